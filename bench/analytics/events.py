"""Raw usage events of 90 days: the same for the same arguments, in memory as columns, and in the database."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np
from bson import ObjectId
from numpy.typing import NDArray
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError

from modelharbor.auth.viewer import PUBLIC
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.migrations import create_indexes
from modelharbor.db.usage import EVENT_INDEX, PREFIX, UsageKind

DAYS: Final = 90
CLIENTS: Final = ("browser", "modelharbor", "huggingface_hub", "python", "curl", "modelharbor-ci", "bot", "unknown")  # fmt: skip
FORMATS: Final = ("SAFETENSORS", "GGUF", "JSON", "PYTORCH_PICKLE", "ONNX", "TEXT")
KINDS: Final = (UsageKind.DOWNLOAD.value, UsageKind.VIEW.value, UsageKind.LIKE.value)
DOWNLOAD, VIEW, LIKE = range(3)
SHARES: Final = (0.7, 0.28, 0.02)
PEOPLE: Final = 200_000
LATE: Final = 0.01  # of all events: told after the rest was rolled up
TWICE: Final = 0.01  # of them told again, too
AT_ONCE: Final = 20_000
DUPLICATE: Final = 11_000  # MongoDB's code
EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001  # rows are in UTC without saying so

Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Models:
    """What the models are counted as, each at its place."""

    ids: list[ObjectId]
    dimensions: dict[str, list[str]]
    """By name: the value of each model, as the API shows it."""
    is_public: NDArray[np.bool_]


async def read_models(database: Database) -> Models:
    rows = await database.find("models", {}, sort={"_id": 1})
    return Models(
        [row["_id"] for row in rows],
        {
            name.upper(): [row[name] or "" for row in rows]
            for name in ("task", "library", "license")
        },
        np.array([PUBLIC in row["principals"] for row in rows], dtype=bool),
    )


@dataclass(frozen=True, slots=True)
class Events:
    """Columns, in the order of time."""

    at: Whole  # milliseconds since 1970
    number: Whole
    model: Whole
    kind: NDArray[np.int8]
    client: NDArray[np.int8]
    format: NDArray[np.int8]
    count: NDArray[np.int8]
    size: Whole
    who: Whole
    is_late: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.at)

    def between(self, start: int, end: int) -> "Events":
        """By milliseconds."""
        first, last = np.searchsorted(self.at, [start, end])
        return self._taken(slice(first, last))

    def where(self, wanted: NDArray[np.bool_]) -> "Events":
        return self._taken(wanted)

    def _taken(self, part: Any) -> "Events":
        return Events(*(getattr(self, each.name)[part] for each in fields(self)))


def make_events(count: int, models: Models, until: datetime, seed: int = 1) -> Events:
    """More by day than by night, few models with most of them. `until`: in UTC, without saying so."""
    random = np.random.default_rng(seed)
    end = (until - EPOCH) // timedelta(milliseconds=1)
    begin = end - end % 86_400_000 - (DAYS - 1) * 86_400_000
    at = random.integers(begin, end, count)
    hour = (at // 3_600_000) % 24
    at = np.where(random.random(count) < 0.5, at - (hour // 2) * 3_600_000, at)
    at.sort()
    weights = 1 / (np.arange(len(models.ids)) + 10.0)
    model = random.permutation(len(models.ids))[
        random.choice(len(models.ids), count, p=weights / weights.sum())
    ]
    kind = random.choice(3, count, p=SHARES).astype(np.int8)
    is_part = random.random(count) < 0.2
    taken_back = random.random(count) < 0.2
    clients = 1 / (np.arange(len(CLIENTS)) + 1.0)
    return Events(
        at=at,
        number=np.arange(count),
        model=model,
        kind=kind,
        client=random.choice(len(CLIENTS), count, p=clients / clients.sum()).astype(np.int8),
        format=((model + (random.random(count) < 0.3)) % len(FORMATS)).astype(np.int8),
        count=np.where(
            kind == DOWNLOAD, ~is_part, np.where((kind == LIKE) & taken_back, -1, 1)
        ).astype(np.int8),
        size=random.integers(1, 1 << 31, count),
        who=_hashes(random.integers(0, PEOPLE, count)),
        is_late=random.random(count) < LATE,
    )


def _hashes(people: Whole) -> Whole:
    """63 bits that look like chance (the last step of SplitMix64)."""
    mixed = people.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def documents(events: Events, models: Models) -> Iterator[Row]:
    """As the recorder writes them."""
    columns = (getattr(events, each.name).tolist() for each in fields(events))
    for at, number, model, kind, client, format, count, size, who, _ in zip(*columns, strict=True):
        row: Row = {
            "_id": f"bench:{number}",
            "at": EPOCH + timedelta(milliseconds=at),
            "kind": KINDS[kind],
            "model": models.ids[model],
            "client": CLIENTS[client],
            "count": count,
        }
        if kind == DOWNLOAD:
            row |= {"format": FORMATS[format], "bytes": size, "who": who}
        yield row


async def write_events(database: Database, events: Events, models: Models) -> int:
    """Into the collections of their days, with the marks of what is to be rolled up. Answers how many
    were there already."""
    there = 0
    days = events.at // 86_400_000
    for day in np.unique(days):
        name = f"{PREFIX}{EPOCH + timedelta(days=int(day)):%Y%m%d}"
        collection = database.data[name]
        await collection.create_indexes([EVENT_INDEX])
        rows = list(documents(events.where(days == day), models))
        for start in range(0, len(rows), AT_ONCE):
            try:
                await collection.insert_many(rows[start : start + AT_ONCE], ordered=False)
            except BulkWriteError as error:
                failures = (error.details or {})["writeErrors"]
                if any(each["code"] != DUPLICATE for each in failures):
                    raise
                there += len(failures)
    minutes = np.unique(events.at // 60_000).tolist()
    await _mark(database, [EPOCH + timedelta(minutes=each) for each in minutes])
    return there


async def _mark(database: Database, minutes: Sequence[datetime]) -> None:
    marks = [
        UpdateOne({"minute": minute, "process": "bench"}, {"$inc": {"marks": 1}}, upsert=True)
        for minute in minutes
    ]
    for start in range(0, len(marks), AT_ONCE):
        await database.data["usage_dirty"].bulk_write(marks[start : start + AT_ONCE], ordered=False)


async def forget_usage(database: Database) -> None:
    """All that was recorded, and what it was rolled up to."""
    for name in await database.data.list_collection_names():
        digits = name.removeprefix(PREFIX)
        is_day = digits != name and digits.isdigit()
        if is_day or name.startswith("rollup_") or name == "usage_dirty":
            await database.data.drop_collection(name)
    await create_indexes(database)
