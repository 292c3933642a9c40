"""Rolls up all the time: one worker process at a time, by a lease in `rollup_state`.

No job, for it never ends and takes no worker's place from one that does: whoever is the first to find
that a run is due does it. Jobs (handlers/rollup_analytics.py) take the same lease.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, replace
from datetime import datetime
from time import monotonic
from typing import Final

import pymongo
from bson import ObjectId
from pymongo import DeleteMany, ReturnDocument, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from modelharbor.cache.client import Cache
from modelharbor.cache.freshness import announce
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.rollups import MINUTES_KEPT, STATE, Cuboid, Grain, naive
from modelharbor.db.usage import WHOLE_DAY, day_of, quarter_of
from modelharbor.errors import HarborError, Unavailable
from modelharbor.observability.commands import WriteCount, counted
from modelharbor.observability.logging import log_event
from modelharbor.observability.sentry import capture
from modelharbor.settings import Settings

from .claims import IdleTransactions
from .model_stats import leaving, refresh, unsettle
from .rollups import DAY, IDS_AT_ONCE, Adding, aware, ensure_state
from .usage_intake import Intake

log = logging.getLogger(__name__)
LEASE_MS: Final = 10_000
RENEW_SECONDS: Final = 3.0
TRY_SECONDS: Final = 0.1
TAKE_SECONDS: Final = 2.0
BLOCKED_SECONDS: Final = 1.0
MARKS_AT_ONCE: Final = 20_000  # minutes that are dirty
MOST_QUARTERS: Final = 32
"""Of a day that are dirty: of more all of it is made anew, for it is written at once then."""
RUN_SECONDS: Final = 30.0
"""After so long it ends, once the day is done: another one does the rest, and what is told of one is
not without bounds. Only at the end stats of models are written and their minutes clean; who dies before
does as much again."""
MOVED_AT_ONCE: Final = 100  # models
MOVING_SECONDS: Final = 3.0  # in one run: events do not wait for longer
UNTIL: Final[Row] = {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": LEASE_MS}}
FINEST: Final = Cuboid.MODEL_ALL.value
TAKEN_OVER: Final = "Another process adds usage up by now."
BOTTOM_UP: Final = (Grain.MINUTE, Grain.QUARTER, Grain.DAY)


@dataclass(slots=True)
class Ran:
    """What a run did."""

    minutes: int = 0
    rows: int = 0
    models: int = 0  # whose stats changed
    is_moving: bool = False  # there is more to do at once


# A run ------------------------------------------------------------------------------------------


async def roll_up(
    database: Database,
    settings: Settings,
    *,
    now: datetime | None = None,
    check: Callable[[], None] = lambda: None,
) -> Ran:
    """Take in what is new, and make anew what is dirty. `now`: by default it is; `check` is called
    often, and may raise."""
    moment = naive(now or utc_now())
    state = await ensure_state(database, settings, aware(moment))
    return await _Run(database, settings, state, moment, check).all()


class _Run:
    def __init__(
        self,
        database: Database,
        settings: Settings,
        state: Row,
        now: datetime,
        check: Callable[[], None],
    ) -> None:
        self._database, self._settings, self._state = database, settings, state
        self._now, self._today = now, naive(day_of(aware(now)))
        self._adding = Adding(database, settings, state, check)
        self._intake = Intake(self._adding, now)
        self._ran = Ran()
        self._after: Row = {"through": now}
        """What the state is to say."""
        self._models: set[ObjectId] = set()
        """Whose stats are to be written."""
        self._done: list[Row] = []
        """Marks of days that were made anew, of which the stats are not written yet."""
        self._until = monotonic() + RUN_SECONDS
        self._is_late = False

    async def all(self) -> Ran:
        try:
            return await self._all()
        finally:
            await self._adding.stop()

    async def _all(self) -> Ran:
        self._after["position"] = await self._intake.take_in(self._state["position"])
        began: datetime | None = None
        is_more = True
        while is_more and not self._is_late:
            marks = await self._database.find(
                "usage_dirty", {}, sort={"minute": 1}, limit=MARKS_AT_ONCE
            )
            days: dict[datetime, list[Row]] = {}
            for mark in marks:
                days.setdefault(naive(day_of(aware(mark["minute"]))), []).append(mark)
            is_more = len(marks) == MARKS_AT_ONCE
            if is_more and len(days) > 1:
                days.popitem()  # there may be more of it: it comes with that
            for day, some in days.items():
                await self._day(day, some)
                began = day if began is None else min(began, day)
                self._is_late = monotonic() > self._until
                if self._is_late:
                    break
            await self._settle()
        await self._turn_of_the_day()
        await self._move()
        await self._end(began)
        return self._ran

    async def _day(self, day: datetime, marks: list[Row]) -> None:
        adding = self._adding
        self._done += marks
        if day < adding.whole_from:
            log_event(log, logging.WARNING, "rollups.too_late", day=day, minutes=len(marks))
            return
        minutes = {mark["minute"] for mark in marks}
        is_whole = any(mark["process"] == WHOLE_DAY for mark in marks)
        is_much = len({quarter_of(minute) for minute in minutes}) > MOST_QUARTERS
        await adding.add_up(day, minutes, is_whole=is_whole or is_much)
        self._models |= adding.models
        adding.models.clear()
        self._ran.minutes += len(marks)

    async def _settle(self) -> None:
        """What follows from the days that were made anew; then they are clean."""
        if not self._done:
            return
        await self._adding.finish()
        first = naive(day_of(aware(self._done[0]["minute"])))
        models = sorted(self._models)
        if first < self._today - DAY:
            await unsettle(self._database, models, first)
        self._ran.models += await refresh(self._adding, models, self._today)
        # Whoever has added events meanwhile has raised `marks`; most minutes have as many as others.
        by_marks: dict[int, list[ObjectId]] = {}
        for mark in self._done:
            by_marks.setdefault(mark["marks"], []).append(mark["_id"])
        await self._database.data["usage_dirty"].bulk_write(
            [
                DeleteMany({"_id": {"$in": ids[start : start + IDS_AT_ONCE]}, "marks": marks})
                for marks, ids in by_marks.items()
                for start in range(0, len(ids), IDS_AT_ONCE)
            ],
            ordered=False,
        )
        self._models, self._done = set(), []

    async def _turn_of_the_day(self) -> None:
        """Windows of days end with today; what is older than is kept goes."""
        last = naive(self._state["stats_day"])
        if last >= self._today:
            return
        models = await leaving(self._adding, last, self._today)
        self._ran.models += await refresh(self._adding, models, self._today)
        adding = self._adding
        adding.whole_from = max(adding.whole_from, self._today - self._settings.usage_days * DAY)
        adding.minutes_from = max(adding.minutes_from, self._today - MINUTES_KEPT)
        # First it is said that they are gone: nobody makes anything of what is left.
        bounds = {
            "whole_from": adding.whole_from,
            "minutes_from": adding.minutes_from,
            "stats_day": self._today,
        }
        await self._database.data["rollup_state"].update_one({"_id": STATE}, {"$set": bounds})
        await adding.drop()

    async def _end(self, began: datetime | None) -> None:
        if self._is_late:
            del self._after["through"]
            self._ran.is_moving = True
        if self._ran.minutes or self._adding.rows:
            self._after["run"] = self._adding.run
        update: Row = {"$set": self._after}
        if began is not None:
            known = self._state.get("began")
            self._after["began"] = began if known is None else min(naive(known), began)
        # Somebody else has taken over who has ended this run since, where it is not as it was.
        mine = {"_id": STATE, "run": self._state["run"]}
        done = await self._database.data["rollup_state"].update_one(mine, update)
        if done.matched_count == 0:
            raise Unavailable(TAKEN_OVER)
        self._ran.rows = self._adding.rows

    # ---- models that are counted as something else by now

    async def _move(self) -> None:
        """Make rows of audiences anew wherever such a model has rows: from the bottom up, so that what
        is added up meanwhile from a bucket that was not made anew yet is made anew later itself."""
        homes = self._database.data["rollup_homes"]
        moving: Row | None = self._state.get("moving")
        if moving is None:
            found = await self._database.find(
                "rollup_homes",
                {"moving": {"$gt": 0}},
                projection={"moving": 1},
                sort={"moving": 1, "_id": 1},
                limit=MOVED_AT_ONCE,
            )
            if not found:
                return
            counts = [[row["_id"], row["moving"]] for row in found]
            moving = {
                "models": counts,
                "days": await self._days([model for model, _ in counts]),
                "grain": BOTTOM_UP[0].value,
                "after": None,
            }
        until = monotonic() + MOVING_SECONDS
        models: list[ObjectId] = [model for model, _ in moving["models"]]
        days = [naive(day) for day in moving["days"]]
        for grain in BOTTOM_UP[BOTTOM_UP.index(Grain(moving["grain"])) :]:
            after = moving["after"] if grain.value == moving["grain"] else None
            for day in days:
                if after is not None and day <= naive(after):
                    continue
                if grain is Grain.MINUTE and day < self._adding.minutes_from:
                    continue
                for bucket in await self._buckets(grain, models, day):
                    await self._adding.move(grain, bucket)
                moving = {**moving, "grain": grain.value, "after": day}
                if monotonic() > until:
                    self._after["moving"], self._ran.is_moving = moving, True
                    return
        await homes.bulk_write(
            [
                UpdateOne({"_id": model, "moving": count}, {"$unset": {"moving": 1}})
                for model, count in moving["models"]
            ],
            ordered=False,
        )
        self._after["moving"] = None
        self._ran.is_moving = len(models) == MOVED_AT_ONCE

    async def _days(self, models: list[ObjectId]) -> list[datetime]:
        """On which these models have rows: by quarter and minute too, for changes may come to nothing
        in a day."""
        found: set[datetime] = set()
        for grain in BOTTOM_UP:
            rows = await self._adding.aggregate(
                grain,
                [
                    {"$match": {"cuboid": FINEST, "model": {"$in": models}}},
                    {"$group": {"_id": {"$dateTrunc": {"date": "$at", "unit": "day"}}}},
                ],
            )
            found.update(row["_id"] for row in rows)
        return sorted(found)

    async def _buckets(self, grain: Grain, models: list[ObjectId], day: datetime) -> list[datetime]:
        """Of a day, in which these models have rows, of this grain or by minute: what there was in one
        minute and came to nothing in the next may still be counted where it is to go from."""
        if grain is Grain.DAY:
            return [day]
        found: set[datetime] = set()
        between = {"$gte": day, "$lt": day + DAY}
        for each in {Grain.MINUTE, grain}:
            rows = await self._adding.aggregate(
                each,
                [
                    {"$match": {"cuboid": FINEST, "model": {"$in": models}, "at": between}},
                    {"$group": {"_id": "$at"}},
                ],
            )
            found.update(row["_id"] for row in rows)
        return sorted(found if grain is Grain.MINUTE else {quarter_of(at) for at in found})


# One at a time ----------------------------------------------------------------------------------


class Lease:
    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._state = database.data["rollup_state"]
        self._me = secrets.token_hex(8)
        self.is_blocked = False
        """The row could not be written when it was last tried: a transaction holds it."""

    async def take(self, *, due: bool) -> bool:
        """Whether it is ours now. `due`: only if a run is."""
        free: Row = {"$or": [{"owner": None}, {"$expr": {"$lt": ["$until", "$$NOW"]}}]}
        query: Row = {"_id": STATE, **free}
        if due:
            # No time at all is before any time.
            query = {"$and": [query, {"$expr": {"$lte": ["$due", "$$NOW"]}}]}
        try:
            with pymongo.timeout(TAKE_SECONDS):
                row = await self._state.find_one_and_update(
                    query,
                    [{"$set": {"owner": self._me, "until": UNTIL}}],
                    projection={"_id": 1},
                    return_document=ReturnDocument.AFTER,
                )
        except PyMongoError as error:
            if not error.timeout:
                raise
            self.is_blocked = True
            return False
        self.is_blocked = False
        return row is not None

    @asynccontextmanager
    async def holding(self) -> AsyncIterator[Database]:
        """While it is ours: the database, whose transactions end where it is not any more."""
        renewing = asyncio.create_task(self._renew())
        try:
            yield replace(self._database, fence=self._fence)
        finally:
            await ended(renewing)
            with suppress(PyMongoError), pymongo.timeout(2):
                milliseconds = int(self._settings.rollup_seconds * 1000)
                due: Row = {
                    "$dateAdd": {
                        "startDate": "$$NOW",
                        "unit": "millisecond",
                        "amount": milliseconds,
                    }
                }
                await self._state.update_one(
                    {"_id": STATE, "owner": self._me},
                    [{"$set": {"owner": None, "until": None, "due": due}}],
                )

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            with suppress(PyMongoError):
                await self._state.update_one(
                    {"_id": STATE, "owner": self._me}, [{"$set": {"until": UNTIL}}]
                )

    @asynccontextmanager
    async def _fence(self, session: AsyncClientSession) -> AsyncIterator[None]:
        """Whoever takes it over collides with us, and we with them."""
        async with self._outer(session):
            done = await self._state.update_one(
                {"_id": STATE, "owner": self._me}, [{"$set": {"until": UNTIL}}], session=session
            )
            if done.matched_count == 0:
                raise Unavailable(TAKEN_OVER)
            yield

    def _outer(self, session: AsyncClientSession) -> AbstractAsyncContextManager[None]:
        return self._database.fence(session)


@asynccontextmanager
async def holding(
    database: Database, settings: Settings, check: Callable[[], None]
) -> AsyncIterator[Database]:
    """Wait until nobody else rolls up; nobody does while the block runs."""
    lease = Lease(database, settings)
    while not await lease.take(due=False):
        check()
        await asyncio.sleep(TRY_SECONDS)
    async with lease.holding() as mine:
        yield mine


@asynccontextmanager
async def rolling_up(database: Database, cache: Cache, settings: Settings) -> AsyncIterator[None]:
    """Do it whenever it is due and no other process does, while the block runs."""
    # In an empty context: what the caller counts and bounds in time is not its commands.
    task = asyncio.get_running_loop().create_task(
        _roll_on(database, cache, settings), context=Context()
    )
    try:
        yield
    finally:
        await ended(task)


async def _roll_on(database: Database, cache: Cache, settings: Settings) -> None:
    lease = Lease(database, settings)
    idle = IdleTransactions(LEASE_MS / 1000)
    is_made = False
    while True:
        pause = settings.rollup_seconds
        try:
            if not is_made:
                await ensure_state(database, settings, utc_now())
                is_made = True
            if await lease.take(due=True):
                async with lease.holding() as mine:
                    ran = await told(mine, cache, settings)
                if ran.is_moving:
                    pause = 0.0
            elif lease.is_blocked:
                # By a process that was killed, most likely: MongoDB would let it stand for a minute.
                await idle.end_some(database)
                pause = min(pause, BLOCKED_SECONDS)
        except (PyMongoError, HarborError) as error:
            log_event(log, logging.WARNING, "rollups.failed", error=error)
            is_made = False
        except Exception as error:
            log.error("rollups.broke", exc_info=error)
            capture(error)
        await asyncio.sleep(pause)


async def told(
    database: Database,
    cache: Cache,
    settings: Settings,
    check: Callable[[], None] = lambda: None,
) -> Ran:
    """A run, after which nobody goes by an answer of before it."""
    count = WriteCount()
    before = counted.set(count)
    try:
        return await roll_up(database, settings, check=check)
    finally:
        counted.reset(before)
        await announce(cache, settings, count.wrote)
