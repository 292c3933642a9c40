"""Jobs as they are followed: what is told, in which order, and to whom."""

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import ANONYMOUS, Viewer, job_principals
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.conditions import NOTHING, all_of, between, holds, one_of, within
from modelharbor.db.connection import Database
from modelharbor.db.events import EventDocument
from modelharbor.db.jobs import JobDocument, JobKind, JobState, Progress
from modelharbor.db.keyset import EVERYTHING, Filter
from modelharbor.errors import NotFound
from modelharbor.events.changes import Change, What
from modelharbor.jobs.put import put_job
from modelharbor.jobs.states import HIDDEN, change_state
from modelharbor.resolvers.jobs import cancel_job, retry_job
from modelharbor.streams import many
from modelharbor.streams.base import Happening
from modelharbor.streams.jobs import JobProgress, Jobs, laid_over
from tests.documents import START, insert_actor, insert_job, row_of, viewer_of

from .watching import Watching, event, place, progress, told

pytestmark = pytest.mark.anyio


def test_new_values_are_laid_over_what_is_known() -> None:
    job: Row = {"a": 1, "progress": {"current": 1, "unit": "x"}, "steps": [{"n": 1}], "none": None}
    found = laid_over(
        job,
        {
            "progress.current": 2,
            "steps.0.n": 2,
            "steps.1": {"n": 3},
            "none.deep.er": 4,
            "new": 5,
            "worker": "hidden",
            "input.x": "hidden",
        },
    )
    assert found == {
        "a": 1,
        "progress": {"current": 2, "unit": "x"},
        "steps": [{"n": 2}, {"n": 3}],
        "none": {"deep": {"er": 4}},
        "new": 5,
    }
    assert job["progress"] == {"current": 1, "unit": "x"}
    assert job["steps"] == [{"n": 1}]


def job_event(job: Row, number: int, **changes: Any) -> Change:
    """`sequence` stands for that of its progress."""
    sequence = changes.pop("sequence")
    after = {**job, **changes, "progress": {**job["progress"], "sequence": sequence}}
    row = {
        "stream": "jobs",
        "about": [job["_id"]],
        "principals": job["principals"],
        "job_id": job["_id"],
        "job": after,
    }
    return event(row, number)


async def test_what_is_not_newer_is_left_out(watch: Watching) -> None:
    """Also what was read at the start already, and what comes after a change of state."""
    alice = await insert_actor("alice")
    job = await insert_job(alice, state=JobState.RUNNING, progress=Progress(sequence=3))
    other = await insert_job(alice, parent_id=job.id)
    row, source = row_of(job), JobProgress(job.id)
    reads, follower = watch.reads(viewer_of(alice)), source.follow()
    await follower.begin(reads, place(1))
    standing = follower.standing()
    assert standing is follower.standing()
    assert standing is not None
    assert (standing.position, standing.sequence, standing.key) == (place(1), 3, job.id)
    assert not standing.row["job"].keys() & HIDDEN
    found = await follower.happenings(
        reads,
        [
            progress(job.id, 2, progress__sequence=3, progress__current=1),
            job_event(row, 3, sequence=3, state="QUEUED"),
            progress(job.id, 4, progress__sequence=4, progress__current=8, steps=[{"name": "a"}]),
            job_event(row_of(other), 5, sequence=9, state="FAILED"),
            progress(job.id, 6, progress__sequence=5, state="SUCCEEDED"),
            Change(What.MODEL, place(6), {"model_id": job.id}),
            job_event(row, 7, sequence=5, state="RETRYING"),
            progress(job.id, 8, progress__sequence=5, progress__current=1),
            job_event(row, 9, sequence=6, state="SUCCEEDED"),
        ],
    )
    assert told(found) == [
        ("RUNNING", 4, True, False),
        ("RETRYING", 5, False, False),
        ("SUCCEEDED", 6, False, True),
    ]
    assert [each.position for each in found] == [place(4), place(7), place(9)]
    assert [each.sequence for each in found] == [4, 5, 6]
    assert {each.key for each in found} == {job.id}
    assert found[0].row["job"]["progress"]["current"] == 8
    assert found[0].row["job"]["steps"] == [{"name": "a"}]
    assert found[0].row["job"]["kind"] == "REINDEX"
    assert follower.standing() is found[2]


