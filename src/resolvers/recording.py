"""Records how models and the API are used: in the process first, so that no request waits for it.

Views and calls are added up by what they are of, and each download is an event; a task writes them twice
a second, so that a process that is killed loses what came since. What tells of a change that must not be
lost is written in the transaction of that change: `record_in`.
"""

import asyncio
import logging
import secrets
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from datetime import UTC, date, datetime, timedelta
from functools import partial
from hashlib import blake2b
from time import time
from typing import Any, Final, NamedTuple, TypeAlias

from bson import ObjectId
from pymongo import UpdateOne, timeout
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, PyMongoError

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.usage import (
    EVENT_INDEX,
    HISTOGRAM_STEPS,
    UsageKind,
    collection_of,
    latency_of,
    minute_of,
)
from modelharbor.errors import Unavailable
from modelharbor.observability.logging import log_event
from modelharbor.observability.metrics import UsageCount
from modelharbor.settings import Settings

log = logging.getLogger(__name__)
DOWNLOAD: Final = UsageKind.DOWNLOAD.value
VIEW: Final = UsageKind.VIEW.value
FLUSH_SECONDS: Final = 0.5
WRITE_SECONDS: Final = 5.0
"""Of one transaction: without a database a process ends within two of them."""
BATCH: Final = 1000  # events in one transaction
ADDED_UP: Final = 500  # answers at once
MOST_OPERATIONS: Final = 500
"""That are told apart, an hour and process: anybody can send texts of their own."""
KNOWN_AGAIN: Final = 250  # of those, the most used, that are known in the next hour
OTHER: Final = "other"
LONGEST_NAME: Final = 100  # characters of an operation's name
BOUNDS: Final = tuple(latency_of(step) for step in range(HISTOGRAM_STEPS - 1))
"""The most milliseconds of each step but the last one."""
step_of: Final = partial(bisect_left, BOUNDS)
"""As `latency_step`, sooner."""
DUPLICATE_KEY: Final = 11000
UNSIGNED_63: Final = (1 << 63) - 1
HOUR: Final = 3600


class Download(NamedTuple):
    """`at`: seconds since 1970."""

    at: float
    file: Row
    client: str
    who: int
    sent: int
    is_last: bool

    def event(self) -> Row:
        file = self.file
        return {
            "kind": DOWNLOAD,
            "client": self.client,
            "count": int(self.is_last),
            "model": file["model_id"],
            "version": file["version_id"],
            "file": file["_id"],
            "format": file["format"],
            "bytes": self.sent,
            "who": self.who,
        }


class Views:
    """Of one model by one class of clients, in one minute."""

    __slots__ = ("at", "count")

    def __init__(self) -> None:
        self.count, self.at = 0, 0.0


class Calls:
    """Of one operation by one class of clients, in one minute. `at`: of the last one."""

    __slots__ = (
        "at",
        "batches",
        "commands",
        "cost",
        "count",
        "errors",
        "hits",
        "keys",
        "latencies",
        "total_ms",
    )

    def __init__(self) -> None:
        self.count = self.errors = self.cost = 0
        self.commands = self.batches = self.keys = self.hits = 0
        self.at = self.total_ms = 0.0
        self.latencies: defaultdict[int, int] = defaultdict(int)

    def event(self) -> Row:
        numbers = {
            name: value
            for name in ("errors", "cost", "commands", "batches", "keys", "hits")
            if (value := getattr(self, name))
        }
        return {
            "kind": UsageKind.OPERATION.value,
            "count": self.count,
            # A multiple of a power of two: sums of them are exact, in whatever order.
            "total_ms": round(self.total_ms * 1024) / 1024,
            "latencies": {str(step): self.latencies[step] for step in sorted(self.latencies)},
            **numbers,
        }


class Work(NamedTuple):
    """What it took to run an operation."""

    commands: int = 0
    batches: int = 0
    keys: int = 0


Answered: TypeAlias = tuple[float, str, str, float, int, Work | None, Sequence[ObjectId], bool]
"""When, in seconds since 1970, and what `Usage.operation` takes."""


