"""Jobs are put with the change that needs them, once for a key, in fair turns."""

import asyncio
from typing import Any

import pytest
from beanie import PydanticObjectId
from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobDocument, JobKind, JobState
from modelharbor.db.tokens import Permission
from modelharbor.jobs.put import add_progress, adopt, next_turn, put_job
from modelharbor.jobs.states import CLAIMABLE, change_state

pytestmark = pytest.mark.anyio


async def put(database: Database, **given: Any) -> Row:
    values: Row = {"kind": JobKind.REINDEX, "input": {}, "principals": ["operator"], **given}
    return await database.transaction(lambda session: put_job(database, session, **values))


async def test_what_is_put_is_stored_and_told(database: Database) -> None:
    owner, about = ObjectId(), ObjectId()
    row = await put(
        database,
        input={"a": 1},
        created_by_id=owner,
        scopes=[Permission.READ, "WRITE"],
        subject={"type": "Model", "id": about},
        priority=2,
        max_attempts=3,
    )
    stored = await database.data["jobs"].find_one({"_id": row["_id"]})
    assert stored == row
    job = JobDocument.model_validate(stored)
    assert (job.input, job.scopes, job.created_by_id) == ({"a": 1}, ["READ", "WRITE"], owner)
    assert (job.subject, job.priority, job.turn) == ({"type": "Model", "id": about}, 2, 1)
    (event,) = await database.find("events", {"stream": "jobs"})
    assert (event["job_id"], event["kind"]) == (row["_id"], None)
    assert event["about"] == [row["_id"], about, owner]


async def test_nothing_is_put_when_the_change_fails(database: Database) -> None:
    async def work(session: Any) -> None:
        await put_job(database, session, kind=JobKind.REINDEX, input={}, principals=[])
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        await database.transaction(work)
    assert await database.count("jobs", {}) == 0
    assert await database.count("events", {}) == 0


async def test_a_key_gives_one_job_of_each_kind(database: Database) -> None:
    rows = await asyncio.gather(
        *(put(database, idempotency_key="k", input={"n": n}) for n in range(8))
    )
    assert len({row["_id"] for row in rows}) == 1
    other = await put(database, idempotency_key="k", kind=JobKind.IMPORT_MODEL)
    assert other["_id"] != rows[0]["_id"]
    assert await database.count("jobs", {}) == 2
    assert await database.count("events", {}) == 2


async def test_a_turn_costs_two_short_index_reads(database: Database) -> None:
    owner = PydanticObjectId()
    first = await put(database, created_by_id=owner)
    await database.data["jobs"].insert_many(
        [{**first, "_id": ObjectId(), "turn": n} for n in range(2, 3001)]
    )

    async def examined(query: Row, order: int) -> tuple[int, int]:
        plan = await database.data.command(
            "explain",
            {"find": "jobs", "filter": query, "sort": {"turn": order}, "limit": 1},
            verbosity="executionStats",
        )
        stats = plan["executionStats"]
        return stats["totalKeysExamined"], stats["totalDocsExamined"]

    async def turn(session: Any) -> int:
        return await next_turn(database, session, JobKind.REINDEX, owner, 0)

    assert await database.transaction(turn) == 3001
    keys, rows = await examined({"state": "QUEUED", "priority": 0, **CLAIMABLE}, 1)
    assert (keys < 5, rows) == (True, 1)
    lane = {
        "state": {"$in": ["QUEUED", "RETRYING"]},
        "created_by_id": owner,
        "kind": "REINDEX",
        "priority": 0,
    }
    keys, rows = await examined(lane, -1)
    assert (keys < 5, rows < 3) == (True, True)


async def test_jobs_are_adopted_that_have_not_ended_and_are_no_others(database: Database) -> None:
    parent, other = await put(database), await put(database)
    free = [await put(database) for _ in range(3)]
    ended = await put(database)
    await database.data["jobs"].update_one({"_id": ended["_id"]}, {"$set": {"state": "FAILED"}})
    theirs = await put(database, parent_id=other["_id"])
    ids = [row["_id"] for row in (*free, ended, theirs)]

    async def adopted() -> int:
        return await database.transaction(
            lambda session: adopt(database, session, parent["_id"], ids)
        )

    assert (await adopted(), await adopted()) == (3, 0)

    async def open_children() -> list[int]:
        rows = await database.find("jobs", {"_id": {"$in": [parent["_id"], other["_id"]]}})
        return [row["open_children"] for row in rows]

    assert await open_children() == [3, 1]
    rows = await database.find("jobs", {"parent_id": parent["_id"]}, sort={"_id": 1})
    assert [row["_id"] for row in rows] == [row["_id"] for row in free]

    async def cancel(session: Any) -> None:
        await change_state(database, session, {"_id": free[0]["_id"]}, JobState.CANCELLED)

    await database.transaction(cancel)
    assert await open_children() == [2, 1]


async def test_a_job_that_ends_while_it_is_adopted_is_counted_once(database: Database) -> None:
    parent = await put(database)
    jobs = [await put(database) for _ in range(10)]

    async def cancel(job: Row) -> None:
        await database.transaction(
            lambda session: change_state(database, session, {"_id": job["_id"]}, JobState.CANCELLED)
        )

    async def take(job: Row) -> int:
        return await database.transaction(
            lambda session: adopt(database, session, parent["_id"], [job["_id"]])
        )

    await asyncio.gather(*(act(job) for job in jobs for act in (cancel, take)))
    [row] = await database.find("jobs", {"_id": parent["_id"]})
    assert row["open_children"] == 0
    assert await database.count("jobs", {"state": "CANCELLED"}) == 10


async def test_progress_is_added_to_a_job_that_waits_up_to_its_total(database: Database) -> None:
    job = await put(database)

    async def added(count: int, **values: Any) -> tuple[int, int]:
        await database.data["jobs"].update_one({"_id": job["_id"]}, {"$set": values})
        before = await database.data["jobs"].find_one({"_id": job["_id"]})
        await add_progress(database, job["_id"], count)
        after = await database.data["jobs"].find_one({"_id": job["_id"]})
        assert before is not None
        assert after is not None
        told = after["progress"]["sequence"] - before["progress"]["sequence"]
        return after["progress"]["current"], told

    assert await added(5, state="QUEUED") == (0, 0)
    assert await added(5, awaits_children=True) == (5, 1)
    assert await added(5, **{"progress.total": 8}) == (8, 1)
    assert await added(5, state="RUNNING") == (8, 0)
