"""`/uploads`: the bytes of files, by tus 1.0.0 (https://tus.io/protocols/resumable-upload).

What may be sent is settled before, over GraphQL: an upload has its address from there, and a client
that creates one here only says which it means (`Upload-Metadata: upload …`).
"""

import asyncio
import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Final
from urllib.parse import urlsplit

from bson import ObjectId
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from modelharbor.auth.tokens import authenticate
from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.uploads import TAKING, UploadState
from modelharbor.errors import (
    BadRequest,
    ChecksumMismatch,
    HarborError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    PreconditionFailed,
    UnsupportedMediaType,
)
from modelharbor.execution.failures import any_problem, expected
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.resolvers.receiving import Checksum, Receiver
from modelharbor.schema.nodes import global_id, parse_global_id
from modelharbor.settings import Settings

from .answers import error_response, json_response, with_request_id
from .protocol import RESUMABLE
from .state import State

VERSION: Final = "1.0.0"
EXTENSIONS: Final = "creation,creation-with-upload,expiration,checksum,termination,concatenation"
DIGEST_BYTES: Final = {"sha1": 20, "sha256": 32}
MEDIA: Final = "application/offset+octet-stream"
REQUEST_HEADERS: Final = (
    "tus-resumable",
    "upload-length",
    "upload-offset",
    "upload-metadata",
    "upload-checksum",
    "upload-concat",
    "upload-defer-length",
    "x-http-method-override",
)
"""What pages of other origins may send, beside what they may send everywhere."""
ANSWER_HEADERS: Final = (
    "location",
    "tus-resumable",
    "tus-version",
    "tus-extension",
    "tus-max-size",
    "tus-checksum-algorithm",
    "upload-offset",
    "upload-length",
    "upload-metadata",
    "upload-concat",
    "upload-expires",
)
"""What they may read."""
MOST_METADATA: Final = 4096  # bytes of the header
MOST_PARTS: Final = 1000  # of one upload
MOST_TOLD: Final = 100  # parts whose addresses a HEAD tells: Node takes 16 KiB of headers
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 16 * 1024 * 1024
_TAKING: Final = {state.value for state in TAKING}
_KEY: Final = re.compile(r"[\x21-\x2b\x2d-\x7e]+")
_BEYOND: Final = 2**63 - 1  # bytes; no file is so large, and MongoDB knows no larger number
_OF_ALL: Final = ("POST", "OPTIONS")
_OF_ONE: Final = ("HEAD", "PATCH", "DELETE", "OPTIONS")


def upload_routes(settings: Settings) -> list[BaseRoute]:
    endpoint = UploadEndpoint(settings)
    return [Route(path, endpoint) for path in ("/uploads", "/uploads/", "/uploads/{upload_id}")]


class Body:
    """The body of a request, piece by piece, no faster than it is asked for."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        length = headers.get("content-length", "0")  # the parser took it for a number
        self.length = None if "transfer-encoding" in headers else int(length)
        """Bytes; None: only its end tells."""
        self.is_ended = self.length == 0
        self._receive = receive

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Raises ClientDisconnect when the connection ends before the body."""
        while not self.is_ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            self.is_ended = not message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            if piece:
                return piece
        raise StopAsyncIteration


