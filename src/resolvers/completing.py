"""An upload ends: as a file of its version, or without one. Exactly once, whatever comes first.

Whoever ends one changes it from open to ended, within the transaction of all that follows from it: the
file, the contents that it refers to, what was reserved for it, its job, the event. Two who come at once
collide there, and the one who comes second finds it ended.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Final

from bson import ObjectId
from pymongo import ReturnDocument, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer, job_principals
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import JobKind
from modelharbor.db.models import ModelState
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import OPEN, TAKING, UploadProtocol, UploadState
from modelharbor.db.versions import MUTABLE, VersionStatus
from modelharbor.errors import ErrorCode, HarborError
from modelharbor.inspection.formats import role_of, sniff
from modelharbor.jobs.put import NewJob, put_jobs
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.storage.blobs import BlobStore, blob_key

from .access import full_name
from .blobs import Contents, announce_blobs, are_here, removed_meanwhile
from .files import FileEntry, files_at, insert_files
from .quotas import release
from .telling import tell_of_upload, tell_of_uploads

log = logging.getLogger(__name__)
AT_ONCE: Final = 100  # uploads that complete in one transaction
TAKING_STATES: Final = frozenset(state.value for state in TAKING)
# Of a job that reads what is stored: over a quarter of an hour, for the store may be gone meanwhile.
VERIFY_ATTEMPTS: Final = 15
NOTHING_KNOWN: Final = b"\0"  # a head that says nothing: the name alone tells the format
NOT_HELD: Final[Row] = {"holder": None, "held_until": None, "rate": None}
CHANGED: Final = (
    *("state", "is_open", "ended_at", "updated_at", *NOT_HELD, "error", "protocol", "sha256"),
    *("received_bytes", "segments", "file_id", "job_id", "sequence"),
)
"""Fields of an upload that completing may change."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """An upload that has all its bytes: their SHA-256, and the key of the one object that they are.

    The upload is as its holder has it: another who claimed it since is not robbed. `key` None: the
    contents are stored already. `viewer`: who sent the last of them; None where that was settled.
    """

    upload: Row
    digest: str
    key: str | None
    viewer: Viewer | None = None

    @property
    def sha256(self) -> str:
        return self.digest

    @property
    def size_bytes(self) -> int:
        size: int = self.upload["size_bytes"]
        return size


async def complete(
    database: Database, storage: BlobStore, upload: Row, digest: str, key: str
) -> Row:
    """The upload as it is then: COMPLETED, with its file; or FAILED, with its `error`, where the bytes
    are others than was said, or its version takes no files any more. Once more is the same answer.

    An upload that ended before, or that another has claimed since `upload` was read, is answered as
    it is. Refused (CONFLICT), Unavailable: try again.
    """
    [row] = await complete_all(database, storage, [Arrived(upload, digest, key)])
    return row


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    arrived: Arrived
    future: "asyncio.Future[Row]"
    count: CommandCount | None
    """Of the request: it acknowledges what is written for it."""


class Completions:
    """Of one process. Those of one version that come while others are being written go together, for
    version, model and quota are one document each, which all of them write."""

    def __init__(self, database: Database, storage: BlobStore) -> None:
        self._database, self._storage = database, storage
        self._waiting: dict[ObjectId, list[_Waiting]] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def complete(self, arrived: Arrived) -> Row:
        """As `complete` does."""
        future: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        mine = _Waiting(arrived, future, counted.get())
        owner_id = arrived.upload["owner_id"]
        if owner_id in self._waiting:
            self._waiting[owner_id].append(mine)
        else:
            self._waiting[owner_id] = [mine]
            # In a context of its own: it writes for many requests, and each is told of it.
            running = asyncio.get_running_loop().create_task(self._run(owner_id), context=Context())
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        return await future

    async def close(self) -> None:
        """Wait for what is being written."""
        if self._running:
            await asyncio.wait(self._running)

    async def _run(self, owner_id: ObjectId) -> None:
        waiting = self._waiting[owner_id]
        while waiting:
            version_id = waiting[0].arrived.upload["version_id"]
            batch = [each for each in waiting if each.arrived.upload["version_id"] == version_id]
            batch = batch[:AT_ONCE]
            taken = {id(each) for each in batch}
            waiting[:] = [each for each in waiting if id(each) not in taken]
            count = CommandCount()
            counted.set(count)
            found: list[Row] | Exception
            try:
                found = await complete_all(
                    self._database, self._storage, [each.arrived for each in batch]
                )
            except Exception as error:
                found = error
            for told in {id(each.count): each.count for each in batch}.values():
                if told is not None:
                    told.add(count)
            for index, each in enumerate(batch):
                if each.future.done():
                    continue
                if isinstance(found, Exception):
                    each.future.set_exception(found)
                else:
                    each.future.set_result(found[index])
        del self._waiting[owner_id]


async def complete_all(
    database: Database, storage: BlobStore, arrived: Sequence[Arrived]
) -> list[Row]:
    """`complete` for uploads of one version, in one transaction."""
    right = [each for each in arrived if each.upload["sha256"] in {None, each.digest}]
    if right:
        blobs = await announce_blobs(database, storage, right)
        # What the store has lost is marked as such, and kept anew then.
        stored = [blob for blob in blobs.values() if blob["stored"]]
        await asyncio.gather(*(are_here(database, storage, blob) for blob in stored))
    done = await database.transaction(
        lambda session: _complete_in(database, session, arrived),
        turn=arrived[0].upload["owner_id"],
    )
    await discard(storage, done.useless)
    return [done.rows[each.upload["_id"]] for each in arrived]


@dataclass(slots=True)
class _Done:
    rows: dict[ObjectId, Row] = field(default_factory=dict)
    useless: set[str] = field(default_factory=set)  # keys of objects, once this is committed


async def _complete_in(
    database: Database, session: AsyncClientSession, arrived: Sequence[Arrived]
) -> _Done:
    done = _Done()
    first = arrived[0].upload
    ids = [each.upload["_id"] for each in arrived]
    uploads = {row["_id"]: row for row in await _rows(database, session, "uploads", "_id", ids)}
    version = await _row(database, session, "versions", first["version_id"])
    model = await _row(database, session, "models", first["model_id"])
    paths = [row["path"] for row in uploads.values()]
    files = await files_at(database, session, first["version_id"], paths)
    succeeding: list[tuple[Arrived, Row]] = []
    failing: list[tuple[Arrived, Row, Failing]] = []
    for each in arrived:
        row = uploads.get(each.upload["_id"])
        if row is None:  # ended so long ago that it was removed
            row = {**each.upload, "is_open": False, "state": UploadState.ABORTED.value}
        done.rows[each.upload["_id"]] = row
        if not row["is_open"] or row["token"] != each.upload["token"]:
            continue
        refusal = _refusal(each, row, version, model, files.get(row["path"]))
        if refusal is None:
            succeeding.append((each, row))
        else:
            failing.append((each, row, refusal))
    now, used = utc_now(), set[str]()
    if succeeding:
        assert version is not None  # or they were refused
        made = await _make_files(database, session, version, succeeding, files)
        used = made.keys
        for each, row in succeeding:
            done.useless |= _keys(each, row)
            done.rows[row["_id"]] = {
                **row,
                **_ended(UploadState.COMPLETED, now),
                "protocol": row["protocol"] if each.key else UploadProtocol.INSTANT.value,
                "sha256": each.digest,
                "received_bytes": row["size_bytes"],
                "segments": [],
                "file_id": made.files[row["path"]],
                "job_id": made.jobs.get(row["_id"], row["job_id"]),
                "sequence": row["sequence"] + 1,
            }
    for each, row, refusal in failing:
        done.useless |= _keys(each, row)
        done.rows[row["_id"]] = {
            **row,
            **_ended(UploadState.FAILED, now),
            "error": refusal.row,
            "sequence": row["sequence"] + 1,
        }
    ended = [row for _, row in succeeding] + [row for _, row, _ in failing]
    if ended:
        done.useless |= await _write(database, session, ended, done.rows)
    done.useless -= used
    return done


def _keys(arrived: Arrived, row: Row) -> set[str]:
    """Of all objects that an upload has."""
    keys = {segment["key"] for segment in row["segments"]}
    return keys if arrived.key is None else keys | {arrived.key}


async def _rows(
    database: Database,
    session: AsyncClientSession,
    collection: str,
    name: str,
    values: Sequence[ObjectId | str],
) -> list[Row]:
    found: list[Row] = (
        await database.data[collection]
        .find({name: {"$in": list(values)}}, session=session)
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    return found


async def _row(
    database: Database, session: AsyncClientSession, collection: str, row_id: ObjectId
) -> Row | None:
    row: Row | None = await database.data[collection].find_one(
        {"_id": row_id}, session=session, max_time_ms=database.query_timeout_ms
    )
    return row


@dataclass(frozen=True, slots=True)
class Failing:
    """Why an upload does not become a file."""

    code: ErrorCode
    message: str

    @property
    def row(self) -> Row:
        return {"code": self.code.value, "message": self.message, "path": None}


def _refusal(
    arrived: Arrived, row: Row, version: Row | None, model: Row | None, file: Row | None
) -> Failing | None:
    said = row["sha256"]
    if said is not None and said != arrived.digest:
        return Failing(
            ErrorCode.CHECKSUM_MISMATCH,
            f"The bytes have the SHA-256 {arrived.digest}; {said} was announced.",
        )
    refusal = gone(version, model)
    if refusal is not None:
        return refusal
    assert version is not None
    assert model is not None
    taking = {status.value for status in MUTABLE}
    if row["state"] not in TAKING_STATES:  # who published it waits for this one
        taking.add(VersionStatus.PROCESSING.value)
    if version["status"] not in taking:
        return Failing(
            ErrorCode.INVALID_TRANSITION,
            f"Version {version['number']} is {version['status']}: it takes no more files.",
        )
    if model["state"] != ModelState.ACTIVE.value:
        return Failing(
            ErrorCode.INVALID_TRANSITION,
            f"{full_name(model)} is {model['state']}: it takes no files.",
        )
    if arrived.viewer is not None and Permission.WRITE not in arrived.viewer.on_model(model):
        return Failing(
            ErrorCode.FORBIDDEN, f"This needs the permission WRITE on {full_name(model)}."
        )
    if file is not None and file["sha256"] != arrived.digest:
        return Failing(
            ErrorCode.ALREADY_EXISTS, f"The version has another file {row['path']} by now."
        )
    return None


def gone(version: Row | None, model: Row | None) -> Failing | None:
    """Why nothing of a version (`status`) that was deleted, or of a model (`state`), takes bytes."""
    if version is None or version["status"] == VersionStatus.DELETED.value:
        return Failing(ErrorCode.NOT_FOUND, "The version was deleted.")
    if model is None or model["state"] == ModelState.DELETED.value:
        return Failing(ErrorCode.NOT_FOUND, "The model was deleted.")
    return None


def _ended(state: UploadState, now: object) -> Row:
    return {
        "state": state.value,
        "is_open": False,
        "ended_at": now,
        "updated_at": now,
        **NOT_HELD,
    }


@dataclass(frozen=True, slots=True)
class _Made:
    files: dict[str, ObjectId]  # by path
    jobs: dict[ObjectId, ObjectId]  # by upload
    keys: set[str]  # that contents have


async def _make_files(
    database: Database,
    session: AsyncClientSession,
    version: Row,
    succeeding: Sequence[tuple[Arrived, Row]],
    files: Mapping[str, Row],
) -> _Made:
    """Files of the version, their contents and their jobs. CONFLICT where contents are not stored."""
    digests = sorted({each.digest for each, _ in succeeding})
    rows = await _rows(database, session, "blobs", "sha256", digests)
    blobs = {row["sha256"]: row for row in rows}
    new = [(each, row) for each, row in succeeding if row["path"] not in files]
    keys = await _keep(database, session, blobs, succeeding, new)
    made = {path: file["_id"] for path, file in files.items()}
    if new:
        entries = [file_entry(row, each.digest, blobs[each.digest]) for each, row in new]
        # PROCESSING too: what was refused was refused one by one before.
        _, files_made = await insert_files(
            database, session, version, entries, MUTABLE | {VersionStatus.PROCESSING}
        )
        made |= {file["path"]: file["_id"] for file in files_made}
    files_of = {row["_id"]: made[row["path"]] for _, row in new}
    inspected = {digest for digest, blob in blobs.items() if blob.get("inspection") is not None}
    jobs = await put_file_jobs(
        database,
        session,
        # Where a job has verified it, that one goes on with the file.
        [
            (row, each)
            for each, row in new
            if row["job_id"] is None and each.digest not in inspected
        ],
        files_of,
    )
    return _Made(made, jobs, keys)


async def _keep(
    database: Database,
    session: AsyncClientSession,
    blobs: Mapping[str, Row],
    succeeding: Sequence[tuple[Arrived, Row]],
    new: Sequence[tuple[Arrived, Row]],
) -> set[str]:
    """Contents that are not stored get the key of who brought them first; all are referred to by so many
    more files. Answers the keys of all of them."""
    brought: dict[str, str] = {}
    for each, _ in succeeding:
        blob = blobs.get(each.digest)
        if blob is None or blob["deleting_at"] is not None:
            raise removed_meanwhile()
        if blob["stored"]:
            continue
        if each.key is not None:
            brought.setdefault(each.digest, each.key)
        elif each.digest not in brought:
            raise removed_meanwhile()
    counts = Counter(each.digest for each, _ in new)
    now = utc_now()
    updates = []
    for digest in sorted(brought.keys() | counts.keys()):
        change: Row = {"$inc": {"references": counts[digest]}}
        if digest in brought:
            stored = {"stored": True, "key": brought[digest], "seen_at": now}
            change["$set"] = {**stored, "verified_at": now, "damaged_at": None}
        updates.append(UpdateOne({"_id": blobs[digest]["_id"]}, change))
    if updates:
        await database.data["blobs"].bulk_write(updates, ordered=False, session=session)
    return set(brought.values()) | {
        blob_key(blob) for digest, blob in blobs.items() if digest not in brought
    }


def file_entry(upload: Row, digest: str, blob: Row) -> FileEntry:
    """The file that an upload becomes. What it is, its job will say, where nobody has looked before."""
    inspection, path = blob.get("inspection"), upload["path"]
    format = FileFormat(inspection["format"]) if inspection else FileFormat.OTHER
    if format is FileFormat.OTHER:
        format = sniff(NOTHING_KNOWN, path)
    return FileEntry(path, upload["size_bytes"], digest, role_of(path, format), format)


async def put_file_jobs(
    database: Database,
    session: AsyncClientSession,
    waiting: Sequence[tuple[Row, Contents]],
    files: Mapping[ObjectId, ObjectId],
) -> dict[ObjectId, ObjectId]:
    """A job for each file whose contents nobody has looked into: of these uploads, with the ids of
    their files. Answers the jobs, by upload."""
    found: dict[ObjectId, ObjectId] = {}
    creators = dict.fromkeys(upload["created_by_id"] for upload, _ in waiting)
    for creator_id in creators:
        theirs = [pair for pair in waiting if pair[0]["created_by_id"] == creator_id]
        jobs = await put_jobs(
            database,
            session,
            [
                NewJob(
                    {
                        "version_id": upload["version_id"],
                        "file_id": files[upload["_id"]],
                        "sha256": contents.sha256,
                    },
                    version_subject(upload),
                )
                for upload, contents in theirs
            ],
            kind=JobKind.VERIFY_FILE,
            principals=job_principals(creator_id, theirs[0][0]["owner_id"]),
            created_by_id=creator_id,
            max_attempts=VERIFY_ATTEMPTS,
        )
        found.update(
            (upload["_id"], job["_id"]) for (upload, _), job in zip(theirs, jobs, strict=True)
        )
    return found


def version_subject(upload: Row) -> Row:
    """Of the jobs of an upload."""
    return {"type": "ModelVersion", "id": upload["version_id"]}


async def _write(
    database: Database,
    session: AsyncClientSession,
    ended: Sequence[Row],
    rows: Mapping[ObjectId, Row],
) -> set[str]:
    """Uploads that were open, as they are now; what was reserved for them is given back. Answers keys
    of their parts."""
    await database.data["uploads"].bulk_write(
        [
            UpdateOne(
                {"_id": row["_id"]},
                {"$set": {name: rows[row["_id"]][name] for name in CHANGED}},
            )
            for row in ended
        ],
        ordered=False,
        session=session,
    )
    useless = await _end_parts(database, session, ended, UploadState.COMPLETED)
    await release(
        database,
        session,
        ended[0]["owner_id"],
        size_bytes=sum(row["size_bytes"] for row in ended),
        uploads=len(ended),
    )
    await tell_of_uploads(session, [rows[row["_id"]] for row in ended])
    return useless


async def _end_parts(
    database: Database, session: AsyncClientSession, uploads: Sequence[Row], state: UploadState
) -> set[str]:
    """The parts of uploads end with them. Answers the keys of their segments."""
    parents = [row["_id"] for row in uploads if row["part_count"]]
    if not parents:
        return set()
    parts = await _rows(database, session, "uploads", "part_of", parents)
    going = [part for part in parts if part["is_open"]]
    await database.data["uploads"].update_many(
        {"_id": {"$in": [part["_id"] for part in going]}},
        {"$set": _ended(state, utc_now())},
        session=session,
    )
    return {segment["key"] for part in going for segment in part["segments"]}


# Without a file ---------------------------------------------------------------------------------


async def fail(
    database: Database, storage: BlobStore, upload: Row, code: ErrorCode, message: str
) -> Row:
    """The upload as it is then: FAILED for this reason, or as it ended before. Its bytes are removed."""
    return await end(database, storage, upload, UploadState.FAILED, failing=Failing(code, message))


async def end(
    database: Database,
    storage: BlobStore,
    upload: Row,
    state: UploadState,
    *,
    failing: Failing | None = None,
    states: Collection[UploadState] = OPEN,
    where: Row | None = None,
    by: ObjectId | None = None,
    comment: str | None = None,
) -> Row:
    """An upload ends without a file, where it is in one of these states still, and `where`; its bytes are removed.
    Answers it as it is then."""

    async def work(session: AsyncClientSession) -> tuple[Row | None, set[str]]:
        return await end_in(
            database,
            session,
            upload["_id"],
            state,
            failing=failing,
            states=states,
            where=where,
            by=by,
            comment=comment,
        )

    row, useless = await database.transaction(work, turn=upload["owner_id"])
    await discard(storage, useless)
    if row is not None:
        return row
    found: Row | None = await database.data["uploads"].find_one(
        {"_id": upload["_id"]}, max_time_ms=database.query_timeout_ms
    )
    return upload if found is None else found


async def end_in(
    database: Database,
    session: AsyncClientSession,
    upload_id: ObjectId,
    state: UploadState,
    *,
    failing: Failing | None = None,
    states: Collection[UploadState] = OPEN,
    where: Row | None = None,
    by: ObjectId | None = None,
    comment: str | None = None,
) -> tuple[Row | None, set[str]]:
    """`end` within a transaction: None where it was in no such state. After it: `discard` these keys."""
    row: Row | None = await database.data["uploads"].find_one_and_update(
        {
            "_id": upload_id,
            "part_of": None,
            "is_open": True,
            "state": {"$in": [each.value for each in states]},
            **(where or {}),
        },
        {
            "$set": {**_ended(state, utc_now()), "error": failing.row if failing else None},
            "$inc": {"sequence": 1},
        },
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    if row is None:
        return None, set()
    useless = {segment["key"] for segment in row["segments"]}
    useless |= await _end_parts(database, session, [row], UploadState.ABORTED)
    await release(database, session, row["owner_id"], size_bytes=row["size_bytes"], uploads=1)
    await tell_of_upload(session, row, by=by, comment=comment)
    return row, useless


async def discard(storage: BlobStore, keys: Collection[str]) -> None:
    """Remove objects that nothing needs. What fails is left to the sweeper."""
    for key in sorted(keys):
        try:
            await storage.incoming.delete(key)
        except (HarborError, OSError):
            log.warning("upload.left key=%s", key, exc_info=True)
