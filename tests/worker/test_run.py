"""How a worker claims, runs and settles jobs."""

import asyncio
import os
from datetime import timedelta
from typing import Any

import pytest
from beanie import PydanticObjectId
from bson import ObjectId
from pymongo.errors import AutoReconnect

from modelharbor.auth.viewer import actor_principal
from modelharbor.cache import keys
from modelharbor.cache.client import connect_cache
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.jobs import JobDocument, JobKind, JobLogDocument, JobState, Level
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Forbidden, Refused, Unavailable
from modelharbor.jobs.states import CLAIMABLE, change_state
from modelharbor.resolvers.jobs import cancel_job, retry_job
from modelharbor.worker import claims, outcomes, reports, run, tools
from modelharbor.worker.interruptions import LeaseLost
from modelharbor.worker.tools import HandlerSpec, JobCancelled, Tools

from .conftest import Hall

pytestmark = pytest.mark.anyio
REINDEX, IMPORT, COLLECT = JobKind.REINDEX, JobKind.IMPORT_MODEL, JobKind.GARBAGE_COLLECT


async def test_a_job_is_run_and_its_result_is_kept(hall: Hall) -> None:
    async def handler(job: Row, tools: Tools) -> Row:
        tools.report(3, 10, unit="models", message="$half")
        return {"$seen": job["input"]["n"], "a.b": None}

    job = await hall.put(input={"n": 4})
    assert (job["state"], job["turn"], job["token"]) == ("QUEUED", 1, 0)
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert done["result"] == {"$seen": 4, "a.b": None}
    assert (done["attempt"], done["token"], done["deaths"]) == (1, 1, 0)
    assert (done["worker"], done["lease_until"], done["heartbeat_at"]) == (None, None, None)
    progress = done["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (3, 10, "models")
    assert progress["message"] == "$half"
    assert done["started_at"] <= done["finished_at"]
    assert await hall.states(job["_id"]) == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_who_reads_that_a_job_is_done_reads_what_it_did(hall: Hall) -> None:
    """What the job has written counts as acknowledged before its state says that it is done."""
    keeping = hall.settings.model_copy(update={"response_cache": True})
    wrote: list[int] = []

    async def handler(job: Row, tools: Tools) -> None:
        model_id = ObjectId()
        await hall.database.data["cards"].insert_one({"_id": model_id})
        now = (await hall.database.data.command("hello"))["operationTime"]
        wrote.append(now.time << 32 | now.inc)

    async with connect_cache(keeping) as cache:
        key = cache.name(keys.acknowledged(keeping.mongo_database))
        await cache.redis.set(key, f"{1:016x}")
        job = await hall.put()
        async with hall.working({REINDEX: handler}, response_cache=True):
            await hall.reaches(job["_id"], "SUCCEEDED")
        found = await cache.redis.get(key)
        assert found is not None
        assert 1 < int(found, 16) <= wrote[0]
        await cache.redis.delete(key)


async def test_events_tell_what_others_may_know(hall: Hall) -> None:
    async def handler(job: Row, tools: Tools) -> None:
        tools.report(7)

    owner = PydanticObjectId()
    job = await hall.put(
        input={"secret": 1},
        created_by_id=owner,
        principals=["operator", actor_principal(owner)],
        subject={"type": "Model", "id": PydanticObjectId()},
    )
    async with hall.working({REINDEX: handler}):
        await hall.reaches(job["_id"], "FAILED", "SUCCEEDED")
    first, _, last = await hall.database.find("events", {"job_id": job["_id"]}, sort={"_id": 1})
    assert first["about"] == last["about"] == [job["_id"], job["subject"]["id"], owner]
    assert first["stream"] == "jobs"
    assert first["principals"] == ["operator", actor_principal(owner)]
    hidden = {"input", "scopes", "token", "touched", "worker", "lease_until", "turn", "checkpoint"}
    assert set(first["job"]) == set(job) - hidden
    assert last["job"]["progress"]["current"] == 7
    sequences = [each["job"]["progress"]["sequence"] for each in (first, last)]
    assert sequences[0] == 0 < sequences[1]


@pytest.mark.parametrize(
    ("error", "state", "failure"),
    [
        (
            Refused(ErrorCode.CONFLICT, "Taken.", "name"),
            "FAILED",
            {"code": "CONFLICT", "message": "Taken.", "path": ["name"]},
        ),
        (Forbidden("No."), "FAILED", {"code": "FORBIDDEN", "message": "No.", "path": None}),
        (
            Unavailable("Later."),
            "RETRYING",
            {"code": "UNAVAILABLE", "message": "Later.", "path": None},
        ),
        (
            AutoReconnect("secret host"),
            "RETRYING",
            {
                "code": "UNAVAILABLE",
                "message": "The database does not answer; try again.",
                "path": None,
            },
        ),
        (
            ValueError("secret"),
            "RETRYING",
            {"code": "INTERNAL", "message": outcomes.MASKED, "path": None},
        ),
        (
            RecursionError(),
            "RETRYING",
            {"code": "INTERNAL", "message": outcomes.MASKED, "path": None},
        ),
        (
            JobCancelled(),
            "RETRYING",
            {"code": "INTERNAL", "message": outcomes.MASKED, "path": None},
        ),
    ],
)
async def test_failures_come_to_their_states(
    error: Exception,
    state: str,
    failure: Row,
    hall: Hall,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured: list[BaseException] = []
    monkeypatch.setattr(outcomes, "capture", captured.append)
    monkeypatch.setattr(outcomes, "backoff_seconds", lambda attempt: 60.0 * attempt)

    async def handler(job: Row, tools: Tools) -> None:
        raise error

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "FAILED", "RETRYING")
    assert (done["state"], done["error"], done["attempt"]) == (state, failure, 1)
    assert (done["finished_at"] is None) == (state == "RETRYING")
    wait = (done["run_after"] - utc_now()).total_seconds()
    assert (50 < wait <= 60) == (state == "RETRYING")
    assert bool(captured) == (failure["code"] == "INTERNAL") == ("job.broke" in caplog.text)


async def test_attempts_end(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "FIRST_BACKOFF_SECONDS", 0.001)
    started = []

    async def handler(job: Row, tools: Tools) -> None:
        started.append((job["attempt"], job["progress"]["current"], job["error"]))
        tools.report(5)
        raise ValueError

    job = await hall.put(max_attempts=3)
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "FAILED")
    assert started == [(1, 0, None), (2, 0, None), (3, 0, None)]
    assert (done["error"]["code"], done["attempt"]) == ("INTERNAL", 3)
    assert await hall.states(job["_id"]) == [
        *("QUEUED", "RUNNING", "RETRYING", "RUNNING", "RETRYING", "RUNNING", "FAILED")
    ]


