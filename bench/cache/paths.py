"""The ways by which an answer can come, side by side: what each costs the server at 200 connections."""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx

from bench.measure import LoadError, graphql_lines, yardstick
from bench.operation import Ask, Body, Operation, asking, draw, load_operations
from bench.peers.measuring import MANY, Sample, combined, sample, warm
from bench.serving import Serving

from .counting import L1, L2, count

HITTING: Final = ("model", "page")  # asked for by every way
COMPUTED: Final = ("model", "page", "filtered", "facets", "search")
SAMPLED: Final = 25  # answers of which the fixed one is the middle one by length
FRESH: Final = 10_000  # filters that were never asked for, more than one measurement can ask for
KEPT: Final = range(10**9, 10**9 + 400)  # of those that are asked for again and again
FILLS: Final = 5  # at most
TRIES: Final = 3
SURE: Final = 0.95  # of the requests that came from where they were to come from


class Way(Enum):
    FIXED_UNREAD = "Starlette, fixed bytes, by POST, its body unread"
    FIXED_POST = "Starlette, fixed bytes, by POST"
    FIXED_GET = "Starlette, fixed bytes, by GET"
    L1_TEXT = "L1, the text by POST"
    L1_HASH = "L1, its hash by POST (APQ)"
    L1_GET = "L1, its hash by GET (APQ)"
    L2_TEXT = "L2, the text by POST"
    COMPUTED = "computed"


@dataclass(frozen=True, slots=True)
class Servers:
    """All at once; those that are not asked rest."""

    fixed: Serving
    l1: Serving
    l2: Serving
    """Keeps nothing in its own process."""
    computed: Serving
    """Keeps no answers at all."""


