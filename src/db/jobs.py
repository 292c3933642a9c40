"""Jobs: long work that survives any crash. The truth about each is its one document here."""

from datetime import datetime
from enum import Enum
from typing import Any, Final

from beanie import PydanticObjectId
from bson import ObjectId
from pydantic import BaseModel, Field
from pymongo import ASCENDING, DESCENDING, IndexModel

from .base import BaseDocument, utc_now


class JobKind(Enum):
    IMPORT_MODEL = "IMPORT_MODEL"
    REINDEX = "REINDEX"
    GARBAGE_COLLECT = "GARBAGE_COLLECT"
    VERIFY_FILE = "VERIFY_FILE"
    FINALIZE_VERSION = "FINALIZE_VERSION"
    VERIFY_BLOBS = "VERIFY_BLOBS"
    EXPIRE_UPLOADS = "EXPIRE_UPLOADS"
    ROLLUP_ANALYTICS = "ROLLUP_ANALYTICS"
    EXPORT = "EXPORT"
    BULK_MUTATION = "BULK_MUTATION"


class JobState(Enum):
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"  # an attempt failed, the next one waits for its time
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"  # refused, or out of attempts
    CANCELLING = "CANCELLING"  # its worker will find out
    CANCELLED = "CANCELLED"
    DEAD = "DEAD"  # workers died of it


ENDED: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD})
WAITING: Final = frozenset({JobState.QUEUED, JobState.RETRYING})
HELD: Final = frozenset({JobState.RUNNING, JobState.CANCELLING})
"""States in which a worker has it, by a lease."""


class Progress(BaseModel):
    """Grows within an attempt; `sequence` grows with every change of the job, over all attempts."""

    current: int = 0
    total: int | None = None
    unit: str = "items"
    rate: float | None = None  # per second, of the last seconds
    message: str | None = None
    updated_at: datetime = Field(default_factory=utc_now)
    sequence: int = 0


class Step(BaseModel):
    name: str
    state: JobState
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Failure(BaseModel):
    code: str  # one of ErrorCode where the job was refused, else INTERNAL, WORKER_DIED …
    message: str
    path: list[str] | None = None


# In place of `$type`: MongoDB does not see that what equals an id, or is in a list of them, has the
# type of one, and would not use the index.
LEAST_ID: Final = ObjectId("0" * 24)


class JobDocument(BaseDocument):
    kind: JobKind
    state: JobState = JobState.QUEUED
    input: dict[str, Any] = {}  # for the handler alone; never shown
    scopes: list[str] = []  # of the token that asked for it: what the handler may do
    created_by_id: PydanticObjectId | None = None  # None: the system
    principals: list[str] = []  # who may see it: auth/viewer.py, job_principals
    subject: dict[str, Any] | None = None  # {type, id}: what it is about, a type of the schema
    parent_id: PydanticObjectId | None = None
    open_children: int = 0  # that have not ended
    awaits_children: bool = False  # not to be claimed before they have
    idempotency_key: str | None = None  # unique per kind
    priority: int = 0  # higher first
    turn: int = 0  # among equal priorities, lower first: see jobs/put.py
    run_after: datetime = Field(default_factory=utc_now)
    attempt: int = 0
    max_attempts: int = 5
    deaths: int = 0  # workers that died while they had it
    token: int = 0  # fencing: raised by each claim
    touched: int = 0  # raised by transactions of its worker: whoever takes it over collides
    worker: str | None = None
    lease_until: datetime | None = None  # by the server's clock
    heartbeat_at: datetime | None = None
    progress: Progress = Field(default_factory=Progress)
    steps: list[Step] = []
    checkpoint: dict[str, Any] | None = None  # what its handler goes on from, in the next attempt
    log_count: int = 0
    result: dict[str, Any] | None = None
    error: Failure | None = None
    comment: str | None = None  # of who cancelled or retried it
    created_at: datetime = Field(default_factory=utc_now)
    started_at: datetime | None = None  # of the first attempt
    finished_at: datetime | None = None

    class Settings:
        name = "jobs"
        indexes = [
            IndexModel(
                [
                    ("state", ASCENDING),
                    ("priority", DESCENDING),
                    ("turn", ASCENDING),
                    ("_id", ASCENDING),
                    ("kind", ASCENDING),
                ],
                name="queue",
            ),
            IndexModel(
                [
                    ("state", ASCENDING),
                    ("created_by_id", ASCENDING),
                    ("kind", ASCENDING),
                    ("priority", ASCENDING),
                    ("turn", DESCENDING),
                ],
                name="turns",
            ),
            # Where most of those that wait do so for their time, the few others are found by this.
            IndexModel([("state", ASCENDING), ("run_after", ASCENDING)], name="due"),
            IndexModel(
                [("kind", ASCENDING), ("idempotency_key", ASCENDING)],
                name="idempotency",
                unique=True,
                partialFilterExpression={"idempotency_key": {"$gt": ""}},
            ),
            IndexModel([("principals", ASCENDING), ("_id", ASCENDING)], name="seen"),
            IndexModel(
                [("principals", ASCENDING), ("state", ASCENDING), ("_id", ASCENDING)],
                name="seen_state",
            ),
            IndexModel(
                [("subject.id", ASCENDING), ("_id", ASCENDING)],
                name="subject",
                partialFilterExpression={"subject.id": {"$exists": True}},
            ),
            IndexModel(
                [("parent_id", ASCENDING), ("_id", ASCENDING)],
                name="parent",
                partialFilterExpression={"parent_id": {"$gt": LEAST_ID}},
            ),
            IndexModel(
                [("finished_at", ASCENDING)],
                name="finished",
                partialFilterExpression={"finished_at": {"$type": "date"}},
            ),
        ]


class Level(Enum):
    """How much a line of a job's log matters."""

    INFO = "INFO"
    WARNING = "WARNING"
    CRITICAL = "CRITICAL"


class JobLogDocument(BaseDocument):
    job_id: PydanticObjectId
    level: Level = Level.INFO
    message: str
    at: datetime = Field(default_factory=utc_now)

    class Settings:
        name = "job_logs"
        indexes = [IndexModel([("job_id", ASCENDING), ("_id", ASCENDING)], name="job")]
