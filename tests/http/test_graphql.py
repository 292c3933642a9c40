"""Requests in, answers out: what GraphQL over HTTP and our conventions say about each."""

import asyncio
from collections.abc import AsyncIterator
from itertools import product
from typing import cast

import orjson
import pytest
from graphql import parse

from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import Database
from modelharbor.execution.documents import Document, Operation
from modelharbor.execution.persisted import Resolved
from modelharbor.http.operations import REMEMBERED_BYTES, Operations, Prepared
from modelharbor.observability.metrics import Metrics
from modelharbor.schema import schema as served_schema
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model
from tests.http.serving import SECRET, Query, Server, codes, ran, serving

pytestmark = pytest.mark.anyio
RESPONSE_JSON = "application/graphql-response+json"


async def test_answers_a_query_by_post(server: Server) -> None:
    response = await server.ask("query($n:String!){hello(name:$n)}", variables={"n": "Ada"})
    assert response.status_code == 200
    assert response.json() == {"data": {"hello": "Hello Ada"}}
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.headers["cache-control"] == "private, no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "Accept" in response.headers["vary"]
    assert "access-control-allow-origin" not in response.headers


async def test_answers_a_query_by_get(server: Server) -> None:
    response = await server.client.get(
        "/graphql",
        params={
            "query": "query A($n:String!){hello(name:$n)} query B{item{name}}",
            "variables": '{"n":"Ada"}',
            "operationName": "A",
        },
    )
    assert response.json() == {"data": {"hello": "Hello Ada"}}


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        (RESPONSE_JSON, RESPONSE_JSON),
        (f"{RESPONSE_JSON}, application/json", RESPONSE_JSON),
        (f"application/json, {RESPONSE_JSON}", "application/json"),
        (f"application/json;q=0.5, {RESPONSE_JSON}", RESPONSE_JSON),
        (f"{RESPONSE_JSON};q=0.1, application/json;q=0.9", "application/json"),
        (f"text/html, {RESPONSE_JSON};q=0.2", RESPONSE_JSON),
        ("Application/JSON ; charset=utf-8", "application/json"),
    ],
)
async def test_the_media_type_is_negotiated(server: Server, accept: str, media: str) -> None:
    response = await server.ask("{hello}", {"accept": accept})
    assert response.headers["content-type"] == f"{media}; charset=utf-8"


@pytest.mark.parametrize("accept", ["text/plain", "application/json;q=0", "application/json;q=x"])
async def test_other_media_types_are_not_acceptable(server: Server, accept: str) -> None:
    response = await server.ask("{hello}", {"accept": accept})
    assert (response.status_code, codes(response)) == (406, ["NOT_ACCEPTABLE"])
    assert ran == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("{", "GRAPHQL_PARSE_FAILED"),
        ("{hello(name:" + "[" * 5000 + "]" * 5000 + ")}", "GRAPHQL_PARSE_FAILED"),
        ("{hello(name:" + "[" * 900 + "]" * 900 + ")}", "GRAPHQL_PARSE_FAILED"),
        ("{nope}", "GRAPHQL_VALIDATION_FAILED"),
        (
            "{item{...A}} fragment A on Item{...B} fragment B on Item{...A}",
            "GRAPHQL_VALIDATION_FAILED",
        ),
        ("query($n:Int!){hello}", "GRAPHQL_VALIDATION_FAILED"),
        ("query($n:String!){hello(name:$n)}", "BAD_USER_INPUT"),
        ("fragment A on Item{name}", "GRAPHQL_VALIDATION_FAILED"),
        ("type A{b:Int}", "GRAPHQL_VALIDATION_FAILED"),
    ],
)
async def test_an_operation_that_cannot_begin_has_no_data(
    server: Server, query: str, code: str
) -> None:
    new = await server.ask(query, {"accept": RESPONSE_JSON})
    old = await server.ask(query, {"accept": "application/json"})
    assert (new.status_code, old.status_code) == (400, 200)
    for response in (new, old):
        assert codes(response)[0] == code
        assert "data" not in response.json()
    assert ran == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"5",
        b'"x"',
        b"true",
        b"{",
        b"\xff\xfe",
        b'{"query":"{hello}","variables":{"a":"\xff"}}',
        b'{"query":"\\ud800"}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"query":"{hello}","variables":' + b'{"a":' * 1000 + b"1" + b"}" * 1001,
        b'{"query":"{hello}","variables":' + b'{"a":' * 129 + b"1" + b"}" * 130,
        b'{"query":"{hello}","variables":{"a":1e999}}',
        b'{"query":"{hello}","variables":{"a":NaN}}',
        b"[" + b",".join([b'{"query":"{hello}"}'] * 200) + b"]",
        b"{}",
        b'{"query":null}',
        b'{"query":5}',
        b'{"query":["{hello}"]}',
        b'{"query":{"a":1}}',
        b'{"query":"{hello}","variables":"x"}',
        b'{"query":"{hello}","variables":[1]}',
        b'{"query":"{hello}","variables":0}',
        b'{"query":"{hello}","operationName":7}',
        b'{"query":"{hello}","operationName":false}',
        b'{"query":"{hello}","operationName":"Other"}',
        b'{"query":"query A{hello} query B{hello}"}',
        b'{"query":"{hello}","extensions":[]}',
        b'{"query":"{hello}","extensions":"x"}',
        b'{"query":"{hello}","extensions":{"persistedQuery":5}}',
        b'{"query":"{hello}","extensions":{"persistedQuery":{}}}',
        b'{"query":"{hello}","extensions":{"persistedQuery":{"version":true,"sha256Hash":"a"}}}',
        b'{"query":"{hello}","documentId":5}',
        b'{"documentId":"sha256:nonsense"}',
    ],
)
async def test_a_bad_body_is_a_coded_400(server: Server, body: bytes) -> None:
    response = await server.post(body)
    assert (response.status_code, codes(response)) == (400, ["BAD_REQUEST"])
    assert len(response.content) < 4096
    assert ran == []


