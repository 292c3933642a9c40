"""VERIFY_FILE: the bytes of an upload are compared with their hash, and contents are inspected.

What comes out belongs to the contents: it is written once, and who finds it there is done.
"""

import asyncio
from functools import partial
from typing import Final

from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.uploads import Segment, UploadState
from modelharbor.errors import ErrorCode, NotStored, Refused, Unavailable
from modelharbor.inspection.formats import HEAD_BYTES, role_of, sniff
from modelharbor.jobs.put import add_progress
from modelharbor.resolvers.blobs import mark_damaged
from modelharbor.resolvers.completing import complete, fail
from modelharbor.resolvers.inspections import inspect_blob
from modelharbor.resolvers.telling import tell_of_upload
from modelharbor.storage.blobs import blob_key
from modelharbor.storage.incoming import INCOMING
from modelharbor.worker.tools import Tools

DOING: Final = {"sniff": "Recognising", "parse": "Reading the header", "scan": "Scanning"}


async def verify_file(job: Row, tools: Tools) -> Row:
    """Input: {upload_id}, of an upload whose bytes are all here; or {version_id, file_id, sha256}.
    Result: {verdict, format, findings}, the last a count.

    Twice is once: an upload that is COMPLETED is not read again, contents have one inspection. Refused
    where the upload became no file: it has FAILED then.
    """
    given = job["input"]
    if "upload_id" in given:
        upload = await _verified(tools, given["upload_id"])
        file_id, digest = upload["file_id"], upload["sha256"]
    else:
        file_id, digest = given["file_id"], given["sha256"]
    blob = await _blob(tools.database, digest)
    size_bytes = blob["size_bytes"]
    tools.report(0, size_bytes, unit="bytes")
    try:
        await _describe(tools, file_id, blob)
        inspection = await _inspected(tools, digest)
    except NotStored as error:
        # So its version fails, instead of being taken for one that nobody has looked into.
        await mark_damaged(tools.database, blob)
        raise Refused(ErrorCode.NOT_STORED, error.message) from None
    tools.report(size_bytes, size_bytes, unit="bytes")
    await _count(tools, size_bytes)
    return {
        "verdict": inspection["verdict"],
        "format": inspection["format"],
        "findings": len(inspection["findings"]),
    }


# The upload -------------------------------------------------------------------------------------


async def _verified(tools: Tools, upload_id: ObjectId) -> Row:
    """The upload, COMPLETED."""
    async with tools.step("verify"):
        upload = await tools.database.transaction(partial(_begin, tools.database, upload_id))
        if upload["state"] == UploadState.VERIFYING.value:
            digest, key = await _hashed(tools, upload)
            try:
                upload = await complete(tools.database, tools.storage, upload, digest, key)
            except Refused as refused:  # it passes: old contents are being removed, say
                raise Unavailable(refused.message) from None
        _refuse_unless_completed(upload)
        return upload


def _refuse_unless_completed(upload: Row) -> None:
    if upload["state"] == UploadState.COMPLETED.value:
        return
    error = upload["error"]
    if error is None:
        message = f"The upload is {upload['state']}: nothing is to be verified."
        raise Refused(ErrorCode.INVALID_TRANSITION, message)
    raise Refused(ErrorCode(error["code"]), error["message"])


async def _begin(database: Database, upload_id: ObjectId, session: AsyncClientSession) -> Row:
    """The upload: from RECEIVED it becomes VERIFYING."""
    uploads = database.data["uploads"]
    upload: Row | None = await uploads.find_one(
        {"_id": upload_id}, session=session, max_time_ms=database.query_timeout_ms
    )
    if upload is None:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such upload any more.")
    if upload["state"] != UploadState.RECEIVED.value:
        return upload
    begun: Row | None = await uploads.find_one_and_update(
        {"_id": upload_id, "state": upload["state"]},
        {
            "$set": {"state": UploadState.VERIFYING.value, "updated_at": utc_now()},
            "$inc": {"sequence": 1},
        },
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    assert begun is not None  # read in this transaction: another's write in between starts it anew
    await tell_of_upload(session, begun)
    return begun


async def _hashed(tools: Tools, upload: Row) -> tuple[str, str]:
    """SHA-256 and key of all its bytes, in one object from now on. Read from the beginning each time."""
    incoming = tools.storage.incoming
    segments = [Segment(**each) for each in upload["segments"]]
    size, done = upload["size_bytes"], 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        tools.report(done, size, unit="bytes", message=f"Verifying {upload['path']}")

    report(0)
    try:
        key = incoming.final_key(segments)
        if key is not None:
            return await incoming.digest(key, size, report), key
        key = f"{INCOMING}/{upload['_id']}/whole"
        return await incoming.compose(segments, key, report), key
    except NotStored as error:
        failed = await fail(
            tools.database, tools.storage, upload, ErrorCode.NOT_STORED, error.message
        )
        _refuse_unless_completed(failed)
        # Another completed it meanwhile, and took the bytes away: the next attempt sees it.
        raise Unavailable(error.message) from None


# The contents -----------------------------------------------------------------------------------


async def _blob(database: Database, digest: str) -> Row:
    blob: Row | None = await database.data["blobs"].find_one(
        {"sha256": digest},
        dict.fromkeys(("sha256", "key", "size_bytes", "stored"), 1),
        max_time_ms=database.query_timeout_ms,
    )
    if blob is None:
        raise Refused(ErrorCode.NOT_STORED, "The contents of this file are not here any more.")
    return blob


async def _describe(tools: Tools, file_id: ObjectId, blob: Row) -> None:
    """What the file is, from its first bytes and its name: an upload did not know. Before it is
    inspected, for then its version may be published at once."""
    head = await tools.storage.read_range(blob_key(blob), 0, min(HEAD_BYTES, blob["size_bytes"]))

    async def work(session: AsyncClientSession) -> None:
        files = tools.database.data["files"]
        file = await files.find_one(
            {"_id": file_id}, session=session, max_time_ms=tools.database.query_timeout_ms
        )
        if file is None:
            return
        format = sniff(head, file["path"])
        role = role_of(file["path"], format)
        if (file["format"], file["role"]) != (format.value, role.value):
            await files.update_one(
                {"_id": file_id},
                {"$set": {"format": format.value, "role": role.value}},
                session=session,
            )

    await tools.database.transaction(work)


async def _inspected(tools: Tools, digest: str) -> Row:
    """The inspection; each stage of the fence is a step of the job."""
    stages: asyncio.Queue[str | None] = asyncio.Queue()
    inspecting = asyncio.create_task(
        inspect_blob(tools.database, tools.storage, tools.fence, digest, stages.put_nowait)
    )
    inspecting.add_done_callback(lambda _: stages.put_nowait(None))
    try:
        stage = await stages.get()
        while stage is not None:
            async with tools.step(stage):
                tools.report(0, message=DOING.get(stage))
                stage = await stages.get()
                if stage is None:
                    await inspecting  # what it raises ends this step too
    except BaseException:
        await ended(inspecting)
        raise
    return await inspecting


async def _count(tools: Tools, size_bytes: int) -> None:
    """Add to the progress of the job that waits for this one: once, whatever becomes of us then."""
    counted = await tools.database.data["jobs"].find_one_and_update(
        {"_id": tools.job["_id"], "parent_id": {"$ne": None}, "checkpoint": None},
        {"$set": {"checkpoint": {"counted": True}}},
        {"parent_id": 1},
    )
    if counted is not None:
        await add_progress(tools.database, counted["parent_id"], size_bytes)
