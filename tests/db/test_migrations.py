"""Migrations: each step once, whoever comes, and a process that died holds nobody up for ever."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.db import migrations
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.files import path_key
from modelharbor.db.migrations import migrate, order_events, pending, take_uploads
from tests.documents import insert_actor, insert_model

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


async def test_events_of_before_get_an_order_and_whom_they_concern(database: Database) -> None:
    acme = await insert_actor("acme")
    model = await insert_model(acme, "bert")
    version, person, other, gone = (ObjectId() for _ in range(4))

    def told(seconds: int, **values: Any) -> Row:
        common = {"kind": "MODEL_UPDATED", "model_id": None, "version_id": None}
        of_before: Row = {"organization_id": None, "actor_id": person, "before": {}, "after": {}}
        new_id = ObjectId(f"{seconds:08x}" + ObjectId().binary.hex()[8:])
        return {"_id": new_id, **common, **of_before, **values}

    role = {"kind": "ROLE_GRANTED", "after": {"actor_id": other, "role": "VIEWER"}}
    old = [
        told(1_700_000_001, model_id=model.id, version_id=version),
        told(1_700_000_000, model_id=gone),
        told(1_700_000_002, organization_id=acme.id, **role),
        told(1_700_000_003, model_id=model.id, **role),
        told(0xEEEE_EEEE, model_id=model.id),  # of a clock that is far ahead
        told(0xEEEE_EEEF, model_id=model.id),
    ]
    await database.data["events"].insert_many(old)
    now = (await database.data.command("hello"))["operationTime"]
    await order_events(database)
    rows = {row["_id"]: row async for row in database.data["events"].find().sort("position", 1)}
    # In the order of the ids, each with its own as its place, where that is of the past.
    assert list(rows) == sorted(row["_id"] for row in old)
    assert [rows[row["_id"]]["position"] for row in old[:4]] == [str(row["_id"]) for row in old[:4]]
    last, next_to_last = rows[old[5]["_id"]]["position"], rows[old[4]["_id"]]["position"]
    log = await database.data["log"].find_one({"_id": "events"})
    assert log is not None
    assert [next_to_last[16:], last[16:]] == ["80000000", "80000001"]
    assert next_to_last[:16] == last[:16] < log["recorded"][:16]
    assert log["recorded"] >= f"{now.time:08x}{now.inc:08x}00000000"
    assert log == {
        "_id": "events",
        "recorded": log["recorded"],
        "began": "0" * 24,
        "owner": None,
        "until": None,
    }
    both = [f"actor:{acme.id}", f"actor:{other}"]
    assert [
        (rows[row["_id"]]["stream"], rows[row["_id"]]["about"], rows[row["_id"]]["principals"])
        for row in old[:5]
    ] == [
        ("models", [model.id, acme.id, version], ["public"]),
        ("models", [gone], []),
        ("people", [acme.id, other], both),
        ("people", [acme.id, other], both),
        ("models", [model.id, acme.id], ["public"]),
    ]
    # Nothing else of them is changed, and nothing at all by a second time.
    for row in old:
        assert row.items() <= rows[row["_id"]].items()
        assert len(rows[row["_id"]]) == len(row) + 4
    await order_events(database)
    again = await database.data["events"].find().sort("position", 1).to_list()
    assert again == list(rows.values())
    assert await database.data["log"].find().to_list() == [log]


async def test_files_of_before_get_their_paths_without_case(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those have that come now, also beyond ASCII."""
    monkeypatch.setattr(migrations, "PATHS_AT_ONCE", 2)
    version_id = ObjectId()
    paths = ["README.md", "\u00c4.txt", "STRA\u00dfE/a", "\u0130x", "e\u0301"]
    await database.data["files"].insert_many(
        [{"version_id": version_id, "path": path} for path in paths]
    )
    await take_uploads(database)
    rows = await database.data["files"].find({"version_id": version_id}).to_list()
    assert {row["path"]: row["path_key"] for row in rows} == {
        path: path_key(path) for path in paths
    }
