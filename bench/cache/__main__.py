"""`make bench-cache`: what answers cost that are kept, whether any is old, and the same of two others."""

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import httpx

from bench.live.report import Goal, goals_text
from bench.measure import LoadError, settle, yardstick
from bench.operation import WrongAnswer, asking
from bench.peers.servers import NODE_FOLDER, PRODUCTION, node
from bench.report import write
from bench.serving import Filled, Serving, filled, free_port, our_server, run_server
from modelharbor.db.connection import connect
from modelharbor.dev.demo import SeedRefused
from modelharbor.dev.engines import EngineError

from .counting import Counts, count
from .drawing import list_models
from .fixed import BODIES
from .mixing import Act, Mixed, crowd_of, mix
from .paths import COMPUTED, Servers, draw_operations, measure_paths, write_fixed
from .people import People, make_people
from .redis import own_redis
from .report import (
    BEGIN,
    END,
    Compared,
    circumstances,
    cores_here,
    mix_goals,
    mix_table,
    path_goals,
    paths_table,
    peer_goals,
    peers_table,
)
from .users import Phase

ROOT: Final = Path(__file__).parent.parent.parent
DOCUMENT: Final = ROOT / "docs" / "performance.md"
FOLDER: Final = ROOT / ".modelharbor" / "bench-cache"
DATABASE: Final = "modelharbor_bench_cache"
FILES_PER_VERSION: Final = 4
PARTS: Final = ("paths", "mix", "peers")
OURS: Final = "ours"
PEERS: Final = {
    "apollo-cached": "Apollo Server, its response cache",
    "yoga-cached": "GraphQL Yoga, @envelop/response-cache",
}
MAX_AGE: Final = 30  # seconds, as our schema says of models
MOST_BUDGET: Final = str(10**9)
"""Of one address: all connections come from it, and the budget of one is not what is measured."""
WARM_SECONDS: Final = 10.0
WARM: Final = "warm"
MEASURED: Final = "all is well"


def main() -> int:
    arguments = _arguments()
    if "paths" in arguments.only and shutil.which("wrk") is None:
        print("bench: wrk is missing: apt-get install wrk", file=sys.stderr)
        return 1
    try:
        is_met = asyncio.run(_run(arguments))
    except (EngineError, SeedRefused, WrongAnswer, LoadError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0 if is_met else 3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument(
        "--operations", nargs="*", choices=COMPUTED, help="of the ways, these operations alone"
    )
    parser.add_argument("--models", type=int, default=10_000, help="demo models (10000)")
    parser.add_argument("--seconds", type=int, default=2, help="length of a measurement (2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each line (3)")
    parser.add_argument("--users", type=int, default=200, help="of the mix (200)")
    parser.add_argument(
        "--anonymous", type=int, default=0, help="of the users, so many read without a token (0)"
    )
    parser.add_argument(
        "--rate", type=float, default=600.0, help="things that all users begin, a second (600)"
    )
    parser.add_argument(
        "--phase", type=float, default=15.0, help="seconds of a phase of the mix (15)"
    )
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the engines")
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables into docs/{DOCUMENT.name}"
    )
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> bool:
    """Whether all goals are met."""
    load, cores, yardsticks = os.getloadavg()[0], cores_here(), [yardstick()]
    told: list[str] = []
    goals: list[Goal] = []
    async with filled(
        arguments.data.absolute(),
        arguments.models,
        database=DATABASE,
        files_per_version=FILES_PER_VERSION,
    ) as data:
        people = await _people(data, arguments.users)
        if "paths" in arguments.only:
            await _paths(data, arguments, told, goals, yardsticks)
        if "mix" in arguments.only:
            await _mix(data, people, arguments, told, goals)
            yardsticks.append(yardstick())
        if "peers" in arguments.only:
            await _peers(data, people, arguments, told, goals)
            yardsticks.append(yardstick())
        about = circumstances(
            data,
            cores,
            arguments.models,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            users=arguments.users,
            rate=arguments.rate,
            load=load,
            yardsticks=yardsticks,
        )
    text = "\n\n".join([about, *told, goals_text(goals)])
    print(text)
    if arguments.write:
        write(DOCUMENT, text, BEGIN, END)
    return all(each.is_met for each in goals)


async def _people(data: Filled, users: int) -> People:
    async with connect(data.settings) as database:
        return await make_people(database, users)


async def _paths(
    data: Filled,
    arguments: argparse.Namespace,
    told: list[str],
    goals: list[Goal],
    yardsticks: list[float],
) -> None:
    bodies = data.settings.data_path / "fixed"
    budget = {"MODELHARBOR_BUDGET_ANONYMOUS": MOST_BUDGET}
    async with AsyncExitStack() as stack:

        async def ours(name: str, variables: dict[str, str]) -> Serving:
            return await stack.enter_async_context(our_server(data, name, budget | variables))

        computed = await ours("computed", {"MODELHARBOR_RESPONSE_CACHE": "false"})
        with httpx.Client(base_url=computed.url, timeout=60, trust_env=False) as client:
            operations = await asyncio.to_thread(draw_operations, client, arguments.operations)
            await asyncio.to_thread(write_fixed, bodies, operations, asking(client))
        servers = Servers(
            fixed=await _fixed(stack, data, bodies),
            l1=await ours("l1", {}),
            l2=await ours("l2", {"MODELHARBOR_CACHE_BYTES": "0"}),
            computed=computed,
        )
        lines, found = await asyncio.to_thread(
            measure_paths,
            servers,
            operations,
            arguments.seconds,
            arguments.rounds,
        )
    yardsticks += found
    told += ["**An answer by each way**", paths_table(lines)]
    goals += path_goals(lines)


