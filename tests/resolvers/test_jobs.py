"""Starting jobs, cancelling them, giving them another chance: who may, and what happens."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer, actor_principal, job_principals
from modelharbor.db.actors import Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Unauthenticated
from modelharbor.jobs.put import put_job
from modelharbor.jobs.states import change_state
from modelharbor.resolvers.jobs import (
    cancel_job,
    list_jobs,
    retry_job,
    start_collection,
    start_import,
    start_reindex,
)
from modelharbor.settings import Settings
from tests.documents import SCOPES, insert_actor, insert_model, viewer_of
from tests.resolvers.conftest import Company
from tests.resolvers.state import everything, refused

pytestmark = pytest.mark.anyio
STATES = [state.value for state in JobState]


@pytest.fixture
def roots(settings: Settings, tmp_path: Path) -> Settings:
    """The source `disk` with the folder `team/tiny`, and what one must not come to from there."""
    (tmp_path / "disk/team/tiny").mkdir(parents=True)
    (tmp_path / "disk/team/tiny/config.json").write_text("{}")
    (tmp_path / "disk/file").write_text("")
    (tmp_path / "secret").mkdir()
    (tmp_path / "disk/out").symlink_to(tmp_path / "secret")
    (tmp_path / "disk/around").symlink_to("around")
    return settings.model_copy(update={"import_roots": {"disk": tmp_path / "disk"}})


async def job_of(database: Database, state: JobState = JobState.QUEUED, **given: Any) -> Row:
    """A job as it is in this state."""
    values: Row = {
        "kind": JobKind.REINDEX,
        "input": {"model_id": None},
        "principals": job_principals(),
        **given,
    }
    row = await database.transaction(lambda session: put_job(database, session, **values))
    change: Row = {"state": state.value, "attempt": 3, "deaths": 2, "result": {"a": 1}}
    change["error"] = {"code": "INTERNAL", "message": "x", "path": None}
    change["checkpoint"] = {"after": 1}
    await database.data["jobs"].update_one({"_id": row["_id"]}, {"$set": change})
    return await stored(database, row["_id"])


async def stored(database: Database, job_id: ObjectId) -> Row:
    row = await database.data["jobs"].find_one({"_id": job_id})
    assert row is not None
    return row


async def told(
    database: Database, job_id: ObjectId
) -> list[tuple[str, ObjectId | None, str | None]]:
    """State, actor and comment of the job's events but the first."""
    rows = await database.data["events"].find({"job_id": job_id}).sort("_id", 1).to_list()
    return [(row["job"]["state"], row["actor_id"], row["comment"]) for row in rows[1:]]


def operator(viewer: Viewer) -> Viewer:
    user = {**(viewer.user or {}), "is_operator": True}
    return replace(viewer, user=user, scopes=frozenset(Permission))


# Imports ----------------------------------------------------------------------------------------


async def test_an_import_is_asked_for(
    database: Database, roots: Settings, company: Company
) -> None:
    maintainer = company.member(Role.MAINTAINER)
    job = await start_import(
        database, maintainer, roots, source="disk", folder="./team//tiny/", owner="ACME", name="m"
    )
    assert job == await stored(database, job["_id"])
    assert job == job | {
        "kind": "IMPORT_MODEL",
        "state": "QUEUED",
        "input": {"source": "disk", "folder": "team/tiny", "owner": "ACME", "name": "m"},
        "scopes": sorted(scope.value for scope in SCOPES),
        "created_by_id": maintainer.user_id,
        "principals": job_principals(maintainer.user_id, company.acme.id),
        "subject": None,
        "idempotency_key": None,
    }


async def test_an_import_names_the_model_that_is_there(
    database: Database, roots: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "Tiny", visibility=Visibility.PRIVATE)
    job = await start_import(
        database, company.admin, roots, source="disk", folder="team/tiny", owner="acme", name=None
    )
    assert job["input"]["name"] == "tiny"
    assert job["subject"] == {"type": "Model", "id": model.id}


