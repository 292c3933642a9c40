"""One job that moves, as a worker moves it; or as it is published, in what is compared."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import orjson
import redis.asyncio
from bson import ObjectId

from modelharbor.auth.viewer import job_principals
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.jobs.put import put_job
from modelharbor.jobs.states import change_state
from modelharbor.schema.nodes import global_id

from .plain import CHANNEL
from .watching import Stamp


class Mover(Protocol):
    """Answers when what it has done was written, and is safe."""

    @property
    def job(self) -> str:
        """Its global id."""

    async def progress(self) -> Stamp: ...

    async def become(self, state: JobState) -> Stamp: ...


class StoredJob:
    """In MongoDB: a change is acknowledged when a majority has it on disk."""

    def __init__(self, database: Database, row: Row) -> None:
        self.database, self.row_id = database, row["_id"]
        self.sequence: int = row["progress"]["sequence"]
        self.current = 0

    @property
    def job(self) -> str:
        return global_id("Job", self.row_id)

    async def progress(self) -> Stamp:
        self.current += 1
        self.sequence += 1
        sent = time.monotonic()
        await self.database.data["jobs"].update_one(
            {"_id": self.row_id},
            {"$set": {"progress.current": self.current}, "$inc": {"progress.sequence": 1}},
        )
        return Stamp(self.sequence, sent, time.monotonic(), is_state=False)

    async def become(self, state: JobState) -> Stamp:
        async def work(session: Any) -> Row | None:
            return await change_state(self.database, session, {"_id": self.row_id}, state)

        sent = time.monotonic()
        row = await self.database.transaction(work)
        acknowledged = time.monotonic()
        assert row is not None, state
        self.sequence = row["progress"]["sequence"]
        return Stamp(self.sequence, sent, acknowledged, is_state=True)


async def stored_job(database: Database, user_id: ObjectId) -> StoredJob:
    async def work(session: Any) -> Row:
        return await put_job(
            database,
            session,
            kind=JobKind.REINDEX,
            input={},
            created_by_id=user_id,
            principals=job_principals(user_id),
        )

    return StoredJob(database, await database.transaction(work))


class PublishedJob:
    """In Redis: a change is acknowledged when it was published."""

    job: Final = "bench"

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client = client
        self.sequence = self.current = 0
        self.state = JobState.QUEUED

    async def progress(self) -> Stamp:
        self.current += 1
        return await self._publish(is_state=False)

    async def become(self, state: JobState) -> Stamp:
        self.state = state
        return await self._publish(is_state=True)

    async def _publish(self, *, is_state: bool) -> Stamp:
        self.sequence += 1
        told = orjson.dumps(
            {
                "id": self.job,
                "state": self.state.value,
                "current": self.current,
                "sequence": self.sequence,
            }
        )
        sent = time.monotonic()
        async with self.client.pipeline(transaction=True) as pipe:
            pipe.set(f"{CHANNEL}:{self.job}", told)
            pipe.publish(f"{CHANNEL}:{self.job}", told)
            await pipe.execute()
        return Stamp(self.sequence, sent, time.monotonic(), is_state=is_state)


@asynccontextmanager
async def published_job(redis_url: str) -> AsyncIterator[PublishedJob]:
    async with redis.asyncio.from_url(redis_url) as client:
        made = PublishedJob(client)
        await made.become(JobState.QUEUED)
        yield made
