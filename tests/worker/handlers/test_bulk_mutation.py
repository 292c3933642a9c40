"""BULK_MUTATION."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, cast

import pytest
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.pool import AsyncConnection

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache, connect_cache
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.db.keyset import Filter
from modelharbor.db.models import Grant, ModelState, Visibility
from modelharbor.loaders.base import Reads
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.resolvers.bulk import read_models, start_bulk_change
from modelharbor.resolvers.jobs import retry_job
from modelharbor.resolvers.models import update_model
from modelharbor.schema.nodes import global_id
from modelharbor.worker.claims import Places, claim
from modelharbor.worker.handlers import bulk_mutation
from modelharbor.worker.handlers.bulk_mutation import MODELS_AT_ONCE, change_models
from modelharbor.worker.reports import Reports
from modelharbor.worker.tools import Shared, Tools
from tests.documents import insert_actor, insert_model, insert_version, row_of, viewer_of
from tests.worker.handlers.conftest import Yard

pytestmark = pytest.mark.anyio
ALL: Final = Filter({"state": "ACTIVE"})


@dataclass
class Fleet:
    """Models of `acme`, and who asks for their change: an administrator there."""

    yard: Yard
    cache: Cache
    acme: ActorDocument
    person: ActorDocument

    @property
    def database(self) -> Database:
        return self.yard.database

    @property
    def viewer(self) -> Viewer:
        return viewer_of(self.person, {self.acme.id: Role.ADMIN})

    async def put(self, which: Filter | Sequence[ObjectId] = ALL, **given: Any) -> Row:
        reads = Reads(
            database=self.database,
            cache=self.cache,
            viewer=self.viewer,
            links=DownloadLinks(b"", ""),
        )
        preview = await start_bulk_change(
            reads,
            self.yard.settings,
            **{"filter" if isinstance(which, Filter) else "ids": cast("Any", which)},
            **given,
        )
        assert preview.job is not None
        return preview.job

    async def make(self, count: int, **values: Any) -> list[ObjectId]:
        """Private ones."""
        first = row_of(
            await insert_model(
                self.acme, f"m{ObjectId()}", **{"visibility": Visibility.PRIVATE, **values}
            )
        )
        others = []
        for _ in range(count - 1):
            name = f"m{ObjectId()}"
            others.append({**first, "_id": ObjectId(), "name": name, "name_lower": name})
        if others:
            await self.database.data["models"].insert_many(others)
        return [first["_id"], *(each["_id"] for each in others)]

    async def models(self) -> list[Row]:
        return await self.database.data["models"].find().sort("_id", 1).to_list()

    async def events(self) -> Counter[tuple[ObjectId, str]]:
        rows = self.database.data["events"].find({"stream": "models"})
        return Counter([(row["model_id"], row["kind"]) async for row in rows])

    async def left(self) -> int:
        return await self.database.count("bulk_batches", {})


@pytest.fixture
async def fleet(yard: Yard) -> Any:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    person = await insert_actor("ada")
    await MembershipDocument(organization_id=acme.id, user_id=person.id, role=Role.ADMIN).insert()
    async with connect_cache(yard.settings) as cache:
        yield Fleet(yard, cache, acme, person)


async def test_each_is_changed_as_by_the_mutation_for_one(fleet: Fleet) -> None:
    alone, *_ = await fleet.make(1, tags=["old", "kept"])
    ids = await fleet.make(45, tags=["old", "kept"])
    before = {row["_id"]: row for row in await fleet.models()}
    await update_model(
        fleet.database,
        fleet.viewer,
        fleet.yard.settings,
        model_id=alone,
        add_tags=["new"],
        remove_tags=["old"],
        visibility=Visibility.INTERNAL,
    )
    job = await fleet.put(
        ids, add_tags=["new"], remove_tags=["old"], visibility=Visibility.INTERNAL
    )
    ended = await fleet.yard.run(job)
    assert ended["result"] == {"changed": 45, "unchanged": 0, "failed": 0, "failures": []}
    progress = ended["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (45, 45, "models")
    rows = {row["_id"]: row for row in await fleet.models()}
    written = {"tags", "visibility", "principals", "revision", "updated_at"}
    for row in rows.values():
        old = before[row["_id"]]
        assert {name for name in row if row[name] != old[name]} == written
        assert {name: row[name] for name in sorted(written - {"updated_at"})} == {
            "principals": ["internal"],
            "revision": 2,
            "tags": ["kept", "new"],
            "visibility": "INTERNAL",
        }
    told = await fleet.database.data["events"].find({"stream": "models"}).to_list()
    same = {"before", "after", "principals", "actor_id", "kind", "comment"}
    [of_one] = [row for row in told if row["model_id"] == alone]
    assert len(told) == 46
    for row in told:
        assert {name: row[name] for name in same} == {name: of_one[name] for name in same}
        assert row["about"] == [row["model_id"], fleet.acme.id]
    assert await fleet.left() == 0


async def test_what_it_changes_may_be_what_the_filter_asks_for(fleet: Fleet) -> None:
    """Neither a loop nor a gap; whoever comes to match later is not meant."""
    await fleet.make(50, tags=["old"])
    job = await fleet.put(Filter({"tags": "old", "state": "ACTIVE"}), remove_tags=["old"])
    assert (await fleet.yard.result(job))["changed"] == 50
    assert [row["tags"] for row in await fleet.models()] == [[]] * 50
    job = await fleet.put(state=ModelState.ARCHIVED)
    assert (await fleet.yard.result(job))["changed"] == 50
    job = await fleet.put(Filter({"state": "ARCHIVED"}), state=ModelState.ACTIVE, add_tags=["x"])
    assert (await fleet.yard.result(job))["changed"] == 50
    events = await fleet.events()
    assert Counter(kind for _, kind in events.elements()) == {
        "MODEL_UPDATED": 100,
        "MODEL_ARCHIVED": 50,
        "MODEL_RESTORED": 50,
    }
    assert {row["revision"] for row in await fleet.models()} == {1 + 4}


async def test_what_is_so_already_is_left_alone(fleet: Fleet) -> None:
    ids = await fleet.make(3, tags=["x"])
    ids += await fleet.make(2)
    before = await fleet.models()
    result = await fleet.yard.result(await fleet.put(ids, add_tags=["x"]))
    assert result == {"changed": 2, "unchanged": 3, "failed": 0, "failures": []}
    assert (await fleet.models())[:3] == before[:3]
    assert set((await fleet.events()).values()) == {1}
    assert len(await fleet.events()) == 2


async def test_failures_are_told_and_undo_nothing(fleet: Fleet) -> None:
    """Too many tags, an archived one, one whose row is broken: in one batch with five others."""
    [full] = await fleet.make(1, tags=[f"t{number}" for number in range(100)])
    [archived] = await fleet.make(1, state=ModelState.ARCHIVED)
    [broken] = await fleet.make(1)
    good = await fleet.make(5)
    job = await fleet.put([full, archived, broken, *good], add_tags=["x"])
    models = fleet.database.data["models"]
    await models.update_one({"_id": broken}, {"$unset": {"revision": ""}})
    names = {row["_id"]: f"acme/{row['name']}" for row in await fleet.models()}
    result = await fleet.yard.result(job)
    failures = result.pop("failures")
    assert result == {"changed": 5, "unchanged": 0, "failed": 3}
    assert {(each["id"], each["fullName"], each["code"]) for each in failures} == {
        (global_id("Model", full), names[full], "BAD_INPUT"),
        (global_id("Model", archived), names[archived], "INVALID_TRANSITION"),
        (global_id("Model", broken), None, "INTERNAL"),
    }
    rows = {row["_id"]: row for row in await fleet.models()}
    assert {rows[each]["revision"] for each in good} == {2}
    assert {rows[each].get("revision") for each in (full, archived, broken)} == {1, None}
    assert set(await fleet.events()) == {(each, "MODEL_UPDATED") for each in good}
    log = await fleet.yard.log(job)
    assert len(log) == 3
    assert (
        "WARNING",
        f"{names[full]}: It would have 101 tags: 100 are allowed. [BAD_INPUT]",
    ) in log


async def test_the_first_hundred_failures_are_told(fleet: Fleet) -> None:
    await fleet.make(130, tags=[f"t{number}" for number in range(100)])
    result = await fleet.yard.result(await fleet.put(add_tags=["x"]))
    assert (result["failed"], len(result["failures"])) == (130, 100)


class Death(BaseException):
    """A worker is gone in the middle of something."""


@dataclass
class Bomb(CommandCount):
    """Goes off at one of the commands: before MongoDB has it, or when it was answered."""

    left: int = -1  # negative: never
    is_answered: bool = False


async def attempt(fleet: Fleet, bomb: Bomb) -> bool:
    """Whether it came to its end."""
    database = fleet.database
    places = Places(free=1, by_kind={JobKind.BULK_MUTATION: 1}, suspects=True)
    [job] = await claim(database, "doomed", 60.0, places)
    nothing = cast("Any", None)
    shared = Shared(database, fleet.yard.settings, nothing, fleet.cache, nothing, nothing)
    tools = Tools(shared, job, fleet.viewer, Reports(database, job))
    token = counted.set(bomb)
    try:
        await change_models(job, tools)
    except Death:
        return False
    finally:
        counted.reset(token)
        # As when its lease has run out.
        free = {"state": "QUEUED", "worker": None, "lease_until": None, "heartbeat_at": None}
        await database.data["jobs"].update_one({"_id": job["_id"]}, {"$set": {**free, "deaths": 0}})
    return True


async def test_each_is_changed_once_whenever_its_worker_dies(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = AsyncConnection.command

    async def command(self: Any, *given: Any, **named: Any) -> Any:
        bomb = counted.get()
        if not isinstance(bomb, Bomb):
            return await send(self, *given, **named)
        bomb.left -= 1
        if bomb.left == 0 and not bomb.is_answered:
            raise Death
        answer = await send(self, *given, **named)
        if bomb.left == 0:
            raise Death
        return answer

    monkeypatch.setattr(AsyncConnection, "command", command)
    chance = Random("deaths")
    await fleet.make(3 * MODELS_AT_ONCE + 7)
    job = await fleet.put(visibility=Visibility.INTERNAL)
    deaths = 0
    while not await attempt(fleet, Bomb(left=chance.randint(1, 70), is_answered=deaths % 2 == 0)):
        deaths += 1
        assert deaths < 100
    assert deaths >= 3
    result = await fleet.yard.result(job)
    assert result == {"changed": 67, "unchanged": 0, "failed": 0, "failures": []}
    assert {row["revision"] for row in await fleet.models()} == {2}
    events = await fleet.events()
    assert (len(events), set(events.values())) == (67, {1})
    assert await fleet.left() == 0


async def test_each_costs_two_commands(fleet: Fleet) -> None:
    """And six for twenty: what they are, who asks, what is left, how far it is; begin and end."""
    counts = []
    for many in (MODELS_AT_ONCE, 3 * MODELS_AT_ONCE):
        await fleet.database.data["models"].delete_many({})
        await fleet.make(many)
        job = await fleet.put(add_tags=["x"])
        count = Bomb()
        assert await attempt(fleet, count)
        counts.append(len(count.names))
        await fleet.yard.result(job)
    assert counts[1] - counts[0] == 2 * (2 * MODELS_AT_ONCE + 6)


async def test_others_change_the_same_models(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost of either."""
    ids = await fleet.make(60)
    job = await fleet.put(add_tags=["ours"])
    settings = fleet.yard.settings

    async def theirs(model_id: ObjectId) -> None:
        await update_model(
            fleet.database, fleet.viewer, settings, model_id=model_id, add_tags=["theirs"]
        )

    result: Row
    result, _ = await asyncio.gather(fleet.yard.result(job), asyncio.gather(*map(theirs, ids)))
    assert (result["changed"], result["failed"]) == (60, 0)
    for row in await fleet.models():
        assert (sorted(row["tags"]), row["revision"]) == (["ours", "theirs"], 3)
    assert set((await fleet.events()).values()) == {2}


