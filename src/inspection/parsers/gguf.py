"""GGUF: typed keys and values, then what tensors there are, then their bytes.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 1 to 3, in both byte orders.
Arrays are counted and skipped; the elements of those with a fixed size are not even read.
"""

import struct
from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding
from modelharbor.inspection.source import Malformed, Source

from .headers import kept, text
from .parsed import MOST_COUNT, MOST_TENSORS, SHOWN_TENSORS, Counts, Parsed, product
from .templates import template_findings
from .window import Window

MOST_HEADER_BYTES: Final = 64 * 1024 * 1024
MOST_KEYS: Final = 100_000
MOST_TEXT_BYTES: Final = 1024 * 1024
MOST_NAME_BYTES: Final = 65_535  # of a key, as the format says
MOST_ELEMENTS: Final = 4_000_000  # of arrays that have to be gone through: texts and arrays
DEEPEST_ARRAY: Final = 4
MOST_DIMENSIONS: Final = 8
MOST_ALIGNMENT: Final = 1024 * 1024
DEFAULT_ALIGNMENT: Final = 32

BOOL, TEXT, ARRAY = 7, 8, 9  # types of values
# Of the types of values: the name, and how `struct` reads one.
_VALUE_TYPES: Final = (
    *(("UINT8", "B"), ("INT8", "b"), ("UINT16", "H"), ("INT16", "h"), ("UINT32", "I")),
    *(("INT32", "i"), ("FLOAT32", "f"), ("BOOL", "B"), ("STRING", ""), ("ARRAY", "")),
    *(("UINT64", "Q"), ("INT64", "q"), ("FLOAT64", "d")),
)
TYPE_NAMES: Final = dict(enumerate(name for name, _ in _VALUE_TYPES))
SCALARS: Final = {number: code for number, (_, code) in enumerate(_VALUE_TYPES) if code}

# Of the types of ggml: the number, the name, the elements of a block and its bytes. The last six
# are no longer in ggml, but there are files with them.
_GGML_TYPES: Final = (
    *((0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20)),
    *((6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40)),
    *((10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144)),
    *((13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292)),
    *((16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98)),
    *((19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110)),
    *((22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2)),
    *((26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56)),
    *((30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66)),
    *((39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18)),
    *((31, "Q4_0_4_4", 32, 18), (32, "Q4_0_4_8", 32, 18), (33, "Q4_0_8_8", 32, 18)),
    *((36, "IQ4_NL_4_4", 32, 18), (37, "IQ4_NL_4_8", 32, 18), (38, "IQ4_NL_8_8", 32, 18)),
)
GGML_TYPES: Final = {number: (name, block, size) for number, name, block, size in _GGML_TYPES}

