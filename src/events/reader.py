"""Hands every committed change to those in this process who want it: one change stream for all.

It starts when it is first needed and goes on by itself after any failure of MongoDB: it knows how
many changes of the last commit it has handed over, opens the stream at that commit and leaves those out.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from contextvars import Context
from typing import Final

import bson
from bson import ObjectId

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.events import Stream
from modelharbor.errors import Unavailable
from modelharbor.settings import Settings

from .changes import Change, Topic, What, topics_of
from .following import Found, HistoryLost, Place, follow, now_of
from .position import position_of
from .recorded import ensure_log

log = logging.getLogger(__name__)

RECENT_ROWS: Final = 10_000
RECENT_BYTES: Final = 8 * 1024 * 1024  # as MongoDB keeps them; about five times that as objects
NEVER: Final = "f" * 24  # a place that nothing reaches

_PROGRESS: Final[Row] = {
    "$expr": {
        "$anyElementTrue": {
            "$map": {
                "input": {"$objectToArray": {"$ifNull": ["$updateDescription.updatedFields", {}]}},
                "in": {"$eq": [{"$indexOfCP": ["$$this.k", "progress"]}, 0]},
            }
        }
    }
}
_UPDATED: Final[Row] = {
    "$cond": [
        {"$in": ["$ns.coll", ["jobs", "uploads"]]},
        "$updateDescription.updatedFields",
        "$$REMOVE",
    ]
}
_OF_UPLOADS: Final = frozenset({"received_bytes", "rate", "sequence", "updated_at", "expires_at"})
"""What progress of an upload comes to; more of it is written, for its receiver alone."""
_ONLY_EVENTS: Final[Row] = {"$cond": [{"$eq": ["$ns.coll", "events"]}, "$fullDocument", "$$REMOVE"]}
_RUN: Final[Row] = {
    "$cond": [
        {"$eq": ["$ns.coll", "rollup_state"]},
        {"$ifNull": ["$updateDescription.updatedFields.run", "$fullDocument.run"]},
        "$$REMOVE",
    ]
}
PIPELINE: Final[list[Row]] = [
    {
        "$match": {
            "$or": [
                {"ns.coll": "events", "operationType": "insert"},
                {
                    "ns.coll": "jobs",
                    "operationType": "update",
                    # A change of state writes the job too; its event tells of it.
                    "updateDescription.updatedFields.state": {"$exists": False},
                    **_PROGRESS,
                },
                {
                    "ns.coll": "uploads",
                    "operationType": "update",
                    "updateDescription.updatedFields.state": {"$exists": False},
                    "updateDescription.updatedFields.received_bytes": {"$exists": True},
                },
                {
                    "ns.coll": "models",
                    "operationType": {"$in": ["insert", "update", "replace"]},
                },
                {"ns.coll": "rollup_state", "operationType": {"$in": ["insert", "replace"]}},
                {
                    "ns.coll": "rollup_state",
                    "operationType": "update",
                    "updateDescription.updatedFields.run": {"$exists": True},
                },
            ]
        }
    },
    # A model is long, and that it was written is all that is told of it.
    {
        "$project": {
            "ns.coll": 1,
            "documentKey._id": 1,
            "clusterTime": 1,
            "fullDocument": _ONLY_EVENTS,
            "updated": _UPDATED,
            "run": _RUN,
        }
    },
]


class _Subscriber:
    __slots__ = ("callback", "is_here", "lost", "topics")

    def __init__(
        self,
        topics: frozenset[Topic],
        callback: Callable[[Change], None],
        lost: Callable[[], None],
    ) -> None:
        self.topics, self.callback, self.lost = topics, callback, lost
        self.is_here = True


class Reader:
    """Use `open_reader`. Nothing is sent before `ready` is first called."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._patience = settings.mongo_timeout_seconds + 2
        self._task: asyncio.Task[None] | None = None
        self._seen = asyncio.Event()
        self._mark = ObjectId()
        self._place: Place | None = None
        self._failures = 0
        # A dict for its order: who came first is called first.
        self._subscribers: dict[Topic, dict[_Subscriber, None]] = {}
        self._recent: deque[tuple[Change, int]] = deque()
        self._bytes = 0
        self.began = NEVER
        """All events after this place are in `since`."""
        self.position = NEVER
        """All changes up to this place were handed over; before the first `ready` it says nothing."""

    async def ready(self) -> None:
        """Back when changes are handed over that are committed from now on. Raises Unavailable."""
        if self._task is None:
            # Not in the context of who asks first: their commands are counted, and may be cut short.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())
        try:
            async with asyncio.timeout(self._patience):
                await self._seen.wait()
        except TimeoutError:
            raise Unavailable("The log of changes cannot be read just now; try again.") from None

    def subscribe(
        self,
        topics: Iterable[Topic],
        callback: Callable[[Change], None],
        lost: Callable[[], None],
    ) -> Callable[[], None]:
        """Have each change of these topics handed over once; the answer ends that.

        `callback` is quick and waits for nothing. `lost` is called, and nothing after it, when changes
        are gone before they could be read.
        """
        subscriber = _Subscriber(frozenset(topics), callback, lost)
        for topic in subscriber.topics:
            self._subscribers.setdefault(topic, {})[subscriber] = None
        return lambda: self._unsubscribe(subscriber)

    def _unsubscribe(self, subscriber: _Subscriber) -> None:
        if not subscriber.is_here:
            return
        subscriber.is_here = False
        for topic in subscriber.topics:
            others = self._subscribers[topic]
            del others[subscriber]
            if not others:
                del self._subscribers[topic]

    def since(self, position: str) -> list[Change]:
        """Events after this place, in order; all of them where it is not before `began`."""
        found = []
        for change, _ in reversed(self._recent):
            if change.position <= position:
                break
            found.append(change)
        return found[::-1]

    async def close(self) -> None:
        if self._task is not None:
            await ended(self._task)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except HistoryLost as error:
                log.error("events.lost position=%s error=%s", self.position, error.__cause__)
                self._lose()
            except Exception as error:
                log.warning("events.reading_failed error=%s: %s", type(error).__name__, error)
            self._failures += 1
            # All processes have lost the same server: they do not come back all at once.
            await asyncio.sleep(random.uniform(0, min(1.0, 0.05 * 2.0 ** min(self._failures, 10))))

    async def _follow(self) -> None:
        if self._place is None:
            await ensure_log(self._database)  # before `began`, so that all after it gets its place
            self._place = Place(await now_of(self._database.data))
            self.began = self.position = position_of(self._place.time, 0)
        async with aclosing(follow(self._database, PIPELINE, self._place)) as stream:
            await anext(stream)
            if not self._seen.is_set():
                await self._database.data["events"].insert_one(self._new_mark())
            async for found in stream:
                self._failures = 0
                if found.change is not None:
                    self._take(found, found.change)
                self.position = max(self.position, found.position)

    def _new_mark(self) -> Row:
        self._mark = ObjectId()
        return {
            "_id": self._mark,
            "stream": Stream.MARKS.value,
            "kind": None,
            "about": [],
            "principals": [],
            "at": utc_now(),
            "position": None,
        }

    def _take(self, found: Found, told: Row) -> None:
        try:
            change = _change(found.position, told)
            if change.what is What.EVENT:
                if change.row["stream"] != Stream.MARKS.value:
                    self._keep(change)
                elif change.row["_id"] == self._mark:
                    self._seen.set()
            self._hand_over(change)
        except Exception:
            log.exception("events.not_understood position=%s", found.position)

    def _keep(self, change: Change) -> None:
        size = len(bson.encode(change.row))
        self._recent.append((change, size))
        self._bytes += size
        while len(self._recent) > RECENT_ROWS or self._bytes > RECENT_BYTES:
            gone, size = self._recent.popleft()
            self._bytes -= size
            self.began = gone.position

    def _hand_over(self, change: Change) -> None:
        wanted = [
            subscribers
            for topic in topics_of(change)
            if (subscribers := self._subscribers.get(topic))
        ]
        if not wanted:
            return
        # Copied, since a callback may end its subscription; once, where several topics name it.
        once = list(wanted[0]) if len(wanted) == 1 else list({k: None for d in wanted for k in d})
        for subscriber in once:
            if subscriber.is_here:
                try:
                    subscriber.callback(change)
                except Exception:
                    log.exception("events.callback_failed position=%s", change.position)

    def _lose(self) -> None:
        """All that follow the stream end, and it begins again from now."""
        self._place = None
        self._seen.clear()
        self._recent.clear()
        self._bytes = 0
        self.began = self.position = NEVER
        everyone = {subscriber: None for each in self._subscribers.values() for subscriber in each}
        for subscriber in everyone:
            if subscriber.is_here:
                self._unsubscribe(subscriber)
                try:
                    subscriber.lost()
                except Exception:
                    log.exception("events.callback_failed")


