"""`jobs`, `reindex`, `collect-garbage`, `verify-blobs` and `analytics`."""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import orjson
import typer
from bson import ObjectId
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from modelharbor.cache.client import connect_cache
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, HELD, JobKind, JobState
from modelharbor.errors import ErrorCode, Refused
from modelharbor.jobs.waking import wake
from modelharbor.resolvers.access import full_name
from modelharbor.resolvers.jobs import (
    cancel_job,
    jobs_by_id,
    list_jobs,
    log_of_job,
    retry_job,
    start_backfill,
    start_collection,
    start_reindex,
    start_verification,
)
from modelharbor.resolvers.references import parse_reference
from modelharbor.settings import Settings

from .running import AsJson, Limit, on_database, read_settings, show, show_json, tell_if_cut
from .telling import Failure, tell

commands = typer.Typer(help="Jobs: long work that workers do.")
COLUMNS: Final = {
    "id": "Id",
    "kind": "Kind",
    "about": "About",
    "state": "State",
    "done": "Done",
    "attempt": "Attempt",
    "created_at": "Created",
    "finished_at": "Finished",
    "told": "Says",
}
LOOK_SECONDS: Final = 0.5
BAR_WIDTH: Final = 24
WIDE: Final = 100  # columns of a terminal
UNNAMED: Final = "-"
MOST_WATCHED: Final = 1000
ID: Final = re.compile(r"[0-9a-f]{24}")
UNENDED: Final = frozenset(JobState) - ENDED
Id = Annotated[str, typer.Argument(metavar="ID", help="As `jobs list` or the API shows it.")]
Comment = Annotated[str | None, typer.Option(help="Why: kept with the job.")]
Watch = Annotated[bool, typer.Option("--watch", help="Follow it until it has ended.")]


def _id(text: str) -> ObjectId:
    """Of the database, or a global one."""
    if ID.fullmatch(text):
        return ObjectId(text)
    from modelharbor.schema.nodes import parse_global_id  # takes a second that others do not need

    found = parse_global_id(text)
    if found is None or found.typename != "Job":
        raise typer.BadParameter("`modelharbor jobs list` shows the ids.", param_hint="ID")
    return found.id


def _missing(job_id: ObjectId) -> Refused:
    return Refused(ErrorCode.NOT_FOUND, f"There is no job {job_id}.")


# Look -------------------------------------------------------------------------------------------


