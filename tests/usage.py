"""Usage events for tests, as they are recorded; and rolling them up at once, without a worker."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from bson import ObjectId

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.rollups import naive
from modelharbor.db.usage import EVENT_INDEX, UsageKind, collection_of
from modelharbor.settings import Settings
from modelharbor.worker import rolling_up
from modelharbor.worker.rollups import Adding, aware, ensure_state
from modelharbor.worker.usage_intake import Intake, dirty_minutes


def usage(kind: UsageKind, at: datetime, **values: Any) -> Row:
    """One event; a count of 1, unless it is said or means nothing."""
    common: Row = {} if kind in {UsageKind.JOB, UsageKind.STORAGE} else {"count": 1}
    return {"_id": ObjectId(), "kind": kind.value, "at": at, **common, **values}


async def insert_usage(database: Database, events: Iterable[Row]) -> list[Row]:
    """As the recorder writes them; those that are there by their ids are left out. Answers the new."""
    by_day: dict[str, list[Row]] = {}
    for event in events:
        by_day.setdefault(collection_of(aware(naive(event["at"]))), []).append(
            {"_id": ObjectId(), **event}
        )
    new: list[Row] = []
    for name, some in by_day.items():
        collection = database.data[name]
        await collection.create_indexes([EVENT_INDEX])
        ids = [event["_id"] for event in some]
        there = {row["_id"] async for row in collection.find({"_id": {"$in": ids}}, {"_id": 1})}
        fresh = list({event["_id"]: event for event in some if event["_id"] not in there}.values())
        if fresh:
            await collection.insert_many(fresh, ordered=False)
        new += fresh
    if marks := dirty_minutes(new, "test"):
        await database.data["usage_dirty"].bulk_write(marks, ordered=False)
    return new


async def roll_up(
    database: Database, settings: Settings, *, now: datetime | None = None
) -> rolling_up.Ran:
    """Whole runs, after all models were compared with what they are counted as."""
    moment = now or utc_now()
    state = await ensure_state(database, settings, moment)
    intake = Intake(Adding(database, settings, state), naive(moment))
    after, _ = await intake.compare(None)
    while after is not None:
        after, _ = await intake.compare(after)
    ran = await rolling_up.roll_up(database, settings, now=now)
    while ran.is_moving:
        ran = await rolling_up.roll_up(database, settings, now=now)
    return ran
