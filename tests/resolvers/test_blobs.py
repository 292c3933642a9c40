"""Contents that come and go at once."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from beanie import PydanticObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument, FileDocument, FileFormat, FileRole
from modelharbor.errors import ErrorCode, Refused, Unavailable
from modelharbor.resolvers import blobs
from modelharbor.resolvers.blobs import (
    Claim,
    announce_blobs,
    are_here,
    claim_unused,
    forget_blobs,
    mark_damaged,
    record_blobs,
    refer_to,
    release,
    remove_contents,
)
from modelharbor.resolvers.files import FileEntry
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, digest_key, open_storage
from tests.explaining import explained
from tests.resolvers.state import refused

pytestmark = pytest.mark.anyio


@pytest.fixture
async def storage(settings: Settings) -> AsyncIterator[BlobStore]:
    async with open_storage(settings) as storage:
        yield storage


def entry(contents: bytes) -> FileEntry:
    digest = sha256(contents).hexdigest()
    return FileEntry("x", len(contents), digest, FileRole.OTHER, FileFormat.OTHER)


ONE = entry(b"one")


async def put(storage: BlobStore, tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "contents"
    path.write_bytes(contents)
    await storage.put_file(path, sha256(contents).hexdigest())


async def row_of(database: Database, digest: str = ONE.sha256) -> Row | None:
    return await database.data["blobs"].find_one({"sha256": digest})


async def insert(database: Database, **changed: Any) -> BlobDocument:
    values: Row = {"sha256": ONE.sha256, "size_bytes": 3, **changed}
    blob = BlobDocument(**values)
    await blob.insert()
    return blob


async def claimed(database: Database, most: int = 100, **ago: float) -> Claim:
    before = utc_now() - timedelta(**ago)
    return await database.transaction(lambda session: claim_unused(database, session, before, most))


async def forgotten(database: Database, claim: Claim, removed: list[Row]) -> None:
    await database.transaction(lambda session: forget_blobs(database, session, claim, removed))


async def referred(database: Database, counts: dict[str, int]) -> None:
    await database.transaction(lambda session: refer_to(database, session, counts))


async def released(database: Database, counts: dict[str, int]) -> None:
    await database.transaction(lambda session: release(database, session, counts))


async def test_contents_come(database: Database, storage: BlobStore) -> None:
    begun = utc_now()
    documents = await announce_blobs(database, storage, [ONE])
    row = await row_of(database)
    assert row is not None
    assert documents == {
        ONE.sha256: {name: row[name] for name in ("_id", "sha256", "key", "stored")}
    }
    assert (row["size_bytes"], row["references"], row["stored"]) == (3, 0, False)
    assert row["created_at"] == row["seen_at"] >= begun
    async with refused(database, ErrorCode.CONFLICT):
        await referred(database, {ONE.sha256: 2})
    await record_blobs(database, [row["_id"]])
    await referred(database, {ONE.sha256: 2})
    row = await row_of(database)
    assert row is not None
    assert (row["references"], row["stored"], row["deleting_at"]) == (2, True, None)


async def test_many_announce_the_same_at_once(database: Database, storage: BlobStore) -> None:
    entries = [entry(b"%d" % number) for number in range(50)]
    await asyncio.gather(*(announce_blobs(database, storage, entries) for _ in range(8)))
    assert await database.count("blobs", {}) == 50


async def test_contents_of_files_stay_whatever_was_counted(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    old = utc_now() - timedelta(hours=25)
    for number in range(4):
        await insert(database, sha256=f"{number:064}", created_at=old)
    await database.data["blobs"].update_one(
        {"sha256": f"{1:064}"}, {"$set": {"deleting_at": utc_now() - timedelta(seconds=70)}}
    )
    for number in (0, 1, 1):
        await FileDocument(
            version_id=PydanticObjectId(),
            model_id=PydanticObjectId(),
            path="x",
            size_bytes=3,
            sha256=f"{number:064}",
        ).insert()
    claim = await claimed(database, 3, hours=24)
    assert ([row["sha256"] for row in claim.rows], claim.miscounted) == ([f"{2:064}"], 2)
    claim = await claimed(database, 3, hours=24)
    assert ([row["sha256"] for row in claim.rows], claim.miscounted) == ([f"{3:064}"], 0)
    rows = [await row_of(database, f"{number:064}") for number in range(2)]
    assert [(row["references"], row["deleting_at"]) for row in rows if row] == [
        (1, None),
        (2, None),
    ]
    assert "storage.miscounted" in caplog.text


async def test_what_is_used_or_seen_or_young_stays(database: Database) -> None:
    old = utc_now() - timedelta(hours=25)
    staying: list[Row] = [
        {"created_at": old, "references": 1},
        {"created_at": old, "seen_at": utc_now()},
        {},
        {"created_at": old, "deleting_at": utc_now() - timedelta(seconds=50)},
    ]
    going: list[Row] = [
        {"created_at": old},
        {"created_at": old, "seen_at": old},
        {"created_at": old, "stored": False},
        {"created_at": old, "deleting_at": utc_now() - timedelta(seconds=70)},
    ]
    for number, changed in enumerate(staying):
        await insert(database, sha256=f"{number:064}", **changed)
    assert (await claimed(database, hours=24)).rows == []
    for number, changed in enumerate(going):
        await insert(database, sha256=f"{10 + number:064}", **changed)
    first = await claimed(database, 3, hours=24)
    rest = await claimed(database, 3, hours=24)
    assert [row["sha256"] for row in (*first.rows, *rest.rows)] == [
        f"{10 + number:064}" for number in range(4)
    ]
    marked = await database.data["blobs"].count_documents({"deleting_at": first.marked_at})
    assert marked == 3


async def test_what_is_unused_is_found_by_its_index(database: Database) -> None:
    await insert(database)
    command = {
        "find": "blobs",
        "filter": blobs.removable(utc_now()),
        "sort": {"_id": 1},
        "limit": 100,
    }
    stages = await explained(database, command)
    assert {stage.get("indexName") for stage in stages} - {None} == {"unused"}
    assert not [stage for stage in stages if stage.get("stage") in ("COLLSCAN", "SORT")]


async def test_contents_go(database: Database, storage: BlobStore, tmp_path: Path) -> None:
    await put(storage, tmp_path, b"one")
    blob = await insert(database)
    claim = await claimed(database, hours=-1)
    async with refused(database, ErrorCode.CONFLICT):
        await record_blobs(database, [blob.id])
    async with refused(database, ErrorCode.CONFLICT):
        await referred(database, {ONE.sha256: 1})
    removed = await remove_contents(storage, claim)
    await forgotten(database, claim, removed)
    assert [row["sha256"] for row in removed] == [ONE.sha256]
    assert await row_of(database) is None
    assert not await storage.exists(digest_key(ONE.sha256))
    async with refused(database, ErrorCode.CONFLICT):
        await referred(database, {ONE.sha256: 1})
    await announce_blobs(database, storage, [ONE])  # by another, whose contents they will be
    async with refused(database, ErrorCode.CONFLICT):
        await record_blobs(database, [blob.id])
    async with refused(database, ErrorCode.CONFLICT):
        await referred(database, {ONE.sha256: 1})


async def fill(storage: BlobStore, key: str, contents: bytes) -> None:
    async with storage.incoming.writer(key, 0) as writer:
        await writer.write(contents)
        await writer.flush()


async def test_contents_that_were_recorded_meanwhile_stay_where_they_are(
    database: Database, storage: BlobStore
) -> None:
    """An upload brought them, while an import put them under their hash."""
    row = (await announce_blobs(database, storage, [ONE]))[ONE.sha256]
    assert not await are_here(database, storage, row)
    await fill(storage, "incoming/0/1", b"one")
    now = utc_now()
    await database.data["blobs"].update_one(
        {"_id": row["_id"]},
        {"$set": {"stored": True, "key": "incoming/0/1", "verified_at": now}},
    )
    await record_blobs(database, [row["_id"]])
    after = await row_of(database)
    assert after is not None
    assert (after["stored"], after["key"]) == (True, "incoming/0/1")
    assert after["verified_at"] == now
    assert await are_here(database, storage, after)


async def test_contents_go_from_wherever_they_lie(
    database: Database, storage: BlobStore, tmp_path: Path
) -> None:
    await put(storage, tmp_path, b"one")
    for key in ("incoming/0/1", "incoming/1/1"):
        await fill(storage, key, b"one")
    await insert(database, key="incoming/0/1")
    claim = await claimed(database, hours=-1)
    await forgotten(database, claim, await remove_contents(storage, claim))
    assert [left.key async for left in storage.incoming.listed()] == ["incoming/1/1"]
    assert not await storage.exists(digest_key(ONE.sha256))


async def test_an_abandoned_removal_of_what_arrived_is_finished(
    database: Database, storage: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(storage, "incoming/0/1", b"one")
    await insert(database, key="incoming/0/1")
    await claimed(database, hours=-1)  # by one who dies now
    monkeypatch.setattr(blobs, "ABANDONED", timedelta(seconds=-1))
    row = (await announce_blobs(database, storage, [ONE]))[ONE.sha256]
    assert (row["stored"], row["key"]) == (False, None)
    assert [left async for left in storage.incoming.listed()] == []


async def test_contents_that_the_store_has_lost_are_recorded_anew(
    database: Database, storage: BlobStore, tmp_path: Path
) -> None:
    begun = utc_now()
    await insert(database, key="incoming/0/1", references=2, verified_at=begun)
    row = (await announce_blobs(database, storage, [ONE]))[ONE.sha256]
    assert not await are_here(database, storage, row)
    damaged = await row_of(database)
    assert damaged is not None
    assert (damaged["stored"], damaged["damaged_at"] >= begun) == (False, True)
    async with refused(database, ErrorCode.CONFLICT):
        await referred(database, {ONE.sha256: 1})
    await put(storage, tmp_path, b"one")
    await record_blobs(database, [row["_id"]])
    mended = await row_of(database)
    assert mended is not None
    assert (mended["stored"], mended["references"]) == (True, 2)
    assert [mended[name] for name in blobs.OF_STORED] == [None, None, None]
    assert not await mark_damaged(database, row)  # which is of before


async def test_who_announces_waits_for_the_removal(
    database: Database, storage: BlobStore, tmp_path: Path
) -> None:
    await put(storage, tmp_path, b"one")
    blob = await insert(database)
    claim = await claimed(database, hours=-1)
    waiting = asyncio.create_task(announce_blobs(database, storage, [ONE, entry(b"two")]))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    await forgotten(database, claim, await remove_contents(storage, claim))
    await waiting
    row = await row_of(database)
    assert row is not None
    assert (row["_id"] != blob.id, row["stored"], row["deleting_at"]) == (True, False, None)
    assert (await claimed(database, hours=24)).rows == []


async def test_what_is_announced_first_is_not_claimed(
    database: Database, storage: BlobStore
) -> None:
    """Both in one moment: of the two that write to the document, one begins anew."""
    old = utc_now() - timedelta(hours=25)
    await insert(database, created_at=old, seen_at=old)

    async def work(session: AsyncClientSession) -> Claim:
        await database.data["blobs"].find_one({}, session=session)  # here its snapshot is taken
        if not announced.is_set():
            await announce_blobs(database, storage, [ONE])
            announced.set()
        return await claim_unused(database, session, utc_now() - timedelta(hours=24), 100)

    announced = asyncio.Event()
    assert (await database.transaction(work)).rows == []


async def test_an_abandoned_removal_is_finished(
    database: Database, storage: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(storage, tmp_path, b"one")
    await insert(database)
    await claimed(database, hours=-1)  # by one who dies now
    monkeypatch.setattr(blobs, "ABANDONED", timedelta(seconds=0.3))
    assert (await claimed(database, hours=-1)).rows == []
    await announce_blobs(database, storage, [ONE])
    assert not await storage.exists(digest_key(ONE.sha256))
    row = await row_of(database)
    assert row is not None
    assert (row["stored"], row["deleting_at"]) == (False, None)


async def test_a_removal_that_takes_too_long_is_told(
    database: Database, storage: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await insert(database)
    await claimed(database, hours=-1)
    monkeypatch.setattr(blobs, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(Unavailable, match="try again later"):
        await announce_blobs(database, storage, [ONE])


async def test_who_is_late_removes_nothing(
    database: Database, storage: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(storage, tmp_path, b"one")
    await insert(database)
    monkeypatch.setattr(blobs, "REMOVE_SECONDS", 0.0)
    claim = await claimed(database, hours=-1)
    assert await remove_contents(storage, claim) == []
    assert await storage.exists(digest_key(ONE.sha256))


async def test_what_was_stored_anew_and_may_have_been_removed_is_known(
    database: Database,
    storage: BlobStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that stood still between its clock and the store: the next import stores it once more."""
    await put(storage, tmp_path, b"one")
    await insert(database)
    late = await claimed(database, hours=-1)
    monkeypatch.setattr(blobs, "ABANDONED", timedelta())
    await asyncio.sleep(0.01)
    documents = await announce_blobs(database, storage, [ONE])
    await put(storage, tmp_path, b"one")
    await record_blobs(database, [documents[ONE.sha256]["_id"]])
    removed = await remove_contents(storage, late)
    await forgotten(database, late, removed)
    row = await row_of(database)
    assert row is not None
    assert row["stored"] is False
    assert "storage.removed_late" in caplog.text


