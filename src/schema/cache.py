"""What the caches do."""

import strawberry

from .scalars import BigInt


@strawberry.type(
    description="What one layer of the caches did, in the process that answers, since it started."
)
class CacheStats:
    layer: str = strawberry.field(
        description="`l1`: answers in the memory of the process; `l2`: answers in Redis; `sessions`: who holds a token, in both."
    )
    hits: BigInt = strawberry.field(
        description="Look-ups that found what is current; what is not found in `l1` is looked up in `l2`."
    )
    misses: BigInt = strawberry.field(description="Look-ups that did not.")
    hit_ratio: float = strawberry.field(description="`hits` by both; 0 where nothing was asked.")
    entries: BigInt = strawberry.field(
        description="How many there are now. Of `l2` those that this process wrote and that have not reached their age; what took the place of another counts beside it."
    )
    bytes: BigInt = strawberry.field(
        description="What they take: of `l1` and `sessions` with everything around them, of `l2` as they lie in Redis, without their names."
    )
    invalidations: BigInt = strawberry.field(
        description="Look-ups that found what is old, for something in it has changed since."
    )
