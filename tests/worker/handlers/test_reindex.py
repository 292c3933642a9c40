"""REINDEX."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.links import DownloadLinks
from modelharbor.cache.client import connect_cache
from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.db.models import Visibility
from modelharbor.inspection.fence import open_fence
from modelharbor.loaders.base import Reads
from modelharbor.loaders.history import versions_at
from modelharbor.resolvers.imports import import_folder
from modelharbor.resolvers.jobs import start_reindex
from modelharbor.resolvers.models import delete_model, update_model
from modelharbor.resolvers.versions import archive_version, create_version, delete_version
from modelharbor.storage.blobs import open_storage
from modelharbor.worker.handlers import reindex
from modelharbor.worker.tools import Tools
from tests.documents import insert_actor, insert_model, viewer_of
from tests.worker.handlers.conftest import Yard

pytestmark = pytest.mark.anyio
BROKEN: Row = {
    "stats.versions": 99,
    "stats.files": 98,
    "stats.size_bytes": 97,
    "stats.stored_bytes": 96,
    "stats.trending_score": 1.5,
    "latest_version_id": ObjectId(),
    "formats": ["GGUF"],
    "parameters": 95,
    "principals": ["actor:nobody"],
    "name_lower": "other",
    "owner_login": "Else",
    "owner_login_lower": "else",
    "owner_kind": "Organization",
}


class Registry:
    """Models as the resolvers make them."""

    def __init__(self, yard: Yard, folder: Path, viewer: Any) -> None:
        self.yard, self.database, self.folder, self.viewer = yard, yard.database, folder, viewer

    async def publish(self, name: str, files: dict[str, bytes]) -> ObjectId:
        """The version's id."""
        folder = self.folder / f"{name}-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        for path, contents in files.items():
            (folder / path).write_bytes(contents)
        settings = self.yard.settings
        async with open_storage(settings) as storage, open_fence(settings) as fence:
            result = await import_folder(
                self.database,
                storage,
                fence,
                self.viewer,
                folder,
                "Ada",
                name,
                visibility=Visibility.PUBLIC,
                max_card_bytes=1000,
                report=lambda progress: None,
            )
        return result.version_id

    async def model(self, name: str) -> Row:
        row = await self.database.data["models"].find_one({"name": name})
        assert row is not None
        return row

    async def models(self) -> list[Row]:
        return await self.database.data["models"].find().sort("_id", 1).to_list()

    async def break_(self, name: str, **changed: Any) -> None:
        await self.database.data["models"].update_one(
            {"name": name}, {"$set": {**BROKEN, **changed}}
        )

    async def reindexed(self, model_id: ObjectId | None = None) -> Row:
        return await self.yard.result(await start_reindex(self.database, None, model_id=model_id))


def without_time(row: Row) -> Row:
    return {**row, "updated_at": None, "stats": {**row["stats"], "as_of": None}}


@pytest.fixture
async def registry(yard: Yard, tmp_path: Path) -> Registry:
    """`a` with published, archived, deleted and draft versions; `b` with none; `c`, which is deleted."""
    (tmp_path / "folders").mkdir()
    viewer = viewer_of(await insert_actor("Ada"))
    made = Registry(yard, tmp_path / "folders", viewer)
    shared = b"{}"
    await made.publish("a", {"config.json": shared, "x": b"1"})
    archived = await made.publish("a", {"config.json": shared, "x": b"22"})
    deleted = await made.publish("a", {"config.json": shared, "x": b"333"})
    await made.publish("a", {"copy.json": shared, "config.json": shared, "y.txt": b"four"})
    database, model = made.database, await made.model("a")
    await archive_version(database, viewer, version_id=archived)
    await delete_version(database, viewer, version_id=deleted)
    await create_version(database, viewer, yard.settings, model_id=model["_id"])
    await insert_model(await insert_actor("bob"), "b", visibility=Visibility.PRIVATE)
    await made.publish("c", {"config.json": shared})
    await delete_model(database, viewer, model_id=(await made.model("c"))["_id"])
    # As a model has it that was not made by `insert_model`.
    assert await made.reindexed() == {"models": 3, "changed": 1}
    return made


