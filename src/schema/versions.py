"""Versions of models, and the aliases that point at them."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import strawberry
from bson import ObjectId
from strawberry.relay.utils import to_base64

from modelharbor.db.keyset import Window
from modelharbor.db.versions import VersionStatus
from modelharbor.execution.declaration import computed, loaded
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.files import FileByPathLoader, FilesByVersionLoader
from modelharbor.loaders.jobs import JobsBySubjectLoader
from modelharbor.loaders.models import AliasesByVersionLoader, ModelByIdLoader
from modelharbor.loaders.uploads import UploadsByVersionLoader
from modelharbor.loaders.versions import VersionByIdLoader

from .actors import by_id
from .directives import KEPT
from .files import ModelFile, file_path, files_window
from .filters import ModelVersionFilter, compile_filter
from .jobs import Job, jobs_in_states
from .nodes import Actor, Node
from .orders import ModelVersionOrder, version_order
from .pages import PER_ROW, After, Before, Connection, First, Last, window
from .scalars import JSON, SHA256, BigInt
from .uploads import Upload

if TYPE_CHECKING:
    from .models import Model

LazyModel = Annotated["Model", strawberry.lazy("modelharbor.schema.models")]


AsOf = Annotated[
    datetime | None,
    strawberry.argument(
        description="As it was at this time, by the log of events; a time to come is now."
    ),
]


def alias_id(model_id: ObjectId, name: str, as_of: datetime | None = None) -> strawberry.ID:
    """An alias of then is another object than that of now: clients keep objects by their ids."""
    at = "" if as_of is None else f"@{as_of.isoformat(timespec='milliseconds')}"
    return strawberry.ID(to_base64("Alias", f"{model_id}/{name}{at}"))


@strawberry.type(description="A name that points at one version of a model.", directives=(KEPT,))
class Alias(Node):
    id: strawberry.ID = computed(alias_id, description="Global id, opaque.")
    name: str = strawberry.field(description="Unique within the model.")
    model: LazyModel = loaded(ModelByIdLoader, key="model_id", description="The model.")
    version: "ModelVersion" = loaded(
        VersionByIdLoader, key="version_id", description="The version that it points at."
    )
    protected: bool = strawberry.field(
        description="Whether only administrators may move or delete it."
    )
    set_by: Actor | None = loaded(
        ActorByIdLoader, key="set_by_id", description="Who pointed it there."
    )
    set_at: datetime = strawberry.field(description="When it was pointed there.")


def versions_window(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    filter: Annotated[
        ModelVersionFilter | None, strawberry.argument(description="Only these.")
    ] = None,
    order_by: Annotated[
        ModelVersionOrder | None,
        strawberry.argument(description="How to sort them; the highest number first without it."),
    ] = None,
) -> Window:
    return window(version_order(order_by), first, after, last, before, compile_filter(filter))


@strawberry.type(
    description="One version of a model: files that never change once it is READY.",
    directives=(KEPT,),
)
class ModelVersion(Node):
    model: LazyModel = loaded(ModelByIdLoader, key="model_id", description="The model.")
    number: int = strawberry.field(description="Counts from 1 within the model.")
    label: str | None = strawberry.field(description="A name of its own, such as v1.2.")
    description: str | None = strawberry.field(description="What is new in it.")
    status: VersionStatus = strawberry.field(description="Where it is in its life.")
    status_reason: str | None = strawberry.field(
        description="Why it FAILED or is QUARANTINED; why it was released."
    )
    aliases: list[Alias] = loaded(
        AliasesByVersionLoader,
        key=("model_id", "_id"),
        description="Names that point at it, in order.",
    )
    tags: list[str] = strawberry.field(description="Free words.")
    properties: JSON | None = strawberry.field(description="Own properties, by name.")
    digest: SHA256 | None = strawberry.field(
        description="Hash over the paths and hashes of its files; null until it is published."
    )
    parameters: BigInt | None = strawberry.field(
        description="How many values its weights have; null where no file of it tells."
    )
    size_bytes: BigInt = strawberry.field(description="Sum of its files' lengths, in bytes.")
    file_count: int = strawberry.field(description="How many files it has.")
    files: Connection[ModelFile] = loaded(
        FilesByVersionLoader,
        key="_id",
        arguments=files_window,
        description="Its files, by path.",
        directives=(*PER_ROW, KEPT),
    )
    file: ModelFile | None = loaded(
        FileByPathLoader, key="_id", arguments=file_path, description="The file at a path."
    )
    uploads: Connection[Upload] = loaded(
        UploadsByVersionLoader,
        key="_id",
        arguments=by_id,
        description="Uploads into it that you may see, the oldest first.",
        directives=PER_ROW,
    )
    jobs: Connection[Job] = loaded(
        JobsBySubjectLoader,
        key="_id",
        arguments=jobs_in_states,
        description="Jobs about it that you may see, the newest first.",
        directives=PER_ROW,
    )
    created_by: Actor | None = loaded(
        ActorByIdLoader, key="created_by_id", description="Who made it."
    )
    created_at: datetime = strawberry.field(description="When it was made.")
    published_at: datetime | None = strawberry.field(description="When it became READY.")
    revision: int = strawberry.field(description="Counts its changes; for `expectedRevision`.")