class UploadEndpoint:
    """The ASGI application at `/uploads` and `/uploads/<id>`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.public_url = (settings.public_url or "").rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request: Request[State] = Request(scope)
        body = Body(request.headers, receive)
        if not body.is_ended:
            scope[RESUMABLE] = True
        try:
            response = await self.answer(request, body)
        except ClientDisconnect:
            raise  # nobody is there to answer
        except Exception as error:
            response = _failure(scope, error)
        response.headers["tus-resumable"] = VERSION
        response.headers["cache-control"] = "no-store"
        if body.is_ended:
            await response(scope, receive, send)
        else:
            await _close_with(response, body, send)

    async def answer(self, request: Request[State], body: Body) -> Response:
        headers = request.headers
        if counted.get() is None:
            counted.set(CommandCount())  # each request is a task of its own
        method = headers.get("x-http-method-override", request.method)
        given: str | None = request.path_params.get("upload_id")
        if method == "OPTIONS":
            return Response(status_code=204, headers=self._abilities())
        if headers.get("tus-resumable") != VERSION:
            raise PreconditionFailed(f"This takes `Tus-Resumable: {VERSION}`.")
        if method not in (_OF_ALL if given is None else _OF_ONE):
            raise MethodNotAllowed("This address does not take this method.")
        viewer = await authenticate(request.state["database"], headers.get("authorization"))
        viewer.person_id()
        receiver = request.state["receiver"]
        if given is None:
            return await self._create(receiver, viewer, headers, body)
        if not re.fullmatch(r"[0-9a-f]{24}", given):
            raise _unknown()
        upload_id = ObjectId(given)
        if method == "DELETE":
            await receiver.terminate(viewer, upload_id)
            return Response(status_code=204)
        if method == "PATCH":
            _check_content(headers)
            offset, checksum = _number(headers, "Upload-Offset"), _checksum(headers)
            row = await receiver.receive(
                viewer, upload_id, offset, body, checksum=checksum, length=body.length
            )
            await _acknowledge(request, row)
            told = {"upload-offset": str(row["received_bytes"]), **_expiry(row)}
            return Response(status_code=204, headers=told)
        row = await receiver.status(viewer, upload_id)
        await _acknowledge(request, row)
        return Response(status_code=200, headers=self._description(row))

    async def _create(
        self, receiver: Receiver, viewer: Viewer, headers: Headers, body: Body
    ) -> Response:
        """Binds to an upload that is there, adds a part to it, or puts its parts together."""
        kind = headers.get("upload-concat", "").strip()
        if "upload-defer-length" in headers:
            raise BadRequest("The length of an upload stands before it is sent.")
        if kind.startswith("final;"):
            if "upload-length" in headers or not body.is_ended:
                raise BadRequest("What is put together of parts has no length and bytes itself.")
            upload_id = _bound(headers)
            parts = self._parts(kind.removeprefix("final;"), headers.get("host", ""))
            row = await receiver.join_parts(viewer, upload_id, parts)
            return self._created(row)
        if kind not in {"", "partial"}:
            raise BadRequest("`Upload-Concat` takes `partial` or `final;` with addresses.")
        size = _number(headers, "Upload-Length")
        if size > self.settings.max_file_bytes:
            raise PayloadTooLarge(f"A file has at most {self.settings.max_file_bytes} bytes.")
        upload_id = _bound(headers)
        if not body.is_ended:
            _check_content(headers)
        if body.length is not None and body.length > size:
            raise PayloadTooLarge(f"This is to have {size} bytes; these are more.")
        checksum = _checksum(headers)
        if kind:
            row = await receiver.add_part(viewer, upload_id, size)
        else:
            row = await receiver.status(viewer, upload_id)
            if row["part_of"] is not None:
                raise _unknown()
            if row["size_bytes"] != size:
                raise BadRequest(
                    f"This upload was created for {row['size_bytes']} bytes, not for {size}."
                )
        if not body.is_ended:
            row = await receiver.receive(
                viewer, row["_id"], 0, body, checksum=checksum, length=body.length
            )
            return self._created(row, {"upload-offset": str(row["received_bytes"])})
        if size == 0 and row["state"] in _TAKING:  # clients send nothing more of an empty file
            row = await receiver.receive(viewer, row["_id"], 0, body)
        return self._created(row)

    def _abilities(self) -> dict[str, str]:
        return {
            "tus-version": VERSION,
            "tus-extension": EXTENSIONS,
            "tus-max-size": str(self.settings.max_file_bytes),
            "tus-checksum-algorithm": ",".join(DIGEST_BYTES),
        }

    def _address(self, upload_id: ObjectId) -> str:
        """Of an upload; without a public address relative to the one that the client knows."""
        return f"{self.public_url}/uploads/{upload_id}"

    def _created(self, row: Row, headers: Mapping[str, str] | None = None) -> Response:
        told = {"location": self._address(row["_id"]), **_expiry(row), **(headers or {})}
        return Response(status_code=201, headers=told)

    def _description(self, row: Row) -> dict[str, str]:
        about = global_id("Upload", row["part_of"] or row["_id"])
        found = {
            "upload-offset": str(row["received_bytes"]),
            "upload-length": str(row["size_bytes"]),
            "upload-metadata": f"upload {_base64(about)},filename {_base64(row['path'])}",
            **_expiry(row),
        }
        if row["part_of"] is not None:
            found["upload-concat"] = "partial"
        elif 0 < len(row["joined_ids"]) <= MOST_TOLD:
            addresses = map(self._address, row["joined_ids"])
            found["upload-concat"] = f"final;{' '.join(addresses)}"
        return found

    def _parts(self, addresses: str, host: str) -> list[ObjectId]:
        """The uploads that the addresses of a final one name, in order; ours alone."""
        found = addresses.split(" ", MOST_PARTS)
        if len(found) > MOST_PARTS:
            raise BadRequest(f"An upload is put together of {MOST_PARTS} parts at most.")
        ours = urlsplit(self.public_url)
        hosts, folder = {host.lower(), ours.netloc.lower()} - {""}, f"{ours.path}/uploads/"
        return [part_id(address, hosts, {folder, "/uploads/"}) for address in found]


def part_id(address: str, hosts: Collection[str], folders: Collection[str]) -> ObjectId:
    """Of the upload at an address: absolute on one of the hosts, or a path alone. BadRequest."""
    wrong = BadRequest("`Upload-Concat` names something that is no upload of this server.")
    try:
        parts = urlsplit(address)
    except ValueError:
        raise wrong from None
    folder, name = parts.path[:-24], parts.path[-24:]
    is_here = (
        parts.netloc.lower() in hosts and parts.scheme in {"http", "https"}
        if parts.scheme or parts.netloc
        else True
    )
    if not is_here or parts.query or parts.fragment or folder not in folders:
        raise wrong
    if not re.fullmatch(r"[0-9a-f]{24}", name):
        raise wrong
    return ObjectId(name)


def read_metadata(header: str) -> dict[str, bytes]:
    """`Upload-Metadata`: keys, and values in Base64. BadRequest for anything else."""
    if len(header) > MOST_METADATA:
        raise BadRequest(f"`Upload-Metadata` is longer than {MOST_METADATA} bytes.")
    found: dict[str, bytes] = {}
    for pair in header.split(","):
        key, _, value = pair.strip(" ").partition(" ")
        if not _KEY.fullmatch(key) or key in found:
            raise BadRequest("`Upload-Metadata` takes keys, each once, with values in Base64.")
        found[key] = _from_base64(value, "Upload-Metadata")
    return found


def _bound(headers: Headers) -> ObjectId:
    """The upload that `Upload-Metadata` names. BadRequest, NotFound."""
    metadata = read_metadata(headers.get("upload-metadata", ""))
    if "upload" not in metadata:
        raise BadRequest("`Upload-Metadata` takes `upload`: the id that `createUploads` answered.")
    found = parse_global_id(metadata["upload"].decode("latin-1"))
    if found is None or found.typename != "Upload":
        raise _unknown()
    return found.id


def _number(headers: Headers, name: str) -> int:
    """Bytes; _BEYOND for all that is more: Python refuses to read thousands of digits."""
    digits = headers.get(name, "")
    if not re.fullmatch(r"[0-9]+", digits):
        raise BadRequest(f"`{name}` takes a number of bytes.")
    digits = digits.lstrip("0")
    return min(int(digits[:20] or 0), _BEYOND)


def _checksum(headers: Headers) -> Checksum | None:
    given = headers.get("upload-checksum")
    if given is None:
        return None
    algorithm, _, digest = given.strip(" ").partition(" ")
    if algorithm not in DIGEST_BYTES:
        raise BadRequest(f"`Upload-Checksum` takes {' or '.join(DIGEST_BYTES)}.")
    found = _from_base64(digest, "Upload-Checksum")
    if len(found) != DIGEST_BYTES[algorithm]:
        raise ChecksumMismatch(f"`Upload-Checksum` is no {algorithm} of anything.")
    return Checksum(algorithm, found)


def _check_content(headers: Headers) -> None:
    if headers.get("content-type", "").strip().lower() != MEDIA:
        raise UnsupportedMediaType(f"Bytes come as `Content-Type: {MEDIA}`.")
    coding = headers.get("transfer-encoding", "chunked").strip().lower()
    if coding != "chunked" or (
        headers.get("content-encoding", "identity").strip().lower() != "identity"
    ):
        raise UnsupportedMediaType("The bytes may not be compressed.")


def _from_base64(value: str, name: str) -> bytes:
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"`{name}` takes values in Base64.") from None


def _base64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _expiry(row: Row) -> dict[str, str]:
    """Until when an upload waits for bytes."""
    if row["state"] not in _TAKING:
        return {}
    at: datetime = row["expires_at"]
    return {"upload-expires": format_datetime(at.replace(tzinfo=UTC), usegmt=True)}


async def _acknowledge(request: Request[State], row: Row) -> None:
    """Who is told that an upload is complete finds its file from then on, whoever has made it: another
    process may have ended before it could say so."""
    count = counted.get()
    if row["state"] == UploadState.COMPLETED.value and count is not None and count.wrote is None:
        await request.state["freshness"].acknowledge_read(count.read)


def _unknown() -> HarborError:
    return NotFound("There is no such upload.")


def _failure(scope: Scope, error: Exception) -> Response:
    failure = expected(error)
    if failure is None:
        made = with_request_id(scope, [any_problem(error, scope["path"])])
        return json_response({"errors": made}, 500)
    headers = {}
    if failure.status == 412:
        headers = {"tus-version": VERSION}
    elif failure.status == 405:
        allowed = _OF_ONE if "upload_id" in scope["path_params"] else _OF_ALL
        headers = {"allow": ", ".join(allowed)}
    return error_response(scope, failure, headers)


async def _close_with(response: Response, body: Body, send: Send) -> None:
    """Answers before the body has come whole, and closes the connection instead of reading it.

    Closed with bytes unread, TCP takes the answer back too: a client gets a little time to notice.
    """
    response.headers["connection"] = "close"
    start = {"status": response.status_code, "headers": response.raw_headers}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    taken = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(LINGER_SECONDS):
            async for piece in body:
                taken += len(piece)
                if taken > LINGER_BYTES:  # nothing more goes in, it looks up
                    await asyncio.sleep(LINGER_SECONDS)
    await send({"type": "http.response.body"})
