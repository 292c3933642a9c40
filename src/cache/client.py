"""Redis, where it helps and never where it is needed: without it every call answers as if nothing were cached."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from modelharbor.observability.commands import counted
from modelharbor.settings import Settings

log = logging.getLogger(__name__)
MOST_BYTES: Final = 1_048_576  # of a value
PAUSE_SECONDS = 2.0  # after a failure, how long Redis is left alone: no request waits for it


class Cache:
    """Bytes by key, for a time. Whoever uses `redis` itself asks `name` for the names."""

    def __init__(self, redis: Redis, prefix: str = "mh") -> None:
        self.redis, self.prefix = redis, prefix
        self._closed_until = 0.0

    def name(self, key: str) -> str:
        """What Redis calls it."""
        return f"{self.prefix}:{key}"

    async def get(self, key: str, most: int = MOST_BYTES) -> bytes | None:
        """`most`: bytes; what is longer, somebody else has put there, is cut off after one more."""
        if time.monotonic() < self._closed_until:
            return None
        try:
            found: bytes | str | None = await self.redis.getrange(self.name(key), 0, most)
            if not found:  # nothing, or an empty text?
                found = await self.redis.get(self.name(key))
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
            return None
        count = counted.get()
        if found is not None and count is not None:
            count.cache_hits += 1
        return cast("bytes | None", found)  # decode_responses is off

    async def put(self, key: str, value: bytes, seconds: int) -> None:
        if time.monotonic() < self._closed_until:
            return
        try:
            await self.redis.set(self.name(key), value, ex=seconds)
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)

    async def publish(self, channel: str, seconds: float) -> None:
        """A message without content to whoever listens; given up after so many seconds."""
        if time.monotonic() < self._closed_until:
            return
        try:
            async with asyncio.timeout(seconds):
                await self.redis.publish(self.name(channel), b"")
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)

    async def ping(self) -> float:
        """Milliseconds of a round trip; raises when Redis does not answer."""
        start = time.perf_counter()
        await self.redis.ping()
        self._closed_until = 0.0
        return (time.perf_counter() - start) * 1000

    def _failed(self, error: Exception) -> None:
        self._closed_until = time.monotonic() + PAUSE_SECONDS
        log.warning("cache.unavailable error=%s", error)


@asynccontextmanager
async def connect_cache(settings: Settings) -> AsyncIterator[Cache]:
    # Who finds all connections in use waits for one: another kind of pool would raise at once.
    pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=settings.redis_pool_size,
        timeout=settings.redis_timeout_seconds,
        socket_timeout=settings.redis_timeout_seconds,
        socket_connect_timeout=settings.redis_timeout_seconds,
        retry=Retry(NoBackoff(), 1),  # once more: a connection that idled may have been closed
    )
    async with Redis.from_pool(pool) as redis:
        yield Cache(redis, settings.redis_prefix)
