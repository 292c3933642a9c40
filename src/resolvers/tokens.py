"""API tokens: issue, create, revoke."""

import asyncio
import base64
import hmac
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.links import secret_key
from modelharbor.auth.tokens import PREFIX, make_secret, secret_hash, token_text
from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission, TokenDocument
from modelharbor.errors import ErrorCode, Refused
from modelharbor.settings import Settings

from .idempotency import Attempt, create_once
from .names import DISPLAY_NAME, bad, valid_comment, valid_label

log = logging.getLogger(__name__)
MOST_LIVE: Final = 100


def _live(user_id: ObjectId, now: datetime) -> Row:
    return {
        "user_id": user_id,
        "revoked_at": None,
        "$or": [{"expires_at": None}, {"expires_at": {"$gt": now}}],
    }


async def issue_token(
    database: Database,
    user_id: ObjectId,
    name: str,
    scopes: Sequence[Permission],
    expires_at: datetime | None = None,
    secret: str | None = None,
) -> tuple[TokenDocument, str]:
    """A token for anyone, as the operator at the command line may make it: the document and its text."""
    document, text = _token(PydanticObjectId(), user_id, name, scopes, expires_at, secret)
    await document.insert()
    return document, text


def _token(
    token_id: PydanticObjectId,
    user_id: ObjectId,
    name: str,
    scopes: Sequence[Permission],
    expires_at: datetime | None,
    secret: str | None,
) -> tuple[TokenDocument, str]:
    secret = secret or make_secret()
    document = TokenDocument(
        id=token_id,
        user_id=PydanticObjectId(user_id),
        name=name,
        prefix=f"{PREFIX}{token_id}",
        secret_sha256=secret_hash(secret),
        scopes=sorted(set(scopes), key=list(Permission).index),
        expires_at=expires_at,
    )
    return document, token_text(token_id, secret)


async def create_api_token(
    database: Database,
    viewer: Viewer,
    settings: Settings,
    *,
    name: str,
    scopes: Sequence[Permission],
    expires_at: datetime | None = None,
    idempotency_key: str | None = None,
) -> tuple[Row, str]:
    """A token of the viewer's own, with at most the scopes and the time of the one that was presented.

    Needs the scope ADMINISTER. Answers the stored row and the text, which is not stored: the same
    key derives it again.
    """
    user_id = viewer.person_id()
    _refuse_without_administer(viewer)
    name = valid_label(name, DISPLAY_NAME, "name")
    if not scopes:
        raise bad("A token needs at least one scope.", "scopes")
    beyond = sorted(scope.value for scope in set(scopes) - viewer.scopes)
    if beyond:
        raise Refused(
            ErrorCode.FORBIDDEN,
            f"Your token lacks {', '.join(beyond)}: a new one cannot have more scopes.",
            "scopes",
        )
    expires_at = _expiry(expires_at, viewer.expires_at)
    key = await asyncio.to_thread(secret_key, settings) if idempotency_key is not None else None

    def secret_of(attempt: Attempt) -> str:
        return _derived(key, attempt.nonce) if key is not None else make_secret()

    secret = ""

    async def make(session: AsyncClientSession, attempt: Attempt) -> Row:
        nonlocal secret
        # Two at once must not both count 99: the second collides here and starts anew.
        await database.data["actors"].update_one(
            {"_id": user_id}, {"$inc": {"turn": 1}}, session=session
        )
        live = await database.data["tokens"].count_documents(
            _live(user_id, utc_now()), session=session, maxTimeMS=database.query_timeout_ms
        )
        if live >= MOST_LIVE:
            raise Refused(
                ErrorCode.CONFLICT, f"You have {live} tokens: revoke one that you do not use."
            )
        secret = secret_of(attempt)
        document, _ = _token(attempt.id, user_id, name, scopes, expires_at, secret)
        await document.insert(session=session)
        row: Row = get_dict(document, to_db=True)
        return row

    async def find(session: AsyncClientSession, attempt: Attempt) -> Row | None:
        nonlocal secret
        secret = secret_of(attempt)
        # A secret that no longer fits the hash: the server's key was changed meanwhile.
        return await database.data["tokens"].find_one(
            {"_id": attempt.id, "revoked_at": None, "secret_sha256": secret_hash(secret)},
            session=session,
            max_time_ms=database.query_timeout_ms,
        )

    given: dict[str, Any] = {
        "name": name,
        "scopes": sorted(scope.value for scope in scopes),
        "expires_at": expires_at,
    }
    row = await create_once(
        database,
        settings,
        user_id=user_id,
        operation="createApiToken",
        key=idempotency_key,
        given=given,
        make=make,
        find=find,
    )
    return row, token_text(row["_id"], secret)


def _refuse_without_administer(viewer: Viewer) -> None:
    """Who has got hold of a lesser token can neither keep a way in nor shut its owner out."""
    if Permission.ADMINISTER not in viewer.scopes:
        raise Refused(
            ErrorCode.FORBIDDEN, "The token lacks the scope ADMINISTER: use one that has it."
        )


def _expiry(expires_at: datetime | None, latest: datetime | None) -> datetime | None:
    """When a new token expires: not after `latest`, where that is a time."""
    outlives = Refused(
        ErrorCode.FORBIDDEN,
        f"Your token expires at {latest}: a new one cannot be good for longer.",
        "expiresAt",
    )
    if expires_at is None:
        if latest is not None:
            raise outlives
        return None
    if expires_at.tzinfo is None:
        expires_at = expires_at.replace(tzinfo=UTC)
    expires_at = expires_at.astimezone(UTC)
    if expires_at <= utc_now():
        raise bad("The token would have expired already: give a time to come.", "expiresAt")
    expires_at = expires_at.replace(microsecond=expires_at.microsecond // 1000 * 1000)
    if latest is not None and expires_at > latest:
        raise outlives
    return expires_at


def _derived(key: bytes, nonce: str) -> str:
    """43 URL-safe base64 characters."""
    digest = hmac.new(key, f"api-token {nonce}".encode(), sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


async def revoke_api_token(
    database: Database, viewer: Viewer, *, token_id: ObjectId, comment: str | None = None
) -> ObjectId:
    """The comment goes to the log. Answers the id; again for a token that was revoked before.

    The presented one can always be revoked, any other needs the scope ADMINISTER. Other people's
    tokens: operators only.
    """
    user_id = viewer.person_id()
    if token_id != viewer.token_id:
        _refuse_without_administer(viewer)
    comment = valid_comment(comment)
    token = await database.data["tokens"].find_one(
        {"_id": token_id} if viewer.operates else {"_id": token_id, "user_id": user_id},
        max_time_ms=database.query_timeout_ms,
    )
    if token is None:
        raise Refused(ErrorCode.NOT_FOUND, "You have no such token.", "id")
    if await revoke_token(database, token_id):
        log.info("token.revoked token_id=%s by=%s comment=%r", token_id, user_id, comment)
    return token_id


async def revoke_token(database: Database, token_id: ObjectId) -> bool:
    """As the operator at the command line: False where there is no such token that is not revoked."""
    done = await database.data["tokens"].update_one(
        {"_id": token_id, "revoked_at": None}, {"$set": {"revoked_at": utc_now()}}
    )
    return done.modified_count == 1


async def list_tokens(database: Database, *, user_id: ObjectId, limit: int = 1000) -> list[Row]:
    """Newest first, without their hashes."""
    return (
        await database.data["tokens"]
        .find({"user_id": user_id}, {"secret_sha256": 0}, max_time_ms=database.query_timeout_ms)
        .sort("_id", -1)
        .to_list(limit)
    )
