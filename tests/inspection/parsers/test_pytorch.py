"""PyTorch, as its own writer of pickles lays them out: gone through, never loaded."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers.opcodes import MOST_OPCODES
from modelharbor.inspection.parsers.pytorch import MAGIC_NUMBER, parse
from modelharbor.inspection.source import of_bytes
from tests.inspection.parsers.contents import Counted, rule_of, rules_of


@pytest.fixture(autouse=True)
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of these names, as a pickler looks for what it names; there is nothing in them."""
    names: dict[str, list[str]] = {
        "torch": ["FloatStorage", "HalfStorage", "LongStorage", "BFloat16Storage", "Size"],
        "torch.storage": ["UntypedStorage"],
        "torch._utils": ["_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"],
        "torch._tensor": ["_rebuild_from_type_v2"],
    }
    for module_name, attributes in names.items():
        module = types.ModuleType(module_name)
        for attribute in [*attributes, "float8_e4m3fn"]:
            made = type(attribute, (), {"__module__": module_name})
            setattr(module, attribute, made)
        monkeypatch.setitem(sys.modules, module_name, module)


def named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules[module], attribute)


@dataclass
class Storage:
    kind: str
    key: str
    held: int


@dataclass
class Tensor:
    storage: Storage
    shape: tuple[int, ...]
    offset: int = 0
    stride: tuple[int, ...] | None = None
    dtype: str | None = None
    wrap: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        stride = self.stride
        if stride is None:
            steps = [1]
            for size in reversed(self.shape[1:]):
                steps.insert(0, steps[0] * size)
            stride = tuple(steps[: len(self.shape)])
        arguments: tuple[Any, ...] = (self.storage, self.offset, self.shape, stride, False)
        arguments += (OrderedDict(),)
        function = "torch._utils._rebuild_tensor_v2"
        if self.dtype:
            arguments += (named(f"torch.{self.dtype}"),)
            function = "torch._utils._rebuild_tensor_v3"
        if self.wrap == "type":
            return named("torch._tensor._rebuild_from_type_v2"), (
                named(function),
                named("torch.Size"),
                arguments,
                {},
            )
        return named(function), arguments


@dataclass(eq=False)
class Parameter:
    tensor: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return named("torch._utils._rebuild_parameter"), (self.tensor, True, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Storage):
            return ("storage", named(value.kind), value.key, "cpu", value.held)
        return None


def pickled(value: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def archive_of(
    value: Any, sizes: dict[str, int], protocol: int = 2, more: dict[str, bytes] | None = None
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value, protocol))
        for name, contents in {"byteorder": b"little", "version": b"3\n", **(more or {})}.items():
            archive.writestr(f"archive/{name}", contents)
        for key, size in sizes.items():
            archive.writestr(f"archive/data/{key}", b"\0" * size)
    return file.getvalue()


def state() -> tuple[dict[str, Any], dict[str, int]]:
    embedding = Storage("torch.FloatStorage", "0", 24)
    return OrderedDict(
        {
            "embed.weight": Tensor(embedding, (6, 4)),
            "head.weight": Tensor(embedding, (6, 4)),  # the same elements
            "norm": Parameter(Tensor(Storage("torch.HalfStorage", "1", 4), (4,))),
            "step": Tensor(Storage("torch.LongStorage", "2", 1), ()),
            "row": Tensor(embedding, (4,), offset=20),
            "fp8": Tensor(
                Storage("torch.storage.UntypedStorage", "3", 8), (2, 4), dtype="float8_e4m3fn"
            ),
            "wrapped": Tensor(Storage("torch.BFloat16Storage", "4", 2), (2,), wrap="type"),
            "spread": Tensor(Storage("torch.FloatStorage", "5", 1), (1000,), stride=(0,)),
        }
    ), {"0": 96, "1": 8, "2": 8, "3": 8, "4": 4, "5": 4}


