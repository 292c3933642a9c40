"""Whether what readers were told fits what was written, and when: a judge of recorded histories.

A *register* is one thing with one value at a time: the summary of a model, whether someone likes it,
the version that an alias means. A history holds writes of registers and reads of them, with the times
at which each began and ended, all by one clock.

What a reader may be told at a read:

1. Nothing older than what was acknowledged before the read began, to whomever and by whichever
   process. A write whose outcome nobody knows may be seen or not; one that was refused may not.
2. Of direct writes to the database the same, GRACE_SECONDS after they returned.
3. Nothing that was never written, and nothing before its writing began.
4. Nothing that only others may see.

A write W *may be current* at a read R unless it began after R ended, or there is a write V of the same
register that began after W was in the database for certain and was to be seen before R began. W is in
the database for certain when it was acknowledged, or found there, or when some read that has ended saw
it. The writes
that may be current give the values that may be seen. Writes that overlapped in time may have come in
either order, but not in both: who saw one of them after both were to be seen says which was the last.

What follows from several registers (whether a viewer finds a model, how many models a list has) is
judged by all the combinations of values that may be seen, as if the registers were read one by one:
what passes may still be wrong, what is convicted is wrong.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate, product
from typing import Any, Final, TypeAlias

Register: TypeAlias = tuple[str, ...]
"""What it is of what, such as ("summary", "m1")."""
Value: TypeAlias = Hashable
GRACE_SECONDS: Final = 2.0
NEVER: Final = math.inf
ALWAYS: Final = -math.inf
MOST_COMBINATIONS: Final = 4096


@dataclass(eq=False, slots=True)
class Write:
    values: Mapping[Register, Value]
    begin: float
    end: float = NEVER
    """When it was acknowledged; NEVER: nobody knows what came of it."""
    is_direct: bool = False
    """To the database itself, past the API."""
    is_refused: bool = False
    """It was told that nothing was written."""
    there_by: float = NEVER
    """When it was found in the database, where it never was acknowledged."""
    by: str = ""

    @property
    def due(self) -> float:
        """From then on nothing older may be seen."""
        return self.end + GRACE_SECONDS if self.is_direct else self.end


@dataclass(frozen=True, slots=True)
class Derived:
    """A value that follows from those of some registers."""

    registers: tuple[Register, ...]
    follows: Callable[..., Value]


@dataclass(frozen=True, slots=True)
class Fact:
    """What a reader was told that follows from registers."""

    name: str
    of: Derived
    value: Value
    right: Derived | None = None
    """Whether one may be told that it is so."""


@dataclass(frozen=True, slots=True)
class Members:
    """What a list was said to have, of all that it might have."""

    name: str
    of: Mapping[str, Derived]
    """Whether it has it."""
    rights: Mapping[str, Derived]
    """Whether one may be told that it is there."""
    value: frozenset[str]


@dataclass(frozen=True, slots=True)
class Count:
    """How many of these were said to hold."""

    name: str
    of: tuple[Derived, ...]
    value: int


@dataclass(eq=False, slots=True)
class Read:
    begin: float
    end: float
    seen: Mapping[Register, Value] = field(default_factory=dict)
    facts: Sequence[Fact] = ()
    members: Sequence[Members] = ()
    counts: Sequence[Count] = ()
    by: str = ""


class Kind(Enum):
    STALE = "an older value, after a later one was acknowledged"
    OUTSIDE = "an older value, too long after the database had a later one"
    INVENTED = "a value that was never written"
    EARLY = "a value before its writing began"
    REFUSED = "a value whose writing was refused"
    SPLIT = "two values, each as the last of both"
    HIDDEN = "what others alone may see"
    IMPOSSIBLE = "what follows from no values that may be current"


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: Kind
    what: str
    told: Any
    allowed: Any
    read: Read
    late: float = 0.0
    """Seconds between the write that should have been seen, and the read."""

    def __str__(self) -> str:
        at = f"{self.read.begin:.4f}..{self.read.end:.4f}"
        return f"{self.kind.name} {self.what}: told {self.told!r}, may be {self.allowed!r}, {self.late * 1000:.0f} ms late, read {at} {self.read.by}"


@dataclass
class Judged:
    """What came of a history."""

    verdicts: list[Verdict] = field(default_factory=list)
    reads: int = 0
    writes: int = 0
    unknown: int = 0
    """Writes whose outcome nobody knows."""
    judged: int = 0
    """Values, facts and counts."""
    went_back: int = 0
    """Values older than what another read had seen: allowed while the later one is not acknowledged."""
    direct_lag: float = 0.0
    """Seconds after a direct write had returned at which an older value was seen last."""

    @property
    def kinds(self) -> "Counter[Kind]":
        return Counter(verdict.kind for verdict in self.verdicts)


class _History:
    """The writes of one register."""

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.refused: set[Value] = set()
        self.first_seen: dict[Value, float] = {}
        """When the first read that saw a value had ended."""

    def prepare(self, register: Register) -> None:
        values = Counter(write.values[register] for write in self.writes)
        self.values = {id(write): write.values[register] for write in self.writes}
        self.by_value: dict[Value, Write] = {
            write.values[register]: write
            for write in self.writes
            if values[write.values[register]] == 1
        }
        self.settled = {
            id(write): min(
                write.end,
                write.there_by,
                self.first_seen.get(self.values[id(write)], NEVER)
                if values[self.values[id(write)]] == 1
                else NEVER,
            )
            for write in self.writes
        }
        self.by_settled = sorted(self.writes, key=self.settle)
        self._settled = [self.settle(write) for write in self.by_settled]
        self._due = _Latest((write.due, write.begin) for write in self.writes)
        self._direct = _Latest((write.end, write.begin) for write in self.writes if write.is_direct)
        self._known = _Latest(
            (min(write.end, self.settle(write)), write.begin) for write in self.writes
        )

    def settle(self, write: Write) -> float:
        return self.settled[id(write)]

    def current(self, begin: float, end: float) -> list[Write]:
        """What may be current at a read."""
        latest = self._due.at(begin)
        later = self.by_settled[bisect_right(self._settled, latest) :]
        return [write for write in later if write.begin < end]

    def possible(self, begin: float, end: float) -> set[Value]:
        return {self.values[id(write)] for write in self.current(begin, end)}

    def overwritten(self, write: Write, begin: float) -> tuple[Write, float] | None:
        """The first write that should have been seen instead, and how long before `begin` it ended."""
        after = [
            other
            for other in self.writes
            if other.begin >= self.settle(write) and other.due <= begin
        ]
        first = min(after, key=lambda other: other.end, default=None)
        return (first, begin - first.end) if first is not None else None

    def went_back(self, write: Write, begin: float) -> bool:
        return self._known.at(begin) >= self.settle(write)

    def direct_lag(self, write: Write, begin: float) -> float:
        if self._direct.at(begin) < self.settle(write):
            return 0.0
        return max(
            begin - other.end
            for other in self.writes
            if other.is_direct and other.begin >= self.settle(write) and other.end <= begin
        )


class _Latest:
    """Of pairs (time, value): the highest value up to a time."""

    def __init__(self, pairs: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(pairs)
        self.times = [time for time, _ in ordered]
        self.values = list(accumulate((value for _, value in ordered), max))

    def at(self, time: float) -> float:
        found = bisect_right(self.times, time)
        return self.values[found - 1] if found else ALWAYS


def judge(
    initial: Mapping[Register, Value], writes: Sequence[Write], reads: Sequence[Read]
) -> Judged:
    """`initial`: what registers had before everything."""
    histories: dict[Register, _History] = defaultdict(_History)
    for register, value in initial.items():
        # It began before it was there, as all writes do.
        first = Write({register: value}, ALWAYS, -1e18, by="the beginning")
        histories[register].writes.append(first)
    for write in writes:
        for register in write.values:
            if write.is_refused:
                histories[register].refused.add(write.values[register])
            else:
                histories[register].writes.append(write)
    for read in reads:
        for register, value in read.seen.items():
            first_seen = histories[register].first_seen
            first_seen[value] = min(first_seen.get(value, NEVER), read.end)
    for register, history in histories.items():
        history.prepare(register)
    unknown = sum(write.end == NEVER and not write.is_refused for write in writes)
    judged = Judged(reads=len(reads), writes=len(writes), unknown=unknown)
    for read in reads:
        _judge_read(histories, read, judged)
    for register, history in histories.items():
        _judge_order(register, history, reads, judged)
    return judged


def _judge_read(histories: Mapping[Register, _History], read: Read, judged: Judged) -> None:
    possible: dict[Register, set[Value]] = {}

    def values(register: Register) -> set[Value]:
        if register not in possible:
            possible[register] = histories[register].possible(read.begin, read.end)
        return possible[register]

    for register, value in read.seen.items():
        judged.judged += 1
        history = histories[register]
        write = history.by_value.get(value)
        if value in values(register):
            if write is not None:
                judged.went_back += history.went_back(write, read.begin)
                lag = history.direct_lag(write, read.begin)
                judged.direct_lag = max(judged.direct_lag, lag)
            continue
        what = ".".join(register)
        kind, late = _kind(history, value, read)
        judged.verdicts.append(Verdict(kind, what, value, values(register), read, late))
        if kind is Kind.OUTSIDE:
            judged.direct_lag = max(judged.direct_lag, late)

    def check(name: str, allowed: set[Value], value: Value, right: Derived | None) -> None:
        judged.judged += 1
        if value not in allowed:
            may = _follows(right, values) if right and value else {True}
            kind = Kind.IMPOSSIBLE if True in may else Kind.HIDDEN
            judged.verdicts.append(Verdict(kind, name, value, allowed, read))

    for fact in read.facts:
        check(fact.name, _follows(fact.of, values), fact.value, fact.right)
    for members in read.members:
        for key, of in members.of.items():
            name = f"{members.name} has {key}"
            check(name, _follows(of, values), key in members.value, members.rights[key])
    for count in read.counts:
        judged.judged += 1
        allowed = [_follows(derived, values) for derived in count.of]
        least = sum(found == {True} for found in allowed)
        most = sum(True in found for found in allowed)
        if not least <= count.value <= most:
            between = f"{least} to {most}"
            verdict = Verdict(Kind.IMPOSSIBLE, count.name, count.value, between, read)
            judged.verdicts.append(verdict)


def _follows(derived: Derived, values: Callable[[Register], set[Value]]) -> set[Value]:
    each = [values(register) for register in derived.registers]
    if math.prod(map(len, each)) > MOST_COMBINATIONS:
        raise ValueError(f"too many combinations of {derived.registers}")
    return {derived.follows(*combination) for combination in product(*each)}


def _kind(history: _History, value: Value, read: Read) -> tuple[Kind, float]:
    """Of a value that may not be current, and how late the read was."""
    wrote = [write for write in history.writes if history.values[id(write)] == value]
    if not wrote:
        return (Kind.REFUSED if value in history.refused else Kind.INVENTED), 0.0
    begun = [write for write in wrote if write.begin < read.end]
    if not begun:
        return Kind.EARLY, 0.0
    later = [found for write in begun if (found := history.overwritten(write, read.begin))]
    instead, late = min(later, key=lambda found: found[1])
    return (Kind.OUTSIDE if instead.is_direct else Kind.STALE), late


def _judge_order(
    register: Register, history: _History, reads: Sequence[Read], judged: Judged
) -> None:
    """Of writes that overlapped, both seen as the last: once after both of them were to be seen."""
    pairs = _overlapping(history)
    if not pairs:
        return
    last: dict[tuple[int, int], Read] = {}
    ordered = sorted((read for read in reads if register in read.seen), key=lambda read: read.begin)
    begins = [read.begin for read in ordered]
    for one, other in pairs:
        both = max(one.due, other.due)
        for read in ordered[bisect_left(begins, both) :]:
            seen = history.by_value.get(read.seen[register])
            if seen is one or seen is other:
                last.setdefault((id(one), id(other)), read)
                before = last[id(one), id(other)]
                if before.seen[register] != read.seen[register]:
                    told = (before.seen[register], read.seen[register])
                    verdict = Verdict(
                        Kind.SPLIT, ".".join(register), told, before.seen[register], read
                    )
                    judged.verdicts.append(verdict)
                    break


def _overlapping(history: _History) -> list[tuple[Write, Write]]:
    writes = sorted(history.by_value.values(), key=lambda write: write.begin)
    return [
        (one, other)
        for number, one in enumerate(writes)
        for other in writes[number + 1 :]
        if other.begin < history.settle(one) and max(one.due, other.due) < NEVER
    ]
