"""uvicorn's protocols, with what they lack: an end to the head of a request (its parser keeps headers of
any length), a way to be rid of clients that take nothing, a word to open connections before the process
ends, and one write for an answer."""

import asyncio
import logging
import re
from http import HTTPStatus
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request
from websockets.protocol import State

from modelharbor.errors import PayloadTooLarge
from modelharbor.observability.logging import log_event

from .answers import JSON, REQUEST_ID, error_response, request_id_from

log = logging.getLogger("uvicorn.websockets")
requests = logging.getLogger(__name__)
HEAD_BYTES: Final = 64 * 1024  # of the address and all headers, trailers included
CUT_OFF: Final = "modelharbor.cut_off"
"""In the ASGI scope: ends a connection whose client takes nothing any more."""
WRITE_TEXT: Final = "modelharbor.write_text"
"""In the ASGI scope of a WebSocket: sends a text (in UTF-8) at once, or answers that it has to wait."""
RESUMABLE: Final = "modelharbor.resumable"
"""In the ASGI scope: a request whose client sends the rest of its body again, from where it ended."""
CUT_OFF_SECONDS: Final = 10.0  # for what is on its way to a client that is only slow


class HeadTooLarge(Exception):
    """Raised within the parser, which ends with it."""


class BoundedProtocol(HttpToolsProtocol):
    """Answers 431 (414: of the address alone) and closes the connection when a head has more than
    HEAD_BYTES.

    The parser hands over whole headers only: one that has not ended is counted by what arrived
    since it last handed over anything, so that a head is up to one read larger than its limit.
    """

    head_bytes = 0  # handed over, of this request
    held_bytes = 0  # arrived since
    is_address = False  # what is being counted

    def data_received(self, data: bytes) -> None:
        self.held_bytes += len(data)
        held = self.held_bytes
        super().data_received(data)
        if self.held_bytes == held > HEAD_BYTES and not self.transport.is_closing():
            self.head_bytes = held
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if type(self.cycle) is RequestResponseCycle:
            self.cycle.__class__ = OneWriteCycle  # it has not begun
        self.scope[CUT_OFF] = self.transport.abort  # type: ignore[typeddict-unknown-key]  # ours alone

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # it has this protocol's methods

    def shutdown(self) -> None:
        tell_closing(self.app_state)
        if self.cycle is not None and self.cycle.more_body and RESUMABLE in self.cycle.scope:
            self.transport.close()  # it might take hours, and what came so far is kept
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        if self.head_bytes <= HEAD_BYTES:
            super().send_400_response(msg)
            return
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        what = "The address and headers of the request have"
        if self.is_address:
            status, what = HTTPStatus.REQUEST_URI_TOO_LONG, "The address has"
        error = PayloadTooLarge(f"{what} more than {HEAD_BYTES} bytes.")
        current = request_id_from(())
        scope = {"type": "http", REQUEST_ID: current}
        body = bytes(error_response(scope, error).body)
        lines = (
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"content-type: {JSON}",
            f"content-length: {len(body)}",
            "cache-control: private, no-store",
            f"x-request-id: {current}",
            "connection: close",
        )
        self.transport.write("\r\n".join((*lines, "", "")).encode("ascii") + body)
        self.transport.close()
        log_event(requests, logging.INFO, "http.refused", status=status.value, request_id=current)

    def on_message_begin(self) -> None:
        self.head_bytes = self.held_bytes = 0
        self.is_address = False
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.is_address = True
        self._count(len(url))
        self.is_address = False
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self.held_bytes = 0
        super().on_body(body)

    def _count(self, size: int) -> None:
        self.held_bytes = 0
        self.head_bytes += size
        if self.head_bytes > HEAD_BYTES:
            raise HeadTooLarge


