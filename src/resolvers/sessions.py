"""Who holds a token, kept until something in that changes: the token, the person, or where they belong.

Of the secret only the hash is kept; it is compared each time, and so is the time of expiry. What is
wrong with a token is never kept.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC
from time import time
from typing import Final

import bson
from bson import ObjectId
from bson.codec_options import CodecOptions
from bson.errors import BSONError

from modelharbor.auth.tokens import (
    REFUSED,
    USED_EVERY,
    Credentials,
    credentials_of,
    has_secret,
    note_use,
    presented,
    read_tokens,
    viewer_of,
)
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.cache.answers import Judge
from modelharbor.cache.entries import Access, Entry
from modelharbor.cache.memory import Memory
from modelharbor.cache.shared import Shared
from modelharbor.cache.tags import Tag, below, entity, gone
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.errors import Unauthenticated, Unavailable
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.observability.metrics import CacheCount, Metrics

log = logging.getLogger(__name__)
MEMORY_BYTES: Final = 16 * 1_048_576
KEPT_SECONDS: Final = 300.0  # then a token is read again, whatever is known of changes
TOKENS_AT_ONCE: Final = 500
SESSION_BYTES: Final = 1_200  # beside what grows with the row; measured in test_sessions.py
ROW_FACTOR: Final = 3  # bytes in memory for one of the row in BSON
_ROWS: Final = CodecOptions[Row](tz_aware=False)  # as they are read


class _Known:
    """A token as it was read. `position` and `version`: as of the last look at what has changed."""

    __slots__ = ("expires", "note_at", "position", "secret", "tags", "until", "version", "viewer")

    def __init__(self, row: Row, viewer: Viewer, entry: Entry, version: int) -> None:
        self.secret: str = row["secret_sha256"]
        self.viewer, self.tags = viewer, entry.tags
        self.position, self.version = entry.position, version
        self.until = entry.made_at + entry.max_age
        self.expires = viewer.expires_at.timestamp() if viewer.expires_at else float("inf")
        used_at = row["last_used_at"]
        self.note_at = (used_at.replace(tzinfo=UTC) + USED_EVERY).timestamp() if used_at else 0.0


@dataclass(slots=True, eq=False)
class _Batch:
    """Tokens that are read together, for all who asked before the read began."""

    answer: "asyncio.Future[dict[ObjectId, _Known | Exception]]"
    ids: set[ObjectId] = field(default_factory=set)
    counts: list[CommandCount] = field(default_factory=list)


class Sessions:
    """Of one process."""

    def __init__(
        self,
        database: Database,
        freshness: Judge,
        shared: Shared | None,
        count: CacheCount | None = None,
    ) -> None:
        """`shared` None: this process keeps for itself alone."""
        self.count = count or CacheCount("sessions")
        self._database, self._freshness, self._shared = database, freshness, shared
        self._memory: Memory[_Known] = Memory(MEMORY_BYTES)
        self._batches: list[_Batch] = []
        self._reading: asyncio.Task[None] | None = None
        self.count.sizes = lambda: (len(self._memory), self._memory.size)

    async def viewer(self, authorization: str | None, usable: bool) -> Viewer:
        """The viewer behind an `Authorization` header; without one, nobody. Raises Unauthenticated.

        `usable`: what is kept may be used, for this process knows all changes (`Freshness.ready`).
        """
        if authorization is None:
            return ANONYMOUS
        token = presented(authorization)
        if usable:
            known = self._in_memory(token.id) or await self._in_redis(token.id)
            if known is not None:
                self.count.hits += 1
                return self._used(known, token)
        self.count.misses += 1
        found = await self._read(token.id)
        if isinstance(found, Exception):
            raise found
        return self._used(found, token)

    def known(self, authorization: str | None) -> Viewer | None:
        """Who held the token when it was last read: for what a moment's delay does not matter to."""
        token = credentials_of(authorization) if authorization is not None else None
        known = self._memory.get(token.id.binary) if token is not None else None
        if token is None or known is None or not has_secret(known.secret, token):
            return None
        return known.viewer if time() < known.expires else None

    async def close(self) -> None:
        if self._reading is not None:
            await ended(self._reading)

    def _used(self, known: _Known | None, token: Credentials) -> Viewer:
        same = has_secret(known.secret if known is not None else None, token)
        if known is None or not same or time() >= known.expires:
            raise Unauthenticated(REFUSED)
        if time() >= known.note_at:
            known.note_at = time() + USED_EVERY.total_seconds()
            note_use(self._database, token.id)
        return known.viewer

    def _in_memory(self, token_id: ObjectId) -> _Known | None:
        known = self._memory.get(token_id.binary)
        if known is None:
            return None
        freshness = self._freshness
        if known.version != freshness.version:
            if not freshness.is_current(known.position, known.tags):
                self.count.invalidations += 1
                self._memory.drop(token_id.binary)
                return None
            known.version = freshness.version
        known.position = max(known.position, freshness.position)
        if time() >= known.until:
            self._memory.drop(token_id.binary)
            return None
        return known

    async def _in_redis(self, token_id: ObjectId) -> _Known | None:
        if self._shared is None:
            return None
        name = self._name(self._shared, token_id)
        entry = (await self._shared.look([name], None, self.count)).entry
        if entry is None or time() >= entry.made_at + entry.max_age:
            return None
        if not self._freshness.is_current(entry.position, entry.tags):
            self.count.invalidations += 1
            return None
        try:
            row = bson.decode(entry.body, _ROWS)
        except BSONError:
            log.warning("sessions.not_understood token_id=%s", token_id)
            return None
        known = self._understood(row, entry)
        if known is not None:
            self._hold(token_id, known, entry)
        return known

    def _understood(self, row: Row, entry: Entry) -> _Known | None:
        """None where the token is no longer good."""
        viewer = viewer_of(row)
        if viewer is None:
            return None
        known = _Known(row, viewer, entry, self._freshness.version)
        before = self._memory.get(row["_id"].binary)
        if before is not None:
            known.note_at = max(known.note_at, before.note_at)
        return known

    def _hold(self, token_id: ObjectId, known: _Known, entry: Entry) -> None:
        """In memory."""
        size = SESSION_BYTES + ROW_FACTOR * len(entry.body)
        self._memory.put(token_id.binary, known, size)

    def _name(self, shared: Shared, token_id: ObjectId) -> str:
        return f"{shared.prefix}:session:{shared.seal.name(b'session' + token_id.binary)}"

    async def _read(self, token_id: ObjectId) -> _Known | Exception | None:
        """From MongoDB, by a read that begins after this call: many who come at once read together."""
        if not self._batches or len(self._batches[-1].ids) >= TOKENS_AT_ONCE:
            self._batches.append(_Batch(asyncio.get_running_loop().create_future()))
        batch = self._batches[-1]
        batch.ids.add(token_id)
        count = counted.get()
        if count is not None:
            batch.counts.append(count)
        if self._reading is None:
            # In a context of its own: it reads for many operations.
            self._reading = asyncio.get_running_loop().create_task(
                self._read_all(), context=Context()
            )
        return (await asyncio.shield(batch.answer)).get(token_id)

    async def _read_all(self) -> None:
        """One read after the other, as long as somebody waits."""
        batch: _Batch | None = None
        try:
            while self._batches:
                batch = self._batches.pop(0)
                try:
                    rows = await self._read_batch(batch)
                except Exception as error:
                    batch.answer.set_exception(error)
                    batch.answer.exception()  # looked at, for all who asked may have gone
                else:
                    batch.answer.set_result(rows)
        finally:
            self._reading = None
            for left in (*([batch] if batch else []), *self._batches):
                if not left.answer.done():
                    left.answer.set_exception(Unavailable("The server is ending."))
                    left.answer.exception()
            self._batches.clear()

    async def _read_batch(self, batch: _Batch) -> "dict[ObjectId, _Known | Exception]":
        count = CommandCount()
        counted.set(count)
        position = self._freshness.position
        try:
            rows = await read_tokens(self._database, list(batch.ids))
        finally:
            for each in batch.counts:
                each.add(count)
        found: dict[ObjectId, _Known | Exception] = {}
        for token_id, row in rows.items():
            try:
                known = self._keep(row, position)
            except (
                Exception
            ) as error:  # what a later version wrote; the others are read all the same
                log.warning("sessions.not_understood token_id=%s error=%r", token_id, error)
                found[token_id] = error
            else:
                if known is not None:
                    found[token_id] = known
        return found

    def _keep(self, row: Row, position: int) -> _Known | None:
        entry = _entry_of(row, bson.encode(row), position)
        known = self._understood(row, entry)
        if known is None:
            return None
        if self._freshness.is_current(position, entry.tags):
            self._hold(row["_id"], known, entry)
            if self._shared is not None:
                self._shared.put(self._name(self._shared, row["_id"]), entry)
        elif self._memory.get(row["_id"].binary) is None:
            # For `known` alone: it is judged before it is used, and will not be found current.
            known.version = -1
            self._hold(row["_id"], known, entry)
        return known


def _entry_of(row: Row, body: bytes, position: int) -> Entry:
    return Entry(
        body=body,
        position=position,
        tags=_tags(row),
        access=Access.VIEWER,
        made_at=time(),
        max_age=KEPT_SECONDS,
        is_private=True,
    )


def _tags(row: Row) -> tuple[Tag, ...]:
    """Of the token, the person, and where they belong: a membership that goes says no more than its id."""
    user_id = row["user_id"]
    return (
        entity("tokens", row["_id"]),
        entity("actors", user_id),
        below("memberships", "user_id", user_id),
        *(entity("memberships", each["_id"]) for each in row["memberships"]),
        gone("memberships"),
    )


@asynccontextmanager
async def open_sessions(
    database: Database, freshness: Judge, shared: Shared | None, metrics: Metrics
) -> AsyncIterator[Sessions]:
    sessions = Sessions(database, freshness, shared, metrics.sessions)
    try:
        yield sessions
    finally:
        await sessions.close()
