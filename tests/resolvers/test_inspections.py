"""Contents are looked into once, in the fence; what was found stays with them, and says what it may."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest
from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import (
    BlobDocument,
    FileDocument,
    FileFormat,
    ScanVerdict,
    verdict_of,
)
from modelharbor.db.jobs import Level
from modelharbor.errors import NotStored
from modelharbor.inspection.fence import SCANNER, Fence, open_fence
from modelharbor.inspection.results import Finding, Inspection, Tensors
from modelharbor.resolvers.inspections import (
    Troubled,
    inspect_blob,
    storable,
    troubled_files,
    uninspected,
)
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, open_storage
from tests.documents import START

pytestmark = pytest.mark.anyio
TEXT = b"a small text\n" * 1000
DIGEST = sha256(TEXT).hexdigest()


class Told:
    """A fence that says of all contents what it was told."""

    def __init__(self, inspection: Inspection) -> None:
        self.inspection = inspection
        self.heads: list[bytes] = []

    async def inspect(
        self,
        read: Callable[[int, int], Awaitable[bytes]],
        size: int,
        stage: Callable[[str], None] | None = None,
    ) -> Inspection:
        self.heads.append(await read(0, min(5, size)))
        if stage is not None:
            stage("sniff")
        return self.inspection


def fence_of(told: Told) -> Fence:
    return cast("Fence", told)


SAFE = Inspection(ScanVerdict.SAFE, FileFormat.TEXT)


class Shelf:
    def __init__(self, database: Database, storage: BlobStore) -> None:
        self.database, self.storage = database, storage

    async def put(self, contents: bytes, folder: Path, **values: Any) -> str:
        digest = sha256(contents).hexdigest()
        path = folder / digest
        path.write_bytes(contents)
        await self.storage.put_file(path, digest)
        await BlobDocument(sha256=digest, size_bytes=len(contents), **values).insert()
        return digest

    async def inspect(self, fence: Fence, digest: str = DIGEST, **values: Any) -> Row:
        return await inspect_blob(self.database, self.storage, fence, digest, **values)

    async def row(self, digest: str = DIGEST) -> Row:
        row = await self.database.data["blobs"].find_one({"sha256": digest})
        assert row is not None
        return row


@pytest.fixture
async def shelf(database: Database, settings: Settings) -> AsyncIterator[Shelf]:
    async with open_storage(settings) as storage:
        yield Shelf(database, storage)


async def test_real_contents_in_the_real_fence(
    shelf: Shelf, settings: Settings, tmp_path: Path
) -> None:
    await shelf.put(TEXT, tmp_path)
    stages: list[str] = []
    async with open_fence(settings) as fence:
        found = await shelf.inspect(fence, stage=stages.append)
        assert found == (await shelf.row())["inspection"]
        assert (found["format"], found["scanner"], found["findings"]) == ("TEXT", SCANNER, [])
        assert ScanVerdict(found["verdict"]) in (ScanVerdict.SAFE, ScanVerdict.SKIPPED)
        assert stages[0] == "sniff"
        stages.clear()
        assert await shelf.inspect(fence, stage=stages.append) == found
    assert stages == []


async def test_what_was_found_is_stored_once(shelf: Shelf, tmp_path: Path) -> None:
    await shelf.put(TEXT, tmp_path)
    told = Told(SAFE)
    rows = await asyncio.gather(*[shelf.inspect(fence_of(told)) for _ in range(5)])
    assert set(told.heads) == {TEXT[:5]}
    stored = (await shelf.row())["inspection"]
    assert rows == [stored] * 5
    told.inspection = Inspection(ScanVerdict.UNSAFE, FileFormat.OTHER)
    told.heads.clear()
    assert await shelf.inspect(fence_of(told)) == stored
    assert told.heads == []


async def test_what_an_older_scanner_found_can_be_renewed(shelf: Shelf, tmp_path: Path) -> None:
    old = SAFE.row("modelharbor 0", START)
    await shelf.put(TEXT, tmp_path, inspection=old)
    fence = fence_of(Told(Inspection(ScanVerdict.UNSAFE, FileFormat.TEXT)))
    assert await shelf.inspect(fence) == old
    new = await shelf.inspect(fence, renew=True)
    assert (new["verdict"], new["scanner"]) == ("UNSAFE", SCANNER)
    assert (await shelf.row())["inspection"] == new
    assert await shelf.inspect(fence_of(Told(SAFE)), renew=True) == new


async def test_contents_that_are_not_here(shelf: Shelf, tmp_path: Path) -> None:
    fence = fence_of(Told(SAFE))
    with pytest.raises(NotStored):
        await shelf.inspect(fence)
    await BlobDocument(sha256=DIGEST, size_bytes=len(TEXT), stored=False).insert()
    with pytest.raises(NotStored):
        await shelf.inspect(fence)
    await shelf.database.data["blobs"].update_one({}, {"$set": {"stored": True}})
    with pytest.raises(NotStored):  # it says so, and the store has them not
        await shelf.inspect(fence)
    assert (await shelf.row())["inspection"] is None


HARD: list[Any] = [
    {"$set": {"a.b": 1, "": [1, 2.5, None, True, "é"]}},
    {"$literal": "$sha256"},
    [[[]]],
    {"n": 2**63 - 1},
]
IMPOSSIBLE: list[Any] = [
    {"n": 2**63},
    {"a\0b": 1},
    {"a": "\ud800"},
    {1: "a"},
    {"x": b"bytes"},
]


async def test_a_header_may_say_anything(shelf: Shelf, tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    for number, header in enumerate([*HARD, *IMPOSSIBLE, deep]):
        digest = await shelf.put(b"%d" % number, tmp_path)
        found = await shelf.inspect(
            fence_of(
                Told(
                    Inspection(
                        ScanVerdict.SAFE,
                        FileFormat.GGUF,
                        [Finding(Level.INFO, "a.b", "$sha256", 7)],
                        Tensors(1, 2**63 - 1, {"$F.32": 2**63 - 1}, architecture="$x"),
                        header,
                    )
                )
            ),
            digest,
        )
        assert (await shelf.row(digest))["inspection"] == found
        assert found["header"] == (header if number < len(HARD) else None)
        assert found["findings"][0]["detail"] == "$sha256"
        assert found["tensors"]["parameters_by_dtype"] == {"$F.32": 2**63 - 1}


def test_values_that_fit() -> None:
    assert [storable(each) for each in HARD] == HARD
    assert [storable(each) for each in IMPOSSIBLE] == [None] * len(IMPOSSIBLE)


@pytest.mark.parametrize(
    ("blob", "verdict"),
    [
        (None, ScanVerdict.SKIPPED),
        ({"stored": False}, ScanVerdict.SKIPPED),
        ({"stored": False, "damaged_at": START}, ScanVerdict.ERROR),
        (
            {"stored": False, "damaged_at": START, "inspection": {"verdict": "SAFE"}},
            ScanVerdict.ERROR,
        ),
        ({"stored": True}, ScanVerdict.PENDING),
        ({"stored": True, "inspection": None}, ScanVerdict.PENDING),
        ({"stored": True, "inspection": {"verdict": "UNSAFE"}}, ScanVerdict.UNSAFE),
        (
            {"stored": True, "damaged_at": START, "inspection": {"verdict": "SAFE"}},
            ScanVerdict.SAFE,
        ),
    ],
)
def test_the_verdict_of_contents(blob: Row | None, verdict: ScanVerdict) -> None:
    assert verdict_of(blob) is verdict


async def test_files_that_keep_a_version_from_being_ready(database: Database) -> None:
    version_id, other_id = ObjectId(), ObjectId()
    findings = [{"severity": "CRITICAL", "rule": "x", "detail": "It calls os.system."}]
    of_blobs: list[Row] = [
        {"stored": False},
        {"inspection": {"verdict": "UNSAFE", "findings": findings}},
        {"inspection": {"verdict": "SAFE", "findings": []}},
        {"stored": False, "damaged_at": START},
        {},
    ]
    for size, values in enumerate(of_blobs):
        await BlobDocument(sha256=f"{size:064x}", size_bytes=size, **values).insert()
        for version in (version_id, other_id):
            await FileDocument(
                version_id=version,
                model_id=ObjectId(),
                path=f"{9 - size}",
                size_bytes=size,
                sha256=f"{size:064x}",
            ).insert()
    found = await troubled_files(database, version_id, 10)
    assert found == [
        Troubled("5", ScanVerdict.PENDING, ()),
        Troubled("6", ScanVerdict.ERROR, ()),
        Troubled("8", ScanVerdict.UNSAFE, ("It calls os.system.",)),
    ]
    assert str(found[2]) == "8: UNSAFE It calls os.system."
    assert await troubled_files(database, version_id, 1) == found[:1]
    assert await uninspected(database, [f"{size:064x}" for size in range(9)]) == {f"{4:064x}"}
