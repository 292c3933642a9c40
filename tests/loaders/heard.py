"""What the change stream tells, in a test's own time."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bson import ObjectId
from bson.codec_options import CodecOptions
from pymongo.asynchronous.database import AsyncDatabase

from modelharbor.cache.following import pipeline
from modelharbor.cache.tags import Tag, tags_of
from modelharbor.db.base import Row
from modelharbor.db.connection import Database


class Heard:
    """The change stream, as the cache hears it."""

    def __init__(self, stream: Any, database: Database) -> None:
        self.stream, self.database = stream, database

    async def since(self) -> set[Tag]:
        """The tags of all changes since it was asked last."""
        mark = str(ObjectId())
        await self.database.data["cache"].insert_one({"_id": mark})
        found: set[Tag] = set()
        async for change in self.stream:
            if change["id"] == mark:
                return found
            found.update(tags_of(change))
        raise AssertionError("the stream has ended")


@asynccontextmanager
async def hearing(database: Database) -> AsyncIterator[Heard]:
    plain: AsyncDatabase[Row] = database.data.with_options(
        codec_options=CodecOptions(tz_aware=False)
    )
    async with await plain.watch(pipeline(), full_document="updateLookup") as stream:
        yield Heard(stream, database)


@dataclass
class Told:
    """What has been heard, as far as a test lets it be."""

    position: int = 1
    version: int = 1
    bumps: dict[Tag, int] = field(default_factory=dict)

    def is_current(self, position: int, tags: Collection[Tag]) -> bool:
        return position > 0 and all(self.bumps.get(tag, 0) <= position for tag in tags)

    async def hear(self, heard: Heard) -> None:
        self.position += 1
        self.version += 1
        self.bumps |= dict.fromkeys(await heard.since(), self.position)
