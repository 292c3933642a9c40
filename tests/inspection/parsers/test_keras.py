"""Keras: archives and HDF5 files as h5py writes them, and what their loaders would run."""

import io
import json
import struct
import zipfile
from typing import Any

import h5py
import numpy as np
import pytest

from modelharbor.db.files import FileFormat
from modelharbor.inspection.parsers import hdf5, keras
from modelharbor.inspection.parsers.keras import parse
from modelharbor.inspection.source import of_bytes
from tests.inspection.parsers.contents import Counted, rule_of, rules_of


def layer(class_name: str = "Dense", module: str | None = "keras.layers", **config: Any) -> Any:
    return {
        "module": module,
        "class_name": class_name,
        "config": {"name": "a", "units": 2, **config},
        "registered_name": None,
    }


def model(*layers: Any) -> dict[str, Any]:
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": "seq", "layers": list(layers)},
        "registered_name": None,
    }


def hdf5_file(
    config: Any = None, *, groups: int = 3, libver: str = "earliest", **dataset: Any
) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w", libver=libver) as opened:
        if config is not None:
            opened.attrs["model_config"] = json.dumps(config)
        opened.attrs["keras_version"] = "3.11.0"
        opened.attrs["layer_names"] = [b"a", b"b"]
        layers = opened.create_group("layers")
        for number in range(groups):
            group = layers.create_group(f"dense_{number}")
            group.attrs["weight_names"] = [b"kernel"]
            group.create_dataset("vars/0", data=np.ones((3, 4), "f4"), **dataset)
            group.create_dataset("vars/1", data=np.ones(4, "f2"))
            group.create_dataset("vars/2", data=np.int64(7))
            group.create_dataset("vars/3", data=np.array([True]))
            group.create_dataset("vars/4", data="text")
        opened.create_dataset("optimizer/vars/0", data=np.ones(99))
    return file.getvalue()


def archive_of(
    config: Any,
    weights: bytes | None = None,
    *,
    packed: bool = False,
    more: dict[str, bytes] | None = None,
) -> bytes:
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.11.0"}))
        archive.writestr("config.json", raw)
        archive.writestr("model.weights.h5", hdf5_file() if weights is None else weights)
        for name, contents in (more or {}).items():
            archive.writestr(name, contents)
    return file.getvalue()


def oracle(contents: bytes) -> tuple[dict[str, int], int]:
    """What h5py sees, outside of the optimizer."""
    by_dtype: dict[str, int] = {}
    count = 0
    with h5py.File(io.BytesIO(contents)) as opened:
        found: list[tuple[str, Any]] = []
        opened.visititems(lambda name, value: found.append((name, value)))
        for name, value in found:
            is_number = isinstance(value, h5py.Dataset) and value.dtype.kind in "fiub"
            if is_number and not name.startswith("optimizer"):
                count += 1
                by_dtype[value.dtype.name] = by_dtype.get(value.dtype.name, 0) + value.size
    return by_dtype, count


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive(packed: bool) -> None:
    contents = archive_of(model(layer(), layer(), layer("Dropout")), packed=packed)
    source = Counted(contents)
    parsed = parse(source)
    assert parsed.format is FileFormat.KERAS
    assert parsed.tensors is not None
    by_dtype, count = oracle(hdf5_file())
    assert parsed.tensors.parameters_by_dtype == by_dtype
    assert by_dtype == {"float32": 36, "float16": 12, "int64": 3, "bool": 3}
    assert (parsed.tensors.tensor_count, parsed.tensors.architecture) == (count, "Sequential")
    assert parsed.header["metadata"] == {"keras_version": "3.11.0"}
    assert (parsed.header["layers"], parsed.header["name"]) == (3, "seq")
    assert parsed.header["layer_classes"] == {"Dense": 2, "Dropout": 1}
    assert parsed.header["tensors"][0] == {
        "name": "layers/dense_0/vars/0",
        "dtype": "float32",
        "shape": [3, 4],
    }
    assert parsed.findings == []
    assert source.reads < 40


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("long", [False, True])
def test_the_older_single_file(libver: str, long: bool) -> None:
    config = model(layer(), layer("Lambda", note="x" * (200_000 if long else 1)))
    contents = hdf5_file(config, libver=libver)
    parsed = parse(of_bytes(contents))
    assert parsed.tensors is not None
    assert (dict(parsed.tensors.parameters_by_dtype), parsed.tensors.tensor_count) == oracle(
        contents
    )
    assert parsed.header["layers"] == 2
    assert parsed.header["keras_version"] == "3.11.0"
    assert rules_of(parsed) == [("CRITICAL", "keras.lambda")]


