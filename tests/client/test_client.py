"""Operations, what they fail with, and what is tried again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from modelharbor.client import (
    Client,
    ClientError,
    Refused,
    Rejected,
    Unauthenticated,
    Unreachable,
)
from modelharbor.client.client import base_url, model_name
from modelharbor.client.patience import Patience, asked_seconds, may_pass
from modelharbor.settings import Settings
from tests.client.strangers import served
from tests.http.processes import free_port
from tests.live.serving import serving

pytestmark = pytest.mark.anyio
VIEWER = "query { viewer { login } }"


@asynccontextmanager
async def answering(*answers: Response) -> AsyncIterator[tuple[str, list[Request]]]:
    """A server that gives these answers in turn, and what it was asked."""
    waiting, asked = list(answers), list[Request]()

    async def answer(request: Request) -> Response:
        await request.body()
        asked.append(request)
        return waiting.pop(0)

    async with served(Starlette(routes=[Route("/graphql", answer, methods=["POST"])])) as url:
        yield url, asked


def good(**data: Any) -> Response:
    return JSONResponse({"data": data})


def bad(code: str, status: int = 200, **headers: str) -> Response:
    error = {"message": "No.", "extensions": {"code": code, "requestId": "r1"}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"errors": [error]}, status, named)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("https://models.example/", "https://models.example"),
        ("https://models.example/harbor/graphql", "https://models.example/harbor"),
        (" https://models.example ", "https://models.example"),
    ],
)
def test_addresses_have_one_form(given: str, found: str) -> None:
    assert base_url(given) == found


@pytest.mark.parametrize(
    "given",
    [
        "models.example",
        "ftp://models.example",
        "https://",
        "https://me:secret@models.example",
        "https://models.example?x=1",
        "https://[",
        "https://models.example:port",
        "",
    ],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ClientError) as caught:
        Client(given, "t")
    assert caught.value.code == "BAD_INPUT"
    assert "secret" not in caught.value.message


def test_models_are_named_without_a_version() -> None:
    assert model_name("ada/tiny") == ("ada", "tiny")
    for wrong in ("ada", "ada/", "/tiny", "ada/tiny:3", "ada/tiny@prod", "a/b/c"):
        with pytest.raises(ClientError):
            model_name(wrong)


def test_the_token_goes_to_its_own_server_alone() -> None:
    client = Client("https://models.example/harbor", "mh_secret")
    assert client.authorized("https://models.example/uploads/1") == {
        "authorization": "Bearer mh_secret"
    }
    for other in (
        "http://models.example/uploads/1",
        "https://models.example.evil/uploads/1",
        "https://models.example:444/uploads/1",
        "https://evil/models.example",
    ):
        assert client.authorized(other) == {}
    assert "mh_secret" not in repr(client)
    assert Client("https://models.example").authorized("https://models.example/") == {}


async def test_operations_of_a_real_server(settings: Settings) -> None:
    async with serving(settings) as real:
        url = f"http://127.0.0.1:{real.port}"
        async with Client(url, real.token) as client:
            assert await client.execute(VIEWER) == {"viewer": {"login": "ada"}}
            viewer = await client.viewer()
            assert viewer is not None
            assert viewer.login == "ada"
            with pytest.raises(Rejected) as rejected:
                await client.execute("query { nothing }")
            assert (rejected.value.code, rejected.value.status) == (
                "GRAPHQL_VALIDATION_FAILED",
                400,
            )
            assert rejected.value.request_id
            with pytest.raises(Refused) as refused:
                await client.mutate(
                    "mutation M($input: CreateModelInput!) { createModel(input: $input) "
                    "{ userErrors { code message path } } }",
                    {"owner": "nobody", "name": "x"},
                )
            assert refused.value.code == "NOT_FOUND"
            assert refused.value.errors[0].path == ("owner",)
            with pytest.raises(Rejected) as missing:
                await client.resolve("ada/nothing")
            assert missing.value.code == "NOT_FOUND"
        async with Client(url) as nobody:
            assert await nobody.viewer() is None
        async with Client(url, "mh_" + "0" * 24 + "_wrong") as stranger:
            with pytest.raises(Unauthenticated):
                await stranger.viewer()


async def test_what_passes_is_tried_again() -> None:
    answers = (
        bad("UNAVAILABLE", 503),
        bad("RATE_LIMITED", 429, retry_after="1"),
        bad("INTERNAL_SERVER_ERROR", 500),
        bad("TIMEOUT"),
        Response("bad gateway", 502),
        good(viewer=None),
    )
    loop = asyncio.get_running_loop()
    async with answering(*answers) as (url, asked), Client(url, "t") as client:
        begun = loop.time()
        assert await client.execute(VIEWER) == {"viewer": None}
        assert loop.time() - begun >= 1.0  # as `Retry-After` asked
    assert len(asked) == len(answers)
    assert {request.headers["authorization"] for request in asked} == {"Bearer t"}


@pytest.mark.parametrize(
    "answer",
    [
        bad("BAD_REQUEST", 400),
        bad("FORBIDDEN", 403),
        bad("NOT_FOUND", 404),
        bad("CONFLICT", 409),
        bad("INSUFFICIENT_STORAGE", 507),
        bad("OPERATION_TOO_COMPLEX"),
        Response("<html>", 200),
        JSONResponse({"data": []}),
        JSONResponse([]),
    ],
)
async def test_what_does_not_pass_is_told_at_once(answer: Response) -> None:
    async with answering(answer) as (url, asked), Client(url) as client:
        with pytest.raises(Rejected) as caught:
            await client.execute(VIEWER)
    assert len(asked) == 1
    body = bytes(answer.body)
    told = orjson.loads(body) if body.startswith(b'{"errors"') else None
    if told is not None:
        assert caught.value.code == told["errors"][0]["extensions"]["code"]
        assert caught.value.request_id == "r1"
    else:
        assert caught.value.code == "NO_SERVER"


async def test_mutations_are_sent_twice_only_where_that_does_no_harm() -> None:
    mutation = "mutation M($input: I!) { m(input: $input) { userErrors { code } } }"
    async with answering(bad("X", 500), good(m={})) as (url, asked), Client(url) as client:
        with pytest.raises(Rejected):
            await client.mutate(mutation, {"name": "x"})
        assert len(asked) == 1
    async with answering(bad("X", 500), good(m={"a": 1})) as (url, asked), Client(url) as client:
        assert await client.mutate(mutation, {"idempotencyKey": "k"}) == {"a": 1}
        assert len(asked) == 2


async def test_a_server_that_never_answers_is_given_up() -> None:
    async with Client(f"http://127.0.0.1:{free_port()}", "t", patience=0.5) as client:
        with pytest.raises(Unreachable) as caught:
            await client.viewer()
        assert "does not answer" in caught.value.message
        with pytest.raises(Unreachable):
            await anext(client.subscribe("subscription { x }"))


async def test_patience_begins_anew_with_progress() -> None:
    patience = Patience(0.3)
    for _ in range(5):
        await patience.wait(Unreachable("No."))
        patience.progressed()
    assert patience.tries == 0

    async def give_up() -> None:
        while True:
            await patience.wait(Unreachable("No."))

    with pytest.raises(Unreachable):
        await give_up()
    late = Rejected("No.", "X", status=503)
    late.asked_seconds = 60.0
    with pytest.raises(Rejected):  # at once: it would be over before that
        await Patience(5.0).wait(late)


def test_what_may_pass() -> None:
    assert [status for status in range(400, 512) if may_pass(status)] == [
        *(423, 429, 500, 502, 503, 504, 506, 508, 509, 510, 511)
    ]
    assert [asked_seconds(given) for given in (None, "7", "0", "9" * 30, "-1", "x", "1.5")] == [
        *(None, 7.0, 0.0, 120.0, None, None, None)
    ]
