"""The stream says up to when it has told everything, and that is so."""

import asyncio
import random
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.cache import following as module
from modelharbor.cache.following import NOWHERE, pack, unpack
from modelharbor.db.connection import Database

from .hearing import Heard
from .processes import until

pytestmark = pytest.mark.anyio


async def insert_models(database: Database, count: int) -> list[ObjectId]:
    keys = [ObjectId() for _ in range(count)]
    await database.data["models"].insert_many(
        [{"_id": key, "name_lower": str(key), "owner_login_lower": str(key)} for key in keys]
    )
    return keys


async def now_of(database: Database) -> int:
    return pack((await database.data.command("hello"))["operationTime"])


def assert_kept(heard: Heard) -> None:
    """No change came with a time that had been said to be whole before it."""
    for position, count in heard.reached_to:
        assert all(time > position for time in heard.times[count:])


async def write_at_random(database: Database, keys: list[ObjectId], count: int, seed: int) -> None:
    """What is followed and what is not, alone and in transactions."""
    chance, data = random.Random(seed), database.data
    for _ in range(count):
        kind = chance.random()
        if kind < 0.3:
            await data["jobs"].update_one({"_id": seed}, {"$inc": {"n": 1}}, upsert=True)
        elif kind < 0.7:
            await data["models"].update_one({"_id": chance.choice(keys)}, {"$inc": {"revision": 1}})
        else:

            async def work(session: Any) -> None:
                for _ in range(chance.randrange(1, 20)):
                    key = ObjectId()
                    row = {"_id": key, "version_id": key, "path": "p"}
                    await data["files"].insert_one(row, session=session)
                await data["jobs"].update_one(
                    {"_id": seed}, {"$inc": {"n": 1}}, upsert=True, session=session
                )

            await database.transaction(work)


@pytest.mark.parametrize("batch", [1000, 3])
async def test_nothing_comes_before_a_place_that_was_reached(
    heard: Heard, database: Database, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where answers end in the middle of a commit."""
    monkeypatch.setattr(module, "BATCH", batch)
    keys = await insert_models(database, 10)
    await asyncio.gather(*[write_at_random(database, keys, 40, seed) for seed in range(6)])
    now = await now_of(database)
    # Whatever was written last, followed or not, and though nothing follows it.
    await until(lambda: heard.position >= now)
    assert len(heard.reached_to) > 5
    assert_kept(heard)


async def test_nothing_is_left_out_when_it_is_opened_again(
    heard: Heard, database: Database
) -> None:
    keys = await insert_models(database, 10)

    async def kill() -> None:
        for _ in range(15):
            await asyncio.sleep(0.03)
            cursor = heard.following.cursor
            await database.data.command("killCursors", NOWHERE, cursors=[cursor])

    await asyncio.gather(kill(), *[write_at_random(database, keys, 30, seed) for seed in range(4)])
    now = await now_of(database)
    await until(lambda: heard.position >= now)
    rows = await database.data["models"].find({"_id": {"$in": keys}}).to_list()
    told = [change for change in heard.changes if change["coll"] == "models"]
    for row in rows:
        mine = [change for change in told if change["id"] == row["_id"]]
        # Each is told at least once, and in order; an answer that was lost is told again.
        assert len([each for each in mine if each["kind"] == "update"]) >= row.get("revision", 0)
    assert heard.lost_to == [heard.lost_to[0]]
    files = {row["_id"] async for row in database.data["files"].find({}, {"_id": 1})}
    assert files == {each["id"] for each in heard.changes if each["coll"] == "files"}


async def test_a_large_commit_is_told_in_turns(heard: Heard, database: Database) -> None:
    """Others have their turn meanwhile, and the place before it is all that is reached until its end."""
    version, count = ObjectId(), 3000
    before = heard.position

    async def work(session: Any) -> None:
        rows = [{"version_id": version, "path": str(number)} for number in range(count)]
        await database.data["files"].insert_many(rows, session=session)

    turns = 0

    async def others() -> None:
        nonlocal turns
        while len(heard.changes) < count:
            turns += bool(heard.changes)
            await asyncio.sleep(0)

    await asyncio.gather(database.transaction(work), others())
    commit = heard.times[-1]
    assert set(heard.times[-count:]) == {commit}
    await until(lambda: heard.position >= commit)
    between = {place for place, _ in heard.reached_to if before < place < commit}
    assert all(place == commit - 1 or place < commit for place in between)
    assert turns >= count // module.TURN
    assert_kept(heard)


async def test_what_was_looked_up_counts_when_all_up_to_then_is_told(
    heard: Heard, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that left a list before it was looked up: that it was in it is not told, and so its
    change is not whole before the one that took it away is told too."""
    reached: list[tuple[int, float]] = []
    monkeypatch.setattr(heard, "reached", lambda *told: reached.append(told))
    following, second = heard.following, 1 << 32
    now = await now_of(database)

    def reach(position: int, apart: int, until: int, asked_at: float) -> list[tuple[int, float]]:
        reached.clear()
        following._reach(position, apart, until, asked_at)
        return list(reached)

    following._held = None
    # Nothing was looked up, or nothing has come since.
    assert reach(now, 0, now + 9, 1.0) == [(now, 1.0)]
    assert reach(now + 1, now + 1, now + 1, 2.0) == [(now + 1, 2.0)]
    # Looked up while others wrote.
    assert reach(now + 5, now + 3, now + 7, 3.0) == [(now + 2, 0.0)]
    assert reach(now + 6, 0, now + 9, 4.0) == []
    # All up to 7 is told, with it what came at 3; not what was looked up at 8.
    assert reach(now + 9, now + 8, now + second, 5.0) == [(now + 7, 4.0)]
    assert reach(now + second, 0, now + second, 6.0) == [(now + second, 6.0)]
    following._held = None


async def test_times_are_packed_in_their_order() -> None:
    assert pack(unpack(5 << 32 | 7)) == 5 << 32 | 7
    assert unpack(5 << 32 | 7).time == 5
