"""Reads of rows: straight on PyMongo's connections where that can be had, else by its public API."""

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from pymongo.asynchronous.database import AsyncDatabase

from .base import Row

if TYPE_CHECKING:
    from .wire import Wire

log = logging.getLogger(__name__)

ONE_BATCH: Final = 10_000  # rows: more than any read here asks for, so no `getMore` below 16 MB
in_one_reply: Final[ContextVar[bool]] = ContextVar("in_one_reply", default=False)
"""Whether rows are only wanted where one reply of the server, 16 MB, has them all."""
COUNTED: Final[Row] = {"$group": {"_id": 1, "n": {"$sum": 1}}}  # as `count_documents` counts


class TooManyBytesError(Exception):
    """The rows are more than one reply, and no more were wanted."""


class Reading:
    """Rows of one database, as fast as they can be had.

    The answers, the errors and the events are those of PyMongo's `find`, `aggregate` and
    `count_documents`, with its settings of the database and `maxTimeMS`.
    """

    __slots__ = ("_concern", "_data", "_max_time_ms", "_wire")

    def __init__(self, data: AsyncDatabase[Row], max_time_ms: int) -> None:
        self._data, self._max_time_ms = data, max_time_ms
        self._concern: Row = data.read_concern.document
        found = _wire(data)
        self._wire = None if isinstance(found, str) else found
        if isinstance(found, str):
            log.warning("reading.plain reason=%s", found)

    async def find(
        self,
        collection: str,
        query: Row,
        *,
        projection: Row | None = None,
        sort: dict[str, int] | None = None,
        limit: int = 0,
        batch_size: int = ONE_BATCH,
    ) -> list[Row]:
        wire = self._wire
        if wire is not None and wire.is_usual():
            command: Row = {"find": collection, "filter": query}
            if sort:
                command["sort"] = sort
            if projection:
                command["projection"] = projection
            if limit:
                command["limit"] = limit
            # One more than the limit, and the server knows that the cursor is at its end.
            command["batchSize"] = batch_size + 1 if batch_size == limit else batch_size
            command["maxTimeMS"] = self._max_time_ms
            if self._concern:
                command["readConcern"] = self._concern
            rows = await wire.rows(command, batch_size)
            if rows is not None:
                return rows
        cursor = self._data[collection].find(query, projection or None)
        if sort:
            cursor = cursor.sort(sort)
        cursor = cursor.limit(limit).batch_size(batch_size).max_time_ms(self._max_time_ms)
        return await cursor.to_list()

    async def aggregate(
        self, collection: str | None, pipeline: list[Row], *, batch_size: int = ONE_BATCH
    ) -> list[Row]:
        """Without a collection the pipeline begins with its own documents."""
        wire = self._wire
        if wire is not None and wire.is_usual():
            command = self._aggregate(collection, pipeline, {"batchSize": batch_size})
            rows = await wire.rows(command, batch_size)
            if rows is not None:
                return rows
        target = self._data if collection is None else self._data[collection]
        cursor = await target.aggregate(pipeline, maxTimeMS=self._max_time_ms, batchSize=batch_size)
        return await cursor.to_list()

    async def count(self, collection: str, query: Row) -> int:
        """How many rows match, exactly."""
        wire = self._wire
        if wire is not None and wire.is_usual():
            command = self._aggregate(collection, [{"$match": query}, COUNTED], {})
            rows = await wire.rows(command, 1)
            if rows is not None:
                return int(rows[0]["n"]) if rows else 0
        return await self._data[collection].count_documents(query, maxTimeMS=self._max_time_ms)

    def _aggregate(self, collection: str | None, pipeline: list[Row], cursor: Row) -> Row:
        command: Row = {
            "aggregate": 1 if collection is None else collection,
            "pipeline": pipeline,
            "cursor": cursor,
            "maxTimeMS": self._max_time_ms,
        }
        if self._concern:
            command["readConcern"] = self._concern
        return command


def _wire(data: AsyncDatabase[Row]) -> "Wire | str":
    """Or why it cannot be had."""
    try:
        # Here, because in another version of PyMongo the names that it imports may be missing.
        from .wire import Wire, unfit
    except (ImportError, AttributeError) as error:
        return f"another PyMongo: {error}"
    return unfit(data) or Wire(data)
