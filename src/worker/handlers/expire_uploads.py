"""EXPIRE_UPLOADS: uploads that nobody goes on with end, old ones are forgotten, and what lies below
`incoming/` without being of any use goes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.resolvers import uploads
from modelharbor.storage.blobs import BlobStore
from modelharbor.storage.incoming import Left, segment_key
from modelharbor.worker.tools import Tools

from .checkpoints import Checkpoint

ORPHAN_SECONDS: Final = 3600.0  # an object of no use is at least so old before it goes
ROWS_AT_ONCE: Final = 500
OBJECTS_AT_ONCE: Final = 1000
DELETES_AT_ONCE: Final = 8
OPEN: Final[Row] = {"is_open": True, "expires_at": {"$type": "date"}}  # as their index has them
COUNTED: Final = ("expired", "forgotten", "objects", "bytes")


async def sweep_uploads(job: Row, tools: Tools) -> Row:
    """Input: {sweep}, unless it is false the whole of `incoming/` is gone through; {orphan_seconds}.
    Result: uploads that ended, rows that were forgotten, objects that went and their bytes."""
    given, now = job["input"], utc_now()
    done = Checkpoint(tools, dict.fromkeys(COUNTED, 0))
    async with tools.step("expire"):
        await _expire(tools, done, now)
    async with tools.step("forget"):
        await _forget(tools, done, now - timedelta(days=tools.settings.job_days))
    if given.get("sweep", True):
        before = now - timedelta(seconds=given.get("orphan_seconds", ORPHAN_SECONDS))
        async with tools.step("sweep"):
            await _sweep(tools, done, before)
    return done.values


async def _add(done: Checkpoint, **counts: int) -> None:
    async def write(session: AsyncClientSession) -> Row:
        return {name: done.values[name] + count for name, count in counts.items()}

    await done.advance(write)


async def _expire(tools: Tools, done: Checkpoint, now: datetime) -> None:
    while rows := await uploads.expire_uploads(tools.database, tools.storage, now):
        await _add(done, expired=len(rows))
        tools.report(done.values["expired"], unit="uploads", message="Ending uploads")


async def _forget(tools: Tools, done: Checkpoint, before: datetime) -> None:
    """Rows of uploads that ended long ago."""
    data = tools.database.data["uploads"]

    async def work(session: AsyncClientSession) -> Row:
        rows = (
            await data.find(
                {"ended_at": {"$type": "date", "$lt": before}}, {"_id": 1}, session=session
            )
            .sort("ended_at", 1)
            .limit(ROWS_AT_ONCE)
            .max_time_ms(tools.database.query_timeout_ms)
            .to_list()
        )
        gone = await data.delete_many(
            {"_id": {"$in": [row["_id"] for row in rows]}}, session=session
        )
        return {"forgotten": done.values["forgotten"] + gone.deleted_count}

    forgotten = -1
    while forgotten < done.values["forgotten"]:
        forgotten = done.values["forgotten"]
        await done.advance(work)
        tools.check()


# What lies below `incoming/` --------------------------------------------------------------------


async def _sweep(tools: Tools, done: Checkpoint, before: datetime) -> None:
    seen = 0
    async for batch in _batches(tools.storage.incoming.listed()):
        seen += len(batch)
        tools.report(seen, unit="objects", message="Looking for what nobody needs")
        old = [left for left in batch if left.last_modified < before]
        useless = await _useless(tools.database, old)
        if useless:
            await _delete(tools.storage, useless)
            await _add(done, objects=len(useless), bytes=sum(left.size_bytes for left in useless))


async def _batches(found: AsyncIterator[Left]) -> AsyncIterator[list[Left]]:
    batch: list[Left] = []
    async for left in found:
        batch.append(left)
        if len(batch) == OBJECTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


async def _useless(database: Database, found: Sequence[Left]) -> list[Left]:
    """Objects of no open upload and of no contents.

    Contents are looked for at last: they have the bytes of an upload from the moment on when it is not
    open any more. Before that too, for of all objects but a few they are, and what only open uploads
    know (the bytes of their parts) is not found as easily.
    """
    ids = [ObjectId(name) for name in {_upload(left) for left in found} if ObjectId.is_valid(name)]
    rows = await database.find(
        "uploads", {"_id": {"$in": ids}, "is_open": True}, projection={"_id": 1}
    )
    going = {str(row["_id"]) for row in rows}
    left = await _without_contents(database, [each for each in found if _upload(each) not in going])
    if not left:
        return []
    rows = await database.find(
        "uploads",
        {**OPEN, "segments.key": {"$in": [segment_key(each.key) for each in left]}},
        projection={"segments.key": 1},
    )
    used = {segment["key"] for row in rows for segment in row["segments"]}
    left = [each for each in left if segment_key(each.key) not in used]
    return await _without_contents(database, left)


async def _without_contents(database: Database, found: Sequence[Left]) -> list[Left]:
    rows = await database.find(
        "blobs", {"key": {"$in": [left.key for left in found]}}, projection={"key": 1}
    )
    used = {row["key"] for row in rows}
    return [left for left in found if left.key not in used]


def _upload(left: Left) -> str:
    """The id of the upload that it was received for."""
    return left.key.split("/")[1]


async def _delete(storage: BlobStore, useless: Sequence[Left]) -> None:
    waiting = iter(useless)

    async def delete() -> None:
        # Several of these share one iterator: each takes the next when it is done with one.
        for left in waiting:
            await storage.delete(left.key)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(DELETES_AT_ONCE):
                group.create_task(delete())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # they all have one cause: the store
