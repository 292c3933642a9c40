"""How models and the API were used: a question, and series of points as the answer."""

from datetime import datetime
from typing import Annotated

import strawberry
from bson import ObjectId

from modelharbor.db.metrics import Comparison, Dimension, Granularity, Metric
from modelharbor.execution.declaration import computed, loaded
from modelharbor.loaders.analytics import Question
from modelharbor.loaders.nodes import NodeByTypeLoader
from modelharbor.resolvers.analytics import make_question, make_question_of_model

from .filters import ModelFilter, compile_filter
from .nodes import Node, global_id


@strawberry.input(description="A stretch of time.")
class TimeRange:
    from_: datetime = strawberry.field(name="from", description="Its first moment; from 2000 on.")
    to: datetime = strawberry.field(
        description="The moment that it ends before; a year from now at the latest."
    )


@strawberry.input(description="A question about how models or the API were used.")
class AnalyticsInput:
    metrics: list[Metric] = strawberry.field(
        description="Of what: 1 to 5. Those of the API and those of models are asked for apart."
    )
    range: TimeRange = strawberry.field(
        description="Of which time; it is widened to whole buckets."
    )
    granularity: Granularity = strawberry.field(
        default=Granularity.DAY, description="How long the buckets are."
    )
    group_by: list[Dimension] | None = strawberry.field(
        default=None,
        description="A series for each combination of these, 3 at most. Each metric says what it can be divided by.",
    )
    compare_to: Comparison | None = strawberry.field(
        default=None, description="An earlier time to compare with."
    )
    timezone: str | None = strawberry.field(
        default="UTC",
        description="A name of the IANA database, such as Europe/Berlin, whose days and hours are meant.",
    )
    limit: int | None = strawberry.field(
        default=10,
        description="How many groups, 1 to 100: those with the largest total of the first metric. All others are one series.",
    )


Asked = Annotated[AnalyticsInput, strawberry.argument(description="The question.")]


def question_wanted(
    input: Asked,
    filter: Annotated[
        ModelFilter | None,
        strawberry.argument(
            description="Only these models, also archived ones unless it says something else; without it all that you may read."
        ),
    ] = None,
) -> Question:
    models = compile_filter(filter)
    return make_question(
        input.metrics,
        input.range.from_,
        input.range.to,
        granularity=input.granularity,
        group_by=input.group_by or (),
        compare_to=input.compare_to,
        timezone="UTC" if input.timezone is None else input.timezone,
        limit=10 if input.limit is None else input.limit,
        models=models if models.data else None,
    )


def question_of_model(input: Asked) -> Question:
    return make_question_of_model(question_wanted(input))


def group_text(type: str | None, node_id: ObjectId | None, text: str) -> str:
    return text if type is None or node_id is None else global_id(type, node_id)


@strawberry.type(description="What a series is of, in one dimension.")
class GroupValue:
    dimension: Dimension = strawberry.field(description="The dimension.")
    value: str = computed(
        group_text,
        description="The value; of MODEL, VERSION, FILE and OWNER the global id. Empty where it has none.",
    )
    node: Node | None = loaded(
        NodeByTypeLoader,
        key=("type", "node_id"),
        description="The object that the value is the id of; null where there is none, or none any more.",
    )


@strawberry.type(description="What happened in one bucket of time.")
class AnalyticsPoint:
    at: datetime = strawberry.field(description="When the bucket begins.")
    value: float = strawberry.field(description="Of the bucket; 0 where nothing happened.")
    comparison: float | None = strawberry.field(
        description="Of the bucket at the same place in the time that is compared with; null without one."
    )


@strawberry.type(description="One metric of one group, bucket by bucket without gaps.")
class AnalyticsSeries:
    metric: Metric = strawberry.field(description="The metric.")
    group: list[GroupValue] = strawberry.field(
        description="A value for each dimension of `groupBy`, in its order; none for all others together."
    )
    is_other: bool = strawberry.field(
        description="Whether these are all groups that are not shown by themselves."
    )
    points: list[AnalyticsPoint] = strawberry.field(description="In order.")
    total: float = strawberry.field(
        description="Of the whole time: a sum; of sizes what there is at its end; of people those that are different; of latencies the one of all operations together."
    )


@strawberry.type(description="A metric over everything that was asked about, shown or not.")
class MetricTotal:
    metric: Metric = strawberry.field(description="The metric.")
    value: float = strawberry.field(description="Of the whole time, as the `total` of a series.")
    comparison: float | None = strawberry.field(
        description="The same of the time that is compared with; null without one."
    )
    change_percent: float | None = strawberry.field(
        description="By how much it is more; null without a comparison, or where nothing was before."
    )


@strawberry.type(description="The answer to a question about use.")
class AnalyticsResult:
    series: list[AnalyticsSeries] = strawberry.field(
        description="By metric, in the order asked for; of each the groups by their total of the first metric, then all others together where there are any."
    )
    totals: list[MetricTotal] = strawberry.field(description="Of each metric.")
    freshness: datetime = strawberry.field(
        description="All that was recorded before is in it; what is later may be."
    )
    exact: bool = strawberry.field(
        description="False where a number is an estimate: of more people than are told apart one by one, or of latencies."
    )
    scanned_buckets: int = strawberry.field(
        description="How many rows of added-up usage were read for it, and for all that was asked for with it."
    )