async def test_a_person_has_so_many_imports_in_the_queue(
    database: Database, roots: Settings, company: Company
) -> None:
    few = roots.model_copy(update={"max_waiting_jobs": 2})
    asked = {"source": "disk", "folder": "team/tiny", "owner": "acme"}
    first = await start_import(database, company.admin, few, **asked, name="a")
    await start_import(database, company.admin, few, **asked, name="b")
    async with refused(database, ErrorCode.QUOTA_EXCEEDED, says="2 jobs of yours"):
        await start_import(database, company.admin, few, **asked, name="c")
    await start_import(database, company.member(Role.MAINTAINER), few, **asked, name="c")
    await cancel_job(database, company.admin, job_id=first["_id"])
    await start_import(database, company.admin, few, **asked, name="c")


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("", "must lead below"),
        (".", "must lead below"),
        ("/team/tiny", "must lead below"),
        ("//team/tiny", "must lead below"),
        ("..", "must lead below"),
        ("team/../../secret", "must lead below"),
        ("team/../team/tiny", "must lead below"),
        ("team\0/tiny", "has characters"),
        ("team\\tiny", "has characters"),
        ("team\n", "has characters"),
        ("a" * 1025, "longer than 1024"),
        ("a" * 300, "no such folder"),
        ("team/absent", "no such folder"),
        ("file", "no such folder"),
        ("around", "no such folder"),
        ("out", "leads out"),
        (".hidden", "Hidden folders"),
        ("team/.hidden", "Hidden folders"),
    ],
)
async def test_folders_that_are_none_are_refused(
    folder: str, says: str, database: Database, roots: Settings, company: Company
) -> None:
    async with refused(database, ErrorCode.BAD_INPUT, "folder", says=says):
        await start_import(
            database,
            company.admin,
            roots,
            source="disk",
            folder=folder,
            owner="acme",
            name="m",
        )


async def test_a_source_that_is_not_there_is_not_found(
    database: Database, roots: Settings, company: Company
) -> None:
    for source in ("", "other", "DISK", "disk/team", ".."):
        async with refused(database, ErrorCode.NOT_FOUND, "source"):
            await start_import(
                database, company.admin, roots, source=source, folder="tiny", owner="acme"
            )


@pytest.mark.parametrize("folder", ["team/tiny", "team/absent", "out"])
async def test_who_may_not_import_learns_nothing_of_folders(
    folder: str, database: Database, roots: Settings, company: Company
) -> None:
    given: Row = {"source": "disk", "folder": folder, "owner": "acme", "name": "m"}
    for viewer in (company.stranger, company.member(Role.CONTRIBUTOR)):
        async with refused(database, ErrorCode.FORBIDDEN, "owner"):
            await start_import(database, viewer, roots, **given)
    async with refused(database, ErrorCode.NOT_FOUND, "owner"):
        await start_import(database, company.admin, roots, **{**given, "owner": "nobody"})
    weak = replace(company.admin, scopes=SCOPES - {Permission.PUBLISH})
    async with refused(database, ErrorCode.FORBIDDEN, "owner", says="lacks the scope PUBLISH"):
        await start_import(database, weak, roots, **given)
    before = await everything(database)
    with pytest.raises(Unauthenticated):
        await start_import(database, ANONYMOUS, roots, **given)
    assert await everything(database) == before


async def test_names_are_checked(database: Database, roots: Settings, company: Company) -> None:
    given: Row = {"source": "disk", "folder": "team/tiny", "owner": "acme"}
    for name in ("", "a b", "models"):
        async with refused(database, ErrorCode.BAD_INPUT, "name"):
            await start_import(database, company.admin, roots, **given, name=name)
    await insert_model(company.acme, "old", state="ARCHIVED")
    async with refused(database, ErrorCode.INVALID_TRANSITION, "name"):
        await start_import(database, company.admin, roots, **given, name="old")


