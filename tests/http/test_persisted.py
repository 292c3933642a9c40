"""Documents named by hash: Apollo's APQ and `documentId`, one store."""

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import orjson
import pytest
from httpx import Response

from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.execution.persisted import text_key
from modelharbor.resolvers.persisted import Publication, publish, retire
from modelharbor.resolvers.tokens import issue_token
from modelharbor.settings import Settings
from tests.documents import insert_actor
from tests.http.serving import Server, codes, ran, schema, serving

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 30.0


def unique(settings: Settings) -> str:
    """A text that no earlier test has stored in Redis."""
    return f"query Q($n:String!){{hello(name:$n)}} #{settings.data_path}"


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def apollo(text: str) -> dict[str, Any]:
    return {"persistedQuery": {"version": 1, "sha256Hash": digest(text)}}


async def by_get(server: Server, **parameters: Any) -> Response:
    params = {
        name: value if isinstance(value, str) else orjson.dumps(value).decode()
        for name, value in parameters.items()
    }
    return await server.client.get("/graphql", params=params)


async def by_post(server: Server, **parameters: Any) -> Response:
    return await server.client.post("/graphql", json=parameters)


@pytest.mark.parametrize("send", [by_get, by_post])
async def test_a_document_is_found_by_either_name_after_it_was_sent_once(
    server: Server, settings: Settings, send: Any
) -> None:
    text, variables = unique(settings), {"n": "Ada"}
    for unknown in ({"extensions": apollo(text)}, {"documentId": f"sha256:{digest(text)}"}):
        response = await send(server, variables=variables, **unknown)
        assert response.status_code == 200
        assert codes(response) == ["PERSISTED_QUERY_NOT_FOUND"]
        assert response.json()["errors"][0]["message"] == "PersistedQueryNotFound"
        assert "no-store" in response.headers["cache-control"]
    sent = await send(server, query=text, variables=variables, extensions=apollo(text))
    assert sent.json() == {"data": {"hello": "Hello Ada"}}
    for known in ({"extensions": apollo(text)}, {"documentId": f"sha256:{digest(text)}"}):
        response = await send(server, variables=variables, **known)
        assert response.json() == {"data": {"hello": "Hello Ada"}}


async def test_another_process_finds_it_in_redis(settings: Settings) -> None:
    text = unique(settings)
    async with serving(settings) as first:
        await by_post(first, query=text, variables={"n": "Ada"}, extensions=apollo(text))
    async with serving(settings) as second:
        response = await by_get(second, variables={"n": "Bob"}, extensions=apollo(text))
        assert response.json() == {"data": {"hello": "Hello Bob"}}


async def test_a_hash_of_another_text_is_refused(server: Server, settings: Settings) -> None:
    text = unique(settings)
    response = await by_post(
        server, query=f"{text} ", variables={"n": "Ada"}, extensions=apollo(text)
    )
    assert (response.status_code, codes(response)) == (400, ["BAD_REQUEST"])
    assert ran == []
    asked = await by_post(server, extensions=apollo(text))
    assert codes(asked) == ["PERSISTED_QUERY_NOT_FOUND"]


@pytest.mark.parametrize("bad", ["{", "{nope}", "{" + "hello " * 3000 + "}"])
async def test_what_cannot_run_is_not_stored(server: Server, settings: Settings, bad: str) -> None:
    await by_post(server, query=bad, extensions=apollo(bad))
    async with connect_cache(settings) as cache:
        assert await cache.get(text_key(schema._schema, digest(bad))) is None
    assert codes(await by_post(server, extensions=apollo(bad))) == ["PERSISTED_QUERY_NOT_FOUND"]


async def test_what_lies_under_a_false_hash_in_redis_never_runs(
    server: Server, settings: Settings
) -> None:
    text = unique(settings)
    async with connect_cache(settings) as cache:
        for stored in (b"mutation{write}", b"\xff"):
            await cache.put(text_key(schema._schema, digest(text)), stored, 60)
            response = await by_post(server, extensions=apollo(text))
            assert codes(response) == ["PERSISTED_QUERY_NOT_FOUND"]
    assert ran == []


async def test_what_no_longer_validates_is_asked_for_again(
    server: Server, settings: Settings
) -> None:
    text = f"{{fieldOfThePast}} #{settings.data_path}"
    async with connect_cache(settings) as cache:
        await cache.put(text_key(schema._schema, digest(text)), text.encode(), 60)
    response = await by_post(server, extensions=apollo(text))
    assert codes(response) == ["PERSISTED_QUERY_NOT_FOUND"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": "0" * 63}}},
        {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": 5}}},
        {"extensions": {"persistedQuery": []}},
        {"documentId": "sha256:" + "A" * 64},
        {"documentId": ""},
        {"documentId": 5},
        {"documentId": "a" * 257},
        {"documentId": "a" * 1_000_000},
        {"documentId": "sha256:" + "1" * 64, "extensions": apollo("other")},
    ],
)
async def test_a_malformed_name_is_refused(server: Server, parameters: dict[str, Any]) -> None:
    response = await by_post(server, **parameters)
    assert (response.status_code, codes(response)) == (400, ["BAD_REQUEST"])


async def test_a_mutation_by_hash_takes_post(server: Server) -> None:
    text = "mutation{write}"
    await by_post(server, query=text, extensions=apollo(text))
    ran.clear()
    response = await by_get(server, extensions=apollo(text))
    assert (response.status_code, codes(response)) == (405, ["METHOD_NOT_ALLOWED"])
    assert ran == []


