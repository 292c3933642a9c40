"""Bytes by key: many at once, on few connections, under names of one installation."""

import asyncio

import pytest

from modelharbor.cache.client import connect_cache
from modelharbor.settings import Settings

pytestmark = pytest.mark.anyio


async def test_more_requests_than_connections_wait_for_one(settings: Settings) -> None:
    few = settings.model_copy(update={"redis_pool_size": 10, "redis_timeout_seconds": 30.0})
    async with connect_cache(few) as cache:
        await cache.put("many", b"x", 60)
        found = await asyncio.gather(*[cache.get("many") for _ in range(300)])
        assert found == [b"x"] * 300
        assert len(cache.redis.connection_pool._available_connections) == 10


async def test_installations_that_share_a_redis_do_not_meet(settings: Settings) -> None:
    other = settings.model_copy(update={"redis_prefix": "other"})
    async with connect_cache(settings) as one, connect_cache(other) as two:
        await one.put("name", b"1", 60)
        await two.redis.delete(two.name("name"))
        assert (await one.get("name"), await two.get("name")) == (b"1", None)
        assert await one.redis.get("mh:name") == b"1"

        channel = two.redis.pubsub(ignore_subscribe_messages=True)
        await channel.subscribe(two.name("channel"))
        await channel.get_message(timeout=5)
        await one.publish("channel", 5)
        assert await channel.get_message(timeout=0.2) is None
        await two.publish("channel", 5)
        found = None
        async with asyncio.timeout(30):
            while found is None:
                found = await channel.get_message(timeout=1)
        assert found["channel"] == b"other:channel"
        await channel.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
