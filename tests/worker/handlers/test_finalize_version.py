"""FINALIZE_VERSION."""

import asyncio
from hashlib import sha256
from typing import Any

import pytest

from modelharbor.db.base import Row, utc_now
from modelharbor.db.files import ScanVerdict
from modelharbor.db.jobs import JobKind
from modelharbor.db.uploads import UploadState
from modelharbor.errors import ErrorCode
from modelharbor.jobs.put import adopt
from modelharbor.resolvers.completing import VERIFY_ATTEMPTS
from modelharbor.resolvers.jobs import cancel_job, retry_job
from modelharbor.resolvers.settling import files_digest
from modelharbor.resolvers.uploads import expire_uploads
from modelharbor.resolvers.versions import delete_version, publish_version
from modelharbor.worker.handlers import HANDLERS
from modelharbor.worker.handlers.finalize_version import finalize_version as handler
from modelharbor.worker.handlers.verify_file import verify_file
from modelharbor.worker.tools import HandlerSpec, Tools
from tests.resolvers.state import refused
from tests.worker.handlers.docks import TEXT, WEIGHTS, Dock

pytestmark = pytest.mark.anyio


async def publish(dock: Dock, *aliases: str) -> Row:
    published = await publish_version(
        dock.database, dock.viewer, version_id=dock.version.id, set_aliases=aliases
    )
    assert published.version["status"] == "PROCESSING"
    assert published.job is not None
    return published.job


async def version_of(dock: Dock) -> Row:
    return await dock.one("versions", dock.version.id)


async def model_of(dock: Dock) -> Row:
    return await dock.one("models", dock.model.id)


async def children_of(dock: Dock, job: Row) -> list[Row]:
    return await dock.database.find("jobs", {"parent_id": job["_id"]}, sort={"_id": 1})


async def told(dock: Dock) -> list[tuple[str, Row]]:
    rows = await dock.database.find("events", {"stream": "models"}, sort={"_id": 1})
    return [(row["kind"], row["after"]) for row in rows]


