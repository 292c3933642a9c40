"""`plan`."""

import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer

from .running import show
from .telling import Failure


def plan(
    file: Annotated[Path, typer.Argument(help="A GraphQL document; `-` reads standard input.")],
    operation: Annotated[
        str | None, typer.Option(help="Its name, where the document has several operations.")
    ] = None,
    variables: Annotated[
        str,
        typer.Option(help="JSON; those in @skip and @include decide what is selected."),
    ] = "{}",
) -> None:
    """Show how an operation runs: its reads, and the function that its document is compiled to.

    Exit code 1 where it has no plan, with the reason; graphql-core runs it then.
    """
    from modelharbor.execution.documents import DocumentStore, InvalidDocument
    from modelharbor.schema import core, schema  # takes a second that no other command needs
    from modelharbor.settings import Settings

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except UnicodeDecodeError:
        raise Failure(f"{file} is no text in UTF-8.") from None
    try:
        found = DocumentStore(core, Settings()).get(text).operation(operation)
    except InvalidDocument as error:
        told = "; ".join(str(each["message"]) for each in error.problems)
        raise Failure(f"{file} is no document of this schema: {told}") from None
    try:
        given = orjson.loads(variables)
    except orjson.JSONDecodeError:
        raise Failure("--variables takes a JSON object.") from None
    values = found.coerce(given) if isinstance(given, dict) else None
    if values is None:
        raise Failure("--variables does not fit the operation: give what it requires.")
    made = found.planned(schema, values)
    if isinstance(made, str):
        raise Failure(f"No plan, graphql-core runs it: {made}.")
    reads = [
        {
            "path": step.path,
            "loader": step.loader.__name__,
            "key": ", ".join(step.key) or "arguments",
            "names": ", ".join(sorted(step.reads)) or "no rows",
        }
        for step in made.steps.values()
    ]
    headings = {"path": "Read", "loader": "Loader", "key": "By", "names": "Stored names"}
    show(reads, headings, as_json=False)
    typer.echo(f"\n{made.source}", nl=False)
