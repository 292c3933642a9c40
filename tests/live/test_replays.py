"""Much at once: long replays to slow clients, large answers, and clients that leave meanwhile."""

import asyncio
import json
import socket
from typing import Any, Final

import pytest
from bson import ObjectId

from modelharbor.db.base import utc_now
from modelharbor.db.events import EventDocument, EventKind
from modelharbor.execution.live import AT_WORK, REPLAYS
from tests.documents import insert_actor, insert_model, row_of

from .client import open_client
from .serving import Served
from .stream import open_stream

pytestmark = pytest.mark.anyio
EVENTS: Final = (
    "subscription E($after: Cursor) { modelEvents(after: $after) { cursor changedFields } }"
)
FILLER: Final = 4000  # characters of an event: more than fits between the two ends of a connection


async def cursor_before(served: Served, count: int) -> str:
    """Of a place that so many events come after."""
    model = await insert_model(await insert_actor("owner"), "m")

    def row(number: int) -> dict[str, Any]:
        event = EventDocument(
            id=ObjectId(),
            kind=EventKind.MODEL_UPDATED,
            about=[model.id],
            principals=["public"],
            model_id=model.id,
            after={f"{number:x}".rjust(FILLER, "x"): 1},
            at=utc_now(),
        )
        return row_of(event)

    events = served.database.data["events"]
    async with open_client(served.ws) as client:
        await client.subscribe("1", EVENTS)
        while not any(group.ready.done() for group in served.live.groups.values()):
            await asyncio.sleep(0.01)
        await events.insert_one(row(0))
        cursor: str = (await client.next())["modelEvents"]["cursor"]
    for group in list(served.live.groups.values()):
        group.end()  # so that the log alone knows what comes now
    rows = [row(number) for number in range(1, count + 1)]
    await events.insert_many(rows)
    async with asyncio.timeout(10):
        # Until then, the last of them would come as what happens now, as fast as it does.
        while True:
            last = await events.find_one({"_id": rows[-1]["_id"]})
            if last and last["position"] and last["position"] <= served.live.reader.position:
                return cursor
            await asyncio.sleep(0.02)


def number(event: Any) -> int:
    [name] = event["modelEvents"]["changedFields"]
    return int(name.lstrip("x") or "0", 16)


def narrow(port: int) -> dict[str, Any]:
    """A connection that holds little on its way."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    own.connect(("127.0.0.1", port))
    own.setblocking(False)
    return {"sock": own, "max_queue": 1}


async def test_a_replay_waits_for_a_client_that_reads_slowly(served: Served) -> None:
    cursor = await cursor_before(served, 3000)
    async with open_client(served.ws, **narrow(served.port)) as client:
        await client.subscribe("1", EVENTS, after=cursor)
        seen = [number(await client.next())]
        for _ in range(2):
            client.connection.transport.pause_reading()
            await asyncio.sleep(0.7)
            client.connection.transport.resume_reading()
            seen += [number(await client.next()) for _ in range(1000)]
        seen += [number(await client.next()) for _ in range(999)]
        assert seen == list(range(1, 3001))
        assert await client.is_silent()


async def test_a_stream_whose_client_leaves_while_it_is_told_leaves_nothing(
    served: Served,
) -> None:
    cursor = await cursor_before(served, 3000)
    async with open_stream(served.http, EVENTS, served.token, after=cursor) as stream:
        assert [number(await stream.next()) for _ in range(3)] == [1, 2, 3]
        made = served.live.metrics.encodings._value.get()
        assert made < 3000

    def following() -> list[str]:
        names = [getattr(each.get_coro(), "__qualname__", "") for each in asyncio.all_tasks()]
        return [name for name in names if "_Following" in name or "Live." in name]

    async with asyncio.timeout(10):
        while following() or any(group.members for group in served.live.groups.values()):
            await asyncio.sleep(0.02)
    made = served.live.metrics.encodings._value.get()
    await asyncio.sleep(0.1)
    assert served.live.metrics.encodings._value.get() == made < 3000
    assert served.live.work._value == AT_WORK
    assert served.live.replays._value == REPLAYS
    assert served.live.shut_down == {}
    assert served.server.lifespan.state["viewers"]._held == {}


async def test_large_answers_wait_for_their_turn(served: Served) -> None:
    owner = await insert_actor("owner")
    for name in range(10):
        await insert_model(owner, f"m{name}", summary="x" * 60_000)
    query = (
        f"{{ models(first: 10) {{ nodes {{ {' '.join(f'a{n}: summary' for n in range(10))} }} }} }}"
    )
    async with open_client(served.ws, max_size=2**24, **narrow(served.port)) as client:
        client.connection.transport.pause_reading()
        for id in "12":
            await client.subscribe(id, query)
        await asyncio.sleep(0.5)
        client.connection.transport.resume_reading()
        messages = [await client.receive() for _ in range(4)]
    assert [(each["id"], each["type"]) for each in messages] == [
        ("1", "next"),
        ("1", "complete"),
        ("2", "next"),
        ("2", "complete"),
    ]
    for answer in messages[::2]:
        assert 6_000_000 < len(json.dumps(answer)) < 6_010_000
