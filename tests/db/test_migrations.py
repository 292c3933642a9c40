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
from modelharbor.db.migrations import migrate, order_events, pending, take_uploads, take_usage
from modelharbor.db.models import Visibility
from modelharbor.db.rollups import Cuboid, Grain, cuboid_of
from modelharbor.db.usage import UsageKind, day_of
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model
from tests.usage import insert_usage, roll_up, usage

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


async def test_downloads_of_before_become_rows_that_add_up_to_the_same(
    database: Database, settings: Settings
) -> None:
    """Those of days, of today, and of before any day was counted; in the numbers of models too."""
    ada = await insert_actor("ada")
    now = utc_now()
    counted = {0: 2, 1: 3, 29: 5, 30: 7, 400: 11}
    shown = await insert_model(
        ada, "shown", stats={"downloads_30d": 10, "downloads_all": 128}, task="ocr"
    )
    hidden = await insert_model(
        ada, "hidden", visibility=Visibility.PRIVATE, stats={"downloads_all": 1}
    )
    unused = await insert_model(ada, "unused", stats={"downloads_all": 9})
    await database.data["models"].update_many({}, {"$unset": {"stats.use_7d": ""}})
    rows = [
        {"model_id": shown.id, "day": day_of(now) - timedelta(days=back), "downloads": downloads}
        for back, downloads in counted.items()
    ]
    rows.append({"model_id": hidden.id, "day": day_of(now) - timedelta(days=2), "downloads": 1})
    await database.data["downloads"].insert_many(rows)
    before = {row["_id"]: row["stats"] for row in await database.find("models", {})}
    await take_usage(database)
    assert "downloads" not in await database.data.list_collection_names()
    # Once more, as after a process that died at the end.
    await database.data["downloads"].insert_many(rows)
    await take_usage(database)
    await roll_up(database, settings)
    for row in await database.find("models", {}):
        old, new = before[row["_id"]], row["stats"]
        for name in ("downloads_30d", "downloads_all", "likes"):
            assert new[name] == old[name] or row["_id"] == hidden.id, name
    by_name = {row["name"]: row["stats"] for row in await database.find("models", {})}
    names = ("downloads_all", "downloads_30d", "use_1d", "use_7d")
    assert [by_name["shown"][name] for name in names] == [128, 10, 2, 5]
    assert [by_name["hidden"][name] for name in names] == [1, 1, 0, 1]
    assert [by_name["unused"][name] for name in names] == [9, 0, 0, 0]
    for cuboid, group in (
        ("model", {"model": shown.id}),
        ("model.client", {"model": shown.id}),
        ("model.all", {"model": shown.id}),
        ("audience", {"audience": "public"}),
        ("audience.task", {"audience": "public", "value": "ocr"}),
        ("audience.client", {"audience": "public", "value": ""}),
    ):
        days = await database.find("rollup_days", {"cuboid": cuboid, **group}, sort={"at": -1})
        assert [row["downloads"] for row in days] == list(counted.values()), cuboid
        quarters = await database.find(
            "rollup_quarters", {"cuboid": cuboid_of(Cuboid(cuboid), Grain.QUARTER).value, **group}
        )
        assert sum(row["downloads"] for row in quarters) == sum(counted.values()), cuboid
    homes = {row["_id"]: row for row in await database.find("rollup_homes", {})}
    assert [homes[each.id]["downloads_before"] for each in (shown, hidden, unused)] == [100, 0, 9]
    # What follows is added to that.
    await insert_usage(database, [usage(UsageKind.DOWNLOAD, now, model=shown.id, who=1)])
    await roll_up(database, settings)
    [row] = await database.find("models", {"_id": shown.id})
    assert [row["stats"][name] for name in names] == [129, 11, 3, 6]


async def test_a_database_without_models_has_nothing_to_take(database: Database) -> None:
    await take_usage(database)
    assert await database.find("rollup_state", {}) == []
