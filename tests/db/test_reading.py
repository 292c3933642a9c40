"""Reads answer, fail, count and recover as PyMongo's public API does, on a set of three members."""

import asyncio
import logging
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pymongo
import pytest
from bson import Decimal128, ObjectId
from bson.codec_options import CodecOptions
from bson.errors import InvalidDocument
from pymongo import AsyncMongoClient
from pymongo.errors import (
    AutoReconnect,
    DocumentTooLarge,
    ExecutionTimeout,
    InvalidOperation,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
)
from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
    ConnectionPoolListener,
)
from pymongo.read_concern import ReadConcern

from modelharbor.db import wire
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.reading import Reading
from modelharbor.dev.engines import Child, end_child, find_engine, run_child
from modelharbor.observability.commands import CommandCount, CommandCounter, counted
from modelharbor.settings import Settings
from tests.http.processes import free_port
from tests.http.proxy import Door

pytestmark = pytest.mark.anyio
HANG = 20  # seconds: far beyond what a test takes, also on a busy machine
WAYS = ["wire", "plain"]


@dataclass
class Members:
    """A replica set whose members fail when they are told to."""

    url: str
    folder: Path
    running: dict[int, Child]
    stack: AsyncExitStack

    async def start(self, port: int) -> None:
        folder = self.folder / str(port)
        folder.mkdir(exist_ok=True)
        self.running[port] = await self.stack.enter_async_context(
            run_child(
                folder,
                "mongod",
                find_engine("mongod"),
                *("--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"),
                *("--dbpath", str(folder), "--replSet", "three", "--oplogSize", "64"),
                *("--wiredTigerCacheSizeGB", "0.25"),
                *("--setParameter", "enableTestCommands=1"),
                *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
                *("--setParameter", "diagnosticDataCollectionEnabled=false"),
            )
        )


@asynccontextmanager
async def three_members(folder: Path) -> AsyncIterator[Members]:
    ports = [free_port() for _ in range(3)]
    hosts = [f"127.0.0.1:{port}" for port in ports]
    async with AsyncExitStack() as stack:
        members = Members(f"mongodb://{','.join(hosts)}/?replicaSet=three", folder, {}, stack)
        for port in ports:
            await members.start(port)
        client: AsyncMongoClient[Row] = AsyncMongoClient(hosts[0], directConnection=True)
        async with client, asyncio.timeout(HANG):
            await client.admin.command(
                "replSetInitiate",
                {
                    "_id": "three",
                    "members": [{"_id": n, "host": host} for n, host in enumerate(hosts)],
                    "settings": {"electionTimeoutMillis": 2000},
                    "writeConcernMajorityJournalDefault": False,
                },
            )
            while not (await client.admin.command("hello")).get("primary"):
                await asyncio.sleep(0.05)
        yield members


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    with tempfile.TemporaryDirectory(prefix="three-") as folder, asyncio.Runner() as runner:
        context = three_members(Path(folder))
        yield runner.run(context.__aenter__())
        runner.run(context.__aexit__(None, None, None))