@dataclass(slots=True)
class Line:
    """One way for one operation, and what was measured of it."""

    operation: Operation
    way: Way
    served: Serving
    lines: Callable[[], list[str]]
    """As the script of wrk reads them; others each time where they must be new."""
    layer: str | None = None
    """From which the answers must come."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def combined(self) -> Sample:
        return combined(self.samples)


def hash_of(document: str) -> str:
    return sha256(document.encode()).hexdigest()


def extensions_of(operation: Operation) -> Body:
    return {"persistedQuery": {"version": 1, "sha256Hash": hash_of(operation.document)}}


def hash_bodies(operation: Operation) -> list[Body]:
    """The hash instead of the text."""
    return [
        {
            "operationName": operation.operation_name,
            "variables": variables,
            "extensions": extensions_of(operation),
        }
        for variables in operation.variables
    ]


def get_lines(operation: Operation) -> list[str]:
    """As the script of wrk reads them."""

    def text(value: Any) -> str:
        return quote(json.dumps(value, separators=(",", ":")), safe="")

    return [
        f"GET /graphql?operationName={operation.operation_name}"
        f"&variables={text(variables)}&extensions={text(extensions_of(operation))}\n"
        for variables in operation.variables
    ]


def fresh_facets(operation: Operation, given_numbers: Iterable[int]) -> list[Body]:
    """Filters that find the same models, each with a value more that no model has: counts of facets are
    kept for half a minute by themselves, and here they are to be computed."""
    bodies = []
    for number in given_numbers:
        (name, value), *_ = operation.variables[number % len(operation.variables)]["filter"].items()
        given = {name: {"in": [value["eq"], f"none-{number}"]}}
        bodies.append(
            {
                "query": operation.document,
                "operationName": operation.operation_name,
                "variables": {"filter": given},
            }
        )
    return bodies


def register(ask: Ask, operation: Operation) -> None:
    """The text with its hash, once."""
    body = operation.bodies()[0] | {"extensions": extensions_of(operation)}
    operation.check(ask(body))
    again = ask(hash_bodies(operation)[0])
    operation.check(again)


def write_fixed(folder: Path, operations: Iterable[Operation], ask: Ask) -> None:
    """An answer of each, that of middle length, for the server of fixed bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for operation in operations:
        answers = []
        bodies = operation.bodies()
        for body in bodies[:: max(1, len(bodies) // SAMPLED)]:
            answer = ask(body)
            operation.check(answer)
            answer.pop("extensions", None)
            answers.append(json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode())
        middle = sorted(answers, key=len)[len(answers) // 2]
        (folder / f"{operation.name}.json").write_bytes(middle)


def draw_operations(client: httpx.Client, only: Sequence[str] | None) -> list[Operation]:
    return [
        operation
        for operation in load_operations(draw(asking(client)))
        if only is None or operation.name in only
    ]


def lines_of(servers: Servers, operation: Operation) -> list[Line]:
    """Everything that is measured of one operation."""
    text = graphql_lines(operation.bodies())
    found: list[Line] = []

    def line(way: Way, served: Serving, lines: list[str], layer: str | None = None) -> Line:
        return Line(operation, way, served, lambda: lines, layer)

    if operation.name in HITTING:
        path = f"/{operation.name}"
        fixed = [each.replace("/graphql", path, 1) for each in text]
        unread = [each.replace("/graphql", f"{path}/unread", 1) for each in text]
        gets = get_lines(operation)
        hashes = graphql_lines(hash_bodies(operation))
        fixed_gets = [each.replace("/graphql", path, 1) for each in gets]
        found += [
            line(Way.FIXED_UNREAD, servers.fixed, unread),
            line(Way.FIXED_POST, servers.fixed, fixed),
            line(Way.FIXED_GET, servers.fixed, fixed_gets),
            line(Way.L1_TEXT, servers.l1, text, L1),
            line(Way.L1_HASH, servers.l1, hashes, L1),
            line(Way.L1_GET, servers.l1, gets, L1),
        ]
    if operation.name == "facets":
        # More than there are connections: of equal ones that are asked for at once, one goes to Redis.
        kept = graphql_lines(fresh_facets(operation, KEPT))
        found.append(line(Way.L2_TEXT, servers.l2, kept, L2))
        unused = numbers()

        def fresh() -> list[str]:
            return graphql_lines(fresh_facets(operation, islice(unused, FRESH)))

        found.append(Line(operation, Way.COMPUTED, servers.computed, fresh))
    else:
        found.append(line(Way.L2_TEXT, servers.l2, text, L2))
        found.append(line(Way.COMPUTED, servers.computed, text))
    return found


def measure_paths(
    servers: Servers, operations: Sequence[Operation], seconds: int, rounds: int
) -> tuple[list[Line], list[float]]:
    """In turns, `rounds` times; with what the yardstick took meanwhile. LoadError where an answer came
    from elsewhere, or was limited."""
    lines = [line for operation in operations for line in lines_of(servers, operation)]
    with (
        httpx.Client(base_url=servers.l1.url, timeout=60, trust_env=False) as l1,
        httpx.Client(base_url=servers.l2.url, timeout=60, trust_env=False) as l2,
    ):
        clients = {servers.l1.url: l1, servers.l2.url: l2}
        for operation in operations:
            if operation.name in HITTING:
                register(asking(l1), operation)
        yardsticks = [yardstick()]
        for turn in range(rounds):
            for line in lines:
                print(f"round {turn + 1}: {line.operation.name}, {line.way.value}", file=sys.stderr)
                _measure(line, clients.get(line.served.url), seconds, is_first=turn == 0)
            yardsticks.append(yardstick())
    return lines, yardsticks


def _measure(line: Line, client: httpx.Client | None, seconds: int, *, is_first: bool) -> None:
    if client is None or line.layer is None:
        if is_first:
            warm(line.served, line.lines())
        line.samples.append(_sample(line, seconds))
        return
    for _ in range(TRIES):
        _fill(line, client)  # each round anew: what is kept grows old
        before = count(client)
        found = _sample(line, seconds)
        share = count(client).since(before).share(line.layer)
        if share >= SURE:
            line.samples.append(found)
            return
    raise LoadError(
        f"{line.operation.name}, {line.way.value}: only {share:.0%} came from {line.layer}"
    )


def _sample(line: Line, seconds: int) -> Sample:
    found = sample(line.served, line.lines(), MANY, seconds)
    if found.errors:
        raise LoadError(f"{line.operation.name}, {line.way.value}: {found.errors} errors")
    return found


def _fill(line: Line, client: httpx.Client) -> None:
    """Until the layer has what it is asked for, as far as it is to be had."""
    assert line.layer is not None
    for _ in range(FILLS):
        before = count(client)
        warm(line.served, line.lines())
        if count(client).since(before).share(line.layer) >= SURE:
            return


def cpu_of(lines: Sequence[Line], operation: str, way: Way) -> float | None:
    """Microseconds a request, the median of the rounds."""
    for line in lines:
        if line.operation.name == operation and line.way is way and line.samples:
            return line.combined.cpu_micros
    return None


def difference(lines: Sequence[Line], operation: str, one: Way, other: Way) -> float | None:
    """How many microseconds `one` takes more than `other`: the median over the rounds, each of which
    had both."""
    samples = {
        line.way: [each.cpu_micros for each in line.samples]
        for line in lines
        if line.operation.name == operation and line.way in (one, other)
    }
    pairs = zip(samples.get(one, ()), samples.get(other, ()), strict=False)
    found = [a - b for a, b in pairs if a is not None and b is not None]
    return statistics.median(found) if found else None