@commands.command("list")
def list_(
    state: Annotated[
        list[JobState] | None,
        typer.Option(case_sensitive=False, help="Only in this state; may be repeated."),
    ] = None,
    kind: Annotated[
        list[JobKind] | None,
        typer.Option(case_sensitive=False, help="Only of this kind; may be repeated."),
    ] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""

    async def work(database: Database) -> list[Row]:
        jobs = await list_jobs(database, states=state or (), kinds=kind or (), limit=limit)
        return await _named(database, jobs, {})

    rows = on_database(work)
    show([_listed(row) for row in rows], COLUMNS, as_json=as_json)
    tell_if_cut(rows, limit)


def _listed(job: Row) -> Row:
    return {**job, "id": str(job["_id"]), "done": _done(job), "told": _told(job)}


async def _named(database: Database, jobs: Sequence[Row], known: dict[ObjectId, str]) -> list[Row]:
    """Each with the name of the model or version it is `about`; `known` keeps names for the next time."""
    subjects = [_subject(job) for job in jobs if _to_import(job) is None]
    await _know(database, known, _of_type(subjects, "Model"), _of_type(subjects, "ModelVersion"))
    return [
        {
            **job,
            "about": _to_import(job) or known.get(_subject(job).get("id") or job["_id"], UNNAMED),
        }
        for job in jobs
    ]


def _subject(job: Row) -> Row:
    return job.get("subject") or {}


def _of_type(subjects: Sequence[Row], typename: str) -> set[ObjectId]:
    return {each["id"] for each in subjects if each.get("type") == typename}


async def _know(
    database: Database,
    known: dict[ObjectId, str],
    models: set[ObjectId],
    versions: set[ObjectId],
) -> None:
    """Names of models, as `owner/name`, and of versions, as `owner/name:number`."""
    numbers = await _rows(database, "versions", versions - known.keys(), "model_id", "number")
    wanted = models - known.keys() | {version["model_id"] for version in numbers}
    rows = await _rows(database, "models", wanted, "owner_login", "name")
    names = {model["_id"]: full_name(model) for model in rows}
    known.update(dict.fromkeys((models | versions) - known.keys(), UNNAMED))
    known.update(names)
    known.update(
        {
            version["_id"]: f"{names[version['model_id']]}:{version['number']}"
            for version in numbers
            if version["model_id"] in names
        }
    )


async def _rows(database: Database, collection: str, ids: set[ObjectId], *names: str) -> list[Row]:
    query = {"_id": {"$in": sorted(ids)}}
    return await database.find(collection, query, projection=dict.fromkeys(names, 1)) if ids else []


def _to_import(job: Row) -> str | None:
    given = job.get("input") or {}
    if job["kind"] != JobKind.IMPORT_MODEL.value or not (given.get("owner") and given.get("name")):
        return None
    return f"{given['owner']}/{given['name']}"


def _done(job: Row) -> str | None:
    """How far it is: in percent, else in units."""
    progress = job["progress"]
    current, total, unit = progress["current"], progress["total"], progress["unit"]
    if total:
        return f"{min(100, 100 * current // total)} %"
    return f"{current:,} {unit}" if current else None


def _told(job: Row) -> str | None:
    """What it does; of one that has ended, why it ended so."""
    state = JobState(job["state"])
    comment: str | None = job["comment"]
    message: str | None = job["progress"]["message"]
    if state in HELD:
        return message or comment
    if job["error"] is not None:
        return f"{job['error']['code']}: {job['error']['message']}"
    return comment if state in ENDED else comment or message


@commands.command("show")
def show_(job: Id, as_json: AsJson = False) -> None:
    """Show all that is known of a job, and its log."""
    job_id = _id(job)

    async def work(database: Database) -> tuple[list[Row], list[Row]]:
        return await jobs_by_id(database, [job_id]), await log_of_job(database, job_id)

    rows, lines = on_database(work)
    if not rows:
        raise _missing(job_id)
    told = _whole(rows[0])
    if as_json:
        log = [{name: line[name] for name in ("at", "level", "message")} for line in lines]
        show_json({**told, "log": log})
        return
    show(list(_fields(told)), {"name": "Field", "value": "Value"}, as_json=False)
    if lines:
        typer.echo()
        log = [{**line, "at": _value(line["at"])} for line in lines]
        show(log, {"at": "At", "level": "Level", "message": "Message"}, as_json=False)


def _fields(told: Row) -> Iterator[Row]:
    """For people: without what says nothing; a field of many lines is named at its first."""
    for name, value in told.items():
        for number, line in enumerate(_told_lines(name, value, told)):
            yield {"name": "" if number else name, "value": line}


def _told_lines(name: str, value: Any, told: Row) -> list[str]:
    if value in (None, 0, "", [], {}):
        return []
    if name == "progress":
        line = _progress_line(value, ended=JobState(told["state"]) in ENDED)
        return [line] if line else []
    if name == "steps":
        return [f"{step['name']}  {step['state']}" for step in value]
    if name == "error":
        at = f" (at {'.'.join(value['path'])})" if value.get("path") else ""
        return [f"{value['code']}: {value['message']}{at}"]
    if name == "subject":
        return [f"{value['type']} {value['id']}"]
    if isinstance(value, dict):  # a 0 stays: it may be the answer
        return [
            f"{key}: {_value(each)}"
            for key, each in value.items()
            if each is not None and each not in ("", [], {})
        ]
    return [_value(value)]


def _progress_line(progress: Row, *, ended: bool) -> str:
    current, total, unit, rate = (progress[key] for key in ("current", "total", "unit", "rate"))
    parts: list[str] = []
    if total:
        parts += [f"{min(100, 100 * current // total)} %", f"{current:,} of {total:,} {unit}"]
    elif current:
        parts.append(f"{current:,} {unit}")
    if rate:
        parts.append(f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second")
    if progress["message"] and not ended:
        parts.append(progress["message"])
    return ", ".join(parts)


def _value(value: object) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _whole(job: Row) -> Row:
    """What a person may want to know; what only its worker needs is left out."""
    names = (
        *("kind", "state", "comment", "error", "result", "progress", "steps", "input", "subject"),
        *("parent_id", "open_children", "created_by_id", "priority", "attempt", "max_attempts"),
        *("deaths", "worker", "created_at", "run_after", "started_at", "finished_at"),
    )
    return {"id": str(job["_id"]), **{name: _plain(job[name]) for name in names}}


def _plain(value: Any) -> Any:
    """Ids as text, in whatever they lie."""
    if isinstance(value, ObjectId):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


@commands.command()
def watch(
    job: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="One job; otherwise all that have not ended."),
    ] = None,
) -> None:
    """Follow jobs until they have ended; exit code 1 when the one that is named did not succeed."""
    if job is not None:
        _follow(_id(job))
        return

    async def work(database: Database) -> None:
        seen: list[ObjectId] = []
        names: dict[ObjectId, str] = {}

        async def look() -> list[Row]:
            going = await list_jobs(database, states=UNENDED, limit=MOST_WATCHED)
            new = {row["_id"] for row in going} - set(seen)
            seen.extend(sorted(new))
            return await _named(database, await jobs_by_id(database, seen[-MOST_WATCHED:]), names)

        if not await _watched(look):
            typer.echo("No job waits or runs.")

    _interruptible(work)


