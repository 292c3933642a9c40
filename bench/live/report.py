"""Tables of what was measured."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from bench.report import grid, processor
from bench.serving import Filled

from .measuring import CHANGES, Measured

BEGIN: Final = "<!-- live: begin -->"
END: Final = "<!-- live: end -->"
HEAD: Final = (
    "Server",
    "Subscribers",
    "KB/connection",
    "p50 ms",
    "p99 ms",
    "Longest ms",
    "With the write: p50 ms",
    "p99 ms",
    "Events delivered",
    "States missed",
    "Repeated",
    "Backwards",
    "Server CPU µs/event",
    "Server CPU s to reconnect 1,000",
    "States missed while away",
    "s to connect all",
    "Server CPU at rest",
)
OURS: Final = "modelharbor"
PLAIN: Final = "Strawberry, a Redis subscription each"
RATIOS: Final = (
    "Subscribers",
    "Memory of a connection: plain ÷ ours",
    "p99: plain ÷ ours",
    "CPU of an event: plain ÷ ours",
    "CPU to reconnect: plain ÷ ours",
)


@dataclass(frozen=True, slots=True)
class Goal:
    told: str
    is_met: bool


def goals(ours: Sequence[Measured]) -> list[Goal]:
    """Each figure beside what was promised."""
    found = []
    for each in ours:
        count = f"{each.subscribers:,} subscribers"
        most = 30.0 if each.subscribers <= 1000 else 1000.0
        lost = each.missed + each.repeated + each.backwards + each.missed_away
        back = each.back_cpu_of_thousand
        found += [
            Goal(f"{count}: {each.kilobytes:.1f} of 30 KB a connection", each.kilobytes <= 30),
            Goal(f"{count}: p99 {each.p99:.1f} of {most:,.0f} ms", each.p99 <= most),
            Goal(f"{count}: {lost} of 0 events dropped, repeated or told backwards", lost == 0),
            Goal(f"{count}: {back:.2f} of 1 s of CPU to reconnect 1,000", back <= 1),
        ]
    return found


def goals_text(found: Sequence[Goal]) -> str:
    return "\n".join(f"- {each.told}: {'met' if each.is_met else 'missed'}" for each in found)


def table(lines: Sequence[tuple[str, Measured]]) -> str:
    return grid(HEAD, [_line(name, each) for name, each in lines])


def _line(name: str, one: Measured) -> tuple[str, ...]:
    return (
        name,
        f"{one.subscribers:,}",
        f"{one.kilobytes:,.1f}",
        *(f"{value:,.1f}" for value in (one.p50, one.p99, one.longest, one.sent_p50, one.sent_p99)),
        *(f"{value:,}" for value in (one.delivered, one.missed, one.repeated, one.backwards)),
        f"{one.cpu_micros:,.1f}",
        f"{one.back_cpu_of_thousand:.2f}",
        f"{one.missed_away:,}",
        f"{one.connect_seconds:.1f}",
        f"{one.idle_share:.0%}",
    )


def ratios(ours: Sequence[Measured], plain: Sequence[Measured]) -> str:
    by_count = {each.subscribers: each for each in plain}
    lines: list[tuple[str, ...]] = [
        (
            f"{each.subscribers:,}",
            f"{other.kilobytes / each.kilobytes:.1f}",
            f"{other.p99 / each.p99:.1f}",
            f"{other.cpu_micros / each.cpu_micros:.1f}",
            f"{other.back_cpu_of_thousand / each.back_cpu_of_thousand:.1f}",
        )
        for each in ours
        if (other := by_count.get(each.subscribers)) is not None
    ]
    return grid(RATIOS, lines)


def circumstances(
    data: Filled, seconds: int, pace: float, load: float, yardsticks: Sequence[float]
) -> str:
    cores = len(os.sched_getaffinity(0)) + len(data.server_cores)
    alone = ", ".join(map(str, data.server_cores))
    where = (
        f"the server on core {alone}, subscribers, the writer and engines on the rest"
        if alone
        else "everything on the same cores"
    )
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: one job, one server process; "
        f"{pace:g} changes a second: progress for {seconds} s, then {CHANGES} changes of state. "
        f"{processor()}, {cores} cores ({where}); "
        f"{'engines of our own' if data.mongo_pid else 'engines elsewhere'}; "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"MongoDB {data.mongo_version}. Load of the machine before: {load:.1f}. "
        f"Meanwhile Python added up a million numbers in {min(yardsticks):.0f} to {max(yardsticks):.0f} ms of CPU."
    )
