"""What a change concerns: each kind of change in each collection, as MongoDB tells it."""

from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.cache.tags import PARENTS, changed, tags_of, told_name, told_names
from modelharbor.db.base import Row
from modelharbor.db.cache import FOLLOWED
from modelharbor.db.connection import Database

from .hearing import Heard

pytestmark = pytest.mark.anyio


MODEL = {
    "name_lower": "bert",
    "owner_login_lower": "ann",
    "task": "ocr",
    "library": "pt",
    "principals": ["public", "actor:1"],
    "stats": {"likes": 0, "downloads_all": 0},
    "tags": ["a", "b"],
}
WITHIN = [
    "principal:public",
    "principal:actor:1",
    "task:ocr",
    "library:pt",
    "license:None",
    "owner_login_lower:ann",
]


def each_within(*names: str, within: list[str] = WITHIN) -> set[str]:
    return {
        tag
        for name in names
        for tag in (f"models.{name}", *(f"models.{name}@{value}" for value in within))
    }


async def test_a_model(heard: Heard) -> None:
    models, key = heard.data["models"], ObjectId()
    one = {f"models/{key}"}
    await models.insert_one({"_id": key, **MODEL})
    assert await heard.tags() == one | {"models+@*"} | {f"models+@{value}" for value in WITHIN}

    await models.update_one({"_id": key}, {"$set": {"summary": "x"}})
    assert await heard.tags() == one | each_within("summary")

    await models.update_one({"_id": key}, {"$inc": {"stats.likes": 1}})
    assert await heard.tags() == one | each_within("stats", "stats.likes")

    await models.update_one({"_id": key}, {"$set": {"tags.1": "c"}, "$unset": {"summary": 1}})
    assert await heard.tags() == one | each_within("tags", "summary")

    await models.update_one({"_id": key}, [{"$set": {"tags": ["a"]}}])
    assert await heard.tags() == one | each_within("tags")

    await models.update_one({"_id": key}, {"$set": {"properties": {"a": {"b": 1}}}})
    await models.update_one({"_id": key}, {"$set": {"properties.a.b": 2, "properties.c d": 3}})
    assert await heard.tags(2) == one | each_within("properties")

    await models.update_one({"_id": key}, {"$set": {"stats": {"likes": 9}}})
    found = await heard.tags()
    assert found >= one | each_within("stats", "stats.likes", "stats.trending_score")

    await models.update_one({"_id": key}, {"$set": {"task": "asr"}})
    after = [value.replace("ocr", "asr") for value in WITHIN]
    assert await heard.tags() == one | each_within("task", within=after)

    await models.update_one({"_id": key}, {"$set": {"principals": []}})
    after = after[2:]
    assert await heard.tags() == one | each_within("principals", within=after)

    await models.update_one({"_id": key}, {"$set": {"task": "asr"}})  # nothing is changed
    await models.delete_one({"_id": key})
    assert await heard.tags() == one | {"models-"}


async def test_a_model_that_is_replaced(heard: Heard) -> None:
    models, key = heard.data["models"], ObjectId()
    await models.insert_one({"_id": key, **MODEL})
    await heard.tags()
    await models.replace_one({"_id": key}, {"name_lower": "x", "task": "asr"})
    found = await heard.tags()
    within = ["task:asr", "library:None", "license:None", "owner_login_lower:None"]
    assert found >= each_within("task", "summary", "stats", "stats.likes", "aliases", within=within)
    assert found >= {f"models/{key}", "models+@*", "models+@task:asr"}
    assert not {tag for tag in found if "ocr" in tag or tag == "models-"}


async def test_a_model_that_is_gone_when_it_is_looked_up(heard: Heard) -> None:
    """Nobody knows any more in which lists it was."""
    key = ObjectId()
    change = {
        "kind": "update",
        "coll": "models",
        "id": key,
        "names": ["summary"],
        "document": None,
    }
    assert set(tags_of(change)) == {f"models/{key}", "models.summary", "models-"}
    assert set(tags_of({**change, "kind": "unheard of"})) == {f"models/{key}", "models-"}


@pytest.mark.parametrize("collection", sorted(PARENTS))
async def test_what_is_below_a_parent(heard: Heard, collection: str) -> None:
    rows, key = heard.data[collection], ObjectId()
    parents = {name: ObjectId() for name in PARENTS[collection]}
    one = {f"{collection}/{key}"}
    lists = {f"{collection}?{name}={value}" for name, value in parents.items()}
    await rows.insert_one({"_id": key, **parents, "number": 1, "path": "p"})
    assert await heard.tags() == one | lists | {f"{collection}+@*"}

    await rows.update_one({"_id": key}, {"$set": {"status": "READY"}})
    assert await heard.tags() == one | lists | {f"{collection}.status"}

    # Where it was before is not told.
    name, other = PARENTS[collection][0], ObjectId()
    await rows.update_one({"_id": key}, {"$set": {name: other}})
    found = await heard.tags()
    assert found >= one | {f"{collection}?{name}={other}", f"{collection}.{name}", f"{collection}-"}

    await rows.replace_one({"_id": key}, {**parents, "number": 1, "path": "p"})
    found = await heard.tags()
    assert found >= one | lists | {f"{collection}-", f"{collection}+@*"}

    await rows.delete_one({"_id": key})
    assert await heard.tags() == one | {f"{collection}-"}


