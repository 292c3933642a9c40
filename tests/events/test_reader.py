"""The reader: every change once to each who wants it, whatever happens to its connection."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from datetime import datetime
from functools import partial
from typing import Any

import pytest
from bson import ObjectId, Timestamp
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import Database, connect
from modelharbor.db.events import Stream
from modelharbor.errors import Unavailable
from modelharbor.events import changes, reader
from modelharbor.events.changes import MODELS, Change, What, events_about, events_of, progress_of
from modelharbor.events.following import Found, HistoryLost, Place, follow
from modelharbor.events.reader import Reader, open_reader
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.settings import Settings

from .log import EVERYTHING, Listener, Storm, listening, tell, until

pytestmark = pytest.mark.anyio


def numbered(change: Change) -> tuple[What, int]:
    return change.what, int(change.position[16:], 16)


async def test_an_event_is_handed_over_as_it_is_read(
    database: Database, settings: Settings
) -> None:
    subject = ObjectId()
    async with (
        open_reader(database, settings) as reader,
        listening(reader, [events_about(subject)]) as listener,
    ):
        event_id = await tell(
            database, subject, principals=["public"], job={"a": [1]}, comment="so", job_id=subject
        )
        await until(lambda: bool(listener.changes))
        [change] = listener.changes
        [row] = await database.find("events", {"_id": event_id})
        assert change == Change(What.EVENT, change.position, {**row, "position": change.position})
        assert isinstance(change.row["at"], datetime)
        assert change.row["at"].tzinfo is None
        assert reader.position >= change.position > reader.began
        assert reader.since(reader.began) == [change]
        assert reader.since(change.position) == []


async def test_one_transaction_of_many_kinds(database: Database, settings: Settings) -> None:
    job_id, other, model_id, subject = (ObjectId() for _ in range(4))
    jobs, models = database.data["jobs"], database.data["models"]
    await jobs.insert_many([{"_id": job_id}, {"_id": other}])

    async def work(session: AsyncClientSession) -> None:
        await jobs.update_one(
            {"_id": job_id},
            {"$set": {"progress.current": 1, "steps": [{"name": "a"}], "heartbeat_at": 1}},
            session=session,
        )
        await database.data["events"].insert_one(
            {"about": [subject], "stream": "jobs", "position": None}, session=session
        )
        await models.insert_one({"_id": model_id, "name_lower": "a"}, session=session)
        await models.update_one({"_id": model_id}, {"$set": {"a": 1}}, session=session)
        await database.data["events"].insert_one({"kind": "MODEL_CREATED"}, session=session)
        await jobs.update_one(
            {"_id": other}, {"$set": {"progress": {"current": 2}, "worker": "X"}}, session=session
        )

    async with (
        open_reader(database, settings) as reader,
        listening(reader, [*EVERYTHING, progress_of(Stream.JOBS, None), MODELS]) as every,
        listening(reader, [progress_of(Stream.JOBS, job_id)]) as of_job,
    ):
        untold: list[Row] = [
            {"heartbeat_at": 2},
            {"steps": []},
            {"result": {"progress": 1}},
            {"state": "RUNNING", "progress.sequence": 1},  # its event tells of it
        ]
        for update in untold:
            await jobs.update_one({"_id": job_id}, {"$set": update})  # of which nobody is told
        await database.transaction(work)
        await models.replace_one({"_id": model_id}, {"name_lower": "b"})
        await models.delete_one({"_id": model_id})
        await until(lambda: len(every.changes) == 7)
        assert [numbered(change) for change in every.changes] == [
            (What.PROGRESS, 1),
            (What.EVENT, 2),
            (What.MODEL, 2),
            (What.MODEL, 2),
            (What.EVENT, 3),
            (What.PROGRESS, 3),
            (What.MODEL, 1),
        ]
        rows = [change.row for change in every.changes]
        assert rows[0] == {
            "job_id": job_id,
            "updated": {"progress.current": 1, "steps": [{"name": "a"}]},
        }
        assert rows[5] == {"job_id": other, "updated": {"progress": {"current": 2}}}
        assert [rows[index] for index in (2, 3, 6)] == [{"model_id": model_id}] * 3
        # One that an older version wrote has what it lacks.
        assert rows[4] == {
            "_id": rows[4]["_id"],
            "kind": "MODEL_CREATED",
            "stream": "models",
            "about": [],
            "principals": [],
            "position": every.changes[4].position,
        }
        positions = [change.position for change in every.changes]
        assert positions == sorted(positions)
        assert len({position[:16] for position in positions}) == 2
        assert of_job.changes == [every.changes[0]]


async def test_progress_of_uploads_is_what_came_on_disk(
    database: Database, settings: Settings
) -> None:
    uploads, one, other = database.data["uploads"], ObjectId(), ObjectId()
    await uploads.insert_many(
        [{"_id": each, "path_key": str(each), "received_bytes": 0} for each in (one, other)]
    )
    untold: list[Row] = [
        {"held_until": 2, "sequence": 1},
        {"state": "UPLOADING", "received_bytes": 1},  # its event tells of it
        {"received_bytes": 1},  # as it is
        {"error": {"received_bytes": 2}},
    ]
    async with (
        open_reader(database, settings) as reader,
        listening(reader, [progress_of(Stream.UPLOADS, None)]) as every,
        listening(reader, [progress_of(Stream.UPLOADS, one)]) as of_one,
        listening(reader, [progress_of(Stream.JOBS, None)]) as of_jobs,
    ):
        for update in untold:
            await uploads.update_one({"_id": one}, {"$set": update})
        await uploads.update_one(
            {"_id": one},
            {
                "$set": {"received_bytes": 5, "rate": 1.5, "segments": [{"size_bytes": 5}]},
                "$inc": {"sequence": 2},
            },
        )
        await uploads.update_one({"_id": other}, [{"$set": {"received_bytes": 7, "holder": "me"}}])
        await until(lambda: len(every.changes) == 2)
        assert [change.row for change in every.changes] == [
            {"upload_id": one, "updated": {"received_bytes": 5, "rate": 1.5, "sequence": 3}},
            {"upload_id": other, "updated": {"received_bytes": 7}},
        ]
        assert {change.what for change in every.changes} == {What.PROGRESS}
        assert of_one.changes == every.changes[:1]
        assert of_jobs.changes == []


async def test_who_is_called_and_how_often(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = ObjectId(), ObjectId()
    async with open_reader(database, settings) as reader:
        await reader.ready()
        told: list[str] = []

        def broken(change: Change) -> None:
            told.append("broken")
            raise RuntimeError("of a subscriber")

        def ending(change: Change) -> None:
            told.append("ending")
            leave()
            leave_too()

        reader.subscribe([events_about(one)], broken, lambda: None)
        leave = reader.subscribe([events_about(one), events_about(two)], ending, lambda: None)
        leave_too = reader.subscribe(
            [events_about(two)], lambda _: told.append("left"), lambda: None
        )
        reader.subscribe(
            [events_of(Stream.JOBS), events_about(two), events_about(one)],
            lambda _: told.append("all"),
            lambda: None,
        )
        reader.subscribe([events_about(ObjectId())], lambda _: told.append("no"), lambda: None)
        await tell(database, one, two)
        await until(lambda: "all" in told)
        assert told == ["all", "broken", "ending"]  # by topic, then in the order in which they came
        assert "of a subscriber" in caplog.text
        await tell(database, two)
        await until(lambda: told.count("all") == 2)
        assert told == ["all", "broken", "ending", "all"]
        leave()  # a second time


async def test_ten_thousand_subscribers_cost_one_look(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Change] = []

    def counting(change: Change) -> list[changes.Topic]:
        looked.append(change)
        return changes.topics_of(change)

    monkeypatch.setattr(reader, "topics_of", counting)
    subject, calls = ObjectId(), [0] * 10_000
    async with open_reader(database, settings) as one:
        await one.ready()
        looked.clear()

        def count(index: int, change: Change) -> None:
            calls[index] += 1

        leave = [
            one.subscribe([events_about(subject)], partial(count, index), lambda: None)
            for index in range(10_000)
        ]
        await tell(database, ObjectId())
        await tell(database, subject)
        await until(lambda: calls[-1] == 1)
        assert calls == [1] * 10_000
        assert len(looked) == 2
        for each in leave:
            each()
        assert one._subscribers == {}


async def test_the_latest_are_kept_within_bounds(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "RECENT_ROWS", 3)
    async with (
        open_reader(database, settings) as one,
        listening(one, EVERYTHING) as listener,
    ):
        for _ in range(5):
            await tell(database, ObjectId())
        await until(lambda: len(listener.changes) == 5)
        assert one.began == listener.changes[1].position
        assert one.since(one.began) == listener.changes[2:]
        monkeypatch.setattr(reader, "RECENT_BYTES", 1000)
        await tell(database, ObjectId(), comment="x" * 900)
        await until(lambda: len(listener.changes) == 6)
        assert one.since("0" * 24) == []
        assert one.began == listener.changes[5].position


async def test_what_is_not_understood_is_left_out(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        open_reader(database, settings) as one,
        listening(one, EVERYTHING) as listener,
    ):
        await database.data["events"].insert_one({"stream": "of a later version"})
        event_id = await tell(database, ObjectId())
        await until(lambda: bool(listener.changes))
        assert listener.ids == [event_id]
        assert "events.not_understood" in caplog.text


async def kill(database: Database, chance: random.Random) -> int:
    """End a change stream of this database as a server does that goes away: its command, its cursor,
    or both; answers how many were found."""
    watching: list[Row] = [
        {"$currentOp": {"idleCursors": True}},
        {
            "$match": {
                "ns": {"$regex": f"^{database.data.name}[.]"},
                "cursor.originatingCommand.pipeline.0.$changeStream": {"$exists": True},
            }
        },
    ]
    cursor = await database.client.admin.aggregate(watching)
    found = await cursor.to_list()
    for each in found:
        way = chance.randint(1, 3)
        if way & 1 and "opid" in each:
            await database.client.admin.command("killOp", op=each["opid"])
        if way & 2:
            await database.data.command("killCursors", "$cmd", cursors=[each["cursor"]["cursorId"]])
    return len(found)


async def test_nothing_is_missed_or_told_twice_while_connections_break(
    database: Database, settings: Settings
) -> None:
    chance = random.Random(4)
    storm, killed = Storm(database, chance), 0
    async with (
        open_reader(database, settings) as one,
        open_reader(database, settings) as other,
        listening(one, [*EVERYTHING, progress_of(Stream.JOBS, None)]) as listener,
        listening(other, [*EVERYTHING, progress_of(Stream.JOBS, None)]) as second,
    ):
        blowing = asyncio.create_task(storm.blow(each=25))
        while not blowing.done():
            killed += await kill(database, chance)
            await asyncio.sleep(chance.uniform(0, 0.05))
        await blowing
        last = await tell(database, ObjectId())
        await until(
            lambda: all(each.changes[-1].row.get("_id") == last for each in (listener, second))
        )
        assert killed > 5
        assert listener.changes == second.changes
        events = [each.row["_id"] for each in listener.changes if each.what is What.EVENT]
        assert sorted(events) == sorted([*storm.written, last])
        updates = [each for each in listener.changes if each.what is What.PROGRESS]
        rows = await database.data["jobs"].find().to_list()
        assert len(updates) == sum(row["progress"]["current"] for row in rows)


async def test_an_operation_does_not_pay_for_the_reader(
    database: Database, settings: Settings
) -> None:
    count = CommandCount()
    token = counted.set(count)
    try:
        async with open_reader(database, settings) as one:
            await one.ready()
            await one.ready()
    finally:
        counted.reset(token)
    assert count.names == []


async def test_a_reader_that_nobody_needs_sends_nothing(
    database: Database, settings: Settings
) -> None:
    async with open_reader(database, settings) as one:
        await asyncio.sleep(0)
        assert one._task is None
    assert await database.data["events"].count_documents({}) == 0


async def test_without_mongodb_one_is_told_so(settings: Settings) -> None:
    gone = settings.model_copy(
        update={
            "mongo_url": "mongodb://127.0.0.1:9/?directConnection=true",
            "mongo_timeout_seconds": 0.05,
        }
    )
    async with connect(gone) as database, open_reader(database, gone) as one:
        one._patience = 0.3
        with pytest.raises(Unavailable):
            await one.ready()
        with pytest.raises(Unavailable):
            await one.ready()


def losing(monkeypatch: pytest.MonkeyPatch, module: Any, places: int = 1) -> list[Timestamp]:
    """The next streams that are opened find their history lost; answers where they were."""
    lost: list[Timestamp] = []

    async def once(
        database: Database, pipeline: list[Row], place: Place
    ) -> AsyncGenerator[Found, None]:
        if len(lost) < places:
            lost.append(place.time)
            raise HistoryLost from RuntimeError("the log has rolled over")
        async for found in follow(database, pipeline, place):
            yield found

    monkeypatch.setattr(module, "follow", once)
    return lost


async def test_lost_history_ends_subscriptions_and_the_reader_begins_anew(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_reader(database, settings) as one, listening(one, EVERYTHING) as listener:
        still = Listener()

        def broken() -> None:
            raise RuntimeError("of a subscriber")

        one.subscribe([MODELS, *EVERYTHING], still.take, broken)
        first = await tell(database, ObjectId())
        await until(lambda: listener.ids == [first])
        before = one.position
        lost = losing(monkeypatch, reader)
        chance = random.Random(1)
        while not lost:
            await kill(database, chance)
            await asyncio.sleep(0.02)
        await until(lambda: listener.losses == 1)
        await one.ready()
        assert one.began[:16] >= before[:16]
        assert one._subscribers == {}
        async with listening(one, EVERYTHING) as later:
            second = await tell(database, ObjectId())
            await until(lambda: later.ids == [second])
        assert one.since(one.began)[-1:] == later.changes
        assert (listener.ids, listener.losses, still.ids) == ([first], 1, [first])


async def test_a_dropped_database_is_lost_history(settings: Settings) -> None:
    apart = settings.model_copy(update={"mongo_database": f"{settings.mongo_database}_apart"})
    async with connect(apart) as database:
        try:
            async with open_reader(database, apart) as one, listening(one, EVERYTHING) as listener:
                await database.client.drop_database(database.data.name)
                await until(lambda: listener.losses == 1)
                async with listening(one, EVERYTHING) as later:
                    row = {"_id": ObjectId(), "stream": "jobs", "about": []}
                    await database.data["events"].insert_one(row)
                    await until(lambda: later.ids == [row["_id"]])
        finally:
            await database.client.drop_database(database.data.name)


async def test_it_ends_while_it_waits_and_while_it_begins(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for pause in (0, 0.001, 0.003, 0.01, 0.05):
        async with open_reader(database, settings) as one:
            ready = asyncio.create_task(one.ready())
            await asyncio.sleep(pause)
        ready.cancel()
        await asyncio.wait([ready])
    one = Reader(database, settings)
    await one.close()
    assert caplog.records == []
