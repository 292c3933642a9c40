"""What a process knows of the published operations: all but their texts, and soon after each change."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Protocol

from bson import ObjectId
from pymongo.errors import PyMongoError

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.persisted import PersistedDocument
from modelharbor.errors import HarborError, Unavailable
from modelharbor.resolvers.persisted import last_sequence

log = logging.getLogger(__name__)
COLLECTION: Final = PersistedDocument.Settings.name
LOOK_SECONDS: Final = 10.0  # where nobody tells of changes
FIRST_SECONDS: Final = 3.0  # that a request waits for a process that has just begun
AT_ONCE: Final = 1000
NOTED: Final = 10_000  # changes that are looked up one by one; more, and all is read again
WANTED: Final = dict.fromkeys(
    ("document_id", "client", "sha256", "name", "price", "retired_at", "sequence"), 1
)


class Changes(Protocol):
    """Who tells of committed changes, within milliseconds."""

    def on_change(self, callback: Callable[[str, Any], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class Trusted:
    """A published operation. Where several clients have it, the first of them, and the highest price."""

    id: str
    client: str
    name: str | None
    price: int | None
    sha256: str
    row_id: ObjectId


class Published:
    """Published operations by their ids, and by the SHA-256 of their texts."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows: dict[ObjectId, Row] = {}
        self._ids: dict[str, dict[ObjectId, None]] = {}
        self._texts: dict[str, dict[ObjectId, None]] = {}
        self._by_id: dict[str, Trusted] = {}
        self._by_text: dict[str, Trusted] = {}
        self._sequence = 0
        self.version = 0
        """Grows with every change."""
        self._noted: set[Any] = set()
        self._is_doubtful = True
        self._is_told = asyncio.Event()
        self._is_known = asyncio.Event()

    def __len__(self) -> int:
        return len(self._by_id)

    def by_id(self, document_id: str) -> Trusted | None:
        return self._by_id.get(document_id)

    def by_text(self, text_sha256: str) -> Trusted | None:
        return self._by_text.get(text_sha256)

    async def known(self) -> None:
        """When they have been read; Unavailable where that does not happen."""
        if self._is_known.is_set():
            return
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await self._is_known.wait()
        except TimeoutError:
            raise Unavailable("The published operations are not known yet; try again.") from None

    def note(self, collection: str, id: Any) -> None:
        """That a document has changed; None: any may have."""
        if collection == COLLECTION:
            if id is None or len(self._noted) >= NOTED:
                self._is_doubtful = True
            else:
                self._noted.add(id)
            self._is_told.set()

    # ---- reading

    async def look(self) -> None:
        """Read what has changed since the last time."""
        noted, self._noted = self._noted, set()
        is_doubtful, self._is_doubtful = self._is_doubtful, False
        try:
            last = await last_sequence(self._database)
            if is_doubtful or last < self._sequence:  # restored from a backup, say
                rows = await self._read({"sequence": {"$gt": 0}, "retired_at": None})
                self._forget(self._rows.keys() - self._take(rows))
            elif last > self._sequence:
                noted -= self._take(await self._read({"sequence": {"$gt": self._sequence}}))
            self._sequence = last
            while noted:
                some = set(islice(noted, AT_ONCE))
                self._forget(some - self._take(await self._read({"_id": {"$in": list(some)}})))
                noted -= some
        except BaseException:
            self._noted |= noted
            self._is_doubtful |= is_doubtful
            raise
        self._is_known.set()

    def _forget(self, gone: Iterable[Any]) -> None:
        self._take({"_id": id, "retired_at": True} for id in gone)

    async def _read(self, query: Row) -> list[Row]:
        return await self._database.find(COLLECTION, query, projection=WANTED)

    def _take(self, rows: Iterable[Row]) -> set[ObjectId]:
        """Answers their ids."""
        self.version += 1
        seen, ids, texts = set(), set(), set()
        for row in rows:
            id = row["_id"]
            seen.add(id)
            before = self._rows.pop(id, None)
            if before is not None:
                ids.add(before["document_id"])
                texts.add(before["sha256"])
                _leave(self._ids, before["document_id"], id)
                _leave(self._texts, before["sha256"], id)
            if row["retired_at"] is None:
                self._rows[id] = row
                ids.add(row["document_id"])
                texts.add(row["sha256"])
                self._ids.setdefault(row["document_id"], {})[id] = None
                self._texts.setdefault(row["sha256"], {})[id] = None
        for names, found, trusted in (
            (ids, self._ids, self._by_id),
            (texts, self._texts, self._by_text),
        ):
            for name in names:
                if name in found:
                    trusted[name] = _trusted([self._rows[id] for id in found[name]])
                else:
                    trusted.pop(name, None)
        return seen

    async def follow(self) -> None:
        """For ever."""
        while True:
            self._is_told.clear()
            try:
                await self.look()
            except (PyMongoError, HarborError) as error:
                log.warning("persisted.not_read error=%s", error)
            except Exception:
                log.exception("persisted.look_failed")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS if self._is_known.is_set() else 1.0):
                    await self._is_told.wait()


def _leave(found: dict[str, dict[ObjectId, None]], name: str, id: ObjectId) -> None:
    del found[name][id]
    if not found[name]:
        del found[name]


def _trusted(rows: list[Row]) -> Trusted:
    first = min(rows, key=lambda row: (row["client"], row["document_id"]))
    prices = [row["price"] for row in rows if row["price"] is not None]
    return Trusted(
        first["document_id"],
        first["client"],
        first["name"],
        max(prices, default=None),
        first["sha256"],
        first["_id"],
    )


@asynccontextmanager
async def following_published(
    database: Database, changes: Changes | None
) -> AsyncIterator[Published]:
    """`changes`: who tells of them; without, they are looked for every few seconds."""
    published = Published(database)
    if changes is not None:
        changes.on_change(published.note)
    task = asyncio.get_running_loop().create_task(published.follow(), context=Context())
    try:
        yield published
    finally:
        await ended(task)
