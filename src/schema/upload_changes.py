"""Mutations of uploads, and of what owners may store."""

import strawberry

from modelharbor.context import Info
from modelharbor.db.uploads import UploadProtocol
from modelharbor.errors import ErrorCode, Refused
from modelharbor.jobs.waking import wake
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.jobs import JobByIdLoader
from modelharbor.loaders.quotas import StorageByOwnerLoader
from modelharbor.resolvers import quotas, uploads

from .model_changes import CHANGE, COMMENT, IDEMPOTENCY
from .nodes import object_id, parse_global_id
from .payloads import Given, SetQuotaPayload, UploadPayload, UploadsPayload, done, refusable
from .scalars import SHA256, BigInt
from .uploads import UploadFileInput, upload_files


@strawberry.input(description="Files that are to be uploaded into a version.")
class CreateUploadsInput:
    version_id: strawberry.ID = strawberry.field(
        description="The version, DRAFT or UPLOADING; it is UPLOADING then."
    )
    files: list[UploadFileInput] = strawberry.field(description="The files, 1 to 1,000.")
    protocol: UploadProtocol | None = strawberry.field(
        default=None,
        description="TUS: the bytes are to be sent in any case. Otherwise a file whose contents are stored here, and that you may download, is COMPLETED at once.",
    )
    idempotency_key: str | None = strawberry.field(default=None, description=IDEMPOTENCY)


@strawberry.input(description="An upload to complete.")
class CompleteUploadInput:
    id: strawberry.ID = strawberry.field(description="The upload.")
    sha256: SHA256 = strawberry.field(
        name="sha256", description="Hash of the contents; it must be that of the bytes."
    )


@strawberry.input(description="An upload to pause.")
class PauseUploadInput:
    id: strawberry.ID = strawberry.field(description="The upload.")
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="An upload to give up.")
class AbortUploadInput:
    id: strawberry.ID = strawberry.field(description="The upload.")
    comment: str | None = strawberry.field(default=None, description=COMMENT)


@strawberry.input(description="How much an owner may store.")
class SetQuotaInput:
    owner_id: strawberry.ID = strawberry.field(description="A person or an organization.")
    bytes: BigInt | None = strawberry.field(
        default=None, description="Length of all its files at most; null: as the server is set up."
    )


@strawberry.type(description="Changes of uploads and quotas.")
class UploadMutation:
    @strawberry.mutation(
        description="Announce files of a version: each gets an address to send its bytes to, unless its contents are stored here already.",
        directives=CHANGE,
    )
    @refusable
    async def create_uploads(self, info: Info, input: Given[CreateUploadsInput]) -> UploadsPayload:
        context = info.context
        rows = await uploads.create_uploads(
            context.database,
            context.storage,
            context.person,
            context.settings,
            version_id=object_id(input.version_id, "ModelVersion", "versionId"),
            files=upload_files(input.files),
            protocol=input.protocol,
            idempotency_key=input.idempotency_key,
        )
        if any(row["job_id"] is not None for row in rows):
            await wake(context.cache)
        return done(UploadsPayload, uploads=rows)

    @strawberry.mutation(
        description="Say that an upload is whole: the last byte says so by itself, so this is for contents that are stored already, and to be sure. Done twice, the answer is the same.",
        directives=CHANGE,
    )
    @refusable
    async def complete_upload(self, info: Info, input: Given[CompleteUploadInput]) -> UploadPayload:
        context = info.context
        row = await uploads.complete_upload(
            context.database,
            context.storage,
            context.person,
            upload_id=object_id(input.id, "Upload", "id"),
            sha256=str(input.sha256),
        )
        job = None
        if row["job_id"] is not None:
            await wake(context.cache)
            job = await context.loader(JobByIdLoader, None).load(row["job_id"])
        return done(UploadPayload, upload=row, job=job)

    @strawberry.mutation(
        description="Let an upload rest: who sends bytes just now is told so. The next bytes go on with it.",
        directives=CHANGE,
    )
    @refusable
    async def pause_upload(self, info: Info, input: Given[PauseUploadInput]) -> UploadPayload:
        context = info.context
        row = await uploads.pause_upload(
            context.database,
            context.storage,
            context.person,
            upload_id=object_id(input.id, "Upload", "id"),
            comment=input.comment,
        )
        return done(UploadPayload, upload=row, job=None)

    @strawberry.mutation(
        description="Give an upload up: what came of it is removed, and what it reserved is free again.",
        directives=CHANGE,
    )
    @refusable
    async def abort_upload(self, info: Info, input: Given[AbortUploadInput]) -> UploadPayload:
        context = info.context
        row = await uploads.abort_upload(
            context.database,
            context.storage,
            context.person,
            upload_id=object_id(input.id, "Upload", "id"),
            comment=input.comment,
        )
        return done(UploadPayload, upload=row, job=None)

    @strawberry.mutation(
        description="Set what the files of an owner may come to; for operators.", directives=CHANGE
    )
    @refusable
    async def set_quota(self, info: Info, input: Given[SetQuotaInput]) -> SetQuotaPayload:
        context = info.context
        owner = parse_global_id(input.owner_id)
        if owner is None or owner.typename not in ("User", "Organization"):
            raise Refused(
                ErrorCode.NOT_FOUND, "There is no such person or organization.", "ownerId"
            )
        await quotas.set_quota(
            context.database, context.person, owner_id=owner.id, limit_bytes=input.bytes
        )
        actor = await context.loader(ActorByIdLoader, None).load(owner.id)
        key = owner.id, actor["login_lower"]
        storage = await context.loader(StorageByOwnerLoader, None).load(key)
        return done(SetQuotaPayload, storage=storage)
