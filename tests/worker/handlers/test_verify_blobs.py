"""VERIFY_BLOBS."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from modelharbor.db.base import Row, utc_now
from modelharbor.db.files import BlobDocument, FileDocument, FileFormat, FileRole
from modelharbor.db.jobs import JobKind
from modelharbor.errors import ErrorCode
from modelharbor.inspection.fence import SCANNER
from modelharbor.resolvers.blobs import announce_blobs, are_here, record_blobs
from modelharbor.resolvers.files import FileEntry
from modelharbor.resolvers.jobs import cancel_job, start_verification
from modelharbor.storage.blobs import BlobStore, blob_key, open_storage
from modelharbor.worker.handlers import verify_blobs as handler
from modelharbor.worker.handlers.verify_blobs import compare_contents
from modelharbor.worker.tools import Tools
from tests.documents import insert_actor, insert_model, insert_version, viewer_of
from tests.resolvers.state import refused
from tests.worker.handlers.conftest import Yard

pytestmark = pytest.mark.anyio


class Vault:
    """Contents that are stored, with their rows."""

    def __init__(self, yard: Yard, storage: BlobStore, folder: Path) -> None:
        self.yard, self.storage, self.folder = yard, storage, folder
        self.data = yard.database.data["blobs"]

    async def put(self, contents: bytes, **values: Any) -> BlobDocument:
        """Under their hash; `key`: where an upload left them."""
        digest = sha256(contents).hexdigest()
        key = values.get("key")
        if key is None:
            path = self.folder / "source"
            path.write_bytes(contents)
            await self.storage.put_file(path, digest)
        else:
            async with self.storage.incoming.writer(key, 0) as writer:
                await writer.write(contents)
                await writer.flush()
        blob = BlobDocument(sha256=digest, size_bytes=len(contents), **values)
        await blob.insert()
        return blob

    def path(self, blob: BlobDocument) -> Path:
        return self.folder / "blobs" / blob_key({"key": blob.key, "sha256": blob.sha256})

    async def row(self, blob: BlobDocument) -> Row:
        row: Row | None = await self.data.find_one({"sha256": blob.sha256})
        assert row is not None
        return row

    async def verified(self, *, all_contents: bool = False) -> Row:
        return await self.yard.result(
            await start_verification(self.yard.database, None, all_contents=all_contents)
        )


@pytest.fixture
async def vault(yard: Yard, tmp_path: Path) -> AsyncIterator[Vault]:
    async with open_storage(yard.settings) as storage:
        yield Vault(yard, storage, tmp_path)


def ago(days: float) -> datetime:
    return utc_now() - timedelta(days=days)


async def test_what_is_whole_is_noted(vault: Vault) -> None:
    begun = utc_now()
    one = await vault.put(b"one")
    two = await vault.put(b"twotwo", key="incoming/0123456789abcdef01234567/1", verified_at=ago(31))
    recent = await vault.put(b"recent", verified_at=ago(29))
    absent = BlobDocument(sha256="0" * 64, size_bytes=5, stored=False)
    going = BlobDocument(sha256="1" * 64, size_bytes=5, deleting_at=utc_now())
    await absent.insert()
    await going.insert()
    assert await vault.verified() == {"checked": 2, "bytes": 9, "damaged": 0}
    for blob in (one, two):
        row = await vault.row(blob)
        assert row["verified_at"] >= begun
        assert (row["stored"], row["key"], row["damaged_at"]) == (True, blob.key, None)
    assert (await vault.row(recent))["verified_at"] < begun
    for blob in (absent, going):
        assert (await vault.row(blob))["verified_at"] is None
    assert await vault.verified() == {"checked": 0, "bytes": 0, "damaged": 0}
    assert await vault.verified(all_contents=True) == {"checked": 3, "bytes": 15, "damaged": 0}


async def test_what_an_older_process_has_recorded_is_compared_too(vault: Vault) -> None:
    blob = await vault.put(b"one")
    new = ("key", "verified_at", "damaged_at", "inspection")
    await vault.data.update_one({"_id": blob.id}, {"$unset": dict.fromkeys(new, "")})
    assert await vault.verified() == {"checked": 1, "bytes": 3, "damaged": 0}
    assert (await vault.row(blob))["verified_at"] is not None


async def test_damaged_contents_are_found_told_and_no_longer_count_as_stored(vault: Vault) -> None:
    database = vault.yard.database
    flipped, cut, lost, whole = [
        await vault.put(contents, references=1) for contents in (b"flipped", b"cut", b"lost", b"ok")
    ]
    vault.path(flipped).write_bytes(b"flypped")
    vault.path(cut).write_bytes(b"cu")
    vault.path(lost).unlink()
    model = await insert_model(await insert_actor("ada"), "tiny")
    version = await insert_version(database, model, {})
    for number in range(handler.FILES_NAMED + 1):
        await FileDocument(
            version_id=version.id,
            model_id=model.id,
            path=f"{number:02}",
            size_bytes=7,
            sha256=flipped.sha256,
        ).insert()
    job = await start_verification(database, None)
    assert await vault.yard.result(job) == {"checked": 4, "bytes": 7 + 3 + 4 + 2, "damaged": 3}
    for blob in (flipped, cut, lost):
        row = await vault.row(blob)
        assert (row["stored"], row["verified_at"]) == (False, None)
        assert row["damaged_at"] > blob.created_at
    assert (await vault.row(whole))["stored"] is True
    lines = dict.fromkeys(await vault.yard.log(job))
    assert {level for level, _ in lines} == {"CRITICAL"}
    named = ", ".join(f"ada/tiny 1 {number:02}" for number in range(handler.FILES_NAMED))
    assert (
        "CRITICAL",
        f"Stored contents are damaged: SHA-256 {flipped.sha256}, of {named}, and others. Upload them again.",
    ) in lines
    assert (
        "CRITICAL",
        f"Stored contents are damaged: SHA-256 {lost.sha256}, of no file. Upload them again.",
    ) in lines
    assert await vault.verified() == {"checked": 0, "bytes": 0, "damaged": 0}


async def entry_of(vault: Vault, blob: BlobDocument) -> Row:
    entry = FileEntry("x", blob.size_bytes, blob.sha256, FileRole.OTHER, FileFormat.OTHER)
    return (await announce_blobs(vault.yard.database, vault.storage, [entry]))[blob.sha256]


async def test_the_same_contents_mend_them(vault: Vault) -> None:
    """By an upload, which lies where it arrived, and by an import, under the hash."""
    database = vault.yard.database
    first = await vault.put(b"first", key="incoming/0123456789abcdef01234567/1", references=1)
    second = await vault.put(b"second", key="incoming/0123456789abcdef01234567/2", references=1)
    for blob in (first, second):
        vault.path(blob).write_bytes(b"?")
    assert (await vault.verified())["damaged"] == 2

    key = "incoming/89abcdef0123456701234567/1"
    row = await entry_of(vault, first)
    assert not await are_here(database, vault.storage, row)
    async with vault.storage.incoming.writer(key, 0) as writer:
        await writer.write(b"first")
        await writer.flush()
    await vault.data.update_one(  # as its completion does
        {"_id": row["_id"]},
        {"$set": {"stored": True, "key": key, "damaged_at": None, "verified_at": None}},
    )

    row = await entry_of(vault, second)
    (vault.folder / "source").write_bytes(b"second")
    await vault.storage.put_file(vault.folder / "source", second.sha256)
    await record_blobs(database, [row["_id"]])

    for blob, where in ((first, key), (second, None)):
        row = await vault.row(blob)
        assert (row["stored"], row["key"], row["damaged_at"]) == (True, where, None)
        assert (row["verified_at"], row["references"]) == (None, 1)
    assert await vault.verified() == {"checked": 2, "bytes": 11, "damaged": 0}


async def test_what_goes_or_comes_anew_meanwhile_is_not_called_damaged(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, moved = await vault.put(b"going"), await vault.put(b"moved")
    for blob in (going, moved):
        vault.path(blob).unlink()
    digest = handler._Verifying._is_whole

    async def late(self: Any, row: Row) -> bool:
        is_whole: bool = await digest(self, row)
        await vault.data.update_one({"_id": going.id}, {"$set": {"deleting_at": utc_now()}})
        await vault.data.update_one({"_id": moved.id}, {"$set": {"key": "incoming/x/1"}})
        return is_whole

    monkeypatch.setattr(handler._Verifying, "_is_whole", late)
    assert await vault.verified() == {"checked": 2, "bytes": 10, "damaged": 0}
    assert [row["stored"] for row in await vault.data.find().to_list()] == [True, True]


async def test_it_goes_on_where_it_was_and_counts_bytes(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(handler, "CONTENTS_AT_ONCE", 2)
    monkeypatch.setattr("modelharbor.worker.outcomes.FIRST_BACKOFF_SECONDS", 0.01)
    blobs = [await vault.put(b"%02d" % number) for number in range(10)]
    vault.path(blobs[1]).write_bytes(b"??")
    read: list[str] = []
    digest = handler._Verifying._is_whole

    async def breaking(self: Any, row: Row) -> bool:
        read.append(row["sha256"])
        if len(read) == 6:
            raise ConnectionError("the power is gone")
        is_whole: bool = await digest(self, row)
        return is_whole

    monkeypatch.setattr(handler._Verifying, "_is_whole", breaking)
    job = await vault.yard.run(await start_verification(vault.yard.database, None))
    assert job["result"] == {"checked": 10, "bytes": 20, "damaged": 1}
    assert 11 <= len(read) <= 12  # two at most once more
    progress = job["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (20, 20, "bytes")
    assert [step["name"] for step in job["steps"]] == ["verify"]


async def test_it_is_cancelled_within_a_large_file(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await vault.put(bytes(9_000_000))

    async def cancelled(job: Row, tools: Tools) -> Row:
        await cancel_job(vault.yard.database, None, job_id=job["_id"])
        return await compare_contents(job, tools)

    job = await start_verification(vault.yard.database, None)
    ended = await vault.yard.run(job, {JobKind.VERIFY_BLOBS: cancelled})
    assert (ended["state"], ended["result"]) == ("CANCELLED", None)
    assert (await vault.row(blob))["verified_at"] is None


async def test_it_is_for_operators(yard: Yard) -> None:
    ada = viewer_of(await insert_actor("ada"))
    async with refused(yard.database, ErrorCode.FORBIDDEN):
        await start_verification(yard.database, ada)


async def test_what_nobody_has_looked_into_is_inspected(vault: Vault) -> None:
    """So contents from before there were inspections get theirs, and those of an older scanner anew."""
    old = {"verdict": "SAFE", "scanner": "older 0", "scanned_at": ago(40), "findings": []}
    evil = await vault.put(b"cos\nsystem\n(S'id'\ntR.", inspection=old)
    text = await vault.put(b"Nothing but words.")
    wrong = await vault.put(b"other bytes")
    vault.path(wrong).write_bytes(b"OTHER BYTES")
    assert (await vault.verified())["damaged"] == 1
    found = [(await vault.row(blob))["inspection"] for blob in (evil, text)]
    assert [each["verdict"] for each in found] == ["UNSAFE", "SAFE"]
    assert [each["scanner"] for each in found] == [SCANNER, SCANNER]
    assert (await vault.row(wrong))["inspection"] is None