class Listener(CommandListener):
    """All events of a client, without what differs each time."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.commands: list[Row] = []

    def started(self, event: CommandStartedEvent) -> None:
        self.commands.append(dict(event.command))
        own = {"lsid", "$clusterTime"}
        command = {key: value for key, value in event.command.items() if key not in own}
        if "getMore" in command:
            command["getMore"] = "an id"
            # `find` of PyMongo asks for no more than its limit, which the server keeps anyway.
            del command["batchSize"]
        self.events.append((event.command_name, event.database_name, command))

    def succeeded(self, event: CommandSucceededEvent) -> None:
        assert event.duration_micros > 0
        own = {"$clusterTime", "operationTime"}
        reply = {key: value for key, value in event.reply.items() if key not in own}
        if "cursor" in reply and reply["cursor"]["id"]:
            reply["cursor"] = {**reply["cursor"], "id": "an id"}
        self.events.append((event.command_name, event.database_name, "succeeded", reply))

    def failed(self, event: CommandFailedEvent) -> None:
        told = event.failure.get("code"), event.failure.get("errtype")
        self.events.append((event.command_name, event.database_name, "failed", *told))


class Pools(ConnectionPoolListener):
    """How often connections were taken and given back."""

    def __init__(self) -> None:
        self.taken = self.given = 0

    def connection_checked_out(self, event: Any) -> None:
        self.taken += 1

    def connection_checked_in(self, event: Any) -> None:
        self.given += 1

    def _ignore(self, event: Any) -> None:
        pass

    pool_created = pool_ready = pool_cleared = pool_closed = _ignore
    connection_created = connection_ready = connection_closed = _ignore
    connection_check_out_started = connection_check_out_failed = _ignore


@dataclass
class Way:
    client: AsyncMongoClient[Row]
    reads: Reading
    listener: Listener


MakeWay = Callable[..., Awaitable[Way]]


@pytest.fixture
async def way(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeWay]:
    """Makes a client whose reads go one way."""
    async with AsyncExitStack() as stack:

        async def make(
            which: str, url: str, name: str, max_time_ms: int = 20_000, **options: Any
        ) -> Way:
            listener = Listener()
            listeners = [CommandCounter(), listener, *options.pop("listeners", [])]
            options = {"heartbeatFrequencyMS": 500, "tz_aware": True, **options}
            client: AsyncMongoClient[Row] = AsyncMongoClient(
                url, event_listeners=listeners, **options
            )
            await stack.enter_async_context(client)
            data = client.get_database(
                name,
                codec_options=CodecOptions(tz_aware=True),
                read_concern=ReadConcern("majority"),
            )
            with monkeypatch.context() as patch:
                if which == "plain":
                    patch.setattr(wire, "TESTED", ())
                reads = Reading(data, max_time_ms)
            return Way(client, reads, listener)

        yield make


@pytest.fixture
async def both(
    way: MakeWay, members: Members
) -> AsyncIterator[Callable[..., Awaitable[list[Way]]]]:
    """Both ways to a database of the set with rows `{_id: n, n: n}`."""
    name = f"reading_{uuid4().hex[:8]}"

    async def make(**options: Any) -> list[Way]:
        return [await way(each, members.url, name, **options) for each in WAYS]

    client: AsyncMongoClient[Row] = AsyncMongoClient(members.url, w="majority")
    async with client:
        await client[name]["rows"].insert_many([{"_id": n, "n": n} for n in range(100)])
        yield make
        await client.drop_database(name)


@asynccontextmanager
async def failing(members: Members, **data: Any) -> AsyncIterator[None]:
    """Commands of the primary that fail, `times` times."""
    mode: Any = {"times": data.pop("times")} if "times" in data else "alwaysOn"
    client: AsyncMongoClient[Row] = AsyncMongoClient(members.url)
    async with client:
        data = {"failCommands": ["find", "aggregate"], **data}
        await client.admin.command(
            {"configureFailPoint": "failCommand", "mode": mode, "data": data}
        )
        try:
            yield
        finally:
            await client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


async def outcome(read: Awaitable[Any]) -> Any:
    """The answer, or what is told of the error."""
    try:
        async with asyncio.timeout(HANG):
            return await read
    except (PyMongoError, InvalidDocument, RuntimeError) as error:
        return type(error), getattr(error, "code", None), getattr(error, "_error_labels", None)


def idle(client: AsyncMongoClient[Row]) -> bool:
    """Nobody holds a connection, or waits for one."""
    pools = [server.pool for server in client._topology._servers.values()]
    return all(
        (pool.active_sockets, pool.requests, pool.operation_count, pool.active_contexts)
        == (0, 0, 0, set())
        and all(not conn.active and not conn.closed for conn in pool.conns)
        for pool in pools
    )


ROWS: list[Row] = [
    {
        "_id": n,
        "n": n,
        "at": datetime(2026, 1, 1, n % 24, tzinfo=UTC),
        "id": ObjectId(f"{n:024x}"),
        "price": Decimal128(Decimal(n) / 8),
        "hash": bytes([n]),
        "tags": ["a", "b"] if n % 2 else [],
        "deep": {"list": [{"x": n}, {"x": None}], "text": "Grüße, 世界"},
        "big": 2**40 + n,
        "ratio": n / 7,
    }
    for n in range(60)
]
FINDS: list[tuple[Row, dict[str, Any]]] = [
    ({}, {}),
    ({"_id": 7}, {}),
    ({"_id": 1000}, {}),
    ({"_id": {"$in": [1, 2, 3]}}, {"projection": {"n": 1}}),
    ({"_id": {"$in": [1, 2, 3]}}, {"projection": {}}),
    ({"n": {"$gte": 10}}, {"sort": {"n": -1}, "limit": 5}),
    ({"n": {"$gte": 10}}, {"sort": {"n": 1, "_id": 1}, "limit": 5, "batch_size": 7}),
    ({}, {"limit": 60, "batch_size": 60}),
    ({"tags": "a"}, {"sort": {"deep.list.x": -1}, "projection": {"deep.list.x": 1, "_id": 0}}),
    ({"at": {"$lt": datetime(2026, 1, 1, 5, tzinfo=UTC)}}, {"sort": {"_id": 1}}),
    ({"deep.text": {"$regex": "^GRÜ", "$options": "i"}}, {"limit": 1}),
    ({"$or": [{"price": Decimal128("0.5")}, {"id": ObjectId(f"{9:024x}")}]}, {}),
    ({}, {"sort": {"_id": 1}, "batch_size": 25}),
    ({}, {"sort": {"_id": 1}, "batch_size": 25, "limit": 40}),
    ({}, {"sort": {"_id": 1}, "batch_size": 20}),
]
PIPELINES: list[tuple[str | None, list[Row], dict[str, Any]]] = [
    ("rows", [], {}),
    ("rows", [{"$match": {"n": {"$lt": 5}}}, {"$project": {"at": 1}}], {"batch_size": 6}),
    ("rows", [{"$group": {"_id": "$tags", "sum": {"$sum": "$n"}}}, {"$sort": {"sum": 1}}], {}),
    ("rows", [{"$sort": {"_id": 1}}], {"batch_size": 7}),
    ("nothing", [{"$match": {}}], {}),
    (
        None,
        [
            {"$documents": [{"key": key} for key in (1, 2, 99)]},
            {
                "$lookup": {
                    "from": "rows",
                    "localField": "key",
                    "foreignField": "n",
                    "pipeline": [{"$limit": 2}],
                    "as": "rows",
                }
            },
        ],
        {"batch_size": 4},
    ),
    (None, [{"$documents": [{"key": key} for key in range(9)]}], {"batch_size": 2}),
]
COUNTS: list[Row] = [{}, {"tags": "a"}, {"n": {"$gt": 50}}, {"n": -1}]


async def test_answers_and_events_are_those_of_the_public_api(
    way: MakeWay, settings: Settings, database: Database
) -> None:
    await database.data["rows"].insert_many(ROWS)
    ways = [await way(each, settings.mongo_url, settings.mongo_database) for each in WAYS]
    assert [each.reads._wire is None for each in ways] == [False, True]
    answers: list[list[Any]] = []
    counts = []
    for each in ways:
        count = CommandCount()
        before = counted.set(count)
        answer: list[Any] = []
        for query, options in FINDS:
            answer.append(await each.reads.find("rows", query, **options))
        for collection, pipeline, options in PIPELINES:
            answer.append(await each.reads.aggregate(collection, pipeline, **options))
        answer += [await each.reads.count("rows", query) for query in COUNTS]
        counted.reset(before)
        answers.append(answer)
        counts.append(count)
        assert idle(each.client)
    assert answers[0] == answers[1]
    assert answers[0][0] == ROWS
    assert all(row["at"].tzinfo is not None for row in answers[0][0])
    assert answers[0][-4:] == [60, 30, 9, 0]
    assert ways[0].listener.events == ways[1].listener.events
    # Ids of cursors are in the names of `getMore`.
    assert [name.split()[0] for name in counts[0].names] == [
        name.split()[0] for name in counts[1].names
    ]
    assert len(counts[0].names) == len(FINDS) + len(PIPELINES) + len(COUNTS) + 2 + 1 + 3 + 8 + 4
    assert counts[0].micros > 0


async def test_what_does_not_fit_into_one_answer_is_fetched(
    way: MakeWay, settings: Settings, database: Database
) -> None:
    rows = [{"_id": n, "text": str(n) * 2_000_000} for n in range(10, 20)]
    for row in rows:
        await database.data["rows"].insert_one(row)
    for each in WAYS:
        made = await way(each, settings.mongo_url, settings.mongo_database)
        count = CommandCount()
        before = counted.set(count)
        assert await made.reads.find("rows", {}, sort={"_id": 1}) == rows
        assert await made.reads.aggregate("rows", [{"$sort": {"_id": 1}}]) == rows
        counted.reset(before)
        names = [name.split()[0] for name in count.names]
        assert names == ["find", *["getMore"] * 2, "aggregate", *["getMore"] * 2]


async def test_a_read_has_no_session_and_tells_the_time_of_the_set(
    both: Callable[..., Awaitable[list[Way]]],
) -> None:
    on_wire, _ = await both()
    for _ in range(3):
        await on_wire.reads.find("rows", {"_id": 1})
    commands = on_wire.listener.commands
    assert ["lsid" in command for command in commands] == [False, False, False]
    assert ["$clusterTime" in command for command in commands] == [True, True, True]
    assert commands[-1]["maxTimeMS"] == 20_000
    assert commands[-1]["readConcern"] == {"level": "majority"}


@pytest.mark.parametrize("which", WAYS)
async def test_reads_at_once_get_their_own_answers(
    which: str, way: MakeWay, settings: Settings, database: Database
) -> None:
    await database.data["rows"].insert_many([{"_id": n} for n in range(500)])
    made = await way(which, settings.mongo_url, settings.mongo_database, maxPoolSize=5)
    found = await asyncio.gather(*[made.reads.find("rows", {"_id": n}) for n in range(500)])
    assert found == [[{"_id": n}] for n in range(500)]
    assert idle(made.client)


@pytest.mark.parametrize(("connections", "again"), [(4, 0.0), (16, 0.3)])
async def test_cancelled_reads_leave_no_answer_behind(
    connections: int, again: float, way: MakeWay, settings: Settings, database: Database
) -> None:
    """Also where they are cancelled `again` while they close their connection. That is not tried
    while they wait for one: PyMongo's conditions do not stand it before Python 3.12."""
    await database.data["rows"].insert_many([{"_id": n, "text": "x" * n} for n in range(300)])
    made = await way("wire", settings.mongo_url, settings.mongo_database, maxPoolSize=connections)
    await made.reads.find("rows", {"_id": 1})
    chance = random.Random(1)
    done = cancelled = 0

    async def reader(first: int) -> None:
        nonlocal done
        for turn in range(40):
            n = (first * 37 + turn) % 300
            which = turn % 3
            if which == 0:
                assert [row["_id"] for row in await made.reads.find("rows", {"_id": n})] == [n]
            elif which == 1:
                pipeline = [{"$match": {"_id": n}}]
                assert [r["_id"] for r in await made.reads.aggregate("rows", pipeline)] == [n]
            else:
                assert await made.reads.count("rows", {"_id": {"$lt": n}}) == n
            done += 1

    async with asyncio.timeout(HANG):
        for turn in range(60):
            tasks = [asyncio.create_task(reader(turn * 8 + n)) for n in range(8)]
            await asyncio.sleep(chance.random() * 0.01)
            chosen = chance.sample(tasks, 5)
            for task in chosen:
                task.cancel()
                if chance.random() < again:
                    await asyncio.sleep(0)
                    task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for task, result in zip(tasks, ended, strict=True):
                assert result is None or (task in chosen and type(result) is asyncio.CancelledError)
                cancelled += result is not None
        for n in range(300):
            assert [row["_id"] for row in await made.reads.find("rows", {"_id": n})] == [n]
    assert done > 5000
    assert cancelled > 200
    assert idle(made.client)


