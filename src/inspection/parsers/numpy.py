"""NumPy: one array (.npy), or a ZIP of arrays (.npz).

https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. The header is a literal of
Python; it is read as one, never evaluated. An array of objects is a pickle.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding
from modelharbor.inspection.source import Malformed, Source, of_bytes
from modelharbor.inspection.zip_members import STORED, Member, contents, data_start, members

from .headers import kept, text
from .parsed import MOST_COUNT, SHOWN_TENSORS, Counts, Parsed, product

MAGIC: Final = b"\x93NUMPY"
MOST_HEADER_BYTES: Final = 10_000  # as NumPy allows
MOST_ARRAYS: Final = 10_000
USUAL_BYTES: Final = 1024  # that a header with what is in front of it does not pass
EXPECTED_AT_ONCE: Final = 32  # members
MOST_DIMENSIONS: Final = 64
MOST_FIELDS: Final = 256
DEEPEST_FIELDS: Final = 8
MOST_FINDINGS: Final = 10
_SIMPLE: Final = re.compile(r"([<>|=]?)([a-zA-Z?])(\d{0,9})(\[[0-9A-Za-z/]{1,16}\])?")
_NAMES: Final = {"i": "int", "u": "uint", "f": "float", "c": "complex"}
_SIZES: Final = {"i": {1, 2, 4, 8}, "u": {1, 2, 4, 8}, "f": {2, 4, 8, 12, 16}, "c": {8, 16, 24, 32}}
_LONG: Final = re.compile(r"\b(\d+)L\b")  # how Python 2 wrote some of the integers of a shape
_NESTED: Final = re.compile(r"[\[({]")


def parse(source: Source) -> Parsed:
    if source.head(2) == b"PK":
        return _archive(source)
    array = _array(source, source.size)
    counts = Counts("numpy.shape")
    counts.add(array.dtype, array.elements)
    findings = []
    end = array.data_start + array.size
    if array.is_pickle:
        findings.append(_pickle("The array", array.data_start))
    elif end > source.size:
        raise Malformed("numpy.size", "The file ends within its array.", source.size)
    elif end < source.size:
        findings.append(
            Finding(Level.WARNING, "numpy.trailing", "Something follows the array.", end)
        )
    header = {"descr": array.descr, "fortran_order": array.is_fortran, "shape": array.shape}
    return Parsed(FileFormat.NUMPY, counts.summary(), kept(header), findings)


@dataclass(frozen=True, slots=True)
class _Array:
    descr: Any
    dtype: str
    is_pickle: bool
    is_fortran: bool
    shape: list[int]
    elements: int
    size: int  # bytes of the data, of no pickle
    data_start: int


def _archive(source: Source) -> Parsed:
    counts = Counts("numpy.shape")
    findings: list[Finding] = []
    shown: list[Any] = []
    others: list[str] = []
    found = members(source)
    if len(found) > MOST_ARRAYS:
        raise Malformed("numpy.too_many_arrays", f"There are over {MOST_ARRAYS:,} arrays.")
    for number, member in enumerate(found):
        if number % EXPECTED_AT_ONCE == 0:
            group = found[number : number + EXPECTED_AT_ONCE]
            source.expect([(each.offset, USUAL_BYTES) for each in group])
        name = text(member.name.removesuffix(".npy"), 200)
        if not member.name.endswith(".npy"):
            others.append(name)
            continue
        array = _member(source, member, name)
        counts.add(array.dtype, array.elements)
        if array.is_pickle and len(findings) < MOST_FINDINGS:
            # Within the file only where it is not packed.
            at = data_start(source, member)
            offset = at + array.data_start if member.method == STORED else at
            findings.append(_pickle(f"The array {name!r}", offset))
        if len(shown) < SHOWN_TENSORS:
            shown.append({"name": name, "dtype": array.dtype, "shape": array.shape})
    header = {"tensor_count": counts.tensors, "tensors": shown, "others": others}
    return Parsed(FileFormat.NUMPY, counts.summary(), kept(header), findings)


def _member(source: Source, member: Member, name: str) -> _Array:
    start = contents(source, member, USUAL_BYTES)
    if len(start) >= 12 and int.from_bytes(start[8:10], "little") > USUAL_BYTES - 12:
        start = contents(source, member, MOST_HEADER_BYTES + 12)
    try:
        array = _array(of_bytes(start), member.size)
    except Malformed as problem:  # where in the archive, not in the member
        raise Malformed(problem.rule, f"{name}: {problem.detail}", member.offset) from None
    if not array.is_pickle and array.data_start + array.size != member.size:
        raise Malformed("numpy.size", f"The shape of {name!r} and its bytes differ.", member.offset)
    return array


def _pickle(what: str, offset: int) -> Finding:
    return Finding(Level.WARNING, "numpy.pickle", f"{what} is of objects: a pickle.", offset)


def _array(source: Source, size: int) -> _Array:
    """By the header; `size` is that of the whole."""
    head = source.head(12)
    if len(head) < 10 or head[:6] != MAGIC:
        raise Malformed("numpy.magic", "The array does not start with '\\x93NUMPY'.", 0)
    major, minor = head[6], head[7]
    if major not in (1, 2, 3) or minor != 0:
        raise Malformed("numpy.version", f"Version {major}.{minor} is not known.", 6)
    width = 2 if major == 1 else 4
    length = int.from_bytes(head[8 : 8 + width], "little")
    if length > MOST_HEADER_BYTES:
        raise Malformed(
            "numpy.header_too_large",
            f"The header claims {length:,} bytes: {MOST_HEADER_BYTES:,} are allowed.",
            8,
        )
    start = 8 + width
    if start + length > source.size:
        raise Malformed("numpy.size", "The file ends within its header.", source.size)
    header = _literal(source.read(start, length), "latin-1" if major < 3 else "utf-8")
    descr, is_fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    if (
        type(is_fortran) is not bool
        or not isinstance(shape, tuple)
        or not all(type(each) is int for each in shape)
        or len(shape) > MOST_DIMENSIONS
    ):
        raise Malformed("numpy.header", "The header has no valid shape or order.", start)
    kind = _Type()
    item = kind.size(descr, 0)
    elements = product(shape, "numpy.shape", start)
    if elements * item > MOST_COUNT:
        raise Malformed("numpy.shape", "The array has more bytes than can be counted.", start)
    # An object takes a byte of its pickle at the least.
    if start + length + elements * (1 if kind.has_objects else item) > size:
        raise Malformed("numpy.size", "The file ends within its array.", size)
    return _Array(
        descr=descr,
        dtype=kind.name if isinstance(descr, str) else "structured",
        is_pickle=kind.has_objects,
        is_fortran=is_fortran,
        shape=list(shape),
        elements=elements if item else 0,  # any number of nothing can be claimed
        size=elements * item,
        data_start=start + length,
    )


def _literal(raw: bytes, encoding: str) -> dict[str, Any]:
    try:
        source = raw.decode(encoding).strip()
        if len(_NESTED.findall(source)) > 4 * MOST_FIELDS:
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, of escapes in the literal
            value = ast.literal_eval(_LONG.sub(r"\1", source))
        is_header = isinstance(value, dict) and value.keys() == {"descr", "fortran_order", "shape"}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        is_header = False
    if not is_header:
        raise Malformed("numpy.header", "The header is not that of an array.", 10)
    return dict(value)


class _Type:
    """The bytes of an element, and what the type of the array is called."""

    def __init__(self) -> None:
        self.name = ""
        self.has_objects = False
        self._fields = 0

    def size(self, descr: Any, depth: int) -> int:
        if isinstance(descr, str):
            return self._simple(descr)
        if depth > DEEPEST_FIELDS:
            raise _bad_type()
        if isinstance(descr, list):
            return sum(self._field(each, depth + 1) for each in descr)
        if isinstance(descr, tuple) and len(descr) == 2:  # the type of elements, and their shape
            return self.size(descr[0], depth + 1) * self._shape(descr[1])
        raise _bad_type()

    def _field(self, field: Any, depth: int) -> int:
        self._fields += 1
        if self._fields > MOST_FIELDS or not isinstance(field, tuple) or len(field) not in (2, 3):
            raise _bad_type()
        return self.size(field[1], depth) * self._shape(field[2] if len(field) == 3 else ())

    def _shape(self, shape: Any) -> int:
        if type(shape) is int:
            shape = (shape,)
        if not isinstance(shape, tuple) or not all(type(each) is int for each in shape):
            raise _bad_type()
        return product(shape, "numpy.shape")

    def _simple(self, descr: str) -> int:
        found = _SIMPLE.fullmatch(descr)
        if found is None:
            raise _bad_type()
        _, kind, digits, unit = found.groups()
        size = int(digits or 0)
        if unit and kind not in "mM":
            raise _bad_type()
        if kind in _NAMES and size in _SIZES[kind]:
            self.name = f"{_NAMES[kind]}{8 * size}"
        elif kind in "b?" and size in (0, 1):
            self.name, size = "bool", 1
        elif kind == "O":
            self.name, self.has_objects, size = "object", True, 8
        elif kind in "mM" and size == 8:
            self.name = "timedelta64" if kind == "m" else "datetime64"
        elif kind in "SaUV":
            self.name = {"S": "bytes", "a": "bytes", "U": "str", "V": "void"}[kind]
            size *= 4 if kind == "U" else 1
        else:
            raise _bad_type()
        return size


def _bad_type() -> Malformed:
    return Malformed("numpy.dtype", "The type of the array is not known.", 10)