def test_pauses_grow_and_are_spread() -> None:
    for attempt, longest in ((1, 1.0), (2, 2.0), (5, 16.0), (9, 256.0), (10, 300.0), (5000, 300.0)):
        found = [outcomes.backoff_seconds(attempt) for _ in range(200)]
        assert 0 <= min(found) < longest / 4
        assert longest * 3 / 4 < max(found) <= longest


async def test_a_result_that_cannot_be_stored_is_a_failure(hall: Hall) -> None:
    async def handler(job: Row, tools: Tools) -> Row:
        return {"no": object()} if job["input"] else {"long": "x" * 300_000}

    jobs = [await hall.put(input=given) for given in ({"a": 1}, {})]
    async with hall.working({REINDEX: handler}):
        for job in jobs:
            done = await hall.reaches(job["_id"], "FAILED")
            assert (done["error"]["code"], done["result"]) == ("INTERNAL", None)


async def test_places_are_counted_in_all_and_by_kind(hall: Hall) -> None:
    running: dict[str, int] = {"all": 0}
    most: dict[str, int] = {}

    async def handler(job: Row, tools: Tools) -> None:
        for name in ("all", job["kind"]):
            running[name] = running.get(name, 0) + 1
            most[name] = max(most.get(name, 0), running[name])
        await asyncio.sleep(0.05)
        for name in ("all", job["kind"]):
            running[name] -= 1

    jobs = [await hall.put(kind) for kind in (IMPORT,) * 8 + (REINDEX,) * 20 + (COLLECT,)]
    handlers = {
        IMPORT: HandlerSpec(handler, at_once=2),
        REINDEX: HandlerSpec(handler, at_once=10),
    }
    async with hall.working(handlers, concurrency=5):
        for job in jobs[:-1]:
            await hall.reaches(job["_id"], "SUCCEEDED")
    assert most == {"all": 5, "IMPORT_MODEL": 2, "REINDEX": 5}
    assert (await hall.job(jobs[-1]["_id"]))["state"] == "QUEUED"  # nobody does this kind


