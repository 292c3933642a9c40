"""What usage events add up to, by minute, quarter of an hour and day.

A row belongs to one bucket of time and one group of one cuboid: the rows of a cuboid have, together,
counted each event that concerns it once. What a question is asked of is the cuboid that has its
dimensions and no more.
"""

from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final

from beanie import PydanticObjectId
from pydantic import BaseModel, Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument


class Grain(Enum):
    """How long a bucket is; the value is the collection."""

    MINUTE = "rollup_minutes"
    QUARTER = "rollup_quarters"
    DAY = "rollup_days"


SECONDS: Final = {Grain.MINUTE: 60, Grain.QUARTER: 900, Grain.DAY: 86_400}


class Cuboid(Enum):
    """Of one model (`model`), then of all models of an audience, then of the operations of the API."""

    MODEL = "model"
    MODEL_VERSION = "model.version"
    MODEL_FILE = "model.file"
    MODEL_FORMAT = "model.format"
    MODEL_CLIENT = "model.client"
    MODEL_ALL = "model.all"  # version, file, format and client

    AUDIENCE = "audience"
    AUDIENCE_OWNER = "audience.owner"
    AUDIENCE_TASK = "audience.task"
    AUDIENCE_LIBRARY = "audience.library"
    AUDIENCE_LICENSE = "audience.license"
    AUDIENCE_FORMAT = "audience.format"
    AUDIENCE_CLIENT = "audience.client"

    API = "api"
    API_OPERATION = "api.operation"
    API_CLIENT = "api.client"
    API_ALL = "api.all"  # operation and client


AUDIENCES: Final = ("public", "internal")
"""Principals of models that so many have that their rows are added up: see db/rollups of `audience`.
Of all other models each viewer's are added up when they ask."""

ADDITIVE: Final = (
    "downloads",
    "egress_bytes",
    "uploads",
    "ingress_bytes",
    "views",
    "likes",
    "new_models",
    "new_versions",
    "job_seconds",
    "storage_bytes",
    "stored_bytes",
    "requests",
    "errors",
    "total_ms",
    "cost",
    "commands",
    "batches",
    "keys",
    "hits",
)
"""Names of a row whose values are added up; one that is 0 is left out. `likes`, `storage_bytes` and
`stored_bytes` are changes, and may be negative: what there is at a moment is the sum of all before it."""

MOST_HASHES: Final = 1024
"""Of `who`: the smallest hashes of those who downloaded. Up to so many they are all, and counted
exactly; beyond, their density tells how many there are, with a standard error of 3.2 %
(1 / sqrt(1024 - 2): Bar-Yossef et al. 2002, "Counting distinct elements in a data stream", as Apache
DataSketches' KMV)."""


class Rolled(BaseModel):
    """A row. Times are the first moment of the bucket. Its id is the group: cuboid, time and dimensions,
    in the order of the fields here, without those that the cuboid has not; so that rolling up again
    replaces."""

    cuboid: str
    at: datetime
    model: PydanticObjectId | None = None
    version: PydanticObjectId | None = None
    file: PydanticObjectId | None = None
    format: str | None = None
    client: str | None = None
    operation: str | None = None  # the first 16 digits of its text's SHA-256, `:`, its name
    audience: str | None = None
    value: str | None = None  # of the dimension of an audience's cuboid; "": it has none
    run: int  # the run that wrote it
    who: list[int] = []
    latencies: list[int] = []  # HISTOGRAM_STEPS counts
    last_at: datetime | None = None  # of API rows: when it was last used


def _indexes() -> list[IndexModel]:
    return [
        IndexModel(
            [("cuboid", ASCENDING), ("model", ASCENDING), ("at", ASCENDING)],
            name="model",
            partialFilterExpression={"model": {"$exists": True}},
        ),
        IndexModel(
            [("cuboid", ASCENDING), ("audience", ASCENDING), ("at", ASCENDING)], name="audience"
        ),
    ]


class MinuteRollupDocument(Rolled, BaseDocument):
    id: dict[str, Any] = Field(alias="_id")  # type: ignore[assignment]  # its group

    class Settings:
        name = "rollup_minutes"
        indexes = _indexes()


class QuarterRollupDocument(Rolled, BaseDocument):
    id: dict[str, Any] = Field(alias="_id")  # type: ignore[assignment]  # its group

    class Settings:
        name = "rollup_quarters"
        indexes = _indexes()


class DayRollupDocument(Rolled, BaseDocument):
    id: dict[str, Any] = Field(alias="_id")  # type: ignore[assignment]  # its group

    class Settings:
        name = "rollup_days"
        indexes = _indexes()


class HomeDocument(BaseDocument):
    """What a model was counted as: the audience and the dimensions that its rows were added to, and the
    sizes that its changes of storage add up to. Its id is the model's."""

    audience: str | None  # None: none of AUDIENCES
    owner: str  # its id
    task: str
    library: str
    license: str
    storage_bytes: int
    stored_bytes: int
    downloads_before: int = 0  # that were counted before there were events

    class Settings:
        name = "rollup_homes"


class RollupStateDocument(BaseDocument):
    """One document, `rollups`: how far the rollups are."""

    id: str = Field(alias="_id")  # type: ignore[assignment]  # its name, there is one
    run: int  # the last one that ended
    through: datetime  # all events that were recorded before are in the rows
    position: str  # of the log: events up to it were taken in
    began: datetime | None = None  # the first day that has rows

    class Settings:
        name = "rollup_state"


class RollupDeltaDocument(BaseDocument):
    """By how much a run has changed a minute's row of a cuboid MODEL_ALL or API_ALL: what subscriptions
    tell. Kept for a day."""

    run: int
    at: datetime  # the minute
    written_at: datetime
    cuboid: str
    model: PydanticObjectId | None = None
    version: PydanticObjectId | None = None
    file: PydanticObjectId | None = None
    format: str | None = None
    client: str | None = None
    operation: str | None = None

    class Settings:
        name = "rollup_deltas"
        indexes = [
            IndexModel([("run", ASCENDING)], name="run"),
            IndexModel([("written_at", ASCENDING)], name="old", expireAfterSeconds=24 * 3600),
        ]


MINUTES_KEPT: Final = timedelta(days=7)