async def test_what_is_right_is_left_alone(registry: Registry) -> None:
    before = await registry.models()
    assert await registry.reindexed() == {"models": 3, "changed": 0}
    assert await registry.models() == before
    stats = (await registry.model("a"))["stats"]
    counters = (stats["versions"], stats["files"], stats["size_bytes"], stats["stored_bytes"])
    assert counters == (4, 7, 3 + 4 + 8, 2 + 1 + 2 + 4)


async def test_every_field_is_derived_anew(registry: Registry) -> None:
    before = await registry.models()
    for number, name in enumerate(("a", "b", "c")):
        await registry.break_(name, name_lower=f"other{number}")
    job = await start_reindex(registry.database, None)
    ended = await registry.yard.run(job)
    assert ended["result"] == {"models": 3, "changed": 3}
    assert [without_time(row) for row in await registry.models()] == [
        without_time(row) for row in before
    ]
    assert all(
        new["stats"]["as_of"] > old["stats"]["as_of"]
        for new, old in zip(await registry.models(), before, strict=True)
    )
    assert (ended["progress"]["current"], ended["progress"]["total"]) == (3, 3)
    fields = ", ".join(sorted(BROKEN))
    assert await registry.yard.log(job) == [
        ("INFO", f"Else/a: {fields}"),
        ("INFO", f"Else/b: {fields}"),
        ("INFO", f"Else/c: {fields}"),
    ]


async def test_each_field_alone_is_found(registry: Registry) -> None:
    before = await registry.model("a")
    for field, value in BROKEN.items():
        await registry.database.data["models"].update_one({"name": "a"}, {"$set": {field: value}})
        assert await registry.reindexed(before["_id"]) == {"models": 1, "changed": 1}, field
        assert without_time(await registry.model("a")) == without_time(before), field


async def test_a_latest_version_that_is_mended_is_told(registry: Registry) -> None:
    """So that names lead to the right one from then on, and to what they led to before until then."""
    database, model = registry.database, await registry.model("a")
    right, [other] = model["latest_version_id"], await versions_before(registry, model)
    # As a change would have it that was lost half.
    await database.data["models"].update_one(
        {"_id": model["_id"]}, {"$set": {"latest_version_id": other}}
    )
    await database.data["events"].update_many(
        {"model_id": model["_id"], "pointed": {"$ne": None}},
        {"$set": {"pointed.latest_version_id": other}},
    )
    assert await registry.reindexed(model["_id"]) == {"models": 1, "changed": 1}
    after = await registry.model("a")
    assert after["updated_at"] > model["updated_at"]
    query = {"kind": "MODEL_UPDATED", "pointed": {"$ne": None}}
    [event] = await database.data["events"].find(query).to_list()
    assert event["pointed"] == {"latest_version_id": right, "aliases": model["aliases"]}
    assert (event["before"], event["after"]) == (
        {"latest_version_id": other},
        {"latest_version_id": right},
    )
    assert (event["actor_id"], event["at"]) == (None, after["updated_at"])
    assert event["principals"] == after["principals"]
    async with connect_cache(registry.yard.settings) as cache:
        links = DownloadLinks(b"", "")
        reads = Reads(database=database, cache=cache, viewer=registry.viewer, links=links)
        for ago, version in ((0, right), (1, other)):
            at = event["at"] - timedelta(milliseconds=ago)
            assert await versions_at(reads, [model["_id"]], None, at) == [version]
    # Of what is right nothing is told, nor of fields that are no names.
    told = {"model_id": model["_id"], "stream": "models"}
    events = await database.count("events", told)
    await database.data["models"].update_one({"name": "a"}, {"$set": {"formats": []}})
    assert await registry.reindexed(model["_id"]) == {"models": 1, "changed": 1}
    assert await registry.reindexed(model["_id"]) == {"models": 1, "changed": 0}
    assert await database.count("events", told) == events
    assert (await registry.model("a"))["updated_at"] == after["updated_at"]


