"""One mix of reads and writes against one server, phase by phase, and what happens to it meanwhile."""

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson

from bench.measure import LoadError, cpu_seconds
from bench.serving import HOST, Serving

from .counting import Counts
from .drawing import Catalogue
from .people import People
from .users import Crowd, Phase, to_line

LINE_BYTES: Final = 2**20  # of a report, far above what one holds
REPORT_SECONDS: Final = 60.0  # after the last phase

Act = Callable[[], Awaitable[None]]
Count = Callable[[], Awaitable[Counts]]


@dataclass(frozen=True, slots=True)
class Figures:
    count: int
    p50: float  # milliseconds, as all of them
    p95: float
    p99: float
    longest: float


@dataclass(frozen=True, slots=True)
class Mixed:
    """What came of the requests that were begun in one phase."""

    name: str
    seconds: float
    all: Figures
    reads: Figures
    writes: Figures
    errors: int
    limited: int
    stale: int
    hits: int | None
    """Reads whose answer had been kept; None where nobody counts them."""
    joined: int | None
    """Reads that waited for an answer that another one was making."""
    cpu_micros: float  # of the server, each request
    users_share: float  # of a core, by the process of the users
    mongo_share: float | None  # of a core, by our own mongod

    @property
    def hit_ratio(self) -> float | None:
        return _ratio(self.hits, self.reads.count)

    @property
    def joined_ratio(self) -> float | None:
        return _ratio(self.joined, self.reads.count)

    @property
    def per_second(self) -> float:
        return self.all.count / self.seconds

    @property
    def right_per_second(self) -> float:
        """Without errors and stale answers."""
        return (self.all.count - self.errors - self.stale) / self.seconds


def _ratio(part: int | None, whole: int) -> float | None:
    return part / whole if part is not None and whole else None


@dataclass(frozen=True, slots=True)
class Mark:
    """Between two phases."""

    counts: Counts | None
    server: float  # seconds of CPU, as the next two
    users: float
    mongo: float | None


def crowd_of(
    served: Serving,
    people: People,
    phases: Sequence[Phase],
    *,
    rate: float | None,
    signed_in: int = 0,
) -> Crowd:
    return Crowd(
        HOST,
        int(served.url.rpartition(":")[2]),
        people.users,
        signed_in,
        people.writer,
        rate,
        tuple(phases),
        int(time.time()) * 1000,  # above the numbers of all earlier runs
    )


async def mix(
    served: Serving,
    crowd: Crowd,
    catalogue: Catalogue,
    *,
    count: Count | None = None,
    acts: Mapping[str, Act] | None = None,
) -> list[Mixed]:
    """`count`: the server's own count of what came from its cache; without it, the users look at what
    its answers say. `acts`: what is done when a phase begins, by its name. LoadError where anything
    was limited: that would be another measurement."""
    async with _users() as users:
        assert users.stdin is not None
        users.stdin.write(to_line(crowd, catalogue))
        await users.stdin.drain()
        at = (await _read(users, REPORT_SECONDS))["begins"]
        marks = []
        for phase in crowd.phases:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            marks.append(await _mark(served, users, count))
            if acts is not None and phase.name in acts:
                await acts[phase.name]()
            at += phase.seconds
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        marks.append(await _mark(served, users, count))
        report = await _read(users, REPORT_SECONDS)
    for problem in report["problems"]:
        print(f"  {problem}", file=sys.stderr)
    found = [
        mixed(phase, report["phases"][phase.name], before, after)
        for phase, before, after in zip(crowd.phases, marks, marks[1:], strict=False)
    ]
    limited = sum(each.limited for each in found)
    if limited:
        raise LoadError(f"{limited} requests were limited: raise the budgets, or lower the rate")
    return found


def mixed(phase: Phase, told: dict[str, Any], before: Mark, after: Mark) -> Mixed:
    hits: int | None = told["hits"]
    joined = None
    if before.counts is not None and after.counts is not None:
        since = after.counts.since(before.counts)
        hits, joined = since.hits, since.joined
    everything = Figures(**told["all"])
    done = max(1, everything.count)
    return Mixed(
        name=phase.name,
        seconds=phase.seconds,
        all=everything,
        reads=Figures(**told["reads"]),
        writes=Figures(**told["writes"]),
        errors=told["errors"],
        limited=told["limited"],
        stale=told["stale"],
        hits=hits,
        joined=joined,
        cpu_micros=(after.server - before.server) / done * 1e6,
        users_share=(after.users - before.users) / phase.seconds,
        mongo_share=(
            (after.mongo - before.mongo) / phase.seconds
            if after.mongo is not None and before.mongo is not None
            else None
        ),
    )


async def _mark(served: Serving, users: Process, count: Count | None) -> Mark:
    mongo = served.mongo_pid
    return Mark(
        None if count is None else await count(),
        cpu_seconds(served.pid),
        cpu_seconds(users.pid),
        None if mongo is None else cpu_seconds(mongo),
    )


@asynccontextmanager
async def _users() -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.cache.users"), stdin=PIPE, stdout=PIPE, limit=LINE_BYTES
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _read(users: Process, seconds: float) -> dict[str, Any]:
    assert users.stdout is not None
    try:
        async with asyncio.timeout(seconds):
            line = await users.stdout.readline()
    except TimeoutError:
        raise LoadError("the process with the users says nothing") from None
    if not line:
        raise LoadError("the process with the users has ended")
    found: dict[str, Any] = orjson.loads(line)
    return found