EXPECTED = {"float32": 24 + 4 + 1, "float16": 4, "int64": 1, "float8_e4m3fn": 8, "bfloat16": 2}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state(protocol: int) -> None:
    parsed = parse(of_bytes(archive_of(*state(), protocol=protocol)))
    assert parsed.format is FileFormat.PYTORCH_PICKLE
    assert parsed.tensors is not None
    assert parsed.tensors.parameters_by_dtype == EXPECTED
    assert parsed.tensors.tensor_count == 7
    assert parsed.header["tensors"][0] == {
        "name": "embed.weight",
        "dtype": "float32",
        "shape": [6, 4],
    }
    assert [each["name"] for each in parsed.header["tensors"]] == [
        *("embed.weight", "norm", "step", "row", "fp8", "wrapped", "spread"),
    ]
    assert parsed.header["byteorder"] == "little"
    assert parsed.header["version"] == "3"
    assert parsed.header["protocol"] == protocol
    assert parsed.findings == []


def test_a_nested_checkpoint() -> None:
    tensors, sizes = state()
    parsed = parse(of_bytes(archive_of({"epoch": 3, "state_dict": tensors, "xs": [1, 2]}, sizes)))
    assert parsed.tensors is not None
    assert parsed.tensors.parameters_by_dtype == EXPECTED


def legacy(value: Any, storages: int) -> bytes:
    parts = [pickle.dumps(each, 2) for each in (MAGIC_NUMBER, 1001, {"little_endian": True})]
    parts += [pickled(value), pickle.dumps(["0"], 2), b"\0" * storages]
    return b"".join(parts)


def test_from_before_the_archives() -> None:
    value = {"w": Tensor(Storage("torch.FloatStorage", "0", 6), (2, 3))}
    parsed = parse(of_bytes(legacy(value, 8 + 24)))
    assert parsed.tensors is not None
    assert parsed.tensors.parameters_by_dtype == {"float32": 6}
    assert parsed.header["container"] == "legacy"
    assert rule_of(parse, legacy(value, 8 + 23)) == "pytorch.storage"


def test_other_pickles_have_no_tensors() -> None:
    for value in ({"a": [1, (2,), {3}]}, {"b": b"x" * 300, "c": frozenset({1.5})}, 2**70):
        for protocol in range(6):
            parsed = parse(of_bytes(pickle.dumps(value, protocol)))
            assert (parsed.tensors, parsed.header["container"]) == (None, "pickle")


