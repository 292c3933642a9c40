"""Contents are looked into once, in the fence, and what was found stays with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bson import ObjectId
from pymongo import ReturnDocument

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.files import HARMLESS, ScanVerdict, verdict_of
from modelharbor.errors import NotStored
from modelharbor.inspection.fence import SCANNER, Fence
from modelharbor.storage.blobs import BlobStore, blob_key

CONTENTS_AT_ONCE: Final = 1000
DEEPEST: Final = 50  # levels of a header; MongoDB holds 100, and those above it count too
BIG: Final = 2**63


async def inspect_blob(
    database: Database,
    storage: BlobStore,
    fence: Fence,
    sha256: str,
    stage: Callable[[str], None] | None = None,
    *,
    renew: bool = False,
) -> Row:
    """The inspection of these contents; made now where there is none, and stored with them.

    `renew`: also where there is one by another scanner than ours. `stage` is told what the fence does.
    Whoever stores first wins, so it may be done twice at once. NotStored where the contents are not
    here, Unavailable where the store does not answer: neither says anything of the file.
    """
    blobs = database.data["blobs"]
    blob = await blobs.find_one(
        {"sha256": sha256, "deleting_at": None}, max_time_ms=database.query_timeout_ms
    )
    if blob is None or not blob["stored"]:
        raise NotStored("The contents of this file are not stored here.")
    known: Row | None = blob.get("inspection")
    if known is not None and not (renew and known["scanner"] != SCANNER):
        return known
    key = blob_key(blob)

    async def read(start: int, end: int) -> bytes:
        return await storage.read_range(key, start, end)

    found = await fence.inspect(read, blob["size_bytes"], stage)
    row = found.row(SCANNER, utc_now())
    row |= {name: storable(row[name]) for name in ("tensors", "header")}
    after: Row | None = await blobs.find_one_and_update(
        {
            "_id": blob["_id"],
            "inspection.scanned_at": None if known is None else known["scanned_at"],
        },
        [{"$set": {"inspection": {"$literal": row}}}],
        {"inspection": 1},
        return_document=ReturnDocument.AFTER,
    )
    if after is None:
        after = await blobs.find_one(
            {"_id": blob["_id"]}, {"inspection": 1}, max_time_ms=database.query_timeout_ms
        )
    if after is None or after["inspection"] is None:
        raise NotStored("The contents of this file were removed meanwhile.")
    inspection: Row = after["inspection"]
    return inspection


def storable(value: Any) -> Any:
    """The value, None where MongoDB cannot hold it: a file may say anything of itself."""
    return value if _fits(value, DEEPEST) else None


def _fits(value: Any, levels: int) -> bool:
    match value:
        case None | bool() | float():
            return True
        case int():
            return -BIG <= value < BIG
        case str():
            return _is_text(value)
        case list():
            return levels > 0 and all(_fits(each, levels - 1) for each in value)
        case dict():
            return levels > 0 and all(
                isinstance(key, str)
                and "\0" not in key
                and _is_text(key)
                and _fits(each, levels - 1)
                for key, each in value.items()
            )
    return False


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


async def uninspected(database: Database, digests: Sequence[str]) -> set[str]:
    """Those of these contents that are stored here, and that nobody has looked into yet."""
    found: set[str] = set()
    for start in range(0, len(digests), CONTENTS_AT_ONCE):
        rows = await database.find(
            "blobs",
            {
                "sha256": {"$in": list(digests[start : start + CONTENTS_AT_ONCE])},
                "stored": True,
                "inspection": None,
            },
            projection={"_id": 0, "sha256": 1},
        )
        found.update(row["sha256"] for row in rows)
    return found


@dataclass(frozen=True, slots=True)
class Troubled:
    """A file that is not known to be harmless; `details` are sentences about why."""

    path: str
    verdict: ScanVerdict
    details: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}: {self.verdict.value}{''.join(f' {each}' for each in self.details)}"


async def troubled_files(database: Database, version_id: ObjectId, most: int) -> list[Troubled]:
    """The first files of a version, by path, that keep it from being READY."""
    found: list[Troubled] = []
    after = ""
    while len(found) < most:
        files = await database.find(
            "files",
            {"version_id": version_id, "path": {"$gt": after}},
            projection={"_id": 0, "path": 1, "sha256": 1},
            sort={"path": 1},
            limit=CONTENTS_AT_ONCE,
        )
        if not files:
            break
        after = files[-1]["path"]
        blobs = {
            row["sha256"]: row
            for row in await database.find(
                "blobs",
                {"sha256": {"$in": sorted({file["sha256"] for file in files})}},
                projection={
                    "_id": 0,
                    **dict.fromkeys(("sha256", "stored", "damaged_at"), 1),
                    **dict.fromkeys(("inspection.verdict", "inspection.findings"), 1),
                },
            )
        }
        for file in files:
            blob = blobs.get(file["sha256"])
            verdict = verdict_of(blob)
            if blob is not None and verdict not in HARMLESS:
                found.append(Troubled(file["path"], verdict, _details(blob)))
    return found[:most]


def _details(blob: Row) -> tuple[str, ...]:
    inspection = blob.get("inspection") or {}
    return tuple(each["detail"] for each in inspection.get("findings", ()))
