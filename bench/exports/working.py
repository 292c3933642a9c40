"""One worker process that exports, a person who asks for it, and what came of it."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import orjson
from bson import ObjectId

from bench.measure import LoadError, cpu_seconds, family
from bench.operation import WrongAnswer
from bench.serving import Filled, on_cores
from bench.uploads import watched_memory
from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorDocument, ActorKind
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, JobState
from modelharbor.db.tokens import Permission
from modelharbor.dev.engines import Child, run_child
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.http.server import environment
from modelharbor.resolvers.exports import pieces_of, put_export, read_result
from modelharbor.resolvers.tokens import issue_token
from modelharbor.schema.nodes import global_id
from modelharbor.storage.blobs import BlobStore

LOGIN: Final = "bench-exports"
LEASE_SECONDS: Final = 2.0  # so that a killed worker's job is not waited for
PAUSE: Final = 0.05  # between two looks at a job
WAIT_SECONDS: Final = 3600.0
JOB: Final = "query Job($id: ID!) { job(id: $id) { state progress { percent etaSeconds } } }"


@dataclass(frozen=True, slots=True)
class Person:
    viewer: Viewer
    token: str


async def make_person(database: Database) -> Person:
    """Anew: what an earlier run has left of them goes."""
    old = await database.data["actors"].find_one_and_delete({"login": LOGIN})
    if old is not None:
        await database.data["tokens"].delete_many({"user_id": old["_id"]})
        await database.data["jobs"].delete_many({"created_by_id": old["_id"]})
    user = await ActorDocument(kind=ActorKind.USER, login=LOGIN, login_lower=LOGIN).insert()
    _, token = await issue_token(database, user.id, "bench", list(Permission), None)
    row = await database.data["actors"].find_one({"_id": user.id})
    assert row is not None
    return Person(Viewer(user=row, scopes=frozenset(Permission)), token)


@dataclass(slots=True)
class Exported:
    row: Row
    """The job, ended."""
    cpu_seconds: float
    mebibytes: float  # of the worker, at most
    etas: list[tuple[float, float, float]] = field(default_factory=list)
    """(when it was asked, percent, seconds to go), by the API."""

    @property
    def rows(self) -> int:
        return int(self.row["result"]["rows"])

    @property
    def seconds(self) -> float:
        """Of the step that writes."""
        [step] = [each for each in self.row["steps"] if each["name"] == "write"]
        return float((step["finished_at"] - step["started_at"]).total_seconds())


@asynccontextmanager
async def run_worker(
    data: Filled, name: str = "worker", cores: Iterable[int] = ()
) -> AsyncIterator[Child]:
    """`cores`: where it is to run; without any beside the engines, away from the server."""
    variables = environment(data.settings) | {"MODELHARBOR_LEASE_SECONDS": str(LEASE_SECONDS)}
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        with on_cores(set(cores) or os.sched_getaffinity(0)):
            worker = run_child(
                data.settings.data_path,
                name,
                Path(sys.executable),
                *("-m", "modelharbor", "worker", "--kinds", "EXPORT", "--concurrency", "1"),
            )
            child = await worker.__aenter__()
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            await worker.__aexit__(None, None, None)


def kill(child: Child) -> None:
    """With all that it has started, at once."""
    for pid in reversed(family(child.process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.process.wait()


async def put(
    database: Database, data: Filled, person: Person, query: str, variables: dict[str, Any]
) -> Row:
    return await put_export(
        database,
        person.viewer,
        data.settings,
        query=query,
        variables=variables,
        format=ExportFormat.JSONL,
        compression=Compression.NONE,
        base_url="http://127.0.0.1",
    )


async def job_row(database: Database, job_id: ObjectId) -> Row:
    row = await database.data["jobs"].find_one({"_id": job_id})
    if row is None:
        raise WrongAnswer("the job is gone")
    return row


async def export(
    database: Database,
    data: Filled,
    person: Person,
    query: str,
    variables: dict[str, Any],
    url: str | None = None,
) -> Exported:
    """By a worker of its own. `url`: of a server that is asked how long it takes."""
    # Without a server its core is free.
    async with run_worker(data, cores=() if url else data.server_cores) as worker:
        await _at_rest(worker.process.pid)
        before = cpu_seconds(worker.process.pid)
        with watched_memory(worker.process.pid) as memory:
            job = await put(database, data, person, query, variables)
            asking = asyncio.create_task(_watch(url, person, job["_id"]))
            row = await ended_job(database, job["_id"])
            etas = await asking
        used = cpu_seconds(worker.process.pid) - before
    return Exported(row, used, max(memory), etas)


async def _at_rest(pid: int) -> None:
    """It has begun, and waits for a job."""
    until, used = time.monotonic() + 60, -1.0
    while time.monotonic() < until:
        await asyncio.sleep(0.5)
        before, used = used, cpu_seconds(pid)
        if used > 0.5 and used - before <= 0.02:
            return
    raise LoadError("the worker does not come to rest")


async def ended_job(database: Database, job_id: ObjectId) -> Row:
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        row = await job_row(database, job_id)
        if JobState(row["state"]) in ENDED:
            if row["state"] != JobState.SUCCEEDED.value:
                raise WrongAnswer(f"the export ended as {row['state']}: {row['error']}")
            return row
        await asyncio.sleep(PAUSE)
    raise LoadError(f"the export takes longer than {WAIT_SECONDS:.0f} s")


async def _watch(
    url: str | None, person: Person, job_id: ObjectId
) -> list[tuple[float, float, float]]:
    """What people are told while it runs."""
    found: list[tuple[float, float, float]] = []
    if url is None:
        return found
    headers = {"authorization": f"Bearer {person.token}"}
    body = {"query": JOB, "variables": {"id": global_id("Job", job_id)}}
    async with httpx.AsyncClient(base_url=url, trust_env=False, headers=headers) as client:
        while True:
            answer = (await client.post("/graphql", json=body)).json()
            job = answer["data"]["job"]
            if JobState(job["state"]) in ENDED:
                return found
            progress = job["progress"]
            if progress["percent"] is not None and progress["etaSeconds"] is not None:
                found.append((time.time(), progress["percent"], progress["etaSeconds"]))
            await asyncio.sleep(0.25)


async def lines_of(storage: BlobStore, row: Row) -> AsyncIterator[bytes]:
    """The rows of the file, from the store."""
    pieces = pieces_of(row["_id"], row["checkpoint"])
    size = sum(piece.size_bytes for piece in pieces)
    rest = b""
    async for part in await read_result(storage, pieces, 0, size):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    if rest:
        raise WrongAnswer("the file ends in the middle of a row")


def eta_errors(row: Row, etas: list[tuple[float, float, float]], least: float) -> Iterator[float]:
    """How far off the second half's were, as a share of what was left; where that was `least` seconds
    or more."""
    end = row["finished_at"].timestamp()
    for at, percent, told in etas:
        left = end - at
        if percent >= 50 and left >= least:
            yield abs(told - left) / left


def same_rows(ours: bytes, plain: bytes) -> bool:
    return bool(orjson.loads(ours) == orjson.loads(plain))