async def _fixed(stack: AsyncExitStack, data: Filled, bodies: Path) -> Serving:
    port = free_port()
    return await stack.enter_async_context(
        run_server(
            data,
            "fixed",
            Path(sys.executable),
            *("-m", "bench.cache.fixed", "--port", str(port)),
            port=port,
            variables={BODIES: str(bodies)},
        )
    )


async def _mix(
    data: Filled,
    people: People,
    arguments: argparse.Namespace,
    told: list[str],
    goals: list[Goal],
) -> None:
    """One run with a Redis of its own, which is killed and hung. Settings as they are."""
    phases = [Phase(WARM, WARM_SECONDS)] + [
        Phase(name, arguments.phase)
        for name in (MEASURED, "Redis killed", "Redis back", "Redis hung", "Redis goes on")
    ]
    async with own_redis(data.settings.data_path / "redis") as redis:
        settings = data.settings.model_copy(update={"redis_url": redis.url})

        async def kill() -> None:
            redis.kill()

        async def hang() -> None:
            redis.hang()

        async def go_on() -> None:
            redis.go_on()

        async with our_server(replace(data, settings=settings), "mix") as served:
            acts = {
                "Redis killed": kill,
                "Redis back": redis.start,
                "Redis hung": hang,
                "Redis goes on": go_on,
            }
            _, *mixes = await _mixed(
                served,
                people,
                phases,
                rate=arguments.rate,
                signed_in=arguments.users - arguments.anonymous,
                acts=acts,
            )
    told += ["**The mix, and Redis killed and hung in the middle of it**", mix_table(mixes)]
    goals += mix_goals(mixes)


async def _mixed(
    served: Serving,
    people: People,
    phases: Sequence[Phase],
    *,
    rate: float | None,
    signed_in: int = 0,
    acts: Mapping[str, Act] | None = None,
) -> list[Mixed]:
    """With our own server."""
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        catalogue = await asyncio.to_thread(list_models, asking(client))

        async def counts() -> Counts:
            return await asyncio.to_thread(count, client)

        crowd = crowd_of(served, people, phases, rate=rate, signed_in=signed_in)
        return await mix(served, crowd, catalogue, count=counts, acts=acts)


async def _peers(
    data: Filled,
    people: People,
    arguments: argparse.Namespace,
    told: list[str],
    goals: list[Goal],
) -> None:
    """All at once, as fast as the users can, in turns: those that are not asked rest."""
    phases = [Phase(WARM, WARM_SECONDS), Phase(MEASURED, arguments.phase)]
    budget = {"MODELHARBOR_BUDGET_ANONYMOUS": MOST_BUDGET}
    found: dict[str, list[Mixed]] = {name: [] for name in (OURS, *PEERS)}
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(our_server(data, OURS, budget))
        others = {name: await _node(stack, data, name) for name in PEERS}
        for turn in range(arguments.rounds):
            for name in (OURS, *PEERS):
                print(f"round {turn + 1}: {name}", file=sys.stderr)
                served = ours if name == OURS else others[name]
                await asyncio.to_thread(settle, served)
                if name == OURS:
                    mixes = await _mixed(served, people, phases, rate=None)
                else:
                    mixes = await _mixed_elsewhere(served, ours, people, phases)
                found[name].append(mixes[-1])
    titles = {OURS: "modelharbor"} | PEERS
    compared = [Compared(name, titles[name], tuple(mixes)) for name, mixes in found.items()]
    told += [
        f"**The mix, as fast as {arguments.users} users can, beside others**",
        peers_table(compared),
    ]
    goals += peer_goals(compared, OURS)


async def _node(stack: AsyncExitStack, data: Filled, name: str) -> Serving:
    port = free_port()
    return await stack.enter_async_context(
        run_server(
            data,
            name,
            Path(node()),
            *(str(NODE_FOLDER / f"{name}.js"), str(port)),
            port=port,
            variables={
                "MODELHARBOR_MONGO_URL": data.mongo_url,
                "MODELHARBOR_MONGO_DATABASE": data.settings.mongo_database,
                "MAX_AGE": str(MAX_AGE),
            }
            | PRODUCTION,
        )
    )


async def _mixed_elsewhere(
    served: Serving, ours: Serving, people: People, phases: Sequence[Phase]
) -> list[Mixed]:
    """With a server that has no list of all models to draw from: ours has, and the same cursors."""
    with httpx.Client(base_url=ours.url, timeout=60, trust_env=False) as client:
        catalogue = await asyncio.to_thread(list_models, asking(client))
    return await mix(served, crowd_of(served, people, phases, rate=None), catalogue)


if __name__ == "__main__":
    sys.exit(main())
