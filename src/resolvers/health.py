"""What the server depends on, asked now or within the last second."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import modelharbor
from modelharbor.cache.client import Cache
from modelharbor.db.connection import Database
from modelharbor.db.migrations import pending

ANSWER_SECONDS = 2.0  # probes give up after few seconds; an honest answer comes before
FRESH_SECONDS = 1.0  # anyone may ask, and many times in one operation
STARTED = time.monotonic()
OK, DEGRADED, UNAVAILABLE = "ok", "degraded", "unavailable"


@dataclass(frozen=True, slots=True)
class Dependency:
    """`status` is ok, unavailable, or what is to be done."""

    name: str
    status: str
    latency_ms: float | None


@dataclass(frozen=True, slots=True)
class Health:
    """`status` is ok, degraded (everything works, some of it slower) or unavailable."""

    status: str
    dependencies: list[Dependency]
    version: str
    uptime_seconds: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """A check of one database and cache, under way or done."""

    database: Database
    at: float
    check: asyncio.Task[Health]

    def serves(self, database: Database) -> bool:
        is_fresh = not self.check.done() or time.monotonic() < self.at + FRESH_SECONDS
        return is_fresh and self.database is database


_asked: WeakKeyDictionary[Cache, _Asked] = WeakKeyDictionary()


async def check_health(database: Database, cache: Cache) -> Health:
    """Takes 2 seconds at most. Whoever asks meanwhile, or within a second of it, shares the answer."""
    asked = _asked.get(cache)
    if asked is None or not asked.serves(database):
        check = asyncio.create_task(_check(database, cache))
        asked = _asked[cache] = _Asked(database, time.monotonic(), check)
    # Shielded: who gives up waiting does not end it for the others.
    found = await asyncio.shield(asked.check)
    return replace(found, uptime_seconds=time.monotonic() - STARTED)


async def _check(database: Database, cache: Cache) -> Health:
    """Asks all at once."""

    async def mongodb() -> str:
        await database.client.admin.command("ping")
        waiting = await pending(database)
        return "migrations are pending: run `modelharbor migrate`" if waiting else OK

    async def redis() -> str:
        await cache.ping()
        return OK

    found = await asyncio.gather(_ask("mongodb", mongodb), _ask("redis", redis))
    status = OK if all(one.status == OK for one in found) else DEGRADED
    if found[0].status != OK:
        status = UNAVAILABLE
    return Health(status, list(found), modelharbor.__version__, time.monotonic() - STARTED)


async def _ask(name: str, question: Callable[[], Awaitable[str]]) -> Dependency:
    start = time.perf_counter()
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            status = await question()
    except Exception:  # whatever it is, the dependency cannot be used; the client's logs say more
        return Dependency(name, UNAVAILABLE, None)
    return Dependency(name, status, round((time.perf_counter() - start) * 1000, 3))
