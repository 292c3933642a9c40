"""Rows straight over HTTP: the same for all who ask in the same way, at the pace of who takes them."""

import asyncio
import csv
import io
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from hashlib import sha256
from time import monotonic
from typing import Any

import httpx
import orjson
import pytest
import redis.asyncio
from bson import ObjectId

from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.execution import exporting
from modelharbor.exports.encoding import TextEncoder
from modelharbor.observability.commands import CommandCounter
from modelharbor.resolvers.persisted import Publication, publish
from modelharbor.resolvers.tokens import issue_token
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model, insert_version
from tests.live.serving import Served, serving

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 30.0
NAMES = "{ models { nodes { name } } }"
LARGE = "{ models { nodes { name summary } } }"
ROW_BYTES = 16 * 1024
BATCH_ROWS = 32


@pytest.fixture
async def served(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings) as found:
        yield found


async def ada(served: Served) -> ActorDocument:
    found = await ActorDocument.get(served.user_id)
    assert found is not None
    return found


def client(served: Served, token: str | None = None, **headers: str) -> httpx.AsyncClient:
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    base = f"http://127.0.0.1:{served.port}"
    return httpx.AsyncClient(base_url=base, headers=headers, timeout=GUARD_SECONDS, trust_env=False)


async def streamed(served: Served, token: str | None = None, **given: Any) -> httpx.Response:
    async with client(served, token) as asking:
        return await asking.post("/exports/stream", json=given)


def codes(answer: httpx.Response) -> list[str]:
    return [error["extensions"]["code"] for error in answer.json()["errors"]]