@pytest.mark.parametrize(
    ("fails", "commands"),
    [
        ({"errorCode": 2, "times": 1}, 1),  # BadValue: nothing to retry
        ({"errorCode": 50, "times": 1}, 1),  # MaxTimeMSExpired
        ({"errorCode": 13, "times": 1}, 1),  # Unauthorized
        ({"errorCode": 10107, "times": 1}, 2),  # NotWritablePrimary
        ({"errorCode": 10107, "times": 2}, 2),
        ({"errorCode": 11600, "times": 1}, 2),  # InterruptedAtShutdown
        ({"errorCode": 189, "times": 1}, 2),  # PrimarySteppedDown
        ({"errorCode": 6, "times": 2}, 2),  # HostUnreachable
        ({"closeConnection": True, "times": 1}, 2),
        ({"closeConnection": True, "times": 2}, 2),
    ],
)
async def test_failures_and_retries_are_those_of_the_public_api(
    fails: Row, commands: int, both: Callable[..., Awaitable[list[Way]]], members: Members
) -> None:
    reads: list[Callable[[Reading], Awaitable[Any]]] = [
        lambda reads: reads.find("rows", {"_id": 1}),
        lambda reads: reads.aggregate("rows", [{"$match": {"_id": 1}}]),
        lambda reads: reads.count("rows", {"_id": 1}),
    ]
    told = []
    for each in await both():
        assert await each.reads.find("rows", {"_id": 1}) == [{"_id": 1, "n": 1}]
        outcomes = []
        each.listener.events.clear()
        for read in reads:
            count = CommandCount()
            before = counted.set(count)
            async with failing(members, **fails):
                outcomes.append(await outcome(read(each.reads)))
            counted.reset(before)
            assert len(count.names) == commands
            outcomes.append(await read(each.reads))
            assert idle(each.client)
        told.append((outcomes, each.listener.events))
    assert told[0] == told[1]


