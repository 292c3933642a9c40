"""Reading a source here and there, without a request for every few bytes."""

from typing import Final

from modelharbor.inspection.source import Malformed, Source

CHUNK_BYTES: Final = 256 * 1024


class Window:
    """`buffer` holds the bytes of the source from `base` on; it moves to where one asks for more."""

    def __init__(self, source: Source, chunk: int = CHUNK_BYTES) -> None:
        self.source = source
        self.buffer = b""
        self.base = 0
        self._chunk = chunk

    def at(self, position: int, length: int) -> int:
        """The index in `buffer` of `position`, with `length` bytes from there. Malformed at the end."""
        index = position - self.base
        if index >= 0 and index + length <= len(self.buffer):
            return index
        if position + length > self.source.size:
            raise Malformed(
                "source.truncated", "The file ends before its contents do.", self.source.size
            )
        size = min(max(length, self._chunk), self.source.size - position)
        self.buffer = self.source.read(position, size)
        self.base = position
        return 0

    def read(self, position: int, length: int) -> bytes:
        index = self.at(position, length)
        return self.buffer[index : index + length]
