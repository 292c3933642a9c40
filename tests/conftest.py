"""What tests share: one real mongod and redis-server for the session, an empty database for each test."""

import asyncio
import gc
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pymongo
import pytest
from pymongo.read_concern import ReadConcern

from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import migrate
from modelharbor.dev.engines import Engines, run_engines
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from tests.asking import Asker

LONG = {"faults", "histories"}
"""Folders of tests with few tests that take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests and long files first: in the end all processes have something to do."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.parent.name not in LONG, -tests[item.path], item.path))


def pytest_collection_finish() -> None:
    """What is loaded by now stays to the end: no collection of garbage need look through it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Yours by URL in the environment, else started here and ended after the last test."""
    with (
        tempfile.TemporaryDirectory(prefix="modelharbor-") as folder,
        asyncio.Runner() as runner,
    ):
        context = run_engines(
            Path(folder),
            mongo_url=os.environ.get("MODELHARBOR_MONGO_URL"),
            redis_url=os.environ.get("MODELHARBOR_REDIS_URL"),
            fast=True,
            cache_gigabytes=0.25,
        )
        yield runner.run(context.__aenter__())
        runner.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def migrated_database(engines: Engines) -> Iterator[str]:
    """The name of a database of this session with all its collections and indexes."""
    name = f"test_{uuid4().hex[:12]}"
    settings = Settings(mongo_url=engines.mongo_url, mongo_database=name)

    async def make() -> None:
        async with connect(settings) as database:
            await migrate(database)

    async def drop() -> None:
        async with connect(settings) as database:
            await database.client.drop_database(name)

    asyncio.run(make())
    yield name
    asyncio.run(drop())


@pytest.fixture
def settings(engines: Engines, migrated_database: str, tmp_path: Path) -> Settings:
    return Settings(
        mongo_url=engines.mongo_url,
        mongo_database=migrated_database,
        redis_url=engines.redis_url,
        data_path=tmp_path,
        environment="test",
        # Tests write to the database itself and look at once, and count commands: what is kept would
        # be heard of a moment later. Those of caches switch it on; those of usage, its recording.
        response_cache=False,
        usage_recording=False,
    )


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """Connected and migrated; emptied after the test, its indexes stay."""
    async with connect(settings) as database:
        yield database
        with pymongo.timeout(120):  # some tests leave much behind
            for name in await filled(database):
                await database.data[name].delete_many({})


async def filled(database: Database) -> list[str]:
    """The collections with rows: one question for all, where to empty each took longer than most tests."""
    names = set(await database.data.list_collection_names()) - {"migrations"}
    told = [
        {"$unionWith": {"coll": name, "pipeline": [{"$limit": 1}, {"$project": {"_id": name}}]}}
        for name in names
    ]
    # Also what is not on a majority yet.
    local = database.data.with_options(read_concern=ReadConcern("local"))
    rows = await local.aggregate([{"$documents": []}, *told])
    return [row["_id"] async for row in rows]


@pytest.fixture
async def ask(database: Database, settings: Settings) -> AsyncIterator[Asker]:
    """Runs operations on the schema directly."""
    async with connect_cache(settings) as cache, open_storage(settings) as storage:
        await cache.redis.flushdb()
        yield Asker(database, cache, settings, storage)
