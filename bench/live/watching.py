"""What subscribers ask for and get, and what is to be said of what they got."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

SELECTION: Final = "{ cursor job { id state progress { current sequence } } }"
OURS: Final = (
    "subscription Watch($id: ID!, $after: Cursor, $rate: Float!) "
    f"{{ jobProgress(id: $id, after: $after, maxRateHz: $rate) {SELECTION} }}"
)
PLAIN: Final = f"subscription Watch($id: ID!) {{ jobProgress(id: $id) {SELECTION} }}"
RATE: Final = 50.0  # more than is written: all progress is delivered, none waits for its time


@dataclass(frozen=True, slots=True)
class Event:
    sequence: int
    state: str
    cursor: str


@dataclass(frozen=True, slots=True)
class Stamp:
    """When a change was written, by the clock that all processes of a machine share, in seconds."""

    sequence: int
    sent: float
    acknowledged: float
    is_state: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of what one subscriber heard, or all of them."""

    missed: int = 0  # changes of state
    repeated: int = 0  # changes of state and of progress, told again
    backwards: int = 0  # events older than one told before

    def __add__(self, other: "Verdict") -> "Verdict":
        return Verdict(
            self.missed + other.missed,
            self.repeated + other.repeated,
            self.backwards + other.backwards,
        )

    @property
    def total(self) -> int:
        return self.missed + self.repeated + self.backwards


def read_event(payload: bytes) -> Event | None:
    """None for other messages than events. Raises ValueError for events with errors."""
    message: dict[str, Any] = orjson.loads(payload)
    if message.get("type") != "next":
        if message.get("type") == "error":
            raise ValueError(payload.decode())
        return None
    if message["payload"].get("errors"):
        raise ValueError(payload.decode())
    told = message["payload"]["data"]["jobProgress"]
    job = told["job"]
    return Event(int(job["progress"]["sequence"]), job["state"], told["cursor"])


def judge(heard: Sequence[int], states: Iterable[int]) -> Verdict:
    """`heard`: sequences as they came, from the first on; `states`: those of all changes of state."""
    there = set(heard)
    first = heard[0] if heard else 0
    missed = sum(1 for each in states if each > first and each not in there)
    repeated = len(heard) - len(there)
    highest, backwards, seen = -1, 0, set[int]()
    for sequence in heard:
        backwards += sequence < highest and sequence not in seen
        seen.add(sequence)
        highest = max(highest, sequence)
    return Verdict(missed, repeated, backwards)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in order; the nearest rank."""
    if not ordered:
        raise ValueError("there are no values")
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
