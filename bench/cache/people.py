"""Those who write: one who may change every model, and users who like them."""

from dataclasses import dataclass
from typing import Final

from bson import ObjectId

from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.connection import Database
from modelharbor.db.models import trending_score_expression
from modelharbor.db.tokens import Permission
from modelharbor.resolvers.tokens import issue_token

WRITER: Final = "bench-writer"
USER: Final = "bench-user-"


@dataclass(frozen=True, slots=True)
class People:
    writer: str
    """Token of an operator, who maintains every model that is public."""
    users: tuple[str, ...]
    """Tokens, each of a person of its own."""


async def make_people(database: Database, users: int) -> People:
    """New tokens for the same people; what they liked before, nobody likes any more."""
    writer = await _person(database, WRITER, is_operator=True)
    await database.data["models"].update_many(
        {"visibility": "PUBLIC", "grants.actor_id": {"$ne": writer}},
        {"$push": {"grants": {"actor_id": writer, "role": Role.MAINTAINER.value}}},
    )
    ids = [await _person(database, f"{USER}{number:03}") for number in range(users)]
    await database.data["tokens"].delete_many({"user_id": {"$in": [writer, *ids]}})
    await _forget_likes(database, ids)
    return People(
        await _token(database, writer, list(Permission)),
        tuple([await _token(database, each, [Permission.READ]) for each in ids]),
    )


async def _person(database: Database, login: str, *, is_operator: bool = False) -> ObjectId:
    found = await database.data["actors"].find_one({"login_lower": login}, {"_id": 1})
    if found is not None:
        known: ObjectId = found["_id"]
        return known
    made = ActorDocument(
        kind=ActorKind.USER, login=login, login_lower=login, is_operator=is_operator
    )
    await made.insert()
    return made.id


async def _token(database: Database, person: ObjectId, scopes: list[Permission]) -> str:
    _, text = await issue_token(database, person, "bench", scopes)
    return text


async def _forget_likes(database: Database, people: list[ObjectId]) -> None:
    likes, models = database.data["likes"], database.data["models"]
    theirs = {"user_id": {"$in": people}}
    counted = await likes.aggregate(
        [{"$match": theirs}, {"$group": {"_id": "$model_id", "count": {"$sum": 1}}}]
    )
    async for row in counted:
        less = {"$subtract": ["$stats.likes", row["count"]]}
        await models.update_one(
            {"_id": row["_id"]},
            [
                {"$set": {"stats.likes": less}},
                {"$set": {"stats.trending_score": trending_score_expression()}},
            ],
        )
    await likes.delete_many(theirs)
