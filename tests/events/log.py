"""Writers and followers of the log, for its tests."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventDocument, Stream
from modelharbor.events.changes import Change, Topic, events_of
from modelharbor.events.position import START
from modelharbor.events.reader import Reader
from modelharbor.events.replay import missed

GUARD_SECONDS: Final = 5.0
JOBS: Final[Row] = {"stream": "jobs"}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


async def all_recorded(database: Database) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while await database.data["events"].count_documents({"position": None}):
            await asyncio.sleep(0.01)


def event(*about: ObjectId, stream: Stream = Stream.JOBS, **values: Any) -> EventDocument:
    return EventDocument(stream=stream, about=list(about), **values)


async def tell(database: Database, *about: ObjectId, **values: Any) -> ObjectId:
    """One event in a transaction of its own."""
    document = event(*about, **values)

    async def work(session: AsyncClientSession) -> None:
        await document.insert(session=session)

    await database.transaction(work)
    return document.id


@dataclass
class Listener:
    """What a subscriber was handed, and whether its history was lost."""

    changes: list[Change] = field(default_factory=list)
    losses: int = 0

    def take(self, change: Change) -> None:
        self.changes.append(change)

    def lose(self) -> None:
        self.losses += 1

    @property
    def ids(self) -> list[ObjectId]:
        return [change.row["_id"] for change in self.changes]


@asynccontextmanager
async def listening(reader: Reader, topics: Iterable[Topic]) -> AsyncIterator[Listener]:
    listener = Listener()
    await reader.ready()
    unsubscribe = reader.subscribe(topics, listener.take, listener.lose)
    try:
        yield listener
    finally:
        unsubscribe()


@dataclass
class Storm:
    """Writers at once, each with transactions that stay open for a while after their ids were made."""

    database: Database
    chance: random.Random
    subjects: list[ObjectId] = field(default_factory=lambda: [ObjectId() for _ in range(12)])
    written: list[ObjectId] = field(default_factory=list)
    """In no order."""

    async def blow(self, writers: int = 8, each: int = 12) -> None:
        jobs = self.database.data["jobs"]
        await jobs.insert_many([{"progress": {"current": 0}} for _ in range(writers)])
        rows = await jobs.find().to_list()
        await asyncio.gather(*[self._write(row["_id"], each) for row in rows])

    async def _write(self, job_id: ObjectId, transactions: int) -> None:
        for _ in range(transactions):
            documents = [
                event(*self.chance.sample(self.subjects, self.chance.randint(1, 3)))
                for _ in range(self.chance.randint(1, 3))
            ]
            pauses = [self.chance.uniform(0, 0.01) for _ in documents]
            reports = [self.chance.random() < 0.5 for _ in documents]

            async def work(
                session: AsyncClientSession,
                documents: list[EventDocument] = documents,
                pauses: list[float] = pauses,
                reports: list[bool] = reports,
            ) -> None:
                for document, pause, reported in zip(documents, pauses, reports, strict=True):
                    await asyncio.sleep(pause)
                    if reported:
                        await self.database.data["jobs"].update_one(
                            {"_id": job_id}, {"$inc": {"progress.current": 1}}, session=session
                        )
                    await document.insert(session=session)

            await self.database.transaction(work)
            self.written += [document.id for document in documents]


async def resumed(
    database: Database,
    reader: Reader,
    topics: Iterable[Topic],
    query: Row,
    after: str,
    count: int,
    batch: int = 500,
) -> list[Change]:
    """Subscribe, be told what was missed, then what comes: until `count` changes are there, or for
    ever, as one who was cut off does."""
    waiting: list[Change] = []
    got: list[Change] = []
    unsubscribe = reader.subscribe(topics, waiting.append, lambda: None)
    try:
        async for changes in missed(database, reader, query, after, batch):
            assert 1 <= len(changes) <= batch
            got += changes
        covered = reader.position
        while len(got) < count:
            await asyncio.sleep(0.001)
            got += [change for change in waiting if change.position > covered]
            waiting.clear()
        return got[:count]
    finally:
        unsubscribe()


async def replayed(database: Database, reader: Reader, query: Row, after: str = START) -> list[Row]:
    return [
        change.row async for changes in missed(database, reader, query, after) for change in changes
    ]


EVERYTHING: Final = [events_of(stream) for stream in Stream if stream is not Stream.MARKS]
