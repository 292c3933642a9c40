"""`make bench-exports`: exports beside a loop by hand, killed, and while others ask the API."""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Final

import httpx
from bson import json_util

from bench.live.report import Goal, goals_text
from bench.measure import LoadError, graphql_lines, run_wrk, yardstick
from bench.operation import WrongAnswer, asking, draw, load_operations
from bench.report import grid, processor, write
from bench.serving import COMPUTED, Filled, Serving, filled, on_cores, our_server
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database, connect
from modelharbor.db.models import ModelState
from modelharbor.dev.demo import SeedRefused
from modelharbor.dev.engines import EngineError
from modelharbor.resolvers.exports import folder_of
from modelharbor.storage.blobs import open_storage

from .plain import MODELS, NESTED, id_of
from .working import (
    Exported,
    Person,
    ended_job,
    eta_errors,
    export,
    job_row,
    kill,
    lines_of,
    make_person,
    put,
    run_worker,
    same_rows,
)

ROOT: Final = Path(__file__).parent.parent.parent
DOCUMENT: Final = ROOT / "docs" / "performance.md"
FOLDER: Final = ROOT / ".modelharbor" / "bench-exports"
DATABASE: Final = "modelharbor_bench_exports"
BEGIN: Final = "<!-- exports: begin -->"
END: Final = "<!-- exports: end -->"
PARTS: Final = ("rows", "nested", "api", "kills")
LEAST_RATIO: Final = 0.7
MOST_MEBIBYTES: Final = 150.0
MOST_TIMES: Final = 1.5
MOST_ETA_ERROR: Final = 0.2
ETA_SECONDS: Final = 1.0  # left at least, or a share of it says nothing
CONNECTIONS: Final = 4
VARIABLES: Final = {**COMPUTED, "MODELHARBOR_BUDGET_USER": "0"}
HEAD: Final = ("Export", "Rows", "Bytes", "Seconds", "Rows/s", "CPU s", "Resident MiB, at most", "By hand: rows/s", "CPU s", "Ratio")  # fmt: skip
KILLED: Final = ("Killed", "Rows", "There throughout", "Missing", "Twice", "Rows done again, at most", "Bytes in the store done again, at most")  # fmt: skip
API: Final = ("One model by name", "Requests/s", "p50 ms", "p95 ms", "p99 ms")


@dataclass(frozen=True, slots=True)
class Beside:
    title: str
    ours: Exported
    plain: Row

    @property
    def ratio(self) -> float:
        """Of the rows a second."""
        mine = self.ours.rows / self.ours.seconds
        return float(mine / (self.plain["rows"] / self.plain["seconds"]))


@dataclass(frozen=True, slots=True)
class Killed:
    kills: int
    rows: int
    throughout: int
    missing: int
    twice: int
    rows_again: int
    bytes_again: int


def main() -> int:
    arguments = _arguments()
    try:
        is_met = asyncio.run(_run(arguments))
    except (EngineError, SeedRefused, WrongAnswer, LoadError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0 if is_met else 3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.exports", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--models", type=int, default=100_000, help="demo models (100000)")
    parser.add_argument("--files", type=int, default=2, help="of a version, at most (2)")
    parser.add_argument(
        "--nested", type=int, default=5_000, help="of them with versions and files (5000)"
    )
    parser.add_argument("--kills", type=int, default=20, help="of the worker (20)")
    parser.add_argument("--seconds", type=int, default=5, help="that the API is asked (5)")
    parser.add_argument("--rounds", type=int, default=3, help="of what is measured beside (3)")
    parser.add_argument("--seed", type=int, default=1, help="of moments and changes (1)")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the engines")
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables into docs/{DOCUMENT.name}"
    )
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> bool:
    """Whether all goals are met."""
    load, yardsticks = os.getloadavg()[0], [yardstick()]
    told: list[str] = []
    goals: list[Goal] = []
    async with (
        filled(
            arguments.data.absolute(),
            arguments.models,
            database=DATABASE,
            files_per_version=arguments.files,
        ) as data,
        connect(data.settings) as database,
    ):
        person = await make_person(database)
        beside = []
        if "rows" in arguments.only:
            beside += await _beside(data, database, person, "models", MODELS, arguments.rounds)
        if "nested" in arguments.only:
            variables = await _first(database, person, arguments.nested)
            beside += await _beside(
                data, database, person, "nested", NESTED, 1, variables=variables
            )
        if beside:
            told.append(beside_table(beside))
            goals += beside_goals(beside)
        yardsticks.append(yardstick())
        if "api" in arguments.only:
            text, found = await _api(data, database, person, arguments.seconds)
            told.append(text)
            goals += found
            yardsticks.append(yardstick())
        if "kills" in arguments.only:
            killed = await _kill(data, database, person, Random(arguments.seed), arguments.kills)
            told.append(killed_table(killed))
            goals += killed_goals(killed)
        about = circumstances(data, arguments, load, yardsticks)
    text = "\n\n".join([about, *told, goals_text(goals)])
    print(text)
    if arguments.write:
        write(DOCUMENT, text, BEGIN, END)
    return all(each.is_met for each in goals)


