"""People, as the operator at the command line makes them, and what they share with organizations."""

from beanie.odm.utils.dump import get_dict
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from modelharbor.db.actors import ActorDocument, ActorKind
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.errors import ErrorCode, Refused

from .names import DISPLAY_NAME, valid_login, valid_text


async def create_user(
    database: Database, *, login: str, display_name: str | None = None, is_operator: bool = False
) -> Row:
    document = new_actor(ActorKind.USER, login, display_name)
    document.is_operator = is_operator
    try:
        await document.insert()
    except DuplicateKeyError:
        raise login_taken(login) from None
    row: Row = get_dict(document, to_db=True)
    return row


async def list_users(database: Database, *, limit: int = 1000) -> list[Row]:
    """By login."""
    return await list_actors(database, ActorKind.USER, limit)


async def set_operator(database: Database, *, login: str, is_operator: bool) -> Row:
    """Whether a person may operate the whole site."""
    user = await actor_by_login(database, login, ActorKind.USER, "login")
    await database.data["actors"].update_one(
        {"_id": user["_id"]}, {"$set": {"is_operator": is_operator}}
    )
    return {**user, "is_operator": is_operator}


def new_actor(kind: ActorKind, login: str, display_name: str | None) -> ActorDocument:
    """Not yet inserted."""
    login = valid_login(login, "login")
    return ActorDocument(
        kind=kind,
        login=login,
        login_lower=login.lower(),
        display_name=valid_text(display_name, DISPLAY_NAME, "displayName"),
    )


def login_taken(login: str) -> Refused:
    return Refused(
        ErrorCode.ALREADY_EXISTS,
        f"The login {login} is taken (in whatever case): use another.",
        "login",
    )


async def list_actors(database: Database, kind: ActorKind, limit: int) -> list[Row]:
    return (
        await database.data["actors"]
        .find({"kind": kind.value}, max_time_ms=database.query_timeout_ms)
        .sort("login_lower", 1)
        .to_list(limit)
    )


async def actor_by_login(
    database: Database,
    login: str,
    kind: ActorKind | None = None,
    *path: str,
    session: AsyncClientSession | None = None,
) -> Row:
    """In whatever case; NOT_FOUND where there is none of that kind."""
    wanted = {"login_lower": login.lower()}
    if kind is not None:
        wanted["kind"] = kind.value
    actor = await database.data["actors"].find_one(
        wanted, session=session, max_time_ms=database.query_timeout_ms
    )
    if actor is None:
        what = "person or organization" if kind is None else kind.value.lower()
        raise Refused(ErrorCode.NOT_FOUND, f"There is no {what} of the login {login!r}.", *path)
    return actor
