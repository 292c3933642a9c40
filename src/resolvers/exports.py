"""Exports as jobs: put one, and who may have what came of it.

A result lies in the store in pieces, `exports/<job>/<number>-<token>`, each written before the job's
checkpoint names it. So what is not named there is of an attempt that broke off, and nobody's.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import orjson
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.requesters import requester_of
from modelharbor.auth.viewer import Viewer, job_principals
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import HELD, WAITING, JobKind, JobState
from modelharbor.errors import ErrorCode, Forbidden, Gone, NotFound, Refused
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.jobs.put import put_job
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore

from .names import valid_idempotency_key

EXPORTS: Final = "exports"  # below which all results lie
OPEN: Final = sorted(state.value for state in WAITING | HELD)
CHOSEN: Final = ("query", "variables", "format", "compression")
"""Of the input of a job: what was asked for. The rest is about how it was asked."""


async def put_export(
    database: Database,
    viewer: Viewer,
    settings: Settings,
    *,
    query: str,
    variables: dict[str, Any],
    format: ExportFormat,
    compression: Compression,
    base_url: str,
    idempotency_key: str | None = None,
) -> Row:
    """A job that writes the rows of a query, which can be exported, to a file. Needs READ: now, and
    again while the job runs. `base_url`: for addresses in the rows."""
    user_id = viewer.person_id()
    key = valid_idempotency_key(idempotency_key)
    if viewer.reads_as is None:
        raise Refused(ErrorCode.FORBIDDEN, "An export needs a token with the scope READ.")
    given = {
        "query": query,
        # As text: what is good JSON can hold names and numbers that BSON cannot.
        "variables": orjson.dumps(variables).decode(),
        "format": format.value,
        "compression": compression.value,
        "base_url": base_url,
    }
    stored_key = None if key is None else f"{user_id}:{key}"

    async def work(session: AsyncClientSession) -> Row:
        jobs = database.data["jobs"]
        same = {"kind": JobKind.EXPORT.value, "idempotency_key": stored_key}
        known = stored_key and await jobs.find_one(
            same, {"_id": 1}, session=session, max_time_ms=database.query_timeout_ms
        )
        if not known:
            await refuse_too_many_exports(database, session, user_id, settings.max_exports)
        job = await put_job(
            database,
            session,
            kind=JobKind.EXPORT,
            input=given,
            created_by_id=user_id,
            scopes=sorted(scope.value for scope in viewer.scopes),
            principals=job_principals(user_id),
            idempotency_key=stored_key,
        )
        if any(job["input"][name] != given[name] for name in CHOSEN):
            raise Refused(
                ErrorCode.CONFLICT,
                "The idempotency key was used with another input: use a new one.",
                "idempotencyKey",
            )
        return job

    return await database.transaction(work, turn=("exports", user_id))


async def refuse_too_many_exports(
    database: Database, session: AsyncClientSession, user_id: ObjectId, most: int
) -> None:
    """Within the transaction that makes one more of them wait."""
    # Two at once must not both count one too few: the second collides here and starts anew.
    await database.data["actors"].update_one(
        {"_id": user_id}, {"$inc": {"turn": 1}}, session=session
    )
    waiting = await database.data["jobs"].count_documents(
        {"kind": JobKind.EXPORT.value, "created_by_id": user_id, "state": {"$in": OPEN}},
        limit=most,
        session=session,
        maxTimeMS=database.query_timeout_ms,
    )
    if waiting >= most:
        raise Refused(
            ErrorCode.QUOTA_EXCEEDED,
            f"{most} exports of yours wait or run already: wait for one of them, or cancel one.",
        )


# What came of one --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    key: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """The file that an export has written."""

    name: str
    media_type: str
    size_bytes: int
    tag: str
    """Another one for other contents."""
    pieces: tuple[Piece, ...]
    """One after the other they are the file."""


def folder_of(job_id: ObjectId) -> str:
    return f"{EXPORTS}/{job_id}"


def piece_key(job_id: ObjectId, name: str) -> str:
    """`name` ends in `-` and the token of the claim under which it is written: no two attempts write
    the same."""
    return f"{folder_of(job_id)}/{name}"


def pieces_of(job_id: ObjectId, checkpoint: Row) -> tuple[Piece, ...]:
    """Those that a checkpoint names."""
    return tuple(Piece(piece_key(job_id, name), size) for name, size in checkpoint["pieces"])


async def result_of(
    database: Database, job_id: ObjectId, name: str, viewer: Viewer | None
) -> Result:
    """What an export has written, for who asked for it (as `viewer`, or by a link of theirs: None),
    with the rights that they had then. NotFound, Gone, Forbidden."""
    missing = NotFound("There is no such export, or the link to it is no longer good.")
    job = await database.data["jobs"].find_one(
        {"_id": job_id, "kind": JobKind.EXPORT.value}, max_time_ms=database.query_timeout_ms
    )
    if job is None or (viewer is not None and viewer.user_id != job["created_by_id"]):
        raise missing
    result, checkpoint = job["result"], job["checkpoint"]
    if job["state"] != JobState.SUCCEEDED.value or result["fileName"] != name:
        raise missing
    if checkpoint is None or datetime.fromisoformat(result["expiresAt"]) <= utc_now():
        raise Gone(f"The result was kept until {result['expiresAt']}: export it again.")
    requester = await requester_of(database, job)
    for who in (requester, requester if viewer is None else viewer):
        if who is None or not set(checkpoint["principals"]).issubset(who.principals):
            raise Forbidden(
                "Who asked for this export may not see any more what they might when it ran: export it again."
            )
    pieces = pieces_of(job_id, checkpoint)
    return Result(
        name=name,
        media_type=result["mediaType"],
        size_bytes=result["bytes"],
        tag=f"{job_id}-{job['token']}",
        pieces=pieces,
    )


async def read_result(
    storage: BlobStore, pieces: Sequence[Piece], start: int, end: int
) -> AsyncIterator[bytes]:
    """The bytes from `start` up to `end` (not included) of all pieces as one. NotStored, Unavailable:
    for the first piece before the first byte."""
    wanted = []
    at = 0
    for piece in pieces:
        first, last = max(start - at, 0), min(end - at, piece.size_bytes)
        if first < last:
            wanted.append((piece.key, first, last))
        at += piece.size_bytes
    if not wanted:
        return _parts(storage, [], None)
    return _parts(storage, wanted[1:], await storage.open_range(*wanted[0]))


async def _parts(
    storage: BlobStore, rest: list[tuple[str, int, int]], first: AsyncIterator[bytes] | None
) -> AsyncIterator[bytes]:
    if first is None:
        return
    async for part in first:
        yield part
    for key, start, end in rest:
        async for part in await storage.open_range(key, start, end):
            yield part


async def remove_pieces(
    storage: BlobStore, job_id: ObjectId, *, up_to: int, kept: Sequence[Piece] = ()
) -> int:
    """Of claims up to that token, but the ones that are kept; answers how many went."""
    keep = {piece.key for piece in kept}
    removed = 0
    async with aclosing(storage.listed(folder_of(job_id))) as keys:
        doomed = [key async for key in keys if key not in keep and _token(key) <= up_to]
    for key in doomed:
        await storage.delete(key)
        removed += 1
    await storage.remove_unfinished(folder_of(job_id), lambda name: _token(name) <= up_to)
    if not keep:
        await storage.remove_folder(folder_of(job_id))
    return removed


def _token(key: str) -> int:
    """Of whatever else lies there it is one that is long past."""
    digits = key.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else 0
