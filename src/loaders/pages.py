"""Pages of lists: one command for all parents of a level, whatever their number."""

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, TypeVar

from modelharbor.cache.entries import Access
from modelharbor.cache.tags import PARENTS, Tag, entity
from modelharbor.db.base import Row, value_at
from modelharbor.db.conditions import all_of
from modelharbor.db.keyset import Filter, Window

from .base import ROOT, Loader, Sharing, projection
from .told import below_each, of_list

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
A = TypeVar("A", bound=Hashable)
MOST_ROWS: Final = 10_000  # of pages that several operations read together


@dataclass(frozen=True, slots=True)
class Total:
    """What would have to be counted, if someone asks.

    Either a counter that stands in the row `key` of `collection` at `counter`, or the rows of
    `collection` that match `query`, of one parent where `parent` names the field that holds `key`.
    """

    collection: str
    key: Hashable = ROOT
    query: Filter | None = None
    parent: str | None = None
    counter: str | None = None
    known: int | None = None  # counted already
    also: "Total | None" = None  # added to it


def of_total(total: Total, *names: str) -> list[Tag] | None:
    """What a number of rows was made of, and `names` of these rows."""
    if total.also is not None:
        others, mine = of_total(total.also, *names), of_total(replace(total, also=None), *names)
        return None if others is None or mine is None else [*mine, *others]
    if total.known is not None:
        return []  # by the loader that knows
    if total.counter is not None:
        return [entity(total.collection, total.key)]
    if total.parent is not None:
        if total.parent not in PARENTS.get(total.collection, ()):
            return None
        return below_each(total.collection, total.parent, [total.key])
    return of_list(total.collection, total.query.data if total.query else {}, *names)


def access_of(total: Total) -> Access:
    """The viewer's principals stand in the filters of models."""
    if total.also is not None and access_of(total.also) is not Access.ANYBODY:
        return Access.RIGHTS
    return Access.RIGHTS if total.collection == "models" and total.query else Access.ANYBODY


class OfTotalsLoader(Loader[Total, R, A]):
    """What is worked out from the rows of lists."""

    sharing = Sharing.EVERYBODY  # who may see what is part of the query

    def tags(self, keys: Sequence[Total], found: Mapping[Total, Any]) -> list[Tag] | None:
        told: list[Tag] = []
        for total in keys:
            tags = of_total(total, *self.of_rows)
            if tags is None:
                return None
            told += tags
        return told

    def access(self, keys: Sequence[Total], found: Mapping[Total, Any]) -> Access:
        depends = any(access_of(total) is Access.RIGHTS for total in keys)
        return Access.RIGHTS if depends else Access.ANYBODY

    @property
    def of_rows(self) -> Sequence[str]:
        """Stored names that it reads of the rows."""
        return ()


class TotalLoader(OfTotalsLoader[int, None]):
    """How many rows lists have: one command for those that differ in their parent only."""

    async def batch_load(self, keys: list[Total]) -> list[int]:
        groups: dict[Hashable, list[Total]] = {}
        for total in keys:
            alone = total.parent is None and total.counter is None
            together = (
                total if alone else (total.collection, total.query, total.parent, total.counter)
            )
            groups.setdefault(together, []).append(total)
        counted = await asyncio.gather(*[self.counts(totals) for totals in groups.values()])
        found = {total: count for counts in counted for total, count in counts.items()}
        return [found[total] for total in keys]

    async def counts(self, totals: Sequence[Total]) -> dict[Total, int]:
        """Of totals that differ in their key only."""
        if totals[0].counter is not None:
            by_key = await self.counters(totals)
        elif totals[0].parent is not None:
            by_key = await self.grouped(totals)
        else:
            return {totals[0]: await self.count(totals[0])}
        return {total: by_key.get(total.key, 0) for total in totals}

    async def count(self, total: Total) -> int:
        if total.also is not None:
            alone = replace(total, also=None)
            return sum(await asyncio.gather(self.count(alone), self.count(total.also)))
        if total.known is not None:
            return total.known
        query = total.query.data if total.query else {}
        return await self.reads.database.count(total.collection, query)

    async def counters(self, totals: Sequence[Total]) -> dict[Hashable, int]:
        path = str(totals[0].counter)
        by_id = {total.key: total.key for total in totals}
        rows = await self.find(totals[0].collection, {"_id": {"$in": list(by_id)}}, [path])
        return {row["_id"]: value_at(row, path) for row in rows}

    async def grouped(self, totals: Sequence[Total]) -> dict[Hashable, int]:
        first = totals[0]
        parents = {str(first.parent): {"$in": [total.key for total in totals]}}
        match = all_of([parents, first.query.data if first.query else {}])
        rows = await self.reads.database.aggregate(
            first.collection,
            [{"$match": match}, {"$group": {"_id": f"${first.parent}", "count": {"$sum": 1}}}],
        )
        return {row["_id"]: row["count"] for row in rows}