def visible(person: Person) -> Row:
    """As the API's own list of models has it."""
    return {"state": ModelState.ACTIVE.value, **person.viewer.visible}


async def _first(database: Database, person: Person, count: int) -> dict[str, Any]:
    """A filter for so many models, the oldest ones."""
    rows = await database.find(
        "models",
        visible(person),
        projection={"created_at": 1},
        sort={"created_at": 1, "_id": 1},
        limit=count,
    )
    last = rows[-1]["created_at"].isoformat("T", "milliseconds") + "Z"
    return {"filter": {"createdAt": {"lte": last}}}


# Beside a loop by hand ---------------------------------------------------------------------------


async def _beside(
    data: Filled,
    database: Database,
    person: Person,
    what: str,
    document: str,
    rounds: int,
    variables: dict[str, Any] | None = None,
) -> list[Beside]:
    query = visible(person)
    given = variables or {}
    if given:
        last = datetime.fromisoformat(given["filter"]["createdAt"]["lte"])
        query = {**query, "created_at": {"$lte": last}}
    found = []
    with tempfile.TemporaryDirectory(dir=data.settings.data_path) as folder:
        to = Path(folder) / "plain.jsonl"
        for number in range(1, rounds + 1):
            plain = await _plain(data, query, what, to)
            ours = await export(database, data, person, document, given)
            if ours.rows != plain["rows"]:
                raise WrongAnswer(f"{ours.rows} rows are exported, of {plain['rows']}")
            await _compare(data, ours, to)
            found.append(Beside(f"{what}, {number}", ours, plain))
    return found


async def _plain(data: Filled, query: Row, what: str, to: Path) -> Row:
    with on_cores(set(data.server_cores) or os.sched_getaffinity(0)):
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.exports.plain", data.mongo_url),
            *(data.settings.mongo_database, json_util.dumps(query), what, str(to)),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
    output, _ = await child.communicate()
    if child.returncode:
        raise LoadError(f"the loop by hand ended with {child.returncode}")
    told: Row = json.loads(output)
    return told


async def _compare(data: Filled, ours: Exported, plain: Path) -> None:
    """Row by row."""
    async with open_storage(data.settings) as storage:
        with plain.open("rb") as file:
            async for line in lines_of(storage, ours.row):
                other = file.readline()
                if line != other[:-1] and not same_rows(line, other):
                    raise WrongAnswer(f"{line[:300]!r} is exported; by hand it is {other[:300]!r}")


# While others ask --------------------------------------------------------------------------------