async def versions_before(registry: Registry, model: Row) -> list[ObjectId]:
    """The READY versions of a model but its latest."""
    query = {
        "model_id": model["_id"],
        "status": "READY",
        "_id": {"$ne": model["latest_version_id"]},
    }
    return [row["_id"] for row in await registry.database.find("versions", query)]


async def test_one_model_is_reindexed_alone(registry: Registry) -> None:
    await registry.break_("a")
    await registry.break_("b", name_lower="other2")
    wrong = await registry.model("b")
    before = await registry.model("a")
    assert await registry.reindexed(before["_id"]) == {"models": 1, "changed": 1}
    assert (await registry.model("a"))["stats"]["versions"] == 4
    assert await registry.model("b") == wrong


async def test_a_model_that_is_gone_is_not_found(registry: Registry) -> None:
    model = await registry.model("b")
    job = await start_reindex(registry.database, None, model_id=model["_id"])
    await registry.database.data["models"].delete_one({"_id": model["_id"]})
    ended = await registry.yard.run(job)
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "NOT_FOUND")


async def test_aliases_that_lead_nowhere_are_told(registry: Registry) -> None:
    alias = {"name": "prod", "version_id": ObjectId(), "protected": False}
    await registry.database.data["models"].update_one({"name": "a"}, {"$set": {"aliases": [alias]}})
    before = await registry.models()
    job = await start_reindex(registry.database, None)
    assert await registry.yard.result(job) == {"models": 3, "changed": 0}
    assert await registry.models() == before
    assert await registry.yard.log(job) == [
        ("WARNING", "Ada/a: the alias prod points at no version.")
    ]


async def test_a_name_that_another_has_by_now_stays(registry: Registry) -> None:
    await registry.break_("b")
    [owner] = await registry.database.data["actors"].find({"login": "bob"}).to_list()
    await insert_model(ActorDocument.model_validate(owner), "B")
    model_id = (await registry.model("b"))["_id"]
    job = await start_reindex(registry.database, None, model_id=model_id)
    assert await registry.yard.result(job) == {"models": 1, "changed": 1}
    model = await registry.database.data["models"].find_one({"_id": model_id})
    assert model is not None
    assert (model["name_lower"], model["owner_login"], model["owner_kind"]) == (
        "other",
        "Else",
        "User",
    )
    assert (model["stats"]["versions"], model["principals"]) == (0, [f"actor:{owner['_id']}"])
    assert [level for level, _ in await registry.yard.log(job)] == ["WARNING", "INFO"]


