"""Engines that a test may kill: a Redis of its own, and three mongods that elect one another."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from modelharbor.dev.engines import Child, find_engine, run_child
from tests.http.processes import free_port

SET = "faults"
ELECTION_MS = 2000  # without word from the primary; MongoDB's own default is 10 s
START_SECONDS = 60.0


@asynccontextmanager
async def redis_server(folder: Path, port: int) -> AsyncIterator[Child]:
    options = ("--bind", "127.0.0.1", "--save", "", "--dir", str(folder))
    program = find_engine("redis-server")
    async with run_child(folder, "redis-server", program, "--port", str(port), *options) as child:
        yield child


@dataclass
class ReplicaSet:
    members: dict[int, Child]  # by port

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.members)
        return f"mongodb://{hosts}/?replicaSet={SET}"

    async def primary(self) -> int:
        """Its port, once there is one."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            for port, member in self.members.items():
                if member.process.poll() is None and await is_primary(port):
                    return port
            await asyncio.sleep(0.05)
        raise TimeoutError("no member becomes primary")

    def kill(self, port: int) -> None:
        self.members[port].process.send_signal(signal.SIGKILL)
        self.members[port].process.wait()


async def is_primary(port: int) -> bool:
    try:
        found = await asked(port, "hello")
    except PyMongoError:
        return False
    return bool(found["isWritablePrimary"])


async def asked(port: int, command: str, value: Any = 1) -> dict[str, Any]:
    """What one member says."""
    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
        "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=1000
    )
    async with client:
        return await client.admin.command(command, value)


@asynccontextmanager
async def replica_set(folder: Path) -> AsyncIterator[ReplicaSet]:
    program = find_engine("mongod")
    async with AsyncExitStack() as stack:
        members = {}
        for number in range(3):
            port, data = free_port(), folder / f"data{number}"
            data.mkdir()
            members[port] = await stack.enter_async_context(
                run_child(
                    folder,
                    f"mongod{number}",
                    program,
                    *("--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"),
                    *("--dbpath", str(data), "--replSet", SET, "--oplogSize", "64"),
                    *("--wiredTigerCacheSizeGB", "0.25"),
                    *("--setParameter", "diagnosticDataCollectionEnabled=false"),
                    *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
                )
            )
        made = ReplicaSet(members)
        hosts = [{"_id": n, "host": f"127.0.0.1:{port}"} for n, port in enumerate(members)]
        settings = {"electionTimeoutMillis": ELECTION_MS, "heartbeatIntervalMillis": 500}
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                for port in members:
                    await asked(port, "hello")
                await asked(
                    next(iter(members)),
                    "replSetInitiate",
                    {"_id": SET, "members": hosts, "settings": settings},
                )
                break
            except PyMongoError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.1)
        await made.primary()
        yield made


@dataclass
class Member:
    """A replica set of one, that may be killed and comes back with what it had."""

    folder: Path
    port: int
    stack: AsyncExitStack
    child: Child | None = None
    options: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"mongodb://127.0.0.1:{self.port}/?replicaSet={SET}"

    async def start(self) -> None:
        """Until it takes writes."""
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        options = (
            *("--port", str(self.port), "--bind_ip", "127.0.0.1", "--nounixsocket"),
            *("--dbpath", str(data), "--replSet", SET, "--oplogSize", "64"),
            *("--wiredTigerCacheSizeGB", "0.25"),
            *("--setParameter", "diagnosticDataCollectionEnabled=false"),
            *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
            *self.options,
        )
        self.child = await self.stack.enter_async_context(
            run_child(self.folder, "mongod", find_engine("mongod"), *options)
        )
        until = time.monotonic() + START_SECONDS
        while not await is_primary(self.port):
            with suppress(PyMongoError):
                members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
                await asked(self.port, "replSetInitiate", {"_id": SET, "members": members})
            assert time.monotonic() < until, self.child.failure()
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        assert self.child is not None
        self.child.process.send_signal(signal.SIGKILL)
        self.child.process.wait()


@asynccontextmanager
async def one_member(folder: Path) -> AsyncIterator[Member]:
    async with AsyncExitStack() as stack:
        member = Member(folder, free_port(), stack)
        await member.start()
        yield member
