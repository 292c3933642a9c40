"""Changes of a job's state: each that is allowed, and no other."""

from itertools import product
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, HELD, JobKind, JobState
from modelharbor.jobs.put import put_job
from modelharbor.jobs.states import TRANSITIONS, change_state

pytestmark = pytest.mark.anyio
ALLOWED = {
    *(("QUEUED", "RUNNING"), ("QUEUED", "CANCELLED")),
    *(("RUNNING", "SUCCEEDED"), ("RUNNING", "FAILED"), ("RUNNING", "RETRYING")),
    *(("RUNNING", "CANCELLING"), ("RUNNING", "QUEUED"), ("RUNNING", "DEAD")),
    *(("RETRYING", "RUNNING"), ("RETRYING", "CANCELLED"), ("RETRYING", "QUEUED")),
    *(("CANCELLING", "CANCELLED"), ("FAILED", "QUEUED"), ("CANCELLED", "QUEUED")),
    ("DEAD", "QUEUED"),
}


async def put(database: Database) -> Row:
    return await database.transaction(
        lambda session: put_job(
            database, session, kind=JobKind.REINDEX, input={}, principals=["operator"]
        )
    )


async def test_only_what_the_table_allows_happens(database: Database) -> None:
    job = await put(database)
    for source, to in product(JobState, JobState):
        held = {"worker": "w", "lease_until": job["created_at"], "heartbeat_at": None}
        before = {**job, "_id": ObjectId(), "state": source.value, **held}
        await database.data["jobs"].insert_one(before)

        async def work(
            session: Any, to: JobState = to, job_id: ObjectId = before["_id"]
        ) -> Row | None:
            return await change_state(
                *(database, session, {"_id": job_id}, to, [{"$set": {"comment": "c"}}]),
                actor_id=job["_id"],
                comment="why",
            )

        after = await database.transaction(work)
        events = await database.find("events", {"job_id": before["_id"]})
        if (source.value, to.value) not in ALLOWED:
            assert after is None
            assert await database.data["jobs"].find_one({"_id": before["_id"]}) == before
            assert events == []
            continue
        assert after is not None
        assert (after["state"], after["comment"]) == (to.value, "c")
        assert (after["finished_at"] is not None) == (to in ENDED)
        assert after["progress"]["sequence"] == 1
        assert after["worker"] == ("w" if to in HELD else None)
        assert [(e["job"]["state"], e["actor_id"], e["comment"]) for e in events] == [
            (to.value, job["_id"], "why")
        ]
    found = {(source.value, to.value) for source in JobState for to in TRANSITIONS[source]}
    assert found == ALLOWED


async def test_the_query_must_match_too(database: Database) -> None:
    job = await put(database)
    for query in ({"_id": job["_id"], "token": 7}, {"_id": ObjectId()}):
        for to in (JobState.RUNNING, JobState.QUEUED):

            async def work(session: Any, query: Row = query, to: JobState = to) -> Row | None:
                return await change_state(database, session, query, to)

            assert await database.transaction(work) is None
    assert await database.count("events", {}) == 1
