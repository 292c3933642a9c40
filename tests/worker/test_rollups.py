"""Rollups against a recount of the events in plain Python: late ones, twice, over many days, with runs that
end anywhere."""

import asyncio
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.db.rollups import (
    ADDITIVE,
    BY_DAY_ALONE,
    DIMENSIONS,
    OF_API,
    OF_AUDIENCES,
    OF_MODELS,
    SECONDS,
    STATE,
    Cuboid,
    Grain,
    key_of,
    naive,
    new_state,
)
from modelharbor.db.usage import HISTOGRAM_STEPS, UsageKind, day_of
from modelharbor.errors import Unavailable
from modelharbor.settings import Settings
from modelharbor.worker import rolling_up, rollups
from modelharbor.worker.claims import IdleTransactions
from modelharbor.worker.usage_intake import mark_day
from tests.documents import insert_actor, insert_model
from tests.usage import insert_usage, roll_up, usage

pytestmark = pytest.mark.anyio
EPOCH = naive(datetime(1970, 1, 1, tzinfo=UTC))
NOW = datetime(2026, 11, 20, 17, 3, 21, tzinfo=UTC)
FINE_FROM = day_of(NOW) - timedelta(days=1)
"""The first day with rows by minute here, so that few days have all sorts."""
CLIENTS = ["browser", "curl", "python", "bot"]
FORMATS = ["GGUF", "SAFETENSORS", "JSON"]
OPERATIONS = ["0123456789abcdef:Models", "fedcba9876543210:", "aaaaaaaaaaaaaaaa:Model"]
AUDIENCES = {Visibility.PUBLIC: "public", Visibility.INTERNAL: "internal", Visibility.PRIVATE: None}
DIMENSION = {
    Cuboid.AUDIENCE_OWNER.value: "owner",
    Cuboid.AUDIENCE_TASK.value: "task",
    Cuboid.AUDIENCE_LIBRARY.value: "library",
    Cuboid.AUDIENCE_LICENSE.value: "license",
    Cuboid.AUDIENCE_FORMAT.value: "format",
    Cuboid.AUDIENCE_CLIENT.value: "client",
}


def some_events(chance: random.Random, models: Sequence[ObjectId], count: int) -> list[Row]:
    """Of all kinds, most of the last hours, some of weeks ago."""
    versions = {model: [ObjectId() for _ in range(2)] for model in models}
    files = {each: [ObjectId() for _ in range(2)] for some in versions.values() for each in some}
    found = []
    for _ in range(count):
        back = chance.choice([3600, 86_400, 3 * 86_400])
        at = NOW - timedelta(milliseconds=chance.randrange(1000 * back))
        model = chance.choice(models)
        version = chance.choice(versions[model])
        client = chance.choice(CLIENTS)
        match chance.choice(list(UsageKind)):
            case UsageKind.DOWNLOAD:
                values: Row = {
                    "model": model,
                    "version": version,
                    "file": chance.choice(files[version]),
                    "format": chance.choice(FORMATS),
                    "client": client,
                    "count": chance.choice([0, 1, 1]),
                    "bytes": chance.randrange(1 << 40),
                    "who": chance.randrange(40) << 50 | 7,
                }
                kind = UsageKind.DOWNLOAD
            case UsageKind.OPERATION:
                kind = UsageKind.OPERATION
                steps = [chance.randrange(HISTOGRAM_STEPS) for _ in range(3)]
                values = {
                    "operation": chance.choice(OPERATIONS),
                    "client": client,
                    "count": 3,
                    "errors": chance.randrange(2),
                    "total_ms": chance.randrange(10_000) / 1024,
                    "latencies": {str(step): steps.count(step) for step in set(steps)},
                    "cost": chance.randrange(100),
                    "commands": chance.randrange(9),
                    "hits": chance.randrange(2),
                }
            case UsageKind.UPLOAD as kind:
                values = {"model": model, "version": version, "bytes": chance.randrange(1 << 33)}
                values["format"] = chance.choice(FORMATS)
            case UsageKind.VIEW as kind:
                values = {"model": model, "client": client, "count": chance.randrange(1, 9)}
            case UsageKind.LIKE as kind:
                values = {"model": model, "count": chance.choice([1, 1, -1])}
            case UsageKind.JOB as kind:
                values = {"model": model, "seconds": chance.randrange(1 << 20) / 1024}
            case UsageKind.STORAGE as kind:
                values = {"model": model, "bytes": chance.randrange(-(1 << 30), 1 << 30)}
                values["stored"] = values["bytes"] // 2
            case UsageKind.MODEL as kind:
                values = {"model": model}
            case kind:
                values = {"model": model, "version": version}
        found.append(usage(kind, at, **values))
    return found


