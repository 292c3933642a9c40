"""How models and the API are used, as it is added up: what each run of the rollups has changed.

A run's deltas are read once in a process, whoever follows, and each follower looks up which of their
models it may count. What it adds up of some runs is told together; a cursor says of which.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeAlias

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.conditions import all_of
from modelharbor.db.keyset import Filter
from modelharbor.db.metrics import HOME, MEASURED, Dimension, Metric, Sort
from modelharbor.db.rollups import Cuboid
from modelharbor.errors import Forbidden
from modelharbor.events.changes import ROLLUPS, Change, Topic
from modelharbor.loaders.analytics import group_value
from modelharbor.loaders.base import Reads, Sharing
from modelharbor.loaders.models import with_holders

from .base import Follower, Happening, Place, Source, Summing

DAYS: Final = 1.0  # that deltas are kept
MOST_GROUPS: Final = 100
"""That are told apart of what is told together, the largest; the rest is one more."""
MOST_HELD: Final = 10_000  # groups that are told apart while they are added up
MODELS_AT_ONCE: Final = 10_000  # looked up in one command
TELLABLE: Final = tuple(
    metric for metric, measured in MEASURED.items() if measured.sort in (Sort.ADDITIVE, Sort.LEVEL)
)
"""Metrics whose changes can be added up."""
OF_DELTAS: Final = tuple(each for each in Dimension if each not in HOME)
"""Dimensions that deltas have; the others the model says, as it is when its use is added up."""

Group: TypeAlias = tuple[Any, ...] | None
"""A value for each dimension, None for one that has none; of an owner its id and kind. None: all
others."""
Cell: TypeAlias = tuple[Metric, Group]


@dataclass(slots=True)
class Sums:
    """What was added up."""

    cells: dict[Cell, float]
    at: datetime | None = None  # when the last of it was

    def add(self, other: "Sums", most: int) -> None:
        groups = {group for _, group in self.cells}
        for (name, group), value in other.cells.items():
            if group not in groups and len(groups) >= most:
                group = None
            groups.add(group)
            cell = name, group
            self.cells[cell] = self.cells.get(cell, 0) + value
        if other.at is not None and (self.at is None or other.at > self.at):
            self.at = other.at


class Told(NamedTuple):
    """What an event is of, and the last of these that were told: a cursor's `sequence`, which grows."""

    run: int
    number: int
    """Of the event, from 1; LAST when nothing of these runs is left to tell."""
    runs: int
    """So many, up to `run`, were added up for it."""

    @property
    def sequence(self) -> int:
        return self.run << 32 | self.number << 20 | self.runs

    @classmethod
    def of(cls, sequence: int) -> "Told":
        return cls(sequence >> 32, sequence >> 20 & LAST, sequence & MOST_RUNS)


LAST: Final = 2**12 - 1  # above the number of any event
MOST_RUNS: Final = 2**20 - 1  # more than there are in a day


def through(run: int) -> int:
    """The sequence of one who was told everything up to a run."""
    return Told(run, LAST, 0).sequence


