"""`make bench-analytics`: what a question about 90 days costs beside the raw events, and whether it is right."""

import argparse
import asyncio
import json
import os
import platform
import resource
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Final

import httpx
from pymongo import timeout

from bench.live.report import Goal, goals_text
from bench.measure import yardstick
from bench.operation import WrongAnswer, asking
from bench.report import grid, processor, write
from bench.serving import COMPUTED, Filled, Serving, filled, on_cores, our_server
from modelharbor.auth.viewer import PUBLIC
from modelharbor.db.connection import Database, connect
from modelharbor.db.rollups import Grain
from modelharbor.db.usage import PREFIX, UsageKind
from modelharbor.dev.demo import SeedRefused
from modelharbor.dev.engines import EngineError
from modelharbor.http.server import environment
from modelharbor.observability.garbage import collecting
from modelharbor.settings import Settings
from modelharbor.worker.rolling_up import roll_up

from .events import (
    DAYS,
    EPOCH,
    Events,
    Models,
    forget_usage,
    make_events,
    read_models,
    write_events,
)
from .truth import QUESTION, Differences, compare, draw

ROOT: Final = Path(__file__).parent.parent.parent
DOCUMENT: Final = ROOT / "docs" / "performance.md"
FOLDER: Final = ROOT / ".modelharbor" / "bench-analytics"
DATABASE: Final = "modelharbor_bench_analytics"
REMEMBERED: Final = "filled.json"  # in that folder
OLDEST: Final = timedelta(hours=20)
"""After so long what was filled is asked no more: minutes of six days are, and kept for seven."""
BEGIN: Final = "<!-- analytics: begin -->"
END: Final = "<!-- analytics: end -->"
MOST_MILLISECONDS: Final = 10.0
LEAST_RATIO: Final = 100.0
WARM: Final = 20
ASKED: Final = 200  # times that the one question is asked
GROUPS: Final = 5
SLOW_SECONDS: Final = 600.0  # of the aggregate over raw events
VARIABLES: Final = {
    **COMPUTED,
    "MODELHARBOR_USAGE_DAYS": str(DAYS + 10),
    "MODELHARBOR_USAGE_RECORDING": "false",  # questions are operations, too
}
ROLL_UP: Final = "--roll-up"
HEAD: Final = ("Question", "Median ms", "95th percentile ms", "Commands", "Rows read", "Raw events: ms", "Ratio")  # fmt: skip
ROLLED: Final = ("Rolling up", "Events", "Seconds", "CPU s", "Events/s", "Resident MiB, at most", "Rows by minute", "by quarter", "by day")  # fmt: skip
QUESTIONS: Final[dict[str, Mapping[str, Any]]] = {
    "by task": {"groupBy": ["TASK"]},
    "by client": {"groupBy": ["CLIENT"]},
    "by client, Berlin": {"groupBy": ["CLIENT"], "timezone": "Europe/Berlin"},
}
"""Of 90 days, by day, the five largest groups and all others. The first is the one that counts."""


@dataclass(frozen=True, slots=True)
class Rolled:
    title: str
    events: int
    seconds: float
    cpu_seconds: float
    mebibytes: float
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Filling:
    """What was filled, and what that took."""

    events: int
    models: int
    kills: int
    seed: int
    until: datetime
    load: float
    yardsticks: Sequence[float]
    rolled: Sequence[Rolled]

    def remember(self, folder: Path) -> None:
        """For those who ask later."""
        told = {**asdict(self), "until": self.until.isoformat()}
        (folder / REMEMBERED).write_text(json.dumps(told, indent=2) + "\n")

    @classmethod
    def remembered(cls, folder: Path, now: datetime) -> "Filling":
        try:
            told = json.loads((folder / REMEMBERED).read_text())
        except FileNotFoundError:
            raise EngineError(f"nothing was filled in {folder}: --fill does") from None
        until = datetime.fromisoformat(told["until"])
        if now - until > OLDEST:
            raise EngineError(f"what was filled in {folder} is too old by now: --fill does it anew")
        return cls(**told | {"until": until, "rolled": [Rolled(**each) for each in told["rolled"]]})


@dataclass(frozen=True, slots=True)
class Timed:
    title: str
    milliseconds: Sequence[float]  # of the database, each time
    commands: int
    rows: int
    raw_milliseconds: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def ratio(self) -> float | None:
        return None if self.raw_milliseconds is None else self.raw_milliseconds / self.median


