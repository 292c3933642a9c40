"""What has changed lately, and what is forgotten of it."""

import pytest

from modelharbor.cache import bumps as module
from modelharbor.cache.bumps import GENERATION_SECONDS, Bumps


def test_what_changed_later_makes_old() -> None:
    bumps = Bumps(0.0)
    bumps.add(["a", "b"], 10)
    bumps.add(["b"], 20)
    assert [bumps.is_current(place, ["a"]) for place in (9, 10, 11)] == [False, True, True]
    assert [bumps.is_current(place, ["b"]) for place in (9, 19, 20)] == [False, False, True]
    assert bumps.is_current(1, ["c"])
    assert not bumps.is_current(1, ["c", "a"])
    assert bumps.is_current(0, [])
    assert (bumps.version, bumps.count) == (2, 3)


def test_what_is_told_again_changes_nothing() -> None:
    """A stream that was opened again begins before what was told last."""
    bumps = Bumps(0.0)
    bumps.add(["a"], 20)
    bumps.add(["a", "b"], 10)
    assert not bumps.is_current(15, ["a"])
    assert [bumps.is_current(place, ["b"]) for place in (9, 10)] == [False, True]


def test_generations_are_forgotten_whole() -> None:
    bumps = Bumps(0.0)
    bumps.add(["a"], 10)
    bumps.age(GENERATION_SECONDS - 1)
    bumps.add(["b"], 20)
    bumps.age(GENERATION_SECONDS)
    bumps.add(["c"], 30)
    # Of the older one, too, everything is known.
    assert not bumps.is_current(9, ["a"])
    assert not bumps.is_current(19, ["b"])
    assert bumps.is_current(5, ["other"])
    bumps.age(2 * GENERATION_SECONDS)
    # Nothing is known of what was before 20: also not of what did not change.
    assert not bumps.is_current(19, ["other"])
    assert bumps.is_current(20, ["a", "b"])
    assert not bumps.is_current(20, ["c"])


def test_where_nothing_happens_nothing_is_forgotten() -> None:
    bumps = Bumps(0.0)
    bumps.add(["a"], 10)
    for number in range(1, 10):
        bumps.age(number * GENERATION_SECONDS)
    assert bumps.is_current(10, ["a", "b"])
    assert not bumps.is_current(9, ["b"])


def test_many_tags_begin_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TAGS", 10)
    bumps = Bumps(0.0)
    for time in range(1, 101):
        bumps.add([f"t{time}"], time)
        bumps.age(0.0)
    assert len(bumps._new) + len(bumps._old) <= 22
    for time in range(1, 101):
        assert not bumps.is_current(time - 1, [f"t{time}"])


def test_what_is_forgotten_is_refused() -> None:
    bumps = Bumps(0.0)
    bumps.add(["a"], 10)
    bumps.forget(15)
    assert [bumps.is_current(place, ["b"]) for place in (14, 15)] == [False, True]
    bumps.forget(12)
    assert not bumps.is_current(14, ["b"])
    assert bumps.version == 3
