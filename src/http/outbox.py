"""What waits to be sent on one connection: bounded, and never in the way of other connections."""

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable
from typing import Any

MOST_WAITING, MOST_SIZE = 1024, 4 * 1024 * 1024
"""Messages, and their bytes, that may wait for one client: beyond it counts as stuck."""
ROOM_SECONDS = 0.02  # between two looks whether there is room


class Outbox:
    """Sends messages one after the other, as fast as the client takes them.

    Those with a key may be left out: when more than `most` wait, or an older one of the same key
    does, the newest of each key is what remains. A client that takes nothing for `patience` seconds,
    or for whom too much waits that may not be left out, is given up: `stuck` is called once.

    `at_once`: sends a message without waiting, or answers False; without it `send` does all.
    """

    __slots__ = (
        "_at_once",
        "_keyed",
        "_most",
        "_patience",
        "_send",
        "_sending",
        "_size",
        "_stuck",
        "_waiting",
        "is_ended",
    )

    def __init__(
        self,
        send: Callable[[bytes], Awaitable[None]],
        most: int,
        patience: float,
        stuck: Callable[[], None],
        at_once: Callable[[bytes], bool] | None = None,
    ) -> None:
        self._send, self._most, self._patience, self._stuck = send, most, patience, stuck
        self._at_once = at_once
        # Empty most of the time, where a deque takes ten times as much memory.
        self._waiting: list[tuple[Hashable, bytes]] = []
        self._keyed = self._size = 0
        self._sending: asyncio.Future[None] | None = None
        self.is_ended = False

    def put(self, message: bytes, key: Hashable = None) -> None:
        if self.is_ended:
            return
        if self._sending is None:
            if self._at_once is None or not self._at_once(message):
                self._begin(message)
            return
        if key is not None:
            self._drop(key)
            self._keyed += 1
        self._waiting.append((key, message))
        self._size += len(message)
        if len(self._waiting) > self._most and self._keyed:
            self._drop_oldest()
        if len(self._waiting) > MOST_WAITING or self._is_too_much():
            self._give_up()

    async def room(self) -> None:
        """Back when little enough waits that nothing would be left out, nor the client given up."""
        while self._sending is not None and not self.is_ended:
            if len(self._waiting) < self._most and self._size < MOST_SIZE // 2:
                return
            await asyncio.wait([self._sending], timeout=ROOM_SECONDS)

    async def drained(self) -> None:
        """Back when nothing waits any more, or nobody takes it."""
        while self._sending is not None and not self.is_ended:
            await asyncio.wait([self._sending])

    def end(self) -> None:
        """Nothing more is sent, and nobody is held on to: what has ended goes at once, and does not
        wait for the collector of garbage."""
        self.is_ended = True
        self._waiting.clear()
        self._send, self._stuck, self._at_once = _nowhere, _nothing, None
        if self._sending is not None and self._sending is not asyncio.current_task():
            self._sending.cancel()

    def _is_too_much(self) -> bool:
        """One message may be as large as answers may be; that it was all comes right after it."""
        if self._size <= MOST_SIZE:
            return False
        return self._size - max(len(message) for _, message in self._waiting) > MOST_SIZE

    def _drop(self, key: Hashable) -> None:
        """The one of that key, if there is one: an older one tells nothing more."""
        self._remove(next((entry for entry in self._waiting if entry[0] == key), None))

    def _drop_oldest(self) -> None:
        """Of those that may be left out."""
        self._remove(next((entry for entry in self._waiting if entry[0] is not None), None))

    def _remove(self, entry: tuple[Hashable, bytes] | None) -> None:
        if entry is not None:
            self._waiting.remove(entry)
            self._keyed -= 1
            self._size -= len(entry[1])

    def _begin(self, message: bytes) -> None:
        """Most clients take a message at once: no task is made for it."""
        sending: Coroutine[Any, Any, None] = self._send(message)  # type: ignore[assignment]  # what servers give
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return
        except Exception:  # whoever reads from the connection finds out, too
            self.end()
            return
        rest = self._rest(_resumed(sending, waits_for))
        self._sending = asyncio.get_running_loop().create_task(rest)

    async def _rest(self, sending: Awaitable[None]) -> None:
        try:
            while True:
                async with asyncio.timeout(self._patience):
                    await sending
                if not self._waiting:
                    break
                key, message = self._waiting.pop(0)
                self._keyed -= key is not None
                self._size -= len(message)
                sending = self._send(message)
        except TimeoutError:
            self._give_up()
        except Exception:  # the same
            self.is_ended = True
        finally:
            self._sending = None

    def _give_up(self) -> None:
        if not self.is_ended:
            stuck = self._stuck
            self.end()
            stuck()


async def _nowhere(message: bytes) -> None:
    pass


def _nothing() -> None:
    pass


@types.coroutine
def _resumed(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine that was run up to its first wait."""
    step: Callable[[Any], Any]
    while True:
        given: Any
        try:
            step, given = coroutine.send, (yield waits_for)
        except BaseException as error:
            step, given = coroutine.throw, error
        try:
            waits_for = step(given)
        except StopIteration:
            return
