"""`make bench`: load demo models, serve them, drive the canonical operations with wrk, print a table."""

import argparse
import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Final

import httpx

from modelharbor.dev.demo import SeedRefused
from modelharbor.dev.engines import EngineError

from .measure import LoadError, Measured, measure, settle, yardstick
from .operation import WrongAnswer, asking, check, draw, load_operations
from .report import Result, circumstances, first_answers, table, write
from .serving import Serving, serving

CONNECTIONS: Final = (1, 200)
DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "performance.md"


def main() -> int:
    arguments = _arguments()
    if shutil.which("wrk") is None:
        print("bench: wrk is missing: apt-get install wrk", file=sys.stderr)
        return 1
    try:
        asyncio.run(_run(arguments))
    except (EngineError, SeedRefused, WrongAnswer, LoadError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--models", type=int, default=10_000, help="demo models (10000)")
    parser.add_argument("--seconds", type=int, default=5, help="length of a measurement (5)")
    parser.add_argument(
        "--only", nargs="*", help="names of operations: model page filtered facets search"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(".modelharbor/bench"),
        help="folder of the engines and their data, kept for the next run",
    )
    parser.add_argument(
        "--write", action="store_true", help=f"put the table into docs/{DOCUMENT.name}"
    )
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    async with serving(arguments.data.absolute(), arguments.models) as served:
        results, yardsticks = await asyncio.to_thread(_measure, served, arguments)
    told = "\n\n".join(
        [
            circumstances(served, arguments.models, arguments.seconds, load, yardsticks),
            table(results),
            first_answers(results),
        ]
    )
    print(told)
    if arguments.write:
        write(DOCUMENT, told)


def _measure(served: Serving, arguments: argparse.Namespace) -> tuple[list[Result], list[float]]:
    results, yardsticks = [], [yardstick()]
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        ask = asking(client)
        for operation in load_operations(draw(ask)):
            if arguments.only and operation.name not in arguments.only:
                continue
            settle(served)
            checked = check(ask, operation)
            measured: list[Measured] = []
            for connections in CONNECTIONS:
                print(f"{operation.name}: {connections} connections", file=sys.stderr)
                settle(served)
                measured.append(measure(served, operation, connections, arguments.seconds))
                yardsticks.append(yardstick())
            results.append(Result(operation, checked, measured))
    return results, yardsticks


if __name__ == "__main__":
    sys.exit(main())