class Usage:
    """What one process records. Opened by `recording_usage`.

    `sealed` are the events that are being written, with the ids that they keep: whether a transaction
    was committed may never be known, and then they are written again.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        secret: bytes,
        count: UsageCount | None = None,
    ) -> None:
        """`secret`: of the installation; who downloads is told by a hash that needs it."""
        self.is_on = settings.usage_recording
        self.count = count or UsageCount()
        self.count.waiting = lambda: self.waiting
        self._database, self._days = database, settings.usage_days
        self._most = settings.usage_buffer
        self._key = blake2b(secret, person=b"modelharbor.who").digest()
        self._process = secrets.token_hex(8)
        self._sealed: list[Row] = []
        self._downloads: deque[Download] = deque()
        self._answered: list[Answered] = []
        self._views: OrderedDict[tuple[int, ObjectId, str], Views] = OrderedDict()
        self._calls: OrderedDict[tuple[int, str, str], Calls] = OrderedDict()
        # The same of this minute, by what they are asked for.
        self._now: dict[tuple[str, str], Calls] = {}
        self._minute = self._until = 0  # this minute, and when it ends
        self._known: Counter[str] = Counter()
        self._hour = 0
        self._ready: set[str] = set()  # collections that are there with their index
        self._left_out: Counter[str] = Counter()  # of this stretch
        self._has_failed = False

    @property
    def waiting(self) -> int:
        """Events."""
        self._add_up()
        return self._waiting

    @property
    def _waiting(self) -> int:
        return len(self._sealed) + len(self._downloads) + len(self._views) + len(self._calls)

    # ---- what is used

    def who(self, name: str) -> int:
        """A number that tells a person or an address from others, and not which one it is."""
        made = blake2b(name.encode(), key=self._key, digest_size=8).digest()
        return int.from_bytes(made) & UNSIGNED_63

    def download(self, file: Row, client: str, who: int, sent: int, *, is_last: bool) -> None:
        """A response with contents of a file has ended. `file`: `_id model_id version_id format`;
        `is_last`: the last byte of the file was among them."""
        if self.is_on:
            self._downloads.append(Download(time(), file, client, who, sent, is_last))
            self._make_room()

    def operation(
        self,
        operation: str,
        client: str,
        milliseconds: float,
        cost: int,
        work: Work | None,
        viewed: Sequence[ObjectId] = (),
        *,
        is_failed: bool = False,
    ) -> None:
        """An operation has been answered. `operation`: as `operation_key` makes it; `work`: None where its
        answer was there already; `viewed`: the models that it has shown by their own field; `is_failed`:
        there were errors in the answer."""
        if not self.is_on:
            return
        answered = self._answered
        answered.append((time(), operation, client, milliseconds, cost, work, viewed, is_failed))
        if len(answered) >= ADDED_UP:
            self._add_up()

    def _add_up(self) -> None:
        """What was answered lately. Many at once take half the time that each would take by itself,
        between all else that a request does."""
        answered, self._answered = self._answered, []
        calls_now, all_views = self._now, self._views
        for now, operation, client, milliseconds, cost, work, viewed, is_failed in answered:
            if now >= self._until:
                self._turn(int(now))
            calls = calls_now.get((operation, client))
            if calls is None:
                calls = self._calls_of(operation, client)
            calls.count += 1
            calls.at = now
            calls.total_ms += milliseconds
            calls.latencies[step_of(milliseconds)] += 1
            calls.cost += cost
            if work is None:
                calls.hits += 1
            else:
                commands, batches, keys = work
                calls.commands += commands
                calls.batches += batches
                calls.keys += keys
            if is_failed:
                calls.errors += 1
            if calls.count == 1:
                self._make_room()
            for model_id in viewed:
                key = (self._minute, model_id, client)
                views = all_views.get(key)
                if views is None:
                    views = all_views[key] = Views()
                views.count += 1
                views.at = now
                if views.count == 1:
                    self._make_room()

    def _turn(self, now: int) -> None:
        """Another minute has begun."""
        self._now.clear()
        self._minute = now // 60
        self._until = self._minute * 60 + 60
        if now >= self._hour:
            again = self._known.most_common(KNOWN_AGAIN)
            self._known = Counter(dict.fromkeys((name for name, _ in again), 0))
            self._hour = now // HOUR * HOUR + HOUR

    def _calls_of(self, operation: str, client: str) -> Calls:
        is_known = operation in self._known or len(self._known) < MOST_OPERATIONS
        key = (self._minute, operation if is_known else OTHER, client)
        calls = self._calls.get(key)
        if calls is None:
            calls = self._calls[key] = Calls()
        if is_known:
            self._known[operation] += 0
            self._now[operation, client] = calls
        return calls

    def _take_calls(self) -> tuple[str, str, Calls]:
        """The oldest: their operation, the class of clients."""
        (_, operation, client), calls = self._calls.popitem(last=False)
        self._now.pop((operation, client), None)
        if operation in self._known:
            self._known[operation] += calls.count
        return operation, client, calls

    def _make_room(self) -> None:
        """Leave out the oldest of what is worth least; never what is being written."""
        if self._waiting <= self._most:
            return
        if self._views:
            _, views = self._views.popitem(last=False)
            self._leave_out(UsageKind.VIEW, "left_out", views.count)
        elif self._calls:
            _, _, calls = self._take_calls()
            self._leave_out(UsageKind.OPERATION, "left_out", calls.count)
        elif self._downloads:
            self._downloads.popleft()
            self._leave_out(UsageKind.DOWNLOAD, "left_out", 1)

    def _leave_out(self, kind: UsageKind, outcome: str, count: int) -> None:
        self.count.outcomes[kind.value, outcome] += count
        if not self._left_out:
            log_event(log, logging.WARNING, "usage.left_out", kind=kind.value, reason=outcome)
        self._left_out[kind.value] += count

    # ---- how it is written

    async def flush(self) -> None:
        """Write what is waiting; what cannot be written goes on waiting, and why is raised."""
        left = self.waiting
        while left > 0:
            left -= len(self._sealed or self._seal())
            if not self._sealed:
                break
            await self._write()
        if self._left_out:
            log_event(log, logging.INFO, "usage.recorded_again", **dict(self._left_out))
            self._left_out.clear()

    async def prepare(self) -> None:
        """The collections of today and tomorrow, and of what is being written: they are there with their
        index before a transaction inserts."""
        now = datetime.now(UTC)
        wanted = {collection_of(now), collection_of(now + timedelta(days=1))}
        wanted.update(_by_collection(self._sealed))
        for name in wanted - self._ready:
            with timeout(WRITE_SECONDS):
                await self._database.data[name].create_indexes([EVENT_INDEX])
        self._ready = wanted

    def _seal(self) -> list[Row]:
        """Make events of the oldest of what waits; downloads first."""
        self._add_up()
        made: list[tuple[float, Row]] = []
        while self._downloads and len(made) < BATCH:
            download = self._downloads.popleft()
            made.append((download.at, download.event()))
        while self._calls and len(made) < BATCH:
            operation, client, calls = self._take_calls()
            made.append((calls.at, {"operation": operation, "client": client, **calls.event()}))
        while self._views and len(made) < BATCH:
            (_, model, client), views = self._views.popitem(last=False)
            shown = {"kind": VIEW, "client": client, "count": views.count, "model": model}
            made.append((views.at, shown))
        oldest = time() - self._days * 24 * HOUR
        for at, event in made:
            if at < oldest:
                self._leave_out(UsageKind(event["kind"]), "too_old", _uses(event))
                continue
            event["_id"], event["at"] = ObjectId(), datetime.fromtimestamp(at, UTC)
            self._sealed.append(event)
        return self._sealed

    async def _write(self) -> None:
        """One transaction, once, however often it has to be tried."""
        await self.prepare()
        recorded = Counter[tuple[str, str]]()
        for event in self._sealed:
            recorded[event["kind"], "recorded"] += _uses(event)
        while self._sealed:
            try:
                await self._database.transaction(
                    partial(_insert, self._database, self._process, self._sealed), WRITE_SECONDS
                )
            except BulkWriteError as error:
                if not _is_duplicate(error):
                    raise
                there = await self._there()
                if not there:
                    raise  # not on a majority yet
                self._sealed = [each for each in self._sealed if each["_id"] not in there]
            else:
                self._sealed = []
        self.count.outcomes.update(recorded)

    async def _there(self) -> set[Any]:
        """The ids of the sealed events that were written before."""
        found: set[Any] = set()
        for name, events in _by_collection(self._sealed).items():
            ids = [each["_id"] for each in events]
            rows = await self._database.find(name, {"_id": {"$in": ids}}, projection={"_id": 1})
            found.update(row["_id"] for row in rows)
        return found

    async def run(self, end: asyncio.Event) -> None:
        """Flush until the end, and then once more: what is not written by then is lost, and counted."""
        while not end.is_set():
            await self._try()
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await end.wait()
        await self._try()
        lost = Counter[str]()
        while self._sealed or self._seal():
            for event in self._sealed:
                lost[event["kind"]] += _uses(event)
            self._sealed = []
        for kind, count in lost.items():
            self.count.outcomes[kind, "lost"] += count
        if lost:
            log_event(log, logging.ERROR, "usage.lost", **lost)

    async def _try(self) -> None:
        try:
            await self.prepare()
            await self.flush()
        except (PyMongoError, Unavailable) as error:
            if not self._has_failed:
                log.warning("usage.not_recorded_yet error=%s", error)
            self._has_failed = True
        else:
            self._has_failed = False


@asynccontextmanager
async def recording_usage(
    database: Database, settings: Settings, secret: bytes, count: UsageCount
) -> AsyncIterator[Usage]:
    """A recorder that flushes twice a second, and once more at the end."""
    usage = Usage(database, settings, secret, count)
    if not usage.is_on:
        yield usage
        return
    end = asyncio.Event()
    running = asyncio.get_running_loop().create_task(usage.run(end), context=Context())
    try:
        yield usage
    finally:
        end.set()  # not cancelled: a flush under way would not know whether it was committed
        await running


async def record_in(database: Database, session: AsyncClientSession, events: Sequence[Row]) -> None:
    """Within a transaction: they are recorded if it is committed. Each has an `_id` that follows from
    what it tells of, `at` and `kind`."""
    # By a mark of its own: two that change the same one would hold each other up.
    await _insert(database, f"change {ObjectId()}", events, session)


async def _insert(
    database: Database, process: str, events: Sequence[Row], session: AsyncClientSession
) -> None:
    for name, some in _by_collection(events).items():
        await database.data[name].insert_many(some, session=session)
    minutes = sorted({minute_of(each["at"]) for each in events})
    await database.data["usage_dirty"].bulk_write(
        [
            UpdateOne({"minute": minute, "process": process}, {"$inc": {"marks": 1}}, upsert=True)
            for minute in minutes
        ],
        ordered=False,
        session=session,
    )


def _by_collection(events: Sequence[Row]) -> dict[str, list[Row]]:
    """By day first, for to make a name takes longer than to find the day."""
    days: defaultdict[date, list[Row]] = defaultdict(list)
    for event in events:
        days[event["at"].astimezone(UTC).date()].append(event)
    return {collection_of(some[0]["at"]): some for some in days.values()}


def _is_duplicate(error: BulkWriteError) -> bool:
    details: Any = error.details
    return any(each["code"] == DUPLICATE_KEY for each in details["writeErrors"])


def _uses(event: Row) -> int:
    """How many uses an event tells of; each download is one, part or whole."""
    return 1 if event["kind"] == DOWNLOAD else int(event["count"])


def operation_key(document_sha256: str, name: str | None) -> str:
    """How an operation is told apart: by its text, in which others may have its name."""
    return f"{document_sha256[:16]}:{(name or '')[:LONGEST_NAME]}"
