"""`migrate` and `seed`."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from modelharbor.db.connection import Database
from modelharbor.db.migrations import create_indexes, pending
from modelharbor.db.migrations import migrate as apply_migrations
from modelharbor.inspection.fence import open_fence
from modelharbor.storage.blobs import open_storage

from .running import on_database, read_settings
from .telling import Failure


def migrate(
    check: Annotated[
        bool, typer.Option("--check", help="Only say what is pending; exit code 1 if anything is.")
    ] = False,
    indexes: Annotated[
        bool, typer.Option("--indexes", help="Also create indexes that someone removed.")
    ] = False,
) -> None:
    """Bring the database to this version's shape."""

    async def work(database: Database) -> list[str]:
        if check:
            return await pending(database)
        did = await apply_migrations(database)
        if indexes:
            await create_indexes(database)
        return did

    found = on_database(work, migrated=False)
    for name in found:
        typer.echo(f"{'pending' if check else 'applied'}: {name}")
    if not found:
        typer.echo("The database is up to date.")
    if check and found:
        raise typer.Exit(1)


def seed(
    models: Annotated[int, typer.Option(min=1, help="How many models.")] = 500,
    monsters: Annotated[
        bool,
        typer.Option(
            "--monsters",
            help="Add 200,000 versions to a model, 100,000 files to a version, a tag on half of all, an owner of a third.",
        ),
    ] = False,
    files_per_version: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most so many; otherwise as many as real ones have, and one above 2,000 models.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same number makes the same data.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty the database first.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --fresh: do not ask before your own data go too.")
    ] = False,
) -> None:
    """Fill the database with demo data, shaped like a real hub."""
    # The other commands start without all the vocabulary of the demo data.
    from modelharbor.dev import demo
    from modelharbor.dev.population import Shape
    from modelharbor.dev.run import holds_own

    try:
        Shape(models, seed, files_per_version, monsters)
    except ValueError as error:
        raise Failure(str(error)) from None
    settings = read_settings()

    async def work(database: Database) -> None:
        if fresh and not yes and await holds_own(database):
            if not sys.stdin.isatty():
                raise Failure("The database holds more than demo data: --yes removes all of it.")
            question = "The database holds more than demo data. Remove all of it?"
            typer.confirm(question, abort=True, err=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        async with open_storage(settings) as storage, open_fence(settings) as fence:
            if fresh:
                await demo.clear(database, storage)
            with Progress(
                *columns, console=console, transient=True, disable=not sys.stderr.isatty()
            ) as progress:
                task = progress.add_task("Models", total=models, left="")

                def report(now: demo.SeedProgress) -> None:
                    if not now.rows:
                        console.print(
                            f"This takes about {_size(now.disk_bytes)} of MongoDB's disk.",
                            highlight=False,
                        )
                    left = "" if now.eta is None else f"{now.eta:.0f} s left,"
                    progress.update(task, completed=now.done, left=left)

                result = await demo.seed(
                    database,
                    storage,
                    models=models,
                    monsters=monsters,
                    files_per_version=files_per_version,
                    seed=seed,
                    fence=fence,
                    report=report,
                )
        if not result.rows:
            typer.echo(f"The demo data of {models:,} models are there already.")
            return
        for name, count in sorted(result.rows.items()):
            typer.echo(f"{count:>12,} {name}")
        typer.echo(f"{sum(result.rows.values()):>12,} in all, in {result.seconds:.1f} s")

    try:
        on_database(work, settings, migrated=False)
    except demo.SeedRefused as error:
        raise Failure(str(error)) from None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
