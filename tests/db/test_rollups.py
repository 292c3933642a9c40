"""What is added up, in whatever order and parts, comes to the same."""

import random
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from math import sqrt

import pytest
from bson import ObjectId

from modelharbor.db.rollups import (
    ADDITIVE,
    DIMENSIONS,
    HASHES,
    MOST_HASHES,
    Cuboid,
    Grain,
    Groups,
    Rolled,
    Sums,
    Together,
    add,
    add_to,
    bucket_starts,
    cuboid_of,
    distinct,
    key_of,
    naive,
    row_of,
    sums_of,
)
from modelharbor.db.usage import HISTOGRAM_STEPS

AT = naive(datetime(2026, 11, 20, tzinfo=UTC))


def some_sums(chance: random.Random) -> Sums:
    sums: Sums = {
        name: chance.randrange(-(1 << 40), 1 << 40)
        for name in ADDITIVE
        if name not in ("total_ms", "job_seconds")
    }
    sums["total_ms"] = chance.randrange(1 << 30) / 1024
    sums["who"] = {chance.randrange(5000) << 50 for _ in range(chance.randrange(3000))}
    sums["latencies"] = [chance.randrange(100) for _ in range(HISTOGRAM_STEPS)]
    sums["last_at"] = AT + timedelta(seconds=chance.randrange(1000))
    return {name: sums[name] for name in sums if chance.random() < 0.8}


@pytest.mark.parametrize("seed", range(20))
def test_adding_up_is_associative_and_has_no_order(seed: int) -> None:
    """Through rows too, which keep the smallest hashes alone."""
    chance = random.Random(seed)
    parts = [some_sums(chance) for _ in range(12)]
    key = (Cuboid.AUDIENCE.value, "public")

    def added(some: list[Sums], *, stored: bool) -> Sums:
        found: Sums = {}
        for each in some:
            add(found, each)
        row = row_of(key, AT, found, 1)
        return found if row is None or not stored else sums_of(row)

    expected = row_of(key, AT, added(parts, stored=False), 1)
    for _ in range(5):
        shuffled = chance.sample(parts, len(parts))
        cuts = sorted(chance.sample(range(len(parts) + 1), 3))
        pieces = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        found = added([added(piece, stored=True) for piece in pieces], stored=True)
        assert row_of(key, AT, found, 1) == expected


def test_what_is_added_is_not_changed() -> None:
    first: Sums = {"who": {1}, "latencies": [1] * HISTOGRAM_STEPS, "views": 1}
    found: Sums = {}
    add(found, first)
    add(found, {"who": {2}, "latencies": [1] * HISTOGRAM_STEPS, "views": 1})
    assert first == {"who": {1}, "latencies": [1] * HISTOGRAM_STEPS, "views": 1}
    assert found == {"who": {1, 2}, "latencies": [2] * HISTOGRAM_STEPS, "views": 2}


def test_groups_are_added_up_from_others_that_stay_as_they_are() -> None:
    chance = random.Random(3)
    parts = [((chance.choice("abc"),), some_sums(chance)) for _ in range(40)]
    alone = (("d",), some_sums(chance))
    before = deepcopy(parts)
    together = Together()
    expected: Groups = {}
    for key, sums in (*parts, alone):
        together.add(key, sums)
        add_to(expected, key, sums)
    assert together.groups == expected
    assert together.groups["d",] is alone[1]
    assert parts == before


def test_a_row_says_nothing_twice() -> None:
    model = ObjectId()
    key = (Cuboid.MODEL_ALL.value, model, None, None, "GGUF", None)
    row = row_of(key, AT, {"views": 2, "likes": 0, "who": set()}, 7)
    group = {"cuboid": "model.all", "at": AT, "model": model, "format": "GGUF"}
    assert row == {"_id": group, **group, "run": 7, "views": 2}
    assert key_of(row) == key
    assert sums_of(row) == {"views": 2}
    assert row_of(key, AT, {"likes": 0}, 7) is None


def test_who_is_exact_up_to_a_bound_and_then_within_its_error() -> None:
    chance = random.Random(5)
    assert distinct([]) == (0, True)
    few = [chance.randrange(HASHES) for _ in range(MOST_HASHES - 1)]
    assert distinct([*few, *few]) == (MOST_HASHES - 1, True)
    error = 1 / sqrt(MOST_HASHES - 2)
    for count in (2_000, 20_000, 200_000):
        found, is_exact = distinct(chance.randrange(HASHES) for _ in range(count))
        assert not is_exact
        assert abs(found - count) < 4 * error * count, count


def test_rows_have_the_dimensions_of_their_cuboid() -> None:
    assert set(DIMENSIONS) == {each.value for each in Cuboid}
    for names in DIMENSIONS.values():
        # In the order of the fields of a row.
        fields = [name for name in Rolled.model_fields if name in names]
        assert list(names) == fields


def test_what_has_no_rows_of_its_own_is_made_of_the_finest() -> None:
    assert cuboid_of(Cuboid.MODEL_FILE, Grain.DAY) is Cuboid.MODEL_FILE
    assert cuboid_of(Cuboid.MODEL_FILE, Grain.QUARTER) is Cuboid.MODEL_ALL
    assert cuboid_of(Cuboid.MODEL, Grain.MINUTE) is Cuboid.MODEL
    assert cuboid_of(Cuboid.AUDIENCE_CLIENT, Grain.MINUTE) is Cuboid.AUDIENCE_CLIENT


def test_buckets_of_a_day() -> None:
    end = AT + timedelta(days=1)
    counts = [len(list(bucket_starts(grain, AT, end))) for grain in Grain]
    assert counts == [1440, 96, 1]
