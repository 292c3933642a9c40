"""EXPIRE_UPLOADS."""

import os
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row, utc_now
from modelharbor.db.files import BlobDocument
from modelharbor.db.jobs import JobKind
from modelharbor.db.models import ModelDocument
from modelharbor.db.uploads import UploadDocument, UploadState
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, open_storage
from modelharbor.storage.incoming import Left
from modelharbor.worker.handlers import expire_uploads as handler
from tests.documents import insert_actor, insert_model, insert_upload, insert_version
from tests.explaining import explained
from tests.worker.handlers.conftest import Yard

pytestmark = pytest.mark.anyio
NOTHING: Row = dict.fromkeys(handler.COUNTED, 0)


def ago(days: float = 0, **given: float) -> datetime:
    return utc_now() - timedelta(days=days, **given)


class Dock:
    def __init__(
        self,
        yard: Yard,
        storage: BlobStore,
        ada: ActorDocument,
        model: ModelDocument,
        version: VersionDocument,
    ) -> None:
        self.yard, self.storage, self.ada = yard, storage, ada
        self.model, self.version = model, version
        self.count = 0

    async def upload(self, size: int = 0, **values: Any) -> UploadDocument:
        """One that has so many bytes in a segment."""
        self.count += 1
        id = ObjectId()
        key = f"incoming/{id}/1"
        if size:
            await self.fill(key, size)
        return await insert_upload(
            self.ada,
            self.model,
            self.version,
            f"file{self.count}",
            **{
                "id": id,
                "expires_at": ago(-1),
                "received_bytes": size,
                "segments": [{"key": key, "size_bytes": size}] if size else [],
                **values,
            },
        )

    async def fill(self, key: str, size: int) -> str:
        async with self.storage.incoming.writer(key, 0) as writer:
            await writer.write(bytes(size))
            await writer.flush()
        return key

    async def lie(self) -> dict[str, int]:
        return {left.key: left.size_bytes async for left in self.storage.incoming.listed()}

    async def swept(self, **given: Any) -> Row:
        given = {"orphan_seconds": 0, **given}
        return await self.yard.result(await self.yard.hall.put(JobKind.EXPIRE_UPLOADS, input=given))


@pytest.fixture
async def dock(yard: Yard) -> AsyncIterator[Dock]:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "tiny")
    version = await insert_version(yard.database, model, {}, status=VersionStatus.UPLOADING)
    async with open_storage(yard.settings) as storage:
        yield Dock(yard, storage, ada, model, version)


async def test_what_has_waited_too_long_expires_with_its_bytes(dock: Dock) -> None:
    late = [
        await dock.upload(100, expires_at=ago(minutes=1)),
        await dock.upload(0, expires_at=ago(days=3)),
    ]
    going = await dock.upload(70)
    await dock.yard.database.data["quotas"].insert_one(
        {
            "_id": dock.ada.id,
            "limit_bytes": None,
            "reserved_bytes": 300,
            "open_uploads": 3,
            "changes": 0,
        }
    )
    assert await dock.swept(sweep=False) == NOTHING | {"expired": 2}
    for upload in late:
        row = await dock.yard.database.data["uploads"].find_one({"_id": upload.id})
        assert row is not None
        assert (row["state"], row["is_open"]) == ("EXPIRED", False)
    assert await dock.lie() == {going.segments[0].key: 70}
    assert await dock.swept() == NOTHING


async def test_what_ended_long_ago_is_forgotten(dock: Dock) -> None:
    state = UploadState.COMPLETED
    old = [await dock.upload(state=state, ended_at=ago(31)) for _ in range(3)]
    part = await dock.upload(state=state, ended_at=ago(31), part_of=old[0].id)
    young = await dock.upload(state=state, ended_at=ago(29))
    going = await dock.upload()
    assert await dock.swept() == NOTHING | {"forgotten": 4}
    rows = await dock.yard.database.data["uploads"].find().sort("_id", 1).to_list()
    assert [row["_id"] for row in rows] == [young.id, going.id]
    assert part.id not in [row["_id"] for row in rows]


async def test_many_are_forgotten_in_several_transactions(
    dock: Dock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "ROWS_AT_ONCE", 2)
    for _ in range(5):
        await dock.upload(state=UploadState.ABORTED, ended_at=ago(31))
    assert await dock.swept() == NOTHING | {"forgotten": 5}


