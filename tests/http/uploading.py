"""A served application with a version of ada's, and uploads to it."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from bson import ObjectId
from httpx import AsyncClient, Response

from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row
from modelharbor.db.models import ModelDocument
from modelharbor.db.uploads import Segment
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.resolvers.uploads import UploadFile, create_uploads
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, blob_key, open_storage
from tests.documents import SCOPES, insert_model, insert_version
from tests.live.serving import Served, serving

MEDIA = "application/offset+octet-stream"
GUARD_SECONDS = 30.0


@dataclass
class Desk:
    served: Served
    settings: Settings
    storage: BlobStore
    client: AsyncClient  # sends ada's token, and the version of the protocol
    viewer: Viewer
    model: ModelDocument
    version: VersionDocument

    @property
    def authorization(self) -> str:
        return f"Bearer {self.served.token}"

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.served.port}"

    async def create(
        self, size: int, path: str = "model.bin", declared: str | None = None
    ) -> ObjectId:
        file = UploadFile(path, size, declared)
        [row] = await create_uploads(
            self.served.database,
            self.storage,
            self.viewer,
            self.settings,
            version_id=self.version.id,
            files=[file],
        )
        upload_id: ObjectId = row["_id"]
        return upload_id

    async def row(self, upload_id: ObjectId) -> Row:
        found = await self.served.database.data["uploads"].find_one({"_id": upload_id})
        assert found is not None
        return found

    async def until(self, upload_id: ObjectId, **values: Any) -> Row:
        """The row, once it has these values."""
        async with asyncio.timeout(GUARD_SECONDS):
            while True:
                row = await self.row(upload_id)
                if all(row[name] == value for name, value in values.items()):
                    return row
                await asyncio.sleep(0.01)

    async def received(self, upload_id: ObjectId) -> bytes:
        """The bytes that count so far."""
        row = await self.row(upload_id)
        assert sum(each["size_bytes"] for each in row["segments"]) == row["received_bytes"]
        pieces = [
            await self.storage.read_range(each["key"], 0, each["size_bytes"])
            for each in row["segments"]
        ]
        return b"".join(pieces)

    async def whole(self, upload_id: ObjectId) -> str:
        """The SHA-256 of all bytes: of the file, or of what the job will put together."""
        row = await self.row(upload_id)
        if row["state"] == "COMPLETED":
            return sha256(await self.file(upload_id)).hexdigest()
        assert row["state"] == "RECEIVED"
        segments = [Segment(**each) for each in row["segments"]]
        return await self.storage.incoming.compose(segments, f"incoming/{upload_id}/whole")

    async def file(self, upload_id: ObjectId) -> bytes:
        """The contents of the file that a completed upload became."""
        row = await self.row(upload_id)
        data = self.served.database.data
        file = await data["files"].find_one({"_id": row["file_id"]})
        assert file is not None
        blob = await data["blobs"].find_one({"sha256": file["sha256"]})
        assert blob is not None
        contents = await self.storage.read_range(blob_key(blob), 0, file["size_bytes"])
        assert sha256(contents).hexdigest() == file["sha256"]
        return contents

    # ---- requests

    def metadata(self, upload_id: ObjectId) -> str:
        return f"upload {encoded(global_id('Upload', upload_id))}"

    async def patch(
        self,
        upload_id: ObjectId,
        offset: int,
        body: bytes | AsyncIterator[bytes],
        **headers: str,
    ) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.patch(
            f"/uploads/{upload_id}",
            content=body,
            headers={"upload-offset": str(offset), "content-type": MEDIA, **named},
        )

    async def head(self, upload_id: ObjectId) -> Response:
        return await self.client.head(f"/uploads/{upload_id}")

    async def post(self, *body: bytes, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/uploads", content=b"".join(body), headers=named)

    def request(self, method: str, path: str, **headers: Any) -> bytes:
        """A request of ada's up to its body."""
        named = {
            "host": f"127.0.0.1:{self.served.port}",
            "authorization": self.authorization,
            "tus-resumable": "1.0.0",
            "content-type": MEDIA,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {named[key]}" for key in named)]
        return "\r\n".join([*lines, "", ""]).encode()


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@asynccontextmanager
async def receiving(settings: Settings) -> AsyncIterator[Desk]:
    async with (
        serving(settings) as served,
        open_storage(settings) as storage,
        AsyncClient(
            base_url=f"http://127.0.0.1:{served.port}",
            headers={"authorization": f"Bearer {served.token}", "tus-resumable": "1.0.0"},
            timeout=GUARD_SECONDS,
            trust_env=False,
        ) as client,
    ):
        database = served.database
        row = await database.data["actors"].find_one({"_id": served.user_id})
        assert row is not None
        ada = ActorDocument.model_validate(row | {"id": row["_id"]})
        model = await insert_model(ada, "tiny")
        version = await insert_version(database, model, {}, status=VersionStatus.DRAFT)
        viewer = Viewer(user=row, scopes=SCOPES)
        yield Desk(served, settings, storage, client, viewer, model, version)
