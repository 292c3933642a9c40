"""What usage events add up to, by minute, quarter of an hour and day.

A row belongs to one bucket of time and one group of one cuboid: the rows of a cuboid have, together,
counted each event that concerns it once. What a question is asked of is the cuboid that has its
dimensions and no more; `cuboid_of` says which one has rows at a grain.

Adding up is associative and does not heed the order, so what is made of minutes, of quarters or of the
events themselves is the same: sums, of floats only such as are multiples of 1/1024; sets, of hashes the
smallest ones; histograms of the same steps; the latest of times.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from heapq import nsmallest
from typing import Any, Final, TypeAlias

from beanie import PydanticObjectId
from pydantic import BaseModel, Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, Row
from .usage import HISTOGRAM_STEPS, UsageKind, day_of


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
    in the order of the fields here, without those that the cuboid or the events have not; so that
    rolling up again replaces, and that all rows of a bucket stand together in the index of ids.

    Values of ADDITIVE are fields of their own; what is not there is 0, empty or none. One that has no
    values at all is about to be deleted."""

    cuboid: str
    at: datetime
    model: PydanticObjectId | None = None
    version: PydanticObjectId | None = None
    file: PydanticObjectId | None = None
    format: str | None = None
    operation: str | None = None  # the first 16 digits of its text's SHA-256, `:`, its name
    client: str | None = None
    audience: str | None = None
    value: str | None = None  # of the dimension of an audience's cuboid; "": it has none
    run: int  # the run that changed it last
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
            [("cuboid", ASCENDING), ("audience", ASCENDING), ("at", ASCENDING)],
            name="audience",
            # Those of models, which are most, have none: their names come after.
            partialFilterExpression={"cuboid": {"$lt": "b"}},
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
    downloads_until: datetime | None = None
    downloads_settled: int = (
        0  # of all days before `downloads_until`: known without adding up again
    )
    moving: int | None = None
    """Its audience or a dimension changed, so many times: its past is to be added to others' rows."""

    class Settings:
        name = "rollup_homes"
        indexes = [
            IndexModel(
                [("moving", ASCENDING), ("_id", ASCENDING)],
                name="moving",
                partialFilterExpression={"moving": {"$gt": 0}},
            )
        ]


class RollupStateDocument(BaseDocument):
    """One document, `rollups`: how far the rollups are."""

    id: str = Field(alias="_id")  # type: ignore[assignment]  # its name, there is one
    run: int  # the last one that ended
    through: datetime  # all events that were recorded before are in the rows
    position: str  # of the log: events up to it were taken in
    began: datetime | None = None  # the first day that has rows
    whole_from: datetime | None = None  # the first day whose events are all here: before, rows stay
    minutes_from: datetime | None = None  # the first day that has rows by minute
    stats_day: datetime | None = None  # that windows of `models.stats` end with
    moving: dict[str, Any] | None = None  # models whose past is being moved, and how far that is
    owner: str | None = None  # who rolls up just now,
    until: datetime | None = None  # by a lease on the database's clock,
    due: datetime | None = None  # and when the next one is to

    class Settings:
        name = "rollup_state"


class RollupDeltaDocument(BaseDocument):
    """By how much a run has changed a minute's row of a cuboid MODEL_ALL or API_ALL: what subscriptions
    tell. Values of ADDITIVE are fields of their own. Written in the transaction that changes the row; all
    of a run are there once the state names it. Kept for a day. Of minutes that have no rows by minute
    any more there are none."""

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


# Groups -----------------------------------------------------------------------------------------

Key: TypeAlias = tuple[Any, ...]
"""A group: the value of its cuboid, then of each of its dimensions; None: it has none."""
Sums: TypeAlias = Row
"""What a group adds up to: values of ADDITIVE, `who` as a set, `latencies`, `last_at`."""
Groups: TypeAlias = dict[Key, Sums]

