"""`schema`."""

from difflib import unified_diff
from pathlib import Path
from typing import Annotated

import typer

from .telling import Failure

commands = typer.Typer(help="The served GraphQL schema.")


@commands.command("print")
def print_(
    file: Annotated[
        Path | None, typer.Argument(help="Where to; otherwise it goes to standard output.")
    ] = None,
) -> None:
    """Print the schema in GraphQL's own language, sorted."""
    from modelharbor.schema.sdl import schema_text  # takes a second that no other command needs

    if file is None:
        typer.echo(schema_text(), nl=False)
    else:
        file.write_text(schema_text(), encoding="utf-8")


@commands.command()
def check(
    file: Annotated[Path, typer.Argument(help="What `schema print` has printed before.")],
) -> None:
    """Compare the schema with a file, byte for byte; exit code 1 and a diff when they differ."""
    from modelharbor.schema.sdl import schema_text

    served = schema_text()
    found = file.read_bytes()
    if found == served.encode():
        typer.echo(f"{file} is the served schema.")
        return
    lines = unified_diff(
        found.decode(errors="replace").splitlines(keepends=True),
        served.splitlines(keepends=True),
        str(file),
        "served",
    )
    for line in lines:
        typer.echo(line.rstrip("\n"))
    raise Failure(f"{file} is not the served schema: `modelharbor schema print {file}` renews it.")