EXPECTED: dict[str, tuple[Row, type[PyMongoError]]] = {
    "bad value": ({"errorCode": 2, "times": 1}, OperationFailure),
    "out of time": ({"errorCode": 50, "times": 1}, ExecutionTimeout),
    "no primary": ({"errorCode": 10107, "times": 2}, NotPrimaryError),
    "broken": ({"closeConnection": True, "times": 2}, AutoReconnect),
}


@pytest.mark.parametrize("name", EXPECTED)
async def test_kinds_of_failures(
    name: str, both: Callable[..., Awaitable[list[Way]]], members: Members
) -> None:
    fails, kind = EXPECTED[name]
    messages = []
    for each in await both():
        await each.reads.find("rows", {})
        async with failing(members, **fails):
            with pytest.raises(kind) as caught:
                await each.reads.find("rows", {})
        assert type(caught.value) is kind
        messages.append(str(caught.value).split("$clusterTime")[0].split("'operationTime'")[0])
    assert messages[0] == messages[1]


async def test_a_slow_query_is_ended(both: Callable[..., Awaitable[list[Way]]]) -> None:
    for each in await both(max_time_ms=150):
        for _ in range(2):
            with pytest.raises(ExecutionTimeout, match="exceeded time limit") as caught:
                await each.reads.find("rows", {"$where": "sleep(100) || true"})
            assert caught.value.code == 50
        assert idle(each.client)


