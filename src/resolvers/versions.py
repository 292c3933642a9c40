"""Versions: create, describe, publish, release, archive, delete."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer, job_principals
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.history import moment
from modelharbor.db.jobs import ENDED, JobKind
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import TAKING, UploadState
from modelharbor.db.versions import MUTABLE, VersionDocument, VersionStatus
from modelharbor.errors import ErrorCode, Refused
from modelharbor.jobs.put import put_job
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore

from .access import full_name, may, model_for, refuse_stale, refuse_unless_active, version_for
from .idempotency import Attempt, create_once
from .models import UNSET, Given, changed, differs
from .names import (
    COMMENT,
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
from .settling import (
    PUBLISHED,
    change_version,
    files_of,
    own_bytes,
    read_inventory,
    settle_in,
    update_model_of,
)
from .telling import tell_of_model
from .uploads import UploadFile, contents_at_hand, create_uploads_in, valid_files

SETTLED_AT_ONCE: Final = 2_000  # files, while somebody waits for the answer
LEAST_REASON: Final = 3  # characters


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
    files: Sequence[UploadFile] = (),
    storage: BlobStore | None = None,
    idempotency_key: str | None = None,
) -> Row:
    """A DRAFT with the model's next number; UPLOADING with `files`, which take `storage`: they are
    announced in the same transaction, as by `create_uploads`. Needs WRITE."""
    user_id = viewer.person_id()
    fields = valid_version_fields(
        label=label, description=description, tags=tags, properties=properties
    )
    given, known = [[each.path, each.size_bytes, each.sha256] for each in files], {}
    if storage is not None and files:
        await model_for(database, None, viewer, model_id, Permission.WRITE, "modelId")
        known = await contents_at_hand(database, storage, viewer, valid_files(files, settings))

    async def make(session: AsyncClientSession, attempt: Attempt) -> Row:
        version = await create_version_in(
            database, session, viewer, model_id=model_id, fields=fields, version_id=attempt.id
        )
        if storage is None or not files:
            return version
        model = await model_for(database, session, viewer, model_id, Permission.WRITE, "modelId")
        await create_uploads_in(
            database, session, storage, viewer, settings, version, model, files, known=known
        )
        return await find(session, attempt) or version

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
        given={**fields, "model_id": model_id, **({"files": given} if given else {})},
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
        return await change_version(database, session, version, after)

    return await database.transaction(work)


@dataclass(frozen=True, slots=True)
class Published:
    """The version, settled; or PROCESSING, with the job that will settle it."""

    version: Row
    job: Row | None = None


async def publish_version(
    database: Database,
    viewer: Viewer,
    *,
    version_id: ObjectId,
    set_aliases: Sequence[str] | None = None,
) -> Published:
    """Its files are fixed from now on. Needs PUBLISH.

    What has few files, all of them inspected, is settled at once (READY, QUARANTINED or FAILED: see
    `settle_in`); anything else is PROCESSING, until the job has waited for its files. Aliases are set
    when it is READY. INVALID_TRANSITION while uploads take bytes. After it: `wake` where there is a job.
    """
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
    most_files: int | None = SETTLED_AT_ONCE,
) -> Published:
    """Publish within a transaction: one with more than `most_files` files is left to a job."""
    user_id = viewer.person_id()
    aliases = list(dict.fromkeys(valid_alias(name, "setAliases") for name in set_aliases or []))
    version, model = await version_for(
        database, session, viewer, version_id, Permission.PUBLISH, "id"
    )
    refuse_unless_active(model, "id")
    if VersionStatus(version["status"]) not in MUTABLE:
        raise _impossible(version, VersionStatus.READY)
    for name in aliases:  # what is refused is refused now, not when the job comes to it
        guarded = any(each["name"] == name and each["protected"] for each in model["aliases"])
        may(viewer, Permission.ADMINISTER if guarded else Permission.PROMOTE, model, "setAliases")
    awaited = await _awaited_uploads(database, session, version)
    count = await database.data["files"].count_documents(
        {"version_id": version_id}, session=session, maxTimeMS=database.query_timeout_ms
    )
    if not count and not awaited:
        raise bad("The version has no files: add some first.", "id")
    is_small = most_files is None or count <= most_files
    if is_small and not awaited and not await _is_at_work(database, session, version_id):
        inventory = await read_inventory(database, session, version_id)
        if inventory.is_inspected:
            settled = await settle_in(
                database,
                session,
                version,
                model,
                by=user_id,
                viewer=viewer,
                aliases=aliases,
                inventory=inventory,
            )
            return Published(settled)
    before = {"status": version["status"]}
    version = await change_version(
        database, session, version, {"status": VersionStatus.PROCESSING.value}
    )
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
        by=user_id,
        version_id=version_id,
        before=before,
        after={"status": version["status"]},
    )
    job = await put_job(
        database,
        session,
        kind=JobKind.FINALIZE_VERSION,
        input={"version_id": version_id, "aliases": aliases, "files": count + awaited},
        created_by_id=user_id,
        scopes=sorted(scope.value for scope in viewer.scopes),
        principals=job_principals(user_id, model["owner_id"]),
        subject=version_subject(version_id),
    )
    return Published(version, job)


def version_subject(version_id: ObjectId) -> Row:
    """Of jobs: for those that are about a version or its files."""
    return {"type": "ModelVersion", "id": version_id}


async def _awaited_uploads(database: Database, session: AsyncClientSession, version: Row) -> int:
    """How many uploads have all their bytes, and are to become files of it."""
    rows = (
        await database.data["uploads"]
        .find(
            {"version_id": version["_id"], "part_of": None, "is_open": True},
            {"_id": 0, "state": 1},
            session=session,
        )
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    taking = sum(UploadState(row["state"]) in TAKING for row in rows)
    if taking:
        uploads = "1 upload waits" if taking == 1 else f"{taking:,} uploads wait"
        raise Refused(
            ErrorCode.INVALID_TRANSITION,
            f"{uploads} for bytes for version {version['number']}: complete or abort them first.",
            "id",
        )
    return len(rows)


async def _is_at_work(
    database: Database, session: AsyncClientSession, version_id: ObjectId
) -> bool:
    """Whether a job has still to see to a file of the version."""
    job = await database.data["jobs"].find_one(
        {
            "subject.id": version_id,
            "kind": JobKind.VERIFY_FILE.value,
            "state": {"$nin": [state.value for state in ENDED]},
        },
        {"_id": 1},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    return job is not None


async def release_version(
    database: Database, viewer: Viewer, *, version_id: ObjectId, reason: str
) -> Row:
    """QUARANTINED → READY, all the same: who does it says why, and that stays. Needs PUBLISH."""
    viewer.person_id()
    said = valid_text(reason, COMMENT, "reason", lines=True)
    if said is None or len(said) < LEAST_REASON:
        raise bad(f"Say why, in at least {LEAST_REASON} characters.", "reason")

    async def work(session: AsyncClientSession) -> Row:
        version, model = await version_for(
            database, session, viewer, version_id, Permission.PUBLISH, "id"
        )
        refuse_unless_active(model, "id")
        if version["status"] != VersionStatus.QUARANTINED.value:
            raise _impossible(version, VersionStatus.READY)
        files = await files_of(database, session, version_id)
        stored_bytes = await own_bytes(database, session, version, files)
        at = moment(model)
        released = await change_version(
            database,
            session,
            version,
            {
                "status": VersionStatus.READY.value,
                "status_reason": said,
                "published_at": at,
            },
        )
        model = await update_model_of(database, session, model, at, stored_bytes=stored_bytes)
        await tell_of_model(
            session,
            EventKind.VERSION_RELEASED,
            model,
            by=viewer.person_id(),
            version_id=version_id,
            before={"status": version["status"], "status_reason": version["status_reason"]},
            after={"status": VersionStatus.READY.value, "status_reason": said},
            comment=said,
        )
        return released

    return await database.transaction(work)


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
        archived = await change_version(
            database, session, version, {"status": VersionStatus.ARCHIVED.value}
        )
        model = await update_model_of(database, session, model, moment(model))
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
        return archived

    return await database.transaction(work)


async def delete_version(
    database: Database, viewer: Viewer, *, version_id: ObjectId, comment: str | None = None
) -> ObjectId:
    """Any state → DELETED: gone for everyone, its number is never given again.

    Needs PUBLISH, before it was published only WRITE. CONFLICT while an alias points at it.
    """
    viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> ObjectId:
        version, model = await version_for(
            database, session, viewer, version_id, Permission.WRITE, "id"
        )
        if VersionStatus(version["status"]) not in MUTABLE:
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
            files = await files_of(database, session, version_id)
            stored_bytes = await own_bytes(database, session, version, files)
        await change_version(database, session, version, {"status": VersionStatus.DELETED.value})
        model = await update_model_of(
            database,
            session,
            model,
            moment(model),
            versions=-1,
            files=-version["file_count"],
            size_bytes=-version["size_bytes"],
            stored_bytes=-stored_bytes,
        )
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
        return version_id

    return await database.transaction(work)


def _impossible(version: Row, new: VersionStatus) -> Refused:
    return Refused(
        ErrorCode.INVALID_TRANSITION,
        f"Version {version['number']} is {version['status']}: it cannot become {new.value}.",
        "id",
    )