USUAL_NAMES: Final = frozenset(
    {
        *(b"age", b"allow", b"cache-control", b"content-encoding", b"content-length"),
        *(b"content-security-policy", b"content-type", b"date", b"etag", b"link", b"ratelimit"),
        *(b"ratelimit-policy", b"referrer-policy", b"retry-after", b"surrogate-key", b"vary"),
        *(b"www-authenticate", b"x-cache", b"x-content-type-options", b"x-frame-options"),
        b"x-request-id",
    }
)
"""Of headers: names that are known to be fit to be sent, and to have no say in how."""
UNFIT: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
TOGETHER_BYTES: Final = 64 * 1024


class OneWriteCycle(RequestResponseCycle):
    """Sends a usual answer that comes whole, head and body, in one write. uvicorn looks at each header
    by itself, which takes a quarter of the time that a kept answer takes in all; whatever is not as
    usual here is left to it."""

    head: bytes | None = None  # of an answer whose body is yet to come

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if not self.response_started and (head := self._head_of(message)) is not None:
                self.head = head
                self.response_started, self.waiting_for_100_continue = True, False
                return
        elif self.head is not None:
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            head, self.head = self.head, None
            body: bytes = message.get("body", b"")
            if (
                len(body) == self.expected_content_length
                and len(body) <= TOGETHER_BYTES
                and not message.get("more_body", False)
            ):
                if not self.disconnected:
                    self.transport.write(head + body)
                    self._end()
                return
            if not self.disconnected:
                self.transport.write(head)
        await super().send(message)

    def _end(self) -> None:
        self.expected_content_length = 0
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def _head_of(self, message: Any) -> bytes | None:
        """None for what uvicorn is to do."""
        line = STATUS_LINE.get(message["status"])
        if line is None or not self.keep_alive or self.access_log or self.scope["method"] == "HEAD":
            return None
        length, parts, values = None, [line], []
        for name, value in (*self.default_headers, *message["headers"]):
            if name not in USUAL_NAMES:
                return None
            if name == b"content-length":
                length = value
            parts += (name, b": ", value, b"\r\n")
            values.append(value)
        if length is None or not length.isdigit() or UNFIT.search(b"".join(values)):
            return None
        self.expected_content_length, self.chunked_encoding = int(length), False
        parts.append(b"\r\n")
        return b"".join(parts)


class SocketProtocol(WebSocketsSansIOProtocol):
    """WebSockets that are told before the process ends, so that they close as clients like it, and
    that go at once when they have ended: no cycle keeps them until garbage is collected."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logger = self.conn.logger = log  # they tell of each connection twice; we do, once

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:
            self.scope[CUT_OFF] = self.cut_off  # type: ignore[typeddict-unknown-key]  # ours alone
            self.scope[WRITE_TEXT] = self.write_text  # type: ignore[typeddict-unknown-key]  # ours alone

    def start_keepalive(self) -> None:
        """Called once it is accepted: what the handshake was is 3 KB that nobody asks for again."""
        del self.request, self.response
        super().start_keepalive()

    def write_text(self, text: bytes) -> bool:
        """The short way of `websocket.send`, of an accepted connection: a frame of a server is its
        length and the text. False: the client does not take it now, or the connection is closing."""
        if not self.writable.is_set() or self.close_sent or self.transport.is_closing():
            return False
        self.transport.write(head_of_text(len(text)) + text)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.conn.parser.close()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        scope = cast(dict[str, Any], self.scope)
        del scope[CUT_OFF], scope[WRITE_TEXT]

    def cut_off(self, code: int, reason: str) -> None:
        if self.close_sent or self.conn.state is not State.OPEN:
            self.transport.abort()  # it is closing already, and takes nothing
            return
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.loop.call_later(CUT_OFF_SECONDS, self.transport.abort)

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and tell_closing(self.app_state):
            return  # it is closed from there
        super().shutdown()


def head_of_text(size: int) -> bytes:
    """Of a whole frame that is not compressed: RFC 6455, 5.2."""
    if size < 126:
        return bytes((0x81, size))
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big")
    return b"\x81\x7f" + size.to_bytes(8, "big")


def tell_closing(state: dict[str, Any]) -> bool:
    """Whether there is anyone to tell. More calls change nothing."""
    live = state.get("live")
    if live is None:
        return False
    live.shut()
    return True
