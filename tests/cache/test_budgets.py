"""Budgets in a real Redis, and in the process while there is none."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given
from hypothesis import settings as drawn
from hypothesis import strategies as st
from redis import Redis
from redis.exceptions import ResponseError

import modelharbor.cache.budgets as module
from modelharbor.cache.budgets import (
    LARGEST,
    MILLION,
    SCRIPT,
    Budget,
    Budgets,
    BudgetSpent,
    Charge,
    Kind,
    owed,
    take,
)
from modelharbor.cache.rounds import Rounds, running
from modelharbor.dev.engines import Engines
from modelharbor.settings import Settings

pytestmark = pytest.mark.anyio
SLOW = {"budget_anonymous": 10, "budget_token": 20, "budget_operator": 30, "budget_seconds": 100.0}
"""So little is restored that a test does not live to see it: 1,000, 2,000 and 3,000 can be saved up."""
A, B = "address:192.0.2.1", "token:65f000000000000000000001"


@pytest.fixture
async def shared(settings: Settings) -> AsyncIterator["redis.asyncio.Redis"]:
    async with redis.asyncio.Redis.from_url(settings.redis_url) as client:
        await client.flushdb()
        yield client


def budgets_of(settings: Settings, **changes: Any) -> Budgets:
    return Budgets(settings.model_copy(update={**SLOW, **changes}))


async def go(client: "redis.asyncio.Redis", *parts: Budgets) -> int:
    """One round; how many commands it took."""
    pipeline = client.pipeline(transaction=False)
    counts = [part.commands(pipeline) for part in parts]
    replies = await pipeline.execute(raise_on_error=False) if sum(counts) else []
    for part, count in zip(parts, counts, strict=True):
        mine, replies = replies[:count], replies[count:]
        part.answered(mine)
    return sum(counts)


async def charged(
    client: "redis.asyncio.Redis", budgets: Budgets, cost: int, principal: str = A, **more: Any
) -> Charge:
    made = budgets.charge(principal, Kind.ANONYMOUS, cost, **more)
    await go(client, budgets)
    assert not made.waits
    return made


def about(expected: float) -> Any:
    """What is restored while a test runs: no more than in ten seconds."""
    return pytest.approx(expected, abs=100)


async def test_all_charges_of_a_round_are_one_call(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    first = [budgets.charge(A, Kind.ANONYMOUS, cost) for cost in (600, 500, 300)]
    token = budgets.charge(B, Kind.TOKEN, 700)
    assert [each.waits for each in (*first, token)] == [True] * 4
    assert await go(shared, budgets) == 1
    assert [each.allowed for each in first] == [True, False, True]  # in their order
    assert [each.remaining for each in first] == [400, 400, 100]
    assert (token.allowed, token.remaining) == (True, 1300)
    assert [(each.limit, each.restore_rate) for each in (first[0], token)] == [
        (1000, 10),
        (2000, 20),
    ]
    assert await go(shared, budgets) == 0  # nothing waits
    again = budgets.charge(A, Kind.ANONYMOUS, 0)
    await go(shared, budgets)
    assert again.remaining == about(100)
    assert not budgets.decided_here


async def test_processes_share_the_buckets(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    one, other = budgets_of(settings), budgets_of(settings)
    await charged(shared, one, 600)
    assert (await charged(shared, other, 300)).remaining == about(100)
    assert not (await charged(shared, one, 300)).allowed
    another = budgets_of(settings, redis_prefix="elsewhere")
    assert (await charged(shared, another, 300)).remaining == 700


async def test_who_is_refused_is_told_when_to_come_again(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    (await charged(shared, budgets, 900)).check()
    refused = await charged(shared, budgets, 300)
    assert refused.remaining == about(100)
    assert refused.retry_after == pytest.approx(20, abs=10)  # 200 are missing, 10 a second
    assert refused.reset_after == pytest.approx(90, abs=10)
    with pytest.raises(BudgetSpent) as raised:
        refused.check()
    assert raised.value.charge is refused
    told = raised.value.extensions
    assert told == {
        "code": "RATE_LIMITED",
        "retryAfter": pytest.approx(20, abs=10),
        "requested": 300,
        "remaining": about(100),
    }
    assert told["retryAfter"] * 1000 == round(told["retryAfter"] * 1000)
    assert budgets.refused == 1
    allowed = await charged(shared, budgets, 50)
    assert (allowed.allowed, allowed.retry_after) == (True, 0.0)


async def test_what_is_owed_runs_out(settings: Settings, shared: "redis.asyncio.Redis") -> None:
    budgets = budgets_of(settings, budget_anonymous=1000, budget_seconds=1.0)
    full = await charged(shared, budgets, 1000)
    assert full.remaining == 0
    left = [0]
    until = time.monotonic() + 60  # against a hang
    while left[-1] < 500:
        assert time.monotonic() < until
        left.append((await charged(shared, budgets, 0)).remaining)
    assert left == sorted(left)


async def test_a_bucket_ends_when_nothing_is_owed(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    await charged(shared, budgets, 500)
    [key] = await shared.keys()
    assert key == f"mh:budget:{A}".encode()
    assert 40_000 <= await shared.pttl(key) <= 50_001
    budgets.refund(A, Kind.ANONYMOUS, 500)
    assert await go(shared, budgets) == 1
    assert await shared.keys() == []


async def test_what_is_given_back_is_never_more_than_the_limit(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    spent = await charged(shared, budgets, 600)
    budgets.settle(spent, 100)
    assert spent.remaining == 900  # as it is told to its own client
    assert (await charged(shared, budgets, 0)).remaining == about(900)
    budgets.refund(A, Kind.ANONYMOUS, 10**12)
    assert (await charged(shared, budgets, 0)).remaining == 1000
    budgets.refund(A, Kind.ANONYMOUS, 500)  # to who owes nothing
    assert (await charged(shared, budgets, 1000)).remaining == 0
    budgets.refund(A, Kind.ANONYMOUS, -500)
    budgets.refund(A, Kind.ANONYMOUS, 0)
    assert await go(shared, budgets) == 0


async def test_only_what_was_taken_is_given_back(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    allowed = await charged(shared, budgets, 900)
    for charge in (
        await charged(shared, budgets, 600),  # refused
        await charged(shared, budgets, 50, dry_run=True),
    ):
        budgets.settle(charge, 0)
    budgets.settle(allowed, 900)
    budgets.settle(allowed, 1200)
    assert await go(shared, budgets) == 0


async def test_a_dry_run_takes_nothing(settings: Settings, shared: "redis.asyncio.Redis") -> None:
    budgets = budgets_of(settings)
    fits = await charged(shared, budgets, 1000, dry_run=True)
    assert (fits.allowed, fits.remaining) == (True, 1000)
    await charged(shared, budgets, 600)
    too_much = await charged(shared, budgets, 500, dry_run=True)
    assert (too_much.allowed, too_much.remaining) == (False, about(400))
    assert too_much.retry_after == pytest.approx(10, abs=10)
    assert (await charged(shared, budgets, 300)).allowed


async def test_costs_are_not_negative(settings: Settings) -> None:
    with pytest.raises(ValueError, match="-1"):
        budgets_of(settings).charge(A, Kind.ANONYMOUS, -1)


async def test_what_is_dearer_than_the_limit_is_for_who_owes_nothing(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    dear = await charged(shared, budgets, 5000)
    assert (dear.allowed, dear.remaining) == (True, 0)
    assert dear.reset_after == 500  # no faster than everybody else
    refused = await charged(shared, budgets, 5000)
    assert refused.retry_after == pytest.approx(500, abs=10)
    assert (await charged(shared, budgets, 1)).retry_after == pytest.approx(400, abs=10)


async def test_without_a_limit_nothing_is_sent(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings, budget_token=0)
    free = budgets.charge(B, Kind.TOKEN, 10**9)
    assert not free.waits
    budgets.settle(free, 0)
    budgets.refund(B, Kind.TOKEN, 5)
    budgets.owe(B, Kind.TOKEN, 5)
    assert await go(shared, budgets) == 0
    budgets.owe(A, Kind.ANONYMOUS, 100)
    free.check()
    assert (free.allowed, free.remaining, free.limit, free.restore_rate) == (True, *[LARGEST] * 3)
    assert (free.reset_after, free.retry_after) == (0, 0)
    assert budgets.exhausted(B, Kind.TOKEN) is None
    assert not budgets.decided_here
    limited = budgets.charge(A, Kind.ANONYMOUS, 1)
    assert await go(shared, budgets) == 1
    assert limited.remaining == 899


async def test_what_has_been_done_is_owed_in_any_case(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    assert budgets.exhausted(A, Kind.ANONYMOUS) is None  # it was never seen
    await charged(shared, budgets, 950)
    assert budgets.exhausted(A, Kind.ANONYMOUS) is None
    budgets.owe(A, Kind.ANONYMOUS, 100)
    budgets.owe(A, Kind.ANONYMOUS, 100)
    known = budgets.exhausted(A, Kind.ANONYMOUS)  # before any round
    assert known is not None
    assert (known.allowed, known.waits, known.remaining) == (False, False, 0)
    assert known.retry_after == pytest.approx(15, abs=10)
    asked = await charged(shared, budgets, 1)
    assert (asked.allowed, asked.remaining) == (False, 0)
    other = budgets_of(settings)
    assert (await charged(shared, other, 1)).retry_after == pytest.approx(15, abs=10)
    assert other.exhausted(A, Kind.ANONYMOUS) is not None
    budgets.refund(A, Kind.ANONYMOUS, 500)
    assert budgets.exhausted(A, Kind.ANONYMOUS) is None


async def test_what_is_settled_while_a_round_is_under_way_counts_after_it(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    budgets.charge(A, Kind.ANONYMOUS, 900)
    pipeline = shared.pipeline(transaction=False)
    budgets.commands(pipeline)
    budgets.owe(A, Kind.ANONYMOUS, 500)
    budgets.answered(await pipeline.execute())
    assert budgets.exhausted(A, Kind.ANONYMOUS) is not None
    assert (await charged(shared, budgets, 0)).retry_after == pytest.approx(40, abs=10)


# ---- without Redis


async def test_the_process_goes_on_from_what_it_knew(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    await charged(shared, budgets, 600)
    sent = budgets.charge(A, Kind.ANONYMOUS, 300)
    pipeline = shared.pipeline(transaction=False)
    budgets.commands(pipeline)
    waiting = budgets.charge(A, Kind.ANONYMOUS, 300)
    budgets.failed()
    assert not sent.waits
    assert (sent.allowed, sent.remaining) == (True, about(100))
    assert (waiting.allowed, waiting.remaining) == (False, about(100))
    assert waiting.retry_after == pytest.approx(20, abs=10)
    unknown = budgets.charge(B, Kind.TOKEN, 600)
    assert (unknown.allowed, unknown.remaining) == (True, 1400)
    assert budgets.decided_here == 3
    budgets.settle(sent, 0)
    assert budgets.charge(A, Kind.ANONYMOUS, 300).allowed


async def test_a_charge_is_decided_once(settings: Settings, shared: "redis.asyncio.Redis") -> None:
    """Who waits may hear that a round has failed before its parts do."""
    budgets = budgets_of(settings)
    for is_answered in (False, True):
        charge = budgets.charge(A, Kind.ANONYMOUS, 300)
        pipeline = shared.pipeline(transaction=False)
        budgets.commands(pipeline)
        charge.check()
        if is_answered:
            budgets.answered(await pipeline.execute())
        else:
            budgets.failed()
        assert charge.is_local
    assert budgets.decided_here == 2
    assert charge.remaining == about(400)


async def test_the_buckets_of_redis_go_on_when_it_is_back(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    await charged(shared, budgets, 100)
    alone = budgets.charge(A, Kind.ANONYMOUS, 500)
    assert alone.remaining == about(400)  # nobody has asked Redis
    budgets.settle(alone, 100)
    budgets.owe(A, Kind.ANONYMOUS, 100)
    assert await go(shared, budgets) == 0  # what Redis was not told of, it need not give back
    back = await charged(shared, budgets, 100)
    assert (back.remaining, back.is_local) == (about(800), False)
    assert budgets.decided_here == 1
    budgets.settle(back, 0)
    assert (await charged(shared, budgets, 0)).remaining == about(900)


async def test_a_reply_that_makes_no_sense_is_none(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    for reply in (ResponseError("READONLY"), None, [], [1], [1, 2, 3], b"x"):
        charge = budgets.charge(A, Kind.ANONYMOUS, 100)
        budgets.commands(shared.pipeline(transaction=False))
        budgets.answered([reply])
        assert (charge.waits, charge.is_local, charge.allowed) == (False, True, True)
    assert (await charged(shared, budgets, 100)).remaining == 900


@pytest.mark.parametrize(
    "value", ["", "x", "1", "-1 5", "1e9 5", "9" * 400 + " 5", "0 " + "9" * 400]
)
async def test_what_somebody_else_wrote_there_is_no_debt(
    settings: Settings, shared: "redis.asyncio.Redis", value: str
) -> None:
    await shared.set(f"mh:budget:{A}", value)
    charge = await charged(shared, budgets_of(settings), 100)
    assert (charge.remaining, charge.is_local) == (900, False)


async def test_nor_is_what_is_no_text(settings: Settings, shared: "redis.asyncio.Redis") -> None:
    await shared.rpush(f"mh:budget:{A}", "5")
    assert (await charged(shared, budgets_of(settings), 100)).remaining == 900


async def test_a_clock_that_was_set_back_holds_nobody_up(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    seconds, micros = await shared.time()
    future = (seconds + 3600) * MILLION + micros
    await shared.set(f"mh:budget:{A}", f"{900 * MILLION} {future}")
    budgets = budgets_of(settings)
    assert not (await charged(shared, budgets, 500)).allowed
    kept = await shared.get(f"mh:budget:{A}")
    assert kept is not None
    _, since = kept.split()
    assert int(since) < future  # and it runs out from now on


async def test_few_buckets_are_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BUCKETS", 3)
    budgets = budgets_of(settings)
    for name in "abc":
        assert budgets.charge(name, Kind.ANONYMOUS, 900).allowed
    assert not budgets.charge("a", Kind.ANONYMOUS, 900).allowed  # used last
    assert budgets.charge("d", Kind.ANONYMOUS, 900).allowed
    assert not budgets.charge("a", Kind.ANONYMOUS, 900).allowed
    assert budgets.charge("b", Kind.ANONYMOUS, 900).allowed  # forgotten


async def test_what_waits_for_a_round_that_does_not_come_is_bounded(
    settings: Settings, shared: "redis.asyncio.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BUCKETS", 3)
    budgets = budgets_of(settings)
    for number in range(4):
        budgets.owe(f"o{number}", Kind.ANONYMOUS, 1)
    assert await go(shared, budgets) == 0
    for number in range(5):
        budgets.charge(f"w{number}", Kind.ANONYMOUS, 1)
    budgets.charge(A, Kind.ANONYMOUS, 1).check()
    assert await go(shared, budgets) == 0


async def test_what_was_settled_long_ago_is_not_told(
    settings: Settings, shared: "redis.asyncio.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then it has run out by itself; given back later it would be given twice."""
    budgets = budgets_of(settings)
    spent = await charged(shared, budgets, 900)
    budgets.settle(spent, 0)
    later = module.clock() + 101 * MILLION
    monkeypatch.setattr(module, "clock", lambda: later)
    assert await go(shared, budgets) == 0
    assert (await charged(shared, budgets, 0)).remaining == about(100)