async def test_a_key_makes_one_job_a_person(
    database: Database, roots: Settings, company: Company, tmp_path: Path
) -> None:
    given: Row = {"source": "disk", "folder": "team/tiny", "owner": "acme", "name": "m"}
    keyed: Row = {**given, "idempotency_key": "k"}
    jobs = await asyncio.gather(
        *(start_import(database, company.admin, roots, **keyed) for _ in range(5))
    )
    assert {job["_id"] for job in jobs} == {jobs[0]["_id"]}
    other = await start_import(database, company.member(Role.MAINTAINER), roots, **keyed)
    assert other["_id"] != jobs[0]["_id"]
    async with refused(database, ErrorCode.CONFLICT, "idempotencyKey"):
        await start_import(database, company.admin, roots, **{**keyed, "name": "n"})
    for key in ("", "a b", "k" * 129, "é"):
        async with refused(database, ErrorCode.BAD_INPUT, "idempotencyKey"):
            await start_import(database, company.admin, roots, **given, idempotency_key=key)
    # The answer stays what it was, whatever became of the folder and the job.
    (tmp_path / "disk/team/tiny/config.json").unlink()
    (tmp_path / "disk/team/tiny").rmdir()
    await cancel_job(database, company.admin, job_id=jobs[0]["_id"])
    again = await start_import(database, company.admin, roots, **keyed)
    assert (again["_id"], again["state"]) == (jobs[0]["_id"], "CANCELLED")
    assert len(await list_jobs(database)) == 2


# What operators start ---------------------------------------------------------------------------


async def test_operators_start_collections_and_reindexing(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "m")
    someone = operator(company.stranger)
    collection = await start_collection(database, someone, dry_run=True)
    one = await start_reindex(database, someone, model_id=model.id)
    all_of_them = await start_reindex(database, None)
    assert [job["kind"] for job in (collection, one, all_of_them)] == [
        "GARBAGE_COLLECT",
        "REINDEX",
        "REINDEX",
    ]
    assert collection["input"] == {"dry_run": True}
    assert (one["input"], one["subject"]) == (
        {"model_id": model.id},
        {"type": "Model", "id": model.id},
    )
    assert (all_of_them["input"], all_of_them["subject"]) == ({"model_id": None}, None)
    assert one["principals"] == job_principals(someone.user_id)
    assert (all_of_them["created_by_id"], all_of_them["principals"]) == (None, ["operator"])


async def test_others_start_neither(database: Database, company: Company) -> None:
    unscoped = replace(operator(company.admin), scopes=SCOPES)
    for viewer in (company.admin, unscoped):
        async with refused(database, ErrorCode.FORBIDDEN):
            await start_collection(database, viewer)
        async with refused(database, ErrorCode.FORBIDDEN):
            await start_reindex(database, viewer)
    before = await everything(database)
    with pytest.raises(Unauthenticated):
        await start_collection(database, ANONYMOUS)
    with pytest.raises(Unauthenticated):
        await start_reindex(database, ANONYMOUS)
    assert await everything(database) == before
    async with refused(database, ErrorCode.NOT_FOUND, "modelId"):
        await start_reindex(database, None, model_id=ObjectId())


# Cancel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "after"),
    [("QUEUED", "CANCELLED"), ("RETRYING", "CANCELLED"), ("RUNNING", "CANCELLING")],
)
async def test_a_job_is_cancelled(
    state: str, after: str, database: Database, company: Company
) -> None:
    job = await job_of(
        database,
        JobState(state),
        principals=job_principals(company.ann.id),
        created_by_id=company.ann.id,
    )
    row = await cancel_job(database, company.stranger, job_id=job["_id"], comment=" no more ")
    assert row == await stored(database, job["_id"])
    assert (row["state"], row["comment"]) == (after, "no more")
    assert (row["finished_at"] is not None) == (after == "CANCELLED")
    assert row["progress"]["sequence"] == job["progress"]["sequence"] + 1
    assert await told(database, job["_id"]) == [(after, company.ann.id, "no more")]
    before = await everything(database)
    assert await cancel_job(database, company.stranger, job_id=job["_id"], comment="x") == row
    assert await everything(database) == before


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "DEAD"])
async def test_what_has_ended_is_not_cancelled(state: str, database: Database) -> None:
    job = await job_of(database, JobState(state))
    async with refused(database, ErrorCode.INVALID_TRANSITION, "id", says=f"is {state}"):
        await cancel_job(database, None, job_id=job["_id"])


