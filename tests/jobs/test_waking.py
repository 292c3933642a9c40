"""Workers hear of jobs through Redis, and never wait for it."""

import asyncio
import time

import pytest

from modelharbor.cache.client import connect_cache
from modelharbor.jobs.waking import listening, wake
from modelharbor.settings import Settings

pytestmark = pytest.mark.anyio


async def test_a_wait_ends_with_news(settings: Settings) -> None:
    async with connect_cache(settings) as cache, listening(cache) as waking:
        await waking.wait(5)  # the subscription itself is news
        begun = time.monotonic()
        waiting = asyncio.create_task(waking.wait(5))
        await asyncio.sleep(0)
        await wake(cache)
        await waiting
        assert time.monotonic() - begun < 1
        waking.tell()
        await waking.wait(5)
        assert time.monotonic() - begun < 1
        await waking.wait(0.2)
        assert time.monotonic() - begun > 0.2


async def test_without_redis_it_waits_its_time(settings: Settings) -> None:
    gone = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    async with connect_cache(gone) as cache, listening(cache) as waking:
        await wake(cache)
        begun = time.monotonic()
        await wake(cache)
        await waking.wait(0.3)
        assert 0.3 <= time.monotonic() - begun < 0.5


async def test_a_redis_that_hangs_costs_one_caller_a_tenth_of_a_second(settings: Settings) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    hung = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0"})
    async with connect_cache(hung) as cache:
        took = []
        for _ in range(3):
            begun = time.monotonic()
            await wake(cache)
            took.append(time.monotonic() - begun)
    server.close()
    assert 0.1 <= took[0] < 0.2
    assert max(took[1:]) < 0.01
