"""What the client tells of: small records, as far as a program needs them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from .answers import number_of


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of a folder on this machine; `path` is its name in the version, `real` where its contents
    are, when a link leads there: below `base`, by no link."""

    path: str
    base: Path
    real: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Viewer:
    id: str
    login: str


@dataclass(frozen=True, slots=True)
class Version:
    id: str
    number: int
    status: str
    model_id: str
    model: str  # owner/name
    label: str | None = None
    digest: str | None = None
    size_bytes: int = 0
    file_count: int = 0

    @property
    def reference(self) -> str:
        return f"{self.model}:{self.number}"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a version; `url` needs no token, and is good for some time."""

    id: str
    path: str
    size_bytes: int
    sha256: str
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    id: str
    path: str
    size_bytes: int
    received_bytes: int
    state: str
    protocol: str
    url: str
    headers: Mapping[str, str]
    sha256: str | None = None
    error: str | None = None  # why it failed


TAKING: Final = frozenset({"CREATED", "UPLOADING", "PAUSED"})
"""States of an upload in which it takes bytes."""
ON_ITS_WAY: Final = frozenset({"RECEIVED", "VERIFYING"})
"""States of an upload whose bytes are all there, and that is no file yet."""


class Step(Enum):
    HASHING = "hashing"
    SENDING = "sending"
    RECEIVING = "receiving"
    VERIFYING = "verifying"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a file: `done` of `total` bytes of a step. `moved` is how many of them went over the network."""

    path: str
    step: Step
    done: int
    total: int
    moved: int = 0


@dataclass(frozen=True, slots=True)
class Transferred:
    """What an upload or a download came to; `moved_bytes` went over the network, the rest was there."""

    files: int
    size_bytes: int
    moved_bytes: int
    skipped_files: int  # that were there already, whole


@dataclass(frozen=True, slots=True)
class Finding:
    """What the inspection of a file found."""

    path: str
    verdict: str
    severity: str
    rule: str
    detail: str


@dataclass(frozen=True, slots=True)
class Processing:
    """How far the server is with a version that was published."""

    status: str  # of the version, or of the job that processes it
    message: str | None = None
    current: int = 0
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Exporting:
    """How far the job of an export is, in rows."""

    job_id: str
    state: str
    rows: int = 0
    total: int | None = None
    rows_per_second: float | None = None
    seconds_left: float | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export has written; `url` needs no token, and is good for some time."""

    job_id: str
    file_name: str
    rows: int
    size_bytes: int
    truncated: int  # connections below rows that have more than is in the file
    faults: int  # rows that are left out, for the server could not make them
    expires_at: str
    url: str | None = None


def version_of(row: Mapping[str, Any]) -> Version:
    return Version(
        id=row["id"],
        number=row["number"],
        status=row["status"],
        model_id=row["model"]["id"],
        model=row["model"]["fullName"],
        label=row["label"],
        digest=row["digest"],
        size_bytes=int(row["sizeBytes"]),
        file_count=row["fileCount"],
    )


def file_of(row: Mapping[str, Any]) -> File:
    return File(
        id=row["id"],
        path=row["path"],
        size_bytes=number_of(row["sizeBytes"]),
        sha256=row["sha256"],
        url=row.get("downloadUrl"),
    )


def upload_of(row: Mapping[str, Any]) -> Upload:
    error = row.get("error")
    return Upload(
        id=row["id"],
        path=row["path"],
        size_bytes=int(row["sizeBytes"]),
        received_bytes=int(row["receivedBytes"]),
        state=row["state"],
        protocol=row["protocol"],
        url=row["url"],
        headers=row["headers"] or {},
        sha256=row["sha256"],
        error=None if error is None else error["message"],
    )


def batches(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
