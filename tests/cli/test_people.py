"""`user`, `org` and `member`."""

import json

import pytest

from modelharbor.db.connection import Database
from tests.cli.conftest import Done, Run
from tests.resolvers.state import events_of, everything

pytestmark = pytest.mark.anyio


async def refused(run: Run, database: Database, *arguments: str, code: int = 1) -> str:
    """The one line that it says; nothing was written."""
    before = await everything(database)
    done = await run(*arguments)
    assert (done.code, done.out) == (code, "")
    assert await everything(database) == before
    (line,) = done.err.splitlines()
    return line.removeprefix("modelharbor: ")


async def test_people_are_made_and_listed(run: Run, database: Database) -> None:
    assert await run("user", "create", "Grace") == Done(0, "Made the user Grace.\n", "")
    assert await run("user", "create", "ada", "--name", "Ada [L]", "--operator") == Done(
        0, "Made the user ada.\n", ""
    )
    rows = await database.data["actors"].find().sort("login_lower", 1).to_list()
    assert [
        (row["kind"], row["login"], row["display_name"], row["is_operator"]) for row in rows
    ] == [("User", "ada", "Ada [L]", True), ("User", "Grace", None, False)]
    days = [f"{row['created_at']:%Y-%m-%d %H:%M}" for row in rows]
    listed = await run("user", "list")
    assert [line.rstrip() for line in listed.out.splitlines()] == [
        "Login  Name     Operator  Created",
        f"ada    Ada [L]  yes       {days[0]}",
        f"Grace  -        no        {days[1]}",
    ]
    as_json = await run("user", "list", "--json")
    assert json.loads(as_json.out) == [
        {
            "login": row["login"],
            "display_name": row["display_name"],
            "is_operator": row["is_operator"],
            "created_at": row["created_at"].isoformat(),
        }
        for row in rows
    ]
    first = await run("user", "list", "--limit", "1", "--json")
    assert [row["login"] for row in json.loads(first.out)] == ["ada"]
    assert first.err == "These are the first 1: more with --limit.\n"


async def test_operators_are_made_and_unmade(run: Run, database: Database) -> None:
    await run("user", "create", "ada")
    for verb, is_operator, words in (
        ("grant", True, "ada is now an operator.\n"),
        ("revoke", False, "ada is no longer an operator.\n"),
    ):
        assert await run("user", verb, "ADA", "--operator") == Done(0, words, "")
        (row,) = await database.data["actors"].find().to_list()
        assert row["is_operator"] is is_operator


async def test_what_cannot_be_a_person_is_refused(run: Run, database: Database) -> None:
    await run("user", "create", "ada")
    assert await refused(run, database, "user", "create", "ADA") == (
        "The login ADA is taken (in whatever case): use another."
    )
    assert await refused(run, database, "user", "create", "a/b") == (
        "The login has U+002F (SOLIDUS) at position 2: use only A-Z, a-z, 0-9, '.', '_' and '-'."
    )
    assert await refused(run, database, "user", "grant", "bob", "--operator") == (
        "There is no user of the login 'bob'."
    )
    assert await refused(run, database, "user", "grant", "ada", code=2) == (
        "Invalid value: say which right: --operator. (--help tells more)"
    )


async def test_an_organization_has_its_first_admin(run: Run, database: Database) -> None:
    await run("user", "create", "ada")
    assert await run("org", "create", "Guild", "--admin", "ada", "--name", "The Guild") == Done(
        0, "Made the organization Guild.\n", ""
    )
    for command in (["org", "members"], ["member", "list"]):
        assert await run(*command, "guild") == Done(0, "Login  Role \nada    ADMIN\n", "")
        done = await run(*command, "guild", "--json")
        assert json.loads(done.out) == [{"login": "ada", "role": "ADMIN"}]
    listed = await run("org", "list", "--json")
    (row,) = json.loads(listed.out)
    assert (row["login"], row["display_name"]) == ("Guild", "The Guild")
    assert await refused(run, database, "org", "create", "Ada", "--admin", "ada") == (
        "The login Ada is taken (in whatever case): use another."
    )
    assert await refused(run, database, "org", "create", "other", "--admin", "nobody") == (
        "There is no user of the login 'nobody'."
    )
    assert await refused(run, database, "org", "create", "other", code=2) == (
        "Missing option '--admin'. (--help tells more)"
    )


async def test_members_get_change_and_lose_roles(run: Run, database: Database) -> None:
    await run("user", "create", "ada")
    await run("user", "create", "bob")
    await run("org", "create", "guild", "--admin", "ada")
    for role, words in (
        ("viewer", "bob is now VIEWER of guild.\n"),
        ("MAINTAINER", "bob is now MAINTAINER of guild.\n"),
        ("maintainer", "bob is already MAINTAINER of guild.\n"),
    ):
        assert await run("member", "grant", "guild", "bob", role) == Done(0, words, "")
    done = await run("member", "list", "guild", "--json")
    assert json.loads(done.out) == [
        {"login": "ada", "role": "ADMIN"},
        {"login": "bob", "role": "MAINTAINER"},
    ]
    for words in ("bob is no longer a member of guild.\n", "bob was no member of guild.\n"):
        assert await run("member", "revoke", "guild", "bob") == Done(0, words, "")
    assert [
        (event["before"]["role"], event["after"]["role"]) for event in await events_of(database)
    ] == [(None, "ADMIN"), (None, "VIEWER"), ("VIEWER", "MAINTAINER"), ("MAINTAINER", None)]


async def test_what_cannot_be_a_membership_is_refused(run: Run, database: Database) -> None:
    await run("user", "create", "ada")
    await run("org", "create", "guild", "--admin", "ada")
    last = "ada is the last ADMIN of guild: make another first."
    assert await refused(run, database, "member", "revoke", "guild", "ada") == last
    assert await refused(run, database, "member", "grant", "guild", "ada", "viewer") == last
    assert await refused(run, database, "member", "grant", "nope", "ada", "viewer") == (
        "There is no organization of the login 'nope'."
    )
    assert await refused(run, database, "member", "grant", "guild", "guild", "viewer") == (
        "There is no user of the login 'guild'."
    )
    line = await refused(run, database, "member", "grant", "guild", "ada", "king", code=2)
    assert line.startswith("Invalid value for 'role': ")
    assert "'king' is not one of 'viewer', 'downloader'" in line
