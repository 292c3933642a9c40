"""GraphiQL's files over HTTP."""

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from modelharbor.http import console
from modelharbor.http.console import console_routes
from modelharbor.http.middleware import CompressionMiddleware, http_error
from modelharbor.settings import Settings

pytestmark = pytest.mark.anyio

POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; font-src 'self' data:; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

EDITOR = "edit();" * 200
BUILT = console.BUILT


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "graphiql"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>page")
    (folder / "assets" / "index-a1.js").write_text("run()")
    (folder / "assets" / "secret.env").write_text("no")
    (folder / "assets" / "editor-c3.js").write_text(EDITOR)
    (folder / "assets" / "editor-c3.js.br").write_bytes(b"as brotli")
    (folder / "assets" / "editor-c3.js.gz").write_bytes(gzip.compress(EDITOR.encode()))
    monkeypatch.setattr(console, "BUILT", folder)
    return folder


@asynccontextmanager
async def client(graphiql: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(
        routes=console_routes(Settings(graphiql=graphiql)),
        middleware=[Middleware(CompressionMiddleware)],
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
    [
        "index-b2.js",
        "secret.env",
        "editor-c3.js.br",
        "editor-c3.js.gz",
        "%2e%2e",
        "..%2findex.html",
        "%2e%2e%2findex.html",
        "%00.js",
        "",
    ],
)
async def test_no_other_file_is_served(built: Path, name: str) -> None:
    async with client() as ask:
        answer = await ask.get(f"/graphiql/assets/{name}")
    assert answer.status_code == 404
    assert answer.json()["errors"][0]["extensions"]["code"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("accepts", "coding"),
    [
        ("gzip, deflate, br, zstd", "br"),
        ("br;q=0.1, gzip", "br"),
        ("gzip, deflate", "gzip"),
        ("br;q=0, gzip;q=0.5", "gzip"),
    ],
)
async def test_a_file_that_was_compressed_beforehand_goes_out_as_it_is(
    built: Path, accepts: str, coding: str
) -> None:
    path = "/graphiql/assets/editor-c3.js"
    stored = (built / "assets" / f"editor-c3.js{console.SUFFIXES[coding]}").read_bytes()
    async with (
        client() as ask,
        ask.stream("GET", path, headers={"accept-encoding": accepts}) as answer,
    ):
        sent = b"".join([piece async for piece in answer.aiter_raw()])
        head = await ask.head(path, headers={"accept-encoding": accepts})
    assert (answer.status_code, sent) == (200, stored)
    for headers in (answer.headers, head.headers):
        assert headers["content-encoding"] == coding
        assert headers["content-length"] == str(len(stored))
        assert headers["content-type"] == "text/javascript; charset=utf-8"
        assert headers["cache-control"] == "public, max-age=31536000, immutable"
        assert headers["etag"].endswith(f'-{coding}"')
        assert headers.get_list("vary") == ["Accept-Encoding"]


async def test_who_takes_none_of_them_gets_the_file_itself(built: Path) -> None:
    path = "/graphiql/assets/editor-c3.js"
    async with client() as ask:
        answers = {
            coding: await ask.get(path, headers={"accept-encoding": coding})
            for coding in ("identity", "zstd", "br;q=0", "nonsense")
        }
    assert {answer.text for answer in answers.values()} == {EDITOR}
    assert answers["zstd"].headers["content-encoding"] == "zstd"  # on the way
    assert "content-encoding" not in answers["identity"].headers
    assert len({answer.headers["etag"] for answer in answers.values()}) == 2
    for answer in answers.values():
        assert answer.headers.get_list("vary") == ["Accept-Encoding"]


@pytest.mark.parametrize("path", ["/graphiql", "/graphiql/assets/editor-c3.js"])
@pytest.mark.parametrize("accepts", ["identity", "gzip", "br", "zstd"])
async def test_who_has_a_file_is_told_so(built: Path, path: str, accepts: str) -> None:
    asked = {"accept-encoding": accepts}
    async with client() as ask:
        async with ask.stream("GET", path, headers=asked) as first:
            tag = first.headers["etag"]
        for known in (tag, f'"other", {tag}', f"W/{tag}", "*"):
            again = await ask.get(path, headers={**asked, "if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
            for name in ("cache-control", "vary", "content-security-policy"):
                assert again.headers[name] == first.headers[name]
            assert again.headers["etag"] == (tag if known != "*" else again.headers["etag"])
        other = await ask.head(path, headers={**asked, "if-none-match": '"other"'})
        assert other.status_code == 200


async def test_another_page_has_another_tag(built: Path) -> None:
    async with client() as ask:
        first = await ask.get("/graphiql")
        (built / "index.html").write_text("<!doctype html>paged")
        tag = first.headers["etag"]
        second = await ask.get("/graphiql", headers={"if-none-match": tag})
    assert (second.status_code, second.text) == (200, "<!doctype html>paged")


async def test_a_part_of_a_compressed_file_is_a_part_of_what_goes_out(built: Path) -> None:
    path, asked = "/graphiql/assets/editor-c3.js", {"accept-encoding": "br", "range": "bytes=3-"}
    async with client() as ask, ask.stream("GET", path, headers=asked) as answer:
        sent = b"".join([piece async for piece in answer.aiter_raw()])
    assert (answer.status_code, sent) == (206, b"brotli")
    assert answer.headers["content-range"] == "bytes 3-8/9"


def test_what_was_built_has_its_compressed_forms() -> None:
    if not BUILT.exists():
        pytest.skip("GraphiQL is not built: `make run`, `make test` and `make wheel` build it")
    built = [path for path in BUILT.rglob("*") if path.suffix in console.MEDIA_TYPES]
    assert len(built) > 10
    for path in built:
        plain = path.read_bytes()
        for coding, suffix in console.SUFFIXES.items():
            compressed = path.with_name(path.name + suffix)
            if len(plain) < 500:
                assert not compressed.exists()
                continue
            sent = compressed.read_bytes()
            headers = {"content-encoding": coding}
            assert httpx.Response(200, headers=headers, content=sent).content == plain
            assert len(sent) < len(plain)


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
