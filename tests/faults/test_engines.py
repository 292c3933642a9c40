"""Streams and requests go on without Redis, and streams and writes through the end of MongoDB's primary."""

import asyncio
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import pytest
from pymongo.errors import PyMongoError

from modelharbor.db.connection import connect
from modelharbor.db.migrations import migrate
from modelharbor.errors import HarborError
from modelharbor.settings import Settings
from tests.http.processes import free_port
from tests.live.serving import Served, serving

from .engines import redis_server, replica_set
from .figures import is_long, record
from .watching import Counts, Moved, Watcher, moved

pytestmark = pytest.mark.anyio
GONE_SECONDS = 10.0 if is_long() else 1.5
WRITES = 5000 if is_long() else 500  # acknowledged
WRITERS = 8
GUARD_SECONDS = 300.0
# Looks into Redis for an answer, and puts one there.
FACETS = "{ models(filter: {}) { facets(fields: [LIBRARY], limit: 10) { buckets { count } } } }"


@dataclass
class Requests:
    """Of one who asks again and again."""

    seconds: list[float] = field(default_factory=list)
    errors: int = 0

    async def go_on(self, served: Served, seconds: float) -> list[float]:
        """How long each took."""
        begin, until = len(self.seconds), time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            while time.monotonic() < until:
                start = time.perf_counter()
                answer = (await client.post(served.http, json={"query": FACETS})).json()
                self.seconds.append(time.perf_counter() - start)
                self.errors += "errors" in answer
                await asyncio.sleep(0.01)
        return self.seconds[begin:]


@asynccontextmanager
async def streaming(served: Served) -> AsyncIterator[tuple[Moved, Watcher]]:
    """A job that moves and one who watches it, until the block ends: then it ends, and is told so."""
    chance, is_over = random.Random(4), False
    job = await moved(served)
    watcher = Watcher(served, job.row)

    async def move() -> None:
        while not is_over:
            await surely(job, lambda: job.step(chance))
            await asyncio.sleep(chance.uniform(0.0, 0.05))
        while job.goes_on:
            await surely(job, lambda: job.end(chance))

    async with asyncio.timeout(GUARD_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(watcher.connected())
        tasks.create_task(move())
        yield job, watcher
        is_over = True
    assert watcher.is_complete


async def surely(job: Moved, work: Callable[[], Awaitable[None]]) -> None:
    """Where MongoDB does not say what came of it, the job tells."""
    try:
        await work()
    except (PyMongoError, HarborError):
        await job.look()


async def test_redis_is_killed_and_hangs(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    changed = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0"})
    requests = Requests()
    async with serving(changed) as served, streaming(served) as (job, watcher):
        async with redis_server(tmp_path, port) as first:
            before = await requests.go_on(served, 1.0)
            first.process.kill()
            first.process.wait()
            killed = await requests.go_on(served, GONE_SECONDS)
        async with redis_server(tmp_path, port) as second:
            await requests.go_on(served, 1.0)
            second.process.send_signal(signal.SIGSTOP)
            hanging = await requests.go_on(served, GONE_SECONDS)
            second.process.send_signal(signal.SIGCONT)
            await requests.go_on(served, 0.5)
    counts = watcher.compare([job])
    usual = statistics.median(before)
    record(
        f"streams and requests while redis is killed, or hangs, for {GONE_SECONDS:g} s",
        {
            "request_errors": 0,
            "missed": 0,
            "repeated": 0,
            "backwards": 0,
            "added_ms_killed": "<= 50",
            "added_ms_hanging": "<= 50",
        },
        requests=len(requests.seconds),
        request_errors=requests.errors,
        **asdict(counts),
        changes_of_state=len(job.states),
        added_ms_killed=(statistics.median(killed) - usual) * 1000,
        added_ms_hanging=(statistics.median(hanging) - usual) * 1000,
        longest_request_ms=max(requests.seconds) * 1000,
    )
    assert requests.errors == 0
    assert counts == Counts()


@dataclass
class Writing:
    """Many write at once; what MongoDB acknowledged is to stay."""

    served: Served
    acknowledged: list[int] = field(default_factory=list)
    failed: int = 0
    next: int = 0
    longest: float = 0.0  # seconds without an acknowledgement
    last: float = field(default_factory=time.monotonic)

    async def until(self, count: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WRITERS):
                tasks.create_task(self._write(count))

    async def _write(self, count: int) -> None:
        while len(self.acknowledged) < count:
            self.next += 1
            number = self.next
            try:
                await self.served.database.data["written"].insert_one({"_id": number})
            except PyMongoError:
                self.failed += 1
                await asyncio.sleep(0.05)
                continue
            self.acknowledged.append(number)
            now = time.monotonic()
            self.longest, self.last = max(self.longest, now - self.last), now

    async def lost(self) -> int:
        rows = await self.served.database.find("written", {})
        return len(set(self.acknowledged) - {row["_id"] for row in rows})


async def test_the_primary_of_mongodb_is_killed(settings: Settings, tmp_path: Path) -> None:
    async with replica_set(tmp_path) as members:
        changed = Settings(
            **{
                **settings.model_dump(include=settings.model_fields_set),
                "mongo_url": members.url,
                "mongo_database": "faults",
            }
        )
        async with connect(changed) as database:
            await migrate(database)
        async with serving(changed) as served:
            async with streaming(served) as (job, watcher):
                writing = Writing(served)
                await writing.until(WRITES // 2)
                writers = asyncio.create_task(writing.until(WRITES))
                members.kill(await members.primary())
                await writers
                heard = watcher.events
                while watcher.events < heard + 5:  # the stream goes on, too
                    await asyncio.sleep(0.05)
            await job.look_back()
            lost, counts = await writing.lost(), watcher.compare([job])
    record(
        "kill -9 the mongod primary of a 3-node set under writes",
        {"acknowledged": ">= 5000", "lost": 0, "missed": 0, "repeated": 0, "backwards": 0},
        acknowledged=len(writing.acknowledged),
        lost=lost,
        refused=writing.failed,
        seconds_without_writes=writing.longest,
        **asdict(counts),
        changes_of_state=len(job.states),
    )
    assert lost == 0
    assert counts == Counts()
