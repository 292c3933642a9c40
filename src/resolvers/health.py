"""What the server depends on, asked now."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import modelharbor
from modelharbor.cache.client import Cache
from modelharbor.db.connection import Database
from modelharbor.db.migrations import pending

ANSWER_SECONDS = 2.0  # probes give up after few seconds; an honest answer comes before
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


async def check_health(database: Database, cache: Cache) -> Health:
    """Asks all at once; takes 2 seconds at most."""

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
