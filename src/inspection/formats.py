"""What a file is, from its first bytes; its name only where these do not tell.

Nothing is parsed: this says which inspection applies, never that a file is well formed.
"""

import re
from pathlib import PurePosixPath
from typing import Final

from modelharbor.db.files import FileFormat, FileRole

HEAD_BYTES: Final = 8192
"""How much of a file `sniff` wants to see; more is not looked at."""

MAX_SAFETENSORS_HEADER: Final = 100_000_000  # bytes; the limit of the format's own reader
_SAFETENSORS_HEADER: Final = re.compile(
    rb'.{8}\{\s*"(?:__metadata__"|[^"\\]{1,512}"\s*:\s*\{\s*"(?:dtype|shape|data_offsets)")',
    re.DOTALL,
)
_JSON_START: Final = re.compile(
    rb'\s*(?:\{\s*(?:["}]|\Z)|\[\s*(?:[\[\]{"\d-]|true\b|false\b|null\b|\Z))'
)
_NOT_TEXT: Final = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_ZIP_ENTRY: Final = b"PK\x03\x04"
_ZIP_NAME_LENGTH: Final = slice(26, 28)
_ZIP_HEADER_BYTES: Final = 30

# For these the first bytes say nothing certain: protobuf has no magic, weights beside a graph are
# bare numbers, and the oldest pickle protocols are plain letters.
_BY_SUFFIX: Final = {
    ".onnx": FileFormat.ONNX,
    ".onnx_data": FileFormat.ONNX,
    ".pb": FileFormat.TENSORFLOW,
    ".mlmodel": FileFormat.COREML,
    ".engine": FileFormat.TENSORRT,
    ".plan": FileFormat.TENSORRT,
    ".trt": FileFormat.TENSORRT,
}
_PICKLE_SUFFIXES: Final = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"})
_PROSE: Final = frozenset({".md", ".txt", ".rst", ".py", ".toml", ".ini", ".cfg"})
_CHECKPOINT: Final = re.compile(r"\.(?:data-\d{5}-of-\d{5}|index|meta)\Z")


def sniff(head: bytes, path: str) -> FileFormat:
    """The format of a file whose first bytes are `head` (the whole file, when it is short)."""
    head = head[:HEAD_BYTES]
    return _by_magic(head, path) or _by_text(head, path) or _by_name(path)


