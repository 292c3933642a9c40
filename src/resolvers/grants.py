"""Roles: on one model, or in an organization."""

from typing import Final, Literal

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer, model_principals
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused

from .access import model_for, refuse_without
from .models import changed
from .names import bad
from .organizations import set_membership
from .telling import tell_of_role

MOST_GRANTS: Final = 1000


async def grant_role(
    database: Database,
    viewer: Viewer,
    *,
    subject: Literal["Model", "Organization"],
    subject_id: ObjectId,
    actor_id: ObjectId,
    role: Role | None,
) -> bool:
    """Give one role in place of the one held before; None takes it away. Needs ADMINISTER.

    True where a role is held now.
    """
    viewer.person_id()

    async def work(session: AsyncClientSession) -> bool:
        if subject == "Model":
            await _grant_on_model(database, session, viewer, subject_id, actor_id, role)
        else:
            await _grant_in_organization(database, session, viewer, subject_id, actor_id, role)
        return role is not None

    return await database.transaction(work)


async def _actor(database: Database, session: AsyncClientSession, actor_id: ObjectId) -> Row:
    actor = await database.data["actors"].find_one(
        {"_id": actor_id}, session=session, max_time_ms=database.query_timeout_ms
    )
    if actor is None:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such person or organization.", "actorId")
    return actor


async def _grant_on_model(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    model_id: ObjectId,
    actor_id: ObjectId,
    role: Role | None,
) -> None:
    model = await model_for(database, session, viewer, model_id, Permission.ADMINISTER, "subjectId")
    await _actor(database, session, actor_id)
    if actor_id == model["owner_id"]:
        raise bad("The owner of a model has every permission on it: no role is needed.", "actorId")
    old = next((grant for grant in model["grants"] if grant["actor_id"] == actor_id), None)
    was = old["role"] if old else None
    now = role.value if role else None
    if was == now:
        return
    grants = [grant for grant in model["grants"] if grant["actor_id"] != actor_id]
    if role is not None:
        if len(grants) >= MOST_GRANTS:
            raise bad(
                f"A model has at most {MOST_GRANTS} roles granted: use an organization.", "actorId"
            )
        grants.append({"actor_id": actor_id, "role": role.value})
    await tell_of_role(
        session,
        by=viewer.person_id(),
        actor_id=actor_id,
        owner_id=model["owner_id"],
        was=was,
        now=now,
        model_id=model["_id"],
    )
    # Not the revision, nor the time: who may do what is not a change that readers are told of.
    await changed(
        database,
        session,
        {key: model[key] for key in ("_id", "state", "visibility", "grants")},
        {"$set": {"grants": grants, "principals": model_principals({**model, "grants": grants})}},
    )


async def _grant_in_organization(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    organization_id: ObjectId,
    actor_id: ObjectId,
    role: Role | None,
) -> None:
    organization = await database.data["actors"].find_one(
        {"_id": organization_id, "kind": ActorKind.ORGANIZATION.value},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    if organization is None:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such organization.", "subjectId")
    refuse_without(
        viewer,
        Permission.ADMINISTER,
        lambda viewer: viewer.on_owner(organization_id),
        organization["login"],
        "subjectId",
    )
    actor = await _actor(database, session, actor_id)
    await set_membership(database, session, organization, actor, role, by=viewer.person_id())
