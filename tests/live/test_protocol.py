"""`graphql-transport-ws` to the letter, and whatever else comes in its place."""

import asyncio
import json
from hashlib import sha256
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from modelharbor.db.jobs import JobState
from modelharbor.events.cursors import encode
from modelharbor.settings import Settings

from .client import WATCH, Client, open_client
from .serving import Served, id_of

pytestmark = pytest.mark.anyio
ALL = "subscription { jobs { job { state } } }"
ALLOWED = "https://console.example"


@pytest.fixture
def live_settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "init_timeout_seconds": 0.4,
            "allowed_origins": [ALLOWED],
            "allowed_hosts": ["127.0.0.1"],
        }
    )


def subscribe(id: object, payload: object) -> dict[str, object]:
    return {"type": "subscribe", "id": id, "payload": payload}


async def failure(client: Client, id: str) -> tuple[str, str]:
    """Code and message of the error that ends an operation."""
    message = await client.receive()
    assert (message["type"], message["id"]) == ("error", id), message
    (error,) = message["payload"]
    assert len(error["extensions"]["requestId"]) == 32
    return error["extensions"]["code"], error["message"]


async def answer(client: Client, id: str, query: str, **more: Any) -> Any:
    """Of a query or mutation: one `next`, then `complete`."""
    await client.send(**subscribe(id, {"query": query, **more}))
    message = await client.receive()
    assert (message["type"], message["id"]) == ("next", id), message
    assert await client.receive() == {"id": id, "type": "complete"}
    return message["payload"]


async def is_alive(client: Client) -> bool:
    await client.send(type="ping", payload={"still": "there"})
    return await client.receive() == {"type": "pong", "payload": {"still": "there"}}


async def test_it_must_begin_with_an_initialisation_in_time(served: Served) -> None:
    async with open_client(served.ws, init=False) as client:
        assert await client.close_code() == (4408, "Connection initialisation timeout")
    async with open_client(served.ws, init=False) as client:
        await client.send(**subscribe("1", {"query": "{ __typename }"}))
        reason = "Unauthorized: send connection_init first"
        assert await client.close_code() == (4401, reason)
    async with open_client(served.ws, init=False) as client:
        await client.send(type="connection_init")
        await client.send(type="connection_init")
        assert await client.receive() == {"type": "connection_ack"}
        assert await client.close_code() == (4429, "Too many initialisation requests")
    for token in ("mh_wrong", served.token[:-1], "", "é" * 300):
        async with open_client(served.ws, init=False) as client:
            await client.send(type="connection_init", payload={"Authorization": f"Bearer {token}"})
            code, reason = await client.close_code()
            assert (code, reason[:22]) == (4403, "The token is not valid"), token
    payloads: tuple[object, ...] = ([], "token", 7, True)
    for payload in payloads:
        async with open_client(served.ws, init=False) as client:
            await client.send(type="connection_init", payload=payload)
            reason = "`payload` of connection_init takes an object"
            assert await client.close_code() == (4400, reason)
    # One that has begun is not asked again.
    async with open_client(served.ws) as client:
        await asyncio.sleep(0.5)
        assert await is_alive(client)


async def test_the_token_comes_in_the_payload_or_in_the_handshake(served: Served) -> None:
    bearer = f"Bearer {served.token}"
    who = "{ viewer { login } }"
    for payload in ({"Authorization": bearer}, {"headers": {"authorization": bearer}}):
        async with open_client(served.ws, init=False) as client:
            await client.send(type="connection_init", payload=payload)
            assert await client.receive() == {"type": "connection_ack"}
            assert await answer(client, "1", who) == {"data": {"viewer": {"login": "ada"}}}
    async with open_client(served.ws, additional_headers={"authorization": bearer}) as client:
        assert await answer(client, "1", who) == {"data": {"viewer": {"login": "ada"}}}
    async with open_client(served.ws) as client:
        assert await answer(client, "1", who) == {"data": {"viewer": None}}


