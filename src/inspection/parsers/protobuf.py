"""Protobuf's wire format, walked without a schema: what is not asked for is stepped over unread.

https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from modelharbor.inspection.source import Malformed, Source

from .window import Window

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MOST_FIELDS: Final = 1_000_000  # some ten for each node of a graph
MOST_TAG: Final = 2**32 - 1  # a number of 29 bits, and the kind


class Field(NamedTuple):
    """`value` of a number is itself; of bytes it is where they start, and `end` where they end."""

    number: int
    kind: int
    value: int
    end: int


class Message:
    """Fields of messages in a source. All that are walked count to one limit."""

    def __init__(self, source: Source, rule: str) -> None:
        self.window = Window(source)
        self.size = source.size
        self._rule = rule
        self._fields = 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Those of the message in these bytes; Malformed where they do not make one."""
        window = self.window
        at = start
        while at < end:
            self._fields += 1
            if self._fields > MOST_FIELDS:
                raise Malformed(
                    f"{self._rule}.too_many_fields", f"There are over {MOST_FIELDS:,} fields.", at
                )
            index, buffer = at - window.base, window.buffer
            # Most tags and numbers are of one byte; a call for each takes twice the time.
            if 0 <= index < len(buffer) - 1 and (tag := buffer[index]) < 0x80:
                at += 1
                if at < end and tag & 5 == 0 and (value := buffer[index + 1]) < 0x80:
                    at += 1
                elif tag & 5 == 0:
                    value, at = self._varint(at, end)
            else:
                tag, at = self._varint(at, end)
                if tag & 5 == 0:
                    value, at = self._varint(at, end)
            kind = tag & 7
            if not 8 <= tag <= MOST_TAG:
                raise self._wrong(at)
            if kind == VARINT:
                yield Field(tag >> 3, kind, value, at)
                continue
            if kind in (FIXED32, FIXED64):
                value = 4 if kind == FIXED32 else 8
            elif kind != BYTES:  # groups, which nobody has written for long
                raise self._wrong(at)
            if value > end - at:
                raise self._wrong(at)
            yield Field(tag >> 3, kind, at, at + value)
            at += value

    def read(self, field: Field, most: int) -> bytes:
        """The bytes of a field; of longer ones the first `most`."""
        if field.kind != BYTES:
            raise self._wrong(field.value)
        return self.window.read(field.value, min(field.end - field.value, most))

    def text(self, field: Field, most: int = 1024) -> str:
        return self.read(field, most).decode("utf-8", "replace")

    def numbers(self, field: Field, most: int) -> list[int]:
        """Of a repeated field, written one by one or packed. Malformed where packed are too many."""
        if field.kind == VARINT:
            return [signed(field.value)]
        if field.kind != BYTES or field.end - field.value > 10 * most:
            raise self._wrong(field.value)
        at, result = field.value, []
        while at < field.end:
            value, at = self._varint(at, field.end)
            result.append(signed(value))
        return result

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        window = self.window
        index = at - window.base
        if not 0 <= index < len(window.buffer) - 10:
            index = window.at(at, min(10, max(end - at, 1)))
        byte = window.buffer[index]
        if byte < 0x80:
            if at >= end:
                raise self._wrong(at)
            return byte, at + 1
        value = 0
        for number, byte in enumerate(window.buffer[index : index + min(10, end - at)]):
            value |= (byte & 0x7F) << (7 * number)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + number + 1
        raise self._wrong(at)

    def _wrong(self, at: int) -> Malformed:
        return Malformed(f"{self._rule}.protobuf", "The file is not protobuf.", at)


def signed(value: int) -> int:
    """Of an int32 or int64, which are written as 64 bits."""
    return value - 2**64 if value >= 2**63 else value
