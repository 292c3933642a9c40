"""Jobs: exact values, who sees which, and what a page of them costs."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.connection import Database
from modelharbor.db.jobs import (
    Failure,
    JobDocument,
    JobKind,
    JobLogDocument,
    JobState,
    Level,
    Progress,
    Step,
)
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode
from modelharbor.jobs.waking import listening
from modelharbor.loaders.jobs import MOST_WAITING
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.documents import START, insert_actor, insert_job, insert_model, row_of, viewer_of
from tests.explaining import Captured, keys_examined

pytestmark = pytest.mark.anyio


def job_id(job: JobDocument) -> str:
    return global_id("Job", job.id)


def operator_of(actor: ActorDocument) -> Viewer:
    return Viewer(user={**row_of(actor), "is_operator": True}, scopes=frozenset(Permission))


WHOLE = """
query Whole($id: ID!) { job(id: $id) {
  id kind state attempt maxAttempts priority result queuePosition
  progress { current total unit percent ratePerSecond etaSeconds message updatedAt sequence }
  steps { name state startedAt finishedAt }
  subject { id ... on Model { fullName } }
  parent { id kind } children { totalCount nodes { id state } }
  logs(first: 1) { totalCount nodes { at level message } pageInfo { hasNextPage endCursor } }
  error { code message path } createdBy { login }
  createdAt startedAt finishedAt heartbeatAt
} }
"""


async def test_a_job_whole(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model = await insert_model(alice, "m")
    parent = await insert_job(alice, kind=JobKind.GARBAGE_COLLECT)
    job = await insert_job(
        alice,
        kind=JobKind.IMPORT_MODEL,
        state=JobState.RUNNING,
        input={"folder": "secret"},
        attempt=2,
        max_attempts=3,
        priority=7,
        subject={"type": "Model", "id": model.id},
        parent_id=parent.id,
        progress=Progress(
            current=2**33,
            total=2**35,
            unit="bytes",
            rate=2.0**30,
            message="Reading",
            updated_at=START,
            sequence=41,
        ),
        steps=[Step(name="read", state=JobState.SUCCEEDED, started_at=START, finished_at=START)],
        started_at=START + timedelta(seconds=1),
        heartbeat_at=START + timedelta(seconds=2),
    )
    for number, level in enumerate(Level):
        await JobLogDocument(
            job_id=job.id, level=level, message=f"line {number}", at=START
        ).insert()
    child = await insert_job(alice, parent_id=job.id)
    for asked in (ask, ask.by_core):
        answer = await asked(WHOLE, viewer_of(alice), id=job_id(job))
        assert answer.errors == []
        found = answer.data["job"]
        assert found["logs"].pop("pageInfo")["hasNextPage"] is True
        assert found == {
            "id": job_id(job),
            "kind": "IMPORT_MODEL",
            "state": "RUNNING",
            "attempt": 2,
            "maxAttempts": 3,
            "priority": 7,
            "result": None,
            "queuePosition": None,
            "progress": {
                "current": "8589934592",
                "total": "34359738368",
                "unit": "bytes",
                "percent": 25.0,
                "ratePerSecond": 1073741824.0,
                "etaSeconds": 24.0,
                "message": "Reading",
                "updatedAt": "2026-01-01T00:00:00.000Z",
                "sequence": "41",
            },
            "steps": [
                {
                    "name": "read",
                    "state": "SUCCEEDED",
                    "startedAt": "2026-01-01T00:00:00.000Z",
                    "finishedAt": "2026-01-01T00:00:00.000Z",
                }
            ],
            "subject": {"id": global_id("Model", model.id), "fullName": "alice/m"},
            "parent": {"id": job_id(parent), "kind": "GARBAGE_COLLECT"},
            "children": {"totalCount": 1, "nodes": [{"id": job_id(child), "state": "QUEUED"}]},
            "logs": {
                "totalCount": 3,
                "nodes": [{"at": "2026-01-01T00:00:00.000Z", "level": "INFO", "message": "line 0"}],
            },
            "error": None,
            "createdBy": {"login": "alice"},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "startedAt": "2026-01-01T00:00:01.000Z",
            "finishedAt": None,
            "heartbeatAt": "2026-01-01T00:00:02.000Z",
        }


PROGRESS = "query($id: ID!) { job(id: $id) { progress { percent ratePerSecond etaSeconds } } }"


@pytest.mark.parametrize(
    ("state", "given", "expected"),
    [
        ("RUNNING", {"current": 3}, (None, None, None)),
        ("RUNNING", {"current": 3, "rate": 1.0}, (None, 1.0, None)),
        ("RUNNING", {"current": 1, "total": 3, "rate": 0.0}, (33.33, 0.0, None)),
        ("RUNNING", {"current": 5, "total": 3, "rate": 2.0}, (100.0, 2.0, 0.0)),
        ("RUNNING", {"current": 0, "total": 0, "rate": 2.0}, (100.0, 2.0, 0.0)),
        ("SUCCEEDED", {"current": 3, "total": 4, "rate": 2.0}, (75.0, None, None)),
        ("RETRYING", {"current": 3, "total": 4, "rate": 2.0}, (75.0, None, None)),
    ],
)
async def test_what_progress_says(
    ask: Asker,
    database: Database,
    state: str,
    given: dict[str, Any],
    expected: tuple[float | None, float | None, float | None],
) -> None:
    alice = await insert_actor("alice")
    job = await insert_job(alice, state=JobState(state), progress=Progress(**given))
    answer = await ask(PROGRESS, viewer_of(alice), id=job_id(job))
    assert answer.errors == []
    assert answer.fallback is None
    percent, rate, eta = expected
    assert answer.data["job"]["progress"] == {
        "percent": percent,
        "ratePerSecond": rate,
        "etaSeconds": eta,
    }


@pytest.mark.parametrize(
    ("code", "shown"),
    [*[(code.value, code.value) for code in ErrorCode], ("SOMETHING_ELSE", "INTERNAL")],
)
async def test_why_a_job_failed(ask: Asker, database: Database, code: str, shown: str) -> None:
    alice = await insert_actor("alice")
    failure = Failure(code=code, message="No.", path=["owner"])
    job = await insert_job(alice, state=JobState.FAILED, error=failure)
    answer = await ask(
        "query($id: ID!) { job(id: $id) { error { code message path } } }",
        viewer_of(alice),
        id=job_id(job),
    )
    assert answer.errors == []
    assert answer.data == {"job": {"error": {"code": shown, "message": "No.", "path": ["owner"]}}}


async def test_a_subject_that_is_gone_or_hidden_is_null(ask: Asker, database: Database) -> None:
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    hidden = await insert_model(bob, "m", visibility=Visibility.PRIVATE)
    subjects: list[dict[str, Any] | None] = [
        {"type": "Model", "id": hidden.id},
        {"type": "Model", "id": ObjectId()},
        {"type": "Robot", "id": hidden.id},
        {"type": "User", "id": bob.id},
        None,
    ]
    for subject in subjects:
        await insert_job(alice, subject=subject)
    for asked in (ask, ask.by_core):
        answer = await asked("{ jobs { nodes { subject { id } } } }", viewer_of(alice))
        assert answer.errors == []
        nodes = answer.data["jobs"]["nodes"]
        assert [node["subject"] for node in reversed(nodes)] == [
            None,
            None,
            None,
            {"id": global_id("User", bob.id)},
            None,
        ]


EVERYWHERE = """
query Everywhere($id: ID!, $ids: [ID!]!) {
  job(id: $id) { id } node(id: $id) { id } nodes(ids: $ids) { __typename }
  jobs { totalCount nodes { id } }
}
"""


async def test_who_sees_which_jobs(ask: Asker, database: Database) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    alice, member, stranger = [await insert_actor(name) for name in ("alice", "mem", "str")]
    job = await insert_job(alice, acme)
    await insert_job(None)
    roles: dict[Any, Role] = {acme.id: Role.VIEWER}
    viewers: dict[str, tuple[Viewer, int]] = {
        "creator": (viewer_of(alice), 1),
        "member": (viewer_of(member, roles), 1),
        "operator": (operator_of(stranger), 2),
        "without READ": (
            Viewer(user=row_of(alice), roles=roles, scopes=frozenset({Permission.WRITE})),
            0,
        ),
        "stranger": (viewer_of(stranger), 0),
        "nobody": (ANONYMOUS, 0),
    }
    for name, (viewer, count) in viewers.items():
        for asked in (ask, ask.by_core):
            answer = await asked(EVERYWHERE, viewer, id=job_id(job), ids=[job_id(job)])
            assert answer.errors == [], name
            found = {"id": job_id(job)} if count else None
            assert answer.data["job"] == answer.data["node"] == found, name
            assert answer.data["nodes"] == [{"__typename": "Job"} if count else None], name
            assert answer.data["jobs"]["totalCount"] == count, name
            assert len(answer.data["jobs"]["nodes"]) == count, name


async def test_children_are_only_those_that_one_sees(ask: Asker, database: Database) -> None:
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    parent = await insert_job(alice)
    mine = await insert_job(alice, parent_id=parent.id)
    other = await insert_job(bob, parent_id=parent.id)
    document = (
        "query($id: ID!) { job(id: $id) { parent { id } children { totalCount nodes { id } } } }"
    )
    answer = await ask(document, viewer_of(alice), id=job_id(parent))
    assert answer.data["job"]["children"] == {"totalCount": 1, "nodes": [{"id": job_id(mine)}]}
    answer = await ask(document, viewer_of(bob), id=job_id(other))
    assert answer.data == {"job": {"parent": None, "children": {"totalCount": 0, "nodes": []}}}


@pytest.mark.parametrize("given", ["", "garbage", global_id("Model", ObjectId("a" * 24))])
async def test_an_id_that_is_none_of_a_job(ask: Asker, database: Database, given: str) -> None:
    answer = await ask("query($id: ID!) { job(id: $id) { id } }", id=given)
    assert (answer.data, answer.errors) == ({"job": None}, [])


FILTERED = """
query($filter: JobFilter) { jobs(filter: $filter) { totalCount nodes { id } } }
"""


async def test_filters(ask: Asker, database: Database) -> None:
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    model = await insert_model(alice, "m")
    subject = {"type": "Model", "id": model.id}
    jobs = [
        await insert_job(alice, kind=JobKind.IMPORT_MODEL, subject=subject),
        await insert_job(bob, alice, state=JobState.DEAD),
        await insert_job(alice, created_at=START + timedelta(days=1)),
    ]
    wanted: list[tuple[dict[str, Any] | None, list[int]]] = [
        (None, [0, 1, 2]),
        ({}, [0, 1, 2]),
        ({"kind": ["IMPORT_MODEL", "GARBAGE_COLLECT"]}, [0]),
        ({"kind": []}, []),
        ({"state": ["DEAD"]}, [1]),
        ({"createdBy": global_id("User", bob.id)}, [1]),
        ({"createdBy": "garbage"}, []),
        ({"subject": global_id("Model", model.id)}, [0]),
        ({"subject": global_id("ModelVersion", model.id)}, []),
        ({"subject": "garbage"}, []),
        ({"createdAt": {"gte": "2026-01-01T12:00:00Z"}}, [2]),
        ({"createdAt": {"lte": "2026-01-01T12:00:00Z"}, "state": ["QUEUED"]}, [0]),
    ]
    for given, expected in wanted:
        answer = await ask(FILTERED, viewer_of(alice), filter=given)
        assert answer.errors == []
        found = answer.data["jobs"]
        assert [node["id"] for node in found["nodes"]] == [
            job_id(jobs[number]) for number in reversed(expected)
        ], given
        assert found["totalCount"] == len(expected), given


async def test_pages_go_through_all_jobs_both_ways(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    jobs = [job_id(await insert_job(alice)) for _ in range(5)]
    document = """
    query($first: Int, $after: Cursor, $last: Int, $before: Cursor) {
      jobs(first: $first, after: $after, last: $last, before: $before) {
        nodes { id } pageInfo { startCursor endCursor } } }
    """
    seen, after = [], None
    for _ in range(3):
        answer = await ask(document, viewer_of(alice), first=2, after=after)
        seen += [node["id"] for node in answer.data["jobs"]["nodes"]]
        after = answer.data["jobs"]["pageInfo"]["endCursor"]
    assert seen == jobs[::-1]
    back = await ask(document, viewer_of(alice), last=4, before=after)
    assert [node["id"] for node in back.data["jobs"]["nodes"]] == jobs[:0:-1]


async def test_the_place_in_the_queue(ask: Asker, database: Database) -> None:
    """By priority, then by turn, whoever owns what waits before."""
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    late = await insert_job(alice, turn=9)
    first = await insert_job(alice, turn=5, priority=1)
    again = await insert_job(alice, turn=2, state=JobState.RETRYING)
    running = await insert_job(alice, turn=1, state=JobState.RUNNING)
    for turn in (1, 3):
        await insert_job(bob, turn=turn)
    document = "{ jobs { nodes { id queuePosition } } }"
    answer = await ask(document, viewer_of(alice))
    places = {node["id"]: node["queuePosition"] for node in answer.data["jobs"]["nodes"]}
    assert places == {
        job_id(late): 5,
        job_id(first): 1,
        job_id(again): 3,
        job_id(running): None,
    }
    assert len(answer.commands) == 2
    row = row_of(late)
    await database.data["jobs"].insert_many(
        [{**row, "_id": ObjectId(), "turn": 4, "principals": []} for _ in range(MOST_WAITING)]
    )
    answer = await ask(document, viewer_of(alice))
    places = {node["id"]: node["queuePosition"] for node in answer.data["jobs"]["nodes"]}
    assert places[job_id(late)] == MOST_WAITING + 1
    assert places[job_id(again)] == 3


PAGE = """
query Page($first: Int!) { jobs(first: $first) { totalCount nodes {
  state progress { percent } subject { id } createdBy { login } parent { id } queuePosition
  logs(first: 2) { totalCount nodes { message } } children { totalCount nodes { state subject { id } } }
} } }
"""


async def test_what_a_page_costs_does_not_grow_with_it(ask: Asker, database: Database) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    viewer = None
    for number in range(50):
        alice = await insert_actor(f"alice{number}")
        viewer = viewer or viewer_of(alice, {acme.id: Role.VIEWER})
        model = await insert_model(alice, f"m{number}")
        subject = {"type": "Model", "id": model.id}
        parent = await insert_job(None, kind=JobKind.GARBAGE_COLLECT)
        job = await insert_job(alice, acme, subject=subject, parent_id=parent.id)
        for _ in range(3):
            await JobLogDocument(job_id=job.id, message="x").insert()
        child = await insert_job(None, acme, subject=subject, parent_id=job.id)
        await database.data["jobs"].update_one({"_id": child.id}, {"$set": {"principals": []}})
    assert viewer is not None
    commands = []
    for asked in (ask, ask.by_core):
        for first in (1, 50):
            answer = await asked(PAGE, viewer, first=first)
            assert answer.errors == []
            nodes = answer.data["jobs"]["nodes"]
            assert answer.data["jobs"]["totalCount"] == 50
            assert len(nodes) == first
            assert all(len(node["logs"]["nodes"]) == 2 for node in nodes)
            assert all(node["logs"]["totalCount"] == 3 for node in nodes)
            assert all(node["subject"] for node in nodes)
            commands.append(len(answer.commands))
    # The page and its total, subjects, creators, parents, the queue, and of logs and children a page
    # and a total each.
    assert commands == [10, 10, 10, 10]


async def test_parts_are_found_by_their_parent(ask: Asker, database: Database) -> None:
    """Whoever sees thousands of jobs does not walk through them for the few parts of one."""
    alice = await insert_actor("alice")
    row = row_of(await insert_job(alice))
    many = [{**row, "_id": ObjectId()} for _ in range(5000)]
    parts = [{**row, "_id": ObjectId(), "parent_id": many[n]["_id"]} for n in range(20)]
    await database.data["jobs"].insert_many([*many, *parts])
    document = """
    query($last: Int) { jobs(last: $last) { nodes {
      children(first: 5) { totalCount nodes { state } } } } }
    """
    for last in (2, 50):
        captured = Captured()
        answer = await ask(document, viewer_of(alice), count=captured, last=last)
        assert answer.errors == []
        counts = [node["children"]["totalCount"] for node in answer.data["jobs"]["nodes"]]
        assert sum(counts) == min(last - 1, 20)
        _, *captured.commands = captured.commands  # the page itself
        assert 0 < await keys_examined(database, captured, "jobs") <= 4 * last


CHANGE = """
mutation($i: %sInput!) { %s(input: $i) {
  job { id kind state createdBy { login } subject { id } } userErrors { code path } } }
