"""Migrations: each step once, whoever comes, and a process that died holds nobody up for ever."""

import asyncio
from datetime import timedelta

import pytest
from bson import ObjectId

from modelharbor.db import migrations
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.migrations import migrate, pending

pytestmark = pytest.mark.anyio


async def test_many_at_once_apply_each_step_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    async def slow(database: Database) -> None:
        ran.append("slow")
        await asyncio.sleep(0.05)

    async def quick(database: Database) -> None:
        ran.append("quick")

    steps = [*migrations.MIGRATIONS, (9001, "slow", slow), (9002, "quick", quick)]
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)
    try:
        assert await pending(database) == ["9001 slow", "9002 quick"]
        async with asyncio.timeout(30):
            answers = await asyncio.gather(*[migrate(database) for _ in range(5)])
        assert ran == ["slow", "quick"]
        assert sorted(answers) == [[], [], [], [], ["9001 slow", "9002 quick"]]
        assert await pending(database) == []
        assert await database.data["migrations"].find_one({"_id": "lock"}) is None
    finally:
        await database.data["migrations"].delete_many({"_id": {"$gte": 9000}})


async def test_a_failed_step_stays_pending_and_gives_the_lock_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(database: Database) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(
        migrations, "MIGRATIONS", [*migrations.MIGRATIONS, (9001, "broken", broken)]
    )
    with pytest.raises(RuntimeError, match="no"):
        await migrate(database)
    assert await pending(database) == ["9001 broken"]
    assert await database.data["migrations"].find_one({"_id": "lock"}) is None


async def test_the_lock_of_a_dead_process_ends(database: Database) -> None:
    left = {"_id": "lock", "owner": ObjectId(), "until": utc_now() - timedelta(seconds=1)}
    await database.data["migrations"].insert_one(left)
    async with asyncio.timeout(10):
        assert await migrate(database) == []
    assert await database.data["migrations"].find_one({"_id": "lock"}) is None