@pytest.mark.parametrize("collection", ["actors", "cards", "persisted_documents"])
async def test_what_has_no_parent(heard: Heard, collection: str) -> None:
    rows, key = heard.data[collection], ObjectId()
    one = {f"{collection}/{key}"}
    named: Row = {"login_lower": str(key), "client": str(key), "document_id": str(key)}
    await rows.insert_one({"_id": key, **named})
    assert await heard.tags() == one | {f"{collection}+@*"}
    await rows.update_one({"_id": key}, {"$set": {"html": "x"}})
    assert await heard.tags() == one | {f"{collection}.html"}
    await rows.delete_one({"_id": key})
    assert await heard.tags() == one | {f"{collection}-"}


async def test_contents_are_known_by_their_hash(heard: Heard) -> None:
    blobs, key = heard.data["blobs"], ObjectId()
    sha256, other = "a" * 64, "b" * 64
    await blobs.insert_one({"_id": key, "sha256": sha256})
    assert await heard.tags() == {f"blobs/{sha256}", "blobs+@*"}
    await blobs.update_one({"_id": key}, {"$set": {"inspection": {"verdict": "SAFE"}}})
    assert await heard.tags() == {f"blobs/{sha256}", "blobs.inspection"}
    await blobs.update_one({"_id": key}, {"$set": {"sha256": other}})
    assert await heard.tags() == {f"blobs/{other}", "blobs.sha256", "blobs-"}
    await blobs.delete_one({"_id": key})
    assert await heard.tags() == {"blobs-"}


async def test_that_a_token_was_used_is_not_told(heard: Heard) -> None:
    tokens, key, user = heard.data["tokens"], ObjectId(), ObjectId()
    await tokens.insert_one({"_id": key, "user_id": user})
    await heard.tags()
    now = datetime.now(UTC)
    await tokens.update_one({"_id": key}, {"$set": {"last_used_at": now}})
    await tokens.update_one({"_id": key}, {"$set": {"revoked_at": now, "name": "x"}})
    found = await heard.tags()
    assert found == {f"tokens/{key}", f"tokens?user_id={user}", "tokens.revoked_at", "tokens.name"}


async def test_other_collections_are_not_told(heard: Heard) -> None:
    for name in ("jobs", "events", "likes", "uploads", "log"):
        await heard.data[name].insert_one({"_id": ObjectId(), "user_id": ObjectId()})
        await heard.data[name].delete_many({})
    await heard.data["versions"].insert_one({"model_id": 1, "number": 1})
    assert await heard.tags() >= {"versions+@*"}


async def test_each_change_of_a_transaction_is_told(heard: Heard, database: Database) -> None:
    keys = [ObjectId() for _ in range(3)]

    async def work(session: Any) -> None:
        for key in keys:
            await database.data["versions"].insert_one(
                {"_id": key, "model_id": key, "number": 1}, session=session
            )
        await database.data["versions"].update_one(
            {"_id": keys[0]}, {"$set": {"label": "x"}}, session=session
        )

    await database.transaction(work)
    found = await heard.tags(4)
    assert found >= {f"versions/{key}" for key in keys} | {"versions.label"}
    assert len(set(heard.times[-4:])) == 1


def test_names_are_told_as_what_they_are_in() -> None:
    assert told_name("models", "tags.3") == "tags"
    assert told_name("models", "aliases.0.version_id") == "aliases"
    assert told_name("models", "properties.a.b") == "properties"
    assert told_name("models", "stats.likes") == "stats.likes"
    assert told_name("models", "stats.of another version") == "stats"
    assert told_name("unknown", "a.b") == "a"
    assert told_names("models", "stats.likes") == ("stats", "stats.likes")
    assert set(told_names("models", "stats")) >= {"stats", "stats.likes", "stats.trending_score"}
    assert changed("models", "properties.layers", "task:ocr") == "models.properties@task:ocr"
    assert changed("models", "stats.likes") == "models.stats.likes"


def test_whatever_has_a_tag_is_followed() -> None:
    assert set(PARENTS) | {"models", "actors", "cards", "blobs"} <= set(FOLLOWED)