async def test_what_is_nested_less_is_taken(server: Server) -> None:
    body = b'{"query":"{hello}","variables":' + b'{"a":' * 126 + b"1" + b"}" * 127
    assert (await server.post(body)).json() == {"data": {"hello": "Hello you"}}


async def test_huge_numbers_reach_no_resolver(server: Server) -> None:
    for number in ("1" * 400, "123456789012345678901234567890", "-9223372036854775809"):
        body = f'{{"query":"query($n:Int){{items(first:$n){{totalCount}}}}","variables":{{"n":{number}}}}}'
        response = await server.post(body.encode())
        assert response.status_code in {200, 400}
        assert codes(response)[0] in {"BAD_USER_INPUT", "BAD_REQUEST"}
    assert ran == []


@pytest.mark.parametrize(
    "params",
    [
        {"query": "{hello}", "variables": "{"},
        {"query": "{hello}", "variables": "[]"},
        {"query": "{hello}", "variables": "5"},
        {"query": "{hello}", "extensions": "[" * 5000},
        {"variables": "{}"},
    ],
)
async def test_bad_parameters_of_get_are_a_coded_400(
    server: Server, params: dict[str, str]
) -> None:
    response = await server.client.get("/graphql", params=params)
    assert (response.status_code, codes(response)) == (400, ["BAD_REQUEST"])
    assert ran == []


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "text/plain; application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        "application/graphql",
    ],
)
async def test_only_json_is_taken(server: Server, content_type: str) -> None:
    """What a page of another site may send without being asked first must not run."""
    response = await server.post(b'{"query":"mutation{write}"}', content_type=content_type)
    assert (response.status_code, codes(response)) == (415, ["UNSUPPORTED_MEDIA_TYPE"])
    assert ran == []


async def test_a_compressed_body_is_not_unpacked(server: Server) -> None:
    response = await server.post(b"\x1f\x8b" + b"\0" * 100, content_encoding="gzip")
    assert (response.status_code, codes(response)) == (415, ["UNSUPPORTED_MEDIA_TYPE"])


async def test_a_mutation_takes_post(server: Server) -> None:
    response = await server.client.get("/graphql", params={"query": "mutation{write}"})
    assert (response.status_code, codes(response)) == (405, ["METHOD_NOT_ALLOWED"])
    assert response.headers["allow"] == "POST"
    assert ran == []
    assert (await server.ask("mutation{write}")).json() == {"data": {"write": "written"}}


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
async def test_other_methods_are_not_allowed(server: Server, method: str) -> None:
    response = await server.client.request(method, "/graphql", params={"query": "{hello}"})
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, POST"
    assert ran == []


async def test_what_the_guard_saw_is_what_runs(server: Server) -> None:
    response = await server.post(b'{"query":"{hello}","query":"mutation{write}"}')
    assert response.json() == {"data": {"write": "written"}}
    assert ran == ["write"]


