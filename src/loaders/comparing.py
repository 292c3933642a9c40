"""What differs between two versions: their files, by path and by contents, and their tensors.

Paths are merged in the database. A page reads so many files of each version as it has rows, for the
first paths of both are among the first of each; only counts, sums and pages of some kinds of changes go
through all files of both.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple

from bson import ObjectId

from modelharbor.cache.entries import Access
from modelharbor.cache.tags import Tag
from modelharbor.db.base import Row
from modelharbor.db.files import FileRole
from modelharbor.db.versions import VersionDocument

from .base import Loader, Sharing
from .files import by_contents
from .models import access_to
from .pages import PageLoader
from .told import below_each, by_key
from .versions import LISTED

ADDED, REMOVED, MODIFIED, UNCHANGED = "ADDED", "REMOVED", "MODIFIED", "UNCHANGED"
MOST_WEIGHTS: Final = (
    1000  # contents of weights of both versions; of more, tensors are not compared
)
MOST_NAMED: Final = 200  # contents that only one has, whose tensors are compared by name
KIND: Final[Row] = {
    "$switch": {
        "branches": [
            {"case": {"$eq": [{"$type": "$both.base"}, "missing"]}, "then": ADDED},
            {"case": {"$eq": [{"$type": "$both.head"}, "missing"]}, "then": REMOVED},
            {"case": {"$eq": ["$both.base.sha256", "$both.head.sha256"]}, "then": UNCHANGED},
        ],
        "default": MODIFIED,
    }
}
TOGETHER: Final[Row] = {"$group": {"_id": "$path", "both": {"$mergeObjects": "$$ROOT"}}}
"""Of rows {path, base} and {path, head}: one for each path."""

Side = Literal["base", "head"]


class Versions(NamedTuple):
    """What is compared: ids of versions, and of the model that the first one belongs to."""

    base: ObjectId
    head: ObjectId
    base_model: ObjectId


class ComparisonLoader(Loader[tuple[ObjectId, ObjectId], Row | None, None]):
    """Two versions, of one model or of two; None where one of them is not there for the viewer.

    A row has the ids of `Versions` as `base_id`, `head_id`, `base_model_id`, and what is compared of
    the versions themselves by its name behind `base_` and `head_`. Two commands.
    """

    COMPARED: ClassVar = ("parameters", "properties")
    assert set(COMPARED) <= set(VersionDocument.model_fields)
    of_models: Mapping[ObjectId, Row] | None = None
    """Those that were seen, of those that were looked for: `looked_for`."""
    looked_for: Sequence[ObjectId] = ()

    async def batch_load(self, keys: list[tuple[ObjectId, ObjectId]]) -> list[Row | None]:
        ids = list(dict.fromkeys(each for key in keys for each in key))
        names = ["model_id", *self.COMPARED]
        rows = await self.find("versions", {"_id": {"$in": ids}, **LISTED}, names)
        self.looked_for = list(dict.fromkeys(row["model_id"] for row in rows))
        seen = {"_id": {"$in": self.looked_for}, **self.reads.viewer.visible}
        models = await self.find("models", seen, ["principals"]) if rows else []
        self.of_models = {row["_id"]: row for row in models}
        versions = {row["_id"]: row for row in rows if row["model_id"] in self.of_models}
        return [self.compared(versions.get(base), versions.get(head)) for base, head in keys]

    def compared(self, base: Row | None, head: Row | None) -> Row | None:
        if base is None or head is None:
            return None
        return {
            "base_id": base["_id"],
            "head_id": head["_id"],
            "base_model_id": base["model_id"],
            **{f"base_{name}": base.get(name) for name in self.COMPARED},
            **{f"head_{name}": head.get(name) for name in self.COMPARED},
        }

    def tags(
        self,
        keys: Sequence[tuple[ObjectId, ObjectId]],
        found: Mapping[tuple[ObjectId, ObjectId], Any],
    ) -> list[Tag] | None:
        if self.of_models is None:
            return None
        ids = dict.fromkeys(each for key in keys for each in key)
        return [*by_key("versions", ids), *by_key("models", self.looked_for)]

    def access(
        self,
        keys: Sequence[tuple[ObjectId, ObjectId]],
        found: Mapping[tuple[ObjectId, ObjectId], Any],
    ) -> Access:
        seen = self.of_models or {}
        return access_to(seen.get(each) for each in self.looked_for)


def below_both(keys: Iterable[Versions]) -> list[Tag]:
    ids = dict.fromkeys(each for key in keys for each in (key.base, key.head))
    return below_each("files", "version_id", ids)


# Files --------------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """Of a file of the head, to be looked for in the base."""

    base: ObjectId
    base_model: ObjectId
    sha256: str
    size_bytes: int
    known: int | None
    """How many of its bytes the base has, where no look is needed."""


@dataclass(frozen=True, slots=True)
class Changes:
    """A list of changes, to be counted; `kinds` None: all."""

    versions: Versions
    kinds: frozenset[str] | None


class FileChangesLoader(PageLoader[Versions]):
    """A page of the paths of both versions. The arguments' query is about `change` alone."""

    collection = "files"
    sharing = Sharing.EVERYBODY

    @property
    def most_keys(self) -> int:
        return 10  # each is a command of its own

    async def batch_load(self, keys: list[Versions]) -> list[Row | None]:
        keys = [Versions(*key) for key in keys]
        found = await asyncio.gather(*[self.changes(key) for key in keys])
        return [self.page(key, rows) for key, rows in zip(keys, found, strict=True)]

    def tags(self, keys: Sequence[Versions], found: Mapping[Versions, Any]) -> list[Tag]:
        return below_both(Versions(*key) for key in keys)

    async def changes(self, versions: Versions) -> list[Row]:
        kinds = kinds_of(self.arguments.query.data)
        stages = self.all_kinds(versions) if kinds is None else self.some_kinds(versions, kinds)
        rows = await self.reads.database.aggregate("files", stages)
        return [change(versions, row.get("base"), row.get("head")) for row in rows]

    def all_kinds(self, versions: Versions) -> list[Row]:
        """As many files of each version as the page may have rows."""
        window = self.arguments
        ends: list[Row] = [{"$sort": window.sort}, {"$limit": window.limit + 1}]
        return [
            *union(versions, window.between, (), ends),
            TOGETHER,
            *self.page_of_paths,
            {"$project": {"base": "$both.base", "head": "$both.head"}},
        ]

    def some_kinds(self, versions: Versions, kinds: frozenset[str]) -> list[Row]:
        """All files beyond the place, as far as it takes to tell what changed; then those of the page."""
        return [
            *union(versions, self.arguments.between, ("_id", "sha256"), []),
            TOGETHER,
            {"$match": {"$expr": {"$in": [KIND, sorted(kinds)]}}},
            *self.page_of_paths,
            *(self.lookup(name) for name in ("base", "head")),
            {"$project": {"base": {"$first": "$base"}, "head": {"$first": "$head"}}},
        ]

    def lookup(self, name: str) -> Row:
        return {
            "$lookup": {
                "from": "files",
                "localField": f"both.{name}._id",
                "foreignField": "_id",
                "as": name,
            }
        }

    @property
    def page_of_paths(self) -> list[Row]:
        window = self.arguments
        return [{"$sort": {"_id": window.direction}}, {"$limit": window.limit + 1}]

    def total(self, key: Any) -> Any:
        return Changes(key, kinds_of(self.arguments.query.data))