def _follow(job_id: ObjectId) -> None:
    async def work(database: Database) -> list[Row]:
        names: dict[ObjectId, str] = {}

        async def look() -> list[Row]:
            return await _named(database, await jobs_by_id(database, [job_id]), names)

        return await _watched(look)

    rows = _interruptible(work)
    if not rows:
        raise _missing(job_id)
    [ended] = rows
    if ended["state"] != JobState.SUCCEEDED.value:
        error = ended["error"]
        raise Failure(f"The job is {ended['state']}{': ' + error['message'] if error else '.'}")
    if ended["result"] is not None:
        show_json(_plain(ended["result"]))


def _interruptible(work: Callable[[Database], Awaitable[Any]]) -> Any:
    try:
        return on_database(work)
    except KeyboardInterrupt:
        tell("What was watched goes on.")
        raise typer.Exit(130) from None  # as of a shell: 128 + SIGINT


async def _watched(look: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
    """Show what `look` answers until all of it has ended."""
    return await (_live(look) if sys.stdout.isatty() else _lines(look))


def _all_ended(rows: Sequence[Row]) -> bool:
    return all(JobState(row["state"]) in ENDED for row in rows)


async def _live(look: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
    rows = await look()
    console = Console()
    with Live(_table(rows, console.width), console=console, auto_refresh=False) as live:
        while not _all_ended(rows):
            await asyncio.sleep(LOOK_SECONDS)
            rows = await look()
            live.update(_table(rows, console.width), refresh=True)
    return rows


async def _lines(look: Callable[[], Awaitable[list[Row]]]) -> list[Row]:
    """A line for each change of a state, and for each tenth that is done."""
    told: dict[ObjectId, object] = {}
    while True:
        rows = await look()
        for row in rows:
            progress = row["progress"]
            tenths = 10 * progress["current"] // progress["total"] if progress["total"] else 0
            now = row["state"], row["attempt"], tenths
            if told.get(row["_id"]) != now:
                told[row["_id"]] = now
                about = None if row["about"] == UNNAMED else row["about"]
                parts = (str(row["_id"]), row["kind"], about, row["state"], _done(row), _told(row))
                typer.echo("  ".join(part for part in parts if part))
        if _all_ended(rows):
            return rows
        await asyncio.sleep(LOOK_SECONDS)


def _table(rows: Sequence[Row], width: int) -> Table:
    """As wide as the terminal; what is left by the others is for About and Says."""
    wide = width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    table.add_column("Id", no_wrap=True, min_width=24)
    table.add_column("Kind", no_wrap=True)
    table.add_column("About", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("State", no_wrap=True, min_width=10)
    if wide:
        table.add_column("", no_wrap=True)
    table.add_column("Done", no_wrap=True, min_width=5)
    if wide:
        table.add_column("Left", no_wrap=True)
    table.add_column("Says", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        cells: list[RenderableType] = [str(row["_id"]), row["kind"], Text(row["about"])]
        done = _done(row) or ""
        cells += [row["state"], *([_bar(row), done, _left(row)] if wide else [done])]
        table.add_row(*cells, Text(_told(row) or ""))
    return table


def _bar(job: Row) -> RenderableType:
    progress = job["progress"]
    if job["state"] == JobState.SUCCEEDED.value:
        return ProgressBar(total=1, completed=1, width=BAR_WIDTH)
    if progress["total"]:
        return ProgressBar(progress["total"], progress["current"], width=BAR_WIDTH)
    return ProgressBar(total=1, completed=0, width=BAR_WIDTH)


def _left(job: Row) -> str:
    progress = job["progress"]
    if job["state"] != JobState.RUNNING.value or not progress["rate"] or not progress["total"]:
        return ""
    return f"{max(0, progress['total'] - progress['current']) / progress['rate']:.0f} s"


# Change -----------------------------------------------------------------------------------------


def _changing(work: Callable[[Database], Awaitable[Row]]) -> Row:
    """Do the work, and wake the workers."""
    settings = read_settings()

    async def and_wake(database: Database) -> Row:
        row = await work(database)
        await _wake(settings)
        return row

    return on_database(and_wake, settings)


async def _wake(settings: Settings) -> None:
    async with connect_cache(settings) as cache:
        await wake(cache)


@commands.command()
def cancel(job: Id, comment: Comment = None) -> None:
    """End a job, and all below it."""
    job_id = _id(job)
    row = _changing(lambda database: cancel_job(database, None, job_id=job_id, comment=comment))
    typer.echo(f"The job {job_id} is {row['state']}.")


@commands.command()
def retry(job: Id, comment: Comment = None) -> None:
    """Give a job that failed, died or was cancelled another chance, from its beginning."""
    job_id = _id(job)
    row = _changing(lambda database: retry_job(database, None, job_id=job_id, comment=comment))
    typer.echo(f"The job {job_id} is {row['state']}.")


def reindex(
    reference: Annotated[
        str | None,
        typer.Argument(metavar="OWNER/NAME", help="One model; otherwise all."),
    ] = None,
    watch: Watch = False,
) -> None:
    """Count anew what models keep of their versions, files and owners, as a job."""

    async def work(database: Database) -> Row:
        model_id = None if reference is None else await _model_id(database, reference)
        return await start_reindex(database, None, model_id=model_id)

    _started(_changing(work), watch)


async def _model_id(database: Database, reference: str) -> ObjectId:
    wanted = parse_reference(reference)
    if reference != f"{wanted.owner}/{wanted.name}":
        raise Failure(f"Give the model alone, without a version: {wanted.owner}/{wanted.name}.")
    model = await database.data["models"].find_one(
        {"owner_login_lower": wanted.owner.lower(), "name_lower": wanted.name.lower()},
        {"_id": 1},
        max_time_ms=database.query_timeout_ms,
    )
    if model is None:
        raise Refused(ErrorCode.NOT_FOUND, f"There is no model {reference}.")
    model_id: ObjectId = model["_id"]
    return model_id


def collect_garbage(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count what would go; needs --watch to show it.")
    ] = False,
    watch: Watch = False,
) -> None:
    """Remove what nobody needs any more, as a job: old contents, tokens, jobs, deleted models."""
    row = _changing(lambda database: start_collection(database, None, dry_run=dry_run))
    _started(row, watch)


def verify_blobs(
    all_contents: Annotated[
        bool, typer.Option("--all", help="Also what was compared a short while ago.")
    ] = False,
    watch: Watch = False,
) -> None:
    """Read stored contents again and compare them with their hashes, as a job."""
    row = _changing(lambda database: start_verification(database, None, all_contents=all_contents))
    _started(row, watch)


analytics = typer.Typer(help="Analytics: what is counted of the use of models and the API.")


@analytics.command()
def backfill(
    first: Annotated[
        datetime | None,
        typer.Option(
            "--from",
            formats=["%Y-%m-%d"],
            help="The first day, UTC; otherwise the first whose events are kept.",
        ),
    ] = None,
    last: Annotated[
        datetime | None,
        typer.Option("--to", formats=["%Y-%m-%d"], help="The last day; otherwise today."),
    ] = None,
    watch: Watch = False,
) -> None:
    """Add up usage again from its events, as a job."""
    if first is not None and last is not None and first > last:
        raise typer.BadParameter("It is after --to.", param_hint="--from")
    row = _changing(lambda database: start_backfill(database, first, last))
    _started(row, watch)


def _started(job: Row, watch: bool) -> None:
    if not watch:
        typer.echo(str(job["_id"]))
        return
    tell(f"The job {job['_id']} waits for a worker (`modelharbor worker`).")
    _follow(job["_id"])
