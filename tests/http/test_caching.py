"""What caches of others are told: who may keep an answer, how long, by which tag and keys."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable
from hashlib import sha256
from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelharbor.cache.entries import Access, Entry
from modelharbor.cache.tags import added, below, changed, entity, gone
from modelharbor.db.connection import Database
from modelharbor.http.caching import (
    ADDRESS_BYTES,
    CODINGS,
    EVERY,
    KEYS_BYTES,
    UNKEPT,
    AddressTooLong,
    Named,
    Sent,
    check_address,
    codings,
    compressed,
    digest_of,
    distinct,
    form_of,
    matching,
    purged_by,
    seconds_left,
    sent,
    surrogate_key,
    surrogate_keys,
    tag_with,
    vary_of,
)
from modelharbor.http.middleware import CompressionMiddleware, RequestMiddleware
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model
from tests.http.serving import Server, serving

pytestmark = pytest.mark.anyio
BODY = b'{"data":{"model":{"name":"' + b"tiny" * 500 + b'"}}}'
MEDIA = b"application/json; charset=utf-8"
VARY = b"Authorization, Accept, Accept-Encoding"
NOBODY: dict[bytes, bytes] = {b"host": b"localhost", b"accept": b"*/*"}
TAG = re.compile(r'"[0-9a-f]{32}"')


def kept(**changes: Any) -> Entry:
    named: dict[str, Any] = {
        "body": BODY,
        "position": 1,
        "tags": (entity("models", "65f1"), changed("models", "summary")),
        "access": Access.ANYBODY,
        "made_at": time.time(),
        "max_age": 60.5,
    }
    return Entry(**named | changes)


def by_get(
    entry: Entry | None,
    headers: dict[bytes, bytes] | None = None,
    *,
    with_keys: bool = False,
    **more: Any,
) -> Sent:
    return sent(
        more.pop("status", 200),
        MEDIA,
        BODY if entry is None else entry.body,
        VARY,
        named=Named.of(NOBODY | (headers or {})),
        entry=entry,
        form=None if entry is None else form_of(entry, with_keys=with_keys),
        **more,
    )


def named(found: Sent) -> dict[str, str]:
    names = [name for name, _ in found[1]]
    assert len(set(names)) == len(names)
    return {name.decode(): value.decode() for name, value in found[1]}


def test_what_everybody_may_read_may_be_kept_by_everybody() -> None:
    status, _, body = found = by_get(kept())
    headers = named(found)
    assert TAG.fullmatch(headers.pop("etag"))
    assert (status, body) == (200, BODY)
    assert headers == {
        "cache-control": "public, max-age=60",
        "content-length": str(len(BODY)),
        "content-type": MEDIA.decode(),
        "vary": VARY.decode(),
    }


@pytest.mark.parametrize(
    ("changes", "control"),
    [
        ({"access": Access.RIGHTS}, "public, max-age=60"),
        ({"stale": 30.0}, "public, max-age=60, stale-while-revalidate=30"),
        ({"stale": 0.9}, "public, max-age=60"),
        ({"max_age": 1.5}, "public, max-age=1"),
        ({"max_age": 0.9}, "private, no-store"),
        ({"access": Access.VIEWER}, "private, no-store"),
        ({"is_private": True}, "private, no-store"),
        ({"is_private": True, "stale": 30.0}, "private, no-store"),
    ],
)
def test_the_policy_says_how_long(changes: dict[str, Any], control: str) -> None:
    assert named(by_get(kept(**changes)))["cache-control"] == control


def test_what_was_kept_here_already_is_kept_less_long_there() -> None:
    entry = kept(made_at=1000.0)
    assert [seconds_left(entry, now) for now in (1000.0, 1000.4, 1000.6, 1059.6)] == [60, 60, 59, 0]
    assert seconds_left(entry, 990.0) == 60  # made by a clock that is ahead
    assert seconds_left(entry, 1100.0) < 0
    old = kept(made_at=time.time() - 70, stale=30.0)  # served while it is made anew
    assert named(by_get(old))["cache-control"] == "private, no-store"


@pytest.mark.parametrize(
    "header",
    [
        b"authorization",
        b"cookie",
        b"proxy-authorization",
        b"client-cert",
        b"x-forwarded-client-cert",
        b"x-ssl-client-cert",
    ],
)
@pytest.mark.parametrize("value", [b"", b"Bearer mh_x"])
def test_no_cache_keeps_what_was_asked_with_credentials(header: bytes, value: bytes) -> None:
    entry = kept(stale=30.0)
    found = named(by_get(entry, {header: value}, with_keys=True))
    assert found["cache-control"] == "private, no-store"
    assert "surrogate-key" not in found
    assert TAG.fullmatch(found["etag"])


@pytest.mark.parametrize(
    "answer",
    [
        sent(200, MEDIA, BODY, b"Accept", entry=kept()),  # by POST, or with a text
        by_get(kept(), has_errors=True),
        by_get(kept(), status=400),
    ],
)
def test_nothing_else_may_be_kept(answer: Sent) -> None:
    headers = named(answer)
    assert headers["cache-control"] == "private, no-store"
    assert not {"etag", "surrogate-key"} & headers.keys()
    assert answer[2] == BODY


def test_a_body_that_tells_more_is_not_what_was_kept() -> None:
    entry, body = kept(), BODY.replace(b"}}}", b'}},"extensions":{}}')
    asked, form = Named.of(NOBODY), form_of(entry, with_keys=True)
    found = sent(200, MEDIA, body, VARY, named=asked, entry=entry, form=form)
    assert named(found) == {
        "cache-control": "private, no-store",
        "content-length": str(len(body)),
        "content-type": MEDIA.decode(),
        "etag": f'"{digest_of(body)}"',
        "vary": VARY.decode(),
    }


def test_an_answer_that_is_not_kept_here_is_kept_nowhere_and_yet_told_by_its_tag() -> None:
    headers = named(by_get(None))
    assert headers["cache-control"] == "private, no-store"
    assert headers["etag"] == f'"{digest_of(BODY)}"'
    assert by_get(None, {b"if-none-match": headers["etag"].encode()})[0] == 304


@pytest.mark.parametrize("layer", [b"L1", b"L2", b"MISS", b"BYPASS", b"STALE"])
def test_the_layer_is_told_where_that_is_wanted(layer: bytes) -> None:
    assert named(by_get(kept(), layer=layer))["x-cache"] == layer.decode()
    assert named(sent(200, MEDIA, BODY, b"Accept", layer=layer))["x-cache"] == layer.decode()
    assert "x-cache" not in named(by_get(kept()))


def test_who_has_it_is_told_so() -> None:
    entry = kept(stale=30.0)
    tag = named(by_get(entry, with_keys=True))["etag"]
    status, _, body = found = by_get(entry, {b"if-none-match": tag.encode()}, with_keys=True)
    assert (status, body) == (304, b"")
    assert named(found) == {
        "cache-control": "public, max-age=60, stale-while-revalidate=30",
        "etag": tag,
        "surrogate-key": surrogate_keys(entry.tags).decode(),
        "vary": VARY.decode(),
    }


@pytest.mark.parametrize(
    ("known", "accepts", "found"),
    [
        ('"d"', "", '"d"'),
        ('W/"d"', "", '"d"'),
        ("*", "", '"d"'),
        ('"x", "d"', "br", '"d"'),
        ('"d-br"', "gzip, br", '"d-br"'),
        ('W/"d-br"', "br", '"d-br"'),
        ('"d-gzip","d-br"', "gzip, br", '"d-br"'),
        ('"d-gzip", "d"', "gzip", '"d-gzip"'),
        ('"d-gzip"', "zstd, gzip", '"d-gzip"'),
        ('"d-gzip"', "*", '"d-gzip"'),
        ('"d-gzip"', "", None),  # it could not read what a cache has under this tag
        ('"d-gzip"', "gzip;q=0, br", None),
        ('"d-lzma"', "lzma", None),
        ('"x"', "br", None),
        ('"D"', "br", None),
        ("d", "br", None),
        ("", "br", None),
        ('"', "br", None),
    ],
)
def test_a_tag_is_known_in_codings_that_the_client_takes(
    known: str, accepts: str, found: str | None
) -> None:
    assert matching(known, "d", accepts) == found


@pytest.mark.parametrize(
    ("accepts", "found"),
    [
        ("", ()),
        ("identity", ()),
        ("gzip", ("gzip",)),
        ("gzip, deflate, br, zstd", ("zstd", "br", "gzip")),
        ("GZIP;Q=1", ("gzip",)),
        ("br;q=0.1,gzip;q=1.0", ("br", "gzip")),
        ("br;q=0,gzip;q=0.000", ()),
        ("*", CODINGS),
        ("*;q=0", ()),
        ("*, br;q=0", ("zstd", "gzip")),
        ("br;q=high", ()),
        ("br;level=4", ("br",)),
    ],
)
def test_codings_are_negotiated(accepts: str, found: tuple[str, ...]) -> None:
    assert codings(accepts) == found


def test_other_contents_or_keys_have_another_tag() -> None:
    entry = kept()
    bodies = [entry, kept(body=b'{"data":null}')]
    assert len({named(by_get(each))["etag"] for each in bodies}) == 2
    keys = [entry, kept(tags=("models/65f2",)), kept(tags=(*entry.tags, "models-"))]
    assert len({named(by_get(each, with_keys=True))["etag"] for each in keys}) == 3
    assert len({named(by_get(each))["etag"] for each in keys}) == 1
    turned = kept(tags=tuple(entry.tags)[::-1])
    assert form_of(turned, with_keys=True) == form_of(entry, with_keys=True)


def test_tags_tell_codings_apart() -> None:
    assert tag_with(b'"d"', b"br") == b'"d-br"'
    assert tag_with(b'"d-br"', b"br") == b'"d-br"'  # compressed beforehand
    assert tag_with(b'W/"d"', b"br") == b'W/"d"'  # a weak one is the same for all


@pytest.mark.parametrize(
    ("method", "with_origins", "vary"),
    [
        ("GET", False, "Authorization, Accept, Accept-Encoding"),
        ("GET", True, "Authorization, Accept, Accept-Encoding, Origin"),
        ("POST", False, "Accept"),
        ("POST", True, "Accept"),
    ],
)
def test_what_an_answer_depends_on(method: str, with_origins: bool, vary: str) -> None:
    assert vary_of(method, with_origins=with_origins).decode() == vary


@pytest.mark.parametrize(
    ("given", "vary"),
    [
        (b"Accept", b"Accept"),
        (b"Accept, accept-encoding , Accept-Encoding,,accept", b"Accept, accept-encoding"),
        (b"Accept, *", b"*"),
        (b"", b""),
    ],
)
def test_vary_names_each_once(given: bytes, vary: bytes) -> None:
    assert distinct(given) == vary


def test_several_vary_become_one() -> None:
    found = compressed([(b"vary", b"A, B"), (b"a", b"1"), (b"vary", b"b, C"), (b"vary", b"D")])
    assert found == [(b"vary", b"A, B, C, D"), (b"a", b"1")]


ALL_TAGS = (
    entity("models", "65f1c0ffee0123456789abcd"),
    below("files", "version_id", "65f1"),
    changed("models", "summary"),
    changed("models", "summary", "task:ocr"),
    added("models", "principal:public"),
    gone("models"),
)


def test_keys_are_short_and_stay_the_same() -> None:
    assert surrogate_key("models/65f1c0ffee0123456789abcd") == "N3Sh6uSO"
    found = surrogate_keys(ALL_TAGS).decode().split(" ")
    assert found == [EVERY, *sorted(surrogate_key(tag) for tag in ALL_TAGS)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{8}", key) for key in found[1:])


def test_only_public_answers_name_their_keys_and_only_where_that_is_set() -> None:
    for entry, with_keys, is_named in (
        (kept(), True, True),
        (kept(), False, False),
        (kept(access=Access.RIGHTS), True, True),
        (kept(access=Access.VIEWER), True, False),
        (kept(is_private=True), True, False),
        (kept(tags=()), True, True),
        (kept(max_age=0.0), True, False),
    ):
        headers = named(by_get(entry, with_keys=with_keys))
        assert ("surrogate-key" in headers) is is_named


@pytest.mark.parametrize("tag", ALL_TAGS)
def test_a_change_purges_what_has_its_tag_however_many_it_has(tag: str) -> None:
    for others in (0, 10, 5000):
        tags = [tag, *(entity("files", number) for number in range(others))]
        tags += [entity("models", number) for number in range(others)]
        keys = surrogate_keys(tags)
        assert len(keys) <= KEYS_BYTES
        assert set(keys.decode().split()) & purged_by([tag])


def test_what_does_not_fit_falls_back_to_its_collection_the_largest_first() -> None:
    files = [entity("files", number) for number in range(900)]
    models = [entity("models", number) for number in range(20)]
    found = set(surrogate_keys([*files, *models]).decode().split())
    assert found == {EVERY, surrogate_key("files"), *map(surrogate_key, models)}
    assert not found & purged_by([entity("models", 21)])


def test_most_keys_fit_exactly() -> None:
    most = [entity("files", number) for number in range((KEYS_BYTES - len(EVERY)) // 9)]
    keys = surrogate_keys(most)
    assert KEYS_BYTES - 9 < len(keys) <= KEYS_BYTES
    assert surrogate_keys([*most, "files/x"]).decode() == f"{EVERY} {surrogate_key('files')}"


def test_addresses_have_an_end() -> None:
    fits: Scope = {"raw_path": b"/graphql", "query_string": b"x" * (ADDRESS_BYTES - 8)}
    check_address(fits)
    check_address({"query_string": b""})
    with pytest.raises(AddressTooLong) as caught:
        check_address({**fits, "query_string": b"x" * (ADDRESS_BYTES - 7)})
    assert (caught.value.status, caught.value.code) == (414, "PAYLOAD_TOO_LARGE")
    assert caught.value.message == (
        "The address has 32769 bytes; the limit is 32768: send the operation by POST."
    )


@pytest.mark.parametrize("coding", ["identity", *CODINGS])
async def test_each_coding_has_its_tag_and_is_known_by_it(coding: str) -> None:
    entry = kept()
    app = RequestMiddleware(CompressionMiddleware(answering(entry)))
    status, headers, body = await ask(app, {b"accept-encoding": coding.encode()})
    digest = form_of(entry, with_keys=False).digest
    expected = digest if coding == "identity" else f"{digest}-{coding}"
    assert (status, headers["etag"], headers["vary"]) == (200, f'"{expected}"', VARY.decode())
    assert headers.get("content-encoding", "identity") == coding
    assert httpx.Response(200, headers=headers, content=body).content == BODY

    asked = {b"accept-encoding": coding.encode(), b"if-none-match": headers["etag"].encode()}
    again, told, nothing = await ask(app, asked)
    assert (again, nothing) == (304, b"")
    for name in ("etag", "vary", "cache-control"):  # RFC 9110, 15.4.5
        assert told[name] == headers[name]
    assert not {"content-encoding", "content-length", "content-type"} & told.keys()


async def test_a_client_of_no_coding_is_told_on_what_the_answer_depends() -> None:
    app = RequestMiddleware(CompressionMiddleware(answering(kept())))
    status, headers, body = await ask(app, {})
    assert (status, headers["vary"], body) == (200, VARY.decode(), BODY)


@pytest.mark.parametrize("accepts", [{}, {b"accept-encoding": b"br"}])
@pytest.mark.parametrize("origin", [{}, {b"origin": b"https://app.example"}])
async def test_other_origins_are_told_apart_once(
    accepts: dict[bytes, bytes], origin: dict[bytes, bytes]
) -> None:
    inner = CompressionMiddleware(answering(kept(), vary_of("GET", with_origins=True)))
    cors = CORSMiddleware(inner, allow_origins=["https://app.example"])
    app = RequestMiddleware(cors, merges_vary=True)
    _, headers, _ = await ask(app, accepts | origin)
    assert headers["vary"] == "Authorization, Accept, Accept-Encoding, Origin"


async def test_no_name_is_lost_where_others_add_theirs() -> None:
    inner = CompressionMiddleware(Response(b"x", headers={"vary": "Accept"}))
    cors = CORSMiddleware(inner, allow_origins=["https://app.example"])
    app = RequestMiddleware(cors, merges_vary=True)
    _, headers, _ = await ask(app, {b"origin": b"https://app.example"})
    assert headers["vary"] == "Accept, Accept-Encoding, Origin"


def answering(entry: Entry, vary: bytes = VARY) -> ASGIApp:
    """An application that serves one entry."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        form, asked = form_of(entry, with_keys=False), Named.of(dict(scope["headers"]))
        status, headers, body = sent(
            200, MEDIA, entry.body, vary, named=asked, entry=entry, form=form
        )
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


