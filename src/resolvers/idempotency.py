"""The same key and input give the same answer, however often and at once they come."""

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any

from beanie import PydanticObjectId
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.idempotency import IdempotencyDocument
from modelharbor.errors import ErrorCode, Refused
from modelharbor.settings import Settings

from .names import valid_idempotency_key


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one creation is to use, and each repetition of it finds again."""

    id: PydanticObjectId
    nonce: str


Work = Callable[[AsyncClientSession, Attempt], Awaitable[Row]]
Find = Callable[[AsyncClientSession, Attempt], Awaitable[Row | None]]


async def create_once(
    database: Database,
    settings: Settings,
    *,
    user_id: ObjectId,
    operation: str,
    key: str | None,
    given: Mapping[str, Any],
    make: Work,
    find: Find,
    turn: ObjectId | None = None,
) -> Row:
    """`make` within a transaction; when the key was used with the same input before, `find` instead.

    Refuses with CONFLICT where the key belongs to another input, or where what it made is gone. `turn`:
    see `Database.transaction`.
    """
    key = valid_idempotency_key(key)
    fresh = Attempt(PydanticObjectId(), secrets.token_hex(32))
    if key is None:
        return await database.transaction(lambda session: make(session, fresh), turn=turn)
    digest = sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()
    mine = {"user_id": user_id, "operation": operation, "key": key}

    async def work(session: AsyncClientSession) -> Row:
        records = database.data["idempotency"]
        record = await records.find_one(
            mine, session=session, max_time_ms=database.query_timeout_ms
        )
        now = utc_now()
        if record is not None and record["expires_at"] > now:
            return await _again(session, record, digest, find)
        if record is not None:  # MongoDB removes what expired only once a minute
            await records.delete_one({"_id": record["_id"]}, session=session)
        # First of all writes: of many at once, all but one collide here and start anew.
        await IdempotencyDocument(
            user_id=PydanticObjectId(user_id),
            operation=operation,
            key=key,
            input_sha256=digest,
            result_id=fresh.id,
            nonce=fresh.nonce,
            expires_at=now + timedelta(hours=settings.idempotency_hours),
        ).insert(session=session)
        return await make(session, fresh)

    return await database.transaction(work, turn=turn)


async def _again(session: AsyncClientSession, record: Row, digest: str, find: Find) -> Row:
    if record["input_sha256"] != digest:
        raise Refused(
            ErrorCode.CONFLICT,
            "The idempotency key was used with another input: use a new one.",
            "idempotencyKey",
        )
    found = await find(session, Attempt(record["result_id"], record["nonce"]))
    if found is None:
        raise Refused(
            ErrorCode.CONFLICT,
            "What this idempotency key made is no longer there: use a new one.",
            "idempotencyKey",
        )
    return found
