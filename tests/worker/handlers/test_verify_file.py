"""VERIFY_FILE."""

import asyncio
import io
import pickle
import zipfile
from hashlib import sha256
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.jobs import JobKind
from modelharbor.db.uploads import UploadState
from modelharbor.inspection.fence import SCANNER
from modelharbor.resolvers.completing import VERIFY_ATTEMPTS
from modelharbor.worker.handlers.verify_file import verify_file
from modelharbor.worker.outcomes import FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS
from modelharbor.worker.tools import Tools
from tests.worker.handlers.docks import TEXT, WEIGHTS, Dock

pytestmark = pytest.mark.anyio


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/executed",)


def steps_of(job: Row) -> list[tuple[str, str]]:
    return [(step["name"], step["state"]) for step in job["steps"]]


DONE = "SUCCEEDED"
INSPECTED = [("sniff", DONE), ("parse", DONE), ("scan", DONE)]


@pytest.mark.parametrize("cut", [None, 700])
async def test_an_upload_is_hashed_completed_and_inspected(dock: Dock, cut: int | None) -> None:
    parts = [WEIGHTS] if cut is None else [WEIGHTS[:cut], WEIGHTS[cut:]]
    upload = await dock.arrived("model.safetensors", *parts)
    job = await dock.yard.run(await dock.job(upload_id=upload.id))
    assert (job["state"], job["error"]) == ("SUCCEEDED", None)
    assert job["result"] == {"verdict": "SAFE", "format": "SAFETENSORS", "findings": 0}
    assert steps_of(job) == [("verify", DONE), *INSPECTED]
    size = len(WEIGHTS)
    assert (job["progress"]["current"], job["progress"]["total"]) == (size, size)
    after = await dock.upload(upload)
    digest = sha256(WEIGHTS).hexdigest()
    assert (after["state"], after["is_open"], after["sha256"], after["error"]) == (
        *("COMPLETED", False),
        *(digest, None),
    )
    file = await dock.one("files", after["file_id"])
    assert (file["path"], file["sha256"], file["format"], file["role"]) == (
        *("model.safetensors", digest),
        *("SAFETENSORS", "WEIGHTS"),
    )
    blob = await dock.blob(WEIGHTS)
    assert blob is not None
    assert (blob["stored"], blob["references"]) == (True, 1)
    inspection = blob["inspection"]
    assert (inspection["verdict"], inspection["scanner"]) == ("SAFE", SCANNER)
    assert inspection["tensors"]["parameter_count"] == 1250
    assert b"".join(
        [part async for part in await dock.storage.open_range(blob["key"], 0, size)]
    ) == (WEIGHTS)
    assert await dock.states_told(upload) == ["VERIFYING", "COMPLETED"]
    quota = await dock.one("quotas", dock.ada.id)
    assert (quota["reserved_bytes"], quota["open_uploads"]) == (0, 0)


async def test_bytes_that_are_not_what_was_announced_fail(dock: Dock) -> None:
    said, found = sha256(b"other").hexdigest(), sha256(TEXT).hexdigest()
    upload = await dock.arrived("notes.txt", TEXT, sha256=said)
    job = await dock.yard.run(await dock.job(upload_id=upload.id))
    assert (job["state"], job["error"]["code"]) == ("FAILED", "CHECKSUM_MISMATCH")
    assert found in job["error"]["message"]
    assert steps_of(job) == [("verify", "FAILED")]
    after = await dock.upload(upload)
    assert (after["state"], after["error"]["code"]) == ("FAILED", "CHECKSUM_MISMATCH")
    assert await dock.database.count("files", {}) == 0
    assert await dock.database.count("blobs", {"stored": True}) == 0
    assert [each async for each in dock.storage.incoming.listed()] == []
    assert (await dock.one("quotas", dock.ada.id))["reserved_bytes"] == 0
    # Once more is the same answer.
    again = await dock.yard.run(await dock.job(upload_id=upload.id))
    assert again["error"] == job["error"]


async def test_bytes_that_are_gone_fail(dock: Dock) -> None:
    upload = await dock.arrived("notes.txt", TEXT)
    await dock.storage.incoming.delete(upload.segments[0].key)
    job = await dock.yard.run(await dock.job(upload_id=upload.id))
    assert (job["state"], job["error"]["code"]) == ("FAILED", "NOT_STORED")
    assert (await dock.upload(upload))["error"]["code"] == "NOT_STORED"


