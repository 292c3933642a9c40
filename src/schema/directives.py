"""Directives that stand in the schema."""

from enum import Enum

import strawberry
from strawberry.schema_directive import Location


@strawberry.schema_directive(
    locations=[Location.FIELD_DEFINITION],
    description="What a field adds to the cost of an operation: `weight`, times the largest of the `multipliers`, plus what is selected below it once for each row.",
)
class Cost:
    weight: int = strawberry.field(default=1, description="Cost of the field, or of one row of it.")
    multipliers: list[str] | None = strawberry.field(
        default=strawberry.UNSET,
        description="Arguments that tell by their value, or by the length of their list, how many rows there are; `input.limit` is a field of one that is an input.",
    )


@strawberry.enum(description="Whose an answer is.")
class CacheScope(Enum):
    PUBLIC = strawberry.enum_value("PUBLIC", description="For all who may see the same.")
    PRIVATE = strawberry.enum_value("PRIVATE", description="For one person only.")


@strawberry.schema_directive(
    locations=[Location.FIELD_DEFINITION, Location.OBJECT],
    name="cacheControl",
    description="How long an answer may be kept: the least of all that is selected. Fields of Query, and those that answer objects, are not kept without it, on them or on the type of the objects; others go by what they stand in.",
)
class CacheControl:
    max_age: int | None = strawberry.field(
        default=strawberry.UNSET, description="Seconds; 0: it is never kept."
    )
    scope: CacheScope | None = strawberry.field(
        default=CacheScope.PUBLIC, description="Whose it is: PRIVATE where one field says so."
    )
    stale_while_revalidate: int | None = strawberry.field(
        default=strawberry.UNSET,
        description="Seconds that it may be used beyond that, while it is made anew; 0 without it.",
    )


_PUBLIC = strawberry.UNSET  # the default, which need not be printed
KEPT = CacheControl(max_age=30, scope=_PUBLIC)
"""Of what tags tell every change of: see docs/caching.md."""
KEPT_OR_OLDER = CacheControl(max_age=30, scope=_PUBLIC, stale_while_revalidate=10)
"""Where what is selected below decides."""
KEPT_FOR_ONE = CacheControl(max_age=30, scope=CacheScope.PRIVATE)
NEVER_KEPT = CacheControl(max_age=0, scope=_PUBLIC)
MAY_BE_OLD = CacheControl(max_age=20, scope=_PUBLIC, stale_while_revalidate=10)
"""Half a minute in all, with the time for which the loaders keep them: that counts as their age."""
