"""What the users have been told of the models, and which later answers are older than that.

Everything happens in one process on one thread: what was acknowledged before a read was sent is known
without any clock. Each write has a number of its own, which it puts into the summary; its answer says
which revision it has made, so their order is known however many are under way at once.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile


@dataclass(slots=True)
class Writes:
    """Of one model."""

    revisions: dict[int, int] = field(default_factory=dict)
    """By the number of the write."""
    moments: list[int] = field(default_factory=list)
    """Of acknowledgements, in order."""
    newest: list[int] = field(default_factory=list)
    """The highest revision that had been acknowledged at each of these."""


@dataclass(frozen=True, slots=True)
class Open:
    """An answer that showed a write of which nobody had been told yet, and `least` that it may show."""

    least: int
    found_stale: Callable[[], None]


class Truth:
    """`first`: the numbers of writes are not below it."""

    def __init__(self, first: int) -> None:
        self.moment = 0
        self.first = self.next = first
        self.models: dict[str, Writes] = {}
        self.open: dict[int, list[Open]] = {}

    def begin(self) -> int:
        """The number of a write that is about to be sent."""
        number, self.next = self.next, self.next + 1
        return number

    def end(self, model: str, number: int, revision: int) -> None:
        """It was acknowledged just now."""
        self.moment += 1
        writes = self.models.setdefault(model, Writes())
        writes.revisions[number] = revision
        writes.moments.append(self.moment)
        writes.newest.append(max(revision, writes.newest[-1] if writes.newest else 0))
        for each in self.open.pop(number, ()):
            if revision < each.least:
                each.found_stale()

    def judge(
        self,
        shown: Iterable[tuple[str, int | None]],
        sent: int,
        found_stale: Callable[[], None],
    ) -> None:
        """An answer to a read that was sent at the moment `sent`, and the numbers of the writes that it
        shows of each model; None: one before them all. `found_stale` is called, at once or later, at most
        once for each model: where a newer write had been acknowledged by `sent`."""
        for model, number in shown:
            writes = self.models.get(model)
            before = bisect_right(writes.moments, sent) if writes is not None else 0
            if writes is None or before == 0:
                continue
            least = writes.newest[before - 1]
            if number is None:
                found_stale()
            elif number in writes.revisions:
                if writes.revisions[number] < least:
                    found_stale()
            else:
                self.open.setdefault(number, []).append(Open(least, found_stale))


def number_in(summary: str | None, begins: str, first: int) -> int | None:
    """Of the write that made this summary; None where that was not since `first`."""
    if summary is None or not summary.startswith(begins):
        return None
    digits = "".join(takewhile(str.isdecimal, summary[len(begins) :]))
    return int(digits) if digits and int(digits) >= first else None