DIMENSIONS: Final[Mapping[str, tuple[str, ...]]] = {
    Cuboid.MODEL.value: ("model",),
    Cuboid.MODEL_VERSION.value: ("model", "version"),
    Cuboid.MODEL_FILE.value: ("model", "file"),
    Cuboid.MODEL_FORMAT.value: ("model", "format"),
    Cuboid.MODEL_CLIENT.value: ("model", "client"),
    Cuboid.MODEL_ALL.value: ("model", "version", "file", "format", "client"),
    Cuboid.AUDIENCE.value: ("audience",),
    Cuboid.AUDIENCE_OWNER.value: ("audience", "value"),
    Cuboid.AUDIENCE_TASK.value: ("audience", "value"),
    Cuboid.AUDIENCE_LIBRARY.value: ("audience", "value"),
    Cuboid.AUDIENCE_LICENSE.value: ("audience", "value"),
    Cuboid.AUDIENCE_FORMAT.value: ("audience", "value"),
    Cuboid.AUDIENCE_CLIENT.value: ("audience", "value"),
    Cuboid.API.value: (),
    Cuboid.API_OPERATION.value: ("operation",),
    Cuboid.API_CLIENT.value: ("client",),
    Cuboid.API_ALL.value: ("operation", "client"),
}
BY_DAY_ALONE: Final = (
    Cuboid.MODEL_VERSION,
    Cuboid.MODEL_FILE,
    Cuboid.MODEL_FORMAT,
    Cuboid.MODEL_CLIENT,
)
"""In a quarter of an hour most groups of MODEL_ALL hold one event, and rows of these would be as many
again, each: there they are added up when somebody asks."""
OF_AUDIENCES: Final = tuple(each.value for each in Cuboid if each.value.startswith("audience"))
OF_API: Final = tuple(each.value for each in Cuboid if each.value.startswith("api"))
OF_MODELS: Final = tuple(each.value for each in Cuboid if each.value.startswith("model"))
_ALL, _API_ALL = Cuboid.MODEL_ALL.value, Cuboid.API_ALL.value
_MODEL, _VERSION, _FILE = Cuboid.MODEL.value, Cuboid.MODEL_VERSION.value, Cuboid.MODEL_FILE.value
_FORMAT, _CLIENT = Cuboid.MODEL_FORMAT.value, Cuboid.MODEL_CLIENT.value
_API, _API_OPERATION = Cuboid.API.value, Cuboid.API_OPERATION.value
_API_CLIENT = Cuboid.API_CLIENT.value


def cuboid_of(cuboid: Cuboid, grain: Grain) -> Cuboid:
    """The one to read for the dimensions of this one: MODEL_ALL, of which groups are added up, where it
    has rows by day alone."""
    return Cuboid.MODEL_ALL if grain is not Grain.DAY and cuboid in BY_DAY_ALONE else cuboid


def gather(found: Groups, events: Iterable[Row]) -> int:
    """Add events of one bucket to its finest groups: MODEL_ALL and API_ALL. What is about a model and
    does not say which is passed over. Answers how many cannot be read, such as a newer version's: they
    are passed over too, for else nothing would ever be added up again."""
    unreadable = 0
    for event in events:
        try:
            _gather(found, event)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            unreadable += 1
    return unreadable


def _gather(found: Groups, event: Row) -> None:
    get = event.get
    kind = event["kind"]
    if kind == _OPERATION:
        key: Key = (_API_ALL, get("operation"), get("client"))
        sums = found.get(key)
        if sums is None:
            sums = found[key] = {}
        _call(sums, event)
        return
    model = get("model")
    if model is None:
        return
    key = (_ALL, model, get("version"), get("file"), get("format"), get("client"))
    sums = found.get(key)
    if sums is None:
        sums = found[key] = {}
    count = get("count", 0)
    if kind == _DOWNLOAD:
        sums["downloads"] = sums.get("downloads", 0) + count
        sums["egress_bytes"] = sums.get("egress_bytes", 0) + get("bytes", 0)
        who = get("who")
        if count and who is not None:
            if "who" in sums:
                sums["who"].add(int(who))
            else:
                sums["who"] = {int(who)}
        return
    for name, source in _COUNTED[kind]:
        sums[name] = sums.get(name, 0) + get(source, 0)


_OPERATION, _DOWNLOAD = UsageKind.OPERATION.value, UsageKind.DOWNLOAD.value
_COUNTED: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    UsageKind.VIEW.value: (("views", "count"),),
    UsageKind.UPLOAD.value: (("uploads", "count"), ("ingress_bytes", "bytes")),
    UsageKind.LIKE.value: (("likes", "count"),),
    UsageKind.JOB.value: (("job_seconds", "seconds"),),
    UsageKind.STORAGE.value: (("storage_bytes", "bytes"), ("stored_bytes", "stored")),
    UsageKind.MODEL.value: (("new_models", "count"),),
    UsageKind.VERSION.value: (("new_versions", "count"),),
}
"""Names of a row, with those of the event that they are of."""
_CALLED: Final = ("errors", "total_ms", "cost", "commands", "batches", "keys", "hits")


def _call(sums: Sums, event: Row) -> None:
    sums["requests"] = sums.get("requests", 0) + event.get("count", 0)
    for name in _CALLED:
        if name in event:
            sums[name] = sums.get(name, 0) + event[name]
    if "latencies" in event:
        steps = sums.setdefault("latencies", [0] * HISTOGRAM_STEPS)
        for step, count in event["latencies"].items():
            steps[int(step)] += count
    last = sums.get("last_at")
    if last is None or event["at"] > last:
        sums["last_at"] = event["at"]


