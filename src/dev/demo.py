"""Puts the demo data into a database and its store, and takes it out again."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import pymongo
from pymongo import WriteConcern
from pymongo.errors import BulkWriteError, DuplicateKeyError

from modelharbor.db.base import BaseDocument, Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.documents import DOCUMENTS
from modelharbor.db.files import BlobDocument, FileDocument
from modelharbor.db.migrations import migrate
from modelharbor.db.models import CardDocument, ModelDocument
from modelharbor.db.rollups import RollupStateDocument
from modelharbor.db.usage import EVENT_INDEX, day_of_collection
from modelharbor.db.versions import VersionDocument
from modelharbor.inspection.fence import Fence
from modelharbor.resolvers.inspections import inspect_blob
from modelharbor.storage.blobs import BlobStore, blob_key

from .population import MONSTER_FILES, MONSTER_VERSIONS, THIN_ABOVE, Population, Shape
from .samples import SampleModel, make_samples
from .usage import DEMO, LONGEST, Usage

SEEDS: Final = "seeds"
MARKER: Final = "demo"
DUPLICATE: Final = 11000  # MongoDB's code
BATCH: Final = 1_000  # rows of an insert
AT_ONCE: Final = 4  # inserts, or inspections, under way
REPORTS_PER_SECOND: Final = 5
LONGEST_SECONDS: Final = (
    4 * 3600.0
)  # of one seeding; the timeouts of requests are far too short here
USAGE_ROWS: Final = 120  # of a model, nearly
REBUILD_ROWS: Final = 50_000  # indexes built afterwards: 16 s, not 22, with 228,000 rows
REBUILT: Final[tuple[type[BaseDocument], ...]] = (
    ModelDocument,
    VersionDocument,
    FileDocument,
    BlobDocument,
)
INDEXES: Final = 1  # number of the migration that creates them


class SeedRefused(Exception):
    """Nothing was written; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class SeedMarker:
    """What the database was seeded with. `complete` is false while it happens, and after a crash."""

    models: int
    seed: int
    files_per_version: int | None
    monsters: bool
    monster_versions: int
    monster_files: int
    complete: bool
    usage: bool = False


@dataclass(frozen=True, slots=True)
class SeedProgress:
    """Models done of all, rows written, seconds passed and left, bytes on MongoDB's disk in the end.

    `eta` is None at the beginning, and at the end while the indexes are built.
    """

    done: int
    total: int
    rows: int
    seconds: float
    eta: float | None
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class SeedResult:
    """`rows` by collection, empty when everything was there already. `usage`: to be added."""

    marker: SeedMarker
    rows: dict[str, int]
    seconds: float
    usage: Usage | None = None


# Measured with 10,000 models: compressed rows, indexes, and once more the row in the log of changes.
BYTES_PER_ROW: Final = {
    ModelDocument.Settings.name: 1_500,
    VersionDocument.Settings.name: 450,
    FileDocument.Settings.name: 400,
    BlobDocument.Settings.name: 380,
    CardDocument.Settings.name: 600,
}


def estimate_disk(rows: dict[str, int]) -> int:
    """Bytes on the disk of MongoDB, with indexes and the log of changes, for rows by collection."""
    return sum(BYTES_PER_ROW.get(name, 400) * count for name, count in rows.items())


async def seeded(database: Database) -> SeedMarker | None:
    """What the database was seeded with; None when it was not."""
    row = await database.data[SEEDS].find_one({"_id": MARKER})
    return SeedMarker(**row["arguments"], complete=row["complete"]) if row else None


