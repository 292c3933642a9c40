"""Versions of models."""

from dataclasses import dataclass
from typing import Final

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.versions import VersionDocument, VersionStatus

from .base import Loader, Sharing
from .models import ModelByIdLoader, ModelByNameLoader, ModelName
from .pages import PageLoader
from .rows import RowByIdLoader

LISTED: Final[Row] = {"status": {"$ne": VersionStatus.DELETED.value}}


class VersionByIdLoader(RowByIdLoader):
    """Versions of models that were reached."""

    collection, document = "versions", VersionDocument
    sharing = Sharing.EVERYBODY

    def base(self) -> Row:
        return LISTED


class VersionsByModelLoader(PageLoader[ObjectId]):
    collection, parent, document = "versions", "model_id", VersionDocument
    counter = ("models", "stats.versions")
    sharing = Sharing.EVERYBODY

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
    """A version of a model by its number, or by an alias; with neither the latest."""

    number: int | None = None
    alias: str | None = None


class VersionByModelLoader(Loader[ObjectId, Row | None, VersionWanted]):
    document = VersionDocument
    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        if self.arguments.number is not None:
            query: Row = {"model_id": {"$in": keys}, "number": self.arguments.number, **LISTED}
        else:
            models = await self.find(
                "models", {"_id": {"$in": keys}}, ["aliases", "latest_version_id"]
            )
            query = {"_id": {"$in": [self.pointed(model) for model in models]}, **LISTED}
        rows = await self.find("versions", query, self.names("model_id"))
        by_model = {row["model_id"]: row for row in rows}
        return [by_model.get(key) for key in keys]

    def pointed(self, model: Row) -> ObjectId | None:
        if self.arguments.alias is None:
            found: ObjectId | None = model["latest_version_id"]
            return found
        return next(
            (a["version_id"] for a in model["aliases"] if a["name"] == self.arguments.alias), None
        )


@dataclass(frozen=True, slots=True)
class ReferenceWanted:
    model: ModelName
    version: VersionWanted


class VersionByReferenceLoader(Loader[str, Row | None, ReferenceWanted]):
    """`owner/name`, `owner/name@alias`, `owner/name:12` to a version."""

    document = VersionDocument

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        model = await self.reads.loader(ModelByNameLoader, None).load(self.arguments.model)
        if model is None:
            return [None for _ in keys]
        wanted = self.reads.loader(VersionByModelLoader, self.arguments.version)
        version = await wanted.load(model["_id"])
        return [version for _ in keys]
