"""PyTorch: a ZIP with a pickle and the bytes of its storages, or all of it in one pickled stream.

The pickle is gone through, never loaded: the calls that rebuild tensors in it say their types and
shapes. Other pickles come here too, as a pickle does not say what it is for; those have no tensors.
"""

from dataclasses import dataclass
from typing import Any, Final

from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding
from modelharbor.inspection.source import Malformed, Source, of_bytes
from modelharbor.inspection.zip_members import Member, contents, members

from .headers import kept, text
from .opcodes import MOST_BYTES, Container, Global, Made, Stored, Stream, TooLarge, Walk
from .parsed import MOST_COUNT, MOST_TENSORS, SHOWN_TENSORS, Counts, Parsed, product

MAGIC_NUMBER: Final = 0x1950A86A20F9469CFC6C  # the first pickle of those from before the ZIP
PICKLE: Final = "data.pkl"
MOST_DIMENSIONS: Final = 64
MOST_WRAPPINGS: Final = 8

# Classes of storages, and the type of their elements; other types come in a storage of bytes, and
# are named beside it.
STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
}
_BYTES: Final = {
    1: (
        *("int8", "uint8", "bool", "qint8", "quint8", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    ),
    2: ("int16", "uint16", "float16", "bfloat16"),
    4: ("int32", "uint32", "float32", "qint32", "complex32"),
    8: ("int64", "uint64", "float64", "complex64"),
    16: ("complex128",),
}
SIZES: Final = {dtype: size for size, dtypes in _BYTES.items() for dtype in dtypes}
UNTYPED: Final = "UntypedStorage"
REBUILD: Final = frozenset(
    f"torch._utils.{name}"
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
)
PARAMETERS: Final = frozenset(
    {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
)
WRAPPED: Final = "torch._tensor._rebuild_from_type_v2"


def parse(source: Source) -> Parsed:
    if source.head(2) == b"PK":
        return _archive(source)
    return _stream(source)


@dataclass(slots=True)
class _Tensor:
    dtype: str
    shape: list[int]
    elements: int
    storage: str
    name: str | None = None


class _Tensors:
    """What the calls in a pickle rebuild."""

    def __init__(self) -> None:
        self.found: list[_Tensor] = []
        self.storages: dict[str, int] = {}  # the bytes that each needs
        self.walk = Walk(self._call, self._item)
        self._seen: dict[tuple[str, int, tuple[int, ...]], _Tensor] = {}

    def _item(self, key: str, value: Any) -> None:
        if isinstance(value, Made) and value.value.name is None:
            value.value.name = text(key, 200)

    def _call(self, name: str, arguments: Any) -> Any:
        for _ in range(MOST_WRAPPINGS):
            if name != WRAPPED:
                break
            if len(arguments) < 3 or not isinstance(arguments[0], Global):
                return Container()
            name, arguments = arguments[0].name, arguments[2]
            if not isinstance(arguments, tuple):
                return Container()
        if name in PARAMETERS and arguments and isinstance(arguments[0], Made):
            return arguments[0]
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if name in REBUILD and len(arguments) >= 4:
            tensor = self._rebuilt(arguments)
            return Container() if tensor is None else Made(tensor)
        return Container()

    def _rebuilt(self, arguments: tuple[Any, ...]) -> _Tensor | None:
        storage, offset, shape, stride, *rest = arguments
        stored = _storage(storage, rest[2] if len(rest) > 2 else None)
        if stored is None or not _are_counts(shape) or not _are_counts(stride):
            return None
        if type(offset) is not int or offset < 0 or len(shape) != len(stride):
            return None
        key, dtype, item, held = stored
        elements = product(shape, "pytorch.shape")
        pairs = zip(shape, stride, strict=True)
        last = offset + sum((size - 1) * step for size, step in pairs) if elements else 0
        if elements and last >= held:
            raise Malformed("pytorch.shape", "A tensor reaches beyond its storage.")
        self.storages[key] = held * item
        place = (key, offset, shape)
        if place in self._seen:
            return self._seen[place]
        if len(self.found) == MOST_TENSORS:
            raise Malformed("pytorch.too_many_tensors", f"There are over {MOST_TENSORS:,} tensors.")
        # One that repeats its elements, by steps of 0, has no more of them for that.
        tensor = _Tensor(dtype, list(shape), min(elements, held), key)
        self.found.append(tensor)
        self._seen[place] = tensor
        return tensor

    def parsed(self, header: dict[str, Any], findings: list[Finding] | None = None) -> Parsed:
        counts = Counts("pytorch.shape")
        for tensor in self.found:
            counts.add(tensor.dtype, tensor.elements)
        shown = [
            {"name": each.name, "dtype": each.dtype, "shape": each.shape}
            for each in self.found[:SHOWN_TENSORS]
        ]
        return Parsed(
            FileFormat.PYTORCH_PICKLE,
            counts.summary() if self.found else None,
            kept(
                {
                    **header,
                    "protocol": self.walk.protocol,
                    "tensor_count": counts.tensors,
                    "tensors": shown,
                }
            ),
            findings or [],
        )


def _storage(storage: Any, dtype: Any) -> tuple[str, str, int, int] | None:
    """Its key, the type of its elements, the bytes of one, and how many there are."""
    key = storage.key if isinstance(storage, Stored) else None
    if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage":
        return None
    _, kind, name, _, held = key[:5]
    if not isinstance(kind, Global) or not isinstance(name, str) or type(held) is not int:
        return None
    if not 0 <= held <= MOST_COUNT:
        raise Malformed("pytorch.shape", "A storage has an impossible size.")
    class_name = kind.name.rpartition(".")[2]
    if class_name in STORAGES:
        of_class = STORAGES[class_name]
        return name, of_class, SIZES[of_class], held
    if class_name != UNTYPED or not isinstance(dtype, Global):
        return None
    beside = dtype.name.removeprefix("torch.")
    if beside not in SIZES:
        return None
    return name, beside, SIZES[beside], held // SIZES[beside]


def _are_counts(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MOST_DIMENSIONS
        and all(type(each) is int and 0 <= each <= MOST_COUNT for each in value)
    )


def _archive(source: Source) -> Parsed:
    found = members(source)
    by_name = {member.name: member for member in found}
    names = [member.name for member in found]
    header: dict[str, Any] = {"container": "zip", "members": len(found)}
    findings: list[Finding] = []
    if any(name.split("/", 1)[-1].startswith("code/") for name in names):
        header["is_torchscript"] = True
        findings.append(Finding(Level.INFO, "pytorch.torchscript", "It holds code of TorchScript."))
    pickles = [name for name in names if name.rpartition("/")[2] == PICKLE]
    if len(pickles) != 1 or by_name[pickles[0]].size > MOST_BYTES:
        return Parsed(FileFormat.PYTORCH_PICKLE, None, kept(header), findings)
    folder = pickles[0].removesuffix(PICKLE)
    for name in ("version", "byteorder"):
        if member := by_name.get(folder + name):
            header[name] = contents(source, member, 64).decode("ascii", "replace").strip()
    pickled = of_bytes(contents(source, by_name[pickles[0]], MOST_BYTES))
    tensors = _Tensors()
    try:
        tensors.walk.run(Stream(pickled))
    except TooLarge:
        return Parsed(FileFormat.PYTORCH_PICKLE, None, kept(header), findings)
    except Malformed as problem:  # where in the file, not in the member
        raise Malformed(problem.rule, problem.detail, by_name[pickles[0]].offset) from None
    _check_storages(tensors, by_name, folder)
    return tensors.parsed(header, findings)


def _check_storages(tensors: _Tensors, by_name: dict[str, Member], folder: str) -> None:
    for key, size in tensors.storages.items():
        member = by_name.get(f"{folder}data/{key}") or by_name.get(f"{folder}tensors/{key}")
        if member is None or member.size < size:
            raise Malformed(
                "pytorch.storage",
                f"The storage {key[:100]!r} is not there, or has less than its tensors need.",
                member.offset if member else None,
            )


def _stream(source: Source) -> Parsed:
    """A pickle; with the magic number first, three more and then the storages."""
    stream = Stream(source)
    tensors = _Tensors()
    try:
        if tensors.walk.run(stream) != MAGIC_NUMBER:
            return tensors.parsed({"container": "pickle"})
        for _ in range(3):  # the version, what system it was, the object
            tensors.walk.run(stream)
        Walk(lambda *_: None, lambda *_: None).run(stream)  # keys of the storages
    except TooLarge:
        return Parsed(FileFormat.PYTORCH_PICKLE, None, kept({"container": "pickle"}))
    needed = sum(8 + size for size in tensors.storages.values())
    if needed > source.size - stream.at:
        raise Malformed("pytorch.storage", "The file ends before its storages do.", source.size)
    return tensors.parsed({"container": "legacy"})
