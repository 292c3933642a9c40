"""People and organizations, as the operator at the command line makes them."""

import asyncio

import pytest

from modelharbor.db.actors import Role
from modelharbor.db.connection import Database
from modelharbor.errors import ErrorCode, Refused
from modelharbor.resolvers.organizations import (
    create_organization,
    list_members,
    list_organizations,
    set_member,
)
from modelharbor.resolvers.users import (
    actor_by_login,
    create_user,
    list_users,
    set_operator,
)
from tests.resolvers.state import events_of, refused

pytestmark = pytest.mark.anyio


async def test_people_are_created_and_listed_by_login(database: Database) -> None:
    ann = await create_user(database, login="Ann", display_name=" Ann B. ", is_operator=True)
    bob = await create_user(database, login="bob")
    assert (ann["login_lower"], ann["kind"], ann["display_name"], ann["is_operator"]) == (
        *("ann", "User", "Ann B.", True),
    )
    assert (bob["display_name"], bob["is_operator"]) == (None, False)
    assert await list_users(database) == [ann, bob]
    assert await list_users(database, limit=1) == [ann]
    changed = await set_operator(database, login="BOB", is_operator=True)
    assert changed == {**bob, "is_operator": True}
    assert await actor_by_login(database, "bob") == changed


async def test_a_login_is_unique_over_people_and_organizations(database: Database) -> None:
    await create_user(database, login="Ann")
    await create_organization(database, login="acme", admin_login="ann")
    for login in ("ANN", "Acme"):
        says = f"The login {login} is taken (in whatever case): use another."
        async with refused(database, ErrorCode.ALREADY_EXISTS, "login", says=says):
            await create_user(database, login=login)
        async with refused(database, ErrorCode.ALREADY_EXISTS, "login", says=says):
            await create_organization(database, login=login, admin_login="ann")
    found = await asyncio.gather(
        *[create_user(database, login=login) for login in ("bob", "Bob", "BOB")],
        return_exceptions=True,
    )
    codes = [one.code for one in found if isinstance(one, Refused)]
    assert codes == [ErrorCode.ALREADY_EXISTS] * 2


async def test_bad_logins(database: Database) -> None:
    await create_user(database, login="ann")
    for login in ("", "a/b", "graphql", "\u0430nn"):
        async with refused(database, ErrorCode.BAD_INPUT, "login"):
            await create_user(database, login=login)
        async with refused(database, ErrorCode.BAD_INPUT, "login"):
            await create_organization(database, login=login, admin_login="ann")
    async with refused(database, ErrorCode.BAD_INPUT, "displayName"):
        await create_user(database, login="bob", display_name="\0")
    async with refused(
        database, ErrorCode.NOT_FOUND, says="no person or organization of the login"
    ):
        await actor_by_login(database, "nobody")
    async with refused(database, ErrorCode.NOT_FOUND, "login"):
        await set_operator(database, login="nobody", is_operator=True)


async def test_an_organization_begins_with_an_admin(database: Database) -> None:
    ann = await create_user(database, login="Ann")
    acme = await create_organization(
        database, login="Acme", admin_login="ann", display_name="Acme Inc."
    )
    assert (acme["kind"], acme["display_name"]) == ("Organization", "Acme Inc.")
    assert [row["_id"] for row in await list_organizations(database)] == [acme["_id"]]
    assert await list_members(database, organization_login="acme") == [
        {"login": "Ann", "role": "ADMIN"}
    ]
    assert [
        (e["organization_id"], e["actor_id"], e["after"]) for e in await events_of(database)
    ] == [(acme["_id"], None, {"actor_id": ann["_id"], "role": "ADMIN"})]
    for admin in ("nobody", "acme"):
        async with refused(database, ErrorCode.NOT_FOUND, "admin"):
            await create_organization(database, login="other", admin_login=admin)


async def test_members_come_and_go(database: Database) -> None:
    for login in ("ann", "Bob"):
        await create_user(database, login=login)
    await create_organization(database, login="acme", admin_login="ann")

    async def put(login: str, role: Role | None) -> bool:
        return await set_member(database, organization_login="acme", user_login=login, role=role)

    assert await put("bob", Role.VIEWER)
    assert not await put("bob", Role.VIEWER)
    assert await put("bob", Role.ADMIN)
    assert await list_members(database, organization_login="acme") == [
        {"login": "ann", "role": "ADMIN"},
        {"login": "Bob", "role": "ADMIN"},
    ]
    assert await put("ann", None)
    assert not await put("ann", None)
    async with refused(database, ErrorCode.CONFLICT, "role"):
        await put("bob", Role.MAINTAINER)
    async with refused(database, ErrorCode.NOT_FOUND, "user"):
        await put("acme", Role.VIEWER)
    async with refused(database, ErrorCode.NOT_FOUND, "organization"):
        await list_members(database, organization_login="bob")
    assert await list_members(database, organization_login="acme") == [
        {"login": "Bob", "role": "ADMIN"}
    ]
