"""Which principals of a viewer matter: those that stand in some model, and no read more than needed."""

import asyncio

import pytest

from modelharbor.auth.viewer import ANONYMOUS, PUBLIC, Viewer, actor_principal
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.loaders.rights import Rights, narrowed
from modelharbor.observability.commands import counted
from tests.documents import insert_actor, insert_model, row_of, viewer_of
from tests.explaining import Captured, keys_examined

from .heard import Told, hearing

pytestmark = pytest.mark.anyio


class Counting(Rights):
    """Which principals were looked for."""

    looks: list[str]

    async def _look(self, principal: str) -> object:  # type: ignore[override]  # as it is
        self.looks.append(principal)
        await asyncio.sleep(0)
        return await super()._look(principal)


def counting(database: Database, told: Told, most: int = 100) -> Counting:
    made = Counting(database, told, most)
    made.looks = []
    return made


def of(actor: ActorDocument) -> str:
    assert actor.id is not None
    return actor_principal(actor.id)


async def test_nobody_needs_no_read(database: Database) -> None:
    rights = counting(database, Told())
    assert await rights.of(ANONYMOUS) == PUBLIC
    assert rights.looks == []


async def test_only_principals_that_stand_in_a_model_matter(database: Database) -> None:
    ada, bob = await insert_actor("ada"), await insert_actor("bob")
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    await insert_model(acme, "hidden", visibility=Visibility.PRIVATE)
    await insert_model(ada, "open")
    rights = counting(database, Told())
    member = viewer_of(bob, {acme.id: Role.VIEWER})
    assert await rights.of(viewer_of(ada)) == PUBLIC
    assert await rights.of(viewer_of(bob)) == PUBLIC
    assert await rights.of(member) == f"{PUBLIC} {of(acme)}"
    operator = Viewer(
        user={**row_of(bob), "is_operator": True}, scopes=frozenset(Permission), roles={}
    )
    assert await rights.of(operator) == PUBLIC
    without = Viewer(user=row_of(bob), scopes=frozenset({Permission.WRITE}), roles=member.roles)
    assert await rights.of(without) == PUBLIC
    assert sorted(rights.looks) == sorted(["internal", of(ada), of(bob), of(acme), "operator"])


async def test_a_model_of_any_state_counts(database: Database) -> None:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "odd", visibility=Visibility.PRIVATE)
    await database.data["models"].update_one({"_id": model.id}, {"$unset": {"state": 1}})
    assert await counting(database, Told()).of(viewer_of(ada)) == f"{PUBLIC} {of(ada)}"


async def test_what_is_known_holds_until_a_change_that_concerns_it(database: Database) -> None:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "open")
    viewer, told = viewer_of(ada), Told()
    rights = counting(database, told)
    data = database.data["models"]

    async def after(change: object) -> tuple[str, int]:
        before = len(rights.looks)
        await told.hear(heard)
        return await rights.of(viewer), len(rights.looks) - before

    async with hearing(database) as heard:
        assert await rights.of(viewer) == PUBLIC
        assert len(rights.looks) == 2
        assert await after(None) == (PUBLIC, 0)
        changed = await data.update_one({"_id": model.id}, {"$set": {"summary": "new"}})
        assert await after(changed) == (PUBLIC, 0)
        mine = {"visibility": "PRIVATE", "principals": [of(ada)]}
        changed = await data.update_one({"_id": model.id}, {"$set": mine})
        assert await after(changed) == (f"{PUBLIC} {of(ada)}", 1)
        changed = await data.update_one({"_id": model.id}, {"$set": {"summary": "newer"}})
        assert await after(changed) == (f"{PUBLIC} {of(ada)}", 0)
        other = await insert_model(ada, "inside", visibility=Visibility.INTERNAL)
        assert await after(other) == (f"{PUBLIC} {of(ada)} internal", 1)
        gone = await data.delete_one({"_id": model.id})
        assert await after(gone) == (f"{PUBLIC} internal", 2)
        public = {"visibility": "PUBLIC", "principals": [PUBLIC]}
        changed = await data.update_one({"_id": other.id}, {"$set": public})
        assert await after(changed) == (PUBLIC, 1)


async def test_without_a_place_in_time_nothing_is_known_for_longer(database: Database) -> None:
    ada = await insert_actor("ada")
    rights = counting(database, Told(position=0))
    assert await rights.of(viewer_of(ada)) == PUBLIC
    rights._known.clear()
    await insert_model(ada, "hidden", visibility=Visibility.PRIVATE)
    assert await rights.of(viewer_of(ada)) == f"{PUBLIC} {of(ada)}"


async def test_who_ask_at_the_same_time_share_a_read(database: Database) -> None:
    ada = await insert_actor("ada")
    await insert_model(ada, "hidden", visibility=Visibility.PRIVATE)
    rights = counting(database, Told())
    found = await asyncio.gather(*[rights.of(viewer_of(ada)) for _ in range(20)])
    assert set(found) == {f"{PUBLIC} {of(ada)}"}
    assert sorted(rights.looks) == sorted(["internal", of(ada)])


async def test_a_read_that_was_under_way_is_not_taken_where_it_is_too_old(
    database: Database,
) -> None:
    ada = await insert_actor("ada")
    told = Told()
    rights = counting(database, told)
    async with hearing(database) as heard:
        early = asyncio.ensure_future(rights._read(of(ada)))
        await asyncio.sleep(0)
        position = rights._freshness.position
        found = await early
        assert not found.stands
        # As if it had been read before the change, and was still on its way.
        waiting: asyncio.Task[object] = asyncio.ensure_future(asyncio.sleep(0.01))
        rights._looking[of(ada)] = waiting  # type: ignore[assignment]  # only waited for
        await insert_model(ada, "hidden", visibility=Visibility.PRIVATE)
        await told.hear(heard)
        assert position < told.position
        assert await rights.of(viewer_of(ada)) == f"{PUBLIC} {of(ada)}"


async def test_what_is_known_is_bounded(database: Database) -> None:
    rights = counting(database, Told(), most=4)
    for number in range(12):
        await rights.of(viewer_of(await insert_actor(f"actor{number}")))
    assert len(rights._facts) <= 4
    assert len(rights._known) <= 4


async def test_a_look_reads_a_few_keys(database: Database) -> None:
    ada = await insert_actor("ada")
    for number in range(300):
        await insert_model(ada, f"open-{number}")
    captured = Captured()
    token = counted.set(captured)
    try:
        assert not (await Rights(database, Told())._look(of(ada))).stands
    finally:
        counted.reset(token)
    assert await keys_examined(database, captured, "models") <= 4


async def test_a_narrowed_viewer_sees_by_these_rights_alone(database: Database) -> None:
    ada = await insert_actor("ada")
    viewer = viewer_of(ada)
    assert viewer.visible == {"principals": {"$in": [PUBLIC, "internal", of(ada)]}}
    made = narrowed(viewer, PUBLIC)
    assert made.visible == {"principals": PUBLIC}
    assert made.user == viewer.user
    assert made.scopes == viewer.scopes
    assert narrowed(viewer, f"{PUBLIC} {of(ada)}").principals == (PUBLIC, of(ada))
    assert viewer.principals == (PUBLIC, "internal", of(ada))