def main() -> int:
    if sys.argv[1:] == [ROLL_UP]:
        return asyncio.run(_roll_up())
    arguments = _arguments()
    try:
        is_met = asyncio.run(_run(arguments))
    except (EngineError, SeedRefused, WrongAnswer) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0 if is_met else 3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.analytics", description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000, help="raw events (10000000)")
    parser.add_argument("--models", type=int, default=10_000, help="demo models (10000)")
    parser.add_argument("--questions", type=int, default=1000, help="random ones (1000)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the aggregate over raw events (3)"
    )
    parser.add_argument("--kills", type=int, default=3, help="of who rolls up (3)")
    parser.add_argument("--seed", type=int, default=1, help="of events, questions and kills (1)")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the engines")
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables into docs/{DOCUMENT.name}"
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--fill", action="store_true", help="write and roll up events, and ask nothing yet"
    )
    steps.add_argument(
        "--ask", action="store_true", help="only ask, what --fill has filled; its arguments hold"
    )
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> bool:
    """Whether all goals are met."""
    folder: Path = arguments.data.absolute()
    now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    before = Filling.remembered(folder, now) if arguments.ask else None
    many = arguments.models if before is None else before.models
    async with filled(folder, many, database=DATABASE) as data:
        async with connect(data.settings) as database:
            models = await read_models(database)
            if before is None:
                filling = await _fill(data, database, models, now - timedelta(minutes=5), arguments)
                filling.remember(folder)
            else:
                filling = before
        if arguments.fill:
            print(rolled_table(filling.rolled))
            return True
        events = make_events(filling.events, models, filling.until, filling.seed)
        load, yardsticks = os.getloadavg()[0], [*filling.yardsticks, yardstick()]
        async with our_server(data, variables=VARIABLES) as served:
            timed = await _time(served, data.settings, events, arguments.rounds)
            differences, refused = await asyncio.to_thread(
                _ask_at_random,
                served,
                events,
                models,
                Random(filling.seed),
                arguments.questions,
            )
        yardsticks.append(yardstick())
        about = circumstances(data, filling, load, yardsticks)
    goals = goals_of(timed, differences, arguments.questions)
    told = [about, rolled_table(filling.rolled), timed_table(timed), wrong_text(differences, arguments.questions, refused), goals_text(goals)]  # fmt: skip
    text = "\n\n".join(told)
    print(text)
    if arguments.write:
        write(DOCUMENT, text, BEGIN, END)
    return all(each.is_met for each in goals)


# Filling it --------------------------------------------------------------------------------------


async def _fill(
    data: Filled,
    database: Database,
    models: Models,
    until: datetime,
    arguments: argparse.Namespace,
) -> Filling:
    """Most events, killing who rolls up; then the late ones, and some for the second time."""
    load, yardsticks = os.getloadavg()[0], [yardstick()]
    (data.settings.data_path / REMEMBERED).unlink(missing_ok=True)
    await forget_usage(database)
    random, kills = Random(arguments.seed), arguments.kills
    events = make_events(arguments.events, models, until, arguments.seed)
    late, early = events.where(events.is_late), events.where(~events.is_late)
    begun = time.monotonic()
    await write_events(database, early, models)
    print(f"Wrote {len(early):,} events in {time.monotonic() - begun:.0f} s", file=sys.stderr)
    # As long as a part of it takes: kills come while it is at work.
    expected = 5 + len(early) / 50_000
    for _ in range(kills):
        seconds = await _killed(data, 1 + random.random() * expected / (kills + 1))
        print(f"Killed who rolls up after {seconds:.1f} s", file=sys.stderr)
    rolled = [await _rolled(data, database, f"after {kills} kills", len(early))]
    again = events.where(events.number % 97 == 0)
    new = int((again.is_late).sum())
    await write_events(database, late, models)
    there = await write_events(database, again, models)
    if there != len(again):
        raise WrongAnswer(f"{len(again)} events were told twice, {there} are known ({new} late)")
    rolled.append(await _rolled(data, database, "late ones, and some twice", len(late)))
    return Filling(
        arguments.events,
        arguments.models,
        kills,
        arguments.seed,
        until,
        load,
        [*yardsticks, yardstick()],
        rolled,
    )


async def _start(data: Filled) -> asyncio.subprocess.Process:
    variables = {**os.environ, **environment(data.settings), **VARIABLES}
    cores = set(data.server_cores) or os.sched_getaffinity(0)
    with on_cores(cores):
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.analytics", ROLL_UP),
            stdout=asyncio.subprocess.PIPE,
            env=variables,
            cwd=ROOT,
        )


