"""`/metrics`: which engine made the answers, and why it was not a plan."""

from collections.abc import AsyncIterator

import pytest
from httpx import AsyncClient

from modelharbor.db.connection import Database
from modelharbor.settings import Settings
from tests.http.serving import serving

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(database: Database, settings: Settings) -> AsyncIterator[AsyncClient]:
    async with serving(settings, None) as server:
        yield server.client


async def shown(client: AsyncClient) -> list[str]:
    """The samples of operations, without when they began to be counted."""
    answer = await client.get("/metrics")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return [
        line for line in answer.text.splitlines() if line.startswith("modelharbor_operations_total")
    ]


async def test_operations_are_counted_by_engine_and_reason(client: AsyncClient) -> None:
    planned = 'modelharbor_operations_total{engine="plan",reason=""}'
    assert await shown(client) == [f"{planned} 0.0"]
    for query in ("{ models { totalCount } }", "{ viewer { login } }", "{ health { version } }"):
        assert "errors" not in (await client.post("/graphql", json={"query": query})).json()
    await client.post("/graphql", json={"query": "{ models(first: 101) { totalCount } }"})
    await client.post("/graphql", json={"query": "{ nothing }"})  # does not run
    interpreted = 'modelharbor_operations_total{engine="graphql-core",reason='
    assert sorted(await shown(client)) == [
        f'{interpreted}"Query.health has a resolver of its own"}} 1.0',
        f'{interpreted}"an answer that is not as the schema promises"}} 1.0',
        f"{planned} 2.0",
    ]
