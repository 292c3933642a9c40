"""Files of versions."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import strawberry

from modelharbor.db import conditions
from modelharbor.db.files import FileFormat, FileRole, ScanVerdict
from modelharbor.db.jobs import Level
from modelharbor.db.keyset import Filter, Window
from modelharbor.errors import BadUserInput
from modelharbor.execution.declaration import computed, loaded
from modelharbor.loaders.files import (
    DownloadLinkLoader,
    HeaderByContentsLoader,
    LinkWanted,
    OthersByContentsLoader,
    ScanByContentsLoader,
    TensorsByContentsLoader,
)
from modelharbor.loaders.versions import VersionByIdLoader

from .directives import KEPT, NEVER_KEPT, Cost
from .nodes import Node
from .orders import BY_PATH
from .pages import After, Before, First, Last, window
from .scalars import JSON, SHA256, URL, BigInt

if TYPE_CHECKING:
    from .versions import ModelVersion

MAX_EXPIRY = 7 * 24 * 3600  # seconds
MAX_PATH = 1024  # characters


def files_window(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    path_prefix: Annotated[
        str | None, strawberry.argument(description="Only paths that begin with this.")
    ] = None,
    role: Annotated[
        list[FileRole] | None, strawberry.argument(description="Only files of these roles.")
    ] = None,
) -> Window:
    parts = [
        conditions.text("path", prefix=path_prefix, longest=MAX_PATH),
        conditions.one_of("role", [each.value for each in role]) if role is not None else {},
    ]
    return window(BY_PATH, first, after, last, before, Filter(conditions.all_of(parts)))


def file_path(
    path: Annotated[str, strawberry.argument(description="Path within the version.")],
) -> str:
    if len(path) > MAX_PATH or "\0" in path:
        raise BadUserInput(f"A path has {MAX_PATH} characters at most, none of them NUL.")
    return path


def link_wanted(
    expires_in: Annotated[
        int,
        strawberry.argument(description="How many seconds the link is good for, 60 to 604,800."),
    ] = 3600,
    accept_quarantined: Annotated[
        bool,
        strawberry.argument(
            description="Also where the version is QUARANTINED or FAILED, for those with the permission PUBLISH: the file may do harm."
        ),
    ] = False,
) -> LinkWanted:
    if not 60 <= expires_in <= MAX_EXPIRY:
        raise BadUserInput(f"`expiresIn` is {expires_in}; it takes 60 to {MAX_EXPIRY} seconds.")
    return LinkWanted(expires_in, accept_quarantined)


@strawberry.type(description="Something that an inspection found in a file.", directives=(KEPT,))
class ScanFinding:
    severity: Level = strawberry.field(description="How much it matters.")
    rule: str = strawberry.field(description="Name of the rule, such as pickle.unknown_global.")
    detail: str = strawberry.field(description="What was found, for people.")
    offset: BigInt | None = strawberry.field(
        description="Where in the file, in bytes; null where it is no one place."
    )


@strawberry.type(description="What an inspection of a file came to.", directives=(KEPT,))
class FileScan:
    verdict: ScanVerdict = strawberry.field(description="What it came to.")
    scanner: str | None = strawberry.field(
        description="What inspected it, with its version; null before that."
    )
    scanned_at: datetime | None = strawberry.field(description="When it was inspected.")
    findings: list[ScanFinding] = strawberry.field(
        description="What was found, 50 at most, the worst first."
    )


def context_length(context_length: int | None) -> int | None:
    """As it is stored, it may be more than an Int holds."""
    return context_length if context_length is None or context_length < 2**31 else None


@strawberry.type(
    description="What the header of a file with weights says of its tensors.", directives=(KEPT,)
)
class TensorSummary:
    tensor_count: int = strawberry.field(description="How many tensors it has.")
    parameter_count: BigInt = strawberry.field(description="How many values all of them have.")
    parameters_by_dtype: JSON = strawberry.field(
        description="How many values there are of each type, by the format's own name of it."
    )
    architecture: str | None = strawberry.field(description="Name of the architecture.")
    context_length: int | None = computed(
        context_length, description="Longest context, in tokens; null where that is no sane number."
    )
    quantization: str | None = strawberry.field(description="How the weights are quantised.")


@strawberry.type(description="One file of a version.", directives=(KEPT,))
class ModelFile(Node):
    version: Annotated["ModelVersion", strawberry.lazy("modelharbor.schema.versions")] = loaded(
        VersionByIdLoader, key="version_id", description="The version that it belongs to."
    )
    path: str = strawberry.field(description="Path within the version, with `/`.")
    size_bytes: BigInt = strawberry.field(description="Length in bytes.")
    sha256: SHA256 = strawberry.field(name="sha256", description="Hash of its contents.")
    role: FileRole = strawberry.field(description="What it is for.")
    format: FileFormat = strawberry.field(description="How it is written.")
    download_url: URL | None = loaded(
        DownloadLinkLoader,
        key=("_id", "model_id", "version_id", "path", "sha256"),
        arguments=link_wanted,
        description="Link to its contents that needs no token; null without the permission to download, and where the file is not known to be harmless: see `acceptQuarantined`. What is not published and not inspected yet is for those who may WRITE.",
        directives=(Cost(weight=1), NEVER_KEPT),
    )
    scan: FileScan = loaded(
        ScanByContentsLoader,
        key="sha256",
        description="Whether it is known to be harmless.",
    )
    tensors: TensorSummary | None = loaded(
        TensorsByContentsLoader,
        key="sha256",
        description="Its tensors, where it has weights in a format that is parsed.",
    )
    header: JSON | None = loaded(
        HeaderByContentsLoader,
        key="sha256",
        description="What it says of itself, 64 KiB at most; by format.",
        directives=(Cost(weight=20),),
    )
    shared_with: int = loaded(
        OthersByContentsLoader,
        key="sha256",
        description="How many other files that you may see have the same contents.",
        directives=(Cost(weight=2), NEVER_KEPT),
    )
