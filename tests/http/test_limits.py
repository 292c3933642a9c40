"""Too much, and what means harm: refused over HTTP before anything is resolved or read."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelharbor.execution.documents import DocumentStore
from modelharbor.settings import Settings
from tests.http.serving import Server, codes, ran, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
async def real(settings: Settings) -> AsyncIterator[Server]:
    """Our own schema."""
    async with serving(settings, None) as server:
        yield server


OVER = {
    "depth": ('{model(id:"x"){' + "latestVersion{model{" * 5 + "owner{id}" + "}}" * 6, 13),
    "aliases": ('{model(id:"x"){' + " ".join(f"a{i}:name" for i in range(31)) + "}}", 31),
    "rootFields": ("{" + "__typename " * 21 + "}", 21),
    "directives": ('{model(id:"x"){' + "id @skip(if:false) " * 51 + "}}", 51),
    "cost": ("{models(first:100){nodes{versions(first:50){nodes{id}}}}}", 5100),
}
WITHIN = {
    "depth": '{model(id:"x"){' + "latestVersion{model{" * 5 + "id" + "}}" * 5 + "}}",
    "aliases": '{model(id:"x"){' + " ".join(f"a{i}:name" for i in range(30)) + "}}",
    "rootFields": "{" + "__typename " * 20 + "}",
    "directives": '{model(id:"x"){' + "id @skip(if:false) " * 50 + "}}",
    "cost": "{models(first:100){nodes{versions(first:49){nodes{id}}}}}",
}


@pytest.mark.parametrize("measure", OVER)
async def test_over_a_limit_nothing_runs(real: Server, commands: list[str], measure: str) -> None:
    text, value = OVER[measure]
    response = await real.ask(text, {"authorization": "Bearer mh_" + "0" * 24 + "x" * 43})
    assert codes(response) == ["OPERATION_TOO_COMPLEX"]
    found = response.json()["errors"][0]["extensions"]
    assert (found["measure"], found["value"], found["limit"]) == (
        measure,
        value,
        value - 100 if measure == "cost" else value - 1,
    )
    assert "data" not in response.json()
    assert commands == []


@pytest.mark.parametrize("measure", WITHIN)
async def test_at_a_limit_everything_runs(real: Server, measure: str) -> None:
    response = await real.ask(WITHIN[measure])
    assert "errors" not in response.json()


async def test_cost_counts_the_variables_of_the_request(real: Server, commands: list[str]) -> None:
    text = "query($n:Int!){models(first:100){nodes{versions(first:$n){nodes{id}}}}}"
    fits = await real.ask(text, {"x-modelharbor-cost": "1"}, variables={"n": 49})
    assert fits.json()["extensions"]["cost"]["requested"] == 5000
    commands.clear()
    over = await real.ask(text, variables={"n": 50})
    assert codes(over) == ["OPERATION_TOO_COMPLEX"]
    assert commands == []


async def test_a_page_size_with_a_point_is_no_way_around_the_cost(
    real: Server, commands: list[str]
) -> None:
    text = "query($n:Int!){models(first:$n){nodes{versions(first:$n){nodes{id}}}}}"
    over = await real.post(b'{"query":"%s","variables":{"n":100.0}}' % text.encode())
    assert codes(over) == ["OPERATION_TOO_COMPLEX"]
    assert over.json()["errors"][0]["extensions"]["value"] == 100 * (1 + 100)
    assert commands == []


FILTERED = "query($f:ModelFilter){models(filter:$f){nodes{id}}}"


@pytest.mark.parametrize(
    ("variables", "value"),
    [
        ({"f": {"or": [{}] * 60_000}}, 60_002),
        ({"f": {"or": [{}] * 4999}}, 5001),
        ({"f": {}, "unused": [[0] * 2500, {str(n): n for n in range(2500)}]}, 5004),
        ({str(n): n for n in range(5001)}, 5001),
    ],
)
async def test_variables_of_too_many_values_are_not_coerced(
    real: Server, commands: list[str], monkeypatch: pytest.MonkeyPatch, variables: Any, value: int
) -> None:
    coerced = []
    monkeypatch.setattr(DocumentStore, "check_cost", lambda *given: coerced.append(given))
    response = await real.ask(FILTERED, variables=variables)
    assert codes(response) == ["OPERATION_TOO_COMPLEX"]
    found = response.json()["errors"][0]["extensions"]
    assert (found["measure"], found["value"], found["limit"]) == ("inputValues", value, 5000)
    assert "data" not in response.json()
    assert coerced == []
    assert commands == []


@pytest.mark.parametrize(
    "variables",
    [
        {"unused": [0] * 4999},
        {
            "f": {"tags": {"all": []}},
            "properties": {f"key{n}": "x" * 320 for n in range(200)},
            "tags": [f"tag{n}" for n in range(100)],
        },
    ],
)
async def test_variables_within_the_limit_are_taken(real: Server, variables: Any) -> None:
    response = await real.ask("query{__typename}", variables=variables)
    assert response.json() == {"data": {"__typename": "Query"}}


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("{models(first:1000000){nodes{id}}}", "BAD_USER_INPUT"),
        ("{models(first:-1){nodes{id}}}", "BAD_USER_INPUT"),
        ("{models(first:0){nodes{id}}}", "BAD_USER_INPUT"),
        ("{models(first:99999999999){nodes{id}}}", "GRAPHQL_VALIDATION_FAILED"),
        ('{models(orderBy:{field:"passwordHash"}){nodes{id}}}', "GRAPHQL_VALIDATION_FAILED"),
        ("{models(orderBy:{field:PASSWORD}){nodes{id}}}", "GRAPHQL_VALIDATION_FAILED"),
        (
            "{models{nodes{...A}}} fragment A on Model{...B} fragment B on Model{...A}",
            "GRAPHQL_VALIDATION_FAILED",
        ),
        ("{models(filter:" + "[" * 1000 + "]" * 1000 + "){nodes{id}}}", "GRAPHQL_PARSE_FAILED"),
        ("{models{nodes{" + "id " * 3000 + "}}}", "OPERATION_TOO_COMPLEX"),
        ("{__typename " + "@a" * 5000 + "}", "OPERATION_TOO_COMPLEX"),
        (
            "{"
            + " ".join(f"models{{nodes{{a{i % 2}:name ...F}}}}" for i in range(900))
            + "} fragment F on Model{name}",
            "OPERATION_TOO_COMPLEX",
        ),
        (
            "{" + " ".join(f'a{i}:model(id:"{i}"){{id}}' for i in range(1000)) + "}",
            "OPERATION_TOO_COMPLEX",
        ),
        (
            "{__schema{types{fields{type{fields{type{fields{name}}}}}}}}",
            "GRAPHQL_VALIDATION_FAILED",
        ),
    ],
)
async def test_a_harmful_query_is_refused_before_the_database(
    real: Server, commands: list[str], query: str, code: str
) -> None:
    response = await real.ask(query)
    assert set(codes(response)) == {code}
    assert response.json().get("data") is None
    assert commands == []


@pytest.mark.parametrize(
    "filter",
    [
        {"name": {"$ne": None}},
        {"$where": "sleep(2000)||true"},
        {"$expr": {"$function": {"body": "function(){return true}", "args": [], "lang": "js"}}},
        {"owner.id": "B"},
        {"name": {"eq": {"$gt": ""}}},
        [1],
        "x",
    ],
)
async def test_no_operator_reaches_the_database(
    real: Server, commands: list[str], filter: Any
) -> None:
    """A variable that does not fit its type: Apollo's code for it."""
    response = await real.ask(
        "query($f:ModelFilter){models(filter:$f){nodes{id}}}", variables={"f": filter}
    )
    assert set(codes(response)) == {"BAD_USER_INPUT"}
    assert "data" not in response.json()
    assert commands == []


async def test_the_whole_introspection_is_within_the_limits(
    real: Server, commands: list[str]
) -> None:
    from graphql import get_introspection_query

    response = await real.ask(get_introspection_query())
    assert "errors" not in response.json()
    assert response.json()["data"]["__schema"]["queryType"]["name"] == "Query"
    assert commands == []


async def test_the_server_lives_after_all_of_it(real: Server) -> None:
    for text, _ in OVER.values():
        await real.ask(text)
    assert (await real.ask("{__typename}")).json() == {"data": {"__typename": "Query"}}
    assert ran == []