async def joined(rounds: Rounds) -> None:
    async with asyncio.timeout(60):
        while rounds.is_open:
            await asyncio.sleep(0.01)


async def test_rounds_carry_charges_and_their_end_does_not_stop_them(
    settings: Settings, shared: "redis.asyncio.Redis"
) -> None:
    budgets = budgets_of(settings)
    async with running(Rounds(settings, (budgets,))) as rounds:
        await joined(rounds)

        async def charged_one() -> Charge:
            made = budgets.charge(A, Kind.ANONYMOUS, 1)
            assert await rounds.next()
            assert not made.waits
            return made

        charges = await asyncio.gather(*[charged_one() for _ in range(100)])
        assert all(each.allowed and not each.is_local for each in charges)
        assert charges[-1].remaining == about(900)
        assert rounds.done <= 3  # the first goes at once, the others together
        await shared.client_pause(1000)
        alone = budgets.charge(A, Kind.ANONYMOUS, 300)
        assert not await rounds.next()
        assert (alone.allowed, alone.is_local, alone.remaining) == (True, True, about(600))
        assert rounds.is_open
        assert budgets.charge(A, Kind.ANONYMOUS, 600).remaining == about(0)
        await joined(rounds)
        back = await charged_one()
        assert not back.is_local
        assert back.remaining in {
            *range(599, 700),
            *range(899, 1000),
        }  # Redis may have heard of 300


