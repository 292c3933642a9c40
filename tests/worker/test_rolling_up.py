"""What a run takes in, moves and writes besides rows; and who rolls up."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from pymongo.errors import PyMongoError

from modelharbor.cache.client import connect_cache
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobState
from modelharbor.db.models import Visibility, trending_score
from modelharbor.db.rollups import STATE, Cuboid, Grain, naive
from modelharbor.db.uploads import UploadState
from modelharbor.db.usage import UsageKind, collection_of, day_of, minute_of
from modelharbor.errors import Unavailable
from modelharbor.events.recorder import recording
from modelharbor.jobs.states import tell
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.resolvers.models import create_model, delete_model, update_model
from modelharbor.resolvers.versions import create_version
from modelharbor.settings import Settings
from modelharbor.worker import rolling_up
from modelharbor.worker.rolling_up import Lease
from modelharbor.worker.rollups import ensure_state
from tests.documents import (
    START,
    change_upload,
    insert_actor,
    insert_job,
    insert_model,
    insert_upload,
    insert_version,
    viewer_of,
)
from tests.events.log import all_recorded
from tests.explaining import Captured, explained
from tests.usage import insert_usage, roll_up, usage

from .conftest import Hall

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 11, 20, 17, 3, 21, tzinfo=UTC)
NOON = day_of(NOW) + timedelta(hours=12)


def plain(events: list[Row]) -> list[Row]:
    return [
        {name: value for name, value in event.items() if name not in ("_id", "at")}
        for event in events
    ]


async def totals(database: Database, grain: Grain = Grain.DAY, **group: Any) -> Row:
    """Of the rows of a group, without their names."""
    rows = await database.find(grain.value, group)
    found: Row = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "run":
                found[name] = found.get(name, 0) + value
    return found


# What the log says ------------------------------------------------------------------------------


async def test_the_log_is_taken_in_once(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.worker.usage_intake.EVENTS_AT_ONCE", 2)
    ada = await insert_actor("ada")
    viewer = viewer_of(ada)
    made = await create_model(
        database, viewer, settings, owner="ada", name="bert", visibility=Visibility.PUBLIC
    )
    version = await create_version(database, viewer, settings, model_id=made["_id"])
    model = await insert_model(ada, "old")
    old = await insert_version(database, model, {"a": 7, "b": 5})
    upload = await insert_upload(ada, model, old, "a", size_bytes=7)
    await change_upload(database, upload, UploadState.VERIFYING)
    await change_upload(database, upload, UploadState.COMPLETED)
    begun = utc_now()
    for subject in (
        {"type": "Model", "id": model.id},
        {"type": "ModelVersion", "id": old.id},
        None,
    ):
        job = await insert_job(
            ada,
            state=JobState.SUCCEEDED,
            subject=subject,
            started_at=begun,
            finished_at=begun + timedelta(seconds=1.5),
        )
        await tell_of_job(database, job.id)
    async with recording(database, settings):
        await all_recorded(database)
        await until_recorded(database)
        ran = await rolling_up.roll_up(database, settings)
    assert ran.minutes
    events = await database.find(collection_of(utc_now()), {}, sort={"_id": 1})
    kinds = sorted(event["kind"] for event in events)
    assert kinds == ["job", "job", "model", "storage", "upload", "version"]
    assert await totals(database, cuboid="model", model=model.id) == {
        "uploads": 1,
        "ingress_bytes": 7,
        "job_seconds": 3.0,
        "storage_bytes": 12,
    }
    assert await totals(database, cuboid="model", model=made["_id"]) == {
        "new_models": 1,
        "new_versions": 1,
    }
    assert await database.count("rollup_days", {"version": version["_id"]}) == 2
    # Its place is kept with what it said; and from the beginning again it says the same.
    assert (await rolling_up.roll_up(database, settings)).minutes == 0
    await database.data["rollup_state"].update_one({"_id": STATE}, {"$set": {"position": "0" * 24}})
    assert (await rolling_up.roll_up(database, settings)).minutes == 0
    assert await database.find(collection_of(utc_now()), {}, sort={"_id": 1}) == events


async def tell_of_job(database: Database, job_id: ObjectId) -> None:
    async def work(session: Any) -> None:
        row = await database.data["jobs"].find_one({"_id": job_id}, session=session)
        assert row is not None
        await tell(session, row)

    await database.transaction(work)


async def until_recorded(database: Database) -> None:
    """So that the log says that all have their places."""
    last = await database.find("events", {}, sort={"position": -1}, limit=1)
    async with asyncio.timeout(20):
        while True:
            log = await database.data["log"].find_one({"_id": "events"})
            if log is not None and log["recorded"] >= last[0]["position"]:
                return
            await asyncio.sleep(0.02)


async def test_who_sees_a_model_sees_its_past(database: Database, settings: Settings) -> None:
    """A model that becomes private, by the log, leaves all rows of the public with the next run."""
    ada = await insert_actor("ada")
    viewer = viewer_of(ada)
    made = await create_model(
        database, viewer, settings, owner="ada", name="bert", visibility=Visibility.PUBLIC
    )
    other = await insert_model(ada, "other", task="ocr")
    now = utc_now()
    for back in (timedelta(), timedelta(days=3), timedelta(days=20)):
        at = now - back
        await insert_usage(
            database,
            [
                usage(UsageKind.DOWNLOAD, at, model=made["_id"], who=1, bytes=2, client="curl"),
                usage(UsageKind.DOWNLOAD, at, model=other.id, who=1, bytes=3, client="curl"),
            ],
        )
    async with recording(database, settings):
        await all_recorded(database)
        await until_recorded(database)
        await rolling_up.roll_up(database, settings)
        for grain, count in ((Grain.MINUTE, 4), (Grain.QUARTER, 6), (Grain.DAY, 6)):
            found = await totals(database, grain, cuboid="audience", audience="public")
            assert found["downloads"] == count, grain
        model = await update_model(
            database,
            viewer,
            settings,
            model_id=made["_id"],
            visibility=Visibility.PRIVATE,
            expected_revision=None,
        )
        assert model["principals"] == [f"actor:{ada.id}"]
        await all_recorded(database)
        await until_recorded(database)
        await rolling_up.roll_up(database, settings)
        for grain in Grain:
            rows = await database.find(grain.value, {"cuboid": {"$in": list(AUDIENCE_OF_OTHER)}})
            assert rows
            for row in rows:
                assert (row["audience"], row.get("downloads")) == ("public", 1), row
                assert (row["egress_bytes"], row["who"]) == (3, [1])
                assert row.get("value") in AUDIENCE_OF_OTHER[row["cuboid"]](str(ada.id))
            # Its own stay.
            own = await totals(database, grain, cuboid="model", model=made["_id"])
            assert own["downloads"] == (2 if grain is Grain.MINUTE else 3)
        await delete_model(database, viewer, model_id=other.id)
        await all_recorded(database)
        await until_recorded(database)
        await rolling_up.roll_up(database, settings)
    for grain in Grain:
        assert await database.count(grain.value, {"audience": {"$exists": True}}) == 0
    assert await database.count("rollup_homes", {"moving": {"$exists": True}}) == 0


AUDIENCE_OF_OTHER: dict[str, Any] = {
    "audience": lambda owner: {None},
    "audience.owner": lambda owner: {owner},
    "audience.task": lambda owner: {"ocr"},
    "audience.library": lambda owner: {""},
    "audience.license": lambda owner: {""},
    "audience.format": lambda owner: {""},
    "audience.client": lambda owner: {"curl"},
}


async def test_moving_goes_on_where_it_was(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling_up, "MOVING_SECONDS", 0.0)
    model = await insert_model(await insert_actor("ada"), "bert")
    days = [NOW - timedelta(days=back) for back in range(3)]
    await insert_usage(database, [usage(UsageKind.VIEW, at, model=model.id) for at in days])
    await roll_up(database, settings, now=NOW)
    await database.data["models"].update_one({"_id": model.id}, {"$set": {"task": "ocr"}})
    await roll_up(database, settings, now=NOW)
    for grain in Grain:
        rows = await database.find(grain.value, {"cuboid": "audience.task"})
        assert [row["value"] for row in rows] == ["ocr"] * 3, grain
    [state] = await database.find("rollup_state", {})
    assert state["moving"] is None


# What models say --------------------------------------------------------------------------------


async def stats_of(database: Database, model_id: ObjectId) -> Row:
    [row] = await database.find("models", {"_id": model_id})
    stats: Row = row["stats"]
    return stats


async def test_stats_of_models_come_from_rows(database: Database, settings: Settings) -> None:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "bert", stats={"likes": 4})
    quiet = await insert_model(ada, "quiet", stats={"downloads_all": 9})
    await roll_up(database, settings, now=NOW)
    downloads = {0: 3, 6: 5, 7: 7, 29: 11}
    events = [
        usage(UsageKind.DOWNLOAD, NOW - timedelta(days=back), model=model.id, who=number % 4)
        for back, count in downloads.items()
        for number in range(count)
    ]
    events += [usage(UsageKind.LIKE, NOW - timedelta(days=2), model=model.id, count=2)]
    events += [usage(UsageKind.LIKE, NOW, model=model.id, count=-1)]
    await insert_usage(database, events)
    await roll_up(database, settings, now=NOW)
    stats = await stats_of(database, model.id)
    expected = {
        "downloads_30d": 26,
        "downloads_all": 26,
        "unique_downloaders_30d": 4,
        "use_1d": 0,  # 3 downloads, and a like less
        "use_7d": 18,
        "use_30d": 36,
    }
    assert {name: stats[name] for name in expected} == expected
    assert stats["trending_score"] == pytest.approx(trending_score(26, 4, START))
    assert stats["likes"] == 4
    assert stats["as_of"] > naive(START)
    assert (await stats_of(database, quiet.id))["as_of"] == naive(START)
    # The next day, a week later, and when none is left.
    names = ("downloads_all", "downloads_30d", "unique_downloaders_30d", "use_7d", "use_30d")
    for passed, found in {
        1: (26, 15, 4, 13, 25),
        7: (26, 15, 4, 0, 25),
        40: (26, 0, 0, 0, 0),
    }.items():
        await rolling_up.roll_up(database, settings, now=NOW + timedelta(days=passed))
        stats = await stats_of(database, model.id)
        assert tuple(stats[name] for name in names) == found, passed
    # What was before, and a late event of a day that was settled.
    await database.data["rollup_homes"].update_one(
        {"_id": model.id}, {"$set": {"downloads_before": 100}}
    )
    later = NOW + timedelta(days=40)
    await insert_usage(
        database,
        [
            usage(UsageKind.DOWNLOAD, later - timedelta(days=20), model=model.id),
            usage(UsageKind.DOWNLOAD, later, model=model.id),
        ],
    )
    await rolling_up.roll_up(database, settings, now=later)
    stats = await stats_of(database, model.id)
    assert (stats["downloads_all"], stats["downloads_30d"], stats["use_1d"]) == (128, 2, 1)


async def test_what_is_kept_no_longer_goes_at_the_turn_of_the_day(
    database: Database, settings: Settings
) -> None:
    model = await insert_model(await insert_actor("ada"), "bert")
    times = [NOW - timedelta(days=back) for back in (0, 6, 7, 30)]
    await insert_usage(database, [usage(UsageKind.VIEW, at, model=model.id) for at in times])
    await roll_up(database, settings, now=NOW)
    minutes = await database.find("rollup_minutes", {"cuboid": "model"}, sort={"at": 1})
    assert [row["at"] for row in minutes] == [naive(minute_of(at)) for at in times[2::-1]]
    await roll_up(database, settings, now=NOW + timedelta(days=1))
    minutes = await database.find("rollup_minutes", {}, sort={"at": 1})
    assert {row["at"] for row in minutes} == {naive(minute_of(at)) for at in times[:2]}
    names = await database.data.list_collection_names()
    kept = [collection_of(at) in names for at in times]
    assert kept == [True, True, True, False]
    # What is told of a day that is gone changes nothing of it.
    before = await database.find("rollup_days", {}, sort={"_id": 1})
    await insert_usage(database, [usage(UsageKind.VIEW, times[3], model=model.id)])
    await roll_up(database, settings, now=NOW + timedelta(days=1))
    assert await database.find("rollup_days", {}, sort={"_id": 1}) == before
    assert await database.count("usage_dirty", {}) == 0
    await database.data.drop_collection(collection_of(times[3]))


# What it costs ----------------------------------------------------------------------------------


async def test_a_run_without_events_takes_five_commands(
    database: Database, settings: Settings
) -> None:
    await roll_up(database, settings)
    count = CommandCount()
    before = counted.set(count)
    try:
        await rolling_up.roll_up(database, settings)
    finally:
        counted.reset(before)
    assert count.names == [
        "find rollup_state",
        "find log",
        "find usage_dirty",
        "find rollup_homes",
        "update rollup_state",
    ]


async def test_runs_read_by_indexes(database: Database, settings: Settings) -> None:
    ada = await insert_actor("ada")
    models = [await insert_model(ada, f"m{number}") for number in range(20)]
    events = [
        usage(UsageKind.VIEW, NOW - timedelta(days=back, hours=number), model=model.id)
        for back in range(3)
        for number, model in enumerate(models)
    ]
    await insert_usage(database, events)
    await roll_up(database, settings, now=NOW)
    await database.data["models"].update_one({"_id": models[3].id}, {"$set": {"task": "ocr"}})
    await insert_usage(
        database,
        [
            usage(UsageKind.VIEW, NOW, model=models[0].id),
            usage(UsageKind.VIEW, NOW - timedelta(days=12), model=models[1].id),
        ],
    )
    captured = Captured()
    before = counted.set(captured)
    try:
        await roll_up(database, settings, now=NOW + timedelta(days=1))
    finally:
        counted.reset(before)
    seen = set()
    for name, command in captured.commands:
        if name not in ("find", "aggregate"):
            continue
        seen.add(command[name])
        for stage in await explained(database, command):
            assert stage.get("stage") != "COLLSCAN" or command[name] in SMALL, command
    assert {each.value for each in Grain} <= seen


SMALL = {"rollup_state", "usage_dirty", "models"}
"""Read as a whole: one row, what there is to do, and all models by their ids."""


# Who does it ------------------------------------------------------------------------------------


async def test_one_at_a_time(database: Database, settings: Settings) -> None:
    await ensure_state(database, settings, utc_now())
    first, second = Lease(database, settings), Lease(database, settings)
    assert await first.take(due=True)
    assert not await second.take(due=False)
    async with first.holding() as mine:
        await mine.transaction(touch(mine))
        # Its time has run out, and another takes over.
        await database.data["rollup_state"].update_one({}, {"$set": {"until": START}})
        assert await second.take(due=False)
        with pytest.raises(Unavailable):
            await mine.transaction(touch(mine))
    assert await database.count("usage_dirty", {}) == 1
    assert not await first.take(due=False)
    async with second.holding():
        pass
    assert not await first.take(due=True)
    assert await first.take(due=False)


def touch(database: Database) -> Any:
    async def work(session: Any) -> None:
        await database.data["usage_dirty"].insert_one(
            {"minute": utc_now(), "process": "x", "marks": 1}, session=session
        )

    return work


async def test_workers_roll_up_while_they_run(hall: Hall) -> None:
    """Two of them; an event becomes a row, and both end at once."""
    database = hall.database
    settings = hall.settings.model_copy(update={"rollup_seconds": 0.05})
    model = await insert_model(await insert_actor("ada"), "bert")
    async with (
        connect_cache(settings) as cache,
        rolling_up.rolling_up(database, cache, settings),
        rolling_up.rolling_up(database, cache, settings),
    ):
        for count in (1, 2, 3):
            await insert_usage(database, [usage(UsageKind.VIEW, utc_now(), model=model.id)])

            async def is_there(count: int = count) -> bool:
                found = await totals(database, cuboid=Cuboid.MODEL.value, model=model.id)
                return bool(found.get("views") == count)

            await hall.until(is_there)
    [state] = await database.find("rollup_state", {})
    assert (state["owner"], state["run"] >= 2) == (None, True)


async def test_a_failure_is_tried_again(
    hall: Hall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = hall.settings.model_copy(update={"rollup_seconds": 0.05})
    ran: list[int] = []

    async def fragile(*given: Any, **named: Any) -> rolling_up.Ran:
        ran.append(len(ran))
        if len(ran) < 3:
            raise [Unavailable("not ours"), RuntimeError("no")][len(ran) - 1]
        return rolling_up.Ran()

    monkeypatch.setattr(rolling_up, "roll_up", fragile)

    async def has_run() -> bool:
        return len(ran) > 3

    async with (
        connect_cache(settings) as cache,
        rolling_up.rolling_up(hall.database, cache, settings),
    ):
        await hall.until(has_run)
    messages = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("rollups.failed") for message in messages)
    assert "rollups.broke" in messages


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "of a later version"},
        {"bytes": "3"},
        {"count": None},
        {"who": "ada"},
        {"kind": "operation", "latencies": {"99": 1}},
        {"kind": "operation", "latencies": {"x": 1}},
    ],
)
async def test_what_cannot_be_read_stops_nothing(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture, bad: Row
) -> None:
    model = await insert_model(await insert_actor("ada"), "bert")
    good = usage(UsageKind.DOWNLOAD, NOW, model=model.id, client="curl", bytes=3, who=4)
    await insert_usage(database, [good, {**good, "_id": ObjectId(), "client": "go", **bad}])
    await roll_up(database, settings, now=NOW + timedelta(seconds=2))
    found = await totals(database, cuboid=Cuboid.MODEL_CLIENT.value, client="curl")
    assert (found["downloads"], found["egress_bytes"]) == (1, 3)
    assert await database.count("usage_dirty", {}) == 0
    assert "rollups.unreadable" in caplog.text


async def test_an_event_of_the_log_that_cannot_be_read_stops_nothing(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "bert")
    begun = utc_now()
    for ended in (None, begun + timedelta(seconds=1.5)):
        job = await insert_job(
            ada,
            state=JobState.SUCCEEDED,
            subject={"type": "Model", "id": model.id},
            started_at=begun,
            finished_at=ended,
        )
        await tell_of_job(database, job.id)
    async with recording(database, settings):
        await all_recorded(database)
        await until_recorded(database)
        await rolling_up.roll_up(database, settings)
    assert (await totals(database, cuboid=Cuboid.MODEL.value))["job_seconds"] == 1.5
    assert "rollups.unreadable" in caplog.text


async def test_a_run_that_takes_long_ends_and_another_one_follows(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Day by day; only the last one says that all is in, and each leaves stats that are right."""
    model = await insert_model(await insert_actor("ada"), "bert")
    events = [
        usage(UsageKind.DOWNLOAD, NOW - timedelta(days=back), model=model.id) for back in range(3)
    ]
    await roll_up(database, settings, now=NOW)
    await insert_usage(database, events)
    monkeypatch.setattr(rolling_up, "RUN_SECONDS", 0.0)
    found = []
    for _ in range(4):
        later = NOW + timedelta(seconds=5)
        ran = await rolling_up.roll_up(database, settings, now=later)
        [state] = await database.find("rollup_state", {})
        row = await database.data["models"].find_one({"_id": model.id})
        assert row is not None
        found.append((ran.is_moving, state["through"] == naive(later), row["stats"]["use_30d"]))
    assert found == [(True, False, 1), (True, False, 2), (True, False, 3), (False, True, 3)]
    [state] = await database.find("rollup_state", {})
    assert state["run"] == 3


