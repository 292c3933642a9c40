"""A version that is being uploaded, with uploads in any state."""

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from bson import ObjectId

from modelharbor.auth.viewer import Viewer, job_principals
from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row, utc_now
from modelharbor.db.files import FileDocument
from modelharbor.db.jobs import JobKind
from modelharbor.db.models import ModelDocument
from modelharbor.db.uploads import QuotaDocument, Segment, UploadDocument, UploadState
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.jobs.put import put_job
from modelharbor.resolvers.versions import version_subject
from modelharbor.storage.blobs import BlobStore
from tests.documents import START, insert_model, viewer_of

if TYPE_CHECKING:
    from tests.worker.handlers.conftest import Yard  # which has the fixture of what is here

TEXT = b"a small text\n" * 1000
HEADER = b'{"x":{"dtype":"F32","shape":[25,50],"data_offsets":[0,5000]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(5000)


class Dock:
    """An UPLOADING version of a model, with uploads whose bytes have all arrived."""

    def __init__(self, yard: "Yard", storage: BlobStore, ada: ActorDocument) -> None:
        self.yard, self.storage, self.ada, self.database = yard, storage, ada, yard.database
        self.model: ModelDocument
        self.version: VersionDocument

    @property
    def viewer(self) -> Viewer:
        return viewer_of(self.ada)

    async def open(self) -> None:
        self.model = await insert_model(self.ada, "tiny", stats={"versions": 1})
        self.version = VersionDocument(
            model_id=self.model.id, number=1, status=VersionStatus.UPLOADING
        )
        await self.version.insert()
        await QuotaDocument(id=self.ada.id, reserved_bytes=0, open_uploads=0).insert()

    async def arrived(
        self, path: str, *parts: bytes, state: UploadState = UploadState.RECEIVED, **values: Any
    ) -> UploadDocument:
        """An upload, each part in a segment of its own."""
        size = sum(map(len, parts))
        upload = UploadDocument(
            version_id=self.version.id,
            model_id=self.model.id,
            owner_id=self.ada.id,
            principals=job_principals(self.ada.id),
            created_by_id=self.ada.id,
            path=path,
            path_key=path.lower(),
            size_bytes=size,
            received_bytes=size,
            state=state,
            expires_at=START,
            token=len(parts),
            **values,
        )
        for number, part in enumerate(parts):
            key = f"incoming/{upload.id}/{number}"
            async with self.storage.incoming.writer(key, 0) as writer:
                await writer.write(part)
                await writer.flush()
            upload.segments.append(Segment(key=key, size_bytes=len(part)))
        await upload.insert()
        await self.database.data["quotas"].update_one(
            {"_id": self.ada.id}, {"$inc": {"reserved_bytes": size, "open_uploads": 1}}
        )
        return upload

    async def job(self, **input: Any) -> Row:
        return await self.database.transaction(
            lambda session: put_job(
                self.database,
                session,
                kind=JobKind.VERIFY_FILE,
                input=input,
                principals=job_principals(self.ada.id),
                created_by_id=self.ada.id,
                subject=version_subject(self.version.id),
            )
        )

    async def upload(self, upload: UploadDocument) -> Row:
        return await self.one("uploads", upload.id)

    async def one(self, collection: str, row_id: ObjectId) -> Row:
        row = await self.database.data[collection].find_one({"_id": row_id})
        assert row is not None
        return row

    async def blob(self, contents: bytes) -> Row | None:
        return await self.database.data["blobs"].find_one({"sha256": sha256(contents).hexdigest()})

    async def stored(self, path: str, contents: bytes) -> FileDocument:
        """A file whose contents are here, and that nobody has looked into: as an upload leaves it."""
        digest = sha256(contents).hexdigest()
        key = f"incoming/{ObjectId()}/1"
        async with self.storage.incoming.writer(key, 0) as writer:
            await writer.write(contents)
            await writer.flush()
        await self.database.data["blobs"].update_one(
            {"sha256": digest},
            {
                "$inc": {"references": 1},
                "$setOnInsert": {
                    "size_bytes": len(contents),
                    "stored": True,
                    "key": key,
                    "created_at": utc_now(),
                    "deleting_at": None,
                    "inspection": None,
                },
            },
            upsert=True,
        )
        file = FileDocument(
            version_id=self.version.id,
            model_id=self.model.id,
            path=path,
            path_key=path.lower(),
            size_bytes=len(contents),
            sha256=digest,
        )
        await file.insert()
        return file

    async def states_told(self, upload: UploadDocument) -> list[str]:
        rows = (
            await self.database.data["events"].find({"upload_id": upload.id}).sort("_id").to_list()
        )
        return [row["upload"]["state"] for row in rows]