async def test_only_what_nobody_needs_is_swept(dock: Dock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "OBJECTS_AT_ONCE", 3)
    going = await dock.upload(10)
    kept = {going.segments[0].key: 10}
    # A holder died before it had told of its segment: the next one may have it still.
    kept[await dock.fill(f"incoming/{going.id}/2", 11)] = 11
    # The bytes of parts are the upload's, also when the parts have ended.
    part = await dock.upload(12, state=UploadState.COMPLETED, ended_at=ago(1))
    whole = await dock.upload(state=UploadState.RECEIVED, segments=part.segments, received_bytes=12)
    kept[part.segments[0].key] = 12
    kept[await dock.fill(f"incoming/{whole.id}/whole.0123", 5)] = 5  # being made
    # Contents, of an upload that ended and of one that nobody remembers.
    for number in range(4):
        done = await dock.upload(13, state=UploadState.COMPLETED, ended_at=ago(1))
        key = done.segments[0].key if number else await dock.fill(f"incoming/{ObjectId()}/1", 13)
        await BlobDocument(sha256=f"{number:064}", size_bytes=13, key=key).insert()
        kept[key] = 13
        if not number:
            await dock.storage.incoming.delete(done.segments[0].key)
    orphans = [
        (await dock.upload(20, state=UploadState.ABORTED, ended_at=ago(1))).segments[0].key,
        await dock.fill(f"incoming/{ObjectId()}/whole", 21),
        await dock.fill(f"{key}0", 22),  # beside contents
        await dock.fill("incoming/nonsense/1", 23),
    ]
    assert (await dock.lie()).keys() == kept.keys() | set(orphans)
    assert await dock.swept(orphan_seconds=60) == NOTHING  # they are too young
    expected = NOTHING | {"objects": 4, "bytes": 20 + 21 + 22 + 23}
    assert await dock.swept() == expected
    assert await dock.lie() == kept
    assert await dock.swept() == NOTHING


async def test_an_orphan_is_an_hour_old(dock: Dock, tmp_path: Path) -> None:
    young, old = [await dock.fill(f"incoming/{ObjectId()}/1", 5) for _ in range(2)]
    hour = ago(minutes=61).timestamp()
    os.utime(tmp_path / "blobs" / old, (hour, hour))
    job = await dock.yard.hall.put(JobKind.EXPIRE_UPLOADS)
    assert await dock.yard.result(job) == NOTHING | {"objects": 1, "bytes": 5}
    assert await dock.lie() == {young: 5}


async def test_an_upload_that_completes_meanwhile_keeps_its_bytes(
    dock: Dock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two looks, also where the contents are the bytes of a part."""
    part = await dock.upload(12, state=UploadState.COMPLETED, ended_at=ago(1))
    whole = await dock.upload(
        12, state=UploadState.RECEIVED, segments=part.segments, received_bytes=12
    )
    await dock.storage.incoming.delete(f"incoming/{whole.id}/1")
    key = part.segments[0].key
    database = dock.yard.database
    find = type(database).find
    for moment in range(1, 5):
        await database.data["blobs"].delete_many({})
        await database.data["uploads"].update_one(
            {"_id": whole.id}, {"$set": {"state": "RECEIVED", "is_open": True}}
        )
        looks = 0

        async def complete(self: Any, collection: str, query: Row, **named: Any) -> list[Row]:
            nonlocal looks
            looks += collection in ("uploads", "blobs")
            if looks == moment:  # noqa: B023  # called before the next one
                await BlobDocument(sha256="0" * 64, size_bytes=12, key=key).insert()
                await database.data["uploads"].update_one(
                    {"_id": whole.id}, {"$set": {"state": "COMPLETED", "is_open": False}}
                )
                looks += 10
            return await find(self, collection, query, **named)

        monkeypatch.setattr(type(database), "find", complete)
        found = [Left(key, utc_now(), 12)]
        assert await handler._useless(database, found) == [], moment
        monkeypatch.setattr(type(database), "find", find)
    await database.data["blobs"].delete_many({})
    assert await handler._useless(database, found) == found


async def test_what_is_swept_is_found_by_indexes(dock: Dock) -> None:
    await dock.upload(5)
    await BlobDocument(sha256="0" * 64, size_bytes=5, key="incoming/x/1").insert()
    commands: list[Row] = [
        {"find": "uploads", "filter": {**handler.OPEN, "segments.key": {"$in": ["incoming/x/1"]}}},
        {"find": "blobs", "filter": {"key": {"$in": ["incoming/x/1", "incoming/x/2"]}}},
    ]
    for command in commands:
        stages = await explained(dock.yard.database, command)
        assert not [stage for stage in stages if stage.get("stage") == "COLLSCAN"], command


async def test_chunks_of_other_stores(dock: Dock) -> None:
    """Each is an object; the one that contents are stays, those beside it go."""
    async with open_storage(Settings(storage_url="memory:///")) as storage:
        dock.storage = storage
        going = await dock.upload(9_000_000)
        done = await dock.upload(9_000_000, state=UploadState.COMPLETED, ended_at=ago(1))
        small = await dock.fill(f"incoming/{done.id}/2", 7)
        await BlobDocument(sha256="0" * 64, size_bytes=7, key=small).insert()
        found = [left async for left in storage.incoming.listed()]
        useless = await handler._useless(dock.yard.database, found)
        assert sorted(left.key for left in useless) == [
            f"incoming/{done.id}/1{end}" for end in ("", ".00000001", ".00000002")
        ]
        await handler._delete(storage, useless)
        kept = [f"incoming/{going.id}/1{end}" for end in ("", ".00000001", ".00000002")]
        assert sorted(await dock.lie()) == sorted([*kept, small])
