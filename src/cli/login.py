"""`login` and `logout`."""

import sys
from typing import Annotated

import typer

from modelharbor.client import Client, Rejected, Viewer

from .remote import (
    Login,
    config_path,
    find_login,
    store_login,
    with_client,
)
from .telling import Failure


def login(
    url: Annotated[
        str | None,
        typer.Argument(metavar="URL", help="Address of the server. \\[default: the stored one]"),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="API token; others on this machine can see it here. \\[default: asked for, or read from standard input]"
        ),
    ] = None,
) -> None:
    """Store a server's address and your token, once the server has taken it.

    They are kept in the folder of your settings (XDG_CONFIG_HOME, else
    ~/.config), for your eyes alone. Options, and the variables MODELHARBOR_URL
    and MODELHARBOR_TOKEN, come before them.
    """
    found = find_login(url, None)
    secret = (token or _asked()).strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise Failure("That is no token: `modelharbor token create` or the API makes one.")

    async def work(client: Client) -> tuple[str, Viewer]:
        viewer = await client.viewer()
        if viewer is None:
            raise Rejected("The server does not know this token.", "UNAUTHENTICATED")
        return client.url, viewer

    place, viewer = with_client(found.url, secret, work, interrupted="Stopped; nothing was stored.")
    path = store_login(Login(place, secret))
    typer.echo(f"You are {viewer.login} at {place}; {path} keeps it.")


def _asked() -> str:
    if sys.stdin.isatty():
        answer: str = typer.prompt("Token", hide_input=True, err=True)
        return answer
    return sys.stdin.readline()


def logout() -> None:
    """Forget the stored address and token. The token itself stays good: `token revoke` ends it."""
    path = config_path()
    try:
        path.unlink()
    except FileNotFoundError:
        typer.echo("Nothing was stored.")
    else:
        typer.echo(f"Removed {path}.")
