"""Uploads: how the bytes of a file arrive, and what an owner's files may come to."""

from datetime import datetime
from enum import Enum
from typing import Final

from beanie import PydanticObjectId
from pydantic import BaseModel, Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, utc_now
from .jobs import LEAST_ID, Failure


class UploadState(Enum):
    CREATED = "CREATED"
    UPLOADING = "UPLOADING"
    PAUSED = "PAUSED"  # somebody asked for it; the next bytes end it
    RECEIVED = "RECEIVED"  # all bytes are here, their hash is not known yet
    VERIFYING = "VERIFYING"  # a job reads them again
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    ABORTED = "ABORTED"
    EXPIRED = "EXPIRED"


TAKING: Final = frozenset({UploadState.CREATED, UploadState.UPLOADING, UploadState.PAUSED})
"""States in which it takes bytes."""
OPEN: Final = TAKING | {UploadState.RECEIVED, UploadState.VERIFYING}
"""States from which it may still become a file; `is_open` says the same."""
HIDDEN: Final = frozenset({"joined_ids", "segments", "token", "holder", "held_until", "path_key"})
"""What only its receiver needs: never in events."""


class UploadProtocol(Enum):
    TUS = "TUS"
    INSTANT = "INSTANT"  # its contents were stored here already


class Segment(BaseModel):
    """Bytes that follow one another, in the store: see storage/incoming.py."""

    key: str
    size_bytes: int


class UploadDocument(BaseDocument):
    """An upload, or a part of one that is sent beside other parts (tus: concatenation).

    Who receives bytes holds it by a lease: `token` is raised by each claim, and what one holder has
    written says nothing once another has claimed it. `received_bytes` counts only what is on disk.
    """

    version_id: PydanticObjectId
    model_id: PydanticObjectId
    owner_id: PydanticObjectId  # of the model: whose quota it counts to
    principals: list[str] = []  # who may see it: auth/viewer.py, job_principals
    created_by_id: PydanticObjectId | None = None
    part_of: PydanticObjectId | None = None  # the upload that this is a part of
    part_count: int = 0  # parts that it was ever given: its bytes come by them alone
    joined_ids: list[PydanticObjectId] = []  # the parts that it was put together of, in order
    path: str  # relative, with `/`, normalised
    path_key: str  # the same without regard to case
    size_bytes: int
    sha256: str | None = None  # what the client says it is; hexadecimal, lower case
    protocol: UploadProtocol = UploadProtocol.TUS
    state: UploadState = UploadState.CREATED
    is_open: bool = True
    received_bytes: int = 0
    segments: list[Segment] = []  # in order; their sizes sum up to `received_bytes`
    rate: float | None = None  # bytes in a second, of the last seconds
    sequence: int = 0  # raised by every change that is told
    token: int = 0
    holder: str | None = None  # who receives bytes just now
    held_until: datetime | None = None  # by the database's clock
    expires_at: datetime
    created_at: datetime = Field(default_factory=utc_now)
    updated_at: datetime = Field(default_factory=utc_now)
    ended_at: datetime | None = None
    error: Failure | None = None
    file_id: PydanticObjectId | None = None
    job_id: PydanticObjectId | None = None

    class Settings:
        name = "uploads"
        indexes = [
            IndexModel([("version_id", ASCENDING), ("_id", ASCENDING)], name="version"),
            IndexModel([("principals", ASCENDING), ("_id", ASCENDING)], name="seen"),
            IndexModel(
                [("principals", ASCENDING), ("state", ASCENDING), ("_id", ASCENDING)],
                name="seen_state",
            ),
            IndexModel(
                [("version_id", ASCENDING), ("path_key", ASCENDING)],
                name="path",
                unique=True,
                partialFilterExpression={"is_open": True, "part_of": None},
            ),
            IndexModel(
                [("part_of", ASCENDING), ("_id", ASCENDING)],
                name="parts",
                partialFilterExpression={"part_of": {"$gt": LEAST_ID}},
            ),
            IndexModel(
                [("expires_at", ASCENDING)],
                name="expiring",
                partialFilterExpression={"is_open": True},
            ),
            IndexModel(
                [("ended_at", ASCENDING)],
                name="ended",
                partialFilterExpression={"ended_at": {"$type": "date"}},
            ),
        ]


class QuotaDocument(BaseDocument):
    """What the files of an owner (its id) may come to, and what open uploads have reserved of it.

    Written by everything that reserves or gives back: two at once collide, and count one after the
    other.
    """

    limit_bytes: int | None = None  # None: as the settings say
    reserved_bytes: int = 0
    open_uploads: int = 0
    changes: int = 0  # raised by every write: one that changes nothing would collide with nothing

    class Settings:
        name = "quotas"
