"""What was missed: everything once, in one order, from wherever one was cut off."""

import asyncio
import random

import pytest
from bson import ObjectId, Timestamp
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import Stream
from modelharbor.errors import Unavailable
from modelharbor.events import reader as reading
from modelharbor.events import replay
from modelharbor.events.changes import Topic, What, events_about, events_of, progress_of
from modelharbor.events.position import START, position_of, time_of
from modelharbor.events.reader import open_reader
from modelharbor.events.recorded import recorded
from modelharbor.events.recorder import recording
from modelharbor.events.replay import missed
from modelharbor.observability.commands import counted
from modelharbor.settings import Settings
from tests.explaining import Captured, explained

from .log import (
    EVERYTHING,
    JOBS,
    Storm,
    all_recorded,
    event,
    listening,
    replayed,
    resumed,
    tell,
    until,
)
from .test_reader import kill

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("rows", [4, 60, 10_000])
async def test_cut_at_random_and_resumed_everything_comes_once_in_order(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """From the collection, from what the reader keeps, and from both; of one subject and of all;
    by any process, while it goes on and connections break."""
    monkeypatch.setattr(reading, "RECENT_ROWS", rows)
    chance = random.Random(rows)
    storm = Storm(database, chance)
    streams: list[tuple[list[Topic], Row]] = [
        (EVERYTHING, JOBS),
        ([events_about(storm.subjects[0])], {"about": storm.subjects[0], "stream": "jobs"}),
    ]
    async with (
        recording(database, settings),
        open_reader(database, settings) as one,
        open_reader(database, settings) as other,
        listening(one, EVERYTHING) as every,
        listening(one, streams[1][0]) as some,
    ):
        await other.ready()
        began = one.position

        async def cut_and_resumed(topics: list[Topic], query: Row) -> list[ObjectId]:
            got: list[ObjectId] = []
            after, whole = began, False
            while not whole:
                whole = blowing.done()
                wanted = 100_000 if whole else chance.randint(0, 40)
                try:
                    async with asyncio.timeout(0.3):
                        changes = await resumed(
                            database,
                            chance.choice([one, other]),
                            topics,
                            query,
                            after,
                            wanted,
                            batch=chance.choice([1, 7, 500]),
                        )
                except TimeoutError:
                    continue  # what it had got is lost with it
                got += [change.row["_id"] for change in changes]
                if changes:
                    after = changes[-1].position
            await all_recorded(database)
            reader = chance.choice([one, other])
            async with asyncio.timeout(20):
                while reader.position < every.changes[-1].position:
                    await asyncio.sleep(0.01)
            return got + [row["_id"] for row in await replayed(database, reader, query, after)]

        async def blow() -> None:
            await storm.blow(each=20)

        blowing = asyncio.create_task(blow())
        following = [asyncio.create_task(cut_and_resumed(*each)) for each in streams * 2]
        while not blowing.done():
            await kill(database, chance)
            await asyncio.sleep(chance.uniform(0, 0.1))
        await blowing
        found = await asyncio.gather(*following)
        assert sorted(every.ids) == sorted(storm.written)
        assert found == [every.ids, some.ids] * 2
        assert every.ids != sorted(every.ids)
        assert 10 < len(some.ids) < len(every.ids)


async def test_after_progress_nothing_is_missed_nor_repeated(
    database: Database, settings: Settings
) -> None:
    job_id = ObjectId()
    await database.data["jobs"].insert_one({"_id": job_id})
    events = [event() for _ in range(3)]

    async def report(session: AsyncClientSession | None = None) -> None:
        await database.data["jobs"].update_one(
            {"_id": job_id}, {"$inc": {"progress.current": 1}}, session=session
        )

    async def work(session: AsyncClientSession) -> None:
        for each in events:
            await report(session)
            await each.insert(session=session)
        await report(session)

    topics = [*EVERYTHING, progress_of(Stream.JOBS, job_id)]
    async with (
        recording(database, settings),
        open_reader(database, settings) as one,
        listening(one, topics) as listener,
    ):
        await report()
        await tell(database, ObjectId())
        await report()
        await database.transaction(work)
        await report()
        await until(lambda: len(listener.changes) == 11)
        await all_recorded(database)
        for reader_began in (one.began, listener.changes[-1].position):
            one.began = reader_began  # first from what it keeps, then from the collection
            for index, change in enumerate(listener.changes):
                later = [
                    each.row["_id"]
                    for each in listener.changes[index + 1 :]
                    if each.what is What.EVENT
                ]
                rows = await replayed(database, one, JOBS, change.position)
                assert [row["_id"] for row in rows] == later, index


async def test_rows_are_the_same_wherever_they_come_from(
    database: Database, settings: Settings
) -> None:
    async with (
        recording(database, settings),
        open_reader(database, settings) as one,
        listening(one, EVERYTHING) as listener,
    ):
        await tell(database, ObjectId(), job={"a": {"b": [1, None]}}, comment="so")
        await database.data["events"].insert_one({"stream": "jobs"})
        await until(lambda: len(listener.changes) == 2)
        await all_recorded(database)
        kept = await replayed(database, one, JOBS, one.began)
        async with open_reader(database, settings) as later:
            await later.ready()
            assert later.since(START) == []
            stored = await replayed(database, later, JOBS)
        assert stored == kept == [change.row for change in listener.changes]


async def test_a_filter_is_the_same_for_both(database: Database, settings: Settings) -> None:
    one, two = ObjectId(), ObjectId()
    async with recording(database, settings), open_reader(database, settings) as reader:
        await reader.ready()
        ids = [
            await tell(database, one, job={"state": "QUEUED"}),
            await tell(database, one, two, stream=Stream.MODELS),
            await tell(database, two, job={"state": "DEAD"}),
        ]
        await all_recorded(database)
        await until(lambda: len(reader.since(reader.began)) == 3)
        queries: list[tuple[Row, list[int]]] = [
            ({"stream": {"$in": ["jobs", "models"]}}, [0, 1, 2]),
            ({"about": one}, [0, 1]),
            ({"about": {"$in": [two, ObjectId()]}}, [1, 2]),
            ({"stream": "models"}, [1]),
            ({"job.state": {"$in": ["DEAD", "FAILED"]}}, [2]),
            ({"$and": [{"about": one}, {"about": two}]}, [1]),
        ]
        for query, expected in queries:
            at = reader.began
            kept = await replayed(database, reader, query, at)
            assert [row["_id"] for row in kept] == [ids[index] for index in expected]
            reader.began = reader.position
            stored = await replayed(database, reader, query, at)
            reader.began = at
            assert stored == kept


async def test_without_a_recorder_one_is_told_so(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "PATIENCE", 0.1)
    async with open_reader(database, settings) as one:
        await one.ready()
        with pytest.raises(Unavailable):
            await replayed(database, one, JOBS)
        assert await replayed(database, one, JOBS, one.position) == []


async def test_the_recorder_is_waited_for(database: Database, settings: Settings) -> None:
    told = [await tell(database, ObjectId()) for _ in range(3)]
    async with open_reader(database, settings) as one:
        await one.ready()
        asking = asyncio.create_task(replayed(database, one, JOBS))
        await asyncio.sleep(0.05)
        assert not asking.done()
        async with recording(database, settings):
            assert [row["_id"] for row in await asking] == told


async def test_a_place_that_this_reader_has_yet_to_come_to_is_waited_for(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recording(database, settings), open_reader(database, settings) as one:
        await one.ready()
        time = time_of(one.position)
        ahead = position_of(Timestamp(time.time + 1, 0), 0)
        asking = asyncio.create_task(replayed(database, one, JOBS, ahead))
        await asyncio.sleep(0.05)
        assert not asking.done()
        await tell(database, ObjectId())
        assert await asking == []
        assert one.position >= ahead
        monkeypatch.setattr(replay, "PATIENCE", 0.1)
        far = position_of(Timestamp(time.time + 60, 0), 0)
        with pytest.raises(Unavailable):
            await replayed(database, one, JOBS, far)


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ({"stream": "jobs"}, "stream"),
        ({"about": {"$in": [ObjectId(), ObjectId()]}, "stream": "jobs"}, "about"),
        ({"about": ObjectId(), "stream": "jobs"}, "about"),
    ],
)
async def test_the_collection_is_read_by_an_index_in_its_order(
    database: Database, settings: Settings, query: Row, index: str
) -> None:
    rows = [
        {"about": [ObjectId()], "stream": "jobs", "position": position_of(Timestamp(5, n), 2)}
        for n in range(300)
    ]
    await database.data["events"].insert_many(rows)
    async with recording(database, settings), open_reader(database, settings) as one:
        await one.ready()
        async with asyncio.timeout(10):
            while await recorded(database) < one.began:
                await asyncio.sleep(0.01)
        captured = Captured()
        token = counted.set(captured)
        [changes async for changes in missed(database, one, query, START, 100)]
        counted.reset(token)
    commands = [command for name, command in captured.commands if command.get(name) == "events"]
    assert len(commands) == (4 if index == "stream" else 1)
    for command in commands:
        assert 0 < command["maxTimeMS"] <= 5000
        stages = await explained(database, command)
        assert {stage["indexName"] for stage in stages if "indexName" in stage} == {index}
        assert not {stage.get("stage") for stage in stages} & {"COLLSCAN", "SORT"}
        assert all(int(stage.get("totalKeysExamined", 0)) <= 101 for stage in stages)


async def test_subscribers_are_told_from_where_they_came_in(
    database: Database, settings: Settings
) -> None:
    """All is handed over that is committed once `ready` is back."""
    async with open_reader(database, settings) as one:
        for _ in range(20):
            async with listening(one, [events_of(Stream.JOBS)]) as listener:
                before = one.position
                event_id = await tell(database, ObjectId())
                await until(lambda: bool(listener.changes))
                assert listener.ids == [event_id]
                assert listener.changes[0].position > before
