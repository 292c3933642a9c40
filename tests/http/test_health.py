import pytest

from modelharbor import __version__
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


async def test_a_database_without_its_migrations_is_not_ready(settings: Settings) -> None:
    empty = settings.model_copy(update={"mongo_database": f"{settings.mongo_database}_empty"})
    async with serving(empty) as server:
        response = await server.client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"
    mongodb = response.json()["dependencies"][0]
    assert mongodb["status"] == "migrations are pending: run `modelharbor migrate`"
