"""Mutations of who may do what: roles and tokens."""

from datetime import datetime

import strawberry

from modelharbor.context import Info
from modelharbor.db.actors import Role
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused
from modelharbor.resolvers import grants, tokens

from .model_changes import CHANGE, IDEMPOTENCY
from .nodes import object_id, parse_global_id
from .payloads import (
    ApiTokenPayload,
    DeletePayload,
    Given,
    GrantRolePayload,
    deleted,
    done,
    refusable,
    values_of,
)


@strawberry.input(description="A role to give or take.")
class GrantRoleInput:
    subject_id: strawberry.ID = strawberry.field(description="A model or an organization.")
    actor_id: strawberry.ID = strawberry.field(
        description="Who gets it: a person; on a model also an organization."
    )
    role: Role | None = strawberry.field(
        default=strawberry.UNSET, description="The role; null takes it away."
    )


@strawberry.input(description="A new token of your own.")
class CreateApiTokenInput:
    name: str = strawberry.field(description="What it is for.")
    scopes: list[Permission] = strawberry.field(
        description="What it may be used for at most; no more than the token that you use now."
    )
    expires_at: datetime | None = strawberry.field(
        default=None, description="When it ends by itself."
    )
    idempotency_key: str | None = strawberry.field(default=None, description=IDEMPOTENCY)


@strawberry.input(description="A token to revoke.")
class RevokeApiTokenInput:
    id: strawberry.ID = strawberry.field(description="The token.")
    comment: str | None = strawberry.field(default=None, description="Why, for the log.")


@strawberry.type(description="Changes of who may do what.")
class AccessMutation:
    @strawberry.mutation(
        description="Give someone a role on a model or in an organization, or take it away.",
        directives=CHANGE,
    )
    @refusable
    async def grant_role(self, info: Info, input: Given[GrantRoleInput]) -> GrantRolePayload:
        subject = parse_global_id(input.subject_id)
        actor = parse_global_id(input.actor_id)
        if subject is None or subject.typename not in ("Model", "Organization"):
            raise Refused(
                ErrorCode.NOT_FOUND, "There is no such model or organization.", "subjectId"
            )
        if actor is None or actor.typename not in ("User", "Organization"):
            raise Refused(
                ErrorCode.NOT_FOUND, "There is no such person or organization.", "actorId"
            )
        if input.role is strawberry.UNSET:
            raise Refused(
                ErrorCode.BAD_INPUT, "Say which role; null takes the one that is held away.", "role"
            )
        await grants.grant_role(
            info.context.database,
            info.context.person,
            subject="Model" if subject.typename == "Model" else "Organization",
            subject_id=subject.id,
            actor_id=actor.id,
            role=input.role,
        )
        return done(GrantRolePayload, granted=True)

    @strawberry.mutation(description="Make a token of your own.", directives=CHANGE)
    @refusable
    async def create_api_token(
        self, info: Info, input: Given[CreateApiTokenInput]
    ) -> ApiTokenPayload:
        context = info.context
        row, text = await tokens.create_api_token(
            context.database, context.person, context.settings, **values_of(input)
        )
        return done(ApiTokenPayload, token=row, secret=text)

    @strawberry.mutation(description="Revoke a token: it ends at once.", directives=CHANGE)
    @refusable
    async def revoke_api_token(
        self, info: Info, input: Given[RevokeApiTokenInput]
    ) -> DeletePayload:
        found = await tokens.revoke_api_token(
            info.context.database,
            info.context.person,
            token_id=object_id(input.id, "ApiToken", "id"),
            comment=input.comment,
        )
        return deleted("ApiToken", found)