async def test_a_version_waits_for_its_files_and_is_ready(dock: Dock) -> None:
    upload = await dock.arrived("model.safetensors", WEIGHTS[:100], WEIGHTS[100:])
    first = await dock.job(upload_id=upload.id)
    text = await dock.stored("notes.txt", TEXT)
    second = await dock.job(version_id=dock.version.id, file_id=text.id, sha256=text.sha256)
    lone = await dock.stored("more.json", b"{}")  # whose job was lost

    async def once_adopted(job: Row, tools: Tools) -> Row | None:
        """The same worker has all of them at once: they are not to end before they have a parent."""
        while not await dock.database.find("jobs", {"_id": job["_id"], "parent_id": {"$ne": None}}):
            await asyncio.sleep(0.01)
        return await HANDLERS[JobKind.VERIFY_FILE].function(job, tools)

    handlers = {**HANDLERS, JobKind.VERIFY_FILE: HandlerSpec(once_adopted)}
    job = await dock.yard.run(await publish(dock, "prod"), handlers)
    assert (job["state"], job["error"]) == ("SUCCEEDED", None)
    size = len(WEIGHTS) + len(TEXT) + 2
    digest = files_digest(
        [
            ("model.safetensors", sha256(WEIGHTS).hexdigest()),
            *(("notes.txt", text.sha256), ("more.json", lone.sha256)),
        ]
    )
    assert job["result"] == {
        "status": "READY",
        "statusReason": None,
        "digest": digest,
        "files": 3,
        "parameters": 1250,
    }
    assert [(step["name"], step["state"]) for step in job["steps"]] == [
        *(("wait", "SUCCEEDED"), ("inspect", "SUCCEEDED"), ("settle", "SUCCEEDED"))
    ]
    progress = job["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (size, size, "bytes")
    assert job["open_children"] == 0
    children = {child["_id"]: child for child in await children_of(dock, job)}
    assert {first["_id"], second["_id"]} < children.keys()
    assert {(child["kind"], child["state"]) for child in children.values()} == (
        {("VERIFY_FILE", "SUCCEEDED")}
    )
    put = {"version_id": dock.version.id, "file_id": lone.id, "sha256": lone.sha256}
    assert put in [child["input"] for child in children.values()]
    version, model = await version_of(dock), await model_of(dock)
    assert (version["status"], version["digest"], version["parameters"]) == (
        *("READY", digest),
        1250,
    )
    assert (version["file_count"], version["size_bytes"]) == (3, size)
    assert (model["latest_version_id"], model["parameters"]) == (dock.version.id, 1250)
    assert model["formats"] == ["JSON", "SAFETENSORS", "TEXT"]
    assert [alias["name"] for alias in model["aliases"]] == ["prod"]
    stats = model["stats"]
    assert (stats["versions"], stats["files"], stats["size_bytes"], stats["stored_bytes"]) == (
        *(1, 3),
        *(size, size),
    )
    assert await told(dock) == [
        ("VERSION_UPDATED", {"status": "PROCESSING"}),
        ("VERSION_READY", {"status": "READY", "digest": digest}),
        ("ALIAS_SET", {"name": "prod", "version_id": dock.version.id, "protected": False}),
    ]


async def test_a_file_that_is_unsafe_puts_the_version_in_quarantine(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)
    await dock.stored("evil.pkl", b"cos\nsystem\n(S'true'\ntR.")
    job = await dock.yard.run(await publish(dock, "prod"))
    reason = "1 file is not known to be harmless: evil.pkl (UNSAFE)."
    assert (job["state"], job["result"]["status"], job["result"]["statusReason"]) == (
        *("SUCCEEDED", "QUARANTINED"),
        reason,
    )
    version, model = await version_of(dock), await model_of(dock)
    assert (version["status"], version["status_reason"], version["published_at"]) == (
        *("QUARANTINED", reason),
        None,
    )
    assert (model["latest_version_id"], model["aliases"]) == (None, [])
    assert model["stats"]["stored_bytes"] == 0
    assert (await told(dock))[1:] == [
        ("VERSION_QUARANTINED", {"status": "QUARANTINED", "status_reason": reason})
    ]
    lines = await dock.yard.log(job)
    assert lines[0] == ("WARNING", reason)
    assert lines[1][1].startswith("evil.pkl: UNSAFE ")


async def test_an_upload_that_is_not_what_was_said_fails_the_version(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)
    upload = await dock.arrived("model.bin", WEIGHTS, sha256=sha256(b"other").hexdigest())
    await dock.job(upload_id=upload.id)
    job = await dock.yard.run(await publish(dock))
    reason = "1 file could not be verified: model.bin."
    assert (job["state"], job["result"]["status"], job["result"]["statusReason"]) == (
        *("SUCCEEDED", "FAILED"),
        reason,
    )
    version = await version_of(dock)
    assert (version["status"], version["status_reason"], version["digest"]) == (
        *("FAILED", reason),
        None,
    )
    assert (await told(dock))[1:] == [
        ("VERSION_FAILED", {"status": "FAILED", "status_reason": reason})
    ]
    assert (await model_of(dock))["stats"]["files"] == 1


async def test_contents_that_are_damaged_fail_the_version(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)
    file = await dock.stored("model.bin", WEIGHTS)
    await dock.database.data["blobs"].update_one(
        {"sha256": file.sha256}, {"$set": {"stored": False, "damaged_at": file.id.generation_time}}
    )
    job = await dock.yard.run(await publish(dock))
    assert job["result"]["statusReason"] == "1 file could not be verified: model.bin."


async def test_contents_that_the_store_has_lost_fail_the_version(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)
    blob = await dock.blob(TEXT)
    assert blob is not None
    await dock.storage.delete(blob["key"])
    job = await dock.yard.run(await publish(dock))
    assert (job["result"]["status"], job["result"]["statusReason"]) == (
        *("FAILED", "1 file could not be verified: notes.txt."),
    )
    after = await dock.blob(TEXT)
    assert after is not None
    assert (after["stored"], after["damaged_at"] is None) == (False, False)


async def test_an_upload_whose_job_was_cancelled_gets_another(dock: Dock) -> None:
    """Nor does the sweeper end it meanwhile, however old it is."""
    upload = await dock.arrived("notes.txt", TEXT)
    verifying = await dock.job(upload_id=upload.id)
    await dock.database.data["uploads"].update_one(
        {"_id": upload.id}, {"$set": {"job_id": verifying["_id"]}}
    )
    await cancel_job(dock.database, None, job_id=verifying["_id"])

    async def swept(job: Row, tools: Tools) -> Row:
        assert await expire_uploads(tools.database, tools.storage, utc_now()) == []
        return await verify_file(job, tools)

    handlers = {**HANDLERS, JobKind.VERIFY_FILE: HandlerSpec(swept)}
    job = await dock.yard.run(await publish(dock), handlers)
    assert (job["state"], job["result"]["status"]) == ("SUCCEEDED", "READY")
    child = (await children_of(dock, job))[0]
    assert child["input"] == {"upload_id": upload.id}
    assert child["max_attempts"] == VERIFY_ATTEMPTS


async def test_a_job_that_fails_leaves_its_file_in_quarantine(dock: Dock) -> None:
    """It does not keep the version waiting."""
    await dock.stored("notes.txt", TEXT)

    async def fails(job: Row, tools: Tools) -> None:
        await tools.database.data["jobs"].update_one(
            {"_id": job["_id"]}, {"$set": {"max_attempts": 1}}
        )
        job["max_attempts"] = 1
        raise ValueError

    handlers = {**HANDLERS, JobKind.VERIFY_FILE: HandlerSpec(fails)}
    job = await dock.yard.run(await publish(dock), handlers)
    assert (job["state"], job["result"]["status"], job["result"]["statusReason"]) == (
        *("SUCCEEDED", "QUARANTINED"),
        "1 file is not known to be harmless: notes.txt (PENDING).",
    )


async def test_an_alias_that_may_no_longer_be_set_is_left_out(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)
    job = await publish(dock, "prod")
    await dock.database.data["jobs"].update_one({}, {"$set": {"scopes": ["READ", "WRITE"]}})
    job = await dock.yard.run(job)
    assert (job["state"], job["result"]["status"]) == ("SUCCEEDED", "READY")
    assert (await model_of(dock))["aliases"] == []
    assert await dock.yard.log(job) == [
        (
            "WARNING",
            "No aliases were set: The token lacks the scope PROMOTE: use one that has it.",
        )
    ]


async def test_a_deleted_version_is_not_brought_back(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)
    job = await publish(dock)
    await delete_version(dock.database, dock.viewer, version_id=dock.version.id)
    job = await dock.yard.run(job)
    assert (job["state"], job["error"]["code"]) == ("FAILED", "NOT_FOUND")
    assert (await version_of(dock))["status"] == "DELETED"


async def test_cancelled_it_leaves_the_version_until_it_is_retried(dock: Dock) -> None:
    upload = await dock.arrived("notes.txt", TEXT)
    first = await dock.job(upload_id=upload.id)
    job = await publish(dock)

    taken = await dock.database.transaction(
        lambda session: adopt(dock.database, session, job["_id"], [first["_id"]])
    )
    assert taken == 1
    await cancel_job(dock.database, None, job_id=job["_id"])
    assert (await dock.one("jobs", first["_id"]))["state"] == "CANCELLED"
    assert (await version_of(dock))["status"] == "PROCESSING"
    again = await dock.yard.run(await retry_job(dock.database, None, job_id=job["_id"]))
    assert (again["state"], again["result"]["status"]) == ("SUCCEEDED", "READY")
    assert (await dock.upload(upload))["state"] == "COMPLETED"


async def test_settled_twice_is_settled_once(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)

    async def twice(job: Row, tools: Tools) -> Row:
        result = await handler(job, tools)
        before = await version_of(dock)
        assert await handler(job, tools) == result
        assert await version_of(dock) == before
        return result

    handlers = {**HANDLERS, JobKind.FINALIZE_VERSION: HandlerSpec(twice)}
    job = await dock.yard.run(await publish(dock), handlers)
    assert (job["state"], job["result"]["status"]) == ("SUCCEEDED", "READY")


async def test_uploads_that_take_bytes_keep_a_version_from_being_published(dock: Dock) -> None:
    await dock.stored("notes.txt", TEXT)
    await dock.arrived("one.bin", b"1", state=UploadState.UPLOADING)
    async with refused(
        dock.database,
        ErrorCode.INVALID_TRANSITION,
        "id",
        says="1 upload waits for bytes for version 1: complete or abort them first.",
    ):
        await publish_version(dock.database, dock.viewer, version_id=dock.version.id)


async def test_progress_grows_while_it_waits(dock: Dock) -> None:
    """Each child adds its bytes, once."""
    files = [await dock.stored(f"{number}.txt", b"%d" % number * 10) for number in range(1, 4)]
    for file in files:
        await dock.job(version_id=dock.version.id, file_id=file.id, sha256=file.sha256)
    seen: list[tuple[str, int]] = []

    async def watched(job: Row, tools: Tools) -> Any:
        result = await HANDLERS[JobKind.VERIFY_FILE].function(job, tools)
        [parent] = await dock.database.find("jobs", {"kind": "FINALIZE_VERSION"})
        seen.append((parent["state"], parent["progress"]["current"]))
        return result

    handlers = {**HANDLERS, JobKind.VERIFY_FILE: HandlerSpec(watched, at_once=1)}
    job = await publish(dock)
    hall = type(dock.yard.hall)(dock.database, dock.yard.settings)
    only = {JobKind.FINALIZE_VERSION: HANDLERS[JobKind.FINALIZE_VERSION]}
    async with hall.working(only):

        async def waits() -> bool:
            return bool((await hall.job(job["_id"]))["awaits_children"])

        await hall.until(waits)
    assert (await hall.job(job["_id"]))["progress"]["total"] == 30
    ended = await dock.yard.run(job, handlers)
    assert (ended["state"], ended["result"]["status"]) == ("SUCCEEDED", "READY")
    assert seen == [("QUEUED", 10), ("QUEUED", 20), ("QUEUED", 30)]


async def test_many_files_are_gone_through_in_batches(
    dock: Dock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(handler.__globals__, "FILES_AT_ONCE", 2)
    for number in range(5):
        await dock.stored(f"{number}.txt", b"%d" % number)
    job = await dock.yard.run(await publish(dock))
    assert (job["state"], job["result"]["status"], job["result"]["files"]) == (
        *("SUCCEEDED", "READY"),
        5,
    )
    verdicts = {row["inspection"]["verdict"] for row in await dock.database.find("blobs", {})}
    assert verdicts <= {ScanVerdict.SAFE.value, ScanVerdict.SKIPPED.value}