SIDES: Final[tuple[Side, Side]] = ("base", "head")


def kinds_of(query: Row) -> frozenset[str] | None:
    """From a filter on `change`; None: all of them."""
    if not query:
        return None
    wanted = query["change"]
    return frozenset(wanted["$in"] if isinstance(wanted, dict) else [wanted])


def union(versions: Versions, between: Any, names: Sequence[str], ends: list[Row]) -> list[Row]:
    """Rows {path, base} of the files of the one, and {path, head} of those of the other: of each file
    the `names`, or all of it."""
    base, head = (
        [
            {"$match": between({"version_id": version_id})},
            *ends,
            {
                "$project": {
                    "_id": 0,
                    "path": 1,
                    side: {name: f"${name}" for name in names} if names else "$$ROOT",
                }
            },
        ]
        for side, version_id in zip(SIDES, versions[:2], strict=True)
    )
    return [*base, {"$unionWith": {"coll": "files", "pipeline": head}}]


def change(versions: Versions, base: Row | None, head: Row | None) -> Row:
    """As KIND tells it to the database; one of the two is there."""
    file = head if head is not None else base
    assert file is not None
    known: int | None = None
    if base is None:
        kind = ADDED
    elif head is None:
        kind, known = REMOVED, 0
    elif base["sha256"] == head["sha256"]:
        kind, known = UNCHANGED, head["size_bytes"]
    else:
        kind = MODIFIED
    return {
        "_id": file["_id"],
        "path": file["path"],
        "change": kind,
        "base": base,
        "head": head,
        "contents": Contents(
            versions.base, versions.base_model, file["sha256"], file["size_bytes"], known
        ),
    }