def add(into: Sums, more: Sums) -> None:
    """Add `more` to `into`; `more` stays as it is, and shares nothing with it."""
    for name, value in more.items():
        if name not in _NOT_ADDED:
            into[name] = into.get(name, 0) + value
        elif name == "who":
            who = into.get("who")
            if who is None:
                into["who"] = set(value)
                continue
            who |= value
            if len(who) > _MOST_IN_MEMORY:
                into["who"] = set(nsmallest(MOST_HASHES, who))
        elif name == "latencies":
            steps = into.get("latencies")
            if steps is None:
                into["latencies"] = list(value)
            else:
                into["latencies"] = [a + b for a, b in zip(steps, value, strict=True)]
        else:
            into["last_at"] = max(into.get("last_at", value), value)


_NOT_ADDED: Final = frozenset({"who", "latencies", "last_at"})
_MOST_IN_MEMORY: Final = 4 * MOST_HASHES


def add_to(groups: Groups, key: Key, more: Sums) -> None:
    sums = groups.get(key)
    if sums is not None:
        add(sums, more)
        return
    groups[key] = _copy(more)


def _copy(sums: Sums) -> Sums:
    found = sums.copy()
    for name in ("who", "latencies"):
        if name in found:
            found[name] = found[name].copy()
    return found


class Together:
    """Groups that are added up from others, which stay as they are: one of a single other is that one
    itself. Most are."""

    def __init__(self) -> None:
        self.groups: Groups = {}
        self._own: set[int] = set()
        """Ids of sums that are not those of others."""

    def add(self, key: Key, more: Sums) -> None:
        # To look a key up costs, for hashes of ids are computed by Python: once is enough for most.
        sums = self.groups.setdefault(key, more)
        if sums is more:
            return
        if id(sums) not in self._own:
            sums = self.groups[key] = _copy(sums)
            self._own.add(id(sums))
        add(sums, more)

    def add_all(self, groups: Groups) -> None:
        for key, sums in groups.items():
            self.add(key, sums)


def coarser(fine: Groups, grain: Grain) -> Groups:
    """The other groups of models and of the API that the finest ones add up to, at this grain; to be
    read only, as the finest ones are from here on."""
    found = Together()
    take = found.add
    is_day = grain is Grain.DAY
    for key, sums in fine.items():
        if key[0] == _API_ALL:
            _, operation, client = key
            take((_API,), sums)
            take((_API_OPERATION, operation), sums)
            take((_API_CLIENT, client), sums)
            continue
        _, model, version, file, format, client = key
        take((_MODEL, model), sums)
        if is_day:
            take((_VERSION, model, version), sums)
            take((_FILE, model, file), sums)
            take((_FORMAT, model, format), sums)
            take((_CLIENT, model, client), sums)
    return found.groups


def of_audiences(groups: Groups, homes: Mapping[Any, Row | None]) -> Groups:
    """What models add up to for the audiences of their homes: from MODEL with MODEL_ALL, or, where there
    is nothing of that, with MODEL_FORMAT and MODEL_CLIENT. To be read only, as `groups` are from here
    on."""
    wanted = _FROM_ALL if any(key[0] == _ALL for key in groups) else _FROM_OTHERS
    # First by all that they have in common: few are left to be added to each of the others.
    by_home, by_event, found = Together(), Together(), Together()
    for key, sums in groups.items():
        cuboid = key[0]
        if cuboid not in wanted:
            continue
        home = homes.get(key[1])
        if home is None or home["audience"] is None:
            continue
        audience = home["audience"]
        if cuboid == _MODEL:
            common = (audience, home["owner"], home["task"], home["library"], home["license"])
            by_home.add(common, sums)
        elif cuboid == _ALL:
            by_event.add((audience, key[4] or "", key[5] or ""), sums)
        elif cuboid == _FORMAT:
            by_event.add((audience, key[2] or "", None), sums)
        else:
            by_event.add((audience, None, key[2] or ""), sums)
    by_license = Together()
    for (audience, owner, task, library, license), sums in by_home.groups.items():
        found.add((_OF_OWNER, audience, owner), sums)
        found.add((_OF_TASK, audience, task), sums)
        found.add((_OF_LIBRARY, audience, library), sums)
        by_license.add((_OF_LICENSE, audience, license), sums)
    for (_, audience, _), sums in by_license.groups.items():
        found.add((_OF_ALL, audience), sums)
    found.groups |= by_license.groups
    for (audience, format, client), sums in by_event.groups.items():
        if format is not None:
            found.add((Cuboid.AUDIENCE_FORMAT.value, audience, format), sums)
        if client is not None:
            found.add((Cuboid.AUDIENCE_CLIENT.value, audience, client), sums)
    return found.groups


