"""What a version comes to, once its files are fixed: READY, QUARANTINED or FAILED; and its model then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.files import (
    HARMLESS,
    FileFormat,
    FileRole,
    ScanVerdict,
    is_damaged,
    verdict_of,
)
from modelharbor.db.history import moment
from modelharbor.db.uploads import UploadState
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Refused

from .aliases import set_alias_in
from .models import changed
from .names import bad
from .telling import tell_of_model

CONTENTS_AT_ONCE: Final = 2_000
MOST_NAMED: Final = 10  # files in a reason
MOST_PARAMETERS: Final = 2**63 - 1
PUBLISHED: Final = [VersionStatus.READY.value, VersionStatus.ARCHIVED.value]


async def change_version(
    database: Database, session: AsyncClientSession, version: Row, fields: Mapping[str, Any]
) -> Row:
    """Compare and set: the version after the change, its revision raised."""
    row = await database.data["versions"].find_one_and_update(
        {"_id": version["_id"], "status": version["status"], "revision": version["revision"]},
        {"$set": fields, "$inc": {"revision": 1}},
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    if row is None:
        raise Refused(ErrorCode.CONFLICT, "The version was changed meanwhile: read it again.")
    return row


async def settle_in(
    database: Database,
    session: AsyncClientSession,
    version: Row,
    model: Row,
    *,
    by: ObjectId | None,
    viewer: Viewer | None = None,
    aliases: Sequence[str] = (),
    expected_files: int | None = None,
    inventory: "Inventory | None" = None,
) -> Row:
    """The version as its files make it, within a transaction that read both rows.

    READY where all files are SAFE or SKIPPED; then `aliases`, which are valid, are set for `viewer`.
    QUARANTINED where one is anything else, PENDING too. FAILED where contents are damaged, or where
    fewer files are there than `expected_files`: uploads of the others could not be verified.
    Refused where there are no files at all. `inventory`: where this transaction has read it already.
    """
    version_id = version["_id"]
    if inventory is None:
        inventory = await read_inventory(database, session, version_id)
    files, contents = inventory.files, inventory.contents
    if not files and not expected_files:
        raise bad("The version has no files: add some first.", "id")
    settled = _settled(files, contents)
    missing = max(0, (expected_files or 0) - len(files))
    if missing:
        names = await _missing_names(database, session, version_id, files, missing)
        settled = _Settled(VersionStatus.FAILED, _reason(missing, FAILED, names))
    is_ready = settled.status is VersionStatus.READY
    digest = files_digest([(file.path, file.sha256) for file in files])
    size_bytes = sum(file.size_bytes for file in files)
    stored_bytes = await own_bytes(database, session, version, files) if is_ready else 0
    at = moment(model)
    after = await change_version(
        database,
        session,
        version,
        {
            "status": settled.status.value,
            "status_reason": settled.reason,
            "digest": None if settled.status is VersionStatus.FAILED else digest,
            "parameters": _parameters(files, contents),
            "file_count": len(files),
            "size_bytes": size_bytes,
            "published_at": at if is_ready else None,
        },
    )
    model = await update_model_of(
        database,
        session,
        model,
        at,
        files=len(files) - version["file_count"],
        size_bytes=size_bytes - version["size_bytes"],
        stored_bytes=stored_bytes,
    )
    told = {"digest": digest} if is_ready else {"status_reason": settled.reason}
    await tell_of_model(
        session,
        EVENTS[settled.status],
        model,
        by=by,
        version_id=version_id,
        before={"status": version["status"]},
        after={"status": settled.status.value, **told},
    )
    if is_ready and viewer is not None:
        for name in aliases:
            model = await set_alias_in(
                database,
                session,
                viewer,
                model,
                name=name,
                version_id=version_id,
                path="setAliases",
                at=at,
            )
    return after


EVENTS: Final[Mapping[VersionStatus, EventKind]] = {
    VersionStatus.READY: EventKind.VERSION_READY,
    VersionStatus.QUARANTINED: EventKind.VERSION_QUARANTINED,
    VersionStatus.FAILED: EventKind.VERSION_FAILED,
}
FAILED: Final = "could not be verified"
QUARANTINED: Final = "not known to be harmless"


# The files, and what is known of their contents --------------------------------------------------


@dataclass(frozen=True, slots=True)
class File:
    path: str
    sha256: str
    size_bytes: int
    role: str


@dataclass(frozen=True, slots=True)
class _Contents:
    verdict: ScanVerdict
    is_damaged: bool
    format: str
    parameters: int | None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The files of a version, and what is known of their contents."""

    files: Sequence[File]
    contents: Mapping[str, _Contents]

    @property
    def is_inspected(self) -> bool:
        """Nothing of it is PENDING."""
        return all(each.verdict is not ScanVerdict.PENDING for each in self.contents.values())