async def ask(app: ASGIApp, headers: dict[bytes, bytes]) -> tuple[int, dict[str, str], bytes]:
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("A GET has no body.")

    async def send(message: Message) -> None:
        sent.append(message)

    asked: Iterable[tuple[bytes, bytes]] = (NOBODY | headers).items()
    scope = {"type": "http", "method": "GET", "path": "/graphql", "headers": list(asked)}
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], named((0, sent[0]["headers"], b"")), body


LIST = "query List{models(first:10){nodes{fullName summary}}}"


@pytest.fixture
async def keeping(settings: Settings, database: Database) -> AsyncIterator[tuple[Server, str]]:
    """The whole server with one public model, and the address of a query that it knows by its hash."""
    ada = await insert_actor("ada")
    await insert_model(ada, "open", summary="words " * 200)
    changes = {
        "response_cache": True,
        "surrogate_keys": True,
        "cache_timeout_seconds": 30.0,  # on a machine with much to do
        "allowed_origins": ["https://app.example"],
    }
    async with serving(settings.model_copy(update=changes), None) as server:
        digest = sha256(LIST.encode()).hexdigest()
        extensions = {"persistedQuery": {"version": 1, "sha256Hash": digest}}
        await server.ask(LIST, extensions=extensions)
        address = f"/graphql?documentId=sha256:{digest}"
        async with asyncio.timeout(30):
            while (await server.client.get(address)).headers["cache-control"] == UNKEPT[1].decode():
                await asyncio.sleep(0.01)
        yield server, address


