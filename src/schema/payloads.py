"""What mutations answer: the object, and what the user can mend as data."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Annotated, Any, Final, TypeAlias, TypeVar, cast

import strawberry
from bson import ObjectId

from modelharbor.context import Info
from modelharbor.errors import Refused
from modelharbor.resolvers.models import UNSET as LEFT_OUT

from .actors import ApiToken
from .errors import UserError
from .jobs import Job
from .models import Model
from .nodes import global_id
from .quotas import StorageUsage
from .uploads import Upload
from .versions import Alias, ModelVersion

P = TypeVar("P")
T = TypeVar("T")
Given: TypeAlias = Annotated[T, strawberry.argument(description="What is to be done, and to what.")]


@strawberry.type(description="What all payloads say.")
class Payload:
    user_errors: list[UserError] = strawberry.field(description="Why nothing was done; else empty.")


@strawberry.type(description="A model, after a change.")
class ModelPayload(Payload):
    model: Model | None = strawberry.field(description="The model; null when nothing was done.")


@strawberry.type(description="A version, after a change.")
class ModelVersionPayload(Payload):
    model_version: ModelVersion | None = strawberry.field(
        description="The version; null when nothing was done."
    )
    uploads: list[Upload] = strawberry.field(
        description="Of `createModelVersion` with `files`: one for each, in their order; else empty."
    )
    job: Job | None = strawberry.field(
        description="Of `publishModelVersion`: the job that settles it, where its files are still to be checked; else null."
    )


@strawberry.type(description="Uploads that were made.")
class UploadsPayload(Payload):
    uploads: list[Upload] = strawberry.field(
        description="One for each file, in their order; empty when nothing was done."
    )


@strawberry.type(description="An upload, after a change.")
class UploadPayload(Payload):
    upload: Upload | None = strawberry.field(description="The upload; null when nothing was done.")
    job: Job | None = strawberry.field(
        description="The job that goes on with it, where there is one; else null."
    )


@strawberry.type(description="What an owner stores, after a change of its quota.")
class SetQuotaPayload(Payload):
    storage: StorageUsage | None = strawberry.field(
        description="What it stores, and may; null when nothing was done."
    )


@strawberry.type(description="An alias, after a change.")
class AliasPayload(Payload):
    alias: Alias | None = strawberry.field(description="The alias; null when nothing was done.")


@strawberry.type(description="What was deleted.")
class DeletePayload(Payload):
    deleted_id: strawberry.ID | None = strawberry.field(
        description="Its global id; null when nothing was done."
    )


@strawberry.type(description="A new token.")
class ApiTokenPayload(Payload):
    token: ApiToken | None = strawberry.field(description="The token; null when nothing was done.")
    secret: str | None = strawberry.field(
        description="The text to send as `Authorization: Bearer …`. Shown now and never again."
    )


@strawberry.type(description="A job that was put, or changed.")
class JobPayload(Payload):
    job: Job | None = strawberry.field(description="The job; null when nothing was done.")


@strawberry.type(description="Whether a role was given or taken.")
class GrantRolePayload(Payload):
    granted: bool = strawberry.field(description="False when nothing was done.")


_NOTHING: Final = {
    "granted": False,
    "uploads": [],
    "matched_count": 0,
    "forbidden_count": 0,
    "sample": [],
}
"""What payloads say of what was not done, where that is not null."""


def refusable(change: Callable[..., Awaitable[P]]) -> Callable[..., Awaitable[P]]:
    """A mutation whose refusal is the payload's `userErrors`.

    What loaders have read before is forgotten then: the operation's next mutation reads anew.
    """

    @wraps(change)
    async def answered(self: Any, info: Info, input: Any) -> P:
        try:
            return await change(self, info, input)
        except Refused as refused:
            error = {"code": refused.code.value, "message": refused.message, "path": refused.path}
            return cast("P", {**_NOTHING, "user_errors": [error]})
        finally:
            info.context.forget()

    return answered


def done(payload: type[P], **values: Any) -> P:
    """A payload of stored rows: fields are read by name, so a dict does as one."""
    return cast("P", {"uploads": [], "user_errors": [], **values})


def values_of(given: Any, *apart: str) -> dict[str, Any]:
    """An input's values by name, as resolvers take them, but those named `apart`.

    What was left out is LEFT_OUT where that is not the same as null.
    """
    return {
        name: LEFT_OUT if value is strawberry.UNSET else value
        for name, value in vars(given).items()
        if name not in apart
    }


def deleted(typename: str, found: ObjectId) -> DeletePayload:
    return done(DeletePayload, deleted_id=global_id(typename, found))