def _by_magic(head: bytes, path: str) -> FileFormat | None:
    suffix = PurePosixPath(path).suffix.lower()
    if head.startswith(b"GGUF"):
        return FileFormat.GGUF
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= MAX_SAFETENSORS_HEADER:
        return FileFormat.SAFETENSORS
    if _SAFETENSORS_HEADER.match(head):  # with a length that cannot be
        return FileFormat.SAFETENSORS
    if head.startswith(_ZIP_ENTRY):
        return _zip_format(head, suffix)
    if head[:1] == b"\x80" and head[1:2] in (b"\x00", b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        return FileFormat.PYTORCH_PICKLE
    if head.startswith(b"\x93NUMPY"):
        return FileFormat.NUMPY
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return FileFormat.KERAS if suffix in (".h5", ".hdf5", ".keras") else FileFormat.OTHER
    if head[4:8] == b"TFL3":  # the identifier of a TensorFlow Lite flatbuffer
        return FileFormat.TENSORFLOW
    if head.startswith(b"ftrt"):
        return FileFormat.TENSORRT
    if _looks_like_onnx(head):
        return FileFormat.ONNX
    return None


def _zip_format(head: bytes, suffix: str) -> FileFormat:
    names = _zip_names(head)
    if any(PurePosixPath(name).name == "data.pkl" for name in names):
        return FileFormat.PYTORCH_PICKLE
    if any(name.endswith(".npy") for name in names):
        return FileFormat.NUMPY
    if suffix == ".keras" or any(name == "model.weights.h5" for name in names):
        return FileFormat.KERAS
    # An archive with another name in front may still hold a pickle.
    return FileFormat.PYTORCH_PICKLE if suffix in _PICKLE_SUFFIXES | {".bin"} else FileFormat.OTHER


def _zip_names(head: bytes) -> list[str]:
    """The names in those local headers that lie within `head`."""
    names = []
    at = head.find(_ZIP_ENTRY)
    while at >= 0:
        header = head[at : at + _ZIP_HEADER_BYTES]
        length = int.from_bytes(header[_ZIP_NAME_LENGTH], "little")
        start = at + _ZIP_HEADER_BYTES
        names.append(head[start : start + length].decode("utf-8", "replace"))
        at = head.find(_ZIP_ENTRY, start)
    return names


def _looks_like_onnx(head: bytes) -> bool:
    """A protobuf with a small number (`ir_version`), then a short printable text (`producer_name`),
    or the graph itself where it has no such name.

    SavedModel and Core ML begin alike, but have a nested message in the second place.
    """
    if len(head) < 5 or head[0] != 0x08 or not 1 <= head[1] <= 32:
        return False
    if head[2] == 0x3A:
        return True
    if head[2] != 0x12:
        return False
    length = head[3]
    name = head[4 : 4 + length]
    return 1 <= length <= 64 and len(name) == length and all(32 <= byte < 127 for byte in name)


def _by_text(head: bytes, path: str) -> FileFormat | None:
    # A character that is cut in two at the end of `head` does not make it binary.
    tail = 3 if len(head) == HEAD_BYTES else 0
    for cut in range(tail + 1):
        try:
            text = head[: len(head) - cut].decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        break
    else:
        return None
    if _NOT_TEXT.search(text):
        return None
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _PICKLE_SUFFIXES and text[:1] in ("(", "c", "]", "}", "I", "S", "V"):
        return FileFormat.PYTORCH_PICKLE  # protocol 0
    if suffix == ".xml" and "<net " in text:
        return FileFormat.OPENVINO
    if suffix not in _PROSE and _JSON_START.match(text.encode()):
        return FileFormat.JSON
    return FileFormat.TEXT


def _by_name(path: str) -> FileFormat:
    name = PurePosixPath(path)
    suffix = name.suffix.lower()
    if any(part.lower().endswith(".mlpackage") for part in name.parts[:-1]):
        return FileFormat.COREML
    if _CHECKPOINT.search(name.name):
        return FileFormat.TENSORFLOW
    if suffix in _PICKLE_SUFFIXES:
        return FileFormat.PYTORCH_PICKLE  # protocol 1, and the tar files of the first PyTorch
    return _BY_SUFFIX.get(suffix, FileFormat.OTHER)


_WEIGHTS: Final = frozenset(
    {
        FileFormat.SAFETENSORS,
        FileFormat.GGUF,
        FileFormat.PYTORCH_PICKLE,
        FileFormat.ONNX,
        FileFormat.TENSORFLOW,
        FileFormat.KERAS,
        FileFormat.NUMPY,
        FileFormat.OPENVINO,
        FileFormat.COREML,
        FileFormat.TENSORRT,
    }
)
_TRAINING: Final = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state\w*)\.\w+\Z")
_TOKENIZER: Final = re.compile(
    r"(?:tokenizer|vocab|merges|special_tokens_map|added_tokens|spiece|sentencepiece|source|target)"
    r"[\w.-]*\.(?:json|txt|model|spm|vocab|bpe|tiktoken)\Z|\w[\w.-]*\.tiktoken\Z"
)
_CODE: Final = frozenset(
    {
        *(".py", ".ipynb", ".sh", ".bash", ".js", ".ts", ".c", ".cc", ".cpp", ".cu"),
        *(".h", ".hpp", ".java", ".rs", ".go", ".lua", ".r", ".jinja"),
    }
)
_CONFIG: Final = frozenset(
    {
        *(".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".xml"),
        *(".pbtxt", ".prototxt"),
    }
)
_SAMPLES: Final = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".svg", ".wav", ".mp3"),
        *(".flac", ".ogg", ".mp4", ".webm", ".mov", ".csv", ".tsv", ".parquet"),
    }
)


def role_of(path: str, format: FileFormat) -> FileRole:
    """What a file is for, from its place, its name and its format."""
    name = PurePosixPath(path).name.lower()
    suffix = PurePosixPath(name).suffix
    if path.lower() == "readme.md":
        return FileRole.CARD
    if _TOKENIZER.match(name):
        return FileRole.TOKENIZER
    if _TRAINING.match(name):
        return FileRole.OTHER
    if format in _WEIGHTS or (format is FileFormat.OTHER and suffix == ".bin"):
        return FileRole.WEIGHTS
    if suffix in _CODE:
        return FileRole.CODE
    if suffix in _CONFIG:
        return FileRole.CONFIG
    if suffix in _SAMPLES:
        return FileRole.SAMPLE
    return FileRole.OTHER
