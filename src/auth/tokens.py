"""API tokens: their text, and who presents one.

Text: `mh_`, the id in 24 hexadecimal digits, 43 URL-safe base64 characters of 32 random bytes.
"""

import asyncio
import hmac
import logging
import re
import secrets
from collections.abc import Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final, NamedTuple

from bson import ObjectId
from pymongo.errors import PyMongoError

from modelharbor.db.actors import Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unauthenticated

from .viewer import ANONYMOUS, Viewer

log = logging.getLogger(__name__)
PREFIX: Final = "mh_"
TOKEN: Final = re.compile(r"mh_([0-9a-f]{24})([A-Za-z0-9_-]{43})")
LONGEST_HEADER: Final = 256
USED_EVERY: Final = timedelta(minutes=1)
REFUSED: Final = "The token is not valid: send `Authorization: Bearer mh_…` with a token that was not revoked and has not expired."
NO_HASH: Final = "0" * 64  # what an unknown id is compared with: it costs what a known one costs
_notes: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks only weakly


def make_secret() -> str:
    return secrets.token_urlsafe(32)


def token_text(token_id: ObjectId, secret: str) -> str:
    return f"{PREFIX}{token_id}{secret}"


def secret_hash(secret: str) -> str:
    """What is stored of a secret. It has 256 random bits, so a slow hash would add nothing."""
    return sha256(secret.encode()).hexdigest()


async def authenticate(database: Database, authorization: str | None) -> Viewer:
    """The viewer behind an `Authorization` header; without one, nobody.

    Raises Unauthenticated, with one message whatever is wrong with the token.
    """
    if authorization is None:
        return ANONYMOUS
    token = presented(authorization)
    row = (await read_tokens(database, [token.id])).get(token.id)
    same = has_secret(row["secret_sha256"] if row else None, token)
    viewer = viewer_of(row) if row is not None and same else None
    if row is None or viewer is None:
        raise Unauthenticated(REFUSED)
    if is_use_due(row):
        note_use(database, token.id)
    return viewer


def presented(authorization: str) -> "Credentials":
    """Raises Unauthenticated for anything that is no token of ours."""
    token = credentials_of(authorization)
    if token is None:
        raise Unauthenticated(REFUSED)
    return token


def has_secret(stored: str | None, token: "Credentials") -> bool:
    """Whether a stored hash is that of what was presented; takes as long when nothing is stored."""
    same = hmac.compare_digest(stored or NO_HASH, secret_hash(token.secret))
    return same and stored is not None


def is_use_due(row: Row) -> bool:
    """Whether the use of a token is to be noted: its last one was a while ago."""
    last_used_at = _in_utc(row["last_used_at"])
    return last_used_at is None or last_used_at <= utc_now() - USED_EVERY


def note_use(database: Database, token_id: ObjectId) -> None:
    """Nobody waits for it. In a context of its own: the operation's count of commands does not see it."""
    note = asyncio.create_task(_note_use(database, token_id), context=Context())
    _notes.add(note)
    note.add_done_callback(_notes.discard)


def viewer_of(row: Row) -> Viewer | None:
    """Who holds a token (as `read_tokens` answers it) now; None where it is no longer good."""
    expires_at = _in_utc(row["expires_at"])
    if row["revoked_at"] is not None or not row["user"]:
        return None
    if expires_at is not None and expires_at <= utc_now():
        return None
    return Viewer(
        user=row["user"][0],
        roles={entry["organization_id"]: Role(entry["role"]) for entry in row["memberships"]},
        scopes=frozenset(map(Permission, row["scopes"])),
        token_id=row["_id"],
        expires_at=expires_at,
    )


def _in_utc(moment: datetime | None) -> datetime | None:
    return moment and moment.replace(tzinfo=UTC)


async def finish_notes() -> None:
    """Wait until every use of a token that was seen is noted: before the database is closed."""
    await asyncio.gather(*_notes)


class Credentials(NamedTuple):
    id: ObjectId
    secret: str


def credentials_of(authorization: str) -> Credentials | None:
    """What an `Authorization` header says; None for anything that is no token of ours."""
    scheme, _, text = authorization[:LONGEST_HEADER].partition(" ")
    found = TOKEN.fullmatch(text.strip(" ")) if scheme.lower() == "bearer" else None
    return Credentials(ObjectId(found[1]), found[2]) if found else None


async def read_tokens(database: Database, token_ids: Sequence[ObjectId]) -> dict[ObjectId, Row]:
    """Tokens with their `user` and `memberships`, in one command."""
    rows = await database.aggregate(
        "tokens",
        [
            {"$match": {"_id": {"$in": list(token_ids)}}},
            {
                "$lookup": {
                    "from": "actors",
                    "localField": "user_id",
                    "foreignField": "_id",
                    "as": "user",
                }
            },
            {
                "$lookup": {
                    "from": "memberships",
                    "localField": "user_id",
                    "foreignField": "user_id",
                    "as": "memberships",
                }
            },
        ],
    )
    return {row["_id"]: row for row in rows}


async def _note_use(database: Database, token_id: ObjectId) -> None:
    now = utc_now()
    try:
        await database.data["tokens"].update_one(
            {
                "_id": token_id,
                "$or": [{"last_used_at": None}, {"last_used_at": {"$lte": now - USED_EVERY}}],
            },
            {"$set": {"last_used_at": now}},
        )
    except PyMongoError as error:
        log.warning("token.use_not_noted token_id=%s error=%s", token_id, error)
