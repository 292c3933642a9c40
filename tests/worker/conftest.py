"""A worker within the test's own process, on its database, with handlers of the test."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import job_principals
from modelharbor.cache.client import connect_cache
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.inspection.fence import open_fence
from modelharbor.jobs.put import put_job
from modelharbor.jobs.waking import listening
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from modelharbor.worker.processes import open_processes
from modelharbor.worker.run import Worker
from modelharbor.worker.schedule import Clock, Periodic
from modelharbor.worker.tools import Handler, HandlerSpec, Shared

PATIENCE_SECONDS = 20.0  # a guard against hanging


@dataclass
class Hall:
    """Where workers of the test run."""

    database: Database
    settings: Settings

    async def put(self, kind: JobKind = JobKind.REINDEX, **given: Any) -> Row:
        values: Row = {"input": {}, "principals": job_principals(), **given}
        return await self.database.transaction(
            lambda session: put_job(self.database, session, kind=kind, **values)
        )

    async def job(self, job_id: ObjectId) -> Row:
        row: Row | None = await self.database.data["jobs"].find_one({"_id": job_id})
        assert row is not None
        return row

    async def until(self, check: Callable[[], Awaitable[bool]]) -> None:
        begun = time.monotonic()
        while not await check():
            assert time.monotonic() - begun < PATIENCE_SECONDS, [
                (row["kind"], row["state"], row["error"])
                for row in await self.database.find("jobs", {}, limit=20)
            ]
            await asyncio.sleep(0.02)

    async def reaches(self, job_id: ObjectId, *states: str) -> Row:
        async def check() -> bool:
            return (await self.job(job_id))["state"] in states

        await self.until(check)
        return await self.job(job_id)

    async def states(self, job_id: ObjectId) -> list[str]:
        """As the log of events tells them."""
        rows = await self.database.find("events", {"job_id": job_id}, sort={"_id": 1})
        return [row["job"]["state"] for row in rows]

    @asynccontextmanager
    async def working(
        self,
        handlers: Mapping[JobKind, Handler | HandlerSpec],
        concurrency: int = 8,
        schedule: Sequence[Periodic] = (),
        **changed: Any,
    ) -> AsyncIterator[Worker]:
        settings = self.settings.model_copy(update=changed)
        async with AsyncExitStack() as stack:
            cache = await stack.enter_async_context(connect_cache(settings))
            storage = await stack.enter_async_context(open_storage(settings))
            processes = await stack.enter_async_context(open_processes(1))
            fence = await stack.enter_async_context(open_fence(settings))
            waking = await stack.enter_async_context(listening(cache))
            specs = {
                kind: each if isinstance(each, HandlerSpec) else HandlerSpec(each, at_once=100)
                for kind, each in handlers.items()
            }
            worker = Worker(
                Shared(self.database, settings, storage, cache, processes, fence),
                specs,
                concurrency,
                waking,
                Clock(schedule, specs),
            )
            stop = asyncio.Event()
            task = asyncio.create_task(worker.run(stop))
            try:
                yield worker
            finally:
                stop.set()
                await asyncio.wait_for(task, PATIENCE_SECONDS)


@pytest.fixture
def hall(database: Database, settings: Settings) -> Hall:
    return Hall(database, settings.model_copy(update={"lease_seconds": 0.9, "drain_seconds": 0.3}))