@dataclass(frozen=True, slots=True)
class Analytics(Source):
    """Changes of some metrics, by the values of some dimensions, of models that a filter names (None:
    all) and the viewer may see, or of the API."""

    metrics: tuple[Metric, ...]
    dimensions: tuple[Dimension, ...]
    filter: Filter | None
    interval: int  # seconds between two events of the same, at least

    sharing = Sharing.EQUAL_RIGHTS
    kept_days = DAYS

    @property
    def stream(self) -> str:
        metrics = ",".join(each.value for each in self.metrics)
        dimensions = ",".join(each.value for each in self.dimensions)
        filter = "*" if self.filter is None else self.filter.raw.hex()
        return f"analytics/{metrics}/{dimensions}/{filter}"

    @property
    def topics(self) -> tuple[Topic, ...]:
        return (ROLLUPS,)

    @property
    def query(self) -> None:
        return None

    @property
    def takes_after(self) -> bool:
        return True

    async def check(self, reads: Reads) -> None:
        is_of_api = any(MEASURED[metric].is_of_api for metric in self.metrics)
        if is_of_api and not reads.viewer.operates:
            raise Forbidden("This is for operators, with a token that has the scope OPERATE.")

    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return []

    def follow(self) -> Follower:
        return AnalyticsFollower(self)

    async def added_up(self, reads: Reads, rows: Sequence[Row]) -> Sums:
        """Of deltas, those that are asked for and may be seen."""
        ids = {row["_id"]["model"] for row in rows if "model" in row["_id"]}
        models = await self._models(reads, ids)
        sums = Sums({})
        for row in rows:
            of, model = row["_id"], None
            is_of_api = of["cuboid"] == Cuboid.API_ALL.value
            if not is_of_api:
                model = models.get(of.get("model"))
                if model is None:
                    continue
            group = tuple(_value(each, of, model or {}) for each in self.dimensions)
            for metric in self.metrics:
                measured = MEASURED[metric]
                value = row[measured.field] if measured.is_of_api is is_of_api else 0
                if value:
                    cell = metric, group
                    sums.cells[cell] = sums.cells.get(cell, 0) + value
                    sums.at = row["at"] if sums.at is None else max(sums.at, row["at"])
        return sums

    async def _models(self, reads: Reads, ids: Iterable[ObjectId]) -> dict[ObjectId, Row]:
        """Those that may be seen and are asked for: one command for most."""
        if all(MEASURED[metric].is_of_api for metric in self.metrics):
            return {}
        names = [HOME[each] for each in self.dimensions if each in HOME]
        if Dimension.OWNER in self.dimensions:
            names += ["owner_id", "owner_kind"]
        conditions = [reads.viewer.visible]
        if self.filter is not None:
            conditions.append(await with_holders(reads, self.filter.data))
        wanted = sorted(ids)
        found: dict[ObjectId, Row] = {}
        for first in range(0, len(wanted), MODELS_AT_ONCE):
            some = {"_id": {"$in": wanted[first : first + MODELS_AT_ONCE]}}
            rows = await reads.database.find(
                "models",
                all_of([some, *conditions]),
                projection=dict.fromkeys(["_id", *names], 1),
            )
            found |= {row["_id"]: row for row in rows}
        return found

    def told(self, sums: Sums, since: int, run: int, position: str) -> list[Happening]:
        """What was added up of the runs after one, up to another."""
        cells = {cell: value for cell, value in sums.cells.items() if value}
        values = {
            group: tuple(cells.get((metric, group), 0) for metric in self.metrics)
            for group in dict.fromkeys(group for _, group in cells)
        }
        # The largest are told apart; which they are is the same whenever it is worked out again.
        ranked = sorted(
            (group for group in values if group is not None),
            key=lambda group: (*(-abs(value) for value in values[group]), *map(str, group)),
        )
        apart = set(ranked[:MOST_GROUPS])
        others = dict.fromkeys(self.metrics, 0.0)
        for (metric, group), value in cells.items():
            if group not in apart:
                others[metric] += value
        rows = [
            self._row(metric, group, cells[metric, group], sums)
            for metric in self.metrics
            for group in ranked[:MOST_GROUPS]
            if (metric, group) in cells
        ]
        rows += [self._row(metric, None, value, sums) for metric, value in others.items() if value]
        last = len(rows)
        return [
            Happening(
                position,
                row,
                through(run) if number == last else Told(run, number, run - since).sequence,
            )
            for number, row in enumerate(rows, 1)
        ]

    def _row(self, metric: Metric, group: Group, value: float, sums: Sums) -> Row:
        values = () if group is None else zip(self.dimensions, group, strict=True)
        return {
            "metric": metric.value,
            "group": [_shown(each, found) for each, found in values],
            "is_other": group is None,
            "value": value,
            "at": sums.at,
        }


def _value(dimension: Dimension, of: Row, model: Row) -> Any:
    if dimension is Dimension.OWNER:
        return model["owner_id"], model["owner_kind"]
    if dimension in HOME:
        return model.get(HOME[dimension])
    return of.get(dimension.value.lower())


