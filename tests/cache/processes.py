"""What two API processes do with what is kept, without the API: each has its own connections."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.cache.client import Cache, connect_cache
from modelharbor.cache.freshness import Freshness, open_freshness
from modelharbor.cache.tags import entity
from modelharbor.db.connection import Database, connect
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.settings import Settings

GUARD_SECONDS = 30.0


async def until(found: Callable[[], Awaitable[bool]] | Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while True:
            is_so = found()
            if is_so if isinstance(is_so, bool) else await is_so:
                return
            await asyncio.sleep(0.005)


@dataclass(eq=False)
class Register:
    """A document with a number that writes raise."""

    id: ObjectId = field(default_factory=ObjectId)
    written: int = 0
    acknowledged: int = 0

    async def insert(self, database: Database) -> None:
        await database.data["versions"].insert_one(
            {"_id": self.id, "model_id": self.id, "number": 0}
        )


@dataclass(eq=False)
class Process:
    database: Database
    cache: Cache
    freshness: Freshness
    kept: dict[ObjectId, tuple[int, int]] = field(default_factory=dict)
    """Position and number by register."""
    hits: int = 0
    misses: int = 0

    async def usable(self) -> None:
        try:
            await until(self.freshness.ready)
        except TimeoutError:
            it = self.freshness
            raise AssertionError(
                f"not usable: position {it._told_position:x} of {it._acknowledged:x}, passed {it._passed},"
                f" server {it._has_server}, heard {time.monotonic() - it._heard_at:.1f} s ago, suspended for"
                f" {it._suspended_until - time.monotonic():.1f} s, Redis away {it.rounds.is_open}"
            ) from None

    async def commit(self, register: Register) -> tuple[int, int | None]:
        """A write that is not acknowledged yet: the number, and its time."""
        register.written += 1
        number, count = register.written, CommandCount()
        token = counted.set(count)
        try:
            await self.database.data["versions"].update_one(
                {"_id": register.id}, {"$max": {"number": number}}
            )
        finally:
            counted.reset(token)
        return number, count.wrote

    async def write(self, register: Register) -> None:
        number, wrote = await self.commit(register)
        await self.freshness.acknowledge(wrote)
        register.acknowledged = max(register.acknowledged, number)

    async def read(self, register: Register) -> int:
        """As an answer is read: what is kept where that may be used, else from MongoDB, and kept."""
        tags = [entity("versions", register.id)]
        is_usable = await self.freshness.ready()
        position, number = self.kept.get(register.id, (0, 0))
        if is_usable and self.freshness.is_current(position, tags):
            self.hits += 1
            return number
        self.misses += 1
        position = self.freshness.position
        [row] = await self.database.find("versions", {"_id": register.id})
        if self.freshness.is_current(position, tags):
            self.kept[register.id] = (position, row["number"])
        return int(row["number"])

    async def check(self, register: Register) -> None:
        """Read, and find no less than what was acknowledged before."""
        least = register.acknowledged
        found = await self.read(register)
        assert found >= least, f"{found} after {least} was acknowledged"

    async def transact(self, work: Callable[[AsyncClientSession], Awaitable[Any]]) -> int | None:
        count = CommandCount()
        token = counted.set(count)
        try:
            await self.database.transaction(work)
        finally:
            counted.reset(token)
        return count.wrote


@asynccontextmanager
async def process(settings: Settings) -> AsyncIterator[Process]:
    async with (
        connect(settings) as database,
        connect_cache(settings) as cache,
        open_freshness(database, cache, settings) as freshness,
    ):
        yield Process(database, cache, freshness)


@asynccontextmanager
async def processes(first: Settings, second: Settings) -> AsyncIterator[tuple[Process, Process]]:
    async with process(first) as one, process(second) as other:
        await one.usable()
        await other.usable()
        yield one, other
