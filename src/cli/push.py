"""`push`."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress as Bars

from modelharbor.client import (
    Client,
    ClientError,
    Draft,
    Finding,
    Processing,
    Transferred,
    Version,
    model_name,
    walk,
)
from modelharbor.resolvers.names import valid_alias

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
from .telling import end, tell

MOST_FINDINGS = 20  # shown; all are in the API, and in the console


@dataclass
class Pushed:
    """What came of it."""

    draft: Draft
    version: Version
    sent: Transferred
    status: str
    reason: str | None = None
    findings: Sequence[Finding] = field(default_factory=list)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the model's files.")],
    reference: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The model.")],
    alias: Annotated[
        list[str] | None, typer.Option(help="Point this alias at the version; may be repeated.")
    ] = None,
    parallel: Parallel = 4,
    label: Annotated[str | None, typer.Option(help="Of the version.")] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Of the model, where it is made now. \\[default: private]"
        ),
    ] = None,
    new: Annotated[
        bool,
        typer.Option(
            "--new",
            help="Always a new version: neither go on with one, nor take one of the same contents.",
        ),
    ] = False,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish/--no-publish", help="Publish the version, and follow it until it is READY."
        ),
    ] = True,
    url: Url = None,
    token: Token = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Send a folder as a new version of a model, and publish it.

    Hashes while it sends, skips what the server has, and goes on by itself where
    an earlier push of the same folder was stopped or killed. Hidden files are
    left out.
    """
    for each in alias or ():
        valid_alias(each)
    try:
        model_name(reference)
        files = walk(folder)
    except ClientError as error:
        fail(error)
    size_bytes = sum(file.size_bytes for file in files)
    visibility = None if private is None else "PRIVATE" if private else "PUBLIC"

    async def work(client: Client) -> Pushed:
        await _refuse_early(client, reference, publish=publish, promote=publish and bool(alias))
        with shown_bars(hidden=quiet or as_json) as bars:
            board = Board(bars, "Files", len(files), size_bytes)
            draft, sent = await client.upload_folder(
                folder,
                reference,
                label=label,
                visibility=visibility,
                new=new,
                parallel=parallel,
                report=board.report,
                begun=lambda draft: board.skip(
                    [file for file in files if draft.is_same or file.path in draft.there]
                ),
            )
            board.end()
            version = await client.version(draft.version.id)
            pushed = Pushed(draft, version, sent, version.status)
            if publish:
                await _publish(client, pushed, alias or (), bars)
        return pushed

    pushed = with_client(
        url,
        token,
        work,
        interrupted="Stopped. The same command goes on from here; what was published is processed by the server all the same.",
    )
    _show(pushed, as_json=as_json, quiet=quiet)


async def _refuse_early(client: Client, reference: str, *, publish: bool, promote: bool) -> None:
    """What the server would refuse after all bytes were sent."""
    held = await client.permissions(reference)
    if held is None:
        return  # it will be made
    needed = ["WRITE", *(["PUBLISH"] if publish else []), *(["PROMOTE"] if promote else [])]
    missing = [each for each in needed if each not in held]
    if missing:
        raise ClientError(
            f"This needs {' and '.join(missing)} on {reference}, which you or this token have not."
        )


async def _publish(client: Client, pushed: Pushed, aliases: Sequence[str], bars: Bars) -> None:
    pushed.version, job_id = await client.publish(pushed.version, aliases)
    task = bars.add_task("The server looks at them", total=None)
    last = Processing(pushed.version.status)
    async with aclosing(client.follow(pushed.version.id, job_id)) as steps:
        async for last in steps:
            if last.total is not None:  # else its job has not begun, or the version has settled
                words = escape(plainly(last.message)) if last.message else None
                bars.update(task, description=words, completed=last.current, total=last.total)
    pushed.status, pushed.reason = last.status, last.message
    if pushed.status != "READY":
        pushed.findings = await client.findings(pushed.version.id)
    pushed.version = await client.version(pushed.version.id)


def _show(pushed: Pushed, *, as_json: bool, quiet: bool) -> None:
    version, sent = pushed.version, pushed.sent
    if pushed.draft.is_same:
        what = "These contents were there already: nothing was added."
    else:
        what = f"{counted(sent.files, 'file')}, {sent.size_bytes:,} bytes; {sent.moved_bytes:,} of them were sent"
    show_result(
        {
            "reference": version.reference,
            "id": version.id,
            "status": pushed.status,
            "digest": version.digest,
            "reason": pushed.reason,
            "is_new": not pushed.draft.is_same,
            "is_resumed": pushed.draft.is_resumed,
            **asdict(sent),
            "findings": [asdict(finding) for finding in pushed.findings],
        },
        as_json=as_json,
        quiet=quiet,
        lines=[
            f"{version.reference} is {pushed.status}",
            *([f"digest {version.digest}"] if version.digest else []),
            what,
        ],
    )
    if pushed.status not in ("QUARANTINED", "FAILED"):
        return
    if not as_json:
        for finding in pushed.findings[:MOST_FINDINGS]:
            line = f"{finding.verdict}  {finding.path}  {finding.rule}  {finding.detail}"
            tell(plainly(line).rstrip())
        if len(pushed.findings) > MOST_FINDINGS:
            tell(f"These are the first {MOST_FINDINGS} of {len(pushed.findings):,}.")
    reason = f": {pushed.reason}" if pushed.reason else "."
    code = QUARANTINED if pushed.status == "QUARANTINED" else FAILED
    end(plainly(f"{version.reference} is {pushed.status}{reason}"), code)
