"""A worker process: looks for jobs, runs as many as it has places for, keeps their leases, settles them."""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import pymongo
from pymongo.errors import PyMongoError

from modelharbor.auth.requesters import requester_of
from modelharbor.cache.client import connect_cache
from modelharbor.cache.freshness import announce
from modelharbor.db.base import Row
from modelharbor.db.connection import Database, connect
from modelharbor.db.ending import ended
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.db.migrations import pending
from modelharbor.errors import HarborError, Unavailable
from modelharbor.events.recorder import recording
from modelharbor.inspection.fence import open_fence
from modelharbor.jobs.waking import Waking, listening, wake
from modelharbor.observability.commands import WriteCount, counted
from modelharbor.observability.logging import log_event
from modelharbor.observability.sentry import capture
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage

from .claims import (
    Claim,
    IdleTransactions,
    Places,
    claim,
    claim_of,
    expire,
    held_states,
    renew,
    strays,
)
from .interruptions import JobCancelled, LeaseLost
from .outcomes import CANCELLED, HANDED_BACK, Outcome, after, settle, settle_in_time, succeeded
from .processes import open_processes
from .reports import Reports
from .rolling_up import rolling_up
from .schedule import SCHEDULE, Clock, Periodic
from .tools import HandlerSpec, Shared, Tools

log = logging.getLogger(__name__)
LOOK_SECONDS: Final = 1.0  # between two looks at the queue when nobody wakes us
UNHEARD_SECONDS: Final = 10.0  # that a cancelled handler may go on without a report
LAST_SECONDS: Final = 3.0  # for handing back, after the drain: 15 s in all with the default
LONGEST_PAUSE_SECONDS: Final = 5.0  # between two tries to reach MongoDB at the start


async def run_worker(
    settings: Settings,
    handlers: Mapping[JobKind, HandlerSpec],
    concurrency: int,
    kinds: Collection[JobKind],
    stop: asyncio.Event,
    *,
    schedule: Sequence[Periodic] = SCHEDULE,
) -> None:
    """Run jobs of these kinds (empty: of all in the table) until `stop`, then drain.

    Waits for MongoDB, and for migrations that are pending: it may be started before either.
    """
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(connect(settings))
        if not await _ready(database, stop):
            return
        cache = await stack.enter_async_context(connect_cache(settings))
        shared = Shared(
            database=database,
            settings=settings,
            storage=await stack.enter_async_context(open_storage(settings)),
            cache=cache,
            processes=await stack.enter_async_context(open_processes()),
            fence=await stack.enter_async_context(open_fence(settings)),
        )
        waking = await stack.enter_async_context(listening(cache))
        await stack.enter_async_context(recording(database, settings))
        chosen = {kind: spec for kind, spec in handlers.items() if not kinds or kind in kinds}
        if JobKind.ROLLUP_ANALYTICS in chosen:
            await stack.enter_async_context(rolling_up(database, cache, settings))
        worker = Worker(shared, chosen, concurrency, waking, Clock(schedule, handlers))
        await worker.run(stop)


async def _ready(database: Database, stop: asyncio.Event) -> bool:
    """Once MongoDB is there and up to date; False where we are to stop before that."""
    pause = 0.25
    while not stop.is_set():
        try:
            missing = await pending(database)
        except PyMongoError as error:
            log_event(log, logging.WARNING, "worker.waits", reason="mongodb", error=error)
        else:
            if not missing:
                return True
            log_event(log, logging.WARNING, "worker.waits", reason="migrations", pending=missing)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await stop.wait()
        pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
    return False


@dataclass(eq=False, slots=True)
class Held:
    """A job that this process has."""

    job: Row
    reports: Reports
    handler: "asyncio.Task[Row | None] | None" = None
    attempt: "asyncio.Task[None] | None" = None
    """The handler, and settling what it came to: never cancelled."""
    cancelling_since: float | None = None
    is_handed_back: bool = False

    @property
    def is_running(self) -> bool:
        """Its handler has not ended yet."""
        return self.handler is None or not self.handler.done()

    def interrupt(self) -> None:
        if self.handler is not None:
            self.handler.cancel()


