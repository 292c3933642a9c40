"""What a pickle would import and call, read off its opcodes: nothing is ever unpickled.

*Every global must be known to be harmless.* A list of bad ones is never complete (any function of any
package can be called), so an unknown one makes the file SUSPICIOUS, and one that picklescan or this
module knows to be dangerous makes it UNSAFE.

The walk keeps the depth of the stack and its marks as the unpickler does, so that it ends exactly where
the unpickler would, and knows which strings STACK_GLOBAL gets only where these were pushed right before
it; whatever else is on the stack then counts as unknown.
"""

import io
import logging
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Final

from picklescan.scanner import (  # type: ignore[import-untyped]  # it has no types
    SafetyLevel,
    scan_pickle_bytes,
)
from picklescan.torch import MAGIC_NUMBER  # type: ignore[import-untyped]  # as above

from .reports import Report, shown
from .source import Source

WINDOW_BYTES: Final = 1024 * 1024
MOST_LINE_BYTES: Final = 256 * 1024 * 1024  # of an argument that ends with its line
KEPT_LINE_BYTES: Final = 4096  # of it
MOST_NAME: Final = 256  # characters of a module or name that is known; longer ones are unknown
MOST_STACKED: Final = 10_000  # pickles that follow one another
LEGACY_TORCH_PICKLES: Final = 5  # magic number, version, system, object, keys of the storages

# The unpickler of torch.load(weights_only=True) allows these, or they make plain values of Python and
# NumPy. None of them calls anything but its own arguments, which the pickle has to import as well.
_STORAGES: Final = (
    *("Double", "Float", "Half", "Long", "Int", "Short", "Char", "Byte", "Bool", "BFloat16"),
    *("ComplexDouble", "ComplexFloat", "QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4"),
)
_TORCH_TYPES: Final = (
    *("float", "float16", "float32", "float64", "half", "double", "bfloat16", "bool"),
    *("int", "int8", "int16", "int32", "int64", "short", "long", "uint8", "uint16", "uint32"),
    *("uint64", "complex32", "complex64", "complex128", "cfloat", "cdouble", "chalf"),
    *("quint8", "qint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric"),
    *("per_channel_symmetric", "per_channel_affine_float_qparams"),
)
_PLAIN: Final = (
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
    *("object", "range", "set", "slice", "str", "tuple"),
)
_NUMPY_TYPES: Final = (
    *("bool", "bool_", "int8", "int16", "int32", "int64", "intc", "intp", "longlong"),
    *("uint8", "uint16", "uint32", "uint64", "uintc", "uintp", "ulonglong"),
    *("float16", "float32", "float64", "longdouble", "complex64", "complex128", "clongdouble"),
    *("bytes_", "str_", "void", "object_", "datetime64", "timedelta64"),
)
HARMLESS: Final[dict[str, frozenset[str]]] = {
    "builtins": frozenset(_PLAIN),
    "__builtin__": frozenset({*_PLAIN, "long", "unicode", "xrange"}),
    "collections": frozenset({"OrderedDict", "Counter", "defaultdict", "deque"}),
    "copyreg": frozenset({"_reconstructor"}),
    "copy_reg": frozenset({"_reconstructor"}),
    "_codecs": frozenset({"encode"}),
    "types": frozenset({"SimpleNamespace"}),
    "uuid": frozenset({"UUID", "SafeUUID"}),
    "datetime": frozenset({"date", "datetime", "time", "timedelta", "timezone"}),
    "decimal": frozenset({"Decimal"}),
    "fractions": frozenset({"Fraction"}),
    "numpy": frozenset({"dtype", "ndarray", *_NUMPY_TYPES}),
    **dict.fromkeys(
        ("numpy.core.multiarray", "numpy._core.multiarray"),
        frozenset({"_reconstruct", "scalar"}),
    ),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), frozenset({"_frombuffer"})),
    "torch": frozenset(
        {
            *(f"{each}Storage" for each in _STORAGES),
            *(f"{each}Tensor" for each in _STORAGES),
            *_TORCH_TYPES,
            *("Size", "Tensor", "device"),
        }
    ),
    "torch._utils": frozenset(
        {
            *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"),
            *("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_qtensor"),
            *("_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"),
            *("_rebuild_nested_tensor", "_rebuild_wrapper_subclass"),
            *("_rebuild_device_tensor_from_numpy", "_rebuild_device_tensor_from_cpu_tensor"),
        }
    ),
    "torch._tensor": frozenset({"_rebuild_from_type_v2"}),
    "torch.nn.parameter": frozenset({"Parameter"}),
    "torch.jit._pickle": frozenset(
        {
            *("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist"),
            *("build_tensor_from_id", "restore_type_tag"),
        }
    ),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.storage": frozenset({"TypedStorage", "UntypedStorage", "_TypedStorage"}),
}