async def test_priority_then_fair_turns(hall: Hall) -> None:
    ada, bob = PydanticObjectId(), PydanticObjectId()
    order: list[tuple[Any, int]] = []

    async def handler(job: Row, tools: Tools) -> None:
        order.append((job["created_by_id"], job["input"]["n"]))

    first = await hall.put(created_by_id=ada, input={"n": 1})
    many = [
        {**first, "_id": PydanticObjectId(), "turn": n, "input": {"n": n}} for n in range(2, 10_001)
    ]
    await hall.database.data["jobs"].insert_many(many)
    more = await hall.put(created_by_id=ada, input={"n": 10_001})
    assert more["turn"] == 10_001
    others = [await hall.put(created_by_id=bob, input={"n": n}) for n in (1, 2, 3)]
    assert [job["turn"] for job in others] == [2, 3, 4]
    other_kind = await hall.put(IMPORT, created_by_id=ada, input={"n": 0})
    assert other_kind["turn"] == 2
    urgent = await hall.put(created_by_id=ada, input={"n": -1}, priority=1)
    assert urgent["turn"] == 1
    async with hall.working({REINDEX: handler, IMPORT: handler}, concurrency=1):
        await hall.until(lambda: _true(len(order) >= 9))
    assert order[:9] == [
        *((ada, -1), (ada, 1), (ada, 2), (bob, 1), (ada, 0), (ada, 3), (bob, 2)),
        *((ada, 4), (bob, 3)),
    ]


async def _true(value: bool) -> bool:
    return value


async def test_many_that_wait_for_their_time_are_passed_over_by_an_index(hall: Hall) -> None:
    later = utc_now() + timedelta(hours=1)
    for state in (JobState.QUEUED, JobState.RETRYING):
        await JobDocument.insert_many(
            [JobDocument(kind=REINDEX, state=state, run_after=later) for _ in range(500)]
        )
    await hall.put()
    query: Row = {
        "state": {"$in": ["QUEUED", "RETRYING"]},
        "kind": {"$in": ["REINDEX"]},
        **CLAIMABLE,
    }
    order = {"priority": -1, "turn": 1, "_id": 1}
    for command in (
        {"find": "jobs", "filter": query, "sort": order, "limit": 24},
        {"find": "jobs", "filter": query, "limit": 1},
    ):
        plan = await hall.database.data.command({"explain": command, "verbosity": "executionStats"})
        assert plan["executionStats"]["totalKeysExamined"] <= 5, command


async def test_what_waits_for_its_time_does_not_hold_turns_back(hall: Hall) -> None:
    later = utc_now() + timedelta(hours=1)
    await hall.put(run_after=later)
    kept = await hall.put(created_by_id=PydanticObjectId())
    await hall.database.data["jobs"].update_one({"_id": kept["_id"]}, {"$set": {"turn": 500}})
    assert (await hall.put(created_by_id=PydanticObjectId()))["turn"] == 501
    started = []

    async def handler(job: Row, tools: Tools) -> None:
        started.append(job["turn"])

    async with hall.working({REINDEX: handler}, concurrency=1):
        await hall.until(lambda: _true(len(started) == 2))
    assert started == [500, 501]


