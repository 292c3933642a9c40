"""Uploads on a real S3 server, the whole way: over HTTP into chunks, by the worker into one object, and
out again. `Wire`: between us and the store, so that it can be cut."""

import asyncio
import random
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from hashlib import sha1, sha256
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy
import obstore
import pytest
from bson import ObjectId
from httpx import Response
from obstore.store import from_url
from safetensors.numpy import save

from modelharbor.auth.links import DownloadLinks, secret_key
from modelharbor.db.base import Row, utc_now
from modelharbor.db.jobs import JobKind
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unavailable
from modelharbor.resolvers.jobs import start_verification
from modelharbor.settings import Settings
from modelharbor.storage import blobs
from modelharbor.storage.chunks import CHUNK
from modelharbor.worker.handlers import HANDLERS
from tests.http.serving import codes
from tests.http.uploading import Desk, receiving
from tests.storage.s3 import Swift
from tests.worker.conftest import Hall

pytestmark = pytest.mark.anyio
SIZE = CHUNK + 900_001


@dataclass
class Wire:
    """Leads to the store. Cut, nobody answers there: connections end, and none is taken."""

    host: str
    port: int
    most: int | None = None
    """Bytes of answers after which a connection breaks."""
    taken: int = 0
    """Connections."""
    listening: int = 0
    _server: asyncio.Server | None = None
    _passing: set[asyncio.Task[None]] = field(default_factory=set)

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.listening)
        self.listening = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._passing:
            task.cancel()
        if self._passing:
            await asyncio.wait(self._passing)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.taken += 1
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        back, onwards = await asyncio.open_connection(self.host, self.port)
        try:
            await asyncio.gather(_copied(reader, onwards), _copied(back, writer, self.most))
        except asyncio.CancelledError:
            pass  # asyncio would tell of it
        finally:
            writer.transport.abort()
            onwards.transport.abort()


async def _copied(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None = None
) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65_536 if most is None else min(65_536, most)):
            writer.write(data)
            await writer.drain()
            if most is not None:
                most -= len(data)
        writer.write_eof()


