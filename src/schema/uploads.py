"""Uploads: how the bytes of files arrive."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import strawberry
from bson import ObjectId

from modelharbor.db import conditions
from modelharbor.db.keyset import Filter, Window
from modelharbor.db.uploads import UploadProtocol, UploadState
from modelharbor.execution.declaration import computed, loaded
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.jobs import JobByIdLoader
from modelharbor.loaders.uploads import FileWithinVersionLoader, UploadUrlLoader
from modelharbor.loaders.versions import VersionWithinModelLoader
from modelharbor.resolvers.uploads import UploadFile

from .errors import UserError
from .files import ModelFile
from .jobs import NEWEST, Job, job_error
from .jobs import eta_seconds as eta_of
from .jobs import percent as percent_of
from .nodes import Actor, Node, parse_global_id
from .pages import After, Before, First, Last, window
from .scalars import JSON, SHA256, URL, BigInt

if TYPE_CHECKING:
    from .versions import ModelVersion


def upload_wanted(
    id: Annotated[strawberry.ID, strawberry.argument(description="Its global id.")],
) -> ObjectId | None:
    found = parse_global_id(id)
    return found.id if found and found.typename == "Upload" and found.name is None else None


def uploads_window(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    state: Annotated[
        list[UploadState] | None, strawberry.argument(description="Only those in these states.")
    ] = None,
) -> Window:
    query = conditions.one_of("state", [each.value for each in state]) if state is not None else {}
    return window(NEWEST, first, after, last, before, Filter(query))


def percent(received_bytes: int, size_bytes: int) -> float:
    found = percent_of(received_bytes, size_bytes)
    assert found is not None
    return found


def bytes_per_second(state: str, rate: float | None) -> float | None:
    """Of an upload that receives nothing there is no rate."""
    return rate if state == UploadState.UPLOADING.value else None


def eta_seconds(
    state: str, received_bytes: int, size_bytes: int, rate: float | None
) -> float | None:
    return eta_of(received_bytes, size_bytes, bytes_per_second(state, rate))


def upload_headers(protocol: str) -> Any:
    return {"Tus-Resumable": "1.0.0"} if protocol == UploadProtocol.TUS.value else {}


def completed_at(state: str, ended_at: datetime | None) -> datetime | None:
    return ended_at if state == UploadState.COMPLETED.value else None


@strawberry.type(
    description="The bytes of one file on their way into a version. Its creator sees it, the owner of the model with all members, and operators."
)
class Upload(Node):
    version: Annotated["ModelVersion", strawberry.lazy("modelharbor.schema.versions")] | None = (
        loaded(
            VersionWithinModelLoader,
            key=("model_id", "version_id"),
            description="The version that it is for; null when that is gone, or is not yours to see.",
        )
    )
    path: str = strawberry.field(description="Path of the file within the version, with `/`.")
    state: UploadState = strawberry.field(description="Where it is in its life.")
    size_bytes: BigInt = strawberry.field(description="Length of the file, in bytes.")
    received_bytes: BigInt = strawberry.field(
        description="How many bytes are on disk here: what a client goes on from after a failure."
    )
    percent: float = computed(percent, description="The same, 0 to 100.")
    bytes_per_second: float | None = computed(
        bytes_per_second, description="Of the last seconds; null unless it is UPLOADING."
    )
    eta_seconds: float | None = computed(
        eta_seconds, description="Seconds to go at this rate; null where that is not known."
    )
    protocol: UploadProtocol = strawberry.field(description="How the bytes come.")
    url: URL = loaded(
        UploadUrlLoader,
        key="_id",
        description="Where the bytes are sent to, by tus 1.0.0, with your token.",
    )
    headers: JSON = computed(
        upload_headers, description="Headers to send with each request there, besides the token."
    )
    sha256: SHA256 | None = strawberry.field(
        name="sha256", description="Hash of the contents as it was announced."
    )
    expires_at: datetime = strawberry.field(
        description="When it ends by itself if no more bytes come; each that comes moves it."
    )
    created_by: Actor | None = loaded(
        ActorByIdLoader, key="created_by_id", description="Who announced it."
    )
    created_at: datetime = strawberry.field(description="When it was announced.")
    completed_at: datetime | None = computed(completed_at, description="When it became a file.")
    error: UserError | None = computed(job_error, description="Why it failed.")
    file: ModelFile | None = loaded(
        FileWithinVersionLoader,
        key=("model_id", "version_id", "file_id"),
        description="The file that it became; null before, and when that is gone or not yours to see.",
    )
    job: Job | None = loaded(
        JobByIdLoader,
        key="job_id",
        description="The job that verifies, parses and scans it; null where none is needed.",
    )


@strawberry.input(description="A file that is to be uploaded.")
class UploadFileInput:
    path: str = strawberry.field(
        description="Path within the version, relative, with `/`; no two may differ in case only."
    )
    size_bytes: BigInt = strawberry.field(description="Its exact length, in bytes.")
    sha256: SHA256 | None = strawberry.field(
        name="sha256",
        default=None,
        description="Hash of its contents: other bytes are refused. Without it equal contents are found only once they were sent.",
    )


def upload_files(given: list[UploadFileInput]) -> list[UploadFile]:
    return [UploadFile(str(each.path), int(each.size_bytes), each.sha256) for each in given]
