"""Answers that are kept are current, whose they may be, and made once; whatever lies in Redis."""

import asyncio
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import pytest
import zstandard
from bson import ObjectId

from modelharbor.cache import answers as module
from modelharbor.cache import shared as sharing
from modelharbor.cache.answers import Answers, Layer, Made, Served, open_answers
from modelharbor.cache.client import Cache, connect_cache
from modelharbor.cache.entries import Access, Entry
from modelharbor.cache.freshness import Freshness, open_freshness
from modelharbor.cache.sealing import _HEAD, _SEAL_BYTES, VERSION, Seal
from modelharbor.cache.tags import entity
from modelharbor.db.connection import Database
from modelharbor.dev.engines import Engines
from modelharbor.errors import RateLimited
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.observability.metrics import Metrics
from modelharbor.settings import Settings
from tests.cache.worlds import World, entry
from tests.documents import insert_actor, insert_model

pytestmark = pytest.mark.anyio
CAPACITY = 10_000_000
BASE = b"operation and variables........."
GUARD_SECONDS = 10.0
SECRET = b"of this installation"


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@dataclass
class Maker:
    """Makes answers when it is let."""

    world: World
    values: dict[str, Any] = field(default_factory=dict)
    keeps: bool = True
    begun: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    @classmethod
    def at_once(cls, world: World, **values: Any) -> "Maker":
        maker = cls(world, values)
        maker.gate.set()
        return maker

    async def __call__(self) -> Made:
        self.begun += 1
        found = entry(self.world, **self.values)  # as of before its reads
        number = self.begun
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Made(number, found if self.keeps else None)


def alone(world: World) -> Answers:
    """Without Redis."""
    return Answers(world, None, CAPACITY)


async def ask(
    answers: Answers, make: Maker, rights: str = "public", viewer: str = "", private: bool = False
) -> Served:
    async with asyncio.timeout(GUARD_SECONDS):
        return await answers.answer(BASE, rights, viewer, private, make)


async def begun(make: Maker, number: int = 1) -> None:
    """Until so many are being made, and whoever waits for them does."""
    async with asyncio.timeout(GUARD_SECONDS):
        while make.begun < number:
            await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while not is_so():
            await asyncio.sleep(0.001)


async def test_what_was_made_is_kept_until_something_in_it_changes() -> None:
    world = World()
    answers, make = alone(world), Maker.at_once(world)
    assert answers.peek(BASE, "public", "") is None
    first = await ask(answers, make)
    assert (first.layer, first.made, make.begun) == (Layer.MISS, Made(1, first.entry), 1)
    world.change("models/2")
    found = answers.peek(BASE, "public", "")
    assert found is not None
    assert found.body == b'{"data":1}'
    second = await ask(answers, make)
    assert (second.layer, second.made, make.begun) == (Layer.L1, None, 1)
    world.change("models/1", "models.summary")
    assert answers.peek(BASE, "public", "") is None
    assert (await ask(answers, make)).layer is Layer.MISS
    assert make.begun == 2
    count = answers.count
    assert (count.hits, count.misses, count.invalidations) == (2, 2, 1)


async def test_in_a_world_without_changes_nothing_is_judged_again() -> None:
    world = World()
    answers = alone(world)
    await ask(answers, Maker.at_once(world))
    asked = world.asked
    for _ in range(10):
        assert answers.peek(BASE, "public", "")
    assert world.asked == asked
    world.change("models/2")
    for _ in range(10):
        assert answers.peek(BASE, "public", "")
    assert world.asked == asked + 1


async def test_what_was_just_found_current_is_as_good_as_new() -> None:
    """Changes are remembered for a while only: who is asked for all the time outlives that."""
    world = World()
    answers = alone(world)
    await ask(answers, Maker.at_once(world))
    for _ in range(10):
        world.change("models/2")
        assert answers.peek(BASE, "public", "")
        world.floor = world.position
    # Nothing changes for a long time, and it is looked at without being judged.
    world.position += 10
    assert answers.peek(BASE, "public", "")
    world.floor = world.position
    world.change("models/2")
    assert answers.peek(BASE, "public", "")
    # Who was not looked at for so long is not.
    world.change("models/2")
    world.floor = world.position
    assert answers.peek(BASE, "public", "") is None


async def test_what_was_begun_before_a_change_is_served_to_who_began_it_and_not_kept() -> None:
    world = World()
    answers, make = alone(world), Maker(world)
    asking = asyncio.create_task(ask(answers, make))
    await begun(make)
    world.change("models/1")
    make.gate.set()
    served = await asking
    assert served.made == Made(1, served.entry)
    assert answers.peek(BASE, "public", "") is None


async def test_an_answer_has_its_time(clock: Clock) -> None:
    world = World()
    answers = alone(world)
    make = Maker.at_once(world, made_at=clock.now, max_age=10.0)
    await ask(answers, make)
    clock.now += 9.9
    assert answers.peek(BASE, "public", "")
    clock.now += 0.2
    assert answers.peek(BASE, "public", "") is None
    assert (await ask(answers, make)).layer is Layer.MISS
    assert answers.count.invalidations == 0