async def test_a_store_that_fails_leaves_the_rest_for_later(
    database: Database, storage: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await insert(database)
    claim = await claimed(database, hours=-1)

    async def fail(digest: str) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(storage, "delete", fail)
    with pytest.raises(PermissionError):
        await remove_contents(storage, claim)
    row = await row_of(database)
    assert row is not None
    assert row["deleting_at"] == claim.marked_at


async def test_released_contents_stay_for_a_while(database: Database) -> None:
    old = utc_now() - timedelta(days=9)
    await insert(database, references=3, created_at=old, seen_at=old)
    for count in (1, 2):
        await released(database, {ONE.sha256: count})
    row = await row_of(database)
    assert row is not None
    assert (row["references"], row["seen_at"] > old) == (0, True)
    assert (await claimed(database, hours=24)).rows == []
    assert len((await claimed(database, hours=-1)).rows) == 1


async def test_whoever_comes_and_goes_what_is_used_is_stored(
    database: Database, storage: BlobStore, tmp_path: Path
) -> None:
    """Many add and let go the same few contents while others remove them at once, without any grace."""
    contents = [b"%d" % number for number in range(3)]
    done = refusals = 0

    async def use(name: int) -> None:
        nonlocal done, refusals
        mine = [entry(each) for each in contents]
        folder = tmp_path / str(name)
        folder.mkdir()
        for number, each in enumerate(contents):
            (folder / str(number)).write_bytes(each)
        for _ in range(12):
            try:
                documents = await announce_blobs(database, storage, mine)
                missing = []
                for number, wanted in enumerate(mine):
                    row = documents[wanted.sha256]
                    if not row["stored"] or not await storage.exists(digest_key(wanted.sha256)):
                        await storage.put_file(folder / str(number), wanted.sha256)
                        missing.append(row["_id"])
                await record_blobs(database, missing)
                counts = {wanted.sha256: 1 for wanted in mine}
                await referred(database, counts)
            except (Refused, FileNotFoundError):  # or it went before it was on the disk
                refusals += 1
                continue
            for used in mine:
                assert await storage.exists(digest_key(used.sha256))
            await asyncio.sleep(0.005)
            for used in mine:
                assert await storage.exists(digest_key(used.sha256))
            await released(database, counts)
            done += 1

    async def remove() -> None:
        while not ended.is_set():  # PyMongo can turn a cancellation into an error of its own
            claim = await claimed(database, hours=-1)
            await forgotten(database, claim, await remove_contents(storage, claim))
            before = done  # however slow all this is, somebody succeeds between two removals
            while done == before and not ended.is_set():
                await asyncio.sleep(0.001)

    ended = asyncio.Event()
    removing = [asyncio.create_task(remove()) for _ in range(2)]
    try:
        await asyncio.gather(*(use(name) for name in range(4)))
    finally:
        ended.set()
        await asyncio.gather(*removing)
    assert done + refusals == 48
    assert done > 5
