"""Directives that stand in the schema."""

import strawberry
from strawberry.schema_directive import Location


@strawberry.schema_directive(
    locations=[Location.FIELD_DEFINITION],
    description="What a field adds to the cost of an operation: `weight`, times the largest of the `multipliers`, plus what is selected below it once for each row.",
)
class Cost:
    weight: int = strawberry.directive_field(name="weight", default=1)
    multipliers: list[str] | None = strawberry.directive_field(
        name="multipliers", default=strawberry.UNSET
    )
