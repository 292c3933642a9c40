"""Files of versions, and where their contents are."""

from collections.abc import Hashable

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.files import FileDocument
from modelharbor.db.tokens import Permission

from .base import Loader
from .pages import PageLoader, Total, in_visible_models
from .rows import RowByIdLoader


class FileByIdLoader(RowByIdLoader):
    """Files of versions that were reached."""

    collection, document = "files", FileDocument


class FilesByVersionLoader(PageLoader[ObjectId]):
    collection, parent, document = "files", "version_id", FileDocument
    counter = ("versions", "file_count")


class FileByPathLoader(Loader[ObjectId, Row | None, str]):
    """The file of each version at one path."""

    document = FileDocument

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        rows = await self.find("files", {"version_id": {"$in": keys}, "path": self.arguments})
        by_version = {row["version_id"]: row for row in rows}
        return [by_version.get(key) for key in keys]


class FilesByContentsLoader(PageLoader[str]):
    """All files with one hash, in models that the viewer may see. The query holds the hash."""

    collection, document = "files", FileDocument

    async def one(self, query: Row) -> list[Row]:
        window = self.arguments
        cursor = await self.reads.database.data["files"].aggregate(
            [
                {"$match": window.between(query)},
                {"$sort": window.sort},
                *in_visible_models(self.reads.viewer),
                {"$limit": window.limit + 1},
                *([{"$project": self.projection}] if self.projection else []),
            ],
            maxTimeMS=self.reads.database.query_timeout_ms,
            batchSize=window.limit + 2,
        )
        return await cursor.to_list()

    def total(self, key: Hashable) -> Total:
        return Total("files", key, query=self.arguments.query, through_models=True)


class CopiesByContentsLoader(Loader[str, int, None]):
    """How many files have the contents, in models that the viewer may see."""

    async def batch_load(self, keys: list[str]) -> list[int]:
        cursor = await self.reads.database.data["files"].aggregate(
            [
                {"$match": {"sha256": {"$in": keys}}},
                {"$project": {"sha256": 1, "model_id": 1}},
                *in_visible_models(self.reads.viewer),
                {"$group": {"_id": "$sha256", "count": {"$sum": 1}}},
            ],
            maxTimeMS=self.reads.database.query_timeout_ms,
            batchSize=len(keys) + 1,
        )
        counts = {row["_id"]: row["count"] async for row in cursor}
        return [counts.get(key, 0) for key in keys]


class OthersByContentsLoader(CopiesByContentsLoader):
    """How many other files have the contents of a file."""

    async def batch_load(self, keys: list[str]) -> list[int]:
        return [max(0, count - 1) for count in await super().batch_load(keys)]


class DownloadLinkLoader(Loader[tuple[ObjectId, ObjectId, str], str | None, int]):
    """Signed links, good for `arguments` seconds; None without the permission to download.

    The key is (file id, model id, path).
    """

    async def batch_load(self, keys: list[tuple[ObjectId, ObjectId, str]]) -> list[str | None]:
        models = list({model_id for _, model_id, _ in keys})
        names = ["state", "visibility", "owner_id", "grants"]
        found = await self.find(
            "models", {"_id": {"$in": models}, **self.reads.viewer.visible}, names
        )
        allowed = {
            row["_id"] for row in found if Permission.DOWNLOAD in self.reads.viewer.on_model(row)
        }
        return [
            self.reads.links.link(file_id, path, self.arguments) if model_id in allowed else None
            for file_id, model_id, path in keys
        ]
