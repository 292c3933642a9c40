"""Sources followed as the engine follows them, without anything that is sent."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bson import ObjectId

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventDocument, Stream
from modelharbor.events.changes import Change, What, events_of
from modelharbor.events.reader import Reader, open_reader
from modelharbor.loaders.base import Reads
from modelharbor.settings import Settings
from modelharbor.streams.base import Follower, Happening, Source


@dataclass
class Watched:
    """One source, followed by one viewer."""

    world: "Watching"
    source: Source
    viewer: Viewer
    follower: Follower
    changes: list[Change] = field(default_factory=list)

    async def happenings(self) -> list[Happening]:
        """What came of all that was committed until now."""
        await self.world.settle()
        changes, self.changes = self.changes, []
        return await self.follower.happenings(self.world.reads(self.viewer), changes)

    async def rows(self) -> list[Row]:
        return [each.row for each in await self.happenings()]


@dataclass
class Watching:
    database: Database
    cache: Cache
    reader: Reader

    def reads(self, viewer: Viewer) -> Reads:
        links = DownloadLinks(b"k" * 32, "http://test")
        return Reads(database=self.database, cache=self.cache, viewer=viewer, links=links)

    async def watch(self, source: Source, viewer: Viewer) -> Watched:
        """Checked, and begun. Raises what the check raises."""
        await source.check(self.reads(viewer))
        await self.reader.ready()
        found = Watched(self, source, viewer, source.follow())
        self.reader.subscribe(
            source.topics, lambda change: found.changes.append(change), lambda: None
        )
        await found.follower.begin(self.reads(viewer), self.reader.position)
        return found

    async def settle(self) -> None:
        """Back when all that was committed has been handed over."""
        seen, mark = asyncio.Event(), EventDocument(stream=Stream.MARKS)

        def take(change: Change) -> None:
            if change.row["_id"] == mark.id:
                seen.set()

        end = self.reader.subscribe([events_of(Stream.MARKS)], take, lambda: None)
        try:
            await mark.insert()
            async with asyncio.timeout(20):
                await seen.wait()
        finally:
            end()

    async def logged(self, query: Row) -> list[Change]:
        """Events of the log that a query finds, with places of their own."""
        rows = await self.database.data["events"].find(query).sort("_id", 1).to_list()
        return [event(row, number) for number, row in enumerate(rows, 1)]


@asynccontextmanager
async def watching(database: Database, cache: Cache, settings: Settings) -> AsyncIterator[Watching]:
    async with open_reader(database, settings) as reader:
        yield Watching(database, cache, reader)


def place(number: int) -> str:
    return f"{number:024x}"


def event(row: Row, number: int) -> Change:
    return Change(What.EVENT, place(number), row)


def progress(job_id: ObjectId, number: int, **updated: Any) -> Change:
    """`progress__current=…` stands for the stored name `progress.current`."""
    names = {name.replace("__", "."): value for name, value in updated.items()}
    return Change(What.PROGRESS, place(number), {"job_id": job_id, "updated": names})


def told(happenings: Sequence[Happening]) -> list[tuple[str, int, bool, bool]]:
    """Of happenings of jobs: state, sequence, whether passing, whether final."""
    return [
        (
            each.row["job"]["state"],
            each.row["job"]["progress"]["sequence"],
            each.is_passing,
            each.is_final,
        )
        for each in happenings
    ]
