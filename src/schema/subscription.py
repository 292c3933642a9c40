"""What can be followed: the root fields, and what their events look like."""

import math
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import strawberry
from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.keyset import MAX_PAGE
from modelharbor.errors import BadUserInput, NotFound
from modelharbor.execution.declaration import computed, loaded, streamed
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.models import ModelByIdLoader
from modelharbor.loaders.pages import TotalLoader
from modelharbor.loaders.versions import VersionWithinModelLoader
from modelharbor.streams.base import Subscribed
from modelharbor.streams.jobs import JobProgress, Jobs
from modelharbor.streams.models import ModelEvents, ModelsChanged
from modelharbor.streams.uploads import UploadProgress, VersionUploads

from .analytics_changes import AnalyticsEvent, analytics
from .directives import Cost
from .filters import JobFilter, ModelFilter, compile_filter
from .jobs import Job, job_wanted
from .models import Model, ModelEdge
from .nodes import Actor, global_id, parse_global_id
from .orders import ModelOrder
from .query import models_window
from .scalars import Cursor, event_cursor
from .uploads import Upload, upload_wanted
from .versions import ModelVersion

MAX_RATE_HZ: Final = 50.0
MAX_UPLOADS: Final = 100
JOBS_RATE_HZ: Final = 1.0  # of the progress of each of many jobs
MAX_MODELS: Final = 100
T = TypeVar("T")

MaxRate: TypeAlias = Annotated[
    float,
    strawberry.argument(
        description="How many events of progress in a second, 50 at most. Changes of state always come."
    ),
]
Since: TypeAlias = Annotated[
    Cursor | None,
    strawberry.argument(
        description="Go on after the event with this `cursor`: what came since is told first. Good for the same field with the same arguments."
    ),
]


CURSOR: Final = "Its place in the log; give it to `after` to go on from there."


@strawberry.type(description="A job, as it has become.")
class JobEvent:
    cursor: Cursor = computed(event_cursor, description=CURSOR)
    job: Job = strawberry.field(description="The job as it was then.")


@strawberry.type(description="An upload, as it has become.")
class UploadEvent:
    cursor: Cursor = computed(event_cursor, description=CURSOR)
    upload: Upload = strawberry.field(description="The upload as it was then.")


# What stored names are shown as, where that is not the name itself in camel case.
SHOWN_AS: Final = {
    "card_sha256": "card",
    "latest_version_id": "latestVersion",
    "owner_id": "owner",
    "version_id": "version",
}


def changed_fields(before: Row, after: Row) -> list[str]:
    """Of what is gone, all that there was."""
    changed = [name for name, value in after.items() if before.get(name) != value]
    names = changed if after else before
    return sorted(SHOWN_AS.get(name) or _camel(name) for name in names)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(each.title() for each in rest)


@strawberry.enum(name="EventKind", description="What happened to a model.")
class ModelEventKind(Enum):
    """Those of db/events.py that are told to whoever sees the model."""

    MODEL_CREATED = strawberry.enum_value("MODEL_CREATED", description="It was made.")
    MODEL_UPDATED = strawberry.enum_value("MODEL_UPDATED", description="It was changed.")
    MODEL_ARCHIVED = strawberry.enum_value("MODEL_ARCHIVED", description="It was archived.")
    MODEL_RESTORED = strawberry.enum_value("MODEL_RESTORED", description="It was brought back.")
    MODEL_DELETED = strawberry.enum_value("MODEL_DELETED", description="It was deleted.")
    VERSION_CREATED = strawberry.enum_value(
        "VERSION_CREATED", description="A version of it was made."
    )
    VERSION_UPDATED = strawberry.enum_value(
        "VERSION_UPDATED", description="A version of it was changed."
    )
    VERSION_READY = strawberry.enum_value(
        "VERSION_READY", description="A version of it was published, and is READY."
    )
    VERSION_FAILED = strawberry.enum_value(
        "VERSION_FAILED", description="A version of it was published, and its files are not right."
    )
    VERSION_QUARANTINED = strawberry.enum_value(
        "VERSION_QUARANTINED",
        description="A version of it was published, and is not known to be harmless.",
    )
    VERSION_RELEASED = strawberry.enum_value(
        "VERSION_RELEASED", description="A version of it was released from quarantine."
    )
    VERSION_ARCHIVED = strawberry.enum_value(
        "VERSION_ARCHIVED", description="A version of it was archived."
    )
    VERSION_DELETED = strawberry.enum_value(
        "VERSION_DELETED", description="A version of it was deleted."
    )
    ALIAS_SET = strawberry.enum_value(
        "ALIAS_SET", description="An alias was pointed at a version of it."
    )
    ALIAS_DELETED = strawberry.enum_value(
        "ALIAS_DELETED", description="An alias of it was deleted."
    )


