"""What a connection was goes when it ends: garbage is collected once a minute, what is old once an hour."""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from websockets.server import ServerProtocol

from modelharbor.db.jobs import JobState

from .client import WATCH, Client, open_client
from .conftest import Served, id_of
from .stream import open_stream

pytestmark = pytest.mark.anyio
End = Callable[[Client], Awaitable[None]]


@contextmanager
def left() -> Iterator[Counter[str]]:
    """What of ours only the collector of garbage would have found, by the names of the types."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(
            type(each).__name__
            for each in gc.garbage
            if type(each).__module__.startswith("modelharbor.") or isinstance(each, ServerProtocol)
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def cut(client: Client) -> None:
    client.connection.transport.abort()


async def close(client: Client) -> None:
    await client.connection.close()


async def unsubscribe(client: Client) -> None:
    await client.send(type="complete", id="1")
    assert await client.is_silent(0.05)


async def be_refused(client: Client) -> None:
    await client.connection.send("{")
    assert (await client.close_code())[0] == 4400


@pytest.mark.parametrize("end", [cut, close, unsubscribe, be_refused])
async def test_a_socket_leaves_nothing(served: Served, end: End) -> None:
    job = await served.put()
    async with open_client(served.ws, served.token) as first:  # it keeps what all share
        await first.subscribe("1", WATCH, id=id_of(job))
        await first.next()
        with left() as found:
            async with open_client(served.ws, served.token) as client:
                await client.subscribe("1", WATCH, id=id_of(job))
                await client.next()
                await end(client)
            await asyncio.sleep(0.2)
    assert found == Counter()


async def test_a_socket_whose_job_has_ended_leaves_nothing(served: Served) -> None:
    job = await served.put()
    async with open_client(served.ws, served.token) as first:
        await first.subscribe("1", WATCH, id=id_of(job))
        await first.next()
        with left() as found:
            async with open_client(served.ws, served.token) as client:
                await client.subscribe("1", WATCH, id=id_of(job))
                await client.next()
                await served.become(job, JobState.CANCELLED)
                await client.next()
                assert (await client.receive())["type"] == "complete"
            await asyncio.sleep(0.2)
    assert found == Counter()


async def test_a_stream_of_events_leaves_nothing(served: Served) -> None:
    job = await served.put()
    async with open_stream(served.http, WATCH, served.token, id=id_of(job)) as first:
        await first.next()
        with left() as found:
            async with open_stream(served.http, WATCH, served.token, id=id_of(job)) as stream:
                await stream.next()
            await asyncio.sleep(0.2)
    assert found == Counter()
