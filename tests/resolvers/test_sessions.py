"""Who holds a token is kept, and never a moment longer than it is so: in two processes, with real engines."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import bson
import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect

from modelharbor.auth.tokens import REFUSED, finish_notes, read_tokens, token_text
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.auth.watch import rights_of
from modelharbor.cache.client import Cache, connect_cache
from modelharbor.cache.freshness import Freshness, open_freshness
from modelharbor.cache.sealing import Seal
from modelharbor.cache.shared import Shared, open_shared
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unauthenticated
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.observability.metrics import Metrics
from modelharbor.resolvers import sessions as module
from modelharbor.resolvers.sessions import Sessions, open_sessions
from modelharbor.resolvers.tokens import issue_token, revoke_token
from modelharbor.settings import Settings
from tests.documents import insert_actor

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 20.0
READ = ["aggregate tokens"]
SECRET = b"of this installation"


@dataclass
class Process:
    sessions: Sessions
    freshness: Freshness
    shared: Shared
    cache: Cache

    async def viewer(self, authorization: str) -> Viewer:
        """As a request goes about it."""
        return await self.sessions.viewer(authorization, await self.freshness.ready())

    async def until_ready(self) -> None:
        async with asyncio.timeout(GUARD_SECONDS):
            while self.shared.is_closed or not await self.freshness.ready():
                await asyncio.sleep(0.01)

    async def writes(self, write: Awaitable[Any]) -> None:
        """A change through the API: acknowledged when this returns."""
        count = CommandCount()
        before = counted.set(count)
        try:
            await write
        finally:
            counted.reset(before)
        assert count.wrote is not None
        await self.freshness.acknowledge(count.wrote)


@asynccontextmanager
async def process(database: Database, settings: Settings) -> AsyncIterator[Process]:
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(connect_cache(settings))
        freshness = await stack.enter_async_context(open_freshness(database, cache, settings))
        shared = await stack.enter_async_context(open_shared(cache, settings, SECRET))
        sessions = await stack.enter_async_context(
            open_sessions(database, freshness, shared, Metrics())
        )
        yield Process(sessions, freshness, shared, cache)


@pytest.fixture
async def two(database: Database, settings: Settings) -> AsyncIterator[tuple[Process, Process]]:
    # On a busy machine Redis is not always quick, and then nothing that is kept is used.
    settings = settings.model_copy(
        update={"response_cache": True, "cache_timeout_seconds": GUARD_SECONDS}
    )
    async with process(database, settings) as one, process(database, settings) as other:
        await one.cache.redis.flushdb()
        for each in (one, other):
            await each.until_ready()
        yield one, other
        await finish_notes()


@dataclass
class Person:
    actor: ActorDocument
    organization: ActorDocument
    membership: MembershipDocument
    token_id: ObjectId
    authorization: str


@pytest.fixture
async def ann(database: Database) -> Person:
    actor = await insert_actor("Ann")
    organization = await insert_actor("acme", ActorKind.ORGANIZATION)
    membership = MembershipDocument(
        organization_id=organization.id, user_id=actor.id, role=Role.ADMIN
    )
    await membership.insert()
    token, text = await issue_token(
        database, actor.id, "laptop", [Permission.READ, Permission.WRITE]
    )
    await database.data["tokens"].update_one(
        {"_id": token.id}, {"$set": {"last_used_at": utc_now()}}
    )
    return Person(actor, organization, membership, token.id, f"Bearer {text}")


@asynccontextmanager
async def commands() -> AsyncIterator[list[str]]:
    count = CommandCount()
    before = counted.set(count)
    try:
        yield count.names
    finally:
        counted.reset(before)


async def in_redis(one: Process) -> list[str]:
    found = await one.cache.redis.keys("*:session:*")
    return [each.decode() for each in found if isinstance(each, bytes)]


async def kept_in_redis(one: Process) -> str:
    async with asyncio.timeout(GUARD_SECONDS):
        while not (names := await in_redis(one)):
            await asyncio.sleep(0.001)
    [name] = names
    return name


async def test_a_token_is_read_once_by_one_process_and_found_by_the_other(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    one, other = two
    async with commands() as names:
        first = await one.viewer(ann.authorization)
        assert names == READ
        for _ in range(3):
            assert await one.viewer(ann.authorization) is first
        await kept_in_redis(one)
        second = await other.viewer(ann.authorization)
        assert await other.viewer(ann.authorization) is second
    assert names == READ
    row = (await read_tokens(database, [ann.token_id]))[ann.token_id]
    assert first.user == second.user == row["user"][0]
    assert rights_of(first) == rights_of(second)
    assert first.roles == {ann.organization.id: Role.ADMIN}
    assert (first.token_id, first.expires_at) == (second.token_id, second.expires_at)
    counts = [each.sessions.count for each in two]
    assert [(each.hits, each.misses) for each in counts] == [(3, 1), (2, 0)]
    assert [each.sizes()[0] for each in counts] == [1, 1]


async def test_without_a_header_the_viewer_is_nobody(two: tuple[Process, Process]) -> None:
    one, _ = two
    assert await one.sessions.viewer(None, True) is ANONYMOUS
    assert one.sessions.known(None) is None


async def test_only_the_hash_of_the_secret_is_kept(
    two: tuple[Process, Process], ann: Person
) -> None:
    one, _ = two
    await one.viewer(ann.authorization)
    value = await one.cache.redis.get(await kept_in_redis(one))
    assert isinstance(value, bytes)
    entry = one.shared.seal.open(await kept_in_redis(one), value)
    assert entry is not None
    secret = ann.authorization[-43:].encode()
    assert secret not in value
    assert secret not in entry.body
    assert ann.token_id.binary in entry.body


CHANGES: dict[str, tuple[Callable[[Database, Person], Awaitable[Any]], Any]] = {
    "a token that is revoked": (lambda database, ann: revoke_token(database, ann.token_id), None),
    "a token that is gone": (
        lambda database, ann: database.data["tokens"].delete_one({"_id": ann.token_id}),
        None,
    ),
    "a token that expires": (
        lambda database, ann: database.data["tokens"].update_one(
            {"_id": ann.token_id}, {"$set": {"expires_at": utc_now() - timedelta(seconds=1)}}
        ),
        None,
    ),
    "fewer scopes": (
        lambda database, ann: database.data["tokens"].update_one(
            {"_id": ann.token_id}, {"$set": {"scopes": ["READ"]}}
        ),
        ({Permission.READ}, {Role.ADMIN}),
    ),
    "a lower role": (
        lambda database, ann: database.data["memberships"].update_one(
            {"_id": ann.membership.id}, {"$set": {"role": "VIEWER"}}
        ),
        ({Permission.READ, Permission.WRITE}, {Role.VIEWER}),
    ),
    "a role that is taken": (
        lambda database, ann: database.data["memberships"].delete_one({"_id": ann.membership.id}),
        ({Permission.READ, Permission.WRITE}, set()),
    ),
    "a role that is given to somebody else": (
        lambda database, ann: database.data["memberships"].update_one(
            {"_id": ann.membership.id}, {"$set": {"user_id": ObjectId()}}
        ),
        ({Permission.READ, Permission.WRITE}, set()),
    ),
    "a person who is gone": (
        lambda database, ann: database.data["actors"].delete_one({"_id": ann.actor.id}),
        None,
    ),
}


async def allowed(one: Process, ann: Person) -> Any:
    """Scopes and roles; None where the token is refused."""
    try:
        viewer = await one.viewer(ann.authorization)
    except Unauthenticated:
        return None
    return set(viewer.scopes), set(viewer.roles.values())


BEFORE = ({Permission.READ, Permission.WRITE}, {Role.ADMIN})


@pytest.mark.parametrize("change", CHANGES)
async def test_what_is_acknowledged_holds_at_once_in_every_process(
    two: tuple[Process, Process], database: Database, ann: Person, change: str
) -> None:
    one, other = two
    write, after = CHANGES[change]
    for each in two:
        assert await allowed(each, ann) == BEFORE
    await one.writes(write(database, ann))
    assert [await allowed(each, ann) for each in two] == [after, after]
    assert other.sessions.count.invalidations > 0
    # And so it stays, read or kept.
    assert [await allowed(each, ann) for each in two] == [after, after]


@pytest.mark.parametrize("change", CHANGES)
async def test_what_is_written_by_others_holds_soon(
    two: tuple[Process, Process], database: Database, ann: Person, change: str
) -> None:
    write, after = CHANGES[change]
    for each in two:
        assert await allowed(each, ann) == BEFORE
    await write(database, ann)
    async with asyncio.timeout(2.0):  # the promise, many times what it takes
        for each in two:
            while await allowed(each, ann) != after:
                await asyncio.sleep(0.01)


async def test_what_is_gained_holds_at_once(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    one, other = two
    for each in two:
        await each.viewer(ann.authorization)
    more = await insert_actor("more", ActorKind.ORGANIZATION)
    membership = MembershipDocument(organization_id=more.id, user_id=ann.actor.id, role=Role.VIEWER)
    await one.writes(membership.insert())
    assert (await other.viewer(ann.authorization)).roles[more.id] is Role.VIEWER
    await one.writes(
        database.data["actors"].update_one({"_id": ann.actor.id}, {"$set": {"is_operator": True}})
    )
    viewer = await other.viewer(ann.authorization)
    assert viewer.user is not None
    assert viewer.user["is_operator"] is True


async def test_other_peoples_changes_change_nothing(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    one, other = two
    viewer = await other.viewer(ann.authorization)
    bob = await insert_actor("bob")
    await one.writes(issue_token(database, bob.id, "laptop", [Permission.READ]))
    await one.writes(
        MembershipDocument(
            organization_id=ann.organization.id, user_id=bob.id, role=Role.ADMIN
        ).insert()
    )
    async with commands() as names:
        assert await other.viewer(ann.authorization) is viewer
    assert names == []


async def test_the_secret_is_compared_each_time(two: tuple[Process, Process], ann: Person) -> None:
    one, other = two
    await one.viewer(ann.authorization)
    await kept_in_redis(one)
    wrong = f"Bearer {token_text(ann.token_id, 'A' * 43)}"
    async with commands() as names:
        for each in two:
            with pytest.raises(Unauthenticated) as caught:
                await each.viewer(wrong)
            assert caught.value.message == REFUSED
            assert each.sessions.known(wrong) is None
    assert names == []
    assert await other.viewer(ann.authorization)


async def test_a_token_ends_at_its_time_while_it_is_kept(
    two: tuple[Process, Process],
    database: Database,
    ann: Person,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, _ = two
    ends = utc_now() + timedelta(hours=1)
    await one.writes(
        database.data["tokens"].update_one({"_id": ann.token_id}, {"$set": {"expires_at": ends}})
    )
    assert (await one.viewer(ann.authorization)).expires_at == ends
    assert one.sessions.known(ann.authorization) is not None
    monkeypatch.setattr(module, "KEPT_SECONDS", 10_000.0)
    known = one.sessions._memory.get(ann.token_id.binary)
    assert known is not None
    known.until = float("inf")
    for early, is_good in ((1.0, True), (-0.001, False)):
        monkeypatch.setattr(module, "time", lambda early=early: ends.timestamp() - early)
        assert (await allowed(one, ann) is not None) == is_good
        assert (one.sessions.known(ann.authorization) is not None) == is_good


async def test_what_is_wrong_is_not_kept(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    one, _ = two
    unknown = f"Bearer {token_text(ObjectId(), 'A' * 43)}"
    wrong = f"Bearer {token_text(ann.token_id, 'A' * 43)}"
    await revoke_token(database, ann.token_id)
    async with commands() as names:
        for authorization in (unknown, wrong, ann.authorization) * 2:
            with pytest.raises(Unauthenticated) as caught:
                await one.viewer(authorization)
            assert caught.value.message == REFUSED
    assert names == READ * 6
    assert one.sessions.count.sizes()[0] == 0
    assert await in_redis(one) == []
    for text in ("", "Bearer", "Basic x", "Bearer mh_x"):
        with pytest.raises(Unauthenticated):
            await one.viewer(text)


async def test_many_that_come_at_once_read_together(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    one, _ = two
    bob = await insert_actor("bob")
    _, text = await issue_token(database, bob.id, "laptop", [Permission.READ])
    async with commands() as names:
        viewers = await asyncio.gather(
            *[
                one.sessions.viewer(authorization, False)
                for authorization in [ann.authorization, f"Bearer {text}"] * 100
            ]
        )
    assert [viewer.user_id for viewer in viewers] == [ann.actor.id, bob.id] * 100
    assert set(names) == {"aggregate tokens"}
    assert one.sessions._reading is None


async def test_who_comes_while_a_read_is_under_way_waits_for_the_next(
    two: tuple[Process, Process],
    database: Database,
    ann: Person,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one that began before a change has found is not for who came after it."""
    one, _ = two
    reads: list[list[ObjectId]] = []
    gate = asyncio.Event()

    async def slow(database: Database, token_ids: list[ObjectId]) -> dict[ObjectId, Row]:
        rows = await read_tokens(database, token_ids)
        reads.append(token_ids)
        await gate.wait()
        return rows

    monkeypatch.setattr(module, "read_tokens", slow)
    before = asyncio.create_task(one.sessions.viewer(ann.authorization, False))
    async with asyncio.timeout(GUARD_SECONDS):
        while not reads:
            await asyncio.sleep(0.001)
    await one.writes(revoke_token(database, ann.token_id))
    after = [
        asyncio.create_task(one.sessions.viewer(ann.authorization, usable))
        for usable in (False, True)
    ]
    await asyncio.sleep(0.01)
    gate.set()
    assert (await before).user_id == ann.actor.id
    found = await asyncio.gather(*after, return_exceptions=True)
    assert [type(each) for each in found] == [Unauthenticated] * 2
    # Nor is it kept.
    assert await allowed(one, ann) is None
    assert one.sessions.count.sizes()[0] == 0


