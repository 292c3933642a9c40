"""Models, their cards and who likes them."""

from datetime import UTC, datetime
from enum import Enum
from math import log10
from typing import Any, Final

from beanie import PydanticObjectId
from pydantic import BaseModel, Field
from pymongo import ASCENDING, TEXT, IndexModel

from .actors import ActorKind, Role
from .base import BaseDocument, utc_now


class Visibility(Enum):
    PUBLIC = "PUBLIC"
    INTERNAL = "INTERNAL"
    PRIVATE = "PRIVATE"


class ModelState(Enum):
    ACTIVE = "ACTIVE"
    ARCHIVED = "ARCHIVED"
    DELETED = "DELETED"


class AliasEntry(BaseModel):
    name: str
    version_id: PydanticObjectId
    protected: bool = False
    set_by_id: PydanticObjectId | None = None
    set_at: datetime = Field(default_factory=utc_now)


class Grant(BaseModel):
    """A role on one model."""

    actor_id: PydanticObjectId
    role: Role


class Stats(BaseModel):
    """Counters, so that reading them costs nothing: of use kept by the rollups (worker/model_stats.py),
    the others by the writes that change them."""

    downloads_30d: int = 0  # of so many whole days (UTC), with today
    downloads_all: int = 0
    unique_downloaders_30d: int = 0  # see db/rollups.py, `distinct`
    use_1d: int = 0  # downloads and ten times the new likes of so many days
    use_7d: int = 0
    use_30d: int = 0
    likes: int = 0
    versions: int = 0  # not deleted ones
    files: int = 0  # of versions that are not deleted
    size_bytes: int = 0  # sum of file lengths
    stored_bytes: int = 0  # of READY and ARCHIVED versions, equal contents counted once
    trending_score: float = 0.0
    as_of: datetime = Field(default_factory=utc_now)


TRENDING_EPOCH: Final = datetime(2020, 1, 1, tzinfo=UTC)
TRENDING_PERIOD_SECONDS: Final = 45 * 24 * 3600  # being so much newer weighs as ten times the use


def trending_score(downloads_30d: int, likes: int, created_at: datetime) -> float:
    """What models are ordered by when nothing else is asked for.

    The form is Reddit's "hot" of 2008 (`_sorts.pyx` of its published source): the logarithm of the
    votes plus the age on a straight line. Time is in the created date only, so a score stays right
    while nothing happens and can be stored and indexed. A like weighs as ten downloads.
    """
    seconds = (created_at - TRENDING_EPOCH).total_seconds()
    return log10(max(1, downloads_30d + 10 * likes)) + seconds / TRENDING_PERIOD_SECONDS


def trending_score_expression() -> dict[str, Any]:
    """The same from the fields of a model, for a `$set` of an update pipeline after its counters."""
    use = {"$add": ["$stats.downloads_30d", {"$multiply": [10, "$stats.likes"]}]}
    milliseconds = {"$subtract": ["$created_at", TRENDING_EPOCH]}
    return {
        "$add": [
            {"$log10": {"$max": [1, use]}},
            {"$divide": [milliseconds, TRENDING_PERIOD_SECONDS * 1000]},
        ]
    }


class ModelDocument(BaseDocument):
    owner_id: PydanticObjectId
    owner_login: str
    owner_login_lower: str
    owner_kind: ActorKind
    name: str
    name_lower: (
        str  # of a deleted model: with `#` and its id behind, so that the name is free again
    )
    display_name: str | None = None
    summary: str | None = None
    task: str | None = None
    library: str | None = None
    license: str | None = None
    languages: list[str] = []
    tags: list[str] = []
    formats: list[str] = []  # FileFormat values in the latest version
    parameters: int = 0  # of the latest version; 0: not known
    properties: dict[str, Any] = {}
    visibility: Visibility = Visibility.PRIVATE
    state: ModelState = ModelState.ACTIVE
    principals: list[str] = []  # who may see it: auth/principals.py; empty when deleted
    grants: list[Grant] = []
    revision: int = 1
    last_number: int = 0  # the highest version number ever given
    latest_version_id: PydanticObjectId | None = None  # the highest number that is READY
    aliases: list[AliasEntry] = []
    stats: Stats = Field(default_factory=Stats)
    created_at: datetime = Field(default_factory=utc_now)
    updated_at: datetime = Field(default_factory=utc_now)
    deleted_at: datetime | None = None
    purging_at: datetime | None = None  # since when its rows are being removed: no way back

    class Settings:
        name = "models"
        # One array in an index, no more: MongoDB refuses parallel arrays. {state, principals, sort
        # key, _id} gives each order of each viewer as a merge of few index scans.
        indexes = [
            IndexModel(
                [("owner_login_lower", ASCENDING), ("name_lower", ASCENDING)],
                name="owner_name",
                unique=True,
            ),
            *[
                IndexModel(
                    [
                        ("state", ASCENDING),
                        ("principals", ASCENDING),
                        (key, ASCENDING),
                        ("_id", ASCENDING),
                    ],
                    name=name,
                )
                for name, key in {
                    "trending": "stats.trending_score",
                    "downloads_30d": "stats.downloads_30d",
                    "downloads_all": "stats.downloads_all",
                    "likes": "stats.likes",
                    "size": "stats.size_bytes",
                    "parameters": "parameters",
                    "use_1d": "stats.use_1d",
                    "use_7d": "stats.use_7d",
                    "use_30d": "stats.use_30d",
                    "updated": "updated_at",
                    "created": "created_at",
                    "name": "name_lower",
                }.items()
            ],
            IndexModel(
                [("tags", ASCENDING), ("stats.trending_score", ASCENDING), ("_id", ASCENDING)],
                name="tags",
            ),
            IndexModel(
                [("deleted_at", ASCENDING), ("_id", ASCENDING)],
                name="deleted",
                partialFilterExpression={"deleted_at": {"$type": "date"}},
            ),
            *[
                IndexModel(
                    [
                        ("state", ASCENDING),
                        ("principals", ASCENDING),
                        (key, ASCENDING),
                        ("stats.trending_score", ASCENDING),
                        ("_id", ASCENDING),
                    ],
                    name=key,
                )
                for key in ("task", "library", "license", "owner_login_lower")
            ],
            *[
                IndexModel(
                    [
                        ("state", ASCENDING),
                        ("principals", ASCENDING),
                        ("task", ASCENDING),
                        (f"stats.{key}", ASCENDING),
                        ("_id", ASCENDING),
                    ],
                    name=f"task_{key}",
                )
                for key in ("use_1d", "use_7d", "use_30d")
            ],
            IndexModel(
                [
                    ("name", TEXT),
                    ("display_name", TEXT),
                    ("summary", TEXT),
                    ("tags", TEXT),
                    ("owner_login", TEXT),
                ],
                name="text",
                weights={"name": 10, "display_name": 8, "owner_login": 4, "tags": 3, "summary": 2},
                default_language="none",
                language_override="text_language",
            ),
        ]


class CardDocument(BaseDocument):
    """The card of the model with the same id; apart, so that lists never read it."""

    markdown: str
    metadata: dict[str, Any] = {}
    html: str  # sanitised when it is written

    class Settings:
        name = "cards"


class LikeDocument(BaseDocument):
    user_id: PydanticObjectId
    model_id: PydanticObjectId
    created_at: datetime = Field(default_factory=utc_now)

    class Settings:
        name = "likes"
        indexes = [
            IndexModel([("user_id", ASCENDING), ("model_id", ASCENDING)], name="like", unique=True),
            IndexModel([("model_id", ASCENDING), ("_id", ASCENDING)], name="model"),
        ]
