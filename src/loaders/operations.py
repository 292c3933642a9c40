"""What each operation of the API costs, from the rollups."""

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from math import ceil
from operator import add
from typing import Final

from bson import ObjectId

from modelharbor.db import conditions
from modelharbor.db.base import Row, utc_now
from modelharbor.db.calendar import moment, seconds_of
from modelharbor.db.keyset import Place, Window
from modelharbor.db.metrics import Sort
from modelharbor.db.rollups import SECONDS, Cuboid, Grain

from .analytics import AT_ONCE, HEAVY, of_operators, percentile
from .base import Loader, Sharing
from .pages import Total

MOST_OPERATIONS: Final = 1000
RANKED_BY: Final = {"calls": "requests", "errors": "errors", "db_queries_per_call": "commands"}
"""Which sum tells the operations that matter, by what they are sorted by; otherwise their time."""
LONG: Final = timedelta(days=7)
"""Of a longer time whole days are read, in UTC."""
_SUMS: Final = ("requests", "errors", "total_ms", "cost", "commands", "batches", "keys", "hits")


@dataclass(frozen=True, slots=True)
class NameWanted:
    """Conditions on an operation's name; all must hold."""

    eq: str | None = None
    one_of: tuple[str, ...] | None = None
    prefix: str = ""
    contains: str = ""

    def holds(self, name: str) -> bool:
        return (
            (self.eq is None or name == self.eq)
            and (self.one_of is None or name in self.one_of)
            and name.startswith(self.prefix)
            and self.contains in name
        )

    @property
    def query(self) -> Row:
        """The same on a field `name`."""
        return conditions.text(
            "name",
            eq=self.eq,
            one_of=self.one_of,
            prefix=self.prefix or None,
            contains=self.contains or None,
        )


@dataclass(frozen=True, slots=True)
class OperationsWanted:
    window: Window
    name: NameWanted = NameWanted()
    least_calls: int = 0
    begin: datetime | None = None
    end: datetime | None = None
    """Without them the last 24 hours."""


class OperationStatsLoader(Loader[str, Row, OperationsWanted]):
    """A page of operations: one command, that reads all of them. Where they are too many, for anybody can
    send operations of his own, those are read that matter most, after one more command has found them."""

    sharing = Sharing.EQUAL_RIGHTS

    async def batch_load(self, keys: list[str]) -> list[Row]:
        of_operators(self.reads.viewer)
        wanted = self.arguments
        found = [
            made
            for operation, sums in (await self.operations()).items()
            if (made := _stats(operation, sums))["calls"] >= max(1, wanted.least_calls)
            and wanted.name.holds(made["name"] or "")
        ]
        page = _page(wanted.window, found)
        return [page for _ in keys]

    async def operations(self) -> dict[str, Row]:
        wanted = self.arguments
        end = wanted.end or utc_now()
        begin = wanted.begin or end - timedelta(days=1)
        grain = Grain.DAY if end - begin > LONG else Grain.QUARTER
        most = self.reads.max_analytics_buckets // HEAVY[Sort.PERCENTILE]
        names = ("operation", "latencies", "last_at", *_SUMS)
        start = _start(begin, grain)
        query: Row = {
            "cuboid": Cuboid.API_OPERATION.value,
            "audience": None,  # by its index: these rows have none
            "at": {"$gte": start, "$lt": end},
        }
        fields = dict.fromkeys(names, 1) | {"_id": 0}
        database = self.reads.database
        rows = await database.find(grain.value, query, projection=fields, limit=most + 1)
        if len(rows) > most:
            buckets = ceil((seconds_of(end) - seconds_of(start)) / SECONDS[grain])
            ranked = await database.aggregate(
                grain.value, _ranked(wanted, query, max(1, most // buckets))
            )
            only = {**query, "operation": {"$in": [row["_id"] for row in ranked]}}
            rows = await database.find(grain.value, only, projection=fields)
        found: dict[str, Row] = {}
        for number, row in enumerate(rows):
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            sums = found.setdefault(row.get("operation", ""), {})
            for name in _SUMS:
                if name in row:
                    sums[name] = sums.get(name, 0) + row[name]
            if "latencies" in row:
                known = sums.get("latencies")
                latencies = row["latencies"]
                sums["latencies"] = list(map(add, known, latencies)) if known else latencies
            if "last_at" in row:
                sums["last_at"] = max(sums.get("last_at", row["last_at"]), row["last_at"])
        return found


def _ranked(wanted: OperationsWanted, query: Row, most: int) -> list[Row]:
    """The ids of the operations that matter most, without what the caller does not ask for."""
    total = RANKED_BY.get(wanted.window.order.path, "total_ms")
    name = {"$ifNull": [{"$arrayElemAt": [{"$split": ["$_id", ":"]}, 1]}, ""]}
    return [
        {"$match": query},
        {"$project": {"operation": 1, "requests": 1, total: 1}},
        {
            "$group": {
                "_id": "$operation",
                "calls": {"$sum": "$requests"},
                "total": {"$sum": f"${total}"},
            }
        },
        {"$set": {"name": name}},
        {"$match": {"calls": {"$gte": max(1, wanted.least_calls)}, **wanted.name.query}},
        {"$sort": {"total": -1, "_id": 1}},
        {"$limit": most},
        {"$project": {"_id": 1}},
    ]


def _start(at: datetime, grain: Grain) -> datetime:
    seconds = seconds_of(at)
    return moment(seconds - seconds % SECONDS[grain])


def _stats(operation: str, sums: Row) -> Row:
    calls = sums.get("requests", 0)
    latencies = sums.get("latencies", ())
    batches = sums.get("batches", 0)
    asked = calls - sums.get("hits", 0)  # whose answer was not there already
    return {
        "_id": ObjectId(sha256(operation.encode()).digest()[:12]),
        "operation": operation,
        "name": operation.partition(":")[2] or None,
        "calls": calls,
        "errors": sums.get("errors", 0),
        "total_ms": float(sums.get("total_ms", 0)),
        "p50_ms": percentile(latencies, 0.5),
        "p95_ms": percentile(latencies, 0.95),
        "p99_ms": percentile(latencies, 0.99),
        "average_cost": _ratio(sums.get("cost", 0), calls),
        "db_queries_per_call": _ratio(sums.get("commands", 0), calls),
        "loader_batch_size": _ratio(sums.get("keys", 0), batches),
        "cache_hit_ratio": _ratio(calls - asked, calls),
        "last_seen_at": sums.get("last_at"),
    }


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0


def _page(window: Window, found: list[Row]) -> Row:
    """As PageLoader makes it of what the database has cut."""
    order = window.order
    found.sort(key=lambda row: (order.value(row), row["_id"]), reverse=not order.ascending)
    found = found[:MOST_OPERATIONS]
    count = len(found)
    for place, side in ((window.after, 1), (window.before, -1)):
        if place is not None:
            found = [row for row in found if _side(window, row, place) == side]
    more = len(found) > window.limit
    nodes = found[-window.limit :] if window.backward else found[: window.limit]
    return {
        "nodes": nodes,
        "window": window,
        "has_next": window.before is not None if window.backward else more,
        "has_previous": more if window.backward else window.after is not None,
        "total": Total("operations", known=count),
    }


def _side(window: Window, row: Row, place: Place) -> int:
    """1: it comes after the place, -1: before it, 0: it stands there."""
    key, there = (window.order.value(row), row["_id"]), (place.value, place.id)
    return (int(key > there) - int(key < there)) * (1 if window.order.ascending else -1)
