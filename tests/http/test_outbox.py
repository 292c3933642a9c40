"""What waits for one client: in order, bounded, and given up when it takes nothing."""

import asyncio

import pytest

from modelharbor.http import outbox as module
from modelharbor.http.outbox import Outbox

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 20.0  # against a hang
SHORT_SECONDS = 0.05


class Line:
    """A connection that takes messages while it is free."""

    def __init__(self, most: int = 3, patience: float = GUARD_SECONDS) -> None:
        self.sent: list[bytes] = []
        self.stuck = self.cancelled = 0
        self.fails = False
        self.free = asyncio.Event()
        self.outbox = Outbox(self.send, most, patience, self.be_stuck)

    async def send(self, message: bytes) -> None:
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails:
            raise OSError("The connection is gone.")
        self.sent.append(message)

    def be_stuck(self) -> None:
        self.stuck += 1

    def put(self, *messages: bytes | tuple[bytes, str]) -> None:
        """Texts, and (text, key)."""
        for each in messages:
            if isinstance(each, tuple):
                self.outbox.put(*each)
            else:
                self.outbox.put(each)

    async def drain(self) -> list[bytes]:
        self.free.set()
        async with asyncio.timeout(GUARD_SECONDS):
            await self.outbox.drained()
        return self.sent


async def is_waiting(task: asyncio.Task[None]) -> bool:
    await asyncio.wait([task], timeout=SHORT_SECONDS)
    return not task.done()


async def test_messages_are_sent_in_order_and_at_once_where_they_can_be() -> None:
    line = Line()
    line.free.set()
    line.put(b"1", b"2")
    assert line.sent == [b"1", b"2"]
    line.free.clear()
    line.put(*[b"%d" % number for number in range(3, 12)])
    assert line.sent == [b"1", b"2"]
    assert await line.drain() == [b"%d" % number for number in range(1, 12)]
    line.put(b"12")
    assert line.sent[-1] == b"12"


async def test_the_short_way_is_not_taken_past_what_waits() -> None:
    line, taken, takes = Line(), [], True

    def at_once(message: bytes) -> bool:
        if takes:
            taken.append(message)
        return takes

    line.outbox = Outbox(line.send, 3, GUARD_SECONDS, line.be_stuck, at_once)
    line.put(b"1")
    takes = False
    line.put(b"2")
    takes = True
    line.put(b"3")
    assert (taken, await line.drain()) == ([b"1"], [b"2", b"3"])
    line.put(b"4")
    assert taken == [b"1", b"4"]


async def test_a_newer_one_of_a_key_takes_the_place_of_an_older_one_that_waits() -> None:
    line = Line(most=100)
    line.put((b"a1", "a"), (b"a2", "a"), (b"b1", "b"), b"state", (b"a3", "a"), (b"a4", "a"))
    assert await line.drain() == [b"a1", b"b1", b"state", b"a4"]  # a1 was on its way


async def test_of_too_many_the_oldest_that_may_be_left_out_goes() -> None:
    line = Line(most=3)
    line.put(b"0", (b"a", "a"), (b"b", "b"), b"1", (b"c", "c"), b"2")
    assert len(line.outbox._waiting) == 3
    line.put(b"3", b"4", b"5")
    assert await line.drain() == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert line.stuck == 0
    line.free.clear()
    line.put(b"6", (b"a", "a"), (b"b", "b"), (b"c", "c"), (b"d", "d"))
    assert await line.drain() == [*(b"%d" % n for n in range(7)), b"b", b"c", b"d"]


async def test_who_lets_too_many_wait_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 4)
    line = Line()
    line.put(b"0", b"1", b"2", b"3", b"4")
    await asyncio.sleep(0)
    assert (line.stuck, line.outbox.is_ended) == (0, False)
    line.put(b"5")
    assert (line.stuck, line.outbox.is_ended) == (1, True)
    line.put(b"6", b"7")
    await asyncio.sleep(0)
    assert await line.drain() == []
    assert (line.stuck, line.cancelled, line.outbox._waiting) == (1, 1, [])


async def test_who_lets_too_much_wait_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SIZE", 10)
    line = Line(most=100)
    line.put(b"0", b"1" * 4, (b"a" * 6, "a"), (b"b" * 6, "a"), (b"c" * 5, "a"))  # one of each key
    assert (line.stuck, line.outbox._size) == (0, 9)
    line.put(b"2" * 6)  # beside the largest, 9 again
    assert (line.stuck, line.outbox._size) == (0, 15)
    line.put(b"33")
    assert (line.stuck, line.outbox.is_ended) == (1, True)


async def test_one_message_may_be_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SIZE", 10)
    line = Line()
    line.put(b"0", b"1" * 50)
    assert await line.drain() == [b"0", b"1" * 50]
    line.free.clear()
    line.put(b"2" * 50, b"3" * 50)  # one on its way, and one that waits
    assert (await line.drain())[2:] == [b"2" * 50, b"3" * 50]
    assert line.stuck == 0


async def test_the_word_that_an_answer_was_all_may_wait_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_SIZE", 10)
    line = Line()
    line.put(b"0", b"1" * 50, b"done")
    assert await line.drain() == [b"0", b"1" * 50, b"done"]


async def test_who_takes_nothing_for_too_long_is_given_up() -> None:
    line = Line(patience=SHORT_SECONDS)
    line.put(b"1", b"2")
    async with asyncio.timeout(GUARD_SECONDS):
        await line.outbox.drained()
    assert (line.stuck, line.cancelled, line.outbox.is_ended) == (1, 1, True)
    assert await line.drain() == []


async def test_there_is_room_while_less_waits_than_would_be_left_out() -> None:
    line = Line(most=2)
    await line.outbox.room()
    line.put(b"0", b"1")
    await line.outbox.room()
    line.put(b"2")
    waiting = asyncio.create_task(line.outbox.room())
    assert await is_waiting(waiting)
    line.free.set()
    async with asyncio.timeout(GUARD_SECONDS):
        await waiting
    await line.drain()
    line.free.clear()
    line.put(b"3", b"4", b"5")
    waiting = asyncio.create_task(line.outbox.room())
    assert await is_waiting(waiting)
    line.outbox.end()
    async with asyncio.timeout(GUARD_SECONDS):
        await waiting


async def test_it_is_drained_when_nothing_waits_or_nobody_takes_it() -> None:
    line = Line()
    await line.outbox.drained()
    for end in (line.free.set, line.outbox.end):
        line.free.clear()
        line.put(b"1", b"2")
        waiting = asyncio.create_task(line.outbox.drained())
        assert await is_waiting(waiting)
        end()
        async with asyncio.timeout(GUARD_SECONDS):
            await waiting
        assert line.sent == [b"1", b"2"]


async def test_its_end_ends_what_is_being_sent() -> None:
    line = Line()
    line.put(b"1", b"2")
    await asyncio.sleep(0)
    line.outbox.end()
    line.outbox.end()
    await asyncio.sleep(0)
    assert await line.drain() == []
    assert (line.cancelled, line.stuck, line.outbox._sending) == (1, 0, None)
    line.put(b"3")
    assert line.sent == []


@pytest.mark.parametrize("is_free", [True, False])
async def test_a_connection_that_is_gone_ends_it(is_free: bool) -> None:
    """Whether it is found out at once or later; nobody who puts something has to know."""
    line = Line()
    line.fails = True
    if is_free:
        line.free.set()
    line.put(b"1", b"2")
    assert await line.drain() == []
    line.put(b"3")
    assert (line.outbox.is_ended, line.stuck, line.sent) == (True, 0, [])