async def test_the_body_limit_holds_with_and_without_a_length(settings: Settings) -> None:
    head, tail = b'{"query":"{hello}","x":"', b'"}'
    async with serving(settings) as server:
        limit = settings.max_body_bytes
        fits = head + b"x" * (limit - len(head) - len(tail)) + tail
        assert len(fits) == limit
        assert (await server.post(fits)).json() == {"data": {"hello": "Hello you"}}
        ran.clear()

        taken = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal taken
            for _ in range(200):
                taken += 65536
                yield b"x" * 65536

        for response in (await server.post(fits + b" "), await server.post(endless())):
            assert (response.status_code, codes(response)) == (413, ["PAYLOAD_TOO_LARGE"])
    assert ran == []


@pytest.mark.parametrize(
    "query",
    [
        "query={hello}%ff",
        'query={hello(name:"%C3")}',
        "query={hello}&variables=%80",
        "query={hello}&%E4=1",
    ],
)
async def test_a_query_string_is_in_utf_8(server: Server, query: str) -> None:
    response = await server.client.get(f"/graphql?{query}")
    assert (response.status_code, codes(response)) == (400, ["BAD_REQUEST"])
    assert ran == []
    fits = await server.client.get('/graphql?query={hello(name:"%C3%A9+%F0%9F%90%88")}')
    assert fits.json() == {"data": {"hello": "Hello é 🐈"}}


async def test_a_body_has_its_time(settings: Settings) -> None:
    left = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        try:
            yield b'{"query":'
            await asyncio.sleep(60)
            yield b'"{hello}"}'
        finally:
            left.set()

    async with serving(settings.model_copy(update={"body_timeout_seconds": 0.1})) as server:
        response = await server.post(stalled())
    assert (response.status_code, codes(response)) == (408, ["REQUEST_TIMEOUT"])
    assert response.headers["connection"] == "close"  # what is still to come is no next request
    assert left.is_set()
    assert ran == []


async def test_the_text_limit_counts_bytes(server: Server, settings: Settings) -> None:
    limit = settings.max_query_bytes
    fits = "{hello}#" + "é" * ((limit - 8) // 2)
    assert len(fits.encode()) == limit
    assert (await server.ask(fits)).json() == {"data": {"hello": "Hello you"}}
    ran.clear()
    for text in (fits + " ", "#" + "x" * 500_000 + "\n{hello}"):
        response = await server.ask(text)
        assert (response.status_code, codes(response)) == (413, ["PAYLOAD_TOO_LARGE"])
    assert ran == []


async def test_unexpected_errors_are_masked_and_logged(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    response = await server.ask("{broken hello}", {"x-request-id": "r-1"})
    assert response.status_code == 200
    assert response.json() == {
        "data": {"broken": None, "hello": "Hello you"},
        "errors": [
            {
                "message": "Internal server error",
                "locations": [{"line": 1, "column": 2}],
                "path": ["broken"],
                "extensions": {"code": "INTERNAL_SERVER_ERROR", "requestId": "r-1"},
            }
        ],
    }
    assert SECRET not in response.text
    assert SECRET in caplog.text


async def test_an_error_of_a_scalar_is_masked(server: Server) -> None:
    response = await server.ask("{tooLarge}")
    assert codes(response) == ["INTERNAL_SERVER_ERROR"]
    assert str(2**40) not in response.text


async def test_a_null_that_reaches_the_root_is_still_an_answer(server: Server) -> None:
    response = await server.ask("{needed}", {"accept": RESPONSE_JSON})
    assert response.status_code == 200
    assert response.json()["data"] is None
    assert codes(response) == ["INTERNAL_SERVER_ERROR"]


async def test_expected_errors_keep_code_and_message(server: Server) -> None:
    error = (await server.ask("{forbidden}")).json()["errors"][0]
    assert (error["message"], error["extensions"]["code"]) == ("Not yours.", "FORBIDDEN")


async def test_validation_messages_survive(server: Server) -> None:
    error = (await server.ask("{helo}")).json()["errors"][0]
    assert error["message"] == "Cannot query field 'helo' on type 'Query'. Did you mean 'hello'?"


async def test_errors_in_an_answer_are_few(server: Server, settings: Settings) -> None:
    response = await server.ask("{brokenItems{name}}")
    assert len(codes(response)) == settings.max_errors
    assert len(response.json()["data"]["brokenItems"]) == 50


@pytest.mark.parametrize(
    "query",
    [
        "{" + " ".join(f"zz{i}" for i in range(5000)) + "}",
        "{item{" + " ".join(f"zz{i}" for i in range(900)) + "}}",
        "{" + "z" * 32_000 + "}",
        "{item{" + " ".join("z" * 1000 + str(i) for i in range(30)) + "}}",
    ],
)
async def test_an_answer_to_a_flood_of_mistakes_is_small(server: Server, query: str) -> None:
    response = await server.ask(query)
    assert response.json()["errors"]
    assert len(response.content) < 8192


async def test_request_ids(server: Server) -> None:
    kept = await server.ask("{nope}", {"x-request-id": "abc.DEF_1-2"})
    assert kept.headers["x-request-id"] == "abc.DEF_1-2"
    assert kept.json()["errors"][0]["extensions"]["requestId"] == "abc.DEF_1-2"
    for bad in ("", "a b", "x" * 129, "a\tb", "<script>", "a\u00e9"):
        made = await server.client.post(
            "/graphql", json={"query": "{nope}"}, headers=[(b"x-request-id", bad.encode())]
        )
        found = made.headers["x-request-id"]
        assert found != bad
        assert len(found) == 32
        assert made.json()["errors"][0]["extensions"]["requestId"] == found


async def test_no_token_is_anonymous_and_a_bad_one_is_refused(server: Server) -> None:
    for bad in ("Bearer nonsense", "Basic abc", "", "Bearer mh_" + "a" * 67):
        response = await server.ask("{hello}", {"authorization": bad})
        assert (response.status_code, codes(response)) == (401, ["UNAUTHENTICATED"])
        assert response.headers["www-authenticate"] == "Bearer"
    assert ran == []


async def test_an_operation_has_its_time(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"operation_timeout_seconds": 0.1})) as server:
        response = await server.ask("{slow hello}")
        assert response.status_code == 200
        assert response.json()["data"] is None
        assert codes(response) == ["TIMEOUT"]
        assert Query.cancelled == ["slow"]


