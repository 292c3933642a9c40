"""`jobs`, `reindex`, `collect-garbage` and `verify-blobs`."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from rich.console import Console

from modelharbor.auth.viewer import job_principals
from modelharbor.cli import jobs
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobDocument, JobKind, JobLogDocument, JobState, Progress
from modelharbor.http.server import environment
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run
from tests.documents import insert_actor, insert_model, insert_version

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 60.0


async def insert_job(
    database: Database, state: JobState = JobState.QUEUED, **given: Any
) -> JobDocument:
    """Raw: a command that ran before has bound the documents to its own connection."""
    values: Row = {"kind": JobKind.REINDEX, "principals": job_principals(), **given}
    job = JobDocument(state=state, **values)
    await database.data["jobs"].insert_one(get_dict(job, to_db=True))
    return job


async def stored(database: Database, job_id: ObjectId) -> Row:
    row = await database.data["jobs"].find_one({"_id": job_id})
    assert row is not None
    return row


async def test_jobs_are_listed(run: Run, database: Database) -> None:
    assert await run("jobs", "list", "--json") == Done(0, "[]\n", "")
    first = await insert_job(database, progress=Progress(current=1, total=3, message="Counting"))
    second = await insert_job(
        database,
        JobState.FAILED,
        kind=JobKind.IMPORT_MODEL,
        error={"code": "BAD_INPUT", "message": "No.", "path": None},
        progress=Progress(current=4096, unit="bytes"),
    )
    told = json.loads((await run("jobs", "list", "--json")).out)
    assert [(job["id"], job["state"], job["done"], job["told"]) for job in told] == [
        (str(second.id), "FAILED", "4,096 bytes", "BAD_INPUT: No."),
        (str(first.id), "QUEUED", "33 %", "Counting"),
    ]
    for options, ids in (
        (["--state", "failed"], [second.id]),
        (["--state", "failed", "--state", "queued"], [second.id, first.id]),
        (["--kind", "reindex"], [first.id]),
        (["--kind", "reindex", "--state", "failed"], []),
    ):
        told = json.loads((await run("jobs", "list", "--json", *options)).out)
        assert [job["id"] for job in told] == [str(each) for each in ids], options
    cut = await run("jobs", "list", "--limit", "1")
    assert cut.err == "These are the first 1: more with --limit.\n"
    assert cut.out.splitlines()[1].split()[:5] == [
        str(second.id),
        "IMPORT_MODEL",
        "-",
        "FAILED",
        "4,096",
    ]
    wrong = await run("jobs", "list", "--state", "lost")
    assert (wrong.code, wrong.out) == (2, "")


async def test_what_jobs_are_about_is_listed(run: Run, database: Database) -> None:
    model = await insert_model(await insert_actor("Ada"), "Tiny")
    given = {"owner": "ada", "name": "new"}
    await insert_job(database, kind=JobKind.IMPORT_MODEL, input=given)
    await insert_job(database, subject={"type": "Model", "id": model.id})
    await insert_job(database, subject={"type": "Model", "id": ObjectId()})
    version = await insert_version(database, model, {})
    await insert_job(database, subject={"type": "ModelVersion", "id": version.id})
    await insert_job(database, subject={"type": "ModelVersion", "id": ObjectId()})
    await insert_job(database, JobState.SUCCEEDED)
    bare = await insert_job(database, kind=JobKind.IMPORT_MODEL)
    await database.data["jobs"].update_one({"_id": bare.id}, {"$unset": {"input": ""}})
    told = json.loads((await run("jobs", "list", "--json")).out)
    assert [job["about"] for job in told] == [
        "-",
        "-",
        "-",
        "Ada/Tiny:1",
        "-",
        "Ada/Tiny",
        "ada/new",
    ]


@pytest.mark.parametrize(
    ("state", "error", "comment", "told"),
    [
        ("RUNNING", "No.", "again", "Counting"),
        ("CANCELLING", None, "enough", "Counting"),
        ("CANCELLED", None, "enough", "enough"),
        ("SUCCEEDED", None, None, None),
        ("FAILED", "No.", "again", "BAD_INPUT: No."),
        ("RETRYING", "No.", None, "BAD_INPUT: No."),
    ],
)
def test_what_a_job_says(
    state: str, error: str | None, comment: str | None, told: str | None
) -> None:
    failure = None if error is None else {"code": "BAD_INPUT", "message": error}
    progress = {"message": "Counting"}
    job = {"state": state, "error": failure, "comment": comment, "progress": progress}
    assert jobs._told(job) == told


async def test_a_job_is_shown_to_people(run: Run, database: Database) -> None:
    job = await insert_job(
        database,
        JobState.SUCCEEDED,
        input={"owner": "ada", "aliases": ["a", "b"], "note": None},
        result={"models": 3, "changed": 0},
        progress=Progress(
            current=4_000_000, total=9_400_000, unit="bytes", rate=1400, message="Copying"
        ),
        steps=[
            {"name": "hash", "state": JobState.SUCCEEDED},
            {"name": "store", "state": JobState.RUNNING},
        ],
    )
    lines = [line.split() for line in (await run("jobs", "show", str(job.id))).out.splitlines()]
    progress = "progress 42 %, 4,000,000 of 9,400,000 bytes, 1,400 a second"
    for line in (
        *(progress, "steps hash SUCCEEDED", "store RUNNING", "input owner: ada"),
        *('aliases: ["a","b"]', "result models: 3", "changed: 0"),
        f"created_at {job.created_at:%Y-%m-%d %H:%M:%S}",
    ):
        assert line.split() in lines, line
    assert not {"deaths", "priority", "error", "note:"} & {line[0] for line in lines if line}


async def test_a_job_is_shown_whole(run: Run, database: Database) -> None:
    job = await insert_job(
        database, JobState.SUCCEEDED, input={"model_id": ObjectId()}, result={"models": 3}
    )
    await JobLogDocument(job_id=job.id, message="All is well.").insert()
    for id in (str(job.id), str(global_id("Job", job.id))):
        told = json.loads((await run("jobs", "show", id, "--json")).out)
        assert (told["id"], told["kind"], told["state"]) == (str(job.id), "REINDEX", "SUCCEEDED")
        assert told["input"] == {"model_id": str(job.input["model_id"])}
        assert told["result"] == {"models": 3}
        assert [(line["level"], line["message"]) for line in told["log"]] == [
            ("INFO", "All is well.")
        ]
    shown = (await run("jobs", "show", str(job.id))).out
    assert "result" in shown
    assert "parent_id" not in shown
    assert "All is well." in shown


@pytest.mark.parametrize("command", ["show", "cancel", "retry", "watch"])
async def test_ids_that_are_none_are_told(command: str, run: Run, database: Database) -> None:
    line = "Invalid value for ID: `modelharbor jobs list` shows the ids. (--help tells more)"
    for id in ("x", str(global_id("Model", ObjectId()))):
        assert await run("jobs", command, id) == Done(2, "", f"modelharbor: {line}\n")
    missing = ObjectId()
    done = await run("jobs", command, str(missing))
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith("modelharbor: There is no ")


async def test_jobs_are_cancelled_and_retried(run: Run, database: Database) -> None:
    job = await insert_job(database)
    told = f"The job {job.id} is CANCELLED.\n"
    assert await run("jobs", "cancel", str(job.id), "--comment", "enough") == Done(0, told, "")
    assert await run("jobs", "cancel", str(job.id)) == Done(0, told, "")
    row = await stored(database, job.id)
    assert (row["state"], row["comment"]) == ("CANCELLED", "enough")
    assert await run("jobs", "retry", str(job.id)) == Done(0, f"The job {job.id} is QUEUED.\n", "")
    assert (await stored(database, job.id))["state"] == "QUEUED"
    assert await run("jobs", "retry", str(job.id)) == Done(
        1, "", "modelharbor: The job is QUEUED: it cannot be retried.\n"
    )


async def test_reindexing_is_started(run: Run, database: Database) -> None:
    model = await insert_model(await insert_actor("Ada"), "Tiny")
    for arguments, model_id in (([], None), (["ada/tiny"], model.id)):
        done = await run("reindex", *arguments)
        assert (done.code, done.err) == (0, "")
        row = await stored(database, ObjectId(done.out.strip()))
        assert (row["kind"], row["state"], row["input"]) == (
            *("REINDEX", "QUEUED"),
            {"model_id": model_id},
        )
        assert (row["created_by_id"], row["principals"]) == (None, ["operator"])
    for reference, line in (
        ("ada/other", "There is no model ada/other."),
        ("ada/tiny:1", "Give the model alone, without a version: ada/tiny."),
    ):
        assert await run("reindex", reference) == Done(1, "", f"modelharbor: {line}\n")
    assert await database.count("jobs", {}) == 2


@pytest.mark.parametrize("dry_run", [False, True])
async def test_collecting_is_started(dry_run: bool, run: Run, database: Database) -> None:
    done = await run("collect-garbage", *(["--dry-run"] if dry_run else []))
    row = await stored(database, ObjectId(done.out.strip()))
    assert (row["kind"], row["input"]) == ("GARBAGE_COLLECT", {"dry_run": dry_run})


@pytest.mark.parametrize("all_contents", [False, True])
async def test_verifying_is_started(all_contents: bool, run: Run, database: Database) -> None:
    done = await run("verify-blobs", *(["--all"] if all_contents else []))
    row = await stored(database, ObjectId(done.out.strip()))
    assert (row["kind"], row["input"]) == ("VERIFY_BLOBS", {"all": all_contents})
    assert (row["created_by_id"], row["principals"]) == (None, ["operator"])


async def test_a_backfill_is_started(run: Run, database: Database) -> None:
    done = await run("analytics", "backfill", "--from", "2026-11-01", "--to", "2026-11-03")
    row = await stored(database, ObjectId(done.out.strip()))
    assert row["kind"] == "ROLLUP_ANALYTICS"
    assert [f"{row['input'][name]:%Y-%m-%d %H:%M}" for name in ("from", "to")] == [
        "2026-11-01 00:00",
        "2026-11-03 00:00",
    ]
    done = await run("analytics", "backfill")
    row = await stored(database, ObjectId(done.out.strip()))
    assert row["input"] == {"from": None, "to": None}
    for wrong in (["--from", "2026-11-03", "--to", "2026-11-01"], ["--from", "yesterday"]):
        assert (await run("analytics", "backfill", *wrong)).code == 2
    assert await database.count("jobs", {}) == 2


class Looks:
    """How often a command that watches has looked at its jobs."""

    def __init__(self) -> None:
        self.count = 0
        self._all_ended = jobs._all_ended

    def all_ended(self, rows: Sequence[Row]) -> bool:
        """Asked after each look."""
        self.count += 1
        return self._all_ended(rows)

    async def seen(self) -> None:
        """What has been written by now: the next look may have begun before."""
        enough = self.count + 2
        async with asyncio.timeout(GUARD_SECONDS):
            while self.count < enough:
                await asyncio.sleep(0.01)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Of a command that hardly waits between two."""
    made = Looks()
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(jobs, "_all_ended", made.all_ended)
    return made


