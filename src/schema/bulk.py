"""Mutations of many models at once."""

import strawberry

from modelharbor.context import Info
from modelharbor.db.base import Row
from modelharbor.db.conditions import all_of
from modelharbor.db.keyset import Filter
from modelharbor.db.models import ModelState, Visibility
from modelharbor.jobs.waking import wake
from modelharbor.resolvers.bulk import start_bulk_change

from .directives import Cost
from .filters import ModelFilter, compile_filter, names_state
from .jobs import Job
from .models import Model
from .nodes import parse_global_id
from .payloads import Given, Payload, done, refusable, values_of
from .query import ACTIVE_ONLY, ANY_STATE


@strawberry.input(description="Which models are to be changed in the same way, and how.")
class BulkUpdateModelsInput:
    ids: list[strawberry.ID] | None = strawberry.field(
        default=None,
        description="These models, 1,000 at most, whatever their state. Those that are not there for you are passed over.",
    )
    filter: ModelFilter | None = strawberry.field(
        default=None,
        description="Instead of `ids`: those that match, as in `models`; without `state` ACTIVE ones only.",
    )
    dry_run: bool = strawberry.field(
        default=False, description="Only say what it would be about; no job is put."
    )
    add_tags: list[str] | None = strawberry.field(default=None, description="Tags to add.")
    remove_tags: list[str] | None = strawberry.field(default=None, description="Tags to take away.")
    visibility: Visibility | None = strawberry.field(
        default=None, description="Who may see them; needs ADMINISTER."
    )
    state: ModelState | None = strawberry.field(
        default=None, description="ARCHIVED or ACTIVE; needs ADMINISTER."
    )
    idempotency_key: str | None = strawberry.field(
        default=None,
        description="The same key with the same input answers the same job, as long as it is kept: for safe retries.",
    )


@strawberry.type(description="What a change of many models is about, and the job that does it.")
class BulkUpdateModelsPayload(Payload):
    matched_count: int = strawberry.field(
        description="How many of the models that you see are meant; 0 where it was refused."
    )
    forbidden_count: int = strawberry.field(
        description="How many of these you may not change: the job passes them over."
    )
    sample: list[Model] = strawberry.field(
        description="The first ten that would be changed, as they are now, in the order of TRENDING."
    )
    job: Job | None = strawberry.field(
        description="The job; null of a dry run, and where there is nothing to be changed."
    )


def compiled(filter: ModelFilter | None) -> Filter | None:
    if filter is None:
        return None
    state: Row = ANY_STATE if names_state(filter) else ACTIVE_ONLY
    return Filter(all_of([state, compile_filter(filter).data]))


@strawberry.type(description="Changes of many models.")
class BulkMutation:
    @strawberry.mutation(
        description="Change many models in the same way, by a job; each as by `updateModel`, `archiveModel` and `restoreModel`, and exactly once.",
        directives=(Cost(weight=30),),
    )
    @refusable
    async def bulk_update_models(
        self, info: Info, input: Given[BulkUpdateModelsInput]
    ) -> BulkUpdateModelsPayload:
        context = info.context
        ids = None
        if input.ids is not None:
            found = [parse_global_id(each) for each in input.ids]
            ids = [each.id for each in found if each is not None and each.typename == "Model"]
        preview = await start_bulk_change(
            context,
            context.settings,
            ids=ids,
            filter=compiled(input.filter),
            **values_of(input, "ids", "filter"),
        )
        if preview.job is not None:
            await wake(context.cache)
        return done(
            BulkUpdateModelsPayload,
            matched_count=preview.matched,
            forbidden_count=preview.forbidden,
            sample=preview.sample,
            job=preview.job,
        )