async def test_a_silent_server_is_given_up_after_one_more_try(
    both: Callable[..., Awaitable[list[Way]]], members: Members
) -> None:
    for each in await both(socketTimeoutMS=300):
        await each.reads.find("rows", {"_id": 1})
        count = CommandCount()
        before = counted.set(count)
        async with failing(members, blockConnection=True, blockTimeMS=2000, times=2):
            with pytest.raises(NetworkTimeout, match="timed out"):
                await each.reads.find("rows", {"_id": 1})
        counted.reset(before)
        assert count.names == ["find rows", "find rows"]
        assert idle(each.client)
        assert await each.reads.find("rows", {"_id": 2}) == [{"_id": 2, "n": 2}]


async def test_the_time_of_the_caller_is_kept(
    both: Callable[..., Awaitable[list[Way]]], members: Members
) -> None:
    for each in await both():
        await each.reads.find("rows", {"_id": 1})
        async with failing(members, blockConnection=True, blockTimeMS=3000, times=1):
            began = asyncio.get_running_loop().time()
            with pymongo.timeout(0.3), pytest.raises((NetworkTimeout, ExecutionTimeout)) as caught:
                await each.reads.find("rows", {"_id": 1})
            assert asyncio.get_running_loop().time() - began < 2.5
        assert caught.value.timeout
        assert each.listener.commands[-1]["maxTimeMS"] <= 300


