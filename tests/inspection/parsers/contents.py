"""Contents for parsers, good and bad, and sources that count what is read of them."""

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

from modelharbor.inspection.parsers.parsed import Parsed
from modelharbor.inspection.source import Malformed, Source

Parse = Callable[[Source], Parsed]


class Counted(Source):
    """Contents of any size, of which `start` and `end` are given; zeros lie between them."""

    def __init__(self, start: bytes, size: int | None = None, end: bytes = b"") -> None:
        super().__init__(len(start) if size is None else size, self._at)
        self._start, self._end = start, end
        self.reads = 0
        self.bytes = 0

    def _at(self, start: int, length: int) -> bytes:
        self.reads += 1
        self.bytes += length
        data = self._start[start : start + length].ljust(length, b"\0")
        into = self.size - len(self._end)
        if start + length > into:
            tail = self._end[max(start - into, 0) : start + length - into]
            data = data[: length - len(tail)] + tail
        return data


def rule_of(parse: Parse, contents: bytes | Source) -> str:
    """Of what is wrong with it."""
    with pytest.raises(Malformed) as caught:
        parse(contents if isinstance(contents, Source) else Counted(contents))
    assert caught.value.detail
    assert caught.value.offset is None or caught.value.offset >= 0
    return caught.value.rule


def rules_of(parsed: Parsed) -> list[tuple[str, str]]:
    return [(finding.severity.value, finding.rule) for finding in parsed.findings]


def safetensors_file(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
