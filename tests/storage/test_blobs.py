"""Contents by hash: whole or not at all, whoever writes at once."""

import asyncio
import random
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import pytest

from modelharbor.errors import NotStored, Unavailable
from modelharbor.settings import Settings
from modelharbor.storage.blobs import (
    PART,
    SMALL,
    BlobStore,
    ContentChanged,
    digest_key,
    open_storage,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def storage(data_path: Path) -> AsyncIterator[BlobStore]:
    async with open_storage(Settings(data_path=data_path)) as storage:
        yield storage


def made(path: Path, contents: bytes) -> tuple[Path, str]:
    path.write_bytes(contents)
    return path, sha256(contents).hexdigest()


def stored(data_path: Path) -> list[str]:
    """Every file below the store's folder, also those with other than final names."""
    folder = data_path / "blobs"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


async def read(storage: BlobStore, digest: str, start: int, end: int) -> bytes:
    return b"".join(
        [part async for part in await storage.open_range(digest_key(digest), start, end)]
    )


async def test_contents_come_back_whole_and_in_ranges(
    storage: BlobStore, data_path: Path, tmp_path: Path
) -> None:
    contents = random.Random(1).randbytes(2 * PART + 12_345)
    path, digest = made(tmp_path / "weights", contents)
    reported: list[int] = []

    assert not await storage.exists(digest_key(digest))
    await storage.put_file(path, digest, reported.append)

    assert await storage.exists(digest_key(digest))
    assert stored(data_path) == [f"sha256/{digest[:2]}/{digest[2:4]}/{digest}"]
    assert reported == [PART, PART, 12_345]
    assert await read(storage, digest, 0, len(contents)) == contents
    for start, end in [(0, 1), (PART - 1, PART + 1), (len(contents) - 3, len(contents)), (7, 7)]:
        assert await read(storage, digest, start, end) == contents[start:end]


async def test_empty_contents(storage: BlobStore, tmp_path: Path) -> None:
    path, digest = made(tmp_path / "empty", b"")
    await storage.put_file(path, digest)
    assert await read(storage, digest, 0, 0) == b""


async def test_many_at_once_put_the_same_and_one_whole_blob_is_there(
    data_path: Path, tmp_path: Path
) -> None:
    contents = random.Random(2).randbytes(PART + 1)
    path, digest = made(tmp_path / "weights", contents)
    settings = Settings(data_path=data_path)
    async with open_storage(settings) as one, open_storage(settings) as other:
        await asyncio.gather(*(store.put_file(path, digest) for store in [one, other] * 4))
        assert await read(other, digest, 0, len(contents)) == contents
    assert stored(data_path) == [f"sha256/{digest[:2]}/{digest[2:4]}/{digest}"]


async def test_a_file_that_changed_is_not_stored_under_the_announced_hash(
    storage: BlobStore, data_path: Path, tmp_path: Path
) -> None:
    path, digest = made(tmp_path / "weights", bytes(PART + 1))
    path.write_bytes(bytes(PART) + b"x")
    with pytest.raises(ContentChanged, match="weights changed while it was read"):
        await storage.put_file(path, digest)
    assert not await storage.exists(digest_key(digest))
    assert stored(data_path) == []


async def test_a_read_that_fails_midway_leaves_nothing(
    storage: BlobStore, data_path: Path, tmp_path: Path
) -> None:
    path, digest = made(tmp_path / "weights", bytes(3 * PART))

    def fail(count: int) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        await storage.put_file(path, digest, fail)
    assert stored(data_path) == []


async def test_absent_contents_are_coded_before_the_first_byte(storage: BlobStore) -> None:
    for start, end in [(0, 10), (0, 0)]:
        with pytest.raises(NotStored):
            await storage.open_range(digest_key("0" * 64), start, end)


async def test_damaged_contents_are_not_served_as_whole(
    storage: BlobStore, data_path: Path, tmp_path: Path
) -> None:
    path, digest = made(tmp_path / "weights", b"0123456789")
    await storage.put_file(path, digest)
    (data_path / "blobs" / stored(data_path)[0]).write_bytes(b"01234")
    with pytest.raises(NotStored, match="not whole"):
        await storage.open_range(digest_key(digest), 0, 10)


async def test_a_store_that_fails_is_unavailable(storage: BlobStore, data_path: Path) -> None:
    (data_path / "blobs/sha256").write_text("a file stands where the folder was")
    for end in (0, 10):
        with pytest.raises(Unavailable):
            await storage.open_range(digest_key("0" * 64), 0, end)
    with pytest.raises(Unavailable):
        await storage.exists(digest_key("0" * 64))


@pytest.mark.parametrize("size", [10, SMALL, SMALL + 1])
async def test_sizes_around_what_is_put_in_one_go(
    storage: BlobStore, data_path: Path, tmp_path: Path, size: int
) -> None:
    path, digest = made(tmp_path / "weights", b"x" * size)
    reported: list[int] = []
    await storage.put_file(path, digest, reported.append)
    assert reported == [size]
    assert await read(storage, digest, 0, size) == b"x" * size
    path.write_bytes(b"y" * size)
    other = sha256(b"z" * size).hexdigest()
    with pytest.raises(ContentChanged):
        await storage.put_file(path, other)
    assert len(stored(data_path)) == 1


async def test_deleting_twice_is_as_good_as_once(
    storage: BlobStore, data_path: Path, tmp_path: Path
) -> None:
    path, digest = made(tmp_path / "weights", b"x")
    await storage.put_file(path, digest)
    await storage.delete(digest_key(digest))
    await storage.delete(digest_key(digest))
    assert stored(data_path) == []


async def test_check_leaves_nothing_behind(storage: BlobStore, data_path: Path) -> None:
    await storage.check()
    assert stored(data_path) == []


async def test_check_says_when_nothing_can_be_written(storage: BlobStore, data_path: Path) -> None:
    folder = data_path / "blobs"
    folder.rmdir()
    folder.write_text("a file stands where the folder was")
    with pytest.raises(Exception, match="Not a directory"):
        await storage.check()


async def test_storage_url_of_a_folder(tmp_path: Path) -> None:
    path, digest = made(tmp_path / "weights", b"contents")
    url = f"file://{tmp_path}/elsewhere"
    async with open_storage(Settings(data_path=tmp_path / "data", storage_url=url)) as storage:
        await storage.put_file(path, digest)
        assert await read(storage, digest, 0, 8) == b"contents"
    assert (tmp_path / "elsewhere/sha256" / digest[:2] / digest[2:4] / digest).is_file()
    assert not (tmp_path / "data").exists()