ANN, BOB = ("public actor:a", "ann"), ("public actor:b", "bob")
ANNS_OTHER = ("public", "ann")
NOBODY = ("public", "")
PEOPLE = [ANN, BOB, ANNS_OTHER, NOBODY, ("public", "bob")]
SAME: dict[tuple[Access, bool], Callable[[tuple[str, str], tuple[str, str]], bool]] = {
    (Access.ANYBODY, False): lambda one, other: True,
    (Access.RIGHTS, False): lambda one, other: one[0] == other[0],
    (Access.VIEWER, False): lambda one, other: one == other,
    (Access.ANYBODY, True): lambda one, other: one == other,
    (Access.RIGHTS, True): lambda one, other: one == other,
}


@pytest.mark.parametrize(("access", "is_private"), SAME)
@pytest.mark.parametrize("says", ["policy", "entry"])
async def test_an_answer_is_for_those_who_would_get_the_same(
    access: Access, is_private: bool, says: str
) -> None:
    """Kept, and while it is made; `says`: where it stands that it is private."""
    by_policy, by_entry = is_private and says == "policy", is_private and says == "entry"
    for rights, viewer in PEOPLE:
        for other_rights, other_viewer in PEOPLE:
            same = SAME[access, is_private]((rights, viewer), (other_rights, other_viewer))
            world = World()
            answers = alone(world)
            make = Maker(world, {"access": access, "is_private": by_entry})
            first = asyncio.create_task(ask(answers, make, rights, viewer, by_policy))
            await begun(make)
            second = asyncio.create_task(ask(answers, make, other_rights, other_viewer, by_policy))
            await begun(make)
            make.gate.set()
            one, other = await asyncio.gather(first, second)
            assert one.made is not None
            if not same:
                assert other.made is not None
            found = answers.peek(BASE, other_rights, other_viewer)
            assert found is not None
            if other.made is None:
                assert one.entry is not None
                assert other.entry is not None
                assert other.entry.made_at == one.entry.made_at
            fresh = alone(world)
            await ask(fresh, Maker.at_once(world, **make.values), rights, viewer, by_policy)
            assert (fresh.peek(BASE, other_rights, other_viewer) is not None) == same


async def test_texts_of_rights_and_viewers_are_never_taken_for_one_another() -> None:
    world = World()
    answers = alone(world)
    for access, rights, viewer in (
        (Access.RIGHTS, "a", "b"),
        (Access.VIEWER, "a", "b"),
    ):
        await ask(answers, Maker.at_once(world, access=access), rights, viewer)
        for other in (("b", "a"), ("ab", ""), ("", "ab"), ("b", "b"), ("", "a")):
            assert answers.peek(BASE, *other) is None


async def test_many_that_ask_at_once_make_it_once() -> None:
    world = World()
    answers, make = alone(world), Maker(world)
    asking = [asyncio.create_task(ask(answers, make)) for _ in range(100)]
    await begun(make)
    make.gate.set()
    served = await asyncio.gather(*asking)
    assert make.begun == 1
    assert [each.layer for each in served] == [Layer.MISS] + [Layer.JOINED] * 99
    assert {id(each.entry) for each in served} == {id(served[0].entry)}
    assert (answers.count.misses, answers.count.joined) == (100, 99)


async def test_people_with_different_rights_wait_together_for_what_is_anybodys() -> None:
    world = World()
    answers, make = alone(world), Maker.at_once(world)
    await ask(answers, make)
    world.change("models/1")
    make.gate.clear()
    people = [asyncio.create_task(ask(answers, make, *person)) for person in PEOPLE]
    await begun(make, 2)
    make.gate.set()
    await asyncio.gather(*people)
    assert make.begun == 2


async def test_who_comes_after_a_change_does_not_take_what_was_begun_before_it() -> None:
    world = World()
    answers, make = alone(world), Maker(world)
    first = asyncio.create_task(ask(answers, make))
    await begun(make)
    world.change("models/1")
    later = [asyncio.create_task(ask(answers, make)) for _ in range(5)]
    await begun(make)
    make.gate.set()
    served = await asyncio.gather(*later)
    assert (await first).made == Made(1, (await first).entry)
    # One of them makes it, for all of them.
    assert make.begun == 2
    assert {each.entry.position for each in served if each.entry} == {2}
    assert [each.made is not None for each in served].count(True) == 1


async def test_under_a_stream_of_changes_everybody_gets_an_answer() -> None:
    world = World()
    answers = alone(world)
    running = 0

    async def make() -> Made:
        nonlocal running
        running += 1
        found = entry(world)
        await asyncio.sleep(0)
        world.change("models/1")
        return Made(found.position, found)

    async def one() -> None:
        at = world.position
        served = await answers.answer(BASE, "public", "", False, make)
        assert served.entry is not None
        assert served.entry.position >= at

    async with asyncio.timeout(GUARD_SECONDS):
        await asyncio.gather(*[one() for _ in range(50)])
    assert answers._flights == {}


