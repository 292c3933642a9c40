"""The format of a file, from its first bytes."""

import io
import pickle
import zipfile

import pytest

from modelharbor.db.files import FileFormat, FileRole
from modelharbor.inspection.formats import HEAD_BYTES, role_of, sniff

F, R = FileFormat, FileRole


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 10)
    return file.getvalue()


SAFETENSORS = (40).to_bytes(8, "little") + b'{"t":{"dtype":"F32","shape":[1],"data_o'
ONNX = b"\x08\x07\x12\x07pytorch\x1a\x051.0.0:\x10"
SAVED_MODEL = b"\x08\x01\x12\xb4\x05\n\x97\x03\n\x14\n\x05Const"


@pytest.mark.parametrize(
    ("head", "path", "expected"),
    [
        (SAFETENSORS, "model.safetensors", F.SAFETENSORS),
        (SAFETENSORS, "renamed.txt", F.SAFETENSORS),
        (b"GGUF\x03\x00\x00\x00", "model.gguf", F.GGUF),
        (zipped("archive/data.pkl", "archive/data/0"), "pytorch_model.bin", F.PYTORCH_PICKLE),
        (zipped("archive/data.pkl"), "innocent.zip", F.PYTORCH_PICKLE),
        (zipped("metadata.json", "config.json", "model.weights.h5"), "model.keras", F.KERAS),
        (zipped("metadata.json", "model.weights.h5"), "model.zip", F.KERAS),
        (zipped("a.npy", "b.npy"), "weights.npz", F.NUMPY),
        (zipped("other.txt"), "archive.zip", F.OTHER),
        (zipped("other.txt"), "weights.pt", F.PYTORCH_PICKLE),
        *[
            (pickle.dumps({"a": [1]}, protocol), "weights.txt", F.PYTORCH_PICKLE)
            for protocol in (2, 3, 4, 5)
        ],
        (pickle.dumps({"a": [1]}, 0), "weights.pkl", F.PYTORCH_PICKLE),
        (pickle.dumps({"a": [1]}, 1), "weights.pkl", F.PYTORCH_PICKLE),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "x.npy", F.NUMPY),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "tf_model.h5", F.KERAS),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "measurements.nc", F.OTHER),
        (b"\x1c\x00\x00\x00TFL3\x00\x00", "model.tflite", F.TENSORFLOW),
        (SAVED_MODEL, "saved_model.pb", F.TENSORFLOW),
        (b"\x00\x01\xff", "variables/variables.data-00000-of-00001", F.TENSORFLOW),
        (ONNX, "model.onnx", F.ONNX),
        (ONNX, "model", F.ONNX),
        (b"\x00\x01\xff", "model.onnx_data", F.ONNX),
        (b'<?xml version="1.0"?>\n<net name="x" version="11">', "openvino.xml", F.OPENVINO),
        (b'<?xml version="1.0"?>\n<feed>', "feed.xml", F.TEXT),
        (SAVED_MODEL, "model.mlmodel", F.COREML),
        (b"\x00\x01\xff", "Model.mlpackage/Data/weights/weight.bin", F.COREML),
        (b"ftrt\x00\x00\xff", "model.engine", F.TENSORRT),
        (b' {\n "a": 1}', "config.json", F.JSON),
        (b'\xef\xbb\xbf{"a": 1}', "config.json", F.JSON),
        (b'[{"idx": 0}]', "modules", F.JSON),
        (b"[![build](x)](y)\n", "README.md", F.TEXT),
        (b"[1] a note\n", "NOTES.txt", F.TEXT),
        (b"[tool.ruff]\n", "pyproject", F.TEXT),
        (b"{% if x %}", "chat_template.jinja", F.TEXT),
        ("Modèle de langue 模型\n".encode(), "README.md", F.TEXT),
        (b"a\x1b[31mb", "log", F.TEXT),
        (b"", "__init__.py", F.TEXT),
        (b"", "model.safetensors", F.TEXT),
        (b"version https://git-lfs.github.com/spec/v1\n", "model.safetensors", F.TEXT),
        (b"\x00" * 100, "model.safetensors", F.OTHER),
        (b"\xff\xfe\x00\x01", "model.bin", F.OTHER),
        (b"GGUF", "", F.GGUF),
    ],
)
def test_format(head: bytes, path: str, expected: FileFormat) -> None:
    assert sniff(head, path) is expected


@pytest.mark.parametrize("length", [HEAD_BYTES - 2, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1])
def test_a_character_cut_at_the_end_of_the_head_is_text_still(length: int) -> None:
    text = ("x" * (HEAD_BYTES - 3) + "模模模").encode()
    assert sniff(text[:HEAD_BYTES], "vocab.txt") is F.TEXT
    assert sniff(("é" * length).encode()[:HEAD_BYTES], "vocab.txt") is F.TEXT


def test_a_short_file_with_a_broken_character_is_not_text() -> None:
    assert sniff("模".encode()[:2], "vocab.txt") is F.OTHER


def test_only_the_head_is_looked_at() -> None:
    assert sniff(b"x" * HEAD_BYTES + b"\x00", "notes.txt") is F.TEXT


def test_any_bytes_have_a_format() -> None:
    for byte in map(bytes, zip(range(256), strict=True)):
        for head in (byte, byte * 50, b"\x08" + byte * 50, b"PK\x03\x04" + byte):
            assert sniff(head, "x.bin") in FileFormat


@pytest.mark.parametrize(
    ("path", "format", "expected"),
    [
        ("README.md", F.TEXT, R.CARD),
        ("readme.md", F.TEXT, R.CARD),
        ("docs/README.md", F.TEXT, R.OTHER),
        ("model.safetensors", F.SAFETENSORS, R.WEIGHTS),
        ("pytorch_model.bin", F.PYTORCH_PICKLE, R.WEIGHTS),
        ("flax_model.bin", F.OTHER, R.WEIGHTS),
        ("onnx/model.onnx", F.ONNX, R.WEIGHTS),
        ("training_args.bin", F.PYTORCH_PICKLE, R.OTHER),
        ("optimizer.pt", F.PYTORCH_PICKLE, R.OTHER),
        ("config.json", F.JSON, R.CONFIG),
        ("1_Pooling/config.json", F.JSON, R.CONFIG),
        ("model.safetensors.index.json", F.JSON, R.CONFIG),
        ("tokenizer.json", F.JSON, R.TOKENIZER),
        ("tokenizer_config.json", F.JSON, R.TOKENIZER),
        ("special_tokens_map.json", F.JSON, R.TOKENIZER),
        ("vocab.txt", F.TEXT, R.TOKENIZER),
        ("spiece.model", F.OTHER, R.TOKENIZER),
        ("modeling_llama.py", F.TEXT, R.CODE),
        ("assets/example.PNG", F.OTHER, R.SAMPLE),
        ("LICENSE", F.TEXT, R.OTHER),
    ],
)
def test_role(path: str, format: FileFormat, expected: FileRole) -> None:
    assert role_of(path, format) is expected
