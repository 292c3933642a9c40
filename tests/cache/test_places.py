"""Parts of an order: a change and a page have one in common where the page is concerned, and only there."""

from random import Random

import pytest

from modelharbor.cache.places import ORDERED, SIZES, STEPS, parts_between, parts_of, step_of


@pytest.mark.parametrize("name", sorted(ORDERED))
def test_greater_values_never_stand_before_less(name: str) -> None:
    random = Random(name)
    values = [random.choice((0.01, 1.0, 70.0, 1e6, 1e18)) * random.random() for _ in range(500)]
    whole = [round(value) for value in values] if name != "stats.trending_score" else values
    steps = [step_of(name, value) for value in sorted([0, *whole, 2**63 - 1])]
    known = [step for step in steps if step is not None]
    assert known == sorted(known)
    assert len(known) == len(steps)
    assert known[0] == 0
    assert known[-1] < STEPS
    assert len(set(known)) > 50


@pytest.mark.parametrize("value", [None, "7", True, float("nan"), float("inf"), [], {}])
def test_what_is_no_number_has_no_place(value: object) -> None:
    assert step_of("stats.likes", value) is None


def test_what_is_less_than_nothing_stands_first() -> None:
    assert step_of("stats.likes", -5) == 0


def test_scores_are_told_apart_as_far_as_they_come() -> None:
    """A step is a sixteenth of ten times the use; the time for which there are steps is long."""
    assert step_of("stats.trending_score", 66.0) != step_of("stats.trending_score", 66.1)
    assert step_of("stats.trending_score", 250.0) != step_of("stats.trending_score", 251.0)


def test_a_page_has_a_part_in_common_with_what_stands_in_it_alone() -> None:
    random = Random("parts")
    for _ in range(2000):
        first = random.randrange(STEPS)
        last = min(STEPS - 1, first + random.choice((0, 1, 5, 30, 400, 5000)))
        parts = list(parts_between(first, last))
        assert len(parts) == len(set(parts)) <= 6 * SIZES
        for step in (first, last, random.randint(first, last)):
            assert not set(parts).isdisjoint(parts_of(step))
        for step in (first - 1, last + 1, random.randrange(STEPS)):
            if 0 <= step < STEPS and not first <= step <= last:
                assert set(parts).isdisjoint(parts_of(step))


def test_everything_is_a_few_parts() -> None:
    assert len(list(parts_between(0, STEPS - 1))) <= 4
    assert len(list(parts_between(7, STEPS - 1))) <= 3 * SIZES
    assert list(parts_between(9, 9)) == [(0, 9)]
    assert list(parts_between(9, 8)) == []
