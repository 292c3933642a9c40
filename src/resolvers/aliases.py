"""Aliases: names that point at versions and can be moved, such as `production`."""

from datetime import datetime
from typing import Any, Final

from beanie import PydanticObjectId
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.history import moment
from modelharbor.db.models import AliasEntry
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Refused

from .access import full_name, may, model_for, refuse_unless_active, turn_of
from .models import changed
from .names import bad, valid_alias, valid_comment
from .telling import tell_of_model

MOST_ALIASES: Final = 100


async def set_alias(
    database: Database,
    viewer: Viewer,
    *,
    model_id: ObjectId,
    name: str,
    version_id: ObjectId,
    expected_version_id: ObjectId | None = None,
    protected: bool | None = None,
    comment: str | None = None,
) -> Row:
    """Make or move an alias: needs PROMOTE; where it is protected, or is to be or no longer be, ADMINISTER.

    With `expected_version_id` it is only moved from there: CONFLICT where it points elsewhere or
    does not exist. Answers the entry, with `model_id`.
    """
    viewer.person_id()
    name, comment = valid_alias(name, "name"), valid_comment(comment)

    async def work(session: AsyncClientSession) -> Row:
        model = await model_for(database, session, viewer, model_id, Permission.PROMOTE, "modelId")
        refuse_unless_active(model, "modelId")
        old = _entry(model, name)
        if old is None or old["version_id"] != version_id:
            await _refuse_unless_ready(database, session, model, version_id)
        model = await set_alias_in(
            database,
            session,
            viewer,
            model,
            name=name,
            version_id=version_id,
            expected_version_id=expected_version_id,
            protected=protected,
            comment=comment,
        )
        entry = next(entry for entry in model["aliases"] if entry["name"] == name)
        return {**entry, "model_id": model_id}

    return await database.transaction(work, turn=turn_of(model_id))


async def _refuse_unless_ready(
    database: Database, session: AsyncClientSession, model: Row, version_id: ObjectId
) -> None:
    """An alias is led to READY versions only; where it points already, it stays also when that is
    archived."""
    version = await database.data["versions"].find_one(
        {"_id": version_id, "model_id": model["_id"]},
        {"status": 1, "number": 1},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    if version is None or version["status"] == VersionStatus.DELETED.value:
        raise Refused(ErrorCode.NOT_FOUND, f"{full_name(model)} has no such version.", "versionId")
    if version["status"] != VersionStatus.READY.value:
        raise bad(
            f"Version {version['number']} is {version['status']}: an alias points at a READY one.",
            "versionId",
        )


def _entry(model: Row, name: str) -> Row | None:
    return next((entry for entry in model["aliases"] if entry["name"] == name), None)


async def set_alias_in(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    model: Row,
    *,
    name: str,
    version_id: ObjectId,
    expected_version_id: ObjectId | None = None,
    protected: bool | None = None,
    comment: str | None = None,
    path: str = "name",
    at: datetime | None = None,
) -> Row:
    """Within a transaction that read `model`; the name is valid, the version is READY and the model's.
    `at`: the moment of a change before it in the transaction, which it belongs to."""
    user_id = viewer.person_id()
    may(viewer, Permission.PROMOTE, model, path)
    old = _entry(model, name)
    guarded = old is not None and old["protected"]
    if guarded or protected:
        may(viewer, Permission.ADMINISTER, model, path)
    if expected_version_id is not None and (
        old is None or old["version_id"] != expected_version_id
    ):
        raise Refused(
            ErrorCode.CONFLICT,
            f"The alias {name!r} points elsewhere: read it again."
            if old
            else f"There is no alias {name!r} to be moved.",
            "expectedVersionId",
        )
    keep = guarded if protected is None else protected
    if old is not None and old["version_id"] == version_id and old["protected"] == keep:
        return model
    if old is None and len(model["aliases"]) >= MOST_ALIASES:
        raise bad(f"A model has at most {MOST_ALIASES} aliases: delete one.", path)
    at = at or moment(model)
    entry = AliasEntry(
        name=name,
        version_id=PydanticObjectId(version_id),
        protected=keep,
        set_by_id=PydanticObjectId(user_id),
        set_at=at,
    ).model_dump()
    same: dict[str, Any] = {"_id": model["_id"]}
    if old is None:
        same["aliases.name"] = {"$ne": name}
        change: dict[str, Any] = {"$push": {"aliases": entry}, "$set": {"updated_at": at}}
    else:
        same["aliases"] = {"$elemMatch": {"name": name, "version_id": old["version_id"]}}
        change = {"$set": {"aliases.$": entry, "updated_at": at}}
    model = await changed(database, session, same, change)
    await tell_of_model(
        session,
        EventKind.ALIAS_SET,
        model,
        by=user_id,
        version_id=version_id,
        before={}
        if old is None
        else {"name": name, "version_id": old["version_id"], "protected": old["protected"]},
        after={"name": name, "version_id": version_id, "protected": keep},
        comment=comment,
    )
    return model


async def delete_alias(database: Database, viewer: Viewer, *, model_id: ObjectId, name: str) -> Row:
    """Needs PROMOTE, for a protected one ADMINISTER. Answers the entry that was, with `model_id`."""
    user_id = viewer.person_id()

    async def work(session: AsyncClientSession) -> Row:
        model = await model_for(database, session, viewer, model_id, Permission.PROMOTE, "modelId")
        old = _entry(model, name)
        if old is None:
            raise Refused(ErrorCode.NOT_FOUND, f"{full_name(model)} has no such alias.", "name")
        if old["protected"]:
            may(viewer, Permission.ADMINISTER, model, "name")
        refuse_unless_active(model, "modelId")
        model = await changed(
            database,
            session,
            {"_id": model["_id"], "aliases.name": name},
            {"$pull": {"aliases": {"name": name}}, "$set": {"updated_at": moment(model)}},
        )
        await tell_of_model(
            session,
            EventKind.ALIAS_DELETED,
            model,
            by=user_id,
            version_id=old["version_id"],
            before={"name": name, "version_id": old["version_id"], "protected": old["protected"]},
        )
        return {**old, "model_id": model_id}

    return await database.transaction(work, turn=turn_of(model_id))