async def test_workers_that_want_the_same_jobs_start_each_once(hall: Hall) -> None:
    started: list[Any] = []

    async def handler(job: Row, tools: Tools) -> None:
        started.append(job["_id"])
        await asyncio.sleep(0.01)

    jobs = [await hall.put() for _ in range(60)]
    async with (
        hall.working({REINDEX: handler}, 4),
        hall.working({REINDEX: handler}, 4),
        hall.working({REINDEX: handler}, 4),
    ):
        for job in jobs:
            await hall.reaches(job["_id"], "SUCCEEDED")
    assert sorted(started) == sorted(job["_id"] for job in jobs)


async def test_a_long_job_keeps_its_lease(hall: Hall) -> None:
    started: list[int] = []

    async def handler(job: Row, tools: Tools) -> None:
        started.append(job["token"])
        await asyncio.sleep(2.4)

    job = await hall.put()
    async with (
        hall.working({REINDEX: handler}, lease_seconds=0.6),
        hall.working({REINDEX: handler}, lease_seconds=0.6),
    ):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert (started, done["token"], done["deaths"]) == ([1], 1, 0)


async def _die(hall: Hall, job: Row, deaths: int = 0) -> None:
    """As if a worker had claimed it and was gone."""
    await hall.database.data["jobs"].update_one(
        {"_id": job["_id"]},
        {
            "$set": {
                "state": "RUNNING",
                "worker": "gone",
                "deaths": deaths,
                "lease_until": utc_now() - timedelta(seconds=1),
            },
            "$inc": {"token": 1, "attempt": 1},
        },
    )


async def test_a_lease_that_ran_out_is_claimed_by_another(hall: Hall) -> None:
    async def handler(job: Row, tools: Tools) -> Row:
        return {"token": job["token"]}

    job = await hall.put()
    await _die(hall, job)
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert (done["result"], done["deaths"], done["attempt"]) == ({"token": 2}, 1, 2)
    assert await hall.states(job["_id"]) == ["QUEUED", "QUEUED", "RUNNING", "SUCCEEDED"]


async def test_the_third_death_is_the_last(hall: Hall) -> None:
    async def handler(job: Row, tools: Tools) -> None:
        raise AssertionError

    job, cancelled = await hall.put(), await hall.put()
    await _die(hall, job, deaths=2)
    await _die(hall, cancelled)
    await hall.database.data["jobs"].update_one(
        {"_id": cancelled["_id"]}, {"$set": {"state": "CANCELLING"}}
    )
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "DEAD")
        assert (await hall.reaches(cancelled["_id"], "CANCELLED"))["deaths"] == 1
    assert done["deaths"] == 3
    assert done["error"] == {
        "code": "WORKER_DIED",
        "message": "Workers ended 3 times while they had this job.",
        "path": None,
    }


async def test_suspects_run_one_at_a_time_beside_others(hall: Hall) -> None:
    running: set[str] = set()
    seen: set[frozenset[str]] = set()

    async def handler(job: Row, tools: Tools) -> None:
        running.add(job["input"]["name"])
        await asyncio.sleep(0.15)
        seen.add(frozenset(running))
        running.discard(job["input"]["name"])

    jobs = [await hall.put(input={"name": name}) for name in ("s1", "s2", "a", "b")]
    await hall.database.data["jobs"].update_many(
        {"_id": {"$in": [jobs[0]["_id"], jobs[1]["_id"]]}}, {"$set": {"deaths": 1}}
    )
    async with hall.working({REINDEX: handler}):
        for job in jobs:
            await hall.reaches(job["_id"], "SUCCEEDED")
    assert not any({"s1", "s2"} <= each for each in seen)
    assert any({"s1", "a", "b"} == each for each in seen)


