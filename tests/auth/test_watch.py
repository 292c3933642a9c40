"""Who holds the tokens of open connections: asked for once, looked at again and again, whatever happens."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect

from modelharbor.auth import watch as watching
from modelharbor.auth.tokens import REFUSED, finish_notes, read_tokens, token_text
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.auth.watch import ViewerWatch, watching_viewers
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unauthenticated, Unavailable
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.resolvers.tokens import issue_token
from tests.documents import insert_actor

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 5.0


@dataclass(eq=False)
class Holder:
    """A connection: what it was told its viewer has become."""

    token_id: ObjectId
    authorization: str
    told: list[Viewer | None] = field(default_factory=list)

    def take(self, viewer: Viewer | None) -> None:
        self.told.append(viewer)

    async def enter(self, watch: ViewerWatch) -> Viewer:
        return await watch.enter(self.authorization, self.take)


async def holder(
    database: Database, actor: ActorDocument, expires_at: datetime | None = None
) -> Holder:
    token, text = await issue_token(
        database, actor.id, "laptop", [Permission.READ, Permission.WRITE], expires_at
    )
    return Holder(token.id, f"Bearer {text}")


async def change(database: Database, holder: Holder, **values: Any) -> None:
    await database.data["tokens"].update_one({"_id": holder.token_id}, {"$set": values})


async def until_told(holder: Holder) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while not holder.told:
            await asyncio.sleep(0.005)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "EVERY_SECONDS", 0.02)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each command was for."""
    counts: list[int] = []
    read = read_tokens

    async def counting(database: Database, token_ids: Sequence[ObjectId]) -> dict[ObjectId, Row]:
        counts.append(len(token_ids))
        return await read(database, token_ids)

    monkeypatch.setattr(watching, "read_tokens", counting)
    return counts


async def test_nobody_is_not_watched(database: Database, asked: list[int]) -> None:
    watch, told = ViewerWatch(database), Holder(ObjectId(), "")
    assert await watch.enter(None, told.take) is ANONYMOUS
    await watch.look()
    watch.leave(ANONYMOUS, told.take)
    assert (watch._held, asked, told.told) == ({}, [], [])


async def test_many_that_come_at_once_ask_once(database: Database) -> None:
    ann = await holder(database, await insert_actor("ann"))
    bob = await holder(database, await insert_actor("bob"))
    await change(database, ann, last_used_at=utc_now())
    await change(database, bob, last_used_at=utc_now())
    watch = ViewerWatch(database)
    many = [Holder(each.token_id, each.authorization) for each in (ann, bob) for _ in range(100)]
    count = CommandCount()
    before = counted.set(count)
    viewers = await asyncio.gather(*[each.enter(watch) for each in many])
    later = await ann.enter(watch)
    counted.reset(before)
    assert count.names == ["aggregate tokens"] * 2
    assert [viewer.token_id for viewer in viewers] == [each.token_id for each in many]
    assert {id(viewer) for viewer in viewers[:100]} == {id(later)}
    assert watch._asking == {}
    assert [len(held.told) for held in watch._held.values()] == [101, 100]


