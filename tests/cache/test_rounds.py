"""Round trips that requests share: who goes with which, and what becomes of those who wait."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from modelharbor.cache.rounds import Rounds, running
from modelharbor.dev.engines import Child
from modelharbor.settings import Settings
from tests.faults.engines import redis_server
from tests.http.processes import free_port

from .processes import until

pytestmark = pytest.mark.anyio


class Notes:
    """A part that has its number echoed, and notes what went with which round trip."""

    def __init__(self) -> None:
        self.sent = 0
        self.replies: list[list[Any]] = []
        self.failures = 0
        self.command: tuple[Any, ...] | None = None

    def commands(self, pipeline: Any) -> int:
        self.sent += 1
        pipeline.execute_command("ECHO", self.sent)
        if self.command is not None:
            pipeline.execute_command(*self.command)
        return 1 if self.command is None else 2

    def answered(self, replies: list[Any]) -> None:
        self.replies.append(replies)

    def failed(self) -> None:
        self.failures += 1


class Silent(Notes):
    def commands(self, pipeline: Any) -> int:
        return 0


@asynccontextmanager
async def rounds_of(settings: Settings, *parts: Notes) -> AsyncIterator[Rounds]:
    async with running(Rounds(settings, parts)) as rounds:
        await until(lambda: not rounds.is_open)
        yield rounds


@pytest.fixture
def patient(settings: Settings) -> Settings:
    return settings.model_copy(update={"cache_timeout_seconds": 5.0})


@pytest.fixture
async def own_redis(tmp_path: Path) -> AsyncIterator[tuple[str, Child]]:
    folder, port = tmp_path / "redis", free_port()
    folder.mkdir()
    async with AsyncExitStack() as stack:
        child = await stack.enter_async_context(redis_server(folder, port))
        yield f"redis://127.0.0.1:{port}/0", child
        child.process.send_signal(signal.SIGCONT)


async def test_who_waits_at_the_same_time_goes_together(patient: Settings) -> None:
    notes = Notes()
    async with rounds_of(patient, notes) as rounds:
        assert await asyncio.gather(*[rounds.next() for _ in range(200)]) == [True] * 200
        assert notes.replies == [[b"1"]]
        assert (await rounds.next(), rounds.done) == (True, 2)


async def test_nobody_goes_with_one_that_was_sent_before(patient: Settings) -> None:
    """Whoever comes while one is under way has the answer of the next: what it asked for is newer."""
    notes = Notes()
    async with rounds_of(patient, notes) as rounds:
        for _ in range(200):
            first = asyncio.create_task(rounds.next())
            sent = notes.sent
            while notes.sent == sent:
                await asyncio.sleep(0)
            late = asyncio.create_task(rounds.next())
            await first
            before = len(notes.replies)
            await late
            assert len(notes.replies) == before + 1
            assert notes.replies[-1] == [b"%d" % (sent + 2)]


async def test_who_is_cancelled_takes_nobody_along(patient: Settings) -> None:
    notes = Notes()
    async with rounds_of(patient, notes) as rounds:
        for _ in range(50):
            some = [asyncio.create_task(rounds.next()) for _ in range(10)]
            sent = notes.sent
            while notes.sent == sent:
                await asyncio.sleep(0)
            some += [asyncio.create_task(rounds.next()) for _ in range(10)]
            await asyncio.sleep(0)
            for each in some[::2]:
                each.cancel()
            found = await asyncio.gather(*some, return_exceptions=True)
            assert found[1::2] == [True] * 10
            assert all(isinstance(each, asyncio.CancelledError) for each in found[::2])


async def test_answers_go_to_the_part_that_asked(patient: Settings) -> None:
    one, other, silent = Notes(), Notes(), Silent()
    one.command = ("NONSENSE",)
    other.command = ("EVAL", "return {1, ARGV[1]}", 0, "x")
    async with rounds_of(patient, one, silent, other) as rounds:
        assert await rounds.next()
        [[number, refused]] = one.replies
        assert number == b"1"
        assert isinstance(refused, ResponseError)
        assert other.replies == [[b"1", [1, b"x"]]]
        assert silent.replies == []


async def test_without_commands_nothing_is_sent(patient: Settings) -> None:
    async with rounds_of(patient, Silent()) as rounds:
        assert await asyncio.gather(*[rounds.next() for _ in range(3)]) == [True] * 3
        assert rounds.done == 0


async def test_a_server_that_hangs_costs_those_who_wait_the_time_it_has(
    settings: Settings, own_redis: tuple[str, Child]
) -> None:
    url, child = own_redis
    notes = Notes()
    async with rounds_of(settings.model_copy(update={"redis_url": url}), notes) as rounds:
        assert await rounds.next()
        child.process.send_signal(signal.SIGSTOP)
        first = [asyncio.create_task(rounds.next()) for _ in range(5)]
        sent = notes.sent
        while notes.sent == sent:
            await asyncio.sleep(0)
        late = [asyncio.create_task(rounds.next()) for _ in range(5)]
        assert await asyncio.gather(*first, *late) == [False] * 10
        assert (rounds.is_open, notes.failures, notes.sent) == (True, 1, 2)
        # Nothing is sent for those who come now.
        assert not await rounds.next()
        assert notes.sent == 2
        child.process.send_signal(signal.SIGCONT)
        await until(lambda: not rounds.is_open)
        assert await rounds.next()
        # The answer that came late was nobody's.
        assert notes.replies[-1] == [b"3"]


async def test_a_process_that_was_late_itself_takes_the_answer_all_the_same(
    settings: Settings,
) -> None:
    """Longer than Redis has, and the answer is here when it looks."""
    notes = Notes()
    async with rounds_of(settings, notes) as rounds:
        waiting = asyncio.create_task(rounds.next())
        sent = notes.sent
        while notes.sent == sent:
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        until_time = loop.time() + 4 * settings.cache_timeout_seconds
        while loop.time() < until_time:
            pass
        assert await waiting
        assert notes.failures == 0


async def test_a_connection_that_breaks_is_replaced(
    patient: Settings, own_redis: tuple[str, Child]
) -> None:
    url, child = own_redis
    notes = Notes()
    async with rounds_of(patient.model_copy(update={"redis_url": url}), notes) as rounds:
        assert await rounds.next()
        notes.command = ("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
        assert await rounds.next()
        notes.command = None
        # It is seen when it is used.
        assert not await rounds.next()
        await until(lambda: not rounds.is_open)
        assert await rounds.next()
        child.process.kill()
        child.process.wait()
        assert not await rounds.next()


async def test_a_connection_is_used_once_it_has_recovered(patient: Settings) -> None:
    """And is replaced when somebody doubts it."""
    notes, recovered, may = Notes(), [], asyncio.Event()

    async def recover(send: Any) -> None:
        recovered.append(await send("ECHO", "r"))
        await may.wait()
        if len(recovered) == 2:
            raise OSError("not now")

    async with running(Rounds(patient, (notes,), recover)) as rounds:
        await until(lambda: recovered == [b"r"])
        assert not await rounds.next()
        may.set()
        await until(lambda: not rounds.is_open)
        assert await rounds.next()
        rounds.doubt()
        assert not await rounds.next()
        await until(lambda: not rounds.is_open)
        assert recovered == [b"r"] * 3
        assert await rounds.next()
        waiting = asyncio.create_task(rounds.next())
        await asyncio.sleep(0)
        rounds.doubt()
        assert not await waiting


async def test_the_end_of_it_lets_everybody_go(patient: Settings) -> None:
    async with rounds_of(patient, Notes()) as rounds:
        waiting = [asyncio.create_task(rounds.next()) for _ in range(3)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*waiting) in ([True] * 3, [False] * 3)
    assert not await rounds.next()
