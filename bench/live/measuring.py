"""One job, many subscribers, one server: what it costs, and what they get."""

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson

from bench.measure import LoadError, cpu_seconds, resident_mebibytes
from bench.serving import HOST, Serving
from modelharbor.db.jobs import JobState

from .moving import Mover
from .watching import RATE, Stamp

WARM: Final = 20  # subscribers before those that are measured
CHANGES: Final = 10  # of state, after the progress
BACK: Final = 1000  # subscribers that are cut off and come back
WAIT_SECONDS: Final = 60.0
REST_SECONDS: Final = 30.0
REST_SHARE: Final = 0.15  # of a core: pings go on while nothing happens


@dataclass(frozen=True, slots=True)
class Measured:
    subscribers: int
    kilobytes: float  # of the server, resident, each connection
    connect_seconds: float  # of all
    idle_share: float  # of a core, while nothing is told
    delivered: int  # events, while the job moved
    p50: float  # milliseconds from the acknowledged write to the receipt, as the next two
    p99: float
    longest: float
    sent_p50: float  # milliseconds from when the write was sent
    sent_p99: float
    missed: int  # changes of state
    repeated: int  # events
    backwards: int  # events
    cpu_micros: float  # of the server, each event
    back: int  # subscribers that were cut off and came back
    back_cpu_seconds: float  # of the server, for them
    missed_away: int  # changes of state, of those that came back

    @property
    def back_cpu_of_thousand(self) -> float:
        return self.back_cpu_seconds / self.back * 1000


class Clients:
    """The process with the subscribers."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def ask(self, do: str, **given: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(orjson.dumps({"do": do, **given}) + b"\n")
        await self.process.stdin.drain()
        line = await self.process.stdout.readline()
        if not line:
            raise LoadError("the process with the subscribers has ended")
        answer: dict[str, Any] = orjson.loads(line)
        if "failed" in answer:
            raise LoadError(answer["failed"])
        return answer


@asynccontextmanager
async def clients() -> AsyncIterator[Clients]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.live.clients"), stdin=PIPE, stdout=PIPE
    )
    try:
        yield Clients(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def measure(
    served: Serving,
    mover: Mover,
    document: str,
    token: str | None,
    subscribers: int,
    seconds: int,
    pace: float,
) -> Measured:
    """Everything about one server with so many subscribers, `pace` changes a second. The job is new
    and ends with it."""
    stamps: list[Stamp] = []
    variables: dict[str, Any] = {"id": mover.job}
    if "$rate" in document:
        variables |= {"rate": RATE, "after": None}
    begin = {
        "host": HOST,
        "port": int(served.url.rpartition(":")[2]),
        "token": token,
        "document": document,
        "variables": variables,
    }
    await mover.become(JobState.RUNNING)
    async with clients() as warm:
        await warm.ask("begin", **begin)
        await warm.ask("connect", count=WARM)
        stamps.append(await mover.progress())
        await warm.ask("wait", sequence=stamps[-1].sequence, seconds=WAIT_SECONDS)
    stamps.clear()
    async with clients() as crowd:
        await _rest(served)
        before = resident_mebibytes(served.pid)
        await crowd.ask("begin", **begin)
        connected = await crowd.ask("connect", count=subscribers)
        idle = await _rest(served)
        kilobytes = (resident_mebibytes(served.pid) - before) * 1024 / subscribers

        heard = (await crowd.ask("wait", sequence=0, seconds=0))["delivered"]
        cpu = cpu_seconds(served.pid)
        await _move(mover, stamps, seconds, pace)
        last = stamps[-1].sequence
        waited = await crowd.ask("wait", sequence=last, seconds=WAIT_SECONDS)
        cpu = cpu_seconds(served.pid) - cpu
        delivered = waited["delivered"] - heard
        told = await crowd.ask("report", stamps=_plain(stamps))

        back = min(BACK, subscribers)
        await crowd.ask("cut", count=back)
        await _rest(served)
        away = JobState.RETRYING, JobState.RUNNING
        stamps += [await mover.become(state) for state in away]
        await _rest(served)
        back_cpu = cpu_seconds(served.pid)
        await crowd.ask("come_back", count=back)
        await crowd.ask("wait", sequence=stamps[-1].sequence, seconds=WAIT_SECONDS)
        back_cpu = cpu_seconds(served.pid) - back_cpu
        stamps.append(await mover.become(JobState.SUCCEEDED))
        await crowd.ask("wait", sequence=stamps[-1].sequence, seconds=WAIT_SECONDS)
        whole = await crowd.ask("report", stamps=_plain(stamps))
    return Measured(
        subscribers=subscribers,
        kilobytes=kilobytes,
        connect_seconds=connected["seconds"],
        idle_share=idle,
        delivered=delivered,
        p50=told["p50"] * 1000,
        p99=told["p99"] * 1000,
        longest=told["longest"] * 1000,
        sent_p50=told["sent_p50"] * 1000,
        sent_p99=told["sent_p99"] * 1000,
        missed=told["missed"],
        repeated=whole["repeated"],
        backwards=whole["backwards"],
        cpu_micros=cpu / delivered * 1e6,
        back=back,
        back_cpu_seconds=back_cpu,
        missed_away=whole["missed"] - told["missed"],
    )


async def _move(mover: Mover, stamps: list[Stamp], seconds: int, pace: float) -> None:
    """Progress for some seconds, then changes of state, all at the same pace."""
    start = time.monotonic()
    steps: list[JobState | None] = [None] * round(pace * seconds)
    steps += [JobState.RETRYING, JobState.RUNNING] * (CHANGES // 2)
    for number, state in enumerate(steps):
        await asyncio.sleep(max(0.0, start + number / pace - time.monotonic()))
        stamps.append(await (mover.progress() if state is None else mover.become(state)))


def _plain(stamps: list[Stamp]) -> list[list[Any]]:
    return [[each.sequence, each.sent, each.acknowledged, each.is_state] for each in stamps]


async def _rest(served: Serving) -> float:
    """Once the server has done with what was; the share of a core that it then takes."""
    until = time.monotonic() + REST_SECONDS
    while True:
        before = cpu_seconds(served.pid)
        await asyncio.sleep(1)
        share = cpu_seconds(served.pid) - before
        if share <= REST_SHARE or time.monotonic() > until:
            return share
