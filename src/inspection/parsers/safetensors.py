"""safetensors: a length, a JSON header of that length, then the bytes of the tensors without a gap.

https://github.com/huggingface/safetensors#format. The header is scanned entry by entry instead of
being loaded: 100 MB of JSON come to gigabytes of objects, and loaders keep the last of two equal keys.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.inspection.formats import MAX_SAFETENSORS_HEADER
from modelharbor.inspection.source import Malformed, Source

from .headers import kept, text
from .parsed import MOST_COUNT, MOST_TENSORS, SHOWN_TENSORS, Counts, Parsed, product

_DTYPES: Final = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"),
    64: ("C64", "F64", "I64", "U64"),
}
BITS: Final = {dtype: bits for bits, dtypes in _DTYPES.items() for dtype in dtypes}
METADATA: Final = b"__metadata__"
ARCHITECTURE: Final = b"modelspec.architecture"
ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})
LONGEST_NAME: Final = 65_536  # bytes as written
MOST_METADATA: Final = 100_000
SHOWN_METADATA: Final = 1_000
MOST_DIMENSIONS: Final = 64
DECODED_AT_ONCE: Final = 1024 * 1024

# Possessive, so that a text of 100 MB is matched without a memory of where to go back to.
_TEXT: Final = re.compile(rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"')
_TEXT_START: Final = re.compile(rb'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})){0,1200}+')
_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
# No object lies within an entry, and no name of a type has a brace.
_ENTRY: Final = re.compile(rb"\{[^{}]{0,4096}+\}")


def parse(source: Source) -> Parsed:
    if source.size < 8:
        raise Malformed("safetensors.truncated", "The file has no room for a header's length.", 0)
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_SAFETENSORS_HEADER:
        raise Malformed(
            "safetensors.header_too_large",
            f"The header claims {length:,} bytes: {MAX_SAFETENSORS_HEADER:,} are allowed.",
            0,
        )
    if length > source.size - 8:
        raise Malformed("safetensors.truncated", "The file ends within its header.", 0)
    header = source.read(8, length)
    if not header.startswith(b"{"):
        raise Malformed("safetensors.json", "The header does not start with '{'.", 8)
    # A quote within a text is escaped, so this is not written there but as the end of one.
    if header.count(b'"data_offsets"') > MOST_TENSORS:
        raise _too_many()
    _refuse_bad_unicode(header)
    scan = _Scan(header)
    scan.run()
    scan.check_offsets(source.size - 8 - length)
    metadata = scan.metadata
    architecture = metadata.get(ARCHITECTURE.decode())
    return Parsed(
        FileFormat.SAFETENSORS,
        scan.counts.summary(architecture=architecture),
        kept(
            {
                "tensor_count": scan.counts.tensors,
                "metadata": metadata,
                "tensors": scan.shown,
            }
        ),
    )


def _refuse_bad_unicode(header: bytes) -> None:
    """Part by part: as one text it could take four times as much."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(header), DECODED_AT_ONCE):
            decoder.decode(header[start : start + DECODED_AT_ONCE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise Malformed("safetensors.json", "The header is not UTF-8.", 8) from None


class _Scan:
    """One pass over the header. Offsets in what is raised are of the file."""

    def __init__(self, header: bytes) -> None:
        self.header = header
        self.at = 0
        self.counts = Counts("safetensors.shape")
        self.metadata: dict[str, str] = {}
        self.shown: list[Any] = []
        self._spans: list[tuple[int, int]] = []

    def run(self) -> None:
        for name in self._keys():
            if name == METADATA:
                self._metadata()
            else:
                self._tensor(_shown(name))
        self._skip_space()
        if self.at != len(self.header):
            raise self._wrong("safetensors.json", "Something follows the header's object.")

    def check_offsets(self, data_size: int) -> None:
        """Every byte of the data belongs to one tensor: nothing is shared and nothing is hidden."""
        data, end = 8 + len(self.header), 0
        for start, stop in sorted(self._spans):
            if start < end:
                raise Malformed("safetensors.overlap", "Two tensors share bytes.", data + start)
            if start > end:
                raise Malformed("safetensors.hole", "There are bytes of no tensor.", data + end)
            end = stop
        if end > data_size:
            raise Malformed(
                "safetensors.truncated",
                f"The tensors claim {end:,} bytes: there are {data_size:,}.",
                8,
            )
        if end < data_size:
            raise Malformed(
                "safetensors.trailing",
                f"There are {data_size - end:,} bytes after the last tensor.",
                data + end,
            )

    def _keys(self) -> Iterator[bytes]:
        """The keys of the object that starts here. Whoever asks for them reads each one's value.

        They stay bytes: one character of four bytes makes a whole text take four for each.
        """
        keys: set[bytes] = set()
        self._expect(b"{")
        self._skip_space()
        if self._peek() == b"}":
            self.at += 1
            return
        while True:
            key = self._key()
            if key in keys:
                raise self._wrong("safetensors.duplicate_key", f"{_shown(key)!r} is there twice.")
            keys.add(key)
            yield key
            self._skip_space()
            if self._peek() == b"}":
                self.at += 1
                return
            self._expect(b",")
            self._skip_space()

    def _key(self) -> bytes:
        raw = self._raw_text()
        if len(raw) > LONGEST_NAME:
            raise self._wrong("safetensors.json", "A key is longer than 65,536 bytes.")
        self._skip_space()
        self._expect(b":")
        self._skip_space()
        if b"\\" not in raw:
            return raw[1:-1]
        return str(json.loads(raw)).encode("utf-8", "surrogatepass")

    def _metadata(self) -> None:
        for number, key in enumerate(self._keys()):
            if number == MOST_METADATA:
                raise self._wrong("safetensors.metadata", "There are over 100,000 metadata.")
            if self._peek() != b'"':
                raise self._wrong("safetensors.metadata", "A value of the metadata is not a text.")
            raw = self._raw_text()
            if number < SHOWN_METADATA or key == ARCHITECTURE:
                start = _TEXT_START.match(raw)  # a long text by its start
                self.metadata[_shown(key)] = (
                    text(json.loads((start.group() + b'"').decode("utf-8", "replace")))
                    if start
                    else ""
                )

    def _tensor(self, name: str) -> None:
        found = _ENTRY.match(self.header, self.at)
        if found is None:
            raise self._wrong("safetensors.entry", f"The entry of {name!r} is no tensor's.")
        try:
            entry = json.loads(found.group(), object_pairs_hook=_once)
        except _Twice as twice:
            raise self._wrong(
                "safetensors.duplicate_key",
                f"{str(twice)[:100]!r} is there twice in the entry of {name!r}.",
            ) from None
        except (ValueError, RecursionError):
            raise self._wrong("safetensors.json", "The header is not JSON.") from None
        dtype, shape, start, end = self._valid(name, entry)
        elements = product(shape, "safetensors.shape", 8 + self.at)
        bits = elements * BITS[dtype]
        if bits > MOST_COUNT:
            raise self._wrong("safetensors.shape", f"{name!r} has more bits than can be.")
        if bits != (end - start) * 8:
            raise self._wrong(
                "safetensors.size", f"The shape of {name!r} and its bytes do not agree."
            )
        if self.counts.tensors == MOST_TENSORS:
            raise _too_many()
        self.counts.add(dtype, elements)
        self._spans.append((start, end))
        if len(self.shown) < SHOWN_TENSORS:
            self.shown.append({"name": name, "dtype": dtype, "shape": shape})
        self.at = found.end()

    def _valid(self, name: str, entry: dict[str, Any]) -> tuple[str, list[int], int, int]:
        if entry.keys() != ENTRY_KEYS:
            raise self._wrong(
                "safetensors.entry", f"The entry of {name!r} has other keys than a tensor."
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise self._wrong("safetensors.dtype", f"The type of {name!r} is not known.")
        if not _are_counts(shape) or len(shape) > MOST_DIMENSIONS:
            raise self._wrong("safetensors.shape", f"The shape of {name!r} is not one.")
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._wrong("safetensors.offsets", f"The offsets of {name!r} are not two.")
        return dtype, shape, offsets[0], offsets[1]

    def _raw_text(self) -> bytes:
        found = _TEXT.match(self.header, self.at)
        if found is None:
            raise self._wrong("safetensors.json", "The header is not JSON.")
        self.at = found.end()
        return found.group()

    def _skip_space(self) -> None:
        found = _SPACE.match(self.header, self.at)
        self.at = found.end() if found else self.at

    def _peek(self) -> bytes:
        return self.header[self.at : self.at + 1]

    def _expect(self, character: bytes) -> None:
        if self._peek() != character:
            raise self._wrong("safetensors.json", "The header is not JSON.")
        self.at += 1

    def _wrong(self, rule: str, detail: str) -> Malformed:
        return Malformed(rule, detail, 8 + self.at)


def _shown(key: bytes) -> str:
    return text(key[:1024].decode("utf-8", "replace"), 200)


class _Twice(Exception):
    """A key is there twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Twice(key)
        result[key] = value
    return result


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _too_many() -> Malformed:
    return Malformed(
        "safetensors.too_many_tensors", f"There are more than {MOST_TENSORS:,} tensors.", 8
    )