async def test_who_was_taken_over_does_not_say_how_far_it_is(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await insert_model(await insert_actor("ada"), "bert")
    await roll_up(database, settings, now=NOW)
    await insert_usage(database, [usage(UsageKind.VIEW, NOW, model=model.id)])
    told = {"run": 7, "through": naive(NOW + timedelta(hours=1))}

    async def meanwhile(*given: Any) -> int:
        await database.data["rollup_state"].update_one({"_id": STATE}, {"$set": told})
        return 0

    monkeypatch.setattr(rolling_up, "refresh", meanwhile)
    with pytest.raises(Unavailable):
        await rolling_up.roll_up(database, settings, now=NOW + timedelta(seconds=9))
    [state] = await database.find("rollup_state", {})
    assert {name: state[name] for name in told} == told


async def test_deltas_tell_by_how_much_rows_have_changed(
    database: Database, settings: Settings
) -> None:
    model = await insert_model(await insert_actor("ada"), "bert")
    for count in (2, 3):
        await insert_usage(
            database,
            [
                usage(UsageKind.VIEW, NOW, model=model.id, client="curl", count=count),
                usage(
                    UsageKind.OPERATION,
                    NOW,
                    operation="0123456789abcdef:",
                    client="curl",
                    total_ms=1.5,
                    latencies={"3": 1},
                ),
            ],
        )
        await roll_up(database, settings, now=NOW)
    rows = await database.find("rollup_deltas", {}, sort={"run": 1, "cuboid": 1})
    told = [
        {name: value for name, value in row.items() if name not in ("_id", "written_at")}
        for row in rows
    ]
    at = naive(minute_of(NOW))
    viewed = {"cuboid": "model.all", "at": at, "model": model.id, "client": "curl"}
    called = {"cuboid": "api.all", "at": at, "operation": "0123456789abcdef:", "client": "curl"}
    runs = sorted({row["run"] for row in rows})
    assert len(runs) == 2
    assert told == [
        {**called, "run": runs[0], "requests": 1, "total_ms": 1.5},
        {**viewed, "run": runs[0], "views": 2},
        {**called, "run": runs[1], "requests": 1, "total_ms": 1.5},
        {**viewed, "run": runs[1], "views": 3},
    ]


async def test_a_transaction_of_a_killed_process_holds_it_up_for_a_while_only(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling_up, "TAKE_SECONDS", 0.2)
    monkeypatch.setattr(rolling_up, "LEASE_MS", 300)
    database = hall.database
    settings = hall.settings.model_copy(update={"rollup_seconds": 0.05})
    await ensure_state(database, settings, utc_now())
    async with database.client.start_session() as session:
        await session.start_transaction()
        await database.data["rollup_state"].update_one({}, {"$set": {"run": 7}}, session=session)
        async with (
            connect_cache(settings) as cache,
            rolling_up.rolling_up(database, cache, settings),
        ):

            async def has_run() -> bool:
                [state] = await database.find("rollup_state", {})
                return state["due"] is not None

            await hall.until(has_run)
        with pytest.raises(PyMongoError):
            await session.commit_transaction()
    [state] = await database.find("rollup_state", {})
    assert state["run"] == 0
