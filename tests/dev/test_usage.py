"""The usage of the demo: rows that agree with each other, with the stats of models and with the rollups."""

from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument
from modelharbor.db.rollups import (
    ADDITIVE,
    OF_API,
    OF_AUDIENCES,
    STATE,
    Cuboid,
    Grain,
    coarser,
    distinct,
    key_of,
    of_audiences,
    sums_of,
)
from modelharbor.db.usage import day_of
from modelharbor.dev.demo import add_usage, clear, seed, seeded, usage_left
from modelharbor.dev.population import Population, Shape
from modelharbor.dev.samples import make_samples
from modelharbor.dev.usage import DAYS, Usage
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, open_storage
from modelharbor.worker.usage_intake import mark_day
from tests.usage import roll_up

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 12, 1, 10, 7, tzinfo=UTC)
TODAY = day_of(NOW)
FIRST = TODAY - timedelta(days=DAYS - 1)
MODELS = 40
Sums = Counter[str]


@pytest.fixture
async def storage(settings: Settings) -> AsyncIterator[BlobStore]:
    async with open_storage(settings) as storage:
        yield storage


def made(now: datetime = NOW, models: int = 150) -> tuple[list[Row], dict[str, list[Row]]]:
    """Models, and rows by collection: without a database, and without samples."""
    usage, found, rows = Usage(1, now), [], dict[str, list[Row]]()
    for name, row in Population(Shape(models), []).rows():
        usage.take(name, row)
        if name == ModelDocument.Settings.name:
            found.append(row)
    for name, row in usage.rows():
        rows.setdefault(name, []).append(row)
    return found, rows


def total(rows: list[Row], *cuboids: Cuboid) -> Sums:
    found: Sums = Counter()
    for row in rows:
        if row["cuboid"] in {each.value for each in cuboids}:
            found.update({name: row[name] for name in ADDITIVE if name in row})
    return found


def test_stats_of_models_are_the_sums_of_their_rows() -> None:
    models, rows = made()
    homes = {row["_id"]: row for row in rows["rollup_homes"]}
    by_model: dict[ObjectId, list[Row]] = {}
    for row in rows["rollup_days"]:
        if row["cuboid"] == Cuboid.MODEL.value:
            by_model.setdefault(row["model"], []).append(row)
    assert len(homes) == len(models)
    for model in models:
        own, stats, home = by_model.get(model["_id"], []), model["stats"], homes[model["_id"]]
        created = max(FIRST, day_of(model["created_at"]))
        assert all(created <= row["at"] <= TODAY for row in own)
        for days in (1, 7, 30):
            inside = total([row for row in own if (TODAY - row["at"]).days < days], Cuboid.MODEL)
            assert stats[f"use_{days}d"] == inside["downloads"] + 10 * inside["likes"]
        assert stats["downloads_30d"] == inside["downloads"]
        who = {each for row in own if (TODAY - row["at"]).days < 30 for each in row.get("who", ())}
        assert stats["unique_downloaders_30d"] == distinct(who)[0]
        ever = total(own, Cuboid.MODEL)
        assert home["downloads_before"] >= 0
        assert stats["downloads_all"] == home["downloads_before"] + ever["downloads"]
        assert ever["storage_bytes"] == home["storage_bytes"] == stats["size_bytes"]
        assert ever["stored_bytes"] == home["stored_bytes"] == stats["stored_bytes"]
    assert sum(model["stats"]["unique_downloaders_30d"] > 0 for model in models) > 30