GET_VARY = "Authorization, Accept, Accept-Encoding, Origin"


@pytest.mark.parametrize("coding", ["identity", *CODINGS])
async def test_a_get_by_hash_is_for_caches(keeping: tuple[Server, str], coding: str) -> None:
    server, address = keeping
    for origin in ({}, {"origin": "https://app.example"}):
        asked = {"accept-encoding": coding, **origin}
        first = await server.client.get(address, headers=asked)
        assert first.json()["data"]["models"]["nodes"][0]["fullName"] == "ada/open"
        assert re.fullmatch(r"public, max-age=(30|[12]\d)", first.headers["cache-control"])
        assert first.headers.get_list("vary") == [GET_VARY]
        assert first.headers["surrogate-key"].startswith(f"{EVERY} ")
        assert not {"ratelimit", "ratelimit-policy", "x-cache"} & first.headers.keys()
        assert first.headers.get("content-encoding", "identity") == coding
        again = await server.client.get(
            address, headers={**asked, "if-none-match": first.headers["etag"]}
        )
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        assert again.headers.get_list("vary") == [GET_VARY]


async def test_nothing_else_is_for_caches(keeping: tuple[Server, str]) -> None:
    server, address = keeping
    get, unknown = server.client.get, f"/graphql?documentId=sha256:{'0' * 64}"
    for answer, status in (
        (await server.ask(LIST), 200),
        (await get("/graphql", params={"query": LIST}), 200),
        (await get(address, headers={"cookie": "a=b"}), 200),
        (await get(address, headers={"x-modelharbor-cost": "1"}), 200),
        (await get(address, headers={"authorization": "Bearer mh_x"}), 401),
        (await get(unknown), 200),
        (await get("/graphql?documentId=sha256:x"), 400),
        (await get(f"/graphql?documentId={'x' * 40_000}"), 414),
        (await get(address, headers={"accept": "text/csv"}), 406),
        (await get("/graphql", params={"query": "mutation{a}"}), 200),
    ):
        assert (answer.status_code, answer.headers["cache-control"]) == (
            status,
            "private, no-store",
        )
        assert "surrogate-key" not in answer.headers
        if answer.request.method == "GET":
            assert answer.headers.get_list("vary") == [GET_VARY]