_OF_ALL, _OF_OWNER = Cuboid.AUDIENCE.value, Cuboid.AUDIENCE_OWNER.value
_OF_TASK, _OF_LIBRARY = Cuboid.AUDIENCE_TASK.value, Cuboid.AUDIENCE_LIBRARY.value
_OF_LICENSE = Cuboid.AUDIENCE_LICENSE.value
_FROM_ALL: Final = frozenset({_MODEL, _ALL})
_FROM_OTHERS: Final = frozenset({_MODEL, _FORMAT, _CLIENT})


# Rows -------------------------------------------------------------------------------------------


def row_id(key: Key, at: datetime) -> Row:
    """The id of a group's row."""
    found: Row = {"cuboid": key[0], "at": at}
    for place, name in enumerate(DIMENSIONS[key[0]], 1):
        value = key[place]
        if value is not None:
            found[name] = value
    return found


def key_of(row: Row) -> Key:
    cuboid = row["cuboid"]
    return (cuboid, *[row.get(name) for name in DIMENSIONS[cuboid]])


def row_of(key: Key, at: datetime, sums: Sums, run: int) -> Row | None:
    """None: it would say nothing."""
    values = values_of(sums)
    return row_with(key, at, values, run) if values else None


def values_of(sums: Sums) -> Row:
    """What a row says of them; if nothing, there is none."""
    return {
        name: smallest(value) if name == "who" else value for name, value in sums.items() if value
    }


def row_with(key: Key, at: datetime, values: Row, run: int) -> Row:
    id = row_id(key, at)
    return {"_id": id, **id, "run": run, **values}


def sums_of(row: Row) -> Sums:
    """What a row says, to be added to others."""
    found: Sums = {name: value for name, value in row.items() if name not in _NAMES}
    if "who" in found:
        found["who"] = set(found["who"])
    return found


_NAMES: Final = frozenset(
    {"_id", "at", "run", "cuboid", *(name for names in DIMENSIONS.values() for name in names)}
)


def bucket_query(cuboids: Iterable[str], start: datetime, end: datetime) -> Row:
    """All rows of these cuboids in buckets from `start` on, before `end`; by the index of ids."""
    ranges = [
        {"_id": {"$gte": {"cuboid": each, "at": start}, "$lt": {"cuboid": each, "at": end}}}
        for each in cuboids
    ]
    return ranges[0] if len(ranges) == 1 else {"$or": ranges}


def bucket_starts(grain: Grain, start: datetime, end: datetime) -> Iterator[datetime]:
    step = timedelta(seconds=SECONDS[grain])
    while start < end:
        yield start
        start += step


# Who --------------------------------------------------------------------------------------------


def smallest(who: Iterable[int]) -> list[int]:
    """Of hashes those that a row keeps, in order."""
    return sorted(who)[:MOST_HASHES]


def distinct(who: Iterable[int]) -> tuple[int, bool]:
    """How many a union of the `who` of rows stands for, and whether that is exact."""
    kept = smallest(set(who))
    if len(kept) < MOST_HASHES:
        return len(kept), True
    return round((MOST_HASHES - 1) * HASHES / (kept[-1] + 1)), False


HASHES: Final = 1 << 63
"""Hashes are from 0 on, and less."""


def naive(at: datetime) -> datetime:
    """In UTC without saying so, as rows are read."""
    return at.astimezone(UTC).replace(tzinfo=None) if at.tzinfo is not None else at


# The state, and homes ---------------------------------------------------------------------------

STATE: Final = "rollups"
"""The id of the one document."""
HOME_READ: Final = dict.fromkeys(
    (
        "owner_id",
        "task",
        "library",
        "license",
        "principals",
        "stats.size_bytes",
        "stats.stored_bytes",
    ),
    1,
)
"""What is read of a model to tell its home."""


def new_state(now: datetime, *, whole_from: datetime, position: str = "0" * 24) -> Row:
    """Of a database in which nothing was rolled up. `whole_from`: the first day whose events are all
    there; `position`: of the log, what is before it does not count."""
    return {
        "run": 0,
        "through": now,
        "position": position,
        "began": None,
        "whole_from": whole_from,
        "minutes_from": day_of(now) - MINUTES_KEPT,
        "stats_day": day_of(now),
        "moving": None,
        "owner": None,
        "until": None,
        "due": None,
    }


def told_home(model: Row) -> Row:
    """The audience and the dimensions of a model, as it is."""
    principals = model["principals"]
    return {
        "audience": next((each for each in AUDIENCES if each in principals), None),
        "owner": str(model["owner_id"]),
        **{name: model.get(name) or "" for name in ("task", "library", "license")},
    }


def new_home(model: Row) -> Row:
    """Nothing is known of what it stores yet."""
    return {"_id": model["_id"], **told_home(model), "storage_bytes": 0, "stored_bytes": 0}
