"""Contents come and go: whoever adds them meets whoever removes them, and neither harms the other.

Who adds says so first (`announce_blobs`), then looks what is stored, stores what is not, and says so
(`record_blobs`); files then refer to it in a transaction (`refer_to`). What lies where it arrived is
recorded by the transaction that completes its upload: see completing.py. Where the store has lost what
was stored, its document says so first (`are_here`, `mark_damaged`): only what is not stored is recorded
anew. Who removes marks first (`claim_unused`: no references, not announced for a while), then removes the
contents, then the document (`forget_blobs`). Nobody adds to what is marked: `announce_blobs` waits until
it is gone, the other two refuse. Contents that come again have another document, and only who was
promised that one records them.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

from bson import ObjectId
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.errors import ErrorCode, Refused, Unavailable
from modelharbor.storage.blobs import BlobStore, blob_key, digest_key

log = logging.getLogger(__name__)
BLOBS_AT_ONCE: Final = 1000
DELETES_AT_ONCE: Final = 8
OF_STORED: Final = ("key", "verified_at", "damaged_at")  # what is known of contents that are stored
DUPLICATE: Final = 11000  # MongoDB's code
LOOK_SECONDS: Final = 0.05
PATIENCE_SECONDS: Final = 90.0  # for contents that are being removed
# Who marked contents stops removing them long before another may take that over.
REMOVE_SECONDS: Final = 20.0
ABANDONED: Final = timedelta(seconds=60)


class Contents(Protocol):
    @property
    def sha256(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...


async def announce_blobs(
    database: Database, storage: BlobStore, contents: Sequence[Contents]
) -> dict[str, Row]:
    """They are about to be used: from here on they are no garbage. Of their documents, by SHA-256, what
    says where they are.

    Waits for those that are being removed. Outside of transactions: an upsert in one fails, where it
    would wait outside, when another adds the same contents at once. Unavailable where they are
    being removed for very long.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    waiting = list(contents)
    while True:
        marked: list[Contents] = []
        for start in range(0, len(waiting), BLOBS_AT_ONCE):
            marked += await _announce(database, waiting[start : start + BLOBS_AT_ONCE])
        if not marked:
            return await _documents(database, contents)
        if time.monotonic() > until:
            raise Unavailable("Old contents of these files are being removed: try again later.")
        await asyncio.sleep(LOOK_SECONDS)
        for each in marked:
            await _finish_abandoned(database, storage, each.sha256)
        waiting = marked


async def _announce(database: Database, contents: Sequence[Contents]) -> list[Contents]:
    """Answers those that are marked. Whose document another makes at the same time is answered as well."""
    now = utc_now()
    updates = [
        UpdateOne(
            {"sha256": each.sha256, "deleting_at": None},
            {
                "$set": {"seen_at": now},
                "$setOnInsert": {
                    **dict.fromkeys(OF_STORED),
                    "size_bytes": each.size_bytes,
                    "references": 0,
                    "stored": False,
                    "inspection": None,
                    "created_at": now,
                },
            },
            upsert=True,
        )
        for each in contents
    ]
    try:
        await database.data["blobs"].bulk_write(updates, ordered=False)
    except BulkWriteError as error:
        failed = error.details["writeErrors"]
        if any(each["code"] != DUPLICATE for each in failed) or error.details["writeConcernErrors"]:
            raise
        return [contents[each["index"]] for each in failed]
    return []