async def _api(
    data: Filled, database: Database, person: Person, seconds: int
) -> tuple[str, list[Goal]]:
    async with our_server(data, variables=VARIABLES) as served:
        lines = await asyncio.to_thread(_bodies, served)
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as bodies:
            bodies.writelines(lines)
            bodies.flush()

            async def ask() -> dict[str, int]:
                return await asyncio.to_thread(
                    run_wrk, served.url, bodies.name, CONNECTIONS, seconds
                )

            await ask()  # to warm up
            idle = await ask()
            exporting = asyncio.create_task(export(database, data, person, MODELS, {}, served.url))
            during: list[dict[str, int]] = []
            await asyncio.sleep(3)
            while not exporting.done():
                asked = await ask()
                if not exporting.done() or not during:
                    during.append(asked)
            exported = await exporting
            quiet = await export(database, data, person, MODELS, {}, served.url)
    busy = {
        name: round(statistics.median(each[name] for each in during))
        for name in ("requests", "microseconds", "p50", "p95", "p99")
    }
    times = busy["p95"] / max(1, idle["p95"])
    goals = [
        Goal(
            f"p95 of one model by name while an export runs: {times:.2f} of {MOST_TIMES} times that of before",
            times <= MOST_TIMES,
        )
    ]
    told = [grid(API, [_asked("idle", idle), _asked("while an export runs", busy)])]
    for title, each in (("while the API is asked", exported), ("alone", quiet)):
        errors = sorted(eta_errors(each.row, each.etas, ETA_SECONDS))
        if not errors:
            told.append(f"Seconds to go, {title}: the export was too short to tell.")
            continue
        middle, worst = statistics.median(errors), errors[-1]
        told.append(
            f"Seconds to go as they were told in the second half, {title}: {middle:.0%} off (median of {len(errors)}), {worst:.0%} at most, of what was left."
        )
        goals.append(
            Goal(f"seconds to go, {title}: {middle:.0%} of {MOST_ETA_ERROR:.0%} off", middle <= MOST_ETA_ERROR)
        )  # fmt: skip
    return "\n\n".join(told), goals


def _bodies(served: Serving) -> list[str]:
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        [model] = load_operations(draw(asking(client)), names=("model",))
    return graphql_lines(model.bodies())


def _asked(title: str, told: dict[str, int]) -> tuple[str, ...]:
    return (
        title,
        f"{told['requests'] / told['microseconds'] * 1e6:,.0f}",
        *(f"{told[name] / 1000:,.2f}" for name in ("p50", "p95", "p99")),
    )


# Killed ------------------------------------------------------------------------------------------


async def _kill(
    data: Filled, database: Database, person: Person, random: Random, kills: int
) -> Killed:
    """The worker, at random moments, while models change, come and go."""
    before = {row["_id"] for row in await database.find("models", visible(person), projection={"_id": 1})}  # fmt: skip
    job = await put(database, data, person, MODELS, {})
    changing = asyncio.create_task(_change(database, random))
    rows_again = bytes_again = done = 0
    try:
        async with open_storage(data.settings) as storage:
            while done < kills:
                async with run_worker(data, f"worker-{done}") as worker:
                    if not await _at_work(database, job["_id"], job["token"]):
                        break
                    await asyncio.sleep(random.random() * 2.5)
                    # This is about rows: three deaths before the first piece of each would end it.
                    await database.data["jobs"].update_one(
                        {"_id": job["_id"]}, {"$set": {"deaths": 0}}
                    )
                    kill(worker)
                row = await job_row(database, job["_id"])
                if row["finished_at"] is not None:
                    break
                done += 1
                job["token"] = row["token"]
                checkpoint = row["checkpoint"] or {"rows": 0, "pieces": []}
                rows_again = max(rows_again, row["progress"]["current"] - checkpoint["rows"])
                named = {name for name, _ in checkpoint["pieces"]}
                folder = data.settings.data_path / "blobs" / folder_of(job["_id"])
                left = [each.stat().st_size for each in folder.glob("*") if each.name not in named]
                bytes_again = max(bytes_again, sum(left))
            async with run_worker(data, "worker-last"):
                row = await ended_job(database, job["_id"])
            changing.cancel()
            seen: Counter[str] = Counter()
            async for line in lines_of(storage, row):
                seen[json.loads(line)["id"]] += 1
    finally:
        changing.cancel()
    after = {row["_id"] for row in await database.find("models", visible(person), projection={"_id": 1})}  # fmt: skip
    throughout = {id_of({"_id": each}) for each in before & after}
    await _restore(database)
    return Killed(
        done,
        sum(seen.values()),
        len(throughout),
        len(throughout - seen.keys()),
        sum(count > 1 for count in seen.values()),
        rows_again,
        bytes_again,
    )


