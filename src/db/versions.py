"""Versions of models."""

from datetime import datetime
from enum import Enum
from typing import Any

from beanie import PydanticObjectId
from pydantic import Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, utc_now


class VersionStatus(Enum):
    DRAFT = "DRAFT"
    PROCESSING = "PROCESSING"
    READY = "READY"
    ARCHIVED = "ARCHIVED"
    DELETED = "DELETED"


class VersionDocument(BaseDocument):
    model_id: PydanticObjectId
    number: int  # counts from 1 within the model, never given twice
    label: str | None = None
    description: str | None = None
    status: VersionStatus = VersionStatus.DRAFT
    tags: list[str] = []
    properties: dict[str, Any] = {}
    digest: str | None = (
        None  # SHA-256 over the sorted list of path and content hash; set when READY
    )
    size_bytes: int = 0
    file_count: int = 0
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