async def test_who_lost_the_lease_commits_nothing(hall: Hall) -> None:
    """The first claim goes on working after its job was taken over."""
    begun, go_on = asyncio.Event(), asyncio.Event()
    lost: list[type[BaseException]] = []

    async def handler(job: Row, tools: Tools) -> Row:
        async def effect(session: Any) -> None:
            await tools.database.data["likes"].insert_one({"by": job["token"]}, session=session)

        if job["token"] == 1:
            begun.set()
            await go_on.wait()
            try:
                await tools.database.transaction(effect)
            except LeaseLost as error:
                lost.append(type(error))
                raise
        await tools.database.transaction(effect)
        return {"by": job["token"]}

    job = await hall.put()
    async with hall.working({REINDEX: handler}, lease_seconds=60.0):  # its beats come late
        await begun.wait()
        await hall.database.data["jobs"].update_one(
            {"_id": job["_id"]}, {"$set": {"lease_until": utc_now() - timedelta(seconds=1)}}
        )
        async with hall.working({REINDEX: handler}):
            done = await hall.reaches(job["_id"], "SUCCEEDED")
        go_on.set()
        await hall.until(lambda: _true(bool(lost)))
    assert done["result"] == {"by": 2}
    assert [row["by"] for row in await hall.database.find("likes", {})] == [2]
    assert (await hall.job(job["_id"]))["result"] == {"by": 2}


async def test_a_takeover_collides_with_a_transaction_of_the_former_worker(hall: Hall) -> None:
    """It began while the job was its own, and would commit after that."""
    inside, taken = asyncio.Event(), asyncio.Event()
    done = []

    async def handler(job: Row, tools: Tools) -> None:
        async def effect(session: Any) -> None:
            await tools.database.data["likes"].insert_one({"by": job["token"]}, session=session)
            inside.set()
            await taken.wait()

        try:
            await tools.database.transaction(effect)
        finally:
            done.append(1)

    job = await hall.put()
    async with hall.working({REINDEX: handler}, lease_seconds=60.0):
        await inside.wait()
        takeover = asyncio.create_task(
            hall.database.transaction(
                lambda session: change_state(
                    *(hall.database, session, {"_id": job["_id"]}, JobState.QUEUED),
                    [{"$set": {"deaths": 1}}],
                )
            )
        )
        await asyncio.sleep(0.2)
        assert not takeover.done()
        taken.set()
        await takeover
        await hall.until(lambda: _true(bool(done)))
    assert await hall.database.count("likes", {}) == 1


async def test_a_job_is_cancelled_at_its_next_report(hall: Hall) -> None:
    begun = asyncio.Event()
    tidied = []

    async def handler(job: Row, tools: Tools) -> None:
        try:
            async with tools.step("loop"):
                for number in range(10_000):
                    tools.report(number)
                    begun.set()
                    await asyncio.sleep(0.01)
        except JobCancelled:
            tidied.append(tools.done_steps)
            raise

    job = await hall.put()
    async with hall.working({REINDEX: handler}, lease_seconds=30.0):
        await begun.wait()
        await _cancel(hall, job)
        done = await hall.reaches(job["_id"], "CANCELLED")
    assert tidied == [frozenset()]
    assert [step["state"] for step in done["steps"]] == ["CANCELLED"]
    assert done["error"] is None
    assert await hall.states(job["_id"]) == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]


async def _cancel(hall: Hall, job: Row) -> Row | None:
    return await hall.database.transaction(
        lambda session: change_state(
            hall.database, session, {"_id": job["_id"]}, JobState.CANCELLING
        )
    )


async def test_a_job_that_ends_well_after_it_was_cancelled_is_cancelled(hall: Hall) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(job: Row, tools: Tools) -> Row:
        begun.set()
        await go_on.wait()
        return {"done": True}

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        await begun.wait()
        await _cancel(hall, job)
        go_on.set()
        done = await hall.reaches(job["_id"], "CANCELLED")
    assert done["result"] is None


async def test_a_handler_that_never_reports_is_cancelled(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "UNHEARD_SECONDS", 0.2)
    ended = []

    async def handler(job: Row, tools: Tools) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(job["_id"])
            raise

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        await hall.reaches(job["_id"], "RUNNING")
        await _cancel(hall, job)
        await hall.reaches(job["_id"], "CANCELLED")
    assert ended == [job["_id"]]