def names(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [orjson.loads(line)["name"] for line in answer.content.splitlines()]


# ---- what is sent


async def test_rows_are_lines_of_what_the_viewer_may_see(served: Served) -> None:
    owner = await ada(served)
    for name, visibility in (("b", Visibility.PUBLIC), ("a", Visibility.PRIVATE)):
        await insert_model(owner, name, visibility=visibility)
    query = "query Names { models { nodes { name stats { likes } owner { login } } } }"
    for token, expected in ((None, ["b"]), (served.token, ["b", "a"])):
        by_post = await streamed(served, token, query=query)
        assert [orjson.loads(line) for line in by_post.content.splitlines()] == [
            {"name": name, "stats": {"likes": 0}, "owner": {"login": "ada"}} for name in expected
        ]
        async with client(served, token) as asking:
            by_get = await asking.get(
                "/exports/stream", params={"query": query, "operationName": "Names"}
            )
            as_csv = await asking.get("/exports/stream", params={"query": query, "format": "csv"})
        assert by_get.content == by_post.content
        assert [dict(row) for row in csv.DictReader(io.StringIO(as_csv.text, newline=""))] == [
            {"name": name, "stats.likes": "0", "owner.login": "ada"} for name in expected
        ]
        assert by_get.headers["content-type"] == "application/x-ndjson"
        assert as_csv.headers["content-type"] == "text/csv; charset=utf-8; header=present"
        for answer, suffix in ((by_post, "jsonl"), (by_get, "jsonl"), (as_csv, "csv")):
            assert answer.headers["cache-control"] == "private, no-store"
            assert f'filename="models.{suffix}"' in answer.headers["content-disposition"]


async def test_variables_are_taken_by_both_ways(served: Served) -> None:
    owner = await ada(served)
    for name in ("a", "b"):
        await insert_model(owner, name, tags=[name])
    query = (
        "query Q($tags: [String!]) { models(filter: {tags: {hasAny: $tags}}) { nodes { name } } }"
    )
    variables = {"tags": ["b"]}
    assert names(await streamed(served, query=query, variables=variables)) == ["b"]
    async with client(served) as asking:
        answer = await asking.get(
            "/exports/stream",
            params={"query": query, "variables": orjson.dumps(variables).decode()},
        )
    assert names(answer) == ["b"]


async def test_no_rows_are_an_answer_of_none(served: Served) -> None:
    assert (await streamed(served, query=NAMES)).content == b""
    assert (await streamed(served, query=NAMES, format="csv")).content == b"name\r\n"


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
async def test_it_is_compressed_for_who_takes_that(served: Served, coding: str) -> None:
    await insert_model(await ada(served), "a", summary="x" * 2000)
    async with client(served) as asking:
        answer = await asking.get(
            "/exports/stream", params={"query": LARGE}, headers={"accept-encoding": coding}
        )
        plain = await asking.get(
            "/exports/stream", params={"query": LARGE}, headers={"accept-encoding": "identity"}
        )
    assert answer.headers["content-encoding"] == coding
    assert "content-encoding" not in plain.headers
    assert answer.content == plain.content
    assert names(answer) == ["a"]


# ---- what is refused


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands about models."""
    found: list[str] = []

    def started(self: CommandCounter, event: Any) -> None:
        if event.command[event.command_name] == "models":
            found.append(event.command_name)

    monkeypatch.setattr(CommandCounter, "started", started)
    return found


async def test_what_can_be_exported_is_read(served: Served, reads: list[str]) -> None:
    assert names(await streamed(served, query=NAMES)) == []
    assert reads == ["find"]


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "BAD_REQUEST"),
        ({"query": "{"}, "GRAPHQL_PARSE_FAILED"),
        ({"query": "{ nothing }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": NAMES, "variables": []}, "BAD_REQUEST"),
        ({"query": NAMES, "operationName": "Other"}, "BAD_REQUEST"),
        (
            {"query": "query Q($f: ModelFilter!) { models(filter: $f) { nodes { name } } }"},
            "BAD_USER_INPUT",
        ),
        (
            {
                "query": 'mutation { createModel(input: {owner: "ada", name: "x"}) { model { id } } }'
            },
            "BAD_USER_INPUT",
        ),
        ({"query": "subscription { jobs { cursor } }"}, "BAD_USER_INPUT"),
        ({"query": "{ viewer { login } }"}, "BAD_USER_INPUT"),
        (
            {"query": "{ a: models { nodes { name } } b: models { nodes { name } } }"},
            "BAD_USER_INPUT",
        ),
        ({"query": "{ models(first: 5) { nodes { name } } }"}, "BAD_USER_INPUT"),
        ({"query": NAMES, "format": "parquet"}, "BAD_USER_INPUT"),
        ({"query": NAMES, "format": 1}, "BAD_USER_INPUT"),
        (
            {
                "query": "{"
                + "models{nodes{"
                + "latestVersion{model{" * 9
                + "name"
                + "}}" * 9
                + "}}}"
            },
            "OPERATION_TOO_COMPLEX",
        ),
    ],
)
async def test_what_cannot_be_exported_is_refused_before_any_work(
    served: Served, reads: list[str], given: dict[str, Any], code: str
) -> None:
    answer = await streamed(served, **given)
    assert (answer.status_code, codes(answer)) == (400, [code])
    assert reads == []
    assert answer.headers["content-type"].startswith("application/json")


async def test_other_ways_to_ask_are_refused(served: Served) -> None:
    async with client(served) as asking:
        put = await asking.put("/exports/stream", json={"query": NAMES})
        form = await asking.post("/exports/stream", data={"query": NAMES})
        several = await asking.post("/exports/stream", json=[{"query": NAMES}])
        unknown = await asking.get("/exports/stream", params={"documentId": "sha256:" + "0" * 64})
    assert (put.status_code, put.headers["allow"], codes(put)) == (
        405,
        "GET, POST",
        ["METHOD_NOT_ALLOWED"],
    )
    assert (form.status_code, codes(form)) == (415, ["UNSUPPORTED_MEDIA_TYPE"])
    assert (several.status_code, codes(several)) == (400, ["BAD_REQUEST"])
    # No row may look like an error, nor an error like a row.
    assert (unknown.status_code, codes(unknown)) == (404, ["PERSISTED_QUERY_NOT_FOUND"])
    bad = await streamed(served, "mh_nobody", query=NAMES)
    assert (bad.status_code, codes(bad)) == (401, ["UNAUTHENTICATED"])


async def test_where_only_published_operations_run_others_are_refused(
    settings: Settings, database: Database
) -> None:
    digest = sha256(NAMES.encode()).hexdigest()
    await publish(
        database, "notebook", [Publication("names", NAMES, digest, None, "query", [])], {}
    )
    hearing = {"trusted_only": True, "response_cache": True}  # of changes, at once
    async with serving(settings.model_copy(update=hearing)) as served:
        await insert_model(await ada(served), "a")
        user = await insert_actor("bob")
        scopes = [each for each in Permission if each is not Permission.OPERATE]
        _, token = await issue_token(database, user.id, "t", scopes, None)
        other = "{ models { nodes { id name } } }"
        for asking in (None, token):
            answer = await streamed(served, asking, query=other)
            assert (answer.status_code, codes(answer)) == (403, ["PERSISTED_QUERY_REQUIRED"])
            assert names(await streamed(served, asking, documentId="names")) == ["a"]
            assert names(await streamed(served, asking, query=NAMES)) == ["a"]


async def test_a_nested_list_that_would_be_cut_is_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing could say so afterwards. With `first` it is not cut: that is what was asked for."""
    monkeypatch.setattr(exporting, "MOST_BELOW", 2)
    monkeypatch.setattr(exporting, "FIRST_BELOW", 1)
    model = await insert_model(await ada(served), "a")
    for _ in range(3):
        await insert_version(served.database, model, {})
    query = "{ models { nodes { name versions%s { nodes { number } } } } }"
    answer = await streamed(served, query=query % "")
    assert (answer.status_code, codes(answer)) == (400, ["OPERATION_TOO_COMPLEX"])
    assert names(await streamed(served, query=query % "(first: 2)")) == ["a"]


# ---- who pays


async def test_rows_are_paid_for(settings: Settings) -> None:
    async with redis.asyncio.Redis.from_url(settings.redis_url) as engine:
        await engine.flushdb()
    spent = {"budget_anonymous": 1, "budget_seconds": 1000.0}
    async with serving(settings.model_copy(update=spent)) as served:
        owner = await ada(served)
        model = await insert_model(owner, "m0")
        await copied(served, model, 600)
        assert len(names(await streamed(served, query=NAMES))) == 601
        refused = await streamed(served, query=NAMES)  # for half of the budget is not there
        assert (refused.status_code, codes(refused)) == (429, ["RATE_LIMITED"])
        assert int(refused.headers["retry-after"]) > 0
        assert len(names(await streamed(served, served.token, query=NAMES))) == 601


# ---- the pace of the client


async def copied(served: Served, model: ModelDocument, count: int, **values: Any) -> None:
    """More models like this one."""
    row: Row | None = await served.database.data["models"].find_one({"_id": model.id})
    assert row is not None
    rows = []
    for number in range(1, count + 1):
        name = f"{model.name[0]}{number}"
        rows.append({**row, **values, "_id": ObjectId(), "name": name, "name_lower": name})
    await served.database.data["models"].insert_many(rows)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each batch had that was read for a client, as long as they are few."""
    found: list[int] = []
    encode = TextEncoder.encode

    def counted(self: TextEncoder, rows: Any) -> bytes:
        found.append(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    monkeypatch.setattr(exporting, "MOST_ROWS", BATCH_ROWS)
    return found


class Reader:
    """A client that reads when it is told to, with as small a buffer as there is."""

    def __init__(self, served: Served, token: str | None, query: str) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        self.socket.settimeout(GUARD_SECONDS)
        self.socket.connect(("127.0.0.1", served.port))
        body = orjson.dumps({"query": query})
        bearer = "" if token is None else f"authorization: Bearer {token}\r\n"
        head = f"POST /exports/stream HTTP/1.1\r\nhost: x\r\n{bearer}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.socket.sendall(head.encode() + body)

    async def begin(self) -> bytes:
        """The head of the answer."""
        found = await asyncio.to_thread(self.socket.recv, 16)
        assert found.startswith(b"HTTP/1.1 200"), found
        return found

    async def rest(self) -> tuple[bytes, bool]:
        """What comes yet, and whether that is all of it."""
        found = bytearray()

        def read() -> bool:
            try:
                while data := self.socket.recv(1 << 20):
                    found.extend(data)
                    if found.endswith(b"\r\n0\r\n\r\n"):
                        return True
            except ConnectionResetError:
                pass
            return False

        is_whole = await asyncio.to_thread(read)
        return bytes(found), is_whole


@asynccontextmanager
async def stalled(
    settings: Settings, rows: int = 1000, **values: Any
) -> AsyncIterator[tuple[Served, Reader]]:
    """16 MB of rows, of which a client of a token has taken the first bytes."""
    async with serving(settings) as served:
        summary = "x" * ROW_BYTES
        model = await insert_model(await ada(served), "m0", summary=summary, **values)
        await copied(served, model, rows - 1)
        reader = Reader(served, served.token, LARGE)
        with closing(reader.socket):
            await reader.begin()
            yield served, reader


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    begun = monotonic()
    while not await check():
        assert monotonic() - begun < GUARD_SECONDS
        await asyncio.sleep(0.05)


async def test_what_is_not_taken_is_not_read(settings: Settings, encoded: list[int]) -> None:
    """Beyond what the connection holds; a client that takes nothing for too long is cut off."""
    changed = settings.model_copy(update={"max_export_streams": 1, "send_timeout_seconds": 0.5})
    async with stalled(changed) as (served, reader):
        full = await streamed(served, query=NAMES)
        assert (full.status_code, codes(full)) == (503, ["UNAVAILABLE"])
        assert full.headers["retry-after"] == "1"

        async def is_over() -> bool:
            return (await streamed(served, query=NAMES)).status_code == 200

        await until(is_over)
        assert 0 < sum(encoded) - 1000 <= 700
        _, is_whole = await reader.rest()
        assert not is_whole


async def test_nobody_has_all_places(settings: Settings, encoded: list[int]) -> None:
    """One person with all their tokens, or one address without any, has half of them."""
    changed = settings.model_copy(update={"max_export_streams": 3})
    async with stalled(changed) as (served, _):
        _, other = await issue_token(
            served.database, served.user_id, "other", [Permission.READ], None
        )
        for token in (served.token, other):
            mine = await streamed(served, token, query=NAMES)
            assert (mine.status_code, codes(mine)) == (429, ["RATE_LIMITED"])
            assert mine.headers["retry-after"] == "1"
        anybody = Reader(served, None, LARGE)
        with closing(anybody.socket):
            await anybody.begin()
            again = await streamed(served, query=NAMES)
            assert (again.status_code, codes(again)) == (429, ["RATE_LIMITED"])
            bob = await insert_actor("bob")
            _, token = await issue_token(served.database, bob.id, "t", [Permission.READ], None)
            assert len(names(await streamed(served, token, query=NAMES))) == 1000

        async def is_over() -> bool:
            return (await streamed(served, query=NAMES)).status_code == 200

        await until(is_over)  # with who has gone goes their place


async def test_a_client_that_reads_on_gets_all(settings: Settings, encoded: list[int]) -> None:
    async with stalled(settings) as (_, reader):
        found, is_whole = await reader.rest()
        assert is_whole
        assert (found.count(b'{"name":'), sum(encoded)) == (1000, 1000)


async def test_nothing_is_read_for_who_has_gone(settings: Settings, encoded: list[int]) -> None:
    changed = settings.model_copy(update={"max_export_streams": 1})
    async with stalled(changed) as (served, reader):
        reader.socket.close()

        async def is_over() -> bool:
            return (await streamed(served, query=NAMES)).status_code == 200

        await until(is_over)
        of_this = [rows for rows in encoded if rows]
        assert sum(of_this) < 2 * 1000  # all of the second, and not all of the first


async def test_a_token_that_is_revoked_ends_it_and_that_shows(
    settings: Settings, encoded: list[int]
) -> None:
    async with stalled(settings) as (served, reader):
        await served.database.data["tokens"].delete_many({})
        found, is_whole = await reader.rest()
        assert not is_whole
        assert 0 < found.count(b'{"name":') < 1000


async def test_rights_are_those_of_each_batch(settings: Settings, encoded: list[int]) -> None:
    """A member sees what is private, until they are no member any more."""
    async with serving(settings) as served:
        house = await insert_actor("house", ActorKind.ORGANIZATION)
        membership = MembershipDocument(
            organization_id=house.id, user_id=served.user_id, role=Role.VIEWER
        )
        await membership.insert()
        summary = "x" * ROW_BYTES
        for name, visibility in (("a0", Visibility.PRIVATE), ("b0", Visibility.PUBLIC)):
            model = await insert_model(house, name, visibility=visibility, summary=summary)
            await copied(served, model, 499)
        reader = Reader(served, served.token, LARGE)
        with closing(reader.socket):
            await reader.begin()
            await membership.delete()
            found, is_whole = await reader.rest()
        assert is_whole
        assert 0 < found.count(b'{"name":"a') < 500
        assert found.count(b'{"name":"b') == 500