@strawberry.type(description="Something that happened to a model.")
class ModelEvent:
    cursor: Cursor = computed(event_cursor, description=CURSOR)
    kind: ModelEventKind = strawberry.field(description="What happened.")
    model: Model | None = loaded(
        ModelByIdLoader,
        key="model_id",
        description="The model as it is now; null when it is gone.",
    )
    version: ModelVersion | None = loaded(
        VersionWithinModelLoader,
        key=("model_id", "version_id"),
        description="The version that it is about, as it is now; null when it is about none, or that is gone.",
    )
    actor: Actor | None = loaded(
        ActorByIdLoader, key="actor_id", description="Who did it; null: the system."
    )
    at: datetime = strawberry.field(description="When.")
    changed_fields: list[str] = computed(
        changed_fields,
        description="Names of the fields that it changed, of the model, the version or the alias.",
    )


def removed_ids(removed: list[ObjectId]) -> list[strawberry.ID]:
    return [global_id("Model", each) for each in removed]


def ids_in_order(order: list[ObjectId]) -> list[strawberry.ID]:
    return [global_id("Model", each) for each in order]


@strawberry.type(
    description="How a list has changed: take away `removedIds`, put in `added`, take over `updated`, and sort by `ids`."
)
class QueryResultChange:
    cursor: Cursor = computed(event_cursor, description="Its place in the log.")
    added: list[ModelEdge] = strawberry.field(
        description="What came into the list, or to another place in it; at first all of it."
    )
    updated: list[Model] = strawberry.field(
        description="Models that stay in their places, and were written to."
    )
    removed_ids: list[strawberry.ID] = computed(
        removed_ids, description="Ids of what left the list, or its place in it."
    )
    ids: list[strawberry.ID] = computed(
        ids_in_order, description="Ids of the whole list after the change, in order."
    )
    total_count: int = loaded(
        TotalLoader,
        key="total",
        description="How many models match in all, as it is now. A change of it alone is no event.",
        directives=(Cost(weight=5),),
    )


def _rate(given: float) -> float:
    if not (math.isfinite(given) and 0 < given <= MAX_RATE_HZ):
        raise BadUserInput(
            f"`maxRateHz` is {given:g}; it takes more than 0, {MAX_RATE_HZ:g} at most."
        )
    return given


def job_progress(
    id: Annotated[strawberry.ID, strawberry.argument(description="Global id of the job.")],
    after: Since = None,
    max_rate_hz: MaxRate = 5,
) -> Subscribed:
    found = job_wanted(id)
    rate = _rate(max_rate_hz)
    if found is None:
        raise NotFound("There is no such job.")
    return Subscribed(JobProgress(found), after, rate)


def jobs(
    filter: Annotated[
        JobFilter | None,
        strawberry.argument(description="Only these; a job counts as it is at the event."),
    ] = None,
    after: Since = None,
) -> Subscribed:
    return Subscribed(Jobs(compile_filter(filter)), after, JOBS_RATE_HZ)


def _some(name: str, given: list[Any], most: int, wanted: Callable[[Any], T]) -> list[T]:
    if not 1 <= len(given) <= most:
        raise BadUserInput(
            f"`{name}` has {len(given)} values; it takes 1 to {most}, or is left out."
        )
    return [wanted(each) for each in given]


def _upload_id(given: strawberry.ID) -> ObjectId:
    found = upload_wanted(given)
    if found is None:
        raise NotFound("There is no such upload.")
    return found


