"""Directives that stand in the schema."""

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
        description="Arguments that tell by their value, or by the length of their list, how many rows there are.",
    )
