"""VERIFY_BLOBS: stored contents are read again, whole, and compared with their hashes.

Contents that are found to be others, or gone, count as not stored from then on: their files are not
given out, no upload is answered with them, and whoever brings the same contents again mends all of it.
Those that are right, and were never looked into, or by another scanner than ours, are inspected.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from bson import ObjectId
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import ExecutionTimeout

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import LEAST_ID, Level
from modelharbor.errors import NotStored
from modelharbor.resolvers.access import full_name
from modelharbor.resolvers.blobs import as_stored, mark_damaged
from modelharbor.resolvers.inspections import inspect_blob
from modelharbor.storage.blobs import blob_key
from modelharbor.worker.tools import Tools

from .checkpoints import Checkpoint

ROWS_AT_ONCE: Final = 1000  # looked at by one read, whether they are to be compared or not
CONTENTS_AT_ONCE: Final = 100  # compared before it is written down
BYTES_AT_ONCE: Final = 256 * 1024 * 1024  # likewise; less is read again after a crash
READERS: Final = 4
FILES_NAMED: Final = 20  # of damaged contents


async def compare_contents(job: Row, tools: Tools) -> Row:
    """Input: {all}: also those that were compared a short while ago. Result: {checked, bytes, damaged},
    over all attempts."""
    before = job["created_at"]
    if not job["input"].get("all"):
        before -= timedelta(days=tools.settings.verify_days)
    done = Checkpoint(tools, {"after": LEAST_ID, "checked": 0, "bytes": 0, "damaged": 0})
    verifying = _Verifying(tools, done, before)
    async with tools.step("verify"):
        await verifying.count()
        while rows := await verifying.page():
            due = [row for row in rows if verifying.is_due(row)]
            for batch in _batches(due):
                await verifying.compare(batch)
            await verifying.passed(rows[-1]["_id"])
    return {name: done.values[name] for name in ("checked", "bytes", "damaged")}


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if (
            len(batch) == CONTENTS_AT_ONCE
            or sum(each["size_bytes"] for each in batch) >= BYTES_AT_ONCE
        ):
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(slots=True)
class _Verifying:
    tools: Tools
    done: Checkpoint
    before: datetime
    read: int = 0  # bytes of this batch
    total: int | None = None
    damaged: list[Row] = field(default_factory=list)

    async def count(self) -> None:
        query = {
            "_id": {"$gt": self.done.values["after"]},
            "stored": True,
            "$or": [{"verified_at": None}, {"verified_at": {"$lt": self.before}}],
        }
        try:
            found = await self.tools.database.aggregate(
                "blobs",
                [{"$match": query}, {"$group": {"_id": None, "bytes": {"$sum": "$size_bytes"}}}],
            )
        except ExecutionTimeout:
            return  # so many that they cannot be counted in time
        self.total = self.done.values["bytes"] + (found[0]["bytes"] if found else 0)
        self.report()

    def report(self, count: int = 0) -> None:
        """Raises when the job was cancelled."""
        self.read += count
        current = self.done.values["bytes"] + self.read
        total = None if self.total is None else max(self.total, current)
        self.tools.report(current, total, unit="bytes", message="Reading stored contents")

    async def page(self) -> list[Row]:
        return await self.tools.database.find(
            "blobs",
            {"_id": {"$gt": self.done.values["after"]}},
            projection=dict.fromkeys(
                ("sha256", "key", "size_bytes", "stored", "verified_at", "deleting_at"), 1
            ),
            sort={"_id": 1},
            limit=ROWS_AT_ONCE,
        )

    def is_due(self, row: Row) -> bool:
        # A process of the version before, which goes on while another is put in place, has no such field.
        verified: datetime | None = row.get("verified_at")
        is_old = verified is None or verified.replace(tzinfo=UTC) < self.before
        return is_old and row["stored"] and row["deleting_at"] is None

    async def compare(self, rows: Sequence[Row]) -> None:
        self.read = 0
        right: list[Row] = []
        wrong: list[Row] = []
        waiting = iter(rows)

        async def read() -> None:
            # Several of these share one iterator: each takes the next when it is done with one.
            for row in waiting:
                is_whole = await self._is_whole(row)
                (right if is_whole else wrong).append(row)
                if is_whole:
                    await self._inspect(row)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(READERS):
                    group.create_task(read())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # of several that fail at once, one tells enough
        damaged: list[Row] = []

        async def write(session: AsyncClientSession) -> Row:
            damaged.clear()
            if right:
                now = utc_now()
                await self.tools.database.data["blobs"].bulk_write(
                    [UpdateOne(as_stored(row), {"$set": {"verified_at": now}}) for row in right],
                    ordered=False,
                    session=session,
                )
            # Unless they went, or came anew, meanwhile.
            damaged.extend(
                [row for row in wrong if await mark_damaged(self.tools.database, row, session)]
            )
            values = self.done.values
            return {
                "checked": values["checked"] + len(rows),
                "bytes": values["bytes"] + sum(row["size_bytes"] for row in rows),
                "damaged": values["damaged"] + len(damaged),
            }

        await self.done.advance(write)
        self.read = 0
        for row in damaged:
            self.tools.log(await _told(self.tools.database, row), Level.CRITICAL)

    async def _is_whole(self, row: Row) -> bool:
        storage = self.tools.storage
        try:
            digest = await storage.incoming.digest(blob_key(row), row["size_bytes"], self.report)
        except NotStored:
            return False
        wanted: str = row["sha256"]
        return digest == wanted

    async def _inspect(self, row: Row) -> None:
        tools = self.tools
        with suppress(NotStored):  # removed since
            await inspect_blob(
                tools.database, tools.storage, tools.fence, row["sha256"], renew=True
            )

    async def passed(self, last: ObjectId) -> None:
        async def write(session: AsyncClientSession) -> Row:
            return {"after": last}

        await self.done.advance(write)


async def _told(database: Database, blob: Row) -> str:
    """That these contents are damaged, and whose they are."""
    files = await database.find(
        "files",
        {"sha256": blob["sha256"]},
        projection={"path": 1, "model_id": 1, "version_id": 1},
        limit=FILES_NAMED + 1,
    )
    names: dict[ObjectId, str] = {}
    for collection, name in (("models", "model_id"), ("versions", "version_id")):
        for row in await database.find(
            collection,
            {"_id": {"$in": [file[name] for file in files]}},
            projection={"owner_login": 1, "name": 1, "number": 1},
        ):
            names[row["_id"]] = full_name(row) if collection == "models" else str(row["number"])
    told = [
        f"{names.get(file['model_id'])} {names.get(file['version_id'])} {file['path']}"
        for file in files[:FILES_NAMED]
    ]
    more = [] if len(files) <= FILES_NAMED else ["and others"]
    used = ", ".join([*told, *more]) or "no file"
    return f"Stored contents are damaged: SHA-256 {blob['sha256']}, of {used}. Upload them again."