MALFORMED: list[tuple[str | bytes, str]] = [
    (b'{"type":"ping"}', "Messages are text"),
    (b"\x00\xff", "Messages are text"),
    ("", "Messages are JSON"),
    ("{", "Messages are JSON"),
    ("NaN", "Messages are JSON"),
    ("[" * 100_000, "Messages are JSON"),
    ("null", "Messages are JSON objects"),
    ("[]", "Messages are JSON objects"),
    ("7", "Messages are JSON objects"),
    ('"ping"', "Messages are JSON objects"),
    ("{}", "Messages have a `type` of the protocol"),
    ('{"type":null}', "Messages have a `type` of the protocol"),
    ('{"type":["ping"]}', "Messages have a `type` of the protocol"),
    ('{"type":"start","id":"1"}', "Messages have a `type` of the protocol"),
    ('{"type":"connection_ack"}', "Messages have a `type` of the protocol"),
    ('{"type":"subscribe","payload":{}}', "`id` takes 1 to 256 characters"),
    ('{"type":"subscribe","id":"","payload":{}}', "`id` takes 1 to 256 characters"),
    ('{"type":"subscribe","id":7,"payload":{}}', "`id` takes 1 to 256 characters"),
    (json.dumps(subscribe("x" * 257, {})), "`id` takes 1 to 256 characters"),
    ('{"type":"complete"}', "`id` takes 1 to 256 characters"),
    (f'{{"type":"ping","payload":{"[" * 300}{"]" * 300}}}', "The payload is nested too deeply"),
    ('{"type":"subscribe","id":"1"}', "`payload` of subscribe takes an object"),
    ('{"type":"subscribe","id":"1","payload":[]}', "`payload` of subscribe takes an object"),
    ('{"type":"subscribe","id":"1","payload":null}', "`payload` of subscribe takes an object"),
]


async def test_what_is_no_message_ends_the_connection(served: Served) -> None:
    job = await served.put()
    async with open_client(served.ws, served.token) as other:
        await other.subscribe("1", WATCH, id=id_of(job))
        await other.next()
        for text, reason in MALFORMED:
            async with open_client(served.ws) as client:
                await client.connection.send(text)
                assert await client.close_code() == (4400, reason), text[:50]
        await served.become(job, JobState.RUNNING)
        assert (await other.next())["jobProgress"]["job"]["state"] == "RUNNING"


async def test_text_that_is_not_utf_8_ends_the_connection(served: Served) -> None:
    async with open_client(served.ws) as client:
        await client.connection.send(b'{"type":"\xff"}', text=True)
        assert (await client.close_code())[0] == 1007


async def test_large_frames_end_the_connection(served: Served) -> None:
    whole = json.dumps({"type": "ping", "payload": {"filler": "x" * 262_144}})
    pieces = [whole[at : at + 16_384] for at in range(0, len(whole), 16_384)]
    for sent in (whole, pieces):
        async with open_client(served.ws) as client:
            await client.connection.send(sent)
            code, _ = await client.close_code()
            assert code == 1009
    # Just below it, both ways are taken.
    payload = {"filler": "x" * 262_000}
    text = json.dumps({"type": "ping", "payload": payload})
    for fitting in (text, [text[:7], text[7:]]):
        async with open_client(served.ws) as client:
            await client.connection.send(fitting)
            assert await client.receive() == {"type": "pong", "payload": payload}


async def test_nothing_is_negotiated_but_the_one_protocol(served: Served) -> None:
    async with open_client(served.ws) as client:
        assert client.connection.subprotocol == "graphql-transport-ws"
        assert client.connection.response is not None
        asked = client.connection.request
        assert asked is not None
        assert "permessage-deflate" in asked.headers["sec-websocket-extensions"]
        assert "sec-websocket-extensions" not in client.connection.response.headers
    both = ["graphql-ws", "graphql-transport-ws"]
    async with open_client(served.ws, subprotocols=both) as client:
        assert client.connection.subprotocol == "graphql-transport-ws"
    for protocols in (["graphql-ws"], ["something"], None):
        async with open_client(served.ws, init=False, subprotocols=protocols) as client:
            reason = "Subprotocol not acceptable: use graphql-transport-ws"
            assert await client.close_code() == (4406, reason)


async def test_who_may_knock(served: Served) -> None:
    own = f"http://127.0.0.1:{served.port}"
    for origin in (own, ALLOWED, None):
        async with open_client(served.ws, origin=origin) as client:
            assert await is_alive(client)
    refused: list[tuple[str, dict[str, Any]]] = [
        (served.ws, {"origin": "https://evil.example"}),
        (served.ws, {"origin": "null"}),
        (served.ws, {"origin": "http://["}),
        (served.ws, {"origin": f"http://127.0.0.1:{served.port + 1}"}),
        (served.ws, {"origin": f"{ALLOWED}.evil.example"}),
        (served.ws.replace("127.0.0.1", "localhost"), {}),  # a Host that it does not go by
        (served.ws.replace("/graphql", "/elsewhere"), {}),
        (served.ws.replace("/graphql", "/healthz"), {}),
    ]
    for url, options in refused:
        with pytest.raises(InvalidStatus) as told:
            async with connect(url, subprotocols=["graphql-transport-ws"], **options):  # type: ignore[list-item]  # a NewType of str
                pass
        assert told.value.response.status_code == 403, (url, options)