async def _documents(database: Database, contents: Sequence[Contents]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for start in range(0, len(contents), BLOBS_AT_ONCE):
        batch = {each.sha256 for each in contents[start : start + BLOBS_AT_ONCE]}
        rows = (
            await database.data["blobs"]
            .find(
                {"sha256": {"$in": sorted(batch)}, "deleting_at": None},
                {"sha256": 1, "key": 1, "stored": 1},
            )
            .max_time_ms(database.query_timeout_ms)
            .to_list()
        )
        if len(rows) < len(batch):
            raise removed_meanwhile()
        found.update((row["sha256"], row) for row in rows)
    return found


async def are_here(database: Database, storage: BlobStore, row: Row) -> bool:
    """Whether the store has the contents of this document (as `announce_blobs` answers it). Where they
    are lost, it says so from now on. Unavailable."""
    if not row["stored"]:
        return False
    if await storage.exists(blob_key(row)):
        return True
    await mark_damaged(database, row)
    return False


async def record_blobs(database: Database, blob_ids: Sequence[ObjectId]) -> None:
    """The contents of these documents are stored under their hashes now. Such as were recorded meanwhile
    stay where they are. CONFLICT where they were removed since they were announced."""
    now = utc_now()
    for start in range(0, len(blob_ids), BLOBS_AT_ONCE):
        batch = blob_ids[start : start + BLOBS_AT_ONCE]
        found = await database.data["blobs"].update_many(
            {"_id": {"$in": list(batch)}, "deleting_at": None},
            [
                {"$set": {"seen_at": now}},
                {"$set": {name: {"$cond": ["$stored", f"${name}", None]} for name in OF_STORED}},
                {"$set": {"stored": True}},
            ],
        )
        if found.matched_count < len(batch):
            raise removed_meanwhile()


async def mark_damaged(
    database: Database, row: Row, session: AsyncClientSession | None = None
) -> bool:
    """The store has not, or not whole, what this document (`_id`, `key`) says. False where it says
    something else by now."""
    found = await database.data["blobs"].update_one(
        as_stored(row), {"$set": {"stored": False, "damaged_at": utc_now()}}, session=session
    )
    return found.matched_count > 0


def as_stored(row: Row) -> Row:
    """Filter of this document (`_id`, `key`), while its contents are where it says."""
    return {"_id": row["_id"], "key": row.get("key"), "stored": True, "deleting_at": None}


async def refer_to(
    database: Database, session: AsyncClientSession, counts: Mapping[str, int]
) -> None:
    """So many more files have contents, by their SHA-256. CONFLICT where those are not stored."""
    done = await database.data["blobs"].bulk_write(
        [
            UpdateOne(
                {"sha256": digest, "stored": True, "deleting_at": None},
                {"$inc": {"references": count}},
            )
            for digest, count in sorted(counts.items())
        ],
        ordered=False,
        session=session,
    )
    if done.matched_count < len(counts):
        raise removed_meanwhile()


async def release(
    database: Database, session: AsyncClientSession, counts: Mapping[str, int]
) -> None:
    """So many fewer files have contents. They count as seen now: they stay for a while."""
    await database.data["blobs"].bulk_write(
        [
            UpdateOne(
                {"sha256": digest}, {"$inc": {"references": -count}, "$set": {"seen_at": utc_now()}}
            )
            for digest, count in sorted(counts.items())
        ],
        ordered=False,
        session=session,
    )


def removed_meanwhile() -> Refused:
    return Refused(
        ErrorCode.CONFLICT,
        "Contents of these files were removed meanwhile, since nothing used them: do it again.",
    )


# Removing ---------------------------------------------------------------------------------------


def removable(before: datetime) -> Row:
    """Filter of contents that nothing refers to and that were last seen before this, or whose removal
    was abandoned."""
    return {
        "references": 0,
        "$or": [
            {"deleting_at": None, "seen_at": {"$lt": before}},
            {"deleting_at": None, "seen_at": None, "created_at": {"$lt": before}},
            _abandoned(),
        ],
    }


def _abandoned() -> Row:
    return {"deleting_at": {"$lt": utc_now() - ABANDONED}}


@dataclass(frozen=True, slots=True)
class Claim:
    """Marked contents, to be removed by who marked them, within a time."""

    rows: Sequence[Row]
    marked_at: datetime
    until: float  # by the process's own clock
    miscounted: int = 0
    """That were no garbage after all: behind them there may be some."""


async def claim_unused(
    database: Database, session: AsyncClientSession, before: datetime, most: int
) -> Claim:
    """Mark contents that can be removed as being removed. What cannot be undone does not hang on a
    counter: those that files have all the same are counted anew, and stay."""
    claim = Claim([], utc_now(), time.monotonic() + REMOVE_SECONDS)
    rows = (
        await database.data["blobs"]
        .find(
            removable(before),
            {"sha256": 1, "key": 1, "size_bytes": 1, "stored": 1},
            session=session,
        )
        .sort("_id", 1)
        .limit(most)
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    used = await _uses(database, session, [row["sha256"] for row in rows])
    if used:
        log.error("storage.miscounted sha256=%s", sorted(used))
        await database.data["blobs"].bulk_write(
            [
                UpdateOne({"sha256": digest}, {"$set": {"references": count, "deleting_at": None}})
                for digest, count in used.items()
            ],
            session=session,
        )
        rows = [row for row in rows if row["sha256"] not in used]
    if rows:
        await database.data["blobs"].update_many(
            {"_id": {"$in": [row["_id"] for row in rows]}},
            {"$set": {"deleting_at": claim.marked_at}},
            session=session,
        )
    return Claim(rows, claim.marked_at, claim.until, len(used))


async def _uses(
    database: Database, session: AsyncClientSession, digests: Sequence[str]
) -> dict[str, int]:
    """How many files have these contents; only of those that some have."""
    cursor = await database.data["files"].aggregate(
        [
            {"$match": {"sha256": {"$in": list(digests)}}},
            {"$group": {"_id": "$sha256", "count": {"$sum": 1}}},
        ],
        session=session,
        maxTimeMS=database.query_timeout_ms,
    )
    return {row["_id"]: row["count"] async for row in cursor}


async def remove_contents(storage: BlobStore, claim: Claim) -> list[Row]:
    """Answers whose contents are removed: all of the claim, where its time was enough."""
    removed: list[Row] = []
    waiting = iter(claim.rows)

    async def remove() -> None:
        # Several of these share one iterator: each takes the next when it is done with one.
        for row in waiting:
            if time.monotonic() > claim.until:
                return
            await _remove(storage, row)
            removed.append(row)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(DELETES_AT_ONCE):
                group.create_task(remove())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # they all have one cause: the store
    return removed


async def _remove(storage: BlobStore, row: Row) -> None:
    """Also what was put under the hash while other contents were recorded already, or damaged."""
    for key in {blob_key(row), digest_key(row["sha256"])}:
        await storage.delete(key)


async def forget_blobs(
    database: Database, session: AsyncClientSession, claim: Claim, removed: Sequence[Row]
) -> None:
    """The documents of removed contents go too."""
    ids = [row["_id"] for row in removed]
    gone = await database.data["blobs"].delete_many(
        {"_id": {"$in": ids}, "deleting_at": claim.marked_at}, session=session
    )
    if gone.deleted_count == len(ids):
        return
    # This process stood still between its clock and the store for so long that another took over.
    # What was stored anew since may have been removed: the next import stores it once more.
    digests = [row["sha256"] for row in removed]
    log.error("storage.removed_late sha256=%s", digests)
    keys = [None, *{row.get("key") for row in removed} - {None}]
    await database.data["blobs"].update_many(
        {"sha256": {"$in": digests}, "key": {"$in": keys}, "deleting_at": None},
        {"$set": {"stored": False}},
        session=session,
    )


async def _finish_abandoned(database: Database, storage: BlobStore, digest: str) -> None:
    now = utc_now()
    row: Row | None = await database.data["blobs"].find_one_and_update(
        {"sha256": digest, **_abandoned()},
        {"$set": {"deleting_at": now}},
        {"sha256": 1, "key": 1},
    )
    if row is not None:
        await _remove(storage, row)
        blob_id: ObjectId = row["_id"]
        await database.data["blobs"].delete_one({"_id": blob_id, "deleting_at": now})
