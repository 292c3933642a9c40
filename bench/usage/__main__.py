"""`make bench-usage`: what the recording of usage adds to the CPU time of a request.

Two servers for each way, one that records and one that does not, asked in turns; what writes the events
is part of the process, and counted.
"""

import argparse
import asyncio
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx

from bench.live.report import Goal, goals_text
from bench.measure import LoadError, graphql_lines, yardstick
from bench.operation import WrongAnswer, asking, draw, load_operations
from bench.peers.measuring import Sample, combined, sample, warm
from bench.report import grid, micros, processor, write
from bench.serving import Serving, filled, our_server
from modelharbor.dev.demo import SeedRefused
from modelharbor.dev.engines import EngineError

ROOT: Final = Path(__file__).parent.parent.parent
DOCUMENT: Final = ROOT / "docs" / "performance.md"
FOLDER: Final = ROOT / ".modelharbor" / "bench-usage"
DATABASE: Final = "modelharbor_bench_usage"
BEGIN: Final = "<!-- usage: begin -->"
END: Final = "<!-- usage: end -->"
HEAD: Final = (
    "Request",
    "CPU µs, not recorded",
    "CPU µs, recorded",
    "Added",
    "mongod CPU µs, not recorded",
    "mongod CPU µs, recorded",
)
CONNECTIONS: Final = 50
MOST_ADDED: Final = 0.05
FREE: Final = {"MODELHARBOR_BUDGET_ANONYMOUS": "0"}
FILES: Final = 100
JSON: Final = "{"
LINKS: Final = """
query Links { models(first: 50, orderBy: { field: CREATED_AT }) { nodes { latestVersion { files(first: 2) {
  nodes { sizeBytes downloadUrl }
} } } } }
"""


@dataclass(slots=True)
class Way:
    """A kind of request, to a server that does not record and to one that does."""

    name: str
    off: Serving
    on: Serving
    lines: list[str]
    begins: str = ""
    samples: list[tuple[Sample, Sample]] = field(default_factory=list)

    @property
    def added(self) -> float:
        """The share of the CPU time: the median over the rounds, each of which had both."""
        return statistics.median(
            (on.cpu_micros or 0) / off.cpu_micros - 1 for off, on in self.samples if off.cpu_micros
        )

    @property
    def line(self) -> tuple[str, ...]:
        off, on = (combined([both[side] for both in self.samples]) for side in (0, 1))
        return (
            self.name,
            micros(off.cpu_micros),
            micros(on.cpu_micros),
            f"{self.added:+.1%}",
            micros(off.mongo_cpu_micros),
            micros(on.mongo_cpu_micros),
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.usage", description=__doc__)
    parser.add_argument("--models", type=int, default=1_000, help="demo models (1000)")
    parser.add_argument("--seconds", type=int, default=3, help="length of a measurement (3)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each line (7)")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the engines")
    parser.add_argument(
        "--write", action="store_true", help=f"put the table into docs/{DOCUMENT.name}"
    )
    try:
        return 0 if asyncio.run(_run(parser.parse_args())) else 3
    except (EngineError, SeedRefused, WrongAnswer, LoadError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


async def _run(arguments: argparse.Namespace) -> bool:
    """Whether the goals are met."""
    load, yardsticks = os.getloadavg()[0], [yardstick()]
    async with (
        filled(arguments.data.absolute(), arguments.models, database=DATABASE) as data,
        AsyncExitStack() as stack,
    ):
        servers = {
            (kept, recorded): await stack.enter_async_context(
                our_server(
                    data,
                    f"server-{kept}-{recorded}",
                    FREE
                    | {
                        "MODELHARBOR_RESPONSE_CACHE": str(kept).lower(),
                        "MODELHARBOR_USAGE_RECORDING": str(recorded).lower(),
                    },
                )
            )
            for kept in (True, False)
            for recorded in (False, True)
        }
        ways = await asyncio.to_thread(_ways, servers)
        for turn in range(arguments.rounds):
            for way in ways:
                print(f"round {turn + 1}: {way.name}", file=sys.stderr)
                await asyncio.to_thread(_measure, way, arguments.seconds, turn)
            yardsticks.append(yardstick())
    goals = [
        Goal(
            f"{way.name}: {way.added:+.1%} of CPU time; at most {MOST_ADDED:.0%}",
            is_met=way.added <= MOST_ADDED,
        )
        for way in ways
    ]
    about = (
        f"{processor()}; {arguments.rounds} rounds of {arguments.seconds} s over {CONNECTIONS} "
        f"connections; load before {load:.1f}; the yardstick {min(yardsticks):.0f}-{max(yardsticks):.0f} ms"
    )
    text = "\n\n".join([about, grid(HEAD, [way.line for way in ways]), goals_text(goals)])
    print(text)
    if arguments.write:
        write(DOCUMENT, text, BEGIN, END)
    return all(each.is_met for each in goals)


def _ways(servers: dict[tuple[bool, bool], Serving]) -> Sequence[Way]:
    with httpx.Client(base_url=servers[False, False].url, timeout=60, trust_env=False) as client:
        operation = next(
            each for each in load_operations(draw(asking(client))) if each.name == "model"
        )
        operation.check(asking(client)(operation.bodies()[0]))
        files = [
            file
            for model in asking(client)({"query": LINKS})["data"]["models"]["nodes"]
            if model["latestVersion"]
            for file in model["latestVersion"]["files"]["nodes"]
            if file["downloadUrl"]
        ]
        links = [
            f"{parts.path}?{parts.query}"
            for file in sorted(files, key=lambda file: int(file["sizeBytes"]))[:FILES]
            if (parts := urlsplit(file["downloadUrl"])) and _is_json(client, file["downloadUrl"])
        ]
    if not links:
        raise LoadError("no demo model has a file that can be fetched")
    asked = graphql_lines(operation.bodies()[:200])
    return [
        Way("a small query, kept", servers[True, False], servers[True, True], asked),
        Way("a small query, computed", servers[False, False], servers[False, True], asked),
        Way(
            "a download of a small file",
            servers[False, False],
            servers[False, True],
            [f"GET {link}\n" for link in links],
            begins=JSON,
        ),
    ]


def _is_json(client: httpx.Client, url: str) -> bool:
    """What begins alike, so that wrk can tell whether it is right."""
    found = client.get(url)
    return found.status_code == 200 and found.text.startswith(JSON)


def _measure(way: Way, seconds: int, turn: int) -> None:
    """Both, in this order and in the other by turns."""
    found: dict[bool, Sample] = {}
    for recorded in (False, True) if turn % 2 else (True, False):
        served = way.on if recorded else way.off
        if not way.samples:
            warm(served, way.lines, way.begins)
        found[recorded] = sample(served, way.lines, CONNECTIONS, seconds, way.begins)
        if found[recorded].errors:
            raise LoadError(f"{way.name}: {found[recorded].errors} errors")
    way.samples.append((found[False], found[True]))


if __name__ == "__main__":
    sys.exit(main())