@dataclass(frozen=True, slots=True)
class _Settled:
    status: VersionStatus
    reason: str | None = None


UNKNOWN: Final = _Contents(verdict_of(None), False, FileFormat.OTHER.value, None)


async def files_of(
    database: Database, session: AsyncClientSession, version_id: ObjectId
) -> list[File]:
    return [
        File(**row)
        async for row in database.data["files"].find(
            {"version_id": version_id},
            {"_id": 0, **dict.fromkeys(("path", "sha256", "size_bytes", "role"), 1)},
            session=session,
            batch_size=10_000,
            max_time_ms=database.query_timeout_ms,
        )
    ]


async def read_inventory(
    database: Database, session: AsyncClientSession, version_id: ObjectId
) -> Inventory:
    files = await files_of(database, session, version_id)
    return Inventory(files, await _contents_of(database, session, files))


async def _contents_of(
    database: Database, session: AsyncClientSession, files: Sequence[File]
) -> dict[str, _Contents]:
    """By their SHA-256; those that nothing is known of are missing."""
    digests = sorted({file.sha256 for file in files})
    found: dict[str, _Contents] = {}
    for start in range(0, len(digests), CONTENTS_AT_ONCE):
        rows = database.data["blobs"].find(
            {"sha256": {"$in": digests[start : start + CONTENTS_AT_ONCE]}},
            {
                "_id": 0,
                **dict.fromkeys(("sha256", "stored", "damaged_at"), 1),
                **dict.fromkeys(("inspection.verdict", "inspection.format"), 1),
                "inspection.tensors.parameter_count": 1,
            },
            session=session,
            batch_size=CONTENTS_AT_ONCE,
            max_time_ms=database.query_timeout_ms,
        )
        async for row in rows:
            inspection = row.get("inspection") or {}
            found[row["sha256"]] = _Contents(
                verdict_of(row),
                is_damaged(row),
                inspection.get("format", FileFormat.OTHER.value),
                (inspection.get("tensors") or {}).get("parameter_count"),
            )
    return found


def _settled(files: Sequence[File], contents: Mapping[str, _Contents]) -> _Settled:
    damaged: list[str] = []
    troubled: list[str] = []
    for file in files:
        of_file = contents.get(file.sha256, UNKNOWN)
        if of_file.is_damaged:
            damaged.append(file.path)
        elif of_file.verdict not in HARMLESS:
            troubled.append(f"{file.path} ({of_file.verdict.value})")
    if damaged:
        return _Settled(VersionStatus.FAILED, _reason(len(damaged), FAILED, sorted(damaged)))
    if troubled:
        reason = _reason(len(troubled), QUARANTINED, sorted(troubled))
        return _Settled(VersionStatus.QUARANTINED, reason)
    return _Settled(VersionStatus.READY)


def _reason(count: int, what: str, names: Sequence[str]) -> str:
    """A sentence: how many files are what, with some of their names."""
    files = "1 file" if count == 1 else f"{count:,} files"
    verb = "is " if what == QUARANTINED and count == 1 else "are " if what == QUARANTINED else ""
    shown = ", ".join(names[:MOST_NAMED])
    if not shown:
        return f"{files} {verb}{what}."
    rest = count - min(len(names), MOST_NAMED)
    more = f" and {rest:,} more" if rest else ""
    return f"{files} {verb}{what}: {shown}{more}."


async def _missing_names(
    database: Database,
    session: AsyncClientSession,
    version_id: ObjectId,
    files: Sequence[File],
    most: int,
) -> list[str]:
    """Of uploads that became no file of the version, the last ones first."""
    there = {file.path for file in files}
    rows = database.data["uploads"].find(
        {
            "version_id": version_id,
            "part_of": None,
            "state": {"$ne": UploadState.COMPLETED.value},
            "received_bytes": {"$gt": 0},
        },
        {"_id": 0, "path": 1},
        session=session,
        sort=[("_id", -1)],
        limit=CONTENTS_AT_ONCE,
        max_time_ms=database.query_timeout_ms,
    )
    paths = dict.fromkeys([row["path"] async for row in rows if row["path"] not in there])
    return sorted(list(paths)[:most])