def test_many_groups_and_packed_chunks() -> None:
    contents = hdf5_file(groups=300, chunks=(1, 4), compression="gzip")
    parsed = parse(of_bytes(contents))
    assert parsed.tensors is not None
    assert (dict(parsed.tensors.parameters_by_dtype), parsed.tensors.tensor_count) == oracle(
        contents
    )
    assert parsed.tensors.tensor_count == 1200


def test_what_is_not_read_is_told() -> None:
    parsed = parse(of_bytes(hdf5_file(groups=50, libver="latest")))
    assert parsed.tensors is None
    assert rules_of(parsed) == [("WARNING", "keras.unread")]


def test_weights_of_other_files(tmp_path: Any) -> None:
    file = io.BytesIO()
    with h5py.File(file, "w", libver="latest") as opened:
        opened["linked"] = h5py.ExternalLink("/etc/passwd", "/x")
        opened.create_dataset("outside", (4,), "u1", external=[("/etc/passwd", 0, 4)])
        layout = h5py.VirtualLayout((4,), "u1")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
        opened.create_virtual_dataset("virtual", layout)
    for contents in (file.getvalue(), archive_of(model(), file.getvalue())):
        parsed = parse(of_bytes(contents))
        assert rules_of(parsed) == [("CRITICAL", "keras.external_data")] * 3


RUN: list[tuple[Any, list[tuple[str, str]]]] = [
    (layer("Lambda"), [("CRITICAL", "keras.lambda")]),
    (layer("Custom>Lambda"), [("CRITICAL", "keras.lambda")]),
    (
        layer("Dense", activation={"class_name": "__lambda__", "config": {"value": "4wE="}}),
        [("CRITICAL", "keras.lambda")],
    ),
    (model(layer("Lambda")), [("CRITICAL", "keras.lambda")]),
    ([[[{"deep": layer("Lambda")}]]], [("CRITICAL", "keras.lambda")]),
    (layer("Loader", "acme.layers"), [("CRITICAL", "keras.foreign_module")]),
    (layer("system", "os"), [("CRITICAL", "keras.foreign_module")]),
    (layer("exec", "builtins"), [("CRITICAL", "keras.foreign_module")]),
    (layer("Dense", "kerasx.layers"), [("CRITICAL", "keras.foreign_module")]),
    (layer("Dense", "keras\n.layers"), [("CRITICAL", "keras.foreign_module")]),
    ({"class_name": "X", "module": ["keras"]}, [("CRITICAL", "keras.foreign_module")]),
    (
        {"class_name": "function", "module": "builtins", "config": "own"},
        [("WARNING", "keras.custom_function")],
    ),
    (
        {"class_name": "function", "module": "keras.utils", "config": "get_file"},
        [("CRITICAL", "keras.foreign_function")],
    ),
    (layer("TorchModuleWrapper"), [("CRITICAL", "keras.pickle_layer")]),
    (
        layer("StringLookup", vocabulary="/etc/passwd"),
        [("WARNING", "keras.vocabulary_path")],
    ),
    (layer("StringLookup", vocabulary=["a", "b"]), []),
    (layer("Dense", "tensorflow.python.keras.layers"), []),
    (layer("Dense", None), []),
    ({"class_name": "function", "module": "keras.activations", "config": "relu"}, []),
    ({"class_name": "slice", "module": "builtins", "config": {}}, []),
]


