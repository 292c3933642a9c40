"""Steps that bring a database to this version's shape: numbered, recorded, one process at a time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import pymongo
from bson import ObjectId
from pymongo import ReplaceOne, UpdateOne
from pymongo.errors import DuplicateKeyError

from .base import utc_now
from .connection import Database
from .documents import DOCUMENTS
from .files import path_key
from .history import fill_pointed
from .rollups import (
    HOME_READ,
    STATE,
    Cuboid,
    Grain,
    Groups,
    coarser,
    naive,
    new_home,
    new_state,
    of_audiences,
    row_of,
)
from .usage import EVENT_INDEX, UsageKind, collection_of, day_of

STEP_SECONDS = 3600  # an index over many rows takes longer than any request may
PATHS_AT_ONCE = 1000
ROWS_AT_ONCE = 1000
NOON = timedelta(hours=12)
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


async def order_events(database: Database) -> None:
    """The collections and indexes of jobs and of the log; for events of before, whom they concern, who
    may see them, and an order: that of their ids, before all that follow. Again, it does the rest."""
    await create_indexes(database)
    await _create_collection(database, "log")
    now = (await database.data.command("hello"))["operationTime"]
    events = database.data["events"]
    cursor = await events.aggregate(
        [
            {"$match": {"position": None}},
            {
                "$lookup": {
                    "from": "models",
                    "localField": "model_id",
                    "foreignField": "_id",
                    "as": "of",
                }
            },
            {"$set": {"of": {"$first": "$of"}, "role": {"$eq": ["$kind", "ROLE_GRANTED"]}}},
            {
                "$set": {
                    "owner_id": {"$ifNull": ["$organization_id", "$of.owner_id"]},
                    "person_id": "$after.actor_id",
                }
            },
            {
                "$project": {
                    "stream": {"$cond": ["$role", "people", "models"]},
                    "about": _known(
                        {
                            "$cond": [
                                "$role",
                                ["$owner_id", "$person_id"],
                                ["$model_id", "$owner_id", "$version_id"],
                            ]
                        }
                    ),
                    "principals": {
                        "$cond": [
                            "$role",
                            _known([_principal("$owner_id"), _principal("$person_id")]),
                            {"$ifNull": ["$of.principals", []]},
                        ]
                    },
                    "position": {"$toString": "$_id"},  # as long, and it begins with the second too
                }
            },
            {"$merge": {"into": "events", "whenMatched": "merge", "whenNotMatched": "discard"}},
        ]
    )
    await cursor.to_list()
    # Ids of this very second, or of a clock that was ahead.
    late = {
        "stream": {"$in": ["models", "people"]},
        "position": {"$gte": f"{now.time:08x}{now.inc:08x}00000000"},
    }
    number = 0x8000_0000
    async for row in events.find(late, {"_id": 1}).sort("_id", 1):
        place = f"{now.time:08x}{now.inc - 1:08x}{number:08x}"
        await events.update_one({"_id": row["_id"]}, {"$set": {"position": place}})
        number += 1
    # From `now` on the recorder counts, also those that an older version has written meanwhile.
    place = f"{now.time:08x}{now.inc:08x}00000000"
    await database.data["log"].update_one(
        {"_id": "events"},
        {"$setOnInsert": {"recorded": place, "began": "0" * 24, "owner": None, "until": None}},
        upsert=True,
    )


async def take_uploads(database: Database) -> None:
    """The collections and indexes of uploads; what versions, models, files and contents have new."""
    await create_indexes(database)
    absent = {"$exists": False}
    new: dict[str, dict[str, Any]] = {
        "versions": {"status_reason": None, "parameters": None},
        "models": {"parameters": 0},
        "blobs": dict.fromkeys(("key", "verified_at", "damaged_at", "inspection")),
    }
    for collection, fields in new.items():
        first = next(iter(fields))
        await database.data[collection].update_many({first: absent}, {"$set": fields})
    files = database.data["files"]
    # MongoDB lowers only what is ASCII.
    others = {"path_key": absent, "path": {"$regex": r"[^\x00-\x7f]"}}
    updates: list[UpdateOne] = []
    async for row in files.find(others, {"path": 1}):
        updates.append(
            UpdateOne({"_id": row["_id"]}, {"$set": {"path_key": path_key(row["path"])}})
        )
        if len(updates) == PATHS_AT_ONCE:
            await files.bulk_write(updates, ordered=False)
            updates = []
    if updates:
        await files.bulk_write(updates, ordered=False)
    await files.update_many({"path_key": absent}, [{"$set": {"path_key": {"$toLower": "$path"}}}])


async def take_usage(database: Database) -> None:
    """The collections and indexes of usage; downloads that were counted by day become rows. Again, it
    does the rest.

    Nobody knows at what time of a day they were: in rows by quarter they stand at noon, UTC, which in
    nearly all timezones is the same day. Those of today are an event, since others follow.
    """
    await create_indexes(database)
    data = database.data
    for name in ("unique_downloaders_30d", "use_1d", "use_7d", "use_30d"):
        field = f"stats.{name}"
        await data["models"].update_many({field: {"$exists": False}}, {"$set": {field: 0}})
    if await data["models"].find_one({}, {"_id": 1}) is None:
        return
    now = utc_now()
    today = day_of(now)
    await _settle_in(database)
    counted = data["downloads"]
    await counted.create_index([("day", 1)])
    days = await counted.distinct("day")
    for day in sorted(day for day in days if day < today):
        await _take_day(database, day)
    await _take_today(database, today)
    recorded = await data["log"].find_one({"_id": "events"})
    state = new_state(
        now, whole_from=today, position=recorded["recorded"] if recorded else "0" * 24
    )
    # As if nothing had run for long: windows of all models are looked at.
    state |= {"stats_day": today - timedelta(days=60), "began": min(days) if days else None}
    await data["rollup_state"].update_one({"_id": STATE}, {"$setOnInsert": state}, upsert=True)
    await counted.drop()


async def _settle_in(database: Database) -> None:
    """A home for each model, with the downloads that no day has."""
    sums = await database.data["downloads"].aggregate(
        [{"$group": {"_id": "$model_id", "downloads": {"$sum": "$downloads"}}}], allowDiskUse=True
    )
    by_model = {row["_id"]: row["downloads"] async for row in sums}
    homes: list[ReplaceOne[dict[str, Any]]] = []
    projection = {**HOME_READ, "stats.downloads_all": 1}
    async for model in database.data["models"].find({}, projection):
        before = model["stats"]["downloads_all"] - by_model.get(model["_id"], 0)
        home = {**new_home(model), "downloads_before": max(0, before)}
        homes.append(ReplaceOne({"_id": model["_id"]}, home, upsert=True))
        if len(homes) == ROWS_AT_ONCE:
            await database.data["rollup_homes"].bulk_write(homes, ordered=False)
            homes = []
    if homes:
        await database.data["rollup_homes"].bulk_write(homes, ordered=False)


async def _take_day(database: Database, day: datetime) -> None:
    rows = await database.data["downloads"].find({"day": day}).to_list()
    fine: Groups = {
        (Cuboid.MODEL_ALL.value, row["model_id"], None, None, None, None): {
            "downloads": row["downloads"]
        }
        for row in rows
    }
    ids = {"_id": {"$in": [row["model_id"] for row in rows]}}
    homes = {row["_id"]: row async for row in database.data["rollup_homes"].find(ids)}
    for grain, at in ((Grain.QUARTER, day + NOON), (Grain.DAY, day)):
        groups = {**fine, **coarser(fine, grain)}
        groups |= of_audiences(groups, homes)
        made = [row_of(key, at, sums, 0) for key, sums in groups.items()]
        writes = [ReplaceOne({"_id": row["_id"]}, row, upsert=True) for row in made if row]
        for start in range(0, len(writes), ROWS_AT_ONCE):
            await database.data[grain.value].bulk_write(
                writes[start : start + ROWS_AT_ONCE], ordered=False
            )


async def _take_today(database: Database, today: datetime) -> None:
    events = database.data[collection_of(today)]
    await events.create_indexes([EVENT_INDEX])
    writes = [
        ReplaceOne(
            {"_id": f"before:{row['model_id']}"},
            {
                "at": today,
                "kind": UsageKind.DOWNLOAD.value,
                "model": row["model_id"],
                "count": row["downloads"],
                "bytes": 0,
            },
            upsert=True,
        )
        async for row in database.data["downloads"].find({"day": {"$gte": today}})
    ]
    if writes:
        await events.bulk_write(writes, ordered=False)
        await database.data["usage_dirty"].update_one(
            {"minute": naive(today), "process": "before"}, {"$inc": {"marks": 1}}, upsert=True
        )


async def keep_history(database: Database) -> None:
    """For events of before, what names pointed at after them. Again, it does the rest."""
    await create_indexes(database)
    await fill_pointed(database)


def _known(array: object) -> dict[str, object]:
    """Without what is not there: the model may be gone."""
    return {"$filter": {"input": array, "cond": {"$gt": ["$$this", None]}}}


def _principal(field: str) -> dict[str, object]:
    return {"$concat": ["actor:", {"$toString": field}]}


Migration = Callable[[Database], Awaitable[None]]
MIGRATIONS: list[tuple[int, str, Migration]] = [
    (1, "collections and indexes", create_indexes),
    (2, "jobs and the order of events", order_events),
    (3, "uploads and inspections", take_uploads),
    (4, "published operations", create_indexes),
    (5, "what is kept", create_indexes),
    (6, "usage and what it adds up to", take_usage),
    (7, "where names pointed", keep_history),
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