# Beside what picklescan knows: they import, run, load other pickles or write files.
_DANGEROUS_MODULES: Final = frozenset(
    {
        *("_posixsubprocess", "_winapi", "_xxsubinterpreters", "antigravity", "cffi", "code"),
        *("codeop", "dill", "ftplib", "importlib", "IPython", "marshal", "runpy", "site"),
        *("smtplib", "socketserver", "telnetlib", "zipimport"),
    }
)
_DANGEROUS_NAMES: Final[dict[str, frozenset[str]]] = {
    "builtins": frozenset(
        {"__import__", "delattr", "execfile", "file", "input", "reload", "setattr"}
    ),
    "types": frozenset({"FunctionType", "LambdaType", "MethodType"}),
    "joblib": frozenset({"load"}),
    "joblib.numpy_pickle": frozenset({"load"}),
    "numpy": frozenset({"load", "fromfile", "save"}),
    "pandas": frozenset({"read_pickle"}),
    "pandas.io.pickle": frozenset({"read_pickle"}),
    "torch": frozenset({"load"}),
    "torch.hub": frozenset({"load", "load_state_dict_from_url", "download_url_to_file"}),
    "torch.jit": frozenset({"load"}),
    "torch.utils.cpp_extension": frozenset({"load", "load_inline"}),
}


class Judgement(Enum):
    HARMLESS = "HARMLESS"
    UNKNOWN = "UNKNOWN"
    DANGEROUS = "DANGEROUS"


@cache
def judge(module: str, name: str) -> Judgement:
    """Of a global; under the names that Python 3 gives to those of Python 2 as well."""
    if name in HARMLESS.get(module, ()):
        return Judgement.HARMLESS
    spelled = [(module, name)]
    if (module, name) in NAME_MAPPING:
        spelled.append(NAME_MAPPING[module, name])
    elif module in IMPORT_MAPPING:
        spelled.append((IMPORT_MAPPING[module], name))
    dangerous = any(_dangerous(*each) for each in spelled)
    return Judgement.DANGEROUS if dangerous else Judgement.UNKNOWN


def _dangerous(module: str, name: str) -> bool:
    if module.partition(".")[0] in _DANGEROUS_MODULES:
        return True
    if name in _DANGEROUS_NAMES.get("builtins" if module == "__builtin__" else module, ()):
        return True
    # Asked by a pickle that imports this one global, which is what its interface takes. The word
    # "unknown" in a name has a meaning for it.
    names = [
        each.replace("unknown", "known").encode("utf-8", "surrogatepass") for each in (module, name)
    ]
    pushed = b"".join(b"X" + len(each).to_bytes(4, "little") + each for each in names)
    logging.getLogger("picklescan").disabled = True
    found = scan_pickle_bytes(io.BytesIO(pushed + b"\x93."), "").globals
    return any(each.safety is SafetyLevel.Dangerous for each in found)


@dataclass(slots=True)
class Walk:
    """Of one pickle. `end` is behind its STOP; None where it is broken, and `why` says how."""

    start: int
    end: int | None = None
    rule: str = ""
    why: str = ""
    at: int = 0  # where the walk ended
    imports: dict[tuple[str, str], int] = field(default_factory=dict)  # and where
    hidden: int | None = None  # where it imports what no one can tell by reading
    extension: int | None = None
    frame: int | None = None  # where a frame ends within something
    called: bool = False  # something that it imported, or may have
    first: int | None = None  # the number, where the first thing is one
    arrays: bool = False  # joblib writes their bytes into the middle of a pickle


