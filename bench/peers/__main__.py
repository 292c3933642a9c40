"""`make bench-peers`: our server and its peers on one data set, in turns, and a table of them all."""

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx

from bench.measure import LoadError, graphql_lines, yardstick
from bench.operation import Ask, Operation, WrongAnswer, asking, draw, load_operations
from bench.report import write
from bench.serving import Filled, Serving, free_port, run_server
from modelharbor.dev.demo import SeedRefused
from modelharbor.dev.engines import EngineError
from modelharbor.http.server import environment

from . import mlflow
from .comparison import check_same, leaves
from .data import MODELS, data_set
from .measuring import MANY, Paced, Sample, combined, commands_of, pace, sample, warm
from .report import (
    BEGIN,
    END,
    Cell,
    Column,
    circumstances,
    operation_table,
    paced_text,
    ratio_table,
)
from .servers import MLFLOW, OPERATIONS, OURS, SERVERS, Server, mlflow_store

ROOT: Final = Path(__file__).parent.parent.parent
DOCUMENT: Final = ROOT / "docs" / "performance.md"
FOLDER: Final = ROOT / ".modelharbor" / "bench-peers"
COMPARED: Final = 25  # variables of each operation
PACED_SECONDS: Final = 10
SLOW_SECONDS: Final = 15  # of waiting for answers after a round


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that runs."""

    server: Server
    served: Serving
    client: httpx.Client

    def get(self, path: str) -> Any:
        return self.client.get(path).json()

    @property
    def ask(self) -> Ask:
        return asking(self.client)


@dataclass(slots=True)
class Plan:
    """What is sent to one server for one operation, and what came of it."""

    peer: Peer
    lines: list[str]
    begins: str
    commands: float | None
    many: list[Sample] = field(default_factory=list)
    alone: Sample | None = None
    is_slow: bool = False

    def measure(self, seconds: int) -> None:
        """One more round; it is the last one where its answers take too long to be waited for again."""
        start = time.monotonic()
        self.many.append(sample(self.peer.served, self.lines, MANY, seconds, self.begins))
        self.is_slow = time.monotonic() - start > seconds + SLOW_SECONDS

    def cell(self) -> Cell:
        assert self.alone is not None
        return Cell(combined(self.many), self.alone, self.commands)


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
    names = [server.name for server in SERVERS]
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=OPERATIONS, help="these operations alone")
    parser.add_argument("--servers", nargs="*", choices=names, help="these servers alone")
    parser.add_argument("--seconds", type=int, default=2, help="length of a measurement (2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each line (3)")
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables into docs/{DOCUMENT.name}"
    )
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> None:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    start = time.monotonic()
    chosen = [each for each in SERVERS if not arguments.servers or each.name in arguments.servers]
    async with data_set(FOLDER) as (data, counts), _running(data, chosen) as peers:
        columns, yardsticks, paced = await asyncio.to_thread(_measure_all, data, peers, arguments)
        about = circumstances(
            data,
            cores,
            counts,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            load=load,
            yardsticks=yardsticks,
        )
    told = "\n\n".join(
        [
            about,
            *(operation_table(column, SERVERS) for column in columns),
            "**Server CPU of a request, in proportion; above 1 ours takes less**",
            ratio_table(columns),
            *paced,
        ]
    )
    print(told)
    print(f"It took {(time.monotonic() - start) / 60:.1f} minutes", file=sys.stderr)
    if arguments.write:
        write(DOCUMENT, told, BEGIN, END)


@asynccontextmanager
async def _running(data: Filled, chosen: list[Server]) -> AsyncIterator[list[Peer]]:
    """All servers at once: those that are not asked rest."""
    async with AsyncExitStack() as stack:
        peers = []
        for server in chosen:
            if server.name == MLFLOW:
                await _fill_mlflow(data, server)
            served = await stack.enter_async_context(_start(data, server))
            client = httpx.Client(base_url=served.url, timeout=60, trust_env=False)
            peers.append(Peer(server, served, stack.enter_context(client)))
        yield peers


def _start(data: Filled, server: Server) -> AbstractAsyncContextManager[Serving]:
    port = free_port()
    program, *words = server.command(FOLDER, port)
    return run_server(
        data,
        server.name,
        Path(program),
        *words,
        port=port,
        ready=server.ready,
        variables=environment(data.settings) | server.variables,
    )


async def _fill_mlflow(data: Filled, server: Server) -> None:
    """It makes its own tables when it starts; the rows are put in while it does not run."""
    store = mlflow_store(FOLDER)
    if not store.exists():
        async with _start(data, server):
            pass
    if not mlflow.is_filled(store, MODELS):
        print("Copying the models into MLflow's store", file=sys.stderr)
        settings = data.settings
        await asyncio.to_thread(mlflow.fill, store, data.mongo_url, settings.mongo_database)


def _measure_all(
    data: Filled, peers: list[Peer], arguments: argparse.Namespace
) -> tuple[list[Column], list[float], list[str]]:
    """What was measured, how long the yardstick took meanwhile, and what else is to be told."""
    drawer = next((peer for peer in peers if peer.server.name.startswith(OURS)), None)
    if drawer is None:
        raise WrongAnswer(f"the variables are drawn from our own server: choose {OURS} as well")
    operations = [
        operation
        for operation in load_operations(
            draw(drawer.ask), Path(__file__).parent / "operations", OPERATIONS
        )
        if not arguments.only or operation.name in arguments.only
    ]
    yardsticks = [yardstick()]
    prepared = [(operation, *_prepare(data, peers, operation)) for operation in operations]
    for turn in range(arguments.rounds):
        for operation, plans, _ in prepared:
            for plan in plans:
                if plan.is_slow:
                    continue
                _tell(f"round {turn + 1}", operation, plan)
                if turn == 0 and plan.peer.server.speaks_graphql:
                    warm(plan.peer.served, plan.lines, plan.begins)
                plan.measure(arguments.seconds)
            yardsticks.append(yardstick())
    for operation, plans, _ in prepared:
        for plan in plans:
            _tell("one connection", operation, plan)
            plan.alone = sample(plan.peer.served, plan.lines, 1, arguments.seconds, plan.begins)
    columns = [
        Column(operation, count, {plan.peer.server.name: plan.cell() for plan in plans})
        for operation, plans, count in prepared
    ]
    return columns, yardsticks, _paced(peers, columns)


def _tell(what: str, operation: Operation, plan: Plan) -> None:
    print(f"{what}: {operation.name}, {plan.peer.server.title}", file=sys.stderr)


def _prepare(data: Filled, peers: list[Peer], operation: Operation) -> tuple[list[Plan], int]:
    """What is sent to whom, once all answers are right; and the leaves of one, on average."""
    print(f"Comparing the answers to {operation.name}", file=sys.stderr)
    bodies = operation.bodies()
    some = bodies[:: max(1, len(bodies) // COMPARED)]
    graphql = [peer for peer in peers if peer.server.speaks_graphql]
    counts = []
    for body in some:
        answers = {peer.server.name: peer.ask(body) for peer in graphql}
        for name, answer in answers.items():
            answer.pop("extensions", None)  # what ours tells of its cost
            if answer.get("errors"):
                message = answer["errors"][0]["message"]
                raise WrongAnswer(f"{name} answers {operation.name} with an error: {message}")
        check_same(operation, body["variables"], answers)
        counts.append(leaves(next(iter(answers.values()))))
    plans = [
        Plan(
            peer,
            graphql_lines(bodies),
            "",
            commands_of(peer.served, [partial(peer.ask, body) for body in some]),
        )
        for peer in graphql
    ]
    for peer in peers:
        if peer.server.name == MLFLOW and operation.name in peer.server.operations:
            asked = mlflow.asked(
                operation.name,
                operation.variables,
                peer.get,
                data.mongo_url,
                data.settings.mongo_database,
            )
            for each in asked[:: max(1, len(asked) // COMPARED)]:
                mlflow.check(each, peer.get(each.path))
            plans.append(Plan(peer, [each.line for each in asked], mlflow.BEGINS, None))
    return plans, round(statistics.mean(counts))


def _paced(peers: list[Peer], columns: list[Column]) -> list[str]:
    ours = next((peer for peer in peers if peer.server.name == OURS), None)
    page = next((column for column in columns if column.operation.name == "page"), None)
    if ours is None or page is None:
        return []
    print("Offering pages at a fixed rate", file=sys.stderr)
    paced: Paced = pace(ours.served, page.operation.bodies(), PACED_SECONDS)
    return [paced_text(paced, page.cells[OURS])]


if __name__ == "__main__":
    sys.exit(main())