async def in_transaction(database: Database, work: Any) -> Any:
    async def run(session: AsyncClientSession) -> Any:
        return await work(session)

    return await database.transaction(run)


async def moved(database: Database, job_id: ObjectId, *states: JobState) -> None:
    for state in states:
        assert await in_transaction(
            database, lambda session, to=state: change_state(database, session, {"_id": job_id}, to)
        )


async def advanced(database: Database, job_id: ObjectId, current: int) -> None:
    """As a worker reports it."""
    await database.data["jobs"].update_one(
        {"_id": job_id}, {"$set": {"progress.current": current}, "$inc": {"progress.sequence": 1}}
    )


async def put(database: Database, viewer: Viewer, **values: Any) -> Row:
    found: Row = await in_transaction(
        database,
        lambda session: put_job(
            database,
            session,
            **{
                "kind": JobKind.REINDEX,
                "input": {"secret": 1},
                "principals": job_principals(viewer.user_id),
                "created_by_id": viewer.user_id,
                **values,
            },
        ),
    )
    return found


async def test_one_job_from_its_beginning_to_its_end(watch: Watching) -> None:
    database = watch.database
    alice = viewer_of(await insert_actor("alice"))
    job = await put(database, alice)
    watched = await watch.watch(JobProgress(job["_id"]), alice)
    standing = watched.follower.standing()
    assert standing is not None
    assert told([standing]) == [("QUEUED", 0, False, False)]
    await moved(database, job["_id"], JobState.RUNNING)
    await advanced(database, job["_id"], 5)
    await put(database, alice, parent_id=job["_id"])
    await database.data["jobs"].update_one({"_id": job["_id"]}, {"$set": {"heartbeat_at": START}})
    await moved(database, job["_id"], JobState.RETRYING, JobState.RUNNING, JobState.SUCCEEDED)
    found = await watched.happenings()
    assert told(found) == [
        ("RUNNING", 1, False, False),
        ("RUNNING", 2, True, False),
        ("RETRYING", 3, False, False),
        ("RUNNING", 4, False, False),
        ("SUCCEEDED", 5, False, True),
    ]
    assert [each.position for each in found] == sorted({each.position for each in found})
    assert all(not each.row["job"].keys() & HIDDEN for each in found)
    late = (await watch.watch(watched.source, alice)).follower.standing()
    assert late is not None
    assert told([late]) == [("SUCCEEDED", 5, False, True)]
    # From the log: states alone.
    logged = await watch.logged(watched.source.query or {})
    replayed = await watched.source.of_events(watch.reads(alice), logged)
    assert told(replayed) == [
        ("QUEUED", 0, False, False),
        *[each for each in told(found) if not each[2]],
    ]


async def test_one_job_is_for_those_who_see_it(watch: Watching) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    job = await insert_job(alice, acme)
    source = JobProgress(job.id)
    happening = Happening(place(1), {"job": row_of(job)})
    member = viewer_of(bob, {acme.id: Role.VIEWER})
    for viewer in (viewer_of(alice), member):
        await source.check(watch.reads(viewer))
        assert source.permits(viewer, happening)
    for viewer in (viewer_of(bob), ANONYMOUS):
        with pytest.raises(NotFound, match="no such job"):
            await source.check(watch.reads(viewer))
        assert not source.permits(viewer, happening)
    with pytest.raises(NotFound):
        await JobProgress(ObjectId()).check(watch.reads(viewer_of(alice)))
    assert JobProgress(job.id) == source
    assert hash(JobProgress(job.id)) == hash(source)


