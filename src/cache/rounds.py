"""Round trips to Redis that requests share: whoever waits goes with the next one, and none is ever late.

A request never goes with a round trip that was sent before it came, so what comes back is as new as
the request. Redis has so much time for one and no more: then the way is closed, and everybody goes on
without at once, until a task that nobody waits for has found Redis again.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from typing import Any, Final, Protocol

from pymongo.errors import PyMongoError
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from modelharbor.db.ending import ended
from modelharbor.observability.logging import log_event
from modelharbor.settings import Settings

log = logging.getLogger(__name__)
PAUSE_SECONDS: Final = (0.25, 1.0)
"""Between two tries to find Redis again, at random: processes do not come all at once."""
LATE_SECONDS: Final = 0.002
Send = Callable[..., Awaitable[Any]]
"""One command, its answer."""


class Commands:
    """What goes with one round trip."""

    __slots__ = ("sent",)

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def execute_command(self, *command: Any) -> None:
        self.sent.append(command)


class Part(Protocol):
    """Who has something to ask with every round trip."""

    def commands(self, pipeline: Any) -> int:
        """Add commands (`execute_command`); how many."""

    def answered(self, replies: list[Any]) -> None:
        """The answers to them, as they come; a refused command's is a ResponseError."""

    def failed(self) -> None:
        """They may have arrived or not. Before those who wait are told."""


class Rounds:
    """One connection, on which one round trip follows the other as long as somebody waits."""

    def __init__(
        self,
        settings: Settings,
        parts: tuple[Part, ...],
        recover: Callable[[Send], Awaitable[None]] | None = None,
    ) -> None:
        """`recover` is done on each new connection, before anybody uses it; it may raise."""
        self._parts, self._recover = parts, recover
        self._seconds = settings.cache_timeout_seconds
        self._patience = settings.redis_timeout_seconds
        self._pool: ConnectionPool = ConnectionPool.from_url(
            settings.redis_url,
            protocol=2,  # nothing is pushed that nobody asked for
            socket_timeout=None,  # the whole round trip has its time
            socket_connect_timeout=settings.redis_timeout_seconds,
            retry=Retry(NoBackoff(), 0),
        )
        self.is_open = True
        """As a breaker is: nothing flows."""
        self.done = self.failures = 0
        self._waiting: list[asyncio.Future[bool]] = []
        self._in_flight: list[asyncio.Future[bool]] = []
        self._wanted: asyncio.Future[None] | None = None
        self._connection: AbstractConnection | None = None
        self._is_taking = self._is_doubted = False
        self._why = ""

    async def next(self) -> bool:
        """Wait for a round trip that begins now or later: whether it was answered. False at once while
        Redis is away."""
        if self.is_open:
            return False
        loop = asyncio.get_running_loop()
        # One for each: who is cancelled takes nobody along.
        mine: asyncio.Future[bool] = loop.create_future()
        self._waiting.append(mine)
        if self._wanted is not None:
            self._wake()
        return await mine

    def doubt(self) -> None:
        """What the connection says is not to be trusted any more: begin anew with another one."""
        self._is_doubted = True
        if not self._is_taking:
            self._shut()

    async def run(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        while True:
            joined = None
            try:
                await self._join()
                joined = loop.time()
                while not self.is_open:
                    await self._round()
                why = "it is not trusted"
            except (RedisError, OSError, TimeoutError, PyMongoError) as error:
                why = repr(error)
            except Exception:
                log.exception("cache.round_failed")
                why = "a fault of its own"
            finally:
                self._shut()
                await self._disconnect()
            # Of tries that fail alike only the first is told.
            if why != self._why or joined is not None:
                log_event(log, logging.WARNING, "cache.left", error=why)
            self._why = why
            # One that lasted and broke is replaced at once.
            if joined is None or loop.time() - joined < PAUSE_SECONDS[1]:
                await asyncio.sleep(random.uniform(*PAUSE_SECONDS))

    async def _join(self) -> None:
        made: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        connection = self._connection = made
        async with asyncio.timeout(self._patience):
            await connection.connect()  # type: ignore[no-untyped-call]  # as above

        async def send(*command: Any) -> Any:
            [reply] = await self._ask(connection, [command])
            if isinstance(reply, Exception):
                raise reply
            return reply

        # As quick as it has to be afterwards.
        await send("PING")
        if self._recover is not None:
            await self._recover(send)
        self.is_open = self._is_doubted = self._is_taking = False
        log_event(log, logging.INFO, "cache.joined")

    async def _round(self) -> None:
        if not self._waiting:
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        connection = self._connection
        if connection is None or self.is_open:
            return
        # From here to the first byte nothing is awaited: who comes later goes with the next.
        self._in_flight, self._waiting = self._waiting, []
        commands = Commands()
        counts = [part.commands(commands) for part in self._parts]
        if commands.sent:
            replies = await self._ask(connection, commands.sent)
            if self.is_open:
                return
            start, self._is_taking = 0, True
            for part, count in zip(self._parts, counts, strict=True):
                if count:
                    part.answered(replies[start : start + count])
                    start += count
            self._is_taking = False
            self.done += 1
            if self._is_doubted:
                self._shut()
        self._settle(True)

    async def _ask(
        self, connection: AbstractConnection, commands: list[tuple[Any, ...]]
    ) -> list[Any]:
        """The answers to commands that are sent together, in time."""
        watch = _Watch(self._seconds, self._shut)
        try:
            await connection.send_packed_command(
                connection.pack_commands(commands), check_health=False
            )
            replies: list[Any] = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
            return replies
        except asyncio.CancelledError:
            if watch.has_ended and watch.task.uncancel() == 0:
                raise TimeoutError(f"no answer within {self._seconds} s") from None
            raise
        finally:
            watch.stop()

    def _settle(self, is_answered: bool) -> None:
        in_flight, self._in_flight = self._in_flight, []
        for each in in_flight:
            if not each.done():
                each.set_result(is_answered)

    def _shut(self) -> None:
        """Everybody goes on without."""
        if not self.is_open:
            self.is_open = True
            self.failures += 1
            for part in self._parts:
                part.failed()
        self._settle(False)
        self._in_flight, self._waiting = self._waiting, []
        self._settle(False)
        self._wake()

    def _wake(self) -> None:
        wanted, self._wanted = self._wanted, None
        if wanted is not None and not wanted.done():
            wanted.set_result(None)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(RedisError, OSError, TimeoutError):
                await connection.disconnect(nowait=True)


class _Watch:
    """Ends what the current task waits for when its time is over.

    Not at the first moment: where this process itself was late, the answer may be here already, and
    is taken first.
    """

    __slots__ = ("_handle", "_loop", "_shut", "has_ended", "task")

    def __init__(self, seconds: float, shut: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self.task, self._shut, self.has_ended = task, shut, False
        self._handle: asyncio.Handle = self._loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._handle = self._loop.call_later(LATE_SECONDS, self._later)

    def _later(self) -> None:
        self._handle = self._loop.call_soon(self._end)

    def _end(self) -> None:
        self.has_ended = True
        self._shut()
        self.task.cancel()

    def stop(self) -> None:
        self._handle.cancel()


@asynccontextmanager
async def running(rounds: Rounds) -> AsyncIterator[Rounds]:
    # In a context of its own: it serves all operations and belongs to none.
    task = asyncio.get_running_loop().create_task(rounds.run(), context=Context())
    try:
        yield rounds
    finally:
        await ended(task)
