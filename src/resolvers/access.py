"""May this viewer do it? What one may not see does not exist; what one may see is FORBIDDEN by name."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelState
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Refused

EVERYTHING = frozenset(Permission)


def refuse_without(
    viewer: Viewer,
    permission: Permission,
    held: Callable[[Viewer], frozenset[Permission]],
    what: str,
    *path: str,
) -> None:
    """FORBIDDEN unless `held` of the viewer has the permission; tells a role's lack from a token's."""
    if permission in held(viewer):
        return
    if permission in held(replace(viewer, scopes=EVERYTHING)):
        message = f"The token lacks the scope {permission.value}: use one that has it."
    else:
        message = f"This needs the permission {permission.value} on {what}: ask its administrators."
    raise Refused(ErrorCode.FORBIDDEN, message, *path)


def turn_of(model_id: ObjectId) -> Hashable:
    """For `Database.transaction`: those who change one model go one after the other. At the same time
    they would collide, and each begin anew until its time is over."""
    return "models", model_id


def full_name(model: Row) -> str:
    return f"{model['owner_login']}/{model['name']}"


def may(viewer: Viewer, permission: Permission, model: Row, *path: str) -> None:
    refuse_without(
        viewer, permission, lambda viewer: viewer.on_model(model), full_name(model), *path
    )


async def model_for(
    database: Database,
    session: AsyncClientSession | None,
    viewer: Viewer,
    model_id: ObjectId,
    permission: Permission,
    *path: str,
    deleted: bool = False,
) -> Row:
    """The whole model, to be changed within the transaction. `deleted` ones only where asked for.

    Needs READ always: it is answered, once it was changed. Without a session: to refuse early what
    the transaction would refuse.
    """
    viewer.person_id()  # nobody is refused before anything is read
    seen: dict[str, Any] = viewer.visible
    if deleted:
        seen = {"$or": [seen, {"state": ModelState.DELETED.value, "purging_at": None}]}
    model = await database.data["models"].find_one(
        {"_id": model_id, **seen}, session=session, max_time_ms=database.query_timeout_ms
    )
    if model is None or Permission.READ not in viewer.on_model(model):
        raise Refused(ErrorCode.NOT_FOUND, "There is no such model that you may see.", *path)
    may(viewer, permission, model, *path)
    return model


def refuse_unless_active(model: Row, *path: str) -> None:
    """The contents of an archived model stay as they are."""
    if model["state"] != ModelState.ACTIVE.value:
        raise Refused(
            ErrorCode.INVALID_TRANSITION,
            f"{full_name(model)} is {model['state']}: restore it first.",
            *path,
        )


async def version_for(
    database: Database,
    session: AsyncClientSession | None,
    viewer: Viewer,
    version_id: ObjectId,
    permission: Permission,
    *path: str,
) -> tuple[Row, Row]:
    """The whole version and its model, to be changed within the transaction."""
    viewer.person_id()  # nobody is refused before anything is read
    missing = Refused(ErrorCode.NOT_FOUND, "There is no such version that you may see.", *path)
    version = await database.data["versions"].find_one(
        {"_id": version_id, "status": {"$ne": VersionStatus.DELETED.value}},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    if version is None:
        raise missing
    model = await database.data["models"].find_one(
        {"_id": version["model_id"], **viewer.visible},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    if model is None:
        raise missing
    may(viewer, permission, model, *path)
    return version, model


def refuse_stale(row: Row, expected_revision: int | None) -> None:
    if expected_revision is not None and row["revision"] != expected_revision:
        raise Refused(
            ErrorCode.STALE_REVISION,
            f"It is at revision {row['revision']}, not {expected_revision}: read it again.",
            "expectedRevision",
        )
