"""The clients that people use, as they come from their registries."""

import pytest

from tests.conformance.driving import Driver

pytestmark = pytest.mark.anyio
TO_THE_END = ["QUEUED", "RUNNING", "SUCCEEDED"]
JSON, EVENTS = "application/graphql-response+json", "text/event-stream"
ADA = {"data": {"viewer": {"login": "ada"}}}


async def test_graphql_ws(driver: Driver) -> None:
    assert await driver.run("graphql-ws.js") == {
        "states": TO_THE_END,
        "query": ADA,
        "mutation": {"model": {"fullName": "ada/by-socket"}, "userErrors": []},
        "together": [{"data": {"__typename": "Query"}}] * 3,
        "syntax": "GRAPHQL_PARSE_FAILED",
        "invalid": "GRAPHQL_VALIDATION_FAILED",
        "unknown": "PERSISTED_QUERY_NOT_FOUND",
        "kept": ADA,
        "known": ADA,
        "documentId": ADA,
        "resumed": ["QUEUED", "RUNNING", "RETRYING", "RUNNING", "SUCCEEDED"],
        "retries": [False, True, True],
        "closed": {
            "badToken": 4403,
            "malformed": 4400,
            "early": 4401,
            "late": 4408,
            "twice": 4429,
            "legacy": 1006,  # `ws` hangs up itself when none of its protocols is chosen; else 4406
            "sameId": 4409,
        },
    }


async def test_graphql_sse(driver: Driver) -> None:
    assert await driver.run("graphql-sse.js") == {
        "query": [ADA],
        "syntax": ["GRAPHQL_PARSE_FAILED"],
        "invalid": ["GRAPHQL_VALIDATION_FAILED"],
        "foreign": ["NOT_FOUND"],
        "states": TO_THE_END,
        "members": [1, 0],
    }


async def test_urql(driver: Driver) -> None:
    assert await driver.run("urql.js") == {
        "query": "ada",
        "get": "ada",
        "error": "GRAPHQL_VALIDATION_FAILED",
        "mutation": "ada/urql",
        "streamed": [*TO_THE_END, "complete"],
        "foreign": "NOT_FOUND",
        "socket": [*TO_THE_END, "complete"],
        "queryBeside": "ada",
        "media": [JSON, JSON, JSON, JSON, EVENTS, EVENTS, JSON],
    }


async def test_apollo(driver: Driver) -> None:
    assert await driver.run("apollo.js") == {
        "query": "ada",
        "mutation": "ada/apollo",
        "error": "GRAPHQL_VALIDATION_FAILED",
        "persisted": "ada",
        "states": [*TO_THE_END, "complete"],
        "media": [JSON] * 5,
    }
