"""What is measured: engines of our own, demo data in them, and one server process on a core of its own."""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from modelharbor.db.connection import connect
from modelharbor.db.migrations import migrate
from modelharbor.dev.demo import SeedProgress, clear, seed, seeded
from modelharbor.dev.engines import Child, EngineError, run_child, run_engines
from modelharbor.http.server import environment
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage

HOST: Final = "127.0.0.1"
DATABASE: Final = "modelharbor_bench"
FILES_PER_VERSION: Final = 4  # so that a page of three files is cut off
READY_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Filled:
    """Engines with the demo models in a database of theirs."""

    settings: Settings
    mongo_url: str
    mongo_pid: int | None
    """Of a mongod of our own."""
    mongo_version: str
    server_cores: tuple[int, ...]
    """Where servers may run; empty when they share all cores with everything else."""


@dataclass(frozen=True, slots=True)
class Serving:
    url: str
    pid: int
    filled: Filled

    @property
    def mongo_url(self) -> str:
        return self.filled.mongo_url

    @property
    def mongo_pid(self) -> int | None:
        return self.filled.mongo_pid

    @property
    def mongo_version(self) -> str:
        return self.filled.mongo_version

    @property
    def server_cores(self) -> tuple[int, ...]:
        return self.filled.server_cores


def divide_cores() -> tuple[set[int], set[int]]:
    """Cores for the server and for all else; the same ones twice where there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    return (set(cores[:1]), set(cores[1:])) if len(cores) > 1 else (set(cores), set(cores))


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Processes that are started within this block begin on these cores, and stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def in_environment(variables: dict[str, str]) -> Iterator[None]:
    """Processes that are started within this block have these variables too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@asynccontextmanager
async def engines_beside(folder: Path, database: str) -> AsyncIterator[Filled]:
    """Runs engines beside the core of the servers, as this process from here on; loads nothing."""
    own = Settings()
    mongo_url = own.mongo_url if "mongo_url" in own.model_fields_set else None
    redis_url = own.redis_url if "redis_url" in own.model_fields_set else None
    server_cores, other_cores = divide_cores()
    with on_cores(other_cores):
        async with run_engines(
            folder / "engines", mongo_url=mongo_url, redis_url=redis_url
        ) as engines:
            settings = own.model_copy(
                update={
                    "mongo_url": engines.mongo_url,
                    "mongo_database": database,
                    "redis_url": engines.redis_url,
                    "data_path": folder,
                }
            )
            yield Filled(
                settings,
                engines.mongo_url,
                next((c.process.pid for c in engines.running if c.name == "mongod"), None),
                await mongo_version(settings),
                () if server_cores == other_cores else tuple(sorted(server_cores)),
            )


@asynccontextmanager
async def filled(
    folder: Path,
    models: int,
    *,
    database: str = DATABASE,
    files_per_version: int = FILES_PER_VERSION,
) -> AsyncIterator[Filled]:
    """Engines, with the models loaded unless they are there."""
    async with engines_beside(folder, database) as data:
        await fill(data.settings, models, files_per_version)
        yield data


@asynccontextmanager
async def run_server(
    data: Filled,
    name: str,
    program: Path,
    *arguments: str,
    port: int,
    ready: str = "/readyz",
    variables: dict[str, str] | None = None,
) -> AsyncIterator[Serving]:
    """Runs a server on the core of the servers, and waits until the path `ready` is answered."""
    cores = set(data.server_cores) or os.sched_getaffinity(0)
    with on_cores(cores), in_environment(variables or {}):
        server = run_child(data.settings.data_path, name, program, *arguments)
        child = await server.__aenter__()
    try:
        url = f"http://{HOST}:{port}"
        await _wait_until_ready(child, url, ready)
        yield Serving(url, child.process.pid, data)
    finally:
        await server.__aexit__(None, None, None)


COMPUTED: Final = {"MODELHARBOR_RESPONSE_CACHE": "false", "MODELHARBOR_BUDGET_ANONYMOUS": "0"}
"""What is measured is how answers are made, by one address that asks more than one may."""


@asynccontextmanager
async def serving(folder: Path, models: int) -> AsyncIterator[Serving]:
    """Our own server with its engines and models; it makes each answer anew."""
    async with filled(folder, models) as data, our_server(data, variables=COMPUTED) as served:
        yield served


@asynccontextmanager
async def our_server(
    data: Filled, name: str = "server", variables: dict[str, str] | None = None
) -> AsyncIterator[Serving]:
    """`variables`: of the environment, beside those that say where the engines are."""
    port = free_port()
    async with run_server(
        data,
        name,
        Path(sys.executable),
        *("-m", "modelharbor", "serve", "--host", HOST, "--port", str(port), "--workers", "1"),
        port=port,
        variables=environment(data.settings) | (variables or {}),
    ) as served:
        yield served


async def mongo_version(settings: Settings) -> str:
    async with connect(settings) as database:
        found = await database.client.server_info()
        return str(found["version"])


async def fill(settings: Settings, models: int, files_per_version: int = FILES_PER_VERSION) -> None:
    """The database is for this alone: what is in it may go."""
    async with connect(settings) as database, open_storage(settings) as storage:
        there = await seeded(database)
        is_there = (
            there is not None
            and there.complete
            and not there.monsters
            and (there.models, there.files_per_version) == (models, files_per_version)
        )
        if not is_there:
            await clear(database, storage)
            last = time.monotonic()

            def report(now: SeedProgress) -> None:
                nonlocal last
                if time.monotonic() - last > 5:
                    last = time.monotonic()
                    print(f"Loading: {now.done:,} of {now.total:,} models", file=sys.stderr)

            result = await seed(
                database,
                storage,
                models=models,
                files_per_version=files_per_version,
                usage=False,
                report=report,
            )
            print(f"Loaded {models:,} models in {result.seconds:.0f} s", file=sys.stderr)
        await migrate(database)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def _wait_until_ready(server: Child, url: str, path: str) -> None:
    until = time.monotonic() + READY_SECONDS
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        while True:
            try:
                if (await client.get(path)).status_code < 500:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            if server.process.poll() is not None:
                raise server.failure()
            if time.monotonic() > until:
                raise EngineError(f"the server does not become ready (log: {server.log})")
            await asyncio.sleep(0.1)
