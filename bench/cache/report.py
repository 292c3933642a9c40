"""Tables of what was measured, and the goals beside it."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from bench.live.report import Goal
from bench.peers.measuring import MANY
from bench.peers.report import ratio
from bench.report import grid, micros, processor
from bench.serving import Filled

from .mixing import Mixed
from .paths import HITTING, Line, Way, cpu_of, difference

BEGIN: Final = "<!-- cache: begin -->"
END: Final = "<!-- cache: end -->"
PATHS: Final = (
    "Operation",
    "Way",
    "Requests/s",
    "p50 ms",
    "p99 ms",
    "Server CPU µs/request",
    "By Starlette's",
    "By computed",
)
MIXES: Final = (
    "Phase",
    "Requests/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "Reads: p50",
    "p95",
    "p99",
    "Writes: p50",
    "p95",
    "p99",
    "Hit ratio",
    "Joined",
    "Errors",
    "Stale",
    "Server CPU µs/request",
    "Users' core",
    "MongoDB's core",
)
PEERS: Final = (
    "Server",
    "Requests/s",
    "Right answers/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "Hit ratio",
    "Errors",
    "Stale answers",
    "Server CPU µs/request",
    "MongoDB's core",
)
OF_FIXED: Final = {
    Way.L1_TEXT: Way.FIXED_POST,
    Way.L1_HASH: Way.FIXED_POST,
    Way.L1_GET: Way.FIXED_GET,
    Way.L2_TEXT: Way.FIXED_POST,
}
MOST_L1: Final = 1.5  # times Starlette
MOST_L2: Final = 0.15  # of computed
COMPARED_L2: Final = ("page", "facets")
MOST_HASH: Final = 10.0  # microseconds
LEAST_HITS: Final = 0.8
MOST_P95: Final = 50.0  # milliseconds
MOST_P99: Final = 3.0  # times that before
LEAST_PEERS: Final = 2.0  # times the requests a second of each


@dataclass(frozen=True, slots=True)
class Compared:
    """One server with the mix, as fast as the users can; one entry of `rounds` each round."""

    name: str
    title: str
    rounds: tuple[Mixed, ...]

    @property
    def combined(self) -> Mixed:
        """The median round by requests a second; of errors and stale answers the sum."""
        middle = sorted(self.rounds, key=lambda each: each.per_second)[len(self.rounds) // 2]
        return replace(
            middle,
            errors=sum(each.errors for each in self.rounds),
            stale=sum(each.stale for each in self.rounds),
        )

    @property
    def per_second(self) -> float:
        return statistics.median(each.per_second for each in self.rounds)

    @property
    def right_per_second(self) -> float:
        return statistics.median(each.right_per_second for each in self.rounds)


def paths_table(lines: Sequence[Line]) -> str:
    return grid(PATHS, [_path(lines, line) for line in lines])


def _path(lines: Sequence[Line], line: Line) -> tuple[str, ...]:
    name, way, one = line.operation.name, line.way, line.combined
    fixed = cpu_of(lines, name, OF_FIXED[way]) if way in OF_FIXED else None
    is_ours = way not in (Way.FIXED_GET, Way.FIXED_POST, Way.FIXED_UNREAD)
    computed = cpu_of(lines, name, Way.COMPUTED) if is_ours and way is not Way.COMPUTED else None
    return (
        name,
        way.value,
        f"{one.requests_per_second:,.0f}",
        f"{one.p50:,.1f}",
        f"{one.p99:,.1f}",
        micros(one.cpu_micros),
        ratio(one.cpu_micros, fixed),
        ratio(one.cpu_micros, computed),
    )


def mix_table(mixes: Sequence[Mixed]) -> str:
    return grid(MIXES, [_mix(each) for each in mixes])


def _mix(one: Mixed) -> tuple[str, ...]:
    return (
        one.name,
        f"{one.per_second:,.0f}",
        *(f"{value:,.1f}" for value in (one.all.p50, one.all.p95, one.all.p99)),
        *(f"{value:,.1f}" for value in (one.reads.p50, one.reads.p95, one.reads.p99)),
        *(f"{value:,.1f}" for value in (one.writes.p50, one.writes.p95, one.writes.p99)),
        _share(one.hit_ratio),
        _share(one.joined_ratio),
        f"{one.errors:,}",
        f"{one.stale:,}",
        micros(one.cpu_micros),
        f"{one.users_share:.0%}",
        "-" if one.mongo_share is None else f"{one.mongo_share:.0%}",
    )


def peers_table(compared: Sequence[Compared]) -> str:
    return grid(PEERS, [_peer(each) for each in compared])


def _peer(server: Compared) -> tuple[str, ...]:
    one = server.combined
    return (
        server.title,
        f"{server.per_second:,.0f}",
        f"{server.right_per_second:,.0f}",
        *(f"{value:,.1f}" for value in (one.all.p50, one.all.p95, one.all.p99)),
        _share(one.hit_ratio),
        f"{one.errors:,}",
        f"{one.stale:,}",
        micros(one.cpu_micros),
        "-" if one.mongo_share is None else f"{one.mongo_share:.0%}",
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def path_goals(lines: Sequence[Line]) -> list[Goal]:
    found = []
    for name in HITTING:
        for way in (Way.L1_TEXT, Way.L1_HASH, Way.L1_GET):
            cpu, fixed = cpu_of(lines, name, way), cpu_of(lines, name, OF_FIXED[way])
            if cpu is not None and fixed:
                told = f"{name}, {way.value}: {cpu / fixed:.2f} of {MOST_L1} times Starlette"
                found.append(Goal(told, cpu / fixed <= MOST_L1))
        more = difference(lines, name, Way.L1_HASH, Way.L1_TEXT)
        if more is not None:
            told = f"{name}: {more:+.1f} of {MOST_HASH:.0f} µs for a hash instead of the text"
            found.append(Goal(told, more <= MOST_HASH))
    for name in COMPARED_L2:
        cpu, computed = cpu_of(lines, name, Way.L2_TEXT), cpu_of(lines, name, Way.COMPUTED)
        if cpu is not None and computed:
            told = f"{name}, L2: {cpu / computed:.2f} of {MOST_L2} times computed"
            found.append(Goal(told, cpu / computed <= MOST_L2))
    return found


def mix_goals(mixes: Sequence[Mixed]) -> list[Goal]:
    """Of the first one, in which nothing happens; of all; and of the others by the first."""
    before = mixes[0]
    errors, stale = sum(each.errors for each in mixes), sum(each.stale for each in mixes)
    hits = before.hit_ratio
    found = [
        Goal(f"{before.all.p95:.1f} of {MOST_P95:.0f} ms at p95", before.all.p95 <= MOST_P95),
        Goal(f"{errors:,} of 0 errors", errors == 0),
        Goal(f"{stale:,} of 0 stale answers", stale == 0),
    ]
    if hits is not None:
        found.insert(0, Goal(f"hit ratio {hits:.2f} of {LEAST_HITS} at least", hits >= LEAST_HITS))
    for each in mixes[1:]:
        times = each.all.p99 / before.all.p99 if before.all.p99 else 0.0
        told = f"{each.name}: p99 {times:.1f} of {MOST_P99:.0f} times that before"
        found.append(Goal(told, times <= MOST_P99))
    return found


def peer_goals(compared: Sequence[Compared], ours: str) -> list[Goal]:
    own = next((each for each in compared if each.name == ours), None)
    if own is None:
        return []
    found = []
    for each in compared:
        if each.name == ours:
            continue
        for what, times in (
            ("requests", own.per_second / each.per_second),
            ("right answers", own.right_per_second / max(each.right_per_second, 1.0)),
        ):
            told = f"{times:.2f} of {LEAST_PEERS} times the {what} a second of {each.title}"
            found.append(Goal(told, times >= LEAST_PEERS))
    stale = own.combined.stale
    found.append(Goal(f"{stale:,} of 0 stale answers of ours", stale == 0))
    return found


def circumstances(
    data: Filled,
    cores: int,
    models: int,
    *,
    seconds: int,
    rounds: int,
    users: int,
    rate: float,
    load: float,
    yardsticks: Sequence[float],
) -> str:
    """`cores`: of the machine, as far as we may have them."""
    if data.server_cores:
        one = ", ".join(map(str, data.server_cores))
        rest = "wrk, users and engines" if data.mongo_pid is not None else "wrk and users"
        shared = f"all servers on core {one}, one of them at work at a time; {rest} on the rest"
    else:
        shared = "everything on the same cores"
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {models:,} models, of which everybody sees most; "
        f"{rounds} rounds of {seconds} s over {MANY} connections for each way; {users} users, who begin "
        f"{rate:,.0f} things a second. "
        f"{processor()}, {cores} cores ({shared}); "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"MongoDB {data.mongo_version}. Load of the machine before: {load:.1f}. "
        f"Meanwhile Python added up a million numbers in {min(yardsticks):.0f} to "
        f"{max(yardsticks):.0f} ms of CPU (median {statistics.median(yardsticks):.0f})."
    )


def cores_here() -> int:
    return len(os.sched_getaffinity(0))