async def changes(
    database: Database, looks: Looks, job_id: ObjectId, *states: tuple[str, int]
) -> None:
    """As a worker would change it, each after what was before is seen."""
    for state, current in states:
        await looks.seen()
        change: Row = {"state": state, "progress.current": current, "progress.total": 10}
        if state == "SUCCEEDED":
            change |= {"result": {"models": 10, "changed": 1}, "finished_at": utc_now()}
        await database.data["jobs"].update_one({"_id": job_id}, {"$set": change})


async def test_a_job_is_watched_until_it_has_ended(
    run: Run, database: Database, looks: Looks
) -> None:
    job = await insert_job(database)
    watching = asyncio.ensure_future(run("jobs", "watch", str(job.id)))
    await changes(database, looks, job.id, ("RUNNING", 0), ("RUNNING", 5), ("SUCCEEDED", 10))
    done = await watching
    assert (done.code, done.err) == (0, "")
    *lines, opening, first, second, closing = done.out.splitlines()
    assert lines == [
        f"{job.id}  REINDEX  {rest}"
        for rest in ("QUEUED", "RUNNING  0 %", "RUNNING  50 %", "SUCCEEDED  100 %")
    ]
    assert json.loads(opening + first + second + closing) == {"models": 10, "changed": 1}


async def test_all_jobs_are_watched(run: Run, database: Database, looks: Looks) -> None:
    await insert_job(database, JobState.FAILED, finished_at=utc_now())
    assert await run("jobs", "watch") == Done(0, "No job waits or runs.\n", "")
    job = await insert_job(database, JobState.RUNNING)
    watching = asyncio.ensure_future(run("jobs", "watch"))
    await looks.seen()
    late = await insert_job(database)
    await changes(database, looks, late.id, ("CANCELLED", 0))
    await changes(database, looks, job.id, ("SUCCEEDED", 10))
    lines = (await watching).out.splitlines()
    assert lines == [
        f"{job.id}  REINDEX  RUNNING",
        f"{late.id}  REINDEX  QUEUED",
        f"{late.id}  REINDEX  CANCELLED  0 %",
        f"{job.id}  REINDEX  SUCCEEDED  100 %",
    ]


