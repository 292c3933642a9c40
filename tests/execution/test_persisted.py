"""Documents by name: from the process, from Redis and from MongoDB, and what is trusted of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest
import strawberry
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.cache.client import Cache, connect_cache
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import (
    BadRequest,
    HarborError,
    PayloadTooLarge,
    PersistedQueryNotFound,
    PersistedQueryNotSupported,
    PersistedQueryRequired,
    Unavailable,
)
from modelharbor.execution import persisted as subject
from modelharbor.execution import published as following
from modelharbor.execution.documents import DocumentStore, InvalidDocument
from modelharbor.execution.persisted import Persisted, Resolved, open_persisted
from modelharbor.execution.published import Published
from modelharbor.observability.commands import counted
from modelharbor.resolvers.persisted import Publication, publish, retire
from modelharbor.settings import Settings
from tests.documents import insert_actor, viewer_of
from tests.explaining import Captured, explained

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 30.0


@strawberry.type
class Query:
    hello: str = "hello"


@strawberry.type(name="Query")
class Changed:
    bye: str = "bye"


SCHEMA = strawberry.Schema(Query)._schema
OTHER = strawberry.Schema(Changed)._schema
HELLO, DIFFERENT = "query Hello { hello }", "query Different { hello }"


@dataclass(frozen=True)
class Asked:
    query: str | None = None
    document_id: object = None
    extensions: dict[str, Any] = field(default_factory=dict)


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def apollo(name: object, query: str | None = None, version: object = 1) -> Asked:
    extensions = {"persistedQuery": {"version": version, "sha256Hash": name}}
    return Asked(query, extensions=extensions)


def by_id(name: object, query: str | None = None) -> Asked:
    return Asked(query, document_id=name)


@dataclass
class Told:
    """Who tells of changes."""

    callbacks: list[Callable[[str, Any], None]] = field(default_factory=list)

    def on_change(self, callback: Callable[[str, Any], None]) -> None:
        self.callbacks.append(callback)

    def tell(self, collection: str, *ids: Any) -> None:
        for id in ids:
            for callback in self.callbacks:
                callback(collection, id)


@pytest.fixture
async def cache(settings: Settings) -> AsyncIterator[Cache]:
    async with connect_cache(settings) as cache:
        await cache.redis.flushdb()
        yield cache


@asynccontextmanager
async def opened(
    database: Database,
    cache: Cache,
    settings: Settings,
    schema: Any = SCHEMA,
    changes: Told | None = None,
    **values: Any,
) -> AsyncIterator[Persisted]:
    """As in one process."""
    settings = settings.model_copy(update=values)
    documents = DocumentStore(schema, settings)
    async with open_persisted(database, cache, documents, settings, changes) as persisted:
        await persisted.published.known()
        yield persisted


async def resolve(persisted: Persisted, asked: Asked, *, is_person: bool = False) -> Resolved:
    """As for an operation that runs."""
    found = await persisted.resolve(asked, is_person=is_person)
    persisted.used(found)
    return found


async def put(
    database: Database, *pairs: tuple[str, str], client: str = "web", **prices: int
) -> None:
    publications = [
        Publication(id, text, digest(text), text.split()[1], "query", ["Query.hello"])
        for id, text in pairs
    ]
    await publish(database, client, publications, prices)


async def soon(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while not await is_so():
            await asyncio.sleep(0.01)


# ---- by hash


async def test_a_text_is_kept_with_its_hash_once_it_is_valid(
    database: Database, cache: Cache, settings: Settings
) -> None:
    async with opened(database, cache, settings) as first:
        for bad in ("{", "{ nothing }", "{ hello " + "@skip(if: true) " * 60 + "}"):
            with pytest.raises(InvalidDocument):
                await resolve(first, apollo(digest(bad), bad))
        long = HELLO + " " * settings.max_query_bytes
        with pytest.raises(PayloadTooLarge):
            await resolve(first, apollo(digest(long), long))
        with pytest.raises(BadRequest, match="provided sha does not match query"):
            await resolve(first, apollo(digest(HELLO), DIFFERENT))
        assert await cache.redis.keys() == []
        found = await resolve(first, apollo(digest(HELLO), HELLO))
        assert (found.document.text, found.trusted, found.by) == (HELLO, None, "text")
        assert await cache.get(first.key(digest(HELLO))) == HELLO.encode()
    async with opened(database, cache, settings) as second:
        for asked in (
            apollo(digest(HELLO)),
            apollo(digest(HELLO).upper()),
            apollo(f"sha256:{digest(HELLO)}"),
            by_id(f"sha256:{digest(HELLO)}"),
            by_id(digest(HELLO)),
            apollo(digest(HELLO), ""),
            replace(apollo(digest(HELLO)), document_id=digest(HELLO)),
        ):
            found = await resolve(second, asked)
            assert (found.document.text, found.by) == (HELLO, "hash")
        with pytest.raises(PersistedQueryNotFound, match=r"^PersistedQueryNotFound$"):
            await resolve(second, apollo(digest(DIFFERENT)))
        assert second.counts == {"hash": 7, "missed": 1}


async def test_another_version_of_the_schema_does_not_see_it(
    database: Database, cache: Cache, settings: Settings
) -> None:
    async with opened(database, cache, settings) as persisted:
        await resolve(persisted, apollo(digest(HELLO), HELLO))
        key = persisted.key(digest(HELLO))
    async with opened(database, cache, settings, OTHER) as other:
        assert other.key(digest(HELLO)) != key
        with pytest.raises(PersistedQueryNotFound):
            await resolve(other, apollo(digest(HELLO)))
        assert other.counts == {"missed": 1}


async def test_limits_of_today_hold_for_texts_of_yesterday(
    database: Database, cache: Cache, settings: Settings
) -> None:
    async with opened(database, cache, settings) as persisted:
        await resolve(persisted, apollo(digest(HELLO), HELLO))
    async with opened(database, cache, settings, max_tokens=3) as stricter:
        with pytest.raises(PersistedQueryNotFound):
            await resolve(stricter, apollo(digest(HELLO)))


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        (digest(HELLO), DIFFERENT.encode()),
        (digest(HELLO), b""),
        # Under the right hash what can be no text, or is too long for one.
        (sha256(b"\xff").hexdigest(), b"\xff"),
        (digest(HELLO + " " * 40_000), HELLO.encode() + b" " * 40_000),
    ],
)
async def test_a_poisoned_value_is_dropped_and_never_runs(
    database: Database, cache: Cache, settings: Settings, name: str, stored: bytes
) -> None:
    async with opened(database, cache, settings) as persisted:
        await cache.put(persisted.key(name), stored, 60)
        with pytest.raises(PersistedQueryNotFound):
            await resolve(persisted, apollo(name))
        assert persisted.counts == {"poisoned": 1, "missed": 1}
        assert await cache.redis.keys() == []
        assert (await resolve(persisted, apollo(digest(HELLO), HELLO))).document.text == HELLO
        assert await cache.get(persisted.key(digest(HELLO))) == HELLO.encode()


@pytest.mark.parametrize("stored", [b"query Different { hello }", b"\xff", b" " * 40_000])
async def test_a_poisoned_value_is_no_published_operation(
    database: Database, cache: Cache, settings: Settings, stored: bytes
) -> None:
    await put(database, ("h", HELLO))
    async with opened(database, cache, settings) as persisted:
        await cache.put(persisted.key(digest(HELLO)), stored, 60)
        assert (await resolve(persisted, by_id("h"))).document.text == HELLO
        assert persisted.counts == {"poisoned": 1, "id": 1}
        await persisted.renew()
        assert await cache.get(persisted.key(digest(HELLO))) == HELLO.encode()


async def test_use_renews_the_time_but_not_each_use(
    database: Database, cache: Cache, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "PAUSE_SECONDS", 3600.0)  # the test renews
    async with opened(database, cache, settings, persisted_days=1.0) as persisted:
        key = cache.name(persisted.key(digest(HELLO)))
        await resolve(persisted, apollo(digest(HELLO), HELLO))
        assert 86_000 < await cache.redis.ttl(key) <= 86_400
        await cache.redis.expire(key, 100)
        await resolve(persisted, apollo(digest(HELLO)))
        await persisted.renew()
        assert await cache.redis.ttl(key) <= 100
        now = time.monotonic() + 6 * 3600
        monkeypatch.setattr(time, "monotonic", lambda: now)
        await resolve(persisted, apollo(digest(HELLO)))
        await persisted.renew()
        assert 86_000 < await cache.redis.ttl(key) <= 86_400
    # Another process does it at its first use, also where Redis has lost the text meanwhile.
    async with opened(database, cache, settings, persisted_days=1.0) as other:
        other.documents.get(HELLO)
        await cache.redis.flushdb()
        await resolve(other, apollo(digest(HELLO)))
        await other.renew()
        assert await cache.get(other.key(digest(HELLO))) == HELLO.encode()


async def test_without_redis_a_process_knows_what_it_was_sent_and_what_is_published(
    database: Database, settings: Settings
) -> None:
    await put(database, ("d", DIFFERENT))
    async with (
        connect_cache(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1"})) as gone,
        opened(database, gone, settings) as persisted,
    ):
        await resolve(persisted, apollo(digest(HELLO), HELLO))
        assert (await resolve(persisted, apollo(digest(HELLO)))).document.text == HELLO
        assert (await resolve(persisted, by_id("d"))).document.text == DIFFERENT
        with pytest.raises(PersistedQueryNotFound):
            await resolve(persisted, apollo("0" * 64))


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (Asked(), BadRequest, "The request has no `query`."),
        (by_id(5), BadRequest, "`documentId` takes a string."),
        (by_id([HELLO]), BadRequest, "`documentId` takes a string."),
        (by_id(""), BadRequest, "`documentId` takes 1 to 256 characters."),
        (by_id("a" * 257), BadRequest, "`documentId` takes 1 to 256 characters."),
        (by_id("a" * 10_000_000), BadRequest, "`documentId` takes 1 to 256 characters."),
        (
            by_id("sha256:" + "A" * 64),
            BadRequest,
            "`sha256:` takes 64 hexadecimal digits in small letters behind it.",
        ),
        (by_id("nobody's"), PersistedQueryNotFound, "PersistedQueryNotFound"),
        (by_id("nobody's", HELLO), BadRequest, "provided sha does not match query"),
        (by_id("0" * 64), PersistedQueryNotFound, "PersistedQueryNotFound"),
        (apollo("0" * 63), BadRequest, "`sha256Hash` takes 64 hexadecimal digits."),
        (apollo("z" * 64), BadRequest, "`sha256Hash` takes 64 hexadecimal digits."),
        (apollo(""), BadRequest, "`sha256Hash` takes a string of 1 to 256 characters."),
        (apollo(5), BadRequest, "`sha256Hash` takes a string of 1 to 256 characters."),
        (
            apollo("a" * 10_000_000),
            BadRequest,
            "`sha256Hash` takes a string of 1 to 256 characters.",
        ),
        (apollo("0" * 64, version=2), PersistedQueryNotSupported, "PersistedQueryNotSupported"),
        (apollo("0" * 64, version=0), PersistedQueryNotSupported, "PersistedQueryNotSupported"),
        (
            apollo("0" * 64, version="1"),
            BadRequest,
            "`persistedQuery` takes `version` and `sha256Hash`.",
        ),
        (
            apollo("0" * 64, version=True),
            BadRequest,
            "`persistedQuery` takes `version` and `sha256Hash`.",
        ),
        (
            Asked(extensions={"persistedQuery": []}),
            BadRequest,
            "`persistedQuery` takes `version` and `sha256Hash`.",
        ),
        (
            replace(apollo("0" * 64), document_id="1" * 64),
            BadRequest,
            "`documentId` and `persistedQuery` name different documents.",
        ),
    ],
)
async def test_a_name_that_cannot_be_one_is_told(
    database: Database,
    cache: Cache,
    settings: Settings,
    asked: Asked,
    error: type[HarborError],
    message: str,
) -> None:
    async with opened(database, cache, settings) as persisted:
        with pytest.raises(HarborError) as caught:
            await resolve(persisted, asked)
        assert (type(caught.value), caught.value.message) == (error, message)


# ---- published


async def test_a_published_operation_is_found_by_id_hash_and_text(
    database: Database, cache: Cache, settings: Settings
) -> None:
    await put(database, ("own id", HELLO), (digest(DIFFERENT), DIFFERENT), Hello=7)
    async with opened(database, cache, settings) as persisted:
        for asked, by in (
            (by_id("own id"), "id"),
            (apollo("own id"), "id"),
            (by_id(digest(HELLO)), "hash"),
            (apollo(digest(HELLO)), "hash"),
            (Asked(HELLO), "text"),
            (by_id("own id", HELLO), "text"),
            (apollo("own id", HELLO), "text"),
        ):
            found = await resolve(persisted, asked)
            assert found.document.text == HELLO
            assert found.trusted is not None
            assert (found.trusted.id, found.trusted.client) == ("own id", "web")
            assert (found.trusted.name, found.trusted.price) == ("Hello", 7)
            assert found.by == by
        for asked in (by_id(f"sha256:{digest(DIFFERENT)}"), apollo(digest(DIFFERENT))):
            found = await resolve(persisted, asked)
            assert found.trusted is not None
            assert (found.trusted.id, found.trusted.price) == (digest(DIFFERENT), None)
        with pytest.raises(BadRequest, match="provided sha does not match query"):
            await resolve(persisted, by_id("own id", DIFFERENT))
        assert (await resolve(persisted, Asked("{ hello }"))).trusted is None


async def test_its_text_is_read_once_and_lies_in_redis_then(
    database: Database, cache: Cache, settings: Settings
) -> None:
    await put(database, ("h", HELLO))

    async def reads(persisted: Persisted) -> list[str]:
        captured = Captured()
        token = counted.set(captured)
        try:
            await asyncio.gather(*(resolve(persisted, by_id("h")) for _ in range(3)))
            await resolve(persisted, by_id("h"))
        finally:
            counted.reset(token)
        await persisted.renew()
        return captured.names

    async with opened(database, cache, settings) as first:
        assert set(await reads(first)) == {"find persisted_documents"}
        assert await reads(first) == []
    async with opened(database, cache, settings) as second:
        assert await reads(second) == []


async def test_of_clients_that_share_an_id_the_higher_price_counts(
    database: Database, cache: Cache, settings: Settings
) -> None:
    for client, price in (("web", 3), ("app", 5), ("tv", 4)):
        await put(database, ("h", HELLO), client=client, Hello=price)
    async with opened(database, cache, settings) as persisted:
        found = persisted.published.by_id("h")
        assert found is not None
        assert (found.client, found.price) == ("app", 5)
        await retire(database, ["h"], "app")
        await persisted.published.look()
        found = persisted.published.by_id("h")
        assert found is not None
        assert (found.client, found.price) == ("tv", 4)
        await retire(database, ["h"])
        await persisted.published.look()
        assert persisted.published.by_id("h") is None
        assert len(persisted.published) == 0


async def test_one_that_no_longer_validates_is_named(
    database: Database, cache: Cache, settings: Settings
) -> None:
    await put(database, ("h", HELLO))
    async with opened(database, cache, settings, OTHER) as persisted:
        with pytest.raises(InvalidDocument) as caught:
            await resolve(persisted, by_id("h"))
        (problem,) = caught.value.problems
        assert problem == {
            "message": "The published operation Hello (h) of web does not run here any more: Cannot query field 'hello' on type 'Query'.",
            "locations": [{"line": 1, "column": 15}],
            "extensions": {"code": "GRAPHQL_VALIDATION_FAILED"},
        }
    async with opened(database, cache, settings, max_query_bytes=5) as persisted:
        with pytest.raises(PayloadTooLarge, match=r"^The published operation Hello \(h\) of web"):
            await resolve(persisted, by_id("h"))


async def test_a_text_that_was_changed_in_the_database_never_runs(
    database: Database, cache: Cache, settings: Settings
) -> None:
    await put(database, ("h", HELLO))
    await database.data["persisted_documents"].update_one({}, {"$set": {"text": DIFFERENT}})
    async with opened(database, cache, settings) as persisted:
        with pytest.raises(PersistedQueryNotFound):
            await resolve(persisted, by_id("h"))


async def test_what_runs_is_counted_by_its_id(
    database: Database, cache: Cache, settings: Settings
) -> None:
    await put(database, ("h", HELLO))
    async with opened(database, cache, settings) as persisted:
        for asked in (by_id("h"), apollo(digest(HELLO)), Asked(HELLO), Asked(DIFFERENT)):
            await resolve(persisted, asked)
    (row,) = await database.data["persisted_usage"].find().to_list()
    assert (row["document_id"], row["calls"]) == ("h", 3)


# ---- changes


async def test_changes_are_known_when_they_are_told(
    database: Database, cache: Cache, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOOK_SECONDS", 3600.0)
    told = Told()
    async with opened(database, cache, settings, changes=told) as persisted:
        published = persisted.published

        async def has(text: str | None) -> bool:
            found = published.by_id("h")
            return (found.sha256 if found else None) == (digest(text) if text else None)

        async def tell() -> None:
            rows = await database.data["persisted_documents"].find().to_list()
            told.tell("persisted_documents", *(row["_id"] for row in rows))

        await put(database, ("h", HELLO))
        told.tell("models", ObjectId())
        assert published.by_id("h") is None
        await tell()
        await soon(lambda: has(HELLO))
        await retire(database, ["h"])
        await tell()
        await soon(lambda: has(None))
        assert published.by_text(digest(HELLO)) is None
        await put(database, ("h", DIFFERENT))
        await tell()
        await soon(lambda: has(DIFFERENT))
        assert published.by_text(digest(HELLO)) is None
        # What somebody does to the collection himself, too.
        row = await database.data["persisted_documents"].find_one_and_delete({})
        assert row is not None
        told.tell("persisted_documents", row["_id"])
        await soon(lambda: has(None))


async def test_changes_are_found_where_nobody_tells(
    database: Database, cache: Cache, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOOK_SECONDS", 0.02)
    async with opened(database, cache, settings) as persisted:

        async def is_known() -> bool:
            return persisted.published.by_id("h") is not None

        async def is_gone() -> bool:
            return not await is_known()

        await put(database, ("h", HELLO))
        await soon(is_known)
        await retire(database, ["h"])
        await soon(is_gone)


async def test_a_look_reads_no_more_than_has_changed(database: Database) -> None:
    await put(database, *((f"id{number}", HELLO) for number in range(300)))
    published = Published(database)

    async def looked() -> Captured:
        captured = Captured()
        token = counted.set(captured)
        try:
            await published.look()
        finally:
            counted.reset(token)
        return captured

    await looked()
    assert len(published) == 300
    assert (await looked()).names == ["find log"]  # the number of the last change
    await put(database, ("new", DIFFERENT))
    captured = await looked()
    assert captured.names == ["find log", "find persisted_documents"]
    assert len(published) == 301
    stages = await explained(database, captured.commands[1][1])
    assert [stage["nReturned"] for stage in stages if "nReturned" in stage][:1] == [1]
    for number in range(50):
        published.note("persisted_documents", ObjectId(f"{number:024x}"))
    captured = await looked()
    assert captured.names == ["find log", "find persisted_documents"]
    scans = [each.get("stage") for each in await explained(database, captured.commands[1][1])]
    assert "COLLSCAN" not in scans
    assert len(published) == 301


async def test_after_a_backup_was_restored_all_is_read_again(database: Database) -> None:
    await put(database, ("a", HELLO))
    backup = {
        name: await database.data[name].find().to_list() for name in ("persisted_documents", "log")
    }
    await put(database, ("b", DIFFERENT))
    published = Published(database)
    await published.look()
    assert len(published) == 2
    for name, rows in backup.items():
        await database.data[name].delete_many({})
        await database.data[name].insert_many(rows)
    await published.look()
    assert (len(published), published.by_id("b")) == (1, None)


async def test_so_many_changes_that_all_is_read_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "NOTED", 2)
    await put(database, ("a", HELLO), ("b", DIFFERENT))
    published = Published(database)
    await published.look()
    row = await database.data["persisted_documents"].find_one_and_delete({"document_id": "b"})
    assert row is not None
    for id in (ObjectId(), ObjectId(), row["_id"]):
        published.note("persisted_documents", id)
    await published.look()
    assert (len(published), published.by_id("b")) == (1, None)
    # And where nobody can tell what has changed.
    await database.data["persisted_documents"].delete_many({})
    published.note("persisted_documents", None)
    await published.look()
    assert len(published) == 0


async def test_a_look_that_failed_is_made_up_for(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(database, ("a", HELLO))
    published = Published(database)
    await published.look()
    row = await database.data["persisted_documents"].find_one_and_delete({})
    assert row is not None
    published.note("persisted_documents", row["_id"])

    async def fail(query: Row) -> list[Row]:
        raise Unavailable("gone")

    with monkeypatch.context() as broken:
        broken.setattr(published, "_read", fail)
        with pytest.raises(Unavailable):
            await published.look()
    assert len(published) == 1
    await published.look()
    assert len(published) == 0


async def test_before_anything_is_known_nothing_is_decided(
    database: Database, cache: Cache, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that begins while MongoDB is gone refuses nobody for good."""
    monkeypatch.setattr(following, "FIRST_SECONDS", 0.01)

    async def fail(self: Published) -> None:
        raise Unavailable("gone")

    monkeypatch.setattr(Published, "look", fail)
    trusting = settings.model_copy(update={"trusted_only": True})
    documents = DocumentStore(SCHEMA, trusting)
    async with open_persisted(database, cache, documents, trusting, None) as persisted:
        for asked in (Asked(HELLO), by_id("h"), by_id(digest(HELLO))):
            with pytest.raises(Unavailable):
                await resolve(persisted, asked)
    documents = DocumentStore(SCHEMA, settings)
    async with open_persisted(database, cache, documents, settings, None) as persisted:
        assert (await resolve(persisted, Asked(HELLO))).document.text == HELLO
        assert (await resolve(persisted, by_id(digest(HELLO)))).document.text == HELLO
        with pytest.raises(Unavailable):
            await resolve(persisted, by_id("h"))


