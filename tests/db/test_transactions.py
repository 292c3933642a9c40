"""Transactions name their concerns, start anew when they collide, and end in bounded time."""

import asyncio
from typing import Any

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import ExecutionTimeout, ServerSelectionTimeoutError
from pymongo.monitoring import CommandStartedEvent

from modelharbor.db import connection
from modelharbor.db.connection import Database, connect
from modelharbor.errors import Unavailable
from modelharbor.observability.commands import CommandCounter
from modelharbor.settings import Settings

pytestmark = pytest.mark.anyio
HANG = 30  # seconds: far beyond what a test takes, also on a busy machine


async def test_a_transaction_reads_a_snapshot_and_is_on_a_majority(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[dict[str, Any]] = []

    def started(self: CommandCounter, event: CommandStartedEvent) -> None:
        commands.append(dict(event.command))

    monkeypatch.setattr(CommandCounter, "started", started)

    async def work(session: AsyncClientSession) -> None:
        await database.data["cards"].insert_one({"a": 1}, session=session)

    await database.transaction(work)
    insert, commit = commands
    assert insert["insert"] == "cards"
    assert insert["readConcern"]["level"] == "snapshot"
    assert "commitTransaction" in commit
    assert commit["writeConcern"]["w"] == "majority"


async def test_what_collides_starts_anew(database: Database) -> None:
    cards = database.data["cards"]
    await cards.insert_one({"_id": 1, "count": 0})

    async def add(session: AsyncClientSession) -> None:
        row = await cards.find_one({"_id": 1}, session=session)
        assert row is not None
        await cards.update_one({"_id": 1}, {"$set": {"count": row["count"] + 1}}, session=session)

    await asyncio.gather(*[database.transaction(add) for _ in range(10)])
    assert await cards.find_one({"_id": 1}) == {"_id": 1, "count": 10}


async def test_what_fails_leaves_nothing(database: Database) -> None:
    async def work(session: AsyncClientSession) -> None:
        await database.data["cards"].insert_one({"a": 1}, session=session)
        raise LookupError("changed my mind")

    with pytest.raises(LookupError):
        await database.transaction(work)
    assert await database.data["cards"].count_documents({}) == 0


async def test_what_collides_for_too_long_is_given_up(database: Database) -> None:
    cards = database.data["cards"]
    await cards.insert_one({"_id": 1, "count": 0})

    async def add(session: AsyncClientSession) -> None:
        await cards.update_one({"_id": 1}, {"$inc": {"count": 1}}, session=session)

    async def hold(session: AsyncClientSession) -> None:
        await add(session)
        async with asyncio.timeout(HANG):
            with pytest.raises(Unavailable, match="busy with other changes; try again"):
                await database.transaction(add, seconds=0.5)

    await database.transaction(hold, seconds=HANG)
    assert await cards.find_one({"_id": 1}) == {"_id": 1, "count": 1}


async def test_what_is_slow_by_itself_is_not_said_to_be_held_up(database: Database) -> None:
    async def work(session: AsyncClientSession) -> None:
        raise ExecutionTimeout("operation exceeded time limit", 50)  # as `maxTimeMS` makes it

    with pytest.raises(ExecutionTimeout):
        await database.transaction(work)


async def test_without_a_server_it_ends_as_soon_as_its_time_is_over(settings: Settings) -> None:
    nowhere = settings.model_copy(
        update={"mongo_url": "mongodb://127.0.0.1:1/?replicaSet=rs0", "mongo_timeout_seconds": 0.2}
    )
    async with connect(nowhere) as database:

        async def work(session: AsyncClientSession) -> object:
            return await database.data["cards"].find_one({}, session=session)

        async with asyncio.timeout(HANG):
            with pytest.raises(ServerSelectionTimeoutError):
                await database.transaction(work, seconds=0.5)


async def test_those_that_take_turns_do_not_collide(database: Database) -> None:
    cards = database.data["cards"]
    await cards.insert_one({"_id": 1, "count": 0})
    attempts = 0

    async def add(session: AsyncClientSession) -> None:
        nonlocal attempts
        attempts += 1
        await cards.update_one({"_id": 1}, {"$inc": {"count": 1}}, session=session)

    await asyncio.gather(*(database.transaction(add, turn=1) for _ in range(20)))
    assert await cards.find_one({"_id": 1}) == {"_id": 1, "count": 20}
    assert attempts == 20
    assert database._turns == {}


async def test_whose_turn_does_not_come_is_told(database: Database) -> None:
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def stay(session: AsyncClientSession) -> None:
        begun.set()
        await goes_on.wait()

    staying = asyncio.create_task(database.transaction(stay, turn=1))
    await begun.wait()
    with pytest.raises(Unavailable):
        await database.transaction(stay, seconds=0.1, turn=1)
    goes_on.set()
    await database.transaction(stay, turn=2)
    await staying
    await database.transaction(stay, turn=1)


async def test_whose_turn_comes_too_late_is_told(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop was held up between its turn and its begin."""
    times = iter((0.0, 0.6))
    monkeypatch.setattr(connection, "monotonic", lambda: next(times))

    async def work(session: AsyncClientSession) -> None:
        raise AssertionError

    with pytest.raises(Unavailable):
        await database.transaction(work, seconds=0.5, turn=1)
    assert database._turns == {}


async def test_what_took_too_long_locks_nothing(database: Database) -> None:
    """PyMongo would not tell MongoDB that it has given up."""
    cards = database.data["cards"]
    await cards.insert_one({"_id": 1, "count": 0})

    async def add(session: AsyncClientSession) -> None:
        await cards.update_one({"_id": 1}, {"$inc": {"count": 1}}, session=session)
        await asyncio.sleep(0.6)
        await cards.find_one({"_id": 1}, session=session)

    with pytest.raises(ExecutionTimeout):
        await database.transaction(add, seconds=0.5)
    async with asyncio.timeout(HANG):
        await cards.update_one({"_id": 1}, {"$inc": {"count": 10}})
    assert await cards.find_one({"_id": 1}) == {"_id": 1, "count": 10}
