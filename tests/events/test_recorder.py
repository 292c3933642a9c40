"""The recorder: each event gets the place that every reader sees, whoever records and however it ends."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from bson import ObjectId, Timestamp

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.events import recorder
from modelharbor.events.following import HistoryLost, now_of
from modelharbor.events.position import START, before, position_of, seconds_of
from modelharbor.events.reader import open_reader
from modelharbor.events.recorded import LOG, ensure_log, last_position, read_log, recorded
from modelharbor.events.recorder import recording
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.settings import Settings

from .log import EVERYTHING, JOBS, Storm, all_recorded, listening, replayed, tell, until
from .test_reader import kill, losing

pytestmark = pytest.mark.anyio


async def places(database: Database) -> dict[ObjectId, str]:
    """Of all events but marks, in order."""
    rows = (
        await database.data["events"]
        .find({"stream": {"$ne": "marks"}})
        .sort("position", 1)
        .to_list()
    )
    return {row["_id"]: row["position"] for row in rows}


@asynccontextmanager
async def killed(database: Database) -> AsyncIterator[None]:
    """A recorder that ends without a word, as after SIGKILL."""
    one = recorder._Recorder(database)

    async def nothing() -> None:
        """It is dead."""

    one._release = nothing  # type: ignore[method-assign]  # as if it had been killed
    task = asyncio.create_task(one.run())
    try:
        yield
    finally:
        await ended(task)


async def test_all_see_one_order_which_is_not_that_of_the_ids(
    database: Database, settings: Settings
) -> None:
    storm = Storm(database, random.Random(1))
    async with (
        recording(database, settings),
        recording(database, settings),
        open_reader(database, settings) as reader,
        listening(reader, EVERYTHING) as listener,
    ):
        await storm.blow()
        await until(lambda: len(listener.changes) == len(storm.written))
        await all_recorded(database)
        live = {change.row["_id"]: change.position for change in listener.changes}
        assert list((await places(database)).items()) == list(live.items())
        assert sorted(live) == sorted(storm.written)
        assert list(live) != sorted(live)
        assert len({place[:16] for place in live.values()}) < len(live)  # several in a transaction
        # To the end, also when nothing more happens.
        async with asyncio.timeout(10):
            while await recorded(database) < listener.changes[-1].position:
                await asyncio.sleep(0.01)


async def test_all_up_to_recorded_have_their_places_while_recorders_come_and_go(
    database: Database, settings: Settings
) -> None:
    chance = random.Random(2)
    storm = Storm(database, chance)
    seen: list[tuple[str, list[ObjectId]]] = []
    await ensure_log(database)
    blowing = asyncio.create_task(storm.blow(each=20))
    while not blowing.done():
        async with recording(database, settings), recording(database, settings):
            for _ in range(chance.randint(1, 6)):
                place = await recorded(database)
                rows = await database.find("events", {"position": None}, projection={"_id": 1})
                seen.append((place, [row["_id"] for row in rows]))
                await asyncio.sleep(chance.uniform(0, 0.03))
            await kill(database, chance)
    await blowing
    async with recording(database, settings):
        await all_recorded(database)
    final = await places(database)
    assert sorted(final) == sorted(storm.written)
    assert len(set(final.values())) == len(final)
    assert max(int(place[16:], 16) for place in final.values()) < 5  # all by count, none left over
    assert [place for place, _ in seen] == sorted(place for place, _ in seen)
    assert any(missing for _, missing in seen)
    for place, missing in seen:
        assert all(final[each] > place for each in missing)


async def test_another_takes_over_from_one_that_was_killed(
    database: Database, settings: Settings
) -> None:
    async with killed(database):
        first = await tell(database, ObjectId())
        await all_recorded(database)
    row = await read_log(database)
    assert row is not None
    assert row["owner"] is not None
    second = await tell(database, ObjectId())
    async with recording(database, settings):
        async with asyncio.timeout(5):
            await all_recorded(database)
        after = await read_log(database)
        assert after is not None
        assert after["owner"] != row["owner"]
        assert list(await places(database)) == [first, second]


async def test_one_that_ends_lets_go_at_once(database: Database, settings: Settings) -> None:
    async with recording(database, settings):
        await tell(database, ObjectId())
        await all_recorded(database)
    row = await read_log(database)
    assert row is not None
    assert (row["owner"], row["until"]) == (None, None)


async def test_two_that_record_at_once_write_the_same(database: Database) -> None:
    """As one that was stopped and goes on after another took over."""
    await ensure_log(database)
    both = [recorder._Recorder(database) for _ in range(2)]
    row = await both[0]._take()
    assert row is not None
    assert await both[1]._take() is None
    await database.data["log"].update_one({}, {"$set": {"until": None}})
    assert await both[1]._take() is not None
    storm = Storm(database, random.Random(3))
    await storm.blow(writers=4, each=5)
    second = asyncio.create_task(both[1]._record(row))
    await all_recorded(database)
    once = await places(database)
    # The first has lost its lease, so `recorded` is no longer its own to move, but it wrote a batch.
    with pytest.raises(recorder._LeaseLost):
        await both[0]._record(row)
    assert await places(database) == once
    await ended(second)


async def test_recorded_never_falls(database: Database) -> None:
    await ensure_log(database)
    one = recorder._Recorder(database)
    await one._take()
    high, low = position_of(Timestamp(0xFFFF_0000, 1), 0), position_of(Timestamp(5, 1), 0)
    for place in (high, low, START):
        await one._move(place)
        assert await recorded(database) == high


async def test_the_log_is_made_anew_when_it_is_gone(database: Database, settings: Settings) -> None:
    async with (
        recording(database, settings),
        open_reader(database, settings) as reader,
        listening(reader, EVERYTHING) as listener,
    ):
        first = await tell(database, ObjectId())
        await all_recorded(database)
        await database.data["log"].delete_many({})
        assert await recorded(database) == START
        second = await tell(database, ObjectId())
        await all_recorded(database)
        third = await tell(database, ObjectId())
        await all_recorded(database)
        await until(lambda: len(listener.changes) == 3)
        assert list(await places(database)) == [first, second, third] == listener.ids
        assert list((await places(database)).values()) == [
            change.position for change in listener.changes
        ]
        async with asyncio.timeout(10):
            while await recorded(database) < listener.changes[-1].position:
                await asyncio.sleep(0.01)


async def test_a_new_log_begins_after_the_last_place(database: Database) -> None:
    assert await last_position(database) is None
    row = await ensure_log(database)
    assert (row["recorded"], row["began"] > START) == (START, True)
    await database.data["log"].delete_many({})
    for stream, place in (("people", "5" * 24), ("jobs", "7" * 24), ("models", "6" * 24)):
        await database.data["events"].insert_one({"stream": stream, "position": place})
    await database.data["events"].insert_one({"stream": "jobs", "position": None})
    row = await ensure_log(database)
    assert row == {
        "_id": "events",
        "recorded": "7" * 24,
        "began": START,
        "owner": None,
        "until": None,
    }
    assert await last_position(database, "7" * 24) == "6" * 24


async def test_what_is_left_when_history_was_lost(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "AT_ONCE", 3)
    async with recording(database, settings):
        known = [await tell(database, ObjectId()) for _ in range(2)]
        await all_recorded(database)
    left = [await tell(database, ObjectId()) for _ in range(7)]
    lost = losing(monkeypatch, recorder)
    async with recording(database, settings), open_reader(database, settings) as reader:
        await all_recorded(database)
        later = [await tell(database, ObjectId()) for _ in range(2)]
        await all_recorded(database)
        found = await places(database)
        assert len(lost) == 1
        assert list(found) == [*known, *sorted(left), *later]
        numbers = [int(found[each][16:], 16) for each in left]
        assert numbers == [0x8000_0000 + index for index in range(7)]
        assert [int(found[each][16:], 16) for each in [*known, *later]] == [2] * 4
        assert {found[each][:16] for each in left} == {found[left[0]][:16]}
        await reader.ready()
        rows = await replayed(database, reader, JOBS, found[known[0]])
        assert [row["_id"] for row in rows] == [known[1], *sorted(left), *later]


async def test_one_that_dies_amid_what_was_left_is_followed_by_another(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "AT_ONCE", 2)
    left = [await tell(database, ObjectId()) for _ in range(5)]
    await ensure_log(database)  # it begins after them
    one = recorder._Recorder(database)
    row = await one._take()
    assert row is not None
    moved: list[str] = []

    async def die(*_: Any) -> None:
        if moved:
            raise RuntimeError("killed")
        moved.append("once")

    monkeypatch.setattr(one, "_move", die)
    with pytest.raises(RuntimeError, match="killed"):
        await one._record(row)
    assert len([each for each in (await places(database)).values() if each]) == 2
    await one._release()
    async with recording(database, settings):
        await all_recorded(database)
    found = await places(database)
    assert list(found) == sorted(left)
    # The log begins with the last event, which is counted. The others have the numbers that the one
    # who died would have given them.
    numbers = [int(place[16:], 16) for place in found.values()]
    assert numbers == [0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0003, 2]


async def test_two_at_once_give_each_that_was_left_a_place_of_its_own(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was stopped amid it and goes on after another took over: one writes some, the other
    passes it, then the first writes more."""
    monkeypatch.setattr(recorder, "AT_ONCE", 2)
    left = [await tell(database, ObjectId()) for _ in range(9)]
    began = await now_of(database.data)
    await ensure_log(database)
    steps = [asyncio.Event() for _ in range(2)]
    left_of = recorder._Recorder._left

    class Stopped(recorder._Recorder):
        """Waits before its second batch, or its third, and has not heard that its lease is lost."""

        async def _move(self, *_: Any) -> None:
            """As if it still held it."""

        async def _left(self, at: Timestamp, after: ObjectId | None) -> list[ObjectId]:
            self.batches = getattr(self, "batches", 0) + 1
            if self is one and self.batches == 2:
                steps[0].set()
                await steps[1].wait()
            if self is other and self.batches == 3:
                steps[1].set()
                await first
            return await left_of(self, at, after)

    one, other = Stopped(database), Stopped(database)
    first = asyncio.create_task(one._record_left(began))
    async with asyncio.timeout(10):
        await steps[0].wait()
        await other._record_left(began)
    found = {each: place for each, place in (await places(database)).items() if place}
    assert len(found) >= 8  # the log begins with the last one
    assert list(found) == sorted(left)[: len(found)]
    assert list(found.values()) == [
        position_of(before(began), 0x8000_0000 + number) for number in range(len(found))
    ]


