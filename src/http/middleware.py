"""What holds for every route: request ids, allowed hosts, safe headers, coded errors, one log line. Pure ASGI."""

import asyncio
import logging
import re
import time
from http import HTTPStatus
from typing import Final, TypeAlias

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette_compress import CompressMiddleware, add_compress_type, remove_compress_type

from modelharbor.errors import BadRequest, HarborError, MethodNotAllowed, NotFound
from modelharbor.execution.failures import any_problem, expected
from modelharbor.execution.kept import Kept
from modelharbor.observability.logging import log_event, request_id

from .answers import (
    OPERATION,
    REQUEST_ID,
    error_response,
    json_response,
    request_id_from,
    with_request_id,
)
from .caching import codings, compressed, distinct, uncompressed

log = logging.getLogger(__name__)
PIECE_BYTES = 64 * 1024
COMPRESSED_BYTES: Final = 16 * 1024 * 1024  # of answers that are kept, as they were compressed
KEPT: Final = "modelharbor.kept"
"""In the ASGI scope: a digest and the body of an answer that will be sent again."""
CODING: Final = (
    "modelharbor.coding"  # likewise: the content coding that the client gets, None: none
)
KeptForms: TypeAlias = Kept[tuple[str, str], bytes]
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


SAFE_NAMES = frozenset(name for name, _ in SAFE_HEADERS)


class RequestMiddleware:
    """The outermost: nothing leaves without a request id, and no exception leaves at all."""

    def __init__(self, app: ASGIApp, merges_vary: bool = False) -> None:
        """`merges_vary`: what is within may name a header in `Vary` twice, as Starlette's CORS does."""
        self.app, self.merges_vary = app, merges_vary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        current = request_id_from(scope["headers"])
        scope[REQUEST_ID], scope[OPERATION] = current, None
        token = request_id.set(current)
        start, status = time.perf_counter(), 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", current.encode())]
                there = {name for name, _ in headers}
                if there.isdisjoint(SAFE_NAMES):
                    headers += SAFE_HEADERS
                else:
                    headers += [header for header in SAFE_HEADERS if header[0] not in there]
                if self.merges_vary:
                    headers = [
                        (name, distinct(value) if name == b"vary" else value)
                        for name, value in headers
                    ]
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, send_marked)
        except ClientDisconnect:
            pass  # nobody is there to answer; the log line has status 0
        except Exception as error:
            response = self._response_to(error, scope)
            if status:
                raise  # too late for an answer: reported, and cut off
            await response(scope, receive, send_marked)
        finally:
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round((time.perf_counter() - start) * 1000, 1),
            }
            if scope[OPERATION] is not None:
                fields["operation"] = scope[OPERATION]
            log_event(log, logging.INFO, "http.request", **fields)
            request_id.reset(token)

    def _response_to(self, error: Exception, scope: Scope) -> Response:
        """Coded where it was expected, else masked, and reported."""
        failure = expected(error)
        if failure is not None:
            return error_response(scope, failure)
        made = with_request_id(scope, [any_problem(error, scope["path"])])
        return json_response({"errors": made}, 500)