def _shown(dimension: Dimension, value: Any) -> Row:
    if dimension is not Dimension.OWNER:
        return group_value(dimension, value)
    owner_id, kind = value
    return {**group_value(dimension, owner_id), "type": kind}


async def _state(reads: Reads) -> int:
    """The last run that has ended: its deltas are all there, and those of all before it."""
    rows = await reads.database.find("rollup_state", {}, projection={"run": 1}, limit=1)
    return rows[0]["run"] if rows else 0


async def _deltas(
    reads: Reads, since: int, run: int, metrics: Iterable[Metric], dimensions: Iterable[Dimension]
) -> list[Row]:
    """Of the runs after one, up to another; added up over their minutes, by model and dimensions."""
    names = ("cuboid", "model", *(each.value.lower() for each in dimensions if each in OF_DELTAS))
    by = {name: f"${name}" for name in names}
    sums: Row = {
        name: {"$sum": f"${name}"} for name in (MEASURED[metric].field for metric in metrics)
    }
    return await reads.database.aggregate(
        "rollup_deltas",
        [
            {"$match": {"run": {"$gt": since, "$lte": run}}},
            {"$group": {"_id": by, "at": {"$max": "$written_at"}, **sums}},
        ],
    )


async def _news(reads: Reads, since: int, change: Change) -> list[Row]:
    """The deltas that a change tells of: read by whoever comes first, for all who were called for it
    and know what was before."""
    shared: dict[Any, Any] = change.row
    async with shared.setdefault("reading", asyncio.Lock()):
        if since not in shared:
            shared[since] = await _deltas(reads, since, shared["run"], TELLABLE, OF_DELTAS)
        found: list[Row] = shared[since]
    return found


class AnalyticsFollower(Summing):
    """Adds up run after run, as each comes, and tells what it has every `interval` seconds."""

    def __init__(self, source: Analytics) -> None:
        self.source = source
        self.sums = Sums({})
        self.run = 0  # the last that is added up
        self.position = ""  # where it is in the log
        self.told_at = -float(source.interval)

    async def begin(self, reads: Reads, position: str) -> None:
        self.run, self.position = await _state(reads), position
        self.place = Place(position, through(self.run))

    async def newest(self, reads: Reads) -> int:
        return through(await _state(reads))

    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        sums, run, position = Sums({}), self.run, self.position
        for change in changes:
            if change.row["run"] > run:
                rows = await _news(reads, run, change)
                sums.add(await self.source.added_up(reads, rows), MOST_HELD)
                run, position = change.row["run"], change.position
        # From here on nothing waits or fails, so each run is added up once.
        self.run, self.position = run, position
        self.sums.add(sums, MOST_HELD)
        now = asyncio.get_running_loop().time()
        if self.sums.cells:
            self.due = self.due if self.due is not None else self.told_at + self.source.interval
            if now < self.due:
                return []
        return self._told(now)

    def _told(self, now: float) -> list[Happening]:
        since = Told.of(self.place.sequence).run
        found = self.source.told(self.sums, since, self.run, self.position)
        self.sums, self.due = Sums({}), None
        if found:
            self.told_at = now
        if self.run > since:
            self.place = Place(self.position, through(self.run))
        return found

    def hurry(self) -> None:
        if self.due is not None:
            self.due = 0.0

    async def missed(self, reads: Reads, since: Place, until: Place) -> list[Happening]:
        told, last = Told.of(since.sequence), Told.of(until.sequence).run
        found: list[Happening] = []
        if told.number < LAST:
            found = await self._between(reads, told.run - told.runs, told.run, since.position)
            found = [each for each in found if each.sequence > since.sequence]
        if told.run < last:
            found += await self._between(reads, told.run, last, until.position)
        return found

    async def _between(self, reads: Reads, since: int, run: int, position: str) -> list[Happening]:
        source = self.source
        rows = await _deltas(reads, since, run, source.metrics, source.dimensions)
        return source.told(await source.added_up(reads, rows), since, run, position)