async def test_all_jobs_of_a_filter(watch: Watching) -> None:
    database = watch.database
    alice, bob = [viewer_of(await insert_actor(name)) for name in ("alice", "bob")]
    going = Filter(one_of("state", ["RUNNING", "FAILED"]))
    everything = await watch.watch(Jobs(EVERYTHING), alice)
    some = await watch.watch(Jobs(going), alice)
    none = await watch.watch(Jobs(EVERYTHING), ANONYMOUS)
    first, second = await put(database, alice), await put(database, alice)
    theirs = await put(database, bob)
    await moved(database, first["_id"], JobState.RUNNING)
    await moved(database, theirs["_id"], JobState.RUNNING)
    await advanced(database, first["_id"], 1)
    await advanced(database, theirs["_id"], 1)
    await advanced(database, second["_id"], 1)
    await moved(database, first["_id"], JobState.FAILED)
    await moved(database, second["_id"], JobState.CANCELLED)
    found = await everything.happenings()
    names = {first["_id"]: "first", second["_id"]: "second"}
    assert [(names[each.key], *state) for each, state in zip(found, told(found), strict=True)] == [
        ("first", "QUEUED", 0, False, False),
        ("second", "QUEUED", 0, False, False),
        ("first", "RUNNING", 1, False, False),
        ("first", "RUNNING", 2, True, False),
        ("second", "QUEUED", 1, True, False),
        ("first", "FAILED", 3, False, False),
        ("second", "CANCELLED", 2, False, False),
    ]
    assert {each.sequence for each in found} == {0}
    assert told(await some.happenings()) == [
        ("RUNNING", 1, False, False),
        ("RUNNING", 2, True, False),
        ("FAILED", 3, False, False),
    ]
    assert await none.happenings() == []
    logged = await watch.logged(some.source.query or {})
    assert told(await some.source.of_events(watch.reads(alice), logged)) == [
        ("RUNNING", 1, False, False),
        ("FAILED", 3, False, False),
    ]
    await cancel_job(database, bob, job_id=theirs["_id"])
    await retry_job(database, alice, job_id=first["_id"])
    assert told(await everything.happenings()) == [("QUEUED", 4, False, False)]


async def test_progress_of_jobs_that_are_not_known_yet(watch: Watching) -> None:
    """They are read once; one that is ahead of the log tells nothing that is still to come."""
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    running = JobState.RUNNING
    job = await insert_job(alice, state=running, progress=Progress(current=7, sequence=7))
    theirs = await insert_job(bob, state=running, progress=Progress(sequence=7))
    source, reads = Jobs(EVERYTHING), watch.reads(viewer_of(alice))
    follower = source.follow()
    await follower.begin(reads, place(0))
    gone = ObjectId()
    row = row_of(job)
    assert (
        await follower.happenings(
            reads,
            [
                progress(job.id, 1, progress__sequence=4),
                progress(theirs.id, 2, progress__sequence=9),
                progress(gone, 3, progress__sequence=1),
            ],
        )
        == []
    )
    assert set(follower.known) == {job.id, theirs.id, gone}
    await JobDocument.find_all().delete()  # nothing more is read
    found = await follower.happenings(
        reads,
        [
            job_event(row, 4, sequence=5, state="RETRYING"),
            progress(job.id, 5, progress__sequence=6, progress__current=6),
            progress(job.id, 6, progress__sequence=7, progress__current=7),
            progress(job.id, 7, progress__sequence=7, progress__current=7),
            progress(theirs.id, 8, progress__sequence=10),
        ],
    )
    assert told(found) == [
        ("RETRYING", 5, False, False),
        ("RETRYING", 6, True, False),
        ("RETRYING", 7, True, False),
    ]


async def test_progress_that_was_read_just_now_is_told(watch: Watching) -> None:
    alice = await insert_actor("alice")
    job = await insert_job(alice, state=JobState.RUNNING, progress=Progress(current=7, sequence=7))
    follower = Jobs(EVERYTHING).follow()
    reads = watch.reads(viewer_of(alice))
    change = progress(job.id, 1, progress__sequence=7, progress__current=7)
    [found] = await follower.happenings(reads, [change])
    assert told([found]) == [("RUNNING", 7, True, False)]
    assert await follower.happenings(reads, [change]) == []


