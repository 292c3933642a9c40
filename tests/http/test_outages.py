"""MongoDB or Redis gone, at the start or in the middle: coded answers in bounded time, and back by itself."""

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from urllib.parse import urlsplit

import pytest

from modelharbor.settings import Settings
from tests.http.proxy import Door
from tests.http.serving import Server, codes, serving

pytestmark = pytest.mark.anyio
BOUND = 15.0  # seconds, generous: nothing here may wait longer
TOKEN = "Bearer mh_" + "0" * 24 + "x" * 43


@pytest.fixture
async def mongo_door(settings: Settings) -> AsyncIterator[Door]:
    door = Door(urlsplit(settings.mongo_url).port or 27017)
    yield door
    await door.close()


@pytest.fixture
async def redis_door(settings: Settings) -> AsyncIterator[Door]:
    door = Door(urlsplit(settings.redis_url).port or 6379)
    yield door
    await door.close()


@pytest.fixture
def through(settings: Settings, mongo_door: Door, redis_door: Door) -> Settings:
    """Settings that lead through the doors."""
    return settings.model_copy(
        update={
            "mongo_url": f"mongodb://127.0.0.1:{mongo_door.port}/?directConnection=true",
            "redis_url": f"redis://127.0.0.1:{redis_door.port}/0",
            "mongo_timeout_seconds": 0.5,
            "operation_timeout_seconds": 2.0,
        }
    )


async def ready(server: Server, status: str) -> None:
    async with asyncio.timeout(BOUND):
        while (await server.client.get("/readyz")).json()["status"] != status:
            await asyncio.sleep(0.1)


async def assert_unavailable(server: Server) -> None:
    async with asyncio.timeout(BOUND):
        answer = await server.ask("{stored}")
        assert (answer.status_code, answer.json()["data"]) == (200, {"stored": None})
        assert codes(answer) == ["UNAVAILABLE"]
        refused = await server.ask("{hello}", {"authorization": TOKEN})
        assert (refused.status_code, codes(refused)) == (503, ["UNAVAILABLE"])
        assert refused.headers["retry-after"] == "1"
        assert (await server.ask("{hello}")).json() == {"data": {"hello": "Hello you"}}
        assert (await server.client.get("/healthz")).status_code == 200
        await ready(server, "unavailable")  # what was found within the last second is told again
        unready = await server.client.get("/readyz")
        assert (unready.status_code, unready.json()["status"]) == (503, "unavailable")


async def assert_available(server: Server) -> None:
    async with asyncio.timeout(BOUND):
        answer = await server.ask("{stored}")
        assert answer.json() == {"data": {"stored": 0}}
        refused = await server.ask("{hello}", {"authorization": TOKEN})
        assert (refused.status_code, codes(refused)) == (401, ["UNAUTHENTICATED"])
        assert (await server.client.get("/readyz")).status_code == 200


async def test_mongodb_gone_at_start_in_the_middle_and_back(
    through: Settings, mongo_door: Door, redis_door: Door
) -> None:
    await redis_door.open()
    async with serving(through) as server:
        await assert_unavailable(server)
        await mongo_door.open()
        await ready(server, "ok")
        await assert_available(server)
        await mongo_door.close()
        await assert_unavailable(server)
        await mongo_door.open()
        await ready(server, "ok")
        await assert_available(server)


async def test_mongodb_that_says_nothing_is_given_up(through: Settings, mongo_door: Door) -> None:
    await mongo_door.open()
    async with serving(through) as server:
        assert (await server.ask("{stored}")).json() == {"data": {"stored": 0}}
        mongo_door.silent = True
        async with asyncio.timeout(BOUND):
            answer = await server.ask("{stored}")
            assert codes(answer)[0] in {"TIMEOUT", "UNAVAILABLE"}
            assert (await server.client.get("/readyz")).status_code == 503


@pytest.mark.parametrize("is_silent", [False, True])
async def test_redis_gone_costs_nothing_but_the_cache(
    through: Settings, mongo_door: Door, redis_door: Door, is_silent: bool
) -> None:
    await mongo_door.open()
    if is_silent:
        redis_door.silent = True
        await redis_door.open()
    text = "{hello}"
    named = {"persistedQuery": {"version": 1, "sha256Hash": sha256(text.encode()).hexdigest()}}
    async with serving(through) as server, asyncio.timeout(BOUND):
        unknown = await server.client.post("/graphql", json={"extensions": named})
        assert codes(unknown) == ["PERSISTED_QUERY_NOT_FOUND"]
        sent = await server.ask(text, extensions=named)
        assert sent.json() == {"data": {"hello": "Hello you"}}
        found = await server.client.post("/graphql", json={"extensions": named})
        assert found.json() == {"data": {"hello": "Hello you"}}
        assert (await server.ask("{stored}")).json() == {"data": {"stored": 0}}
        health = await server.client.get("/readyz")
        assert health.status_code == 200
        assert health.json()["status"] == "degraded"
        assert [(d["name"], d["status"]) for d in health.json()["dependencies"]] == [
            ("mongodb", "ok"),
            ("redis", "unavailable"),
        ]
        await redis_door.close()
        redis_door.silent = False
        await redis_door.open()
        await ready(server, "ok")
