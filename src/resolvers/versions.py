"""Versions: create, describe, publish, archive, delete."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.errors import ErrorCode, Refused
from modelharbor.settings import Settings

from .access import full_name, may, model_for, refuse_stale, refuse_unless_active, version_for
from .aliases import set_alias_in
from .idempotency import Attempt, create_once
from .models import UNSET, Given, changed, differs
from .names import (
    DESCRIPTION,
    LABEL,
    bad,
    changed_tags,
    valid_alias,
    valid_comment,
    valid_properties,
    valid_tags,
    valid_text,
)
from .telling import tell_of_model

CONTENTS_AT_ONCE: Final = 2_000
PUBLISHED: Final = [VersionStatus.READY.value, VersionStatus.ARCHIVED.value]


async def create_version(
    database: Database,
    viewer: Viewer,
    settings: Settings,
    *,
    model_id: ObjectId,
    label: str | None = None,
    description: str | None = None,
    tags: Sequence[str] | None = None,
    properties: Any = None,
    idempotency_key: str | None = None,
) -> Row:
    """A DRAFT with the model's next number. Needs WRITE."""
    user_id = viewer.person_id()
    fields = valid_version_fields(
        label=label, description=description, tags=tags, properties=properties
    )

    async def make(session: AsyncClientSession, attempt: Attempt) -> Row:
        return await create_version_in(
            database, session, viewer, model_id=model_id, fields=fields, version_id=attempt.id
        )

    async def find(session: AsyncClientSession, attempt: Attempt) -> Row | None:
        model = await model_for(database, session, viewer, model_id, Permission.WRITE, "modelId")
        return await database.data["versions"].find_one(
            {
                "_id": attempt.id,
                "model_id": model["_id"],
                "status": {"$ne": VersionStatus.DELETED.value},
            },
            session=session,
            max_time_ms=database.query_timeout_ms,
        )

    return await create_once(
        database,
        settings,
        user_id=user_id,
        operation="createModelVersion",
        key=idempotency_key,
        given={**fields, "model_id": model_id},
        make=make,
        find=find,
    )


def valid_version_fields(
    *,
    label: str | None = None,
    description: str | None = None,
    tags: Sequence[str] | None = None,
    properties: Any = None,
) -> dict[str, Any]:
    """What `create_version_in` takes as `fields`."""
    return {
        "label": valid_text(label, LABEL, "label"),
        "description": valid_text(description, DESCRIPTION, "description", lines=True),
        "tags": valid_tags(tags, "tags"),
        "properties": valid_properties(properties, "properties"),
    }


async def create_version_in(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    *,
    model_id: ObjectId,
    fields: Mapping[str, Any],
    version_id: PydanticObjectId | None = None,
) -> Row:
    """Create a DRAFT within a transaction; `fields` are valid."""
    user_id = viewer.person_id()
    model = await model_for(database, session, viewer, model_id, Permission.WRITE, "modelId")
    refuse_unless_active(model, "modelId")
    now = utc_now()
    model = await changed(
        database,
        session,
        {"_id": model_id},
        {
            "$inc": {"last_number": 1, "stats.versions": 1},
            "$set": {"updated_at": now, "stats.as_of": now},
        },
    )
    document = VersionDocument(
        id=version_id or PydanticObjectId(),
        model_id=PydanticObjectId(model_id),
        number=model["last_number"],
        created_by_id=PydanticObjectId(user_id),
        created_at=now,
        **fields,
    )
    await document.insert(session=session)
    await tell_of_model(
        session,
        EventKind.VERSION_CREATED,
        model,
        by=user_id,
        version_id=document.id,
        after={"number": document.number, "status": document.status.value},
    )
    row: Row = get_dict(document, to_db=True)
    return row