async def test_one_that_others_hold_is_told_and_the_rest_is_done(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await fleet.make(3)
    job = await fleet.put(ids, add_tags=["x"])
    monkeypatch.setattr(bulk_mutation, "CHANGE_SECONDS", 0.5)
    held = ids[1]

    async with fleet.database.client.start_session() as session:
        await session.start_transaction()
        await fleet.database.data["models"].update_one(
            {"_id": held}, {"$set": {"summary": "held"}}, session=session
        )
        result = await fleet.yard.result(job)
        await session.abort_transaction()
    assert (result["changed"], result["failed"]) == (2, 1)
    [failure] = result["failures"]
    assert (failure["id"], failure["code"]) == (global_id("Model", held), "UNAVAILABLE")
    assert {row["_id"]: row["tags"] for row in await fleet.models()} == {
        each: ([] if each == held else ["x"]) for each in ids
    }


async def test_rights_that_are_lost_midway(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before stays; from then on each is refused, and what is not seen has no name."""
    await fleet.make(MODELS_AT_ONCE)
    await fleet.make(5, visibility=Visibility.PUBLIC)
    await fleet.make(5)
    job = await fleet.put(add_tags=["x"])
    calls = 0

    async def leave(
        database: Database, session: AsyncClientSession, viewer: Viewer, ids: Any
    ) -> Any:
        nonlocal calls
        calls += 1
        found = await read_models(database, session, viewer, ids)
        if calls == 1:
            await fleet.database.data["memberships"].delete_many({})
        return found

    monkeypatch.setattr(bulk_mutation, "read_models", leave)
    result = await fleet.yard.result(job)
    assert (result["changed"], result["failed"]) == (MODELS_AT_ONCE, 10)
    assert [each["code"] for each in result["failures"]] == ["FORBIDDEN"] * 5 + ["NOT_FOUND"] * 5
    assert [each["fullName"] is None for each in result["failures"]] == [False] * 5 + [True] * 5
    assert Counter(row["revision"] for row in await fleet.models()) == {2: MODELS_AT_ONCE, 1: 10}


async def test_who_asked_is_gone(fleet: Fleet) -> None:
    await fleet.make(2)
    job = await fleet.put(add_tags=["x"])
    await fleet.database.data["actors"].delete_one({"_id": fleet.person.id})
    before = await fleet.models()
    ended = await fleet.yard.run(job)
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "FORBIDDEN")
    assert await fleet.models() == before


async def test_only_what_may_be_changed_is_on_the_list(fleet: Fleet) -> None:
    other = await insert_actor("other", ActorKind.ORGANIZATION)
    theirs = await insert_model(other, "theirs")
    granted = await insert_model(
        other,
        "granted",
        visibility=Visibility.PRIVATE,
        grants=[Grant(actor_id=fleet.person.id, role=Role.CONTRIBUTOR)],
    )
    [own] = await fleet.make(1)
    job = await fleet.put(add_tags=["x"])
    assert job["input"]["told"]["matched"] == 3
    assert job["input"]["told"]["forbidden"] == 1
    assert (await fleet.yard.result(job))["changed"] == 2
    rows = {row["_id"]: row["tags"] for row in await fleet.models()}
    assert rows == {own: ["x"], granted.id: ["x"], theirs.id: []}


async def test_more_than_are_allowed_by_the_time_it_runs(fleet: Fleet) -> None:
    await fleet.make(3)
    job = await fleet.put(add_tags=["x"])
    await fleet.make(3)
    before = await fleet.models()
    fleet.yard.settings = fleet.yard.settings.model_copy(update={"max_bulk_models": 5})
    ended = await fleet.yard.run(job)
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "QUOTA_EXCEEDED")
    assert await fleet.models() == before


async def test_cancelled_it_leaves_what_is_done_and_goes_on_when_retried(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.make(5 * MODELS_AT_ONCE)
    job = await fleet.put(add_tags=["x"])
    advance, done = bulk_mutation._Changing.change, 0

    async def change(self: Any, batch: Row) -> None:
        nonlocal done
        await advance(self, batch)
        done += 1
        if done == 2:
            self._tools._reports.cancel()
            await fleet.database.data["jobs"].update_one(
                {"_id": job["_id"]}, {"$set": {"state": "CANCELLING"}}
            )

    monkeypatch.setattr(bulk_mutation._Changing, "change", change)
    ended = await fleet.yard.run(job)
    assert (ended["state"], ended["progress"]["current"]) == ("CANCELLED", 2 * MODELS_AT_ONCE)
    revisions = Counter(row["revision"] for row in await fleet.models())
    assert revisions == {2: 2 * MODELS_AT_ONCE, 1: 3 * MODELS_AT_ONCE}
    again = await retry_job(fleet.database, fleet.viewer, job_id=job["_id"])
    result = await fleet.yard.result(again)
    assert (result["changed"], result["unchanged"]) == (3 * MODELS_AT_ONCE, 2 * MODELS_AT_ONCE)
    assert {row["revision"] for row in await fleet.models()} == {2}
    assert await fleet.left() == 0


async def test_contents_that_a_filter_asks_for_are_looked_up(fleet: Fleet) -> None:
    await fleet.make(2)
    model = await insert_model(fleet.acme, "holder", visibility=Visibility.PRIVATE)
    await insert_version(fleet.database, model, {"a": 7})
    job = await fleet.put(Filter({"state": "ACTIVE", "file_sha256": f"{7:064x}"}), add_tags=["x"])
    assert (await fleet.yard.result(job))["changed"] == 1
    tags = {row["_id"]: row["tags"] for row in await fleet.models()}
    assert tags.pop(model.id) == ["x"]
    assert set(map(tuple, tags.values())) == {()}
