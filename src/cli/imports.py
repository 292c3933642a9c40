"""`import`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.db.versions import VersionStatus
from modelharbor.inspection.fence import open_fence
from modelharbor.resolvers.access import full_name
from modelharbor.resolvers.imports import (
    ImportResult,
    Phase,
    Progress,
    import_folder,
    local_viewer,
)
from modelharbor.resolvers.references import parse_reference
from modelharbor.storage.blobs import open_storage

from .running import on_database, read_settings
from .telling import Failure, end, tell

EXIT_CODES = {VersionStatus.QUARANTINED: 4, VersionStatus.FAILED: 5}  # those of `push`
PHASES = {Phase.HASHING: "Reading", Phase.STORING: "Storing", Phase.INSPECTING: "Inspecting"}


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the model's files.")],
    reference: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The model.")],
    alias: Annotated[
        list[str] | None, typer.Option(help="Point this alias at the version; may be repeated.")
    ] = None,
    visibility: Annotated[
        Visibility | None,
        typer.Option(
            case_sensitive=False, help="Of the model, where it is made now. \\[default: PRIVATE]"
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also where these contents are a version already.")
    ] = False,
) -> None:
    """Register a folder as a new version of a model.

    Exit codes: 0 READY; 1 refused; 2 mistyped; 4 the version is quarantined,
    for a file of it is not known to be harmless; 5 the version failed.
    """
    wanted = parse_reference(reference)
    if reference != f"{wanted.owner}/{wanted.name}":
        raise Failure(f"Give the model alone, without a version: {wanted.owner}/{wanted.name}.")
    settings = read_settings()

    async def work(database: Database) -> ImportResult:
        viewer = await local_viewer(database, wanted.owner)
        async with open_storage(settings) as storage, open_fence(settings) as fence:
            with Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                disable=not sys.stderr.isatty(),
            ) as bars:
                tasks = {
                    phase: bars.add_task(name, total=None, visible=False)
                    for phase, name in PHASES.items()
                }

                def report(now: Progress) -> None:
                    bars.update(tasks[now.phase], completed=now.done, total=now.total, visible=True)

                result = await import_folder(
                    database,
                    storage,
                    fence,
                    viewer,
                    folder,
                    wanted.owner,
                    wanted.name,
                    aliases=alias or (),
                    visibility=visibility,
                    again=again,
                    max_card_bytes=settings.max_card_bytes,
                    report=report,
                )
        model = await database.data["models"].find_one(
            {"_id": result.model_id},
            {"owner_login": 1, "name": 1},
            max_time_ms=database.query_timeout_ms,
        )
        name = full_name(model) if model else reference
        for note in result.notes:
            tell(note)
        typer.echo(f"{name}:{result.number}")
        typer.echo(f"digest {result.digest}")
        if result.is_new:
            typer.echo(
                f"{result.files:,} {'file' if result.files == 1 else 'files'}, {result.size_bytes:,} bytes; {result.stored_bytes:,} of them were new to the storage"
            )
        else:
            typer.echo("These contents were there already: nothing was added.")
        return result

    result = on_database(work, settings)
    code = EXIT_CODES.get(result.status)
    if code is not None:
        for each in result.troubled:
            tell(str(each))
        end(f"the version is {result.status.value}: {result.status_reason}", code)
