"""Uploads for tests: a DRAFT that takes files, who receives them, bodies."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache, connect_cache
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.resolvers.receiving import Receiver
from modelharbor.resolvers.uploads import UploadFile, create_uploads
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, blob_key, open_storage
from tests.documents import insert_model, insert_version
from tests.resolvers.conftest import Company


def digest_of(contents: bytes) -> str:
    return sha256(contents).hexdigest()


async def body(contents: bytes, piece: int = 65_536) -> AsyncIterator[bytes]:
    for start in range(0, len(contents), piece):
        yield contents[start : start + piece]


class Stalling:
    """A body that stands still behind its first bytes, until it is told to go on or to break."""

    def __init__(
        self, contents: bytes, rest: bytes = b"", failure: Exception | None = None
    ) -> None:
        self._contents, self._rest, self._failure = contents, rest, failure
        self.is_asked, self.goes_on = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._contents:
            yield self._contents
        self.is_asked.set()
        await self.goes_on.wait()
        if self._failure is not None:
            raise self._failure
        if self._rest:
            yield self._rest


@dataclass
class Site:
    """What uploads go through, to a version of a model of `acme`; `viewer` is an administrator."""

    database: Database
    settings: Settings
    storage: BlobStore
    cache: Cache
    company: Company
    viewer: Viewer
    model: ModelDocument
    version: VersionDocument

    def receiver(self, **changed: Any) -> Receiver:
        """That of another process."""
        settings = self.settings.model_copy(update=changed)
        return Receiver(self.database, settings, self.storage, self.cache)

    async def create(self, *files: UploadFile, **options: Any) -> list[Row]:
        given: dict[str, Any] = {"viewer": self.viewer, "settings": self.settings, **options}
        return await create_uploads(
            self.database,
            self.storage,
            given.pop("viewer"),
            given.pop("settings"),
            version_id=given.pop("version_id", self.version.id),
            files=files,
            **given,
        )

    async def upload(self, contents: bytes, path: str = "file", **options: Any) -> Row:
        """A file, sent in one go."""
        [row] = await self.create(UploadFile(path, len(contents)), **options)
        viewer = options.get("viewer", self.viewer)
        return await self.receiver().receive(viewer, row["_id"], 0, body(contents))

    async def row(self, upload: Row | ObjectId) -> Row:
        upload_id = upload if isinstance(upload, ObjectId) else upload["_id"]
        return await self.one("uploads", _id=upload_id)

    async def one(self, collection: str, **query: Any) -> Row:
        row: Row | None = await self.database.data[collection].find_one(query)
        assert row is not None
        return row

    async def quota(self) -> tuple[int, int]:
        """What is reserved: bytes, and uploads."""
        row = await self.one("quotas", _id=self.company.acme.id)
        return row["reserved_bytes"], row["open_uploads"]

    async def counters(self) -> tuple[int, int, int, int]:
        """Files and bytes, of the version and of the model."""
        version = await self.one("versions", _id=self.version.id)
        stats = (await self.one("models", _id=self.model.id))["stats"]
        return version["file_count"], version["size_bytes"], stats["files"], stats["size_bytes"]

    async def states(self, upload: Row) -> list[str]:
        """That the log tells of."""
        events = self.database.data["events"].find({"upload_id": upload["_id"]}).sort("_id", 1)
        return [row["upload"]["state"] async for row in events]

    async def contents(self, sha256: str) -> bytes:
        """As they are stored."""
        blob = await self.one("blobs", sha256=sha256)
        assert blob["stored"]
        return await self.storage.read_range(blob_key(blob), 0, blob["size_bytes"])

    def kept(self) -> list[str]:
        """All objects below `incoming`, on disk."""
        folder = self.settings.data_path / "blobs" / "incoming"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
async def site(database: Database, settings: Settings, company: Company) -> AsyncIterator[Site]:
    model = await insert_model(company.acme, "bert")
    version = await insert_version(database, model, {}, status=VersionStatus.DRAFT)
    async with open_storage(settings) as storage, connect_cache(settings) as cache:
        yield Site(database, settings, storage, cache, company, company.admin, model, version)
