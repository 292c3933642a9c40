"""What goes wrong while clients read and write: Redis, the change streams, the processes, the ways between."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from modelharbor.dev.engines import Child
from modelharbor.settings import Settings
from tests.faults.engines import Member, redis_server
from tests.faults.harbor import Harbor, Server
from tests.http.processes import free_port
from tests.http.proxy import Door

START_SECONDS: Final = 90.0
APP: Final = "modelharbor"


@dataclass
class Serving:
    """A server process with a way of its own to Redis; it comes back with the same name."""

    name: str
    harbor: Harbor
    door: Door
    server: Server | None = None
    is_up: bool = False

    @property
    def port(self) -> int:
        assert self.server is not None
        return self.server.port

    async def start(self) -> None:
        self.server = self.harbor.server()
        async with asyncio.timeout(START_SECONDS):
            [self.server] = await self.harbor.up(1)
        self.is_up = True

    async def kill(self) -> None:
        assert self.server is not None
        self.is_up = False
        self.server.kill()

    def signal(self, number: int) -> None:
        assert self.server is not None
        self.server.signal(number)


@dataclass
class Engines:
    folder: Path
    member: Member
    redis_port: int
    stack: AsyncExitStack
    redis: Child | None = None

    @property
    def dump(self) -> Path:
        return self.folder / "dump.rdb"

    async def start_redis(self) -> None:
        self.redis = await self.stack.enter_async_context(
            redis_server(self.folder, self.redis_port)
        )
        async with asyncio.timeout(START_SECONDS):
            while not await self.tell("PING"):
                await asyncio.sleep(0.02)

    def kill_redis(self) -> None:
        assert self.redis is not None
        self.redis.process.kill()
        self.redis.process.wait()

    def signal_redis(self, number: int) -> None:
        assert self.redis is not None
        self.redis.process.send_signal(number)

    async def tell(self, *command: Any) -> bool:
        """By a connection of its own; whether it was done."""
        redis = Redis(port=self.redis_port, socket_timeout=5, socket_connect_timeout=5)
        try:
            async with redis:
                await redis.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        except (RedisError, OSError):
            return False
        return True

    async def admin(self, *command: Any, **more: Any) -> dict[str, Any]:
        client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
            "127.0.0.1", self.member.port, directConnection=True, appname="nemesis"
        )
        async with client:
            return await client.admin.command(*command, **more)


@dataclass
class Nemesis:
    engines: Engines
    processes: list[Serving]
    chance: Random
    happened: list[tuple[float, str]] = field(default_factory=list)
    is_over: bool = False
    """What has begun is undone, and nothing more begins."""

    def note(self, text: str) -> None:
        self.happened.append((time.monotonic(), text))

    def one(self) -> Serving:
        return self.chance.choice(self.processes)

    async def go_on(self, faults: Sequence[str], pause: float) -> None:
        """One after the other, in an order drawn anew each time; whatever was done is undone before the
        next."""
        while not self.is_over:
            for name in self.chance.sample(faults, len(faults)):
                # Some come one upon the other, others when all is well again and much is kept.
                await asyncio.sleep(self.chance.choice((0.2, pause, pause, 5 * pause)))
                if self.is_over:
                    return
                begin = len(self.happened)
                self.note(name)
                fault: Callable[[], Awaitable[None]] = getattr(self, name)
                await fault()
                if len(self.happened) == begin + 1:
                    self.note(f"{name} is over")

    # Redis

    async def redis_is_restarted_empty(self) -> None:
        self.engines.kill_redis()
        await asyncio.sleep(self.chance.choice((0.0, 0.3, 1.5)))
        self.engines.dump.unlink(missing_ok=True)
        await self.engines.start_redis()

    async def redis_is_restarted_with_an_old_dump(self) -> None:
        await self.engines.tell("SAVE")
        await asyncio.sleep(self.chance.uniform(0.5, 3.0))
        self.engines.kill_redis()
        await self.engines.start_redis()
        self.engines.dump.unlink(missing_ok=True)

    async def redis_hangs(self) -> None:
        self.engines.signal_redis(signal.SIGSTOP)
        await asyncio.sleep(self.chance.choice((0.02, 0.06, 0.2, 1.0, 3.0)))
        self.engines.signal_redis(signal.SIGCONT)

    async def redis_stutters(self) -> None:
        """Around the time that it is given."""
        for _ in range(15):
            self.engines.signal_redis(signal.SIGSTOP)
            await asyncio.sleep(self.chance.uniform(0.02, 0.08))
            self.engines.signal_redis(signal.SIGCONT)
            await asyncio.sleep(self.chance.uniform(0.0, 0.1))

    async def redis_is_flushed(self) -> None:
        for _ in range(self.chance.choice((1, 5))):
            await self.engines.tell("FLUSHALL")
            await asyncio.sleep(self.chance.uniform(0.0, 0.1))

    async def redis_takes_no_writes(self) -> None:
        """It answers what is read, and lets writes wait, or refuses them."""
        if self.chance.random() < 0.5:
            await self.engines.tell("CLIENT", "PAUSE", "1500", "WRITE")
            await asyncio.sleep(1.5)
            return
        await self.engines.tell("CONFIG", "SET", "maxmemory", "1")
        await asyncio.sleep(1.5)
        await self.engines.tell("CONFIG", "SET", "maxmemory", "0")

    async def redis_becomes_a_replica(self) -> None:
        """Of nobody: it reads, and refuses writes."""
        await self.engines.tell("REPLICAOF", "127.0.0.1", str(free_port()))
        await asyncio.sleep(1.0)
        await self.engines.tell("REPLICAOF", "NO", "ONE")

    async def redis_forgets_scripts(self) -> None:
        await self.engines.tell("SCRIPT", "FLUSH")

    async def redis_loses_keys(self) -> None:
        """Some of them, as when its memory is full."""
        redis = Redis(port=self.engines.redis_port, socket_timeout=5)
        with suppress(RedisError, OSError):
            async with redis:
                for key in await redis.keys("*"):
                    if self.chance.random() < 0.5:
                        await redis.delete(key)

    async def redis_values_are_exchanged(self) -> None:
        """What lies under one name is another's."""
        redis = Redis(port=self.engines.redis_port, socket_timeout=5)
        with suppress(RedisError, OSError):
            async with redis:
                found = {}
                for key in await redis.keys("*"):
                    if await redis.type(key) == b"string":
                        found[key] = await redis.get(key)
                values = [value for value in found.values() if value is not None]
                self.chance.shuffle(values)
                for key, value in zip(found, values, strict=False):
                    await redis.set(key, value, ex=60)

    async def redis_values_come_back(self) -> None:
        """Under each name what was there a while ago."""
        redis = Redis(port=self.engines.redis_port, socket_timeout=5)
        with suppress(RedisError, OSError):
            async with redis:
                found = {}
                for key in await redis.keys("*"):
                    if await redis.type(key) == b"string":
                        found[key] = await redis.get(key)
                await asyncio.sleep(self.chance.uniform(0.1, 2.0))
                for key, value in found.items():
                    if value is not None:
                        await redis.set(key, value, ex=60)

    # The ways to Redis

    async def one_is_cut_off(self) -> None:
        """From Redis, as by a firewall that says so."""
        door = self.one().door
        await door.close()
        await asyncio.sleep(self.chance.choice((0.05, 0.5, 2.0)))
        await door.open()

    async def one_is_cut_off_silently(self) -> None:
        door = self.one().door
        door.silent = True
        await asyncio.sleep(self.chance.choice((0.05, 0.5, 2.0)))
        await door.close()
        door.silent = False
        await door.open()

    # The processes

    async def one_stands_still(self) -> None:
        process = self.one()
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(self.chance.choice((0.1, 1.0, 2.5)))
        process.signal(signal.SIGCONT)

    async def one_is_killed(self) -> None:
        process = self.one()
        await process.kill()
        await asyncio.sleep(self.chance.uniform(0.0, 0.5))
        await process.start()

    # The change streams

    async def cursors_are_killed(self) -> None:
        for _ in range(self.chance.choice((1, 3))):
            for collection, cursor in await self._streams():
                with suppress(PyMongoError):
                    client = AsyncMongoClient[dict[str, Any]](self.engines.member.url)
                    async with client:
                        database, _, name = collection.partition(".")
                        await client[database].command("killCursors", name, cursors=[cursor])
            await asyncio.sleep(self.chance.uniform(0.0, 0.2))

    async def _streams(self) -> list[tuple[str, int]]:
        client = AsyncMongoClient[dict[str, Any]](self.engines.member.url)
        async with client:
            found = await client.admin.aggregate(
                [
                    {"$currentOp": {"idleCursors": True, "allUsers": True, "localOps": True}},
                    {"$match": {"appName": APP}},
                ]
            )
            rows = await found.to_list()
        streams = [row for row in rows if "$changeStream" in str(row.get("cursor", ""))]
        return [(row["ns"], row["cursor"]["cursorId"]) for row in streams]

    async def streams_are_killed(self) -> None:
        """While they wait for what comes."""
        client = AsyncMongoClient[dict[str, Any]](self.engines.member.url)
        async with client:
            for _ in range(10):
                found = await client.admin.aggregate(
                    [{"$currentOp": {"localOps": True}}, {"$match": {"appName": APP}}]
                )
                for row in await found.to_list():
                    if "getMore" in str(row.get("command", "")):
                        with suppress(PyMongoError):
                            await client.admin.command("killOp", op=row["opid"])
                await asyncio.sleep(0.02)

    async def streams_fail(self) -> None:
        """As told by the database: their place is unknown, or the connection is gone, or they hang."""
        kind = self.chance.choice(("error", "lost", "closed", "hang", "hang", "dropped"))
        data: dict[str, Any] = {"failCommands": ["getMore"], "appName": APP}
        if kind == "error":
            data["errorCode"] = 43  # CursorNotFound
        elif kind == "lost":
            data["errorCode"] = 286  # ChangeStreamHistoryLost
        elif kind == "closed":
            data["closeConnection"] = True
        elif kind == "dropped":
            data |= {"errorCode": 11600, "failCommands": ["getMore", "aggregate"]}
        else:
            data |= {"blockConnection": True, "blockTimeMS": self.chance.choice((200, 900, 3000))}
        self.note(f"streams: {kind} {data}")
        mode: Any = {"times": self.chance.choice((1, 4))}
        await self.engines.admin("configureFailPoint", "failCommand", mode=mode, data=data)
        await asyncio.sleep(1.5)
        await self.engines.admin("configureFailPoint", "failCommand", mode="off")

    async def mongod_stands_still(self) -> None:
        child = self.engines.member.child
        assert child is not None
        child.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self.chance.choice((0.1, 0.5, 1.5)))
        child.process.send_signal(signal.SIGCONT)


SHORT: Final = (
    "redis_is_restarted_empty",
    "redis_hangs",
    "redis_is_flushed",
    "one_is_cut_off",
    "one_stands_still",
    "cursors_are_killed",
    "streams_fail",
)
LONG: Final = (
    *SHORT,
    "redis_is_restarted_with_an_old_dump",
    "redis_stutters",
    "redis_takes_no_writes",
    "redis_becomes_a_replica",
    "redis_forgets_scripts",
    "redis_loses_keys",
    "redis_values_are_exchanged",
    "redis_values_come_back",
    "one_is_cut_off_silently",
    "one_is_killed",
    "streams_are_killed",
    "mongod_stands_still",
)


def settings_of(settings: Settings, door: Door) -> Settings:
    return settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{door.port}/0"})
