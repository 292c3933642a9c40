"""Tables of what was measured side by side."""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from bench.operation import Operation
from bench.report import grid, micros, processor
from bench.serving import Filled

from .data import Counts
from .measuring import MANY, PACE, Paced, Sample
from .servers import HANDWRITTEN, MLFLOW, NODE, OURS, UNCOALESCED, UNCOMPILED, Server

BEGIN: Final = "<!-- peers: begin -->"
END: Final = "<!-- peers: end -->"
HEAD: Final = (
    "Server",
    "Requests/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "Errors",
    "Server CPU µs/request",
    "MongoDB CPU µs/request",
    "Resident MiB",
    "MongoDB commands; one at a time",
    "One at a time: p50 ms",
    "p95 ms",
    "p99 ms",
)
RATIOS: Final = (
    "Operation",
    "Handwritten ÷ ours, without coalescing",
    "Handwritten ÷ ours",
    "Handwritten ÷ ours, without compiled plans",
    "Best of Node ÷ ours",
    "Requests/s: ours ÷ best of Node",
    "MLflow ÷ ours",
    "Requests/s: ours ÷ MLflow",
)
NONE: Final = "-"


@dataclass(frozen=True, slots=True)
class Cell:
    """One server with one operation: over MANY connections, and over one."""

    many: Sample
    alone: Sample
    commands: float | None
    """To MongoDB, each request on average; None for a server with another store."""


@dataclass(frozen=True, slots=True)
class Column:
    """One operation with all servers, by name."""

    operation: Operation
    leaves: int
    """Of an answer, on average."""
    cells: Mapping[str, Cell]


def operation_table(column: Column, servers: Iterable[Server]) -> str:
    lines = [
        _line(server.title, column.cells[server.name])
        for server in servers
        if server.name in column.cells
    ]
    return f"**{column.operation.title}** ({column.leaves:,} leaves)\n\n{grid(HEAD, lines)}"


def _line(title: str, cell: Cell) -> tuple[str, ...]:
    many, alone = cell.many, cell.alone
    return (
        title,
        f"{many.requests_per_second:,.0f}",
        *(f"{value:,.1f}" for value in (many.p50, many.p95, many.p99)),
        f"{many.errors + alone.errors:,}",
        micros(many.cpu_micros),
        micros(many.mongo_cpu_micros) if cell.commands is not None else NONE,
        f"{many.resident_mebibytes:,.0f}",
        _commands(cell),
        *(f"{value:,.1f}" for value in (alone.p50, alone.p95, alone.p99)),
    )


def _commands(cell: Cell) -> str:
    """Of a request amid many, and of one alone."""
    if cell.commands is None:
        return NONE
    many, alone = (
        f"{value:.1f}".removesuffix(".0") for value in (cell.many.commands, cell.commands)
    )
    return f"{many}; {alone}"


def ratio_table(columns: Iterable[Column]) -> str:
    return grid(RATIOS, [_ratios(column) for column in columns])


def _ratios(column: Column) -> tuple[str, ...]:
    def cpu(*names: str) -> float | None:
        """The least of these servers, in µs a request."""
        found = [column.cells[name].many.cpu_micros for name in names if name in column.cells]
        return min((value for value in found if value is not None), default=None)

    def rate(*names: str) -> float | None:
        """The most of these servers, in requests a second."""
        found = [column.cells[name].many for name in names if name in column.cells]
        return max((each.requests_per_second for each in found), default=None)

    return (
        column.operation.name,
        ratio(cpu(HANDWRITTEN), cpu(UNCOALESCED)),
        ratio(cpu(HANDWRITTEN), cpu(OURS)),
        ratio(cpu(HANDWRITTEN), cpu(UNCOMPILED)),
        ratio(cpu(*NODE), cpu(OURS)),
        ratio(rate(OURS), rate(*NODE)),
        ratio(cpu(MLFLOW), cpu(OURS)),
        ratio(rate(OURS), rate(MLFLOW)),
    )


def ratio(one: float | None, other: float | None) -> str:
    """Two digits behind the point; NONE where one of them was not measured."""
    return f"{one / other:,.2f}" if one is not None and other else NONE


def paced_text(paced: Paced, page: Cell | None) -> str:
    offered = (
        f"`page` offered to modelharbor {PACE} times a second over {MANY} connections: "
        f"{paced.requests_per_second:,.0f} answers a second, p50 {paced.p50:,.1f} ms, "
        f"p95 {paced.p95:,.1f} ms, p99 {paced.p99:,.1f} ms, {paced.errors:,} errors."
    )
    if page is None or not page.alone.p50:
        return offered
    return (
        f"{offered} One at a time, its p99 is {page.alone.p99 / page.alone.p50:.1f} times its p50."
    )


def circumstances(
    data: Filled,
    cores: int,
    counts: Counts,
    *,
    seconds: int,
    rounds: int,
    load: float,
    yardsticks: list[float],
) -> str:
    """On what, when and with what it was measured. `cores`: of the machine, as far as we may have them."""
    if data.server_cores:
        one = ", ".join(map(str, data.server_cores))
        rest = "wrk and mongod" if data.mongo_pid is not None else "wrk"
        shared = f"all servers on core {one}, one of them at work at a time; {rest} on the rest"
    else:
        shared = "everything on the same cores"
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {counts.models:,} models, "
        f"{counts.versions:,} versions, {counts.files:,} files, a series of {counts.points:,} "
        f"points; {rounds} rounds of {seconds} s over {MANY} connections and one of {seconds} s "
        f"over one, for each line. "
        f"{processor()}, {cores} cores ({shared}); "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"MongoDB {data.mongo_version}. Load of the machine before: {load:.1f}. "
        f"Meanwhile Python added up a million numbers in {min(yardsticks):.0f} to "
        f"{max(yardsticks):.0f} ms of CPU."
    )
