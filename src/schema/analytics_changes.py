"""How use changes, as it is told to those who follow it."""

from datetime import datetime
from typing import Annotated, Final

import strawberry

from modelharbor.db.metrics import MEASURED, Dimension, Metric
from modelharbor.errors import BadUserInput
from modelharbor.execution.declaration import computed
from modelharbor.resolvers.analytics import hold_dimensions, hold_metrics
from modelharbor.streams.analytics import TELLABLE, Analytics
from modelharbor.streams.base import Subscribed

from .analytics import GroupValue
from .filters import ModelFilter, compile_filter
from .scalars import Cursor, event_cursor

MOST_DIMENSIONS: Final = 2
SHORTEST_SECONDS: Final = 1
LONGEST_SECONDS: Final = 3600


@strawberry.type(description="By how much a metric of one group has changed.")
class AnalyticsEvent:
    cursor: Cursor = computed(
        event_cursor, description="How far it tells; give it to `after` to go on from there."
    )
    metric: Metric = strawberry.field(description="The metric.")
    group: list[GroupValue] = strawberry.field(
        description="A value for each dimension of `groupBy`, in its order; none for all others together."
    )
    is_other: bool = strawberry.field(
        description="Whether these are all groups that are not told by themselves: beyond the 100 that changed most."
    )
    value: float = strawberry.field(
        description="What was added since the event before; less than 0 where likes were taken back or files deleted."
    )
    at: datetime = strawberry.field(description="When the last of it was added up.")


def analytics(
    metrics: Annotated[
        list[Metric],
        strawberry.argument(
            description="Of what: 1 to 5, all of models or all of the API. Not UNIQUE_DOWNLOADERS and API_P95_MS, which do not add up."
        ),
    ],
    filter: Annotated[
        ModelFilter | None,
        strawberry.argument(
            description="Only these models, as they are when their use is added up; without it all that you may read."
        ),
    ] = None,
    group_by: Annotated[
        list[Dimension] | None,
        strawberry.argument(description="An event for each combination of these, 2 at most."),
    ] = None,
    interval_seconds: Annotated[
        int,
        strawberry.argument(
            description="How long at least what changes is added up before it is told, 1 to 3600."
        ),
    ] = 5,
    after: Annotated[
        Cursor | None,
        strawberry.argument(
            description="Go on after the event with this `cursor`, a day old at most: what came since is told first, added up. Good for the same metrics, filter and groups."
        ),
    ] = None,
) -> Subscribed:
    hold_metrics(metrics)
    for metric in metrics:
        if metric not in TELLABLE:
            raise BadUserInput(
                f"{metric.value} does not add up: changes of it cannot be told. Ask for it again."
            )
    dimensions = group_by or []
    hold_dimensions(metrics, dimensions, MOST_DIMENSIONS)
    if not SHORTEST_SECONDS <= interval_seconds <= LONGEST_SECONDS:
        raise BadUserInput(
            f"`intervalSeconds` is {interval_seconds}; it takes {SHORTEST_SECONDS} to {LONGEST_SECONDS}."
        )
    models = compile_filter(filter)
    if models.data and MEASURED[metrics[0]].is_of_api:
        raise BadUserInput("Metrics of the API are not about models: leave the `filter` out.")
    source = Analytics(
        tuple(metrics), tuple(dimensions), models if models.data else None, interval_seconds
    )
    return Subscribed(source, after)
