"""Who asked for a job, as they are now."""

from bson import ObjectId

from modelharbor.db.actors import Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission

from .viewer import Viewer


async def requester_of(database: Database, job: Row) -> Viewer | None:
    """With the memberships of now, and the scopes that their token had when they asked; None: nobody
    asked, or they are gone."""
    user_id: ObjectId | None = job["created_by_id"]
    if user_id is None:
        return None
    rows = await database.aggregate(
        "actors",
        [
            {"$match": {"_id": user_id}},
            {
                "$lookup": {
                    "from": "memberships",
                    "localField": "_id",
                    "foreignField": "user_id",
                    "as": "memberships",
                }
            },
        ],
    )
    if not rows:
        return None
    user = rows[0]
    memberships = user.pop("memberships")
    return Viewer(
        user=user,
        roles={each["organization_id"]: Role(each["role"]) for each in memberships},
        scopes=frozenset(map(Permission, job["scopes"])),
    )
