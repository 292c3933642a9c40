"""Rows of a collection by their id."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bson import ObjectId

from modelharbor.cache.tags import Tag
from modelharbor.db.base import Row

from .base import Loader
from .told import by_key


class RowByIdLoader(Loader[ObjectId, Row | None, None]):
    """Rows by `_id`; None where there is none, or none that the viewer may see."""

    collection: ClassVar[str]
    is_told: ClassVar[bool] = False
    """Whether tags tell of the changes of its rows."""
    always: ClassVar[frozenset[str]] = frozenset({"_id"})

    def base(self) -> Row:
        """The filter that always holds: who may see what."""
        return {}

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        wanted = keys[0] if len(keys) == 1 else {"$in": keys}
        query = {"_id": wanted, **self.base()}
        rows = await self.find(self.collection, query, self.names(*self.always))
        by_id = {row["_id"]: row for row in rows}
        return [by_id.get(key) for key in keys]

    def tags(self, keys: Sequence[ObjectId], found: Mapping[ObjectId, Any]) -> list[Tag] | None:
        return by_key(self.collection, keys) if self.is_told else None
