"""Versions of models."""

from datetime import datetime
from enum import Enum
from typing import Any, Final

from beanie import PydanticObjectId
from pydantic import Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, utc_now


class VersionStatus(Enum):
    DRAFT = "DRAFT"
    UPLOADING = "UPLOADING"  # a DRAFT that has uploads
    PROCESSING = "PROCESSING"  # published; its files are being inspected
    READY = "READY"
    FAILED = "FAILED"  # its files could not be verified
    QUARANTINED = "QUARANTINED"  # a file of it is not known to be harmless
    ARCHIVED = "ARCHIVED"
    DELETED = "DELETED"


class VersionDocument(BaseDocument):
    model_id: PydanticObjectId
    number: int  # counts from 1 within the model, never given twice
    label: str | None = None
    description: str | None = None
    status: VersionStatus = VersionStatus.DRAFT
    status_reason: str | None = (
        None  # a sentence: why it FAILED or is QUARANTINED, why it was released
    )
    parameters: int | None = None  # of all tensors in its weights; set when READY
    tags: list[str] = []
    properties: dict[str, Any] = {}
    digest: str | None = (
        None  # SHA-256 over the sorted list of path and content hash; set when READY
    )
    size_bytes: int = 0
    file_count: int = 0
    upload_count: int = 0  # ever created: who creates some collides with who publishes
    created_by_id: PydanticObjectId | None = None
    created_at: datetime = Field(default_factory=utc_now)
    published_at: datetime | None = None
    revision: int = 1

    class Settings:
        name = "versions"
        indexes = [
            IndexModel(
                [("model_id", ASCENDING), ("number", ASCENDING)], name="number", unique=True
            ),
            IndexModel(
                [("model_id", ASCENDING), ("created_at", ASCENDING), ("_id", ASCENDING)],
                name="created",
            ),
            IndexModel(
                [("model_id", ASCENDING), ("size_bytes", ASCENDING), ("_id", ASCENDING)],
                name="size",
            ),
            IndexModel([("model_id", ASCENDING), ("digest", ASCENDING)], name="digest"),
            IndexModel(
                [("model_id", ASCENDING), ("_id", ASCENDING)],
                name="deleted",
                partialFilterExpression={"status": VersionStatus.DELETED.value},
            ),
        ]


MUTABLE: Final = frozenset({VersionStatus.DRAFT, VersionStatus.UPLOADING})
"""States in which a version takes files."""
