"""tus over HTTP: what is taken, what is refused, and that nothing wrong is ever kept."""

import asyncio
import hashlib
import random
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from bson import ObjectId
from httpx import AsyncClient, Response

from modelharbor.errors import BadRequest, InsufficientStorage
from modelharbor.http import uploads
from modelharbor.http.uploads import LINGER_BYTES, MOST_PARTS, part_id, read_metadata
from modelharbor.resolvers.uploads import expire_uploads, pause_upload
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from modelharbor.storage.incoming import SegmentWriter
from tests.http.serving import codes
from tests.http.uploading import GUARD_SECONDS, MEDIA, Desk, encoded, receiving

pytestmark = pytest.mark.anyio
BYTES = random.Random(5).randbytes(300_000)
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
async def desk(settings: Settings) -> AsyncIterator[Desk]:
    async with receiving(settings) as desk:
        yield desk


async def pieces(body: bytes, size: int = 50_000) -> AsyncIterator[bytes]:
    """Without a length: httpx sends it in chunks."""
    for start in range(0, len(body), size):
        yield body[start : start + size]


@asynccontextmanager
async def connected(
    desk: Desk,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", desk.served.port)
    try:
        async with asyncio.timeout(GUARD_SECONDS):
            yield reader, writer
    finally:
        writer.transport.abort()


async def untouched(desk: Desk, upload_id: ObjectId) -> None:
    row = await desk.row(upload_id)
    assert (row["state"], row["received_bytes"], row["segments"]) == ("CREATED", 0, [])


# ---- what it can


async def test_options_say_what_it_can_without_version_and_token(desk: Desk) -> None:
    async with AsyncClient(base_url=desk.base) as nobody:
        for path in ("/uploads", "/uploads/", f"/uploads/{ObjectId()}"):
            response = await nobody.options(path)
            assert response.status_code == 204
            found = {
                name: value for name, value in response.headers.items() if name.startswith("tus-")
            }
            assert found == {
                "tus-resumable": "1.0.0",
                "tus-version": "1.0.0",
                "tus-extension": "creation,creation-with-upload,expiration,checksum,termination,concatenation",
                "tus-max-size": "1099511627776",
                "tus-checksum-algorithm": "sha1,sha256",
            }


async def test_an_upload_in_three_requests(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES), "weights/model.bin", DIGEST)
    response = await desk.post(
        upload_metadata=f"{desk.metadata(upload_id)},filename {encoded('x')},private",
        upload_length=str(len(BYTES)),
    )
    assert (response.status_code, response.content) == (201, b"")
    assert response.headers["location"] == f"/uploads/{upload_id}"
    row = await desk.row(upload_id)
    expires = row["expires_at"].replace(tzinfo=UTC, microsecond=0)
    assert parsedate_to_datetime(response.headers["upload-expires"]) == expires
    await untouched(desk, upload_id)

    response = await desk.patch(upload_id, 0, BYTES[:100_000])
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["upload-offset"] == "100000"
    assert response.headers["tus-resumable"] == "1.0.0"
    assert "upload-expires" in response.headers
    response = await desk.head(upload_id)
    assert response.status_code == 200
    assert {
        name: response.headers[name]
        for name in ("upload-offset", "upload-length", "upload-metadata", "cache-control")
    } == {
        "upload-offset": "100000",
        "upload-length": "300000",
        "upload-metadata": f"{desk.metadata(upload_id)},filename {encoded('weights/model.bin')}",
        "cache-control": "no-store",
    }
    assert "upload-expires" in response.headers
    assert "upload-concat" not in response.headers

    response = await desk.patch(upload_id, 100_000, pieces(BYTES[100_000:]))
    assert (response.status_code, response.headers["upload-offset"]) == (204, "300000")
    assert "upload-expires" not in response.headers
    row = await desk.row(upload_id)
    assert (row["state"], row["received_bytes"], row["is_open"]) == ("COMPLETED", 300_000, False)
    assert await desk.file(upload_id) == BYTES
    response = await desk.head(upload_id)
    assert (response.status_code, response.headers["upload-offset"]) == (200, "300000")


async def test_creation_takes_the_first_bytes(desk: Desk) -> None:
    for path, sent in (("part", 1000), ("whole", len(BYTES))):
        upload_id = await desk.create(len(BYTES), path)
        response = await desk.post(
            BYTES[:sent],
            upload_metadata=desk.metadata(upload_id),
            upload_length=str(len(BYTES)),
            content_type=MEDIA,
        )
        assert (response.status_code, response.headers["upload-offset"]) == (201, str(sent))
        assert response.headers["location"] == f"/uploads/{upload_id}"
    assert await desk.file(upload_id) == BYTES