async def test_all_below_are_cancelled_too(database: Database) -> None:
    parent = await job_of(database, JobState.QUEUED)
    below = [
        await job_of(database, state, parent_id=parent["_id"])
        for state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED, JobState.CANCELLING)
    ]
    deep = await job_of(database, JobState.RETRYING, parent_id=below[2]["_id"])
    aside = await job_of(database, JobState.QUEUED)
    await cancel_job(database, None, job_id=parent["_id"], comment="all")
    states = [
        (await stored(database, job["_id"]))["state"] for job in (parent, *below, deep, aside)
    ]
    assert states == [
        *("CANCELLED", "CANCELLED", "CANCELLING", "SUCCEEDED", "CANCELLING"),
        *("CANCELLED", "QUEUED"),
    ]
    assert await told(database, below[0]["_id"]) == [("CANCELLED", None, "all")]
    assert await told(database, below[3]["_id"]) == []
    # One that broke off before the children goes on when it is said again.
    late = await job_of(database, JobState.QUEUED, parent_id=parent["_id"])
    await cancel_job(database, None, job_id=parent["_id"])
    assert (await stored(database, late["_id"]))["state"] == "CANCELLED"


async def test_of_two_who_cancel_at_once_one_is_told_of(database: Database) -> None:
    job = await job_of(database, JobState.RUNNING)
    rows = await asyncio.gather(*(cancel_job(database, None, job_id=job["_id"]) for _ in range(4)))
    assert [row["state"] for row in rows] == ["CANCELLING"] * 4
    assert await told(database, job["_id"]) == [("CANCELLING", None, None)]


# Retry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["FAILED", "DEAD", "CANCELLED"])
async def test_a_job_gets_another_chance(state: str, database: Database) -> None:
    parent = await job_of(database)
    job = await job_of(database, JobState(state), parent_id=parent["_id"])
    waiting = [await job_of(database) for _ in range(3)]
    await database.data["jobs"].update_one({"_id": parent["_id"]}, {"$set": {"open_children": 0}})
    row = await retry_job(database, None, job_id=job["_id"], comment="$again")
    assert row == await stored(database, job["_id"])
    cleared = {
        "state": "QUEUED",
        "attempt": 0,
        "deaths": 0,
        "error": None,
        "result": None,
        "checkpoint": None,
        "steps": [],
        "finished_at": None,
        "comment": "$again",
    }
    assert row == row | cleared
    assert row["turn"] > max(each["turn"] for each in waiting)
    assert await told(database, job["_id"]) == [("QUEUED", None, "$again")]
    assert (await stored(database, parent["_id"]))["open_children"] == 1


@pytest.mark.parametrize("state", ["QUEUED", "RUNNING", "RETRYING", "CANCELLING", "SUCCEEDED"])
async def test_what_goes_on_or_went_well_gets_none(state: str, database: Database) -> None:
    job = await job_of(database, JobState(state))
    async with refused(database, ErrorCode.INVALID_TRANSITION, "id", says=f"is {state}"):
        await retry_job(database, None, job_id=job["_id"])