# `general.file_type`, by the numbers of llama.cpp's LLAMA_FTYPE_….
_FILE_TYPES: Final = (
    *("F32", "F16", "Q4_0", "Q4_1", None, None, None, "Q8_0", "Q5_0", "Q5_1", "Q2_K"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M"),
    *("IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"),
    *("TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0"),
)
FILE_TYPES: Final = {number: name for number, name in enumerate(_FILE_TYPES) if name}
GUESSED: Final = 1024  # a bit of it: nobody has said so


def parse(source: Source) -> Parsed:
    header = _Header(source)
    header.run()
    values = header.values
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        architecture = None
    return Parsed(
        FileFormat.GGUF,
        header.counts.summary(
            architecture=text(architecture, 200) if architecture else None,
            context_length=_count(values.get(f"{architecture}.context_length")),
            quantization=_quantization(values.get("general.file_type"), header.counts),
        ),
        kept(
            {
                "version": header.version,
                "byte_order": "little" if header.order == "<" else "big",
                "tensor_count": header.counts.tensors,
                "metadata": values,
                "tensors": header.shown,
            }
        ),
        header.findings,
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_COUNT else None


def _quantization(file_type: Any, counts: Counts) -> str | None:
    """As the file says, else the type that most parameters have."""
    if type(file_type) is int and file_type & ~GUESSED in FILE_TYPES:
        return FILE_TYPES[file_type & ~GUESSED]
    return max(counts.by_dtype, key=lambda name: counts.by_dtype[name], default=None)


class _Header:
    """One pass over the header, with the position in it."""

    def __init__(self, source: Source) -> None:
        self.size = source.size
        self.window = Window(source)
        self.at = 4
        self.counts = Counts("gguf.shape")
        self.values: dict[str, Any] = {}
        self.shown: list[Any] = []
        self.findings: list[Finding] = []
        self._elements = 0
        if source.head(4) != b"GGUF":
            raise Malformed("gguf.magic", "The file does not start with 'GGUF'.", 0)
        version = self.window.read(4, 4)
        # The order of bytes is not written: a small number in the wrong order is a large one.
        self.order = "<" if version[:2] != b"\0\0" else ">"
        self.version = self._scalar("I")
        if self.version not in (1, 2, 3):
            raise Malformed("gguf.version", f"Version {self.version} is not known.", 4)
        self._length = "I" if self.version == 1 else "Q"

    def run(self) -> None:
        tensors, keys = self._scalar(self._length), self._scalar(self._length)
        if tensors > MOST_TENSORS:
            raise self._wrong("gguf.too_many_tensors", f"There are over {MOST_TENSORS:,} tensors.")
        if keys > MOST_KEYS:
            raise self._wrong("gguf.too_many_keys", f"There are over {MOST_KEYS:,} keys.")
        for _ in range(keys):
            self._pair()
        alignment = self._alignment()
        names: set[str] = set()
        spans = [self._tensor(names) for _ in range(tensors)]
        self._check_room(self.at)
        start = -(-self.at // alignment) * alignment
        end = start
        for offset, size in sorted(spans):
            if offset % alignment:
                raise self._wrong("gguf.alignment", "The bytes of a tensor are not aligned.")
            if start + offset < end:
                raise Malformed("gguf.overlap", "Two tensors share bytes.", start + offset)
            end = start + offset + size
            if end > self.size:
                raise Malformed(
                    "gguf.out_of_file", "A tensor lies beyond the end of the file.", self.size
                )
        if self.size > -(-end // alignment) * alignment:
            detail = "Something follows the tensors."
            self.findings.append(Finding(Level.WARNING, "gguf.trailing", detail, end))

    def _pair(self) -> None:
        start = self.at
        key = self._name("gguf.key")
        if key in self.values:
            raise Malformed("gguf.duplicate_key", f"{key[:100]!r} is there twice.", start)
        kind = self._scalar("I")
        if kind == TEXT:
            value: Any = self._text()
            if key.startswith("tokenizer.chat_template"):
                self.findings += template_findings(value, start)
            value = text(value)
        elif kind == ARRAY:
            value = self._array(1)
        elif kind in SCALARS:
            value = self._scalar(SCALARS[kind])
            value = bool(value) if kind == BOOL else value
        else:
            raise self._wrong("gguf.value_type", f"The type {kind} of a value is not known.")
        self.values[key] = value

    def _array(self, depth: int) -> dict[str, Any]:
        if depth > DEEPEST_ARRAY:
            raise self._wrong("gguf.nesting", f"Arrays lie deeper than {DEEPEST_ARRAY} levels.")
        kind, length = self._scalar("I"), self._scalar(self._length)
        if kind in SCALARS:
            self._skip(length * struct.calcsize(SCALARS[kind]))
        elif kind == TEXT:
            self._spend(length)
            self._skip_texts(length)
        elif kind == ARRAY:
            self._spend(4 * length)  # each takes as long as four texts
            for _ in range(length):
                self._array(depth + 1)
        else:
            raise self._wrong("gguf.value_type", f"The type {kind} of an array is not known.")
        return {"array": TYPE_NAMES[kind], "length": length}

    def _spend(self, elements: int) -> None:
        self._elements += elements
        if self._elements > MOST_ELEMENTS:
            raise self._wrong(
                "gguf.too_many_elements", f"Arrays have over {MOST_ELEMENTS:,} texts or arrays."
            )

    def _skip_texts(self, count: int) -> None:
        prefix = struct.Struct(self.order + self._length)
        while count:
            index = self.window.at(self.at, prefix.size)
            buffer, base = self.window.buffer, self.window.base
            last = len(buffer) - prefix.size
            while count and index <= last:
                (length,) = prefix.unpack_from(buffer, index)
                if length > MOST_TEXT_BYTES:
                    self.at = base + index
                    raise self._long_text()
                index += prefix.size + length
                count -= 1
            self.at = base + index
            self._check_room(self.at)

    def _alignment(self) -> int:
        alignment: Any = self.values.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            type(alignment) is not int
            or not 0 < alignment <= MOST_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self._wrong("gguf.alignment", "The alignment is not a power of two.")
        return int(alignment)

    def _tensor(self, names: set[str]) -> tuple[int, int]:
        """Where its bytes start after the header, and how many they are."""
        start = self.at
        name = self._name("gguf.tensor_name")
        if name in names:
            raise Malformed("gguf.duplicate_tensor", f"{name[:100]!r} is there twice.", start)
        names.add(name)
        dimensions = self._scalar("I")
        if dimensions > MOST_DIMENSIONS:
            raise self._wrong("gguf.shape", f"A tensor has over {MOST_DIMENSIONS} dimensions.")
        shape = [self._scalar(self._length) for _ in range(dimensions)]
        elements = product(shape, "gguf.shape", start)
        kind, offset = self._scalar("I"), self._scalar("Q")
        if kind not in GGML_TYPES:
            raise self._wrong("gguf.tensor_type", f"The type {kind} of a tensor is not known.")
        dtype, block, block_bytes = GGML_TYPES[kind]
        if (shape[0] if shape else 1) % block:
            raise self._wrong("gguf.shape", f"A row of a tensor is no whole blocks of {dtype}.")
        size = elements // block * block_bytes
        if size > MOST_COUNT:
            raise self._wrong("gguf.shape", "A tensor has more bytes than can be counted.")
        self.counts.add(dtype, elements)
        if len(self.shown) < SHOWN_TENSORS:
            self.shown.append({"name": text(name, 200), "dtype": dtype, "shape": shape})
        return offset, size

    def _name(self, rule: str) -> str:
        length = self._text_length()
        if length > MOST_NAME_BYTES:
            raise self._wrong(rule, f"A name is longer than {MOST_NAME_BYTES:,} bytes.")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._wrong(rule, "A name is not UTF-8.") from None

    def _text(self) -> str:
        return self._take(self._text_length()).decode("utf-8", "replace")

    def _text_length(self) -> int:
        length: int = self._scalar(self._length)
        if length > MOST_TEXT_BYTES:
            raise self._long_text()
        return length

    def _long_text(self) -> Malformed:
        return self._wrong("gguf.text_too_long", f"A text has over {MOST_TEXT_BYTES:,} bytes.")

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        index = self.window.at(self.at, size)
        (value,) = struct.unpack_from(self.order + code, self.window.buffer, index)
        self._skip(size)
        return value

    def _take(self, length: int) -> bytes:
        data = self.window.read(self.at, length)
        self._skip(length)
        return data

    def _skip(self, length: int) -> None:
        self._check_room(self.at + length)
        self.at += length

    def _check_room(self, end: int) -> None:
        if end > self.size:
            raise Malformed("source.truncated", "The file ends before its contents do.", self.size)
        if end > MOST_HEADER_BYTES:
            raise Malformed(
                "gguf.header_too_large",
                f"The header has over {MOST_HEADER_BYTES:,} bytes.",
                self.at,
            )

    def _wrong(self, rule: str, detail: str) -> Malformed:
        return Malformed(rule, detail, self.at)
