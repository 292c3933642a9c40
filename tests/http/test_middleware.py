"""What holds for every route."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import httpx
import orjson
import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelharbor.http.middleware import (
    KEPT,
    PIECE_BYTES,
    CompressionMiddleware,
    HostMiddleware,
    RequestMiddleware,
)
from modelharbor.settings import Settings
from tests.http.serving import Server, codes, ran, serving

pytestmark = pytest.mark.anyio
LARGE = random.Random(5).randbytes(1_000_000)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "NOT_FOUND"),
        ("POST", "/graphql/", 404, "NOT_FOUND"),
        ("GET", "/healthz/", 404, "NOT_FOUND"),
        ("GET", "/files/nothing/here", 404, "NOT_FOUND"),
        ("GET", "/files/%00/%ff", 404, "NOT_FOUND"),
        ("POST", "/healthz", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/readyz", 405, "METHOD_NOT_ALLOWED"),
    ],
)
async def test_all_errors_are_coded_json(
    server: Server, method: str, path: str, status: int, code: str
) -> None:
    response = await server.client.request(method, path, headers={"x-request-id": "r"})
    assert (response.status_code, codes(response)) == (status, [code])
    assert response.json()["errors"][0]["extensions"]["requestId"] == "r"
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("a.example.org", 200),
        ("example.org", 400),
        ("aexample.org", 400),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("localhost:8000@evil.example", 400),
        ("localhost:99999999", 400),
        ("[::2]", 400),
        ("::1", 400),
        ("", 400),
    ],
)
async def test_only_named_hosts_are_answered(settings: Settings, host: str, status: int) -> None:
    allowed = ["localhost", "127.0.0.1", "[::1]", "*.example.org"]
    async with serving(settings.model_copy(update={"allowed_hosts": allowed})) as server:
        response = await server.ask("{hello}", {"host": host})
        assert response.status_code == status
        assert ran == (["hello"] if status == 200 else [])
        if status == 400:
            assert codes(response) == ["BAD_REQUEST"]


async def test_two_hosts_are_none() -> None:
    sent = await run(
        HostMiddleware(answering, ["localhost"]),
        headers=[(b"host", b"localhost"), (b"host", b"localhost")],
    )
    assert sent[0]["status"] == 400


async def test_a_socket_to_a_foreign_host_is_refused() -> None:
    sent = await run(
        HostMiddleware(answering, ["localhost"]), type="websocket", headers=[(b"host", b"evil")]
    )
    assert sent == [{"type": "websocket.close", "code": 1008, "reason": "Host"}]


async def test_other_origins_are_not_let_in(server: Server) -> None:
    evil = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight = await server.client.options("/graphql", headers=evil)
    assert preflight.status_code == 405
    answer = await server.ask("{hello}", {"origin": "https://evil.example"})
    for response in (preflight, answer):
        assert not [name for name in response.headers if name.startswith("access-control")]


async def test_named_origins_are_let_in(settings: Settings) -> None:
    allowed = settings.model_copy(update={"allowed_origins": ["https://app.example"]})
    async with serving(allowed) as server:
        for origin, granted in (
            ("https://app.example", "https://app.example"),
            ("https://evil.example", None),
            ("null", None),
        ):
            response = await server.ask("{hello}", {"origin": origin})
            assert response.headers.get("access-control-allow-origin") == granted
            assert "access-control-allow-credentials" not in response.headers
        preflight = await server.client.options(
            "/graphql",
            headers={
                "origin": "https://app.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization, content-type",
            },
        )
        assert preflight.status_code == 200
        assert "authorization" in preflight.headers["access-control-allow-headers"]


async def test_every_request_is_one_line_without_secrets(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "modelharbor")
    await server.ask("query Greeting{hello}", {"authorization": "Bearer hidden"})
    await server.ask("query Greeting{hello}")
    await server.client.get("/files/abc/name?signature=hidden&expires=1")
    fields = [r.__dict__["fields"] for r in caplog.records if r.message == "http.request"]
    assert [(f["method"], f["path"], f["status"], f.get("operation")) for f in fields] == [
        ("POST", "/graphql", 401, "Greeting"),
        ("POST", "/graphql", 200, "Greeting"),
        ("GET", "/files/abc/name", 404, None),
    ]
    own = [r for r in caplog.records if r.name.startswith("modelharbor")]
    assert "hidden" not in "".join(f"{r.getMessage()}{r.__dict__.get('fields')}" for r in own)


async def test_an_exception_becomes_a_masked_500(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: object, send: object) -> None:
        raise RuntimeError("hidden")

    sent = await run(RequestMiddleware(broken), headers=[(b"x-request-id", b"r")])
    assert sent[0]["status"] == 500
    assert orjson.loads(sent[1]["body"]) == {
        "errors": [
            {
                "message": "Internal server error",
                "extensions": {"code": "INTERNAL_SERVER_ERROR", "requestId": "r"},
            }
        ]
    }
    assert "hidden" in caplog.text


async def test_an_exception_in_the_middle_of_an_answer_cuts_it_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(
        scope: Scope, receive: object, send: Callable[[Message], Awaitable[None]]
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        await run(RequestMiddleware(broken))
    assert "half way" in caplog.text


@pytest.mark.parametrize("encoding", [b"identity", b"gzip", b"br", b"zstd"])
async def test_others_have_their_turn_while_a_large_answer_is_compressed(encoding: bytes) -> None:
    """Turns are counted between one piece and the next."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    headers = {"content-type": "application/json", "content-length": str(len(LARGE))}
    app = CompressionMiddleware(Response(LARGE, headers=headers))
    working = asyncio.create_task(others())
    sent = await run(app, headers=[(b"accept-encoding", encoding)])
    working.cancel()
    assert turns >= len(LARGE) // PIECE_BYTES
    assert sum(message["type"] == "http.response.start" for message in sent) == 1
    assert [message.get("more_body", False) for message in sent[1:]][-1] is False


