"""How bytes come in for one request: taken from the client, written, made durable, counted.

The body is read by the task of the request; all else is done by a task of its own, which nobody cancels:
whatever becomes of the client, what came is counted and the upload is let go.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.uploads import UploadState
from modelharbor.errors import (
    ChecksumMismatch,
    Conflict,
    Gone,
    HarborError,
    PayloadTooLarge,
    RequestTimeout,
    UploadPaused,
)
from modelharbor.settings import Settings
from modelharbor.storage.incoming import Hash, SegmentWriter

from .completing import NOT_HELD, TAKING_STATES, gone
from .telling import tell_of_upload

BLOCK: Final = 256 * 1024  # bytes that are worth a turn; the server hands over 64 KiB and less
MOST_WAITING: Final = 4 * BLOCK  # bytes that came and are not written: then the client waits
FLUSH_BYTES: Final = 2 * 1024 * 1024
# Written and not counted yet: then the store is waited for. What a client sends again after this process
# died is that, and what was on its way.
MOST_UNCOUNTED: Final = 6 * 1024 * 1024
FLUSH_SECONDS: Final = 0.5
RATE_SECONDS: Final = 5.0
RENEWALS: Final = 3  # in the time of a lease


@dataclass(frozen=True, slots=True)
class Checksum:
    """Of the bytes of one request."""

    algorithm: str  # "sha1" or "sha256"
    digest: bytes


def leased(settings: Settings) -> Row:
    """Stage of an update pipeline: held for the time of a lease, by the database's clock."""
    return {"held_until": _later(settings.upload_lease_seconds)}


