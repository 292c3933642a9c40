"""What the log is told of a change, in its transaction: what happened, whom it concerns, who may see it."""

from collections.abc import Sequence
from typing import Any

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import actor_principal, model_principals
from modelharbor.db.base import Row
from modelharbor.db.events import MOVING, EventDocument, EventKind, Stream
from modelharbor.db.history import pointed
from modelharbor.db.uploads import HIDDEN


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
    is_moved: bool = False,
) -> None:
    """Of a model or one of its versions. `model` as it is after the change; a deleted one as it was
    before, for those who could see it are to know. `is_moved`: a name of it points elsewhere, though
    the kind is none of MOVING. Where either is so, its `updated_at` is by `moment`."""
    about = [model["_id"], model["owner_id"], *([version_id] if version_id else [])]
    is_moved = is_moved or kind in MOVING
    moved = {"pointed": pointed(model), "at": model["updated_at"]} if is_moved else {}
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
        **moved,
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


async def tell_of_upload(
    session: AsyncClientSession,
    row: Row,
    *,
    by: ObjectId | None = None,
    comment: str | None = None,
) -> None:
    """Of an upload that is new or has changed its state, as it is then. Never of a part."""
    await tell_of_uploads(session, [row], by=by, comment=comment)


async def tell_of_uploads(
    session: AsyncClientSession,
    rows: Sequence[Row],
    *,
    by: ObjectId | None = None,
    comment: str | None = None,
) -> None:
    """The same of several, in one command."""
    if not rows:
        return
    # Raw, not documents: encoding a thousand takes half a second, and every value here is ours.
    like: Row = get_dict(
        EventDocument(
            stream=Stream.UPLOADS, actor_id=PydanticObjectId(by) if by else None, comment=comment
        ),
        to_db=True,
    )
    events = [{**like, "_id": ObjectId(), **_of_upload(row)} for row in rows]
    await EventDocument.get_pymongo_collection().insert_many(events, session=session)


def _of_upload(row: Row) -> Row:
    about = [row["_id"], row["version_id"], row["model_id"], row["created_by_id"]]
    return {
        "about": [each for each in about if each is not None],
        "principals": row["principals"],
        "model_id": row["model_id"],
        "version_id": row["version_id"],
        "upload_id": row["_id"],
        "upload": upload_snapshot(row),
    }


def upload_snapshot(row: Row) -> Row:
    """The upload as an event keeps it: without what only its receiver needs."""
    return {name: value for name, value in row.items() if name not in HIDDEN}
