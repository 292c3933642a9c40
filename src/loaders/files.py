"""Files of versions, and where their contents are."""

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.files import FileDocument
from modelharbor.db.tokens import Permission

from .base import ROOT, Loader, Sharing
from .models import HoldersByContentsLoader
from .pages import PageLoader, Total
from .rows import RowByIdLoader


class FileByIdLoader(RowByIdLoader):
    """Files of versions that were reached."""

    collection, document = "files", FileDocument
    sharing = Sharing.EVERYBODY


class FilesByVersionLoader(PageLoader[ObjectId]):
    collection, parent, document = "files", "version_id", FileDocument
    counter = ("versions", "file_count")
    sharing = Sharing.EVERYBODY


class FileByPathLoader(Loader[ObjectId, Row | None, str]):
    """The file of each version at one path."""

    document = FileDocument
    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        query = {"version_id": {"$in": keys}, "path": self.arguments}
        rows = await self.find("files", query, self.names("version_id"))
        by_version = {row["version_id"]: row for row in rows}
        return [by_version.get(key) for key in keys]


class FilesByContentsLoader(PageLoader[str]):
    """All files with one hash, in models that the viewer may see. The query holds the hash."""

    collection, document = "files", FileDocument

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        wanted = self.arguments.query.data
        holders = await self.reads.loader(HoldersByContentsLoader, None).load(wanted["sha256"])
        query = {
            **wanted,
            "model_id": {"$in": list(holders.files)},
            "version_id": {"$nin": holders.deleted},
        }
        page = self.page(ROOT, await self.one(query) if holders.files else [])
        page["total"] = Total("files", known=sum(holders.files.values()))
        return [page for _ in keys]


class OthersByContentsLoader(Loader[str, int, None]):
    """How many other files have the contents of a file, in models that the viewer may see."""

    async def batch_load(self, keys: list[str]) -> list[int]:
        holders = await self.reads.loader(HoldersByContentsLoader, None).load_many(keys)
        return [max(0, sum(found.files.values()) - 1) for found in holders]


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
