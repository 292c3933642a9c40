"""Bytes of uploads come in: by one who holds the upload at a time, counted only once they are durable.

Who is to receive claims the upload: compare-and-set on its offset, which raises `token`. All that the
holder writes to its row says that token, so one that stood still and was taken over writes nothing any
more. One that is taken over by its lease may still write bytes, so who takes over begins a new segment;
who finds it let go goes on in the last one.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Final
from uuid import uuid4

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import Segment, UploadDocument, UploadState
from modelharbor.errors import (
    BadRequest,
    ChecksumMismatch,
    Conflict,
    ErrorCode,
    Forbidden,
    Gone,
    HarborError,
    Locked,
    NotFound,
    NotStored,
    PayloadTooLarge,
    Refused,
    Unavailable,
)
from modelharbor.jobs.put import put_job
from modelharbor.jobs.waking import wake
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore
from modelharbor.storage.incoming import INCOMING

from .completing import (
    NOT_HELD,
    TAKING_STATES,
    VERIFY_ATTEMPTS,
    Arrived,
    Completions,
    discard,
    fail,
    version_subject,
)
from .intake import Checksum, Holding, Intake, gone_of, leased, refusal_of
from .telling import tell_of_upload
from .uploads import abort_upload, is_theirs

__all__ = ["Checksum", "Receiver"]

log = logging.getLogger(__name__)
HASHES: Final = 4096  # of uploads that are under way; each is some hundred bytes
MOST_PARTS: Final = 1000  # of one upload, ever
CLAIMABLE_STATES: Final = [UploadState.CREATED.value, UploadState.UPLOADING.value]


class _Spoiled(Exception):
    """More bytes came than the upload has: whoever reads them says so."""


class Receiver:
    """Of one process. What an upload has in memory is its running hash: as long as all its bytes come
    to the same process in order, they need not be read again."""

    def __init__(
        self, database: Database, settings: Settings, storage: BlobStore, cache: Cache
    ) -> None:
        self._database, self._settings = database, settings
        self._storage, self._cache = storage, cache
        self._name = uuid4().hex
        self._hashes: OrderedDict[ObjectId, tuple[int, hashlib._Hash]] = OrderedDict()
        self._completions = Completions(database, storage)

    async def close(self) -> None:
        """Wait for what is being written."""
        await self._completions.close()

    async def status(self, viewer: Viewer, upload_id: ObjectId) -> Row:
        """The upload, or part of one, for who may send its bytes. NotFound, Gone."""
        row = await self._row(viewer, upload_id)
        refusal = refusal_of(row)
        if refusal is None and row["is_open"]:
            refusal = await gone_of(self._database, row)
        if refusal is not None:
            raise refusal
        return row

    async def _row(self, viewer: Viewer, upload_id: ObjectId) -> Row:
        viewer.person_id()
        row: Row | None = await self._database.data["uploads"].find_one(
            {"_id": upload_id}, max_time_ms=self._database.query_timeout_ms
        )
        if row is None or not await is_theirs(self._database, None, viewer, row):
            raise _unknown()
        return row

    # Bytes --------------------------------------------------------------------------------------

    async def receive(
        self,
        viewer: Viewer,
        upload_id: ObjectId,
        offset: int,
        body: AsyncIterator[bytes],
        *,
        checksum: Checksum | None = None,
        length: int | None = None,
    ) -> Row:
        """Take bytes from `offset` on; the upload then: COMPLETED with the last of them, or RECEIVED.

        `length`: of the body, where it is known; too many are refused before any of them is read.
        With a checksum all of them are kept, or none. Whatever becomes of the body, or of this task,
        what came of it is kept, and the upload can be gone on with at once.
        NotFound, Gone, Conflict, Locked, ChecksumMismatch, PayloadTooLarge, RequestTimeout, Forbidden,
        UploadPaused, InsufficientStorage, Unavailable.
        """
        holding = await self._claim(viewer, upload_id, offset)
        if not isinstance(holding, Holding):
            if length:
                raise _too_many(holding)
            return holding
        if length is not None and length > holding.size - offset:
            await self._let_go(holding)
            raise _too_many(holding.row)
        # Of no bytes nothing is written: no object comes of it.
        intake = Intake(0 if length == 0 else holding.size - offset, checksum)
        writing = asyncio.create_task(self._write(viewer, holding, intake))
        failure: BaseException | None = None
        try:
            await intake.take(body, writing, self._settings.upload_idle_seconds)
        except BaseException as error:  # a cancel too: what came is kept before it goes on
            failure = error
        intake.end()
        while not writing.done():
            try:
                await asyncio.wait([writing])
            except asyncio.CancelledError as error:
                failure = error
        refusal = writing.exception()
        if failure is not None:
            if refusal is not None and not isinstance(refusal, _Spoiled):
                log.warning("upload.broken upload_id=%s", upload_id, exc_info=refusal)
            raise failure
        if refusal is not None:
            raise refusal
        return writing.result()

    async def _write(self, viewer: Viewer, holding: Holding, intake: Intake) -> Row:
        """All that becomes of the bytes. It is let go at the end, whatever happens."""
        upload_id, offset = holding.row["_id"], holding.recorded
        hasher = self._hash(upload_id, offset)
        before = None if hasher is None else hasher.copy()
        try:
            written = holding.at
            if intake.left:
                async with self._storage.incoming.writer(holding.key, holding.at, hasher) as writer:
                    await intake.write(writer, holding, self._settings.upload_lease_seconds)
                    if not intake.is_spoiled:
                        written = await writer.flush()
            if intake.is_spoiled:
                raise _Spoiled
            if offset + written - holding.at == holding.size:
                return await self._finish(viewer, holding, written, hasher)
            row = await holding.advance(written, let_go=True)
        except NotStored:
            raise await self._lost(holding) from None
        except BaseException as error:
            if before is not None and holding.recorded == offset:
                self._keep_hash(upload_id, offset, before)
            holding.is_doubtful = isinstance(error, Unavailable)
            await self._let_go(holding)
            raise
        if hasher is not None:
            self._keep_hash(upload_id, row["received_bytes"], hasher)
        return row

    async def _let_go(self, holding: Holding) -> None:
        try:
            if not holding.is_lost:
                await holding.let_go()
        except PyMongoError:  # its lease runs out then
            log.warning("upload.held upload_id=%s", holding.row["_id"], exc_info=True)
        if holding.is_useless:
            await discard(self._storage, [holding.key])

    async def _lost(self, holding: Holding) -> HarborError:
        """Bytes that were counted are not there: somebody else removed them from the store."""
        message = "Bytes of this upload were lost by the file storage: send it anew."
        log.error("upload.lost upload_id=%s", holding.row["_id"])
        if holding.row["part_of"] is None:
            await fail(self._database, self._storage, holding.row, ErrorCode.NOT_STORED, message)
        else:
            await self._let_go(holding)
        return Gone(message)

    async def _finish(
        self, viewer: Viewer, holding: Holding, written: int, hasher: "hashlib._Hash | None"
    ) -> Row:
        """All bytes are here."""
        if holding.row["part_of"] is not None:
            return await holding.advance(written, state=UploadState.RECEIVED, let_go=True)
        segments = holding.segments(written)
        key = self._storage.incoming.final_key([Segment(**each) for each in segments])
        holding.is_counted = True
        if hasher is None or key is None:
            return await self._leave_to_job(holding, segments)
        upload = {**holding.row, "segments": segments}
        arrived = Arrived(upload, hasher.hexdigest(), key, viewer)
        try:
            row = await self._completions.complete(arrived)
        except (Refused, HarborError, PyMongoError) as error:
            # Who asks is told that all bytes are here, and sends nothing more: a job completes it.
            log.warning("upload.completes_later upload_id=%s reason=%s", holding.row["_id"], error)
            return await self._leave_to_job(holding, segments)
        if not row["is_open"] and row["error"] is not None:
            await holding.lost()
            raise _failure(row)
        if row["token"] != upload["token"] or row["sha256"] != arrived.digest or row["is_open"]:
            raise await holding.lost()  # it is another's by now, or others have ended it
        if row["job_id"] is not None:
            await wake(self._cache)
        return row

    async def _leave_to_job(self, holding: Holding, segments: Sequence[Row]) -> Row:
        """RECEIVED, with the job that verifies it."""

        async def work(session: AsyncClientSession) -> Row | None:
            return await self._receive_in(session, holding.row, segments)

        row = await self._database.transaction(work)
        if row is None:
            raise await holding.lost()
        await wake(self._cache)
        return row

    async def _receive_in(
        self,
        session: AsyncClientSession,
        upload: Row,
        segments: Sequence[Row],
        joined_ids: Sequence[ObjectId] = (),
    ) -> Row | None:
        mine = {
            "_id": upload["_id"],
            "token": upload["token"],
            "state": {"$in": sorted(TAKING_STATES)},
        }
        uploads = self._database.data["uploads"]
        if await uploads.find_one(mine, {"_id": 1}, session=session) is None:
            return None
        job = await put_job(
            self._database,
            session,
            kind=JobKind.VERIFY_FILE,
            input={"upload_id": upload["_id"], "version_id": upload["version_id"]},
            created_by_id=upload["created_by_id"],
            principals=upload["principals"],
            subject=version_subject(upload),
            max_attempts=VERIFY_ATTEMPTS,
        )
        row: Row | None = await uploads.find_one_and_update(
            mine,
            {
                "$set": {
                    "state": UploadState.RECEIVED.value,
                    "received_bytes": upload["size_bytes"],
                    "segments": list(segments),
                    "joined_ids": list(joined_ids),
                    "job_id": job["_id"],
                    "updated_at": utc_now(),
                    **NOT_HELD,
                },
                "$inc": {"sequence": 1},
            },
            session=session,
            return_document=ReturnDocument.AFTER,
        )
        assert row is not None  # read in this transaction
        await tell_of_upload(session, row)
        return row

    # Who holds it -------------------------------------------------------------------------------

    async def _claim(self, viewer: Viewer, upload_id: ObjectId, offset: int) -> Holding | Row:
        """Hold the upload; or the upload itself, where it has all its bytes."""
        user_id = viewer.person_id()
        if Permission.WRITE in viewer.scopes:  # most of all clients: one command
            row = await self._take({"_id": upload_id, "created_by_id": user_id}, offset)
            if row is not None:
                return await self._held(row)
        row = await self.status(viewer, upload_id)
        if row["state"] == UploadState.PAUSED.value:
            row = await self._resume(row, offset)
        elif row["state"] not in TAKING_STATES:
            if row["joined_ids"]:
                raise Forbidden("This upload was put together of parts: it takes no bytes itself.")
            if offset != row["size_bytes"]:
                raise _elsewhere(row)
            return row
        else:
            row = await self._take({"_id": upload_id}, offset)
        if row is not None:
            return await self._held(row)
        row = await self.status(viewer, upload_id)
        if row["part_count"]:
            raise Conflict("This upload is sent in parts: join them.")
        if row["received_bytes"] != offset:
            raise _elsewhere(row)
        raise Locked("Another client sends bytes of this upload just now.")

    async def _take(
        self, query: Row, offset: int, session: AsyncClientSession | None = None
    ) -> Row | None:
        """The upload as it was before it was claimed; None where it cannot be."""
        paused = {} if session is None else {"state": UploadState.UPLOADING.value}
        states = CLAIMABLE_STATES if session is None else [UploadState.PAUSED.value]
        row: Row | None = await self._database.data["uploads"].find_one_and_update(
            {
                **query,
                "state": {"$in": states},
                "received_bytes": offset,
                "part_count": 0,
                "$or": [{"holder": None}, {"$expr": {"$lt": ["$held_until", "$$NOW"]}}],
            },
            [
                {
                    "$set": {
                        "token": {"$add": ["$token", 1]},
                        "holder": self._name,
                        "segments": _ended_segments(),
                        **leased(self._settings),
                        **paused,
                    }
                }
            ],
            session=session,
            return_document=ReturnDocument.BEFORE,
        )
        return row

    async def _resume(self, paused: Row, offset: int) -> Row | None:
        """Claim one that was paused: it goes on."""

        async def work(session: AsyncClientSession) -> Row | None:
            before = await self._take({"_id": paused["_id"]}, offset, session)
            if before is None:
                return None
            after: Row | None = await self._database.data["uploads"].find_one_and_update(
                {"_id": paused["_id"]},
                {"$inc": {"sequence": 1}, "$set": {"updated_at": utc_now()}},
                session=session,
                return_document=ReturnDocument.AFTER,
            )
            assert after is not None  # written in this transaction
            await tell_of_upload(session, after)
            return {**after, "token": before["token"], "holder": before["holder"]}

        return await self._database.transaction(work)

    async def _held(self, before: Row) -> Holding:
        row = {**before, "token": before["token"] + 1}
        segments: list[Row] = before["segments"]
        if segments and segments[-1]["size_bytes"] and before["holder"] is None:
            *earlier, last = segments
            key, at = last["key"], last["size_bytes"]
        else:
            earlier = [segment for segment in segments if segment["size_bytes"]]
            key, at = f"{INCOMING}/{row['_id']}/{row['token']}", 0
        holding = Holding(self._database, self._settings, row, key=key, at=at, before=earlier)
        if row["part_of"] is not None:
            try:
                await self._refuse_part(row)
            except BaseException:
                await self._let_go(holding)
                raise
        return holding

    async def _refuse_part(self, part: Row) -> None:
        """A part takes bytes as long as the whole does. One that was paused goes on."""
        whole = await self._whole(part["part_of"])
        if whole["state"] == UploadState.PAUSED.value:
            await self._database.transaction(lambda session: self._go_on(session, whole))
        elif whole["state"] not in TAKING_STATES:
            raise Conflict("The upload that this is a part of has all its bytes.")

    async def _whole(self, upload_id: ObjectId) -> Row:
        row: Row | None = await self._database.data["uploads"].find_one(
            {"_id": upload_id}, max_time_ms=self._database.query_timeout_ms
        )
        refusal = refusal_of(row)
        if refusal is not None:
            raise refusal
        assert row is not None  # or it was refused
        return row

    async def _go_on(self, session: AsyncClientSession, whole: Row) -> None:
        row: Row | None = await self._database.data["uploads"].find_one_and_update(
            {"_id": whole["_id"], "state": UploadState.PAUSED.value},
            {
                "$set": {"state": UploadState.UPLOADING.value, "updated_at": utc_now()},
                "$inc": {"sequence": 1},
            },
            session=session,
            return_document=ReturnDocument.AFTER,
        )
        if row is not None:
            await tell_of_upload(session, row)

    # Hashes -------------------------------------------------------------------------------------

    def _hash(self, upload_id: ObjectId, offset: int) -> "hashlib._Hash | None":
        """Of the first bytes of an upload, where it is known."""
        at, hasher = self._hashes.pop(upload_id, (0, None))
        if offset == 0:
            return hashlib.sha256()
        return hasher if at == offset else None

    def _keep_hash(self, upload_id: ObjectId, offset: int, hasher: "hashlib._Hash") -> None:
        self._hashes[upload_id] = (offset, hasher)
        if len(self._hashes) > HASHES:
            self._hashes.popitem(last=False)

    # Parts --------------------------------------------------------------------------------------

    async def add_part(self, viewer: Viewer, upload_id: ObjectId, size_bytes: int) -> Row:
        """A part of an upload, to be sent beside others; from now on its bytes come by parts alone.

        NotFound, Gone, Conflict where some of its bytes are here already, PayloadTooLarge where its
        parts come to more than twice its size: abandoned ones count until they are terminated.
        """
        whole = await self.status(viewer, upload_id)
        if whole["part_of"] is not None:
            raise _unknown()
        if size_bytes > whole["size_bytes"]:
            raise PayloadTooLarge("A part is no larger than the upload.")

        async def work(session: AsyncClientSession) -> Row:
            row = await self._open_for_parts(session, upload_id)
            sizes = [part["size_bytes"] for part in await self._parts(session, upload_id)]
            if sum(sizes) + size_bytes > 2 * row["size_bytes"]:
                raise PayloadTooLarge(
                    "The parts come to more than twice the upload: terminate those that are not needed."
                )
            is_empty = size_bytes == 0
            part: Row = get_dict(
                UploadDocument(
                    version_id=row["version_id"],
                    model_id=row["model_id"],
                    owner_id=row["owner_id"],
                    created_by_id=PydanticObjectId(viewer.person_id()),
                    part_of=row["_id"],
                    path=row["path"],
                    path_key=row["path_key"],
                    size_bytes=size_bytes,
                    state=UploadState.RECEIVED if is_empty else UploadState.CREATED,
                    expires_at=row["expires_at"],
                ),
                to_db=True,
            )
            await self._database.data["uploads"].insert_one(part, session=session)
            return part

        return await self._database.transaction(work)

    async def _open_for_parts(self, session: AsyncClientSession, upload_id: ObjectId) -> Row:
        free = [{"holder": None}, {"$expr": {"$lt": ["$held_until", "$$NOW"]}}]
        row: Row | None = await self._database.data["uploads"].find_one_and_update(
            {
                "_id": upload_id,
                "state": {"$in": sorted(TAKING_STATES)},
                "part_count": {"$lt": MOST_PARTS},
                "$or": [
                    {"part_count": {"$gt": 0}},
                    {"received_bytes": 0, "$or": free},
                ],
            },
            # Whoever held it once and stood still since is fenced off.
            {"$inc": {"part_count": 1, "token": 1}, "$set": NOT_HELD},
            session=session,
            return_document=ReturnDocument.AFTER,
        )
        if row is None:
            raise Conflict(
                "Some bytes of this upload have come already, or it has no room for parts."
            )
        return row

    async def _parts(self, session: AsyncClientSession, upload_id: ObjectId) -> list[Row]:
        return (
            await self._database.data["uploads"]
            .find({"part_of": upload_id, "is_open": True}, session=session)
            .max_time_ms(self._database.query_timeout_ms)
            .to_list()
        )

    async def join_parts(
        self, viewer: Viewer, upload_id: ObjectId, part_ids: Sequence[ObjectId]
    ) -> Row:
        """The bytes of these parts, in this order, are those of the upload: RECEIVED. Once more is the
        same answer. BadRequest where they come to another size, Conflict where one is not whole."""
        whole = await self.status(viewer, upload_id)
        if whole["part_of"] is not None:
            raise _unknown()
        if whole["state"] not in TAKING_STATES:
            return whole
        if not part_ids or len(set(part_ids)) < len(part_ids):
            raise BadRequest("Name each part once.")

        async def work(session: AsyncClientSession) -> Row | None:
            row = await self._database.data["uploads"].find_one(
                {"_id": upload_id},
                session=session,
                max_time_ms=self._database.query_timeout_ms,
            )
            if row is None or row["state"] not in TAKING_STATES:
                return None  # its parts may have ended with it
            parts = {part["_id"]: part for part in await self._parts(session, upload_id)}
            named = [parts.get(part_id) for part_id in part_ids]
            segments: list[Row] = []
            for part in named:
                if part is None:
                    raise BadRequest("One of these is no part of this upload.")
                if part["state"] != UploadState.RECEIVED.value:
                    raise Conflict(f"The part {part['_id']} has not all its bytes yet.")
                segments += part["segments"]
            size_bytes = sum(segment["size_bytes"] for segment in segments)
            if size_bytes != whole["size_bytes"]:
                raise BadRequest(
                    f"These parts have {size_bytes} bytes, the upload {whole['size_bytes']}."
                )
            return await self._receive_in(session, row, segments, part_ids)

        row = await self._database.transaction(work)
        if row is None:  # another did it at the same moment, or it has ended
            return await self.status(viewer, upload_id)
        await wake(self._cache)
        return row

    async def terminate(self, viewer: Viewer, upload_id: ObjectId) -> None:
        """It is given up, its bytes are removed; a part alone, or an upload with all its parts. Gone
        where it was before, Conflict where it is a file by now."""
        row = await self._row(viewer, upload_id)
        if row["part_of"] is not None:
            await self._terminate_part(row)
            return
        refusal = refusal_of(row)
        if refusal is not None:
            raise refusal
        try:
            await abort_upload(self._database, self._storage, viewer, upload_id=upload_id)
        except Refused as refused:
            if refused.code is ErrorCode.INVALID_TRANSITION:
                raise Conflict(refused.message) from None
            raise _unknown() from None

    async def _terminate_part(self, part: Row) -> None:
        uploads = self._database.data["uploads"]

        async def work(session: AsyncClientSession) -> Row | None:
            now = utc_now()
            whole = await uploads.find_one(
                {"_id": part["part_of"], "state": {"$in": sorted(TAKING_STATES)}},
                {"_id": 1},
                session=session,
                max_time_ms=self._database.query_timeout_ms,
            )
            if whole is None:  # its bytes belong to the whole, or it has ended with it
                return None
            row: Row | None = await uploads.find_one_and_update(
                {"_id": part["_id"], "is_open": True},
                {
                    "$set": {
                        "state": UploadState.ABORTED.value,
                        "is_open": False,
                        "ended_at": now,
                        "updated_at": now,
                        **NOT_HELD,
                    }
                },
                session=session,
                return_document=ReturnDocument.AFTER,
            )
            if row is not None:
                await uploads.update_one(
                    {"_id": part["part_of"]},
                    {
                        "$inc": {"received_bytes": -row["received_bytes"], "sequence": 1},
                        "$set": {"updated_at": now},
                    },
                    session=session,
                )
            return row

        row = await self._database.transaction(work)
        if row is None:
            refusal = refusal_of(part)
            raise refusal or Conflict("This part belongs to the upload by now.")
        await discard(self._storage, [segment["key"] for segment in row["segments"]])


def _ended_segments() -> Row:
    """The segments of an upload that is claimed: in an update pipeline. Where it is taken over, an empty
    one is the last until bytes have come: whoever is next goes on in none that another may still write."""
    filled = {"$filter": {"input": "$segments", "cond": {"$gt": ["$$this.size_bytes", 0]}}}
    number = {"$toString": {"$add": ["$token", 1]}}
    key = {"$concat": [f"{INCOMING}/", {"$toString": "$_id"}, "/", number]}
    is_left: Row = {"$or": [{"$eq": ["$holder", None]}, {"$eq": ["$segments", []]}]}
    empty = {"key": key, "size_bytes": {"$literal": 0}}
    return {"$cond": [is_left, "$segments", {"$concatArrays": [filled, [empty]]}]}


def _unknown() -> NotFound:
    return NotFound("There is no such upload.")


def _too_many(row: Row) -> PayloadTooLarge:
    return PayloadTooLarge(f"This upload has {row['size_bytes']} bytes; these are more.")


def _elsewhere(row: Row) -> Conflict:
    return Conflict(f"This upload goes on at {row['received_bytes']}.")


def _failure(row: Row) -> HarborError:
    """Of an upload that did not become a file, for who has sent its last bytes."""
    error = row["error"]
    if error is None:
        return refusal_of(row) or Conflict("The upload has ended.")
    message = error["message"]
    match ErrorCode(error["code"]):
        case ErrorCode.CHECKSUM_MISMATCH:
            return ChecksumMismatch(message)
        case ErrorCode.NOT_FOUND | ErrorCode.UPLOAD_EXPIRED:
            return Gone(message)
        case ErrorCode.FORBIDDEN:
            return Forbidden(message)
    return Conflict(message)
