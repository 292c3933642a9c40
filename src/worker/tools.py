"""What a handler gets beside its job, and what a handler is.

A handler is `async def (job: Row, tools: Tools) -> Row | None`: it answers the job's result. It may
be started again from its beginning at any time, so what it does twice must come to the same.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.requesters import requester_of
from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, JobKind, JobState, Level
from modelharbor.errors import ErrorCode, Refused
from modelharbor.inspection.fence import Fence
from modelharbor.jobs.put import adopt, put_again, put_job
from modelharbor.jobs.waking import wake
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore

from .claims import leased
from .interruptions import AwaitChildren, JobCancelled, LeaseLost
from .processes import Processes
from .reports import Reports, mine

T = TypeVar("T")
MOST_CHILDREN: Final = 10_000  # of one job, that `await_children` answers
CHILDREN_AT_ONCE: Final = 50  # put in one transaction
ADOPTED_AT_ONCE: Final = 1000

__all__ = ["Handler", "HandlerSpec", "JobCancelled", "LeaseLost", "Tools"]


@dataclass(frozen=True, slots=True)
class Shared:
    """What a worker has open for all its jobs."""

    database: Database
    settings: Settings
    storage: BlobStore
    cache: Cache
    processes: Processes
    fence: Fence


class Tools:
    """For one attempt at one job."""

    job: Row
    """As it was when it was claimed."""
    database: Database
    """Its `transaction` begins with a check that the job is still ours, and collides with whoever
    takes it over: LeaseLost then. Writes outside of transactions are not held back."""
    settings: Settings
    storage: BlobStore
    cache: Cache
    fence: Fence
    """Where files are inspected."""

    def __init__(self, shared: Shared, job: Row, viewer: Viewer | None, reports: Reports) -> None:
        self.job = job
        self.settings, self.storage, self.cache = shared.settings, shared.storage, shared.cache
        self.fence = shared.fence
        self.database = replace(shared.database, fence=self._fence)
        self._viewer, self._reports, self._processes = viewer, reports, shared.processes

    @property
    def viewer(self) -> Viewer:
        """Who asked for the job: with the memberships that they have now and the scopes of the token
        that they had then. Refused when they are gone, or nobody asked."""
        if self._viewer is None:
            raise _gone()
        return self._viewer

    async def viewer_now(self) -> Viewer:
        """The same, with what they may at this moment: for work that takes long."""
        found = await requester_of(self.database, self.job)
        if found is None:
            raise _gone()
        return found

    def report(
        self,
        current: int,
        total: int | None = None,
        *,
        unit: str | None = None,
        message: str | None = None,
    ) -> None:
        """How far the work is; None leaves a value as it was, a smaller `current` is passed over.

        Cheap: the newest is written five times a second, and the last one always. Raises
        JobCancelled and LeaseLost, so call it often; let both pass.
        """
        self._reports.report(current, total, unit=unit, message=message)

    def check(self) -> None:
        """Raises JobCancelled and LeaseLost, as `report` does, where there is no progress to tell."""
        self._reports.check()

    def log(self, message: str, level: Level = Level.INFO) -> None:
        """A line for who looks at the job: no secrets. The first 1,000 of a job are kept."""
        self._reports.log(message, level)

    @asynccontextmanager
    async def step(self, name: str) -> AsyncIterator[None]:
        """A named part of the work; a later one of the same name takes its place."""
        async with self._reports.step(name):
            yield

    @property
    def done_steps(self) -> frozenset[str]:
        """Names of the steps that succeeded, in this attempt or an earlier one."""
        return self._reports.done_steps

    async def apart(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what needs the CPU for long in another process. The function is one of a module, all
        that goes in and out can be pickled. Meanwhile the job's lease goes on."""
        self._reports.check()
        return await self._processes.run(function, *arguments)

    async def put_child(
        self,
        kind: JobKind,
        input: Row,
        *,
        key: str,
        subject: Row | None = None,
        priority: int | None = None,
        max_attempts: int = 5,
    ) -> Row:
        """Another job, for the same person. The same `key` again gives the same child again, queued
        anew where it did not succeed before this job was retried. None is put once the job was
        cancelled: JobCancelled then."""
        [child] = await self.put_children(
            kind, {key: input}, subject=subject, priority=priority, max_attempts=max_attempts
        )
        return child

    async def put_children(
        self,
        kind: JobKind,
        inputs: Mapping[str, Row],
        *,
        subject: Row | None = None,
        priority: int | None = None,
        max_attempts: int = 5,
    ) -> list[Row]:
        """`put_child` for each key with its input, a few in each transaction."""
        job, keys = self.job, list(inputs)
        children: list[Row] = []

        async def put(session: AsyncClientSession, key: str) -> Row:
            child = await put_job(
                self.database,
                session,
                kind=kind,
                input=inputs[key],
                created_by_id=job["created_by_id"],
                scopes=job["scopes"],
                principals=job["principals"],
                subject=job["subject"] if subject is None else subject,
                parent_id=job["_id"],
                idempotency_key=f"{job['_id']}:{key}",
                priority=job["priority"] if priority is None else priority,
                max_attempts=max_attempts,
            )
            if (
                JobState(child["state"]) in ENDED - {JobState.SUCCEEDED}
                and child["finished_at"] <= job["started_at"]
            ):
                return await put_again(self.database, session, child)
            return child

        for start in range(0, len(keys), CHILDREN_AT_ONCE):
            batch = keys[start : start + CHILDREN_AT_ONCE]

            async def work(session: AsyncClientSession, batch: Sequence[str] = batch) -> list[Row]:
                await self._refuse_cancelled(session)
                return [await put(session, key) for key in batch]

            children += await self.database.transaction(work)
        await wake(self.cache)
        return children

    async def adopt(self, jobs: Sequence[ObjectId]) -> int:
        """Jobs that were put for themselves become children of this one, as far as they have not
        ended and are no other's; answers how many. JobCancelled as for `put_child`."""
        adopted = 0
        for start in range(0, len(jobs), ADOPTED_AT_ONCE):
            batch = jobs[start : start + ADOPTED_AT_ONCE]

            async def work(session: AsyncClientSession, batch: Sequence[ObjectId] = batch) -> int:
                await self._refuse_cancelled(session)
                return await adopt(self.database, session, self.job["_id"], batch)

            adopted += await self.database.transaction(work)
        return adopted

    async def _refuse_cancelled(self, session: AsyncClientSession) -> None:
        # The fence has touched the job: who cancels it comes before, or after all of this and
        # then finds the children.
        parent = await self.database.data["jobs"].find_one(
            {"_id": self.job["_id"]},
            {"state": 1},
            session=session,
            max_time_ms=self.database.query_timeout_ms,
        )
        if parent is None or parent["state"] != JobState.RUNNING.value:
            self._reports.cancel()
            raise JobCancelled

    async def until_children(self) -> None:
        """Comes back once all children have ended. Before that this attempt is over: the handler is
        started from its beginning when they have, and comes here again."""
        job = await self.database.find(
            "jobs", {"_id": self.job["_id"]}, projection={"open_children": 1}, limit=1
        )
        if job and job[0]["open_children"]:
            raise AwaitChildren

    async def await_children(self) -> list[Row]:
        """`until_children`, and then all of them."""
        await self.until_children()
        return await self.database.find(
            "jobs", {"parent_id": self.job["_id"]}, sort={"_id": 1}, limit=MOST_CHILDREN
        )

    @asynccontextmanager
    async def _fence(self, session: AsyncClientSession) -> AsyncIterator[None]:
        """Touches the job too, so that whoever takes it over meanwhile collides with us. That renews
        its lease, since a heartbeat has to wait for the transaction; again at the end of a long one."""
        began = time.monotonic()
        await self._touch(session)
        yield
        if time.monotonic() - began > self.settings.lease_seconds / 3:
            await self._touch(session)

    async def _touch(self, session: AsyncClientSession) -> None:
        done = await self.database.data["jobs"].update_one(
            mine(self.job),
            [
                {
                    "$set": {
                        **leased(self.settings.lease_seconds),
                        "touched": {"$add": ["$touched", 1]},
                    }
                }
            ],
            session=session,
        )
        if done.matched_count == 0:
            self._reports.lose()
            raise LeaseLost


def _gone() -> Refused:
    return Refused(ErrorCode.FORBIDDEN, "Who asked for this is not here any more.")


Handler: TypeAlias = Callable[[Row, Tools], Awaitable[Row | None]]


@dataclass(frozen=True, slots=True)
class HandlerSpec:
    """`at_once`: jobs of this kind that one worker process runs at a time."""

    function: Handler
    at_once: int = 4