async def test_without_its_lease_it_writes_nothing_of_what_was_left(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took so long to read that another has it now."""
    for _ in range(3):
        await tell(database, ObjectId())
    await ensure_log(database)
    one, other = [recorder._Recorder(database) for _ in range(2)]
    row = await one._take()
    assert row is not None
    left_of = recorder._Recorder._left

    async def slow(self: Any, at: Timestamp, after: ObjectId | None) -> list[ObjectId]:
        ids = await left_of(self, at, after)
        await database.data["log"].update_one({}, {"$set": {"until": None}})
        assert await other._take() is not None
        return ids

    monkeypatch.setattr(recorder._Recorder, "_left", slow)
    with pytest.raises(recorder._LeaseLost):
        await one._record(row)
    assert set((await places(database)).values()) == {None}


async def test_a_snapshot_of_too_long_ago_is_lost_history(database: Database) -> None:
    time = before(Timestamp((await now_of(database.data)).time - 4000, 1))
    with pytest.raises(HistoryLost):
        await recorder._Recorder(database)._left(time, None)


async def test_old_marks_are_removed(database: Database, settings: Settings) -> None:
    now = seconds_of(position_of(await now_of(database.data), 0))
    rows: list[Row] = [
        {
            "_id": f"{stream} {age}",
            "stream": stream,
            "position": position_of(Timestamp(now - age, 1), 2),
        }
        for stream in ("marks", "jobs")
        for age in (3500, 3700)
    ]
    await database.data["events"].insert_many(rows)
    await ensure_log(database)
    # As if they had been recorded by now: else all since the last of their places is read again.
    reached = position_of(await now_of(database.data), 0)
    await database.data["log"].update_one({"_id": LOG}, {"$set": {"recorded": reached}})
    async with recording(database, settings):
        async with asyncio.timeout(30):
            while await database.data["events"].count_documents({}) > 3:
                await asyncio.sleep(0.01)
    left = await database.data["events"].find().to_list()
    assert sorted(row["_id"] for row in left) == ["jobs 3500", "jobs 3700", "marks 3500"]


async def test_an_operation_does_not_pay_for_the_recorder(
    database: Database, settings: Settings
) -> None:
    count = CommandCount()
    token = counted.set(count)
    async with recording(database, settings):
        counted.reset(token)
        await tell(database, ObjectId())
        await all_recorded(database)
        token = counted.set(count)
    counted.reset(token)
    assert count.names == []


async def test_it_goes_on_after_failures(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    failures: list[int] = []
    take = recorder._Recorder._take

    async def failing(self: Any) -> Row | None:
        if len(failures) < 3:
            failures.append(1)
            raise OSError("no way to the database")
        return await take(self)

    monkeypatch.setattr(recorder._Recorder, "_take", failing)
    async with recording(database, settings):
        await tell(database, ObjectId())
        await all_recorded(database)
    assert caplog.text.count("events.recording_failed") == 3