async def test_waiting_for_a_connection_ends(
    both: Callable[..., Awaitable[list[Way]]], members: Members
) -> None:
    for each in await both(maxPoolSize=1, waitQueueTimeoutMS=200):
        await each.reads.find("rows", {"_id": 1})
        async with failing(members, blockConnection=True, blockTimeMS=1500, times=1):
            slow = asyncio.create_task(outcome(each.reads.find("rows", {"_id": 1})))
            await asyncio.sleep(0.1)
            with pytest.raises(WaitQueueTimeoutError):
                await each.reads.find("rows", {"_id": 2})
            assert await slow == [{"_id": 1, "n": 1}]
        assert idle(each.client)


async def test_a_cleared_pool_ends_the_wait(
    both: Callable[..., Awaitable[list[Way]]], members: Members
) -> None:
    """As PyMongo's monitor does it for a server that does not answer."""
    [made, _] = await both(retryReads=False)
    await made.reads.find("rows", {"_id": 1})
    async with failing(members, blockConnection=True, blockTimeMS=5000, times=1):
        waiting = asyncio.create_task(outcome(made.reads.find("rows", {"_id": 1})))
        await asyncio.sleep(0.1)
        for server in made.client._topology._servers.values():
            await server.pool.reset(interrupt_connections=True)
        began = asyncio.get_running_loop().time()
        kind, _, _ = await waiting
        assert issubclass(kind, AutoReconnect)
        assert asyncio.get_running_loop().time() - began < 3
    async with asyncio.timeout(HANG):
        while await outcome(made.reads.find("rows", {"_id": 1})) != [{"_id": 1, "n": 1}]:
            await asyncio.sleep(0.05)  # the monitor has to see the server first
    assert idle(made.client)


async def test_what_cannot_be_sent_is_refused_alike(
    both: Callable[..., Awaitable[list[Way]]],
) -> None:
    for each in await both():
        await each.reads.find("rows", {"_id": 1})
        for _ in range(2):
            with pytest.raises(InvalidDocument):
                await each.reads.find("rows", {"n": object()})
            with pytest.raises(DocumentTooLarge):
                await each.reads.find("rows", {"n": "x" * 17_000_000})
            with pytest.raises(DocumentTooLarge):
                await each.reads.count("rows", {"n": "x" * 17_000_000})
        assert idle(each.client)
        assert await each.reads.find("rows", {"_id": 1}) == [{"_id": 1, "n": 1}]