async def _killed(data: Filled, seconds: float) -> float:
    child = await _start(data)
    begun = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            await child.wait()
    except TimeoutError:
        child.send_signal(signal.SIGKILL)
        await child.wait()
    return time.monotonic() - begun


async def _rolled(data: Filled, database: Database, title: str, events: int) -> Rolled:
    child = await _start(data)
    output, _ = await child.communicate()
    if child.returncode:
        raise EngineError(f"who rolls up ended with {child.returncode}")
    told = json.loads(output)
    left = await database.count("usage_dirty", {})
    if left:
        raise WrongAnswer(f"{left} minutes are dirty still")
    rows = {grain.value: await database.data[grain.value].estimated_document_count() for grain in Grain}  # fmt: skip
    return Rolled(title, events, told["seconds"], told["cpu"], told["mebibytes"], rows)


async def _roll_up() -> int:
    """In a process of its own, which may be killed."""
    settings = Settings()
    begun = time.monotonic()
    async with collecting(), connect(settings) as database:
        while (await roll_up(database, settings)).is_moving:
            pass
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {
        "seconds": time.monotonic() - begun,
        "cpu": used.ru_utime + used.ru_stime,
        "mebibytes": used.ru_maxrss / 1024,
    }
    print(json.dumps(told))
    return 0


# Asking ------------------------------------------------------------------------------------------


