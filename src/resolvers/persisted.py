"""Published operations: publish, list, compare, retire; and count how often each is used."""

import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from time import time
from typing import Final

from bson import ObjectId
from pymongo import InsertOne, ReturnDocument, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.persisted import USAGE_DAYS, PersistedDocument, PersistedUsageDocument
from modelharbor.errors import ErrorCode, Refused

from .counting import Gathered, flushing
from .manifests import BadManifest, Trouble
from .names import DISPLAY_NAME, valid_label

log = logging.getLogger(__name__)
DOCUMENTS: Final = PersistedDocument.Settings.name
USAGE: Final = PersistedUsageDocument.Settings.name
FLUSH_SECONDS: Final = 3.0
AT_ONCE: Final = 1000  # ids in one query
PUBLISH_SECONDS: Final = 50.0  # for all of a manifest; MongoDB ends a transaction after 60
DAY_SECONDS: Final = 24 * 3600


@dataclass(frozen=True, slots=True)
class Publication:
    """An operation that was checked against the schema."""

    id: str
    text: str
    sha256: str
    name: str | None
    kind: str
    fields: list[str]  # each as `Model.name`


@dataclass(frozen=True, slots=True)
class Published:
    """What publishing a manifest did, or would do: ids."""

    new: list[str]
    again: list[str]  # had been retired
    repriced: list[str]
    same: list[str]


@dataclass(frozen=True, slots=True)
class Difference:
    """A manifest beside what its client has published: ids."""

    new: list[str]
    same: list[str]
    left: list[str]  # published, and not in the manifest


async def last_sequence(database: Database) -> int:
    """The number of the last change. Changes are numbered in the order of their commits."""
    rows = await database.find("log", {"_id": "persisted"}, limit=1)
    return rows[0]["sequence"] if rows else 0


async def published_text(database: Database, row_id: ObjectId) -> str | None:
    rows = await database.find(DOCUMENTS, {"_id": row_id}, projection={"text": 1}, limit=1)
    return rows[0]["text"] if rows else None


async def is_published(database: Database, text: str) -> bool:
    """Whether it is the text of an operation that was published, and not retired."""
    wanted = {
        "sequence": {"$gt": 0},
        "retired_at": None,
        "sha256": sha256(text.encode()).hexdigest(),
    }
    return bool(await database.find(DOCUMENTS, wanted, projection={"_id": 1}, limit=1))


async def _next_sequence(database: Database, session: AsyncClientSession) -> int:
    """Whoever else publishes meanwhile waits for this transaction."""
    row = await database.data["log"].find_one_and_update(
        {"_id": "persisted"},
        {"$inc": {"sequence": 1}},
        upsert=True,
        return_document=ReturnDocument.AFTER,
        session=session,
    )
    assert row is not None
    sequence: int = row["sequence"]
    return sequence


# ---- publish


async def publish(
    database: Database,
    client: str,
    publications: Sequence[Publication],
    prices: Mapping[str, int | None],
    *,
    is_dry_run: bool = False,
) -> Published:
    """All of a manifest or, where one of its ids is taken, nothing: BadManifest.

    `prices` by the names of operations; None is no price, and those that are not named keep theirs.
    """
    client = valid_label(client, DISPLAY_NAME, "client")
    names = {each.name for each in publications}
    for name in prices:
        if name not in names:
            raise Refused(
                ErrorCode.BAD_INPUT, f"The manifest has no operation {name!r}, for --price."
            )

    async def work(session: AsyncClientSession) -> Published:
        return await _publish(database, session, client, publications, prices, is_dry_run)

    return await database.transaction(work, PUBLISH_SECONDS)


async def _publish(
    database: Database,
    session: AsyncClientSession,
    client: str,
    publications: Sequence[Publication],
    prices: Mapping[str, int | None],
    is_dry_run: bool,
) -> Published:
    # First, so that nobody else publishes between what is read and what is written.
    sequence = 0 if is_dry_run else await _next_sequence(database, session)
    standing = await _standing(database, session, [each.id for each in publications])
    done = Published([], [], [], [])
    troubles: list[Trouble] = []
    writes: list[InsertOne[Row] | UpdateOne] = []
    for each in publications:
        rows = standing.get(each.id, [])
        own = next((row for row in rows if row["client"] == client), None)
        taken = next(
            (row for row in rows if row["retired_at"] is None and row["sha256"] != each.sha256),
            None,
        )
        if taken is not None:
            whose = "" if taken["client"] == client else f" by {taken['client']}"
            message = f"published{whose} with another text: retire that, or choose another id"
            troubles.append(Trouble(ErrorCode.CONFLICT.value, message, each.id, each.name))
            continue
        before = own["price"] if own else None
        price = prices.get(each.name, before) if each.name else before
        if own is None:
            done.new.append(each.id)
        elif own["retired_at"] is not None:
            done.again.append(each.id)
        elif price != before:
            done.repriced.append(each.id)
        else:
            done.same.append(each.id)
            continue
        values: Row = {
            "text": each.text,
            "sha256": each.sha256,
            "name": each.name,
            "kind": each.kind,
            "fields": each.fields,
            "price": price,
            "retired_at": None,
            "sequence": sequence,
        }
        if own is None or own["retired_at"] is not None:
            values["published_at"] = utc_now()
        if own is None:
            row = {"_id": ObjectId(), "document_id": each.id, "client": client, **values}
            writes.append(InsertOne(row))
        else:
            writes.append(UpdateOne({"_id": own["_id"]}, {"$set": values}))
    if troubles:
        raise BadManifest(troubles)
    if writes and not is_dry_run:
        await database.data[DOCUMENTS].bulk_write(writes, ordered=False, session=session)
    return done