async def test_a_command_that_takes_too_long_is_a_timeout(server: Server) -> None:
    response = await server.ask("{awaited}")
    assert response.json()["data"] == {"awaited": None}
    assert codes(response) == ["TIMEOUT"]


async def test_cost_is_told_when_asked_for(server: Server, settings: Settings) -> None:
    asked = await server.ask("{stored items(first:3){nodes{name}}}", {"x-modelharbor-cost": "1"})
    cost = asked.json()["extensions"]["cost"]
    assert cost.pop("dbMs") > 0
    status = cost.pop("throttleStatus")
    assert (status["maximumAvailable"], status["restoreRate"]) == (1_000_000, 200_000)
    assert 0 < status["currentlyAvailable"] <= 1_000_000
    assert cost == {
        "requested": 3,
        "actual": 0,
        "dbCommands": 1,
        "loaderBatches": 0,
        "cacheHits": 0,
    }
    assert "extensions" not in (await server.ask("{stored}")).json()
    async with serving(settings.model_copy(update={"debug": True})) as debugging:
        assert (await debugging.ask("{hello}")).json()["extensions"]["cost"]["dbCommands"] == 0


async def test_both_engines_tell_of_the_same_cost(database: Database, settings: Settings) -> None:
    acme = await insert_actor("acme")
    for name in ("a", "b"):
        await insert_model(acme, name, tags=["x"])
    query = "{models(first:5){totalCount nodes{name owner{login}} facets(fields:[TAG]){buckets{value count}}}}"
    told = []
    for compiled in (True, False):
        changed = settings.model_copy(update={"compiled_plans": compiled})
        async with serving(changed, None) as server, connect_cache(settings) as cache:
            await cache.redis.flushdb()
            for _ in range(2):  # the second time the cache has the facets
                answer = (await server.ask(query, {"x-modelharbor-cost": "1"})).json()
                assert len(answer["data"]["models"]["nodes"]) == 2
                cost = answer["extensions"]["cost"]
                assert 0 < cost.pop("dbMs") < 5000
                assert cost.pop("throttleStatus")["maximumAvailable"] == 1_000_000
                told.append(cost)
    first = {
        "requested": 26,
        "actual": 20,
        "dbCommands": 4,
        "loaderBatches": 4,
        "cacheHits": 0,
    }
    assert told == [first, {**first, "dbCommands": 3, "cacheHits": 1}] * 2


async def test_reads_that_the_cache_answered_are_counted(
    server: Server, settings: Settings
) -> None:
    async with connect_cache(settings) as cache:
        await cache.redis.delete(cache.name("mh:test"))
        for hits in (0, 1, 2):
            query = "{" + " ".join(f"c{i}:cached" for i in range(max(hits, 1))) + "}"
            asked = await server.ask(query, {"x-modelharbor-cost": "1"})
            assert set(asked.json()["data"].values()) == {hits > 0}
            assert asked.json()["extensions"]["cost"]["cacheHits"] == hits
            await cache.put("mh:test", b"1", 60)
        await cache.redis.delete(cache.name("mh:test"))


