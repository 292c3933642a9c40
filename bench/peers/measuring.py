"""What one server does with one operation: many short runs of wrk, in turns with the other servers."""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pymongo

from bench.measure import (
    LoadError,
    cpu_seconds,
    resident_mebibytes,
    run_wrk,
    settle,
)
from bench.operation import Body
from bench.serving import Serving

from .servers import NODE_FOLDER, node

MANY: Final = 200  # connections
WARM_SECONDS: Final = 3  # V8 compiles what is hot meanwhile
WARM_CONNECTIONS: Final = 32
WAIT_SECONDS: Final = 60  # for what is unanswered when time is up
COUNTED: Final = ("find", "aggregate", "count", "distinct", "getMore")
PACE: Final = 400  # requests a second


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of wrk. Everything that it sent was answered in the end, and is counted."""

    requests_per_second: float
    p50: float  # milliseconds, as all of them
    p95: float
    p99: float
    errors: int
    cpu_micros: float | None  # of the server with its processes, each request
    mongo_cpu_micros: float | None  # of our own mongod, each request
    resident_mebibytes: float  # of the server with its processes, afterwards
    commands: float  # to MongoDB, each request; by all servers, of which the others rest


@dataclass(frozen=True, slots=True)
class Paced:
    """What became of requests that were offered at a fixed rate."""

    requests_per_second: float
    p50: float
    p95: float
    p99: float
    errors: int


@contextmanager
def written(lines: Sequence[str]) -> Iterator[str]:
    """The path of a file with these lines."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(lines)
        file.flush()
        yield file.name


def sample(
    served: Serving, lines: Sequence[str], connections: int, seconds: int, begins: str = ""
) -> Sample:
    """From rest to rest: no work of the server is left out, and none of it is for nothing."""
    settle(served)
    pids = (served.pid, served.mongo_pid)
    before = [pid and cpu_seconds(pid) for pid in pids]
    with written(lines) as path, counting(served) as count:
        start = count()
        told = run_wrk(served.url, path, connections, seconds, begins=begins, wait=WAIT_SECONDS)
        after = [pid and cpu_seconds(pid) for pid in pids]
        commands = count() - start
    return to_sample(told, before, after, resident_mebibytes(served.pid), commands)


def to_sample(
    told: dict[str, int],
    before: Sequence[float | None],
    after: Sequence[float | None],
    resident: float,
    commands: int,
) -> Sample:
    """`before` and `after`: seconds of CPU of the server and of mongod, None where it is not ours."""
    requests = told["requests"]
    cpu, mongo_cpu = (
        (end - start) / requests * 1e6
        if requests and start is not None and end is not None
        else None
        for start, end in zip(before, after, strict=True)
    )
    return Sample(
        requests / told["microseconds"] * 1e6,
        told["p50"] / 1000,
        told["p95"] / 1000,
        told["p99"] / 1000,
        sum(told[name] for name in ("refused", "broken", "late", "wrong", "unanswered")),
        cpu,
        mongo_cpu,
        resident,
        commands / requests if requests else 0.0,
    )


def warm(served: Serving, lines: Sequence[str], begins: str = "") -> None:
    with written(lines) as path:
        run_wrk(served.url, path, WARM_CONNECTIONS, WARM_SECONDS, begins=begins, wait=WAIT_SECONDS)


def combined(samples: Sequence[Sample]) -> Sample:
    """The median of each figure; of errors the sum, of memory the most."""

    def median(name: str) -> float:
        values: list[float] = [getattr(each, name) for each in samples]
        return statistics.median(values)

    def known(name: str) -> float | None:
        found = [value for each in samples if (value := getattr(each, name)) is not None]
        return statistics.median(found) if found else None

    return Sample(
        median("requests_per_second"),
        median("p50"),
        median("p95"),
        median("p99"),
        sum(each.errors for each in samples),
        known("cpu_micros"),
        known("mongo_cpu_micros"),
        max(each.resident_mebibytes for each in samples),
        median("commands"),
    )


def commands_of(served: Serving, requests: Sequence[Callable[[], Any]]) -> float:
    """Commands to MongoDB, each request on average, asked one after the other."""
    with counting(served) as count:
        start = count()
        for request in requests:
            request()
        return (count() - start) / len(requests)


@contextmanager
def counting(served: Serving) -> Iterator[Callable[[], int]]:
    """A function that tells how many commands MongoDB has had: reads only, as it counts them."""
    with pymongo.MongoClient[dict[str, Any]](served.mongo_url) as client:

        def count() -> int:
            counters = client.admin.command("serverStatus")["metrics"]["commands"]
            return sum(int(counters[name]["total"]) for name in COUNTED)

        count()  # connects
        yield count


def pace(served: Serving, bodies: list[Body], seconds: int) -> Paced:
    """Offers PACE requests a second over MANY connections, however long the answers take."""
    with written([f"{json.dumps(body)}\n" for body in bodies]) as path:
        run = subprocess.run(
            [
                *(node(), str(NODE_FOLDER / "pace.js"), f"{served.url}/graphql", path),
                *(str(PACE), str(MANY), str(seconds)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode:
        raise LoadError(f"autocannon cannot run: {run.stderr.strip()}")
    return Paced(**json.loads(run.stdout.splitlines()[-1]))
