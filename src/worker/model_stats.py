"""`models.stats`, as far as they are of use: from rows by day."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from bson import ObjectId
from pymongo import UpdateOne

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import trending_score_expression
from modelharbor.db.rollups import Cuboid, Grain, bucket_query, bucket_starts, distinct

from .rollups import DAY, Adding

MODELS_AT_ONCE: Final = 500
WINDOWS: Final = (1, 7, 30)
LONGEST: Final = 31  # days without a run after which all that can be in a window is looked at
DAYS: Final = Grain.DAY.value
OF_MODEL: Final = Cuboid.MODEL.value


async def refresh(adding: Adding, models: Sequence[ObjectId], today: datetime) -> int:
    """Write what these models' stats come to where they say something else; answers how many did."""
    written = 0
    for start in range(0, len(models), MODELS_AT_ONCE):
        adding.check()
        written += await _refresh(adding.database, models[start : start + MODELS_AT_ONCE], today)
    return written


async def _refresh(database: Database, models: Sequence[ObjectId], today: datetime) -> int:
    those: Row = {"$in": list(models)}
    stats = {
        row["_id"]: row.get("stats") or {}
        for row in await database.find("models", {"_id": those}, projection={"stats": 1})
    }
    if not stats:
        return 0
    settled = await _settled(database, list(stats), _settling(today))
    found: dict[ObjectId, _Use] = {each: _Use(settled.get(each, 0)) for each in stats}
    rows = await database.find(
        DAYS,
        {"cuboid": OF_MODEL, "model": those, "at": {"$gte": _settling(today)}},
        projection={"model": 1, "at": 1, "downloads": 1, "likes": 1, "who": 1},
    )
    for row in rows:
        if row["model"] in found:
            found[row["model"]].add(row, (today - row["at"]).days)
    updates = []
    for model, use in found.items():
        wanted = use.stats()
        if any(stats[model].get(name) != value for name, value in wanted.items()):
            updates.append(UpdateOne({"_id": model}, _update(wanted)))
    if updates:
        await database.data["models"].bulk_write(updates, ordered=False)
    return len(updates)


def _update(wanted: Row) -> list[Row]:
    fields: Row = {f"stats.{name}": value for name, value in wanted.items()}
    return [
        {"$set": {**fields, "stats.as_of": "$$NOW"}},
        {"$set": {"stats.trending_score": trending_score_expression()}},
    ]


class _Use:
    """Of one model."""

    def __init__(self, settled: int) -> None:
        self._ever = settled
        self._downloads = dict.fromkeys(WINDOWS, 0)
        self._likes = dict.fromkeys(WINDOWS, 0)
        self._who: set[int] = set()

    def add(self, row: Row, age: int) -> None:
        """`age`: in days; today's is 0. What a clock ahead has recorded counts as today's."""
        downloads = row.get("downloads", 0)
        self._ever += downloads
        for window in WINDOWS:
            if age < window:
                self._downloads[window] += downloads
                self._likes[window] += row.get("likes", 0)
        if age < WINDOWS[-1]:
            self._who.update(row.get("who", ()))

    def stats(self) -> dict[str, Any]:
        use = {
            f"use_{window}d": max(0, self._downloads[window] + 10 * self._likes[window])
            for window in WINDOWS
        }
        return {
            "downloads_30d": self._downloads[30],
            "downloads_all": self._ever,
            "unique_downloaders_30d": distinct(self._who)[0],
            **use,
        }


# What is long ago -------------------------------------------------------------------------------


def _settling(today: datetime) -> datetime:
    """The first day of the month that was 31 days ago: what is before is added up once a month."""
    return (today - timedelta(days=31)).replace(day=1)


async def _settled(
    database: Database, models: Sequence[ObjectId], until: datetime
) -> dict[ObjectId, int]:
    """Downloads of all days before, with those of before there were any."""
    homes = await database.find(
        "rollup_homes",
        {"_id": {"$in": list(models)}},
        projection={"downloads_before": 1, "downloads_until": 1, "downloads_settled": 1},
    )
    found = {
        row["_id"]: row.get("downloads_before", 0) + row.get("downloads_settled", 0)
        for row in homes
    }
    old = [row for row in homes if row.get("downloads_until") != until]
    if not old:
        return found
    sums = await database.aggregate(
        DAYS,
        [
            {
                "$match": {
                    "cuboid": OF_MODEL,
                    "model": {"$in": [row["_id"] for row in old]},
                    "at": {"$lt": until},
                }
            },
            {"$group": {"_id": "$model", "downloads": {"$sum": "$downloads"}}},
        ],
    )
    by_model = {row["_id"]: row["downloads"] for row in sums}
    updates = []
    for row in old:
        downloads = by_model.get(row["_id"], 0)
        found[row["_id"]] = row.get("downloads_before", 0) + downloads
        settled = {"downloads_until": until, "downloads_settled": downloads}
        updates.append(UpdateOne({"_id": row["_id"]}, {"$set": settled}))
    await database.data["rollup_homes"].bulk_write(updates, ordered=False)
    return found


async def unsettle(database: Database, models: Sequence[ObjectId], day: datetime) -> None:
    """A day of theirs was made anew."""
    for start in range(0, len(models), MODELS_AT_ONCE):
        some = list(models[start : start + MODELS_AT_ONCE])
        await database.data["rollup_homes"].update_many(
            {"_id": {"$in": some}, "downloads_until": {"$gt": day}},
            {"$unset": {"downloads_until": 1}},
        )


async def leaving(adding: Adding, last: datetime, today: datetime) -> list[ObjectId]:
    """Models of whose windows days have left since they ended with the day `last`."""
    passed = (today - last).days
    found: set[ObjectId] = set()
    if passed > LONGEST:
        spans = [(last - (WINDOWS[-1] - 1) * DAY, today + DAY)]
    else:
        spans = [(last - (window - 1) * DAY, today - (window - 1) * DAY) for window in WINDOWS]
    for day in sorted({day for span in spans for day in bucket_starts(Grain.DAY, *span)}):
        adding.check()
        rows = await adding.aggregate(
            Grain.DAY,
            [
                {"$match": bucket_query([OF_MODEL], day, day + DAY)},
                {"$group": {"_id": "$model"}},
            ],
        )
        found.update(row["_id"] for row in rows)
    return sorted(found)