async def test_one_that_goes_does_not_take_the_answer_from_the_others(database: Database) -> None:
    ann = await holder(database, await insert_actor("ann"))
    watch = ViewerWatch(database)
    first, second = [asyncio.create_task(ann.enter(watch)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).token_id == ann.token_id
    assert first.cancelled()
    await finish_notes()


async def test_a_refusal_that_nobody_waits_for_any_more_is_not_made_a_fuss_of(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    unknown, watch = ObjectId(), ViewerWatch(database)
    asking = asyncio.create_task(
        watch.enter(f"Bearer {token_text(unknown, 'A' * 43)}", lambda viewer: None)
    )
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(GUARD_SECONDS):
        while watch._asking:
            await asyncio.sleep(0.005)
    assert (watch._held, caplog.records) == ({}, [])


async def test_who_knows_only_the_id_of_a_held_token_is_refused(database: Database) -> None:
    ann = await holder(database, await insert_actor("ann"))
    watch, thief = ViewerWatch(database), Holder(ann.token_id, "")
    await ann.enter(watch)
    thief.authorization = f"Bearer {token_text(ann.token_id, 'A' * 43)}"
    for header in (thief.authorization, f"{ann.authorization}A", "Bearer", ""):
        thief.authorization = header
        with pytest.raises(Unauthenticated) as caught:
            await thief.enter(watch)
        assert caught.value.message == REFUSED
    assert list(watch._held[ann.token_id].told) == [ann.take]
    await finish_notes()


async def test_what_was_revoked_is_told_once_to_all_who_hold_it(database: Database) -> None:
    ann = await holder(database, await insert_actor("ann"))
    bob = await holder(database, await insert_actor("bob"))
    watch, other = ViewerWatch(database), Holder(ann.token_id, ann.authorization)
    for each in (ann, other, bob):
        await each.enter(watch)
    await watch.look()
    assert (ann.told, other.told, bob.told) == ([], [], [])
    await change(database, ann, revoked_at=utc_now())
    for _ in range(2):
        await watch.look()
        assert (ann.told, other.told, bob.told) == ([None], [None], [])
        assert list(watch._held) == [bob.token_id]
    with pytest.raises(Unauthenticated):
        await ann.enter(watch)
    await finish_notes()


@pytest.mark.parametrize("gone", ["tokens", "actors"])
async def test_what_is_gone_is_no_longer_good(database: Database, gone: str) -> None:
    ann = await holder(database, await insert_actor("ann"))
    watch = ViewerWatch(database)
    await ann.enter(watch)
    await finish_notes()
    await database.data[gone].delete_many({})
    await watch.look()
    assert (ann.told, watch._held) == ([None], {})


async def test_what_expires_is_told_when_it_does(database: Database) -> None:
    ann = await holder(database, await insert_actor("ann"), utc_now() + timedelta(seconds=0.3))
    watch = ViewerWatch(database)
    assert (await ann.enter(watch)).expires_at is not None
    await watch.look()
    assert ann.told == []
    await asyncio.sleep(0.35)
    await watch.look()
    assert (ann.told, watch._held) == ([None], {})
    await finish_notes()


async def test_roles_that_changed_are_told_once(database: Database) -> None:
    user = await insert_actor("ann")
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    ann, watch = await holder(database, user), ViewerWatch(database)
    first = await ann.enter(watch)
    membership = MembershipDocument(organization_id=acme.id, user_id=user.id, role=Role.VIEWER)
    await membership.insert()
    for _ in range(2):
        await watch.look()
        assert [viewer and viewer.roles for viewer in ann.told] == [{acme.id: Role.VIEWER}]
    # Whoever comes later is who those have become that came before.
    assert await ann.enter(watch) is ann.told[0] is not first
    await membership.delete()
    await change(database, ann, scopes=["READ"])
    await database.data["actors"].update_one({"_id": user.id}, {"$set": {"is_operator": True}})
    for _ in range(2):
        await watch.look()
        [_, viewer] = ann.told
        assert viewer is not None
        assert (dict(viewer.roles), set(viewer.scopes)) == ({}, {Permission.READ})
    # What gives no right is no change: a name, the last use.
    await database.data["actors"].update_one({"_id": user.id}, {"$set": {"display_name": "A"}})
    await change(database, ann, last_used_at=utc_now())
    await watch.look()
    assert len(ann.told) == 2
    await finish_notes()


async def test_who_leaves_is_told_no_more(database: Database, asked: list[int]) -> None:
    ann = await holder(database, await insert_actor("ann"))
    watch, other = ViewerWatch(database), Holder(ann.token_id, ann.authorization)
    viewer = await ann.enter(watch)
    await other.enter(watch)
    watch.leave(viewer, ann.take)
    assert list(watch._held[ann.token_id].told) == [other.take]
    await change(database, ann, scopes=["READ"])
    await watch.look()
    assert (len(ann.told), len(other.told)) == (0, 1)
    watch.leave(viewer, other.take)
    assert watch._held == {}
    watch.leave(viewer, other.take)  # a second time
    await watch.look()
    assert asked == [1]
    await finish_notes()


async def test_who_is_told_may_leave_at_once_and_take_others_along(database: Database) -> None:
    ann = await holder(database, await insert_actor("ann"))
    bob = await holder(database, await insert_actor("bob"))
    watch = ViewerWatch(database)
    viewers: list[Viewer] = []
    told: list[Viewer | None] = []

    def leave(viewer: Viewer | None) -> None:
        told.append(viewer)
        watch.leave(viewers[0], leave)
        watch.leave(viewers[0], ann.take)
        watch.leave(viewers[1], bob.take)

    viewers.append(await watch.enter(ann.authorization, leave))
    await ann.enter(watch)
    viewers.append(await bob.enter(watch))
    await finish_notes()
    await database.data["tokens"].update_many({}, {"$set": {"revoked_at": utc_now()}})
    await watch.look()
    # All that held the token are told, also those that were taken along.
    assert (told, ann.told, bob.told, watch._held) == ([None], [None], [], {})


@pytest.mark.parametrize("what", ["role", "permission"])
async def test_a_token_that_is_not_understood_ends_alone(
    database: Database, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    user = await insert_actor("eve")
    eve, ann = await holder(database, user), await holder(database, await insert_actor("ann"))
    watch = ViewerWatch(database)
    await eve.enter(watch)
    await ann.enter(watch)
    await finish_notes()
    if what == "role":
        row = {"organization_id": ObjectId(), "user_id": user.id, "role": "REVIEWER"}
        await database.data["memberships"].insert_one(row)
    else:
        await change(database, eve, scopes=["READ", "REVIEW"])
    await change(database, ann, revoked_at=utc_now())
    await watch.look()
    assert (eve.told, ann.told, watch._held) == ([None], [None], {})
    assert [(each.levelname, each.message) for each in caplog.records] == [
        ("ERROR", f"viewers.not_understood token_id={eve.token_id}")
    ]


async def test_one_that_cannot_be_told_does_not_keep_it_from_the_others(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    ann = await holder(database, await insert_actor("ann"))
    bob = await holder(database, await insert_actor("bob"))

    def broken(viewer: Viewer | None) -> None:
        raise RuntimeError("of a connection")

    watch = ViewerWatch(database)
    await watch.enter(ann.authorization, broken)
    await ann.enter(watch)
    await bob.enter(watch)
    await finish_notes()
    await database.data["tokens"].update_many({}, {"$set": {"revoked_at": utc_now()}})
    await watch.look()
    assert (ann.told, bob.told, watch._held) == ([None], [None], {})
    assert [each.message for each in caplog.records] == [
        f"viewers.not_told token_id={ann.token_id}"
    ]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (AutoReconnect("no way"), "viewers.not_read error=no way"),
        (Unavailable("busy"), "viewers.not_read error=busy"),
        (RuntimeError("of the driver"), "viewers.look_failed"),
    ],
    ids=["no connection", "refused", "unexpected"],
)
async def test_while_the_database_is_away_nothing_is_told(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    line: str,
) -> None:
    ann = await holder(database, await insert_actor("ann"))
    read, is_away, failures = read_tokens, True, 0

    async def away(database: Database, token_ids: Sequence[ObjectId]) -> dict[ObjectId, Row]:
        nonlocal failures
        if is_away:
            failures += 1
            raise error
        return await read(database, token_ids)

    async with watching_viewers(database) as watch:
        await ann.enter(watch)
        await finish_notes()
        monkeypatch.setattr(watching, "read_tokens", away)
        await change(database, ann, revoked_at=utc_now())
        async with asyncio.timeout(GUARD_SECONDS):
            while failures < 3:
                await asyncio.sleep(0.005)
        assert (ann.told, list(watch._held)) == ([], [ann.token_id])
        is_away = False
        await until_told(ann)
    assert (ann.told, watch._held) == ([None], {})
    assert [each.message for each in caplog.records] == [line] * failures


@pytest.mark.usefixtures("often")
async def test_it_looks_by_itself_for_as_long_as_somebody_holds_a_token(
    database: Database, asked: list[int]
) -> None:
    ann = await holder(database, await insert_actor("ann"))
    async with watching_viewers(database) as watch:
        await asyncio.sleep(0.1)
        assert asked == []
        await ann.enter(watch)
        await finish_notes()
        await asyncio.sleep(0.1)
        assert set(asked) == {1}
        await change(database, ann, revoked_at=utc_now())
        await until_told(ann)
    count = len(asked)
    await asyncio.sleep(0.1)
    assert len(asked) == count


async def test_thousands_are_read_some_at_a_time(database: Database, asked: list[int]) -> None:
    user = await insert_actor("ann")
    first = await holder(database, user)
    row = await database.data["tokens"].find_one({"_id": first.token_id})
    assert row is not None
    ids = [ObjectId() for _ in range(2300)]
    rows = [{**row, "_id": each, "prefix": f"mh_{each}", "last_used_at": utc_now()} for each in ids]
    await database.data["tokens"].insert_many(rows)
    secret = first.authorization.removeprefix("Bearer ")[27:]
    holders = [Holder(each, f"Bearer {token_text(each, secret)}") for each in ids]
    watch = ViewerWatch(database)
    for begin in range(0, len(holders), 100):  # all at once would wait long for a connection
        await asyncio.gather(*[each.enter(watch) for each in holders[begin : begin + 100]])
    await watch.look()
    assert asked == [500, 500, 500, 500, 300]
    revoked = {"_id": {"$in": ids[::2]}}
    await database.data["tokens"].update_many(revoked, {"$set": {"revoked_at": utc_now()}})
    await watch.look()
    assert [each.told for each in holders] == [[None], []] * 1150
    assert sorted(watch._held) == ids[1::2]
    assert asked[5:] == [500, 500, 500, 500, 300]