def _parameters(files: Sequence[File], contents: Mapping[str, _Contents]) -> int | None:
    """Of all tensors in the weights. Shards of one model sum up, equal contents count once; where
    several formats hold the same weights, the one with the most is taken."""
    weights = {file.sha256 for file in files if file.role == FileRole.WEIGHTS.value}
    sums: dict[str, int] = {}
    for digest in weights:
        of_file = contents.get(digest, UNKNOWN)
        if of_file.parameters is not None:
            sums[of_file.format] = sums.get(of_file.format, 0) + of_file.parameters
    return min(max(sums.values()), MOST_PARAMETERS) if sums else None


def files_digest(files: Sequence[tuple[str, str]]) -> str:
    """SHA-256 over `path NUL sha256 LF` of each file, sorted by path: equal contents, equal digest."""
    digest = sha256()
    for path, content in sorted(files):
        digest.update(f"{path}\0{content}\n".encode())
    return digest.hexdigest()


# The model ----------------------------------------------------------------------------------------


async def own_bytes(
    database: Database, session: AsyncClientSession, version: Row, files: Sequence[File]
) -> int:
    """Length of the contents that no other published version of the model has.

    What a neighbour shares, mostly nearly all, is found in one read. The rest is asked for in parts,
    so that each command stays far below its timeout.
    """
    own = {file.sha256: file for file in files}
    neighbour = await database.data["versions"].find_one(
        {
            "model_id": version["model_id"],
            "_id": {"$ne": version["_id"]},
            "status": {"$in": PUBLISHED},
        },
        {"_id": 1},
        sort=[("number", -1)],
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    if neighbour is None:
        return sum(file.size_bytes for file in own.values())
    for file in await files_of(database, session, neighbour["_id"]):
        own.pop(file.sha256, None)
    paths = [file.path for file in own.values()]
    total = 0
    for start in range(0, len(paths), CONTENTS_AT_ONCE):
        cursor = await database.data["files"].aggregate(
            _not_elsewhere(version, paths[start : start + CONTENTS_AT_ONCE]),
            session=session,
            maxTimeMS=database.query_timeout_ms,
        )
        total += sum([row["size_bytes"] async for row in cursor])
    return total


def _not_elsewhere(version: Row, paths: list[str]) -> list[dict[str, Any]]:
    """The length in all of these files whose contents no other published version has. For each it
    stops at the first that has them: a model may have 200,000 versions with one and the same file."""
    return [
        {"$match": {"version_id": version["_id"], "path": {"$in": paths}}},
        {
            "$lookup": {
                "from": "files",
                "localField": "sha256",
                "foreignField": "sha256",
                "pipeline": [
                    {
                        "$match": {
                            "model_id": version["model_id"],
                            "version_id": {"$ne": version["_id"]},
                        }
                    },
                    {
                        "$lookup": {
                            "from": "versions",
                            "localField": "version_id",
                            "foreignField": "_id",
                            "pipeline": [
                                {"$match": {"status": {"$in": PUBLISHED}}},
                                {"$project": {"_id": 1}},
                            ],
                            "as": "published",
                        }
                    },
                    {"$match": {"published": {"$ne": []}}},
                    {"$limit": 1},
                    {"$project": {"_id": 1}},
                ],
                "as": "others",
            }
        },
        {"$match": {"others": []}},
        {"$group": {"_id": None, "size_bytes": {"$sum": "$size_bytes"}}},
    ]


async def update_model_of(
    database: Database,
    session: AsyncClientSession,
    model: Row,
    at: datetime,
    *,
    versions: int = 0,
    files: int = 0,
    size_bytes: int = 0,
    stored_bytes: int = 0,
) -> Row:
    """Bring the model's latest version, what it keeps of that, and its counters up to date.
    `at`: the moment of the change, see db/history.py."""
    latest = await database.data["versions"].find_one(
        {"model_id": model["_id"], "status": VersionStatus.READY.value},
        {"parameters": 1},
        sort=[("number", -1)],
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    latest_id = latest["_id"] if latest else None
    fields: dict[str, Any] = {"updated_at": at, "latest_version_id": latest_id}
    if versions or files or size_bytes or stored_bytes:
        fields["stats.as_of"] = at
    if latest_id != model["latest_version_id"]:
        formats = await database.data["files"].distinct(
            "format",
            {"version_id": latest_id},
            session=session,
            maxTimeMS=database.query_timeout_ms,
        )
        fields["formats"] = sorted(formats)
        fields["parameters"] = (latest.get("parameters") or 0) if latest else 0
    return await changed(
        database,
        session,
        {"_id": model["_id"]},
        {
            "$set": fields,
            "$inc": {
                "stats.versions": versions,
                "stats.files": files,
                "stats.size_bytes": size_bytes,
                "stats.stored_bytes": stored_bytes,
            },
        },
    )
