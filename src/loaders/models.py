"""Models, and what belongs to each: card, aliases, likes, facets."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import orjson
from bson import ObjectId

from modelharbor.auth.viewer import PUBLIC
from modelharbor.cache import keys as cache_keys
from modelharbor.cache.entries import Access
from modelharbor.cache.places import ORDERED
from modelharbor.cache.tags import Tag, entity
from modelharbor.db.base import Row
from modelharbor.db.conditions import all_of
from modelharbor.db.keyset import Filter, Sorted
from modelharbor.db.models import CardDocument, ModelDocument
from modelharbor.db.versions import VersionStatus

from .base import Loader, Reads, Sharing
from .pages import OfTotalsLoader, PageLoader, Total
from .rows import RowByIdLoader
from .search import text_search
from .told import Between, by_key, by_name, of_list

CACHE_SECONDS: Final = 20  # for which an estimate or a facet is kept
WITH_CONTENTS: Final = "file_sha256"
"""Stands in a filter for `_id`s that must be looked up: models that hold a file with this hash."""


def access_to(rows: Iterable[Row | None]) -> Access:
    """On what it depends that these models were found, or not."""
    for row in rows:
        if row is None or PUBLIC not in row["principals"]:
            return Access.RIGHTS
    return Access.ANYBODY


class ModelByIdLoader(RowByIdLoader):
    collection, document = "models", ModelDocument
    always = frozenset({"_id", "principals"})
    sharing, is_told = Sharing.EQUAL_RIGHTS, True

    def base(self) -> Row:
        return self.reads.viewer.visible

    def access(self, keys: Sequence[ObjectId], found: Mapping[ObjectId, Any]) -> Access:
        return access_to(found.get(key) for key in keys)


class ModelName(NamedTuple):
    """In lower case, as names are compared."""

    owner: str
    name: str


def told_of(
    keys: Iterable[ModelName | ObjectId], found: Mapping[ModelName | ObjectId, Row | None]
) -> list[Tag]:
    """Models by name or id, there or not."""
    told: list[Tag] = []
    for key in keys:
        row = found.get(key)
        if row is not None:  # no other has its name meanwhile
            told.append(entity("models", row["_id"]))
        elif isinstance(key, ModelName):
            told += by_name(key.owner)
        else:
            told.append(entity("models", key))
    return told


class ModelByNameLoader(Loader[ModelName | ObjectId, Row | None, None]):
    """Models, each by owner and name in any case, or by its id."""

    document = ModelDocument
    sharing = Sharing.EQUAL_RIGHTS
    shows = "_id"

    @property
    def most_keys(self) -> int:
        return 50  # MongoDB plans each of them anew

    async def batch_load(self, keys: list[ModelName | ObjectId]) -> list[Row | None]:
        found: dict[ModelName | ObjectId, Row] = {}
        # Rights stand in each part, for MongoDB plans the parts of a bare `$or` one by one.
        wanted = [{**_named(key), **self.reads.viewer.visible} for key in keys]
        query = wanted[0] if len(wanted) == 1 else {"$or": wanted}
        for row in await self.find("models", query, self.names(*_FOUND_BY)):
            found[row["_id"]] = row
            found[ModelName(row["owner_login_lower"], row["name_lower"])] = row
        return [found.get(key) for key in keys]

    def tags(
        self, keys: Sequence[ModelName | ObjectId], found: Mapping[ModelName | ObjectId, Any]
    ) -> list[Tag]:
        return told_of(keys, found)

    def access(
        self, keys: Sequence[ModelName | ObjectId], found: Mapping[ModelName | ObjectId, Any]
    ) -> Access:
        return access_to(found.get(key) for key in keys)


_FOUND_BY: Final = ("_id", "owner_login_lower", "name_lower", "principals")


def _named(key: ModelName | ObjectId) -> Row:
    if isinstance(key, ModelName):
        return {"owner_login_lower": key.owner, "name_lower": key.name}
    return {"_id": key}


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds contents, as far as the viewer may see it."""

    files: dict[ObjectId, int]  # how many, by model
    deleted: list[ObjectId]  # versions of these models whose files do not count


