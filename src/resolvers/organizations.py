"""Organizations and their members."""

from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from modelharbor.db.actors import ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.errors import ErrorCode, Refused

from .names import bad
from .telling import tell_of_role
from .users import actor_by_login, list_actors, login_taken, new_actor


async def create_organization(
    database: Database, *, login: str, admin_login: str, display_name: str | None = None
) -> Row:
    """With its first ADMIN: an organization always has one."""
    document = new_actor(ActorKind.ORGANIZATION, login, display_name)

    async def work(session: AsyncClientSession) -> Row:
        admin = await actor_by_login(
            database, admin_login, ActorKind.USER, "admin", session=session
        )
        try:
            await document.insert(session=session)
        except DuplicateKeyError:
            raise login_taken(login) from None
        row: Row = get_dict(document, to_db=True)
        await set_membership(database, session, row, admin, Role.ADMIN, by=None)
        return row

    return await database.transaction(work)


async def list_organizations(database: Database, *, limit: int = 1000) -> list[Row]:
    """By login."""
    return await list_actors(database, ActorKind.ORGANIZATION, limit)


async def list_members(database: Database, *, organization_login: str) -> list[Row]:
    """`{login, role}` of each member, by login."""
    organization = await actor_by_login(
        database, organization_login, ActorKind.ORGANIZATION, "organization"
    )
    cursor = await database.data["memberships"].aggregate(
        [
            {"$match": {"organization_id": organization["_id"]}},
            {
                "$lookup": {
                    "from": "actors",
                    "localField": "user_id",
                    "foreignField": "_id",
                    "as": "user",
                }
            },
            {"$unwind": "$user"},
            {"$sort": {"user.login_lower": 1}},
            {"$project": {"_id": 0, "login": "$user.login", "role": 1}},
        ],
        maxTimeMS=database.query_timeout_ms,
    )
    return await cursor.to_list()


async def set_member(
    database: Database, *, organization_login: str, user_login: str, role: Role | None
) -> bool:
    """As the operator at the command line; None takes the membership away. True where something changed."""

    async def work(session: AsyncClientSession) -> bool:
        organization = await actor_by_login(
            database, organization_login, ActorKind.ORGANIZATION, "organization", session=session
        )
        user = await actor_by_login(database, user_login, ActorKind.USER, "user", session=session)
        return await set_membership(database, session, organization, user, role, by=None)

    return await database.transaction(work)


async def set_membership(
    database: Database,
    session: AsyncClientSession,
    organization: Row,
    user: Row,
    role: Role | None,
    *,
    by: ObjectId | None,
) -> bool:
    """Within a transaction; True where something changed. The last ADMIN stays."""
    if user["kind"] != ActorKind.USER.value:
        raise bad("Only people are members of organizations.", "actorId")
    # Two that each take away one of the last two admins must not both count the other.
    await database.data["actors"].update_one(
        {"_id": organization["_id"]}, {"$inc": {"turn": 1}}, session=session
    )
    memberships = database.data["memberships"]
    mine = {"organization_id": organization["_id"], "user_id": user["_id"]}
    old = await memberships.find_one(mine, session=session, max_time_ms=database.query_timeout_ms)
    was = old["role"] if old else None
    now = role.value if role else None
    if was == now:
        return False
    if was == Role.ADMIN.value:
        other = await memberships.find_one(
            {
                "organization_id": organization["_id"],
                "role": Role.ADMIN.value,
                "user_id": {"$ne": user["_id"]},
            },
            session=session,
            max_time_ms=database.query_timeout_ms,
        )
        if other is None:
            raise Refused(
                ErrorCode.CONFLICT,
                f"{user['login']} is the last ADMIN of {organization['login']}: make another first.",
                "role",
            )
    if role is None:
        await memberships.delete_one(mine, session=session)
    elif old is None:
        await MembershipDocument(
            organization_id=organization["_id"], user_id=user["_id"], role=role
        ).insert(session=session)
    else:
        await memberships.update_one(
            {"_id": old["_id"], "role": was}, {"$set": {"role": now}}, session=session
        )
    await tell_of_role(
        session,
        by=by,
        actor_id=user["_id"],
        owner_id=organization["_id"],
        was=was,
        now=now,
        organization_id=organization["_id"],
    )
    return True
