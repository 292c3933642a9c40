"""Likes: one a person and model, however often it is said."""

from typing import Any

from beanie import PydanticObjectId
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.models import LikeDocument, trending_score_expression
from modelharbor.db.tokens import Permission
from modelharbor.db.usage import UsageKind

from .access import model_for, turn_of
from .models import changed
from .recording import record_in


async def like_model(
    database: Database, viewer: Viewer, *, model_id: ObjectId, is_recorded: bool = True
) -> Row:
    """Answers the model. Needs READ; liked already: nothing changes."""
    return await _like(database, viewer, model_id, True, is_recorded)


async def unlike_model(
    database: Database, viewer: Viewer, *, model_id: ObjectId, is_recorded: bool = True
) -> Row:
    """Answers the model. Needs READ; not liked: nothing changes."""
    return await _like(database, viewer, model_id, False, is_recorded)


async def _like(
    database: Database, viewer: Viewer, model_id: ObjectId, liked: bool, is_recorded: bool
) -> Row:
    user_id = viewer.person_id()
    mine = {"user_id": user_id, "model_id": model_id}

    async def work(session: AsyncClientSession) -> Row:
        model = await model_for(database, session, viewer, model_id, Permission.READ, "id")
        likes = database.data["likes"]
        found = await likes.find_one(mine, session=session, max_time_ms=database.query_timeout_ms)
        if (found is not None) == liked:
            return model
        if found is None:
            like = LikeDocument(
                user_id=PydanticObjectId(user_id), model_id=PydanticObjectId(model_id)
            )
            await like.insert(session=session)
            event = _event("like", like.id, model_id, 1)
        else:
            await likes.delete_one(mine, session=session)
            event = _event("unlike", found["_id"], model_id, -1)
        if is_recorded:
            await record_in(database, session, [event])
        return await changed(database, session, {"_id": model_id}, _count(1 if liked else -1))

    return await database.transaction(work, turn=turn_of(model_id))


def _event(name: str, like_id: ObjectId, model_id: ObjectId, count: int) -> Row:
    return {
        "_id": f"{name}:{like_id}",
        "at": utc_now(),
        "kind": UsageKind.LIKE.value,
        "count": count,
        "model": model_id,
    }


def _count(change: int) -> list[dict[str, Any]]:
    return [
        {"$set": {"stats.likes": {"$add": ["$stats.likes", change]}, "stats.as_of": "$$NOW"}},
        {"$set": {"stats.trending_score": trending_score_expression()}},
    ]