"""


def change(name: str) -> str:
    return CHANGE % (name[0].upper() + name[1:], name)


async def test_cancel_and_retry(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    job = await insert_job(alice)
    shown = {
        "id": job_id(job),
        "kind": "REINDEX",
        "createdBy": {"login": "alice"},
        "subject": None,
    }
    for name, state, code in (
        ("cancelJob", "CANCELLED", None),
        ("retryJob", "QUEUED", None),
        ("retryJob", None, "INVALID_TRANSITION"),
    ):
        answer = await ask(change(name), viewer_of(alice), i={"id": job_id(job), "comment": "x"})
        assert answer.errors == []
        errors = [] if code is None else [{"code": code, "path": ["id"]}]
        expected = None if state is None else {**shown, "state": state}
        assert answer.data[name] == {"job": expected, "userErrors": errors}
    for given in ("garbage", global_id("Model", job.id)):
        answer = await ask(change("cancelJob"), viewer_of(alice), i={"id": given})
        assert answer.data["cancelJob"]["userErrors"] == [{"code": "NOT_FOUND", "path": ["id"]}]


async def test_collecting_garbage_is_for_operators(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    answer = await ask(change("collectGarbage"), viewer_of(alice), i={})
    assert answer.data["collectGarbage"]["job"] is None
    assert [e["code"] for e in answer.data["collectGarbage"]["userErrors"]] == ["FORBIDDEN"]
    assert await JobDocument.count() == 0
    answer = await ask(change("collectGarbage"), operator_of(alice), i={"dryRun": True})
    made = answer.data["collectGarbage"]
    assert made["userErrors"] == []
    assert (made["job"]["kind"], made["job"]["state"]) == ("GARBAGE_COLLECT", "QUEUED")
    [row] = await JobDocument.find().to_list()
    assert row.input == {"dry_run": True}


async def test_importing_puts_a_job_and_wakes_workers(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    root = ask.settings.data_path / "models"
    (root / "tiny").mkdir(parents=True)
    asked = ask.changed(import_roots={"shelf": root})
    given = {"source": "shelf", "folder": "tiny", "owner": "alice", "idempotencyKey": "k"}
    async with listening(ask.cache) as waking:
        await waking.wait(5)  # it listens now
        answer = await asked(change("importModel"), viewer_of(alice), i=given)
        loop = asyncio.get_running_loop()
        before = loop.time()
        await waking.wait(5)
        assert loop.time() - before < 4
    assert answer.errors == []
    made = answer.data["importModel"]
    assert made["userErrors"] == []
    assert made["job"] == {
        "id": made["job"]["id"],
        "kind": "IMPORT_MODEL",
        "state": "QUEUED",
        "createdBy": {"login": "alice"},
        "subject": None,
    }
    again = await asked(change("importModel"), viewer_of(alice), i=given)
    assert again.data == answer.data
    other = await asked(change("importModel"), viewer_of(alice), i={**given, "source": "none"})
    assert other.data["importModel"] == {
        "job": None,
        "userErrors": [{"code": "NOT_FOUND", "path": ["source"]}],
    }
    assert await JobDocument.count() == 1