@pytest.mark.parametrize("send", [by_get, by_post])
async def test_another_version_is_not_supported(server: Server, send: Any) -> None:
    """Clients go on with texts when they read this."""
    named = {"persistedQuery": {"version": 2, "sha256Hash": "0" * 64}}
    for more in ({}, {"query": "{hello}"}):
        response = await send(server, extensions=named, **more)
        assert (response.status_code, codes(response)) == (400, ["PERSISTED_QUERY_NOT_SUPPORTED"])
        assert response.json()["errors"][0]["message"] == "PersistedQueryNotSupported"
        assert "no-store" in response.headers["cache-control"]
    assert ran == []


async def test_what_nobody_has_published_is_not_found_by_its_id(server: Server) -> None:
    for id in ("of-nobody", "0" * 64, "0" * 32):
        response = await by_get(server, documentId=id)
        assert (response.status_code, codes(response)) == (200, ["PERSISTED_QUERY_NOT_FOUND"])


HELLO = "query Hello($n:String!){hello(name:$n)}"
EVENTS = {"accept": "text/event-stream"}


@pytest.fixture
async def trusting(settings: Settings, database: Database) -> AsyncIterator[Server]:
    """A server of published operations only, with two of them."""
    await publish(
        database,
        "web",
        [
            Publication(id, text, digest(text), None, kind, [])
            for id, text, kind in (
                ("hello", HELLO, "query"),
                ("write", "mutation{write}", "mutation"),
            )
        ],
        {},
    )
    hearing = {"trusted_only": True, "response_cache": True}  # of changes, at once
    async with serving(settings.model_copy(update=hearing)) as server:
        yield server


async def test_published_operations_run_by_every_door(trusting: Server) -> None:
    variables, expected = {"n": "Ada"}, {"data": {"hello": "Hello Ada"}}
    for named in (
        {"documentId": "hello"},
        {"documentId": f"sha256:{digest(HELLO)}"},
        {"documentId": digest(HELLO)},
        {"extensions": apollo(HELLO)},
        {"query": HELLO},
        {"query": HELLO, "extensions": apollo(HELLO)},
    ):
        for send in (by_get, by_post):
            response = await send(trusting, variables=variables, **named)
            assert response.json() == expected, named
        streamed = await trusting.client.post(
            "/graphql", json={"variables": variables, **named}, headers=EVENTS
        )
        event = orjson.dumps(expected).decode()
        assert streamed.text == f":\n\nevent: next\ndata: {event}\n\nevent: complete\ndata: \n\n"
    response = await by_post(trusting, documentId="write")
    assert response.json() == {"data": {"write": "written"}}
    response = await by_get(trusting, documentId="write")
    assert (response.status_code, codes(response)) == (405, ["METHOD_NOT_ALLOWED"])


async def test_nothing_else_runs(trusting: Server, database: Database) -> None:
    ada, root = await insert_actor("ada"), await insert_actor("root", is_operator=True)
    every = list(Permission)
    _, of_ada = await issue_token(database, ada.id, "t", every)
    _, of_root = await issue_token(database, root.id, "t", every)
    _, narrow = await issue_token(database, root.id, "t", [Permission.READ])
    await by_post(trusting, documentId="hello", variables={"n": "Ada"})
    ran.clear()
    others = (
        {"query": "{hello}"},
        {"query": "{__schema{description}}"},
        {"query": "mutation{write}  "},
        {"query": "{"},
        {"query": "{hello}", "extensions": apollo("{hello}")},
        {"extensions": apollo("{hello}")},
        {"documentId": "bye"},
    )
    for other in others:
        response = await by_post(trusting, **other)
        assert (response.status_code, codes(response)) == (403, ["PERSISTED_QUERY_REQUIRED"]), other
        assert "no-store" in response.headers["cache-control"]
        streamed = await trusting.client.post("/graphql", json=other, headers=EVENTS)
        assert "PERSISTED_QUERY_REQUIRED" in streamed.text
    for token in (of_ada, narrow):
        headers = {"authorization": f"Bearer {token}"}
        for text in ("{hello}", "{__schema{description}}", "mutation{write}  "):
            response = await trusting.ask(text, headers)
            assert codes(response) == ["PERSISTED_QUERY_REQUIRED"], text
    assert ran == []
    headers = {"authorization": f"Bearer {of_root}"}
    for _ in range(2):
        assert (await trusting.ask("{hello}", headers)).json() == {"data": {"hello": "Hello you"}}
        assert (await trusting.ask("{__typename}", headers)).json()["data"] is not None
        # What an operator has sent is nobody else's for that.
        assert codes(await trusting.ask("{hello}")) == ["PERSISTED_QUERY_REQUIRED"]


async def test_a_retired_operation_runs_no_longer(trusting: Server, database: Database) -> None:
    asked = {"documentId": "hello", "variables": {"n": "Ada"}}
    assert (await by_get(trusting, **asked)).json() == {"data": {"hello": "Hello Ada"}}
    await retire(database, ["hello"])
    async with asyncio.timeout(GUARD_SECONDS):
        while "errors" not in (response := await by_get(trusting, **asked)).json():
            await asyncio.sleep(0.01)
    assert (response.status_code, codes(response)) == (403, ["PERSISTED_QUERY_REQUIRED"])
