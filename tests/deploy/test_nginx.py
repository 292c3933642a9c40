"""deploy/nginx/modelharbor.conf: what nginx keeps, for whom, and how it is rid of it."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from modelharbor.cache.entries import Access, Entry
from modelharbor.cache.tags import entity
from modelharbor.http.caching import Named, form_of, sent, surrogate_key, vary_of
from modelharbor.http.middleware import CompressionMiddleware, RequestMiddleware
from modelharbor.http.purging import NginxFolder, keys_in
from tests.deploy.nginx import PATIENCE_SECONDS, Front, fronting, listening

pytestmark = pytest.mark.anyio
JSON, RESPONSE = "application/json", "application/graphql-response+json"
BEARER = {"authorization": "Bearer mh_x"}
TINY, HUGE = entity("models", "a1"), entity("models", "b2")


@dataclass
class Origin:
    """A server that has one entry for each address, and notes what it is asked."""

    entries: dict[str, Entry] = field(default_factory=dict)
    asked: list[dict[str, str]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    gate: asyncio.Event | None = None
    """Where there is one, no answer begins before it is set."""

    def keep(self, name: str, text: str = "old", **changes: Any) -> str:
        """Its address."""
        given: dict[str, Any] = {
            "body": b'{"data":"%s"}' % (text.encode() * 400),
            "position": 1,
            "tags": (TINY,),
            "access": Access.ANYBODY,
            "made_at": time.time(),
            "max_age": 60.9,
        }
        self.entries[name] = Entry(**given | changes)
        return f"/graphql?documentId={name}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self.asked.append({name.decode(): value.decode() for name, value in headers.items()})
        if self.gate is not None:
            await self.gate.wait()
        name = scope["query_string"].decode().partition("documentId=")[2]
        entry = self.entries[name.partition("&")[0]]
        media = RESPONSE if headers[b"accept"].startswith(RESPONSE.encode()) else JSON
        is_get = scope["method"] == "GET"
        status, answered, body = sent(
            200,
            media.encode(),
            entry.body,
            vary_of(scope["method"], with_origins=False),
            named=Named.of(headers) if is_get else None,
            entry=entry,
            form=form_of(entry, with_keys=True),
        )
        self.statuses.append(status)
        await send({"type": "http.response.start", "status": status, "headers": answered})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def fronted(
    app: Any, folder: Path, **changes: str
) -> AsyncIterator[tuple[httpx.AsyncClient, Front]]:
    async with listening(app) as upstream:
        with fronting(upstream, folder, **changes) as front:
            plain = {"accept": JSON, "accept-encoding": "identity"}
            async with httpx.AsyncClient(base_url=front.url, headers=plain, timeout=30) as client:
                yield client, front


@dataclass
class Set:
    """What most tests need."""

    origin: Origin
    client: httpx.AsyncClient
    front: Front

    async def get(self, address: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.get(address, headers=named)

    async def until(self, address: str, wanted: Callable[[httpx.Response], bool]) -> httpx.Response:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not wanted(found := await self.get(address)):
                await asyncio.sleep(0.05)
        return found


@pytest.fixture
async def nginx(tmp_path: Path) -> AsyncIterator[Set]:
    origin = Origin()
    app = RequestMiddleware(CompressionMiddleware(origin))
    async with fronted(app, tmp_path) as (client, front):
        yield Set(origin, client, front)


def cached(response: httpx.Response) -> str:
    found: str = response.headers["x-proxy-cache"]
    return found


async def test_what_everybody_may_read_is_kept(nginx: Set) -> None:
    address = nginx.origin.keep("a")
    first, second = await nginx.get(address), await nginx.get(address)
    assert (cached(first), cached(second)) == ("MISS", "HIT")
    assert first.content == second.content == nginx.origin.entries["a"].body
    assert len(nginx.origin.asked) == 1
    for answer in (first, second):
        # Browsers ask here each time, so that they are rid of it with nginx.
        assert answer.headers["cache-control"] == "public, no-cache"
        assert answer.headers["vary"] == "Authorization, Accept, Accept-Encoding"
        assert "surrogate-key" not in answer.headers
    known = await nginx.get(address, if_none_match=second.headers["etag"])
    assert (known.status_code, known.content) == (304, b"")
    assert len(nginx.origin.asked) == 1
    other = await nginx.get(nginx.origin.keep("b", "other"))
    assert cached(other) == "MISS"


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"cookie": "a=b"},
        {"proxy-authorization": "Basic x"},
        {"x-modelharbor-cost": "1"},
        {"accept": "text/event-stream"},
        {"accept": "application/json;q=0.5, application/graphql-response+json"},
    ],
)
async def test_who_says_who_it_is_leaves_nothing_and_is_given_nothing_kept(
    nginx: Set, headers: dict[str, str]
) -> None:
    address = nginx.origin.keep("a")
    for _ in range(2):  # nothing is kept of it
        answer = await nginx.client.get(address, headers=headers)
        assert cached(answer) == "BYPASS"
    assert cached(await nginx.get(address)) == "MISS"
    nginx.origin.keep("a", "theirs")
    answer = await nginx.client.get(address, headers=headers)
    assert (cached(answer), answer.content) == ("BYPASS", nginx.origin.entries["a"].body)
    after = await nginx.get(address)
    assert cached(after) == "HIT"
    assert b"theirs" not in after.content


@pytest.mark.parametrize(
    "changes", [{"access": Access.VIEWER}, {"is_private": True}, {"max_age": 0.5}]
)
async def test_what_is_not_for_everybody_is_not_kept(nginx: Set, changes: dict[str, Any]) -> None:
    address = nginx.origin.keep("a", **changes)
    answers = [await nginx.get(address) for _ in range(3)]
    assert [cached(answer) for answer in answers] == ["MISS"] * 3
    assert {answer.headers["cache-control"] for answer in answers} == {"private, no-store"}
    assert len(nginx.origin.asked) == 3
    assert not [path for path in nginx.front.cache.rglob("*") if path.is_file()]


async def test_a_post_is_not_kept(nginx: Set) -> None:
    address = nginx.origin.keep("a")
    for _ in range(2):
        answer = await nginx.client.post(address, json={})
        assert answer.headers["cache-control"] == "private, no-store"
        assert answer.headers.get("x-proxy-cache", "") == ""
    assert len(nginx.origin.asked) == 2
    assert cached(await nginx.get(address)) == "MISS"
    nginx.origin.keep("a", "posted")
    assert b"posted" in (await nginx.client.post(address, json={})).content
    assert b"posted" not in (await nginx.get(address)).content


async def test_a_text_in_the_address_is_not_looked_for(nginx: Set) -> None:
    address = nginx.origin.keep("a") + "&query=%7Bhello%7D"
    assert [cached(await nginx.get(address)) for _ in range(2)] == ["BYPASS"] * 2


async def test_media_types_are_told_apart(nginx: Set) -> None:
    address = nginx.origin.keep("a")
    for accept, media, status in (
        (JSON, JSON, "MISS"),
        (RESPONSE, RESPONSE, "MISS"),
        ("*/*", JSON, "HIT"),
        (f"{JSON},text/plain;q=0.1", JSON, "HIT"),
        (f"{RESPONSE}, application/graphql+json, {JSON}, text/event-stream", RESPONSE, "HIT"),
        (f"{RESPONSE},{JSON};q=0.9", RESPONSE, "HIT"),
        (f"{JSON}x", JSON, "BYPASS"),
    ):
        answer = await nginx.get(address, accept=accept)
        assert (answer.headers["content-type"], cached(answer)) == (media, status)


async def test_codings_are_told_apart(nginx: Set) -> None:
    address = nginx.origin.keep("a")
    for accepts, coding, status in (
        ("identity", None, "MISS"),
        ("gzip, deflate, br, zstd", "br", "MISS"),
        ("gzip, deflate", "gzip", "MISS"),
        ("br", "br", "HIT"),
        ("gzip,br", "br", "HIT"),
        ("GZIP", "gzip", "HIT"),
        ("gzip;q=0", None, "HIT"),
        ("br;q=1.0, gzip;q=0.5", None, "HIT"),
        ("zstd", None, "HIT"),
        ("xbr, gzipx", None, "HIT"),
        ("", None, "HIT"),
    ):
        answer = await nginx.get(address, accept_encoding=accepts)
        assert (answer.headers.get("content-encoding"), cached(answer)) == (coding, status)
        assert answer.content == nginx.origin.entries["a"].body
        tag = answer.headers["etag"]
        assert tag.endswith(f'-{coding}"') == (coding is not None)
        known = await nginx.get(address, accept_encoding=accepts, if_none_match=tag)
        assert known.status_code == 304
    assert [asked.get("accept-encoding") for asked in nginx.origin.asked] == [None, "br", "gzip"]


async def test_hosts_and_origins_are_told_apart(nginx: Set) -> None:
    address = nginx.origin.keep("a")
    assert cached(await nginx.get(address)) == "MISS"
    assert cached(await nginx.get(address, host="other.example")) == "MISS"
    assert cached(await nginx.get(address, origin="https://app.example")) == "MISS"
    assert cached(await nginx.get(address, origin="https://app.example")) == "HIT"


async def test_what_has_become_old_and_is_the_same_is_not_sent_again(nginx: Set) -> None:
    address = nginx.origin.keep("a", max_age=1.9)
    first = await nginx.get(address)
    nginx.origin.keep("a")  # made anew, and the same
    again = await nginx.until(address, lambda answer: cached(answer) != "HIT")
    assert (cached(again), again.content) == ("REVALIDATED", first.content)
    assert nginx.origin.asked[-1]["if-none-match"] == first.headers["etag"]
    assert nginx.origin.statuses == [200, 304]
    assert cached(await nginx.get(address)) == "HIT"  # for as long as the 304 said
    assert len(nginx.origin.asked) == 2


async def test_what_has_become_old_and_is_another_is_sent(nginx: Set) -> None:
    address = nginx.origin.keep("a", max_age=1.9)
    await nginx.get(address)
    nginx.origin.keep("a", "new")
    again = await nginx.until(address, lambda answer: cached(answer) != "HIT")
    assert (cached(again), again.content) == ("EXPIRED", nginx.origin.entries["a"].body)
    assert nginx.origin.statuses == [200, 200]


async def test_nothing_is_sent_old_unless_the_policy_says_so(nginx: Set) -> None:
    strict, lenient = (
        nginx.origin.keep("a", max_age=1.9),
        nginx.origin.keep("b", max_age=1.9, stale=60.0),
    )
    for address in (strict, lenient):
        await nginx.get(address)
    for name in ("a", "b"):
        nginx.origin.keep(name, "new")
    old = await nginx.until(lenient, lambda answer: cached(answer) != "HIT")
    assert cached(old) in {"STALE", "UPDATING"}
    assert b"old" in old.content
    new = await nginx.until(lenient, lambda answer: cached(answer) == "HIT")
    assert b"new" in new.content
    assert b"new" in (await nginx.until(strict, lambda answer: cached(answer) != "HIT")).content


async def test_many_who_want_the_same_are_one_request(tmp_path: Path) -> None:
    origin = Origin(gate=asyncio.Event())
    assert origin.gate is not None
    address = origin.keep("a")
    async with fronted(origin, tmp_path, lock="30s") as (client, _):
        waiting = [asyncio.create_task(client.get(address)) for _ in range(20)]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not origin.asked:
                await asyncio.sleep(0.001)
        origin.gate.set()
        answers = await asyncio.gather(*waiting)
    assert {answer.content for answer in answers} == {origin.entries["a"].body}
    assert Counter(map(cached, answers)) == {"MISS": 1, "HIT": 19}
    assert len(origin.asked) == 1


async def test_who_waits_for_another_does_not_wait_long(nginx: Set) -> None:
    """Its answer may never come."""
    address = nginx.origin.keep("a")
    nginx.origin.gate = asyncio.Event()
    first, second = (asyncio.create_task(nginx.get(address)) for _ in range(2))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(nginx.origin.asked) < 2:
            await asyncio.sleep(0.01)
    nginx.origin.gate.set()
    assert [cached(await first), cached(await second)] == ["MISS", "MISS"]


async def test_an_answer_is_purged_by_its_key_in_all_its_forms(nginx: Set) -> None:
    folder = NginxFolder(nginx.front.cache)
    tiny, huge = nginx.origin.keep("a"), nginx.origin.keep("b", tags=(HUGE,))
    both = nginx.origin.keep("c", tags=(TINY, HUGE))

    async def states() -> list[str]:
        return [
            cached(await nginx.get(tiny)),
            cached(await nginx.get(tiny, accept_encoding="br")),
            cached(await nginx.get(tiny, accept=RESPONSE)),
            cached(await nginx.get(huge)),
            cached(await nginx.get(both)),
        ]

    assert await states() == ["MISS"] * 5
    assert await states() == ["HIT"] * 5
    assert await folder.purge([surrogate_key(entity("models", "c3"))]) == 0
    assert await states() == ["HIT"] * 5
    nginx.origin.keep("a", "new")
    assert await folder.purge([surrogate_key(TINY)]) == 4
    assert b"new" in (await nginx.get(tiny)).content
    assert await states() == ["HIT", "MISS", "MISS", "HIT", "MISS"]
    assert await folder.purge(["modelharbor"]) == 5
    assert await folder.purge(["modelharbor"]) == 0
    assert await states() == ["MISS"] * 5


async def test_the_largest_set_of_keys_goes_through(nginx: Set) -> None:
    tags = tuple(entity("files", number) for number in range(880))
    address = nginx.origin.keep("a", tags=tags)
    assert [cached(await nginx.get(address)) for _ in range(2)] == ["MISS", "HIT"]
    (path,) = (path for path in nginx.front.cache.rglob("*") if path.is_file())
    assert len(keys_in(str(path)).split()) == 881
    assert await NginxFolder(nginx.front.cache).purge([surrogate_key(tags[-1])]) == 1


async def test_request_ids_are_those_of_the_request(nginx: Set) -> None:
    address = nginx.origin.keep("a")
    first, second = await nginx.get(address), await nginx.get(address)
    ids = [answer.headers.get_list("x-request-id") for answer in (first, second)]
    assert [len(found) for found in ids] == [1, 1]
    assert ids[0] != ids[1]
    assert [nginx.origin.asked[0]["x-request-id"]] == ids[0]
    for given, kept in (("mine-1", True), ("not sane", False)):
        answer = await nginx.get(address, x_request_id=given)
        assert (answer.headers["x-request-id"] == given) is kept


async def test_the_server_is_told_who_asks(nginx: Set) -> None:
    await nginx.get(nginx.origin.keep("a"), x_forwarded_for="1.2.3.4", x_real_ip="1.2.3.4")
    (asked,) = nginx.origin.asked
    assert asked["x-forwarded-for"] == asked["x-real-ip"] == "127.0.0.1"
    assert asked["x-forwarded-proto"] == "http"
    assert asked["host"] == asked["x-forwarded-host"] == nginx.front.url.removeprefix("http://")


async def test_events_are_not_gathered(tmp_path: Path) -> None:
    """The second is sent when the first has arrived."""
    arrived = asyncio.Event()

    async def events(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await arrived.wait()
        await send({"type": "http.response.body", "body": b"data: 2\n\n"})

    async with fronted(events, tmp_path) as (client, _):
        accept = {"accept": "text/event-stream"}
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            client.stream("GET", "/graphql", headers=accept) as answer,
        ):
            pieces = answer.aiter_bytes()
            assert await anext(pieces) == b"data: 1\n\n"
            arrived.set()
            assert await anext(pieces) == b"data: 2\n\n"


async def test_uploads_are_not_gathered_and_have_no_limit(tmp_path: Path) -> None:
    """The rest of a body is sent when the server has its beginning."""
    begun = asyncio.Event()
    size = 0

    async def upload(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal size
        more = True
        while more:
            message = await receive()
            size += len(message["body"])
            begun.set()
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        await begun.wait()
        for _ in range(300):
            yield b"x" * 100_000

    async with fronted(upload, tmp_path) as (client, _), asyncio.timeout(PATIENCE_SECONDS):
        length = {"content-length": str(301 * 100_000)}
        answer = await client.patch("/uploads/a", content=body(), headers=length)
    assert (answer.status_code, size) == (204, 30_100_000)


async def test_ranges_and_tags_of_files_go_through(tmp_path: Path) -> None:
    asked: list[dict[bytes, bytes]] = []

    async def file(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(dict(scope["headers"]))
        headers = [
            (b"etag", b'"abc"'),
            (b"content-range", b"bytes 2-3/6"),
            (b"content-length", b"2"),
            (b"cache-control", b"public, no-cache"),
        ]
        await send({"type": "http.response.start", "status": 206, "headers": headers})
        await send({"type": "http.response.body", "body": b"cd"})

    given = {"range": "bytes=2-3", "if-range": '"abc"', "if-none-match": '"x"', **BEARER}
    async with fronted(file, tmp_path) as (client, _):
        answer = await client.get("/files/1/a.bin?signature=s", headers=given)
    assert (answer.status_code, answer.content) == (206, b"cd")
    assert answer.headers["etag"] == '"abc"'
    assert answer.headers["content-range"] == "bytes 2-3/6"
    for name, value in given.items():
        assert asked[0][name.encode()] == value.encode()


async def test_metrics_are_not_for_the_outside(nginx: Set) -> None:
    assert (await nginx.get("/metrics")).status_code == 403
    assert nginx.origin.asked == []