class HoldersByContentsLoader(Loader[str, Holders, None]):
    """Which models hold contents, and in how many files of versions that are not deleted.

    Three commands for all hashes: the files by their index, then the models by id, then which of
    their versions are deleted; a fourth where some are.
    """

    async def batch_load(self, keys: list[str]) -> list[Holders]:
        groups = await self.counted({"sha256": {"$in": keys}})
        ids = list({model_id for _, model_id in groups})
        visible = {"_id": {"$in": ids}, **self.reads.viewer.visible}
        seen = {row["_id"] for row in await self.find("models", visible, ["_id"])}
        gone = {"model_id": {"$in": list(seen)}, "status": VersionStatus.DELETED.value}
        deleted = [row["_id"] for row in await self.find("versions", gone, ["_id"])] if seen else []
        if deleted:
            groups -= await self.counted({"sha256": {"$in": keys}, "version_id": {"$in": deleted}})
        found: dict[str, Holders] = {key: Holders({}, deleted) for key in keys}
        for (sha256, model_id), count in groups.items():
            if model_id in seen and count > 0:
                found[sha256].files[model_id] = count
        return [found[key] for key in keys]

    async def counted(self, query: Row) -> "Counter[tuple[str, ObjectId]]":
        """How many files match, by hash and model."""
        together = {"sha256": "$sha256", "model_id": "$model_id"}
        rows = await self.reads.database.aggregate(
            "files", [{"$match": query}, {"$group": {"_id": together, "count": {"$sum": 1}}}]
        )
        return Counter(
            {(row["_id"]["sha256"], row["_id"]["model_id"]): row["count"] for row in rows}
        )


async def with_holders(reads: Reads, query: Row) -> Row:
    """The filter with `file_sha256` in it replaced by the ids of the models that hold it."""
    if WITH_CONTENTS in query:
        holders = await reads.loader(HoldersByContentsLoader, None).load(query[WITH_CONTENTS])
        rest = {key: value for key, value in query.items() if key != WITH_CONTENTS}
        query = all_of([rest, {"_id": {"$in": list(holders.files)}}])
    return {
        key: [await with_holders(reads, part) for part in value]
        if key in ("$and", "$or", "$nor")
        else value
        for key, value in query.items()
    }


class ModelPageLoader(PageLoader[str]):
    """Models that the viewer may see; with `search` by words, which all must occur."""

    collection, document = "models", ModelDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return self.reads.viewer.visible

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        query = await with_holders(self.reads, self.query)
        page = self.page("root", await self.one(query))
        page["total"] = Total("models", query=Filter(all_of([self.once, query])))
        return [page for _ in keys]

    def tags(self, keys: Sequence[str], found: Mapping[str, Any]) -> list[Tag] | None:
        page, order = found[keys[0]], self.arguments.order
        by = () if order.kind is Sorted.SCORE or order.path in ORDERED else (order.path,)
        between = self.between(page) if order.path in ORDERED else None
        told = of_list("models", all_of([self.once, self.query]), *by, between=between)
        if told is not None:
            told += by_key("models", (row["_id"] for row in page["nodes"]))
            if between is not None and page["behind"] is not None:
                told.append(entity("models", page["behind"]["_id"]))
        return told

    def between(self, page: Row) -> Between:
        """From where the page begins to the row behind it."""
        window = self.arguments
        start, end = (
            (window.before, window.after) if window.backward else (window.after, window.before)
        )
        first = start and start.value
        last = window.order.value(page["behind"]) if page["behind"] else end and end.value
        least, greatest = (first, last) if window.direction > 0 else (last, first)
        return Between(window.order.path, least, greatest)

    @property
    def once(self) -> Row:
        search = self.arguments.search
        return {"$text": {"$search": text_search(search)}} if search is not None else {}

    async def one(self, query: Row) -> list[Row]:
        window = self.arguments
        if window.order.kind is not Sorted.SCORE:
            return await super().one(query)
        pipeline: list[Row] = [
            {"$match": all_of([self.once, query])},
            {"$set": {"score": {"$meta": "textScore"}}},
            {"$match": window.between({})},
            {"$sort": window.sort},
            {"$limit": window.limit + 1},
        ]
        if self.projection:
            pipeline.append({"$project": self.projection})
        return await self.reads.database.aggregate("models", pipeline)


class Estimate(int):
    """A count, and when it was made (seconds since 1970)."""

    at: float

    @classmethod
    def of(cls, count: int, at: float) -> Self:
        made = cls(count)
        made.at = at
        return made


def _dated(value: Any) -> bytes:
    return orjson.dumps([time.time(), value])


class EstimateLoader(OfTotalsLoader[Estimate, None]):
    """Counts that may be as old as the cache keeps them."""

    async def batch_load(self, keys: list[Total]) -> list[Estimate]:
        return await asyncio.gather(*[self.estimate(total) for total in keys])

    async def estimate(self, total: Total) -> Estimate:
        query = total.query or Filter({})
        key = cache_keys.model_count(query.raw)
        cached = await self.reads.cache.get(key)
        if cached is None:
            cached = _dated(await self.reads.database.count("models", query.data))
            await self.reads.cache.put(key, cached, CACHE_SECONDS)
        at, count = orjson.loads(cached)
        return Estimate.of(count, at)

    def age(self, keys: Sequence[Total], found: Mapping[Total, Any]) -> float:
        return _age(found[key].at for key in keys)


