"""Uploads: create, pause, complete, abort, expire. Their bytes come elsewhere: receiving.py."""

import asyncio
import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer, job_principals
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.files import path_key
from modelharbor.db.jobs import ENDED, JobKind, JobState
from modelharbor.db.models import ModelState
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import TAKING, UploadDocument, UploadProtocol, UploadState
from modelharbor.db.versions import MUTABLE, VersionStatus
from modelharbor.errors import ErrorCode, Refused
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, blob_key

from .access import refuse_unless_active, version_for
from .blobs import announce_blobs, are_here, record_blobs, refer_to
from .completing import (
    TAKING_STATES,
    Arrived,
    Failing,
    complete_all,
    discard,
    end,
    end_in,
    file_entry,
    gone,
    put_file_jobs,
)
from .files import insert_files
from .idempotency import Attempt, create_once
from .names import bad, valid_comment, valid_path
from .quotas import reserve
from .telling import tell_of_model, tell_of_upload, tell_of_uploads

log = logging.getLogger(__name__)
FILES_AT_ONCE: Final = 1000  # created by one call
PATHS_AT_ONCE: Final = 250  # looked for by one command
CONTENTS_AT_ONCE: Final = 200
LOOKS: Final = (
    20  # files with the same contents that are looked at, for one that the viewer may have
)
EXPIRED_AT_ONCE: Final = 100
EMPTY: Final = sha256().hexdigest()
BEFORE_READY: Final = frozenset(
    {VersionStatus.DRAFT.value, VersionStatus.UPLOADING.value, VersionStatus.PROCESSING.value}
)
PUBLISHED: Final = frozenset({VersionStatus.READY.value, VersionStatus.ARCHIVED.value})


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file to be sent. `sha256`, hexadecimal in lower case, is checked against its bytes; where these
    contents are stored already, and the viewer may have them, no bytes are needed."""

    path: str
    size_bytes: int
    sha256: str | None = None


async def create_uploads(
    database: Database,
    storage: BlobStore,
    viewer: Viewer,
    settings: Settings,
    *,
    version_id: ObjectId,
    files: Sequence[UploadFile],
    protocol: UploadProtocol | None = None,
    idempotency_key: str | None = None,
) -> list[Row]:
    """An upload for each file, in their order, of a version that takes files. Needs WRITE.

    Those whose contents are stored here, and that the viewer may download, are COMPLETED at once
    (INSTANT), and so are empty ones; unless `protocol` is TUS. All of them, or none: BAD_INPUT,
    ALREADY_EXISTS for paths that others have, also but for their case, or where a file would be a
    folder; QUOTA_EXCEEDED, INVALID_TRANSITION.
    """
    user_id = viewer.person_id()
    entries = valid_files(files, settings)
    _, model = await version_for(database, None, viewer, version_id, Permission.WRITE, "versionId")
    known = await contents_at_hand(database, storage, viewer, entries, protocol)

    async def make(session: AsyncClientSession, attempt: Attempt) -> Row:
        version, model = await version_for(
            database, session, viewer, version_id, Permission.WRITE, "versionId"
        )
        rows = await create_uploads_in(
            database,
            session,
            storage,
            viewer,
            settings,
            version,
            model,
            entries,
            protocol,
            known=known,
            ids=_ids(attempt, len(entries)),
        )
        return {"uploads": rows}

    async def find(session: AsyncClientSession, attempt: Attempt) -> Row | None:
        ids = _ids(attempt, len(entries))
        await version_for(database, session, viewer, version_id, Permission.WRITE, "versionId")
        rows = (
            await database.data["uploads"]
            .find({"_id": {"$in": ids}}, session=session)
            .sort("_id", 1)
            .max_time_ms(database.query_timeout_ms)
            .to_list()
        )
        return {"uploads": rows} if len(rows) == len(ids) else None

    given = [[entry.path, entry.size_bytes, entry.sha256] for entry in entries]
    made = await create_once(
        database,
        settings,
        user_id=user_id,
        operation="createUploads",
        key=idempotency_key,
        given={
            "version_id": version_id,
            "files": given,
            "protocol": protocol.value if protocol else None,
        },
        make=make,
        find=find,
        turn=model["owner_id"],
    )
    rows: list[Row] = made["uploads"]
    return rows


def _ids(attempt: Attempt, count: int) -> list[ObjectId]:
    """The same for each repetition, in the order of the files."""
    start = attempt.id.binary[:4] + sha256(attempt.nonce.encode()).digest()[:5]
    return [ObjectId(start + place.to_bytes(3, "big")) for place in range(count)]


def valid_files(files: Sequence[UploadFile], settings: Settings) -> list[UploadFile]:
    """With paths in one form; no two of them in each other's way."""
    if not files:
        raise bad("No files: give one at least.", "files")
    if len(files) > FILES_AT_ONCE:
        raise bad(f"{len(files)} files: {FILES_AT_ONCE} are allowed in one call.", "files")
    found = []
    for place, file in enumerate(files):
        where = ("files", str(place))
        if not 0 <= file.size_bytes <= settings.max_file_bytes:
            raise bad(
                f"{file.path[:200]!r} has {file.size_bytes} bytes: {settings.max_file_bytes} are allowed.",
                *where,
                "sizeBytes",
            )
        if file.size_bytes == 0 and file.sha256 not in {None, EMPTY}:
            raise Refused(
                ErrorCode.CHECKSUM_MISMATCH,
                f"{file.path[:200]!r} is empty: its SHA-256 is {EMPTY}.",
                *where,
                "sha256",
            )
        found.append(replace(file, path=valid_path(file.path, *where, "path")))
    _refuse_clashes(found)
    return found


