"""Subscriptions: their events, and how they go on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from modelharbor.client import Client, Rejected, Unauthenticated
from modelharbor.client.documents import JOB
from modelharbor.db.jobs import JobState
from modelharbor.settings import Settings
from tests.http.proxy import Door
from tests.live.serving import id_of, serving

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 20.0


async def test_a_job_is_followed_to_its_end(settings: Settings) -> None:
    """Over a connection that is cut in the middle: nothing is missed, nothing comes twice."""
    async with serving(settings) as served:
        door = Door(served.port)
        await door.open()
        job = await served.put()
        states = []
        async with (
            asyncio.timeout(GUARD_SECONDS),
            Client(f"http://127.0.0.1:{door.port}", served.token) as client,
            aclosing(client.subscribe(JOB, {"id": id_of(job)})) as events,
        ):
            async for data in events:
                state = data["jobProgress"]["job"]["state"]
                states.append(state)
                if state == "QUEUED":
                    await door.close()
                    await served.become(job, JobState.RUNNING)
                    await door.open()
                elif state == "RUNNING":
                    await served.become(job, JobState.SUCCEEDED)
        await door.close()
    assert states == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_what_a_real_server_refuses(settings: Settings) -> None:
    async with serving(settings) as served:
        url = f"http://127.0.0.1:{served.port}"
        async with Client(url, served.token) as client:
            with pytest.raises(Rejected) as unknown:
                await anext(client.subscribe(JOB, {"id": "nothing"}))
            assert unknown.value.code == "NOT_FOUND"
            with pytest.raises(Rejected) as wrong:
                await anext(client.subscribe("subscription { nothing }"))
            assert wrong.value.code == "GRAPHQL_VALIDATION_FAILED"
        async with Client(url, "wrong") as stranger:
            with pytest.raises(Unauthenticated):
                await anext(stranger.subscribe(JOB, {"id": "nothing"}))


@asynccontextmanager
async def telling(*turns: tuple[list[Any], int | None]) -> AsyncIterator[tuple[str, list[Any]]]:
    """A server that tells, of each connection in turn, these messages, and closes with this code;
    and the variables that each subscribed with."""
    waiting, asked = list(turns), list[Any]()

    async def talk(socket: ServerConnection) -> None:
        messages, code = waiting.pop(0)
        await socket.recv()
        await socket.send('{"type":"connection_ack"}')
        asked.append(orjson.loads(await socket.recv())["payload"]["variables"])
        for message in messages:
            await socket.send(orjson.dumps({"id": "1", **message}).decode())
        if code is not None:
            await socket.close(code)
        await socket.wait_closed()

    async with serve(
        talk, "127.0.0.1", 0, subprotocols=[Subprotocol("graphql-transport-ws")]
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"http://127.0.0.1:{port}", asked


def event(cursor: str) -> dict[str, Any]:
    return {"type": "next", "payload": {"data": {"events": {"cursor": cursor}}}}


COMPLETE = {"type": "complete"}
QUERY = "subscription S($after: Cursor) { events(after: $after) { cursor } }"


async def test_the_next_connection_goes_on_from_the_last_cursor() -> None:
    turns: tuple[tuple[list[Any], int | None], ...] = (
        ([event("a"), {"type": "ping"}, event("b")], 1001),
        ([], 1013),
        ([event("c"), COMPLETE], None),
    )
    async with telling(*turns) as (url, asked), Client(url, "t") as client:
        events = [data["events"]["cursor"] async for data in client.subscribe(QUERY)]
    assert events == ["a", "b", "c"]
    assert asked == [{}, {"after": "b"}, {"after": "b"}]


async def test_a_document_without_after_begins_anew() -> None:
    turns = (([event("a")], 1012), ([event("b"), COMPLETE], None))
    async with telling(*turns) as (url, asked), Client(url) as client:
        query = "subscription { events { cursor } }"
        assert [data async for data in client.subscribe(query, {"n": 1})] == [
            {"events": {"cursor": "a"}},
            {"events": {"cursor": "b"}},
        ]
    assert asked == [{"n": 1}, {"n": 1}]


@pytest.mark.parametrize(
    ("messages", "code", "failure", "told"),
    [
        ([], 4403, Unauthenticated, "UNAUTHENTICATED"),
        ([], 4400, Rejected, "CLOSED_4400"),
        (
            [
                {
                    "type": "error",
                    "payload": [{"message": "x", "extensions": {"code": "CURSOR_EXPIRED"}}],
                }
            ],
            None,
            Rejected,
            "CURSOR_EXPIRED",
        ),
        (
            [{"type": "next", "payload": {"data": None, "errors": [{"message": "x"}]}}],
            None,
            Rejected,
            "HTTP_None",
        ),
    ],
)
async def test_what_cannot_go_on_is_raised(
    messages: list[Any], code: int | None, failure: type[Rejected], told: str
) -> None:
    async with telling((messages, code)) as (url, asked), Client(url) as client:
        with pytest.raises(failure) as caught:
            await anext(client.subscribe(QUERY))
    assert (type(caught.value), caught.value.code, len(asked)) == (failure, told, 1)
