"""Downloads counted: by day, in a window of 30 days, each once."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect
from pymongo.monitoring import CommandStartedEvent

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.models import trending_score
from modelharbor.observability.commands import CommandCounter
from modelharbor.resolvers.downloads import DownloadCounter, counting_downloads, leave_window
from tests.documents import START, insert_actor, insert_model

pytestmark = pytest.mark.anyio


async def stats(database: Database, model_id: ObjectId) -> Row:
    model = await database.data["models"].find_one({"_id": model_id})
    assert model is not None
    found: Row = model["stats"]
    return found


async def days(database: Database) -> list[tuple[ObjectId, datetime, int, bool]]:
    rows = await database.data["downloads"].find({}).sort([("model_id", 1), ("day", 1)]).to_list()
    return [(row["model_id"], row["day"], row["downloads"], row["in_window"]) for row in rows]


def today() -> datetime:
    return utc_now().replace(hour=0, minute=0, second=0, microsecond=0)


async def test_counts_are_written_by_the_flush(database: Database) -> None:
    ada = await insert_actor("ada")
    first = await insert_model(ada, "first", stats={"likes": 3, "downloads_30d": 5})
    other = await insert_model(ada, "other")
    counter = DownloadCounter(database)
    for model in (first, other, first):
        counter.count(model.id)
    assert await days(database) == []

    await counter.flush()
    counter.count(first.id)
    await counter.flush()
    await counter.flush()

    found = await stats(database, first.id)
    assert (found["downloads_30d"], found["downloads_all"]) == (8, 3)
    assert found["trending_score"] == pytest.approx(trending_score(8, 3, START), abs=1e-12)
    assert found["as_of"] > START
    assert (await stats(database, other.id))["downloads_all"] == 1
    assert await days(database) == [(first.id, today(), 3, True), (other.id, today(), 1, True)]


async def test_counters_of_many_processes_add_up(database: Database) -> None:
    model = await insert_model(await insert_actor("ada"), "tiny")
    counters = [DownloadCounter(database) for _ in range(8)]
    for counter in counters:
        counter.count(model.id)
    await asyncio.gather(*(counter.flush() for counter in counters))
    assert (await stats(database, model.id))["downloads_all"] == 8
    assert await days(database) == [(model.id, today(), 8, True)]


async def test_what_could_not_be_written_is_written_later(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await insert_model(await insert_actor("ada"), "tiny")
    counter = DownloadCounter(database)
    counter.count(model.id)
    with monkeypatch.context() as broken:

        async def fail(self: DownloadCounter, *arguments: Any) -> None:
            counter.count(model.id)  # another comes while the flush runs
            raise AutoReconnect("gone")

        broken.setattr(DownloadCounter, "_add", fail)
        with pytest.raises(AutoReconnect):
            await counter.flush()
    assert (await stats(database, model.id))["downloads_all"] == 0
    await counter.flush()
    assert (await stats(database, model.id))["downloads_all"] == 2


async def test_the_end_flushes(database: Database) -> None:
    model = await insert_model(await insert_actor("ada"), "tiny")
    async with counting_downloads(database) as counter:
        counter.count(model.id)
    assert (await stats(database, model.id))["downloads_all"] == 1


async def test_the_days_that_leave_are_read_in_bounded_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[dict[str, Any]] = []

    def started(self: CommandCounter, event: CommandStartedEvent) -> None:
        commands.append(dict(event.command))

    monkeypatch.setattr(CommandCounter, "started", started)
    assert await leave_window(database) == 0
    assert [(command["find"], command["maxTimeMS"]) for command in commands] == [
        ("downloads", database.query_timeout_ms)
    ]


async def test_each_day_leaves_the_window_once(database: Database) -> None:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "tiny", stats={"downloads_30d": 100, "downloads_all": 100})
    other = await insert_model(ada, "other", stats={"downloads_30d": 1, "downloads_all": 9})
    now = datetime(2026, 7, 31, 15, tzinfo=UTC)
    midnight = datetime(2026, 7, 31, tzinfo=UTC)
    for model_id, age, count in (
        (model.id, 29, 1),
        (model.id, 30, 20),
        (model.id, 31, 40),
        (other.id, 60, 9),
    ):
        await database.data["downloads"].insert_one(
            {
                "model_id": model_id,
                "day": midnight - timedelta(days=age),
                "downloads": count,
                "in_window": True,
            }
        )

    left = await asyncio.gather(*(leave_window(database, now) for _ in range(4)))

    assert sum(left) == 3
    found = await stats(database, model.id)
    assert (found["downloads_30d"], found["downloads_all"]) == (40, 100)
    assert found["trending_score"] == pytest.approx(trending_score(40, 0, START), abs=1e-12)
    found = await stats(database, other.id)
    assert (found["downloads_30d"], found["downloads_all"]) == (0, 9)  # never below nothing
    assert [in_window for *_, in_window in await days(database)] == [False, False, True, False]
    assert await leave_window(database, now) == 0


def test_trending_score() -> None:
    epoch = datetime(2020, 1, 1, tzinfo=UTC)
    assert trending_score(0, 0, epoch) == 0
    assert trending_score(1000, 0, epoch) == 3
    assert trending_score(0, 100, epoch) == 3
    assert trending_score(0, 0, epoch + timedelta(days=45)) == 1
    assert trending_score(90, 1, epoch - timedelta(days=45)) == 1


async def test_the_stored_score_is_the_same(database: Database) -> None:
    ada = await insert_actor("ada")
    for number, (downloads, likes, created) in enumerate(
        [(0, 0, START), (12_345, 67, datetime(2019, 5, 1, 1, 2, 3, tzinfo=UTC)), (9, 0, START)]
    ):
        model = await insert_model(
            ada,
            f"model-{number}",
            stats={"downloads_30d": downloads, "likes": likes},
            created_at=created,
        )
        counter = DownloadCounter(database)
        counter.count(model.id)
        await counter.flush()
        found = await stats(database, model.id)
        assert found["trending_score"] == pytest.approx(
            trending_score(downloads + 1, likes, created), abs=1e-12
        )


async def test_days_that_leave_are_found_by_their_index(database: Database) -> None:
    cursor = database.data["downloads"].find(
        {"in_window": True, "day": {"$lte": START}}, {"_id": 1}
    )
    plan = (await cursor.explain())["queryPlanner"]["winningPlan"]
    assert plan["inputStage"]["inputStage"]["indexName"] == "leaving"