def _later(seconds: float) -> Row:
    milliseconds = int(seconds * 1000)
    return {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": milliseconds}}


class Holding:
    """An upload that is claimed, as its holder knows it. What others did to it meanwhile is found out by
    the next write: it raises then, and `is_lost` where it is not ours to let go."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        row: Row,
        *,
        key: str,
        at: int,
        before: Sequence[Row],
    ) -> None:
        """`row` as it is since the claim. Bytes go into the segment `key` from byte `at` on, behind
        the segments `before`."""
        self.row, self.key, self.at = row, key, at
        self.recorded: int = row["received_bytes"]
        self.is_lost = False
        self.is_unused = False  # nothing has the segment, and nothing will
        # The store did not answer: what it was given last it may still put, after all that follows.
        self.is_doubtful = False
        # Or tried to be: the answer may have been lost, so only the database knows then.
        self.is_counted = False
        self._database, self._settings, self._before = database, settings, before
        self._is_checked = False
        self._samples = deque([(asyncio.get_running_loop().time(), self.recorded)])

    @property
    def size(self) -> int:
        size: int = self.row["size_bytes"]
        return size

    @property
    def is_useless(self) -> bool:
        """Whether the segment can be removed."""
        return self.is_unused or (self.at == 0 and not self.is_counted)

    def _received(self, written: int) -> int:
        return sum(int(each["size_bytes"]) for each in self._before) + written

    def uncounted(self, written: int) -> int:
        """Of so many bytes of the segment, how many would be lost now."""
        return self._received(written) - self.recorded

    def segments(self, written: int) -> list[Row]:
        """All segments, the last one with so many bytes: also with none, or the next holder would go on
        in one before it, which another that was taken over may still write."""
        last = [{"key": self.key, "size_bytes": written}] if written or self._before else []
        return [*self._before, *last]

    async def advance(
        self, written: int, *, state: UploadState | None = None, let_go: bool = False
    ) -> Row:
        """So many bytes of the segment are durable; the row then. Gone, Conflict, UploadPaused."""
        if not self._is_checked:
            await self._refuse_gone()
        received, self.is_counted = self._received(written), True
        told = self.row["part_of"] is None and self.row["state"] == UploadState.CREATED.value
        fields: Row = {
            "received_bytes": received,
            "segments": {"$literal": self.segments(written)},
            "rate": None if let_go else self._rate(received),
            "sequence": {"$add": ["$sequence", 1]},
            "updated_at": "$$NOW",
            "expires_at": _later(self._settings.upload_hours * 3600),
            "state": state.value if state else _begun(),
            **({**NOT_HELD} if let_go else leased(self._settings)),
        }
        if told:
            row = await self._database.transaction(lambda session: self._begin(session, fields))
        else:
            row = await self._update(None, fields)
        if row is None:
            raise await self.lost()
        came, self.recorded, self.row = received - self.recorded, received, row
        # With all of its bytes it is done, whoever wished it to wait: no client would send more.
        if row["state"] == UploadState.PAUSED.value and received < row["size_bytes"]:
            raise _paused()
        if row["part_of"] is not None and came:
            await self._add_to_whole(row["part_of"], came)
        return row

    async def _begin(self, session: AsyncClientSession, fields: Row) -> Row | None:
        row = await self._update(session, fields)
        if row is not None and row["state"] == UploadState.UPLOADING.value:
            await tell_of_upload(session, row)
        return row

    async def _update(self, session: AsyncClientSession | None, fields: Row) -> Row | None:
        row: Row | None = await self._database.data["uploads"].find_one_and_update(
            self._mine(),
            [{"$set": fields}],
            session=session,
            return_document=ReturnDocument.AFTER,
        )
        return row

    def _mine(self) -> Row:
        return {
            "_id": self.row["_id"],
            "token": self.row["token"],
            "state": {"$in": sorted(TAKING_STATES)},
        }

    def _rate(self, received: int) -> float | None:
        """Bytes in a second, of the last seconds."""
        now = asyncio.get_running_loop().time()
        self._samples.append((now, received))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_SECONDS:
            self._samples.popleft()
        then, before = self._samples[0]
        return round((received - before) / (now - then), 1) if now > then else None

    async def _add_to_whole(self, whole_id: ObjectId, came: int) -> None:
        """What comes of a part shows in the upload that it is a part of."""
        seconds: Row = {
            "$max": [
                0.001,
                {"$divide": [{"$subtract": ["$$NOW", "$updated_at"]}, 1000]},
            ]
        }
        weight = {"$divide": ["$$seconds", {"$add": ["$$seconds", RATE_SECONDS]}]}
        now = {"$divide": [came, "$$seconds"]}
        was: Row = {"$ifNull": ["$rate", now]}
        rate: Row = {
            "$let": {
                "vars": {"seconds": seconds},
                "in": {"$add": [was, {"$multiply": [{"$subtract": [now, was]}, weight]}]},
            }
        }
        fields: Row = {
            "received_bytes": {"$add": ["$received_bytes", came]},
            "rate": rate,
            "sequence": {"$add": ["$sequence", 1]},
            "updated_at": "$$NOW",
            "expires_at": _later(self._settings.upload_hours * 3600),
            "state": _begun(),
        }
        mine = {"_id": whole_id, "state": {"$in": sorted(TAKING_STATES)}}

        async def update(session: AsyncClientSession | None, state: Row) -> Row | None:
            row: Row | None = await self._database.data["uploads"].find_one_and_update(
                {**mine, **state},
                [{"$set": fields}],
                session=session,
                return_document=ReturnDocument.AFTER,
            )
            return row

        async def begin(session: AsyncClientSession) -> Row | None:
            row = await update(session, created)
            if row is not None:
                await tell_of_upload(session, row)
                return row
            return await update(session, {})  # another part began at the same moment

        created = {"state": UploadState.CREATED.value}
        row = await update(None, {"state": {"$in": sorted(TAKING_STATES - set(created.values()))}})
        if row is None:
            row = await self._database.transaction(begin)
        if row is None:
            raise Conflict("The upload that this is a part of takes no more bytes.")
        if row["state"] == UploadState.PAUSED.value:
            raise _paused()

    async def _refuse_gone(self) -> None:
        """Gone where nothing can come of these bytes any more."""
        refusal = await gone_of(self._database, self.row)
        if refusal is not None:
            raise refusal
        self._is_checked = True

    async def renew(self) -> None:
        """No bytes have come for a while, the client is there still."""
        row: Row | None = await self._database.data["uploads"].find_one_and_update(
            self._mine(),
            [{"$set": leased(self._settings)}],
            {"state": 1},
            return_document=ReturnDocument.AFTER,
        )
        if row is None:
            raise await self.lost()
        if row["state"] == UploadState.PAUSED.value:
            raise _paused()

    async def let_go(self) -> None:
        # Who finds a holder without a lease takes over: and begins another segment.
        free = {"held_until": None, "rate": None} if self.is_doubtful else NOT_HELD
        await self._database.data["uploads"].update_one(
            {"_id": self.row["_id"], "token": self.row["token"]}, {"$set": free}
        )

    async def lost(self) -> HarborError:
        self.is_lost = True
        row = await self._database.data["uploads"].find_one(
            {"_id": self.row["_id"]}, max_time_ms=self._database.query_timeout_ms
        )
        refusal = refusal_of(row)
        if refusal is not None:
            self.is_unused = True
            return refusal
        assert row is not None  # or it was refused
        if row["is_open"]:
            kept = {segment["key"] for segment in row["segments"]}
            message = "Another client has taken this upload over."
        else:
            blobs = await self._database.find(
                "blobs", {"sha256": row["sha256"]}, projection={"key": 1}
            )
            kept = {blob.get("key") for blob in blobs}
            message = "The upload is a file already."
        self.is_unused = self.key not in kept
        return Conflict(message)


def _begun() -> Row:
    """State of an upload that gets bytes: in an update pipeline."""
    created, uploading = UploadState.CREATED.value, UploadState.UPLOADING.value
    return {"$cond": [{"$eq": ["$state", created]}, uploading, "$state"]}


def _paused() -> UploadPaused:
    return UploadPaused("The upload was paused: send the rest when it is to go on.")


async def gone_of(database: Database, upload: Row) -> Gone | None:
    """Where the version or the model of an upload was deleted."""
    versions = await database.find(
        "versions", {"_id": upload["version_id"]}, projection={"status": 1}
    )
    models = await database.find("models", {"_id": upload["model_id"]}, projection={"state": 1})
    refusal = gone(next(iter(versions), None), next(iter(models), None))
    return None if refusal is None else Gone(refusal.message)


def refusal_of(upload: Row | None) -> Gone | None:
    """Where it has ended without a file."""
    if upload is None:
        return Gone("There is no such upload any more.")
    if upload["is_open"] or upload["state"] == UploadState.COMPLETED.value:
        return None
    error = upload["error"]
    message = error["message"] if error else "Create another one."
    return Gone(f"The upload is {upload['state']}. {message}")


class Intake:
    """Bytes of one request, between the client and the store. `left`: how many there may be."""

    def __init__(self, left: int, checksum: Checksum | None) -> None:
        self.left = left
        self.is_spoiled = False  # more bytes came than the file has
        self._checksum = checksum
        self._hash = None if checksum is None else hashlib.new(checksum.algorithm)
        self._pieces: list[bytes] = []
        self._waiting = 0  # bytes of the pieces
        self._came = 0
        self._since: float | None = None  # when the oldest byte that is not flushed came
        self._is_over = False
        self._arrived, self._room = asyncio.Event(), asyncio.Event()

    async def take(
        self, body: AsyncIterator[bytes], writing: "asyncio.Task[Row]", idle_seconds: float
    ) -> None:
        """Read the body until its end, or until what came cannot be written. Raises PayloadTooLarge,
        RequestTimeout, and what the body raises."""
        loop = asyncio.get_running_loop()

        def stop(_: object) -> None:
            self._room.set()
            with suppress(RuntimeError):  # it is over already
                deadline.reschedule(loop.time())

        try:
            async with asyncio.timeout(idle_seconds) as deadline:
                writing.add_done_callback(stop)
                async for piece in body:
                    if writing.done():
                        return
                    self._put(piece, loop.time())
                    if self._waiting >= MOST_WAITING:
                        deadline.reschedule(None)  # it is the client that waits
                        self._room.clear()
                        await self._room.wait()
                    deadline.reschedule(loop.time() + idle_seconds)
        except TimeoutError:
            if writing.done():
                return
            raise RequestTimeout(
                f"Nothing came for {idle_seconds:g} seconds; what came before is kept."
            ) from None
        finally:
            writing.remove_done_callback(stop)

    def _put(self, piece: bytes, now: float) -> None:
        self._came += len(piece)
        if self._came > self.left:
            self.is_spoiled = True
            raise PayloadTooLarge("These are more bytes than the upload has.")
        if self._since is None:
            self._since = now
        self._pieces.append(piece)
        self._waiting += len(piece)
        if self._waiting >= BLOCK or len(self._pieces) == 1:
            self._arrived.set()

    def end(self) -> None:
        """No more will come."""
        self._is_over = True
        self._arrived.set()

    async def write(self, writer: SegmentWriter, holding: Holding, lease_seconds: float) -> None:
        """Write what comes until its end, and count it meanwhile; the last of it is not flushed then.
        Raises what writer and holding raise, and ChecksumMismatch."""
        loop = asyncio.get_running_loop()
        beside: asyncio.Task[None] | None = None  # a flush, or a renewal
        flushed, renewed = writer.size, loop.time()
        try:
            while True:
                await self._wait(renewed + lease_seconds / RENEWALS, beside)
                if beside is not None and beside.done():
                    beside.result()
                    beside = None
                if (
                    beside is not None
                    and self._hash is None
                    and holding.uncounted(writer.size) >= MOST_UNCOUNTED
                ):
                    await asyncio.wait([beside])
                    continue
                now = loop.time()
                is_due = self._since is not None and now >= self._since + FLUSH_SECONDS
                if self._waiting and (self._waiting >= BLOCK or is_due or self._is_over):
                    await self._write_block(writer)
                elif self._is_over:
                    break
                if beside is not None:
                    continue
                unflushed = writer.size - flushed
                # The last byte is counted only when the request ends well.
                if (
                    self._hash is None
                    and (unflushed >= FLUSH_BYTES or (unflushed and is_due))
                    and self._came < self.left
                ):
                    flushed, renewed = writer.size, now
                    self._since = now if self._waiting else None
                    beside = asyncio.create_task(self._flush(writer, holding))
                elif now >= renewed + lease_seconds / RENEWALS:
                    renewed = now
                    beside = asyncio.create_task(holding.renew())
                if beside is not None:
                    beside.add_done_callback(lambda _: self._arrived.set())
        finally:
            if beside is not None:
                await asyncio.wait([beside])
        if beside is not None:
            beside.result()
        self._refuse_mismatch()

    def _refuse_mismatch(self) -> None:
        if self._hash is None or self._checksum is None:
            return
        if self._hash.digest() != self._checksum.digest:
            raise ChecksumMismatch(
                "The bytes of this request are not those of its checksum; none of them is kept."
            )

    async def _wait(self, until: float, beside: "asyncio.Task[None] | None") -> None:
        """For a block, the end, or the time when something is due: nothing is, before `beside` has ended."""
        if self._waiting >= BLOCK or self._is_over or (beside is not None and beside.done()):
            return
        self._arrived.clear()
        if beside is not None:
            await self._arrived.wait()
            return
        # Once the last byte has come, only the end of the request is waited for.
        if self._since is not None and self._hash is None and self._came < self.left:
            until = min(until, self._since + FLUSH_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._arrived.wait()

    async def _write_block(self, writer: SegmentWriter) -> None:
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        self._room.set()
        if self._hash is not None:
            await asyncio.to_thread(_update, self._hash, pieces)
        for piece in pieces:
            await writer.write(piece)

    async def _flush(self, writer: SegmentWriter, holding: Holding) -> None:
        await holding.advance(await writer.flush())


def _update(hasher: Hash, pieces: Sequence[bytes]) -> None:
    for piece in pieces:
        hasher.update(piece)
