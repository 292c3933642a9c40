"""`export`."""

import asyncio
import os
import sys
from contextlib import aclosing, suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer

from modelharbor.client import Client, ClientError, Exported, Exporting

from .bars import RowsBoard, shown_rows
from .remote import (
    AsJson,
    Quiet,
    Token,
    Url,
    counted,
    plainly,
    show_result,
    with_client,
)
from .telling import Failure, tell


class Format(Enum):
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


class Packing(Enum):
    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


ENDINGS: Final = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".csv": Format.CSV,
    ".parquet": Format.PARQUET,
}
PACKED: Final = {".gz": Packing.GZIP, ".zst": Packing.ZSTD}  # after these
GOING: Final = frozenset({"QUEUED", "RUNNING", "RETRYING"})
CANCEL_SECONDS: Final = 5.0


def export(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where to; - with --stream: to a pipe."
        ),
    ],
    query: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="One GraphQL query of one connection; - reads it from a pipe."
        ),
    ] = None,
    variables: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|@FILE", help="Its variables: a JSON object, or @ and a file of it."
        ),
    ] = None,
    operation: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which one, where the file has several.")
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            case_sensitive=False,
            help="Of the rows. \\[default: as FILE ends; jsonl where it has no ending]",
        ),
    ] = None,
    compression: Annotated[
        Packing | None,
        typer.Option(
            case_sensitive=False,
            help="Of the file; of parquet, within it. \\[default: as FILE ends: .gz, .zst; of parquet zstd]",
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Straight, without a job: for what is not large."),
    ] = False,
    job: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Instead of a query: what the job of an earlier export writes."
        ),
    ] = None,
    new: Annotated[
        bool,
        typer.Option("--new", help="Anew, where an earlier one was stopped."),
    ] = False,
    url: Url = None,
    token: Token = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write all rows of a query to a file.

    The server writes them by a job, which is followed, and whose result is
    fetched. Goes on by itself where an earlier export of the same query to the
    same file was killed. Ctrl-C cancels the job while it runs.
    """
    if (query is None) == (job is None):
        raise typer.BadParameter("Give --query FILE, or --job ID.")
    if job is not None and (stream or new or variables or operation or format or compression):
        raise typer.BadParameter("--job takes nothing but where to.")
    is_pipe = str(output) == "-"
    if is_pipe and not stream:
        raise typer.BadParameter("-o - takes --stream.")
    kind, packing = Format.JSONL, Packing.NONE
    if job is None:
        kind, packing = kind_of(output, format, compression)
    if stream and (kind is Format.PARQUET or packing is not Packing.NONE):
        raise typer.BadParameter("--stream is jsonl or csv, not compressed.")
    text = "" if query is None else _text(query, operation)
    values = _variables(variables)

    async def work(client: Client) -> dict[str, Any]:
        with shown_rows(hidden=quiet or as_json or is_pipe) as bars:
            board = RowsBoard(bars)
            if stream:
                if is_pipe:
                    return {"bytes": await _to_pipe(client, text, values, kind.name)}
                size = await client.stream_to(
                    text, output, values, format=kind.name, report=board.received
                )
                return {"path": str(output), "bytes": size}
            if job is not None:
                result = await client.fetch_export(
                    job, output, told=board.told, report=board.report
                )
                if not quiet and not output.name.lower().endswith(_ending(result.file_name)):
                    tell(f"{output} is what the server calls {plainly(result.file_name)}.")
                return _told(result, output)
            try:
                result = await client.export(
                    text,
                    output,
                    values,
                    format=kind.name,
                    compression=packing.name,
                    new=new,
                    told=board.told,
                    report=board.report,
                )
            except asyncio.CancelledError:
                await _cancel(client, board.now)
                raise
            return _told(result, output)

    result = with_client(
        url, token, work, interrupted="Stopped. The same command goes on from here, or begins anew."
    )
    if is_pipe:
        return
    show_result(result, as_json=as_json, quiet=quiet, lines=_lines(result))


def _told(result: Exported, output: Path) -> dict[str, Any]:
    found = {name: value for name, value in asdict(result).items() if name != "url"}
    return {"path": str(output), "bytes": found.pop("size_bytes"), **found}


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['path']}: {result['bytes']:,} bytes"]
    if "rows" not in result:
        return lines
    lines[0] = f"{result['path']}: {counted(result['rows'], 'row')}, {result['bytes']:,} bytes"
    if result["truncated"]:
        count = counted(result["truncated"], "list")
        lines.append(f"{count} in them cut at 1,000 rows: `first` or `last` says how many")
    if result["faults"]:
        lines.append(f"{counted(result['faults'], 'row')} could not be made, and are left out")
    return lines


async def _cancel(client: Client, now: Exporting | None) -> None:
    """What nobody waits for any more is not worth writing."""
    if now is None or now.state not in GOING:
        return
    with suppress(ClientError, TimeoutError):
        async with asyncio.timeout(CANCEL_SECONDS):
            await client.cancel_export(now.job_id)
            tell(f"The job {plainly(now.job_id)} is cancelled.")


async def _to_pipe(client: Client, text: str, values: dict[str, Any], kind: str) -> int:
    size, pipe = 0, sys.stdout.buffer
    try:
        async with aclosing(client.stream_export(text, values, format=kind)) as blocks:
            async for block in blocks:
                await asyncio.to_thread(pipe.write, block)
                size += len(block)
        pipe.flush()
    except BrokenPipeError:
        # Whoever reads has enough, as `head` has; what is left is flushed to nowhere at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    return size


# What is given ----------------------------------------------------------------------------------


def _text(query: Path, operation: str | None) -> str:
    given = sys.stdin.buffer.read() if str(query) == "-" else query.read_bytes()
    try:
        text = given.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Failure(f"{query} is no text in UTF-8.") from None
    if operation is None:
        return text
    from graphql import GraphQLError, parse, print_ast, separate_operations  # few need it

    try:
        found = separate_operations(parse(text)).get(operation)
    except GraphQLError as error:
        raise Failure(f"{query}: {error.message}") from None
    if found is None:
        raise Failure(f"{query} has no operation {operation}.")
    return print_ast(found)


def _variables(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    text = Path(given[1:]).read_bytes() if given.startswith("@") else given.encode()
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter("a JSON object, or @FILE", param_hint="--variables")
    return found


def _ending(name: str) -> str:
    """All of it: `.csv.gz`."""
    _, dot, rest = name.partition(".")
    return dot + rest


def kind_of(
    output: Path, format: Format | None, compression: Packing | None
) -> tuple[Format, Packing]:
    """What the file is to be, by its name and by what is said: they may not contradict each other, for
    whoever finds the file later goes by its name."""
    *_, before, last = ("", "", *map(str.lower, output.suffixes))
    packed = PACKED.get(last)
    ending = last if packed is None else before
    named = ENDINGS.get(ending)
    if named is None and ending and format is None:
        raise typer.BadParameter(
            f"{output.name}: {ending} is none of the formats: .jsonl, .csv (both with .gz or .zst after it) or .parquet; or give --format."
        )
    if named is not None and format not in (None, named):
        raise typer.BadParameter(
            f"{output.name} would not be {named.value}, with that --format: change one of them."
        )
    kind = format or named or Format.JSONL
    if kind is Format.PARQUET:
        if packed is not None:
            raise typer.BadParameter(
                f"{output.name}: parquet is compressed within, by --compression, and ends in .parquet."
            )
        return kind, compression or Packing.ZSTD
    # Where the name says what the rows are, it says also whether they are compressed.
    told = packed or (None if named is None else Packing.NONE)
    if told is not None and compression not in (None, told):
        endings = {packing: suffix for suffix, packing in PACKED.items()}
        right = endings.get(compression, "neither .gz nor .zst")
        raise typer.BadParameter(f"{output.name} has to end in {right} for that --compression.")
    return kind, compression or told or Packing.NONE
