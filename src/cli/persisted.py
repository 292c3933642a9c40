"""`persisted`."""

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.persisted import USAGE_DAYS, canonical
from modelharbor.resolvers.manifests import (
    LARGEST_BYTES,
    MOST_TROUBLES,
    BadManifest,
    Entry,
    read_manifest,
)
from modelharbor.resolvers.persisted import (
    Difference,
    Publication,
    Published,
    compare,
    list_published,
    publish,
    retire,
    retire_unused,
)
from modelharbor.settings import Settings

from .running import AsJson, Limit, on_database, read_settings, show, show_json, tell_if_cut
from .telling import end, tell

commands = typer.Typer(help="Published operations: those that clients run by their ids.")
COLUMNS = {
    "document_id": "Id",
    "client": "Client",
    "name": "Name",
    "kind": "Kind",
    "price": "Price",
    "calls": "Calls",
    "last_used_at": "Last used",
    "published_at": "Published",
}
FIELD: Final = re.compile(r"[_A-Za-z][_0-9A-Za-z]*\.[_A-Za-z][_0-9A-Za-z]*", re.ASCII)
PRICE: Final = re.compile(r"([_A-Za-z][_0-9A-Za-z]*)=([0-9]{1,9}|none)", re.ASCII)
Manifest = Annotated[
    Path,
    typer.Argument(
        metavar="MANIFEST",
        help="As Apollo's generate-persisted-query-manifest, relay-compiler or graphql-codegen writes it; `-` reads standard input.",
    ),
]
Client = Annotated[str, typer.Option(help="Name of the client that has these operations.")]


@commands.command("publish")
def publish_(
    manifest: Manifest,
    client: Client,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COST",
            help="What an operation costs, whatever it asks for; NAME=none ends that. May be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check it and say what would be published.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check all operations of a manifest against the schema and the limits, and publish them.

    Exit codes: 0 published, or there already; 1 refused, and nothing of it is published; 2 mistyped.
    """
    prices = dict(map(_price, price or ()))
    settings = read_settings()

    async def work(database: Database) -> Published:
        return await publish(database, client, publications, prices, is_dry_run=dry_run)

    try:
        publications = _examined(_read(manifest, settings), settings)
        done = on_database(work, settings)
    except BadManifest as error:
        _refuse(manifest, error, as_json=as_json)
    if as_json:
        show_json(asdict(done) | {"troubles": []})
        return
    names = {each.id: each.name for each in publications}
    for sign, ids in (("new", done.new), ("again", done.again), ("price", done.repriced)):
        for id in ids:
            typer.echo(f"{sign}: {_named(id, names[id])}")
    count = len(done.new) + len(done.again) + len(done.repriced)
    word = "would be " if dry_run else ""
    typer.echo(
        f"{len(publications):,} {'operation' if len(publications) == 1 else 'operations'} of {client}: {count:,} {word}published, {len(done.same):,} {'is' if len(done.same) == 1 else 'are'} there already."
    )


@commands.command("list")
def list_(
    client: Annotated[str | None, typer.Option(help="Of this client only.")] = None,
    field: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE.FIELD",
            help="Only those that select this field: without any, it can be removed.",
        ),
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=USAGE_DAYS, help="Count the calls of so many days.")
    ] = 30,
    limit: Limit = 1000,
    as_json: AsJson = False,
) -> None:
    """List published operations, with their calls and when each was used last."""
    fields = [] if field is None else _fields(field)

    async def work(database: Database) -> list[Row]:
        return await list_published(database, client=client, fields=fields, days=days, limit=limit)

    rows = on_database(work)
    show(rows, COLUMNS, as_json=as_json)
    tell_if_cut(rows, limit)


@commands.command()
def diff(manifest: Manifest, client: Client, as_json: AsJson = False) -> None:
    """Compare a manifest with what its client has published: `+` is new, `-` is in the manifest no more."""
    settings = read_settings()
    try:
        entries = _read(manifest, settings)
    except BadManifest as error:
        _refuse(manifest, error, as_json=as_json)
    names = {each.id: each.name for each in entries}

    async def work(database: Database) -> Difference:
        return await compare(database, client, list(names))

    found = on_database(work, settings)
    if as_json:
        show_json(asdict(found))
        return
    for sign, ids in (("+", found.new), ("-", found.left)):
        for id in ids:
            typer.echo(f"{sign} {_named(id, names.get(id))}")
    typer.echo(
        f"{len(found.new):,} new, {len(found.same):,} published, {len(found.left):,} in the manifest no more."
    )


@commands.command("retire")
def retire_(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID…", help="As `persisted list` shows them.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Of this client only; without ids, all that it has.")
    ] = None,
    unused_days: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=USAGE_DAYS - 1,
            help="With --client: those that nobody has used for so many days.",
        ),
    ] = None,
) -> None:
    """Let published operations run no longer."""
    if unused_days is not None and (ids or client is None):
        raise typer.BadParameter("it goes with --client, without ids.", param_hint="--unused-days")
    wanted = [canonical(id) or id for id in ids or ()]

    async def work(database: Database) -> list[str]:
        if wanted:
            return await retire(database, wanted, client)
        if client is None:
            raise typer.BadParameter("give ids, or --client.")
        return await retire_unused(database, client, unused_days)

    done = on_database(work)
    for id in done:
        typer.echo(f"retired: {id}")
    if not done:
        typer.echo("Nothing was to be retired.")


def _price(text: str) -> tuple[str, int | None]:
    found = PRICE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is no NAME=COST, such as Search=500.", param_hint="--price"
        )
    return found[1], None if found[2] == "none" else int(found[2])


def _fields(field: str) -> list[str]:
    if not FIELD.fullmatch(field):
        raise typer.BadParameter(
            f"{field!r} is no TYPE.FIELD, such as Model.name.", param_hint="--field"
        )
    # They take a second that the other commands do not need.
    from modelharbor.execution.publishing import coordinates
    from modelharbor.schema import core

    found = coordinates(core, field)
    if not found:
        tell(f"The schema has no field {field}.")
    return found or [field]


def _read(manifest: Path, settings: Settings) -> list[Entry]:
    if str(manifest) == "-":
        content = sys.stdin.buffer.read(LARGEST_BYTES + 1)
    else:
        with manifest.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    return read_manifest(content, settings.max_query_bytes)


def _examined(entries: list[Entry], settings: Settings) -> list[Publication]:
    # They take a second that the other commands do not need.
    from modelharbor.execution.documents import DocumentStore
    from modelharbor.execution.publishing import examine
    from modelharbor.schema import core

    documents = DocumentStore(core, settings)
    found, troubles = [], []
    for each in entries:
        examined = examine(documents, each)
        if isinstance(examined, Publication):
            found.append(examined)
        else:
            troubles += examined
    if troubles:
        raise BadManifest(troubles)
    return found


def _refuse(manifest: Path, error: BadManifest, *, as_json: bool) -> NoReturn:
    """All that is wrong with it, and the end."""
    if as_json:
        show_json({"troubles": [asdict(each) for each in error.troubles]})
    else:
        for each in error.troubles[:MOST_TROUBLES]:
            tell(str(each))
        left = len(error.troubles) - MOST_TROUBLES
        if left > 0:
            tell(f"and {left:,} more")
    end(f"{manifest}: nothing of it is published.")


def _named(id: str, name: str | None) -> str:
    return f"{name} ({id})" if name else id
