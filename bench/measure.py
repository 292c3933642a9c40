"""One measurement: wrk against the server for some seconds, and what the server used meanwhile."""

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pymongo

from .operation import Operation
from .serving import Serving

SCRIPT: Final = Path(__file__).with_name("post.lua")
WARM_SECONDS: Final = 1
SETTLE_SECONDS: Final = 60  # an operation has 10
ROUNDS: Final = 2  # answers that each connection should have had, or the unfinished ones distort
LONGER: Final = 2
TICKS: Final = os.sysconf("SC_CLK_TCK")


class LoadError(Exception):
    """wrk could not do its part."""


@dataclass(frozen=True, slots=True)
class Measured:
    connections: int
    requests_per_second: float
    p50: float  # milliseconds, as all of them
    p95: float
    p99: float
    refused: int  # status 4xx or 5xx
    broken: int  # socket errors, and answers later than wrk waits
    wrong: int  # answers with GraphQL errors
    cpu_micros: float | None  # of the server, each request; None without a request
    mongo_cpu_micros: float | None  # of our own mongod, each request
    resident_mebibytes: float  # of the server, afterwards

    @property
    def errors(self) -> int:
        return self.refused + self.broken + self.wrong


def family(pid: int) -> list[int]:
    """A process and those that it started, and they."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads and processes, to a hundredth."""
    ticks = 0
    for member in family(pid):
        stat = Path(f"/proc/{member}/stat").read_text()
        fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold anything
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def resident_mebibytes(pid: int) -> float:
    """Of a process with its processes."""
    kibibytes = [
        int(line.split()[1])
        for member in family(pid)
        for line in Path(f"/proc/{member}/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    ]
    if not kibibytes:
        raise LoadError(f"process {pid} has no memory: it ended")
    return sum(kibibytes) / 1024


def settle(served: Serving) -> None:
    """Wait until the server and its database have done with what an earlier load left behind."""
    until = time.monotonic() + SETTLE_SECONDS
    database = served.filled.settings.mongo_database
    with pymongo.MongoClient[dict[str, object]](served.mongo_url) as client:
        while time.monotonic() < until:
            before = cpu_seconds(served.pid)
            time.sleep(0.5)
            is_quiet = cpu_seconds(served.pid) - before <= 0.02
            # Those who follow the log of changes always wait for the next one.
            busy = {
                "active": True,
                "ns": {"$regex": f"^{database}"},
                "cursor.awaitData": {"$ne": True},
            }
            running = client.admin.aggregate([{"$currentOp": {}}, {"$match": busy}])
            if is_quiet and not list(running):
                return
    raise LoadError(f"the server does not come to rest within {SETTLE_SECONDS} s")


def yardstick() -> float:
    """Milliseconds of CPU in which Python adds up a million numbers here, with what else goes on."""
    start, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number
    return (time.process_time() - start) * 1000


def measure(served: Serving, operation: Operation, connections: int, seconds: int) -> Measured:
    """A short run to warm up, then the one that counts."""
    pids = (served.pid, served.mongo_pid)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as bodies:
        bodies.writelines(graphql_lines(operation.bodies()))
        bodies.flush()
        run_wrk(served.url, bodies.name, connections, WARM_SECONDS)
        settle(served)
        before = [pid and cpu_seconds(pid) for pid in pids]
        told = run_wrk(served.url, bodies.name, connections, seconds)
        if told["requests"] < ROUNDS * connections:
            settle(served)
            before = [pid and cpu_seconds(pid) for pid in pids]
            told = run_wrk(served.url, bodies.name, connections, seconds * LONGER)
        after = [pid and cpu_seconds(pid) for pid in pids]
    requests = told["requests"]
    server_cpu, mongo_cpu = (
        (end - start) / requests * 1e6
        if requests and start is not None and end is not None
        else None
        for start, end in zip(before, after, strict=True)
    )
    return Measured(
        connections=connections,
        requests_per_second=requests / told["microseconds"] * 1e6,
        p50=told["p50"] / 1000,
        p95=told["p95"] / 1000,
        p99=told["p99"] / 1000,
        refused=told["refused"],
        broken=told["broken"] + told["late"],
        wrong=told["wrong"],
        cpu_micros=server_cpu,
        mongo_cpu_micros=mongo_cpu,
        resident_mebibytes=resident_mebibytes(served.pid),
    )


def graphql_lines(bodies: list[dict[str, Any]]) -> list[str]:
    """As the script of wrk reads them."""
    return [f"POST /graphql {json.dumps(body)}\n" for body in bodies]


def run_wrk(
    url: str,
    lines: str,
    connections: int,
    seconds: int,
    *,
    begins: str = "",
    wait: int | None = None,
) -> dict[str, int]:
    """Send the lines of a file for some seconds. `begins`: of a right answer, if not GraphQL's.

    `wait`: wait so many seconds at most for the answers to what was sent; without it, what is
    unanswered when time is up is not counted.
    """
    waiting = [] if wait is None else [str(seconds), str(connections)]
    run = subprocess.run(
        [
            *("wrk", "--threads", "1", "--connections", str(connections)),
            *("--duration", f"{seconds + (wait or 0)}s", "--timeout", "10s"),
            *("--script", str(SCRIPT), url, "--", lines, begins, *waiting),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in run.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, int] = json.loads(line.removeprefix("RESULT "))
            return found
    raise LoadError(f"wrk says nothing ({run.returncode}): {(run.stderr or run.stdout).strip()}")