# Recounting -------------------------------------------------------------------------------------


def values_of(event: Row) -> Row:
    """What an event says, under the names of rows."""
    count = event.get("count", 0)
    match UsageKind(event["kind"]):
        case UsageKind.DOWNLOAD:
            who = {event["who"]} if count else set()
            return {"downloads": count, "egress_bytes": event["bytes"], "who": who}
        case UsageKind.VIEW:
            return {"views": count}
        case UsageKind.UPLOAD:
            return {"uploads": count, "ingress_bytes": event["bytes"]}
        case UsageKind.LIKE:
            return {"likes": count}
        case UsageKind.JOB:
            return {"job_seconds": event["seconds"]}
        case UsageKind.STORAGE:
            return {"storage_bytes": event["bytes"], "stored_bytes": event["stored"]}
        case UsageKind.MODEL:
            return {"new_models": count}
        case UsageKind.VERSION:
            return {"new_versions": count}
        case UsageKind.OPERATION:
            names = ("errors", "total_ms", "cost", "commands", "hits")
            steps = [event["latencies"].get(str(step), 0) for step in range(HISTOGRAM_STEPS)]
            return {
                "requests": count,
                **{name: event[name] for name in names},
                "latencies": steps,
                "last_at": naive(event["at"]),
            }


def groups_of(event: Row, homes: dict[ObjectId, Row], grain: Grain) -> Iterable[tuple[Any, ...]]:
    """Every group that an event belongs to, as `key_of` names it."""
    if event["kind"] == UsageKind.OPERATION.value:
        for cuboid in OF_API:
            yield (cuboid, *[event[name] for name in DIMENSIONS[cuboid]])
        return
    for cuboid in OF_MODELS:
        if grain is Grain.DAY or Cuboid(cuboid) not in BY_DAY_ALONE:
            yield (cuboid, *[event.get(name) for name in DIMENSIONS[cuboid]])
    home = homes[event["model"]]
    if home["audience"] is None:
        return
    for cuboid in OF_AUDIENCES:
        if cuboid == Cuboid.AUDIENCE.value:
            yield (cuboid, home["audience"])
        else:
            name = DIMENSION[cuboid]
            yield (cuboid, home["audience"], home.get(name, event.get(name)) or "")


def recount(
    events: Iterable[Row], homes: dict[ObjectId, Row], grain: Grain
) -> dict[tuple[Any, ...], Row]:
    """By bucket and group, without what is 0."""
    found: dict[tuple[Any, ...], Row] = defaultdict(dict)
    for event in events:
        at = naive(event["at"])
        seconds = int((at - EPOCH).total_seconds())
        bucket = EPOCH + timedelta(seconds=seconds - seconds % SECONDS[grain])
        if grain is Grain.MINUTE and bucket < naive(FINE_FROM):
            continue
        for key in groups_of(event, homes, grain):
            row = found[bucket, *key]
            for name, value in values_of(event).items():
                if name == "latencies":
                    old = row.get(name, [0] * HISTOGRAM_STEPS)
                    row[name] = [old[step] + value[step] for step in range(HISTOGRAM_STEPS)]
                elif name == "who":
                    row[name] = row.get(name, set()) | value
                elif name == "last_at":
                    row[name] = max(row.get(name, value), value)
                else:
                    row[name] = row.get(name, 0) + value
    plain = {
        key: {name: sorted(v) if name == "who" else v for name, v in row.items() if v}
        for key, row in found.items()
    }
    return {key: row for key, row in plain.items() if row}


async def stored(database: Database, grain: Grain) -> dict[tuple[Any, ...], Row]:
    rows = await database.find(grain.value, {})
    found = {}
    for row in rows:
        names = {"_id", "at", "run", "cuboid", *DIMENSIONS[row["cuboid"]]}
        assert row["_id"] == {
            name: value for name, value in row.items() if name in names - {"_id", "run"}
        }
        found[row["at"], *key_of(row)] = {
            name: value for name, value in row.items() if name not in names
        }
    assert len(found) == len(rows)
    return found


async def compare(database: Database, events: Sequence[Row], homes: dict[ObjectId, Row]) -> None:
    for grain in Grain:
        expected, there = recount(events, homes, grain), await stored(database, grain)
        assert there.keys() == expected.keys(), grain
        for key, row in expected.items():
            assert there[key] == row, (grain, key)


class Crash(Exception):
    pass


