import asyncio
from typing import Any

import pytest

from modelharbor import __version__
from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import applied
from modelharbor.observability.commands import CommandCounter
from modelharbor.resolvers import health
from modelharbor.resolvers.health import check_health
from modelharbor.settings import Settings
from tests.http.serving import Server, serving

pytestmark = pytest.mark.anyio


async def test_a_process_that_lives_says_so(server: Server) -> None:
    response = await server.client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert response.headers["cache-control"] == "private, no-store"


async def test_a_server_with_its_engines_is_ready(server: Server) -> None:
    response = await server.client.get("/readyz")
    assert response.status_code == 200
    found = response.json()
    assert found["status"] == "ok"
    assert found["version"] == __version__
    assert found["uptime_seconds"] > 0
    assert [(d["name"], d["status"]) for d in found["dependencies"]] == [
        ("mongodb", "ok"),
        ("redis", "ok"),
    ]
    assert all(d["latency_ms"] > 0 for d in found["dependencies"])


async def test_who_asks_at_once_or_soon_after_shares_one_answer(
    settings: Settings, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone may ask, and many times in one operation."""
    async with serving(settings, None) as server:
        query = "{" + " ".join(f"h{i}:health{{status}}" for i in range(20)) + "}"
        first, ready = await asyncio.gather(server.ask(query), server.client.get("/readyz"))
        assert first.json()["data"] == {f"h{i}": {"status": "ok"} for i in range(20)}
        assert ready.json()["status"] == "ok"
        again = (await server.client.get("/readyz")).json()
        assert again["uptime_seconds"] > ready.json()["uptime_seconds"]
        assert again["dependencies"] == ready.json()["dependencies"]
        assert commands.count("ping") == 1
        monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
        await server.client.get("/readyz")
        assert commands.count("ping") == 2


async def test_who_gives_up_waiting_does_not_end_the_check(
    settings: Settings, database: Database, commands: list[str]
) -> None:
    async with connect_cache(settings) as cache:
        impatient = asyncio.create_task(check_health(database, cache))
        patient = asyncio.create_task(check_health(database, cache))
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).status == "ok"
        assert impatient.cancelled()
    assert sorted(commands) == ["find", "ping"]


async def test_another_database_is_asked_itself(settings: Settings, database: Database) -> None:
    empty = settings.model_copy(update={"mongo_database": f"{settings.mongo_database}_empty"})
    async with connect_cache(settings) as cache, connect(empty) as other:
        assert (await check_health(database, cache)).status == "ok"
        assert (await check_health(other, cache)).status == "unavailable"


async def test_the_read_of_a_check_has_its_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(CommandCounter, "started", lambda self, event: sent.append(event.command))
    assert await applied(database)
    assert [command["maxTimeMS"] for command in sent] == [database.query_timeout_ms]


async def test_a_database_without_its_migrations_is_not_ready(settings: Settings) -> None:
    empty = settings.model_copy(update={"mongo_database": f"{settings.mongo_database}_empty"})
    async with serving(empty) as server:
        response = await server.client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"
    mongodb = response.json()["dependencies"][0]
    assert mongodb["status"] == "migrations are pending: run `modelharbor migrate`"