def test_every_cuboid_and_grain_says_the_same() -> None:
    _, rows = made()
    homes = {row["_id"]: row for row in rows["rollup_homes"]}
    for grain in Grain:
        buckets: dict[datetime, dict[Any, Row]] = {}
        for row in rows[grain.value]:
            assert row["at"] == day_of(row["at"]) or grain is not Grain.DAY
            assert row["at"].timestamp() % {Grain.DAY: 86_400}.get(grain, 900) == 0
            buckets.setdefault(row["at"], {})[key_of(row)] = row
        for found in buckets.values():
            fine = {
                key: sums_of(row)
                for key, row in found.items()
                if key[0] in (Cuboid.MODEL_ALL.value, Cuboid.API_ALL.value)
            }
            groups = {**fine, **coarser(fine, grain)}
            groups |= of_audiences(groups, homes)
            assert found.keys() == groups.keys()
    days, quarters, minutes = (
        rows[each.value] for each in (Grain.DAY, Grain.QUARTER, Grain.MINUTE)
    )
    for cuboid in (
        Cuboid.MODEL,
        Cuboid.MODEL_ALL,
        Cuboid.AUDIENCE,
        Cuboid.AUDIENCE_TASK,
        Cuboid.API,
    ):
        assert total(days, cuboid) == total(quarters, cuboid)
        recent = [row for row in quarters if row["at"] >= TODAY - timedelta(days=1)]
        assert total(minutes, cuboid) == total(recent, cuboid)
        assert total(minutes, cuboid)
    assert {row["cuboid"] for row in days} >= {*OF_API, *OF_AUDIENCES}


def test_it_looks_like_a_hub() -> None:
    """More from month to month, less at weekends; all before now; a deal of it by programs."""
    _, rows = made()
    by_day: Counter[datetime] = Counter()
    by_client: Counter[str] = Counter()
    for row in rows["rollup_days"]:
        if row["cuboid"] == Cuboid.API.value:
            by_day[row["at"]] += row["requests"]
        elif row["cuboid"] == Cuboid.AUDIENCE_CLIENT.value:
            by_client[row["value"]] += row.get("downloads", 0)
    assert len(by_day) == DAYS
    mondays = [by_day[day] for day in sorted(by_day) if day.weekday() == 0]
    assert mondays[-1] > 1.3 * mondays[0]
    for day in sorted(by_day):
        if day.weekday() == 6 and day + timedelta(days=2) in by_day and day + timedelta(3) < TODAY:
            assert by_day[day] < 0.7 * by_day[day + timedelta(days=2)]
    assert by_client["huggingface_hub"] > by_client["curl"] > 0
    assert by_day[TODAY] < by_day[TODAY - timedelta(days=1)]
    for grain in (Grain.MINUTE, Grain.QUARTER):
        assert max(row["at"] for row in rows[grain.value]) < NOW.replace(minute=0)
    api = [row for row in rows["rollup_days"] if row["cuboid"] == Cuboid.API_ALL.value]
    assert all(sum(row["latencies"]) == row["requests"] for row in api)


def test_just_after_midnight_today_has_hardly_begun() -> None:
    for minute in (0, 16):
        models, rows = made(TODAY + timedelta(minutes=minute), models=60)
        assert sum(model["stats"]["downloads_30d"] for model in models) > 0
        assert max(row["at"] for row in rows["rollup_days"]) <= TODAY
        assert max(row["at"] for row in rows["rollup_quarters"]) <= TODAY


def test_it_grows_evenly() -> None:
    """No day stands out from those beside it by more than the rhythm of the week allows."""
    _, rows = made()
    calls = sorted(
        (row["at"], row["requests"])
        for row in rows["rollup_days"]
        if row["cuboid"] == Cuboid.API.value and row["at"] < TODAY
    )
    for (_, before), (_, after) in pairwise(calls):
        assert 0.4 < after / before < 2.5


def test_no_model_has_more_than_all_others() -> None:
    """Yet most of them hardly anything."""
    shape = Shape(500)
    models = [
        row
        for name, row in Population(shape, make_samples(shape.samples)).rows()
        if name == ModelDocument.Settings.name
    ]
    for name, first in (("downloads_30d", 0.102), ("downloads_all", 0.077)):
        many = sorted((model["stats"][name] for model in models), reverse=True)
        assert (round(many[0] / sum(many), 3), len(set(many[:20]))) == (first, 20)
        assert many[250] < 200


async def test_the_first_run_changes_nothing(
    database: Database, storage: BlobStore, settings: Settings
) -> None:
    await seed(database, storage, models=MODELS, now=NOW)
    before = await everything(database)
    ran = await roll_up(database, settings, now=NOW)
    assert (ran.rows, ran.models, ran.minutes) == (0, 0, 0)
    assert await everything(database) == before
    state = await database.data["rollup_state"].find_one()
    assert state is not None
    assert (state["run"], state["owner"]) == (1, None)