async def test_one_that_goes_takes_nothing_from_the_others(
    two: tuple[Process, Process], ann: Person
) -> None:
    one, _ = two
    first, second = [
        asyncio.create_task(one.sessions.viewer(ann.authorization, False)) for _ in range(2)
    ]
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).user_id == ann.actor.id
    assert first.cancelled()


async def test_a_read_that_fails_fails_those_who_wait_for_it_alone(
    two: tuple[Process, Process], ann: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = two

    async def fail(database: Database, token_ids: list[ObjectId]) -> dict[ObjectId, Row]:
        await asyncio.sleep(0)
        raise AutoReconnect("gone")

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_tokens", fail)
        found = await asyncio.gather(
            *[one.sessions.viewer(ann.authorization, False) for _ in range(3)],
            return_exceptions=True,
        )
    assert [type(each) for each in found] == [AutoReconnect] * 3
    assert (await one.viewer(ann.authorization)).user_id == ann.actor.id


async def test_a_token_that_is_not_understood_fails_alone(
    two: tuple[Process, Process],
    database: Database,
    ann: Person,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As a later version may write it."""
    one, _ = two
    bob = await insert_actor("bob")
    token, text = await issue_token(database, bob.id, "laptop", [Permission.READ])
    await database.data["tokens"].update_one({"_id": token.id}, {"$set": {"scopes": ["FLY"]}})
    found = await asyncio.gather(
        *[
            one.sessions.viewer(authorization, False)
            for authorization in (f"Bearer {text}", ann.authorization)
        ],
        return_exceptions=True,
    )
    assert isinstance(found[0], ValueError)
    assert isinstance(found[1], Viewer)
    assert f"sessions.not_understood token_id={token.id}" in caplog.text


async def test_where_nothing_kept_may_be_used_every_request_reads(
    two: tuple[Process, Process], ann: Person
) -> None:
    one, _ = two
    async with commands() as names:
        for _ in range(3):
            await one.sessions.viewer(ann.authorization, False)
    assert names == READ * 3


async def test_without_redis_every_request_reads(
    database: Database, settings: Settings, ann: Person
) -> None:
    nowhere = settings.model_copy(
        update={"response_cache": True, "redis_url": "redis://127.0.0.1:1/0"}
    )
    async with process(database, nowhere) as one, commands() as names:
        for _ in range(3):
            assert (await one.viewer(ann.authorization)).user_id == ann.actor.id
        assert [name for name in names if name != "hello 1"] == READ * 3
        await revoke_token(database, ann.token_id)
        assert await allowed(one, ann) is None


async def test_what_is_poisoned_in_redis_is_dropped(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    """Whoever can write to Redis can make nobody an operator."""
    one, other = two
    await one.viewer(ann.authorization)
    name = await kept_in_redis(one)
    value = await one.cache.redis.get(name)
    assert isinstance(value, bytes)
    entry = one.shared.seal.open(name, value)
    assert entry is not None
    row = bson.decode(entry.body)
    row["user"][0]["is_operator"] = True
    promoted = replace(entry, body=bson.encode(row))
    by_another = Seal(b"another secret", 1 << 24).close(name, promoted)
    for poison in (by_another, value[:16] + by_another[16:], value[:-1], b"x", promoted.body):
        await one.cache.redis.set(name, poison)
        poisoned = other.sessions.count.poisoned
        viewer = await other.viewer(ann.authorization)
        assert not (viewer.user or {}).get("is_operator")
        assert other.sessions.count.poisoned == poisoned + 1
        other.sessions._memory.drop(ann.token_id.binary)
        async with asyncio.timeout(GUARD_SECONDS):  # what was read lies there again
            while other.shared._waiting or other.shared._sent:
                await asyncio.sleep(0.001)


async def test_known_is_who_held_it_when_it_was_last_read(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    one, _ = two
    assert one.sessions.known(ann.authorization) is None
    viewer = await one.viewer(ann.authorization)
    assert one.sessions.known(ann.authorization) is viewer
    assert one.sessions.known("Bearer mh_x") is None


async def test_the_last_use_is_noted_once_a_minute(
    two: tuple[Process, Process], database: Database, ann: Person
) -> None:
    one, _ = two

    async def used_at() -> Any:
        await finish_notes()
        row = await database.data["tokens"].find_one({"_id": ann.token_id})
        assert row is not None
        return row["last_used_at"]

    old = utc_now() - timedelta(seconds=61)
    await database.data["tokens"].update_one({"_id": ann.token_id}, {"$set": {"last_used_at": old}})
    await one.viewer(ann.authorization)
    first = await used_at()
    assert first > old
    # It is kept with what it was before, and is not noted again for that.
    await database.data["tokens"].update_one({"_id": ann.token_id}, {"$set": {"last_used_at": old}})
    async with commands() as names:
        for _ in range(5):
            await one.viewer(ann.authorization)
        assert await used_at() == old
    assert "aggregate tokens" not in names


async def test_what_a_session_takes_is_counted(two: tuple[Process, Process]) -> None:
    one, _ = two
    number = 300
    for memberships in (0, 30):
        rows = [
            {
                "_id": ObjectId(),
                "user_id": ObjectId(),
                "name": f"token {each}",
                "prefix": f"mh_{each:024x}",
                "secret_sha256": f"{each:064x}",
                "scopes": ["READ", "WRITE"],
                "created_at": utc_now(),
                "last_used_at": utc_now(),
                "expires_at": utc_now() + timedelta(days=1),
                "revoked_at": None,
                "user": [{"_id": ObjectId(), "login": f"user-{each}", "kind": "User", "turn": 0}],
                "memberships": [
                    {
                        "_id": ObjectId(),
                        "organization_id": ObjectId(),
                        "user_id": ObjectId(),
                        "role": "ADMIN",
                        "created_at": utc_now(),
                    }
                    for _ in range(memberships)
                ],
            }
            for each in range(number)
        ]
        stored = [bson.encode(row) for row in rows]
        del rows
        sessions = Sessions(one.sessions._database, one.freshness, None)
        before_size = sessions.count.sizes()[1]
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for body in stored:
                row = bson.decode(body, module._ROWS)
                entry = module._entry_of(row, body, 1)
                known = sessions._understood(row, entry)
                assert known is not None
                assert known.viewer.principals
                sessions._hold(row["_id"], known, entry)
            del row, known, entry
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        entries, counted_size = sessions.count.sizes()
        assert entries == number
        ratio = (after - before) / (counted_size - before_size)
        assert 0.4 < ratio <= 1.0, (memberships, ratio)
