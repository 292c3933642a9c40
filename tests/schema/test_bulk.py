"""`bulkUpdateModels`: what it is about, refusals, and who may what."""

import asyncio
from typing import Any, Final

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument, ModelState, Visibility
from modelharbor.schema.nodes import global_id
from tests.asking import Answer, Asker
from tests.documents import insert_actor, insert_model, viewer_of
from tests.explaining import Captured
from tests.resolvers.state import everything

pytestmark = pytest.mark.anyio

BULK: Final = """
mutation($i: BulkUpdateModelsInput!) { bulkUpdateModels(input: $i) {
  matchedCount forbiddenCount sample { name } job { id kind state } userErrors { code path message }
} }
"""
NOTHING: Final = {"matchedCount": 0, "forbiddenCount": 0, "sample": [], "job": None}


class Shelf:
    """Twelve private models of `acme`, one archived; two public ones of somebody else."""

    def __init__(self, ask: Asker, acme: ActorDocument, models: list[ModelDocument]) -> None:
        self.ask, self.acme, self.models = ask, acme, models
        self.ids = [global_id("Model", model.id) for model in models]
        self.person = ANONYMOUS

    async def bulk(self, viewer: Viewer | None = None, **given: Any) -> Any:
        answer: Answer = await self.ask(BULK, self.person if viewer is None else viewer, i=given)
        assert answer.errors == []
        return answer.data["bulkUpdateModels"]

    async def refused(self, viewer: Viewer | None = None, **given: Any) -> tuple[str, Any]:
        """Code and path of the one reason; nothing was written."""
        before = await everything(self.ask.database)
        found = await self.bulk(viewer, **given)
        assert await everything(self.ask.database) == before
        [error] = found.pop("userErrors")
        assert found == NOTHING
        return error["code"], error["path"]

    async def jobs(self) -> int:
        return await self.ask.database.count("jobs", {})


@pytest.fixture
async def shelf(ask: Asker, database: Database) -> Shelf:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    other = await insert_actor("other")
    private = Visibility.PRIVATE
    made = [
        await insert_model(
            acme, f"m{n:02}", visibility=private, stats={"trending_score": n}, tags=["x"]
        )
        for n in range(11)
    ]
    archived = ModelState.ARCHIVED
    made.append(await insert_model(acme, "m11", visibility=private, state=archived, tags=["x"]))
    made += [await insert_model(other, name, tags=["x"]) for name in ("theirs", "also")]
    shelf = Shelf(ask, acme, made)
    shelf.person = viewer_of(await insert_actor("ada"), {acme.id: Role.ADMIN})
    return shelf


async def test_a_preview_counts_shows_and_writes_nothing(shelf: Shelf) -> None:
    before = await everything(shelf.ask.database)
    found = await shelf.bulk(filter={"tags": {"hasAny": ["x"]}}, addTags=["y"], dryRun=True)
    assert found == {
        "matchedCount": 13,
        "forbiddenCount": 2,
        "sample": [{"name": f"m{n:02}"} for n in range(10, 0, -1)],
        "job": None,
        "userErrors": [],
    }
    found = await shelf.bulk(
        filter={"state": ["ARCHIVED"]}, state="ACTIVE", dryRun=True, idempotencyKey="k"
    )
    assert (found["matchedCount"], found["sample"]) == (1, [{"name": "m11"}])
    # Ids mean what they name, whatever its state; what is not there for the viewer is passed over.
    strange = [global_id("Model", ObjectId()), global_id("User", ObjectId()), "nonsense"]
    found = await shelf.bulk(ids=[*shelf.ids[10:], *strange], addTags=["y"], dryRun=True)
    assert (found["matchedCount"], found["forbiddenCount"]) == (4, 2)
    assert {each["name"] for each in found["sample"]} == {"m10", "m11"}
    assert await everything(shelf.ask.database) == before


async def test_a_job_is_put_for_what_matches(shelf: Shelf) -> None:
    found = await shelf.bulk(filter={"tags": {"hasAny": ["x"]}}, addTags=["y"])
    assert (found["matchedCount"], found["forbiddenCount"]) == (13, 2)
    assert (found["job"]["kind"], found["job"]["state"]) == ("BULK_MUTATION", "QUEUED")
    [job] = await shelf.ask.database.find("jobs", {})
    assert job["principals"] == ["operator", f"actor:{shelf.person.user_id}"]
    assert job["scopes"] == sorted(scope.value for scope in shelf.person.scopes)
    # Nothing to be changed: no job.
    found = await shelf.bulk(filter={"name": {"eq": "nowhere"}}, addTags=["y"])
    assert found == {**NOTHING, "userErrors": []}
    assert await shelf.jobs() == 1


