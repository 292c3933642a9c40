"""Files of versions, and the contents that they share."""

import unicodedata
from datetime import datetime
from enum import Enum
from typing import Any, Final

from beanie import PydanticObjectId
from pydantic import Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, Row, utc_now


class FileRole(Enum):
    WEIGHTS = "WEIGHTS"
    CONFIG = "CONFIG"
    TOKENIZER = "TOKENIZER"
    CARD = "CARD"
    CODE = "CODE"
    SAMPLE = "SAMPLE"
    OTHER = "OTHER"


class FileFormat(Enum):
    SAFETENSORS = "SAFETENSORS"
    GGUF = "GGUF"
    PYTORCH_PICKLE = "PYTORCH_PICKLE"
    ONNX = "ONNX"
    TENSORFLOW = "TENSORFLOW"
    KERAS = "KERAS"
    NUMPY = "NUMPY"
    OPENVINO = "OPENVINO"
    COREML = "COREML"
    TENSORRT = "TENSORRT"
    JSON = "JSON"
    TEXT = "TEXT"
    OTHER = "OTHER"


class ScanVerdict(Enum):
    """What an inspection came to. Contents without one are PENDING."""

    PENDING = "PENDING"
    SAFE = "SAFE"
    SUSPICIOUS = "SUSPICIOUS"
    UNSAFE = "UNSAFE"
    ERROR = "ERROR"  # it could not be inspected: never taken for safe
    SKIPPED = "SKIPPED"  # nothing here knows this format


HARMLESS: Final = frozenset({ScanVerdict.SAFE, ScanVerdict.SKIPPED})
"""Whatever else is found keeps a version from being READY."""


def verdict_of(blob: Row | None) -> ScanVerdict:
    """What is known of contents, from their row (`stored`, `damaged_at`, `inspection`).

    Contents that never were here are known by their hash alone: SKIPPED, for nothing will ever look
    into them. Those that were here and are damaged now cannot be looked into: ERROR.
    """
    if blob is None:
        return ScanVerdict.SKIPPED
    if is_damaged(blob):
        return ScanVerdict.ERROR
    inspection = blob.get("inspection")
    if inspection is None:
        return ScanVerdict.PENDING if blob["stored"] else ScanVerdict.SKIPPED
    return ScanVerdict(inspection["verdict"])


def is_damaged(blob: Row) -> bool:
    return not blob["stored"] and blob.get("damaged_at") is not None


def path_key(path: str) -> str:
    """The path without regard to case: equal for two that are one file on some systems."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


class FileDocument(BaseDocument):
    version_id: PydanticObjectId
    model_id: PydanticObjectId
    path: str  # relative, with `/`, normalised
    path_key: str = ""  # the same without regard to case
    size_bytes: int
    sha256: str  # hexadecimal, lower case
    role: FileRole = FileRole.OTHER
    format: FileFormat = FileFormat.OTHER

    class Settings:
        name = "files"
        indexes = [
            IndexModel([("version_id", ASCENDING), ("path", ASCENDING)], name="path", unique=True),
            IndexModel([("version_id", ASCENDING), ("path_key", ASCENDING)], name="path_key"),
            IndexModel(
                [("sha256", ASCENDING), ("model_id", ASCENDING)],
                name="sha256",
            ),
        ]


class BlobDocument(BaseDocument):
    """Contents, once for each hash. `stored` is false where only the hash is known.

    How they come and go, safely at once: resolvers/blobs.py. What is inside of them belongs to the
    contents, not to the files that have them: `inspection`, see inspection/results.py.
    """

    sha256: str
    key: str | None = None  # where they are in the store; None: by their hash, see storage/blobs.py
    size_bytes: int
    references: int = 0  # files with this hash
    stored: bool = True
    seen_at: datetime | None = None  # when it was last about to be used; None: at `created_at`
    deleting_at: datetime | None = None  # since when its contents are being removed
    verified_at: datetime | None = None  # when they were last read whole, and had their hash
    damaged_at: datetime | None = None  # when they had not: `stored` is false since
    inspection: dict[str, Any] | None = None  # None: PENDING
    created_at: datetime = Field(default_factory=utc_now)

    class Settings:
        name = "blobs"
        indexes = [
            IndexModel([("sha256", ASCENDING)], name="sha256", unique=True),
            IndexModel(
                [("references", ASCENDING), ("_id", ASCENDING)],
                name="unused",
                partialFilterExpression={"references": 0},
            ),
            IndexModel(
                [("key", ASCENDING)], name="key", partialFilterExpression={"key": {"$gt": ""}}
            ),
        ]
