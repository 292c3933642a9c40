"""What each operation of the API costs, for operators."""

from datetime import datetime
from enum import Enum
from typing import Annotated, Final

import strawberry

from modelharbor.db import conditions
from modelharbor.db.keyset import Order, Sorted
from modelharbor.errors import BadUserInput
from modelharbor.execution.declaration import computed
from modelharbor.loaders.operations import NameWanted, OperationsWanted
from modelharbor.resolvers.analytics import check_range

from .analytics import TimeRange
from .filters import StringFilter
from .pages import After, Before, First, Last, window
from .scalars import BigInt


@strawberry.enum(description="What operations are sorted by, the greatest first.")
class OperationStatsOrder(Enum):
    TOTAL_TIME = strawberry.enum_value("TOTAL_TIME", description="Time of all calls together.")
    P95 = strawberry.enum_value("P95", description="`p95Ms`.")
    CALLS = strawberry.enum_value("CALLS", description="`calls`.")
    ERRORS = strawberry.enum_value("ERRORS", description="`errors`.")
    DB_QUERIES = strawberry.enum_value("DB_QUERIES", description="`dbQueriesPerCall`.")


ORDERS: Final = {
    OperationStatsOrder.TOTAL_TIME: Order("total_ms", Sorted.NUMBER),
    OperationStatsOrder.P95: Order("p95_ms", Sorted.NUMBER),
    OperationStatsOrder.CALLS: Order("calls", Sorted.WHOLE),
    OperationStatsOrder.ERRORS: Order("errors", Sorted.WHOLE),
    OperationStatsOrder.DB_QUERIES: Order("db_queries_per_call", Sorted.NUMBER),
}


@strawberry.input(description="Which operations. What is given must all hold.")
class OperationStatsFilter:
    name: StringFilter | None = strawberry.field(default=None, description="Name.")
    min_calls: int | None = strawberry.field(
        default=None, description="Called so many times at least."
    )
    range: TimeRange | None = strawberry.field(
        default=None,
        description="When they were called, by quarters of an hour, or by days (UTC) where it is longer than 7 days; without it in the last 24 hours.",
    )


def operations_wanted(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    filter: Annotated[
        OperationStatsFilter | None, strawberry.argument(description="Only these.")
    ] = None,
    order_by: Annotated[
        OperationStatsOrder | None, strawberry.argument(description="How to sort them.")
    ] = OperationStatsOrder.TOTAL_TIME,
) -> OperationsWanted:
    made = window(ORDERS[order_by or OperationStatsOrder.TOTAL_TIME], first, after, last, before)
    if filter is None:
        return OperationsWanted(made)
    least = filter.min_calls or 0
    if least < 0:
        raise BadUserInput(f"`minCalls` is {least}; it takes 0 or more.")
    if filter.range is not None:
        check_range(filter.range.from_, filter.range.to)
    return OperationsWanted(
        made,
        _name(filter.name) if filter.name else NameWanted(),
        least,
        filter.range.from_ if filter.range else None,
        filter.range.to if filter.range else None,
    )


def _name(given: StringFilter) -> NameWanted:
    # For its limits alone: names are looked at here.
    conditions.text(
        "name", eq=given.eq, one_of=given.in_, prefix=given.prefix, contains=given.contains
    )
    one_of = None if given.in_ is None else tuple(given.in_)
    return NameWanted(given.eq, one_of, given.prefix or "", given.contains or "")


def operation_key(operation: str) -> str:
    return operation


@strawberry.type(description="What the calls of one operation came to, in a stretch of time.")
class OperationStats:
    id: str = computed(
        operation_key,
        description="The first 16 digits of the SHA-256 hash of its text, a colon, and its name; `other`: all those that were too many to be told apart.",
    )
    name: str | None = strawberry.field(description="Its name; null: it has none.")
    calls: BigInt = strawberry.field(description="How often it was answered.")
    errors: BigInt = strawberry.field(description="How many answers had errors.")
    p50_ms: float = strawberry.field(
        description="Milliseconds within which half of the calls were answered: up to a fifth too much, as all three."
    )
    p95_ms: float = strawberry.field(description="The same of 95 of 100 calls.")
    p99_ms: float = strawberry.field(description="The same of 99 of 100 calls.")
    average_cost: float = strawberry.field(description="Cost of a call.")
    db_queries_per_call: float = strawberry.field(description="Database commands of a call.")
    loader_batch_size: float = strawberry.field(
        description="Keys that went into one batch of a loader; 0 where there were no batches."
    )
    cache_hit_ratio: float = strawberry.field(
        description="How many of its answers were kept ones, from 0 to 1."
    )
    last_seen_at: datetime = strawberry.field(description="When it was last called.")