async def test_what_is_refused(shelf: Shelf) -> None:
    ids = shelf.ids[:2]
    some = {"tags": {"hasAny": ["x"]}}
    for given, expected in (
        ({"addTags": ["y"]}, ("BAD_INPUT", None)),
        ({"addTags": ["y"], "ids": ids, "filter": some}, ("BAD_INPUT", None)),
        ({"ids": ids}, ("BAD_INPUT", None)),
        ({"ids": ids, "addTags": []}, ("BAD_INPUT", None)),
        ({"ids": ids, "addTags": ["\u202e"]}, ("BAD_INPUT", ["addTags"])),
        ({"ids": ids, "removeTags": ["t"] * 101}, ("BAD_INPUT", ["removeTags"])),
        ({"ids": ids, "state": "DELETED"}, ("BAD_INPUT", ["state"])),
        ({"ids": ids, "addTags": ["y"], "idempotencyKey": "ö"}, ("BAD_INPUT", ["idempotencyKey"])),
        (
            {"ids": [global_id("Model", ObjectId()) for _ in range(1001)], "addTags": ["y"]},
            ("BAD_INPUT", ["ids"]),
        ),
        ({"ids": [], "addTags": ["y"]}, ("NOT_FOUND", ["ids"])),
        ({"ids": ["nonsense"], "addTags": ["y"]}, ("NOT_FOUND", ["ids"])),
        ({"ids": shelf.ids[12:], "addTags": ["y"]}, ("FORBIDDEN", ["ids"])),
        (
            {"filter": {"owner": {"eq": "other"}}, "addTags": ["y"], "dryRun": True},
            ("FORBIDDEN", ["filter"]),
        ),
    ):
        assert await shelf.refused(**given) == expected, given
    before = await everything(shelf.ask.database)
    deep: Any = {"name": {"eq": "a"}}
    for _ in range(5):
        deep = {"not": deep}
    answer = await shelf.ask(BULK, shelf.person, i={"filter": deep, "addTags": ["y"]})
    assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"]
    assert answer.commands == []
    assert await everything(shelf.ask.database) == before


async def test_more_than_are_allowed(shelf: Shelf) -> None:
    shelf.ask = shelf.ask.changed(max_bulk_models=10)
    given: dict[str, Any] = {"filter": {"tags": {"hasAny": ["x"]}}, "addTags": ["y"]}
    for dry_run in (True, False):
        assert await shelf.refused(**given, dryRun=dry_run) == ("QUOTA_EXCEEDED", ["filter"])
    shelf.ask = shelf.ask.changed(max_bulk_models=11)
    assert (await shelf.bulk(**given))["job"] is not None  # those that it passes over do not count


async def test_bad_input_costs_no_command(shelf: Shelf) -> None:
    answer = await shelf.ask(BULK, shelf.person, i={"ids": shelf.ids, "state": "DELETED"})
    assert answer.commands == []


async def test_a_preview_is_three_reads(shelf: Shelf) -> None:
    captured = Captured()
    given = {"filter": {"tags": {"hasAny": ["x"]}}, "addTags": ["y"], "dryRun": True}
    await shelf.ask(BULK, shelf.person, count=captured, i=given)
    assert sorted(captured.names) == ["aggregate models", "aggregate models", "find models"]


async def test_the_same_key_is_the_same_job(shelf: Shelf) -> None:
    given: dict[str, Any] = {"filter": {"tags": {"hasAny": ["x"]}}, "addTags": ["y"]}
    found = await asyncio.gather(
        *[shelf.bulk(**given, idempotencyKey="k", dryRun=False) for _ in range(5)]
    )
    assert len({each["job"]["id"] for each in found}) == 1
    # The same answer, also when nothing matches any more.
    models = shelf.ask.database.data["models"]
    await models.update_many({}, {"$set": {"tags": []}})
    await models.update_one({"name": "m10"}, {"$set": {"state": "DELETED", "principals": []}})
    again = await shelf.bulk(**given, idempotencyKey="k")
    assert again == {**found[0], "sample": found[0]["sample"][1:]}
    assert await shelf.refused(filter=given["filter"], addTags=["z"], idempotencyKey="k") == (
        "CONFLICT",
        ["idempotencyKey"],
    )
    assert await shelf.jobs() == 1
    assert (await shelf.bulk(**{**given, "filter": {}}, idempotencyKey="other"))["job"]
    assert await shelf.jobs() == 2


async def test_each_is_told_of_what_they_see(shelf: Shelf) -> None:
    """The same input by an administrator, a contributor, a reader, a stranger and by nobody."""
    given: dict[str, Any] = {"filter": {"tags": {"hasAny": ["x"]}}, "dryRun": True}

    async def told(role: Role | None, **change: Any) -> Any:
        roles = {} if role is None else {shelf.acme.id: role}
        viewer = viewer_of(await insert_actor(f"a{ObjectId()}"), roles)
        found = await shelf.bulk(viewer, **given, **change)
        if found["userErrors"]:
            return found["userErrors"][0]["code"], found["userErrors"][0]["message"][:12]
        return found["matchedCount"], found["forbiddenCount"]

    tags, visibility = {"addTags": ["y"]}, {"visibility": "INTERNAL"}
    assert await told(Role.ADMIN, **tags) == (13, 2)
    assert await told(Role.ADMIN, **visibility) == (13, 2)
    assert await told(Role.CONTRIBUTOR, **tags) == (13, 2)
    assert await told(Role.CONTRIBUTOR, **visibility) == ("FORBIDDEN", "Of 13 models")
    assert await told(Role.VIEWER, **tags) == ("FORBIDDEN", "Of 13 models")
    assert await told(None, **tags) == ("FORBIDDEN", "Of 2 models ")
    answer = await shelf.ask(BULK, ANONYMOUS, i={**given, **tags})
    assert [code for _, code in answer.errors] == ["UNAUTHENTICATED"]
    assert answer.commands == []
    private = shelf.ids[:3]
    stranger = viewer_of(await insert_actor("stranger"))
    assert await shelf.refused(stranger, ids=private, addTags=["y"]) == ("NOT_FOUND", ["ids"])


async def test_too_many_jobs_of_one_person_wait(shelf: Shelf) -> None:
    shelf.ask = shelf.ask.changed(max_waiting_jobs=1)
    assert (await shelf.bulk(ids=shelf.ids[:1], addTags=["y"]))["job"]
    assert await shelf.refused(ids=shelf.ids[:1], addTags=["y"]) == ("QUOTA_EXCEEDED", None)