async def test_one_that_fails_does_not_fail_the_others() -> None:
    world = World()
    answers, make = alone(world), Maker(world, error=ValueError("no"))
    asking = [asyncio.create_task(ask(answers, make)) for _ in range(3)]
    await begun(make)
    make.gate.set()
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in results] == [ValueError] * 3
    assert make.begun == 3  # each its own failure
    make.error = None
    assert (await ask(answers, make)).layer is Layer.MISS


async def test_when_who_makes_it_goes_another_takes_over() -> None:
    world = World()
    answers, make = alone(world), Maker(world)
    asking = [asyncio.create_task(ask(answers, make)) for _ in range(4)]
    await begun(make)
    asking[0].cancel()
    await begun(make, 2)
    make.gate.set()
    served = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(served[0], asyncio.CancelledError)
    assert make.begun == 2
    assert [each.layer for each in served if isinstance(each, Served)] == [
        Layer.MISS,
        Layer.JOINED,
        Layer.JOINED,
    ]


async def test_one_that_waits_and_goes_takes_nothing_from_the_others() -> None:
    world = World()
    answers, make = alone(world), Maker(world)
    asking = [asyncio.create_task(ask(answers, make)) for _ in range(3)]
    await begun(make)
    asking[1].cancel()
    await begun(make)
    make.gate.set()
    assert (await asking[0]).layer is Layer.MISS
    assert (await asking[2]).layer is Layer.JOINED
    assert make.begun == 1


async def test_what_cannot_be_kept_is_made_by_each_and_not_waited_for_again(clock: Clock) -> None:
    world = World()
    answers, make = alone(world), Maker(world, keeps=False)
    asking = [asyncio.create_task(ask(answers, make)) for _ in range(3)]
    await begun(make)
    assert make.begun == 1
    make.gate.set()
    assert sorted(each.made.answer for each in await asyncio.gather(*asking) if each.made) == [
        1,
        2,
        3,
    ]
    make.gate.clear()
    asking = [asyncio.create_task(ask(answers, make)) for _ in range(3)]
    await begun(make, 6)
    make.gate.set()
    await asyncio.gather(*asking)
    # For a while: then it is tried again.
    clock.now += module.UNKEPT_SECONDS + 1
    make.gate.clear()
    make.keeps = True
    asking = [asyncio.create_task(ask(answers, make)) for _ in range(3)]
    await begun(make, 7)
    make.gate.set()
    assert [each.layer for each in await asyncio.gather(*asking)][1:] == [Layer.JOINED] * 2
    assert make.begun == 7


async def test_what_is_hot_is_made_anew_before_it_is_too_old(clock: Clock) -> None:
    world = World()
    answers = alone(world)
    make = Maker.at_once(world, made_at=clock.now, max_age=10.0)
    await ask(answers, make)
    for _ in range(module.HOT):
        assert answers.peek(BASE, "public", "")
    clock.now += 8.5
    make.gate.clear()
    make.values["made_at"] = clock.now
    # The first one has something to do beside being served; nobody waits for it.
    assert answers.peek(BASE, "public", "") is None
    assert (await ask(answers, make)).layer is Layer.L1
    await begun(make, 2)
    for _ in range(5):
        assert answers.peek(BASE, "public", "")
        assert (await ask(answers, make)).layer is Layer.L1
    make.gate.set()
    await until(lambda: answers.count.refreshed == 1)
    assert make.begun == 2
    clock.now += 5
    found = answers.peek(BASE, "public", "")
    assert found is not None
    assert found.made_at == clock.now - 5
    await answers.close()


async def test_what_is_seldom_used_is_not(clock: Clock) -> None:
    world = World()
    answers = alone(world)
    make = Maker.at_once(world, made_at=clock.now, max_age=10.0)
    await ask(answers, make)
    clock.now += 8.5
    for _ in range(module.HOT - 1):
        assert answers.peek(BASE, "public", "")
    assert (make.begun, answers.count.refreshed) == (1, 0)