class Worker:
    def __init__(
        self,
        shared: Shared,
        handlers: Mapping[JobKind, HandlerSpec],
        concurrency: int,
        waking: Waking,
        clock: Clock,
    ) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self._shared, self._handlers, self._concurrency = shared, handlers, concurrency
        self._database, self._settings = shared.database, shared.settings
        self._waking, self._clock = waking, clock
        self._held: dict[Claim, Held] = {}
        self._patient_until = 0.0
        self._is_blocked = False  # jobs are held by a transaction of somebody else
        self._idle = IdleTransactions(shared.settings.lease_seconds)
        self._is_unsure = False  # a claim failed: we may have more than we know

    async def run(self, stop: asyncio.Event) -> None:
        log_event(
            log,
            logging.INFO,
            "worker.started",
            worker=self.name,
            concurrency=self._concurrency,
            kinds=",".join(kind.value for kind in self._handlers),
        )
        async with (
            _beside(self._keep_leases()),
            _beside(self._tend_queue()),
            _beside(self._hear(stop)),
        ):
            while not stop.is_set():
                if not await self._look():
                    await self._waking.wait(LOOK_SECONDS)
            log_event(log, logging.INFO, "worker.drains", worker=self.name, held=len(self._held))
            await self._drain()
        log_event(log, logging.INFO, "worker.ended", worker=self.name)

    async def _hear(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._waking.tell()

    # Looking for jobs ---------------------------------------------------------------------------

    async def _look(self) -> bool:
        """Start what there is and what there are places for; whether there may be more."""
        jobs: list[Row] = []
        async with self._forgiving("look"):
            if self._is_unsure:
                await self._hand_back_strays()
            jobs = await self._claim(self._places())
        for job in jobs:
            self._start(job)
        return bool(jobs) and len(self._held) < self._concurrency

    async def _tend_queue(self) -> None:
        """Each second: jobs whose time has come, and those whose worker died."""
        while True:
            put: list[Row] = []
            async with self._forgiving("put"):
                try:
                    put = await self._clock.put_due(self._database)
                except Unavailable:
                    self._is_blocked = True
                    raise
            async with self._forgiving("tend"):  # whatever became of what was to be put
                expired, is_blocked = await self._expire()
                self._is_blocked = self._is_blocked or is_blocked
                for job in expired:
                    log_event(
                        log,
                        logging.WARNING,
                        "job.expired",
                        **_names(job),
                        deaths=job["deaths"],
                        state=job["state"],
                    )
                if expired:
                    self._waking.tell()
            if put:
                self._waking.tell()
            if self._is_blocked:
                async with self._forgiving("unblock"):
                    ended_count = await self._idle.end_some(self._database)
                    self._is_blocked = bool(self._idle.watched)
                    if ended_count:
                        log_event(log, logging.WARNING, "worker.unblocked", ended=ended_count)
                        self._waking.tell()
            await asyncio.sleep(LOOK_SECONDS)

    async def _expire(self) -> tuple[list[Row], bool]:
        """After MongoDB was gone, whose leases ran out meanwhile may live: they renew them first."""
        try:
            if time.monotonic() >= self._patient_until:
                return await expire(self._database, self._held)
            await self._database.client.admin.command("ping")
            return [], False
        except PyMongoError:
            self._patient_until = time.monotonic() + self._settings.lease_seconds / 2
            raise

    @asynccontextmanager
    async def _forgiving(self, what: str) -> AsyncIterator[None]:
        """What fails is tried again later: a worker outlives its MongoDB, and our mistakes."""
        try:
            yield
        except (PyMongoError, HarborError) as error:
            log_event(log, logging.WARNING, f"worker.{what}_failed", worker=self.name, error=error)
        except Exception as error:
            log.error("worker.%s_broke worker=%s", what, self.name, exc_info=error)
            capture(error)

    def _places(self) -> Places:
        held = [each.job for each in self._held.values()]
        by_kind = {kind: spec.at_once for kind, spec in self._handlers.items()}
        for job in held:
            by_kind[JobKind(job["kind"])] -= 1
        return Places(
            free=self._concurrency - len(held),
            by_kind=by_kind,
            suspects=not any(job["deaths"] for job in held),
        )

    async def _claim(self, places: Places) -> list[Row]:
        try:
            return await claim(self._database, self.name, self._settings.lease_seconds, places)
        except BaseException as error:
            self._is_unsure = True
            self._is_blocked = isinstance(error, Unavailable)
            raise

    async def _hand_back_strays(self) -> None:
        for job in await strays(self._database, self.name, self._held):
            await settle(self._database, job, Reports(self._database, job), HANDED_BACK)
        self._is_unsure = False

    # Running one --------------------------------------------------------------------------------

    def _start(self, job: Row) -> None:
        held = Held(job, Reports(self._database, job))
        self._held[claim_of(job)] = held
        log_event(log, logging.INFO, "job.claimed", **_names(job), attempt=job["attempt"])
        held.attempt = asyncio.create_task(self._attempt(held))

    async def _attempt(self, held: Held) -> None:
        job, began = held.job, time.perf_counter()
        try:
            outcome = await self._outcome(held)
            row = None
            if outcome is not None:
                row = await settle_in_time(self._database, job, held.reports, outcome)
            if row is None:
                log_event(log, logging.WARNING, "job.lost", **_names(job))
                return
            log_event(
                log,
                logging.INFO,
                f"job.{row['state'].lower()}",
                **_names(job),
                ms=round((time.perf_counter() - began) * 1000),
                **({"code": row["error"]["code"]} if row["error"] else {}),
            )
            if row["parent_id"] is not None or row["state"] == JobState.QUEUED.value:
                await wake(self._shared.cache)
        except Exception as error:  # its lease runs out, then it is tried again
            log.error("job.not_settled job_id=%s", job["_id"], exc_info=error)
            capture(error)
        finally:
            del self._held[claim_of(job)]
            self._waking.tell()

    async def _outcome(self, held: Held) -> Outcome | None:
        """Of the handler; None: the job is not ours any more."""
        async with held.reports.writing():
            handler = held.handler = asyncio.create_task(self._handle(held))
            if held.is_handed_back:
                held.interrupt()
            await asyncio.wait({handler})
        reports = held.reports
        error = asyncio.CancelledError() if handler.cancelled() else handler.exception()
        if reports.is_lost or isinstance(error, LeaseLost):
            return None
        if error is None:
            return succeeded(handler.result(), held.job)
        if reports.is_cancelled:
            return CANCELLED
        if held.is_handed_back:
            return HANDED_BACK
        if isinstance(error, JobCancelled):  # nobody has cancelled it
            error = RuntimeError("the handler cancelled its own job")
        return after(error, held.job)

    async def _handle(self, held: Held) -> Row | None:
        job = held.job
        viewer = await requester_of(self._database, job)
        tools = Tools(self._shared, job, viewer, held.reports)
        count = WriteCount()
        counted.set(count)  # a handler is a task of its own, and so is its context
        try:
            return await self._handlers[JobKind(job["kind"])].function(job, tools)
        finally:
            # Who reads that the job has ended reads what it did, too.
            await announce(self._shared.cache, self._settings, count.wrote)

    # Leases -------------------------------------------------------------------------------------

    async def _keep_leases(self) -> None:
        lease = self._settings.lease_seconds
        next_beat = 0.0
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, lease / 3))
            claims = list(self._held)
            if not claims:
                continue
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + lease / 3 - 0.01
                async with self._forgiving("beat"):
                    await self._renew(claims)
            async with self._forgiving("beat"):
                with pymongo.timeout(lease / 3):
                    self._tell(claims, await held_states(self._database, claims))

    async def _renew(self, claims: Sequence[Claim]) -> None:
        lease = self._settings.lease_seconds
        try:
            with pymongo.timeout(lease / 6):
                await renew(self._database, claims, lease)
        except PyMongoError:
            # A long transaction of one job holds the update up: the others do not wait for it.
            with pymongo.timeout(lease / 6):
                done = await asyncio.gather(
                    *(renew(self._database, [each], lease) for each in claims),
                    return_exceptions=True,
                )
            if all(isinstance(each, BaseException) for each in done):
                raise

    def _tell(self, claims: Sequence[Claim], states: Mapping[Claim, JobState]) -> None:
        """Tell handlers what became of their jobs."""
        for each in claims:
            held, state = self._held.get(each), states.get(each)
            if held is None or not held.is_running:
                continue
            if state is None:
                held.reports.lose()
                held.interrupt()
            elif state is JobState.CANCELLING:
                held.reports.cancel()
                held.cancelling_since = held.cancelling_since or time.monotonic()
                if time.monotonic() - held.cancelling_since >= UNHEARD_SECONDS:
                    held.interrupt()

    # The end ------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Let handlers end, for a while; then hand the rest back at once."""
        if await self._wait(self._settings.drain_seconds):
            return
        for held in self._held.values():
            held.is_handed_back = True
        until = time.monotonic() + LAST_SECONDS / 2
        while time.monotonic() < until:
            for held in self._held.values():
                held.interrupt()  # again: it may be swallowed
            if await self._wait(0.2):
                return
        # Handlers that do not let themselves be ended: their jobs go on elsewhere all the same.
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS / 2):
                for held in list(self._held.values()):
                    held.reports.lose()
                    await settle(self._database, held.job, held.reports, HANDED_BACK)
        if self._held:
            log_event(
                log, logging.WARNING, "worker.abandons", worker=self.name, held=len(self._held)
            )

    async def _wait(self, seconds: float) -> bool:
        """For all attempts to end; whether they did."""
        attempts = [held.attempt for held in self._held.values() if held.attempt is not None]
        if attempts:
            await asyncio.wait(attempts, timeout=seconds)
        return not self._held


def _names(job: Row) -> Row:
    return {"job_id": job["_id"], "kind": job["kind"]}


@asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await ended(task)
