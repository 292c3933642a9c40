"""This process's own ear on MongoDB's change stream: what has changed, and up to when that is all.

By commands of its own and not through PyMongo's change stream, because here whole answers count: what
one answer says, together with the time of its token, is all that has happened up to that time.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Protocol

from bson import Int64, Timestamp
from bson.codec_options import CodecOptions
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError

from modelharbor.db.base import Row
from modelharbor.db.cache import FOLLOWED
from modelharbor.db.connection import Database
from modelharbor.observability.logging import log_event

from .tags import is_apart, read_names

log = logging.getLogger(__name__)
WAIT_MS: Final = 200
"""How long MongoDB waits for a change before it says that there is none; a change is sent at once."""
ANSWER_SECONDS: Final = 3.0
"""Beyond that: an answer that takes longer will not come."""
BACK_SECONDS: Final = 60
"""How far back it begins, so that what other processes have kept before can be judged."""
BATCH: Final = 1000
BATCH_BYTES: Final = 4 * 1024 * 1024
"""Answers end at 16 MB, wherever that is. One that could not be told from such is taken for cut off."""
NOWHERE: Final = "$cmd.aggregate"  # the collection that MongoDB gives to cursors of a database
TURN: Final = 200  # changes, then others have their turn
PAUSE_SECONDS: Final = 0.25  # after a failure; longer each time
LONGEST_PAUSE_SECONDS: Final = 2.0
MOST_FAILURES: Final = 5  # at one place; then it is given up, and everything forgotten
# MongoDB's error codes: the place is gone, or can never be passed.
LOST: Final = frozenset({286, 280, 260, 10334})
ENDINGS: Final = ("dropDatabase", "invalidate")


class Listener(Protocol):
    """Who is told of it, in this order."""

    def changed(self, change: Row, time: int) -> None:
        """A change: `kind`, `coll`, `id`, `names`, `document`; see tags.py."""

    def reached(self, position: int, asked_at: float) -> None:
        """All that was changed up to `position` has been told, and all that was changed before
        `asked_at` (of the monotonic clock), 0: that cannot be said yet."""

    def lost(self, floor: int) -> None:
        """What was changed before `floor` was not all told, and will not be."""

    async def opened(self) -> None:
        """The stream begins anew."""

    def server(self) -> object:
        """By what the server is known that is read from; None: there is none."""


def pack(time: Timestamp) -> int:
    return time.time << 32 | time.inc


def unpack(time: int) -> Timestamp:
    return Timestamp(time >> 32, time & 0xFFFF_FFFF)


def pipeline() -> list[Row]:
    """As little of each change as `tags_of` reads."""
    followed = list(FOLLOWED)
    ours: Row = {"ns.coll": {"$in": followed}}
    return [
        {
            "$match": {
                "$or": [
                    ours,
                    {"operationType": "rename", "to.coll": {"$in": followed}},
                    {"operationType": {"$in": list(ENDINGS)}},
                ]
            }
        },
        {
            "$project": {
                "kind": "$operationType",
                "time": "$clusterTime",
                "coll": "$ns.coll",
                "id": "$documentKey._id",
                "names": {
                    "$concatArrays": [
                        _names("$updateDescription.updatedFields"),
                        {"$ifNull": ["$updateDescription.removedFields", []]},
                        {
                            "$map": {
                                "input": {"$ifNull": ["$updateDescription.truncatedArrays", []]},
                                "in": "$$this.field",
                            }
                        },
                    ]
                },
                "document": {
                    "$cond": [
                        {"$eq": [{"$type": "$fullDocument"}, "object"]},
                        {name: f"$fullDocument.{name}" for name in read_names()},
                        None,
                    ]
                },
            }
        },
        # That a token was used concerns nobody.
        {"$match": {"$nor": [{"coll": "tokens", "names": ["last_used_at"]}]}},
    ]


def _names(field: str) -> Row:
    return {"$map": {"input": {"$objectToArray": {"$ifNull": [field, {}]}}, "in": "$$this.k"}}


@dataclass(slots=True)
class _Held:
    """What an answer has told is whole only once all is told that was written while it was made."""

    until: int
    asked_at: float


class Following:
    """The stream of one process, from its beginning on through all failures. `run` never ends."""

    def __init__(self, database: Database, listener: Listener) -> None:
        plain: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=False)
        self._client = database.client
        self._data = database.data.with_options(codec_options=plain)
        self._listener = listener
        self._token: Row | None = None  # what was taken ends there
        self._from: int | None = None  # without a token: where it begins
        self._server: object = None
        self._is_sharded = False
        self._held: _Held | None = None
        self._failures = 0
        self.cursor = 0  # its id at MongoDB, in NOWHERE

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except (PyMongoError, TimeoutError, OSError) as error:
                self._failures += 1
                if _is_lost(error) or (
                    isinstance(error, OperationFailure) and self._failures >= MOST_FAILURES
                ):
                    log_event(log, logging.WARNING, "cache.history_lost", error=error)
                    self._begin_anew(None)
                elif self._failures == 1:
                    log_event(log, logging.WARNING, "cache.not_following", error=error)
            except Exception:
                # What it cannot take now it cannot take again.
                log.exception("cache.following_failed")
                self._failures += 1
                self._begin_anew(None)
            await asyncio.sleep(
                min(PAUSE_SECONDS * 2 ** min(self._failures - 1, 8), LONGEST_PAUSE_SECONDS)
                if self._failures
                else 0
            )

    def _begin_anew(self, start: int | None) -> None:
        self._token, self._from, self._held = None, start, None
        self._failures = min(self._failures, 1)

    async def _follow(self) -> None:
        """Until it fails, or the database is gone."""
        async with self._client.start_session(causal_consistency=False) as session:
            # What it tells is of this server: of another one, which may know less yet, it says nothing.
            told = await self._ask(session, {"hello": 1})
            self._server = self._listener.server()
            reply = await self._open(session, told)
            self._check_server()
            self.cursor, self._held = reply["cursor"]["id"], None
            while self.cursor:
                wait_ms = WAIT_MS if self._held is None else 1
                asked_at = monotonic()
                reply = await self._ask(
                    session,
                    {
                        "getMore": Int64(self.cursor),
                        "collection": NOWHERE,
                        "batchSize": BATCH,
                        "maxTimeMS": wait_ms,
                    },
                )
                if not await self._take(reply, asked_at):
                    return
                self.cursor, self._failures = reply["cursor"]["id"], 0
            raise AutoReconnect("the stream has ended")

    def _check_server(self) -> None:
        if self._server is None or self._listener.server() != self._server:
            raise AutoReconnect("there is another primary")

    async def _open(self, session: AsyncClientSession, told: Row) -> Row:
        if self._token is not None:
            return await self._aggregate(session, {"resumeAfter": self._token})
        self._is_sharded = told.get("msg") == "isdbgrid"
        now = pack(told["operationTime"])
        back = now - (BACK_SECONDS << 32)
        start, reply = max(back, self._from or 0), None
        if self._from is None:
            try:
                reply = await self._from_time(session, start)
            except OperationFailure as error:
                if not _is_lost(error):
                    raise
                start = now  # MongoDB does not know as much
        if reply is None:
            reply = await self._from_time(session, start)
        # All changes from `start` on will be told, so of the time just before it all is known.
        self._listener.lost(start - 1)
        async with asyncio.timeout(ANSWER_SECONDS):
            await self._listener.opened()
        return reply

    async def _from_time(self, session: AsyncClientSession, start: int) -> Row:
        return await self._aggregate(session, {"startAtOperationTime": unpack(start)})

    async def _aggregate(self, session: AsyncClientSession, start: Row) -> Row:
        return await self._ask(
            session,
            {
                "aggregate": 1,
                "pipeline": [
                    {"$changeStream": {"fullDocument": "updateLookup", **start}},
                    *pipeline(),
                ],
                "cursor": {"batchSize": 0},
                "readConcern": {"level": "majority"},
            },
        )

    async def _ask(self, session: AsyncClientSession, command: Row) -> Row:
        async with asyncio.timeout(ANSWER_SECONDS):
            reply: Row = await self._data.command(command, session=session)
            return reply

    async def _take(self, reply: Row, asked_at: float) -> bool:
        """Tell of all changes in an answer; False where the rest would be told again and again."""
        cursor = reply["cursor"]
        batch: list[Row] = cursor["nextBatch"]
        size, last, apart = 0, 0, 0
        for number, change in enumerate(batch, 1):
            last = pack(change["time"])
            if not self._tell(change, last):
                return False
            if not apart and is_apart(change):
                apart = last
            size += 400 + sum(map(len, change["names"]))
            principals = (change["document"] or {}).get("principals")
            if principals:
                size += sum(map(len, principals))
            if number % TURN == 0:
                await asyncio.sleep(0)
        self._check_server()
        token = cursor["postBatchResumeToken"]
        self._token = token
        position, is_whole = last, len(batch) < BATCH and size < BATCH_BYTES
        if is_whole:
            position = max(position, _time_of(token) or 0)
        if position and (not is_whole or self._is_sharded):
            # More of that time may follow: of the same commit, or of another shard.
            position -= 1
        self._reach(position, apart, pack(reply["operationTime"]), asked_at if is_whole else 0.0)
        return True

    def _reach(self, position: int, apart: int, now: int, asked_at: float) -> None:
        """`apart`: the time of the first change whose document was looked up, 0: there is none.

        That was looked up at some time before `now`, so it may be what a later change made of it, and
        by its values it is in other lists than it was. Until that change is told too, there are lists
        of which nobody has heard; after it, both together have told of all.
        """
        held = self._held
        if held is not None and position < held.until:
            if apart:
                held.until = max(held.until, now)
            held.asked_at = asked_at
            return
        if apart and position < now:
            self._held = _Held(now, asked_at)
            before = held.asked_at if held is not None else 0.0
            self._listener.reached(min(position, apart - 1), before)
        else:
            self._held = None
            self._listener.reached(position, asked_at)

    def _tell(self, change: Row, time: int) -> bool:
        kind = change["kind"]
        if kind in {"insert", "update", "replace", "delete"}:
            self._listener.changed(change, time)
            return True
        log_event(log, logging.WARNING, "cache.forgotten", kind=kind, collection=change.get("coll"))
        self._listener.lost(time)
        if kind in ENDINGS:
            # Behind it: the same word would come again and again.
            self._begin_anew(time + 1)
            return False
        return True


def _is_lost(error: Exception) -> bool:
    return isinstance(error, OperationFailure) and (
        error.code in LOST or error.has_error_label("NonResumableChangeStreamError")
    )


def _time_of(token: Any) -> int | None:
    """The time of a resume token. Not documented; without it a place where nothing happens stays
    where it is."""
    with suppress(TypeError, KeyError, ValueError):
        text = token["_data"]
        if text[:2] == "82":  # a timestamp follows
            return int(text[2:18], 16)
    return None