async def test_how_a_watched_job_failed_is_told(run: Run, database: Database) -> None:
    error = {"code": "BAD_INPUT", "message": "No such folder.", "path": ["folder"]}
    job = await insert_job(database, JobState.FAILED, error=error, finished_at=utc_now())
    line = f"{job.id}  REINDEX  FAILED  BAD_INPUT: No such folder.\n"
    assert await run("jobs", "watch", str(job.id)) == Done(
        1, line, "modelharbor: The job is FAILED: No such folder.\n"
    )
    job = await insert_job(database, JobState.CANCELLED, finished_at=utc_now())
    done = await run("jobs", "watch", str(job.id))
    assert (done.code, done.err) == (1, "modelharbor: The job is CANCELLED.\n")


async def test_what_is_started_can_be_watched(run: Run, database: Database, looks: Looks) -> None:
    watching = asyncio.ensure_future(run("collect-garbage", "--dry-run", "--watch"))
    while not (row := await database.data["jobs"].find_one({})):
        await asyncio.sleep(0.02)
    await changes(database, looks, row["_id"], ("SUCCEEDED", 10))
    done = await watching
    assert done.code == 0
    assert done.err == f"The job {row['_id']} waits for a worker (`modelharbor worker`).\n"
    assert done.out.endswith('{\n  "models": 10,\n  "changed": 1\n}\n')