class HostMiddleware:
    """Only the names that this server goes by: a foreign name that leads here (DNS rebinding) gets nothing."""

    def __init__(self, app: ASGIApp, allowed_hosts: list[str]) -> None:
        self.app = app
        self.allowed = {name.lower().strip("[]") for name in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"} and "*" not in self.allowed:
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or not self._is_allowed(hosts[0]):
                if scope["type"] == "websocket":
                    await receive()
                    await send({"type": "websocket.close", "code": 1008, "reason": "Host"})
                    return
                error = BadRequest("The `Host` header names a host that this server is not.")
                await error_response(scope, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        found = HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found["six"] or found["name"]
        return name in self.allowed or any(
            pattern.startswith("*.") and name.endswith(pattern[1:]) for pattern in self.allowed
        )


HOST = re.compile(r"(\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(:[0-9]{1,5})?", re.ASCII)


class CompressionMiddleware:
    """zstd, br or gzip; never for files and what was exported to one, which are ranges of stored bytes,
    uploads and events."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        add_compress_type("application/graphql-response+json")  # it knows older names only
        # A compressor holds 60 kB (gzip) to 770 kB (zstd) as long as its stream is open.
        remove_compress_type("text/event-stream")
        for rows in ("application/x-ndjson", "text/csv"):  # of exports
            add_compress_type(rows)
        self.kept: KeptForms = Kept(COMPRESSED_BYTES, COMPRESSED_BYTES)
        self.compressing = CompressMiddleware(
            _InPieces(_Kept(app, self.kept)), zstd_level=3, brotli_quality=4, gzip_level=6
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (
            scope["path"].startswith(("/files/", "/uploads", "/exports/"))
            and scope["path"] != "/exports/stream"
        ):
            await self.app(scope, receive, send)
            return
        accepts = [value for name, value in scope["headers"] if name == b"accept-encoding"]
        if not accepts:

            async def send_plain(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = uncompressed(message["headers"])
                await send(message)

            await self.app(scope, receive, send_plain)
            return
        liked = codings(b",".join(accepts).decode("latin-1"))
        scope[CODING] = liked[0] if liked else None
        coding: str | None = None  # of what is being compressed, and will be kept
        pieces: list[bytes] = []

        async def send_marked(message: Message) -> None:
            nonlocal coding
            if message["type"] == "http.response.start":
                message["headers"] = compressed(message["headers"])
                if scope.get(KEPT) is not None:
                    for name, value in message["headers"]:
                        if name == b"content-encoding":
                            coding = value.decode("latin-1")
            elif coding is not None:
                pieces.append(message["body"])
                if not message.get("more_body", False):
                    body = b"".join(pieces)
                    self.kept.put((scope[KEPT][0], coding), body, len(body))
            await send(message)

        await self.compressing(scope, receive, send_marked)


class _Kept:
    """Sends an answer that was sent before as it was compressed then: that takes longer than all else
    about it. Which one it is its maker says (KEPT)."""

    def __init__(self, app: ASGIApp, kept: KeptForms) -> None:
        self.app, self.kept = app, kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun: Message | None = None

        async def send_kept(message: Message) -> None:
            nonlocal begun
            known: tuple[str, bytes] | None = scope.get(KEPT)
            if known is None:
                await send(message)
            elif message["type"] == "http.response.start":
                begun = message
            elif begun is None:
                await send(message)
            else:
                start, begun = begun, None
                digest, whole = known
                if start["status"] != 200 or message["body"] != whole:
                    scope[KEPT] = None  # it is another one after all
                elif found := self.kept.get((digest, scope[CODING])):
                    scope[KEPT] = None  # it need not be kept again
                    headers = [each for each in start["headers"] if each[0] != b"content-length"]
                    headers.append((b"content-encoding", scope[CODING].encode()))
                    headers.append((b"content-length", b"%d" % len(found)))
                    headers.append((b"vary", b"Accept-Encoding"))
                    start, message = {**start, "headers": headers}, {**message, "body": found}
                await send(start)
                await send(message)

        await self.app(scope, receive, send_kept)


class _InPieces:
    """A large body in pieces, with a turn for other requests after each: compressed at once, 16 MiB
    of JSON hold the process up for 0.2 s (zstd) to 0.8 s (br)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_pieces(message: Message) -> None:
            body: bytes = message.get("body", b"")
            if message["type"] == "http.response.body" and len(body) > PIECE_BYTES:
                whole = memoryview(body)
                last = (len(body) - 1) // PIECE_BYTES * PIECE_BYTES
                for start in range(0, last, PIECE_BYTES):
                    piece = bytes(whole[start : start + PIECE_BYTES])
                    await send({"type": message["type"], "body": piece, "more_body": True})
                    await asyncio.sleep(0)
                message = {**message, "body": bytes(whole[last:])}
            await send(message)

        await self.app(scope, receive, send_pieces)


async def http_error(request: Request, error: Exception) -> Response:
    """404, 405 and what else Starlette itself answers, in the one shape of errors."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    found: HarborError
    if status == HTTPStatus.NOT_FOUND:
        found = NotFound("There is nothing at this address.")
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        found = MethodNotAllowed("This address does not take this method.")
    else:
        found = BadRequest(error.detail)
        made = with_request_id(
            request.scope, [{"message": error.detail, "extensions": found.extensions}]
        )
        return json_response({"errors": made}, status, error.headers)
    return error_response(request.scope, found, error.headers)


async def harbor_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HarborError)
    return error_response(request.scope, error)