async def test_a_worker_that_ends_hands_back_at_once(hall: Hall) -> None:
    begun = []

    async def handler(job: Row, tools: Tools) -> None:
        begun.append(job["input"]["name"])
        tools.report(4)
        if job["input"]["name"] == "quick":
            await asyncio.sleep(0.1)
        elif job["input"]["name"] == "deaf":
            while True:
                try:
                    await asyncio.sleep(3)
                    return
                except asyncio.CancelledError:
                    pass
        else:
            await asyncio.sleep(60)

    jobs = {name: await hall.put(input={"name": name}) for name in ("quick", "slow", "deaf")}
    async with hall.working({REINDEX: handler}):
        await hall.until(lambda: _true(len(begun) == 3))
    assert (await hall.job(jobs["quick"]["_id"]))["state"] == "SUCCEEDED"
    for name in ("slow", "deaf"):
        row = await hall.job(jobs[name]["_id"])
        assert (row["state"], row["attempt"], row["deaths"]) == ("QUEUED", 0, 0)
        assert (row["worker"], row["lease_until"]) == (None, None)
        assert row["progress"]["current"] == 4
        assert await hall.states(row["_id"]) == ["QUEUED", "RUNNING", "QUEUED"]


async def test_a_parent_waits_for_its_children(hall: Hall) -> None:
    order: list[str] = []

    async def parent(job: Row, tools: Tools) -> Row:
        order.append(f"parent {job['attempt']}")
        async with tools.step("ask"):
            for n in range(3):
                await tools.put_child(IMPORT, {"n": n}, key=f"part {n}")
        async with tools.step("wait"):
            children = await tools.await_children()
        return {"sum": sum(child["result"]["n"] for child in children)}

    async def child(job: Row, tools: Tools) -> Row:
        order.append("child")
        return {"n": job["input"]["n"]}

    job = await hall.put(priority=3)
    async with hall.working({REINDEX: parent, IMPORT: child}, concurrency=1):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert order == ["parent 1", "child", "child", "child", "parent 1"]
    assert (done["result"], done["attempt"], done["open_children"]) == ({"sum": 3}, 1, 0)
    assert [(step["name"], step["state"]) for step in done["steps"]] == [
        ("ask", "SUCCEEDED"),
        ("wait", "SUCCEEDED"),
    ]
    assert await hall.states(job["_id"]) == ["QUEUED", "RUNNING", "QUEUED", "RUNNING", "SUCCEEDED"]
    children = await hall.database.find("jobs", {"parent_id": job["_id"]})
    assert [child["priority"] for child in children] == [3, 3, 3]


