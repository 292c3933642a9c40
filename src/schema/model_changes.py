"""Mutations of models."""

from typing import Final

import strawberry

from modelharbor.context import Info
from modelharbor.db.models import Visibility
from modelharbor.resolvers import likes, models

from .directives import Cost
from .nodes import object_id
from .payloads import DeletePayload, Given, ModelPayload, deleted, done, refusable, values_of
from .scalars import JSON

IDEMPOTENCY: Final = (
    "The same key with the same input answers the same object for a day: for safe retries."
)
REVISION: Final = "Refuse with STALE_REVISION unless the object is at this revision."
COMMENT: Final = "Why, for the history."
CHANGE: Final = (Cost(weight=10),)


@strawberry.input(description="A new model.")
class CreateModelInput:
    owner: str = strawberry.field(description="Login of the person or organization that owns it.")
    name: str = strawberry.field(
        description="Unique below its owner: letters, digits, `.`, `_`, `-`; 96 at most."
    )
    display_name: str | None = strawberry.field(default=None, description="Name to show.")
    summary: str | None = strawberry.field(default=None, description="One line about it.")
    card_markdown: str | None = strawberry.field(
        default=None, description="Its description in Markdown; may begin with front matter."
    )
    task: str | None = strawberry.field(
        default=None, description="What it does, such as text-generation."
    )
    library: str | None = strawberry.field(
        default=None, description="What loads it, such as transformers."
    )
    license: str | None = strawberry.field(default=None, description="Its licence.")
    languages: list[str] | None = strawberry.field(
        default=None, description="Human languages that it knows."
    )
    tags: list[str] | None = strawberry.field(default=None, description="Free words, 100 at most.")
    properties: JSON | None = strawberry.field(
        default=None, description="Own properties: a JSON object of 64 KiB at most."
    )
    visibility: Visibility = strawberry.field(
        default=Visibility.PRIVATE, description="Who may see it."
    )
    idempotency_key: str | None = strawberry.field(default=None, description=IDEMPOTENCY)


@strawberry.input(description="What to change of a model; what is left out stays, null clears.")
class UpdateModelInput:
    id: strawberry.ID = strawberry.field(description="The model.")
    expected_revision: int | None = strawberry.field(default=None, description=REVISION)
    display_name: str | None = strawberry.field(
        default=strawberry.UNSET, description="Name to show."
    )
    summary: str | None = strawberry.field(
        default=strawberry.UNSET, description="One line about it."
    )
    card_markdown: str | None = strawberry.field(
        default=strawberry.UNSET, description="Its description in Markdown."
    )
    task: str | None = strawberry.field(default=strawberry.UNSET, description="What it does.")
    library: str | None = strawberry.field(default=strawberry.UNSET, description="What loads it.")
    license: str | None = strawberry.field(default=strawberry.UNSET, description="Its licence.")
    languages: list[str] | None = strawberry.field(
        default=strawberry.UNSET, description="Human languages that it knows."
    )
    add_tags: list[str] | None = strawberry.field(default=None, description="Tags to add.")
    remove_tags: list[str] | None = strawberry.field(default=None, description="Tags to take away.")
    properties: JSON | None = strawberry.field(
        default=strawberry.UNSET, description="Own properties, all of them anew."
    )
    visibility: Visibility | None = strawberry.field(
        default=strawberry.UNSET, description="Who may see it; needs ADMINISTER."
    )


@strawberry.input(description="A model to archive.")
class ArchiveModelInput:
    id: strawberry.ID = strawberry.field(description="The model.")
    expected_revision: int | None = strawberry.field(default=None, description=REVISION)
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="A model to bring back.")
class RestoreModelInput:
    id: strawberry.ID = strawberry.field(description="The model.")
    expected_revision: int | None = strawberry.field(default=None, description=REVISION)
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="A model to delete.")
class DeleteModelInput:
    id: strawberry.ID = strawberry.field(description="The model.")
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="A model to like.")
class LikeModelInput:
    id: strawberry.ID = strawberry.field(description="The model.")


@strawberry.input(description="A model to like no more.")
class UnlikeModelInput:
    id: strawberry.ID = strawberry.field(description="The model.")


@strawberry.type(description="Changes of models.")
class ModelMutation:
    @strawberry.mutation(description="Make a model.", directives=CHANGE)
    @refusable
    async def create_model(self, info: Info, input: Given[CreateModelInput]) -> ModelPayload:
        context = info.context
        row = await models.create_model(
            context.database, context.person, context.settings, **values_of(input)
        )
        return done(ModelPayload, model=row)

    @strawberry.mutation(description="Change a model.", directives=CHANGE)
    @refusable
    async def update_model(self, info: Info, input: Given[UpdateModelInput]) -> ModelPayload:
        context = info.context
        row = await models.update_model(
            context.database,
            context.person,
            context.settings,
            model_id=object_id(input.id, "Model", "id"),
            **values_of(input, "id"),
        )
        return done(ModelPayload, model=row)

    @strawberry.mutation(
        description="Keep a model, but show it in lists only when asked for.", directives=CHANGE
    )
    @refusable
    async def archive_model(self, info: Info, input: Given[ArchiveModelInput]) -> ModelPayload:
        row = await models.archive_model(
            info.context.database,
            info.context.person,
            model_id=object_id(input.id, "Model", "id"),
            **values_of(input, "id"),
        )
        return done(ModelPayload, model=row)

    @strawberry.mutation(description="Bring an archived or deleted model back.", directives=CHANGE)
    @refusable
    async def restore_model(self, info: Info, input: Given[RestoreModelInput]) -> ModelPayload:
        row = await models.restore_model(
            info.context.database,
            info.context.person,
            model_id=object_id(input.id, "Model", "id"),
            settings=info.context.settings,
            **values_of(input, "id"),
        )
        return done(ModelPayload, model=row)

    @strawberry.mutation(
        description="Delete a model: it is gone from every list at once, and its name is free.",
        directives=CHANGE,
    )
    @refusable
    async def delete_model(self, info: Info, input: Given[DeleteModelInput]) -> DeletePayload:
        found = await models.delete_model(
            info.context.database,
            info.context.person,
            model_id=object_id(input.id, "Model", "id"),
            comment=input.comment,
        )
        return deleted("Model", found)

    @strawberry.mutation(
        description="Like a model; liking it again changes nothing.", directives=CHANGE
    )
    @refusable
    async def like_model(self, info: Info, input: Given[LikeModelInput]) -> ModelPayload:
        row = await likes.like_model(
            info.context.database,
            info.context.person,
            model_id=object_id(input.id, "Model", "id"),
            is_recorded=info.context.settings.usage_recording,
        )
        return done(ModelPayload, model=row)

    @strawberry.mutation(
        description="Like a model no more; unliking it again changes nothing.", directives=CHANGE
    )
    @refusable
    async def unlike_model(self, info: Info, input: Given[UnlikeModelInput]) -> ModelPayload:
        row = await likes.unlike_model(
            info.context.database,
            info.context.person,
            model_id=object_id(input.id, "Model", "id"),
            is_recorded=info.context.settings.usage_recording,
        )
        return done(ModelPayload, model=row)
