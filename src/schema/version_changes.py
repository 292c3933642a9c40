"""Mutations of versions and aliases."""

import strawberry

from modelharbor.context import Info
from modelharbor.resolvers import aliases, versions

from .model_changes import CHANGE, COMMENT, IDEMPOTENCY, REVISION
from .nodes import object_id
from .payloads import (
    AliasPayload,
    DeletePayload,
    Given,
    ModelVersionPayload,
    done,
    refusable,
    values_of,
)
from .payloads import deleted as deleted_payload
from .scalars import JSON
from .versions import alias_id


@strawberry.input(description="A new version of a model, DRAFT at first.")
class CreateModelVersionInput:
    model_id: strawberry.ID = strawberry.field(description="The model.")
    label: str | None = strawberry.field(default=None, description="A name of its own.")
    description: str | None = strawberry.field(default=None, description="What is new in it.")
    tags: list[str] | None = strawberry.field(default=None, description="Free words, 100 at most.")
    properties: JSON | None = strawberry.field(
        default=None, description="Own properties: a JSON object of 64 KiB at most."
    )
    idempotency_key: str | None = strawberry.field(default=None, description=IDEMPOTENCY)


@strawberry.input(description="What to change of a version; what is left out stays, null clears.")
class UpdateModelVersionInput:
    id: strawberry.ID = strawberry.field(description="The version.")
    expected_revision: int | None = strawberry.field(default=None, description=REVISION)
    label: str | None = strawberry.field(default=strawberry.UNSET, description="A name of its own.")
    description: str | None = strawberry.field(
        default=strawberry.UNSET, description="What is new in it."
    )
    add_tags: list[str] | None = strawberry.field(default=None, description="Tags to add.")
    remove_tags: list[str] | None = strawberry.field(default=None, description="Tags to take away.")
    properties: JSON | None = strawberry.field(
        default=strawberry.UNSET, description="Own properties, all of them anew."
    )


@strawberry.input(description="A version to publish.")
class PublishModelVersionInput:
    id: strawberry.ID = strawberry.field(description="The version.")
    set_aliases: list[str] | None = strawberry.field(
        default=None, description="Aliases to point at it, in the same step."
    )


@strawberry.input(description="A version to archive.")
class ArchiveModelVersionInput:
    id: strawberry.ID = strawberry.field(description="The version.")
    expected_revision: int | None = strawberry.field(default=None, description=REVISION)
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="A version to delete.")
class DeleteModelVersionInput:
    id: strawberry.ID = strawberry.field(description="The version.")
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="Where an alias is to point.")
class SetModelAliasInput:
    model_id: strawberry.ID = strawberry.field(description="The model.")
    name: str = strawberry.field(
        description="Unique within the model; made when it is not there. Not a number."
    )
    version_id: strawberry.ID = strawberry.field(description="A READY version of the model.")
    expected_version_id: strawberry.ID | None = strawberry.field(
        default=None, description="Refuse with CONFLICT unless it points at this version now."
    )
    protected: bool | None = strawberry.field(
        default=None, description="Whether only administrators may move or delete it."
    )
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="An alias to delete.")
class DeleteModelAliasInput:
    model_id: strawberry.ID = strawberry.field(description="The model.")
    name: str = strawberry.field(description="The alias.")


@strawberry.type(description="Changes of versions and aliases.")
class VersionMutation:
    @strawberry.mutation(description="Make a version of a model.", directives=CHANGE)
    @refusable
    async def create_model_version(
        self, info: Info, input: Given[CreateModelVersionInput]
    ) -> ModelVersionPayload:
        row = await versions.create_version(
            info.context.database,
            info.context.person,
            info.context.settings,
            model_id=object_id(input.model_id, "Model", "modelId"),
            **values_of(input, "model_id"),
        )
        return done(ModelVersionPayload, model_version=row)

    @strawberry.mutation(description="Change a version; its files stay.", directives=CHANGE)
    @refusable
    async def update_model_version(
        self, info: Info, input: Given[UpdateModelVersionInput]
    ) -> ModelVersionPayload:
        row = await versions.update_version(
            info.context.database,
            info.context.person,
            version_id=object_id(input.id, "ModelVersion", "id"),
            **values_of(input, "id"),
        )
        return done(ModelVersionPayload, model_version=row)

    @strawberry.mutation(
        description="Make a DRAFT version READY: its files never change again.", directives=CHANGE
    )
    @refusable
    async def publish_model_version(
        self, info: Info, input: Given[PublishModelVersionInput]
    ) -> ModelVersionPayload:
        row = await versions.publish_version(
            info.context.database,
            info.context.person,
            version_id=object_id(input.id, "ModelVersion", "id"),
            set_aliases=input.set_aliases,
        )
        return done(ModelVersionPayload, model_version=row)

    @strawberry.mutation(
        description="Keep a READY version, but offer it no longer as the latest.", directives=CHANGE
    )
    @refusable
    async def archive_model_version(
        self, info: Info, input: Given[ArchiveModelVersionInput]
    ) -> ModelVersionPayload:
        row = await versions.archive_version(
            info.context.database,
            info.context.person,
            version_id=object_id(input.id, "ModelVersion", "id"),
            **values_of(input, "id"),
        )
        return done(ModelVersionPayload, model_version=row)

    @strawberry.mutation(
        description="Delete a version; refused while an alias points at it.", directives=CHANGE
    )
    @refusable
    async def delete_model_version(
        self, info: Info, input: Given[DeleteModelVersionInput]
    ) -> DeletePayload:
        found = await versions.delete_version(
            info.context.database,
            info.context.person,
            version_id=object_id(input.id, "ModelVersion", "id"),
            comment=input.comment,
        )
        return deleted_payload("ModelVersion", found)

    @strawberry.mutation(description="Point an alias at a version.", directives=CHANGE)
    @refusable
    async def set_model_alias(self, info: Info, input: Given[SetModelAliasInput]) -> AliasPayload:
        expected = input.expected_version_id
        row = await aliases.set_alias(
            info.context.database,
            info.context.person,
            model_id=object_id(input.model_id, "Model", "modelId"),
            version_id=object_id(input.version_id, "ModelVersion", "versionId"),
            expected_version_id=object_id(expected, "ModelVersion", "expectedVersionId")
            if expected is not None
            else None,
            name=input.name,
            protected=input.protected,
            comment=input.comment,
        )
        return done(AliasPayload, alias=row)

    @strawberry.mutation(description="Delete an alias; the version stays.", directives=CHANGE)
    @refusable
    async def delete_model_alias(
        self, info: Info, input: Given[DeleteModelAliasInput]
    ) -> DeletePayload:
        model_id = object_id(input.model_id, "Model", "modelId")
        await aliases.delete_alias(
            info.context.database, info.context.person, model_id=model_id, name=input.name
        )
        return done(DeletePayload, deleted_id=alias_id(model_id, input.name))
