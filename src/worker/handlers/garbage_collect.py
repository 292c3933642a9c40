"""GARBAGE_COLLECT: what nobody needs any more goes, in small transactions; or is only counted."""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

from bson import ObjectId, Timestamp
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import ExecutionTimeout

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import Stream
from modelharbor.db.jobs import ENDED, LEAST_ID
from modelharbor.db.models import ModelState
from modelharbor.db.rollups import OF_MODELS, Grain
from modelharbor.events.position import position_of
from modelharbor.resolvers.blobs import (
    Claim,
    claim_unused,
    forget_blobs,
    release,
    removable,
    remove_contents,
)
from modelharbor.settings import Settings
from modelharbor.worker.tools import Tools

from .checkpoints import Checkpoint
from .old_exports import old_exports, remove_old_exports

TOKEN_DAYS: Final = 30.0  # that a token is listed after it was revoked or has expired
ROWS_AT_ONCE: Final = 500  # removed in one transaction
BLOBS_AT_ONCE: Final = 100  # so that an import that meets one of them waits for seconds at most
JOBS_AT_ONCE: Final = 50
JOBS_COUNTED_AT_ONCE: Final = 5000  # whose children are looked for in one read
LINES_AT_ONCE: Final = 5000  # of logs
COUNTED: Final = (
    *("blobs", "bytes", "tokens", "idempotencyKeys", "jobs", "events", "models", "exports"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is from before these times is garbage."""

    blobs: datetime
    tokens: datetime
    keys: datetime
    jobs: datetime
    events: datetime
    models: datetime
    exports: datetime


async def collect_garbage(job: Row, tools: Tools) -> Row:
    """Input: {dry_run}. Result: rows that went, or would; `bytes` of contents."""
    limits = _limits(tools.settings, utc_now())
    if job["input"].get("dry_run"):
        return {"dryRun": True, **await _count(tools.database, limits)}
    done = Checkpoint(tools, dict.fromkeys(COUNTED, 0))
    try:
        total = _rows(done.values) + _rows(await _count(tools.database, limits))
    except ExecutionTimeout:
        total = None  # so much garbage that it cannot be counted: the more it has to go
    collecting = _Collecting(tools, done, limits, total)
    for name, collect in collecting.steps.items():
        async with tools.step(name):
            collecting.doing = f"Removing old {name}"
            collecting.report()
            await collect()
    return {"dryRun": False, **done.values}


def _limits(settings: Settings, now: datetime) -> Limits:
    return Limits(
        blobs=now - timedelta(hours=settings.blob_grace_hours),
        tokens=now - timedelta(days=TOKEN_DAYS),
        keys=now,
        jobs=now - timedelta(days=settings.job_days),
        events=now - timedelta(days=settings.event_days),
        models=now - timedelta(days=settings.deleted_days),
        exports=now - timedelta(days=settings.export_days),
    )


def _rows(counts: Row) -> int:
    return sum(count for name, count in counts.items() if name != "bytes")


# What is garbage. The types are said because the indexes hold only rows of these.


def _tokens(limits: Limits) -> Row:
    old = {"$type": "date", "$lt": limits.tokens}
    return {"$or": [{"revoked_at": old}, {"expires_at": old}]}


def _keys(limits: Limits) -> Row:
    return {"expires_at": {"$lt": limits.keys}}


def _events(limits: Limits) -> Row:
    seconds = int(limits.events.timestamp())
    return {
        "stream": {"$in": [Stream.JOBS.value, Stream.UPLOADS.value]},
        "position": {"$type": "string", "$lt": position_of(Timestamp(seconds, 0), 0)},
    }


def _models(limits: Limits) -> Row:
    return {
        "state": ModelState.DELETED.value,
        "deleted_at": {"$type": "date", "$lt": limits.models},
    }


def _jobs(limits: Limits) -> list[Row]:
    """Stages that find jobs that ended long ago, and have no children that did not, and no parent
    that is still to read what came of them."""
    ended = {"$in": sorted(state.value for state in ENDED)}
    old = {
        "state": ended,
        "finished_at": {"$type": "date", "$lt": limits.jobs},
    }
    return [
        {"$match": old},
        {
            "$lookup": {
                "from": "jobs",
                "localField": "_id",
                "foreignField": "parent_id",
                "pipeline": [
                    {"$match": {"parent_id": {"$gt": LEAST_ID}, "$nor": [old]}},
                    {"$limit": 1},
                    {"$project": {"_id": 1}},
                ],
                "as": "younger",
            }
        },
        {
            "$lookup": {
                "from": "jobs",
                "localField": "parent_id",
                "foreignField": "_id",
                "pipeline": [
                    {"$match": {"state": {"$nin": ended["$in"]}}},
                    {"$project": {"_id": 1}},
                ],
                "as": "waiting",
            }
        },
        {"$match": {"younger": [], "waiting": []}},
    ]


async def _count(database: Database, limits: Limits) -> Row:
    [blobs] = await database.aggregate(
        "blobs",
        [
            {"$match": removable(limits.blobs)},
            {
                "$group": {
                    "_id": None,
                    "rows": {"$sum": 1},
                    "bytes": {"$sum": {"$cond": ["$stored", "$size_bytes", 0]}},
                }
            },
        ],
    ) or [{"rows": 0, "bytes": 0}]
    return {
        "blobs": blobs["rows"],
        "bytes": blobs["bytes"],
        "tokens": await database.count("tokens", _tokens(limits)),
        "idempotencyKeys": await database.count("idempotency", _keys(limits)),
        "jobs": await _count_jobs(database, limits),
        "events": await database.count("events", _events(limits)),
        "models": await database.count("models", _models(limits)),
        "exports": await database.count("jobs", old_exports(limits.exports)),
    }


async def _count_jobs(database: Database, limits: Limits) -> int:
    """Some at a time: looking for the children of all of them takes longer than a read may."""
    found, after = 0, datetime.fromtimestamp(0, UTC)
    match, *stages = _jobs(limits)
    while True:
        # Up to a time, so that those that ended in the same millisecond are counted together.
        ends = await database.aggregate(
            "jobs",
            [
                {"$match": {**match["$match"], "finished_at": _between(after, limits.jobs)}},
                {"$sort": {"finished_at": 1}},
                {"$limit": JOBS_COUNTED_AT_ONCE},
                {"$group": {"_id": None, "last": {"$max": "$finished_at"}}},
            ],
        )
        if not ends:
            return found
        until = ends[0]["last"] + timedelta(milliseconds=1)
        batch = {**match["$match"], "finished_at": _between(after, until)}
        rows = await database.aggregate("jobs", [{"$match": batch}, *stages, {"$count": "rows"}])
        found += rows[0]["rows"] if rows else 0
        after = until


def _between(after: datetime, before: datetime) -> Row:
    return {"$type": "date", "$gte": after, "$lt": before}


# Removing it ------------------------------------------------------------------------------------


class _Collecting:
    def __init__(self, tools: Tools, done: Checkpoint, limits: Limits, total: int | None) -> None:
        self._tools, self._done, self._limits, self._total = tools, done, limits, total
        self._data = tools.database.data
        self.doing = ""
        self.steps: dict[str, Callable[[], Awaitable[None]]] = {
            "models": self.models,
            "exports": self.exports,
            "blobs": self.blobs,
            "tokens": partial(self._rows, "tokens", "tokens", _tokens(limits)),
            "idempotency keys": partial(
                self._rows, "idempotencyKeys", "idempotency", _keys(limits)
            ),
            "jobs": self.jobs,
            "events": partial(self._rows, "events", "events", _events(limits)),
        }

    def report(self) -> None:
        """Raises when the job was cancelled."""
        done = _rows(self._done.values)
        total = None if self._total is None else max(done, self._total)
        self._tools.report(done, total, unit="rows", message=self.doing)

    async def _count_in(self, work: Callable[[AsyncClientSession], Awaitable[Row]]) -> None:
        """Do `work` in a transaction, add the counts that it answers, and say so."""

        async def counted(session: AsyncClientSession) -> Row:
            more = await work(session)
            return {name: self._done.values[name] + count for name, count in more.items()}

        await self._done.advance(counted)
        self.report()

    async def _rows(self, name: str, collection: str, query: Row) -> None:
        database = self._tools.database
        while True:
            found = await database.find(
                collection, query, projection={"_id": 1}, limit=ROWS_AT_ONCE
            )
            if not found:
                return
            mine = {"_id": {"$in": [row["_id"] for row in found]}, **query}

            async def remove(session: AsyncClientSession, mine: Row = mine) -> Row:
                gone = await self._data[collection].delete_many(mine, session=session)
                return {name: gone.deleted_count}

            await self._count_in(remove)

    async def jobs(self) -> None:
        """With their logs."""
        went = True

        async def remove(session: AsyncClientSession) -> Row:
            nonlocal went
            cursor = await self._data["jobs"].aggregate(
                [
                    *_jobs(self._limits),
                    {"$limit": JOBS_AT_ONCE},
                    {"$project": {"log_count": 1}},
                ],
                session=session,
                maxTimeMS=self._tools.database.query_timeout_ms,
            )
            ids: list[ObjectId] = []
            lines = 0
            async for row in cursor:
                lines += row["log_count"]
                if ids and lines > LINES_AT_ONCE:
                    break
                ids.append(row["_id"])
            went = bool(ids)
            mine = {"$in": ids}
            await self._data["job_logs"].delete_many({"job_id": mine}, session=session)
            await self._data["bulk_batches"].delete_many({"job_id": mine}, session=session)
            gone = await self._data["jobs"].delete_many({"_id": mine}, session=session)
            return {"jobs": gone.deleted_count}

        while went:
            await self._count_in(remove)

    async def blobs(self) -> None:
        """Safe beside imports of the same contents: see resolvers/blobs.py."""
        tools = self._tools
        while True:
            claim = await tools.database.transaction(
                lambda session: claim_unused(
                    tools.database, session, self._limits.blobs, BLOBS_AT_ONCE
                )
            )
            if not claim.rows and not claim.miscounted:
                return
            removed = await remove_contents(tools.storage, claim)
            await self._count_in(partial(self._forget, claim, removed))

    async def _forget(
        self, claim: Claim, removed: Sequence[Row], session: AsyncClientSession
    ) -> Row:
        await forget_blobs(self._tools.database, session, claim, removed)
        stored = [row["size_bytes"] for row in removed if row["stored"]]
        return {"blobs": len(removed), "bytes": sum(stored)}

    async def exports(self) -> None:
        removed = await remove_old_exports(self._tools, self._limits.exports)

        async def count(session: AsyncClientSession) -> Row:
            return {"exports": removed}

        await self._count_in(count)

    async def models(self) -> None:
        """With all that is theirs, but what is told of them in the log of events."""
        database = self._tools.database
        while True:
            found = await database.find(
                "models",
                _models(self._limits),
                projection={"_id": 1},
                sort={"deleted_at": 1, "_id": 1},
                limit=ROWS_AT_ONCE,
            )
            if not found:
                return
            for row in found:
                await self._model(row["_id"])

    async def _model(self, model_id: ObjectId) -> None:
        mine = {"_id": model_id, **_models(self._limits)}

        async def mark(session: AsyncClientSession) -> bool:
            """From here on it cannot be restored. False where it was, at the last moment."""
            marked = await self._data["models"].update_one(
                mine, {"$set": {"purging_at": utc_now()}}, session=session
            )
            return marked.matched_count > 0

        async def remove(session: AsyncClientSession) -> Row:
            await self._data["cards"].delete_one({"_id": model_id}, session=session)
            gone = await self._data["models"].delete_one(mine, session=session)
            return {"models": gone.deleted_count}

        if not await self._tools.database.transaction(mark):
            return
        for part in (
            self._some_versions,
            partial(self._some, "likes"),
            self._some_rollups,
        ):
            work = partial(part, model_id)
            while await self._tools.database.transaction(work):
                self.report()
        await self._count_in(remove)

    async def _some_versions(self, model_id: ObjectId, session: AsyncClientSession) -> bool:
        """Remove some files of a model; where those are all of some versions, these too. False where
        nothing was left."""
        database = self._tools.database
        versions = (
            await self._data["versions"]
            .find({"model_id": model_id}, {"_id": 1}, session=session)
            .sort("number", 1)
            .limit(ROWS_AT_ONCE)
            .max_time_ms(database.query_timeout_ms)
            .to_list()
        )
        ids = [row["_id"] for row in versions]
        files = (
            await self._data["files"]
            .find({"version_id": {"$in": ids}}, {"sha256": 1}, session=session)
            .limit(ROWS_AT_ONCE)
            .max_time_ms(database.query_timeout_ms)
            .to_list()
        )
        if files:
            await release(database, session, Counter(row["sha256"] for row in files))
            await self._data["files"].delete_many(
                {"_id": {"$in": [row["_id"] for row in files]}}, session=session
            )
        if len(files) < ROWS_AT_ONCE:
            await self._data["versions"].delete_many({"_id": {"$in": ids}}, session=session)
        return bool(ids)

    async def _some_rollups(self, model_id: ObjectId, session: AsyncClientSession) -> bool:
        """What its use added up to, some of it; at the end what it was counted as. No audience has had
        it since it was deleted."""
        database, gone = self._tools.database, False
        for grain in Grain:
            rows = (
                await self._data[grain.value]
                .find(
                    {"cuboid": {"$in": OF_MODELS}, "model": model_id}, {"_id": 1}, session=session
                )
                .limit(ROWS_AT_ONCE)
                .max_time_ms(database.query_timeout_ms)
                .to_list()
            )
            if rows:
                ids = [row["_id"] for row in rows]
                await self._data[grain.value].delete_many({"_id": {"$in": ids}}, session=session)
                gone = True
        if not gone:
            await self._data["rollup_homes"].delete_one({"_id": model_id}, session=session)
        return gone

    async def _some(self, collection: str, model_id: ObjectId, session: AsyncClientSession) -> bool:
        rows = (
            await self._data[collection]
            .find({"model_id": model_id}, {"_id": 1}, session=session)
            .limit(ROWS_AT_ONCE)
            .max_time_ms(self._tools.database.query_timeout_ms)
            .to_list()
        )
        ids = [row["_id"] for row in rows]
        await self._data[collection].delete_many({"_id": {"$in": ids}}, session=session)
        return bool(ids)
