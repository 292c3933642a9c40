"""Whatever becomes of a valid file: a parser answers or calls it malformed, in little work."""

import json
import pickle
from collections.abc import Callable
from typing import Any

import bson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers import PARSERS
from modelharbor.inspection.parsers.parsed import Parsed
from modelharbor.inspection.parsers.pytorch import MAGIC_NUMBER
from modelharbor.inspection.results import MOST_HEADER_BYTES
from modelharbor.inspection.source import Malformed
from tests.inspection.parsers import test_gguf, test_keras, test_numpy, test_onnx
from tests.inspection.parsers.contents import Counted, entry, safetensors_file

VALUES = bytes([0, 1, 2, 7, 8, 9, 31, 34, 91, 123, 127, 128, 255])


def outcome(format: FileFormat, source: Counted) -> Parsed | Malformed:
    """Anything else that is raised is a fault of the parser."""
    try:
        return PARSERS[format](source)
    except Malformed as problem:
        return problem


def checkpoint() -> bytes:
    """Without the module, by its opcodes: a tensor of two in a dict."""
    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nK\x02tQ"
    arguments = b"(" + storage + b"K\x00(K\x02t(K\x01t\x89Nt"
    return b"\x80\x02}(Vw\nctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Ru."


def torch_archive() -> bytes:
    data = {"archive/data.pkl": checkpoint(), "archive/data/0": b"\0" * 8}
    return test_numpy.archived(*data.items())


def legacy() -> bytes:
    first: list[Any] = [MAGIC_NUMBER, 1001, {}]
    parts = [pickle.dumps(each, 2) for each in first]
    return b"".join([*parts, checkpoint(), pickle.dumps(["0"], 2), b"\0" * 16])


def gguf() -> bytes:
    text, pair, array = test_gguf.text, test_gguf.pair, test_gguf.array
    pairs = [
        pair("general.architecture", 8, text("llama")),
        pair("llama.context_length", 4, b"\0\1\0\0"),
        pair("tokens", 9, array(8, 2, text("a") + text("b"))),
        pair("nested", 9, array(9, 1, array(0, 2, b"\1\2"))),
    ]
    return test_gguf.gguf_file(pairs, [test_gguf.tensor("t", [4, 2])], b"\0" * 32)


def onnx() -> bytes:
    tensor = test_onnx.raw_tensor([2], raw=b"\0" * 8)
    return test_onnx.contents_of(tensor, test_onnx.external("w.bin", length="8"))


FILES: dict[str, tuple[FileFormat, Callable[[], bytes]]] = {
    "safetensors": (
        FileFormat.SAFETENSORS,
        lambda: safetensors_file(
            {"__metadata__": {"a": "b"}, "x": entry("F32", [1], 0, 4)}, b"\0" * 4
        ),
    ),
    "gguf": (FileFormat.GGUF, gguf),
    "onnx": (FileFormat.ONNX, onnx),
    "npy": (FileFormat.NUMPY, lambda: test_numpy.headed()),
    "npz": (
        FileFormat.NUMPY,
        lambda: test_numpy.archived(("a.npy", test_numpy.headed()), ("b.npy", test_numpy.headed())),
    ),
    "torch": (FileFormat.PYTORCH_PICKLE, torch_archive),
    "legacy torch": (FileFormat.PYTORCH_PICKLE, legacy),
    "pickle": (FileFormat.PYTORCH_PICKLE, lambda: pickle.dumps({"a": [1, (2.5, b"c")]}, 4)),
    "keras": (
        FileFormat.KERAS,
        lambda: test_keras.archive_of(test_keras.model(test_keras.layer()), small_hdf5()),
    ),
    "hdf5": (FileFormat.KERAS, lambda: small_hdf5()),
    "new hdf5": (FileFormat.KERAS, lambda: small_hdf5("latest")),
    "config": (
        FileFormat.JSON,
        lambda: json.dumps(
            {"model_type": "a", "auto_map": {"A": "b.C"}, "chat_template": "{{ a['b'] }}"}
        ).encode(),
    ),
}


def small_hdf5(libver: str = "earliest") -> bytes:
    return test_keras.hdf5_file(test_keras.model(), groups=1, libver=libver)


VALID = {name: make() for name, (_, make) in FILES.items()}

edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["set", "flip", "insert", "delete", "cut", "double", "wide"]),
        st.sampled_from(VALUES),
    ),
    min_size=1,
    max_size=6,
)


def changed(contents: bytes, how: list[tuple[float, str, int]]) -> bytes:
    result = bytearray(contents)
    for place, kind, value in how:
        at = int(place * len(result))
        match kind:
            case "set":
                result[at : at + 1] = bytes([value])
            case "flip":
                result[at : at + 1] = bytes([each ^ (value or 1) for each in result[at : at + 1]])
            case "insert":
                result[at:at] = bytes([value]) * 3
            case "delete":
                del result[at : at + 1 + value % 8]
            case "cut":
                del result[at:]
            case "double":
                result[at:at] = result[at : at + 40]
            case _:  # a number of eight bytes
                result[at : at + 8] = bytes([value]) * 8
    return bytes(result)


@pytest.mark.parametrize("name", FILES)
def test_as_it_is(name: str) -> None:
    parsed = PARSERS[FILES[name][0]](Counted(VALID[name]))
    assert parsed.format is FILES[name][0]
    assert (parsed.tensors is None) == (name == "pickle")


@pytest.mark.parametrize("name", FILES)
@given(how=edits)
@settings(max_examples=80, deadline=None)
def test_changed(name: str, how: list[tuple[float, str, int]]) -> None:
    source = Counted(changed(VALID[name], how))
    found = outcome(FILES[name][0], source)
    if isinstance(found, Malformed):
        assert "." in found.rule
        bson.encode({"rule": found.rule, "detail": found.detail, "offset": found.offset})
    else:
        assert len(json.dumps(found.header)) <= MOST_HEADER_BYTES
        bson.encode({"header": found.header})
        for finding in found.findings:
            bson.encode({"detail": finding.detail, "offset": finding.offset})
        if found.tensors is not None:
            bson.encode({"tensors": dict(found.tensors.parameters_by_dtype)})
    assert source.reads < 400
    assert source.bytes <= 20 * max(source.size, 16_384)


@pytest.mark.parametrize("format", PARSERS)
@given(contents=st.binary(max_size=200))
@settings(max_examples=40, deadline=None)
def test_anything(format: FileFormat, contents: bytes) -> None:
    for start in (
        b"",
        b"PK\x03\x04",
        b"\x93NUMPY\x01\x00",
        b"GGUF\x03\0\0\0",
        b"\x89HDF\r\n\x1a\n",
    ):
        outcome(format, Counted(start + contents))


@pytest.mark.parametrize("format", PARSERS)
def test_files_of_other_formats(format: FileFormat) -> None:
    for contents in VALID.values():
        outcome(format, Counted(contents))
