"""What a running job tells of itself: progress, steps and lines of its log; written now and then."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from beanie import PydanticObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, PyMongoError

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.jobs import HELD, JobLogDocument, JobState, Level
from modelharbor.observability.logging import log_event

from .interruptions import AwaitChildren, JobCancelled, LeaseLost

log = logging.getLogger(__name__)
WRITE_SECONDS: Final = 0.2  # between two writes of a job's progress, at least
WINDOW_SECONDS: Final = 5.0  # that the rate is of
SAMPLE_SECONDS: Final = 0.1
MOST_LINES: Final = 1000  # of a job's log, over all its attempts
DUPLICATE_KEY: Final = 11000
LONGEST_LINE: Final = 2000  # characters; of a message of progress too


def mine(job: Row) -> Row:
    """Finds the job as long as nobody else has claimed, ended or handed it back."""
    return {
        "_id": job["_id"],
        "token": job["token"],
        "state": {"$in": [state.value for state in HELD]},
    }


class Reports:
    """Of one attempt. `report` and `log` only note; `writing` writes what was noted."""

    def __init__(self, database: Database, job: Row) -> None:
        self._database, self._job = database, job
        stored = job["progress"]
        self._current: int = stored["current"]
        self._total: int | None = stored["total"]
        self._unit: str = stored["unit"]
        self._message: str | None = stored["message"]
        self._samples: deque[tuple[float, int]] = deque()
        self._steps: list[Row] = [dict(step) for step in job["steps"]]
        self._lines: list[JobLogDocument] = []
        self._line_count: int = job["log_count"]
        self._dirty = asyncio.Event()
        self._writing = asyncio.Lock()
        self.is_cancelled = False
        self.is_lost = False

    def report(
        self,
        current: int,
        total: int | None = None,
        *,
        unit: str | None = None,
        message: str | None = None,
    ) -> None:
        if current >= self._current:
            self._current = current
            self._sample()
        self._total = self._total if total is None else total
        self._unit = self._unit if unit is None else unit
        self._message = self._message if message is None else message[:LONGEST_LINE]
        self._dirty.set()
        self.check()

    def check(self) -> None:
        if self.is_lost:
            raise LeaseLost
        if self.is_cancelled:
            raise JobCancelled

    def lose(self) -> None:
        self.is_lost = True

    def cancel(self) -> None:
        self.is_cancelled = True

    def log(self, message: str, level: Level) -> None:
        if self._line_count >= MOST_LINES:
            return
        self._line_count += 1
        if self._line_count == MOST_LINES:
            message, level = "What follows is not kept: the log is full.", Level.WARNING
        self._lines.append(
            JobLogDocument(
                job_id=PydanticObjectId(self._job["_id"]),
                level=level,
                message=message[:LONGEST_LINE],
            )
        )
        self._dirty.set()

    @property
    def done_steps(self) -> frozenset[str]:
        done = JobState.SUCCEEDED.value
        return frozenset(step["name"] for step in self._steps if step["state"] == done)

    @asynccontextmanager
    async def step(self, name: str) -> AsyncIterator[None]:
        self.check()
        step: Row = {
            "name": name,
            "state": JobState.RUNNING.value,
            "started_at": utc_now(),
            "finished_at": None,
        }
        self._steps = [*(each for each in self._steps if each["name"] != name), step]
        await self.write()
        self.check()
        try:
            yield
        except BaseException as error:
            self._end_step(step, _state_after(error))
            raise  # how the job ends is written soon, with the step
        self._end_step(step, JobState.SUCCEEDED)
        await self.write()

    def _end_step(self, step: Row, state: JobState) -> None:
        step["state"] = state.value
        step["finished_at"] = None if state is JobState.QUEUED else utc_now()
        self._dirty.set()

    def standing(self) -> Row:
        """Stored names with the newest values."""
        return {
            "progress.current": self._current,
            "progress.total": self._total,
            "progress.unit": self._unit,
            "progress.message": self._message,
            "progress.rate": self._rate(),
            "log_count": self._line_count,
            "steps": [dict(step) for step in self._steps],
        }

    async def save_lines(self, session: AsyncClientSession | None = None) -> None:
        """Lines that are not stored yet; within a session they stay, for it may be run again."""
        lines = list(self._lines)
        if not lines:
            return
        if session is not None:
            # Some may be stored, by a write whose answer was lost: a transaction survives no such error.
            found = self._database.data["job_logs"].find(
                {"_id": {"$in": [line.id for line in lines]}},
                {"_id": 1},
                session=session,
                max_time_ms=self._database.query_timeout_ms,
            )
            there = {row["_id"] for row in await found.to_list()}
            lines = [line for line in lines if line.id not in there]
            if lines:
                await JobLogDocument.insert_many(lines, session=session)
            return
        try:
            await JobLogDocument.insert_many(lines, ordered=False)
        except BulkWriteError as error:
            # An answer that was lost, and the lines are there: then this is all there is to tell.
            if any(e["code"] != DUPLICATE_KEY for e in error.details["writeErrors"]):
                raise
        self._lines = self._lines[len(lines) :]

    async def write(self) -> None:
        """Now, all that was noted. Finds out whether the job was cancelled or lost."""
        async with self._writing:
            self._dirty.clear()
            row: Row | None = await self._database.data["jobs"].find_one_and_update(
                mine(self._job),
                {
                    "$set": {**self.standing(), "progress.updated_at": utc_now()},
                    "$inc": {"progress.sequence": 1},
                },
                projection={"state": 1},
                return_document=ReturnDocument.AFTER,
            )
            if row is None:
                self.lose()
            elif row["state"] == JobState.CANCELLING.value:
                self.cancel()
            await self.save_lines()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Meanwhile it is written what is told, at its pace. What is told last the end writes."""
        task = asyncio.create_task(self._write_on())
        try:
            yield
        finally:
            async with self._writing:  # not in the middle of a write
                task.cancel()
            await ended(task)

    async def _write_on(self) -> None:
        while True:
            await self._dirty.wait()
            try:
                await self.write()
            except PyMongoError as error:
                log_event(
                    log, logging.WARNING, "job.report_failed", job_id=self._job["_id"], error=error
                )
                self._dirty.set()
            await asyncio.sleep(WRITE_SECONDS)

    def _sample(self) -> None:
        now = time.monotonic()
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_SECONDS:
            self._samples.append((now, self._current))
            while now - self._samples[0][0] > WINDOW_SECONDS:
                self._samples.popleft()

    def _rate(self) -> float | None:
        """In a second, over the window; None before there is anything to compare."""
        if not self._samples:
            return None
        first, before = self._samples[0]
        passed = time.monotonic() - first
        if passed < SAMPLE_SECONDS:
            return None
        return (self._current - before) / passed


def _state_after(error: BaseException) -> JobState:
    if isinstance(error, AwaitChildren):
        return JobState.QUEUED
    cancelled = isinstance(error, JobCancelled | asyncio.CancelledError)
    return JobState.CANCELLED if cancelled else JobState.FAILED


def literal(values: dict[str, Any]) -> Row:
    """For a stage `$set`: values as they are, also where they look like an expression."""
    return {name: {"$literal": value} for name, value in values.items()}
