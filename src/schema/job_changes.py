"""Mutations of jobs."""

import strawberry

from modelharbor.context import Info
from modelharbor.db.base import Row
from modelharbor.jobs.waking import wake
from modelharbor.resolvers import jobs

from .model_changes import CHANGE, COMMENT
from .nodes import object_id
from .payloads import Given, JobPayload, done, refusable, values_of


@strawberry.input(description="A folder to take in as a version of a model.")
class ImportModelInput:
    source: str = strawberry.field(
        description="Name of a place on the server that its operator opened for imports."
    )
    folder: str = strawberry.field(description="Path of the folder within that place, with `/`.")
    owner: str = strawberry.field(
        description="Login of the person or organization that owns the model."
    )
    name: str | None = strawberry.field(
        default=None, description="Name of the model; without it that of the folder."
    )
    idempotency_key: str | None = strawberry.field(
        default=None,
        description="The same key with the same input answers the same job, as long as it is kept: for safe retries.",
    )


@strawberry.input(description="A job to cancel.")
class CancelJobInput:
    id: strawberry.ID = strawberry.field(description="The job.")
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="A job to try again.")
class RetryJobInput:
    id: strawberry.ID = strawberry.field(description="The job.")
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="What to clean up, and how.")
class CollectGarbageInput:
    dry_run: bool = strawberry.field(
        default=False, description="Only count what would be gone, and how many bytes."
    )


@strawberry.type(description="Changes of jobs.")
class JobMutation:
    @strawberry.mutation(
        description="Take a folder of the server in as a version of a model: made, filled and published by a job.",
        directives=CHANGE,
    )
    @refusable
    async def import_model(self, info: Info, input: Given[ImportModelInput]) -> JobPayload:
        context = info.context
        row = await jobs.start_import(
            context.database, context.person, context.settings, **values_of(input)
        )
        return await _told(info, row)

    @strawberry.mutation(
        description="Cancel a job that has not ended: at once while it waits, else as soon as its worker learns of it.",
        directives=CHANGE,
    )
    @refusable
    async def cancel_job(self, info: Info, input: Given[CancelJobInput]) -> JobPayload:
        context = info.context
        row = await jobs.cancel_job(
            context.database,
            context.person,
            job_id=object_id(input.id, "Job", "id"),
            comment=input.comment,
        )
        return await _told(info, row)

    @strawberry.mutation(
        description="Queue a job again that FAILED, is DEAD or was CANCELLED.", directives=CHANGE
    )
    @refusable
    async def retry_job(self, info: Info, input: Given[RetryJobInput]) -> JobPayload:
        context = info.context
        row = await jobs.retry_job(
            context.database,
            context.person,
            job_id=object_id(input.id, "Job", "id"),
            comment=input.comment,
            max_exports=context.settings.max_exports,
        )
        return await _told(info, row)

    @strawberry.mutation(
        description="Clean up what nothing refers to, or what has run out; for operators.",
        directives=CHANGE,
    )
    @refusable
    async def collect_garbage(self, info: Info, input: Given[CollectGarbageInput]) -> JobPayload:
        context = info.context
        row = await jobs.start_collection(context.database, context.person, **values_of(input))
        return await _told(info, row)


async def _told(info: Info, row: Row) -> JobPayload:
    """Once it is committed: workers look at the queue at once."""
    await wake(info.context.cache)
    return done(JobPayload, job=row)