@dataclass
class Pier:
    """A server and a worker whose store is S3."""

    desk: Desk
    hall: Hall
    wire: Wire

    async def lies(self) -> dict[str, int]:
        """All objects of uploads that the store has, without `incoming/`."""
        listed = self.desk.storage.incoming.listed()
        return {left.key.removeprefix("incoming/"): left.size_bytes async for left in listed}

    async def holds(self, upload_id: ObjectId, contents: bytes) -> int:
        """The offset that a client is told: the store has exactly so many bytes of these contents."""
        response = await self.desk.head(upload_id)
        assert response.status_code == 200
        offset = int(response.headers["upload-offset"])
        row = await self.desk.row(upload_id)
        assert row["received_bytes"] == offset
        if row["state"] == "COMPLETED":
            assert await self.desk.file(upload_id) == contents[:offset]
            return offset
        found = b""
        for segment in row["segments"]:
            key, left = segment["key"], segment["size_bytes"]
            for number in range(-(-left // CHUNK)):
                end = min(CHUNK, left - number * CHUNK)
                chunk = f"{key}.{number:08}" if number else key
                found += await self.desk.storage.read_range(chunk, 0, end)
        assert found == contents[:offset]
        return offset

    async def send(self, upload_id: ObjectId, contents: bytes, ends: Sequence[int]) -> None:
        """In requests that end at these bytes."""
        start = int((await self.desk.head(upload_id)).headers["upload-offset"])
        for offset in ends:
            response = await self.desk.patch(upload_id, start, contents[start:offset])
            assert (response.status_code, response.text) == (204, "")
            assert response.headers["upload-offset"] == str(offset)
            start = await self.holds(upload_id, contents)
            assert start == offset

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        async with self.hall.working(HANDLERS):
            yield

    async def ended(self, job: Row | ObjectId) -> Row:
        job_id = job if isinstance(job, ObjectId) else job["_id"]
        return await self.hall.reaches(job_id, "SUCCEEDED", "FAILED", "DEAD", "CANCELLED")

    async def succeeded(self, job: Row | ObjectId) -> Row:
        row = await self.ended(job)
        assert (row["state"], row["error"]) == ("SUCCEEDED", None)
        return row

    async def swept(self) -> Row:
        """Whatever its age: stores tell of whole seconds, some of the one that comes."""
        job = await self.hall.put(JobKind.EXPIRE_UPLOADS, input={"orphan_seconds": -5})
        result: Row = (await self.succeeded(job))["result"]
        return result

    async def blob(self, contents: bytes) -> Row:
        blob = await self.desk.served.database.data["blobs"].find_one(
            {"sha256": sha256(contents).hexdigest()}
        )
        assert blob is not None
        return blob

    async def reserved(self) -> tuple[int, int]:
        quota = await self.desk.served.database.data["quotas"].find_one(
            {"_id": self.desk.model.owner_id}
        )
        assert quota is not None
        return quota["reserved_bytes"], quota["open_uploads"]

    async def told(self, upload_id: ObjectId) -> list[str]:
        events = self.desk.served.database.data["events"].find({"upload_id": upload_id})
        return [row["upload"]["state"] async for row in events.sort("_id")]

    async def download(self, upload_id: ObjectId, path: str, **headers: str) -> Response:
        row = await self.desk.row(upload_id)
        links = DownloadLinks(secret_key(self.desk.settings), self.desk.base)
        link = links.link(row["file_id"], path, 60, held=Permission.WRITE)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(link, headers=named, follow_redirects=True)


@pytest.fixture
async def pier(
    swift: Swift, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pier]:
    place = urlsplit(swift.url)
    assert place.hostname is not None
    assert place.port is not None
    wire = Wire(place.hostname, place.port)
    bucket = swift.make_bucket()
    await wire.mend()
    environment = {
        **swift.environment,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.listening}",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # It gives up at once where the store is down.
    monkeypatch.setattr(blobs, "from_url", partial(from_url, retry_config={"max_retries": 0}))
    given = settings.model_copy(
        update={"storage_url": f"s3://{bucket}/uploads", "lease_seconds": 3.0, "drain_seconds": 0.3}
    )
    async with receiving(given) as desk:
        yield Pier(desk, Hall(desk.served.database, given), wire)
    await wire.cut()


@pytest.fixture(scope="module")
def contents() -> bytes:
    return random.Random(7).randbytes(SIZE)


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A real file of safetensors, of three chunks."""
    numbers = numpy.random.default_rng(3)
    tensors: dict[str, numpy.ndarray[Any, Any]] = {
        "embedding": numbers.random((1600, 1024), dtype=numpy.float32),
        "head": numbers.random((1024, 1025), dtype=numpy.float32).astype(numpy.float16),
        "bias": numbers.random((1025,), dtype=numpy.float32).astype(numpy.float16),
    }
    found: bytes = save(tensors, metadata={"format": "pt"})
    return found


async def test_requests_of_odd_sizes_become_one_object_that_is_understood(
    pier: Pier, weights: bytes
) -> None:
    desk, size = pier.desk, len(weights)
    assert 2 * CHUNK < size < 3 * CHUNK
    digest = sha256(weights).hexdigest()
    upload_id = await desk.create(size, "model.safetensors", digest)
    key = f"{upload_id}/1"
    await pier.send(upload_id, weights, [1, 777_777])
    assert await pier.lies() == {key: 777_777}
    await pier.send(upload_id, weights, [CHUNK, CHUNK + 1])
    assert await pier.lies() == {key: CHUNK, f"{key}.00000001": 1}
    await pier.send(upload_id, weights, [2 * CHUNK + 12_345, size])
    assert await pier.lies() == {
        key: CHUNK,
        f"{key}.00000001": CHUNK,
        f"{key}.00000002": size - 2 * CHUNK,
    }
    row = await desk.row(upload_id)
    assert (row["state"], row["received_bytes"], row["is_open"]) == ("RECEIVED", size, True)

    async with pier.working():
        job = await pier.succeeded(row["job_id"])
    assert job["result"] == {"verdict": "SAFE", "format": "SAFETENSORS", "findings": 0}
    assert [step["name"] for step in job["steps"]] == ["verify", "sniff", "parse", "scan"]
    progress = job["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (size, size, "bytes")
    row = await desk.row(upload_id)
    assert (row["state"], row["sha256"], row["segments"]) == ("COMPLETED", digest, [])
    assert await pier.told(upload_id) == [
        *("CREATED", "UPLOADING", "RECEIVED", "VERIFYING", "COMPLETED"),
    ]
    assert await pier.reserved() == (0, 0)
    blob = await pier.blob(weights)
    assert (blob["key"], blob["stored"], blob["references"]) == (
        f"incoming/{upload_id}/whole",
        True,
        1,
    )
    assert await pier.lies() == {f"{upload_id}/whole": size}
    tensors = blob["inspection"]["tensors"]
    assert (tensors["tensor_count"], tensors["parameter_count"]) == (3, 2_689_025)
    assert tensors["parameters_by_dtype"] == {"F32": 1_638_400, "F16": 1_050_625}
    file = await desk.served.database.data["files"].find_one({"_id": row["file_id"]})
    assert file is not None
    assert (file["format"], file["role"], file["size_bytes"]) == ("SAFETENSORS", "WEIGHTS", size)

    sent = await pier.download(upload_id, "model.safetensors")
    assert (sent.url.port, sent.status_code) == (pier.wire.listening, 200)
    assert sent.content == weights
    part = await pier.download(upload_id, "model.safetensors", range=f"bytes={CHUNK - 3}-{CHUNK}")
    assert (part.url.port, part.status_code) == (pier.wire.listening, 206)
    assert part.content == weights[CHUNK - 3 : CHUNK + 1]
    streamed = await pier.download(upload_id, "model.safetensors", sec_fetch_mode="navigate")
    assert (streamed.url.port, streamed.status_code) == (desk.served.port, 200)
    assert streamed.content == weights


async def test_one_that_died_and_writes_late_harms_nothing(pier: Pier, contents: bytes) -> None:
    desk = pier.desk
    upload_id = await desk.create(SIZE, "model.bin", sha256(contents).hexdigest())
    at = CHUNK + 1000
    await pier.send(upload_id, contents, [at])
    uploads, mine = desk.served.database.data["uploads"], {"_id": upload_id}
    held = {"holder": "another", "held_until": utc_now() + timedelta(minutes=5)}
    await uploads.update_one(mine, {"$set": held, "$inc": {"token": 1}})
    dead = f"incoming/{upload_id}/1"
    async with desk.storage.incoming.writer(dead, at) as late:
        await late.write(b"these were not counted")
        await late.flush()
        response = await desk.patch(upload_id, at, contents[at:])
        assert (response.status_code, codes(response)) == (423, ["LOCKED"])
        assert await pier.holds(upload_id, contents) == at
        await uploads.update_one(mine, {"$set": {"held_until": utc_now() - timedelta(seconds=1)}})
        await pier.send(upload_id, contents, [at + 5, SIZE])
        await late.write(bytes(CHUNK))
        await late.flush()
    row = await desk.row(upload_id)
    assert row["state"] == "RECEIVED"
    other = f"incoming/{upload_id}/3"
    assert row["segments"] == [
        {"key": dead, "size_bytes": at},
        {"key": other, "size_bytes": SIZE - at},
    ]
    async with pier.working():
        await pier.succeeded(row["job_id"])
    assert await pier.lies() == {f"{upload_id}/whole": SIZE}
    assert await desk.file(upload_id) == contents


async def test_what_a_client_sent_before_it_went_is_there(pier: Pier, contents: bytes) -> None:
    desk, at = pier.desk, CHUNK + 70_001
    upload_id = await desk.create(SIZE)
    _, writer = await asyncio.open_connection("127.0.0.1", desk.served.port)
    headers = {"upload-offset": 0, "content-length": SIZE}
    writer.write(desk.request("PATCH", f"/uploads/{upload_id}", **headers) + contents[:at])
    await writer.drain()
    await desk.until(upload_id, received_bytes=at)
    writer.transport.abort()
    await desk.until(upload_id, holder=None)
    assert await pier.holds(upload_id, contents) == at
    assert await pier.lies() == {f"{upload_id}/1": CHUNK, f"{upload_id}/1.00000001": 70_001}


async def test_wrong_bytes_of_a_request_leave_what_was_there(pier: Pier, contents: bytes) -> None:
    desk, at = pier.desk, CHUNK - 10
    upload_id = await desk.create(SIZE)
    await pier.send(upload_id, contents, [at])
    wrong = b64encode(sha1(b"others").digest()).decode()
    response = await desk.patch(
        upload_id, at, contents[at : CHUNK + 99], upload_checksum=f"sha1 {wrong}"
    )
    assert (response.status_code, codes(response)) == (460, ["CHECKSUM_MISMATCH"])
    assert await pier.holds(upload_id, contents) == at
    await pier.send(upload_id, contents, [SIZE])
    assert (await desk.row(upload_id))["state"] == "RECEIVED"


@pytest.mark.parametrize("size", [1000, SIZE])
async def test_other_bytes_than_were_announced_are_removed(
    pier: Pier, contents: bytes, size: int
) -> None:
    desk = pier.desk
    upload_id = await desk.create(size, "model.bin", sha256(b"others").hexdigest())
    response = await desk.patch(upload_id, 0, contents[:size])
    if size <= CHUNK:
        assert (response.status_code, codes(response)) == (460, ["CHECKSUM_MISMATCH"])
    else:  # found when it is put together
        assert response.status_code == 204
        async with pier.working():
            job = await pier.ended((await desk.row(upload_id))["job_id"])
        assert (job["state"], job["error"]["code"]) == ("FAILED", "CHECKSUM_MISMATCH")
    row = await desk.row(upload_id)
    assert (row["state"], row["error"]["code"]) == ("FAILED", "CHECKSUM_MISMATCH")
    assert await pier.lies() == {}
    assert await pier.reserved() == (0, 0)
    data = desk.served.database.data
    assert await data["files"].count_documents({}) == 0
    assert await data["blobs"].count_documents({"stored": True}) == 0
    assert (await desk.head(upload_id)).status_code == 410


async def test_parts_that_came_side_by_side_become_one(pier: Pier, contents: bytes) -> None:
    desk = pier.desk
    upload_id = await desk.create(SIZE, "model.bin", sha256(contents).hexdigest())
    ends = [0, CHUNK + 1, CHUNK + 4, SIZE]

    async def send(start: int, end: int) -> str:
        response = await desk.post(
            upload_metadata=desk.metadata(upload_id),
            upload_length=str(end - start),
            upload_concat="partial",
        )
        assert response.status_code == 201
        part_id = ObjectId(response.headers["location"][-24:])
        middle = (end - start) // 2
        await pier.send(part_id, contents[start:end], [middle, end - start])
        return f"/uploads/{part_id}"

    pairs = pairwise(ends)
    addresses = await asyncio.gather(*(send(start, end) for start, end in pairs))
    assert (await desk.row(upload_id))["received_bytes"] == SIZE
    response = await desk.post(
        upload_metadata=desk.metadata(upload_id), upload_concat=f"final;{' '.join(addresses)}"
    )
    assert response.status_code == 201
    assert len(await pier.lies()) == 4
    response = await desk.head(upload_id)
    assert response.headers["upload-offset"] == str(SIZE)
    row = await desk.row(upload_id)
    assert row["state"] == "RECEIVED"
    async with pier.working():
        await pier.succeeded(row["job_id"])
    assert await desk.file(upload_id) == contents
    assert await pier.lies() == {f"{upload_id}/whole": SIZE}
    assert await pier.reserved() == (0, 0)


async def test_what_fits_in_one_chunk_is_a_file_at_once(pier: Pier, contents: bytes) -> None:
    lie: dict[str, int] = {}
    for size in (1, 100_000, CHUNK):
        upload_id = await pier.desk.create(size, f"{size}.bin")
        await pier.send(upload_id, contents, [size // 3, size] if size > 1 else [1])
        row = await pier.desk.row(upload_id)
        assert row["state"] == "COMPLETED"
        blob = await pier.blob(contents[:size])
        assert (blob["key"], blob["stored"]) == (f"incoming/{upload_id}/1", True)
        lie[f"{upload_id}/1"] = size
        assert await pier.desk.file(upload_id) == contents[:size]
    assert await pier.lies() == lie
    assert await pier.reserved() == (0, 0)
    empty = await pier.desk.create(0, "empty")
    assert (await pier.desk.row(empty))["state"] == "COMPLETED"
    answer = await pier.download(empty, "empty", sec_fetch_mode="navigate")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_nothing_is_left_of_what_is_given_up(pier: Pier, contents: bytes) -> None:
    desk = pier.desk
    given_up = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield contents[: CHUNK + 5]
        await given_up.wait()
        yield contents[CHUNK + 5 :]

    upload_id = await desk.create(SIZE)
    sending = asyncio.create_task(desk.patch(upload_id, 0, body()))
    await desk.until(upload_id, received_bytes=CHUNK + 5)
    assert len(await pier.lies()) == 2
    response = await desk.client.delete(f"/uploads/{upload_id}")
    assert response.status_code == 204
    given_up.set()
    response = await sending
    assert (response.status_code, codes(response)) == (410, ["GONE"])
    assert await pier.lies() == {}
    assert await pier.reserved() == (0, 0)
    assert (await desk.row(upload_id))["state"] == "ABORTED"


async def test_a_flipped_bit_is_found_and_healed_and_the_sweep_leaves_contents_alone(
    pier: Pier, contents: bytes
) -> None:
    desk, data = pier.desk, pier.desk.served.database.data
    many, few = contents[:300_000], contents[:5000]
    first, small = await desk.create(300_000), await desk.create(5000, "few.bin")
    await pier.send(first, many, [300_000])
    await pier.send(small, few, [5000])
    async with pier.working():
        await pier.succeeded((await desk.row(first))["job_id"])
        blob = await pier.blob(many)
        flipped = bytearray(many)
        flipped[200_017] ^= 1
        await obstore.put_async(desk.storage._store, blob["key"], bytes(flipped))
        verifying = await start_verification(desk.served.database, None, all_contents=True)
        assert (await pier.succeeded(verifying))["result"] == {
            "checked": 2,
            "bytes": 305_000,
            "damaged": 1,
        }
        response = await pier.download(first, "model.bin")
        assert (response.status_code, codes(response)) == (404, ["NOT_STORED"])
        assert (await pier.download(small, "few.bin")).content == few

        again = await desk.create(300_000, "again.bin", sha256(many).hexdigest())
        row = await desk.row(again)
        assert row["state"] == "CREATED"  # the hash alone heals nothing
        await pier.send(again, many, [100_000, 300_000])
        row = await desk.row(again)
        assert (row["state"], row["job_id"]) == ("COMPLETED", None)  # it is known what they are
        blob = await pier.blob(many)
        assert (blob["key"], blob["stored"], blob["damaged_at"], blob["references"]) == (
            f"incoming/{again}/1",
            True,
            None,
            2,
        )
        for upload_id, path in ((first, "model.bin"), (again, "again.bin")):
            assert (await pier.download(upload_id, path)).content == many

        # What nobody goes on with, what nobody knows, and what is going on.
        left, whole, going = [await desk.create(SIZE, f"{number}.bin") for number in range(3)]
        await pier.send(left, contents, [CHUNK + 1])
        response = await desk.post(
            contents[:10],
            upload_metadata=desk.metadata(whole),
            upload_length="1000",
            upload_concat="partial",
            content_type="application/offset+octet-stream",
        )
        assert response.status_code == 201
        await pier.send(going, contents, [70_001])
        await obstore.put_async(desk.storage._store, f"incoming/{ObjectId()}/1.00000001", b"x")
        await obstore.put_async(desk.storage._store, f"incoming/{again}/3", b"late")
        assert len(await pier.lies()) == 9
        await data["uploads"].update_many(
            {"_id": {"$in": [left, whole]}}, {"$set": {"expires_at": utc_now()}}
        )
        assert await pier.swept() == {
            "expired": 2,
            "forgotten": 0,
            "objects": 3,
            "bytes": 300_005,
        }
    assert await pier.lies() == {
        f"{again}/1": 300_000,
        f"{small}/1": 5000,
        f"{going}/1": 70_001,
    }
    assert await pier.holds(going, contents) == 70_001
    assert await pier.reserved() == (SIZE, 1)


async def test_a_store_that_is_down_for_a_while_loses_nothing(pier: Pier, contents: bytes) -> None:
    desk, at = pier.desk, CHUNK + 123
    down = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield contents[:at]
        await down.wait()
        yield contents[at:]

    upload_id = await desk.create(SIZE, "model.bin", sha256(contents).hexdigest())
    sending = asyncio.create_task(desk.patch(upload_id, 0, body()))
    await desk.until(upload_id, received_bytes=at)
    await pier.wire.cut()
    down.set()
    response = await sending
    assert (response.status_code, codes(response)) == (503, ["UNAVAILABLE"])
    response = await desk.head(upload_id)
    assert (response.status_code, response.headers["upload-offset"]) == (200, str(at))
    response = await desk.patch(upload_id, at, contents[at:])
    assert (response.status_code, codes(response)) == (503, ["UNAVAILABLE"])

    await pier.wire.mend()
    assert await pier.holds(upload_id, contents) == at
    await pier.send(upload_id, contents, [SIZE])
    row = await desk.row(upload_id)
    assert row["state"] == "RECEIVED"
    await pier.wire.cut()
    async with pier.working():
        retrying = await pier.hall.reaches(row["job_id"], "RETRYING")
        assert retrying["error"]["code"] == "UNAVAILABLE"
        assert (await desk.row(upload_id))["state"] == "VERIFYING"
        await pier.wire.mend()
        await pier.succeeded(row["job_id"])
        assert await pier.lies() == {f"{upload_id}/whole": SIZE}
        await pier.wire.cut()
        response = await pier.download(upload_id, "model.bin")
        assert (response.status_code, codes(response)) == (503, ["UNAVAILABLE"])
        await pier.wire.mend()
    assert (await pier.download(upload_id, "model.bin")).content == contents


async def noticed(storage: blobs.BlobStore, key: str) -> None:
    """Who first uses a connection that was cut is told so: this is no retry of ours."""
    async with asyncio.timeout(30):
        while True:
            with suppress(Unavailable):
                if await storage.exists(key):
                    return
            await asyncio.sleep(0.05)


async def test_answers_that_break_off_are_gone_on_with(pier: Pier, contents: bytes) -> None:
    upload_id = await pier.desk.create(SIZE)
    await pier.send(upload_id, contents, [SIZE])
    async with pier.working():
        await pier.succeeded((await pier.desk.row(upload_id))["job_id"])
    key, storage = f"incoming/{upload_id}/whole", pier.desk.storage
    await pier.wire.cut()
    pier.wire.most, pier.wire.taken = CHUNK, 0
    await pier.wire.mend()
    await noticed(storage, key)
    body = await storage.open_range(key, 7, SIZE - 1)
    assert b"".join([piece async for piece in body]) == contents[7:-1]
    taken = pier.wire.taken
    assert taken > 1
    digest = await storage.incoming.digest(key, SIZE)
    assert digest == sha256(contents).hexdigest()
    assert pier.wire.taken > taken
    # Where nothing comes at all, that is the end.
    await pier.wire.cut()
    pier.wire.most = 100_000
    await pier.wire.mend()
    with pytest.raises(Unavailable):
        await storage.incoming.digest(key, SIZE)
