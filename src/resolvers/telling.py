"""What the log is told of a change, in its transaction: what happened, whom it concerns, who may see it."""

from typing import Any

from beanie import PydanticObjectId
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import actor_principal, model_principals
from modelharbor.db.base import Row
from modelharbor.db.events import EventDocument, EventKind, Stream


async def tell_of_model(
    session: AsyncClientSession,
    kind: EventKind,
    model: Row,
    *,
    by: ObjectId | None,
    version_id: ObjectId | None = None,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
    comment: str | None = None,
) -> None:
    """Of a model or one of its versions. `model` as it is after the change; a deleted one as it was
    before, for those who could see it are to know."""
    about = [model["_id"], model["owner_id"], *([version_id] if version_id else [])]
    await EventDocument(
        stream=Stream.MODELS,
        kind=kind,
        about=about,
        principals=model_principals(model),
        model_id=model["_id"],
        version_id=PydanticObjectId(version_id) if version_id else None,
        actor_id=PydanticObjectId(by) if by else None,
        before=before or {},
        after=after or {},
        comment=comment,
    ).insert(session=session)


async def tell_of_role(
    session: AsyncClientSession,
    *,
    by: ObjectId | None,
    actor_id: ObjectId,
    owner_id: ObjectId,
    was: str | None,
    now: str | None,
    **subject: Any,
) -> None:
    """Of who may do what: in an organization (`owner_id` is itself), or on a model of this owner.
    Seen by both sides only, also where the model is public."""
    await EventDocument(
        stream=Stream.PEOPLE,
        kind=EventKind.ROLE_GRANTED,
        about=[PydanticObjectId(owner_id), PydanticObjectId(actor_id)],
        principals=[actor_principal(owner_id), actor_principal(actor_id)],
        actor_id=PydanticObjectId(by) if by else None,
        before={"actor_id": actor_id, "role": was},
        after={"actor_id": actor_id, "role": now},
        **subject,
    ).insert(session=session)