def event_row(row: Row, position: str) -> Row:
    """A row of `events` as it is handed over: with its place, and whole where an older version that
    still runs wrote it."""
    return {
        "stream": Stream.MODELS.value,
        "about": [],
        "principals": [],
        **row,
        "position": position,
    }


def _change(position: str, told: Row) -> Change:
    match told["ns"]["coll"]:
        case "events":
            return Change(What.EVENT, position, event_row(told["fullDocument"], position))
        case "jobs":
            updated = {
                name: value
                for name, value in told["updated"].items()
                if name.startswith(("progress", "steps"))
            }
            return Change(
                What.PROGRESS, position, {"job_id": told["documentKey"]["_id"], "updated": updated}
            )
        case "uploads":
            updated = {
                name: value for name, value in told["updated"].items() if name in _OF_UPLOADS
            }
            return Change(
                What.PROGRESS,
                position,
                {"upload_id": told["documentKey"]["_id"], "updated": updated},
            )
        case "rollup_state":
            return Change(What.ROLLUP, position, {"run": told["run"]})
        case _:
            return Change(What.MODEL, position, {"model_id": told["documentKey"]["_id"]})


@asynccontextmanager
async def open_reader(database: Database, settings: Settings) -> AsyncIterator[Reader]:
    """The one of this process, while the block runs."""
    reader = Reader(database, settings)
    try:
        yield reader
    finally:
        await reader.close()