async def test_a_follower_of_many_keeps_few(
    watch: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "MOST_KNOWN", 3)
    alice = await insert_actor("alice")
    rows = [row_of(await insert_job(alice)) for _ in range(6)]
    follower, reads = Jobs(EVERYTHING).follow(), watch.reads(viewer_of(alice))
    changes = [job_event(row, number, sequence=1) for number, row in enumerate(rows, 1)]
    assert len(await follower.happenings(reads, changes)) == 6
    assert list(follower.known) == [row["_id"] for row in rows[3:]]
    again = [progress(rows[3]["_id"], 7, progress__sequence=2)]
    assert len(await follower.happenings(reads, again)) == 1
    assert list(follower.known) == [rows[index]["_id"] for index in (4, 5, 3)]


def random_filter(random: Random, ids: list[ObjectId]) -> Row:
    def some(values: list[str]) -> list[str]:
        return random.sample(values, random.randrange(len(values) + 1))

    at = START + timedelta(microseconds=random.randrange(5000))
    parts = [
        one_of("kind", some([kind.value for kind in JobKind])),
        one_of("state", some([state.value for state in JobState])),
        {"created_by_id": random.choice(ids)},
        {"subject.type": "Model", "subject.id": random.choice(ids)},
        between("created_at", gte=at, lte=None),
        between("created_at", gte=None, lte=at),
        between("created_at", gte=START, lte=at),
        {"principals": {"$in": [f"actor:{random.choice(ids)}", "operator"]}},
        {"principals": f"actor:{random.choice(ids)}"},
        {"created_by_id": None},
        NOTHING,
    ]
    return all_of(random.sample(parts, random.choice((0, 1, 1, 2, 2, 3))))


async def test_a_filter_means_the_same_in_memory_and_to_mongodb(database: Database) -> None:
    random = Random("agree")
    ids = [ObjectId() for _ in range(3)]
    times = [None, *(START + timedelta(milliseconds=each) for each in range(6))]
    subjects = [None, *({"type": kind, "id": each} for kind in ("Model", "User") for each in ids)]
    rows: list[Row] = [
        {
            "_id": ObjectId(),
            "kind": random.choice(list(JobKind)).value,
            "state": random.choice(list(JobState)).value,
            "created_by_id": random.choice([*ids, None]),
            "subject": random.choice(subjects),
            "created_at": random.choice(times),
            "principals": job_principals(*random.sample(ids, random.randrange(3))),
        }
        for _ in range(120)
    ]
    del rows[0]["subject"], rows[1]["created_by_id"]
    await database.data["jobs"].insert_many(rows)
    await database.data["events"].insert_many([{"job": row} for row in rows])
    matched = 0
    for _ in range(200):
        query = random_filter(random, ids)
        # Without time zones, as rows that are read have their times.
        bare = [
            {**row, "created_at": row["created_at"] and row["created_at"].replace(tzinfo=None)}
            for row in rows
        ]
        expected = [row["_id"] for row in await database.find("jobs", query, sort={"_id": 1})]
        for known in (rows, bare):
            assert [row["_id"] for row in known if holds(query, row)] == expected, query
        logged = await database.find("events", within("job", query), sort={"job._id": 1})
        assert [row["job"]["_id"] for row in logged] == expected, query
        matched += len(expected)
    assert 2_000 < matched < 20_000


def test_what_memory_cannot_tell_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\$regex"):
        holds({"a": {"$regex": "x"}}, {"a": "x"})
    assert holds({"at": {"$gte": datetime(2026, 1, 1, tzinfo=UTC)}}, {"at": "2027"}) is False


async def test_events_of_jobs_say_whom_they_concern(watch: Watching) -> None:
    """What the sources rely on."""
    alice = viewer_of(await insert_actor("alice"))
    parent = await put(watch.database, alice)
    child = await put(watch.database, alice, parent_id=parent["_id"])
    [told_of] = await EventDocument.find({"job_id": child["_id"]}).to_list()
    assert {child["_id"], parent["_id"], alice.user_id} == set(told_of.about)
    assert told_of.job is not None
    assert not told_of.job.keys() & HIDDEN
    assert told_of.job["progress"]["sequence"] == 0