async def some_models(count: int) -> tuple[list[ModelDocument], dict[ObjectId, Row]]:
    owners = [await insert_actor("acme"), await insert_actor("ada")]
    models: list[ModelDocument] = []
    homes: dict[ObjectId, Row] = {}
    for number in range(count):
        visibility = list(Visibility)[number % 3]
        model = await insert_model(
            owners[number % 2],
            f"m{number}",
            visibility=visibility,
            task=[None, "ocr"][number % 2],
            library=["onnx", None, "torch"][number % 3],
        )
        models.append(model)
        homes[model.id] = {
            "audience": AUDIENCES[visibility],
            "owner": str(model.owner_id),
            "task": model.task,
            "library": model.library,
            "license": None,
        }
    return models, homes


IS_LONG = os.environ.get("FAULTS") == "long"
SEEDS = range(40) if IS_LONG else range(2)


@pytest.mark.parametrize("seed", SEEDS)
async def test_rows_are_what_events_add_up_to(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """In portions, out of order, some of them twice, with a run that ends before any of its writes, and a
    model that is seen by others from some moment on."""
    chance = random.Random(seed)
    models, homes = await some_models(6)
    state = new_state(NOW, whole_from=day_of(NOW) - timedelta(days=30))
    await database.data["rollup_state"].insert_one(
        {"_id": STATE, **state, "minutes_from": FINE_FROM}
    )
    events = some_events(chance, [each.id for each in models], 250)
    monkeypatch.setattr(rollups, "ROWS_AT_ONCE", 20)
    monkeypatch.setattr(rollups, "MODELS_AT_ONCE", 2)
    monkeypatch.setattr(rolling_up, "MOST_QUARTERS", chance.choice([0, 3, 100]))
    transaction = Database.transaction
    left = 0

    async def fragile(self: Database, *given: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Crash
        return await transaction(self, *given, **named)

    start, crashes = 0, 0
    while start < len(events):
        size = chance.randrange(1, 130)
        await insert_usage(database, events[max(0, start - 20) : start + size])
        start += size
        if chance.random() < 0.4:
            model = chance.choice(models)
            visibility = chance.choice(list(Visibility))
            principals = {"public": ["public"], "internal": ["internal"], None: ["actor:x"]}
            changed = {"task": chance.choice([None, "ocr", "asr"])}
            homes[model.id] |= {"audience": AUDIENCES[visibility], **changed}
            await database.data["models"].update_one(
                {"_id": model.id},
                {"$set": {"principals": principals[AUDIENCES[visibility]], **changed}},
            )
        with monkeypatch.context() as broken:
            broken.setattr(Database, "transaction", fragile)
            left = chance.randrange(1, 40)
            try:
                await roll_up(database, settings, now=NOW)
            except Crash:
                crashes += 1
        if chance.random() < 0.5:
            await roll_up(database, settings, now=NOW)
            await compare(database, events[:start], homes)
    await roll_up(database, settings, now=NOW)
    await compare(database, events, homes)
    assert crashes
    assert await database.find("usage_dirty", {}) == []
    await compare_deltas(database)
    # Again, and nothing is written; nor by whole days, of which everything is right.
    assert (await roll_up(database, settings, now=NOW)).rows == 0
    await mark_days(database)
    assert (await roll_up(database, settings, now=NOW)).rows == 0
    # A wrong row is mended, one too many goes, and all that are lost come back.
    today = naive(day_of(NOW))
    wrong = await database.find("rollup_days", {"cuboid": "model", "at": today}, limit=1)
    await database.data["rollup_days"].update_one(
        {"_id": wrong[0]["_id"]}, {"$inc": {"downloads": 5}}
    )
    for grain in Grain:
        extra = {**wrong[0]["_id"], "model": ObjectId()}
        await database.data[grain.value].insert_one({"_id": extra, **extra, "views": 1, "run": 1})
    await mark_days(database)
    await roll_up(database, settings, now=NOW)
    await compare(database, events, homes)
    lost = {"at": {"$gte": today - timedelta(days=1)}}
    for grain in Grain:
        await database.data[grain.value].delete_many(lost)
    await mark_days(database)
    await roll_up(database, settings, now=NOW)
    await compare(database, events, homes)


async def compare_deltas(database: Database) -> None:
    """Each change of a row was told once: together they are the rows."""
    told: dict[tuple[Any, ...], Row] = defaultdict(dict)
    for delta in await database.find("rollup_deltas", {}):
        group = told[delta["at"], *key_of(delta)]
        for name in ADDITIVE:
            group[name] = group.get(name, 0) + delta.get(name, 0)
    finest = {"cuboid": {"$in": list(rollups.FINEST)}}
    for row in await database.find(Grain.MINUTE.value, finest):
        values = {name: row.get(name, 0) for name in ADDITIVE}
        # A row that holds nothing but people has no delta.
        assert told.pop((row["at"], *key_of(row)), dict.fromkeys(ADDITIVE, 0)) == values
    assert not any(value for group in told.values() for value in group.values())


ROLLING = """
import asyncio, sys
from datetime import datetime
from modelharbor.db.connection import connect
from modelharbor.settings import Settings
from modelharbor.worker.rolling_up import roll_up

async def main():
    settings = Settings(mongo_url=sys.argv[1], mongo_database=sys.argv[2])
    async with connect(settings) as database:
        while True:
            await roll_up(database, settings, now=datetime.fromisoformat(sys.argv[3]))

asyncio.run(main())
"""


@pytest.mark.skipif(not IS_LONG, reason="takes minutes: FAULTS=long")
async def test_rows_are_right_after_processes_were_killed(
    database: Database, settings: Settings
) -> None:
    chance = random.Random(1)
    models, homes = await some_models(6)
    state = new_state(NOW, whole_from=day_of(NOW) - timedelta(days=30))
    await database.data["rollup_state"].insert_one(
        {"_id": STATE, **state, "minutes_from": FINE_FROM}
    )
    events = some_events(chance, [each.id for each in models], 4000)
    killed = 0
    idle = IdleTransactions(0.5)
    for start in range(0, len(events), 200):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ROLLING),
            *(settings.mongo_url, settings.mongo_database, NOW.isoformat()),
        )
        await asyncio.sleep(1.0)
        await insert_usage(database, events[start : start + 200])
        await asyncio.sleep(chance.random())
        process.kill()
        await process.wait()
        killed += bool(await database.count("usage_dirty", {}))
        await idle.end_some(database)
    assert killed  # in the middle of their work
    async with asyncio.timeout(60):
        while True:
            try:
                await roll_up(database, settings, now=NOW)
                break
            except Unavailable:
                await idle.end_some(database)
    await compare(database, events, homes)
    await compare_deltas(database)


