"""`pull`."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from modelharbor.client import Client, ClientError, Transferred, Version, model_name

from .bars import Board, shown_bars
from .remote import (
    FAILED,
    QUARANTINED,
    AsJson,
    Parallel,
    Quiet,
    Token,
    Url,
    counted,
    fail,
    plainly,
    show_result,
    with_client,
)
from .telling import end

HELD_BACK: Final = {"QUARANTINED": QUARANTINED, "FAILED": FAILED}


def pull(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME[@ALIAS|:NUMBER]", help="The version; by name alone the latest."
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Where to. \\[default: a folder of the model's name]"),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Only files like this: *.json, or onnx/ for a folder; may be repeated.",
        ),
    ] = None,
    parallel: Parallel = 4,
    url: Url = None,
    token: Token = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the files of a version into a folder, and verify each.

    Goes on where an earlier one was stopped or killed. What is there with the
    right contents stays; nothing outside of the folder is written.
    """

    try:
        _, name = model_name(re.split("[@:]", reference, maxsplit=1)[0])
    except ClientError as error:
        fail(error)

    async def work(client: Client) -> tuple[Version, Path, Transferred]:
        version = await client.resolve(reference)
        if version.status in HELD_BACK:
            reason = await client.reason(version.id)
            end(
                plainly(
                    f"{version.reference} is {version.status}: {reason or 'its files may do harm.'} Who may publish it fetches single files by `downloadUrl(acceptQuarantined: true)`."
                ),
                HELD_BACK[version.status],
            )
        where = folder or Path(name)
        with shown_bars(hidden=quiet or as_json) as bars:
            known = not include
            board = Board(
                bars,
                "Files",
                version.file_count if known else None,
                version.size_bytes if known else None,
            )
            result = await client.download(
                version, where, include=include or (), parallel=parallel, report=board.report
            )
        return version, where, result

    version, where, result = with_client(
        url, token, work, interrupted="Stopped. The same command goes on from here."
    )
    there = f"; {result.skipped_files:,} of them were there" if result.skipped_files else ""
    show_result(
        {"reference": version.reference, "folder": str(where), **asdict(result)},
        as_json=as_json,
        quiet=quiet,
        lines=[
            f"{version.reference} is in {where}",
            f"{counted(result.files, 'file')}, {result.size_bytes:,} bytes, every SHA-256 right{there}",
        ],
    )