async def seed(
    database: Database,
    storage: BlobStore,
    *,
    models: int,
    monsters: bool = False,
    files_per_version: int | None = None,
    seed: int = 1,
    monster_versions: int = MONSTER_VERSIONS,
    monster_files: int = MONSTER_FILES,
    usage: bool | None = None,
    usage_later: bool = False,
    now: datetime | None = None,
    fence: Fence | None = None,
    report: Callable[[SeedProgress], None] = lambda progress: None,
) -> SeedResult:
    """Fill an empty database; nothing to do when the same is there already.

    What it stores is inspected in the `fence`, where there is one. `files_per_version` None: as many as
    real models have, above 2,000 models one. `usage`: with that of the 90 days until `now`; None: up to
    2,000 models. `usage_later`: it is left to `add_usage`, and the demo unfinished until then.
    SeedRefused when the database holds something else or its disk is too small.
    """
    if files_per_version is None and models > THIN_ABOVE:
        files_per_version = 1
    try:
        shape = Shape(models, seed, files_per_version, monsters, monster_versions, monster_files)
    except ValueError as error:
        raise SeedRefused(str(error)) from None
    if usage is None:
        usage = models <= THIN_ABOVE
    marker = SeedMarker(**asdict(shape), complete=True, usage=usage)
    if await _is_there(database, marker):
        return SeedResult(marker, {}, 0.0)
    expected = await asyncio.to_thread(shape.count)
    rebuilds = sum(expected.values()) >= REBUILD_ROWS
    if usage:
        expected["usage"] = models * USAGE_ROWS
    disk = estimate_disk(expected)
    await migrate(database)
    await _check_disk(database, disk)
    report(SeedProgress(0, models, 0, 0.0, None, disk))
    with pymongo.timeout(LONGEST_SECONDS):
        await _begin(database, marker)
        made = await asyncio.to_thread(make_samples, shape.samples)
        await _store(storage, made)
        used = Usage(seed, now or utc_now()) if usage else None
        population = Population(shape, made)
        load = _Load(database, population, sum(expected.values()), disk, report)
        if rebuilds:
            await _drop_indexes(database)
        if used is not None:
            await load.run(iter([(RollupStateDocument.Settings.name, used.state)]))
        await load.run(_completed(population, used))
        load.tell(None)
        if fence is not None:
            await _inspect(database, storage, fence)
        await migrate(database)
        if used is not None and not usage_later:
            await _index(database, used)
            await load.run(used.rows())
            used = None
        if used is None:
            await _end(database)
        else:
            await database.data[SEEDS].update_one(
                {"_id": MARKER}, {"$set": {"usage_until": used.now}}
            )
        load.tell(0.0)
    return SeedResult(marker, load.counts, load.seconds, used)


async def add_usage(database: Database, usage: Usage) -> None:
    """What a seeding has left for later. Again, it does the rest."""
    with pymongo.timeout(LONGEST_SECONDS):
        await _index(database, usage)
        load = _Load(database, None, 0, 0, lambda progress: None, is_again=True)
        await load.run(usage.rows())
        await _end(database)


async def usage_left(database: Database) -> Usage | None:
    """What a seeding has left for later, and nobody has added yet, or not all of it: to be added before
    anybody adds up. None: nothing."""
    row = await database.data[SEEDS].find_one({"_id": MARKER})
    if row is None or row["complete"] or "usage_until" not in row:
        return None
    given = {name: value for name, value in row["arguments"].items() if name != "usage"}
    usage = Usage(given["seed"], row["usage_until"])
    await asyncio.to_thread(_take_again, Shape(**given), usage)
    held = {"owner": DEMO, "until": utc_now() + LONGEST}
    await database.data[RollupStateDocument.Settings.name].update_one({}, {"$set": held})
    return usage


def _take_again(shape: Shape, usage: Usage) -> None:
    """The same rows as were stored, for they are always the same."""
    for name, row in Population(shape, make_samples(shape.samples)).rows():
        usage.take(name, row)


async def _index(database: Database, usage: Usage) -> None:
    await database.data[usage.events].create_indexes([EVENT_INDEX])


async def _end(database: Database) -> None:
    """On a majority, as everything before it then is."""
    await database.data[RollupStateDocument.Settings.name].update_one(
        {}, {"$set": {"owner": None, "until": None}}
    )
    await database.data[SEEDS].update_one({"_id": MARKER}, {"$set": {"complete": True}})


def _completed(population: Population, usage: Usage | None) -> Iterator[tuple[str, Row]]:
    for name, row in population.rows():
        if usage is not None:
            usage.take(name, row)
        yield name, row


async def clear(database: Database, storage: BlobStore) -> None:
    """Empty the database, and remove the contents that it knows from the store."""
    blobs = database.data[BlobDocument.Settings.name]
    with pymongo.timeout(LONGEST_SECONDS):
        # Should this be interrupted, what is left counts as unfinished.
        await database.data[SEEDS].update_one({"_id": MARKER}, {"$set": {"complete": False}})
        async for row in blobs.find({"stored": True}, {"sha256": 1, "key": 1}):
            await storage.delete(blob_key(row))
        await _forget_indexes(database)
        events = await database.data.list_collection_names()
        for document in DOCUMENTS:
            await database.data.drop_collection(document.get_collection_name())
        for name in events:
            if day_of_collection(name) is not None:
                await database.data.drop_collection(name)
        await database.data.drop_collection(SEEDS)
        await migrate(database)


async def _is_there(database: Database, wanted: SeedMarker) -> bool:
    found = await seeded(database)
    if found == wanted:
        return True
    if found is not None:
        state = "another" if found.complete else "an unfinished"
        raise SeedRefused(
            f"The database holds {state} demo ({found.models:,} models, seed {found.seed}): --fresh empties it first."
        )
    for document in DOCUMENTS:
        name = document.get_collection_name()
        if await database.data[name].find_one({}, {"_id": 1}) is not None:
            raise SeedRefused(
                f"The database is not empty (there are {name}): choose another, or --fresh empties it first."
            )
    return False


