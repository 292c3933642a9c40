"""Documents named by hash: Apollo's APQ and `documentId`, one store."""

from hashlib import sha256
from typing import Any

import orjson
import pytest
from httpx import Response

from modelharbor.cache.client import connect_cache
from modelharbor.cache.keys import persisted_document
from modelharbor.settings import Settings
from tests.http.serving import Server, codes, ran, serving

pytestmark = pytest.mark.anyio


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
        assert await cache.get(persisted_document(digest(bad))) is None
    assert codes(await by_post(server, extensions=apollo(bad))) == ["PERSISTED_QUERY_NOT_FOUND"]


async def test_what_lies_under_a_false_hash_in_redis_never_runs(
    server: Server, settings: Settings
) -> None:
    text = unique(settings)
    async with connect_cache(settings) as cache:
        for stored in (b"mutation{write}", b"\xff"):
            await cache.put(persisted_document(digest(text)), stored, 60)
            response = await by_post(server, extensions=apollo(text))
            assert codes(response) == ["PERSISTED_QUERY_NOT_FOUND"]
    assert ran == []


async def test_what_no_longer_validates_is_asked_for_again(
    server: Server, settings: Settings
) -> None:
    text = f"{{fieldOfThePast}} #{settings.data_path}"
    async with connect_cache(settings) as cache:
        await cache.put(persisted_document(digest(text)), text.encode(), 60)
    response = await by_post(server, extensions=apollo(text))
    assert codes(response) == ["PERSISTED_QUERY_NOT_FOUND"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"extensions": {"persistedQuery": {"version": 2, "sha256Hash": "0" * 64}}},
        {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": "0" * 63}}},
        {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": 5}}},
        {"extensions": {"persistedQuery": []}},
        {"documentId": "sha256:" + "A" * 64},
        {"documentId": "0" * 64},
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