def nested(levels: int) -> Any:
    found: Any = "x"
    for _ in range(levels):
        found = [found]
    return found


async def test_an_operation_that_fails_ends_alone(served: Served) -> None:
    job = await served.put()
    payloads: list[tuple[dict[str, Any], str]] = [
        ({"query": "{"}, "GRAPHQL_PARSE_FAILED"),
        ({"query": "subscription { jobProgress("}, "GRAPHQL_PARSE_FAILED"),
        ({"query": "{ nothing }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": 7}, "BAD_REQUEST"),
        ({"query": "{ viewer { login } }", "variables": []}, "BAD_REQUEST"),
        ({}, "BAD_REQUEST"),
        ({"query": "{ __typename }", "operationName": "None"}, "BAD_REQUEST"),
        ({"query": "query ($id: ID!) { node(id: $id) { id } }"}, "BAD_USER_INPUT"),
        ({"query": WATCH}, "BAD_USER_INPUT"),
        ({"documentId": f"sha256:{'0' * 64}"}, "PERSISTED_QUERY_NOT_FOUND"),
        ({"query": WATCH, "variables": {"id": id_of(job), "more": nested(900)}}, "BAD_REQUEST"),
        ({"query": WATCH, "variables": {"id": nested(900)}}, "BAD_REQUEST"),
        ({"query": WATCH, "extensions": {"more": nested(900)}}, "BAD_REQUEST"),
        ({"query": "#" + "x" * 32_768}, "PAYLOAD_TOO_LARGE"),
        ({"query": "{" + " ".join(f"a{n}: __typename" for n in range(31)) + "}"}, "OPERATION_TOO_COMPLEX"),
        ({"query": "subscription { a: jobs { job { id } } b: jobs { job { id } } }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": "subscription { __typename }"}, "GRAPHQL_VALIDATION_FAILED"),
    ]  # fmt: skip
    async with open_client(served.ws, served.token) as client:
        await client.subscribe("watch", WATCH, id=id_of(job))
        await client.next("watch")
        for payload, code in payloads:
            await client.send(**subscribe("bad", payload))
            assert (await failure(client, "bad"))[0] == code, payload
        await served.become(job, JobState.RUNNING)
        assert (await client.next("watch"))["jobProgress"]["job"]["state"] == "RUNNING"
        # `complete` for what is not there is no fault: it crosses with ours.
        await client.send(type="complete", id="bad")
        await client.send(type="complete", id="never")
        await client.send(type="pong")
        await client.send(type="ping")
        assert await client.receive() == {"type": "pong"}
        await client.send(type="complete", id="watch")
        await served.become(job, JobState.SUCCEEDED)
        assert await client.is_silent()
    assert len(served.live.groups) == 1  # for a while, for who comes back


async def test_an_id_is_taken_until_its_operation_has_ended(served: Served) -> None:
    job = await served.put()
    async with open_client(served.ws, served.token) as client:
        await client.subscribe("1", WATCH, id=id_of(job))
        await client.next()
        await client.send(type="complete", id="1")
        await client.subscribe("1", WATCH, id=id_of(job))
        await client.next()
        await client.subscribe("1", "{ __typename }")
        assert await client.close_code() == (4409, "Subscriber for 1 already exists")


async def test_documents_are_named_by_their_hash(served: Served) -> None:
    job = await served.put()
    text = WATCH + f"# {id_of(job)}"  # that nobody has sent before
    digest = sha256(text.encode()).hexdigest()
    named = {"persistedQuery": {"version": 1, "sha256Hash": digest}}
    variables = {"id": id_of(job)}
    async with open_client(served.ws, served.token) as client:
        await client.send(**subscribe("1", {"extensions": named, "variables": variables}))
        assert (await failure(client, "1"))[0] == "PERSISTED_QUERY_NOT_FOUND"
        both = {"query": text, "extensions": named, "variables": variables}
        await client.send(**subscribe("2", both))
        await client.next("2")
        await client.send(**subscribe("3", {"extensions": named, "variables": variables}))
        await client.next("3")
        by_id = {"documentId": f"sha256:{digest}", "variables": variables}
        await client.send(**subscribe("4", by_id))
        await client.next("4")
        # graphql-ws, the client, has to send a text.
        await client.send(**subscribe("6", {**by_id, "query": ""}))
        await client.next("6")
        wrong = {"query": "{ __typename }", "extensions": named}
        await client.send(**subscribe("5", wrong))
        assert (await failure(client, "5"))[0] == "BAD_REQUEST"


