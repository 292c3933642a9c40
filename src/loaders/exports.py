"""Links to what exports have written."""

from typing import Any

from bson import ObjectId

from modelharbor.db.jobs import JobKind

from .base import Loader


class ExportLinkLoader(Loader[tuple[Any, ...], str | None, None]):
    """Signed links, for who asked for an export that has succeeded; nothing is read.

    The key is (job id, its kind, who asked for it, name of the file).
    """

    async def batch_load(self, keys: list[tuple[Any, ...]]) -> list[str | None]:
        return [self.link(*key) for key in keys]

    def link(self, job_id: ObjectId, kind: str, asked_by: ObjectId, name: str) -> str | None:
        if kind != JobKind.EXPORT.value or asked_by != self.reads.viewer.reads_as:
            return None
        return self.reads.links.export(job_id, name, round(self.reads.export_link_minutes * 60))