def _age(made: Iterable[float]) -> float:
    """Of the oldest; clocks may differ."""
    return max(0.0, time.time() - min(made))


PARAMETER_RANGE: Final = "parameter range"
"""Among the paths of facets: no stored name, but what `parameters` comes to."""
_RANGES: Final = {
    "UNDER_100M": 10**8,
    "100M_TO_1B": 10**9,
    "1B_TO_10B": 10**10,
    "10B_TO_100B": 10**11,
}
_EXPRESSIONS: Final[dict[str, Row]] = {
    PARAMETER_RANGE: {
        "$switch": {
            "branches": [
                {"case": {"$lte": ["$parameters", 0]}, "then": None},
                *(
                    {"case": {"$lt": ["$parameters", end]}, "then": name}
                    for name, end in _RANGES.items()
                ),
            ],
            "default": "OVER_100B",
        }
    }
}


@dataclass(frozen=True, slots=True)
class FacetsWanted:
    fields: tuple[tuple[str, str], ...]  # (name for the client, stored path)
    limit: int


class FacetsLoader(OfTotalsLoader[list[Row], FacetsWanted]):
    """The most frequent values of fields, among all models of a list."""

    async def batch_load(self, keys: list[Total]) -> list[list[Row]]:
        return await asyncio.gather(*[self.facets(total) for total in keys])

    async def facets(self, total: Total) -> list[Row]:
        return await asyncio.gather(
            *[self.facet(total, name, path) for name, path in self.arguments.fields]
        )

    async def facet(self, total: Total, name: str, path: str) -> Row:
        query = total.query or Filter({})
        key = cache_keys.model_facets(query.raw, name, self.arguments.limit)
        cached = await self.reads.cache.get(key)
        if cached is None:
            cached = _dated(await self.buckets(query.data, path))
            await self.reads.cache.put(key, cached, CACHE_SECONDS)
        at, buckets = orjson.loads(cached)
        return {"field": name, "buckets": buckets, "at": at}

    @property
    def of_rows(self) -> Sequence[str]:
        return [
            "parameters" if path == PARAMETER_RANGE else path for _, path in self.arguments.fields
        ]

    def age(self, keys: Sequence[Total], found: Mapping[Total, Any]) -> float:
        return _age(facet["at"] for key in keys for facet in found[key]) if self.of_rows else 0.0

    async def buckets(self, query: Row, path: str) -> list[Row]:
        rows = await self.reads.database.aggregate(
            "models",
            [
                {"$match": query},
                {"$project": {"_id": 0, "value": _EXPRESSIONS.get(path, f"${path}")}},
                {"$unwind": "$value"},
                {"$group": {"_id": "$value", "count": {"$sum": 1}}},
                {"$match": {"_id": {"$ne": None}}},
                {"$sort": {"count": -1, "_id": 1}},
                {"$limit": self.arguments.limit},
            ],
        )
        return [{"value": row["_id"], "count": row["count"]} for row in rows]


class CardByModelLoader(RowByIdLoader):
    """Cards, of models that were reached: a card has its model's id."""

    collection, document = "cards", CardDocument
    sharing, is_told = Sharing.EVERYBODY, True


class AliasesByVersionLoader(Loader[tuple[ObjectId, ObjectId], list[Row], None]):
    """The aliases of one version; the key is (model id, version id)."""

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[tuple[ObjectId, ObjectId]]) -> list[list[Row]]:
        models = list({model_id for model_id, _ in keys})
        rows = await self.find("models", {"_id": {"$in": models}}, ["aliases"])
        by_id = {row["_id"]: alias_rows(row["_id"], row["aliases"]) for row in rows}
        return [
            [alias for alias in by_id.get(model_id, ()) if alias["version_id"] == version_id]
            for model_id, version_id in keys
        ]

    def tags(
        self,
        keys: Sequence[tuple[ObjectId, ObjectId]],
        found: Mapping[tuple[ObjectId, ObjectId], Any],
    ) -> list[Tag]:
        return by_key("models", {model_id for model_id, _ in keys})


def alias_rows(_id: ObjectId, aliases: list[Row]) -> list[Row]:
    """Aliases of a model as rows of their own, by name."""
    return sorted(
        ({**alias, "model_id": _id} for alias in aliases), key=lambda alias: alias["name"]
    )


class LikedByModelLoader(Loader[ObjectId, bool, None]):
    """Whether the viewer likes models."""

    async def batch_load(self, keys: list[ObjectId]) -> list[bool]:
        user_id = self.reads.viewer.user_id
        if user_id is None:
            return [False for _ in keys]
        rows = await self.find(
            "likes", {"user_id": user_id, "model_id": {"$in": keys}}, ["model_id"]
        )
        liked = {row["model_id"] for row in rows}
        return [key in liked for key in keys]