async def test_a_socket_runs_20_operations_at_once(served: Served) -> None:
    job = await served.put()
    async with open_client(served.ws, served.token) as client:
        for number in range(20):
            await client.subscribe(str(number), WATCH, id=id_of(job))
            await client.next(str(number))
        await client.subscribe("20", "{ __typename }")
        told = "A socket runs 20 operations at once, no more."
        assert await failure(client, "20") == ("RATE_LIMITED", told)
        await served.become(job, JobState.RUNNING)
        for number in range(20):
            await client.next(str(number))
        await client.send(type="complete", id="7")
        assert await answer(client, "20", "{ __typename }") == {"data": {"__typename": "Query"}}
    assert len(served.live.groups) == 1


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"id": "nonsense"}, "NOT_FOUND"),
    ({"id": "TW9kZWw6NjViMDAwMDAwMDAwMDAwMDAwMDAwMDAw"}, "NOT_FOUND"),  # of a model
    ({"id": ""}, "NOT_FOUND"),
    ({"id": {"$gt": ""}}, "BAD_USER_INPUT"),
    ({"rate": 0}, "BAD_USER_INPUT"),
    ({"rate": -1}, "BAD_USER_INPUT"),
    ({"rate": 51}, "BAD_USER_INPUT"),
    ({"rate": "NaN"}, "BAD_USER_INPUT"),
    ({"rate": None}, "BAD_USER_INPUT"),
    ({"after": ""}, "BAD_USER_INPUT"),
    ({"after": "garbage"}, "BAD_USER_INPUT"),
    ({"after": "x" * 38}, "BAD_USER_INPUT"),
    ({"after": "é" * 38}, "BAD_USER_INPUT"),
    ({"after": 7}, "BAD_USER_INPUT"),
]


async def test_arguments_that_may_not_be(served: Served) -> None:
    job, another = await served.put(), await served.put()
    stranger = await served.another_token("mallory")
    own, other = f"jobProgress/{job['_id']}", f"jobProgress/{another['_id']}"
    at = int(job["created_at"].timestamp())
    position = f"{at:08x}{1:08x}{0:08x}"
    cases = [
        *BAD_ARGUMENTS,
        ({"after": encode(other, position, 0)}, "BAD_USER_INPUT"),
        ({"after": encode(own, f"{at + 3600:08x}{1:08x}{0:08x}", 0)}, "BAD_USER_INPUT"),
        ({"after": encode(own, f"{at - 31 * 86_400:08x}{1:08x}{0:08x}", 0)}, "CURSOR_EXPIRED"),
        ({"after": encode(own, "0" * 24, 0)}, "CURSOR_EXPIRED"),
    ]
    async with open_client(served.ws, served.token) as client:
        for variables, code in cases:
            await client.subscribe("1", WATCH, **{"id": id_of(job), **variables})
            assert (await failure(client, "1"))[0] == code, variables
        await client.subscribe("1", WATCH.replace("$rate)", "1e400)").replace(", $rate: Float = 50", ""), id=id_of(job))  # fmt: skip
        assert (await failure(client, "1"))[0] in {"GRAPHQL_VALIDATION_FAILED", "BAD_USER_INPUT"}
        # What lies before all there is is a place like any other.
        await client.subscribe("1", WATCH, id=id_of(job), after=encode(own, position, 0))
        await served.become(job, JobState.RUNNING)
        states = [(await client.next())["jobProgress"]["job"]["state"] for _ in range(2)]
        assert states == ["QUEUED", "RUNNING"]
    assert len(served.live.groups) == 1  # none for those that were refused
    for token in (stranger, None):
        async with open_client(served.ws, token) as client:
            await client.subscribe("1", WATCH, id=id_of(job))
            assert await failure(client, "1") == ("NOT_FOUND", "There is no such job.")
    assert len(served.live.groups) == 1
