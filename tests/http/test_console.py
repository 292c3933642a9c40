"""GraphiQL's files over HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from modelharbor.http import console
from modelharbor.http.console import console_routes
from modelharbor.http.middleware import http_error
from modelharbor.settings import Settings

pytestmark = pytest.mark.anyio

POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; font-src 'self' data:; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "graphiql"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>page")
    (folder / "assets" / "index-a1.js").write_text("run()")
    (folder / "assets" / "secret.env").write_text("no")
    monkeypatch.setattr(console, "BUILT", folder)
    return folder


@asynccontextmanager
async def client(graphiql: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(
        routes=console_routes(Settings(graphiql=graphiql)),
        exception_handlers={HTTPException: http_error},
    )

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {"settings": Settings(graphiql=graphiql)}}, receive, send)

    transport = httpx.ASGITransport(app=with_state)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as found:
        yield found


@pytest.mark.parametrize("path", ["/graphiql", "/graphiql/"])
async def test_the_page_is_fresh_and_fenced_in(built: Path, path: str) -> None:
    async with client() as ask:
        answer = await ask.get(path)
    assert (answer.status_code, answer.text) == (200, "<!doctype html>page")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"


async def test_a_hashed_file_is_kept_for_good(built: Path) -> None:
    async with client() as ask:
        answer = await ask.get("/graphiql/assets/index-a1.js")
    assert (answer.status_code, answer.text) == (200, "run()")
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize(
    "name",
    ["index-b2.js", "secret.env", "%2e%2e", "..%2findex.html", "%2e%2e%2findex.html", "%00.js", ""],
)
async def test_no_other_file_is_served(built: Path, name: str) -> None:
    async with client() as ask:
        answer = await ask.get(f"/graphiql/assets/{name}")
    assert answer.status_code == 404
    assert answer.json()["errors"][0]["extensions"]["code"] == "NOT_FOUND"


async def test_the_root_leads_to_graphiql() -> None:
    async with client() as ask:
        answer = await ask.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/graphiql")


async def test_a_page_that_was_not_built_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "BUILT", tmp_path / "nothing")
    async with client() as ask:
        answer = await ask.get("/graphiql")
    assert answer.status_code == 404
    (error,) = answer.json()["errors"]
    assert error["extensions"]["code"] == "NOT_FOUND"
    assert error["message"] == (
        "GraphiQL is not built here: `make run` builds it, and the wheel brings it."
    )


@pytest.mark.parametrize("path", ["/", "/graphiql", "/graphiql/", "/graphiql/assets/index-a1.js"])
async def test_it_can_be_switched_off(built: Path, path: str) -> None:
    async with client(graphiql=False) as ask:
        answer = await ask.get(path)
    assert answer.status_code == 404
    assert answer.json()["errors"][0]["extensions"]["code"] == "NOT_FOUND"