async def _check_disk(database: Database, needed: int) -> None:
    """Of the machine where MongoDB keeps its data."""
    told = await database.data.command("dbStats")
    free = int(told["fsTotalSize"] - told["fsUsedSize"])
    if free < needed:
        raise SeedRefused(
            f"This takes about {needed / 1e9:.1f} GB of MongoDB's disk, where {free / 1e9:.1f} GB are free: "
            "take fewer models, or fewer files with --files-per-version."
        )


async def _begin(database: Database, marker: SeedMarker) -> None:
    arguments = {name: value for name, value in asdict(marker).items() if name != "complete"}
    try:
        await database.data[SEEDS].insert_one(
            {"_id": MARKER, "arguments": arguments, "complete": False, "at": utc_now()}
        )
    except DuplicateKeyError:
        raise SeedRefused("Another process is seeding this database.") from None


async def _store(storage: BlobStore, made: list[SampleModel]) -> None:
    files = {file.sha256: file for model in made for version in model.versions for file in version}
    with tempfile.TemporaryDirectory(prefix="modelharbor-seed-") as folder:
        for file in files.values():
            if isinstance(file.content, Path):
                await storage.put_file(file.content, file.sha256)
            else:
                path = Path(folder, file.sha256)
                await asyncio.to_thread(path.write_bytes, file.content)
                await storage.put_file(path, file.sha256)


async def _inspect(database: Database, storage: BlobStore, fence: Fence) -> None:
    """Contents that are stored. All others are known by their hash alone: nothing looks into them."""
    rows = iter(await database.find("blobs", {"stored": True}, projection={"sha256": 1}))

    async def inspect() -> None:
        # Several of these share one iterator: each takes the next when it is done with one.
        for row in rows:
            await inspect_blob(database, storage, fence, row["sha256"])

    await asyncio.gather(*(inspect() for _ in range(AT_ONCE)))


async def _forget_indexes(database: Database) -> None:
    """From here on `migrate` creates them anew, also after a crash."""
    await database.data["migrations"].delete_one({"_id": INDEXES})


async def _drop_indexes(database: Database) -> None:
    await _forget_indexes(database)
    for document in REBUILT:
        await database.data[document.get_collection_name()].drop_indexes()


class _Load:
    """Streams rows into their collections, a few batches at a time."""

    def __init__(
        self,
        database: Database,
        population: Population | None,
        expected: int,
        disk_bytes: int,
        report: Callable[[SeedProgress], None],
        *,
        is_again: bool = False,
    ) -> None:
        """`is_again`: rows that are there already stay."""
        self._is_again = is_again
        self.counts: dict[str, int] = {}
        self.seconds = 0.0
        self._population = population
        self._expected = expected
        self._disk_bytes = disk_bytes
        self._report = report
        self._rows = 0
        self._started = time.monotonic()
        self._places = asyncio.Semaphore(AT_ONCE)
        # Not each batch waits for the disk: the marker at the end does.
        self._data = database.data.with_options(write_concern=WriteConcern(w=1))

    async def run(self, rows: Iterator[tuple[str, Row]]) -> None:
        waiting: dict[str, list[Row]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for name, row in rows:
                    batch = waiting.setdefault(name, [])
                    batch.append(row)
                    if len(batch) == BATCH:
                        await self._places.acquire()
                        group.create_task(self._insert(name, waiting.pop(name)))
                for name, batch in waiting.items():
                    await self._places.acquire()
                    group.create_task(self._insert(name, batch))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # they all have one cause: callers know its type

    async def _insert(self, name: str, batch: list[Row]) -> None:
        try:
            await self._data[name].insert_many(batch, ordered=False)
        except BulkWriteError as error:
            if not self._is_again or any(each["code"] != DUPLICATE for each in _failed(error)):
                raise
        finally:
            self._places.release()
        self._rows += len(batch)
        self.counts[name] = self.counts.get(name, 0) + len(batch)
        passed = time.monotonic() - self._started
        if passed - self.seconds >= 1 / REPORTS_PER_SECOND:
            left = max(0, self._expected - self._rows)
            self.tell(left * passed / self._rows)

    def tell(self, eta: float | None) -> None:
        self.seconds = time.monotonic() - self._started
        if self._population is None:
            return
        done, total = self._population.done, self._population.shape.models
        progress = SeedProgress(done, total, self._rows, self.seconds, eta, self._disk_bytes)
        self._report(progress)


def _failed(error: BulkWriteError) -> list[Row]:
    found: list[Row] = error.details["writeErrors"]
    return found
