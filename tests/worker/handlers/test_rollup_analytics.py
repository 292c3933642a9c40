"""ROLLUP_ANALYTICS: models compared with what they are counted as, and days rolled up again."""

from datetime import timedelta
from typing import Any

import pytest

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.db.rollups import Grain
from modelharbor.db.usage import UsageKind, collection_of, day_of
from modelharbor.resolvers.jobs import start_backfill
from modelharbor.settings import Settings
from modelharbor.worker import rolling_up
from modelharbor.worker.handlers import rollup_analytics
from modelharbor.worker.handlers.rollup_analytics import roll_up_usage
from modelharbor.worker.usage_intake import mark_day
from tests.documents import insert_actor, insert_model
from tests.usage import insert_usage, roll_up, usage
from tests.worker.conftest import Hall

pytestmark = pytest.mark.anyio
HANDLERS = {JobKind.ROLLUP_ANALYTICS: roll_up_usage}


@pytest.fixture
def hall(database: Database, settings: Settings) -> Hall:
    return Hall(database, settings.model_copy(update={"drain_seconds": 0.3, "usage_days": 13}))


async def rows_of(database: Database) -> dict[str, list[Row]]:
    return {
        grain.value: [
            {name: value for name, value in row.items() if name != "run"}
            for row in await database.find(grain.value, {}, sort={"_id": 1})
        ]
        for grain in Grain
    }


async def events_of_days(database: Database) -> list[Row]:
    model = await insert_model(await insert_actor("ada"), "bert")
    now = utc_now()
    return await insert_usage(
        database,
        [
            usage(UsageKind.DOWNLOAD, now - timedelta(days=back), model=model.id, who=who)
            for back in (0, 1, 9, 12)
            for who in range(3)
        ],
    )


async def test_models_that_nobody_told_of_are_found(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.worker.usage_intake.MODELS_AT_ONCE", 2)
    monkeypatch.setattr(rollup_analytics, "PART_SECONDS", 0.0)
    database = hall.database
    ada = await insert_actor("ada")
    models = [
        await insert_model(ada, f"m{number}", stats={"size_bytes": 10, "stored_bytes": 4})
        for number in range(5)
    ]
    async with hall.working(HANDLERS):
        job = await hall.put(JobKind.ROLLUP_ANALYTICS)
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
        assert done["result"] == {"models": 5}
        assert (done["progress"]["current"], done["progress"]["total"]) == (5, 5)
        query = {"cuboid": "audience", "audience": "public"}
        [row] = await database.find("rollup_days", query)
        assert (row["storage_bytes"], row["stored_bytes"]) == (50, 20)
        # One is private by now, and one is smaller.
        await database.data["models"].update_one(
            {"_id": models[0].id}, {"$set": {"principals": ["actor:x"]}}
        )
        await database.data["models"].update_one(
            {"_id": models[1].id}, {"$set": {"stats.size_bytes": 7}}
        )
        job = await hall.put(JobKind.ROLLUP_ANALYTICS)
        await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
        [row] = await database.find("rollup_days", query)
        assert (row["storage_bytes"], row["stored_bytes"]) == (37, 16)


async def test_days_are_rolled_up_again(hall: Hall) -> None:
    """After all rows were lost; and it goes on from the day that was done last."""
    database = hall.database
    await events_of_days(database)
    await roll_up(database, hall.settings)
    rows = await rows_of(database)
    assert all(rows.values())
    for grain in Grain:
        await database.data[grain.value].delete_many({})
    today = day_of(utc_now())
    async with hall.working(HANDLERS):
        job = await start_backfill(database)
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
        days = hall.settings.usage_days + 1
        assert done["result"] == {"days": days, "events": 12, "skipped": 0}
        progress = done["progress"]
        assert (progress["current"], progress["total"], progress["unit"]) == (12, 12, "events")
        assert await rows_of(database) == rows
        # Some days alone; of those before, the rows stay as they are.
        await database.data["rollup_days"].delete_many({})
        job = await start_backfill(database, today - timedelta(days=9), today - timedelta(days=1))
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
        assert done["result"] == {"days": 9, "events": 6, "skipped": 0}
        job = await start_backfill(database, today - timedelta(days=400))
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
        assert done["result"]["events"] == 12
        [line] = await database.find("job_logs", {"job_id": job["_id"]})
        assert "rows of those days stay" in line["message"]
        assert await rows_of(database) == rows


async def test_rows_whose_events_are_gone_stay(hall: Hall) -> None:
    """Those older than is kept, and those whose collection is not there for another reason."""
    database = hall.database
    await events_of_days(database)
    await roll_up(database, hall.settings)
    rows, today = await rows_of(database), day_of(utc_now())
    await database.data.drop_collection(collection_of(today - timedelta(days=12)))
    await database.data[collection_of(today - timedelta(days=9))].delete_many({})
    await database.data["rollup_state"].update_one(
        {}, {"$set": {"whole_from": today - timedelta(days=11)}}
    )
    async with hall.working(HANDLERS):
        job = await start_backfill(database, today - timedelta(days=400))
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
        assert done["result"] == {"days": 11, "events": 6, "skipped": 2}
        lines = await database.find("job_logs", {"job_id": job["_id"]}, sort={"_id": 1})
        assert [line["message"] for line in lines] == [
            f"Events of before {today - timedelta(days=11):%Y-%m-%d} are not kept: rows of those days stay.",
            f"There are no events of {today - timedelta(days=9):%Y-%m-%d}: its rows stay.",
        ]
        job = await start_backfill(database, today - timedelta(days=20), today - timedelta(days=12))
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
        assert done["result"] == {"days": 0, "events": 0, "skipped": 1}
    assert await rows_of(database) == rows


async def test_it_goes_on_where_it_was(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    database = hall.database
    await events_of_days(database)
    days: list[Any] = []

    async def fragile(data: Any, day: Any) -> None:
        days.append(day)
        if len(days) == 3:
            raise ConnectionError("gone")
        await mark_day(data, day)

    monkeypatch.setattr(rollup_analytics, "mark_day", fragile)
    monkeypatch.setattr(rollup_analytics, "EVENTS_AT_ONCE", -1)
    start = day_of(utc_now()) - timedelta(days=4)
    async with hall.working(HANDLERS):
        job = await start_backfill(database, start)
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED", "RETRYING")
        assert done["state"] == "RETRYING"
        await database.data["jobs"].update_one(
            {"_id": job["_id"]}, {"$set": {"run_after": utc_now()}}
        )
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
    assert done["result"] == {"days": 5, "events": 6, "skipped": 0}
    assert days == [*days[:3], *days[2:3], *days[4:]]
    assert len(set(days)) == 5


async def test_a_job_waits_for_its_turn(hall: Hall) -> None:
    """While somebody else rolls up; and it can be cancelled meanwhile."""
    database = hall.database
    await roll_up(database, hall.settings)
    other = rolling_up.Lease(database, hall.settings)
    assert await other.take(due=False)
    async with other.holding(), hall.working(HANDLERS):
        job = await start_backfill(database)
        await hall.reaches(job["_id"], "RUNNING")
        await database.data["jobs"].update_one(
            {"_id": job["_id"]}, {"$set": {"state": "CANCELLING"}}
        )
        await hall.reaches(job["_id"], "CANCELLED")
    assert await database.count("usage_dirty", {}) == 0