async def test_the_answer_limit_counts_bytes_before_compression(settings: Settings) -> None:
    size = len(b'{"data":{"text":""}}')
    async with serving(settings.model_copy(update={"max_answer_bytes": 10_000})) as server:
        headers = {"accept": RESPONSE_JSON, "accept-encoding": "gzip", "x-request-id": "r"}
        fits = await server.ask(f"{{text(size:{10_000 - size})}}", headers)
        assert len(fits.json()["data"]["text"]) == 10_000 - size
        over = await server.ask(f"{{text(size:{10_001 - size})}}", headers)
        assert over.status_code == 200
        assert over.json() == {
            "data": None,
            "errors": [
                {
                    "message": "The answer has 10001 bytes; the limit is 10000: ask for less at once.",
                    "extensions": {
                        "code": "OPERATION_TOO_COMPLEX",
                        "measure": "answer",
                        "value": 10_001,
                        "limit": 10_000,
                        "requestId": "r",
                    },
                }
            ],
        }
        told = await server.ask("{text(size:20000)}", {"x-modelharbor-cost": "1"})
        assert told.json()["extensions"]["cost"]["requested"] == 0


@pytest.mark.parametrize("encoding", ["identity", "gzip", "br", "zstd"])
@pytest.mark.parametrize("size", [65_536 - 20, 65_537 - 20, 131_072 - 20, 300_000])
async def test_large_answers_arrive_whole(server: Server, encoding: str, size: int) -> None:
    response = await server.ask(f"{{text(size:{size})}}", {"accept-encoding": encoding})
    assert response.json() == {"data": {"text": "x" * size}}
    assert response.headers.get("content-encoding", "identity") == encoding
    if encoding == "identity":
        assert response.headers["content-length"] == str(size + 20)


async def test_browsers_get_the_page_and_nobody_else(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"graphiql": False})) as server:
        html = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
        page = await server.client.get("/graphql", headers=html)
        assert (page.status_code, codes(page)) == (404, ["NOT_FOUND"])
        query = await server.client.get("/graphql", params={"query": "{hello}"}, headers=html)
        assert query.json() == {"data": {"hello": "Hello you"}}
        anything = await server.client.get("/graphql", headers={"accept": "*/*"})
        assert (anything.status_code, codes(anything)) == (400, ["BAD_REQUEST"])


async def test_introspection_can_be_off(settings: Settings) -> None:
    async with serving(settings.model_copy(update={"introspection": False})) as server:
        for query in (
            "{__schema{types{name}}}",
            '{a:__type(name:"Query"){name}}',
            "{...A} fragment A on Query{__schema{types{name}}}",
        ):
            response = await server.ask(query)
            assert codes(response) == ["INTROSPECTION_DISABLED"]
        assert "Did you mean" not in (await server.ask("{helo}")).text
        assert (await server.ask("{__typename}")).json() == {"data": {"__typename": "Query"}}


async def test_answers_are_compressed_on_request(server: Server) -> None:
    query = "{__schema{types{name description}}}"
    plain = await server.ask(query, {"accept-encoding": "identity"})
    for encoding, accept in product(("gzip", "br", "zstd"), ("application/json", RESPONSE_JSON)):
        response = await server.ask(query, {"accept-encoding": encoding, "accept": accept})
        assert response.headers["content-encoding"] == encoding
        assert orjson.loads(response.content) == plain.json()
        assert "accept-encoding" in response.headers["vary"].lower()


async def test_what_came_by_get_is_no_body(server: Server) -> None:
    """Whatever is remembered of requests: bytes mean what they mean in their place."""
    address = "query=%7Bhello%7D"
    assert (await server.client.get(f"/graphql?{address}")).json() == {
        "data": {"hello": "Hello you"}
    }
    for body in (address, f"?{address}", f"GET {address}"):
        sent = {"content-type": "application/json"}
        response = await server.client.post("/graphql", content=body, headers=sent)
        assert (response.status_code, codes(response)) == (400, ["BAD_REQUEST"])


def test_what_is_remembered_of_requests_is_bounded_with_their_documents(
    settings: Settings,
) -> None:
    operations = Operations(served_schema, settings, Metrics())
    tree = parse("{ hello }")  # what is counted is the text
    for number in range(3000):
        text = f"query Q{number}{{" + "hello " * 500 + "}"
        document = Document(text, f"{number:064x}", tree, {})
        resolved = Resolved(document, None, "hash")
        operation = cast("Operation", None)
        prepared = Prepared(resolved, document, operation, {}, None, 1)
        operations.remember(f"{number}".encode(), 0, prepared)
    assert 0 < operations._remembered.bytes <= REMEMBERED_BYTES
    assert len(operations._remembered) <= REMEMBERED_BYTES // 3000
