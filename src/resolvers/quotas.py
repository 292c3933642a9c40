"""What an owner's files may come to: reserved when an upload is created, given back when it ends.

All that reserves, gives back or completes writes the owner's one document, so no two of them count
at the same time: whatever comes at once, exactly as much gets in as fits.
"""

import logging
from typing import Final

from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelState
from modelharbor.errors import ErrorCode, Refused
from modelharbor.settings import Settings

from .names import bad

log = logging.getLogger(__name__)
BIGGEST: Final = 2**63 - 1


async def reserve(
    database: Database,
    session: AsyncClientSession,
    settings: Settings,
    model: Row,
    *,
    size_bytes: int,
    uploads: int,
    instant_bytes: int = 0,
) -> Row:
    """Room for uploads to a model of its owner; `instant_bytes` are files by the same transaction,
    not written yet. QUOTA_EXCEEDED; the owner's quota otherwise."""
    row: Row | None = await database.data["quotas"].find_one_and_update(
        {"_id": model["owner_id"]},
        {
            "$inc": {"reserved_bytes": size_bytes, "open_uploads": uploads, "changes": 1},
            "$setOnInsert": {"limit_bytes": None},
        },
        upsert=True,
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    assert row is not None  # made, if it was not there
    if uploads and row["open_uploads"] > settings.max_open_uploads:
        raise Refused(
            ErrorCode.QUOTA_EXCEEDED,
            f"{model['owner_login']} would have {row['open_uploads']} uploads open: {settings.max_open_uploads} are allowed. Complete or abort some first.",
            "files",
        )
    limit = limit_of(row, settings)
    if limit is not None:
        used = await _used(database, session, model["owner_id"], model["owner_login_lower"])
        asked = size_bytes + instant_bytes
        reserved = row["reserved_bytes"] - size_bytes
        if used["size_bytes"] + reserved + asked > limit:
            raise Refused(
                ErrorCode.QUOTA_EXCEEDED,
                f"The quota of {model['owner_login']} is {limit:,} bytes: {used['size_bytes']:,} are used, {reserved:,} are reserved by open uploads, {asked:,} more were asked for.",
                "files",
            )
    return row


async def release(
    database: Database,
    session: AsyncClientSession,
    owner_id: ObjectId,
    *,
    size_bytes: int,
    uploads: int,
) -> None:
    """So much less is reserved: of uploads that end in this transaction."""
    await database.data["quotas"].update_one(
        {"_id": owner_id},
        {"$inc": {"reserved_bytes": -size_bytes, "open_uploads": -uploads, "changes": 1}},
        session=session,
    )


async def refuse_beyond(
    database: Database,
    session: AsyncClientSession,
    settings: Settings,
    owner: Row,
    size_bytes: int,
    *path: str,
) -> None:
    """QUOTA_EXCEEDED unless so many bytes more, by this transaction, have room: of an import or a model
    that is restored, which reserve nothing. Writes the owner's quota, so that it counts beside uploads."""
    row: Row | None = await database.data["quotas"].find_one_and_update(
        {"_id": owner["_id"]},
        {
            "$inc": {"changes": 1},
            "$setOnInsert": {"limit_bytes": None, "reserved_bytes": 0, "open_uploads": 0},
        },
        upsert=True,
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    limit = limit_of(row, settings)
    if row is None or limit is None:
        return
    used = await _used(database, session, owner["_id"], owner["login_lower"])
    if used["size_bytes"] + row["reserved_bytes"] + size_bytes > limit:
        raise Refused(
            ErrorCode.QUOTA_EXCEEDED,
            f"The quota of {owner['login']} is {limit:,} bytes: {used['size_bytes']:,} are used, {row['reserved_bytes']:,} are reserved by open uploads, {size_bytes:,} more are needed.",
            *path,
        )


def limit_of(quota: Row | None, settings: Settings) -> int | None:
    """Bytes; None: no limit."""
    limit: int | None = quota["limit_bytes"] if quota else None
    return settings.quota_bytes if limit is None else limit


async def set_quota(
    database: Database, viewer: Viewer, *, owner_id: ObjectId, limit_bytes: int | None
) -> Row:
    """What the files of a person or organization may come to; None: as the settings say. What is there
    already stays. Operators only; answers the quota."""
    user_id = viewer.person_id()
    if not viewer.operates:
        raise Refused(
            ErrorCode.FORBIDDEN, "This is for operators, with a token that has the scope OPERATE."
        )
    if limit_bytes is not None and not 0 <= limit_bytes <= BIGGEST:
        raise bad("A quota is a number of bytes, or null for the default.", "bytes")
    owner = await database.data["actors"].find_one(
        {"_id": owner_id}, {"login": 1}, max_time_ms=database.query_timeout_ms
    )
    if owner is None:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such person or organization.", "ownerId")
    try:
        row = await _set(database, owner_id, limit_bytes)
    except DuplicateKeyError:  # another made it at the same moment
        row = await _set(database, owner_id, limit_bytes)
    log.info("quota.set owner=%s bytes=%s by=%s", owner["login"], limit_bytes, user_id)
    return row


async def _set(database: Database, owner_id: ObjectId, limit_bytes: int | None) -> Row:
    row: Row | None = await database.data["quotas"].find_one_and_update(
        {"_id": owner_id},
        {
            "$set": {"limit_bytes": limit_bytes},
            "$inc": {"changes": 1},
            "$setOnInsert": {"reserved_bytes": 0, "open_uploads": 0},
        },
        upsert=True,
        return_document=ReturnDocument.AFTER,
    )
    assert row is not None  # made, if it was not there
    return row


async def storage_usage(database: Database, settings: Settings, owner: Row) -> Row:
    """Of a person or organization (`_id`, `login_lower`): `used_bytes` are the lengths of all files,
    `stored_bytes` of published contents, each once for a model; `reserved_bytes` of `open_uploads`;
    `limit_bytes` None without a limit."""
    quota = await database.data["quotas"].find_one(
        {"_id": owner["_id"]}, max_time_ms=database.query_timeout_ms
    )
    used = await _used(database, None, owner["_id"], owner["login_lower"])
    return {
        "owner_id": owner["_id"],
        "used_bytes": used["size_bytes"],
        "stored_bytes": used["stored_bytes"],
        "reserved_bytes": quota["reserved_bytes"] if quota else 0,
        "open_uploads": quota["open_uploads"] if quota else 0,
        "limit_bytes": limit_of(quota, settings),
    }


async def _used(
    database: Database, session: AsyncClientSession | None, owner_id: ObjectId, login_lower: str
) -> Row:
    cursor = await database.data["models"].aggregate(
        [
            {
                "$match": {
                    "owner_login_lower": login_lower,  # it has an index
                    "owner_id": owner_id,
                    "state": {"$ne": ModelState.DELETED.value},
                }
            },
            {
                "$group": {
                    "_id": None,
                    "size_bytes": {"$sum": "$stats.size_bytes"},
                    "stored_bytes": {"$sum": "$stats.stored_bytes"},
                }
            },
        ],
        session=session,
        maxTimeMS=database.query_timeout_ms,
    )
    async for row in cursor:
        return row
    return {"size_bytes": 0, "stored_bytes": 0}
