"""Files enter a version: with their contents referenced and all counters right, batch by batch."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.files import FileFormat, FileRole, path_key
from modelharbor.db.models import ModelState
from modelharbor.db.versions import MUTABLE, VersionStatus
from modelharbor.errors import ErrorCode, Refused

from .blobs import refer_to


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file to be: `path` relative with `/`, `sha256` hexadecimal in lower case."""

    path: str
    size_bytes: int
    sha256: str
    role: FileRole
    format: FileFormat


async def add_files(
    database: Database, session: AsyncClientSession, version: Row, entries: Sequence[FileEntry]
) -> Row:
    """Add files to a DRAFT or UPLOADING version, within a transaction that read it; answers it as it
    is then.

    Their contents are announced, and recorded: CONFLICT where not. Files that are there already, with
    the same contents, are left alone; ALREADY_EXISTS where the contents differ, INVALID_TRANSITION
    unless the model is ACTIVE.
    """
    there = await files_at(database, session, version["_id"], [entry.path for entry in entries])
    for entry in entries:
        if entry.path in there and there[entry.path]["sha256"] != entry.sha256:
            raise Refused(
                ErrorCode.ALREADY_EXISTS, f"The version has another file {entry.path}.", "path"
            )
    new = [entry for entry in entries if entry.path not in there]
    if not new:
        return version
    changed, _ = await insert_files(database, session, version, new)
    await refer_to(database, session, Counter(entry.sha256 for entry in new))
    return changed


async def files_at(
    database: Database, session: AsyncClientSession, version_id: ObjectId, paths: Sequence[str]
) -> dict[str, Row]:
    """Those files of a version that are at these paths: `_id` and `sha256`, by path."""
    rows = (
        await database.data["files"]
        .find(
            {"version_id": version_id, "path": {"$in": list(paths)}},
            {"path": 1, "sha256": 1},
            session=session,
        )
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    return {row["path"]: row for row in rows}


async def insert_files(
    database: Database,
    session: AsyncClientSession,
    version: Row,
    entries: Sequence[FileEntry],
    statuses: Collection[VersionStatus] = MUTABLE,
) -> tuple[Row, list[Row]]:
    """New files, with the counters of version and model; who calls it refers to their contents. The
    version as it is then, and the files. INVALID_TRANSITION where the version is in another state, or
    the model not ACTIVE."""
    size_bytes = sum(entry.size_bytes for entry in entries)
    changed: Row | None = await database.data["versions"].find_one_and_update(
        {"_id": version["_id"], "status": {"$in": [status.value for status in statuses]}},
        {"$inc": {"file_count": len(entries), "size_bytes": size_bytes}},
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    if changed is None:
        raise Refused(
            ErrorCode.INVALID_TRANSITION,
            f"Version {version['number']} is {version['status']}: only a DRAFT takes files.",
        )
    rows = [_row(version, entry) for entry in entries]
    await database.data["files"].insert_many(rows, session=session)
    counted = await database.data["models"].update_one(
        {"_id": version["model_id"], "state": ModelState.ACTIVE.value},
        {
            "$inc": {"stats.files": len(entries), "stats.size_bytes": size_bytes},
            "$set": {"stats.as_of": utc_now()},
        },
        session=session,
    )
    if counted.matched_count == 0:
        raise Refused(
            ErrorCode.INVALID_TRANSITION, "The model was archived or deleted: restore it first."
        )
    return changed, rows


def _row(version: Row, entry: FileEntry) -> Row:
    # Raw, not a document: validating 100,000 takes seconds, and every value here is ours.
    return {
        "_id": ObjectId(),
        "version_id": version["_id"],
        "model_id": version["model_id"],
        "path": entry.path,
        "path_key": path_key(entry.path),
        "size_bytes": entry.size_bytes,
        "sha256": entry.sha256,
        "role": entry.role.value,
        "format": entry.format.value,
    }
