"""How the models of the demo, and the API, were used lately: rows as the rollups write them, and of today
the events that they would be made of, for today is added up again as it goes on.

A hub has fewer visitors at weekends and more from month to month; most of its downloads are those of a
few models, by programs. The same for the same arguments and the same day. Of days before the last two
all of a day stands at noon, UTC, which in nearly all timezones is the same day.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import accumulate
from math import erf, exp, log, sqrt
from random import Random
from typing import Any, Final

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.files import FileDocument
from modelharbor.db.models import ModelDocument
from modelharbor.db.rollups import (
    DIMENSIONS,
    STATE,
    Cuboid,
    Grain,
    Groups,
    HomeDocument,
    Key,
    RollupStateDocument,
    add_to,
    coarser,
    distinct,
    new_home,
    of_audiences,
    row_of,
)
from modelharbor.db.usage import (
    HISTOGRAM_STEPS,
    UsageKind,
    collection_of,
    day_of,
    latency_of,
    quarter_of,
)
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.events.position import START

from .population import blank

DAYS: Final = 90
WINDOW: Final = 30  # days of downloads in the stats of a model
FINE_DAYS: Final = 2  # that have an hour for everything
RUN: Final = 1
DEMO: Final = "demo"
"""Who has the lease of the rollups until all rows are there,"""
LONGEST: Final = timedelta(minutes=5)
"""for so long at most."""
GROWTH: Final = 0.006  # more each day
WEEK: Final = (1.0, 1.04, 1.05, 1.02, 0.93, 0.58, 0.52)  # from Monday on
HOURS: Final = tuple(1.2 + 0.8 * erf((hour - 8) / 4) - 0.5 * (hour > 20) for hour in range(24))
NOON: Final = timedelta(hours=12)
CLIENTS: Final = {
    "huggingface_hub": 34,
    "python": 15,
    "modelharbor": 14,
    "modelharbor-ci": 9,
    "curl": 8,
    "browser": 8,
    "ci": 6,
    "node": 3,
    "bot": 2,
    "go": 1,
}
CLIENT_WEIGHTS: Final = tuple(accumulate(CLIENTS.values()))
PEOPLE: Final = 20_000  # who download
MOST_PEOPLE: Final = 400  # of one model
MOST_BYTES: Final = 10**13  # of one group in one bucket, so that no sum is beyond 64 bits
BIGGEST_FILES: Final = 3  # of a version are downloaded
LATEST_VERSIONS: Final = 3
CALLS: Final = 30_000  # of the API on an ordinary day


@dataclass(frozen=True, slots=True)
class Called:
    """An operation, and what a call of it takes."""

    name: str
    share: float
    clients: tuple[str, ...]
    median_ms: float
    cost: int
    commands: int
    batches: int
    keys: int
    hits: float
    failing: float = 0.001

    @property
    def operation(self) -> str:
        return f"{hashlib.sha256(f'demo {self.name}'.encode()).hexdigest()[:16]}:{self.name}"


OPERATIONS: Final = (
    Called("Trending", 0.30, ("browser", "python"), 4.1, 62, 3, 3, 30, 0.9),
    Called("Search", 0.22, ("browser", "node"), 9.5, 41, 2, 2, 21, 0.4, 0.004),
    Called("Model", 0.20, ("browser", "huggingface_hub"), 2.6, 24, 3, 4, 9, 0.8),
    Called("Resolve", 0.14, ("modelharbor", "modelharbor-ci"), 1.4, 3, 1, 1, 1, 0.7, 0.012),
    Called("Facets", 0.07, ("browser", "python"), 14.0, 20, 4, 1, 1, 0.95),
    Called("CreateUploads", 0.04, ("modelharbor", "modelharbor-ci"), 22.0, 30, 9, 2, 12, 0.0, 0.02),
    Called("", 0.03, ("curl", "unknown"), 6.0, 18, 3, 3, 14, 0.1, 0.06),
)
SPREAD: Final = 0.7  # of latencies, the sigma of a lognormal
OF_EVENTS: Final = (
    (UsageKind.VIEW, {"count": "views"}),
    (UsageKind.UPLOAD, {"count": "uploads", "bytes": "ingress_bytes"}),
    (UsageKind.LIKE, {"count": "likes"}),
    (UsageKind.STORAGE, {"bytes": "storage_bytes", "stored": "stored_bytes"}),
    (UsageKind.MODEL, {"count": "new_models"}),
    (UsageKind.VERSION, {"count": "new_versions"}),
)
"""Names of an event, with those of the row that it is added to. Downloads are more: see `_downloads`."""


@dataclass(slots=True)
class _Version:
    id: ObjectId
    at: datetime
    size_bytes: int
    files: int
    is_ready: bool
    biggest: list[tuple[int, ObjectId, str]] = field(default_factory=list)  # size, id, format


class Usage:
    """Give it all rows of a population in order: it completes those of models. Then it has its own."""

    def __init__(self, seed: int, now: datetime) -> None:
        self.seed = seed
        self.now = now
        self.end = quarter_of(now)
        """What is before: nothing has happened in a quarter of an hour that goes on."""
        self.today = day_of(now)
        self.first = self.today - timedelta(days=DAYS - 1)
        self.fine = self.today - timedelta(days=FINE_DAYS - 1)
        passed = (self.end - self.today) / timedelta(days=1)
        self._weights = [
            WEEK[(self.first + timedelta(days=day)).weekday()]
            * exp(GROWTH * day)
            * (passed if day == DAYS - 1 else 1.0)
            for day in range(DAYS)
        ]
        self._buckets: dict[datetime, Groups] = {}
        self._homes: dict[ObjectId, Row] = {}
        self._versions: list[_Version] = []
        self._files: dict[ObjectId, list[tuple[int, ObjectId, str]]] = {}

    def take(self, name: str, row: Row) -> None:
        if name == FileDocument.Settings.name:
            biggest = self._files.setdefault(row["version_id"], [])
            biggest.append((row["size_bytes"], row["_id"], row["format"]))
            if len(biggest) > BIGGEST_FILES:
                biggest.remove(min(biggest))
        elif name == VersionDocument.Settings.name:
            self._versions.append(
                _Version(
                    row["_id"],
                    row["created_at"],
                    row["size_bytes"],
                    row["file_count"],
                    row["status"] == VersionStatus.READY.value,
                    sorted(self._files.pop(row["_id"], ()), reverse=True),
                )
            )
        elif name == ModelDocument.Settings.name:
            self._model(row)
            self._versions, self._files = [], {}

    @property
    def state(self) -> Row:
        """Of the rollups: nobody adds up before these rows are all there."""
        return {
            **blank(RollupStateDocument),
            "_id": STATE,
            "run": RUN,
            "through": self.end,
            "position": START,
            "began": self.first,
            "whole_from": self.today,
            "minutes_from": self.fine,
            "stats_day": self.today,
            "compared": self.today,
            "owner": DEMO,
            "until": self.now + LONGEST,
        }

    # ---- models

    def _model(self, model: Row) -> None:
        random = Random(f"{self.seed} usage {model['_id']}")
        model_id, stats = model["_id"], model["stats"]
        storage = self._made(random, model)
        before = self._downloaded(random, model)
        self._homes[model_id] = {
            **new_home(model),
            "storage_bytes": storage[0],
            "stored_bytes": storage[1],
            "downloads_before": before,
        }
        stats["as_of"] = self.end

    def _made(self, random: Random, model: Row) -> tuple[int, int]:
        """When it and its versions were, and what they take since."""
        stats, model_id = model["stats"], model["_id"]
        if model["created_at"] >= self.first:
            self._add(random, self._day(model["created_at"]), model_id, {"new_models": 1})
        size = stored = 0
        sizes = dict[int, int]()
        for version in self._versions:
            day = self._day(version.at)
            sizes[day] = sizes.get(day, 0) + version.size_bytes
            if version.at >= self.first:
                made = {
                    "new_versions": 1,
                    "uploads": version.files,
                    "ingress_bytes": version.size_bytes,
                }
                self._add(random, day, model_id, made, version=version.id)
        for day, added in sorted(sizes.items()):
            size += added
            share = stats["stored_bytes"] * size // max(1, stats["size_bytes"]) - stored
            stored += share
            self._add(random, day, model_id, {"storage_bytes": added, "stored_bytes": share})
        return size, stored

    def _downloaded(self, random: Random, model: Row) -> int:
        """Downloads, views and likes of the days, and how often it was downloaded before them."""
        stats, model_id = model["stats"], model["_id"]
        recent: int = stats["downloads_30d"]
        ever: int = stats["downloads_all"]
        first = self._day(model["created_at"])
        lately = range(max(first, DAYS - WINDOW), DAYS)
        earlier = range(first, DAYS - WINDOW)
        rest = ever - recent
        if model["created_at"] < self.first:
            rest = min(rest, int(2 * recent * random.uniform(0.5, 0.9)))
        elif not earlier:
            rest = 0
        days = self._spread(random, recent, lately) | self._spread(random, rest, earlier)
        people, who = self._people(random, recent), set[int]()
        for day, count in sorted(days.items()):
            came = self._of_day(random, model_id, day, count, people)
            if day in lately:
                who |= came
        likes = int(stats["likes"] * min(1.0, recent / max(1, ever)) * random.uniform(0.3, 0.9))
        liked = self._spread(random, likes, lately, most=5)
        for day, count in liked.items():
            self._add(random, day, model_id, {"likes": count})
        for window in (1, 7, WINDOW):
            inside = range(DAYS - window, DAYS)
            use = sum(days.get(day, 0) + 10 * liked.get(day, 0) for day in inside)
            stats[f"use_{window}d"] = use
        stats["unique_downloaders_30d"] = distinct(who)[0]
        return ever - recent - rest

    def _of_day(
        self, random: Random, model_id: ObjectId, day: int, count: int, people: Sequence[int]
    ) -> set[int]:
        """Who downloaded."""
        clients, came = list(CLIENTS), set[int]()
        parts = 1 if count < 1_000 else 2
        if day >= DAYS - FINE_DAYS:
            parts = min(count, 2 * parts)
        left = count
        for part in range(parts):
            some = left if part == parts - 1 else int(left * random.uniform(0.4, 0.8))
            left -= some
            client = random.choices(clients, cum_weights=CLIENT_WEIGHTS)[0]
            version, size, file, format = self._file(random, day)
            who = random.sample(people, min(len(people), some, 2 + int(some**0.4)))
            sums = {
                "downloads": some,
                "egress_bytes": min(MOST_BYTES, some * size),
                "who": set(who),
            }
            came.update(who)
            of = {"version": version, "file": file, "format": format, "client": client}
            self._add(random, day, model_id, sums, **of)
        if count >= 1_000:
            views = {"views": int(count**0.7 * random.uniform(1, 3))}
            self._add(random, day, model_id, views, client="browser")
        return came

    def _file(
        self, random: Random, day: int
    ) -> tuple[ObjectId | None, int, ObjectId | None, str | None]:
        """Of the versions that there were, mostly of the newest, mostly the biggest."""
        end = self.first + timedelta(days=day + 1)
        there = [each for each in self._versions if each.is_ready and each.biggest]
        some = [each for each in there if each.at < end][-LATEST_VERSIONS:] or there[:1]
        if not some:
            return None, 0, None, None
        version = some[-1] if random.random() < 0.85 else random.choice(some)
        rank = 0 if random.random() < 0.7 else random.randrange(len(version.biggest))
        size, file, format = version.biggest[rank]
        return version.id, size, file, format

    def _people(self, random: Random, recent: int) -> list[int]:
        some = random.sample(range(PEOPLE), min(MOST_PEOPLE, 1 + 2 * int(recent**0.6)))
        return [_hash(self.seed, each) for each in some]

    def _spread(
        self, random: Random, total: int, days: range, *, most: int = DAYS
    ) -> dict[int, int]:
        """So many over these days, what is few on some of them."""
        if not total or not days:
            return {}
        weights = [self._weights[day] * random.lognormvariate(0, 0.15) for day in days]
        if not any(weights):
            weights = [1.0] * len(days)
        many = min(most, 1 + int(total**0.4))
        chosen = (
            sorted(set(random.choices(days, weights, k=many)))
            if many < len(days)
            else [day for day, weight in zip(days, weights, strict=True) if weight]
        )
        sums = list(accumulate(weights[day - days.start] for day in chosen))
        found: dict[int, int] = {}
        before = 0
        for day, reached in zip(chosen, sums, strict=True):
            until = round(total * (reached / sums[-1]))
            if until > before:
                found[day] = until - before
            before = until
        return found

    # ---- buckets

    def _day(self, at: datetime) -> int:
        """Its number among the days; of what is before them, the first one's."""
        return min(DAYS - 1, max(0, (day_of(at) - self.first).days))

    def _slots(self, day: int) -> list[datetime]:
        """The quarters of an hour in which anything happens on a day."""
        start = self.first + timedelta(days=day)
        if day < DAYS - FINE_DAYS:
            return [start + NOON]
        slots = [start + timedelta(hours=hour, minutes=hour % 4 * 15) for hour in range(24)]
        return [slot for slot in slots if slot < self.end] or [start]

    def _add(self, random: Random, day: int, model_id: ObjectId, sums: Row, **of: Any) -> None:
        slots = self._slots(day)
        slot = random.choices(slots, HOURS[: len(slots)])[0] if len(slots) > 1 else slots[0]
        key: Key = (
            Cuboid.MODEL_ALL.value,
            model_id,
            *(of.get(name) for name in ("version", "file", "format", "client")),
        )
        add_to(self._buckets.setdefault(slot, {}), key, sums)

    # ---- the API

    def _api(self) -> None:
        for day in range(DAYS):
            random = Random(f"{self.seed} api {day}")
            slots = self._slots(day)
            weights = HOURS[: len(slots)] if len(slots) > 1 else (1.0,)
            calls = CALLS * self._weights[day] * random.uniform(0.95, 1.05)
            for slot, weight in zip(slots, weights, strict=True):
                some = calls * weight / sum(weights)
                for called in OPERATIONS:
                    for client, share in zip(called.clients, (0.7, 0.3), strict=True):
                        count = round(some * called.share * share * random.uniform(0.9, 1.1))
                        if count:
                            key: Key = (Cuboid.API_ALL.value, called.operation, client)
                            sums = _called(called, count, slot)
                            add_to(self._buckets.setdefault(slot, {}), key, sums)

    # ---- rows

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Collection and row, once all models were taken; first what most questions are answered from."""
        self._api()
        days: dict[datetime, Groups] = {}
        for at, groups in self._buckets.items():
            of_day = days.setdefault(day_of(at), {})
            for key, sums in groups.items():
                add_to(of_day, key, sums)
        for at, groups in sorted(days.items(), reverse=True):
            yield from self._of_bucket(Grain.DAY, at, groups)
        for home in self._homes.values():
            yield HomeDocument.Settings.name, home
        for at, groups in sorted(self._buckets.items(), reverse=True):
            yield from self._of_bucket(Grain.QUARTER, at, groups)
            if at >= self.fine:
                yield from self._of_bucket(Grain.MINUTE, at, groups)
        number = 0
        for at, groups in sorted(self._buckets.items()):
            if at < self.today:
                continue
            for event in _events(at, groups):
                number += 1
                yield self.events, {"_id": f"demo:{number}", **event}

    @property
    def events(self) -> str:
        """The collection of those of today."""
        return collection_of(self.today)

    def _of_bucket(self, grain: Grain, at: datetime, fine: Groups) -> Iterator[tuple[str, Row]]:
        groups = {**fine, **coarser(fine, grain)}
        groups |= of_audiences(groups, self._homes)
        for key, sums in groups.items():
            row = row_of(key, at, sums, RUN)
            if row is not None:
                yield grain.value, row


def _events(at: datetime, fine: Groups) -> Iterator[Row]:
    """What adds up to these groups, in the first minute of their bucket."""
    for key, sums in fine.items():
        if key[0] == Cuboid.API_ALL.value:
            _, operation, client = key
            counts = {str(step): count for step, count in enumerate(sums["latencies"]) if count}
            called = {name: value for name, value in sums.items() if name not in _RENAMED}
            yield {
                "at": sums["last_at"],
                "kind": UsageKind.OPERATION.value,
                "operation": operation,
                "client": client,
                "count": sums["requests"],
                "latencies": counts,
                **called,
            }
            continue
        of = {
            name: value
            for name, value in zip(DIMENSIONS[key[0]], key[1:], strict=True)
            if value is not None
        }
        if sums.get("downloads"):
            for event in _downloads(sums):
                yield {"at": at, "kind": UsageKind.DOWNLOAD.value, **of, **event}
        for kind, names in OF_EVENTS:
            values = {name: sums[source] for name, source in names.items() if sums.get(source)}
            if values:
                yield {"at": at, "kind": kind.value, **of, **values}


_RENAMED: Final = ("requests", "latencies", "last_at")


def _downloads(sums: Row) -> Iterator[Row]:
    """One for each who downloaded; the first has done so for all the rest."""
    rest = 1 + sums["downloads"] - len(sums["who"])
    for number, who in enumerate(sorted(sums["who"])):
        count, size = (rest, sums["egress_bytes"]) if number == 0 else (1, 0)
        yield {"who": who, "count": count, "bytes": size}


def _hash(seed: int, person: int) -> int:
    """Of somebody, as recorders have it: 63 bits."""
    digest = hashlib.sha256(f"{seed} person {person}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _called(called: Called, count: int, at: datetime) -> Row:
    """What calls of an operation add up to; their latencies are a lognormal's."""
    latencies, before, total = [0] * HISTOGRAM_STEPS, 0, 0
    for step in range(HISTOGRAM_STEPS):
        deviation = log(latency_of(step) / called.median_ms) / SPREAD
        share = 0.5 * (1 + erf(deviation / sqrt(2))) if step < HISTOGRAM_STEPS - 1 else 1.0
        until = round(count * share)
        latencies[step] = until - before
        total += round((until - before) * latency_of(step) * 0.92)
        before = until
    return {
        "requests": count,
        "errors": round(count * called.failing),
        "total_ms": total,
        "cost": count * called.cost,
        "commands": round(count * called.commands * (1 - called.hits)),
        "batches": round(count * called.batches * (1 - called.hits)),
        "keys": round(count * called.keys * (1 - called.hits)),
        "hits": round(count * called.hits),
        "latencies": latencies,
        "last_at": at + timedelta(seconds=59),
    }
