"""What happened: append-only, written in the transaction of the change that it tells of."""

from datetime import datetime
from enum import Enum
from typing import Any, Final

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
    VERSION_FAILED = "VERSION_FAILED"
    VERSION_QUARANTINED = "VERSION_QUARANTINED"
    VERSION_RELEASED = "VERSION_RELEASED"
    VERSION_ARCHIVED = "VERSION_ARCHIVED"
    VERSION_DELETED = "VERSION_DELETED"
    ALIAS_SET = "ALIAS_SET"
    ALIAS_DELETED = "ALIAS_DELETED"
    ROLE_GRANTED = "ROLE_GRANTED"


MOVING: Final = frozenset(
    {
        EventKind.VERSION_READY,
        EventKind.VERSION_RELEASED,
        EventKind.VERSION_ARCHIVED,
        EventKind.VERSION_DELETED,
        EventKind.ALIAS_SET,
        EventKind.ALIAS_DELETED,
    }
)
"""After these a name of the model may point elsewhere."""


class Stream(Enum):
    """What an event is about: each can be followed by itself."""

    MODELS = "models"
    PEOPLE = "people"
    JOBS = "jobs"
    UPLOADS = "uploads"
    MARKS = "marks"  # set by readers of the log, to know where in it they are


class EventDocument(BaseDocument):
    stream: Stream = Stream.MODELS
    kind: EventKind | None = None  # None: of a job or an upload, whose state says it, or a mark
    about: list[PydanticObjectId] = []
    """Whatever one can follow it by: the model, its owner, the version; the job, its parent; the
    upload."""
    principals: list[str] = []
    """Who may see it, as far as that was settled when it happened: of a deleted model, who could."""
    model_id: PydanticObjectId | None = None
    version_id: PydanticObjectId | None = None
    organization_id: PydanticObjectId | None = None
    job_id: PydanticObjectId | None = None
    upload_id: PydanticObjectId | None = None
    actor_id: PydanticObjectId | None = None  # who did it; None: the system
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    pointed: dict[str, Any] | None = None
    """Of MOVING kinds, and of others that moved a name: where the names of the model pointed after it,
    see history.py."""
    job: dict[str, Any] | None = None
    """The job as it was then, without what only its worker needs."""
    upload: dict[str, Any] | None = None
    """The upload as it was then, without what only its receiver needs."""
    comment: str | None = None
    at: datetime = Field(default_factory=utc_now)
    position: str | None = None
    """Its place in the log, in the order of commits: known only after it, see events/recorder.py."""

    class Settings:
        name = "events"
        indexes = [
            IndexModel([("model_id", ASCENDING), ("_id", ASCENDING)], name="model"),
            IndexModel(
                [("model_id", ASCENDING), ("at", ASCENDING), ("_id", ASCENDING)],
                name="pointed",
                partialFilterExpression={"pointed": {"$type": "object"}},
            ),
            IndexModel([("stream", ASCENDING), ("position", ASCENDING)], name="stream"),
            IndexModel([("about", ASCENDING), ("position", ASCENDING)], name="about"),
            IndexModel(
                [("position", ASCENDING), ("_id", ASCENDING)],
                name="unrecorded",
                partialFilterExpression={"position": None},  # none at all, too,
            ),
        ]
