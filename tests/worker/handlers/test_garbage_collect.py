"""GARBAGE_COLLECT."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from beanie import PydanticObjectId
from bson import ObjectId, Timestamp
from pymongo.errors import ExecutionTimeout

from modelharbor.auth.viewer import Viewer, job_principals
from modelharbor.db.base import Row, utc_now
from modelharbor.db.events import EventDocument, Stream
from modelharbor.db.files import BlobDocument
from modelharbor.db.idempotency import IdempotencyDocument
from modelharbor.db.jobs import JobDocument, JobKind, JobLogDocument, JobState
from modelharbor.db.models import Visibility
from modelharbor.db.rollups import OF_MODELS, Grain
from modelharbor.db.tokens import Permission, TokenDocument
from modelharbor.db.usage import UsageKind
from modelharbor.errors import ErrorCode
from modelharbor.events.position import position_of
from modelharbor.inspection.fence import open_fence
from modelharbor.resolvers.imports import ImportResult, import_folder
from modelharbor.resolvers.jobs import cancel_job, start_collection
from modelharbor.resolvers.likes import like_model
from modelharbor.resolvers.models import delete_model, restore_model
from modelharbor.storage.blobs import BlobStore, digest_key, open_storage
from modelharbor.worker.handlers import garbage_collect
from modelharbor.worker.handlers.garbage_collect import collect_garbage
from modelharbor.worker.tools import Tools
from tests.documents import insert_actor, viewer_of
from tests.explaining import explained
from tests.resolvers.state import everything, refused
from tests.usage import insert_usage, roll_up, usage
from tests.worker.handlers.conftest import Yard

pytestmark = pytest.mark.anyio
NOTHING: Row = dict.fromkeys(garbage_collect.COUNTED, 0)
OWN = ("jobs", "events", "job_logs", "log")  # in which a job's own life is written


def ago(days: float) -> datetime:
    return utc_now() - timedelta(days=days)


@pytest.fixture
async def storage(yard: Yard) -> AsyncIterator[BlobStore]:
    async with open_storage(yard.settings) as storage:
        yield storage


@pytest.fixture
async def ada(yard: Yard) -> Viewer:
    return viewer_of(await insert_actor("ada"))


async def collected(yard: Yard, *, dry_run: bool = False) -> Row:
    result = await yard.result(await start_collection(yard.database, None, dry_run=dry_run))
    assert result.pop("dryRun") is dry_run
    return result


async def rest(yard: Yard) -> dict[str, list[Row]]:
    return {
        name: rows for name, rows in (await everything(yard.database)).items() if name not in OWN
    }


async def imported(
    yard: Yard, storage: BlobStore, viewer: Viewer, folder: Path, name: str, **files: bytes
) -> ImportResult:
    folder.mkdir(parents=True, exist_ok=True)
    for path, contents in files.items():
        (folder / path).write_bytes(contents)
    async with open_fence(yard.settings) as fence:
        return await import_folder(
            yard.database,
            storage,
            fence,
            viewer,
            folder,
            "ada",
            name,
            visibility=Visibility.PUBLIC,
            max_card_bytes=1000,
            report=lambda progress: None,
        )


async def aged(yard: Yard, model_id: ObjectId, days: float = 31) -> None:
    await yard.database.data["models"].update_one(
        {"_id": model_id}, {"$set": {"deleted_at": ago(days)}}
    )


async def test_nothing_is_garbage(
    yard: Yard, ada: Viewer, storage: BlobStore, tmp_path: Path
) -> None:
    await imported(yard, storage, ada, tmp_path / "m", "m", x=b"1")
    before = await rest(yard)
    assert await collected(yard) == NOTHING
    assert await rest(yard) == before


async def test_contents_go_from_where_they_arrived(yard: Yard, storage: BlobStore) -> None:
    for number, references in enumerate((0, 1)):
        async with storage.incoming.writer(f"incoming/{number}/1", 0) as writer:
            await writer.write(b"contents")
            await writer.flush()
        await BlobDocument(
            sha256=f"{number:064}",
            key=f"incoming/{number}/1",
            size_bytes=8,
            references=references,
            created_at=ago(2),
        ).insert()
    assert await collected(yard) == NOTHING | {"blobs": 1, "bytes": 8}
    assert [left.key async for left in storage.incoming.listed()] == ["incoming/1/1"]
    assert await yard.database.count("blobs", {}) == 1


async def fill(yard: Yard) -> dict[str, list[ObjectId]]:
    """Garbage of each simple kind, each beside what is none; answers the ids of what stays."""
    user = PydanticObjectId()
    kept: dict[str, list[ObjectId]] = {}
    stored: list[Row] = [{}, {"stored": False}, {"references": 1}]
    tokens = [
        TokenDocument(user_id=user, name="x", prefix="x", secret_sha256="0", scopes=[], **values)
        for values in (
            {"revoked_at": ago(31)},
            {"expires_at": ago(31)},
            {"revoked_at": ago(29)},
            {"expires_at": ago(29)},
            {"created_at": ago(99)},
        )
    ]
    keys = [
        IdempotencyDocument(
            user_id=user,
            operation="x",
            key=f"{days}",
            input_sha256="0",
            result_id=user,
            nonce="0",
            expires_at=ago(days),
        )
        for days in (0.1, -1)
    ]
    events = [
        EventDocument(stream=stream, position=position, at=ago(99))
        for stream, position in (
            (Stream.JOBS, place(31)),
            (Stream.UPLOADS, place(31)),
            (Stream.JOBS, place(29)),
            (Stream.JOBS, None),
            (Stream.MODELS, place(31)),
            (Stream.PEOPLE, place(31)),
        )
    ]
    blobs = [
        BlobDocument(sha256=f"{number:064}", size_bytes=7, created_at=ago(2), **values)
        for number, values in enumerate(stored)
    ]
    for documents, old in ((tokens, 2), (keys, 1), (events, 2), (blobs, 2)):
        await type(documents[0]).insert_many(documents)
        kept[documents[0].get_collection_name()] = [ObjectId(each.id) for each in documents[old:]]
    return kept


def place(days: float) -> str:
    return position_of(Timestamp(int(ago(days).timestamp()), 1), 2)


async def test_a_dry_run_counts_what_goes(yard: Yard) -> None:
    kept = await fill(yard)
    before = await rest(yard)
    expected = NOTHING | {"tokens": 2, "idempotencyKeys": 1, "events": 2, "blobs": 2, "bytes": 7}
    assert await collected(yard, dry_run=True) == expected
    assert await rest(yard) == before
    assert await collected(yard) == expected
    for name, ids in kept.items():
        query: Row = {} if name != "events" else {"job_id": None, "stream": {"$ne": "marks"}}
        rows = await yard.database.data[name].find(query).sort("_id", 1).to_list()
        assert [row["_id"] for row in rows] == ids, name
    assert await collected(yard) == NOTHING


async def test_many_rows_go_in_several_transactions(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ROWS_AT_ONCE", "BLOBS_AT_ONCE", "JOBS_AT_ONCE"):
        monkeypatch.setattr(garbage_collect, name, 2)
    await TokenDocument.insert_many(
        [
            TokenDocument(
                user_id=PydanticObjectId(),
                name="x",
                prefix="x",
                secret_sha256="0",
                scopes=[Permission.READ],
                revoked_at=ago(31),
            )
            for _ in range(5)
        ]
    )
    await BlobDocument.insert_many(
        [
            BlobDocument(sha256=f"{number:064}", size_bytes=10, created_at=ago(2))
            for number in range(5)
        ]
    )
    job = await yard.run(await start_collection(yard.database, None))
    assert job["result"] == {"dryRun": False, **NOTHING, "tokens": 5, "blobs": 5, "bytes": 50}
    progress = job["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (10, 10, "rows")
    assert [step["name"] for step in job["steps"]] == [
        *("models", "exports", "blobs", "tokens", "idempotency keys", "jobs", "events")
    ]


# Jobs -------------------------------------------------------------------------------------------


async def old_job(
    days: float = 31, state: JobState = JobState.SUCCEEDED, **given: Any
) -> JobDocument:
    values: Row = {
        "finished_at": ago(days),
        "log_count": 2,
        "principals": job_principals(),
        **given,
    }
    job = JobDocument(kind=JobKind.REINDEX, state=state, **values)
    await job.insert()
    await JobLogDocument.insert_many(
        [JobLogDocument(job_id=job.id, message=f"{number}") for number in range(2)]
    )
    return job


async def test_old_jobs_go_with_their_logs(yard: Yard) -> None:
    for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.DEAD, JobState.CANCELLED):
        await old_job(state=state)
    parent = await old_job()
    await old_job(parent_id=parent.id)
    young = await old_job(29)
    living_parent = await old_job()
    child = await old_job(29, parent_id=living_parent.id)
    waiting_parent = await old_job()
    waiting = await old_job(
        state=JobState.QUEUED,
        finished_at=None,
        parent_id=waiting_parent.id,
        run_after=ago(-1),
    )
    expected = NOTHING | {"jobs": 6}
    assert await collected(yard, dry_run=True) == expected
    assert await collected(yard) == expected
    stay = [young.id, living_parent.id, child.id, waiting_parent.id, waiting.id]
    rows = await yard.database.data["jobs"].find({"kind": "REINDEX"}).sort("_id", 1).to_list()
    assert [row["_id"] for row in rows] == stay
    logs = await yard.database.data["job_logs"].distinct("job_id", {"message": {"$in": ["0", "1"]}})
    assert sorted(logs) == stay


async def test_children_stay_until_their_parent_has_read_what_came_of_them(yard: Yard) -> None:
    parent = await old_job(state=JobState.QUEUED, finished_at=None, run_after=ago(-1))
    child = await old_job(parent_id=parent.id)
    assert await collected(yard, dry_run=True) == NOTHING
    assert await collected(yard) == NOTHING
    assert await yard.database.count("jobs", {"_id": child.id}) == 1


async def test_many_old_jobs_are_counted_some_at_a_time(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage_collect, "JOBS_COUNTED_AT_ONCE", 2)
    ended = ago(40)
    for finished_at in (*[ended] * 3, ago(39), ago(38), ago(37), ago(29)):
        await old_job(finished_at=finished_at)
    assert await collected(yard, dry_run=True) == NOTHING | {"jobs": 6}


async def test_what_cannot_be_counted_in_time_goes_all_the_same(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    await old_job()

    async def slow(database: Any, limits: Any) -> Row:
        raise ExecutionTimeout("operation exceeded time limit", 50)

    monkeypatch.setattr(garbage_collect, "_count", slow)
    assert await collected(yard) == NOTHING | {"jobs": 1}


async def test_few_logs_go_at_once(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage_collect, "LINES_AT_ONCE", 3)
    for _ in range(3):
        await old_job()
    assert await collected(yard) == NOTHING | {"jobs": 3}
    assert await yard.database.count("job_logs", {"message": {"$in": ["0", "1"]}}) == 0


async def test_what_is_garbage_is_found_by_indexes(yard: Yard) -> None:
    await fill(yard)
    job = await old_job()
    await old_job(29, parent_id=job.id)
    limits = garbage_collect._limits(yard.settings, utc_now())
    finds = {
        "tokens": garbage_collect._tokens(limits),
        "events": garbage_collect._events(limits),
        "idempotency": garbage_collect._keys(limits),
        "models": garbage_collect._models(limits),
    }
    pipeline = garbage_collect._jobs(limits)
    commands: list[Row] = [
        *({"find": name, "filter": query} for name, query in finds.items()),
        {"aggregate": "jobs", "pipeline": pipeline, "cursor": {}},
        {"find": "likes", "filter": {"model_id": ObjectId()}},
        {
            "find": "rollup_quarters",
            "filter": {"cuboid": {"$in": OF_MODELS}, "model": ObjectId()},
        },
    ]
    for command in commands:
        for stage in await explained(yard.database, command):
            assert stage.get("stage") != "COLLSCAN", command
            assert int(stage.get("collectionScans", 0)) == 0, command


# Models -----------------------------------------------------------------------------------------


async def test_deleted_models_go_with_all_that_is_theirs(
    yard: Yard, ada: Viewer, storage: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage_collect, "ROWS_AT_ONCE", 2)
    database = yard.database
    files = {f"f{number}": b"%d" % number for number in range(5)}
    gone = await imported(yard, storage, ada, tmp_path / "gone", "gone", **files)
    await imported(yard, storage, ada, tmp_path / "gone", "gone", more=b"more")
    (tmp_path / "gone/README.md").write_text("# Card")
    await imported(yard, storage, ada, tmp_path / "gone", "gone")
    kept = await imported(yard, storage, ada, tmp_path / "kept", "kept", f0=b"0")
    young = await imported(yard, storage, ada, tmp_path / "young", "young", f1=b"1")
    for result in (gone, kept):
        await like_model(database, ada, model_id=result.model_id)
        await insert_usage(
            database,
            [usage(UsageKind.VIEW, ago(back), model=result.model_id) for back in (0, 1, 3)],
        )
    await roll_up(database, yard.settings)
    for result in (gone, young):
        await delete_model(database, ada, model_id=result.model_id)
    await aged(yard, gone.model_id)
    await aged(yard, young.model_id, 29)

    assert await collected(yard, dry_run=True) == NOTHING | {"models": 1}
    assert await collected(yard) == NOTHING | {"models": 1}
    for grain in Grain:
        used = await database.find(grain.value, {"model": {"$exists": True}})
        assert {row["model"] for row in used} == {kept.model_id, young.model_id}
    assert await database.count("rollup_homes", {"_id": gone.model_id}) == 0
    for name in ("versions", "files", "likes"):
        rows = await database.data[name].find().to_list()
        models = (
            {kept.model_id, young.model_id} if name in ("versions", "files") else {kept.model_id}
        )
        assert {row["model_id"] for row in rows} == models, name
    assert await database.count("models", {}) == 2
    assert await database.count("cards", {}) == 0
    assert await database.count("events", {"model_id": gone.model_id}) > 3
    references = {row["sha256"]: row["references"] for row in await database.find("blobs", {})}
    expected = dict.fromkeys((sha256(each).hexdigest() for each in files.values()), 0)
    expected |= {sha256(b"more").hexdigest(): 0, sha256(b"# Card").hexdigest(): 0}
    expected |= {sha256(b"0").hexdigest(): 1, sha256(b"1").hexdigest(): 1}
    assert references == expected

    # The contents stay for their while, and go then.
    assert await collected(yard) == NOTHING
    await database.data["blobs"].update_many({}, {"$set": {"seen_at": ago(2)}})
    assert await collected(yard) == NOTHING | {"blobs": 5, "bytes": 3 + 4 + 6}
    for digest, count in expected.items():
        assert await storage.exists(digest_key(digest)) == (count > 0)


async def test_a_model_that_is_going_is_not_restored(
    yard: Yard,
    ada: Viewer,
    storage: BlobStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a crash in the midst of it leaves the rest to the next attempt."""
    monkeypatch.setattr(garbage_collect, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr("modelharbor.worker.outcomes.FIRST_BACKOFF_SECONDS", 0.01)
    files = {f"f{number}": b"%d" % number for number in range(4)}
    result = await imported(yard, storage, ada, tmp_path / "m", "m", **files)
    await delete_model(yard.database, ada, model_id=result.model_id)
    await aged(yard, result.model_id)
    await fill(yard)
    attempts: list[int] = []

    async def handler(job: Row, tools: Tools) -> Row:
        report, count = tools.report, 0

        def break_off(*given: Any, **named: Any) -> None:
            nonlocal count
            report(*given, **named)
            count += 1
            if count == 4 and len(attempts) < 4:
                raise ConnectionError("the power is gone")

        attempts.append(await tools.database.count("files", {}))
        if len(attempts) == 2:
            async with refused(yard.database, ErrorCode.NOT_FOUND, "id"):
                await restore_model(yard.database, ada, model_id=result.model_id)
        monkeypatch.setattr(tools, "report", break_off)
        return await collect_garbage(job, tools)

    job = await start_collection(yard.database, None)
    ended = await yard.run(job, {JobKind.GARBAGE_COLLECT: handler})
    expected = {"tokens": 2, "idempotencyKeys": 1, "events": 2, "blobs": 2, "bytes": 7, "models": 1}
    assert ended["result"] == {"dryRun": False, **NOTHING, **expected}
    assert attempts == [4, 1, 0, 0]
    assert await yard.database.count("files", {}) == 0


async def test_a_model_that_is_restored_stays(
    yard: Yard, ada: Viewer, storage: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = await imported(yard, storage, ada, tmp_path / "m", "m", x=b"1")
    await delete_model(yard.database, ada, model_id=result.model_id)
    await aged(yard, result.model_id)
    purge = garbage_collect._Collecting._model

    async def late(self: Any, model_id: ObjectId) -> None:
        await restore_model(yard.database, ada, model_id=model_id)
        await purge(self, model_id)

    monkeypatch.setattr(garbage_collect._Collecting, "_model", late)
    assert await collected(yard) == NOTHING
    assert await yard.database.count("models", {"state": "ACTIVE", "purging_at": None}) == 1
    assert await yard.database.count("files", {}) == 1


async def test_it_is_cancelled_between_transactions(yard: Yard) -> None:
    await fill(yard)

    async def handler(job: Row, tools: Tools) -> Row:
        await cancel_job(yard.database, None, job_id=job["_id"])
        return await collect_garbage(job, tools)

    job = await start_collection(yard.database, None)
    before = await rest(yard)
    ended = await yard.run(job, {JobKind.GARBAGE_COLLECT: handler})
    assert (ended["state"], ended["result"]) == ("CANCELLED", None)
    assert await rest(yard) == before
