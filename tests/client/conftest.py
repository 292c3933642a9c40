"""A server on the loop of the test, with what is to be fetched from it."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row
from modelharbor.db.files import BlobDocument, FileDocument
from modelharbor.db.models import Visibility
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from modelharbor.worker.handlers import HANDLERS
from tests.documents import insert_model, insert_version
from tests.live.serving import Served, serving
from tests.worker.conftest import Hall


@dataclass
class Quay:
    """`ada` is here, and has a token."""

    served: Served
    settings: Settings
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.served.port}"

    @property
    def token(self) -> str:
        return self.served.token

    async def store(self, name: str, files: Mapping[str, bytes]) -> None:
        """A private model of ada's with one READY version; no two of its files are the same."""
        database = self.served.database
        ada = await ActorDocument.find_one({"login": "ada"})
        assert ada is not None
        model = await insert_model(ada, name, visibility=Visibility.PRIVATE)
        sizes = sum(len(content) for content in files.values())
        version = await insert_version(database, model, {}, file_count=len(files), size_bytes=sizes)
        async with open_storage(self.settings) as storage:
            for path, content in files.items():
                digest = sha256(content).hexdigest()
                source = self.folder / "stored"
                source.write_bytes(content)
                await storage.put_file(source, digest)
                source.unlink()
                await BlobDocument(sha256=digest, size_bytes=len(content), references=1).insert()
                await FileDocument(
                    version_id=version.id,
                    model_id=model.id,
                    path=path,
                    size_bytes=len(content),
                    sha256=digest,
                ).insert()

    async def rows(self, collection: str, **filter: Any) -> list[Row]:
        found = self.served.database.data[collection].find(filter).sort("_id", 1)
        return await found.to_list()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """A worker beside the server; it does all its jobs before it ends."""
        changed = {"lease_seconds": 3.0, "drain_seconds": 0.3}
        hall = Hall(self.served.database, self.settings.model_copy(update=changed))

        async def has_done_all() -> bool:
            return not await self.rows("jobs", state={"$in": ["QUEUED", "RUNNING", "RETRYING"]})

        async with hall.working(HANDLERS):
            yield
            await hall.until(has_done_all)


@pytest.fixture
async def quay(settings: Settings, tmp_path: Path) -> AsyncIterator[Quay]:
    async with serving(settings) as served:
        yield Quay(served, settings, tmp_path)
