"""What stays in memory: what is asked for often, whatever is read once beside it, and never too much."""

import gc
import random
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelharbor.cache.memory import LARGEST_SHARE, OVERHEAD, Memory, Sketch

CAPACITY = 1_000_000
SIZE = 2_000
KEYS = 5_000
"""Ten times as many as there is room for."""


class Recent:
    """The longest unused goes: what it is compared with."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self.kept: OrderedDict[bytes, int] = OrderedDict()

    def get(self, key: bytes) -> int | None:
        found = self.kept.get(key)
        if found is not None:
            self.kept.move_to_end(key)
        return found

    def put(self, key: bytes, value: int, size: int) -> None:
        self.kept[key] = value
        self.size += size + OVERHEAD + len(key)
        while self.size > self.capacity:
            gone, _ = self.kept.popitem(last=False)
            self.size -= size + OVERHEAD + len(gone)


def name(number: int) -> bytes:
    return b"%016d" % number


def often_asked(seed: int, number: int) -> list[bytes]:
    """Keys by Zipf's law."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(KEYS)]
    return [name(rank) for rank in draw.choices(range(KEYS), weights, k=number)]


def hits(cache: Memory[int] | Recent, asked: list[bytes], scanned: Iterator[int] | None) -> float:
    """The share of those asked for that were there; between any two, five are read once."""
    found = 0
    for key in asked:
        if cache.get(key) is not None:
            found += 1
        else:
            cache.put(key, 1, SIZE)
        if scanned is not None:
            for _ in range(5):
                once = name(next(scanned))
                assert cache.get(once) is None
                cache.put(once, 1, SIZE)
    return found / len(asked)


def test_reading_everything_once_flushes_nothing() -> None:
    warm, asked = often_asked(1, 30_000), often_asked(2, 10_000)
    ratios = {}
    for kind in (Memory[int], Recent):
        alone, scanned = kind(CAPACITY), kind(CAPACITY)
        everything = iter(range(KEYS, 10**9))
        hits(alone, warm, None)
        hits(scanned, warm, None)
        ratios[kind] = hits(alone, asked, None), hits(scanned, asked, everything)
    (quiet, busy), (recent_quiet, recent_busy) = ratios[Memory[int]], ratios[Recent]
    assert busy > quiet - 0.05
    assert quiet > recent_quiet
    assert recent_busy < recent_quiet - 0.2
    assert busy > recent_busy + 0.2


def test_what_is_asked_for_changes_and_so_does_what_is_kept() -> None:
    memory: Memory[int] = Memory(CAPACITY)
    hits(memory, often_asked(1, 30_000), None)
    others = [b"other" + key for key in often_asked(2, 60_000)]
    before = hits(memory, others[:5_000], None)
    hits(memory, others[5_000:-10_000], None)
    assert hits(memory, others[-10_000:], None) > max(before, 0.6)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["get", "put", "drop"]),
            st.integers(0, 60),
            st.integers(0, 30_000),
        ),
        max_size=300,
    )
)
def test_it_never_takes_more_than_it_may(steps: list[tuple[str, int, int]]) -> None:
    capacity = 100_000
    memory: Memory[int] = Memory(capacity)
    put: dict[bytes, int] = {}
    for verb, number, size in steps:
        key = name(number)
        if verb == "put":
            is_kept = memory.put(key, size, size)
            put[key] = size
            assert is_kept == (memory.get(key) is not None)
        elif verb == "drop":
            memory.drop(key)
            assert memory.get(key) is None
        else:
            assert memory.get(key) in (None, put.get(key))
        assert memory.size <= capacity
    kept = {key: size for key, size in put.items() if memory.get(key) is not None}
    empty: Memory[int] = Memory(capacity)
    assert len(memory) == len(kept)
    assert memory.size == empty.size + sum(size + OVERHEAD + len(key) for key, size in kept.items())


def test_what_is_larger_than_a_share_is_not_kept() -> None:
    memory: Memory[int] = Memory(CAPACITY)
    for number in range(100):
        assert memory.put(name(number), 1, SIZE)
    assert not memory.put(b"large", 1, CAPACITY // LARGEST_SHARE)
    assert memory.get(b"large") is None
    assert len(memory) == 100
    # Nor is what it was before, when it was smaller.
    assert memory.put(b"grows", 1, SIZE)
    assert not memory.put(b"grows", 2, CAPACITY)
    assert memory.get(b"grows") is None


def test_one_large_value_does_not_take_the_place_of_many_that_are_used() -> None:
    memory: Memory[int] = Memory(CAPACITY)
    number = 0
    while memory.size < CAPACITY - 2 * SIZE:
        memory.put(name(number), 1, SIZE)
        number += 1
    before = {name(each) for each in range(number) if memory.get(name(each))}
    for _ in range(3):
        memory.put(b"large", 1, CAPACITY // (LARGEST_SHARE + 2))
    assert memory.get(b"large") is None
    assert {key for key in before if memory.get(key)} == before


def test_without_room_nothing_is_kept() -> None:
    memory: Memory[int] = Memory(0)
    assert not memory.put(b"key", 1, 0)
    assert (memory.get(b"key"), len(memory)) == (None, 0)


def test_a_value_is_replaced_where_it_is() -> None:
    memory: Memory[str] = Memory(CAPACITY)
    memory.put(b"key", "old", 10)
    size = memory.size
    memory.put(b"key", "new", 30)
    assert (memory.get(b"key"), len(memory), memory.size) == ("new", 1, size + 20)


def test_values_that_grow_where_they_are_push_out_those_that_are_least_used() -> None:
    memory: Memory[int] = Memory(CAPACITY)
    number = 0
    while memory.size < CAPACITY - 10 * SIZE:
        memory.put(name(number), 1, SIZE)
        number += 1
    grown = [name(each) for each in range(20)]
    for key in grown:
        memory.get(key)
    for key in grown:
        assert memory.put(key, 2, 10 * SIZE)
        assert memory.size <= CAPACITY
    assert [memory.get(key) for key in grown] == [2] * 20
    assert len(memory) < number


@pytest.mark.parametrize("number", [1_000, 5_470, 10_930, 21_860])
def test_an_entry_takes_no_more_beside_its_value_than_is_counted(number: int) -> None:
    """Some of these numbers are those at which Python has just made its tables larger."""
    memory: Memory[None] = Memory(1 << 30)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for each in range(number):
            memory.put(name(each), None, 0)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(memory) == number
    counted = OVERHEAD + len(name(0))
    assert 0.6 * counted < (after - before) / number < counted


def test_the_sketch_counts_to_fifteen_and_forgets_by_half() -> None:
    sketch = Sketch(1024)
    one, other = 0x1234_5678_9ABC_DEF0, -0x0FED_CBA9_8765_4321
    for _ in range(6):
        sketch.add(one, 1)
    sketch.add(other, 40)
    assert (sketch.count(one), sketch.count(other), sketch.count(77)) == (6, 15, 0)
    sketch.halve()
    assert (sketch.count(one), sketch.count(other)) == (3, 7)
    assert sketch.size == 4 * 1024 // 2


def test_the_sketch_is_seldom_far_from_the_truth() -> None:
    sketch, draw = Sketch(1024), random.Random(3)
    seen: dict[int, int] = {}
    for _ in range(3_000):
        key = draw.getrandbits(62)
        times = draw.choice([1, 1, 1, 1, 1, 8])
        seen[key] = times
        sketch.add(key, times)
    counts = {key: sketch.count(key) for key in seen}
    assert all(counts[key] >= times for key, times in seen.items())
    assert sum(counts[key] > times + 2 for key, times in seen.items()) < len(seen) // 3