@pytest.mark.parametrize("size", [2_000, 200_000])
@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_an_answer_that_is_sent_again_is_compressed_once(coding: str, size: int) -> None:
    bodies = {"first": LARGE[:size].hex().encode(), "second": LARGE[-size:].hex().encode()}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"]
        scope[KEPT] = (name, bodies[name])
        media = "application/json"
        await Response(bodies[name], 200, {"etag": f'"{name}"'}, media)(scope, receive, send)

    middleware = CompressionMiddleware(app)
    headers = [(b"accept-encoding", b"identity;q=0.5, " + coding.encode())]
    answers: dict[str, list[bytes]] = {}
    for name in ("first", "second", "first", "second"):
        begun, *rest = await run(middleware, headers=headers, path=name)
        told = {key.decode(): value.decode() for key, value in begun["headers"]}
        body = b"".join(message["body"] for message in rest)
        assert httpx.Response(200, headers=told, content=body).content == bodies[name]
        assert told["etag"] == f'"{name}-{coding}"'
        assert (told["content-encoding"], told["vary"]) == (coding, "Accept-Encoding")
        assert told.get("content-length", str(len(body))) == str(len(body))
        answers.setdefault(name, []).append(body)
    assert len(middleware.kept) == 2
    assert all(first == again for first, again in answers.values())
    # It is the form that was kept which is sent.
    middleware.kept.put(("first", coding), b"as it was", 9)
    (begun, sent) = await run(middleware, headers=headers, path="first")
    assert (sent["body"], dict(begun["headers"])[b"content-length"]) == (b"as it was", b"9")
    (plain, *_) = await run(middleware, headers=[(b"accept-encoding", b"identity")], path="first")
    assert b"content-encoding" not in dict(plain["headers"])


async def test_nothing_is_kept_of_what_is_not_compressed() -> None:
    """Small, of no status or kind that is, or not what its maker would send again."""

    def answering_with(response: Response, body: bytes | None) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if body is not None:
                scope[KEPT] = ("digest", body)
            await response(scope, receive, send)

        return app

    media, large = "application/json", LARGE[:2000].hex()
    for response, body in (
        (Response(b"small", media_type=media), b"small"),
        (Response(b"", 304), b""),
        (Response(large, 400, media_type=media), large.encode()),
        (Response(large, media_type="application/octet-stream"), large.encode()),
        (Response(large, media_type=media), None),
        (Response(large, media_type=media), b"another"),
    ):
        middleware = CompressionMiddleware(answering_with(response, body))
        middleware.kept.put(("digest", "br"), b"of another coding", 0)
        sent = await run(middleware, headers=[(b"accept-encoding", b"gzip")])
        assert sent[0]["status"] == response.status_code
        assert len(middleware.kept) == 1


async def answering(scope: Scope, receive: object, send: object) -> None:
    raise AssertionError("The request went through.")


async def run(
    app: ASGIApp,
    type: str = "http",
    headers: list[tuple[bytes, bytes]] | None = None,
    path: str = "/",
) -> list[Message]:
    """What an ASGI application sends for one request."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": f"{type}.connect" if type == "websocket" else "http.request"}

    async def send(message: Message) -> None:
        sent.append(dict(message))

    scope = {"type": type, "method": "GET", "path": path, "headers": headers or []}
    await app(scope, receive, send)
    return sent