# ---- both engines come to the same


@pytest.fixture
def plain(engines: Engines) -> Iterator[Redis]:
    with Redis.from_url(engines.redis_url) as client:
        client.flushdb()
        yield client


COSTS = st.integers(0, 2_000_000).map(lambda cost: cost * MILLION) | st.sampled_from(
    [0, 1, MILLION, LARGEST * MILLION]
)
STEPS = st.lists(
    st.tuples(
        st.integers(-LARGEST * MILLION, LARGEST * MILLION) | st.just(0),
        st.lists(COSTS, max_size=4),
        st.sampled_from([0.0, 0.0, 0.0001, 0.002]),  # seconds before it
    ),
    min_size=1,
    max_size=8,
)
RATES = st.sampled_from([1, 3, 1000, 200_000, 1_000_003, LARGEST])


@drawn(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate=RATES, limit=st.integers(1, LARGEST), steps=STEPS)
def test_the_script_reckons_as_the_process_does(
    plain: Redis, rate: int, limit: int, steps: list[tuple[int, list[int], float]]
) -> None:
    """To the last millionth, over real time: a second bucket in the same call, which was not there
    before, is left with the time at which Redis reckoned."""
    plain.delete("bucket")
    bucket = (0, 0)
    for settled, costs, wait in steps:
        time.sleep(wait)
        plain.delete("witness")
        first = (rate, limit * MILLION, settled, len(costs), *costs)
        # At one moment: a bucket with little in it is gone some milliseconds later.
        with plain.pipeline(transaction=True) as together:
            together.eval(SCRIPT, 2, "bucket", "witness", *first, 1, MILLION, 0, 1, MILLION)
            together.get("witness")
            together.get("bucket")
            answers, witness, kept = together.execute()
        assert isinstance(witness, bytes)
        now = int(witness.split()[1])
        expected = take(owed(bucket, now, rate), limit * MILLION, settled, costs)
        assert answers == [*expected, 0, MILLION]
        debt = -1 - expected[-1] if expected[-1] < 0 else expected[-1]
        bucket = (debt, now)
        if debt * 1000 > rate * MILLION:  # more than a millisecond's worth
            assert kept == b"%d %d" % bucket
        assert 0 <= debt <= 2 * LARGEST * MILLION * (len(steps) + 1)