class TooManyRowsError(Exception):
    """Lists that were to be read whole have more rows than a scan may read."""


class PageLoader(Loader[K, Row | None, Window]):
    """A page of a collection: for the root, or for each parent.

    A page is a row too: {nodes, window, has_next, has_previous, total}.
    """

    collection: ClassVar[str]
    parent: ClassVar[str | None] = None  # field of the collection that holds the parent's key
    counter: ClassVar[tuple[str, str] | None] = None
    """(collection, path) where the parent keeps the number of its rows; used without a filter."""
    always: ClassVar[frozenset[str]] = frozenset({"_id"})
    is_told: ClassVar[bool] = False
    """Whether tags tell of the changes of its rows."""
    scan_rows: int = 0
    """Where it is set, the lists of several parents are read whole, by one scan of so many rows at most:
    for parents that have few each, whoever wants all of them, in a fifth of the time."""

    @property
    def most_keys(self) -> int:
        return max(1, MOST_ROWS // (self.arguments.limit + 1))

    def tags(self, keys: Sequence[K], found: Mapping[K, Any]) -> list[Tag] | None:
        if not self.is_told or self.parent is None:
            return None
        return below_each(self.collection, self.parent, keys)

    def base(self) -> Row:
        """The filter that always holds: who may see what."""
        return {}

    async def batch_load(self, keys: list[K]) -> list[Row | None]:
        if self.parent is None:
            page = self.page(ROOT, await self.one(self.query))
            return [page for _ in keys]
        found = await self.lists(keys, self.parent)
        return [self.page(key, found[key]) for key in keys]

    async def lists(self, keys: list[K], parent: str) -> dict[K, list[Row]]:
        if len(keys) == 1:
            return {keys[0]: await self.one(all_of([{parent: keys[0]}, self.query]))}
        if self.scan_rows:
            return await self.scanned(keys, parent)
        return await self.many(keys, self.query)

    @property
    def once(self) -> Row:
        """A condition that may stand in a query once only, such as `$text`."""
        return {}

    @property
    def query(self) -> Row:
        """What the rows match, apart from their parent."""
        return all_of([self.base(), self.arguments.query.data])

    async def one(self, query: Row) -> list[Row]:
        """The rows of one list."""
        window = self.arguments
        return await self.reads.database.find(
            self.collection,
            all_of([self.once, window.between(query)]),
            projection=self.projection,
            sort=window.sort,
            limit=window.limit + 1,
        )

    async def many(self, keys: list[K], base: Row) -> dict[K, list[Row]]:
        """The rows of the lists of all parents. `$lookup` keeps the limit for each of them; a
        `$group` would read all children."""
        window = self.arguments
        pipeline: list[Row] = [
            {"$match": window.between(base)},
            {"$sort": window.sort},
            {"$limit": window.limit + 1},
        ]
        if self.projection:
            pipeline.append({"$project": self.projection})
        found = await self.reads.database.aggregate(
            None,
            [
                {"$documents": [{"key": key} for key in keys]},
                {
                    "$lookup": {
                        "from": self.collection,
                        "localField": "key",
                        "foreignField": self.parent,
                        "pipeline": pipeline,
                        "as": "rows",
                    }
                },
            ],
        )
        return {row["key"]: row["rows"] for row in found}

    async def scanned(self, keys: list[K], parent: str) -> dict[K, list[Row]]:
        """The rows of whole lists, along the index of their order; TooManyRowsError beyond `scan_rows`."""
        window, found = self.arguments, {key: list[Row]() for key in keys}
        names = self.projection
        rows = await self.reads.database.find(
            self.collection,
            all_of([{parent: {"$in": keys}}, window.between(self.query)]),
            projection={**names, parent: 1} if names else None,
            sort={parent: window.direction, **window.sort},
            limit=self.scan_rows + 1,
            batch_size=self.scan_rows + 1,
        )
        if len(rows) > self.scan_rows:
            raise TooManyRowsError
        for row in rows:
            found[value_at(row, parent)].append(row)
        return found

    @property
    def projection(self) -> dict[str, int] | None:
        if not self.fields:
            return None
        return projection(self.fields | self.always | {self.arguments.order.path})

    def page(self, key: Hashable, found: list[Row]) -> Row:
        window = self.arguments
        more = len(found) > window.limit
        nodes = found[: window.limit]
        if window.backward:
            nodes.reverse()
        return {
            "nodes": nodes,
            "window": window,
            "has_next": window.before is not None if window.backward else more,
            "has_previous": more if window.backward else window.after is not None,
            "total": self.total(key),
            "behind": found[window.limit] if more else None,
        }

    def total(self, key: Hashable) -> Total:
        if self.counter is not None and not self.arguments.query.data:
            return Total(self.counter[0], key, counter=self.counter[1])
        return Total(self.collection, key, query=Filter(self.query), parent=self.parent)
