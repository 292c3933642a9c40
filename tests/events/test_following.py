"""The change stream with places: the same whoever counts, wherever they begin."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from bson import ObjectId, Timestamp
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import OperationFailure

from modelharbor.db.connection import Database
from modelharbor.events import following, reader, recorder
from modelharbor.events.following import Found, HistoryLost, Place, follow, now_of

from .log import event

pytestmark = pytest.mark.anyio


async def mixed(database: Database) -> list[ObjectId]:
    """Progress, an event, a model, two events and progress in one transaction; answers the events."""
    job_id, model_id = ObjectId(), ObjectId()
    await database.data["jobs"].insert_one({"_id": job_id})
    events = [event() for _ in range(3)]

    async def work(session: AsyncClientSession) -> None:
        jobs = database.data["jobs"]
        await jobs.update_one({"_id": job_id}, {"$set": {"progress.current": 1}}, session=session)
        await events[0].insert(session=session)
        await database.data["models"].insert_one(
            {"_id": model_id, "name_lower": str(model_id)}, session=session
        )
        await events[1].insert(session=session)
        await events[2].insert(session=session)
        await jobs.update_one({"_id": job_id}, {"$set": {"progress.current": 2}}, session=session)

    await database.transaction(work)
    return [each.id for each in events]


async def taken(
    database: Database, pipeline: list[Any], place: Place, count: int
) -> list[tuple[str, ObjectId]]:
    """Positions and ids of the next changes; `place` moves along."""
    found: list[tuple[str, ObjectId]] = []
    async with asyncio.timeout(20), aclosing(follow(database, pipeline, place)) as stream:
        while len(found) < count:
            each = await anext(stream)
            if each.change is not None:
                found.append((each.position, each.change["documentKey"]["_id"]))
    return found


async def test_numbers_within_a_commit_count_its_events(database: Database) -> None:
    start = await now_of(database.data)
    events = await mixed(database)
    whole = await taken(database, reader.PIPELINE, Place(start), 6)
    assert [int(position[16:], 16) for position, _ in whole] == [1, 2, 2, 3, 4, 4]
    assert len({position[:16] for position, _ in whole}) == 1
    assert [each for _, each in whole if each in events] == events
    # Who watches the events alone finds the same places for them.
    only = await taken(database, recorder.PIPELINE, Place(start), 3)
    assert only == [pair for pair in whole if pair[1] in events]


async def test_it_goes_on_within_a_commit_wherever_it_ended(database: Database) -> None:
    start = await now_of(database.data)
    await mixed(database)
    await mixed(database)
    whole = await taken(database, reader.PIPELINE, Place(start), 12)
    for cut in range(13):
        place = Place(start)
        first = await taken(database, reader.PIPELINE, place, cut)
        assert first + await taken(database, reader.PIPELINE, place, 12 - cut) == whole, cut


async def test_a_place_moves_on_where_nothing_happens(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "WAIT_MS", 20)
    start = await now_of(database.data)
    place = Place(start)
    async with asyncio.timeout(20), aclosing(follow(database, reader.PIPELINE, place)) as stream:
        first = await anext(stream)
        assert (first.change, int(first.position[16:], 16)) == (None, 0)
        await database.data["cards"].insert_one({})  # nobody is told of it
        later = await now_of(database.data)
        last = first
        while place.time < later:
            found = await anext(stream)
            assert found.change is None
            assert found.position >= last.position
            last = found
    [event_id, *_] = await mixed(database)
    found_ids = [each for _, each in await taken(database, reader.PIPELINE, place, 6)]
    assert found_ids[1] == event_id


@pytest.mark.parametrize("token", [None, {}, {"_data": "81" + "0" * 16}, {"_data": "82zz"}, "x"])
def test_a_token_of_another_shape_says_nothing(token: Any) -> None:
    assert following._reached(token) is None


def test_a_token_begins_with_its_time() -> None:
    token = {"_data": "826B07639E000000032B022C0100296E5A1004FF"}
    assert following._reached(token) == Timestamp(0x6B07639E, 3)


@pytest.mark.parametrize(("code", "raised"), [(286, HistoryLost), (11601, OperationFailure)])
async def test_only_lost_history_is_told_as_such(code: int, raised: type[Exception]) -> None:
    async def watch(*_: Any, **__: Any) -> None:
        raise OperationFailure("no", code)

    data = SimpleNamespace(watch=watch)
    stub: Any = SimpleNamespace(data=SimpleNamespace(with_options=lambda **_: data))

    async def whole() -> AsyncIterator[Found]:
        async for found in follow(stub, [], Place(Timestamp(1, 1))):
            yield found

    with pytest.raises(raised):
        await anext(whole())
