"""The judge itself: histories that are wrong are convicted, those that are right are not."""

from typing import Any

import pytest

from .checker import (
    Count,
    Derived,
    Fact,
    Judged,
    Kind,
    Members,
    Read,
    Register,
    Value,
    Write,
    judge,
)

A = ("summary", "a")
B = ("visible", "a")


def write(value: str, begin: float, end: float = float("inf"), **more: Any) -> Write:
    return Write({A: value}, begin, end, **more)


def read(value: str, begin: float, end: float) -> Read:
    return Read(begin, end, {A: value})


def judged(writes: list[Write], *reads: Read) -> Judged:
    return judge({A: "old", B: True}, writes, reads)


def kinds(writes: list[Write], *reads: Read) -> list[Kind]:
    return [verdict.kind for verdict in judged(writes, *reads).verdicts]


def test_right_histories() -> None:
    one, two = write("1", 1, 2), write("2", 3, 4)
    assert kinds([one, two]) == []
    assert kinds([one, two], read("old", 0, 1), read("1", 2, 3), read("2", 4, 5)) == []
    # While a write is under way, before and after are both right, in any order.
    assert kinds([one], read("1", 1.1, 1.2), read("old", 1.3, 1.4), read("1", 1.5, 1.6)) == []
    # A read that began before the acknowledgement may end long after it.
    assert kinds([one], read("old", 1.9, 9)) == []


def test_what_is_older_than_an_acknowledged_write() -> None:
    one, two = write("1", 1, 2), write("2", 3, 4)
    assert kinds([one], read("old", 2, 3)) == [Kind.STALE]
    assert kinds([one, two], read("1", 4.1, 5)) == [Kind.STALE]
    [verdict] = judged([one, two], read("old", 4.5, 5)).verdicts
    assert verdict.late == 2.5  # after the first that it should have seen
    assert verdict.allowed == {"2"}


def test_direct_writes_have_a_while() -> None:
    direct = write("1", 1, 2, is_direct=True)
    assert kinds([direct], read("old", 3.9, 4)) == []
    assert judged([direct], read("old", 3.9, 4)).direct_lag == pytest.approx(1.9)
    assert kinds([direct], read("old", 4, 4.1)) == [Kind.OUTSIDE]
    assert judged([direct], read("old", 4.5, 4.6)).direct_lag == pytest.approx(2.5)
    # An acknowledged write has none, also after a direct one.
    assert kinds([direct, write("2", 2.5, 2.6)], read("1", 2.7, 2.8)) == [Kind.STALE]


def test_values_that_never_were() -> None:
    refused = write("no", 1, 2, is_refused=True)
    assert kinds([refused], read("other", 3, 4)) == [Kind.INVENTED]
    assert kinds([refused], read("no", 3, 4)) == [Kind.REFUSED]
    assert kinds([refused], read("old", 3, 4)) == []
    assert kinds([write("1", 5, 6)], read("1", 3, 4)) == [Kind.EARLY]


def test_writes_of_an_unknown_outcome() -> None:
    lost = write("lost", 1)
    for value in ("old", "lost"):
        assert kinds([lost], read(value, 5, 6)) == []
    # Seen once, it was there, and what was written later replaced it.
    two = write("2", 7, 8)
    assert kinds([lost, two], read("lost", 9, 10)) == []
    assert kinds([lost, two], read("lost", 5, 6), read("lost", 9, 10)) == [Kind.STALE]
    assert kinds([lost, two], read("old", 9, 10)) == [Kind.STALE]
    assert judged([lost]).unknown == 1


def test_writes_that_overlap_come_in_one_order() -> None:
    one, two = write("1", 1, 3), write("2", 2, 4)
    assert kinds([one, two], read("1", 5, 6), read("1", 7, 8)) == []
    assert kinds([one, two], read("2", 5, 6), read("2", 7, 8)) == []
    assert kinds([one, two], read("1", 5, 6), read("2", 7, 8)) == [Kind.SPLIT]
    assert kinds([one, two], read("1", 3, 3.9), read("2", 7, 8)) == []
    # What one read saw was there before what was written after the read.
    assert kinds([one, write("3", 2, 4)], read("1", 1.1, 1.9), read("1", 5, 6)) == [Kind.STALE]


def test_a_value_that_comes_again() -> None:
    there, gone, back = write("x", 1, 2), write("y", 3, 4), write("x", 5, 6)
    assert kinds([there, gone, back], read("x", 4.1, 4.5)) == [Kind.STALE]
    assert kinds([there, gone, back], read("x", 4.1, 5.5), read("x", 7, 8)) == []
    assert kinds([there, gone, back], read("y", 7, 8)) == [Kind.STALE]


def test_going_back_before_the_acknowledgement_is_counted() -> None:
    seen = judged([write("1", 1, 9)], read("1", 2, 3), read("old", 4, 5))
    assert (seen.verdicts, seen.went_back) == ([], 1)


def told(is_there: bool, begin: float, *, private: bool = True) -> Read:
    derived = Derived((A, B), lambda summary, visible: visible and summary != "gone")
    right = Derived((B,), lambda visible: visible) if private else None
    return Read(begin, begin + 0.1, facts=[Fact("found", derived, is_there, right)])


def test_what_follows_from_several_registers() -> None:
    hidden = Write({B: False}, 1, 2)
    assert kinds([hidden], told(True, 0.5), told(True, 1.5), told(False, 1.5)) == []
    assert kinds([hidden], told(False, 0.5)) == [Kind.IMPOSSIBLE]
    assert kinds([hidden], told(True, 2)) == [Kind.HIDDEN]
    assert kinds([hidden], told(True, 2, private=False)) == [Kind.IMPOSSIBLE]
    assert kinds([Write({A: "gone"}, 1, 2)], told(True, 2)) == [Kind.IMPOSSIBLE]
    assert kinds([Write({A: "gone"}, 1)], told(True, 5), told(False, 6)) == []


def test_counts() -> None:
    parts = [Derived((("like", each),), lambda liked: liked) for each in "abc"]
    initial: dict[Register, Value] = {("like", each): False for each in "abc"}
    writes = [Write({("like", "a"): True}, 1, 2), Write({("like", "b"): True}, 3, 9)]

    def count(value: int, begin: float) -> list[Kind]:
        read = Read(begin, begin + 0.1, counts=[Count("likes", tuple(parts), value)])
        return [verdict.kind for verdict in judge(initial, writes, [read]).verdicts]

    assert [count(value, 4) for value in (1, 2)] == [[], []]
    assert [count(value, 4) for value in (0, 3)] == [[Kind.IMPOSSIBLE], [Kind.IMPOSSIBLE]]


def test_lists() -> None:
    listed = {each: Derived((("in", each),), lambda there: there) for each in "ab"}
    initial: dict[Register, Value] = {("in", each): True for each in "ab"}
    writes = [Write({("in", "a"): False}, 1, 2)]

    def members(value: str, begin: float) -> list[str]:
        told = Members("it", listed, listed, frozenset(value))
        found = judge(initial, writes, [Read(begin, begin + 0.1, members=[told])])
        return [f"{verdict.kind.name} {verdict.what}" for verdict in found.verdicts]

    assert [members(value, 1.5) for value in ("ab", "b")] == [[], []]
    assert members("b", 2) == []
    assert members("ab", 2) == ["HIDDEN it has a"]
    assert members("", 2) == ["IMPOSSIBLE it has b"]
