"""Writes into each event its place in the log, once the order of commits is known.

One process at a time does it, by a lease on the server's clock: for order and thrift, since whoever
counts finds the same places, so two at once write the same. Places are written in order and `recorded`
moves after them, so all up to it are written, whenever a process ends.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import Context
from typing import Final

import pymongo
from bson import ObjectId, Timestamp
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import OperationFailure, PyMongoError

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.events import Stream
from modelharbor.settings import Settings

from .following import HistoryLost, Place, follow, now_of
from .position import LEFT, START, before, position_of, seconds_of, time_of
from .recorded import LOG, ensure_log

log = logging.getLogger(__name__)

LEASE_MS: Final = 3000
RENEW_SECONDS: Final = 1.0  # and how often the others look whether it is free
AT_ONCE: Final = 1000  # events in one command
AHEAD: Final = 10_000  # events that wait to be written
MARK_SECONDS: Final = 3600  # that a reader's mark is kept
CLEAN_SECONDS: Final = 600.0  # between two looks for old ones

NO_SNAPSHOT: Final = (239, 246)
"""MongoDB's codes: it was too long ago, or collections were made since."""

PIPELINE: Final[list[Row]] = [
    {"$match": {"ns.coll": "events", "operationType": "insert"}},
    {"$project": {"ns.coll": 1, "documentKey._id": 1, "clusterTime": 1}},
]
UNTIL: Final[Row] = {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": LEASE_MS}}


class _LeaseLost(Exception):
    """Another process records now, or the row is gone."""


@asynccontextmanager
async def recording(database: Database, settings: Settings) -> AsyncIterator[None]:
    """Do it whenever no other process does, while the block runs."""
    recorder = _Recorder(database)
    # In an empty context: what the caller counts and bounds in time is not its commands.
    task = asyncio.get_running_loop().create_task(recorder.run(), context=Context())
    try:
        yield
    finally:
        await ended(task)


class _Recorder:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._log = database.data["log"]
        self._events = database.data["events"]
        self._me = ObjectId()
        self._holds = self._has_lost = False
        self._cleaned = -CLEAN_SECONDS

    async def run(self) -> None:
        failures = 0
        try:
            while True:
                pause = RENEW_SECONDS
                try:
                    row = await self._take()
                    if row is not None:
                        failures = 0
                        await self._record(row)
                except HistoryLost as lost:
                    log.error("events.history_lost error=%s", lost.__cause__)
                    self._has_lost, pause = True, 0.1
                except _LeaseLost:
                    log.info("events.lease_lost")
                except Exception as error:
                    failures += 1
                    pause = min(RENEW_SECONDS, 0.05 * 2.0 ** min(failures, 10))
                    log.warning("events.recording_failed error=%s: %s", type(error).__name__, error)
                await asyncio.sleep(random.uniform(pause / 2, pause))
        finally:
            await self._release()

    async def _take(self) -> Row | None:
        """The row of the log, where the lease is ours or free."""
        await ensure_log(self._database)
        row: Row | None = await self._log.find_one_and_update(
            {
                "_id": LOG,
                # No time at all is before any time.
                "$or": [{"owner": self._me}, {"$expr": {"$lt": ["$until", "$$NOW"]}}],
            },
            [{"$set": {"owner": self._me, "until": UNTIL}}],
            return_document=ReturnDocument.AFTER,
        )
        if row is not None and not self._holds:
            log.info("events.recording position=%s", row["recorded"])
        self._holds = row is not None
        return row

    async def _move(self, recorded: str, began: str = START) -> None:
        """Keep the lease; places only grow, whoever writes them."""
        places = {
            "recorded": {"$max": ["$recorded", recorded]},
            "began": {"$max": ["$began", began]},
        }
        done = await self._log.update_one(
            {"_id": LOG, "owner": self._me}, [{"$set": {"until": UNTIL, **places}}]
        )
        if done.matched_count == 0:
            self._holds = False
            raise _LeaseLost

    async def _release(self) -> None:
        """So that another process goes on at once."""
        if self._holds:
            with suppress(PyMongoError), pymongo.timeout(1):
                await self._log.update_one(
                    {"_id": LOG, "owner": self._me}, {"$set": {"owner": None, "until": None}}
                )

    async def _record(self, row: Row) -> None:
        recorded, began = row["recorded"], row["began"]
        if self._has_lost:
            began = position_of(await now_of(self._database.data), 0)
            await self._move(START, began)
            self._has_lost = False
        if began > recorded:
            await self._record_left(time_of(began))
            await self._move(began)
            recorded = began
        found: asyncio.Queue[tuple[ObjectId | None, str]] = asyncio.Queue(AHEAD)
        # No group of tasks: it says once to each that it is to end, which may be swallowed.
        both = [
            asyncio.create_task(self._follow(Place(time_of(recorded)), found)),
            asyncio.create_task(self._write(found)),
        ]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await ended(*both)
        for task in done:
            task.result()

    async def _follow(
        self, place: Place, ahead: asyncio.Queue[tuple[ObjectId | None, str]]
    ) -> None:
        async with aclosing(follow(self._database, PIPELINE, place)) as stream:
            async for found in stream:
                event_id = None if found.change is None else found.change["documentKey"]["_id"]
                await ahead.put((event_id, found.position))

    async def _write(self, ahead: asyncio.Queue[tuple[ObjectId | None, str]]) -> None:
        """What has come meanwhile goes in one command."""
        while True:
            events, reached = [], START
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    event_id, reached = await ahead.get()
                    events = [(event_id, reached)]
            while len(events) < AT_ONCE and not ahead.empty():
                event_id, reached = ahead.get_nowait()
                events.append((event_id, reached))
            # In order, so that where one ends in the middle all before the last place have theirs.
            stamps = [
                UpdateOne({"_id": event_id}, {"$set": {"position": position}})
                for event_id, position in events
                if event_id is not None
            ]
            if stamps:
                await self._events.bulk_write(stamps)
            await self._move(reached)
            await self._clean(reached)

    async def _record_left(self, began: Timestamp) -> None:
        """Give the events before this time, whose own places nobody knows any more, places before all
        that follow, in the order of their ids.

        What has no place is read as of a time when none of these was written yet, so each event has
        one number, whoever counts and however often: no two events can come to the same place.
        """
        at, number = before(began), LEFT
        after: ObjectId | None = None
        while ids := await self._left(at, after):
            await self._move(START)  # reading takes its time, too
            stamps = [
                UpdateOne(
                    {"_id": each, "position": None},
                    {"$set": {"position": position_of(at, number + index)}},
                )
                for index, each in enumerate(ids)
            ]
            await self._events.bulk_write(stamps)
            number, after = number + len(ids), ids[-1]

    async def _left(self, at: Timestamp, after: ObjectId | None) -> list[ObjectId]:
        """Events without a place as of this time, after this id. Later ones have theirs to come."""
        command: Row = {
            "find": "events",
            "filter": {"position": None, **({"_id": {"$gt": after}} if after else {})},
            "projection": {"_id": 1},
            "sort": {"_id": 1},
            "limit": AT_ONCE,
            "batchSize": AT_ONCE + 1,
            "maxTimeMS": self._database.query_timeout_ms,
            "readConcern": {"level": "snapshot", "atClusterTime": at},
        }
        try:
            answer = await self._database.data.command(command)
        except OperationFailure as error:
            if error.code in NO_SNAPSHOT:
                raise HistoryLost from error
            raise
        return [row["_id"] for row in answer["cursor"]["firstBatch"]]

    async def _clean(self, reached: str) -> None:
        """Marks say nothing any more once their readers have seen them."""
        now = time.monotonic()
        if reached == START or now - self._cleaned < CLEAN_SECONDS:
            return
        self._cleaned = now
        old = position_of(Timestamp(seconds_of(reached) - MARK_SECONDS, 0), 0)
        await self._events.delete_many({"stream": Stream.MARKS.value, "position": {"$lt": old}})
