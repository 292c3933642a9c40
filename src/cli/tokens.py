"""`token`."""

import re
from datetime import datetime, timedelta
from typing import Annotated, Final

import typer
from bson import ObjectId

from modelharbor.auth.tokens import PREFIX
from modelharbor.db.actors import ActorKind
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused
from modelharbor.resolvers.names import DISPLAY_NAME, valid_label
from modelharbor.resolvers.tokens import issue_token, list_tokens, revoke_token
from modelharbor.resolvers.users import actor_by_login

from .running import AsJson, Limit, on_database, show, tell_if_cut
from .telling import tell

commands = typer.Typer(help="API tokens.")
COLUMNS = {
    "id": "Id",
    "name": "Name",
    "scopes": "Scopes",
    "created_at": "Created",
    "last_used_at": "Last used",
    "expires_at": "Expires",
    "revoked_at": "Revoked",
}
SPAN: Final = re.compile(r"([1-9][0-9]{0,4})([mhdw])")
UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
ID: Final = re.compile(rf"(?:{PREFIX})?([0-9a-f]{{24}})[A-Za-z0-9_-]*")
User = Annotated[str, typer.Argument(metavar="USER", help="Login of the person.")]


@commands.command()
def create(
    user: User,
    name: Annotated[str, typer.Option(help="What it is for.")],
    scope: Annotated[
        list[Permission],
        typer.Option(case_sensitive=False, help="What it may be used for; may be repeated."),
    ],
    expires_in: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Such as 30m, 12h, 30d, 8w. \\[default: never]"),
    ] = None,
) -> None:
    """Make a token for a person, and print it: this once."""
    expires_at = _expiry(expires_in)

    async def work(database: Database) -> str:
        label = valid_label(name, DISPLAY_NAME, "name")
        owner = await actor_by_login(database, user, ActorKind.USER, "user")
        _, text = await issue_token(database, owner["_id"], label, scope, expires_at)
        return text

    typer.echo(on_database(work))
    tell("Keep it now: it is not stored, and not shown again.")


def _expiry(span: str | None) -> datetime | None:
    if span is None:
        return None
    found = SPAN.fullmatch(span)
    if found is None:
        raise typer.BadParameter(
            f"{span!r} is no span of time: write 30m, 12h, 30d or 8w.", param_hint="--expires-in"
        )
    return utc_now() + timedelta(**{UNITS[found[2]]: int(found[1])})


@commands.command("list")
def list_(user: User, limit: Limit = 1000, as_json: AsJson = False) -> None:
    """List a person's tokens, newest first; the revoked ones too."""

    async def work(database: Database) -> list[Row]:
        owner = await actor_by_login(database, user, ActorKind.USER, "user")
        found = await list_tokens(database, user_id=owner["_id"], limit=limit)
        return [{**row, "id": str(row["_id"])} for row in found]

    rows = on_database(work)
    show(rows, COLUMNS, as_json=as_json)
    tell_if_cut(rows, limit)


@commands.command()
def revoke(
    token: Annotated[str, typer.Argument(metavar="ID", help="As `token list` shows it.")],
) -> None:
    """End a token, whoever it belongs to."""
    found = ID.fullmatch(token)
    if found is None:
        # Not repeated here: it may be a mistyped token, and terminals are recorded.
        raise typer.BadParameter(
            "an id has 24 hexadecimal digits; `modelharbor token list` shows it.", param_hint="ID"
        )
    token_id = ObjectId(found[1])
    if not on_database(lambda database: revoke_token(database, token_id)):
        raise Refused(ErrorCode.NOT_FOUND, f"There is no token {token_id} that is not revoked.")
    typer.echo(f"Revoked the token {token_id}.")
