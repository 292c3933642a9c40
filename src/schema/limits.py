"""What clients may spend, and what they have spent."""

from datetime import datetime
from typing import Annotated

import strawberry


def dry_run_wanted(
    dry_run: Annotated[
        bool | None,
        strawberry.argument(
            description="Do not run the operation: measure it, and answer this field alone, for a cost of 1."
        ),
    ] = False,
) -> bool:
    return bool(dry_run)


@strawberry.type(
    description="What this operation costs, and what is left. Who has no limit reads 2147483647 for `limit`, `remaining` and `restoreRate`."
)
class RateLimit:
    limit: int = strawberry.field(description="Cost that can be saved up.")
    cost: int = strawberry.field(
        description="What the operation was charged; what it does not use is given back afterwards."
    )
    requested_cost: int = strawberry.field(
        description="Its cost as it was asked for: what is held against the limit of an operation."
    )
    remaining: int = strawberry.field(description="What is left, with this operation charged.")
    restore_rate: int = strawberry.field(description="Cost that is restored each second.")
    reset_at: datetime = strawberry.field(description="When all of `limit` is there again.")
    node_count: int = strawberry.field(
        description="How many rows of pages and lists the operation may answer at most."
    )