def _refuse_clashes(files: Sequence[UploadFile]) -> None:
    by_key: dict[str, str] = {}
    for place, file in enumerate(files):
        key = path_key(file.path)
        if key in by_key:
            raise _taken(file.path, by_key[key], "among these too", place)
        by_key[key] = file.path
    for place, file in enumerate(files):
        for folder in _folders(path_key(file.path)):
            if folder in by_key:
                raise _taken(file.path, by_key[folder], "a file among these", place)


def _taken(path: str, other: str, what: str, place: int) -> Refused:
    return Refused(
        ErrorCode.ALREADY_EXISTS,
        f"{path!r} cannot be beside {other!r}, which is {what}.",
        "files",
        str(place),
        "path",
    )


def _folders(path: str) -> list[str]:
    """That a path lies in."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


async def create_uploads_in(
    database: Database,
    session: AsyncClientSession,
    storage: BlobStore,
    viewer: Viewer,
    settings: Settings,
    version: Row,
    model: Row,
    files: Sequence[UploadFile],
    protocol: UploadProtocol | None = None,
    *,
    known: Mapping[str, Row] | None = None,
    ids: Sequence[ObjectId] | None = None,
) -> list[Row]:
    """Create uploads within a transaction that read version and model; the viewer has WRITE.

    `known`: what `contents_at_hand` answered before, for a transaction may begin anew. After it the
    version is UPLOADING, whatever `version` says.
    """
    entries = valid_files(files, settings)
    refuse_unless_active(model, "versionId")
    if VersionStatus(version["status"]) not in MUTABLE:
        raise Refused(
            ErrorCode.INVALID_TRANSITION,
            f"Version {version['number']} is {version['status']}: it takes no more files.",
            "versionId",
        )
    if known is None:
        known = await contents_at_hand(database, storage, viewer, entries, protocol)
    rows = _new_rows(viewer, settings, version, model, entries, known, ids)
    waiting = [row for row in rows if row["is_open"]]
    instant = [row for row in rows if not row["is_open"]]
    # First of all writes, so that of many at once all but one collide here and start anew.
    await reserve(
        database,
        session,
        settings,
        model,
        size_bytes=sum(row["size_bytes"] for row in waiting),
        uploads=len(waiting),
        instant_bytes=sum(row["size_bytes"] for row in instant),
    )
    await _refuse_too_many(database, session, settings, version, len(rows))
    await _refuse_taken(database, session, version, entries)
    await _begin(database, session, viewer, version, model, len(rows))
    if instant:
        blobs = {row["path"]: known[row["sha256"]] for row in instant}
        made = await insert_files(
            database,
            session,
            version,
            [file_entry(row, row["sha256"], blobs[row["path"]]) for row in instant],
        )
        files_made = {file["path"]: file["_id"] for file in made[1]}
        counts: dict[str, int] = {}
        for row in instant:
            counts[row["sha256"]] = counts.get(row["sha256"], 0) + 1
            row["file_id"] = files_made[row["path"]]
        await refer_to(database, session, counts)
        jobs = await put_file_jobs(
            database,
            session,
            [
                (row, Arrived(row, row["sha256"], None))
                for row in instant
                if blobs[row["path"]].get("inspection") is None
            ],
            {row["_id"]: row["file_id"] for row in instant},
        )
        for row in instant:
            row["job_id"] = jobs.get(row["_id"])
    await database.data["uploads"].insert_many(rows, session=session)
    await tell_of_uploads(session, rows, by=viewer.user_id)
    return rows


def _new_rows(
    viewer: Viewer,
    settings: Settings,
    version: Row,
    model: Row,
    files: Sequence[UploadFile],
    known: Mapping[str, Row],
    ids: Sequence[ObjectId] | None,
) -> list[Row]:
    user_id, now = viewer.person_id(), utc_now()
    like: Row = get_dict(
        UploadDocument(
            version_id=version["_id"],
            model_id=model["_id"],
            owner_id=model["owner_id"],
            principals=job_principals(user_id, model["owner_id"]),
            created_by_id=PydanticObjectId(user_id),
            path="",
            path_key="",
            size_bytes=0,
            expires_at=now + timedelta(hours=settings.upload_hours),
            created_at=now,
            updated_at=now,
        ),
        to_db=True,
    )
    rows = []
    for place, file in enumerate(files):
        row: Row = {
            **like,
            "_id": ids[place] if ids else ObjectId(),
            "path": file.path,
            "path_key": path_key(file.path),
            "size_bytes": file.size_bytes,
            "sha256": EMPTY if file.size_bytes == 0 else file.sha256,
            "segments": [],
        }
        if _is_known(file, known):
            row |= {
                "protocol": UploadProtocol.INSTANT.value,
                "state": UploadState.COMPLETED.value,
                "is_open": False,
                "received_bytes": file.size_bytes,
                "ended_at": now,
            }
        rows.append(row)
    return rows


def _is_known(file: UploadFile, known: Mapping[str, Row]) -> bool:
    if file.size_bytes == 0:
        return EMPTY in known
    return file.sha256 is not None and file.sha256 in known


async def _refuse_too_many(
    database: Database, session: AsyncClientSession, settings: Settings, version: Row, count: int
) -> None:
    """Of the files that the version has, those on their way to it and these."""
    most = settings.max_version_files
    there = version["file_count"] + count
    if there <= most:
        there += await database.data["uploads"].count_documents(
            {"version_id": version["_id"], "is_open": True, "part_of": None},
            limit=most + 1,
            session=session,
            maxTimeMS=database.query_timeout_ms,
        )
    if there > most:
        raise Refused(
            ErrorCode.QUOTA_EXCEEDED,
            f"The version would have {there} files, with those that are being uploaded: {most} are allowed.",
            "files",
        )


async def _refuse_taken(
    database: Database, session: AsyncClientSession, version: Row, files: Sequence[UploadFile]
) -> None:
    """No file of the version, and none that is on its way, is at one of these paths, above or below it."""
    places = {path_key(file.path): place for place, file in enumerate(files)}
    above: dict[str, int] = {}
    for key, place in places.items():
        for folder in _folders(key):
            above.setdefault(folder, place)
    keys = [*places, *above]
    for collection, what, open_only in (
        ("files", "a file of the version", {}),
        ("uploads", "being uploaded", {"is_open": True, "part_of": None}),
    ):
        for start in range(0, len(keys), 4 * PATHS_AT_ONCE):
            batch = keys[start : start + 4 * PATHS_AT_ONCE]
            row = await _first(database, session, collection, version, open_only, {"$in": batch})
            if row is not None:
                key = row["path_key"]
                place = places.get(key, above.get(key, 0))
                raise _taken(files[place].path, row["path"], what, place)
        listed = list(places)
        for start in range(0, len(listed), PATHS_AT_ONCE):
            below = [
                {"path_key": {"$gt": f"{key}/", "$lt": f"{key}0"}}  # 0 is what follows the /
                for key in listed[start : start + PATHS_AT_ONCE]
            ]
            row = await _first(database, session, collection, version, open_only, None, below)
            if row is not None:
                place = next(places[each] for each in _folders(row["path_key"]) if each in places)
                raise _taken(files[place].path, row["path"], what, place)


async def _first(
    database: Database,
    session: AsyncClientSession,
    collection: str,
    version: Row,
    query: Row,
    key: Row | None,
    any_of: list[Row] | None = None,
) -> Row | None:
    row: Row | None = await database.data[collection].find_one(
        {
            "version_id": version["_id"],
            **query,
            **({} if key is None else {"path_key": key}),
            **({} if any_of is None else {"$or": any_of}),
        },
        {"path": 1, "path_key": 1},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    return row


async def _begin(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    version: Row,
    model: Row,
    count: int,
) -> None:
    """UPLOADING from here on. Written to in any case: who publishes it at the same time collides."""
    change: Row = {"$inc": {"upload_count": count}}
    if version["status"] != VersionStatus.UPLOADING.value:
        change = {
            "$inc": {"upload_count": count, "revision": 1},
            "$set": {"status": VersionStatus.UPLOADING.value},
        }
    await database.data["versions"].update_one({"_id": version["_id"]}, change, session=session)
    if version["status"] != VersionStatus.UPLOADING.value:
        await tell_of_model(
            session,
            EventKind.VERSION_UPDATED,
            model,
            by=viewer.user_id,
            version_id=version["_id"],
            before={"status": version["status"]},
            after={"status": VersionStatus.UPLOADING.value},
        )


# Contents that are here already -----------------------------------------------------------------


async def contents_at_hand(
    database: Database,
    storage: BlobStore,
    viewer: Viewer,
    files: Sequence[UploadFile],
    protocol: UploadProtocol | None = None,
) -> dict[str, Row]:
    """Rows of those contents, by SHA-256, that are stored and that the viewer may download: a file that
    they may have has them. A hash alone proves nothing: whoever knows one would get the bytes for it.

    Of files with the same contents only some are looked at, so one may be missed: then it is sent.
    """
    known: dict[str, Row] = {}
    if any(file.size_bytes == 0 for file in files):
        known[EMPTY] = await _empty(database, storage)
    if protocol is UploadProtocol.TUS:
        return known
    sizes = {file.sha256: file.size_bytes for file in files if file.sha256 and file.size_bytes}
    digests = sorted(sizes)
    for start in range(0, len(digests), CONTENTS_AT_ONCE):
        rows = await database.aggregate(
            "blobs", _with_files(viewer, digests[start : start + CONTENTS_AT_ONCE])
        )
        fitting = [
            row
            for row in rows
            if row["size_bytes"] == sizes[row["sha256"]] and _may_have(viewer, row["files"])
        ]
        there = await asyncio.gather(*(storage.exists(blob_key(row)) for row in fitting))
        for row, is_there in zip(fitting, there, strict=True):
            if is_there:
                known[row["sha256"]] = row
    return known


def _with_files(viewer: Viewer, digests: Sequence[str]) -> list[Row]:
    """Stored contents, each with some files that have them: the model and the status of the version."""
    return [
        {"$match": {"sha256": {"$in": list(digests)}, "stored": True, "deleting_at": None}},
        {"$project": {"sha256": 1, "size_bytes": 1, "key": 1, "inspection.format": 1}},
        {
            "$lookup": {
                "from": "files",
                "localField": "sha256",
                "foreignField": "sha256",
                "pipeline": [
                    {"$limit": LOOKS},
                    {
                        "$lookup": {
                            "from": "models",
                            "localField": "model_id",
                            "foreignField": "_id",
                            "pipeline": [
                                {"$match": viewer.visible},
                                {
                                    "$project": dict.fromkeys(
                                        ("state", "visibility", "owner_id", "grants"), 1
                                    )
                                },
                            ],
                            "as": "models",
                        }
                    },
                    {"$match": {"models": {"$ne": []}}},
                    {
                        "$lookup": {
                            "from": "versions",
                            "localField": "version_id",
                            "foreignField": "_id",
                            "pipeline": [{"$project": {"status": 1}}],
                            "as": "versions",
                        }
                    },
                    {"$project": {"_id": 0, "models": 1, "versions": 1}},
                ],
                "as": "files",
            }
        },
    ]


def _may_have(viewer: Viewer, files: Sequence[Row]) -> bool:
    """Whether one of these can be downloaded: what is not published, or in quarantine, needs more."""
    for file in files:
        for model, version in zip(file["models"], file["versions"], strict=False):
            held, status = viewer.on_model(model), version["status"]
            if status in PUBLISHED:
                needed = Permission.DOWNLOAD
            elif status in BEFORE_READY:
                needed = Permission.WRITE
            elif status != VersionStatus.DELETED.value:
                needed = Permission.PUBLISH
            else:
                continue
            if {needed, Permission.DOWNLOAD} <= held:
                return True
    return False


@dataclass(frozen=True, slots=True)
class _Empty:
    sha256: str = EMPTY
    size_bytes: int = 0


async def _empty(database: Database, storage: BlobStore) -> Row:
    """The contents of empty files, which everybody knows; stored, where they are not."""
    [row] = (await announce_blobs(database, storage, [_Empty()])).values()
    if not await are_here(database, storage, row):
        with tempfile.NamedTemporaryFile() as source:
            await storage.put_file(Path(source.name), EMPTY)
        await record_blobs(database, [row["_id"]])
    [found] = await database.find("blobs", {"_id": row["_id"]})
    return found


# What becomes of them ---------------------------------------------------------------------------


async def upload_for(
    database: Database,
    session: AsyncClientSession | None,
    viewer: Viewer,
    upload_id: ObjectId,
    *path: str,
) -> Row:
    """The whole upload, no part of one, for who created it or may write to its model."""
    user_id = viewer.person_id()
    missing = Refused(ErrorCode.NOT_FOUND, "There is no such upload that you may see.", *path)
    row = await database.data["uploads"].find_one(
        {"_id": upload_id, "part_of": None}, session=session, max_time_ms=database.query_timeout_ms
    )
    if row is None:
        raise missing
    if not await is_theirs(database, session, viewer, row):
        seen = set(viewer.principals) & set(row["principals"])
        if row["created_by_id"] != user_id and not seen:
            raise missing
        raise Refused(
            ErrorCode.FORBIDDEN,
            "This is for who created the upload, with the scope WRITE, and for who has the permission WRITE on its model.",
            *path,
        )
    return row


async def is_theirs(
    database: Database, session: AsyncClientSession | None, viewer: Viewer, row: Row
) -> bool:
    if Permission.WRITE not in viewer.scopes:
        return False
    if row["created_by_id"] == viewer.user_id:
        return True
    model = await database.data["models"].find_one(
        {"_id": row["model_id"], **viewer.visible},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    return model is not None and Permission.WRITE in viewer.on_model(model)


async def complete_upload(
    database: Database,
    storage: BlobStore,
    viewer: Viewer,
    *,
    upload_id: ObjectId,
    sha256: str,
) -> Row:
    """What the client says the SHA-256 is, once it knows. Needs WRITE.

    One that is COMPLETED, or whose bytes are all here and being verified, is answered as it is:
    CHECKSUM_MISMATCH where they are others. One that still waits for bytes is COMPLETED where these
    contents are stored already and the viewer may download them; SIZE_MISMATCH otherwise.
    """
    row = await upload_for(database, None, viewer, upload_id, "id")
    state = UploadState(row["state"])
    if row["sha256"] not in {None, sha256} and state is not UploadState.FAILED:
        raise Refused(
            ErrorCode.CHECKSUM_MISMATCH,
            f"The upload has the SHA-256 {row['sha256']}, not {sha256}.",
            "sha256",
        )
    if state is UploadState.COMPLETED:
        return row
    if not row["is_open"]:
        raise ended(row)
    if state not in TAKING:
        after: Row | None = await database.data["uploads"].find_one_and_update(
            {"_id": upload_id, "is_open": True, "sha256": row["sha256"]},
            {"$set": {"sha256": sha256}},
            return_document=ReturnDocument.AFTER,
        )
        if after is None:  # it has ended at this moment, or another has said something else
            return await complete_upload(
                database, storage, viewer, upload_id=upload_id, sha256=sha256
            )
        return after
    known = await contents_at_hand(
        database, storage, viewer, [UploadFile(row["path"], row["size_bytes"], sha256)]
    )
    if sha256 not in known:
        raise Refused(
            ErrorCode.SIZE_MISMATCH,
            f"{row['received_bytes']} of {row['size_bytes']} bytes have come: send the rest.",
            "id",
        )
    [done] = await complete_all(database, storage, [Arrived(row, sha256, None, viewer)])
    if done["state"] == UploadState.COMPLETED.value:
        return done
    if done["is_open"]:
        raise Refused(
            ErrorCode.CONFLICT, "Another has begun to send its bytes meanwhile: look again.", "id"
        )
    raise ended(done)


def ended(row: Row) -> Refused:
    """Of an upload that ended without a file."""
    error = row["error"]
    if error is not None:
        return Refused(ErrorCode(error["code"]), error["message"], "id")
    return Refused(
        ErrorCode.INVALID_TRANSITION, f"The upload is {row['state']}: create another one.", "id"
    )


async def pause_upload(
    database: Database,
    storage: BlobStore,
    viewer: Viewer,
    *,
    upload_id: ObjectId,
    comment: str | None = None,
) -> Row:
    """It takes no bytes until a client goes on; a client that is sending some now is told, within
    seconds. For who may write to its model."""
    user_id = viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> Row:
        row = await upload_for(database, session, viewer, upload_id, "id")
        if row["state"] == UploadState.PAUSED.value:
            return row
        if row["state"] not in TAKING_STATES:
            raise _impossible(row, "paused")
        after: Row | None = await database.data["uploads"].find_one_and_update(
            {"_id": upload_id, "state": row["state"]},
            {
                "$set": {
                    "state": UploadState.PAUSED.value,
                    "rate": None,
                    "updated_at": utc_now(),
                },
                "$inc": {"sequence": 1},
            },
            session=session,
            return_document=ReturnDocument.AFTER,
        )
        assert after is not None  # read in this transaction
        await tell_of_upload(session, after, by=user_id, comment=comment)
        return after

    return await database.transaction(work)


async def abort_upload(
    database: Database,
    storage: BlobStore,
    viewer: Viewer,
    *,
    upload_id: ObjectId,
    comment: str | None = None,
) -> Row:
    """It is given up: its bytes are removed, what was reserved is free again. For who may write to its
    model; once more is the same answer. INVALID_TRANSITION where it is a file by now."""
    user_id = viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> tuple[Row, set[str]]:
        row = await upload_for(database, session, viewer, upload_id, "id")
        if row["state"] == UploadState.ABORTED.value:
            return row, set()
        if not row["is_open"]:
            raise _impossible(row, "aborted")
        after, useless = await end_in(
            database, session, upload_id, UploadState.ABORTED, by=user_id, comment=comment
        )
        assert after is not None  # read in this transaction
        return after, useless

    row, useless = await database.transaction(work)
    await discard(storage, useless)
    return row


def _impossible(row: Row, done: str) -> Refused:
    return Refused(
        ErrorCode.INVALID_TRANSITION, f"The upload is {row['state']}: it cannot be {done}.", "id"
    )


# Those that nobody goes on with ------------------------------------------------------------------


async def expire_uploads(database: Database, storage: BlobStore, now: datetime) -> list[Row]:
    """End a batch of uploads that nobody goes on with, as they are then; none when there are no more.

    EXPIRED are those that have waited too long for bytes, ABORTED those whose version or model was
    deleted, FAILED those whose job ended without them.
    """
    return (
        await _expire(database, storage, now)
        or await _abort_orphans(database, storage)
        or await _fail_stuck(database, storage, now)
    )


async def _expire(database: Database, storage: BlobStore, now: datetime) -> list[Row]:
    rows = await _overdue(database, now, TAKING_STATES)
    failing = Failing(ErrorCode.UPLOAD_EXPIRED, "It has waited too long for more bytes.")
    return [
        await end(
            database,
            storage,
            row,
            UploadState.EXPIRED,
            failing=failing,
            states=TAKING,
            where={"expires_at": {"$lt": now}},  # unless more bytes have come meanwhile
        )
        for row in rows
    ]


async def _overdue(database: Database, now: datetime, states: Collection[str]) -> list[Row]:
    return await database.find(
        "uploads",
        {
            "is_open": True,
            "expires_at": {"$lt": now},
            "part_of": None,
            "state": {"$in": sorted(states)},
        },
        sort={"expires_at": 1},
        limit=EXPIRED_AT_ONCE,
    )


async def _abort_orphans(database: Database, storage: BlobStore) -> list[Row]:
    """Of versions that are not there any more."""
    versions = await database.aggregate(
        "uploads",
        [
            {"$match": {"is_open": True, "part_of": None}},
            {"$group": {"_id": {"version_id": "$version_id", "model_id": "$model_id"}}},
            {
                "$lookup": {
                    "from": "versions",
                    "localField": "_id.version_id",
                    "foreignField": "_id",
                    "pipeline": [{"$project": {"status": 1}}],
                    "as": "versions",
                }
            },
            {
                "$lookup": {
                    "from": "models",
                    "localField": "_id.model_id",
                    "foreignField": "_id",
                    "pipeline": [{"$project": {"state": 1}}],
                    "as": "models",
                }
            },
            {
                "$match": {
                    "$or": [
                        {"versions": []},
                        {"versions.status": VersionStatus.DELETED.value},
                        {"models": []},
                        {"models.state": ModelState.DELETED.value},
                    ]
                }
            },
            {"$limit": EXPIRED_AT_ONCE},
        ],
    )
    done: list[Row] = []
    for found in versions:
        version, model = next(iter(found["versions"]), None), next(iter(found["models"]), None)
        rows = await database.find(
            "uploads",
            {"version_id": found["_id"]["version_id"], "is_open": True, "part_of": None},
            limit=EXPIRED_AT_ONCE - len(done),
        )
        failing = gone(version, model)
        done += [
            await end(database, storage, row, UploadState.ABORTED, failing=failing) for row in rows
        ]
        if len(done) >= EXPIRED_AT_ONCE:
            break
    return done


async def _fail_stuck(database: Database, storage: BlobStore, now: datetime) -> list[Row]:
    """Of jobs that ended and left them open: theirs died too often, or was cancelled."""
    rows = await _overdue(database, now, {UploadState.RECEIVED.value, UploadState.VERIFYING.value})
    # Not only its first one: that was cancelled, say, and the publishing of its version put another.
    jobs = await database.find(
        "jobs",
        {
            "subject.id": {"$in": list({row["version_id"] for row in rows})},
            "kind": JobKind.VERIFY_FILE.value,
            "input.upload_id": {"$in": [row["_id"] for row in rows]},
            "state": {"$nin": [state.value for state in ENDED - {JobState.SUCCEEDED}]},
        },
        projection={"input.upload_id": 1},
    )
    going = {job["input"]["upload_id"] for job in jobs}
    failing = Failing(ErrorCode.INTERNAL, "The job that was to verify it has ended without it.")
    return [
        await end(database, storage, row, UploadState.FAILED, failing=failing)
        for row in rows
        if row["_id"] not in going
    ]
