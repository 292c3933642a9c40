"""The command line."""

import typer

from . import database, imports, server
from .running import Commands

app = typer.Typer(
    cls=Commands,
    help="A registry of AI models behind a GraphQL API.",
    pretty_exceptions_enable=False,  # its tracebacks show the values of variables: tokens among them
)
app.command("dev")(server.dev)
app.command("serve")(server.serve)
app.command("migrate")(database.migrate)
app.command("seed")(database.seed)
app.command("import")(imports.import_)


def main() -> None:
    app()
