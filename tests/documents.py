"""Documents for tests, as the resolvers would write them, with what a test does not care about filled in."""

from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer, job_principals, model_principals
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.base import BaseDocument, Row
from modelharbor.db.connection import Database
from modelharbor.db.files import FileDocument
from modelharbor.db.jobs import JobDocument, JobKind
from modelharbor.db.models import ModelDocument, Stats, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import OPEN, UploadDocument, UploadState
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.resolvers.telling import tell_of_upload

START = datetime(2026, 1, 1, tzinfo=UTC)
SCOPES = frozenset(Permission) - {Permission.OPERATE}


def row_of(document: BaseDocument) -> Row:
    """The document as it is stored."""
    from beanie.odm.utils.dump import get_dict

    row: Row = get_dict(document, to_db=True)
    return row


async def insert_actor(
    login: str, kind: ActorKind = ActorKind.USER, **values: Any
) -> ActorDocument:
    actor = ActorDocument(kind=kind, login=login, login_lower=login.lower(), **values)
    await actor.insert()
    return actor


def viewer_of(actor: ActorDocument, roles: dict[Any, Role] | None = None) -> Viewer:
    return Viewer(user=row_of(actor), roles=roles or {}, scopes=SCOPES)


async def insert_model(
    owner: ActorDocument,
    name: str,
    *,
    visibility: Visibility = Visibility.PUBLIC,
    **values: Any,
) -> ModelDocument:
    stats = values.pop("stats", {})
    model = ModelDocument(
        owner_id=owner.id,
        owner_login=owner.login,
        owner_login_lower=owner.login_lower,
        owner_kind=owner.kind,
        name=name,
        name_lower=name.lower(),
        visibility=visibility,
        stats=Stats(**{"as_of": START, **stats}),
        **{"created_at": START, "updated_at": START, **values},
    )
    model.principals = model_principals(row_of(model))
    await model.insert()
    return model


async def insert_version(
    database: Database, model: ModelDocument, files: dict[str, int], **values: Any
) -> VersionDocument:
    """A READY version, with files of these lengths; counters of the model follow."""
    model.last_number += 1
    version = VersionDocument(
        model_id=model.id,
        number=model.last_number,
        **{
            "status": VersionStatus.READY,
            "file_count": len(files),
            "size_bytes": sum(files.values()),
            "created_at": START,
            **values,
        },
    )
    await version.insert()
    for path, size in files.items():
        await FileDocument(
            version_id=version.id,
            model_id=model.id,
            path=path,
            size_bytes=size,
            sha256=f"{size:064x}",
        ).insert()
    await database.data["models"].update_one(
        {"_id": model.id},
        {
            "$set": {"latest_version_id": version.id, "last_number": model.last_number},
            "$inc": {
                "stats.versions": 1,
                "stats.files": len(files),
                "stats.size_bytes": sum(files.values()),
            },
        },
    )
    return version


async def insert_upload(
    creator: ActorDocument, model: ModelDocument, version: VersionDocument, path: str, **values: Any
) -> UploadDocument:
    """One of 100 bytes, unless it is said: seen by its creator and who belongs to the model's owner."""
    state = values.get("state", UploadState.CREATED)
    upload = UploadDocument(
        **{
            "version_id": version.id,
            "model_id": model.id,
            "owner_id": model.owner_id,
            "principals": job_principals(creator.id, model.owner_id),
            "created_by_id": creator.id,
            "path": path,
            "path_key": path.lower(),
            "size_bytes": 100,
            "is_open": state in OPEN,
            "ended_at": None if state in OPEN else START,
            "expires_at": START + timedelta(days=1),
            "created_at": START,
            "updated_at": START,
            **values,
        }
    )
    await upload.insert()
    return upload


async def change_upload(database: Database, upload: UploadDocument, state: UploadState) -> None:
    """With its event, as all changes of states are."""

    async def work(session: AsyncClientSession) -> None:
        row = await database.data["uploads"].find_one_and_update(
            {"_id": upload.id},
            {"$set": {"state": state.value}, "$inc": {"sequence": 1}},
            session=session,
            return_document=ReturnDocument.AFTER,
        )
        assert row is not None
        await tell_of_upload(session, row)

    await database.transaction(work)


async def receive_bytes(database: Database, upload: UploadDocument, received: int) -> None:
    """As its receiver says that so many are on disk."""
    await database.data["uploads"].update_one(
        {"_id": upload.id},
        {
            "$set": {
                "received_bytes": received,
                "rate": 7.5,
                "segments": [{"key": "incoming/x", "size_bytes": received}],
                "holder": "me",
            },
            "$inc": {"sequence": 1},
        },
    )


async def insert_job(
    creator: ActorDocument | None, *owners: ActorDocument, **values: Any
) -> JobDocument:
    """A job that is seen by its creator, and by those who belong to the owners."""
    creator_id = creator.id if creator else None
    job = JobDocument(
        **{
            "kind": JobKind.REINDEX,
            "created_by_id": creator_id,
            "principals": job_principals(creator_id, *(owner.id for owner in owners)),
            "created_at": START,
            **values,
        }
    )
    await job.insert()
    return job
