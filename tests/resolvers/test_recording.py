"""Usage events: what is written of what is used, and that it is written once or counted as left out."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import AutoReconnect, PyMongoError

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database, connect
from modelharbor.db.usage import (
    HISTOGRAM_STEPS,
    UsageKind,
    collection_of,
    latency_of,
    latency_step,
    minute_of,
)
from modelharbor.errors import Forbidden
from modelharbor.observability.metrics import Metrics, UsageCount
from modelharbor.resolvers import recording
from modelharbor.resolvers.likes import like_model, unlike_model
from modelharbor.resolvers.recording import (
    Usage,
    Work,
    operation_key,
    record_in,
    recording_usage,
    step_of,
)
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model, viewer_of
from tests.http.proxy import Door

pytestmark = pytest.mark.anyio
NOON = datetime(2026, 11, 20, 12, 0, 30, tzinfo=UTC)


class Clock:
    """Of the recorder; the test moves it."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now.timestamp()

    def passes(self, **time: float) -> None:
        self.now += timedelta(**time)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"usage_recording": True})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock(utc_now().replace(second=30, microsecond=0))
    monkeypatch.setattr(recording, "time", found)
    return found


@pytest.fixture
def usage(database: Database, settings: Settings) -> Usage:
    return made(database, settings)


def made(database: Database, settings: Settings, **changes: Any) -> Usage:
    return Usage(database, settings.model_copy(update=changes), b"secret")


def file_of(model_id: ObjectId) -> Row:
    return {"_id": ObjectId(), "model_id": model_id, "version_id": ObjectId(), "format": "GGUF"}


async def events(database: Database) -> list[Row]:
    found: list[Row] = []
    for name in sorted(await database.data.list_collection_names()):
        if name.startswith("usage_2"):
            found += await database.data[name].find({}).sort({"at": 1, "_id": 1}).to_list()
    return found


async def marks(database: Database) -> list[tuple[datetime, int]]:
    rows = await database.data["usage_dirty"].find({}).sort({"minute": 1}).to_list()
    return [(row["minute"], row["marks"]) for row in rows]


def without_ids(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "_id"} for row in rows]


# ---- what an event is


def test_steps_are_those_of_the_histogram() -> None:
    generator = random.Random(1)
    given = [0.0, 1e-9, 0.1, 1e9, *(latency_of(step) for step in range(HISTOGRAM_STEPS))]
    given += [bound * factor for bound in given for factor in (1 - 1e-12, 1 + 1e-12)]
    given += [10 ** generator.uniform(-3, 7) for _ in range(2000)]
    for milliseconds in given:
        assert step_of(milliseconds) == latency_step(milliseconds), milliseconds


def test_an_operation_is_told_apart_by_its_text() -> None:
    digest = "0123456789abcdef" * 4
    assert operation_key(digest, "Models") == "0123456789abcdef:Models"
    assert operation_key(digest, None) == "0123456789abcdef:"
    assert operation_key(digest, "x" * 1000) == f"0123456789abcdef:{'x' * 100}"


async def test_calls_of_an_operation_are_one_event_for_each_class_of_clients(
    database: Database, usage: Usage, clock: Clock
) -> None:
    begun = clock.now
    usage.operation("a:A", "curl", 0.05, 3, Work(2, 1, 4))
    clock.passes(seconds=1)
    usage.operation("a:A", "browser", 7.0, 10, Work())
    usage.operation("a:A", "curl", 0.75, 5, Work(1, 1, 1), is_failed=True)
    clock.passes(seconds=1)
    usage.operation("a:A", "curl", 0.05, 3, None)
    usage.operation("b:", "curl", 1e9, 0, Work())
    assert usage.waiting == 3
    assert await events(database) == []
    await usage.flush()
    assert usage.waiting == 0
    assert without_ids(await events(database)) == [
        {
            "at": begun + timedelta(seconds=1),
            "kind": "operation",
            "operation": "a:A",
            "client": "browser",
            "count": 1,
            "total_ms": 7.0,
            "latencies": {str(latency_step(7.0)): 1},
            "cost": 10,
        },
        {
            "at": begun + timedelta(seconds=2),
            "kind": "operation",
            "operation": "a:A",
            "client": "curl",
            "count": 3,
            "total_ms": round(0.85 * 1024) / 1024,
            "latencies": {"0": 2, str(latency_step(0.75)): 1},
            "errors": 1,
            "cost": 11,
            "commands": 3,
            "batches": 2,
            "keys": 5,
            "hits": 1,
        },
        {
            "at": begun + timedelta(seconds=2),
            "kind": "operation",
            "operation": "b:",
            "client": "curl",
            "count": 1,
            "total_ms": 1e9,
            "latencies": {str(HISTOGRAM_STEPS - 1): 1},
        },
    ]
    assert await marks(database) == [(minute_of(begun), 1)]