async def test_no_child_is_too_many_to_be_waited_for(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "MOST_CHILDREN", 1)

    async def parent(job: Row, tools: Tools) -> Row:
        quick = await tools.put_child(IMPORT, {"name": "quick"}, key="quick")
        await tools.put_child(IMPORT, {"name": "slow"}, key="slow")
        await hall.reaches(quick["_id"], "SUCCEEDED")
        return {"children": len(await tools.await_children())}

    async def child(job: Row, tools: Tools) -> None:
        await asyncio.sleep(0.3 if job["input"]["name"] == "slow" else 0)

    job = await hall.put()
    async with hall.working({REINDEX: parent, IMPORT: child}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert (done["result"], done["open_children"]) == ({"children": 1}, 0)


async def test_a_cancelled_parent_puts_no_child(hall: Hall) -> None:
    ended: list[str] = []

    async def parent(job: Row, tools: Tools) -> None:
        await cancel_job(hall.database, None, job_id=job["_id"])
        try:
            await tools.put_child(IMPORT, {}, key="late")
        except JobCancelled:
            ended.append("cancelled")
            raise

    job = await hall.put()
    async with hall.working({REINDEX: parent}):
        await hall.reaches(job["_id"], "CANCELLED")
    assert ended == ["cancelled"]
    assert await hall.database.count("jobs", {"parent_id": job["_id"]}) == 0


async def test_a_parent_that_is_retried_does_anew_what_did_not_succeed(hall: Hall) -> None:
    ran: list[str] = []
    works = False

    async def parent(job: Row, tools: Tools) -> Row:
        for name in ("good", "bad"):
            await tools.put_child(IMPORT, {"name": name}, key=name)
        children = await tools.await_children()
        if any(child["state"] != "SUCCEEDED" for child in children):
            raise Refused(ErrorCode.CONFLICT, "A part failed.")
        return {}

    async def child(job: Row, tools: Tools) -> None:
        ran.append(job["input"]["name"])
        if job["input"]["name"] == "bad" and not works:
            raise Refused(ErrorCode.CONFLICT, "Not yet.")

    job = await hall.put()
    async with hall.working({REINDEX: parent, IMPORT: child}):
        await hall.reaches(job["_id"], "FAILED")
        works = True
        await retry_job(hall.database, None, job_id=job["_id"])
        await hall.reaches(job["_id"], "SUCCEEDED")
    assert sorted(ran) == ["bad", "bad", "good"]


async def test_open_children_are_right_however_children_end(hall: Hall) -> None:
    parent = await hall.put()
    children = [await hall.put(parent_id=parent["_id"]) for _ in range(4)]

    async def change(number: int, to: JobState) -> int:
        await hall.database.transaction(
            lambda session: change_state(
                hall.database, session, {"_id": children[number]["_id"]}, to
            )
        )
        return int((await hall.job(parent["_id"]))["open_children"])

    assert (await hall.job(parent["_id"]))["open_children"] == 4
    assert await change(0, JobState.CANCELLED) == 3
    assert await change(0, JobState.CANCELLED) == 3  # has ended before
    assert await change(1, JobState.RUNNING) == 3
    assert await change(1, JobState.QUEUED) == 3
    assert await change(1, JobState.RUNNING) == 3
    assert await change(1, JobState.DEAD) == 2
    assert await change(1, JobState.QUEUED) == 3  # once more
    assert await change(0, JobState.QUEUED) == 4


async def test_progress_is_written_now_and_then_and_its_last_value_always(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "WRITE_SECONDS", 0.1)
    writes: list[Row] = []

    async def handler(job: Row, tools: Tools) -> None:
        for number in range(1, 501):
            tools.report(number, 600)
            if number % 100 == 0:
                tools.report(2)  # passed over
            await asyncio.sleep(0.001)
        async with tools.step("next"):
            writes.append((await hall.job(job["_id"]))["progress"])
        tools.report(501, message="last")

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert writes[0]["current"] == 500
    assert (done["progress"]["current"], done["progress"]["total"]) == (501, 600)
    assert done["progress"]["message"] == "last"
    assert 100 < done["progress"]["rate"] < 1000
    # queued, claimed, the step twice, settled, and the writes of about a second
    assert 6 < done["progress"]["sequence"] < 25


async def test_lines_of_the_log_are_kept_up_to_a_thousand(hall: Hall) -> None:
    async def handler(job: Row, tools: Tools) -> None:
        tools.log("first " + "x" * 3000, Level.WARNING)
        await asyncio.sleep(0.3)
        for number in range(1200):
            tools.log(f"line {number}")

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    lines = await hall.database.find("job_logs", {"job_id": job["_id"]}, sort={"_id": 1})
    assert (len(lines), done["log_count"]) == (1000, 1000)
    assert (len(lines[0]["message"]), lines[0]["level"]) == (2000, "WARNING")
    assert lines[-1]["message"] == "What follows is not kept: the log is full."


async def test_lines_that_are_stored_already_keep_no_job_from_ending(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of MongoDB was lost: the lines are there, and we do not know it."""
    insert_many = JobLogDocument.insert_many
    lost: list[Any] = []

    async def lose_answer(lines: Any, session: Any = None, **given: Any) -> Any:
        done = await insert_many(lines, session=session, **given)
        if session is None:
            lost.append(lines)
            raise AutoReconnect("lost")
        return done

    monkeypatch.setattr(JobLogDocument, "insert_many", lose_answer)

    async def handler(job: Row, tools: Tools) -> Row:
        tools.log("one")
        while not lost:
            await asyncio.sleep(0.01)
        tools.log("two")
        return {"done": True}

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED", "FAILED")
    assert (done["state"], done["result"]) == ("SUCCEEDED", {"done": True})
    lines = await hall.database.find("job_logs", {"job_id": job["_id"]}, sort={"_id": 1})
    assert [line["message"] for line in lines] == ["one", "two"]


async def test_steps_that_succeeded_are_known_to_the_next_attempt(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "FIRST_BACKOFF_SECONDS", 0.001)
    seen = []

    async def handler(job: Row, tools: Tools) -> None:
        seen.append(tools.done_steps)
        if "one" not in tools.done_steps:
            async with tools.step("one"):
                pass
        async with tools.step("two"):
            if job["attempt"] == 1:
                raise Unavailable("Later.")

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert seen == [frozenset(), frozenset({"one"})]
    assert [(s["name"], s["state"]) for s in done["steps"]] == [
        ("one", "SUCCEEDED"),
        ("two", "SUCCEEDED"),
    ]


async def test_the_viewer_is_who_asked_as_they_are_now(hall: Hall) -> None:
    user = ActorDocument(kind=ActorKind.USER, login="ada", login_lower="ada")
    await user.insert()
    organization = PydanticObjectId()
    member = MembershipDocument(organization_id=organization, user_id=user.id, role=Role.ADMIN)
    await member.insert()
    seen: list[Any] = []

    async def handler(job: Row, tools: Tools) -> None:
        seen.append((tools.viewer.user_id, dict(tools.viewer.roles), tools.viewer.scopes))

    scopes = [Permission.READ, Permission.WRITE]
    jobs = [
        await hall.put(created_by_id=who, scopes=scopes) for who in (user.id, PydanticObjectId())
    ]
    jobs.append(await hall.put())
    async with hall.working({REINDEX: handler}):
        done = [await hall.reaches(job["_id"], "SUCCEEDED", "FAILED") for job in jobs]
    assert seen == [(user.id, {organization: Role.ADMIN}, frozenset(scopes))]
    assert [row["error"] and row["error"]["code"] for row in done] == [
        None,
        "FORBIDDEN",
        "FORBIDDEN",
    ]


async def test_work_apart_runs_in_another_process_and_survives_its_death(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "FIRST_BACKOFF_SECONDS", 0.001)

    async def handler(job: Row, tools: Tools) -> Row:
        if job["attempt"] == 1:
            await tools.apart(os._exit, 1)
        return {"pid": await tools.apart(os.getpid)}

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert done["result"]["pid"] != os.getpid()
    assert done["attempt"] == 2


async def test_a_claim_whose_answer_was_lost_is_handed_back(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, failed = claims.claim, list[Any]()

    async def claim(*given: Any) -> list[Row]:
        rows = await kept(*given)
        if rows and not failed:
            failed.append(rows)
            raise AutoReconnect("after the commit")
        return rows

    monkeypatch.setattr(run, "claim", claim)

    async def handler(job: Row, tools: Tools) -> None: ...

    job = await hall.put()
    async with hall.working({REINDEX: handler}, lease_seconds=60.0):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert (done["attempt"], done["deaths"], done["token"]) == (1, 0, 2)


async def test_settling_goes_on_until_mongodb_answers(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, failed = outcomes.settle, list[int]()

    async def settle(*given: Any) -> Row | None:
        if len(failed) < 3:
            failed.append(1)
            raise AutoReconnect("gone")
        return await kept(*given)

    monkeypatch.setattr(outcomes, "settle", settle)
    effects = []

    async def handler(job: Row, tools: Tools) -> None:
        effects.append(job["token"])

    job = await hall.put()
    async with hall.working({REINDEX: handler}):
        done = await hall.reaches(job["_id"], "SUCCEEDED")
    assert (effects, done["attempt"], len(failed)) == ([1], 1, 3)
