"""WebSocket frames as the clients of the measurement need them: short, whole, not compressed."""

from collections.abc import Iterator
from typing import Final

TEXT: Final = 0x1
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA


def client_frame(opcode: int, payload: bytes) -> bytes:
    """Masked with zeros, so that equal messages are equal frames, made once."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65536:
        head = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8, "big")
    return head + bytes(4) + payload


def server_frames(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Each whole frame: with its head, its opcode, its payload. What is left over at the end comes
    last, with the opcode -1, where there is some."""
    at, end = 0, len(data)
    while at < end:
        found = _sizes(data, at, end)
        if found is None or found[1] > end:
            yield data[at:], -1, b""
            return
        begin, stop = found
        yield data[at:stop], data[at] & 0xF, data[begin:stop]
        at = stop


def _sizes(data: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Where the payload begins and ends; None where the head is not whole."""
    if end - at < 2:
        return None
    size, head = data[at + 1], 2
    if size > 125:
        head = 4 if size == 126 else 10
        if end - at < head:
            return None
        size = int.from_bytes(data[at + 2 : at + head], "big")
    return at + head, at + head + size
