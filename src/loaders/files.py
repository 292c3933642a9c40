"""Files of versions, and where their contents are."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from bson import ObjectId

from modelharbor.auth.quarantine import UNPUBLISHED, needed_beside
from modelharbor.auth.viewer import NOTHING
from modelharbor.cache.tags import Tag, gone
from modelharbor.db.base import Row
from modelharbor.db.files import FileDocument, ScanVerdict, verdict_of
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionStatus

from .base import ROOT, Loader, Sharing
from .models import HoldersByContentsLoader
from .pages import PageLoader, Total
from .rows import RowByIdLoader
from .told import below_each, by_key


class FileByIdLoader(RowByIdLoader):
    """Files of versions that were reached."""

    collection, document = "files", FileDocument
    sharing, is_told = Sharing.EVERYBODY, True


class FilesByVersionLoader(PageLoader[ObjectId]):
    collection, parent, document = "files", "version_id", FileDocument
    counter = ("versions", "file_count")
    sharing, is_told = Sharing.EVERYBODY, True


class FileByPathLoader(Loader[ObjectId, Row | None, str]):
    """The file of each version at one path."""

    document = FileDocument
    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        query = {"version_id": {"$in": keys}, "path": self.arguments}
        rows = await self.find("files", query, self.names("_id", "version_id"))
        by_version = {row["version_id"]: row for row in rows}
        return [by_version.get(key) for key in keys]

    def tags(self, keys: Sequence[ObjectId], found: Mapping[ObjectId, Any]) -> list[Tag]:
        there = [row for key in keys if (row := found.get(key)) is not None]
        missing = [key for key in keys if found.get(key) is None]
        shown = by_key("files", (row["_id"] for row in there))  # no other has its path meanwhile
        return [*shown, *below_each("files", "version_id", missing)] if missing else shown


class FilesByContentsLoader(PageLoader[str]):
    """All files with one hash, in models that the viewer may see. The query holds the hash."""

    collection, document = "files", FileDocument

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        wanted = self.arguments.query.data
        holders = await self.reads.loader(HoldersByContentsLoader, None).load(wanted["sha256"])
        query = {
            **wanted,
            "model_id": {"$in": list(holders.files)},
            "version_id": {"$nin": holders.deleted},
        }
        page = self.page(ROOT, await self.one(query) if holders.files else [])
        page["total"] = Total("files", known=sum(holders.files.values()))
        return [page for _ in keys]


class OthersByContentsLoader(Loader[str, int, None]):
    """How many other files have the contents of a file, in models that the viewer may see."""

    async def batch_load(self, keys: list[str]) -> list[int]:
        holders = await self.reads.loader(HoldersByContentsLoader, None).load_many(keys)
        return [max(0, sum(found.files.values()) - 1) for found in holders]


@dataclass(frozen=True, slots=True)
class LinkWanted:
    expires_in: int  # seconds
    accept_quarantined: bool = False


class FileKey(NamedTuple):
    """What a link to a file depends on."""

    id: ObjectId
    model_id: ObjectId
    version_id: ObjectId
    path: str
    sha256: str


class DownloadLinkLoader(Loader[tuple[Any, ...], str | None, LinkWanted]):
    """Signed links; None without the permission to download, or what else a file needs that is not
    known to be harmless. The key is what FileKey names, in its order.

    Two commands; a third where a version is not published.
    """

    async def batch_load(self, keys: list[tuple[Any, ...]]) -> list[str | None]:
        files = [FileKey(*key) for key in keys]
        viewer = self.reads.viewer
        models = {"_id": {"$in": list({file.model_id for file in files})}, **viewer.visible}
        versions = {"_id": {"$in": list({file.version_id for file in files})}}
        found, of_versions = await asyncio.gather(
            self.find("models", models, ["state", "visibility", "owner_id", "grants"]),
            self.find("versions", versions, ["status"]),
        )
        held = {row["_id"]: viewer.on_model(row) for row in found}
        statuses = {row["_id"]: _status(row.get("status")) for row in of_versions}
        unpublished = [
            file.sha256 for file in files if statuses.get(file.version_id) in UNPUBLISHED
        ]
        verdicts = await self.verdicts(unpublished) if unpublished else {}
        return [
            self.link(
                file,
                held.get(file.model_id, NOTHING),
                statuses.get(file.version_id, VersionStatus.DELETED),
                verdicts.get(file.sha256, ScanVerdict.SKIPPED),
            )
            for file in files
        ]

    async def verdicts(self, digests: list[str]) -> dict[str, ScanVerdict]:
        query = {"sha256": {"$in": list(dict.fromkeys(digests))}}
        rows = await self.find("blobs", query, VERDICT_FROM)
        return {row["sha256"]: verdict_of(row) for row in rows}

    def link(
        self,
        file: FileKey,
        held: frozenset[Permission],
        status: VersionStatus,
        verdict: ScanVerdict,
    ) -> str | None:
        if Permission.DOWNLOAD not in held or status is VersionStatus.DELETED:
            return None
        needed = needed_beside(status, verdict)
        if needed is not None and needed not in held:
            return None
        if needed is Permission.PUBLISH and not self.arguments.accept_quarantined:
            return None
        return self.reads.links.link(file.id, file.path, self.arguments.expires_in, held=needed)


def _status(stored: Any) -> VersionStatus:
    """One that nobody knows gives no links."""
    try:
        return VersionStatus(stored)
    except ValueError:
        return VersionStatus.DELETED


VERDICT_FROM: Final = ("sha256", "stored", "damaged_at", "inspection.verdict")


class ScanByContentsLoader(Loader[str, Row, None]):
    """What was found in contents: {verdict, scanner, scanned_at, findings}."""

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[str]) -> list[Row]:
        inspected = [f"inspection.{name}" for name in ("scanner", "scanned_at", "findings")]
        rows = await self.find("blobs", {"sha256": {"$in": keys}}, [*VERDICT_FROM, *inspected])
        by_hash = {row["sha256"]: row for row in rows}
        return [_scan(by_hash.get(key)) for key in keys]

    def tags(self, keys: Sequence[str], found: Mapping[str, Any]) -> list[Tag]:
        return by_contents(keys)


def by_contents(digests: Sequence[str]) -> list[Tag]:
    """Of one that is gone nothing but its id is told."""
    return [gone("blobs"), *by_key("blobs", digests)]


def _scan(blob: Row | None) -> Row:
    inspection: Row = (blob or {}).get("inspection") or {}
    return {
        "verdict": verdict_of(blob).value,
        "scanner": inspection.get("scanner"),
        "scanned_at": inspection.get("scanned_at"),
        "findings": inspection.get("findings") or [],
    }


class _InspectedLoader(Loader[str, Any, None]):
    """One part of what was found in contents; None where there is none."""

    part: ClassVar[str]
    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[str]) -> list[Any]:
        query = {"sha256": {"$in": keys}}
        rows = await self.find("blobs", query, ["sha256", f"inspection.{self.part}"])
        by_hash = {row["sha256"]: row.get("inspection") or {} for row in rows}
        return [by_hash.get(key, {}).get(self.part) for key in keys]

    def tags(self, keys: Sequence[str], found: Mapping[str, Any]) -> list[Tag]:
        return by_contents(keys)


class TensorsByContentsLoader(_InspectedLoader):
    """What the header of weights says of their tensors."""

    part = "tensors"


class HeaderByContentsLoader(_InspectedLoader):
    """What files say of themselves: JSON, 64 KiB at most."""

    part = "header"
