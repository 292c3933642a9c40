"""Files of versions."""

from typing import TYPE_CHECKING, Annotated

import strawberry

from modelharbor.db import conditions
from modelharbor.db.files import FileFormat, FileRole
from modelharbor.db.keyset import Filter, Window
from modelharbor.errors import BadUserInput
from modelharbor.execution.declaration import loaded
from modelharbor.loaders.files import DownloadLinkLoader, OthersByContentsLoader
from modelharbor.loaders.versions import VersionByIdLoader

from .directives import Cost
from .nodes import Node
from .orders import BY_PATH
from .pages import After, Before, First, Last, window
from .scalars import SHA256, URL, BigInt

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


def expiry(
    expires_in: Annotated[
        int,
        strawberry.argument(description="How many seconds the link is good for, 60 to 604,800."),
    ] = 3600,
) -> int:
    if not 60 <= expires_in <= MAX_EXPIRY:
        raise BadUserInput(f"`expiresIn` is {expires_in}; it takes 60 to {MAX_EXPIRY} seconds.")
    return expires_in


@strawberry.type(description="One file of a version.")
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
        key=("_id", "model_id", "path"),
        arguments=expiry,
        description="Link to its contents that needs no token; null without the permission to download.",
        directives=(Cost(weight=1),),
    )
    shared_with: int = loaded(
        OthersByContentsLoader,
        key="sha256",
        description="How many other files that you may see have the same contents.",
        directives=(Cost(weight=2),),
    )
