"""FINALIZE_VERSION: a published version waits for the jobs of its files, then becomes what they make it.

It may have 100,000 files: they are gone through in batches, and children are waited for by their count.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, JobKind, Level
from modelharbor.db.uploads import UploadState
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Refused
from modelharbor.resolvers.access import refuse_unless_active
from modelharbor.resolvers.completing import VERIFY_ATTEMPTS
from modelharbor.resolvers.inspections import troubled_files, uninspected
from modelharbor.resolvers.settling import settle_in
from modelharbor.worker.tools import Tools

FILES_AT_ONCE: Final = 1000
SETTLE_SECONDS: Final = 55.0  # MongoDB ends a transaction after 60
MOST_TOLD: Final = 100  # files in the log
VERIFYING: Final = [UploadState.RECEIVED.value, UploadState.VERIFYING.value]
OVER: Final = frozenset(state.value for state in ENDED)


async def finalize_version(job: Row, tools: Tools) -> Row:
    """Input: {version_id, aliases, files}: `files` that there are once all uploads are verified.
    Result: {status, statusReason, digest, files, parameters}. Twice is once: a settled version stays.
    """
    version_id = job["input"]["version_id"]
    version = await _version(tools.database, version_id)
    if version["status"] != VersionStatus.PROCESSING.value:
        return _told(version)
    async with tools.step("wait"):
        await _adopt(tools, version_id)
        await _count(tools, version_id)
        await tools.until_children()
    async with tools.step("inspect"):
        # What those jobs have left undone, and what never had a job, gets one now.
        await _verify_again(tools, version_id)
        async for batch in _batches(tools.database, version_id):
            await _inspect(tools, batch)
        await _count(tools, version_id)
        await tools.until_children()
    async with tools.step("settle"):
        version = await _settle(tools, version_id)
    if version["status"] != VersionStatus.READY.value:
        tools.log(str(version["status_reason"]), Level.WARNING)
        for each in await troubled_files(tools.database, version_id, MOST_TOLD):
            tools.log(str(each), Level.WARNING)
    tools.report(version["size_bytes"], version["size_bytes"], unit="bytes")
    return _told(version)


async def _version(database: Database, version_id: ObjectId) -> Row:
    rows = await database.find(
        "versions", {"_id": version_id, "status": {"$ne": VersionStatus.DELETED.value}}, limit=1
    )
    if not rows:
        raise Refused(ErrorCode.NOT_FOUND, "The version is not there any more.")
    return rows[0]


def _told(version: Row) -> Row:
    return {
        "status": version["status"],
        "statusReason": version["status_reason"],
        "digest": version["digest"],
        "files": version["file_count"],
        "parameters": version["parameters"],
    }


# The jobs of its files --------------------------------------------------------------------------


async def _adopt(tools: Tools, version_id: ObjectId) -> None:
    """What verifies its files already. Such jobs are about the version."""
    after: Row = {}
    while rows := await tools.database.find(
        "jobs",
        {"subject.id": version_id, "kind": JobKind.VERIFY_FILE.value, **after},
        projection={"state": 1, "parent_id": 1},
        sort={"_id": 1},
        limit=FILES_AT_ONCE,
    ):
        going = [
            row["_id"] for row in rows if row["state"] not in OVER and row["parent_id"] is None
        ]
        if going:
            await tools.adopt(going)
        after = {"_id": {"$gt": rows[-1]["_id"]}}


async def _verify_again(tools: Tools, version_id: ObjectId) -> None:
    """Uploads whose job has ended without them: it was cancelled, or its workers died."""
    uploads = await tools.database.find(
        "uploads",
        {
            "version_id": version_id,
            "part_of": None,
            "is_open": True,
            "state": {"$in": VERIFYING},
        },
        projection={"_id": 1},
    )
    await tools.put_children(
        JobKind.VERIFY_FILE,
        {f"upload:{row['_id']}": {"upload_id": row["_id"]} for row in uploads},
        max_attempts=VERIFY_ATTEMPTS,
    )


async def _inspect(tools: Tools, files: Sequence[Row]) -> None:
    first = {file["sha256"]: file for file in reversed(files)}
    await tools.put_children(
        JobKind.VERIFY_FILE,
        {
            f"contents:{digest}": {
                "version_id": first[digest]["version_id"],
                "file_id": first[digest]["_id"],
                "sha256": digest,
            }
            for digest in sorted(await uninspected(tools.database, list(first)))
        },
        max_attempts=VERIFY_ATTEMPTS,
    )


async def _batches(database: Database, version_id: ObjectId) -> AsyncIterator[list[Row]]:
    after = ""
    while rows := await database.find(
        "files",
        {"version_id": version_id, "path": {"$gt": after}},
        projection=dict.fromkeys(("version_id", "path", "sha256", "size_bytes"), 1),
        sort={"path": 1},
        limit=FILES_AT_ONCE,
    ):
        yield rows
        after = rows[-1]["path"]


async def _count(tools: Tools, version_id: ObjectId) -> None:
    """Bytes of all files, and of those that nothing is to be done for. While this job waits, its
    children add theirs."""
    total = done = 0
    async for batch in _batches(tools.database, version_id):
        waiting = await uninspected(tools.database, sorted({file["sha256"] for file in batch}))
        total += sum(file["size_bytes"] for file in batch)
        done += sum(file["size_bytes"] for file in batch if file["sha256"] not in waiting)
    uploads = await tools.database.aggregate(
        "uploads",
        [
            {
                "$match": {
                    "version_id": version_id,
                    "part_of": None,
                    "is_open": True,
                    "state": {"$in": VERIFYING},
                }
            },
            {"$group": {"_id": None, "size_bytes": {"$sum": "$size_bytes"}}},
        ],
    )
    total += sum(row["size_bytes"] for row in uploads)
    tools.report(done, total, unit="bytes", message="Inspecting the files")


# The end ----------------------------------------------------------------------------------------


async def _settle(tools: Tools, version_id: ObjectId) -> Row:
    """With its aliases, as far as who asked for them may still set them: else without."""
    given = tools.job["input"]
    aliases: list[str] = given["aliases"]
    viewer: Viewer | None = None
    if aliases:
        try:
            viewer = tools.viewer
        except Refused as refused:
            tools.log(f"No aliases were set: {refused.message}", Level.WARNING)

    async def settle(session: AsyncClientSession, viewer: Viewer | None) -> Row:
        database = tools.database
        version = await database.data["versions"].find_one(
            {"_id": version_id, "status": {"$ne": VersionStatus.DELETED.value}},
            session=session,
            max_time_ms=database.query_timeout_ms,
        )
        if version is None:
            raise Refused(ErrorCode.NOT_FOUND, "The version is not there any more.")
        if version["status"] != VersionStatus.PROCESSING.value:
            return version  # by an attempt whose answer was lost
        model = await database.data["models"].find_one(
            {"_id": version["model_id"]}, session=session, max_time_ms=database.query_timeout_ms
        )
        if model is None:
            raise Refused(ErrorCode.NOT_FOUND, "The model is not there any more.")
        refuse_unless_active(model)
        return await settle_in(
            database,
            session,
            version,
            model,
            by=tools.job["created_by_id"],
            viewer=viewer,
            aliases=aliases,
            expected_files=given["files"],
        )

    try:
        return await tools.database.transaction(
            lambda session: settle(session, viewer), SETTLE_SECONDS
        )
    except Refused as refused:
        if refused.path != ["setAliases"]:
            raise
        tools.log(f"No aliases were set: {refused.message}", Level.WARNING)
    return await tools.database.transaction(lambda session: settle(session, None), SETTLE_SECONDS)
