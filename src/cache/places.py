"""Where a document stands in an order, as tags: of what comes to stand elsewhere only the pages between
whose ends that is hear.

The values of a name are divided into STEPS steps, and these into ever larger parts, each of FOUR of the
part below. A change concerns one part of each size, a page the fewest parts that cover it.
"""

from collections.abc import Iterator
from math import isfinite, log2
from typing import Any, Final

FOUR: Final = 4
SIZES: Final = 6
STEPS: Final = FOUR**SIZES
_OF_SCORES: Final = 16.0  # steps of one, which stands for ten times the use
_OF_NUMBERS: Final = 16.0  # steps of twice as much
_SCORES: Final = frozenset({"stats.trending_score"})
ORDERED: Final = _SCORES | {
    "stats.downloads_30d",
    "stats.downloads_all",
    "stats.likes",
    "stats.use_1d",
    "stats.use_7d",
    "stats.use_30d",
    "stats.size_bytes",
    "parameters",
}
"""Stored names of models by whose values pages are told apart."""


def step_of(name: str, value: Any) -> int | None:
    """From 0 on, never less for a greater value; None for what is no number."""
    if type(value) is bool or not isinstance(value, int | float) or not isfinite(value):
        return None
    if value <= 0:
        return 0
    step = value * _OF_SCORES if name in _SCORES else log2(1 + value) * _OF_NUMBERS
    return min(STEPS - 1, int(step))


def parts_of(step: int) -> Iterator[tuple[int, int]]:
    """(size, number) of the part of each size that it is in."""
    for size in range(SIZES):
        yield size, step
        step //= FOUR


def parts_between(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The fewest parts that cover these steps, and no other."""
    for size in range(SIZES - 1):
        while first <= last and first % FOUR:
            yield size, first
            first += 1
        while first <= last and last % FOUR != FOUR - 1:
            yield size, last
            last -= 1
        if first > last:
            return
        first, last = first // FOUR, last // FOUR
    yield from ((SIZES - 1, number) for number in range(first, last + 1))