async def test_today_added_up_again_is_the_same(
    database: Database, storage: BlobStore, settings: Settings
) -> None:
    await seed(database, storage, models=MODELS, now=NOW)
    before = await everything(database)
    await mark_day(database.data, TODAY.replace(tzinfo=None))
    ran = await roll_up(database, settings, now=NOW)
    assert (ran.minutes, ran.rows, ran.models) == (1, 0, 0)
    after = await everything(database)
    for grain in Grain:
        assert after[grain.value] == before[grain.value]
    assert max(row["at"] for row in before["rollup_minutes"]) > TODAY
    indexes = await database.data["usage_20261201"].index_information()
    assert list(indexes) == ["_id_", "at"]


async def test_on_the_next_day_windows_move(
    database: Database, storage: BlobStore, settings: Settings
) -> None:
    await seed(database, storage, models=MODELS, now=NOW)
    ran = await roll_up(database, settings, now=NOW + timedelta(days=1))
    assert ran.models > 0
    assert await database.data["models"].count_documents({"stats.use_1d": {"$gt": 0}}) == 0
    assert await database.data["models"].count_documents({"stats.downloads_30d": {"$gt": 0}}) > 0


async def everything(database: Database) -> dict[str, list[Row]]:
    names = ("models", "rollup_homes", *(grain.value for grain in Grain))
    return {name: await database.data[name].find().sort("_id", 1).to_list() for name in names}


async def test_it_may_come_later_and_nobody_adds_up_before(
    database: Database, storage: BlobStore
) -> None:
    result = await seed(database, storage, models=MODELS, usage_later=True)
    state = await database.data["rollup_state"].find_one({"_id": STATE})
    assert state is not None
    assert state["owner"] == "demo"
    marker = await seeded(database)
    assert marker is not None
    assert not marker.complete
    assert await database.data["rollup_days"].count_documents({}) == 0
    assert result.usage is not None
    await add_usage(database, result.usage)
    marker = await seeded(database)
    assert marker == result.marker
    assert await database.data["rollup_days"].count_documents({}) > 1000
    state = await database.data["rollup_state"].find_one({"_id": STATE})
    assert state is not None
    assert state["owner"] is None


async def test_what_was_broken_off_is_gone_on_with(database: Database, storage: BlobStore) -> None:
    """Nothing twice, and nothing of another moment; as the first start stores it."""
    assert await usage_left(database) is None
    result = await seed(database, storage, models=MODELS, usage_later=True, now=NOW)
    assert result.usage is not None
    rows = list(result.usage.rows())
    for name, row in rows[:500]:
        await database.data[name].insert_one(row)
    models = await everything(database)
    await database.data["rollup_state"].update_one({}, {"$set": {"until": NOW}})
    left = await usage_left(database)
    assert left is not None
    assert list(left.rows()) == rows
    state = await database.data["rollup_state"].find_one({"_id": STATE})
    assert state is not None
    assert (state["owner"], state["until"] > utc_now()) == ("demo", True)
    await add_usage(database, left)
    stored = await everything(database)
    assert stored["models"] == models["models"]
    for name in (*stored, left.events):
        if name != "models":
            wanted = [row for each, row in rows if each == name]
            assert await database.data[name].count_documents({}) == len(wanted) > 0
    assert await seeded(database) == result.marker
    assert await usage_left(database) is None


async def test_it_is_left_out_of_many_models_and_cleared(
    database: Database, storage: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.dev.demo.THIN_ABOVE", 24)
    result = await seed(database, storage, models=25)
    assert not result.marker.usage
    assert await database.data["rollup_state"].count_documents({}) == 0
    await clear(database, storage)
    await seed(database, storage, models=25, usage=True)
    await database.data["usage_20261201"].insert_one({})
    await clear(database, storage)
    names = ["rollup_days", "rollup_homes", "rollup_state", "usage_20261201"]
    assert [await database.data[name].count_documents({}) for name in names] == [0] * 4
