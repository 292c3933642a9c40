"""Tell workers through Redis that jobs may wait, so that none waits for their next look.

Workers look each second anyway: a message that is lost, and a Redis that is gone or hangs, costs that.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from modelharbor.cache.client import PAUSE_SECONDS, Cache
from modelharbor.cache.keys import WAKING_CHANNEL
from modelharbor.db.ending import ended
from modelharbor.observability.logging import log_event

log = logging.getLogger(__name__)
WAKE_SECONDS: Final = 0.1  # a Redis that hangs costs one caller this, then the breaker is open
LISTEN_SECONDS: Final = 30.0
CLOSE_SECONDS: Final = 0.5


async def wake(cache: Cache) -> None:
    """After the transaction that put jobs, cancelled or queued them again. Never fails."""
    await cache.publish(WAKING_CHANNEL, WAKE_SECONDS)


class Waking:
    """What a worker waits on between two looks at the queue."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    def tell(self) -> None:
        """Also what happens within the process ends the wait: a place became free, it is to stop."""
        self._news.set()

    async def wait(self, seconds: float) -> None:
        """Until there is news, also such as came since the last wait; so many seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()


@asynccontextmanager
async def listening(cache: Cache) -> AsyncIterator[Waking]:
    """A `Waking` that hears of `wake` in other processes, whenever Redis is there."""
    waking = Waking()
    task = asyncio.create_task(_listen(cache, waking))
    try:
        yield waking
    finally:
        await ended(task)


async def _listen(cache: Cache, waking: Waking) -> None:
    heard = True
    while True:
        channel = cache.redis.pubsub(ignore_subscribe_messages=True)
        try:
            await channel.subscribe(cache.name(WAKING_CHANNEL))
            waking.tell()  # what came while nobody listened
            heard = True
            while True:
                message = await channel.get_message(timeout=LISTEN_SECONDS)
                if message is None:
                    await channel.ping()  # a peer that has vanished says nothing by itself
                elif message["type"] == "message":  # not the answer to a ping
                    waking.tell()
        except (RedisError, OSError, TimeoutError) as error:
            if heard:
                log_event(log, logging.WARNING, "worker.polls", error=error)
            heard = False
        finally:
            await _close(channel)
        await asyncio.sleep(PAUSE_SECONDS)


async def _close(channel: PubSub) -> None:
    with suppress(RedisError, OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await channel.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