def test_what_is_written_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows, of which those with many hashes are as large as some dozens."""
    monkeypatch.setattr(rollups, "ROWS_AT_ONCE", 100)
    changes = rollups.Changes(
        Grain.DAY,
        new=[{"who": list(range(1024))} for _ in range(3)],
        changed=[{} for _ in range(90)],
        gone=[{} for _ in range(60)],
    )
    parts = list(rollups.parts_of(changes))
    assert [(len(each.new), len(each.changed), len(each.gone)) for each in parts] == [
        (2, 0, 0),
        (1, 35, 0),
        (0, 55, 45),
        (0, 0, 15),
    ]
    assert list(rollups.parts_of(rollups.Changes(Grain.DAY))) == []


async def mark_days(database: Database) -> None:
    today = naive(day_of(NOW))
    for back in range(4):
        await mark_day(database.data, today - timedelta(days=back))


async def test_no_rows_of_a_purged_model_come_back(database: Database, settings: Settings) -> None:
    """By an event that is late, or by those of its past that are there when a day is made anew."""
    ada, now = await insert_actor("ada"), utc_now()
    gone, other = await insert_model(ada, "gone"), await insert_model(ada, "other")
    days = (now - timedelta(days=1), now)
    downloads = [
        usage(UsageKind.DOWNLOAD, at, model=model.id, who=1)
        for at in days
        for model in (gone, other)
    ]
    await insert_usage(database, downloads)
    await roll_up(database, settings, now=now)
    rows = {grain: await database.count(grain.value, {"model": other.id}) for grain in Grain}
    assert all(rows.values())
    # As a purge leaves it.
    await database.data["models"].delete_one({"_id": gone.id})
    await database.data["rollup_homes"].delete_one({"_id": gone.id})
    for grain in Grain:
        await database.data[grain.value].delete_many({"model": gone.id})
    await insert_usage(
        database, [usage(UsageKind.DOWNLOAD, now, model=model.id, who=2) for model in (gone, other)]
    )
    await mark_day(database.data, naive(day_of(days[0])))
    await roll_up(database, settings, now=now)
    for grain in Grain:
        assert await database.count(grain.value, {"model": gone.id}) == 0, grain
        assert await database.count(grain.value, {"model": other.id}) == rows[grain], grain
    today = {"cuboid": "model", "model": other.id, "at": naive(day_of(now))}
    assert [row["downloads"] for row in await database.find(Grain.DAY.value, today)] == [2]
    assert await database.count("rollup_homes", {"_id": gone.id}) == 0