async def test_without_a_server_selection_ends(way: MakeWay) -> None:
    for each in WAYS:
        nowhere = await way(
            each, "mongodb://127.0.0.1:1/?replicaSet=rs0", "x", serverSelectionTimeoutMS=200
        )
        with pytest.raises(ServerSelectionTimeoutError):
            await nowhere.reads.find("rows", {})


async def test_a_closed_client_reads_no_more(both: Callable[..., Awaitable[list[Way]]]) -> None:
    for each in await both():
        await each.reads.find("rows", {"_id": 1})
        await each.client.close()
        with pytest.raises(InvalidOperation):
            await each.reads.find("rows", {"_id": 1})


@pytest.mark.parametrize("how", ["step down", "kill"])
async def test_reads_go_on_through_a_failover(
    how: str, both: Callable[..., Awaitable[list[Way]]], members: Members
) -> None:
    made, _ = await both(maxPoolSize=8)
    done, is_over = 0, False

    async def reader(n: int) -> None:
        nonlocal done
        while not is_over:
            assert await made.reads.find("rows", {"_id": n}) == [{"_id": n, "n": n}]
            assert await made.reads.count("rows", {"n": {"$lt": n}}) == n
            done += 1
            await asyncio.sleep(0.01)

    async with asyncio.timeout(HANG), asyncio.TaskGroup() as group:
        for n in range(16):
            group.create_task(reader(n))
        while done < 200:
            await asyncio.sleep(0.05)
        before = await made.client.primary
        assert before is not None
        if how == "kill":
            members.running[before[1]].process.kill()
        else:
            await made.client.admin.command("replSetStepDown", 10, force=True)
        while await made.client.primary in (None, before):
            await asyncio.sleep(0.05)
        reached = done
        while done < reached + 200:
            await asyncio.sleep(0.05)
        is_over = True
    assert idle(made.client)
    if how == "kill":
        await end_child(members.running[before[1]])
        await members.start(before[1])


async def test_a_server_that_goes_and_comes_back(
    way: MakeWay, settings: Settings, database: Database
) -> None:
    await database.data["rows"].insert_one({"_id": 1})
    door = Door(urlsplit(settings.mongo_url).port or 27017)
    url = f"mongodb://127.0.0.1:{door.port}/?directConnection=true"
    try:
        for each in WAYS:
            await door.open()
            made = await way(each, url, settings.mongo_database, serverSelectionTimeoutMS=500)
            assert await made.reads.find("rows", {"_id": 1}) == [{"_id": 1}]
            assert made.listener.commands[-1]["$readPreference"] == {"mode": "primaryPreferred"}
            assert await made.reads.find("rows", {"_id": 1}) == [{"_id": 1}]
            assert made.listener.commands[-1]["$readPreference"] == {"mode": "primaryPreferred"}
            await door.close()
            kind, _, _ = await outcome(made.reads.find("rows", {"_id": 1}))
            assert issubclass(kind, AutoReconnect)
            await door.open()
            async with asyncio.timeout(HANG):
                while await outcome(made.reads.find("rows", {"_id": 1})) != [{"_id": 1}]:
                    await asyncio.sleep(0.05)
            assert idle(made.client)
            await door.close()
    finally:
        await door.close()


async def test_connections_with_passwords_and_compression(
    way: MakeWay, settings: Settings, database: Database
) -> None:
    await database.data["rows"].insert_many(ROWS)
    name = f"reader_{uuid4().hex[:8]}"
    await database.client.admin.command("createUser", name, pwd="secret", roles=["readAnyDatabase"])
    try:
        for each in WAYS:
            options = {"username": name, "password": "secret", "compressors": "zlib"}
            made = await way(each, settings.mongo_url, settings.mongo_database, **options)
            for _ in range(2):
                assert await made.reads.find("rows", {}, sort={"_id": 1}) == ROWS
            wrong = await way(each, settings.mongo_url, "x", username=name, password="other")
            with pytest.raises(OperationFailure, match="Authentication failed"):
                await wrong.reads.find("rows", {})
    finally:
        await database.client.admin.command("dropUser", name)


