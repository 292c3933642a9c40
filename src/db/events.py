"""What happened: append-only, written in the transaction of the change that it tells of."""

from datetime import datetime
from enum import Enum
from typing import Any

from beanie import PydanticObjectId
from pydantic import Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, utc_now


class EventKind(Enum):
    MODEL_CREATED = "MODEL_CREATED"
    MODEL_UPDATED = "MODEL_UPDATED"
    MODEL_ARCHIVED = "MODEL_ARCHIVED"
    MODEL_RESTORED = "MODEL_RESTORED"
    MODEL_DELETED = "MODEL_DELETED"
    VERSION_CREATED = "VERSION_CREATED"
    VERSION_UPDATED = "VERSION_UPDATED"
    VERSION_READY = "VERSION_READY"
    VERSION_ARCHIVED = "VERSION_ARCHIVED"
    VERSION_DELETED = "VERSION_DELETED"
    ALIAS_SET = "ALIAS_SET"
    ALIAS_DELETED = "ALIAS_DELETED"
    ROLE_GRANTED = "ROLE_GRANTED"


class EventDocument(BaseDocument):
    kind: EventKind
    model_id: PydanticObjectId | None = None
    version_id: PydanticObjectId | None = None
    organization_id: PydanticObjectId | None = None
    actor_id: PydanticObjectId | None = None  # who did it; None: the system
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    comment: str | None = None
    at: datetime = Field(default_factory=utc_now)

    class Settings:
        name = "events"
        indexes = [IndexModel([("model_id", ASCENDING), ("_id", ASCENDING)], name="model")]