def upload_progress(
    ids: Annotated[
        list[strawberry.ID] | None,
        strawberry.argument(
            description="These uploads, 1 to 100: as they stand, then what changes, until all have ended."
        ),
    ] = None,
    version_id: Annotated[
        strawberry.ID | None,
        strawberry.argument(
            description="Instead of `ids`: all uploads into this version that you may see, also later ones; only what changes, without an end."
        ),
    ] = None,
    after: Since = None,
    max_rate_hz: MaxRate = 5,
) -> Subscribed:
    rate = _rate(max_rate_hz)
    if (ids is None) is (version_id is None):
        raise BadUserInput("Give `ids` or `versionId`, one of them.")
    if ids is not None:
        wanted = tuple(sorted(set(_some("ids", ids, MAX_UPLOADS, _upload_id))))
        return Subscribed(UploadProgress(wanted), after, rate)
    found = parse_global_id(version_id or "")
    if found is None or found.typename != "ModelVersion" or found.name is not None:
        raise NotFound("There is no such version.")
    return Subscribed(VersionUploads(found.id), after, rate)


def _model_id(given: strawberry.ID) -> ObjectId:
    found = parse_global_id(given)
    if found is None or found.typename != "Model" or found.name is not None:
        raise NotFound("There is no such model.")
    return found.id


def model_events(
    model_ids: Annotated[
        list[strawberry.ID] | None,
        strawberry.argument(description="Only of these models, 1 to 100."),
    ] = None,
    owner: Annotated[
        str | None, strawberry.argument(description="Only of models of this login, in any case.")
    ] = None,
    kinds: Annotated[
        list[ModelEventKind] | None, strawberry.argument(description="Only of these kinds.")
    ] = None,
    after: Since = None,
) -> Subscribed:
    wanted = None
    if model_ids is not None:
        wanted = tuple(sorted(set(_some("modelIds", model_ids, MAX_MODELS, _model_id))))
    names = None
    if kinds is not None:
        names = frozenset(_some("kinds", kinds, len(ModelEventKind), lambda kind: str(kind.value)))
    return Subscribed(ModelEvents(wanted, owner.lower() if owner else owner, names), after)


def models_changed(
    search: Annotated[
        str | None, strawberry.argument(description="Words that must all occur, in any case.")
    ] = None,
    filter: Annotated[ModelFilter | None, strawberry.argument(description="Only these.")] = None,
    order_by: Annotated[
        ModelOrder | None,
        strawberry.argument(
            description="How to sort them; by RELEVANCE with `search`, else TRENDING."
        ),
    ] = None,
    first: Annotated[
        int, strawberry.argument(description="The first so many are followed, 1 to 100.")
    ] = 20,
) -> Subscribed:
    if not 1 <= first <= MAX_PAGE:
        raise BadUserInput(f"`first` is {first}; it takes 1 to {MAX_PAGE}.")
    return Subscribed(
        ModelsChanged(models_window(first=first, search=search, filter=filter, order_by=order_by))
    )


@strawberry.type(
    description="What can be followed. Each event has a `cursor`. Where there is an `after`, it takes one: what was missed since is told, with nothing left out and nothing told twice."
)
class Subscription:
    job_progress: JobEvent = streamed(
        job_progress,
        description="A job as it stands, then each change of its state and how far it is, until it has ended.",
    )
    jobs: JobEvent = streamed(
        jobs,
        description="Each change of the state of jobs that you may see, and once a second at most how far each of them is.",
    )
    upload_progress: UploadEvent = streamed(
        upload_progress,
        description="Uploads: each change of their state, and how far each of them is. Exactly one of `ids` and `versionId` is given.",
    )
    model_events: ModelEvent = streamed(
        model_events, description="What happens to models that you may see."
    )
    models_changed: QueryResultChange = streamed(
        models_changed,
        description="The beginning of a list of models as it stands, then how it changes, twice a second at most.",
        directives=(Cost(weight=1, multipliers=["first"]),),
    )
    analytics: AnalyticsEvent = streamed(
        analytics,
        description="How use changes from now on: each metric of each group that has changed, once in `intervalSeconds` at most, or sooner when somebody else begins to follow the same.",
        directives=(Cost(weight=10),),
    )