async def test_a_refresh_that_fails_is_tried_a_little_later(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    answers = alone(world)
    make = Maker.at_once(world, made_at=clock.now, max_age=10.0)
    await ask(answers, make)
    for _ in range(module.HOT):
        assert answers.peek(BASE, "public", "")
    clock.now += 8.1
    make.error = ValueError("no")
    assert (await ask(answers, make)).layer is Layer.L1
    await until(lambda: "answers.not_refreshed" in caplog.text)
    assert answers.peek(BASE, "public", "")
    assert make.begun == 2
    clock.now += 1
    make.error = None
    make.values["made_at"] = clock.now
    assert (await ask(answers, make)).layer is Layer.L1
    await until(lambda: answers.count.refreshed == 1)


async def test_a_change_during_a_refresh_makes_it_anew(clock: Clock) -> None:
    world = World()
    answers = alone(world)
    make = Maker.at_once(world, made_at=clock.now, max_age=10.0)
    await ask(answers, make)
    for _ in range(module.HOT):
        assert answers.peek(BASE, "public", "")
    clock.now += 8.5
    make.gate.clear()
    await ask(answers, make)
    await begun(make, 2)
    world.change("models/1")
    assert answers.peek(BASE, "public", "") is None
    later = asyncio.create_task(ask(answers, make))
    await begun(make, 2)
    make.gate.set()
    served = await later
    assert served.entry is not None
    assert served.entry.position == world.position
    assert make.begun == 3


async def test_what_may_be_old_is_served_while_it_is_made_anew(clock: Clock) -> None:
    world = World()
    answers = alone(world)
    make = Maker.at_once(world, made_at=clock.now, max_age=10.0, stale=5.0)
    await ask(answers, make)
    clock.now += 12
    make.gate.clear()
    make.values["made_at"] = clock.now
    assert answers.peek(BASE, "public", "") is None
    for _ in range(3):
        assert (await ask(answers, make)).layer is Layer.STALE
    await begun(make, 2)
    assert (make.begun, answers.count.stale) == (2, 3)
    make.gate.set()
    await until(lambda: answers.count.refreshed == 1)
    assert (await ask(answers, make)).layer is Layer.L1
    # Not for longer than it may.
    clock.now += 15.5
    assert (await ask(answers, make)).layer is Layer.MISS


async def test_what_may_be_old_is_never_served_after_a_change(clock: Clock) -> None:
    world = World()
    answers = alone(world)
    make = Maker.at_once(world, made_at=clock.now, max_age=10.0, stale=5.0)
    await ask(answers, make)
    clock.now += 12
    world.change("models/1")
    assert (await ask(answers, make)).layer is Layer.MISS
    assert (make.begun, answers.count.stale) == (2, 0)


def test_what_an_entry_takes_is_counted() -> None:
    """All of it: body, tags, and the objects around them."""
    world = World()
    number = 500
    for tags, size in ((0, 100), (1, 100), (40, 4_000), (300, 20_000)):
        answers = Answers(world, None, 1 << 30)
        before_size = answers.count.sizes()[1]
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for each in range(number):
                kept = entry(
                    world,
                    body=b"x" * (size + each % 7),
                    position=(1_800_000_000 << 32) + each,
                    tags=frozenset(f"models/{each:012d}{tag:012d}" for tag in range(tags)),
                    cost=1_000 + each,
                    made_at=1e9 + each,
                    max_age=30.0 + each,
                    stale=1.0 + each,
                )
                assert answers._hold(
                    module._Asked(b"%032d" % each, "public", "", False), kept
                ) or not world.is_current(kept.position, kept.tags)
                del kept
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        entries, counted = answers.count.sizes()
        assert entries == number
        learned = sys.getsizeof(answers._learned) + number * 65  # bounded by their number
        ratio = (after - before - learned) / (counted - before_size)
        assert 0.6 < ratio <= 1.0, (tags, ratio)


def test_the_keys_that_are_learned_about_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LEARNED", 10)
    answers = alone(World())
    for number in range(100):
        answers._learn(b"%d" % number, Access.ANYBODY)
        assert len(answers._learned) <= 10
    assert answers._learned[b"99"] is Access.ANYBODY


# ---------- with Redis


@dataclass
class Process:
    answers: Answers
    cache: Cache
    metrics: Metrics
    world: World

    async def until_joined(self) -> None:
        shared = self.answers.shared
        assert shared is not None
        await until(lambda: not shared.is_closed)


@asynccontextmanager
async def process(
    settings: Settings, world: World, secret: bytes = SECRET
) -> AsyncIterator[Process]:
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(connect_cache(settings))
        metrics = Metrics()
        answers = await stack.enter_async_context(
            open_answers(cache, world, settings, secret, metrics)
        )
        yield Process(answers, cache, metrics, world)


@pytest.fixture
async def two(settings: Settings) -> AsyncIterator[tuple[Process, Process]]:
    """Two processes of one installation, in one world, with an empty Redis."""
    world = World()
    # The first connection takes a while on a busy machine; then nobody waits for Redis.
    settings = settings.model_copy(update={"cache_timeout_seconds": GUARD_SECONDS})
    async with process(settings, world) as one, process(settings, world) as other:
        await one.cache.redis.flushdb()
        for each in (one, other):
            await each.until_joined()
        yield one, other


async def kept_in_redis(one: Process) -> str:
    """The name of the one entry that is there, when it is."""
    async with asyncio.timeout(GUARD_SECONDS):
        while True:
            keys = await one.cache.redis.keys("*:answer:*")
            names = [each.decode() for each in keys if isinstance(each, bytes)]
            found = [each for each in names if not each.endswith(":lock")]
            if found and len(names) == len(found):
                assert len(found) == 1
                return found[0]
            await asyncio.sleep(0.001)


async def test_what_one_process_made_the_other_finds(two: tuple[Process, Process]) -> None:
    one, other = two
    make = Maker.at_once(
        one.world,
        body=b'{"data":"%b"}' % (b"abc" * 1_000),
        tags=frozenset({"models/1", "models.name@task:a\nb"}),
        access=Access.RIGHTS,
        stale=3.0,
        cost=7,
        viewed=(ObjectId(), ObjectId()),
    )
    first = await ask(one.answers, make)
    name = await kept_in_redis(one)
    assert 60_000 < await one.cache.redis.pttl(name) <= 63_000
    assert await one.cache.redis.strlen(name) < 500
    second = await ask(other.answers, make)
    assert (second.layer, second.made, make.begun) == (Layer.L2, None, 1)
    assert first.entry is not None
    assert second.entry is not None
    assert frozenset(second.entry.tags) == first.entry.tags
    assert second.entry == Entry(
        **{
            each: getattr(first.entry, each)
            for each in Entry.__dataclass_fields__
            if each != "tags"
        },
        tags=second.entry.tags,
    )
    assert (await ask(other.answers, make)).layer is Layer.L1
    assert (other.metrics.shared_answers.hits, other.metrics.shared_answers.misses) == (1, 0)
    entries, size = one.metrics.shared_answers.sizes()
    assert (entries, size) == (1, await one.cache.redis.strlen(name))


async def test_what_is_old_is_not_taken_from_redis(two: tuple[Process, Process]) -> None:
    one, other = two
    make = Maker.at_once(one.world)
    await ask(one.answers, make)
    await kept_in_redis(one)
    one.world.change("models/1")
    assert (await ask(other.answers, make)).layer is Layer.MISS
    assert other.metrics.shared_answers.invalidations == 1
    await until(lambda: other.metrics.shared_answers.sizes()[0] == 1)


async def test_an_answer_takes_the_place_of_one_with_another_access(
    two: tuple[Process, Process],
) -> None:
    """A model that was public is no more: what is anybody's would hide what is current."""
    one, other = two
    await ask(one.answers, Maker.at_once(one.world))
    before = await kept_in_redis(one)
    one.world.change("models/1")
    await ask(one.answers, Maker.at_once(one.world, access=Access.RIGHTS))
    async with asyncio.timeout(GUARD_SECONDS):
        while await kept_in_redis(one) == before:
            await asyncio.sleep(0.001)
    assert (await ask(other.answers, Maker.at_once(one.world))).layer is Layer.L2


async def test_two_processes_make_it_once(two: tuple[Process, Process]) -> None:
    one, other = two
    make, theirs = Maker(one.world), Maker.at_once(one.world)
    first = asyncio.create_task(ask(one.answers, make))
    await begun(make)
    second = asyncio.create_task(ask(other.answers, theirs))
    await asyncio.sleep(0.02)  # it has asked Redis, or will find it there
    make.gate.set()
    await first
    assert (await second).layer is Layer.L2
    assert (make.begun, theirs.begun) == (1, 0)


async def test_who_waits_too_long_for_another_process_makes_it(
    two: tuple[Process, Process],
) -> None:
    one, other = two
    make, theirs = Maker(one.world), Maker.at_once(one.world)
    first = asyncio.create_task(ask(one.answers, make))
    await begun(make)
    assert (await ask(other.answers, theirs)).layer is Layer.MISS
    make.gate.set()
    assert (await first).layer is Layer.MISS


async def test_what_fails_or_is_not_kept_gives_the_lock_back(two: tuple[Process, Process]) -> None:
    one, other = two
    failing = Maker.at_once(one.world)
    failing.error = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        await ask(one.answers, failing)
    unkept = Maker.at_once(one.world)
    unkept.keeps = False
    await ask(other.answers, unkept)
    async with asyncio.timeout(GUARD_SECONDS):
        while await one.cache.redis.keys("*"):
            await asyncio.sleep(0.001)


async def test_one_process_makes_anew_what_is_hot_in_both(
    two: tuple[Process, Process], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    monkeypatch.setattr(sharing, "time", clock)
    make = Maker.at_once(one.world, made_at=clock.now, max_age=1_000.0)
    await ask(one.answers, make)
    await kept_in_redis(one)
    for each in two:
        for _ in range(module.HOT + 1):
            await ask(each.answers, make)
    assert make.begun == 1
    clock.now += 900
    make.gate.clear()
    make.values["made_at"] = clock.now
    await ask(one.answers, make)
    await begun(make, 2)
    await ask(other.answers, make)
    await until(lambda: not other.answers._renewing)
    assert make.begun == 2
    make.gate.set()
    await until(lambda: not one.answers._renewing)
    assert one.answers.count.refreshed == 1
    # The other finds that in Redis, when it tries again.
    clock.now += 60
    for _ in range(3):
        await ask(other.answers, make)
        await until(lambda: not other.answers._renewing)
    found = other.answers.peek(BASE, "public", "")
    assert found is not None
    assert found.made_at == clock.now - 60
    assert make.begun == 2


def sealed(name: str, content: bytes, secret: bytes = SECRET) -> bytes:
    seal = Seal(secret, 1 << 24)
    return seal._seal(name, content) + content


def forged(name: str, **change: int) -> bytes:
    """As somebody would write it who knew the secret, with a length that is not so."""
    body = zstandard.ZstdCompressor().compress(bytes(10_000_000))
    length, viewed = change.get("length", 10), change.get("viewed", 0)
    head = _HEAD.pack(VERSION, True, 0, False, 1, 1e12, 1e12, 0.0, 0, length, 2, viewed)
    return sealed(name, head + b"[]" + body)


POISON: dict[str, Callable[[str, bytes], bytes]] = {
    "one byte": lambda name, value: b"x",
    "text": lambda name, value: b'{"data":{"viewer":{"login":"mallory"}}}' * 10,
    "pickle": lambda name, value: b"cos\nsystem\n(S'touch /tmp/x'\ntR." * 10,
    "broken off": lambda name, value: value[:-1],
    "its head alone": lambda name, value: value[: _SEAL_BYTES + _HEAD.size],
    "longer": lambda name, value: value + b"x",
    "one bit": lambda name, value: value[:-1] + bytes([value[-1] ^ 1]),
    "another seal": lambda name, value: bytes(_SEAL_BYTES) + value[_SEAL_BYTES:],
    "no key": lambda name, value: (
        blake2b(name.encode() + value[_SEAL_BYTES:], digest_size=_SEAL_BYTES).digest()
        + value[_SEAL_BYTES:]
    ),
    "another installation": lambda name, value: sealed(name, value[_SEAL_BYTES:], b"other"),
    "another name": lambda name, value: sealed(f"{name}x", value[_SEAL_BYTES:]),
    "another version": lambda name, value: sealed(name, b"mh1\0" + value[_SEAL_BYTES + 4 :]),
    "a bomb": lambda name, value: forged(name),
    "a bomb that says so": lambda name, value: forged(name, length=10_000_000),
    "more models than there are": lambda name, value: forged(name, viewed=65_535),
    "too large": lambda name, value: bytes(sharing.MOST_BYTES + 1),
}


@pytest.mark.parametrize("poison", POISON)
async def test_what_is_poisoned_is_dropped_and_counted_and_never_served(
    two: tuple[Process, Process], poison: str
) -> None:
    one, other = two
    await ask(one.answers, Maker.at_once(one.world))
    name = await kept_in_redis(one)
    value = await one.cache.redis.get(name)
    assert isinstance(value, bytes)
    if poison == "a bomb that says so":
        assert other.answers.shared is not None
        other.answers.shared.seal._most_bytes = 1_000_000
    await one.cache.redis.set(name, POISON[poison](name, value))
    make = Maker(one.world, {"body": b'{"data":2}'})
    asking = asyncio.create_task(ask(other.answers, make))
    await begun(make)
    await until(lambda: other.answers.shared is not None and not other.answers.shared._waiting)
    assert other.metrics.shared_answers.poisoned == 1
    async with asyncio.timeout(GUARD_SECONDS):
        while await one.cache.redis.exists(name):
            await asyncio.sleep(0.001)
    make.gate.set()
    served = await asking
    assert (served.layer, served.entry and served.entry.body) == (Layer.MISS, b'{"data":2}')
    # And what was made lies there again.
    assert await kept_in_redis(one) == name
    third = await one.cache.redis.get(name)
    assert isinstance(third, bytes)
    assert Seal(SECRET, 1 << 24).open(name, third)


async def test_a_value_of_another_kind_is_dropped(two: tuple[Process, Process]) -> None:
    one, other = two
    await ask(one.answers, Maker.at_once(one.world))
    name = await kept_in_redis(one)
    await one.cache.redis.delete(name)
    await one.cache.redis.rpush(name, "x")
    assert (await ask(other.answers, Maker.at_once(one.world))).layer is Layer.MISS
    assert other.metrics.shared_answers.poisoned == 1
    assert await kept_in_redis(one) == name


async def test_the_value_of_another_key_is_dropped(two: tuple[Process, Process]) -> None:
    """Whoever can write to Redis cannot give one the answer that another may see."""
    one, other = two
    await ask(one.answers, Maker.at_once(one.world, access=Access.VIEWER), *ANN)
    of_ann = await kept_in_redis(one)
    value = await one.cache.redis.get(of_ann)
    await one.cache.redis.flushdb()
    await ask(one.answers, Maker.at_once(one.world, access=Access.VIEWER), *BOB)
    of_bob = await kept_in_redis(one)
    assert of_ann != of_bob
    await one.cache.redis.set(of_bob, value or b"")
    served = await ask(other.answers, Maker.at_once(one.world, access=Access.VIEWER), *BOB)
    assert (served.layer, other.metrics.shared_answers.poisoned) == (Layer.MISS, 1)


async def test_another_installation_finds_nothing(
    two: tuple[Process, Process], settings: Settings
) -> None:
    one, _ = two
    await ask(one.answers, Maker.at_once(one.world))
    await kept_in_redis(one)
    async with process(settings, one.world, b"another secret") as foreign:
        served = await ask(foreign.answers, Maker.at_once(one.world))
        assert (served.layer, foreign.metrics.shared_answers.poisoned) == (Layer.MISS, 0)
    other = settings.model_copy(update={"mongo_database": "another"})
    async with process(other, one.world) as foreign:
        assert (await ask(foreign.answers, Maker.at_once(one.world))).layer is Layer.MISS


async def test_scripts_that_redis_forgot_are_sent_again(two: tuple[Process, Process]) -> None:
    one, other = two
    for _ in range(2):
        await one.cache.redis.script_flush()
        make = Maker.at_once(one.world)
        assert (await ask(one.answers, make)).layer is Layer.MISS
        await kept_in_redis(one)
        await one.cache.redis.script_flush()
        assert (await ask(other.answers, make)).layer is Layer.L2
        one.world.change("models/1")


async def test_many_look_ups_at_once_go_together(two: tuple[Process, Process]) -> None:
    one, other = two
    make = Maker.at_once(one.world)
    bases = [b"%032d" % number for number in range(300)]
    for answers in (one.answers, other.answers):
        async with asyncio.timeout(GUARD_SECONDS):
            await asyncio.gather(
                *[answers.answer(base, "public", "", False, make) for base in bases]
            )
        assert answers.shared is not None
        while answers.shared._waiting:
            await asyncio.sleep(0.001)
    assert make.begun == 300
    assert other.metrics.shared_answers.hits == 300
    info = await one.cache.redis.info("clients")
    assert info["connected_clients"] < 12


async def test_without_redis_answers_are_made_and_kept_in_the_process(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    world = World()
    async with process(nowhere, world) as one:
        make = Maker.at_once(world)
        assert (await ask(one.answers, make)).layer is Layer.MISS
        assert one.answers.peek(BASE, "public", "")
        assert one.answers.shared is not None
        assert one.answers.shared.is_closed
        world.change("models/1")
        assert (await ask(one.answers, make)).layer is Layer.MISS


async def test_a_redis_that_does_not_answer_is_left_alone(
    engines: Engines, settings: Settings
) -> None:
    """Through a wire that is cut without an end: nothing comes back any more."""
    goes_on = asyncio.Event()
    goes_on.set()
    connections = 0
    address = urlsplit(engines.redis_url)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await goes_on.wait()
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        back, there = await asyncio.open_connection(address.hostname, address.port)
        await asyncio.gather(carry(reader, there), carry(back, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    behind = settings.model_copy(
        update={
            "redis_url": f"redis://127.0.0.1:{port}{address.path}",
            "cache_timeout_seconds": 1.0,
        }
    )
    world = World()
    async with server, process(behind, world) as one:
        shared = one.answers.shared
        assert shared is not None
        await until(lambda: not shared.is_closed)
        make = Maker.at_once(world)
        bases = [b"%032d" % number for number in range(50)]
        goes_on.clear()
        await asyncio.gather(
            *[one.answers.answer(base, "public", "", False, make) for base in bases]
        )
        assert (make.begun, connections) == (50, 1)
        assert shared.is_closed
        # Who comes now does not ask it at all.
        world.change("models/1")
        for base in bases:
            served = await one.answers.answer(base, "public", "", False, make)
            assert served.layer is Layer.MISS
        assert shared._waiting == deque()
        goes_on.set()
        await until(lambda: not shared.is_closed)
        world.change("models/1")
        await one.answers.answer(bases[0], "public", "", False, make)
        await until(lambda: shared.sizes()[0] == 1)


async def test_an_answer_that_is_too_large_for_redis_stays_in_the_process(
    two: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    monkeypatch.setattr(sharing, "MOST_BYTES", 50)
    make = Maker.at_once(one.world)
    await ask(one.answers, make)
    assert (await ask(other.answers, make)).layer is Layer.MISS
    assert one.answers.peek(BASE, "public", "")


async def test_a_clock_that_goes_ahead_does_not_make_answers_live_longer(
    two: tuple[Process, Process], clock: Clock
) -> None:
    one, other = two
    ahead = Maker.at_once(one.world, made_at=clock.now + 1_000, max_age=10.0)
    served = await ask(one.answers, ahead)
    assert served.entry is not None
    assert one.answers.shared is not None
    names = module._Names(one.answers.shared, module._Asked(BASE, "public", "", False))
    value = one.answers.shared.seal.close(names.all[0], served.entry)
    await one.cache.redis.set(names.all[0], value)
    found = await ask(other.answers, ahead)
    assert found.entry is not None
    assert (found.layer, found.entry.made_at) == (Layer.L2, clock.now)


async def test_what_they_did_is_shown(two: tuple[Process, Process]) -> None:
    one, _ = two
    await ask(one.answers, Maker.at_once(one.world))
    await ask(one.answers, Maker.at_once(one.world))
    assert [one.answers.count.layer, one.answers.shared_count.layer] == ["l1", "l2"]
    shown = one.metrics.shown().decode()
    assert 'modelharbor_cache_hits_total{layer="l1"} 1.0' in shown
    assert 'modelharbor_cache_misses_total{layer="l1"} 1.0' in shown
    assert 'modelharbor_cache_entries{layer="l1"} 1.0' in shown


# ---- with MongoDB, and changes as they are heard of


@dataclass
class Reader:
    """A process that keeps answers of one document: the number in it."""

    database: Database
    answers: Answers
    freshness: Freshness
    model_id: Any
    is_usable: int = 0

    async def make(self) -> Made:
        position = self.freshness.position
        [row] = await self.database.find("models", {"_id": self.model_id})
        tags = frozenset({entity("models", self.model_id)})
        body = b"%d" % row["revision"]
        kept = Entry(body, position, tags, Access.ANYBODY, time.time(), 30.0)
        return Made(row["revision"], kept)

    async def number(self) -> int:
        """As a request asks for it."""
        if not await self.freshness.ready():
            return int((await self.make()).answer)
        self.is_usable += 1
        found = self.answers.peek(BASE, "public", "")
        if found is None:
            served = await self.answers.answer(BASE, "public", "", False, self.make)
            if served.made is not None:
                return int(served.made.answer)
            found = served.entry
        assert found is not None
        return int(found.body)


async def test_no_acknowledged_write_is_followed_by_an_old_answer(
    database: Database, settings: Settings
) -> None:
    """Through two processes, with reads all the time, and writes through each of them."""
    settings = settings.model_copy(
        update={"response_cache": True, "cache_timeout_seconds": GUARD_SECONDS}
    )
    model = await insert_model(await insert_actor("ann"), "m")
    acknowledged = 0
    reads: list[tuple[int, int]] = []
    async with AsyncExitStack() as stack:
        readers = []
        for _ in range(2):
            cache = await stack.enter_async_context(connect_cache(settings))
            freshness = await stack.enter_async_context(open_freshness(database, cache, settings))
            answers = await stack.enter_async_context(
                open_answers(cache, freshness, settings, SECRET, Metrics())
            )
            readers.append(Reader(database, answers, freshness, model.id))
        await cache.redis.flushdb()
        async with asyncio.timeout(GUARD_SECONDS):
            for reader in readers:
                while not await reader.freshness.ready():
                    await asyncio.sleep(0.01)

        async def write(number: int) -> None:
            nonlocal acknowledged
            count = CommandCount()
            token = counted.set(count)
            try:
                await database.data["models"].update_one(
                    {"_id": model.id}, {"$set": {"revision": number}}
                )
            finally:
                counted.reset(token)
            await readers[number % 2].freshness.acknowledge(count.wrote)
            acknowledged = number

        async def read(reader: Reader) -> None:
            while acknowledged < 40:
                before = acknowledged
                reads.append((before, await reader.number()))
                await asyncio.sleep(0)

        reading = [asyncio.create_task(read(reader)) for reader in readers for _ in range(5)]
        try:
            for number in range(1, 41):
                await write(number)
                await asyncio.sleep(0.005 * (number % 4))
            async with asyncio.timeout(GUARD_SECONDS):
                await asyncio.gather(*reading)
        finally:
            for task in reading:
                task.cancel()
        assert [(before, found) for before, found in reads if found < before] == []
        # It was no test of computing alone.
        assert sum(reader.answers.count.hits for reader in readers) > len(reads) // 4
        assert all(reader.is_usable and reader.answers.count.invalidations for reader in readers)
        # What is written past the API is heard of soon.
        await database.data["models"].update_one({"_id": model.id}, {"$set": {"revision": 99}})
        async with asyncio.timeout(2.0):  # the promise, many times what it takes
            for reader in readers:
                while await reader.number() != 99:
                    await asyncio.sleep(0.001)


async def test_whoever_may_not_make_it_leaves_it_to_one_other() -> None:
    world = World()
    answers, made = Answers(world, None, CAPACITY), 0

    async def spent() -> Made:
        await asyncio.sleep(0.01)
        raise RateLimited("spent")

    async def make() -> Made:
        nonlocal made
        made += 1
        await asyncio.sleep(0.02)
        return Made(1, entry(world))

    first = asyncio.create_task(answers.answer(b"k", "public", "", False, spent))
    await asyncio.sleep(0)
    others = [
        asyncio.create_task(answers.answer(b"k", "public", "", False, make)) for _ in range(50)
    ]
    found = await asyncio.gather(*others)
    with pytest.raises(RateLimited):
        await first
    assert made == 1
    assert {each.entry.body for each in found if each.entry is not None} == {entry(world).body}
