"""A folder becomes a version: found again where an earlier process was killed, published, followed."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from . import documents
from .failures import Refused, Rejected
from .hashing import hash_file
from .records import (
    ON_ITS_WAY,
    TAKING,
    File,
    Finding,
    LocalFile,
    Processing,
    Progress,
    Step,
    Upload,
    Version,
    Viewer,
    version_of,
)

if TYPE_CHECKING:
    from .client import Client

MUTABLE: Final = frozenset({"DRAFT", "UPLOADING"})
"""States in which a version takes files."""
UNSETTLED: Final = MUTABLE | {"PROCESSING"}
UNKNOWN_FIELD: Final = "GRAPHQL_VALIDATION_FAILED"
"""Of a server that is older than this client: it goes without."""
SILENT: Final = frozenset({"SAFE", "SKIPPED", "PENDING"})
"""Verdicts of files that there is nothing to tell of."""
LOOK_SECONDS: Final = 0.2
LONGEST_LOOK_SECONDS: Final = 3.0


@dataclass
class Draft:
    """A version that a folder goes to, and what is there of it already."""

    version: Version
    is_resumed: bool = False
    is_same: bool = False  # it was published before, with the same contents
    there: set[str] = field(default_factory=set)  # paths of files that are there, whole
    uploads: list[Upload] = field(default_factory=list)  # that were begun
    hashes: dict[str, str] = field(default_factory=dict)  # of files of this machine, by path


async def find_or_create_model(
    client: "Client", owner: str, name: str, visibility: str | None
) -> str:
    """Its id. A model that is made is PRIVATE unless `visibility` says otherwise."""
    row = (await client.execute(documents.MODEL, {"owner": owner, "name": name}))["model"]
    if row is None:
        input = {"owner": owner, "name": name, "idempotencyKey": uuid4().hex}
        if visibility is not None:
            input["visibility"] = visibility
        try:
            row = (await client.mutate(documents.CREATE_MODEL, input))["model"]
        except Refused as error:
            if error.code != "ALREADY_EXISTS":
                raise
            found = await client.execute(documents.MODEL, {"owner": owner, "name": name})
            row = found["model"]
            if row is None:  # it is there, and not for this token
                raise
    found_id: str = row["id"]
    return found_id


async def find_or_create_draft(
    client: "Client",
    viewer: Viewer,
    model_id: str,
    files: Sequence[LocalFile],
    *,
    label: str | None,
    new: bool,
    report: Callable[[Progress], None],
) -> Draft:
    """Where this folder goes: the version that an earlier process began with it, one that has the same
    contents already, or a new one. `new`: always a new one."""
    if not new:
        finding = _Finding(client, viewer, model_id, files, label, report)
        found = await finding.find()
        if found is not None:
            return found
    input = {"modelId": model_id, "idempotencyKey": uuid4().hex}
    if label is not None:
        input["label"] = label
    payload = await client.mutate(documents.CREATE_VERSION, input)
    return Draft(version_of(payload["modelVersion"]))


class _Finding:
    def __init__(
        self,
        client: "Client",
        viewer: Viewer,
        model_id: str,
        files: Sequence[LocalFile],
        label: str | None,
        report: Callable[[Progress], None],
    ) -> None:
        self.client, self.viewer, self.model_id = client, viewer, model_id
        self.label, self.report = label, report
        self.local = {file.path: file for file in files}
        self.size_bytes = sum(file.size_bytes for file in files)
        self.hashes: dict[str, str] = {}

    async def find(self) -> Draft | None:
        begun = await self._latest(["DRAFT", "UPLOADING"])
        draft = None if begun is None else await self._begun(begun)
        if draft is not None and (draft.there or draft.uploads):
            return draft
        settled = await self._latest(["PROCESSING", "READY", "QUARANTINED"])
        if settled is not None and await self._is_same(settled):
            return Draft(settled, is_same=True, hashes=self.hashes)
        return draft  # an empty one, which a process made before it was killed

    async def _latest(self, status: list[str]) -> Version | None:
        variables = {"model": self.model_id, "by": self.viewer.id, "status": status}
        model = (await self.client.execute(documents.LATEST, variables))["model"]
        rows = [] if model is None else model["versions"]["nodes"]
        return version_of(rows[0]) if rows else None

    async def _begun(self, version: Version) -> Draft | None:
        """None: it was begun with another folder, or with another label."""
        if version.label != self.label or version.file_count > len(self.local):
            return None
        files, uploads = [], []
        async with aclosing(self.client.files(version.id)) as found:
            async for file in found:
                if not self._is_like(file):
                    return None
                files.append(file)
        there = {file.path for file in files}
        async with aclosing(self.client.uploads(version.id)) as begun:
            async for upload in begun:
                if upload.state not in TAKING | ON_ITS_WAY or upload.path in there:
                    continue
                if not self._is_like(upload):
                    return None
                uploads.append(upload)
        if not await self._have_hashes(files):
            return None
        return Draft(version, True, False, there, uploads, self.hashes)

    async def _is_same(self, version: Version) -> bool:
        if version.file_count != len(self.local) or version.size_bytes != self.size_bytes:
            return False
        files = []
        async with aclosing(self.client.files(version.id)) as found:
            async for file in found:
                if not self._is_like(file):
                    return False
                files.append(file)
        return await self._have_hashes(files)

    def _is_like(self, other: File | Upload) -> bool:
        file = self.local.get(other.path)
        return file is not None and file.size_bytes == other.size_bytes

    async def _have_hashes(self, files: Sequence[File]) -> bool:
        """Whether these files have the same contents here; the small ones first, which cost little."""
        for file in sorted(files, key=lambda file: file.size_bytes):
            local = self.local[file.path]
            if file.path not in self.hashes:

                def report(done: int, local: LocalFile = local) -> None:
                    self.report(Progress(local.path, Step.HASHING, done, local.size_bytes))

                self.hashes[file.path] = await hash_file(local, report)
            if self.hashes[file.path] != file.sha256:
                return False
        return True


async def publish(
    client: "Client", version: Version, aliases: Sequence[str]
) -> tuple[Version, str | None]:
    """The version as it is then, and the job that processes it, where one is needed.

    One that was published before is answered as it is, and its aliases are set.
    """
    if version.status in MUTABLE:
        input = {"id": version.id, "setAliases": list(aliases)}
        try:
            payload = await client.mutate(documents.PUBLISH, input, again=True)
        except Refused as error:
            now = await client.version(version.id)
            if error.code != "INVALID_TRANSITION" or now.status in MUTABLE:
                raise
            return now, None  # an answer got lost, and it was done by then
        job = payload["job"]
        return version_of(payload["modelVersion"]), None if job is None else job["id"]
    for alias in aliases:
        input = {"modelId": version.model_id, "name": alias, "versionId": version.id}
        await client.mutate(documents.SET_ALIAS, input, again=True)
    return version, None


async def follow(
    client: "Client", version_id: str, job_id: str | None
) -> AsyncGenerator[Processing, None]:
    """How far the server is with a version, until it has settled: the last one has the final status."""
    failed: str | None = None
    if job_id is not None:
        async with aclosing(_watched(client, job_id)) as events:
            async for now, why in events:
                failed = why
                yield now
    pause = LOOK_SECONDS
    while (version := await client.version(version_id)).status in UNSETTLED:
        if failed is not None:
            yield Processing("FAILED", failed)
            return
        yield Processing(version.status)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, LONGEST_LOOK_SECONDS)
    yield Processing(version.status, await reason_of(client, version_id))


async def _watched(
    client: "Client", job_id: str
) -> AsyncGenerator[tuple[Processing, str | None], None]:
    """Each event of the job; and at its end, when that is a bad one, what is wrong."""
    async with aclosing(client.subscribe(documents.JOB, {"id": job_id})) as events:
        async for data in events:
            job = data["jobProgress"]["job"]
            progress = job["progress"]
            total = progress["total"]
            failed = None
            if job["state"] in ("FAILED", "DEAD", "CANCELLED"):
                failed = job["error"]["message"] if job["error"] else f"Its job is {job['state']}."
            yield (
                Processing(
                    job["state"],
                    progress["message"],
                    int(progress["current"]),
                    None if total is None else int(total),
                ),
                failed,
            )


async def reason_of(client: "Client", version_id: str) -> str | None:
    """Why it has the status that it has, in a sentence."""
    try:
        node = (await client.execute(documents.REASON, {"id": version_id}))["node"]
    except Rejected as error:
        if error.code != UNKNOWN_FIELD:
            raise
        return None
    reason: str | None = (node or {}).get("statusReason")
    return reason


async def findings_of(client: "Client", version_id: str) -> list[Finding]:
    """What keeps a version from being READY."""
    found: list[Finding] = []
    try:
        async with aclosing(client.pages(documents.FINDINGS, version_id, "files")) as rows:
            async for row in rows:
                found += _findings(row)
    except Rejected as error:
        if error.code != UNKNOWN_FIELD:
            raise
    return found


def _findings(row: Mapping[str, Any]) -> list[Finding]:
    scan = row["scan"]
    if scan["verdict"] in SILENT:
        return []
    given = scan["findings"] or [{"severity": "CRITICAL", "rule": "", "detail": ""}]
    return [
        Finding(row["path"], scan["verdict"], each["severity"], each["rule"], each["detail"])
        for each in given
        if each["severity"] != "INFO" or len(given) == 1
    ]
