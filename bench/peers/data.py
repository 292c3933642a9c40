"""The one data set of all servers: demo models, with fewer old versions, and a stored series."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Final

from bench.serving import Filled, filled
from modelharbor.db.connection import Database, connect
from modelharbor.dev.demo import SEEDS

from .harbor import COLLECTION

DATABASE: Final = "modelharbor_bench_peers"
MODELS: Final = 10_000
FILES_PER_VERSION: Final = 3
NEWEST_VERSIONS: Final = 25  # kept of a model: 10,000 models then have 40,000 versions
LIBRARIES: Final = (
    *("transformers", "diffusers", "sentence-transformers", "gguf", "onnx"),
    *("timm", "peft", "keras", "spacy", "flair"),
)
DAYS: Final = 90
LAST_DAY: Final = datetime(2026, 11, 20, tzinfo=UTC)
MARKER: Final = "bench_peers"  # stands beside the demo's own
BATCH: Final = 1_000  # models or versions of one command


@dataclass(frozen=True, slots=True)
class Counts:
    models: int
    versions: int
    files: int
    points: int
    """Of the series."""


@asynccontextmanager
async def data_set(folder: Path) -> AsyncIterator[tuple[Filled, Counts]]:
    """Engines that hold the data set."""
    async with filled(
        folder, MODELS, database=DATABASE, files_per_version=FILES_PER_VERSION
    ) as data:
        async with connect(data.settings) as database:
            if await database.data[SEEDS].find_one({"_id": MARKER}) is None:
                print("Thinning out old versions, writing the series", file=sys.stderr)
                await _thin(database)
                await _write_series(database)
                await database.data[SEEDS].insert_one({"_id": MARKER})
            counts = await _count(database)
        yield data, counts


async def _thin(database: Database) -> None:
    """Leaves the newest versions of each model, and those that are pointed at."""
    versions, files = database.data["versions"], database.data["files"]
    models = (
        await database.data["models"].find({}, {"latest_version_id": 1, "aliases": 1}).to_list()
    )
    for start in range(0, len(models), BATCH):
        some = models[start : start + BATCH]
        pointed = {row["latest_version_id"] for row in some}
        pointed |= {alias["version_id"] for row in some for alias in row["aliases"]}
        old: list[Any] = []
        cursor = await versions.aggregate(
            [
                {"$match": {"model_id": {"$in": [row["_id"] for row in some]}}},
                {"$sort": {"model_id": 1, "number": -1}},
                {"$group": {"_id": "$model_id", "ids": {"$push": "$_id"}}},
            ]
        )
        async for row in cursor:
            old += [each for each in row["ids"][NEWEST_VERSIONS:] if each not in pointed]
        for first in range(0, len(old), BATCH):
            gone = old[first : first + BATCH]
            await files.delete_many({"version_id": {"$in": gone}})
            await versions.delete_many({"_id": {"$in": gone}})


async def _write_series(database: Database) -> None:
    """A row {library, points: [{day, downloads}]} for each library."""
    random = Random(1)
    days = [LAST_DAY - timedelta(days=before) for before in reversed(range(DAYS))]
    rows = [
        {
            "library": library,
            "points": [{"day": day, "downloads": random.randrange(10**9)} for day in days],
        }
        for library in LIBRARIES
    ]
    collection = database.data[COLLECTION]
    await collection.drop()
    await collection.create_index({"library": 1}, unique=True)
    await collection.insert_many(rows)


async def _count(database: Database) -> Counts:
    found = {
        name: await database.data[name].count_documents({})
        for name in ("models", "versions", "files", COLLECTION)
    }
    return Counts(found["models"], found["versions"], found["files"], found[COLLECTION] * DAYS)