async def test_other_read_preferences_select_as_ever(
    both: Callable[..., Awaitable[list[Way]]],
) -> None:
    for each in await both(readPreference="secondary"):
        for _ in range(4):
            assert await each.reads.find("rows", {"_id": 1}) == [{"_id": 1, "n": 1}]
        found = [command["$readPreference"] for command in each.listener.commands]
        assert found == [{"mode": "secondary"}] * 4


async def test_who_listens_to_the_pool_hears_of_each_read(
    both: Callable[..., Awaitable[list[Way]]],
) -> None:
    pools = Pools()
    [made, _] = await both(listeners=[pools])
    for _ in range(3):
        await made.reads.find("rows", {"_id": 1})
    assert pools.taken == pools.given == 3


async def test_who_logs_commands_sees_each_read(
    both: Callable[..., Awaitable[list[Way]]], caplog: pytest.LogCaptureFixture
) -> None:
    [made, _] = await both()
    await made.reads.find("rows", {"_id": 1})
    with caplog.at_level(logging.DEBUG, "pymongo.command"):
        await made.reads.find("rows", {"_id": 1})
    told = [record.message for record in caplog.records if record.name == "pymongo.command"]
    assert sum('"message": "Command succeeded"' in text for text in told) == 1


async def test_a_bound_session_is_used(both: Callable[..., Awaitable[list[Way]]]) -> None:
    for each in await both():
        async with each.client.start_session() as session, session.bind(end_session=False):
            await each.reads.find("rows", {"_id": 1})
            assert each.listener.commands[-1]["lsid"] == session.session_id


async def test_another_pymongo_reads_by_its_public_api(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await database.data["rows"].insert_many(ROWS)
    direct = Reading(database.data, 5000)
    monkeypatch.setattr(pymongo, "version_tuple", (4, 99, 0))
    monkeypatch.setattr(pymongo, "version", "4.99.0")
    plain = Reading(database.data, 5000)
    assert [record.message for record in caplog.records] == [
        "reading.plain reason=PyMongo 4.99.0 is not one that was tested"
    ]
    counts = []
    for reading in (direct, plain):
        count = CommandCount()
        before = counted.set(count)
        assert await reading.find("rows", {}, sort={"_id": 1}) == ROWS
        assert await reading.count("rows", {}) == 60
        assert await reading.aggregate("rows", [{"$count": "n"}]) == [{"n": 60}]
        counted.reset(before)
        counts.append(count.names)
    assert counts[0] == counts[1] == ["find rows", "aggregate rows", "aggregate rows"]


async def test_names_that_changed_are_noticed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Any, something_else: bytes) -> None: ...

    changed = ((write, ("message",)), *wire.NEEDED[1:])
    monkeypatch.setattr(wire, "NEEDED", changed)
    assert "write has no message" in str(wire.unfit(database.data))


async def test_settings_that_need_the_layers_get_them() -> None:
    from pymongo.server_api import ServerApi

    client: AsyncMongoClient[Row] = AsyncMongoClient(server_api=ServerApi("1"))
    assert wire.unfit(client["x"]) == "a declared API version"
    client = AsyncMongoClient("mongodb://127.0.0.1:1/?loadBalanced=true")
    assert wire.unfit(client["x"]) == "a load balancer"
    assert wire.unfit(AsyncMongoClient("mongodb://127.0.0.1:1")["x"]) is None


def test_the_version_of_pymongo_is_one_that_was_tested() -> None:
    """For another one: read what changed in the names of `NEEDED`, run these tests, then add it."""
    assert wire.TESTED == ((4, 20),)
    assert pymongo.version_tuple[:2] in wire.TESTED
