"""Ranged reads of contents, for parsers: each is bounded, and so is what they come to."""

from collections.abc import Callable, Sequence
from typing import Final

MOST_READ_BYTES: Final = 128 * 1024 * 1024  # at once


class Malformed(Exception):
    """Contents are not what their format demands. `rule` is a stable dotted name, `detail` a sentence."""

    def __init__(self, rule: str, detail: str, offset: int | None = None) -> None:
        super().__init__(detail)
        self.rule, self.detail, self.offset = rule, detail, offset


class Source:
    """Contents of `size` bytes. `read_at(start, length)` answers exactly those bytes, within the size."""

    def __init__(self, size: int, read_at: Callable[[int, int], bytes]) -> None:
        self.size = size
        self.is_at_hand = True  # a part of it can be read without having to make all of it
        self._read_at = read_at

    def read(self, start: int, length: int) -> bytes:
        """Malformed where they reach beyond the end, or are more than MOST_READ_BYTES."""
        if start < 0 or length < 0 or start + length > self.size:
            raise Malformed("source.truncated", "The file ends before its contents do.", start)
        if length > MOST_READ_BYTES:
            raise Malformed("source.too_much", "A part of the file is too large to be read.", start)
        return self._read_at(start, length) if length else b""

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tells which small parts (start, length) are read next, so that they may come together."""

    def head(self, length: int) -> bytes:
        """The first bytes, fewer where there are no more."""
        return self.read(0, min(length, self.size))


def of_bytes(contents: bytes | bytearray) -> Source:
    view = memoryview(contents)
    return Source(len(contents), lambda start, length: bytes(view[start : start + length]))


class Part(Source):
    """A part of other contents, as contents of its own."""

    def __init__(self, whole: Source, start: int, size: int) -> None:
        super().__init__(size, lambda at, length: whole.read(start + at, length))
        self._whole, self._start = whole, start

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._whole.expect([(self._start + at, length) for at, length in ranges])
