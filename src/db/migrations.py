"""Steps that bring a database to this version's shape: numbered, recorded, one process at a time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pymongo
from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from .base import utc_now
from .connection import Database
from .documents import DOCUMENTS

STEP_SECONDS = 3600  # an index over many rows takes longer than any request may
LEASE = timedelta(seconds=60)  # a process that died while migrating holds the others up no longer


async def create_indexes(database: Database) -> None:
    """Create every declared index; those that exist are left alone."""
    for document in DOCUMENTS:
        indexes = document.get_settings().indexes
        if indexes:
            await database.data[document.get_collection_name()].create_indexes(
                [index.index for index in indexes]
            )
        else:
            await _create_collection(database, document.get_collection_name())


async def _create_collection(database: Database, name: str) -> None:
    if name not in await database.data.list_collection_names():
        await database.data.create_collection(name)


Migration = Callable[[Database], Awaitable[None]]
MIGRATIONS: list[tuple[int, str, Migration]] = [
    (1, "collections and indexes", create_indexes),
]


async def applied(database: Database) -> list[int]:
    rows = (
        await database.data["migrations"]
        .find({"_id": {"$type": "int"}})
        .sort("_id", 1)
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    return [row["_id"] for row in rows]


async def pending(database: Database) -> list[str]:
    done = set(await applied(database))
    return [f"{number} {name}" for number, name, _ in MIGRATIONS if number not in done]


async def migrate(database: Database) -> list[str]:
    """Apply what is pending; answers its names. Several processes may call it at once."""
    async with _alone(database):
        done, did = set(await applied(database)), []
        for number, name, step in MIGRATIONS:
            if number in done:
                continue
            with pymongo.timeout(STEP_SECONDS):
                await step(database)
            await database.data["migrations"].insert_one(
                {"_id": number, "name": name, "at": utc_now()}
            )
            did.append(f"{number} {name}")
        return did


@asynccontextmanager
async def _alone(database: Database) -> AsyncIterator[None]:
    """While this holds, no other process migrates. Waits for one that does."""
    locks, owner = database.data["migrations"], ObjectId()
    while True:
        try:
            await locks.find_one_and_update(
                {"_id": "lock", "until": {"$lt": utc_now()}},
                {"$set": {"owner": owner, "until": utc_now() + LEASE}},
                upsert=True,
            )
            break
        except DuplicateKeyError:
            await asyncio.sleep(0.2)

    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE.total_seconds() / 3)
            until = {"$set": {"until": utc_now() + LEASE}}
            await locks.update_one({"_id": "lock", "owner": owner}, until)

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewing.cancel()
        await locks.delete_one({"_id": "lock", "owner": owner})