async def test_an_upload_that_was_given_up_is_nothing_to_verify(dock: Dock) -> None:
    upload = await dock.arrived("notes.txt", TEXT, state=UploadState.ABORTED)
    before = await dock.upload(upload)
    job = await dock.yard.run(await dock.job(upload_id=upload.id))
    assert (job["state"], job["error"]["code"]) == ("FAILED", "INVALID_TRANSITION")
    assert await dock.upload(upload) == before
    gone = await dock.yard.run(await dock.job(upload_id=ObjectId()))
    assert (gone["state"], gone["error"]["code"]) == ("FAILED", "NOT_FOUND")


async def test_what_a_worker_left_half_done_is_done_again(
    dock: Dock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies once with the bytes composed, once with the upload completed, once with all done."""
    upload = await dock.arrived("model.safetensors", WEIGHTS[:9], WEIGHTS[9:])

    async def dies(*_: Any, **__: Any) -> None:
        raise asyncio.CancelledError  # nothing is caught, nothing tidied up

    async def handler(job: Row, tools: Tools) -> Row:
        deaths = ("complete", "_describe", "_count") if "upload_id" in job["input"] else ()
        for name in deaths:
            with monkeypatch.context() as patched:
                patched.setitem(verify_file.__globals__, name, dies)
                with pytest.raises(asyncio.CancelledError):
                    await verify_file(job, tools)
        return await verify_file(job, tools)

    job = await dock.yard.run(await dock.job(upload_id=upload.id), {JobKind.VERIFY_FILE: handler})
    assert (job["state"], job["error"]) == ("SUCCEEDED", None)
    assert job["result"] == {"verdict": "SAFE", "format": "SAFETENSORS", "findings": 0}
    assert await dock.states_told(upload) == ["VERIFYING", "COMPLETED"]
    blob = await dock.blob(WEIGHTS)
    assert blob is not None
    assert blob["references"] == 1
    assert await dock.database.count("files", {}) == 1
    assert (await dock.one("models", dock.model.id))["stats"]["files"] == 1
    assert [each.key async for each in dock.storage.incoming.listed()] == [blob["key"]]


async def test_a_pickle_that_would_run_something_is_unsafe_and_does_not(dock: Dock) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as pack:
        pack.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
    contents = archive.getvalue()
    file = await dock.stored("weights.pt", contents)
    job = await dock.yard.run(
        await dock.job(version_id=dock.version.id, file_id=file.id, sha256=file.sha256)
    )
    assert (job["state"], job["result"]["verdict"]) == ("SUCCEEDED", "UNSAFE")
    assert job["result"]["findings"] >= 1
    assert steps_of(job) == INSPECTED
    after = await dock.one("files", file.id)
    assert (after["format"], after["role"]) == ("PYTORCH_PICKLE", "WEIGHTS")


async def test_contents_are_inspected_once(dock: Dock) -> None:
    first, second = await dock.stored("a.txt", TEXT), await dock.stored("b.md", TEXT)
    results = []
    for file in (first, second):
        job = await dock.yard.run(
            await dock.job(version_id=dock.version.id, file_id=file.id, sha256=file.sha256)
        )
        results.append((job["result"], [name for name, _ in steps_of(job)]))
    assert results[1] == (results[0][0], [])
    assert results[0][1] == ["sniff", "parse", "scan"]
    assert [(await dock.one("files", each.id))["role"] for each in (first, second)] == (
        ["OTHER", "OTHER"]
    )
    assert [(await dock.one("files", each.id))["format"] for each in (first, second)] == (
        ["TEXT", "TEXT"]
    )


def test_a_store_that_is_gone_for_a_while_is_waited_for() -> None:
    """Half of the longest pauses, which is what they come to: over ten minutes."""
    pauses = [
        min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2**attempt)
        for attempt in range(VERIFY_ATTEMPTS - 1)
    ]
    assert sum(pauses) / 2 > 600


async def test_contents_that_are_not_here_are_told(dock: Dock) -> None:
    file = await dock.stored("a.txt", TEXT)
    await dock.database.data["blobs"].update_one({}, {"$set": {"stored": False}})
    wanted = {"version_id": dock.version.id, "file_id": file.id, "sha256": file.sha256}
    job = await dock.yard.run(await dock.job(**wanted))
    assert (job["state"], job["error"]["code"]) == ("FAILED", "NOT_STORED")
    await dock.database.data["blobs"].delete_many({})
    job = await dock.yard.run(await dock.job(**wanted))
    assert (job["state"], job["error"]["code"]) == ("FAILED", "NOT_STORED")