@pytest.mark.parametrize(("value", "rules"), RUN)
def test_what_a_loader_would_run(value: Any, rules: list[tuple[str, str]]) -> None:
    parsed = parse(of_bytes(archive_of(model(layer(), value))))
    assert rules_of(parsed) == rules


def test_one_of_two_equal_keys_does_not_hide_the_other() -> None:
    config = b'{"class_name": "Sequential", "config": {"layers": []}, "config": {}}'
    parsed = parse(of_bytes(archive_of(config)))
    assert rules_of(parsed) == [("WARNING", "json.duplicate_key")]


def test_large_packed_weights_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras, "MOST_UNPACKED", 1000)
    parsed = parse(of_bytes(archive_of(model(), packed=True)))
    assert (parsed.tensors, rules_of(parsed)) == (None, [("WARNING", "keras.unread")])


def patched(old: bytes, new: bytes, contents: bytes | None = None) -> bytes:
    good = hdf5_file() if contents is None else contents
    assert old in good
    return good.replace(old, new)


def claimed(size: int, **more: Any) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened.create_dataset("x", (size,), "f4", **more)
    return file.getvalue()


def in_circles() -> bytes:
    """A group whose tree holds itself."""
    contents = bytearray(hdf5_file())
    at = contents.index(b"TREE")
    struct.pack_into("<Q", contents, at + 32, at)
    return bytes(contents)


def without_config() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("metadata.json", "{}")
    return file.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "source.truncated"),
    "text": (b"no model at all", "hdf5.signature"),
    "only a signature": (hdf5.SIGNATURE, "source.truncated"),
    "version 9": (patched(b"\x1a\n\x00\x00", b"\x1a\n\x09\x00"), "hdf5.version"),
    "cut": (hdf5_file()[:-100], "hdf5.truncated"),
    "no heap": (patched(b"HEAP", b"PAEH"), "hdf5.broken"),
    "no tree": (patched(b"TREE", b"EERT"), "hdf5.broken"),
    "no symbols": (patched(b"SNOD", b"DONS"), "hdf5.broken"),
    "no global heap": (patched(b"GCOL", b"LOCG"), "hdf5.broken"),
    "in circles": (in_circles(), "hdf5.nesting"),
    "1 TB that is nowhere": (claimed(2**38), "hdf5.size"),
    "1 TB packed": (claimed(2**38, chunks=(1024,), compression="gzip"), "hdf5.size"),
    "2^62 of four bytes": (claimed(2**62, chunks=(1024,)), "hdf5.shape"),
    "no config": (without_config(), "keras.config"),
    "a config that is no JSON": (archive_of(b"{"), "keras.config"),
    "a deep config": (archive_of(b"[" * 100_000), "keras.config"),
    "a config of many lists": (archive_of(b"[" + b"[]," * 600_000 + b"0]"), "keras.config"),
    "a config of 17 MB": (archive_of(b" " * 17_000_000), "keras.config"),
    "weights of something else": (archive_of(model(), b"\x80\x04N."), "source.truncated"),
    "weights that are cut": (archive_of(model(), hdf5_file()[:-8]), "hdf5.truncated"),
    "an attribute that is no JSON": (
        patched(b'{"module"', b'["module"', hdf5_file(model())),
        "keras.config",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    contents, rule = BAD[case]
    source = Counted(contents)
    assert rule_of(parse, source) == rule
    assert source.reads < 40


def test_too_many_files_of_weights() -> None:
    parts = {f"{number}.weights.h5": b"" for number in range(257)}
    assert rule_of(parse, archive_of(model(), more=parts)) == "keras.too_many_weights"