async def _change(
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


async def update_version(
    database: Database,
    viewer: Viewer,
    *,
    version_id: ObjectId,
    expected_revision: int | None = None,
    label: Given[str | None] = UNSET,
    description: Given[str | None] = UNSET,
    add_tags: Sequence[str] | None = None,
    remove_tags: Sequence[str] | None = None,
    properties: Any = UNSET,
) -> Row:
    """What is said about a version can change at all times, its files cannot. Needs WRITE.

    None clears a field, UNSET leaves it; nothing is written where all is equal.
    """
    viewer.person_id()
    wanted: dict[str, Any] = {}
    if label is not UNSET:
        wanted["label"] = valid_text(label, LABEL, "label")
    if description is not UNSET:
        wanted["description"] = valid_text(description, DESCRIPTION, "description", lines=True)
    if properties is not UNSET:
        wanted["properties"] = valid_properties(properties, "properties")
    add, remove = valid_tags(add_tags, "addTags"), valid_tags(remove_tags, "removeTags")

    async def work(session: AsyncClientSession) -> Row:
        version, model = await version_for(
            database, session, viewer, version_id, Permission.WRITE, "id"
        )
        refuse_stale(version, expected_revision)
        refuse_unless_active(model, "id")
        after = dict(wanted)
        if add or remove:
            after["tags"] = changed_tags(version["tags"], add, remove, "addTags")
        after = {field: value for field, value in after.items() if differs(version[field], value)}
        if not after:
            return version
        before = {field: version[field] for field in after}
        # The model is written to as well: who archives it at the same time collides with this.
        await changed(
            database,
            session,
            {"_id": model["_id"], "state": model["state"]},
            {"$set": {"updated_at": utc_now()}},
        )
        await tell_of_model(
            session,
            EventKind.VERSION_UPDATED,
            model,
            by=viewer.person_id(),
            version_id=version_id,
            before=before,
            after=after,
        )
        return await _change(database, session, version, after)

    return await database.transaction(work)


async def publish_version(
    database: Database,
    viewer: Viewer,
    *,
    version_id: ObjectId,
    set_aliases: Sequence[str] | None = None,
) -> Row:
    """DRAFT → PROCESSING → READY: its files are fixed, aliases may be set at once. Needs PUBLISH."""
    return await database.transaction(
        lambda session: publish_version_in(
            database, session, viewer, version_id=version_id, set_aliases=set_aliases
        )
    )


async def publish_version_in(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    *,
    version_id: ObjectId,
    set_aliases: Sequence[str] | None = None,
) -> Row:
    """Publish within a transaction. The counters of version and model are brought up to its files."""
    viewer.person_id()
    aliases = list(dict.fromkeys(valid_alias(name, "setAliases") for name in set_aliases or []))
    version, model = await version_for(
        database, session, viewer, version_id, Permission.PUBLISH, "id"
    )
    refuse_unless_active(model, "id")
    if version["status"] != VersionStatus.DRAFT.value:
        raise _impossible(version, VersionStatus.READY)
    version = await _change(database, session, version, {"status": VersionStatus.PROCESSING.value})
    files = await _files_of(database, session, version_id)
    if not files:
        raise bad("The version has no files: add some first.", "id")
    digest = files_digest([(file.path, file.sha256) for file in files])
    size_bytes = sum(file.size_bytes for file in files)
    stored_bytes = await _own_bytes(database, session, version, files)
    ready = await _change(
        database,
        session,
        version,
        {
            "status": VersionStatus.READY.value,
            "digest": digest,
            "file_count": len(files),
            "size_bytes": size_bytes,
            "published_at": utc_now(),
        },
    )
    await tell_of_model(
        session,
        EventKind.VERSION_READY,
        model,
        by=viewer.person_id(),
        version_id=version_id,
        before={"status": VersionStatus.DRAFT.value},
        after={"status": VersionStatus.READY.value, "digest": digest},
    )
    model = await _settle(
        database,
        session,
        model,
        files=len(files) - version["file_count"],
        size_bytes=size_bytes - version["size_bytes"],
        stored_bytes=stored_bytes,
    )
    for name in aliases:
        model = await set_alias_in(
            database, session, viewer, model, name=name, version_id=version_id, path="setAliases"
        )
    return ready


async def archive_version(
    database: Database,
    viewer: Viewer,
    *,
    version_id: ObjectId,
    expected_revision: int | None = None,
    comment: str | None = None,
) -> Row:
    """READY → ARCHIVED: there still, but no longer the latest. Needs PUBLISH."""
    viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> Row:
        version, model = await version_for(
            database, session, viewer, version_id, Permission.PUBLISH, "id"
        )
        refuse_stale(version, expected_revision)
        refuse_unless_active(model, "id")
        if version["status"] != VersionStatus.READY.value:
            raise _impossible(version, VersionStatus.ARCHIVED)
        archived = await _change(
            database, session, version, {"status": VersionStatus.ARCHIVED.value}
        )
        await tell_of_model(
            session,
            EventKind.VERSION_ARCHIVED,
            model,
            by=viewer.person_id(),
            version_id=version_id,
            before={"status": version["status"]},
            after={"status": VersionStatus.ARCHIVED.value},
            comment=comment,
        )
        await _settle(database, session, model)
        return archived

    return await database.transaction(work)


async def delete_version(
    database: Database, viewer: Viewer, *, version_id: ObjectId, comment: str | None = None
) -> ObjectId:
    """Any state → DELETED: gone for everyone, its number is never given again.

    Needs PUBLISH, a DRAFT only WRITE. CONFLICT while an alias points at it.
    """
    viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> ObjectId:
        version, model = await version_for(
            database, session, viewer, version_id, Permission.WRITE, "id"
        )
        if version["status"] != VersionStatus.DRAFT.value:
            may(viewer, Permission.PUBLISH, model, "id")
        refuse_unless_active(model, "id")
        pointing = [a["name"] for a in model["aliases"] if a["version_id"] == version_id]
        if pointing:
            raise Refused(
                ErrorCode.CONFLICT,
                f"Aliases point at version {version['number']} of {full_name(model)}: {', '.join(pointing)}. Move or delete them first.",
                "id",
            )
        stored_bytes = 0
        if version["status"] in PUBLISHED:
            files = await _files_of(database, session, version_id)
            stored_bytes = await _own_bytes(database, session, version, files)
        await _change(database, session, version, {"status": VersionStatus.DELETED.value})
        await tell_of_model(
            session,
            EventKind.VERSION_DELETED,
            model,
            by=viewer.person_id(),
            version_id=version_id,
            before={"number": version["number"], "status": version["status"]},
            after={"status": VersionStatus.DELETED.value},
            comment=comment,
        )
        await _settle(
            database,
            session,
            model,
            versions=-1,
            files=-version["file_count"],
            size_bytes=-version["size_bytes"],
            stored_bytes=-stored_bytes,
        )
        return version_id

    return await database.transaction(work)


def _impossible(version: Row, new: VersionStatus) -> Refused:
    return Refused(
        ErrorCode.INVALID_TRANSITION,
        f"Version {version['number']} is {version['status']}: it cannot become {new.value}.",
        "id",
    )


def files_digest(files: Sequence[tuple[str, str]]) -> str:
    """SHA-256 over `path NUL sha256 LF` of each file, sorted by path: equal contents, equal digest."""
    digest = sha256()
    for path, content in sorted(files):
        digest.update(f"{path}\0{content}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    sha256: str
    size_bytes: int


async def _files_of(
    database: Database, session: AsyncClientSession, version_id: ObjectId
) -> list[_File]:
    return [
        _File(**row)
        async for row in database.data["files"].find(
            {"version_id": version_id},
            {"_id": 0, "path": 1, "sha256": 1, "size_bytes": 1},
            session=session,
            batch_size=10_000,
            max_time_ms=database.query_timeout_ms,
        )
    ]


async def _own_bytes(
    database: Database, session: AsyncClientSession, version: Row, files: Sequence[_File]
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
    for file in await _files_of(database, session, neighbour["_id"]):
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


async def _settle(
    database: Database,
    session: AsyncClientSession,
    model: Row,
    *,
    versions: int = 0,
    files: int = 0,
    size_bytes: int = 0,
    stored_bytes: int = 0,
) -> Row:
    """Bring the model's latest version, its formats and its counters up to date."""
    latest = await database.data["versions"].find_one(
        {"model_id": model["_id"], "status": VersionStatus.READY.value},
        {"_id": 1},
        sort=[("number", -1)],
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    latest_id = latest["_id"] if latest else None
    now = utc_now()
    fields: dict[str, Any] = {"updated_at": now, "latest_version_id": latest_id}
    if versions or files or size_bytes or stored_bytes:
        fields["stats.as_of"] = now
    if latest_id != model["latest_version_id"]:
        formats = await database.data["files"].distinct(
            "format",
            {"version_id": latest_id},
            session=session,
            maxTimeMS=database.query_timeout_ms,
        )
        fields["formats"] = sorted(formats)
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