@given(
    rate=st.integers(1, 1000),
    limit=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.integers(0, MILLION), st.integers(0, 2000)), max_size=50),
)
def test_nobody_gets_more_than_the_limit_and_what_is_restored(
    rate: int, limit: int, steps: list[tuple[int, int]]
) -> None:
    """Whatever comes when; but what is dearer than the limit, which is paid off afterwards."""
    bucket, now, spent = (0, 0), 0, 0
    for wait, cost in steps:
        now += wait
        [_, answer] = take(owed(bucket, now, rate), limit * MILLION, 0, [cost * MILLION])
        bucket = (-1 - answer if answer < 0 else answer, now)
        if answer >= 0:
            spent += cost * MILLION
        dearest = max(limit, *(cost for _, cost in steps)) * MILLION
        assert spent <= dearest + now * rate
        if all(cost <= limit for _, cost in steps):
            assert spent <= limit * MILLION + now * rate


def test_a_budget_stays_within_what_can_be_told() -> None:
    assert Budget(Kind.TOKEN, 200_000, 5.0).limit == 1_000_000
    assert Budget(Kind.TOKEN, 1, 0.1).limit == 1
    large = Budget(Kind.TOKEN, 10**12, 10.0)
    assert (large.rate, large.limit) == (LARGEST, LARGEST)