class SharedBytesLoader(Loader[Contents, int, None]):
    """How many bytes of files of the head the base has, in whatever file. One command at most."""

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[Contents]) -> list[int]:
        unknown = [key for key in keys if key.known is None]
        found: set[tuple[ObjectId, str]] = set()
        if unknown:
            query = {  # the model, so that contents which many models have are found by the index
                "sha256": {"$in": list({key.sha256 for key in unknown})},
                "model_id": {"$in": list({key.base_model for key in unknown})},
                "version_id": {"$in": list({key.base for key in unknown})},
            }
            rows = await self.find("files", query, ["version_id", "sha256"])
            found = {(row["version_id"], row["sha256"]) for row in rows}
        return [
            key.known
            if key.known is not None
            else key.size_bytes * ((key.base, key.sha256) in found)
            for key in keys
        ]

    def tags(self, keys: Sequence[Contents], found: Mapping[Contents, Any]) -> list[Tag]:
        return below_each("files", "version_id", dict.fromkeys(key.base for key in keys))


class ChangeCountLoader(Loader[Changes, int, None]):
    """How many paths lists of changes have. One command for two versions, whatever kinds are wanted."""

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[Changes]) -> list[int]:
        pairs = list(dict.fromkeys(key.versions for key in keys))
        counted = await asyncio.gather(*[self.counts(pair) for pair in pairs])
        by_pair = dict(zip(pairs, counted, strict=True))
        return [
            sum(
                count
                for kind, count in by_pair[key.versions].items()
                if key.kinds is None or kind in key.kinds
            )
            for key in keys
        ]

    async def counts(self, versions: Versions) -> dict[str, int]:
        rows = await self.reads.database.aggregate(
            "files",
            [
                *union(versions, lambda base: base, ("sha256",), []),
                TOGETHER,
                {"$group": {"_id": KIND, "count": {"$sum": 1}}},
            ],
        )
        return {row["_id"]: row["count"] for row in rows}

    def tags(self, keys: Sequence[Changes], found: Mapping[Changes, Any]) -> list[Tag]:
        return below_both(key.versions for key in keys)


class ComparedBytesLoader(Loader[Versions, Row, None]):
    """Of the bytes of all files of the head those that the base has too, and the others:
    {shared, added}. One command for two versions."""

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[Versions]) -> list[Any]:
        return await asyncio.gather(*[self.sums(Versions(*key)) for key in keys])

    async def sums(self, versions: Versions) -> Row:
        of_base = [
            {"$match": {"version_id": versions.base}},
            {"$project": {"_id": 0, "sha256": 1, "is_shared": {"$literal": True}}},
        ]
        rows = await self.reads.database.aggregate(
            "files",
            [
                {"$match": {"version_id": versions.head}},
                {"$project": {"_id": 0, "sha256": 1, "size_bytes": 1}},
                {"$unionWith": {"coll": "files", "pipeline": of_base}},
                {
                    "$group": {
                        "_id": "$sha256",
                        "bytes": {"$sum": "$size_bytes"},
                        "is_shared": {"$max": "$is_shared"},
                    }
                },
                {"$group": {"_id": "$is_shared", "bytes": {"$sum": "$bytes"}}},
            ],
        )
        sums = {row["_id"] is True: row["bytes"] for row in rows}
        return {"shared": sums.get(True, 0), "added": sums.get(False, 0)}

    def tags(self, keys: Sequence[Versions], found: Mapping[Versions, Any]) -> list[Tag]:
        return below_both(Versions(*key) for key in keys)


class _BytesLoader(Loader[Versions, int, None]):
    """One of the two sums: who asks for both reads once."""

    part: ClassVar[str]
    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[Versions]) -> list[int]:
        sums = await self.reads.loader(ComparedBytesLoader, None).load_many(keys)
        return [each[self.part] for each in sums]

    def tags(self, keys: Sequence[Versions], found: Mapping[Versions, Any]) -> list[Tag]:
        return below_both(Versions(*key) for key in keys)


class BytesSharedLoader(_BytesLoader):
    part = "shared"


class BytesAddedLoader(_BytesLoader):
    part = "added"


# Tensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Weights:
    """Contents of weights, and what their header says."""

    sha256: str
    format: str
    tensors: Row