async def test_at_a_terminal_there_are_bars(database: Database) -> None:
    """As they are drawn at one moment."""
    rate = Progress(current=5, total=10, rate=2.5, message="Counting")
    made = [
        await insert_job(database, JobState.RUNNING, progress=rate),
        await insert_job(database),
        await insert_job(database, JobState.SUCCEEDED, finished_at=utc_now()),
    ]
    rows = [{**await stored(database, job.id), "about": "-"} for job in made]
    console = Console(width=120, record=True, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(jobs._table(rows, 120))
    heading, running, waiting, ended = captured.get().splitlines()
    assert heading.split() == ["Id", "Kind", "About", "State", "Done", "Left", "Says"]
    assert running.split() == [
        *(str(made[0].id), "REINDEX", "-", "RUNNING", "━" * 12, "50", "%", "2", "s", "Counting")
    ]
    assert waiting.split()[:4] == [str(made[1].id), "REINDEX", "-", "QUEUED"]
    assert ended.split() == [str(made[2].id), "REINDEX", "-", "SUCCEEDED", "━" * 24]


async def test_at_a_narrow_terminal_each_job_has_one_line(database: Database) -> None:
    progress = Progress(current=5, total=10, rate=2.5, message="Counting " * 20)
    job = await insert_job(
        database, JobState.CANCELLING, kind=JobKind.IMPORT_MODEL, progress=progress
    )
    row = {**await stored(database, job.id), "about": "somebody/something"}
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(jobs._table([row], 80))
    _, line = captured.get().splitlines()
    id, kind, about, state, *_, says = line.split()
    assert (id, kind, state) == (str(job.id), "IMPORT_MODEL", "CANCELLING")
    assert about.endswith("…")
    assert says.endswith("…")
    assert "50 %" in line


async def test_import_roots_are_absolute(run: Run, database: Database) -> None:
    done = await run("jobs", "list", MODELHARBOR_IMPORT_ROOTS='{"disk": "models"}')
    assert done == Done(
        1,
        "",
        "modelharbor: MODELHARBOR_IMPORT_ROOTS: Value error, the folder of 'disk' is no absolute path\n",
    )


def test_import_roots_go_to_other_processes() -> None:
    settings = Settings(import_roots={"disk": Path("/srv/models")})
    assert environment(settings) == {"MODELHARBOR_IMPORT_ROOTS": '{"disk": "/srv/models"}'}
