"""Counts downloads: in the process first, so that a download writes nothing by itself."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from bson import ObjectId
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.models import trending_score_expression
from modelharbor.errors import Unavailable

from .counting import Gathered, flushing

log = logging.getLogger(__name__)
FLUSH_SECONDS: Final = 1.0
LEAVE_SECONDS: Final = 3600.0
WINDOW: Final = timedelta(days=30)
BATCH: Final = 500  # days of models that leave in one transaction


class DownloadCounter(Gathered[tuple[ObjectId, datetime]]):
    """Downloads, by model and day."""

    def count(self, model_id: ObjectId) -> None:
        self._waiting[model_id, _day(utc_now())] += 1

    async def _add(
        self, counts: Mapping[tuple[ObjectId, datetime], int], session: AsyncClientSession
    ) -> None:
        await self._database.data["downloads"].bulk_write(
            [
                UpdateOne(
                    {"model_id": model_id, "day": day},
                    {"$inc": {"downloads": count}, "$setOnInsert": {"in_window": True}},
                    upsert=True,
                )
                for (model_id, day), count in counts.items()
            ],
            ordered=False,
            session=session,
        )
        totals: Counter[ObjectId] = Counter()
        for (model_id, _), count in counts.items():
            totals[model_id] += count
        await self._database.data["models"].bulk_write(
            [
                UpdateOne({"_id": model_id}, counted(window=count, ever=count))
                for model_id, count in totals.items()
            ],
            ordered=False,
            session=session,
        )


def counted(*, window: int, ever: int) -> list[Row]:
    """Update of a model: so many more downloads (fewer, when negative), and what follows from it."""
    return [
        {
            "$set": {
                "stats.downloads_30d": {"$max": [0, {"$add": ["$stats.downloads_30d", window]}]},
                "stats.downloads_all": {"$add": ["$stats.downloads_all", ever]},
                "stats.as_of": "$$NOW",
            }
        },
        {"$set": {"stats.trending_score": trending_score_expression()}},
    ]


@asynccontextmanager
async def counting_downloads(database: Database) -> AsyncIterator[DownloadCounter]:
    """A counter that flushes each second, and once more at the end; old days leave the window each hour."""
    counter = DownloadCounter(database)

    async def leave() -> None:
        while not ended.is_set():  # PyMongo can turn a cancellation into an error of its own
            try:
                await leave_window(database)
            except (PyMongoError, Unavailable) as error:
                log.warning("downloads.window_not_left_yet error=%s", error)
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), LEAVE_SECONDS)

    ended = asyncio.Event()
    leaving = asyncio.create_task(leave())
    try:
        async with flushing(counter, FLUSH_SECONDS, "downloads.not_counted_yet"):
            yield counter
    finally:
        ended.set()
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving


async def leave_window(database: Database, now: datetime | None = None) -> int:
    """Subtract days that are 30 days old from `downloads_30d`; answers how many rows left.

    Each is subtracted once, whoever calls this at once: its flag falls in the same transaction.
    """
    last = _day(now or utc_now()) - WINDOW
    left = 0
    while True:
        rows = (
            await database.data["downloads"]
            .find({"in_window": True, "day": {"$lte": last}}, {"_id": 1})
            .limit(BATCH)
            .max_time_ms(database.query_timeout_ms)
            .to_list()
        )
        if not rows:
            return left
        ids = [row["_id"] for row in rows]
        left += await database.transaction(partial(_leave, database, ids))


async def _leave(database: Database, ids: list[ObjectId], session: AsyncClientSession) -> int:
    mine = {"_id": {"$in": ids}, "in_window": True}
    rows = (
        await database.data["downloads"]
        .find(mine, session=session)
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    if not rows:
        return 0
    await database.data["downloads"].update_many(
        mine, {"$set": {"in_window": False}}, session=session
    )
    totals: Counter[ObjectId] = Counter()
    for row in rows:
        totals[row["model_id"]] += row["downloads"]
    await database.data["models"].bulk_write(
        [
            UpdateOne({"_id": model_id}, counted(window=-count, ever=0))
            for model_id, count in totals.items()
        ],
        ordered=False,
        session=session,
    )
    return len(rows)


def _day(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)
