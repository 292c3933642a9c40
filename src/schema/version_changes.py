"""Mutations of versions and aliases."""

import strawberry

from modelharbor.context import Info
from modelharbor.db.base import Row
from modelharbor.db.keyset import Window
from modelharbor.jobs.waking import wake
from modelharbor.loaders.uploads import UploadsByVersionLoader
from modelharbor.resolvers import aliases, versions

from .actors import BY_ID
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
from .uploads import UploadFileInput, upload_files
from .versions import alias_id


@strawberry.input(description="A new version of a model: DRAFT at first, UPLOADING with files.")
class CreateModelVersionInput:
    model_id: strawberry.ID = strawberry.field(description="The model.")
    label: str | None = strawberry.field(default=None, description="A name of its own.")
    description: str | None = strawberry.field(default=None, description="What is new in it.")
    tags: list[str] | None = strawberry.field(default=None, description="Free words, 100 at most.")
    properties: JSON | None = strawberry.field(
        default=None, description="Own properties: a JSON object of 64 KiB at most."
    )
    files: list[UploadFileInput] | None = strawberry.field(
        default=None,
        description="Files that are to be uploaded into it, 1,000 at most: as by `createUploads`, in the same step.",
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


@strawberry.input(description="A version to release from quarantine.")
class ReleaseModelVersionInput:
    id: strawberry.ID = strawberry.field(description="The version.")
    reason: str = strawberry.field(
        description="Why; it stays with the version. 3 characters at least."
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


async def uploads_made(info: Info, version: Row, count: int) -> list[Row]:
    """Of a version that was made with them, in their order; workers look at their jobs at once."""
    loader = info.context.loader(UploadsByVersionLoader, Window(BY_ID, limit=count))
    page = await loader.load(version["_id"])
    rows: list[Row] = page["nodes"]
    if any(row["job_id"] is not None for row in rows):
        await wake(info.context.cache)
    return rows


@strawberry.type(description="Changes of versions and aliases.")
class VersionMutation:
    @strawberry.mutation(description="Make a version of a model.", directives=CHANGE)
    @refusable
    async def create_model_version(
        self, info: Info, input: Given[CreateModelVersionInput]
    ) -> ModelVersionPayload:
        context, files = info.context, upload_files(input.files or [])
        row = await versions.create_version(
            context.database,
            context.person,
            context.settings,
            model_id=object_id(input.model_id, "Model", "modelId"),
            files=files,
            storage=context.storage,
            **values_of(input, "model_id", "files"),
        )
        made = await uploads_made(info, row, len(files)) if files else []
        return done(ModelVersionPayload, model_version=row, uploads=made)

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
        description="Publish a version: its files never change again. READY at once where they were all inspected, else PROCESSING until a job has seen to it.",
        directives=CHANGE,
    )
    @refusable
    async def publish_model_version(
        self, info: Info, input: Given[PublishModelVersionInput]
    ) -> ModelVersionPayload:
        published = await versions.publish_version(
            info.context.database,
            info.context.person,
            version_id=object_id(input.id, "ModelVersion", "id"),
            set_aliases=input.set_aliases,
        )
        if published.job is not None:
            await wake(info.context.cache)
        return done(ModelVersionPayload, model_version=published.version, job=published.job)

    @strawberry.mutation(
        description="Make a QUARANTINED version READY all the same, and say why.",
        directives=CHANGE,
    )
    @refusable
    async def release_model_version(
        self, info: Info, input: Given[ReleaseModelVersionInput]
    ) -> ModelVersionPayload:
        row = await versions.release_version(
            info.context.database,
            info.context.person,
            version_id=object_id(input.id, "ModelVersion", "id"),
            reason=input.reason,
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