class TensorComparisonLoader(Loader[Versions, Row | None, None]):
    """{base, head, added, removed, changed}: what the headers of all weights say, and how many tensors
    differ by name; None where no header tells of any, or there are too many weights.

    Two commands; by name only contents are compared that one of the two alone has.
    """

    looked_at: Sequence[str] | None = None

    async def batch_load(self, keys: list[Versions]) -> list[Row | None]:
        self.looked_at = []
        return await asyncio.gather(*[self.compared(Versions(*key)) for key in keys])

    def tags(self, keys: Sequence[Versions], found: Mapping[Versions, Any]) -> list[Tag] | None:
        if self.looked_at is None:
            return None
        return [*below_both(Versions(*key) for key in keys), *by_contents(self.looked_at)]

    def access(self, keys: Sequence[Versions], found: Mapping[Versions, Any]) -> Access:
        return Access.ANYBODY

    async def compared(self, versions: Versions) -> Row | None:
        rows = await self.weights(versions)
        self.looked_at = [*(self.looked_at or ()), *(row["_id"] for row in rows)]
        if len(rows) > MOST_WEIGHTS:
            return None
        base, head = (chosen([row for row in rows if row[side]]) for side in SIDES)
        if not base and not head:
            return None
        return {
            "base": summary(base),
            "head": summary(head),
            **await self.by_name(
                {each.sha256: each for each in base}, {each.sha256: each for each in head}
            ),
        }

    async def weights(self, versions: Versions) -> list[Row]:
        is_of = {
            side: {"$max": {"$eq": ["$version_id", version_id]}}
            for side, version_id in zip(SIDES, versions[:2], strict=True)
        }
        return await self.reads.database.aggregate(
            "files",
            [
                {
                    "$match": {
                        "version_id": {"$in": sorted({versions.base, versions.head})},
                        "role": FileRole.WEIGHTS.value,
                    }
                },
                {"$group": {"_id": "$sha256", **is_of}},
                {"$limit": MOST_WEIGHTS + 1},
                {
                    "$lookup": {
                        "from": "blobs",
                        "localField": "_id",
                        "foreignField": "sha256",
                        "pipeline": [
                            {"$project": {"inspection.format": 1, "inspection.tensors": 1}}
                        ],
                        "as": "blob",
                    }
                },
            ],
        )

    async def by_name(
        self, base: Mapping[str, _Weights], head: Mapping[str, _Weights]
    ) -> dict[str, int | None]:
        differing = base.keys() ^ head.keys()
        unknown: dict[str, int | None] = dict.fromkeys(("added", "removed", "changed"))
        if len(differing) > MOST_NAMED:
            return unknown
        query = {"sha256": {"$in": sorted(differing)}}
        rows = await self.find("blobs", query, ["sha256", "inspection.header"]) if differing else []
        headers = {row["sha256"]: (row.get("inspection") or {}).get("header") for row in rows}
        named: dict[Side, dict[str, Any]] = {"base": {}, "head": {}}
        for digest in differing:
            side: Side = "base" if digest in base else "head"
            weights = base.get(digest) or head[digest]
            names = tensors_by_name(headers.get(digest), weights.tensors["tensor_count"])
            if names is None:
                return unknown
            named[side] |= names
        old, new = named["base"], named["head"]
        return {
            "added": len(new.keys() - old.keys()),
            "removed": len(old.keys() - new.keys()),
            "changed": sum(old[name] != new[name] for name in old.keys() & new.keys()),
        }


def chosen(rows: Sequence[Row]) -> list[_Weights]:
    """Those that tell of tensors. Where several formats hold the same weights, of the one with the most
    parameters, as `ModelVersion.parameters` counts."""
    by_format: dict[str, list[_Weights]] = {}
    for row in rows:
        inspection = (row["blob"][0].get("inspection") if row["blob"] else None) or {}
        tensors = inspection.get("tensors")
        if tensors is not None:
            each = _Weights(row["_id"], inspection["format"], tensors)
            by_format.setdefault(each.format, []).append(each)
    return max(
        (by_format[name] for name in sorted(by_format)),
        key=lambda weights: sum(each.tensors["parameter_count"] for each in weights),
        default=[],
    )


def summary(weights: Sequence[_Weights]) -> Row | None:
    """All together; what they do not say alike is None."""
    if not weights:
        return None
    by_dtype: dict[str, int] = {}
    for each in weights:
        for dtype, count in each.tensors["parameters_by_dtype"].items():
            by_dtype[dtype] = by_dtype.get(dtype, 0) + count
    alike: Row = {}
    for name in ("architecture", "context_length", "quantization"):
        said = {each.tensors.get(name) for each in weights} - {None}
        alike[name] = said.pop() if len(said) == 1 else None
    return {
        "tensor_count": sum(each.tensors["tensor_count"] for each in weights),
        "parameter_count": sum(each.tensors["parameter_count"] for each in weights),
        "parameters_by_dtype": dict(sorted(by_dtype.items())),
        **alike,
    }


def tensors_by_name(header: Any, count: int) -> dict[str, Any] | None:
    """Type and shape of each; None where the header that was kept has not all of them, or not whole."""
    shown = header.get("tensors") if isinstance(header, dict) else None
    if not isinstance(shown, list) or header.get("cut"):
        return None
    found: dict[str, Any] = {}
    for each in shown:
        name = each.get("name") if isinstance(each, dict) else None
        if not isinstance(name, str) or name.endswith("…"):
            return None
        found[name] = (each.get("dtype"), each.get("shape"))
    return found if len(found) == count else None
