"""`python -m tests.fuzz --cases 100000 --seed 1`: the engines compared on random operations.

Cases that differ are made small and left as files; one that was mended belongs into tests/fuzz/corpus/.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from modelharbor.dev.engines import run_engines

from .campaign import Tally, campaign, timer
from .compare import open_world, report


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def fuzz(
    cases: int, seed: str, folder: Path, most_found: int, is_alone: bool = False
) -> Tally:
    with tempfile.TemporaryDirectory(prefix="modelharbor-") as temporary:
        engines = run_engines(
            Path(temporary),
            mongo_url=os.environ.get("MODELHARBOR_MONGO_URL"),
            redis_url=os.environ.get("MODELHARBOR_REDIS_URL"),
            fast=True,
            cache_gigabytes=0.25,
        )
        async with (
            engines as running,
            open_world(running.mongo_url, running.redis_url, Path(temporary)) as world,
        ):
            if is_alone:
                world.settings["plan"] = world.settings["core"]
            passed, told = timer(), [time.monotonic()]

            written = 0

            def progress(tally: Tally) -> None:
                nonlocal written
                for found in tally.found[written:]:
                    folder.mkdir(parents=True, exist_ok=True)
                    path = folder / f"{seed}-{written}.json"
                    path.write_bytes(report(found.case, found.found))
                    say(f"{path}\n{found.case.document}\n{found.found}\n")
                    written += 1
                if time.monotonic() - told[0] > 10:
                    told[0] = time.monotonic()
                    say(
                        f"{tally.cases} cases, {tally.differences} differ, {tally.cases / passed():.0f} a second"
                    )

            before = await world.state()
            tally = await campaign(world, cases, seed, progress, most_found)
            seconds = passed()
            for each in tally.by_order[:3]:
                say(f"by the order of reads: {report(each.case, each.found).decode()}")
            for reason, case in tally.clean_examples.items():
                say(f"no plan, {reason}: {case.document}")
            for line in tally.lines(seconds):
                say(line)
            if before != await world.state():
                raise SystemExit("A case changed what is stored: later cases were not comparable.")
            return tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--most-found", type=int, default=20, help="end when so many differ")
    parser.add_argument(
        "--folder", type=Path, default=Path(".make/fuzz"), help="for cases that differ"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="graphql-core on both sides: does it agree with itself?",
    )
    given = parser.parse_args()
    tally = asyncio.run(fuzz(given.cases, given.seed, given.folder, given.most_found, given.alone))
    raise SystemExit(1 if tally.found else 0)


main()
