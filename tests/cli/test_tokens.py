"""`token`."""

import json
from datetime import timedelta

import pytest

from modelharbor.auth.tokens import authenticate, finish_notes
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unauthenticated
from tests.cli.conftest import Done, Run
from tests.resolvers.state import everything

pytestmark = pytest.mark.anyio


async def test_a_token_works_until_it_is_revoked(run: Run, database: Database) -> None:
    await run("user", "create", "ada")
    made = await run(
        *("token", "create", "Ada", "--name", " ci ", "--scope", "write", "--scope", "READ"),
        *("--expires-in", "30d"),
    )
    assert (made.code, made.err) == (
        0,
        "Keep it now: it is not stored, and not shown again.\n",
    )
    text = made.out.removesuffix("\n")
    viewer = await authenticate(database, f"Bearer {text}")
    await finish_notes()
    assert viewer.user is not None
    assert viewer.user["login"] == "ada"
    assert viewer.scopes == {Permission.READ, Permission.WRITE}

    (row,) = await database.data["tokens"].find().to_list()
    assert row["name"] == "ci"
    span = row["expires_at"] - row["created_at"]
    assert timedelta(days=30, seconds=-60) < span <= timedelta(days=30)
    listed = await run("token", "list", "ada", "--json")
    assert json.loads(listed.out) == [
        {
            "id": str(row["_id"]),
            "name": "ci",
            "scopes": ["READ", "WRITE"],
            "created_at": row["created_at"].isoformat(),
            "last_used_at": row["last_used_at"].isoformat(),
            "expires_at": row["expires_at"].isoformat(),
            "revoked_at": None,
        }
    ]
    shown = await run("token", "list", "ada")
    assert shown.out.split()[:8] == [
        *("Id", "Name", "Scopes", "Created", "Last", "used", "Expires", "Revoked")
    ]
    assert text[27:] not in shown.out + listed.out

    words = f"Revoked the token {row['_id']}.\n"
    assert await run("token", "revoke", str(row["_id"])) == Done(0, words, "")
    with pytest.raises(Unauthenticated):
        await authenticate(database, f"Bearer {text}")
    again = await run("token", "revoke", str(row["_id"]))
    assert again == Done(
        1, "", f"modelharbor: There is no token {row['_id']} that is not revoked.\n"
    )


async def test_a_whole_token_can_be_revoked_and_is_not_repeated(
    run: Run, database: Database
) -> None:
    await run("user", "create", "ada")
    made = await run("token", "create", "ada", "--name", "x", "--scope", "read")
    text = made.out.strip()
    (row,) = await database.data["tokens"].find().to_list()
    assert row["expires_at"] is None
    assert await run("token", "revoke", text) == Done(0, f"Revoked the token {row['_id']}.\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (
            ["create", "ada", "--name", "x"],
            2,
            "Missing option '--scope'. Choose from: read, download, write, publish, promote, administer, operate (--help tells more)",
        ),
        (
            ["create", "ada", "--name", "x", "--scope", "read", "--expires-in", "soon"],
            2,
            "Invalid value for --expires-in: 'soon' is no span of time: write 30m, 12h, 30d or 8w. (--help tells more)",
        ),
        (
            ["create", "ada", "--name", "x", "--scope", "read", "--expires-in", "0d"],
            2,
            "Invalid value for --expires-in: '0d' is no span of time: write 30m, 12h, 30d or 8w. (--help tells more)",
        ),
        (
            ["create", "ada", "--name", "", "--scope", "read"],
            1,
            "The name is empty: give 1 to 200 characters.",
        ),
        (
            ["create", "bob", "--name", "x", "--scope", "read"],
            1,
            "There is no user of the login 'bob'.",
        ),
        (["list", "bob"], 1, "There is no user of the login 'bob'."),
        (
            ["revoke", "mh_secret"],
            2,
            "Invalid value for ID: an id has 24 hexadecimal digits; `modelharbor token list` shows it. (--help tells more)",
        ),
        (
            ["revoke", "0123456789abcdef01234567"],
            1,
            "There is no token 0123456789abcdef01234567 that is not revoked.",
        ),
    ],
)
async def test_what_cannot_be_done_is_told(
    arguments: list[str], code: int, line: str, run: Run, database: Database
) -> None:
    await run("user", "create", "ada")
    before = await everything(database)
    assert await run("token", *arguments) == Done(code, "", f"modelharbor: {line}\n")
    assert await everything(database) == before
