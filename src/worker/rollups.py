"""Adds up usage events: what is dirty is made anew from what is below it, and replaced where it differs.

Minutes are made of events, quarters of an hour of minutes, days of quarters. Minutes of before
`minutes_from` have no rows: their quarters are made of events. Events of before `whole_from` are gone,
or going: what is told of such a day comes too late.

One run at a time; whoever calls holds the lease (rolling_up.py). A run may end anywhere: a row says which
run changed it last, so the next one, which has the same number, finds what was changed and not yet
carried into longer buckets. A minute stays dirty until its day is done.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bson import ObjectId
from bson.codec_options import CodecOptions
from pymongo import DeleteOne, ReplaceOne, timeout
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.rollups import (
    ADDITIVE,
    DIMENSIONS,
    HOME_READ,
    OF_API,
    OF_AUDIENCES,
    OF_MODELS,
    SECONDS,
    STATE,
    Cuboid,
    Grain,
    Groups,
    Key,
    Together,
    add_to,
    bucket_query,
    bucket_starts,
    coarser,
    gather,
    key_of,
    naive,
    new_home,
    new_state,
    of_audiences,
    row_id,
    row_with,
    sums_of,
    values_of,
)
from modelharbor.db.usage import collection_of, day_of, day_of_collection, minute_of, quarter_of
from modelharbor.observability.logging import log_event
from modelharbor.settings import Settings

log = logging.getLogger(__name__)
EVENTS_AT_ONCE: Final = 5000
EVENTS_IN_PART: Final = 20_000  # of a whole day, in memory
ROWS_AT_ONCE: Final = 5000
"""Written in one transaction: to wait for its commit takes as long as to write some thousands."""
HASHES_OF_ROW: Final = 16  # that weigh as much as another row
MODELS_AT_ONCE: Final = 300  # whose rows of a day are in memory together
GROUPS_AT_ONCE: Final = 120_000  # of a day, in memory
IDS_AT_ONCE: Final = 5000  # looked up by one command
DROPPED_AT_ONCE: Final = 10_000
HOMES_KEPT: Final = 100_000  # in memory, in a run
WRITE_SECONDS: Final = 30.0
READ_MS: Final = 60_000  # of a cursor, over all its batches
DAY: Final = timedelta(days=1)
LOWER: Final = {Grain.QUARTER: Grain.MINUTE, Grain.DAY: Grain.QUARTER}
BASE: Final = (Cuboid.MODEL.value, Cuboid.MODEL_ALL.value, *OF_AUDIENCES, *OF_API)
"""Cuboids with rows by minute and quarter."""
FINEST_OF_MODEL: Final = Cuboid.MODEL_ALL.value
FINEST: Final = (FINEST_OF_MODEL, Cuboid.API_ALL.value)


async def ensure_state(database: Database, settings: Settings, now: datetime) -> Row:
    """How far the rollups are; made where there is nothing."""
    found = await database.find("rollup_state", {"_id": STATE}, limit=1)
    if found:
        return found[0]
    today = day_of(now)
    fresh = new_state(now, whole_from=today - timedelta(days=settings.usage_days))
    await database.data["rollup_state"].update_one(
        {"_id": STATE}, {"$setOnInsert": fresh}, upsert=True
    )
    return (await database.find("rollup_state", {"_id": STATE}, limit=1))[0]


@dataclass(slots=True)
class Changes:
    """Of rows of one grain."""

    grain: Grain
    new: list[Row] = field(default_factory=list)
    changed: list[Row] = field(default_factory=list)
    gone: list[Row] = field(default_factory=list)
    """Ids."""
    deltas: list[Row] = field(default_factory=list)
    keys: set[Key] = field(default_factory=set)
    """Groups of these rows, and of those that this run changed before it was interrupted."""


class Adding:
    """One run's adding up. All times are UTC without saying so."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        state: Row,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called often, and may raise."""
        self.database, self.settings = database, settings
        self.plain: AsyncDatabase[Row] = database.data.with_options(
            codec_options=CodecOptions(tz_aware=False)
        )
        self.run: int = state["run"] + 1
        self.whole_from: datetime = naive(state["whole_from"])
        self.minutes_from: datetime = naive(state["minutes_from"])
        self.check = check
        self.models: set[ObjectId] = set()
        """Whose days were made anew since this was last emptied."""
        self.rows = 0
        """Written."""
        self._homes: dict[ObjectId, Row | None] = {}
        self._left: list[tuple[Grain, Row]] = []
        """Ids of rows without values, which go when what is made of them was."""
        self._writing: asyncio.Task[None] | None = None

    # ---- a day

    async def add_up(
        self, day: datetime, minutes: Iterable[datetime], *, is_whole: bool = False
    ) -> None:
        """Make these minutes of a day anew, or all of it, and all that is made of them. The last of it
        may be written still, while the next day is read and made: it is there after `finish`."""
        quarters: dict[datetime, list[datetime]] = {}
        for minute in sorted(minutes):
            quarters.setdefault(quarter_of(minute), []).append(minute)
        is_fine = day >= self.minutes_from
        if is_whole:
            touched = await self._whole_day(day, is_fine=is_fine)
        else:
            touched = await self._quarters(quarters, is_fine=is_fine)
            await self._sum_up(Grain.DAY, day, touched)
        self.models.update(key[1] for key in touched if key[0] in OF_MODELS)
        if len(self._left) > ROWS_AT_ONCE:
            await self.finish()

    async def finish(self) -> None:
        """Nothing is to be written any more, and rows without values are gone."""
        await self._written()
        await self._drop_left()

    async def stop(self) -> None:
        """Whatever is being written then ends: when something has failed."""
        task, self._writing = self._writing, None
        if task is not None:
            await ended(task)

    async def _quarters(
        self, quarters: Mapping[datetime, Sequence[datetime]], *, is_fine: bool
    ) -> set[Key]:
        """Quarters with the minutes of theirs that are dirty; answers the groups that have changed."""
        touched: set[Key] = set()
        for quarter, minutes in quarters.items():
            self.check()
            if is_fine:
                end = minutes[-1] + timedelta(minutes=1)
                found = await self._gathered(Grain.MINUTE, minutes, end)
                keys = await self._replace_all(Grain.MINUTE, found)
                await self._sum_up(Grain.QUARTER, quarter, keys)
            else:
                end = quarter + timedelta(minutes=15)
                found = await self._gathered(Grain.QUARTER, [quarter], end)
                keys = await self._replace_all(Grain.QUARTER, found)
            touched |= keys
        return touched

    async def _whole_day(self, day: datetime, *, is_fine: bool) -> set[Key]:
        """All of it, in parts with some thousands of events; answers all groups. What was written a moment
        before is not read for it, unless it is too much to be in memory."""
        collection = self.plain[collection_of(aware(day))]
        count = await collection.estimated_document_count(maxTimeMS=self.database.query_timeout_ms)
        seconds = SECONDS[Grain.QUARTER]
        parts = min(SECONDS[Grain.DAY] // seconds, 1 + count // EVENTS_IN_PART)
        starts = list(bucket_starts(Grain.QUARTER, day, day + DAY))
        size = -(-len(starts) // parts)
        touched: set[Key] = set()
        together: Together | None = Together()
        for first in range(0, len(starts), size):
            self.check()
            some = starts[first : first + size]
            end = some[-1] + timedelta(seconds=seconds)
            if is_fine:
                minutes = await self._gathered(
                    Grain.MINUTE, list(bucket_starts(Grain.MINUTE, some[0], end)), end
                )
                touched |= await self._replace_all(Grain.MINUTE, minutes, every=True)
                quarters = {each: Together() for each in some}
                for minute, fine in minutes.items():
                    quarters[quarter_of(minute)].add_all(fine)
                found = {at: quarter.groups for at, quarter in quarters.items()}
            else:
                found = await self._gathered(Grain.QUARTER, some, end)
            touched |= await self._replace_all(Grain.QUARTER, found, every=True)
            if together is None:
                continue
            for fine in found.values():
                together.add_all(fine)
            if len(together.groups) > GROUPS_AT_ONCE:
                together = None
        if together is None:
            await self._sum_up(Grain.DAY, day, touched)
            return touched
        return touched | await self._replace_all(Grain.DAY, {day: together.groups}, every=True)

    async def _gathered(
        self, grain: Grain, buckets: Sequence[datetime], end: datetime
    ) -> dict[datetime, Groups]:
        """The finest groups of these buckets, in order, of which the last one is over at `end`."""
        found: dict[datetime, Groups] = {each: {} for each in buckets}
        if len(buckets) == 1:
            async for events in self._events(buckets[0], end):
                self._gather(found[buckets[0]], events)
            return found
        bucket_of = minute_of if grain is Grain.MINUTE else quarter_of
        async for events in self._events(buckets[0], end):
            some: dict[datetime, list[Row]] = {}
            for event in events:
                some.setdefault(bucket_of(event["at"]), []).append(event)
            for bucket, those in some.items():
                if bucket in found:
                    self._gather(found[bucket], those)
        return found

    def _gather(self, found: Groups, events: Sequence[Row]) -> None:
        unreadable = gather(found, events)
        if unreadable:
            at = events[0]["at"]
            log_event(log, logging.WARNING, "rollups.unreadable", at=at, events=unreadable)

    async def _events(self, start: datetime, end: datetime) -> AsyncIterator[list[Row]]:
        """Of one day."""
        cursor = (
            self.plain[collection_of(aware(start))]
            .find({"at": {"$gte": start, "$lt": end}})
            .batch_size(EVENTS_AT_ONCE)
            .max_time_ms(READ_MS)
        )
        async with cursor:
            while events := await cursor.to_list(EVENTS_AT_ONCE):
                self.check()
                yield events

    # ---- what is made of events

    async def _replace_all(
        self, grain: Grain, buckets: dict[datetime, Groups], *, every: bool = False
    ) -> set[Key]:
        """All rows of buckets, in order, from their finest groups; the groups that have changed, or
        `every` one."""
        models = {key[1] for fine in buckets.values() for key in fine if key[0] == FINEST_OF_MODEL}
        homes = await self.homes(models)
        # Of a model that was purged no rows come back, whatever is still told or kept of it.
        gone = {model for model in models if homes[model] is None}
        if gone:
            for fine in buckets.values():
                for key in [key for key in fine if key[0] == FINEST_OF_MODEL and key[1] in gone]:
                    del fine[key]
        start, last = next(iter(buckets)), next(reversed(buckets))
        end = last + timedelta(seconds=SECONDS[grain])
        cuboids = BASE if grain is not Grain.DAY else tuple(DIMENSIONS)
        old: dict[datetime, list[Row]] = {}
        for row in await self._rows(grain, bucket_query(cuboids, start, end)):
            old.setdefault(row["at"], []).append(row)
        changes = Changes(grain)

        def make() -> None:
            for at, fine in buckets.items():
                groups = {**fine, **coarser(fine, grain)}
                groups |= of_audiences(groups, homes)
                self._compare(changes, at, groups, old.get(at, []), is_base=True)
                if every:
                    changes.keys.update(groups)
            changes.new.sort(key=_place)

        # A day takes seconds: leases and jobs of this process are to go on meanwhile.
        await asyncio.to_thread(make)
        # While it is written, what comes next is read and made.
        await self._written()
        self._writing = asyncio.create_task(self._write(changes))
        return changes.keys

    async def _written(self) -> None:
        task, self._writing = self._writing, None
        if task is not None:
            try:
                await task
            except asyncio.CancelledError:
                await ended(task)
                raise

    # ---- what is made of rows

    async def _sum_up(self, grain: Grain, at: datetime, touched: Iterable[Key]) -> None:
        """The rows of these groups, and of all that are of the same models, from rows below."""
        await self._written()
        models: set[ObjectId] = set()
        others: list[Key] = []
        for key in touched:
            if key[0] in OF_MODELS:
                models.add(key[1])
            else:
                others.append(key)
        ordered = sorted(models)
        for start in range(0, len(ordered), MODELS_AT_ONCE):
            self.check()
            await self._sum_models(grain, at, ordered[start : start + MODELS_AT_ONCE])
        if others:
            await self._sum_others(grain, at, others)

    async def _sum_models(self, grain: Grain, at: datetime, models: Sequence[ObjectId]) -> None:
        end = at + timedelta(seconds=SECONDS[grain])
        mine: Row = {"model": {"$in": models}}
        groups: Groups = {}
        between = {"cuboid": Cuboid.MODEL_ALL.value, **mine, "at": {"$gte": at, "$lt": end}}
        for row in await self._rows(LOWER[grain], between):
            add_to(groups, key_of(row), sums_of(row))
        groups |= coarser(groups, grain)
        old = await self._rows(grain, {"cuboid": {"$in": OF_MODELS}, **mine, "at": at})
        changes = Changes(grain)
        self._compare(changes, at, groups, old)
        await self._write(changes)

    async def _sum_others(self, grain: Grain, at: datetime, keys: Sequence[Key]) -> None:
        """Of audiences and the API: a few groups that are in most buckets, so by their ids."""
        end = at + timedelta(seconds=SECONDS[grain])
        lower = list(bucket_starts(LOWER[grain], at, end))
        groups: Groups = {}
        for row in await self._by_id(LOWER[grain], keys, lower):
            add_to(groups, key_of(row), sums_of(row))
        old = await self._by_id(grain, keys, [at])
        changes = Changes(grain)
        self._compare(changes, at, groups, old)
        await self._write(changes)

    async def _by_id(
        self, grain: Grain, keys: Sequence[Key], buckets: Sequence[datetime]
    ) -> list[Row]:
        ids = [row_id(key, at) for key in keys for at in buckets]
        found: list[Row] = []
        for start in range(0, len(ids), IDS_AT_ONCE):
            self.check()
            some = ids[start : start + IDS_AT_ONCE]
            found += await self._rows(grain, {"_id": {"$in": some}})
        return found

    # ---- what models are counted as

    async def homes(self, models: Iterable[ObjectId]) -> Mapping[ObjectId, Row | None]:
        """By model; None: there is no such model. A model that has none gets one."""
        wanted = [each for each in models if each not in self._homes]
        if len(self._homes) + len(wanted) > HOMES_KEPT:
            self._homes.clear()
            wanted = list(models)
        for start in range(0, len(wanted), IDS_AT_ONCE):
            some = wanted[start : start + IDS_AT_ONCE]
            rows = await self.database.find("rollup_homes", {"_id": {"$in": some}})
            self._homes.update({row["_id"]: row for row in rows})
            missing = [each for each in some if each not in self._homes]
            if missing:
                self._homes.update(dict.fromkeys(missing))
                self._homes.update({row["_id"]: row for row in await self._settle_in(missing)})
        return self._homes

    async def _settle_in(self, models: Sequence[ObjectId]) -> list[Row]:
        rows = await self.database.find("models", {"_id": {"$in": models}}, projection=HOME_READ)
        homes = [new_home(row) for row in rows]
        if homes:
            await self._written()  # one transaction after the other: the lease is in each
            await self.database.transaction(
                lambda session: self.database.data["rollup_homes"].insert_many(
                    homes, ordered=False, session=session
                )
            )
        return homes

    def forget_homes(self) -> None:
        self._homes.clear()

    async def move(self, grain: Grain, at: datetime) -> None:
        """Make the rows of audiences of a bucket anew from those of the models in it."""
        end = at + timedelta(seconds=SECONDS[grain])
        finer = (
            (Cuboid.MODEL_FORMAT.value, Cuboid.MODEL_CLIENT.value)
            if grain is Grain.DAY
            else (Cuboid.MODEL_ALL.value,)
        )
        groups: Groups = {}
        for row in await self._rows(grain, bucket_query((Cuboid.MODEL.value, *finer), at, end)):
            groups[key_of(row)] = sums_of(row)
        models = {key[1] for key in groups}
        made = of_audiences(groups, await self.homes(models))
        old = await self._rows(grain, bucket_query(OF_AUDIENCES, at, end))
        changes = Changes(grain)
        self._compare(changes, at, made, old)
        await self._write(changes)

    # ---- rows

    async def aggregate(self, grain: Grain, pipeline: list[Row]) -> list[Row]:
        """That may take longer than questions of clients do."""
        with timeout(READ_MS / 1000):
            return await (await self.plain[grain.value].aggregate(pipeline)).to_list()

    async def _rows(self, grain: Grain, query: Row) -> list[Row]:
        cursor = self.plain[grain.value].find(query).batch_size(10_000).max_time_ms(READ_MS)
        return await cursor.to_list()

    def _compare(
        self,
        changes: Changes,
        at: datetime,
        groups: Groups,
        old: Sequence[Row],
        *,
        is_base: bool = False,
    ) -> None:
        """`is_base`: longer buckets are made of what has changed here."""
        before = {key_of(row): row for row in old}
        shared: dict[int, Row] = {}  # many groups are of the same sums
        for key, sums in groups.items():
            values = shared.get(id(sums))
            if values is None:
                values = shared[id(sums)] = values_of(sums)
            if not values:
                continue
            row = row_with(key, at, values, self.run)
            was = before.pop(key, None) if before else None
            if was is None:
                changes.new.append(row)
            elif _differ(was, row):
                changes.changed.append(row)
            else:
                if was["run"] == self.run:
                    changes.keys.add(key)
                continue
            changes.keys.add(key)
            if changes.grain is Grain.MINUTE and key[0] in FINEST:
                self._note(changes, was, row)
        for key, was in before.items():
            if not is_base:
                changes.gone.append(was["_id"])
                continue
            # It stays until what is made of it was made anew.
            changes.keys.add(key)
            self._left.append((changes.grain, was["_id"]))
            row = {"_id": was["_id"], **was["_id"], "run": self.run}
            if _differ(was, row):
                changes.changed.append(row)
                if changes.grain is Grain.MINUTE and key[0] in FINEST:
                    self._note(changes, was, row)

    def _note(self, changes: Changes, was: Row | None, row: Row) -> None:
        old = was or {}
        by: Row = {
            name: change
            for name in ADDITIVE
            if (name in row or name in old) and (change := row.get(name, 0) - old.get(name, 0))
        }
        if by:
            changes.deltas.append(
                {"_id": ObjectId(), "run": self.run, "written_at": utc_now(), **row["_id"], **by}
            )

    async def _write(self, changes: Changes) -> None:
        """In few transactions: each row with its delta."""
        rows = self.database.data[changes.grain.value]
        told = {_frozen(delta): delta for delta in changes.deltas}
        for part in parts_of(changes):
            self.check()
            ids = [row["_id"] for row in (*part.new, *part.changed)] if told else []
            deltas = [told[key] for each in ids if (key := _frozen(each)) in told]
            others: list[Any] = [
                *(ReplaceOne({"_id": row["_id"]}, row) for row in part.changed),
                *(DeleteOne({"_id": each}) for each in part.gone),
            ]

            async def write(
                session: AsyncClientSession,
                new: list[Row] = part.new,
                others: list[Any] = others,
                deltas: list[Row] = deltas,
            ) -> None:
                if new:
                    await rows.insert_many(new, ordered=False, session=session)
                if others:
                    await rows.bulk_write(others, ordered=False, session=session)
                if deltas:
                    await self.database.data["rollup_deltas"].insert_many(
                        deltas, ordered=False, session=session
                    )

            await self.database.transaction(write, WRITE_SECONDS)
            self.rows += len(part.new) + len(others)

    async def _drop_left(self) -> None:
        for start in range(0, len(self._left), ROWS_AT_ONCE):
            some = self._left[start : start + ROWS_AT_ONCE]

            async def write(
                session: AsyncClientSession, some: Sequence[tuple[Grain, Row]] = some
            ) -> None:
                for grain in Grain:
                    ids = [id for each, id in some if each is grain]
                    if ids:
                        await self.database.data[grain.value].delete_many(
                            {"_id": {"$in": ids}}, session=session
                        )

            await self.database.transaction(write, WRITE_SECONDS)
        self._left.clear()

    # ---- what is kept no longer

    async def drop(self) -> None:
        """Rows by minute and events of before the bounds, which the state has by now."""
        for name in await self.database.data.list_collection_names():
            day = day_of_collection(name)
            if day is not None and naive(day) < self.whole_from:
                await self.database.data.drop_collection(name)
                log_event(log, logging.INFO, "rollups.dropped", collection=name)
        for cuboid in BASE:
            await self._drop_minutes(cuboid)

    async def _drop_minutes(self, cuboid: str) -> None:
        old = {
            "_id": {"$gte": {"cuboid": cuboid}, "$lt": {"cuboid": cuboid, "at": self.minutes_from}}
        }
        minutes = self.database.data["rollup_minutes"]
        while True:
            self.check()
            found = await self.database.find(
                "rollup_minutes",
                old,
                projection={"_id": 1},
                sort={"_id": 1},
                limit=DROPPED_AT_ONCE,
            )
            if not found:
                return
            await minutes.delete_many({"_id": {"$gte": found[0]["_id"], "$lte": found[-1]["_id"]}})


def aware(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC)


def _differ(old: Row, new: Row) -> bool:
    if len(old) != len(new):
        return True
    return any(name != "run" and old.get(name) != value for name, value in new.items())


def parts_of(changes: Changes) -> Iterator[Changes]:
    """In their order, as many as are written in one transaction each."""
    part, weight = Changes(changes.grain), 0
    for rows, name in ((changes.new, "new"), (changes.changed, "changed"), (changes.gone, "gone")):
        for row in rows:
            getattr(part, name).append(row)
            weight += 1 + len(row.get("who", ())) // HASHES_OF_ROW
            if weight >= ROWS_AT_ONCE:
                yield part
                part, weight = Changes(changes.grain), 0
    if weight:
        yield part


def _place(row: Row) -> tuple[str, bytes, datetime]:
    """In the index by model, which has grown for years: what stands together there is written at once."""
    model = row.get("model")
    return row["cuboid"], model.binary if model is not None else b"", row["at"]


def _frozen(row: Row) -> tuple[Any, ...]:
    """Of a row's id, or of a delta."""
    return (row["at"], *key_of(row))
