"""`make bench-live`: one job with thousands of subscribers, beside Strawberry's own subscriptions."""

import argparse
import asyncio
import os
import resource
import sys
from pathlib import Path
from typing import Final

from bench.measure import LoadError, yardstick
from bench.report import write
from bench.serving import Filled, engines_beside, free_port, our_server, run_server
from modelharbor.db.actors import ActorDocument, ActorKind
from modelharbor.db.connection import connect
from modelharbor.db.migrations import migrate
from modelharbor.db.tokens import Permission
from modelharbor.dev.engines import EngineError
from modelharbor.http.server import environment
from modelharbor.resolvers.tokens import issue_token

from . import watching
from .measuring import Measured, measure
from .moving import published_job, stored_job
from .report import (
    BEGIN,
    END,
    OURS,
    PLAIN,
    circumstances,
    goals,
    goals_text,
    ratios,
    table,
)

ROOT: Final = Path(__file__).parent.parent.parent
DOCUMENT: Final = ROOT / "docs" / "performance.md"
FOLDER: Final = ROOT / ".modelharbor" / "bench-live"
DATABASE: Final = "modelharbor_bench_live"
SPARE: Final = 500  # descriptors for all but connections of subscribers


def main() -> int:
    arguments = _arguments()
    files = _most_files()
    if max(arguments.subscribers) + SPARE > files:
        most = max(arguments.subscribers)
        print(
            f"bench: {most:,} subscribers take more than {files:,} open files: raise `ulimit -Hn`",
            file=sys.stderr,
        )
        return 1
    try:
        is_met = asyncio.run(_run(arguments, files))
    except (EngineError, LoadError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0 if is_met else 3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.live", description=__doc__)
    parser.add_argument(
        "--subscribers", type=int, nargs="+", default=[1000, 10_000], help="(1000 10000)"
    )
    parser.add_argument("--seconds", type=int, default=10, help="of progress (10)")
    parser.add_argument("--pace", type=float, default=5.0, help="changes of the job a second (5)")
    parser.add_argument("--only", choices=["ours", "plain"], help="this server alone")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the engines")
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables into docs/{DOCUMENT.name}"
    )
    return parser.parse_args()


def _most_files() -> int:
    """As many as the system allows, here and in the processes that are started from here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


async def _run(arguments: argparse.Namespace, files: int) -> bool:
    """Whether all goals are met."""
    load, yardsticks = os.getloadavg()[0], [yardstick()]
    ours: list[Measured] = []
    plain: list[Measured] = []
    notes: list[str] = []
    async with engines_beside(arguments.data.absolute(), DATABASE) as data:
        for count in arguments.subscribers:
            if arguments.only != "plain":
                print(f"{OURS}: {count:,} subscribers", file=sys.stderr)
                ours.append(await _measure_ours(data, count, arguments))
                yardsticks.append(yardstick())
            if arguments.only != "ours":
                if 2 * count + SPARE > files:
                    notes.append(
                        f"{PLAIN}: {count:,} subscribers take two open files each, more than the {files:,} that one process may have here."
                    )
                    continue
                print(f"{PLAIN}: {count:,} subscribers", file=sys.stderr)
                plain.append(await _measure_plain(data, count, arguments))
                yardsticks.append(yardstick())
        about = circumstances(data, arguments.seconds, arguments.pace, load, yardsticks)
    reached = goals(ours)
    lines = [(OURS, each) for each in ours] + [(PLAIN, each) for each in plain]
    told = [about, table(lines), *notes]
    if ours and plain:
        told.append(ratios(ours, plain))
    if ours:
        told.append(goals_text(reached))
    print("\n\n".join(told))
    if arguments.write:
        write(DOCUMENT, "\n\n".join(told), BEGIN, END)
    return all(each.is_met for each in reached)


async def _measure_ours(data: Filled, count: int, arguments: argparse.Namespace) -> Measured:
    async with connect(data.settings) as database:
        await database.client.drop_database(data.settings.mongo_database)
        await migrate(database)
        user = await ActorDocument(kind=ActorKind.USER, login="bench", login_lower="bench").insert()
        _, token = await issue_token(database, user.id, "bench", list(Permission), None)
        async with our_server(data) as served:
            job = await stored_job(database, user.id)
            return await measure(
                served, job, watching.OURS, token, count, arguments.seconds, arguments.pace
            )


async def _measure_plain(data: Filled, count: int, arguments: argparse.Namespace) -> Measured:
    port = free_port()
    async with (
        run_server(
            data,
            "plain",
            Path(sys.executable),
            *("-m", "bench.live.plain", "--port", str(port)),
            port=port,
            variables=environment(data.settings),
        ) as served,
        published_job(data.settings.redis_url) as job,
    ):
        return await measure(
            served, job, watching.PLAIN, None, count, arguments.seconds, arguments.pace
        )


if __name__ == "__main__":
    sys.exit(main())
