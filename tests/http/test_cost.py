"""What an operation cost, told on request: of real answers, and of those that never came."""

from typing import Any

import pytest

import modelharbor.http.operations as operations
from modelharbor.db.connection import Database
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model, insert_version
from tests.http.serving import serving

pytestmark = pytest.mark.anyio
ASKED = {"x-modelharbor-cost": "1"}


async def test_rows_that_came_back_are_what_it_cost(database: Database, settings: Settings) -> None:
    ada = await insert_actor("ada")
    models = [await insert_model(ada, f"m{n}", tags=["a"]) for n in range(3)]
    for _ in range(2):
        await insert_version(database, models[0], {"config.json": 1})
    ids = [global_id("Model", models[0].id), global_id("User", ada.id), "unknown"]
    async with serving(settings, None) as server:

        async def cost(query: str, **variables: Any) -> tuple[int, int]:
            response = await server.ask(query, ASKED, variables=variables)
            assert "errors" not in response.json()
            found = response.json()["extensions"]["cost"]
            return found["requested"], found["actual"]

        assert await cost("{models(first:10){nodes{fullName owner{login}}}}") == (20, 6)
        assert await cost("query($n:Int){models(first:$n){edges{node{name}}}}", n=2) == (2, 2)
        assert await cost("{models(first:10){totalCount pageInfo{hasNextPage}}}") == (16, 6)
        versions = "versions(first:5){nodes{number files(first:4){nodes{path}}}}"
        assert await cost(f"{{models(first:10){{nodes{{{versions}}}}}}}") == (
            10 * (1 + 5 * (1 + 4)),
            3 + 2 * (1 + 1),
        )
        assert await cost(
            "query($ids:[ID!]!){nodes(ids:$ids){...on Model{owner{login}} ...on User{login}}}",
            ids=ids,
        ) == (3 * (1 + 1), (1 + 1) + 1)
        assert await cost("{models(first:9){facets(fields:[TAG,TASK]){buckets{count}}}}") == (
            9 + 2 * (10 + 1),
            (10 + 1) + 10,
        )
        assert await cost('{model(owner:"ada",name:"nope"){card{html}}}') == (21, 0)


async def test_what_failed_cost_nothing(settings: Settings) -> None:
    async with serving(settings) as server:
        failed = await server.ask("{needed item{name}}", ASKED)
        assert failed.json()["data"] is None
        assert failed.json()["extensions"]["cost"]["actual"] == 0
        refused = await server.ask(
            "query($n:Int!){items(first:$n){nodes{name}}}", ASKED, variables={"n": "x"}
        )
        assert "data" not in refused.json()
        assert refused.json()["extensions"]["cost"]["actual"] == 0


async def test_small_answers_are_not_priced_unless_it_is_asked_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced = []

    def price(*given: object) -> int:
        priced.append(given)
        return 1

    monkeypatch.setattr(operations, "actual_cost", price)
    async with serving(settings) as server:
        assert (await server.ask("{item{name}}")).json() == {"data": {"item": {"name": "item"}}}
        assert priced == []
        await server.ask("{item{name}}", ASKED)
        assert len(priced) == 1
