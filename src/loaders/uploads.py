"""Uploads, where their bytes go, and what became of them."""

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.files import FileDocument
from modelharbor.db.uploads import UploadDocument

from .base import Loader, Reads, Sharing
from .pages import PageLoader
from .rows import RowByIdLoader
from .versions import VersionWithinModelLoader


def _seen(reads: Reads) -> Row:
    """Those that the viewer may see: a part of an upload is nothing by itself."""
    return {**reads.viewer.visible, "part_of": None}


class UploadByIdLoader(RowByIdLoader):
    """Uploads that the viewer may see."""

    collection, document = "uploads", UploadDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return _seen(self.reads)


class UploadPageLoader(PageLoader[str]):
    """All uploads that the viewer may see."""

    collection, document = "uploads", UploadDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return _seen(self.reads)


class UploadsByVersionLoader(PageLoader[ObjectId]):
    """Those of versions, as far as the viewer may see them."""

    collection, parent, document = "uploads", "version_id", UploadDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return _seen(self.reads)


class UploadUrlLoader(Loader[ObjectId, str, None]):
    """Addresses under the name by which the client knows this server; nothing is read."""

    async def batch_load(self, keys: list[ObjectId]) -> list[str]:
        return [self.reads.links.upload(key) for key in keys]


class FileWithinVersionLoader(Loader[tuple[ObjectId, ObjectId, ObjectId], Row | None, None]):
    """Files whose version need not be there any more, or be the viewer's to see.

    The key is (model id, version id, file id).
    """

    document = FileDocument
    sharing = Sharing.EQUAL_RIGHTS

    async def batch_load(self, keys: list[tuple[ObjectId, ObjectId, ObjectId]]) -> list[Row | None]:
        within = list(dict.fromkeys((model_id, version_id) for model_id, version_id, _ in keys))
        versions = await self.reads.loader(VersionWithinModelLoader, None).load_many(within)
        seen = {version["_id"] for version in versions if version is not None}
        wanted = [file_id for _, version_id, file_id in keys if version_id in seen]
        query = {"_id": {"$in": wanted}}
        rows = await self.find("files", query, self.names("_id", "version_id")) if wanted else []
        by_key = {(row["version_id"], row["_id"]): row for row in rows if row["version_id"] in seen}
        return [by_key.get((version_id, file_id)) for _, version_id, file_id in keys]