def scan_pickles(source: Source, report: Report, start: int = 0, *, sure: bool = True) -> bool:
    """Of the pickles that follow one another from `start`: whether there are any.

    Where one is not `sure` that contents are pickles at all, they count as such when something would
    be called, or when they are pickles to their very end and import something.
    """
    walks: list[Walk] = []
    trailing: int | None = None
    legacy = False
    at = start
    while at < source.size:
        walk = walk_pickle(source, at, report)
        too_long = walk.rule == _TooLong.rule
        found = walk.called or walk.frame is not None or legacy or too_long
        if walks and walk.end is None and not found:
            # It is no pickle; a loader that reads on from here would find nothing to call.
            trailing = at
            break
        legacy = legacy or (not walks and walk.first == MAGIC_NUMBER and not walk.imports)
        walks.append(walk)
        if walk.end is None or walk.arrays or (legacy and len(walks) == LEGACY_TORCH_PICKLES):
            break
        if len(walks) == MOST_STACKED:
            report.suspicious("pickle.stacked", "Very many pickles follow one another.", at)
            break
        at = walk.end
    if not (sure or legacy or _are_pickles(walks, source)):
        return False
    for walk in walks:
        _tell(walk, report)
    if trailing is not None:
        report.suspicious("pickle.trailing", "Other data follow the pickle.", trailing)
    if legacy and len(walks) < LEGACY_TORCH_PICKLES:
        report.broken("pickle.truncated", "The file ends before its contents do.", source.size)
    return bool(walks)


def _are_pickles(walks: Sequence[Walk], source: Source) -> bool:
    if any(walk.called or walk.frame is not None or walk.rule == _TooLong.rule for walk in walks):
        return True
    imports = any(
        walk.hidden is not None
        or walk.extension is not None
        or any(module.strip() and name.strip() for module, name in walk.imports)
        for walk in walks
    )
    if any(
        walk.end is not None and any(judge(*each) is Judgement.DANGEROUS for each in walk.imports)
        for walk in walks
    ):
        return True  # the import alone may do it, whatever follows
    end = walks[-1].end if walks else None
    return imports and end is not None and source.size - end <= 2  # an editor's end of a line


def _tell(walk: Walk, report: Report) -> None:
    for (module, name), at in walk.imports.items():
        spelled = f"{shown(module)}.{shown(name)}"
        match judge(module, name):
            case Judgement.DANGEROUS:
                report.unsafe(
                    "pickle.import.dangerous",
                    f"Loading it imports {spelled}, which can run code or change the system.",
                    at,
                )
            case Judgement.UNKNOWN if not _joblib(module, name):
                report.suspicious(
                    "pickle.import.unknown",
                    f"Loading it imports {spelled}, which is not known to be harmless.",
                    at,
                )
    if walk.hidden is not None:
        report.suspicious(
            "pickle.import.hidden",
            "Loading it imports something whose name cannot be read off.",
            walk.hidden,
        )
    if walk.extension is not None:
        report.suspicious(
            "pickle.extension",
            "Loading it imports something that only the loading program knows by number.",
            walk.extension,
        )
    if walk.frame is not None:
        # The unpickler that is written in C then leaves bytes out, the one in Python refuses.
        report.suspicious(
            "pickle.frame",
            "A frame ends within something: readers see different things.",
            walk.frame,
        )
    if walk.arrays:
        report.suspicious(
            "pickle.joblib",
            "Arrays lie in the middle of the pickle; what follows them was not looked at.",
            walk.at,
        )
    elif walk.end is None:
        report.broken(walk.rule, walk.why, walk.at)


# Opcodes ----------------------------------------------------------------------------------------

_LINE, _LINES = -1, -6  # otherwise the number of bytes of an argument, or one of pickletools' signs
_LENGTHS: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}
_TEXTS: Final = {
    **dict.fromkeys(("UNICODE",), "raw_unicode_escape"),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), "utf-8"),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING", "STRING"), "ascii"),
}
_CALLS: Final = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD"})
_MEMO_WRITES: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_MEMO_READS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_EXTENSIONS: Final = frozenset({"EXT1", "EXT2", "EXT4"})
_LOST: Final = -1
_NUMBERS: Final = frozenset({"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"})


@dataclass(frozen=True, slots=True)
class _Opcode:
    name: str
    argument: int  # bytes, _LINE, _LINES, or 0
    length: int  # bytes of the length in front of the argument, or 0
    signed: bool  # that length
    needs: int  # things on the stack; where it takes all down to a mark: below that
    adds: int  # how much higher the stack is afterwards; where it takes … : than below the mark
    to_mark: bool
    special: bool  # it does more than moving the stack


