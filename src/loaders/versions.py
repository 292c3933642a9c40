"""Versions of models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from bson import ObjectId

from modelharbor.cache.entries import Access
from modelharbor.cache.tags import Tag, entity
from modelharbor.db.base import Row
from modelharbor.db.versions import VersionDocument, VersionStatus

from .base import Loader, Sharing
from .history import versions_at
from .models import ModelByIdLoader, ModelByNameLoader, ModelName, access_to, told_of
from .pages import PageLoader
from .rows import RowByIdLoader
from .told import below_each, by_key

LISTED: Final[Row] = {"status": {"$ne": VersionStatus.DELETED.value}}


class VersionByIdLoader(RowByIdLoader):
    """Versions of models that were reached."""

    collection, document = "versions", VersionDocument
    sharing, is_told = Sharing.EVERYBODY, True

    def base(self) -> Row:
        return LISTED


class VersionsByModelLoader(PageLoader[ObjectId]):
    collection, parent, document = "versions", "model_id", VersionDocument
    counter = ("models", "stats.versions")
    sharing, is_told = Sharing.EVERYBODY, True

    def base(self) -> Row:
        return LISTED


class VersionWithinModelLoader(Loader[tuple[ObjectId, ObjectId], Row | None, None]):
    """Versions of models that need not be there any more, or be the viewer's to see.

    The key is (model id, version id).
    """

    document = VersionDocument
    sharing = Sharing.EQUAL_RIGHTS

    async def batch_load(self, keys: list[tuple[ObjectId, ObjectId]]) -> list[Row | None]:
        ids = list(dict.fromkeys(model_id for model_id, _ in keys))
        models = await self.reads.loader(ModelByIdLoader, None).load_many(ids)
        seen = {model["_id"] for model in models if model is not None}
        wanted = [version_id for model_id, version_id in keys if model_id in seen]
        query = {"_id": {"$in": wanted}, **LISTED}
        rows = await self.find("versions", query, self.names("_id")) if wanted else []
        by_id = {row["_id"]: row for row in rows}
        return [by_id.get(version_id) for _, version_id in keys]


@dataclass(frozen=True, slots=True)
class VersionWanted:
    """A version of a model by its number, or by an alias; with neither the latest. As it was at
    a time; None: now."""

    number: int | None = None
    alias: str | None = None
    as_of: datetime | None = None


class VersionByModelLoader(Loader[ObjectId, Row | None, VersionWanted]):
    document = VersionDocument
    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        number, alias, at = self.arguments.number, self.arguments.alias, self.arguments.as_of
        if number is not None:
            made = {} if at is None else {"created_at": {"$lte": at}}
            query: Row = {"model_id": {"$in": keys}, "number": number, **made, **LISTED}
        elif at is not None:
            query = {"_id": {"$in": await versions_at(self.reads, keys, alias, at)}, **LISTED}
        else:
            models = await self.find(
                "models", {"_id": {"$in": keys}}, ["aliases", "latest_version_id"]
            )
            query = {"_id": {"$in": [self.pointed(model) for model in models]}, **LISTED}
        rows = await self.find("versions", query, self.names("_id", "model_id"))
        by_model = {row["model_id"]: row for row in rows}
        return [by_model.get(key) for key in keys]

    def tags(self, keys: Sequence[ObjectId], found: Mapping[ObjectId, Any]) -> list[Tag]:
        return told_of_wanted(self.arguments, {key: found.get(key) for key in keys})

    def pointed(self, model: Row) -> ObjectId | None:
        if self.arguments.alias is None:
            found: ObjectId | None = model["latest_version_id"]
            return found
        return next(
            (a["version_id"] for a in model["aliases"] if a["name"] == self.arguments.alias), None
        )


def told_of_wanted(wanted: VersionWanted, found: Mapping[ObjectId, Row | None]) -> list[Tag]:
    """One version each of models, there or not."""
    told = [entity("versions", row["_id"]) for row in found.values() if row is not None]
    if wanted.number is None:
        told += by_key("models", found)  # where the alias points
        if wanted.as_of is not None and wanted.alias is None:
            return [*told, *below_each("versions", "model_id", found)]  # see `latest_at`
    missing = [key for key, row in found.items() if row is None]
    return [*told, *below_each("versions", "model_id", missing)] if missing else told


@dataclass(frozen=True, slots=True)
class ReferenceWanted:
    model: ModelName
    version: VersionWanted


class VersionByReferenceLoader(Loader[str, Row | None, ReferenceWanted]):
    """`owner/name`, `owner/name@alias`, `owner/name:12` to a version."""

    document = VersionDocument
    shows = "model_id"
    of_model: Mapping[ModelName | ObjectId, Row | None] | None = None
    """The model that was read on the way, by its name."""

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        model = await self.reads.loader(ModelByNameLoader, None).load(self.arguments.model)
        self.of_model = {self.arguments.model: model}
        if model is None:
            return [None for _ in keys]
        wanted = self.reads.loader(VersionByModelLoader, self.arguments.version)
        version = await wanted.load(model["_id"])
        return [version for _ in keys]

    def tags(self, keys: Sequence[str], found: Mapping[str, Any]) -> list[Tag] | None:
        wanted = self.arguments
        if self.of_model is None:
            return None
        told = told_of([wanted.model], self.of_model)
        model = self.of_model[wanted.model]
        if model is not None:
            told += told_of_wanted(wanted.version, {model["_id"]: found[keys[0]]})
        return told

    def access(self, keys: Sequence[str], found: Mapping[str, Any]) -> Access:
        return access_to((self.of_model or {}).values())