async def test_so_many_answers_are_added_up_at_once(
    database: Database, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether anything is written meanwhile or not, no more of them wait one by one."""
    monkeypatch.setattr(recording, "ADDED_UP", 10)
    model = ObjectId()
    for number in range(1, 26):
        usage.operation("a:", "curl", float(number), 2, None, [model])
        assert len(usage._answered) == number % 10
    assert usage.waiting == 2
    await usage.flush()
    calls, views = await events(database)
    assert (calls["count"], calls["hits"], calls["cost"], calls["total_ms"]) == (25, 25, 50, 325.0)
    assert (views["model"], views["count"]) == (model, 25)


async def test_each_minute_has_events_of_its_own(
    database: Database, usage: Usage, clock: Clock
) -> None:
    """However long they wait: they are added up by the minute."""
    begun, model = minute_of(clock.now), ObjectId()
    for _ in range(3):
        for _ in range(2):
            usage.operation("a:", "curl", 1.0, 0, Work(), [model])
        clock.passes(minutes=1)
    await usage.flush()
    rows = await events(database)
    assert [(minute_of(row["at"]), row["kind"], row["count"]) for row in rows] == [
        (begun + timedelta(minutes=minute), kind, 2)
        for minute in range(3)
        for kind in ("operation", "view")
    ]
    assert await marks(database) == [(begun + timedelta(minutes=minute), 1) for minute in range(3)]


async def test_views_are_added_up_and_downloads_are_events(
    database: Database, usage: Usage, clock: Clock
) -> None:
    one, other = ObjectId(), ObjectId()
    usage.operation("a:", "browser", 1.0, 0, Work(), [one, other])
    usage.operation("a:", "browser", 1.0, 0, None, [one])
    usage.operation("b:", "bot", 1.0, 0, Work(), [one])
    file = file_of(one)
    usage.download(file, "modelharbor", usage.who("user:1"), 5, is_last=False)
    usage.download(file, "modelharbor", usage.who("user:1"), 90, is_last=True)
    await usage.flush()
    rows = [row for row in await events(database) if row["kind"] != "operation"]
    assert len({row["_id"] for row in rows}) == 5
    at = {"at": clock.now}
    download = {
        **at,
        "kind": "download",
        "client": "modelharbor",
        "model": one,
        "version": file["version_id"],
        "file": file["_id"],
        "format": "GGUF",
        "who": usage.who("user:1"),
    }
    view = {**at, "kind": "view"}
    assert without_ids(rows) == [
        {**download, "count": 0, "bytes": 5},
        {**download, "count": 1, "bytes": 90},
        {**view, "model": one, "client": "browser", "count": 2},
        {**view, "model": other, "client": "browser", "count": 1},
        {**view, "model": one, "client": "bot", "count": 1},
    ]


async def test_who_it_is_cannot_be_told_without_the_secret(
    database: Database, settings: Settings
) -> None:
    usage, other = made(database, settings), Usage(database, settings, b"another secret")
    assert usage.who("address:1.2.3.4") == usage.who("address:1.2.3.4")
    assert usage.who("address:1.2.3.4") != usage.who("address:1.2.3.5")
    assert usage.who("address:1.2.3.4") != other.who("address:1.2.3.4")
    assert all(0 <= usage.who(f"user:{number}") < 2**63 for number in range(100))


async def test_so_many_operations_are_told_apart(
    database: Database, usage: Usage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can send texts of their own: they do not drive out what is called often."""
    monkeypatch.setattr(recording, "MOST_OPERATIONS", 4)
    monkeypatch.setattr(recording, "KNOWN_AGAIN", 2)
    clock.now = clock.now.replace(minute=0)
    for name in ("often", "often", "also", "also", "c", "d", "e", "f", "often", "g", "c"):
        usage.operation(name, "curl", 1.0, 0, Work())
    await usage.flush()
    assert {row["operation"]: row["count"] for row in await events(database)} == {
        "often": 3,
        "also": 2,
        "c": 2,
        "d": 1,
        "other": 3,
    }
    clock.passes(hours=1)
    for name in ("1", "2", "3", "often", "also"):
        usage.operation(name, "curl", 1.0, 0, Work())
    await usage.flush()
    last = [row for row in await events(database) if row["at"] == clock.now]
    assert [row["operation"] for row in last] == ["1", "2", "other", "often", "also"]


async def test_without_recording_nothing_is_kept(database: Database, settings: Settings) -> None:
    off = settings.model_copy(update={"usage_recording": False})
    async with recording_usage(database, off, b"secret", UsageCount()) as usage:
        usage.operation("a:", "curl", 1.0, 0, Work(), [ObjectId()])
        usage.download(file_of(ObjectId()), "curl", 1, 1, is_last=True)
        assert usage.waiting == 0
    assert await events(database) == []


# ---- once


async def test_the_collections_are_there_with_their_index_before(
    database: Database, settings: Settings
) -> None:
    """Those of today and tomorrow, before anything is used."""
    now = datetime.now(UTC)
    names = [collection_of(now), collection_of(now + timedelta(days=1))]
    for name in names:
        await database.data.drop_collection(name)
    usage = made(database, settings)
    await usage.prepare()
    for name in names:
        assert "at" in await database.data[name].index_information()
        assert await database.data[name].count_documents({}) == 0


async def test_events_around_midnight_are_each_in_the_collection_of_their_day(
    database: Database, usage: Usage, clock: Clock
) -> None:
    clock.now = clock.now.replace(hour=23, minute=59) - timedelta(days=1)
    first, other = clock.now, clock.now + timedelta(minutes=1)
    usage.operation("a:", "curl", 1.0, 0, Work())
    clock.passes(minutes=1)
    usage.operation("a:", "curl", 1.0, 0, Work())
    await usage.flush()
    for moment in (first, other):
        [row] = await database.data[collection_of(moment)].find({}).to_list()
        assert row["at"] == moment
        assert "at" in await database.data[collection_of(moment)].index_information()
    assert await marks(database) == [(minute_of(first), 1), (minute_of(other), 1)]


async def test_processes_write_beside_each_other(database: Database, settings: Settings) -> None:
    """Their marks are their own, for they would hold each other up."""
    model, processes = ObjectId(), [made(database, settings) for _ in range(8)]
    for usage in processes:
        for number in range(50):
            usage.download(file_of(model), "curl", number, 1, is_last=True)
        usage.operation("a:", "curl", 1.0, 0, Work(), [model])
    await asyncio.gather(*(usage.flush() for usage in processes))
    rows = await events(database)
    assert len(rows) == 8 * 52
    assert sum(row["count"] for row in rows) == 8 * 52
    assert sum(count for _, count in await marks(database)) in range(8, 17)  # a minute may end
    assert len({row["process"] for row in await database.data["usage_dirty"].find().to_list()}) == 8


class Unsure:
    """Transactions whose commit is not answered: they were committed, or were not."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_committed, self.failures, self.begun = True, 0, 0
        transaction = Database.transaction

        async def unanswered(
            given: Database, work: Callable[[Any], Awaitable[Any]], *more: Any, **options: Any
        ) -> Any:
            self.begun += 1
            if self.failures and not self.is_committed:
                self.failures -= 1
                raise AutoReconnect("gone")
            found = await transaction(given, work, *more, **options)
            if self.failures:
                self.failures -= 1
                raise AutoReconnect("gone")
            return found

        monkeypatch.setattr(Database, "transaction", unanswered)


@pytest.mark.parametrize(("is_committed", "failures"), [(True, 1), (False, 2)])
async def test_a_commit_that_was_not_answered_is_no_second_event(
    database: Database,
    usage: Usage,
    monkeypatch: pytest.MonkeyPatch,
    is_committed: bool,
    failures: int,
) -> None:
    unsure = Unsure(database, monkeypatch)
    unsure.is_committed, unsure.failures = is_committed, failures
    for number in range(20):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    for _ in range(failures):
        with pytest.raises(AutoReconnect):
            await usage.flush()
        assert usage.waiting == 20
    usage.download(file_of(ObjectId()), "curl", 20, 1, is_last=True)
    await usage.flush()
    assert [row["who"] for row in await events(database)] == list(range(21))
    assert usage.count.outcomes == {("download", "recorded"): 21}
    assert usage.waiting == 0


async def test_what_is_there_already_is_left_out_and_the_rest_is_written(
    database: Database, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    there = usage._seal()[:4]
    await database.data[collection_of(there[0]["at"])].insert_many(there)
    await usage.flush()
    assert [row["who"] for row in await events(database)] == list(range(10))


async def test_a_batch_has_so_many_events(
    database: Database, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsure = Unsure(database, monkeypatch)
    for number in range(2_500):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    await usage.flush()
    assert unsure.begun == 3
    assert len(await events(database)) == 2_500
    assert sum(count for _, count in await marks(database)) in range(3, 5)  # a minute may end


# ---- without a database, and when there is too much


async def test_without_a_database_all_of_it_waits(
    database: Database,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is written when there is one again, with the times that it had."""
    monkeypatch.setattr(recording, "WRITE_SECONDS", 0.5)
    port = int(settings.mongo_url.partition("/?")[0].rpartition(":")[2])
    door = Door(port)
    await door.open()
    url = settings.mongo_url.replace(f":{port}", f":{door.port}", 1) + "&directConnection=true"
    through = settings.model_copy(update={"mongo_url": url, "mongo_timeout_seconds": 0.3})
    count = UsageCount()
    async with (
        connect(through) as away,
        recording_usage(away, through, b"secret", count) as usage,
    ):
        usage.download(file_of(ObjectId()), "curl", 0, 1, is_last=True)
        await until(lambda: usage.waiting == 0)
        await door.close()
        model = ObjectId()
        for number in range(1, 201):
            usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
            usage.operation("a:", "curl", 1.0, 0, None, [model])
        await until(lambda: usage._has_failed)
        assert usage.waiting >= 202
        usage.download(file_of(ObjectId()), "curl", 201, 1, is_last=True)
        await door.open()
        await until(lambda: usage.waiting == 0)
    await door.close()
    rows = await events(database)
    assert sorted(row["who"] for row in rows if "who" in row) == list(range(202))
    assert sum(row["count"] for row in rows if row["kind"] == "view") == 200
    assert count.outcomes == {
        ("download", "recorded"): 202,
        ("view", "recorded"): 200,
        ("operation", "recorded"): 200,
    }
    assert caplog.text.count("usage.not_recorded_yet") == 1


async def test_what_ends_without_a_database_is_counted_as_lost(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "WRITE_SECONDS", 0.1)
    gone = settings.model_copy(
        update={"mongo_url": "mongodb://127.0.0.1:1/", "mongo_timeout_seconds": 0.05}
    )
    count = UsageCount()
    async with connect(gone) as away, recording_usage(away, gone, b"secret", count) as usage:
        usage.download(file_of(ObjectId()), "curl", 0, 1, is_last=True)
        usage.operation("a:", "curl", 1.0, 0, Work(), [ObjectId(), ObjectId()])
        usage.operation("a:", "curl", 1.0, 0, Work(), [ObjectId()])
    assert count.outcomes == {
        ("download", "lost"): 1,
        ("view", "lost"): 3,
        ("operation", "lost"): 2,
    }
    assert usage.waiting == 0
    assert caplog.text.count("usage.lost") == 1


async def test_the_oldest_views_go_first_and_downloads_last(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    usage = made(database, settings, usage_buffer=6)
    models = [ObjectId() for _ in range(4)]
    usage.operation("a:", "curl", 1.0, 0, Work(), models)
    usage.operation("a:", "curl", 1.0, 0, Work(), models[:1])
    for name in ("a:", "b:"):
        usage.operation(name, "curl", 1.0, 0, Work())
    assert (usage.waiting, usage.count.outcomes) == (6, {})

    usage.operation("c:", "curl", 1.0, 0, Work())
    left_out = {("view", "left_out"): 2}  # one event: the first model's
    assert (usage.waiting, usage.count.outcomes) == (6, left_out)
    for number in range(4):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    left_out = {("view", "left_out"): 5, ("operation", "left_out"): 3}  # these of one, too
    assert (usage.waiting, usage.count.outcomes) == (6, left_out)
    for number in range(4, 7):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    left_out |= {("operation", "left_out"): 5, ("download", "left_out"): 1}
    assert (usage.waiting, usage.count.outcomes) == (6, left_out)
    # What is worth less than all that waits goes at once.
    usage.operation("a:", "curl", 1.0, 0, Work(), models[:1])
    left_out["view", "left_out"] += 1
    left_out["operation", "left_out"] += 1
    assert (usage.waiting, usage.count.outcomes) == (6, left_out)

    assert caplog.text.count("usage.left_out") == 1
    await usage.flush()
    assert [row["who"] for row in await events(database)] == [1, 2, 3, 4, 5, 6]
    for number in range(7):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    assert caplog.text.count("usage.left_out") == 2
    assert usage.count.outcomes["download", "left_out"] == 2


async def test_what_is_being_written_is_not_left_out(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be there already."""
    usage = made(database, settings, usage_buffer=3)
    unsure = Unsure(database, monkeypatch)
    unsure.failures = 1
    for number in range(3):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    with pytest.raises(AutoReconnect):
        await usage.flush()
    for number in range(3, 5):
        usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    assert usage.waiting == 3
    await usage.flush()
    assert [row["who"] for row in await events(database)] == [0, 1, 2]
    assert usage.count.outcomes == {("download", "recorded"): 3, ("download", "left_out"): 2}


async def test_what_waited_for_longer_than_events_are_kept_is_refused(
    database: Database, usage: Usage, settings: Settings, clock: Clock
) -> None:
    begun = clock.now
    usage.download(file_of(ObjectId()), "curl", 0, 1, is_last=True)
    clock.passes(seconds=1)
    usage.download(file_of(ObjectId()), "curl", 1, 1, is_last=True)
    clock.now = begun + timedelta(days=settings.usage_days, milliseconds=1)
    await usage.flush()
    assert [row["who"] for row in await events(database)] == [1]
    assert usage.count.outcomes == {("download", "too_old"): 1, ("download", "recorded"): 1}


async def test_the_end_flushes(database: Database, settings: Settings) -> None:
    count = UsageCount()
    async with recording_usage(database, settings, b"secret", count) as usage:
        await asyncio.sleep(0)
        for number in range(1_500):
            usage.download(file_of(ObjectId()), "curl", number, 1, is_last=True)
    assert len(await events(database)) == 1_500
    assert count.outcomes == {("download", "recorded"): 1_500}


def test_it_is_shown() -> None:
    metrics = Metrics()
    metrics.usage.outcomes["view", "left_out"] += 3
    metrics.usage.waiting = lambda: 7
    shown = metrics.shown().decode()
    assert 'modelharbor_usage_events_total{kind="view",outcome="left_out"} 3.0' in shown
    assert "modelharbor_usage_waiting 7.0" in shown


# ---- in the transaction of what it tells of


async def test_likes_are_recorded_with_them(database: Database) -> None:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "tiny")
    viewer = viewer_of(ada)
    await like_model(database, viewer, model_id=model.id)
    await like_model(database, viewer, model_id=model.id)
    like = await database.data["likes"].find_one({"model_id": model.id})
    assert like is not None
    await unlike_model(database, viewer, model_id=model.id)
    await unlike_model(database, viewer, model_id=model.id)
    rows = await events(database)
    assert [(row["_id"], row["count"]) for row in rows] == [
        (f"like:{like['_id']}", 1),
        (f"unlike:{like['_id']}", -1),
    ]
    for row in rows:
        assert row.keys() == {"_id", "at", "kind", "count", "model"}
        assert (row["kind"], row["model"]) == (UsageKind.LIKE.value, model.id)
        assert utc_now() - row["at"] < timedelta(minutes=1)
    assert {minute for minute, _ in await marks(database)} == {minute_of(row["at"]) for row in rows}
    await like_model(database, viewer, model_id=model.id, is_recorded=False)
    assert len(await events(database)) == 2


async def test_what_is_rolled_back_is_not_recorded(database: Database) -> None:
    event = {"_id": "like:1", "at": utc_now(), "kind": "like", "count": 1, "model": ObjectId()}

    async def work(session: AsyncClientSession) -> None:
        await record_in(database, session, [event])
        raise Forbidden("No.")

    with pytest.raises(Forbidden):
        await database.transaction(work)
    assert await events(database) == []
    assert await marks(database) == []


async def test_twice_is_refused(database: Database) -> None:
    event = {"_id": "like:1", "at": utc_now(), "kind": "like", "count": 1, "model": ObjectId()}

    async def work(session: AsyncClientSession) -> None:
        await record_in(database, session, [event])

    await database.transaction(work)
    with pytest.raises(PyMongoError):
        await database.transaction(work)
    assert len(await events(database)) == 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
