"""People, organizations, memberships and tokens."""

from datetime import datetime

import strawberry

from modelharbor.db.actors import Role
from modelharbor.db.keyset import Order, Sorted, Window
from modelharbor.db.tokens import Permission
from modelharbor.execution.declaration import loaded
from modelharbor.loaders.actors import (
    ActorByIdLoader,
    MembersByOrganizationLoader,
    OrganizationsByUserLoader,
    TokensByUserLoader,
)
from modelharbor.loaders.quotas import StorageByOwnerLoader

from .directives import KEPT, KEPT_FOR_ONE, Cost
from .nodes import Actor, Node
from .pages import PER_ROW, After, Before, Connection, First, Last, window
from .quotas import StorageUsage

BY_ID = Order("_id", Sorted.ID, ascending=True)


def by_id(
    first: First = None, after: After = None, last: Last = None, before: Before = None
) -> Window:
    return window(BY_ID, first, after, last, before)


@strawberry.type(description="A person.", directives=(KEPT,))
class User(Actor, Node):
    organizations: "Connection[Organization]" = loaded(
        OrganizationsByUserLoader,
        key="_id",
        arguments=by_id,
        description="Organizations of this person that the viewer belongs to as well.",
        directives=(*PER_ROW, KEPT_FOR_ONE),
    )
    tokens: "Connection[ApiToken] | None" = loaded(
        TokensByUserLoader,
        key="_id",
        arguments=by_id,
        description="Tokens that are not revoked; null for everyone but their owner.",
        directives=PER_ROW,
    )


@strawberry.type(description="A group of people that owns models.", directives=(KEPT,))
class Organization(Actor, Node):
    members: "Connection[Membership]" = loaded(
        MembersByOrganizationLoader,
        key="_id",
        arguments=by_id,
        description="Who belongs to it; empty for those who do not.",
        directives=(*PER_ROW, KEPT_FOR_ONE),
    )
    storage: StorageUsage | None = loaded(
        StorageByOwnerLoader,
        key=("_id", "login_lower"),
        description="What is stored for it, and may be; null for those who do not belong to it.",
        directives=(Cost(weight=5),),
    )


@strawberry.type(
    description="That a person belongs to an organization.", directives=(KEPT_FOR_ONE,)
)
class Membership(Node):
    user: User = loaded(ActorByIdLoader, key="user_id", description="The person.")
    organization: Organization = loaded(
        ActorByIdLoader, key="organization_id", description="The organization."
    )
    role: Role = strawberry.field(description="What the person may do with all that it owns.")


@strawberry.type(description="A token that stands for its owner, within its scopes.")
class ApiToken(Node):
    name: str = strawberry.field(description="What it is for.")
    prefix: str = strawberry.field(
        description="How it begins, to recognise it; the rest is not kept."
    )
    scopes: list[Permission] = strawberry.field(description="What it may be used for at most.")
    created_at: datetime = strawberry.field(description="When it was made.")
    last_used_at: datetime | None = strawberry.field(
        description="When it was last used, to the minute."
    )
    expires_at: datetime | None = strawberry.field(description="When it ends by itself.")
