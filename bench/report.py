"""The measurements as a table for people."""

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from .measure import WARM_SECONDS, Measured
from .operation import Checked, Operation
from .serving import Serving

BEGIN: Final = "<!-- measured: begin -->"
END: Final = "<!-- measured: end -->"
HEAD: Final = (
    "Operation",
    "Connections",
    "Requests/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "Errors",
    "Server CPU µs/request",
    "MongoDB CPU µs/request",
    "Resident MiB",
    "Database commands",
)


@dataclass(frozen=True, slots=True)
class Result:
    operation: Operation
    checked: Checked
    measured: list[Measured]


def table(results: list[Result]) -> str:
    return grid(HEAD, [_line(result, one) for result in results for one in result.measured])


def grid(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A table in Markdown: the first column to the left, figures to the right."""
    whole = [head, ("---", *("---:" for _ in head[1:])), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in whole)


def _line(result: Result, one: Measured) -> tuple[str, ...]:
    return (
        result.operation.title,
        f"{one.connections:,}",
        f"{one.requests_per_second:,.0f}",
        *(f"{value:,.1f}" for value in (one.p50, one.p95, one.p99)),
        _errors(one),
        micros(one.cpu_micros),
        micros(one.mongo_cpu_micros),
        f"{one.resident_mebibytes:,.0f}",
        _commands(result.checked),
    )


def micros(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _errors(one: Measured) -> str:
    if not one.errors:
        return "0"
    return f"{one.refused} refused, {one.broken} broken, {one.wrong} with GraphQL errors"


def _commands(checked: Checked) -> str:
    if checked.commands == checked.commands_again:
        return str(checked.commands)
    return f"{checked.commands}; {checked.commands_again} from the cache"


def circumstances(
    serving: Serving, models: int, seconds: int, load: float, yardsticks: list[float]
) -> str:
    """On what, when and with what it was measured."""
    ours = serving.mongo_pid is not None
    if serving.server_cores:
        alone = ", ".join(map(str, serving.server_cores))
        cores = f"the server on core {alone}, {'wrk and engines' if ours else 'wrk'} on the rest"
    else:
        cores = "everything on the same cores"
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {models:,} models, one server process, "
        f"{seconds} s for each line after {WARM_SECONDS} s to warm up. "
        f"{processor()}, {len(os.sched_getaffinity(0))} cores ({cores}); "
        f"{'engines of our own' if ours else 'engines elsewhere'}; "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"MongoDB {serving.mongo_version}. Load of the machine before: {load:.1f}. "
        f"Meanwhile Python added up a million numbers in {min(yardsticks):.0f} to {max(yardsticks):.0f} ms of CPU."
    )


def first_answers(results: list[Result]) -> str:
    told = ", ".join(f"{r.operation.name} {r.checked.first_milliseconds:.1f} ms" for r in results)
    return f"Asked for the first time, one at a time, nothing cached (median): {told}."


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(document: Path, text: str, begins: str = BEGIN, ends: str = END) -> None:
    """Put the text between two marks. ValueError where they are not there."""
    whole = document.read_text()
    before, begin, rest = whole.partition(begins)
    _, end, after = rest.partition(ends)
    if not (begin and end):
        raise ValueError(f"{document} has no place for the table: {begins} … {ends}")
    document.write_text(f"{before}{begins}\n\n{text}\n\n{ends}{after}")
