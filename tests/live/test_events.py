"""Subscriptions and other operations as server-sent events."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from modelharbor.db.jobs import JobState

from .client import WATCH
from .serving import Served, id_of
from .stream import TAKES_EVENTS, open_stream

pytestmark = pytest.mark.anyio
URQL_QUERIES = (
    "application/graphql-response+json, application/graphql+json, application/json,"
    " text/event-stream, multipart/mixed"
)
URQL_SUBSCRIPTIONS = "text/event-stream, multipart/mixed"


def state(event: Any) -> str:
    found: str = event["jobProgress"]["job"]["state"]
    return found


async def test_a_job_is_watched_to_its_end_and_gone_on_with(served: Served) -> None:
    job = await served.put()
    async with open_stream(served.http, WATCH, served.token, id=id_of(job)) as stream:
        headers = stream.response.headers
        assert stream.response.status_code == 200
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "private, no-store"
        assert headers["x-accel-buffering"] == "no"
        assert headers["vary"] == "Accept"
        # httpx takes compressed answers, and a compressor for each stream would take much memory.
        assert "gzip" in stream.response.request.headers["accept-encoding"]
        assert "content-encoding" not in headers
        first = await stream.next()
        assert state(first) == "QUEUED"
        await served.become(job, JobState.RUNNING)
        assert state(await stream.next()) == "RUNNING"
        await served.progress(job, 3)
        assert (await stream.next())["jobProgress"]["job"]["progress"]["current"] == "3"
    await served.become(job, JobState.SUCCEEDED)
    after = first["jobProgress"]["cursor"]
    async with open_stream(served.http, WATCH, served.token, id=id_of(job), after=after) as stream:
        assert [state(await stream.next()) for _ in range(2)] == ["RUNNING", "SUCCEEDED"]
        assert await stream.event() == ("complete", None)
        assert await stream.event() is None


async def raw(served: Served, body: dict[str, Any], **headers: str) -> httpx.Response:
    authorized = {"authorization": f"Bearer {served.token}", **headers}
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.post(served.http, json=body, headers=authorized)


async def test_the_bytes_are_those_of_the_protocol(served: Served) -> None:
    answer = await raw(served, {"query": "{ viewer { login } }"}, **TAKES_EVENTS)
    assert answer.content == (
        b':\n\nevent: next\ndata: {"data":{"viewer":{"login":"ada"}}}\n\n'
        b"event: complete\ndata: \n\n"
    )
    # A mutation too; by GET as well, but no mutation.
    create = 'mutation { createModel(input: {owner: "ada", name: "m"}) { userErrors { code } } }'
    answer = await raw(served, {"query": create}, **TAKES_EVENTS)
    assert answer.text.split("\n\n")[1] == (
        'event: next\ndata: {"data":{"createModel":{"userErrors":[]}}}'
    )
    async with httpx.AsyncClient() as client:
        got = await client.get(served.http, params={"query": "{__typename}"}, headers=TAKES_EVENTS)
        assert got.text.split("\n\n")[1] == 'event: next\ndata: {"data":{"__typename":"Query"}}'
        got = await client.get(served.http, params={"query": create}, headers=TAKES_EVENTS)
        assert got.status_code == 405
        assert got.json()["errors"][0]["extensions"]["code"] == "METHOD_NOT_ALLOWED"


async def test_a_subscription_by_get_for_what_cannot_post(served: Served) -> None:
    job = await served.put()
    await served.become(job, JobState.RUNNING, JobState.SUCCEEDED)
    parameters = {"query": WATCH, "variables": json.dumps({"id": id_of(job)})}
    headers = {**TAKES_EVENTS, "authorization": f"Bearer {served.token}"}
    async with httpx.AsyncClient() as client:
        got = await client.get(served.http, params=parameters, headers=headers)
    assert [line for line in got.text.splitlines() if line.startswith("event")] == [
        "event: next",
        "event: complete",
    ]
    assert '"state":"SUCCEEDED"' in got.text


async def test_who_does_not_take_events_gets_none(served: Served) -> None:
    job = await served.put()
    await served.become(job, JobState.RUNNING, JobState.SUCCEEDED)
    watch = {"query": WATCH, "variables": {"id": id_of(job)}}
    query = {"query": "{ __typename }"}
    js, new, events = (
        "application/json; charset=utf-8",
        "application/graphql-response+json; charset=utf-8",
        "text/event-stream; charset=utf-8",
    )
    cases: list[tuple[dict[str, Any], str, int, str]] = [
        (query, URQL_QUERIES, 200, new),
        (query, "application/json, text/event-stream", 200, js),
        (query, "*/*", 200, js),
        (query, "text/event-stream;q=0.1, application/json", 200, js),
        (query, "text/event-stream, application/json;q=0.9", 200, events),
        (query, "text/event-stream, application/json", 200, events),
        (watch, URQL_SUBSCRIPTIONS, 200, events),
        (watch, URQL_QUERIES, 200, events),
        (watch, "application/json", 406, js),
        (watch, "application/graphql-response+json", 406, new),
        (watch, "*/*", 406, js),
        (watch, "text/event-stream;q=0, application/json", 406, js),
        (query, "text/html", 406, js),
    ]
    for body, accept, status, media in cases:
        answer = await raw(served, body, accept=accept)
        assert (answer.status_code, answer.headers["content-type"]) == (status, media), accept
        if status == 406:
            (error,) = answer.json()["errors"]
            assert error["extensions"]["code"] == "NOT_ACCEPTABLE", accept


async def test_what_is_wrong_with_an_operation_is_told_by_events(served: Served) -> None:
    """As the protocol has it; what is wrong with the request itself, by its status."""
    job = await served.put()
    ours = {"id": id_of(job)}
    told: list[tuple[dict[str, Any], str]] = [
        ({"query": "{"}, "GRAPHQL_PARSE_FAILED"),
        ({"query": "{ nothing }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": WATCH}, "BAD_USER_INPUT"),
        ({"query": WATCH, "variables": {"id": "none"}}, "NOT_FOUND"),
        ({"query": WATCH, "variables": ours | {"rate": 0}}, "BAD_USER_INPUT"),
        ({"query": WATCH, "variables": ours | {"after": "x"}}, "BAD_USER_INPUT"),
        ({"documentId": f"sha256:{'0' * 64}"}, "PERSISTED_QUERY_NOT_FOUND"),
        ({"query": "subscription { __typename }"}, "GRAPHQL_VALIDATION_FAILED"),
    ]
    for body, code in told:
        answer = await raw(served, body, **TAKES_EVENTS)
        assert answer.status_code == 200, body
        start, event, end, rest = answer.text.split("\n\n")
        assert (start, end, rest) == (":", "event: complete\ndata: ", ""), body
        name, _, data = event.partition("\n")
        assert name == "event: next"
        (error,) = json.loads(data.removeprefix("data: "))["errors"]
        assert error["extensions"]["code"] == code, body
        assert error["extensions"]["requestId"] == answer.headers["x-request-id"]
    watch = {"query": WATCH, "variables": ours}
    for headers, status, code in (
        ({"authorization": "Bearer mh_wrong"}, 401, "UNAUTHENTICATED"),
        ({"content-type": "text/plain"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    ):
        answer = await raw(served, watch, **TAKES_EVENTS, **headers)
        assert answer.status_code == status
        assert answer.json()["errors"][0]["extensions"]["code"] == code
    assert not served.live.groups


async def test_a_silent_stream_is_kept_alive(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.http.events.ALIVE_SECONDS", 0.1)
    job = await served.put()
    async with open_stream(served.http, WATCH, served.token, id=id_of(job)) as stream:
        await stream.next()
        async with asyncio.timeout(5):
            comments = [line async for line, _ in _some(stream.lines, 6)]
        assert comments == [":", "", ":", "", ":", ""]
        await served.become(job, JobState.RUNNING)
        assert state(await stream.next()) == "RUNNING"


async def _some(lines: Any, count: int) -> Any:
    for number in range(count):
        yield await anext(lines), number