async def test_none_gets_one_while_jobs_below_it_go_on(database: Database) -> None:
    job = await job_of(database, JobState.CANCELLED)
    child = await job_of(database, JobState.CANCELLING, parent_id=job["_id"])
    async with refused(database, ErrorCode.INVALID_TRANSITION, "id", says="have not ended"):
        await retry_job(database, None, job_id=job["_id"])
    await database.transaction(
        lambda session: change_state(database, session, {"_id": child["_id"]}, JobState.CANCELLED)
    )
    assert (await retry_job(database, None, job_id=job["_id"]))["state"] == "QUEUED"


# Who may ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [cancel_job, retry_job])
async def test_who_may_cancel_and_retry(change: Any, database: Database, company: Company) -> None:
    creator = await insert_actor("creator")
    principals = job_principals(creator.id, company.acme.id)

    async def new() -> ObjectId:
        state = JobState.QUEUED if change is cancel_job else JobState.FAILED
        given: Row = {"principals": principals, "created_by_id": creator.id}
        job_id: ObjectId = (await job_of(database, state, **given))["_id"]
        return job_id

    job_id = await new()
    async with refused(database, ErrorCode.NOT_FOUND, "id"):
        await change(database, company.stranger, job_id=job_id)
    async with refused(database, ErrorCode.NOT_FOUND, "id"):
        await change(database, operator(company.stranger), job_id=ObjectId())
    for role in (Role.VIEWER, Role.CONTRIBUTOR, Role.MAINTAINER):
        async with refused(database, ErrorCode.FORBIDDEN, "id"):
            await change(database, company.member(role), job_id=job_id)
    weak = replace(company.admin, scopes=SCOPES - {Permission.ADMINISTER})
    async with refused(database, ErrorCode.FORBIDDEN, "id"):
        await change(database, weak, job_id=job_id)
    reading = replace(viewer_of(creator), scopes=frozenset({Permission.READ}))
    async with refused(database, ErrorCode.FORBIDDEN, "id"):
        await change(database, reading, job_id=job_id)
    blind = replace(viewer_of(creator), scopes=frozenset({Permission.WRITE}))
    async with refused(database, ErrorCode.NOT_FOUND, "id"):
        await change(database, blind, job_id=job_id)
    before = await everything(database)
    with pytest.raises(Unauthenticated):
        await change(database, ANONYMOUS, job_id=job_id)
    assert await everything(database) == before
    async with refused(database, ErrorCode.BAD_INPUT, "comment"):
        await change(database, viewer_of(creator), job_id=job_id, comment="x" * 1001)

    writing = replace(viewer_of(creator), scopes=frozenset({Permission.READ, Permission.WRITE}))
    for viewer in (writing, company.admin, operator(company.stranger)):
        row = await change(database, viewer, job_id=await new())
        assert row["state"] == ("CANCELLED" if change is cancel_job else "QUEUED")


async def test_an_administrator_of_another_owner_may_not(
    database: Database, company: Company
) -> None:
    """Seen by one principal, it is not steered by another that has nothing to do with it."""
    job = await job_of(database, principals=[actor_principal(company.acme.id)])
    viewer = replace(company.member(Role.VIEWER))
    assert Permission.ADMINISTER in viewer.on_owner(viewer.person_id())
    async with refused(database, ErrorCode.FORBIDDEN, "id"):
        await cancel_job(database, viewer, job_id=job["_id"])


async def test_jobs_are_listed(database: Database) -> None:
    first = await job_of(database)
    second = await job_of(database, JobState.RUNNING, kind=JobKind.GARBAGE_COLLECT)

    async def ids(**given: Any) -> list[ObjectId]:
        return [row["_id"] for row in await list_jobs(database, **given)]

    assert await ids() == [second["_id"], first["_id"]]
    assert await ids(limit=1) == [second["_id"]]
    assert await ids(states=[JobState.QUEUED]) == [first["_id"]]
    assert await ids(kinds=[JobKind.GARBAGE_COLLECT]) == [second["_id"]]
    assert await ids(states=[JobState.QUEUED], kinds=[JobKind.GARBAGE_COLLECT]) == []