async def _standing(
    database: Database, session: AsyncClientSession, ids: Sequence[str]
) -> dict[str, list[Row]]:
    """What is published under these ids, of all clients, retired or not."""
    wanted = {"document_id": 1, "client": 1, "sha256": 1, "price": 1, "retired_at": 1}
    found: dict[str, list[Row]] = {}
    for start in range(0, len(ids), AT_ONCE):
        rows = (
            database.data[DOCUMENTS]
            .find({"document_id": {"$in": ids[start : start + AT_ONCE]}}, wanted, session=session)
            .max_time_ms(database.query_timeout_ms)
        )
        async for row in rows:
            found.setdefault(row["document_id"], []).append(row)
    return found


async def compare(database: Database, client: str, ids: Collection[str]) -> Difference:
    """Ids of a manifest beside those that the client has published."""
    rows = await database.find(
        DOCUMENTS, {"client": client, "retired_at": None}, projection={"document_id": 1}
    )
    published = {row["document_id"] for row in rows}
    return Difference(
        new=[id for id in ids if id not in published],
        same=[id for id in ids if id in published],
        left=sorted(published.difference(ids)),
    )


# ---- list and retire


async def list_published(
    database: Database,
    *,
    client: str | None = None,
    fields: Sequence[str] = (),
    days: int = USAGE_DAYS,
    limit: int,
) -> list[Row]:
    """Published operations that are not retired, with `calls` of so many days, and when each was used
    last. `fields`: those that select one of them."""
    query: Row = {"retired_at": None}
    if client is not None:
        query["client"] = client
    if fields:
        query["fields"] = {"$in": list(fields)}
    wanted = ("document_id", "client", "name", "kind", "price", "published_at")
    rows = await database.find(
        DOCUMENTS,
        query,
        projection=dict.fromkeys(wanted, 1),
        sort={"client": 1, "document_id": 1},
        limit=limit,
    )
    used = await _used(database, [row["document_id"] for row in rows], days)
    return [
        {"calls": 0, "last_used_at": None, **row, **used.get(row["document_id"], {})}
        for row in rows
    ]


async def _used(database: Database, ids: Sequence[str], days: int) -> dict[str, Row]:
    since = _day(utc_now()) - timedelta(days=days - 1)
    found = {}
    for start in range(0, len(ids), AT_ONCE):
        some = {"document_id": {"$in": ids[start : start + AT_ONCE]}, "day": {"$gte": since}}
        summed = {
            "_id": "$document_id",
            "calls": {"$sum": "$calls"},
            "last_used_at": {"$max": "$last_used_at"},
        }
        rows = await database.aggregate(USAGE, [{"$match": some}, {"$group": summed}])
        for row in rows:
            found[row["_id"]] = {"calls": row["calls"], "last_used_at": row["last_used_at"]}
    return found


async def retire(database: Database, ids: Collection[str], client: str | None = None) -> list[str]:
    """Let published operations run no longer; of all clients that have the id, or of one.

    Refused where one of them is not published: then none is retired.
    """

    async def work(session: AsyncClientSession) -> list[str]:
        sequence = await _next_sequence(database, session)
        standing = await _standing(database, session, list(ids))
        rows = [
            row
            for id in ids
            for row in standing.get(id, [])
            if row["retired_at"] is None and client in {None, row["client"]}
        ]
        missing = set(ids) - {row["document_id"] for row in rows}
        if missing:
            raise Refused(ErrorCode.NOT_FOUND, f"There is no published operation {min(missing)!r}.")
        for start in range(0, len(rows), AT_ONCE):
            await database.data[DOCUMENTS].update_many(
                {"_id": {"$in": [row["_id"] for row in rows[start : start + AT_ONCE]]}},
                {"$set": {"retired_at": utc_now(), "sequence": sequence}},
                session=session,
            )
        return [row["document_id"] for row in rows]

    return await database.transaction(work, PUBLISH_SECONDS)


async def retire_unused(database: Database, client: str, unused_days: int | None) -> list[str]:
    """Of a client: all, or those that nobody has used for so many days, nor published since."""
    query: Row = {"client": client, "retired_at": None}
    if unused_days is not None:
        query["published_at"] = {"$lt": utc_now() - timedelta(days=unused_days)}
    rows = await database.find(DOCUMENTS, query, projection={"document_id": 1})
    ids = [row["document_id"] for row in rows]
    if unused_days is not None:
        used = await _used(database, ids, unused_days + 1)
        since = utc_now() - timedelta(days=unused_days)
        ids = [
            id
            for id in ids
            if id not in used or used[id]["last_used_at"].replace(tzinfo=UTC) < since
        ]
    if not ids:
        return []
    return await retire(database, ids, client)


# ---- count


class UsageCounter(Gathered[tuple[str, int]]):
    """Calls of published operations, by id and day; bounded by how many are published."""

    def count(self, document_id: str) -> None:
        self._waiting[document_id, int(time()) // DAY_SECONDS] += 1

    async def _add(
        self, counts: Mapping[tuple[str, int], int], session: AsyncClientSession
    ) -> None:
        now = utc_now()
        await self._database.data[USAGE].bulk_write(
            [
                UpdateOne(
                    {
                        "document_id": document_id,
                        "day": datetime.fromtimestamp(day * DAY_SECONDS, UTC),
                    },
                    {"$inc": {"calls": count}, "$max": {"last_used_at": now}},
                    upsert=True,
                )
                for (document_id, day), count in counts.items()
            ],
            ordered=False,
            session=session,
        )


@asynccontextmanager
async def counting_usage(database: Database) -> AsyncIterator[UsageCounter]:
    """A counter that flushes every few seconds, and once more at the end."""
    counter = UsageCounter(database)
    async with flushing(counter, FLUSH_SECONDS, "persisted.not_counted_yet"):
        yield counter


def _day(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)
