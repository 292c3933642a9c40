"""Segments: what was flushed stays and goes on, what was not counts for nothing. In each kind of store."""

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from modelharbor.db.uploads import Segment
from modelharbor.errors import InsufficientStorage, NotStored, Unavailable
from modelharbor.settings import Settings
from modelharbor.storage import chunks, folders
from modelharbor.storage.blobs import BlobStore, open_storage

pytestmark = pytest.mark.anyio
KEY = "incoming/0123456789abcdef01234567/1"
OTHER = "incoming/0123456789abcdef01234567/2"
WHOLE = "incoming/0123456789abcdef01234567/whole"
SMALL = 1000  # bytes of a piece, and of a chunk, in these tests


@pytest.fixture(params=["folder", "chunks"])
async def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[BlobStore]:
    monkeypatch.setattr(folders, "PIECE", SMALL)
    monkeypatch.setattr(chunks, "CHUNK", SMALL)
    monkeypatch.setattr(folders, "FIRST", SMALL // 2)
    monkeypatch.setattr(chunks, "SMALL", SMALL // 2)
    url = f"file://{tmp_path}/store" if request.param == "folder" else "memory:///"
    async with open_storage(Settings(data_path=tmp_path, storage_url=url)) as storage:
        yield storage


@pytest.fixture
async def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[BlobStore]:
    monkeypatch.setattr(folders, "PIECE", SMALL)
    url = f"file://{tmp_path}/store"
    async with open_storage(Settings(data_path=tmp_path, storage_url=url)) as storage:
        yield storage


def made(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


async def put(
    storage: BlobStore, key: str, contents: bytes, at: int = 0, *, step: int = 300
) -> Segment:
    """Write it in steps, flushed at the end."""
    async with storage.incoming.writer(key, at) as writer:
        for start in range(0, len(contents), step):
            await writer.write(contents[start : start + step])
        assert await writer.flush() == at + len(contents) == writer.size
    return Segment(key=key, size_bytes=at + len(contents))


async def composed(storage: BlobStore, *segments: Segment) -> bytes:
    size = sum(segment.size_bytes for segment in segments)
    told: list[int] = []
    digest = await storage.incoming.compose(segments, WHOLE, told.append)
    contents = await storage.read_range(WHOLE, 0, size)
    assert sha256(contents).hexdigest() == digest
    assert await storage.incoming.digest(WHOLE, size) == digest
    assert sum(told) == size
    return contents


async def listed(storage: BlobStore) -> dict[str, int]:
    return {left.key: left.size_bytes async for left in storage.incoming.listed()}


@pytest.mark.parametrize("size", [1, SMALL - 1, SMALL, SMALL + 1, 2 * SMALL, 7 * SMALL + 123])
async def test_what_is_written_comes_back(storage: BlobStore, size: int) -> None:
    contents = made(size)
    assert await composed(storage, await put(storage, KEY, contents)) == contents


async def test_the_hasher_has_what_was_flushed(storage: BlobStore) -> None:
    contents, seen = made(5 * SMALL + 7), sha256()
    async with storage.incoming.writer(KEY, 0, seen) as writer:
        for start in range(0, len(contents), 700):
            await writer.write(contents[start : start + 700])
            if start % 1400 == 0:
                size = await writer.flush()
                assert seen.digest() == sha256(contents[:size]).digest()
        assert await writer.flush() == len(contents)
    assert seen.digest() == sha256(contents).digest()
    async with storage.incoming.writer(KEY, len(contents), seen) as writer:
        await writer.write(b"more")
        await writer.flush()
    assert seen.digest() == sha256(contents + b"more").digest()


@pytest.mark.parametrize("at", [1, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, 4 * SMALL - 1])
async def test_the_next_holder_goes_on_and_drops_what_lies_beyond(
    storage: BlobStore, at: int
) -> None:
    contents = made(6 * SMALL)
    await put(storage, KEY, contents[: 4 * SMALL])
    segment = await put(storage, KEY, contents[at : 5 * SMALL + 3], at)
    assert segment.size_bytes == 5 * SMALL + 3
    assert await composed(storage, segment) == contents[: 5 * SMALL + 3]


async def test_other_bytes_after_the_same_beginning(storage: BlobStore) -> None:
    """As after a checksum that was wrong: the offset has not moved, and what follows is different."""
    await put(storage, KEY, b"a" * 2 * SMALL)
    await put(storage, KEY, b"b" * 50, 1500)
    assert await composed(storage, Segment(key=KEY, size_bytes=1550)) == b"a" * 1500 + b"b" * 50


async def test_a_segment_that_begins_again(storage: BlobStore) -> None:
    await put(storage, KEY, made(3 * SMALL))
    assert await composed(storage, await put(storage, KEY, b"short")) == b"short"


async def test_what_was_not_flushed_counts_for_nothing(storage: BlobStore) -> None:
    contents = made(3 * SMALL)
    async with storage.incoming.writer(KEY, 0) as writer:
        await writer.write(contents[:1200])
        assert await writer.flush() == 1200
        await writer.write(b"x" * 1800)
    segment = await put(storage, KEY, contents[1200:], 1200)
    assert await composed(storage, segment) == contents


async def test_a_holder_that_died_leaves_its_segment_and_another_begins_one(
    storage: BlobStore,
) -> None:
    contents = made(5 * SMALL)
    async with storage.incoming.writer(KEY, 0) as dead:
        await dead.write(contents[:2500])
        await dead.flush()
        begun = Segment(key=KEY, size_bytes=2200)  # what it could still tell the database
        rest = await put(storage, OTHER, contents[2200:])
        await dead.write(b"late" * 500)  # it was only slow
        await dead.flush()
    assert await composed(storage, begun, rest) == contents


async def test_flushes_beside_writes(storage: BlobStore) -> None:
    contents = made(40 * SMALL)
    durable: list[int] = []
    async with storage.incoming.writer(KEY, 0, seen := sha256()) as writer:
        flushing = asyncio.create_task(writer.flush())
        for step, start in enumerate(range(0, len(contents), 130)):
            await writer.write(contents[start : start + 130])
            await asyncio.sleep(0)
            if step % 50 == 0:
                durable.append(await flushing)
                flushing = asyncio.create_task(writer.flush())
        durable += [await flushing, await writer.flush()]
    assert durable == sorted(durable)
    assert (len(durable), durable[-1]) == (9, len(contents))
    assert seen.digest() == sha256(contents).digest()
    assert await composed(storage, Segment(key=KEY, size_bytes=len(contents))) == contents


async def test_nothing_written_is_nothing(storage: BlobStore) -> None:
    async with storage.incoming.writer(KEY, 0) as writer:
        assert await writer.flush() == 0
    assert await composed(storage) == b""
    await storage.delete(WHOLE)
    assert await composed(storage, Segment(key=KEY, size_bytes=0)) == b""


# One object of them -----------------------------------------------------------------------------


async def test_segments_become_one_object_again_and_again(storage: BlobStore) -> None:
    contents = made(6 * SMALL)
    segments = [
        await put(storage, KEY, contents[:1700]),
        await put(storage, OTHER, contents[1700:4000]),
        Segment(key="incoming/never/written", size_bytes=0),
        await put(
            storage, "incoming/another/1", contents[4000:]
        ),  # a part, of an upload of its own
    ]
    assert await composed(storage, *segments) == contents
    for segment in segments:
        await storage.incoming.delete(segment.key)
    assert await composed(storage, *segments) == contents
    assert await listed(storage) == {WHOLE: len(contents)}


async def test_one_segment_is_the_object_where_it_can_be(storage: BlobStore) -> None:
    contents = made(SMALL)
    segment = await put(storage, KEY, contents)
    key = storage.incoming.final_key([Segment(key=OTHER, size_bytes=0), segment])
    assert key is not None
    assert await storage.read_range(key, 0, SMALL) == contents
    assert await storage.incoming.digest(key, SMALL) == sha256(contents).hexdigest()
    assert await listed(storage) == {key: SMALL}
    assert storage.incoming.final_key([segment, segment]) is None
    assert storage.incoming.final_key([]) is None
    await storage.delete(key)
    assert await listed(storage) == {}


async def test_missing_bytes_make_no_object(storage: BlobStore) -> None:
    segment = await put(storage, KEY, made(2 * SMALL + 10))
    longer = Segment(key=KEY, size_bytes=segment.size_bytes + 1)
    absent = Segment(key=OTHER, size_bytes=5)
    before = await listed(storage)
    for segments in ([longer], [segment, absent], [absent, segment]):
        with pytest.raises(NotStored):
            await storage.incoming.compose(segments, WHOLE)
    with pytest.raises(NotStored):
        await storage.incoming.digest(WHOLE, 5)
    assert await listed(storage) == before
    await storage.incoming.compose([segment], WHOLE)
    for size in (segment.size_bytes - 1, segment.size_bytes + 1):
        with pytest.raises(NotStored):
            await storage.incoming.digest(WHOLE, size)


async def test_what_the_report_raises_ends_it_and_leaves_nothing(storage: BlobStore) -> None:
    segment = await put(storage, KEY, made(20 * SMALL))
    before = await listed(storage)

    def cancel(count: int) -> None:
        raise ZeroDivisionError("cancelled")

    with pytest.raises(ZeroDivisionError, match="cancelled"):
        await storage.incoming.compose([segment], WHOLE, cancel)
    assert await listed(storage) == before


async def test_who_goes_on_must_find_what_was_there(storage: BlobStore) -> None:
    await put(storage, KEY, made(1500))
    for key, at in ((KEY, 1501), (OTHER, 1)):
        with pytest.raises(NotStored):
            async with storage.incoming.writer(key, at):
                pytest.fail("it is not there")


async def test_deleting_spares_others(storage: BlobStore) -> None:
    await put(storage, KEY, made(2500))
    await put(storage, KEY + "0", made(10))  # a key that begins with the other one
    await storage.incoming.delete(KEY)
    await storage.incoming.delete(KEY)
    assert [key.startswith(KEY + "0") for key in await listed(storage)] == [True]
    async for left in storage.incoming.listed():
        assert left.last_modified.tzinfo is not None


# Disks ------------------------------------------------------------------------------------------


def files(tmp_path: Path) -> dict[str, int]:
    base = tmp_path / "store"
    return {
        str(path.relative_to(base)): path.stat().st_size
        for path in base.rglob("*")
        if path.is_file()
    }


class Disk:
    """Counts what is synced; is full at so many bytes of a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = errno.ENOSPC) -> None:
        self.room: int | None = None
        self.synced: list[str] = []
        pwrite, fsync = os.pwrite, os.fsync

        def write(descriptor: int, data: Any, at: int) -> int:
            if self.room is not None and at + len(data) > self.room:
                if at >= self.room:
                    raise OSError(error, os.strerror(error))
                data = data[: self.room - at]  # as real disks do: short first, the error next
            return pwrite(descriptor, data, at)

        def sync(descriptor: int) -> None:
            self.synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        monkeypatch.setattr(os, "pwrite", write)
        monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_keeps_what_was_flushed_and_takes_more_later(
    folder: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    disk = Disk(monkeypatch, error)
    contents = made(6 * SMALL)
    async with folder.incoming.writer(KEY, 0) as writer:
        await writer.write(contents[:2500])
        assert await writer.flush() == 2500
        disk.room = 3210
        await writer.write(contents[2500:3500])
        for _ in range(2):
            with pytest.raises(InsufficientStorage):
                await writer.flush()
            with pytest.raises(InsufficientStorage):
                await writer.write(b"x")
            with pytest.raises(InsufficientStorage):
                await writer.flush()
    assert files(tmp_path) == {KEY: 2500}
    disk.room = None
    segment = await put(folder, KEY, contents[2500:], 2500)
    assert await composed(folder, segment) == contents


async def test_a_disk_that_is_full_when_it_syncs(
    folder: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with folder.incoming.writer(KEY, 0) as writer:
        await writer.write(b"x" * 10)
        await writer.flush()
        monkeypatch.setattr(os, "fsync", full)
        await writer.write(b"y" * 10)
        with pytest.raises(InsufficientStorage):
            await writer.flush()
    assert files(tmp_path) == {KEY: 10}


async def test_a_full_disk_makes_no_whole(
    folder: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    segments = [await put(folder, key, made(1500)) for key in (KEY, OTHER)]
    disk.room = 2000
    with pytest.raises(InsufficientStorage):
        await folder.incoming.compose(segments, WHOLE)
    assert files(tmp_path) == {KEY: 1500, OTHER: 1500}


async def test_no_room_for_a_folder(folder: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(InsufficientStorage):
        async with folder.incoming.writer(KEY, 0):
            pytest.fail("there is no file")


async def test_a_disk_that_fails_is_unavailable(
    folder: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, errno.EIO).room = 0
    async with folder.incoming.writer(KEY, 0) as writer:
        await writer.write(b"x")
        with pytest.raises(Unavailable):
            await writer.flush()


async def test_files_and_new_folders_are_on_disk_before_a_flush_answers(
    folder: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, store = Disk(monkeypatch), tmp_path / "store"
    upload, whole = str((store / KEY).parent), str(store / WHOLE)
    async with folder.incoming.writer(KEY, 0) as writer:
        await writer.write(b"x")
        await writer.flush()
        assert disk.synced == [str(store / KEY), upload, str(store / "incoming"), str(store)]
        disk.synced.clear()
        await writer.flush()
        assert disk.synced == []  # nothing new
        await writer.write(b"y")
        await writer.flush()
        assert disk.synced == [str(store / KEY)]
    other = await put(folder, OTHER, b"z")
    disk.synced.clear()
    await folder.incoming.compose([Segment(key=KEY, size_bytes=2), other], WHOLE)
    assert disk.synced[0].startswith(f"{whole}.")
    assert disk.synced[-1] == upload  # after it has its name
    assert files(tmp_path)[WHOLE] == 3


@pytest.mark.parametrize("at", [0, 3])
async def test_links_are_not_followed(folder: BlobStore, tmp_path: Path, at: int) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    path = tmp_path / "store" / KEY
    path.parent.mkdir(parents=True)
    path.symlink_to(secret)
    with pytest.raises(Unavailable):
        async with folder.incoming.writer(KEY, at):
            pytest.fail("it is a link")
    for work in (
        folder.incoming.digest(KEY, 6),
        folder.incoming.compose([Segment(key=KEY, size_bytes=6)], WHOLE),
    ):
        with pytest.raises(Unavailable):
            await work
    assert secret.read_bytes() == b"secret"


async def test_who_is_cancelled_leaves_no_file_open(folder: BlobStore, tmp_path: Path) -> None:
    contents = made(3000 * SMALL)

    async def write(number: int) -> None:
        async with folder.incoming.writer(f"incoming/{number}/1", 0) as writer:
            for start in range(0, len(contents), SMALL):
                await writer.write(contents[start : start + SMALL])
                if start % (16 * SMALL) == 0:
                    await writer.flush()

    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        task = asyncio.create_task(write(number))
        await asyncio.sleep(0.002 * (number % 5))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(os.listdir("/proc/self/fd")) == before
    for size in files(tmp_path).values():
        assert size % SMALL == 0  # as far as it was flushed


async def test_the_folder_of_an_upload_goes_with_its_last_file(
    folder: BlobStore, tmp_path: Path
) -> None:
    await put(folder, KEY, b"x")
    await put(folder, OTHER, b"y")
    upload = (tmp_path / "store" / KEY).parent
    await folder.incoming.delete(KEY)
    assert upload.is_dir()
    await folder.delete(OTHER)
    assert not upload.exists()
    assert (tmp_path / "store/incoming").is_dir()


async def test_a_folder_that_another_removes_meanwhile_is_made_again(
    folder: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, removals = Path.mkdir, iter(range(2))

    def made_and_removed(path: Path, *given: Any, **named: Any) -> None:
        mkdir(path, *given, **named)
        if next(removals, None) is not None:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    await put(folder, KEY, b"x")
    assert files(tmp_path) == {KEY: 1}


# Stores of objects ------------------------------------------------------------------------------


async def test_few_chunks_are_in_memory_however_many_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writer has one, and AHEAD more are being put; a writer waits for the store otherwise."""
    monkeypatch.setattr(chunks, "CHUNK", SMALL)
    going = most = 0
    full = asyncio.Event()

    async def slow(store: Any, key: str, data: Any, **named: Any) -> None:
        nonlocal going, most
        going += 1
        most = max(most, going)
        if going == 8:
            full.set()
        await asyncio.sleep(0.01)
        going -= 1

    monkeypatch.setattr(obstore, "put_async", slow)
    storage = BlobStore(MemoryStore())
    written: dict[int, int] = {}

    async def write(number: int) -> None:
        async with storage.incoming.writer(f"incoming/{number}/1", 0) as writer:
            for _ in range(10):
                await writer.write(bytes(SMALL))
                written[number] = writer.size

    await asyncio.gather(*(write(number) for number in range(8)))
    assert full.is_set()
    assert most == 8  # each has only one under way
    assert set(written.values()) == {10 * SMALL}


async def test_a_store_that_fails_is_told_at_the_next_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*given: Any, **named: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(chunks, "CHUNK", SMALL)
    storage = BlobStore(MemoryStore())
    async with storage.incoming.writer(KEY, 0) as writer:
        await writer.write(b"x" * 10)
        await writer.flush()
        monkeypatch.setattr(obstore, "put_async", fail)
        await writer.write(b"x" * (SMALL - 10))
        with pytest.raises(Unavailable):
            await writer.flush()
        with pytest.raises(Unavailable):
            await writer.write(b"x")
    assert await listed(storage) == {KEY: 10}


async def test_a_chunk_that_went_on_ahead_of_the_database_is_read_as_far_as_it_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", SMALL)
    storage = BlobStore(MemoryStore())
    contents = made(2 * SMALL)
    await put(storage, KEY, contents[:1900])
    rest = await put(storage, OTHER, contents[1200:])
    assert await composed(storage, Segment(key=KEY, size_bytes=1200), rest) == contents