# ---- only published operations


async def test_what_is_not_published_is_refused_before_it_is_parsed(
    database: Database, cache: Cache, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(database, ("h", HELLO))
    async with opened(database, cache, settings, trusted_only=True) as persisted:
        await resolve(persisted, by_id("h"))

        def fail(text: str) -> None:
            raise AssertionError(text)

        monkeypatch.setattr(persisted.documents, "get", fail)
        for asked in (
            Asked(DIFFERENT),
            Asked("{"),
            Asked("{ __schema { description } }"),
            Asked(HELLO + " "),
            apollo(digest(DIFFERENT), DIFFERENT),
            apollo(digest(DIFFERENT)),
            by_id("nobody's"),
        ):
            with pytest.raises(PersistedQueryRequired):
                await resolve(persisted, asked)
        assert persisted.counts["required"] == 7
        long = "{ hello }" + " " * settings.max_query_bytes
        with pytest.raises(PayloadTooLarge):
            await resolve(persisted, Asked(long))
        found = await resolve(persisted, by_id("h"))
        persisted.check(found, ANONYMOUS)


async def test_who_may_be_an_operator_is_asked_first(
    database: Database, cache: Cache, settings: Settings
) -> None:
    await put(database, ("h", HELLO))
    ada, root = await insert_actor("ada"), await insert_actor("root", is_operator=True)
    async with opened(database, cache, settings, trusted_only=True) as persisted:
        found = await resolve(persisted, apollo(digest(DIFFERENT), DIFFERENT), is_person=True)
        assert found.trusted is None
        for viewer in (ANONYMOUS, viewer_of(ada), viewer_of(root)):  # whose token does not operate
            with pytest.raises(PersistedQueryRequired):
                persisted.check(found, viewer)
        persisted.check(found, replace(viewer_of(root), scopes=frozenset(Permission)))
        # Nothing of it is left for others.
        assert await cache.redis.keys() == []
        with pytest.raises(PersistedQueryRequired):
            await resolve(persisted, apollo(digest(DIFFERENT)))
    async with opened(database, cache, settings) as persisted:
        persisted.check(await resolve(persisted, Asked(DIFFERENT)), ANONYMOUS)


async def test_a_retired_one_runs_no_longer(
    database: Database, cache: Cache, settings: Settings
) -> None:
    await put(database, ("h", HELLO))
    async with opened(database, cache, settings, trusted_only=True) as persisted:
        for asked in (by_id("h"), apollo(digest(HELLO)), Asked(HELLO)):
            await resolve(persisted, asked)
        await retire(database, ["h"])
        await persisted.published.look()
        for asked in (by_id("h"), apollo(digest(HELLO)), Asked(HELLO)):
            with pytest.raises(PersistedQueryRequired):
                await resolve(persisted, asked)