def _opcode(info: pickletools.OpcodeInfo) -> _Opcode:
    argument = 0 if info.arg is None else info.arg.n
    length, signed = _LENGTHS.get(argument, (0, False))
    if info.name in ("GLOBAL", "INST"):
        argument = _LINES
    before, after = list(info.stack_before), list(info.stack_after)
    to_mark = pickletools.markobject in before
    if to_mark:
        before = before[: before.index(pickletools.markobject)]
    special = (
        info.name in _CALLS | _MEMO_WRITES | _MEMO_READS | _EXTENSIONS | _NUMBERS
        or info.name in _TEXTS
        or info.name in ("MARK", "POP", "STOP", "GLOBAL", "STACK_GLOBAL", "PROTO", "FRAME")
    )
    return _Opcode(
        info.name,
        argument,
        length,
        signed,
        len(before),
        len(after) - len(before),
        to_mark,
        special,
    )


_OPCODES: Final[Sequence[_Opcode | None]] = [
    next((_opcode(info) for info in pickletools.opcodes if ord(info.code) == code), None)
    for code in range(256)
]


class _Broken(Exception):
    rule = "pickle.malformed"


class _TooLong(_Broken):
    rule = "pickle.too_long"


class _Window:
    """Bytes of the source from a place on, fetched as they are wanted."""

    def __init__(self, source: Source, at: int) -> None:
        self._source, self.size = source, source.size
        self.start, self.kept = at, b""
        self._budget = MOST_LINE_BYTES
        self._next = 64  # most pickles are short, or skipped over for most of their length

    def read(self, at: int, length: int) -> bytes:
        offset = at - self.start
        if offset < 0 or offset + length > len(self.kept):
            if at + length > self._source.size:
                raise _Broken("The file ends within the pickle.")
            self._next = min(self._next * 16, WINDOW_BYTES)
            fetched = min(max(length, self._next), self._source.size - at)
            self.start, self.kept, offset = at, self._source.read(at, fetched), 0
        return self.kept[offset : offset + length]

    def line(self, at: int) -> tuple[bytes, int]:
        """The beginning of it, and where the next one begins. As the unpickler does, the last byte of
        a file counts as an end of its line whatever it is."""
        offset = at - self.start
        found = self.kept.find(b"\n", offset) if offset >= 0 else -1
        if found >= 0:
            return self.kept[offset : min(found, offset + KEPT_LINE_BYTES)], (
                self.start + found + 1
            )
        size = self._source.size
        if at >= size:
            raise _Broken("The file ends within the pickle.")
        kept, length = self.read(at, min(KEPT_LINE_BYTES, size - at)), 256
        while at < size:
            length = min(length * 16, size - at, WINDOW_BYTES)
            if (end := self.read(at, length).find(b"\n")) >= 0:
                return kept.partition(b"\n")[0], at + end + 1
            at += length
            self._budget -= length
            if self._budget < 0:
                raise _TooLong("The pickle is too long to be looked at.")
        return kept[:-1] if len(kept) < KEPT_LINE_BYTES else kept, size


def walk_pickle(source: Source, start: int, report: Report) -> Walk:
    """From `start` to its STOP, or to where the unpickler would fail."""
    walk = Walk(start, at=start)
    try:
        _walk(_Window(source, start), walk, report)
    except _Broken as broken:
        walk.rule, walk.why = broken.rule, str(broken)
    return walk


