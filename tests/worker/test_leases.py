"""Leases while a handler is in the middle of a transaction that takes longer than they do."""

import asyncio
from typing import Any

import pytest
from pymongo.errors import AutoReconnect, PyMongoError

from modelharbor.db.base import Row, utc_now
from modelharbor.db.jobs import JobKind
from modelharbor.errors import Unavailable
from modelharbor.worker import claims, run
from modelharbor.worker.claims import IdleTransactions
from modelharbor.worker.schedule import Clock
from modelharbor.worker.tools import Tools

from .conftest import Hall

pytestmark = pytest.mark.anyio


async def test_a_long_transaction_keeps_its_lease_and_holds_nobody_up(hall: Hall) -> None:
    started: list[Any] = []

    async def handler(job: Row, tools: Tools) -> None:
        started.append(job["input"]["name"])
        if job["input"]["name"] == "quick":
            return

        async def effect(session: Any) -> None:
            await tools.database.data["likes"].insert_one({"user_id": job["_id"]}, session=session)
            await asyncio.sleep(3.6 if job["input"]["name"] == "long" else 0)

        await tools.database.transaction(effect)
        await asyncio.sleep(1.0)  # the lease of the transaction's begin would be over
        if job["input"]["name"] == "beside":
            await asyncio.sleep(3.0)

    jobs = [await hall.put(input={"name": name}) for name in ("long", "beside")]
    async with (
        hall.working({JobKind.REINDEX: handler}, lease_seconds=1.2),
        hall.working({JobKind.REINDEX: handler}, lease_seconds=1.2),
    ):
        await asyncio.sleep(2.0)
        jobs.append(await hall.put(input={"name": "quick"}))
        begun = asyncio.get_running_loop().time()
        await hall.reaches(jobs[-1]["_id"], "SUCCEEDED")
        assert asyncio.get_running_loop().time() - begun < 2.4
        done = [await hall.reaches(job["_id"], "SUCCEEDED") for job in jobs]
    assert sorted(started) == ["beside", "long", "quick"]
    assert [(row["token"], row["deaths"]) for row in done] == [(1, 0)] * 3
    assert await hall.database.count("likes", {}) == 2


async def test_a_schedule_that_fails_keeps_no_lease_from_running_out(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def put_due(self: Clock, *given: Any) -> list[Row]:
        raise Unavailable("Others put the same.")

    async def handler(job: Row, tools: Tools) -> None:
        pass

    monkeypatch.setattr(Clock, "put_due", put_due)
    job = await hall.put()
    await hall.database.data["jobs"].update_one(
        {"_id": job["_id"]},
        {"$set": {"state": "RUNNING", "worker": "gone", "lease_until": utc_now()}},
    )
    async with hall.working({JobKind.REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert done["deaths"] == 1


async def test_after_mongodb_was_gone_others_may_renew_first(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []

    async def expire(*given: Any) -> tuple[list[Row], bool]:
        times.append(asyncio.get_running_loop().time())
        if len(times) == 2:
            raise AutoReconnect("gone")
        return await claims.expire(*given)

    monkeypatch.setattr(run, "expire", expire)
    monkeypatch.setattr(run, "LOOK_SECONDS", 0.05)

    async def looked_again() -> bool:
        return len(times) > 3

    async with hall.working({}):
        await hall.until(looked_again)
    assert times[1] - times[0] < 0.4
    assert times[2] - times[1] > 0.45  # half a lease
    assert times[3] - times[2] < 0.4


async def test_of_many_that_are_held_up_few_are_waited_for(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EXPIRE_SECONDS", 0.5)
    jobs = [await hall.put() for _ in range(20)]
    held = {"_id": {"$in": [job["_id"] for job in jobs]}}
    data = hall.database.data["jobs"]
    await data.update_many(
        held, {"$set": {"state": "RUNNING", "worker": "gone", "lease_until": utc_now()}}
    )
    async with hall.database.client.start_session() as session:
        await session.start_transaction()
        await data.update_many(held, {"$inc": {"touched": 1}}, session=session)
        begun = asyncio.get_running_loop().time()
        assert await claims.expire(hall.database, ()) == ([], True)
        assert asyncio.get_running_loop().time() - begun < 5  # of 10 that all would take
        await session.abort_transaction()
    changed, is_blocked = await claims.expire(hall.database, ())
    assert (len(changed), is_blocked) == (20, False)


async def test_a_long_transaction_that_is_at_work_is_not_ended(hall: Hall) -> None:
    """It was idle for longer than a lease in all, but never for long."""
    idle = IdleTransactions(2.5)
    async with hall.database.client.start_session() as session:
        await session.start_transaction()
        for number in range(35):
            await hall.database.data["likes"].insert_one({"user_id": number}, session=session)
            await asyncio.sleep(0.08)
            assert await idle.end_some(hall.database) == 0
        assert idle.watched
        await session.commit_transaction()
    assert await hall.database.count("likes", {}) == 35
    assert await idle.end_some(hall.database) == 0
    assert not idle.watched


async def test_a_worker_that_died_while_it_claimed_holds_jobs_up_for_a_lease(hall: Hall) -> None:
    """MongoDB itself would let its transaction stand for a minute."""
    started: list[Any] = []

    async def handler(job: Row, tools: Tools) -> None:
        started.append(job["_id"])

    jobs = [await hall.put() for _ in range(6)]
    async with hall.database.client.start_session() as session:
        await session.start_transaction()
        await hall.database.data["jobs"].update_one(
            {"_id": jobs[0]["_id"]}, {"$inc": {"touched": 1}}, session=session
        )
        async with hall.working({JobKind.REINDEX: handler}):
            for job in reversed(jobs):
                await hall.reaches(job["_id"], "SUCCEEDED")
        with pytest.raises(PyMongoError):
            await session.commit_transaction()
    assert started[-1] == jobs[0]["_id"]
    assert len(started) == 6