def variables_of(events: Events, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the last 90 days, with today."""
    day = 86_400_000
    last = int(events.at[-1]) // day * day + day
    begin, end = (EPOCH + timedelta(milliseconds=each) for each in (last - DAYS * day, last))
    return {
        "input": {
            "metrics": ["DOWNLOADS"],
            "range": {"from": f"{begin.isoformat()}Z", "to": f"{end.isoformat()}Z"},
            "granularity": "DAY",
            "limit": GROUPS,
            **values,
        }
    }


async def _time(served: Serving, settings: Settings, events: Events, rounds: int) -> list[Timed]:
    found = []
    for title, values in QUESTIONS.items():
        variables = variables_of(events, values)
        asked = await asyncio.to_thread(_asked, served, variables)
        raw = None
        if title == next(iter(QUESTIONS)):
            async with connect(settings) as database:
                raw = await _raw(database, variables["input"], asked[-1]["data"], rounds)
        cost = asked[-1]["extensions"]["cost"]
        found.append(
            Timed(
                title,
                [each["extensions"]["cost"]["dbMs"] for each in asked],
                cost["dbCommands"],
                asked[-1]["data"]["analytics"]["scannedBuckets"],
                raw,
            )
        )
    return found


def _asked(served: Serving, variables: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        ask, found = asking(client), []
        for _ in range(WARM + ASKED):
            answer = ask({"query": QUESTION, "variables": variables})
            if answer.get("errors"):
                raise WrongAnswer(answer["errors"][0]["message"])
            found.append(answer)
    return found[WARM:]


async def _raw(database: Database, given: Mapping[str, Any], data: Any, rounds: int) -> float:
    """Milliseconds (median) of an aggregate over all raw events that answers the same, and does."""
    names = sorted(n for n in await database.data.list_collection_names() if n.startswith(PREFIX))
    first, *others = [name for name in names if name.removeprefix(PREFIX).isdigit()]
    begin, end = (datetime.fromisoformat(given["range"][name]) for name in ("from", "to"))
    wanted = {"$match": {"kind": UsageKind.DOWNLOAD.value, "at": {"$gte": begin, "$lt": end}}}
    by_model = {
        "$group": {
            "_id": {"day": {"$dateTrunc": {"date": "$at", "unit": "day"}}, "model": "$model"},
            "value": {"$sum": "$count"},
        }
    }
    lookup = {"from": "models", "localField": "_id.model", "foreignField": "_id", "as": "of"}
    pipeline: list[dict[str, Any]] = [
        wanted,
        by_model,
        *({"$unionWith": {"coll": name, "pipeline": [wanted, by_model]}} for name in others),
        # As well as one can: models are looked up once for each of their days.
        {"$lookup": {**lookup, "pipeline": [{"$match": {"principals": PUBLIC}}, {"$project": {"task": 1}}]}},
        {"$unwind": "$of"},
        {"$group": {"_id": {"day": "$_id.day", "task": "$of.task"}, "value": {"$sum": "$value"}}},
    ]  # fmt: skip
    milliseconds = []
    rows: list[Any] = []
    for _ in range(rounds):
        begun = time.perf_counter()
        with timeout(SLOW_SECONDS):  # more than a socket waits for else
            cursor = await database.data[first].aggregate(pipeline, allowDiskUse=True)
            rows = await cursor.to_list()
        milliseconds.append((time.perf_counter() - begun) * 1000)
    for series in data["analytics"]["series"]:
        if series["isOther"]:
            continue
        task = series["group"][0]["value"]
        total = sum(row["value"] for row in rows if (row["_id"].get("task") or "") == task)
        if total != series["total"]:
            raise WrongAnswer(f"{task}: {series['total']} of {total} downloads")
    return statistics.median(milliseconds)


def _ask_at_random(
    served: Serving, events: Events, models: Models, random: Random, count: int
) -> tuple[Differences, int]:
    """How far answers are from the recount; how many questions were too large to be answered."""
    into, refused = Differences(), 0
    first, last = (
        (EPOCH + timedelta(milliseconds=int(at))).replace(tzinfo=UTC)
        for at in (events.at[0], events.at[-1])
    )
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        ask = asking(client)
        for number in range(count):
            asked = draw(random, models, first, last)
            answer = ask({"query": QUESTION, "variables": asked.variables()})
            if answer.get("errors"):
                error = answer["errors"][0]
                if error["extensions"]["code"] != "OPERATION_TOO_COMPLEX":
                    raise WrongAnswer(f"{asked}: {error['message']}")
                refused += 1
                continue
            before = into.all
            compare(asked, answer["data"]["analytics"], events, models, into)
            if into.all != before:
                print(f"Question {number} is answered wrongly: {asked}", file=sys.stderr)
    return into, refused


# Telling -----------------------------------------------------------------------------------------


def goals_of(timed: Sequence[Timed], found: Differences, questions: int) -> list[Goal]:
    first = timed[0]
    ratio = first.ratio or 0.0
    return [
        Goal(
            f"90 days, {GROUPS} groups: {first.median:.1f} of {MOST_MILLISECONDS:.0f} ms in the database",
            first.median <= MOST_MILLISECONDS,
        ),
        Goal(
            f"{ratio:,.0f} times as fast as over raw events, of {LEAST_RATIO:.0f} at least",
            ratio >= LEAST_RATIO,
        ),
        Goal(
            f"{questions:,} random questions: {found.additive} of 0 sums differ from the recount",
            found.additive == 0,
        ),
        Goal(
            f"{found.exact} of 0 counts of people that were told as exact differ, {found.beyond} of 0 estimates are beyond their error",
            found.exact == 0 and found.beyond == 0,
        ),
    ]


def wrong_text(found: Differences, questions: int, refused: int) -> str:
    return (
        f"{questions:,} questions had {found.points:,} points; {refused} were refused as too large. "
        f"{found.estimates:,} numbers of people were estimated, with an error of {found.error:.1%} (root of the mean square)."
    )


def rolled_table(rolled: Sequence[Rolled]) -> str:
    return grid(
        ROLLED,
        [
            (
                each.title,
                f"{each.events:,}",
                f"{each.seconds:,.1f}",
                f"{each.cpu_seconds:,.1f}",
                f"{each.events / each.seconds:,.0f}",
                f"{each.mebibytes:,.0f}",
                *(f"{each.rows[grain.value]:,}" for grain in Grain),
            )
            for each in rolled
        ],
    )


def timed_table(timed: Sequence[Timed]) -> str:
    return grid(HEAD, [_line(each) for each in timed])


def _line(one: Timed) -> tuple[str, ...]:
    ordered = sorted(one.milliseconds)
    return (
        one.title,
        f"{one.median:,.2f}",
        f"{ordered[int(len(ordered) * 0.95)]:,.2f}",
        f"{one.commands}",
        f"{one.rows:,}",
        "-" if one.raw_milliseconds is None else f"{one.raw_milliseconds:,.0f}",
        "-" if one.ratio is None else f"{one.ratio:,.0f}",
    )


def circumstances(data: Filled, filling: Filling, load: float, yardsticks: Sequence[float]) -> str:
    cores = ", ".join(map(str, data.server_cores)) or "shared with all else"
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {filling.events:,} raw events of {DAYS} days, "
        f"{filling.models:,} models, one server process (core {cores}), {processor()}; "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"MongoDB {data.mongo_version}. Load of the machine before it was filled: {filling.load:.1f}, before questions: {load:.1f}. "
        f"Meanwhile Python added up a million numbers in {min(yardsticks):.0f} to {max(yardsticks):.0f} ms of CPU."
    )


if __name__ == "__main__":
    sys.exit(main())
