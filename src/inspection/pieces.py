"""A child's end of its two pipes, and the contents that come through them."""

import os
from collections.abc import Sequence
from typing import Final

from modelharbor.db.files import FileFormat

from . import wire
from .source import Source

BLOCK_BYTES: Final = 64 * 1024  # what a small read fetches, aligned
MOST_BLOCKS: Final = 64  # kept


class Pipe:
    """The child's end: what it asks for goes out, bytes come in."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    def write(self, message: bytes) -> None:
        while message:
            message = message[os.write(self._outgoing, message) :]

    def tell_stage(self, stage: str, format: FileFormat | None = None) -> None:
        known = 0 if format is None else 1 + wire.FORMATS.index(format)
        self.write(wire.STAGE + wire.STAGE_AND_FORMAT.pack(wire.STAGES.index(stage), known))

    def pieces(self, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        """Of one frame's limits."""
        asked = b"".join(wire.PIECE.pack(*each) for each in wanted)
        self.write(wire.READ + wire.COUNT.pack(len(wanted)) + asked)
        return [self._read(length) for _, length in wanted]

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self._incoming, length)
            if not part:
                os._exit(1)  # nobody waits for the answer any more
            parts.append(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Pieces(Source):
    """Contents that come by the pipe. Small reads are answered from whole blocks, which are kept."""

    def __init__(self, size: int, pipe: Pipe) -> None:
        super().__init__(size, self._at)
        self._pipe = pipe
        self._blocks: dict[int, bytes] = {}

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        wanted: dict[int, None] = {}
        for start, length in ranges:
            first, last = start // BLOCK_BYTES, (start + max(1, length) - 1) // BLOCK_BYTES
            if first >= 0 and start + length <= self.size and last - first <= 1:
                wanted.update(dict.fromkeys(range(first, last + 1)))
        missing = [each for each in wanted if each not in self._blocks][: MOST_BLOCKS - 2]
        if missing:
            self._fetch(missing)

    def _fetch(self, blocks: Sequence[int]) -> None:
        ranges = [
            (each * BLOCK_BYTES, min(BLOCK_BYTES, self.size - each * BLOCK_BYTES))
            for each in blocks
        ]
        for block, contents in zip(blocks, self._pipe.pieces(ranges), strict=True):
            self._blocks[block] = contents
        while len(self._blocks) > MOST_BLOCKS:
            del self._blocks[next(iter(self._blocks))]

    def _block(self, number: int) -> bytes:
        found = self._blocks.get(number)
        if found is None:
            # Who reads on from where the last block ended will read on further.
            ahead = 4 if number - 1 in self._blocks else 1
            last = (self.size - 1) // BLOCK_BYTES
            self._fetch(range(number, min(number + ahead, last + 1)))
            found = self._blocks[number]
        return found

    def _at(self, start: int, length: int) -> bytes:
        if length <= BLOCK_BYTES:
            first, last = start // BLOCK_BYTES, (start + length - 1) // BLOCK_BYTES
            at = start - first * BLOCK_BYTES
            if first == last:
                return self._block(first)[at : at + length]
            head = self._block(first)[at:]
            return head + self._block(last)[: length - len(head)]
        parts: list[bytes] = []
        end = start + length
        while start < end:
            stop = min(end, start + wire.MOST_ASKED_BYTES)
            wanted = [
                (each, min(wire.PIECE_BYTES, stop - each))
                for each in range(start, stop, wire.PIECE_BYTES)
            ]
            parts += self._pipe.pieces(wanted)
            start = stop
        return b"".join(parts)
