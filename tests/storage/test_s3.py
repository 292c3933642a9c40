"""A real S3 server: what the other tests hold of stores, here of its answers."""

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from modelharbor.db.uploads import Segment
from modelharbor.errors import NotStored
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, digest_key, open_storage
from modelharbor.storage.chunks import CHUNK, PART
from tests.storage.s3 import Swift

pytestmark = pytest.mark.anyio
UPLOAD = "incoming/0123456789abcdef01234567"
KEY, OTHER, WHOLE = f"{UPLOAD}/1", f"{UPLOAD}/2", f"{UPLOAD}/whole"
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def bucket(swift: Swift) -> str:
    return swift.make_bucket()


@pytest.fixture(params=["", "/some/prefix"])
async def storage(
    request: pytest.FixtureRequest,
    swift: Swift,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[BlobStore]:
    for name, value in swift.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{bucket}{request.param}"
    async with open_storage(Settings(data_path=tmp_path, storage_url=url)) as storage:
        yield storage
        async for left in storage.incoming.listed():
            await storage.delete(left.key)


@pytest.fixture(scope="module")
def contents() -> bytes:
    return random.Random(1).randbytes(PART + CHUNK + 12_345)


async def put(storage: BlobStore, key: str, contents: bytes, at: int = 0) -> Segment:
    async with storage.incoming.writer(key, at) as writer:
        for start in range(0, len(contents), MEGABYTE):
            await writer.write(contents[start : start + MEGABYTE])
        assert await writer.flush() == at + len(contents)
    return Segment(key=key, size_bytes=at + len(contents))


async def listed(storage: BlobStore) -> dict[str, int]:
    return {left.key: left.size_bytes async for left in storage.incoming.listed()}


async def test_an_upload_of_two_holders_becomes_one_object(
    storage: BlobStore, contents: bytes
) -> None:
    began = datetime.now(UTC)
    at = CHUNK + 1_000_000
    dead = await put(storage, KEY, contents[: at + 5])  # of which the database knows less
    rest = await put(storage, OTHER, contents[at : at + 70_000])
    rest = await put(storage, OTHER, contents[at + 70_000 :], 70_000)
    dead.size_bytes = at
    told: list[int] = []
    digest = await storage.incoming.compose([dead, rest], WHOLE, told.append)
    assert digest == sha256(contents).hexdigest()
    assert sum(told) == len(contents)
    for start, end in [(0, 10), (PART - 5, PART + 5), (at - 1, at + 1), (0, len(contents))]:
        assert await storage.read_range(WHOLE, start, end) == contents[start:end]
    body = b"".join([part async for part in await storage.open_range(WHOLE, 7, PART + 7)])
    assert body == contents[7 : PART + 7]
    assert await storage.incoming.digest(WHOLE, len(contents)) == digest
    for segment in (dead, rest):
        await storage.incoming.delete(segment.key)
    assert await storage.incoming.compose([dead, rest], WHOLE) == digest
    async for left in storage.incoming.listed():
        assert (left.key, left.size_bytes) == (WHOLE, len(contents))
        assert abs(left.last_modified - began) < timedelta(minutes=5)
    with pytest.raises(NotStored):
        await storage.read_range(WHOLE, 0, len(contents) + 1)
    await storage.delete(WHOLE)
    await storage.delete(WHOLE)
    assert not await storage.exists(WHOLE)
    with pytest.raises(NotStored):
        await storage.open_range(WHOLE, 0, 1)


async def test_a_small_upload_is_one_object_at_once(storage: BlobStore) -> None:
    segment = await put(storage, KEY, b"some bytes")
    segment = await put(storage, KEY, b" and more", segment.size_bytes)
    key = storage.incoming.final_key([segment])
    assert key is not None
    assert await listed(storage) == {key: 19}
    assert await storage.read_range(key, 0, 19) == b"some bytes and more"
    assert await storage.incoming.digest(key, 19) == sha256(b"some bytes and more").hexdigest()


async def test_a_segment_goes_with_all_its_chunks(storage: BlobStore, contents: bytes) -> None:
    await put(storage, KEY, contents)
    await put(storage, f"{KEY}0", b"x")
    assert len(await listed(storage)) == 5
    for _ in range(2):
        await storage.incoming.delete(KEY)
    assert await listed(storage) == {f"{KEY}0": 1}


async def test_missing_chunks_make_no_object(storage: BlobStore, contents: bytes) -> None:
    segment = await put(storage, KEY, contents)
    await storage.delete(f"{KEY}.00000002")
    with pytest.raises(NotStored):
        await storage.incoming.compose([segment], WHOLE)
    assert not await storage.exists(WHOLE)


async def test_contents_by_hash(storage: BlobStore, tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "weights"
    for some in (b"few", contents):
        path.write_bytes(some)
        digest = sha256(some).hexdigest()
        key = digest_key(digest)
        await storage.put_file(path, digest)
        assert await storage.exists(key)
        assert await storage.read_range(key, 0, len(some)) == some
        await storage.delete(key)
        assert not await storage.exists(key)


async def test_a_presigned_address_is_good_for_one_object(
    storage: BlobStore, contents: bytes
) -> None:
    segments = [await put(storage, KEY, contents[:PART]), await put(storage, OTHER, b"secret")]
    await storage.incoming.compose(segments, WHOLE)
    url = await storage.presigned(WHOLE, timedelta(minutes=1))
    assert url is not None
    async with httpx.AsyncClient() as client:
        answer = await client.get(url)
        assert (answer.status_code, answer.content) == (200, contents[:PART] + b"secret")
        assert answer.headers["content-disposition"] == "attachment"
        assert answer.headers["content-type"] == "application/octet-stream"
        part = await client.get(url, headers={"range": "bytes=1-3"})
        assert (part.status_code, part.content) == (206, contents[1:4])
        last = "1" if url.endswith("0") else "0"
        for tampered in (
            url[:-1] + last,
            url.replace("/whole?", "/2?"),
            url.replace("Expires=60", "Expires=6000"),
        ):
            assert tampered != url
            assert (await client.get(tampered)).status_code == 403
        assert (await client.get(url.partition("?")[0])).status_code == 400
        assert (await client.put(url, content=b"x")).status_code == 403


# Bytes above idle, of a process of its own: what others have freed in this one would count for nothing.
MEMORY = """
import asyncio, os, psutil, sys
from pathlib import Path
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage

async def main():
    most, mine, block = 0, psutil.Process(), os.urandom(65536)
    async with open_storage(Settings(storage_url=sys.argv[1])) as storage:

        async def write(number, size):
            nonlocal most
            async with storage.incoming.writer(f"incoming/{number}/1", 0) as writer:
                for at in range(0, size, len(block)):
                    await writer.write(block)
                    if at % (8 << 20) == 0:
                        await writer.flush()
                    most = max(most, mine.memory_info().rss)
                await writer.flush()
            await storage.incoming.delete(f"incoming/{number}/1")

        await write("first", 65536)
        idle = mine.memory_info().rss
        most = 0
        await asyncio.gather(*(write(number, 24 << 20) for number in range(8)))
        print(most - idle)

asyncio.run(main())
"""


async def test_memory_of_eight_uploads_is_bounded(
    swift: Swift, bucket: str, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MEMORY, f"s3://{bucket}/memory"),
        env=swift.environment,
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert int(output) < 64_000_000
