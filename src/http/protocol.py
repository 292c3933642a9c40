"""HTTP/1.1 of uvicorn with an end to the head of a request: its own parser keeps headers of any length."""

from http import HTTPStatus
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES: Final = 64 * 1024  # of the address and all headers, trailers included


class HeadTooLarge(Exception):
    """Raised within the parser, which ends with it."""


class BoundedProtocol(HttpToolsProtocol):
    """Answers 431 and closes the connection when a head has more than HEAD_BYTES.

    The parser hands over whole headers only: one that has not ended is counted by what arrived
    since it last handed over anything, so that a head is up to one read larger than its limit.
    """

    head_bytes = 0  # handed over, of this request
    held_bytes = 0  # arrived since

    def data_received(self, data: bytes) -> None:
        self.held_bytes += len(data)
        held = self.held_bytes
        super().data_received(data)
        if self.held_bytes == held > HEAD_BYTES and not self.transport.is_closing():
            self.head_bytes = held
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        if self.head_bytes <= HEAD_BYTES:
            super().send_400_response(msg)
            return
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        self.transport.write(
            f"{head}content-length: 0\r\nconnection: close\r\n\r\n".encode("ascii")
        )
        self.transport.close()

    def on_message_begin(self) -> None:
        self.head_bytes = self.held_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
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