async def test_an_empty_file_is_there_once_it_is_created(desk: Desk) -> None:
    upload_id = await desk.create(0)
    created = {"upload_metadata": desk.metadata(upload_id), "upload_length": "0"}
    assert (await desk.post(**created)).status_code == 201
    assert await desk.file(upload_id) == b""
    assert (await desk.post(**created)).status_code == 201


async def test_the_address_is_the_public_one(settings: Settings) -> None:
    public = settings.model_copy(update={"public_url": "https://harbor.example/here/"})
    async with receiving(public) as desk:
        upload_id = await desk.create(3)
        response = await desk.post(upload_metadata=desk.metadata(upload_id), upload_length="3")
        assert response.headers["location"] == f"https://harbor.example/here/uploads/{upload_id}"


async def test_the_method_may_stand_in_a_header(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    url = f"/uploads/{upload_id}"
    headers = {"x-http-method-override": "PATCH", "upload-offset": "0", "content-type": MEDIA}
    response = await desk.client.post(url, content=BYTES[:10], headers=headers)
    assert (response.status_code, response.headers["upload-offset"]) == (204, "10")
    response = await desk.client.get(url, headers={"x-http-method-override": "HEAD"})
    assert (response.status_code, response.headers["upload-offset"]) == (200, "10")
    response = await desk.client.post(url, headers={"x-http-method-override": "DELETE"})
    assert response.status_code == 204
    assert (await desk.head(upload_id)).status_code == 410


# ---- what it refuses, before anything is read


async def refused(
    desk: Desk, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> Response:
    named = {name: value for name, value in headers.items() if value != "-"}
    request = desk.client.build_request(method, path, content=body, headers=named)
    for name, value in headers.items():
        if value == "-":
            request.headers.pop(name, None)
    return await desk.client.send(request)


GOOD = {"upload-offset": "0", "content-type": MEDIA}
ONE = {"upload-length": "10"}
PATCHES: dict[str, tuple[dict[str, str], int, str]] = {
    "wrong offset": (GOOD | {"upload-offset": "5"}, 409, "CONFLICT"),
    "huge offset": (GOOD | {"upload-offset": "9" * 5000}, 409, "CONFLICT"),
    "no offset": ({"content-type": MEDIA}, 400, "BAD_REQUEST"),
    "negative offset": (GOOD | {"upload-offset": "-1"}, 400, "BAD_REQUEST"),
    "signed offset": (GOOD | {"upload-offset": "+0"}, 400, "BAD_REQUEST"),
    "hexadecimal offset": (GOOD | {"upload-offset": "0x0"}, 400, "BAD_REQUEST"),
    "wrong media type": (GOOD | {"content-type": "text/plain"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    "no media type": ({"upload-offset": "0"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    "compressed": (GOOD | {"content-encoding": "gzip"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    "wrong checksum": (GOOD | {"upload-checksum": "sha1 AAAA"}, 460, "CHECKSUM_MISMATCH"),
    "unknown checksum": (GOOD | {"upload-checksum": "md9 AAAA"}, 400, "BAD_REQUEST"),
    "checksum without digest": (GOOD | {"upload-checksum": "sha1"}, 460, "CHECKSUM_MISMATCH"),
    "checksum in garbage": (GOOD | {"upload-checksum": "sha1 !!!!"}, 400, "BAD_REQUEST"),
    "old version": (GOOD | {"tus-resumable": "0.2.2"}, 412, "PRECONDITION_FAILED"),
    "no version": (GOOD | {"tus-resumable": "-"}, 412, "PRECONDITION_FAILED"),
    "no token": (GOOD | {"authorization": "-"}, 401, "UNAUTHENTICATED"),
    "bad token": (GOOD | {"authorization": "Bearer mh_x"}, 401, "UNAUTHENTICATED"),
    "unknown method": (GOOD | {"x-http-method-override": "patch"}, 405, "METHOD_NOT_ALLOWED"),
}


async def test_a_refused_patch_changes_nothing(desk: Desk) -> None:
    upload_id = await desk.create(10)
    for name, (headers, status, code) in PATCHES.items():
        response = await refused(desk, "PATCH", f"/uploads/{upload_id}", b"x", headers)
        assert (name, response.status_code, codes(response)) == (name, status, [code])
        assert response.headers["tus-resumable"] == "1.0.0"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers.get("tus-version") == ("1.0.0" if status == 412 else None)
        assert response.json()["errors"][0]["extensions"]["requestId"]
        await untouched(desk, upload_id)
    assert not await incoming(desk)


async def test_a_body_of_another_coding_is_refused(desk: Desk) -> None:
    upload_id = await desk.create(10)
    async with connected(desk) as (reader, writer):
        given = {"upload_offset": 0, "transfer_encoding": "gzip, chunked"}
        request = desk.request("PATCH", f"/uploads/{upload_id}", **given)
        writer.write(request + b"1\r\nx\r\n0\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 415 ")
    await untouched(desk, upload_id)


CREATIONS: dict[str, tuple[dict[str, str], int, str]] = {
    "too large": ({"upload-length": "9223372036854775807"}, 413, "PAYLOAD_TOO_LARGE"),
    "beyond numbers": ({"upload-length": "9" * 5000}, 413, "PAYLOAD_TOO_LARGE"),
    "negative": ({"upload-length": "-1"}, 400, "BAD_REQUEST"),
    "garbage": ({"upload-length": "1e3"}, 400, "BAD_REQUEST"),
    "other digits": ({"upload-length": "\u00b2"}, 400, "BAD_REQUEST"),
    "no length": ({}, 400, "BAD_REQUEST"),
    "no metadata": (ONE, 400, "BAD_REQUEST"),
    "other metadata": (ONE | {"upload-metadata": "filename YQ=="}, 400, "BAD_REQUEST"),
    "no base64": (ONE | {"upload-metadata": "upload a"}, 400, "BAD_REQUEST"),
    "long metadata": (ONE | {"upload-metadata": f"upload {'A' * 4096}"}, 400, "BAD_REQUEST"),
    "no id": (ONE | {"upload-metadata": "upload YQ=="}, 404, "NOT_FOUND"),
    "unknown id": (
        ONE | {"upload-metadata": f"upload {encoded(global_id('Upload', ObjectId()))}"},
        404,
        "NOT_FOUND",
    ),
    "deferred": ({"upload-defer-length": "1", "upload-metadata": "GOOD"}, 400, "BAD_REQUEST"),
    "other length": ({"upload-length": "11", "upload-metadata": "GOOD"}, 400, "BAD_REQUEST"),
    "unknown concat": (ONE | {"upload-concat": "whole", "upload-metadata": "GOOD"}, 400, "BAD_REQUEST"),
    "final with length": (
        ONE | {"upload-concat": "final;/uploads/x", "upload-metadata": "GOOD"},
        400,
        "BAD_REQUEST",
    ),
    "version": (ONE | {"tus-resumable": "1.0.1", "upload-metadata": "GOOD"}, 412, "PRECONDITION_FAILED"),
    "no token": (ONE | {"authorization": "-", "upload-metadata": "GOOD"}, 401, "UNAUTHENTICATED"),
}  # fmt: skip


async def test_a_refused_creation_changes_nothing(desk: Desk) -> None:
    upload_id = await desk.create(10)
    good = desk.metadata(upload_id)
    for name, (given, status, code) in CREATIONS.items():
        headers = {key: good if value == "GOOD" else value for key, value in given.items()}
        raw: Any = {key: value.encode("latin-1") for key, value in headers.items() if value != "-"}
        for body, more in ((None, {}), (b"x", {"content-type": MEDIA})):
            request = desk.client.build_request(
                "POST", "/uploads", content=body, headers=raw | more
            )
            if headers.get("authorization") == "-":
                del request.headers["authorization"]
            response = await desk.client.send(request)
            assert (name, response.status_code, codes(response)) == (name, status, [code])
    await untouched(desk, upload_id)
    text = {"upload_metadata": good, "upload_length": "10"}
    assert (await desk.post(b"x", content_type="text/plain", **text)).status_code == 415
    for concat in ({}, {"upload_concat": "partial"}):
        response = await desk.post(b"x" * 11, content_type=MEDIA, **text, **concat)
        assert (response.status_code, codes(response)) == (413, ["PAYLOAD_TOO_LARGE"])
    await untouched(desk, upload_id)
    assert await desk.served.database.data["uploads"].count_documents({}) == 1
    assert not await incoming(desk)


async def test_other_methods_and_addresses(desk: Desk) -> None:
    upload_id = await desk.create(10)
    response = await desk.client.get(f"/uploads/{upload_id}")
    assert (response.status_code, codes(response)) == (405, ["METHOD_NOT_ALLOWED"])
    assert response.headers["allow"] == "HEAD, PATCH, DELETE, OPTIONS"
    response = await desk.client.put("/uploads")
    assert (response.status_code, response.headers["allow"]) == (405, "POST, OPTIONS")
    messages = set()
    for address in (ObjectId(), "x", f"{upload_id}0", "%00", "..%2f" * 3):
        response = await desk.client.patch(f"/uploads/{address}", headers=GOOD)
        assert (response.status_code, codes(response)) == (404, ["NOT_FOUND"])
        messages.add(response.json()["errors"][0]["message"])
    assert len(messages) <= 2  # an address with a slash is nothing at all


async def test_uploads_of_others_are_not_there(desk: Desk) -> None:
    upload_id = await desk.create(10)
    token = await desk.served.another_token("eve")
    eve = replace(desk, client=desk.client)
    async with AsyncClient(
        base_url=desk.base,
        headers={"authorization": f"Bearer {token}", "tus-resumable": "1.0.0"},
    ) as client:
        eve = replace(desk, client=client)
        named = {"upload_metadata": desk.metadata(upload_id), "upload_length": "10"}
        answers = [
            await eve.patch(upload_id, 0, b"x" * 10),
            await client.delete(f"/uploads/{upload_id}"),
            await eve.post(**named),
            await eve.post(b"x", content_type=MEDIA, **named),
            await eve.post(upload_concat="partial", **named),
            await eve.post(
                upload_concat=f"final;/uploads/{upload_id}",
                upload_metadata=named["upload_metadata"],
            ),
            await eve.patch(ObjectId(), 0, b"x" * 10),
        ]
        assert [answer.status_code for answer in answers] == [404] * 7
        [message] = {answer.json()["errors"][0]["message"] for answer in answers}
        assert message == "There is no such upload."
        assert (await eve.head(upload_id)).status_code == 404
    await untouched(desk, upload_id)


async def incoming(desk: Desk) -> list[str]:
    """Keys of all bytes that lie there."""
    return [left.key async for left in desk.storage.incoming.listed()]


# ---- checksums and lengths


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
async def test_a_piece_with_a_wrong_checksum_is_dropped(desk: Desk, algorithm: str) -> None:
    upload_id = await desk.create(len(BYTES))

    def checksum(piece: bytes) -> str:
        return f"{algorithm} {b64encode(hashlib.new(algorithm, piece).digest()).decode()}"

    first, second = BYTES[:200_000], BYTES[200_000:]
    assert (
        await desk.patch(upload_id, 0, first, upload_checksum=checksum(first))
    ).status_code == 204
    for body in (second, pieces(second)):
        response = await desk.patch(upload_id, 200_000, body, upload_checksum=checksum(first))
        assert (response.status_code, codes(response)) == (460, ["CHECKSUM_MISMATCH"])
        assert (await desk.row(upload_id))["received_bytes"] == 200_000
    response = await desk.patch(upload_id, 200_000, second, upload_checksum=checksum(second))
    assert response.status_code == 204
    assert await desk.file(upload_id) == BYTES


async def test_nothing_beyond_the_length_is_stored(desk: Desk) -> None:
    upload_id = await desk.create(1000)
    response = await desk.patch(upload_id, 0, BYTES[:1001])
    assert (response.status_code, codes(response)) == (413, ["PAYLOAD_TOO_LARGE"])
    await untouched(desk, upload_id)  # it was known before
    response = await desk.patch(upload_id, 0, pieces(BYTES[:200_000], 600))
    assert (response.status_code, codes(response)) == (413, ["PAYLOAD_TOO_LARGE"])
    row = await desk.row(upload_id)
    assert row["received_bytes"] <= 1000
    assert row["state"] != "COMPLETED"
    lying = [left.size_bytes async for left in desk.storage.incoming.listed()]
    assert sum(lying) <= 1000
    at = row["received_bytes"]
    assert (await desk.patch(upload_id, at, BYTES[at:1000])).status_code == 204
    assert await desk.file(upload_id) == BYTES[:1000]


async def test_contents_that_are_not_those_announced_fail(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES), declared="a" * 64)
    response = await desk.patch(upload_id, 0, BYTES)
    assert (response.status_code, codes(response)) == (460, ["CHECKSUM_MISMATCH"])
    row = await desk.row(upload_id)
    assert (row["state"], row["error"]["code"]) == ("FAILED", "CHECKSUM_MISMATCH")
    assert (await desk.head(upload_id)).status_code == 410
    assert (await desk.patch(upload_id, 0, BYTES)).status_code == 410
    data = desk.served.database.data
    assert await data["files"].count_documents({}) == 0
    assert await data["blobs"].count_documents({"stored": True}) == 0
    assert not await incoming(desk)


# ---- what ended


async def test_what_was_terminated_is_gone(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    await desk.patch(upload_id, 0, BYTES[:1000])
    assert len(await incoming(desk)) == 1
    response = await desk.client.delete(f"/uploads/{upload_id}")
    assert (response.status_code, response.content) == (204, b"")
    assert (await desk.row(upload_id))["state"] == "ABORTED"
    assert not await incoming(desk)
    response = await desk.patch(upload_id, 1000, BYTES[1000:])
    assert (response.status_code, codes(response)) == (410, ["GONE"])
    for response in (
        await desk.head(upload_id),
        await desk.client.delete(f"/uploads/{upload_id}"),
        await desk.post(upload_metadata=desk.metadata(upload_id), upload_length=str(len(BYTES))),
    ):
        assert response.status_code == 410


async def test_what_expired_is_gone(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    await desk.patch(upload_id, 0, BYTES[:1000])
    past = datetime.now(UTC) - timedelta(seconds=1)
    uploads = desk.served.database.data["uploads"]
    await uploads.update_one({"_id": upload_id}, {"$set": {"expires_at": past}})
    swept = await expire_uploads(desk.served.database, desk.storage, datetime.now(UTC))
    assert [row["_id"] for row in swept] == [upload_id]
    assert (await desk.head(upload_id)).status_code == 410
    assert (await desk.patch(upload_id, 1000, BYTES[1000:])).status_code == 410
    assert not await incoming(desk)


async def test_finished_twice_is_the_same(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    assert (await desk.patch(upload_id, 0, BYTES)).status_code == 204
    response = await desk.patch(upload_id, 0, BYTES)
    assert (response.status_code, codes(response)) == (409, ["CONFLICT"])
    response = await desk.patch(upload_id, len(BYTES), b"x")
    assert response.status_code == 413
    assert await desk.served.database.data["files"].count_documents({}) == 1


# ---- connections that end, and more than one at once


async def test_a_cut_connection_keeps_what_came(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    path = f"/uploads/{upload_id}"
    sent = 0
    for size in (120_000, 90_000):
        async with connected(desk) as (_, writer):
            left = len(BYTES) - sent
            writer.write(
                desk.request("PATCH", path, upload_offset=sent, content_length=left)
                + BYTES[sent : sent + size]
            )
            await writer.drain()
            # Before, all of it has to be there, else it is lost with the connection.
            await desk.until(upload_id, received_bytes=sent + size)
        row = await desk.until(upload_id, holder=None)
        sent += size
        assert row["received_bytes"] == sent
        assert (await desk.head(upload_id)).headers["upload-offset"] == str(sent)
    assert await desk.received(upload_id) == BYTES[:sent]
    assert (await desk.patch(upload_id, sent, BYTES[sent:])).status_code == 204
    assert await desk.file(upload_id) == BYTES


async def test_a_half_closed_connection_keeps_what_came(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    async with connected(desk) as (_, writer):
        writer.write(
            desk.request("PATCH", f"/uploads/{upload_id}", upload_offset=0, content_length=300_000)
            + BYTES[:50_000]
        )
        await desk.until(upload_id, received_bytes=50_000)
        writer.write_eof()
        await desk.until(upload_id, holder=None)
    assert await desk.received(upload_id) == BYTES[:50_000]


async def test_fifty_at_once_mix_nothing(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    bodies = [random.Random(n).randbytes(len(BYTES)) for n in range(50)]
    responses = await asyncio.gather(*(desk.patch(upload_id, 0, body) for body in bodies))
    statuses = [response.status_code for response in responses]
    assert statuses.count(204) == 1
    assert set(statuses) <= {204, 409, 423}
    assert await desk.file(upload_id) == bodies[statuses.index(204)]
    assert await desk.served.database.data["files"].count_documents({}) == 1


async def test_a_second_one_is_locked_out(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    path = f"/uploads/{upload_id}"
    async with connected(desk) as (reader, writer):
        writer.write(
            desk.request("PATCH", path, upload_offset=0, content_length=len(BYTES)) + BYTES[:10]
        )
        await desk.until(upload_id, received_bytes=10)
        response = await desk.patch(upload_id, 10, b"x")
        assert (response.status_code, codes(response)) == (423, ["LOCKED"])
        assert (await desk.head(upload_id)).headers["upload-offset"] == "10"
        writer.write(BYTES[10:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 204 ")
    assert await desk.file(upload_id) == BYTES


async def test_a_paused_upload_ends_its_request_and_goes_on_with_the_next(
    settings: Settings,
) -> None:
    shorter = settings.model_copy(update={"upload_lease_seconds": 2.0})  # it looks thrice meanwhile
    async with receiving(shorter) as desk:
        await _paused_and_gone_on_with(desk)


async def _paused_and_gone_on_with(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES))
    path = f"/uploads/{upload_id}"
    async with connected(desk) as (reader, writer):
        writer.write(
            desk.request("PATCH", path, upload_offset=0, content_length=len(BYTES)) + BYTES[:10]
        )
        await desk.until(upload_id, received_bytes=10)
        await pause_upload(desk.served.database, desk.storage, desk.viewer, upload_id=upload_id)
        head, _, body = (await reader.readuntil(b"}]}")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 403 ")
        assert b"connection: close" in head
        assert b'"code":"UPLOAD_PAUSED"' in body
    row = await desk.until(upload_id, holder=None)
    assert (row["state"], row["received_bytes"]) == ("PAUSED", 10)
    assert (await desk.patch(upload_id, 10, BYTES[10:])).status_code == 204
    assert await desk.whole(upload_id) == DIGEST


async def test_a_client_that_sends_nothing_is_ended(settings: Settings) -> None:
    hasty = settings.model_copy(update={"upload_idle_seconds": 0.2})
    async with receiving(hasty) as desk:
        upload_id = await desk.create(len(BYTES))
        async with connected(desk) as (reader, writer):
            writer.write(
                desk.request(
                    "PATCH", f"/uploads/{upload_id}", upload_offset=0, content_length=300_000
                )
                + BYTES[:1000]
            )
            head, _, body = (await reader.readuntil(b"}]}")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head
        assert b'"code":"REQUEST_TIMEOUT"' in body
        row = await desk.row(upload_id)
        assert (row["received_bytes"], row["holder"]) == (1000, None)


async def test_a_server_that_ends_keeps_what_came(settings: Settings) -> None:
    async with receiving(settings) as desk:
        upload_id = await desk.create(len(BYTES))
        async with connected(desk) as (reader, writer):
            writer.write(
                desk.request(
                    "PATCH", f"/uploads/{upload_id}", upload_offset=0, content_length=300_000
                )
                + BYTES[:1000]
            )
            await desk.until(upload_id, received_bytes=1000)
            for connection in list(desk.served.server.server_state.connections):
                connection.shutdown()
            assert await reader.read() == b""  # and not after what a server gives its requests
        row = await desk.until(upload_id, holder=None)
        assert (row["state"], row["received_bytes"]) == ("UPLOADING", 1000)


# ---- more than one may take


async def test_a_body_that_is_refused_is_not_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes at once; then a client may send a little, and the connection ends."""
    monkeypatch.setattr(uploads, "LINGER_SECONDS", 0.5)
    upload_id = await desk.create(2**40)
    request = desk.request("PATCH", f"/uploads/{upload_id}", upload_offset=7, content_length=2**40)
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", desk.served.port)) as raw:
        raw.setblocking(False)
        await loop.sock_sendall(raw, request)
        async with asyncio.timeout(GUARD_SECONDS):
            answer = await loop.sock_recv(raw, 65536)
            assert answer.startswith(b"HTTP/1.1 409 ")
            assert b"connection: close" in answer
            sent = 0
            with suppress(ConnectionError):
                while True:
                    await loop.sock_sendall(raw, bytes(1_000_000))
                    sent += 1_000_000
    assert sent < LINGER_BYTES + 32_000_000  # and what lies in buffers of the system


async def test_a_client_that_waits_for_leave_sends_nothing(desk: Desk) -> None:
    upload_id = await desk.create(10)
    for offset, wanted in ((7, b"HTTP/1.1 409 "), (0, b"HTTP/1.1 100 ")):
        async with connected(desk) as (reader, writer):
            path = f"/uploads/{upload_id}"
            writer.write(
                desk.request(
                    "PATCH", path, upload_offset=offset, content_length=10, expect="100-continue"
                )
            )
            assert (await reader.readline()).startswith(wanted)


async def test_a_slow_disk_holds_the_client_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = await desk.create(2**30)
    opened = asyncio.Event()
    written = await type_of_writers(desk)
    write = written.write

    async def slow(self: SegmentWriter, data: bytes) -> None:
        await opened.wait()
        await write(self, data)

    monkeypatch.setattr(written, "write", slow)
    request = desk.request("PATCH", f"/uploads/{upload_id}", upload_offset=0, content_length=2**30)
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", desk.served.port)) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        raw.setblocking(False)
        await loop.sock_sendall(raw, request)
        sent = 0
        async with asyncio.timeout(GUARD_SECONDS):
            while True:  # until nothing more goes in for a second
                try:
                    async with asyncio.timeout(1):
                        await loop.sock_sendall(raw, bytes(65536))
                except TimeoutError:
                    break
                sent += 65536
        connections: list[Any] = list(desk.served.server.server_state.connections)
        assert max(len(each.cycle.body) for each in connections if each.cycle) < 1_000_000
        assert sent < 32_000_000  # the system's buffers
        opened.set()


async def test_a_full_disk_is_told_and_loses_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = await desk.create(len(BYTES))
    assert (await desk.patch(upload_id, 0, BYTES[:1000])).status_code == 204

    async def full(self: SegmentWriter) -> int:
        raise InsufficientStorage("There is no room.")

    with monkeypatch.context() as patched:
        patched.setattr(await type_of_writers(desk), "flush", full)
        response = await desk.patch(upload_id, 1000, BYTES[1000:])
    assert (response.status_code, codes(response)) == (507, ["INSUFFICIENT_STORAGE"])
    row = await desk.row(upload_id)
    assert (row["received_bytes"], row["holder"]) == (1000, None)
    assert (await desk.patch(upload_id, 1000, BYTES[1000:])).status_code == 204
    assert await desk.file(upload_id) == BYTES


async def test_a_failure_that_nobody_expected_is_masked(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upload_id = await desk.create(len(BYTES))

    async def broken(self: SegmentWriter, data: bytes) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(await type_of_writers(desk), "write", broken)
        response = await desk.patch(upload_id, 0, BYTES)
    assert (response.status_code, codes(response)) == (500, ["INTERNAL_SERVER_ERROR"])
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert (await desk.patch(upload_id, 0, BYTES)).status_code == 204
    assert await desk.file(upload_id) == BYTES


# ---- parts


async def part(desk: Desk, upload_id: ObjectId, body: bytes) -> str:
    """The address of a part that was sent whole."""
    response = await desk.post(
        upload_metadata=desk.metadata(upload_id),
        upload_length=str(len(body)),
        upload_concat="partial",
    )
    assert response.status_code == 201
    address: str = response.headers["location"]
    part_id = ObjectId(address.rpartition("/")[2])
    assert part_id != upload_id
    response = await desk.client.head(address)
    assert response.headers["upload-concat"] == "partial"
    assert response.headers["upload-metadata"].startswith(desk.metadata(upload_id))
    assert (await desk.patch(part_id, 0, body)).status_code == 204
    return address


async def test_parts_become_one(desk: Desk) -> None:
    upload_id = await desk.create(len(BYTES), declared=DIGEST)
    halves = BYTES[:100_000], BYTES[100_000:]
    second, first = [await part(desk, upload_id, body) for body in reversed(halves)]
    assert (await desk.row(upload_id))["received_bytes"] == len(BYTES)  # told while they come
    response = await desk.post(
        upload_metadata=desk.metadata(upload_id),
        upload_concat=f"final;{desk.base}{first} {second}",
    )
    assert response.status_code == 201
    assert response.headers["location"] == f"/uploads/{upload_id}"
    row = await desk.row(upload_id)
    assert row["state"] == "RECEIVED"
    response = await desk.head(upload_id)
    assert (response.headers["upload-offset"], response.headers["upload-length"]) == ("300000",) * 2
    assert response.headers["upload-concat"] == f"final;{first} {second}"
    response = await desk.patch(upload_id, 300_000, b"")
    assert (response.status_code, codes(response)) == (403, ["FORBIDDEN"])
    assert await desk.whole(upload_id) == DIGEST


async def test_parts_that_do_not_fit_are_refused(desk: Desk) -> None:
    upload_id, other = await desk.create(len(BYTES)), await desk.create(10, "other")
    named = {"upload_metadata": desk.metadata(upload_id)}
    first = await part(desk, upload_id, BYTES[:100_000])
    foreign = await part(desk, other, BYTES[:10])
    response = await desk.post(upload_length="200000", upload_concat="partial", **named)
    unfinished = response.headers["location"]
    at = f"/uploads/{ObjectId()}"
    for addresses, status in (
        (f"{first} {unfinished}", 409),
        (first, 400),  # too short
        (f"{first} {first} {first}", 400),
        (f"{first} {foreign}", 400),
        (f"{first} {at}", 400),
        (f"/uploads/{upload_id}", 400),
        ("", 400),
        ("x", 400),
        (f"{first},{first}", 400),
        (f"https://elsewhere.example{first}", 400),
        (f"//elsewhere.example{first}", 400),
        (f"{first}?a=b", 400),
        (f"/files/{upload_id}", 400),
        (" ".join([at] * (MOST_PARTS + 1)), 400),
    ):
        response = await desk.post(upload_concat=f"final;{addresses}", **named)
        assert (addresses[:100], response.status_code) == (addresses[:100], status)
        assert (await desk.row(upload_id))["state"] in {"CREATED", "UPLOADING"}
    response = await desk.post(upload_length="10", upload_metadata=desk.metadata(ObjectId(first[-24:])))  # fmt: skip
    assert response.status_code == 404  # a part is no upload


def test_addresses_of_parts() -> None:
    id = ObjectId()
    hosts, folders = {"a.example", "b.example:8000"}, {"/uploads/", "/here/uploads/"}
    for good in (
        f"/uploads/{id}",
        f"/here/uploads/{id}",
        f"http://a.example/uploads/{id}",
        f"https://B.example:8000/here/uploads/{id}",
    ):
        assert part_id(good, hosts, folders) == id
    for bad in (
        "",
        str(id),
        f"uploads/{id}",
        f"/uploads/{id}/",
        f"/uploads/../uploads/{id}",
        f"/uploads/{str(id).upper()}x",
        f"//a.example/uploads/{id}",
        f"ftp://a.example/uploads/{id}",
        f"https://c.example/uploads/{id}",
        f"https://a.example@c.example/uploads/{id}",
        f"https://[::1/uploads/{id}",
        f"http:///uploads/{id}",
        f"/uploads/{id}#a",
    ):
        with pytest.raises(BadRequest):
            part_id(bad, hosts, folders)


def test_metadata() -> None:
    assert read_metadata("a YQ==,b, c YmI=") == {"a": b"a", "b": b"", "c": b"bb"}
    for bad in (
        "",
        ",",
        "a YQ==,",
        "a YQ==,a YQ==",
        "a Y",
        "a YQ== b",
        "ä YQ==",
        "a Y\u00b2==",
    ):
        with pytest.raises(BadRequest):
            read_metadata(bad)


# ---- browsers


async def test_pages_of_named_origins_may_send(settings: Settings) -> None:
    named = settings.model_copy(update={"allowed_origins": ["https://app.example"]})
    async with receiving(named) as desk:
        upload_id = await desk.create(10)
        asked = "authorization,content-type,tus-resumable,upload-checksum,upload-concat,upload-length,upload-metadata,upload-offset,x-http-method-override,x-request-id"
        for origin, status in (("https://app.example", 200), ("https://evil.example", 400)):
            for method in ("POST", "PATCH", "HEAD", "DELETE", "OPTIONS"):
                preflight = await desk.client.options(
                    f"/uploads/{upload_id}",
                    headers={
                        "origin": origin,
                        "access-control-request-method": method,
                        "access-control-request-headers": asked,
                    },
                )
                assert (method, preflight.status_code) == (method, status)
                granted = preflight.headers.get("access-control-allow-origin")
                assert granted == (origin if status == 200 else None)
        response = await desk.patch(upload_id, 0, b"x", origin="https://app.example")
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert {
            *("location", "tus-resumable", "tus-version", "tus-extension", "tus-max-size"),
            *("upload-offset", "upload-length", "upload-metadata", "upload-expires"),
        } <= set(exposed)
        options = await desk.client.options("/uploads", headers={"origin": "https://app.example"})
        assert options.headers["tus-version"] == "1.0.0"
        assert options.headers["access-control-allow-origin"] == "https://app.example"


async def type_of_writers(desk: Desk) -> Any:
    """The class of what the store of these tests writes with."""
    async with desk.storage.incoming.writer("incoming/of/tests", 0) as writer:
        found = type(writer)
    await desk.storage.incoming.delete("incoming/of/tests")
    return found
