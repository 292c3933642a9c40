"""What the log of events says of the use of models becomes usage events, and changes their homes.

The position in the log, the events, the minutes that they make dirty and the homes are written in one
transaction; and an event's id is made of the log's, so that it is there once, whatever happens.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from bson import ObjectId
from pymongo import InsertOne, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind, Stream
from modelharbor.db.jobs import ENDED
from modelharbor.db.rollups import (
    HOME_READ,
    STATE,
    naive,
    new_home,
    told_home,
)
from modelharbor.db.uploads import UploadState
from modelharbor.db.usage import EVENT_INDEX, WHOLE_DAY, UsageKind, collection_of, minute_of
from modelharbor.events.recorded import recorded
from modelharbor.observability.logging import log_event

from .rollups import Adding, aware

log = logging.getLogger(__name__)
EVENTS_AT_ONCE: Final = 500  # of the log, in one transaction
MODELS_AT_ONCE: Final = 500  # compared with their homes by one command
PROCESS: Final = "log"
"""Who made a minute dirty, where that was the log."""
WRITE_SECONDS: Final = 30.0
STREAMS: Final = [Stream.MODELS.value, Stream.UPLOADS.value, Stream.JOBS.value]
READ: Final = dict.fromkeys(
    (
        *("stream", "kind", "model_id", "version_id", "at", "position"),
        *("upload.state", "upload.size_bytes", "upload.file_id"),
        *("job.state", "job.started_at", "job.finished_at", "job.subject"),
    ),
    1,
)
ENDED_VALUES: Final = frozenset(state.value for state in ENDED)
BELOW: Final = {"ModelVersion": "versions", "File": "files", "Upload": "uploads"}
"""Types of what jobs are about, whose rows say the model."""


@dataclass(slots=True)
class _Taken:
    """What becomes of a part of the log."""

    events: list[Row] = field(default_factory=list)
    homes: list[Any] = field(default_factory=list)
    """Writes."""
    is_moving: bool = False


class Intake:
    def __init__(self, adding: Adding, now: datetime) -> None:
        self._adding, self._now = adding, now
        self._database: Database = adding.database
        self._ready: set[str] = set()

    async def take_in(self, position: str) -> str:
        """All events of the log after this place that have theirs; answers the last place."""
        end = await recorded(self._database)
        while position < end:
            self._adding.check()
            rows = await self._database.find(
                "events",
                {"stream": {"$in": STREAMS}, "position": {"$gt": position, "$lte": end}},
                projection=READ,
                sort={"position": 1},
                limit=EVENTS_AT_ONCE,
            )
            if not rows:
                return end
            position = rows[-1]["position"] if len(rows) == EVENTS_AT_ONCE else end
            taken = _Taken(await self._events(rows))
            latest = {
                row["model_id"]: row["at"]
                for row in rows
                if row.get("model_id") is not None and row["stream"] != Stream.JOBS.value
            }
            await self._compare(taken, latest)
            await self._write(taken, position)
        return position

    async def compare(self, after: ObjectId | None) -> tuple[ObjectId | None, int]:
        """The next models with their homes; answers the last one, None at the end, and how many."""
        query: Row = {} if after is None else {"_id": {"$gt": after}}
        rows = await self._database.find(
            "models", query, projection={"_id": 1}, sort={"_id": 1}, limit=MODELS_AT_ONCE
        )
        taken = _Taken()
        await self._compare(taken, {row["_id"]: self._now for row in rows})
        if taken.homes:
            await self._write(taken, None)
        return rows[-1]["_id"] if len(rows) == MODELS_AT_ONCE else None, len(rows)

    # ---- what the log says

    async def _events(self, rows: Sequence[Row]) -> list[Row]:
        formats = await self._formats(rows)
        models = await self._models_of_jobs(rows)
        found = []
        for row in rows:
            try:
                event = _told(row, formats, models)
            except (KeyError, TypeError, ValueError):
                # Of another version: all that comes after it is to be taken in all the same.
                log_event(log, logging.WARNING, "rollups.unreadable", told=row["_id"])
                continue
            if event is not None and event["at"] >= self._adding.whole_from:
                found.append(event)
        return found

    async def _formats(self, rows: Sequence[Row]) -> Mapping[ObjectId, str]:
        files = {
            upload["file_id"]
            for row in rows
            if (upload := row.get("upload")) is not None
            and upload["state"] == UploadState.COMPLETED.value
            and upload.get("file_id") is not None
        }
        if not files:
            return {}
        found = await self._database.find(
            "files", {"_id": {"$in": sorted(files)}}, projection={"format": 1}
        )
        return {row["_id"]: row["format"] for row in found}

    async def _models_of_jobs(self, rows: Sequence[Row]) -> Mapping[ObjectId, ObjectId]:
        """By what a job was about."""
        found: dict[ObjectId, ObjectId] = {}
        wanted: dict[str, set[ObjectId]] = {}
        for row in rows:
            job = row.get("job")
            if job is None or job["state"] not in ENDED_VALUES or not job.get("subject"):
                continue
            subject = job["subject"]
            if subject["type"] == "Model":
                found[subject["id"]] = subject["id"]
            elif subject["type"] in BELOW:
                wanted.setdefault(BELOW[subject["type"]], set()).add(subject["id"])
        for collection, ids in wanted.items():
            below = await self._database.find(
                collection, {"_id": {"$in": sorted(ids)}}, projection={"model_id": 1}
            )
            found.update({row["_id"]: row["model_id"] for row in below})
        return found

    # ---- homes

    async def _compare(self, taken: _Taken, latest: Mapping[ObjectId, datetime]) -> None:
        """Models with their homes: what moves, and what storage has changed, at these times."""
        if not latest:
            return
        query = {"_id": {"$in": sorted(latest)}}
        models = await self._database.find("models", query, projection=HOME_READ)
        homes = {row["_id"]: row for row in await self._database.find("rollup_homes", query)}
        for model in models:
            old = homes.get(model["_id"])
            home = old or new_home(model)
            wanted = {**told_home(model), **_sizes(model)}
            change: Row = {name: value for name, value in wanted.items() if home[name] != value}
            bytes = wanted["storage_bytes"] - home["storage_bytes"]
            stored = wanted["stored_bytes"] - home["stored_bytes"]
            if bytes or stored:
                taken.events.append(
                    {
                        "_id": ObjectId(),
                        "at": max(latest[model["_id"]], self._adding.whole_from),
                        "kind": UsageKind.STORAGE.value,
                        "model": model["_id"],
                        **({"bytes": bytes} if bytes else {}),
                        **({"stored": stored} if stored else {}),
                    }
                )
            if old is None:
                taken.homes.append(InsertOne({**home, **change}))
            elif change:
                update: Row = {"$set": change}
                if change.keys() - _SIZES:
                    update["$inc"] = {"moving": 1}
                    taken.is_moving = True
                taken.homes.append(UpdateOne({"_id": model["_id"]}, update))

    # ---- writing

    async def _write(self, taken: _Taken, position: str | None) -> None:
        """`position`: that the log was read up to; None: it was not read."""
        by_day: dict[str, list[Row]] = {}
        for event in taken.events:
            by_day.setdefault(collection_of(aware(event["at"])), []).append(event)
        await self._prepare(by_day)
        for name, events in by_day.items():
            ids = [event["_id"] for event in events]
            there = await self._database.find(
                name, {"_id": {"$in": ids}}, projection={"_id": 1}, limit=len(ids)
            )
            known = {row["_id"] for row in there}
            by_day[name] = [event for event in events if event["_id"] not in known]
        data = self._database.data
        minutes = dirty_minutes((event for events in by_day.values() for event in events), PROCESS)

        async def work(session: AsyncClientSession) -> None:
            for name, events in by_day.items():
                if events:
                    await data[name].insert_many(events, ordered=False, session=session)
            if minutes:
                await data["usage_dirty"].bulk_write(minutes, ordered=False, session=session)
            if taken.homes:
                await data["rollup_homes"].bulk_write(taken.homes, ordered=False, session=session)
            if position is not None:
                await data["rollup_state"].update_one(
                    {"_id": STATE}, {"$set": {"position": position}}, session=session
                )

        if taken.homes or minutes:
            await self._database.transaction(work, WRITE_SECONDS)
            self._adding.forget_homes()

    async def _prepare(self, names: Iterable[str]) -> None:
        """Collections with their index: none can be made within a transaction."""
        for name in set(names) - self._ready:
            await self._database.data[name].create_indexes([EVENT_INDEX])
            self._ready.add(name)


_SIZES: Final = {"storage_bytes", "stored_bytes"}


def _sizes(model: Row) -> Row:
    stats = model.get("stats") or {}
    return {
        "storage_bytes": stats.get("size_bytes") or 0,
        "stored_bytes": stats.get("stored_bytes") or 0,
    }


def _told(
    row: Row, formats: Mapping[ObjectId, str], models: Mapping[ObjectId, ObjectId]
) -> Row | None:
    """What an event of the log says of use."""
    at: datetime = row["at"]
    upload, job = row.get("upload"), row.get("job")
    if row.get("kind") == EventKind.MODEL_CREATED.value:
        return _event(UsageKind.MODEL, row, at, model=row["model_id"], count=1)
    if row.get("kind") == EventKind.VERSION_CREATED.value:
        version = row["version_id"]
        return _event(UsageKind.VERSION, row, at, model=row["model_id"], version=version, count=1)
    if upload is not None and upload["state"] == UploadState.COMPLETED.value:
        file = upload.get("file_id")
        return _event(
            UsageKind.UPLOAD,
            row,
            at,
            model=row["model_id"],
            version=row["version_id"],
            file=file,
            format=None if file is None else formats.get(file),
            bytes=upload["size_bytes"],
            count=1,
        )
    if job is not None and job["state"] in ENDED_VALUES and job.get("started_at"):
        model = models.get((job["subject"] or {"id": None})["id"])
        if model is not None:
            seconds = (job["finished_at"] - job["started_at"]).total_seconds()
            # Of such fractions sums are exact, in whatever order.
            exact = round(max(0.0, seconds) * 1024) / 1024
            return _event(UsageKind.JOB, row, job["finished_at"], model=model, seconds=exact)
    return None


def _event(kind: UsageKind, told: Row, at: datetime, **values: Any) -> Row:
    return {
        "_id": f"{kind.value}:{told['_id']}",
        "at": at,
        "kind": kind.value,
        **{name: value for name, value in values.items() if value is not None},
    }


def dirty_minutes(events: Iterable[Row], process: str) -> list[UpdateOne]:
    """Writes that mark the minutes of these events."""
    return [
        UpdateOne({"minute": minute, "process": process}, {"$inc": {"marks": 1}}, upsert=True)
        for minute in sorted({minute_of(naive(event["at"])) for event in events})
    ]


async def mark_day(data: AsyncDatabase[Row], day: datetime) -> None:
    """All of a day is to be made anew."""
    await data["usage_dirty"].update_one(
        {"minute": day, "process": WHOLE_DAY}, {"$inc": {"marks": 1}}, upsert=True
    )