def _walk(window: _Window, walk: Walk, report: Report) -> None:
    depth = fence = 0
    marks: list[int] = []
    memo: dict[int, str | None] = {}
    top: str | None = None  # what is on the stack, where it is certainly this string
    below: str | None = None  # and what is below it
    at = walk.at
    budget = report.opcodes
    known = _OPCODES
    first = True
    name, kept, base = b"", b"", 0
    frame_end = 0
    try:
        while True:
            walk.at = at
            offset = at - base
            if not 0 <= offset < len(kept):
                window.read(at, 1)
                kept, base = window.kept, window.start
                offset = at - base
            opcode = known[kept[offset]]
            if opcode is None:
                raise _Broken("There is no such opcode of pickles.")
            budget -= 1
            if budget < 0:
                raise _TooLong("The pickle is too long to be looked at.")
            at += 1

            value = b""
            length = opcode.argument
            if length > 0:
                if opcode.special:
                    value = window.read(at, length)
                elif at + length > window.size:
                    raise _Broken("The file ends within the pickle.")
                at += length
            elif opcode.length:
                length = int.from_bytes(
                    window.read(at, opcode.length), "little", signed=opcode.signed
                )
                at += opcode.length
                if length < 0 or at + length > window.size:
                    raise _Broken("The file ends within the pickle.")
                if length <= MOST_NAME * 4 and opcode.special:
                    value = window.read(at, length)
                at += length
            elif length < 0:
                value, at = window.line(at)
                if length == _LINES:
                    name, at = window.line(at)

            if walk.at < frame_end < at and walk.frame is None:
                walk.frame = walk.at
            if opcode.to_mark:
                if opcode.name == "INST":  # some unpicklers import before they look for the mark
                    module, called = (each.decode("utf-8", "replace") for each in (value, name))
                    _import(walk, module, called)
                if not marks:
                    raise _Broken("The pickle takes more from its stack than there is.")
                taken = depth - marks[-1]
                depth = marks.pop()
                fence = marks[-1] if marks else 0
                if opcode.name == "OBJ" and taken < 1:
                    raise _Broken("The pickle takes more from its stack than there is.")
            if opcode.name == "POP" and marks and depth == fence:
                marks.pop()
                fence = marks[-1] if marks else 0
                top = below = None
                continue
            if depth - fence < opcode.needs:
                raise _Broken("The pickle takes more from its stack than there is.")
            depth += opcode.adds

            if not opcode.special:
                top = below = None
                continue
            name_of = opcode.name
            if name_of in _MEMO_WRITES:
                key = len(memo) if name_of == "MEMOIZE" else _key(value, opcode.argument)
                memo[key] = top
                continue
            if name_of in ("PROTO", "FRAME"):
                if name_of == "PROTO" and value[0] > 5:
                    raise _Broken("The pickle is of a protocol that does not exist.")
                if name_of == "FRAME":
                    if walk.at < frame_end and walk.frame is None:
                        walk.frame = walk.at
                    frame_end = at + int.from_bytes(value, "little")
                continue
            if name_of in _MEMO_READS:
                known_memo = None if _LOST in memo else memo.get(_key(value, opcode.argument))
                top, below = known_memo, top
                continue
            if name_of in _TEXTS:
                top, below = _text(name_of, value, length), top
                continue
            if name_of == "STACK_GLOBAL":
                if top is None or below is None:
                    walk.hidden = walk.at if walk.hidden is None else walk.hidden
                else:
                    _import(walk, below, top)
            elif name_of == "GLOBAL":
                _import(walk, value.decode("utf-8", "replace"), name.decode("utf-8", "replace"))
            elif name_of in _EXTENSIONS:
                walk.extension = walk.at if walk.extension is None else walk.extension
            elif name_of == "MARK":
                depth -= opcode.adds
                marks.append(depth)
                fence = depth
            elif name_of in _NUMBERS and first:
                walk.first = _long(name_of, value)
            elif name_of == "STOP":
                walk.end = at
                return
            if name_of in _CALLS:
                imported = walk.imports or walk.hidden is not None or walk.extension is not None
                walk.called = walk.called or bool(imported)
                if name_of == "BUILD" and any(_joblib(*each) for each in walk.imports):
                    walk.at, walk.arrays = at, True
                    return
            top = below = None
            first = False
    finally:
        report.opcodes = max(budget, 0)


def _import(walk: Walk, module: str, name: str) -> None:
    if (module, name) not in walk.imports:
        if len(walk.imports) >= 10_000:
            raise _TooLong("The pickle imports too many things.")
        walk.imports[module, name] = walk.at


def _joblib(module: str, name: str) -> bool:
    return module.startswith("joblib.numpy_pickle") and name.endswith("ArrayWrapper")


def _key(value: bytes, argument: int) -> int:
    """Of the memo; _LOST where no one can tell, and then all that the memo holds is unknown."""
    if argument > 0:
        return int.from_bytes(value, "little")
    if len(value) >= KEPT_LINE_BYTES:  # cut off, and zeros may be all that was kept of a number
        return _LOST
    try:
        return int(value.partition(b"\x00")[0])
    except ValueError:
        return _LOST


def _long(name: str, value: bytes) -> int | None:
    if name in ("LONG1", "LONG4"):
        return int.from_bytes(value, "little", signed=True)
    text = value.removesuffix(b"L")
    return int(text) if name in ("INT", "LONG") and text.isdigit() and len(text) < 30 else None


def _text(name: str, value: bytes, length: int) -> str | None:
    if length > 0 and not value:  # longer than what was read
        return None
    if name == "STRING":
        value = value.strip()
        value, quotes = value[1:-1], value[:1] + value[-1:]
        if b"\\" in value or quotes not in (b"''", b'""'):
            return None
    try:
        text = value.decode(_TEXTS[name], "surrogatepass" if _TEXTS[name] == "utf-8" else "strict")
    except UnicodeDecodeError:
        return None
    return text if len(text) <= MOST_NAME else None
