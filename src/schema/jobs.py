"""Jobs: long work, and how far it is."""

from datetime import datetime
from typing import Annotated, Any, Final

import strawberry
from bson import ObjectId

from modelharbor.db import conditions
from modelharbor.db.base import Row
from modelharbor.db.jobs import JobKind, JobState, Level
from modelharbor.db.keyset import Filter, Order, Sorted, Window
from modelharbor.errors import ErrorCode
from modelharbor.execution.declaration import computed, loaded
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.exports import ExportLinkLoader
from modelharbor.loaders.jobs import (
    JobByIdLoader,
    JobsByParentLoader,
    LogsByJobLoader,
    QueuePositionByJobLoader,
)
from modelharbor.loaders.nodes import NodeByTypeLoader

from .actors import by_id
from .directives import NEVER_KEPT, Cost
from .errors import UserError
from .filters import JobFilter, compile_filter
from .nodes import Actor, Node, parse_global_id
from .pages import PER_ROW, After, Before, Connection, First, Last, window
from .scalars import JSON, URL, BigInt

NEWEST: Final = Order("_id", Sorted.ID)


def jobs_in_states(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    state: Annotated[
        list[JobState] | None, strawberry.argument(description="Only those in these states.")
    ] = None,
) -> Window:
    query = conditions.one_of("state", [each.value for each in state]) if state is not None else {}
    return window(NEWEST, first, after, last, before, Filter(query))


def job_wanted(
    id: Annotated[strawberry.ID, strawberry.argument(description="Its global id.")],
) -> ObjectId | None:
    found = parse_global_id(id)
    return found.id if found and found.typename == "Job" and found.name is None else None


def jobs_window(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    filter: Annotated[JobFilter | None, strawberry.argument(description="Only these.")] = None,
) -> Window:
    return window(NEWEST, first, after, last, before, compile_filter(filter))


def job_progress(state: str, progress: Row) -> Any:
    """Of a job that is not at work there is no rate."""
    return progress if state == JobState.RUNNING.value else {**progress, "rate": None}


def percent(current: int, total: int | None) -> float | None:
    if total is None:
        return None
    return min(100.0, round(100 * current / total, 2)) if total > 0 else 100.0


def eta_seconds(current: int, total: int | None, rate: float | None) -> float | None:
    if total is None or not rate:
        return None
    return round(max(0, total - current) / rate, 1)


def job_error(error: Row | None) -> Any:
    """A code that is none of the schema's is a fault."""
    if error is None or error["code"] in ErrorCode.__members__:
        return error
    return {**error, "code": ErrorCode.INTERNAL.value}


@strawberry.type(description="How far a job is. It grows within an attempt.")
class JobProgress:
    current: BigInt = strawberry.field(description="How much is done, in units.")
    total: BigInt | None = strawberry.field(description="How much there is; null if not known.")
    unit: str = strawberry.field(description="What is counted, such as bytes or files.")
    percent: float | None = computed(
        percent, description="0 to 100; null where the total is not known."
    )
    rate: float | None = strawberry.field(
        name="ratePerSecond",
        description="Units in a second, of the last seconds; null unless it is RUNNING.",
    )
    eta_seconds: float | None = computed(
        eta_seconds, description="Seconds to go at this rate; null where that is not known."
    )
    message: str | None = strawberry.field(description="What it does now, for people.")
    updated_at: datetime = strawberry.field(description="When it last said how far it is.")
    sequence: BigInt = strawberry.field(
        description="Counts the changes of the job over all attempts: what is greater is newer."
    )


@strawberry.type(description="A part of a job that is done once, whatever the number of attempts.")
class JobStep:
    name: str = strawberry.field(description="What it does.")
    state: JobState = strawberry.field(description="Where it is.")
    started_at: datetime | None = strawberry.field(description="When it began.")
    finished_at: datetime | None = strawberry.field(description="When it ended.")


@strawberry.type(description="A line of a job's log.")
class JobLog:
    at: datetime = strawberry.field(description="When.")
    level: Level = strawberry.field(description="How much it matters.")
    message: str = strawberry.field(description="What the job has to say.")


@strawberry.type(
    description="Long work that no crash loses. Its creator sees it, the owner of what it is about with all members, and operators."
)
class Job(Node):
    kind: JobKind = strawberry.field(description="What it does.")
    state: JobState = strawberry.field(description="Where it is in its life.")
    progress: JobProgress = computed(job_progress, description="How far it is.")
    steps: list[JobStep] = strawberry.field(description="Its parts, as far as it began them.")
    attempt: int = strawberry.field(description="How many times it was begun.")
    max_attempts: int = strawberry.field(description="How many times it is begun at most.")
    priority: int = strawberry.field(description="A higher one has its turn first.")
    subject: Node | None = loaded(
        NodeByTypeLoader,
        key=("subject.type", "subject.id"),
        description="What it is about; null when that is gone, or is not yours to see.",
    )
    parent: "Job | None" = loaded(
        JobByIdLoader, key="parent_id", description="The job that it is a part of."
    )
    children: "Connection[Job]" = loaded(
        JobsByParentLoader,
        key="_id",
        arguments=by_id,
        description="Jobs that are parts of it.",
        directives=PER_ROW,
    )
    logs: Connection[JobLog] = loaded(
        LogsByJobLoader,
        key="_id",
        arguments=by_id,
        description="Its log, the oldest line first.",
        directives=PER_ROW,
    )
    result: JSON | None = strawberry.field(description="What came of it; by kind.")
    download_url: URL | None = loaded(
        ExportLinkLoader,
        key=("_id", "kind", "created_by_id", "result.fileName"),
        description="Of an EXPORT that has SUCCEEDED: a link to its file that needs no token, for who asked for it. It is good for an hour, unless the server says otherwise; read it again for a new one. Null of others, and for others.",
        directives=(Cost(weight=1), NEVER_KEPT),
    )
    error: UserError | None = computed(job_error, description="Why it failed.")
    created_by: Actor | None = loaded(
        ActorByIdLoader, key="created_by_id", description="Who asked for it; null: the system."
    )
    created_at: datetime = strawberry.field(description="When it was put.")
    started_at: datetime | None = strawberry.field(description="When its first attempt began.")
    finished_at: datetime | None = strawberry.field(description="When it ended.")
    heartbeat_at: datetime | None = strawberry.field(
        description="When its worker last gave a sign of life."
    )
    queue_position: int | None = loaded(
        QueuePositionByJobLoader,
        key=("_id", "state"),
        description="Its place among the jobs that wait, from 1; 1001 stands for all behind the first 1,000, null for one that does not wait.",
        directives=(Cost(weight=2),),
    )
