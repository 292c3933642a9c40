"""The commands that talk to a server somewhere else: they need the client alone, and start fast."""

import typer

from . import export, login, pull, push, remote
from .telling import Commands


def add_remote(app: typer.Typer) -> None:
    app.command("push", epilog=remote.VERSION_EXIT_CODES)(push.push)
    app.command("pull", epilog=remote.VERSION_EXIT_CODES)(pull.pull)
    app.command("export", epilog=remote.EXIT_CODES)(export.export)
    app.command("login", epilog=remote.EXIT_CODES)(login.login)
    app.command("logout")(login.logout)


app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,  # its tracebacks show the values of variables: tokens among them
)
add_remote(app)