async def _at_work(database: Database, job_id: Any, token: int) -> bool:
    """Waits until another claim of it has begun; False where it has ended."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        row = await job_row(database, job_id)
        if row["finished_at"] is not None:
            return False
        if row["token"] != token:
            return True
        await asyncio.sleep(0.02)
    raise LoadError("no worker takes the job within a minute")


NEW: Final = "bench-new-"
GONE: Final = "bench_gone"


async def _change(database: Database, random: Random) -> None:
    """Past the API, as fast as it goes: what exports sort and filter by, too."""
    data, number = database.data["models"], 0
    while True:
        [row] = await (await data.aggregate([{"$sample": {"size": 1}}])).to_list()
        number += 1
        chance = random.random()
        if chance < 0.6:
            await data.update_one(
                {"_id": row["_id"]}, {"$set": {"updated_at": utc_now()}, "$inc": {"stats.likes": 1}}
            )
        elif chance < 0.8:
            name = f"{NEW}{number}"
            new = {key: value for key, value in row.items() if key != "_id"}
            await data.insert_one({**new, "name": name, "name_lower": name})
        elif row["state"] == ModelState.ACTIVE.value:
            gone = {"state": "GONE", GONE: True}
            await data.update_one({"_id": row["_id"]}, {"$set": gone})
        await asyncio.sleep(0.002)


async def _restore(database: Database) -> None:
    """The models of before, for the next time."""
    data = database.data["models"]
    await data.delete_many({"name": {"$regex": f"^{NEW}"}})
    back = {"$set": {"state": ModelState.ACTIVE.value}, "$unset": {GONE: 1}}
    await data.update_many({GONE: True}, back)


# Telling -----------------------------------------------------------------------------------------


def beside_goals(found: Sequence[Beside]) -> list[Goal]:
    rows = [each for each in found if each.title.startswith("models")]
    goals = []
    if rows:
        ratio = statistics.median(each.ratio for each in rows)
        goals.append(
            Goal(
                f"{rows[0].ours.rows:,} rows: {ratio:.2f} (median) of {LEAST_RATIO} at least of the rows/s by hand",
                ratio >= LEAST_RATIO,
            )
        )
    most = max(each.ours.mebibytes for each in found)
    goals.append(Goal(f"{most:.0f} of {MOST_MEBIBYTES:.0f} MiB resident", most <= MOST_MEBIBYTES))
    return goals


def beside_table(found: Sequence[Beside]) -> str:
    return grid(
        HEAD,
        [
            (
                each.title,
                f"{each.ours.rows:,}",
                f"{each.ours.row['result']['bytes']:,}",
                f"{each.ours.seconds:,.1f}",
                f"{each.ours.rows / each.ours.seconds:,.0f}",
                f"{each.ours.cpu_seconds:,.1f}",
                f"{each.ours.mebibytes:,.0f}",
                f"{each.plain['rows'] / each.plain['seconds']:,.0f}",
                f"{each.plain['cpu']:,.1f}",
                f"{each.ratio:.2f}",
            )
            for each in found
        ],
    )


def killed_table(one: Killed) -> str:
    whole = (one.kills, one.rows, one.throughout, one.missing, one.twice, one.rows_again, one.bytes_again)  # fmt: skip
    return grid(KILLED, [tuple(f"{each:,}" for each in whole)])


def killed_goals(one: Killed) -> list[Goal]:
    wrong = one.missing + one.twice
    return [
        Goal(
            f"{one.kills} kills while models change: {wrong} of 0 rows missing or twice", wrong == 0
        )
    ]


def circumstances(
    data: Filled, arguments: argparse.Namespace, load: float, yardsticks: Sequence[float]
) -> str:
    cores = ", ".join(map(str, data.server_cores))
    where = f"the server, and without one the worker or the loop by hand, on core {cores}, all else on the rest" if cores else "everything on the same cores"  # fmt: skip
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {arguments.models:,} models, JSON Lines, not compressed, "
        f"on local disk; one worker process, {where}; {processor()}; "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"MongoDB {data.mongo_version}. Load of the machine before: {load:.1f}. "
        f"Meanwhile Python added up a million numbers in {min(yardsticks):.0f} to {max(yardsticks):.0f} ms of CPU."
    )


if __name__ == "__main__":
    sys.exit(main())