async def test_it_goes_on_where_it_broke_off(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reindex, "MODELS_AT_ONCE", 1)
    for number, name in enumerate(("a", "b", "c")):
        await registry.break_(name, name_lower=f"other{number}")
    attempts = 0
    looked: list[list[Any]] = []

    async def handler(job: Row, tools: Tools) -> Row:
        nonlocal attempts
        attempts += 1
        report = tools.report
        count = 0

        def break_off(current: int, *rest: Any, **given: Any) -> None:
            nonlocal count
            report(current, *rest, **given)
            count += 1
            looked.append([attempts, current])
            if count == 2 and attempts < 3:
                raise ConnectionError("the power is gone")

        monkeypatch.setattr(tools, "report", break_off)
        return await reindex.reindex_models(job, tools)

    monkeypatch.setattr("modelharbor.worker.outcomes.FIRST_BACKOFF_SECONDS", 0.01)
    job = await start_reindex(registry.database, None)
    ended = await registry.yard.run(job, {JobKind.REINDEX: handler})
    assert (ended["state"], ended["result"]) == ("SUCCEEDED", {"models": 3, "changed": 3})
    assert looked == [[1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    assert await registry.reindexed() == {"models": 3, "changed": 0}


async def test_large_numbers_differ_from_others_only(registry: Registry) -> None:
    """PyMongo reads them as another type."""
    model = await registry.model("a")
    files = registry.database.data["files"]
    await files.update_many({"model_id": model["_id"]}, {"$set": {"size_bytes": 2**33}})
    await registry.database.data["versions"].update_many(
        {"model_id": model["_id"]}, {"$set": {"size_bytes": 2**33}}
    )
    assert (await registry.reindexed())["changed"] == 1
    assert (await registry.model("a"))["stats"]["size_bytes"] >= 2**33
    assert (await registry.reindexed())["changed"] == 0


async def test_it_is_right_beside_others_that_write(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are published, archived and deleted, and the model is changed, all the time."""
    monkeypatch.setattr(reindex, "MODELS_AT_ONCE", 2)
    database, viewer = registry.database, registry.viewer
    model = await registry.model("a")
    ended = asyncio.Event()
    written = 0

    async def write(number: int) -> None:
        nonlocal written
        while not ended.is_set():
            version = await registry.publish("a", {"z": f"{number}-{written}".encode()})
            if number == 0:
                await archive_version(database, viewer, version_id=version)
            elif number == 1:
                await delete_version(database, viewer, version_id=version)
            written += 1
            await asyncio.sleep(0.1)  # who never lets up would keep all others from writing

    async def describe() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            await update_model(
                database, viewer, registry.yard.settings, model_id=model["_id"], summary=f"{number}"
            )
            await asyncio.sleep(0.1)

    rounds = 0
    async with asyncio.timeout(180), asyncio.TaskGroup() as group:
        for number in range(2):
            group.create_task(write(number))
        group.create_task(describe())
        try:
            while rounds < 6 or written < 4:
                rounds += 1
                # As much too much as whoever writes meanwhile adds to or takes from.
                await database.data["models"].update_one(
                    {"_id": model["_id"]},
                    {"$inc": {"stats.versions": 50, "stats.stored_bytes": 7}},
                )
                assert (await registry.reindexed())["changed"] >= 1
        finally:
            ended.set()  # a cancellation alone may be swallowed
    assert await registry.reindexed() == {"models": 3, "changed": 0}
    assert (await registry.model("a"))["summary"] is not None


async def test_the_comparison_sees_one_moment(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is published between its reads is not taken for a difference."""
    read_versions = reindex._read_versions

    async def late(*arguments: Any) -> None:
        await registry.publish("a", {"late": str(ObjectId()).encode()})
        await read_versions(*arguments)

    monkeypatch.setattr(reindex, "_read_versions", late)
    assert await registry.reindexed() == {"models": 3, "changed": 0}


async def test_what_is_published_before_the_write_is_counted(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction that has read collides with it, and begins anew."""
    derive, looks = reindex.derive, 0

    async def late(database: Database, session: AsyncClientSession, models: list[Row]) -> Any:
        nonlocal looks
        found = await derive(database, session, models)
        if session.in_transaction:
            looks += 1
            if looks == 1:
                await registry.publish("a", {"late": b"late"})
        return found

    await registry.break_("a")
    model_id = (await registry.model("a"))["_id"]
    # Where whoever publishes finds it.
    found = {"owner_login_lower": "ada", "name_lower": "a", "principals": ["public"]}
    await registry.database.data["models"].update_one({"_id": model_id}, {"$set": found})
    monkeypatch.setattr(reindex, "derive", late)
    assert await registry.reindexed(model_id) == {"models": 1, "changed": 1}
    assert looks == 2
    stats = (await registry.model("a"))["stats"]
    assert (stats["versions"], stats["files"], stats["size_bytes"]) == (5, 8, 3 + 4 + 8 + 4)
    monkeypatch.undo()
    assert await registry.reindexed() == {"models": 3, "changed": 0}