class Marker:
    """Whoever loads it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_called(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "called"
    parse(of_bytes(pickle.dumps(Marker(marker), protocol)))
    parse(of_bytes(archive_of({"a": Marker(marker)}, {})))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Marker(marker), protocol))
    assert marker.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(cos\nsystem\nVid\no.",  # OBJ
        b"(Vid\nios\nsystem\n.",  # INST
        b"cos\nsystem\n)}\x92.",  # NEWOBJ_EX
        b"Vos\nVsystem\n\x93)\x81.",  # STACK_GLOBAL, NEWOBJ
        b"K\x01K\x02\x93.",  # of no names
        b"K\x01)R.",  # a call of a number
        b"P1\n.",  # PERSID
        b"\x82\x01.",  # EXT1
        b"(K\x01K\x02d(K\x01l0(K\x01\x91.",  # DICT, LIST, FROZENSET
        b"\x8f(K\x01\x90.",  # EMPTY_SET, ADDITEMS
        b"](K\x01eK\x02a.",  # APPENDS, APPEND
        b"}K\x01K\x02s}b.",  # SETITEM, BUILD
        b"N2\x85.",  # DUP, TUPLE1
        b"(NN1N.",  # POP_MARK
        b"\x97\x98.",  # NEXT_BUFFER, READONLY_BUFFER
        b"cos\nsystem\np0\ng0\n)R.",  # PUT, GET
    ],
)
def test_every_opcode_is_gone_through(opcodes: bytes) -> None:
    parsed = parse(of_bytes(b"\x80\x02" + opcodes))
    assert (parsed.tensors, parsed.findings) == (None, [])


def test_what_is_not_gone_through_has_no_tensors() -> None:
    many = b"\x80\x02" + b"N0" * (MOST_OPCODES // 2 + 1) + b"N."
    assert parse(of_bytes(many)).tensors is None
    large = b"\x80\x04\x8e" + struct.pack("<Q", 40_000_000)
    source = Counted(large, 40_000_100)
    assert parse(source).tensors is None
    assert source.bytes < 1_000_000
    archive = archive_of({}, {}, more={"sub/data.pkl": pickled({})})
    assert parse(of_bytes(archive)).tensors is None


def test_code_of_torchscript_is_told() -> None:
    parsed = parse(
        of_bytes(archive_of(*state(), more={"code/__torch__.py": b"def forward(): ..."}))
    )
    assert rules_of(parsed) == [("INFO", "pytorch.torchscript")]
    assert parsed.header["is_torchscript"] is True


def one(held: int, shape: tuple[int, ...], size: int, **more: Any) -> Callable[[], bytes]:
    return lambda: archive_of(
        {"w": Tensor(Storage("torch.FloatStorage", "0", held), shape, **more)}, {"0": size}
    )


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "less than the tensor": (one(6, (2, 3), 23), "pytorch.storage"),
    "no storage": (lambda: archive_of(state()[0], {}), "pytorch.storage"),
    "1 TB claimed": (one(2**38, (2**38,), 4), "pytorch.storage"),
    "beyond the storage": (one(6, (2, 4), 24), "pytorch.shape"),
    "beyond it by offset": (one(6, (2,), 24, offset=5), "pytorch.shape"),
    "beyond it by steps": (one(6, (2,), 24, stride=(6,)), "pytorch.shape"),
    "2^64 elements": (one(6, (2**32, 2**32), 24, stride=(0, 0)), "pytorch.shape"),
    "too many, times 0": (one(6, (2**32, 2**32, 0), 24, stride=(0, 0, 0)), "pytorch.shape"),
    "a storage of -1": (one(-1, (0,), 24), "pytorch.shape"),
    "a storage of 2^63": (one(2**63, (0,), 24), "pytorch.shape"),
    "no opcode": (lambda: b"\x80\x02\xff", "pickle.broken"),
    "nothing": (lambda: b"", "pickle.broken"),
    "no end": (lambda: pickle.dumps([1, 2], 2)[:-1], "pickle.broken"),
    "nothing on the stack": (lambda: b"\x80\x020.", "pickle.broken"),
    "no mark": (lambda: b"\x80\x02K\x01t.", "pickle.broken"),
    "no memo": (lambda: b"\x80\x02h\x07.", "pickle.broken"),
    "an odd number of items": (lambda: b"\x80\x02}(K\x01u.", "pickle.broken"),
    "a text that is cut": (lambda: b"\x80\x02X\xff\x00\x00\x00a", "pickle.broken"),
    "a text of 2^64-1": (lambda: b"\x80\x04\x8d" + b"\xff" * 8, "pickle.broken"),
    "a text that is no UTF-8": (lambda: b"\x80\x02X\x01\x00\x00\x00\xff.", "pickle.broken"),
    "a number of 5,000 digits": (lambda: b"\x80\x02I" + b"9" * 5000 + b"\n.", "pickle.broken"),
    "a broken pickle in an archive": (
        lambda: archive_of({}, {}).replace(b"\x80\x02}q\x00.", b"\x80\x02}q\x000."[:6]),
        "pickle.broken",
    ),
    "no directory": (lambda: archive_of({}, {})[:-30], "zip.directory"),
    "something after": (lambda: archive_of({}, {}) + b"x", "zip.directory"),
    "something in front": (lambda: b"PK" + archive_of({}, {}), "zip.directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    make, rule = BAD[case]
    assert rule_of(parse, make()) == rule
