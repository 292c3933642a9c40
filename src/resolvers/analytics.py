"""What may be asked of analytics: all that can be refused without looking at a clock or a row."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from modelharbor.db.calendar import buckets, seconds_of, timezones
from modelharbor.db.keyset import Filter
from modelharbor.db.metrics import (
    HOME,
    MEASURED,
    Comparison,
    Dimension,
    Granularity,
    Metric,
)
from modelharbor.errors import BadUserInput, OperationTooComplex
from modelharbor.loaders.analytics import Question

MOST_METRICS: Final = 5
MOST_DIMENSIONS: Final = 3
MOST_GROUPS: Final = 100
MOST_POINTS: Final = 100_000  # of all series of one answer
EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""What is later than a year from now is refused when it is asked: a question has no clock."""
_JUST_BEFORE_A_SECOND: Final = timedelta(microseconds=999_999)
LONGEST: Final = {
    Granularity.MINUTE: timedelta(days=1),
    Granularity.HOUR: timedelta(days=31),
    Granularity.DAY: timedelta(days=3 * 366),
    Granularity.WEEK: timedelta(days=20 * 366),
    Granularity.MONTH: timedelta(days=20 * 366),
}


def make_question(
    metrics: Sequence[Metric],
    begin: datetime,
    end: datetime,
    *,
    granularity: Granularity = Granularity.DAY,
    group_by: Sequence[Dimension] = (),
    compare_to: Comparison | None = None,
    timezone: str = "UTC",
    limit: int = 10,
    models: Filter | None = None,
) -> Question:
    """BadUserInput or OperationTooComplex where it is none that can be answered. `models`: only such
    as match."""
    hold_metrics(metrics)
    hold_dimensions(metrics, group_by)
    check_range(begin, end)
    longest = LONGEST[granularity]
    if end - begin > longest:
        most = "a day" if longest.days == 1 else f"{longest.days} days"
        raise BadUserInput(
            f"`range` is longer than {most}, the most for the granularity {granularity.value}."
        )
    if compare_to is Comparison.PREVIOUS_WEEK and granularity is Granularity.MONTH:
        raise BadUserInput("Months are not compared with those of the week before.")
    if timezone not in timezones():
        raise BadUserInput(
            "There is no such timezone: give a name of the IANA database, such as Europe/Berlin."
        )
    if not 1 <= limit <= MOST_GROUPS:
        raise BadUserInput(f"`limit` is {limit}; it takes 1 to {MOST_GROUPS}.")
    if models is not None and MEASURED[metrics[0]].is_of_api:
        raise BadUserInput("Metrics of the API are not about models: leave the `filter` out.")
    made = Question(
        metrics=tuple(metrics),
        begin=seconds_of(begin),
        end=seconds_of(end + _JUST_BEFORE_A_SECOND),
        granularity=granularity,
        group_by=tuple(group_by),
        compare_to=compare_to,
        timezone=timezone,
        limit=limit,
        models=models,
    )
    _hold_points(made)
    return made


def make_question_of_model(question: Question) -> Question:
    """The same question about one model; BadUserInput where it is not about one."""
    if question.is_of_api:
        raise BadUserInput("Metrics of the API are not about a model: ask for them at the root.")
    for dimension in question.group_by:
        if dimension is Dimension.MODEL or dimension in HOME:
            raise BadUserInput(f"One model has one {dimension.value}: do not group by it here.")
    return question


def check_range(begin: datetime, end: datetime) -> None:
    if begin >= end:
        raise BadUserInput("`range` is empty: its `to` is not after its `from`.")
    if begin < EARLIEST or end > LATEST:
        raise BadUserInput(f"`range` is not between the years {EARLIEST.year} and {LATEST.year}.")


def hold_metrics(metrics: Sequence[Metric]) -> None:
    if not 1 <= len(metrics) <= MOST_METRICS:
        raise BadUserInput(f"{len(metrics)} metrics are given; it takes 1 to {MOST_METRICS}.")
    if len(set(metrics)) < len(metrics):
        raise BadUserInput("A metric is given twice.")
    if len({MEASURED[each].is_of_api for each in metrics}) > 1:
        raise BadUserInput("Ask for metrics of the API, and for those of models, apart.")


def hold_dimensions(
    metrics: Sequence[Metric], group_by: Sequence[Dimension], most: int = MOST_DIMENSIONS
) -> None:
    if len(group_by) > most:
        raise BadUserInput(f"{len(group_by)} dimensions are given; {most} at most.")
    if len(set(group_by)) < len(group_by):
        raise BadUserInput("A dimension is given twice.")
    for metric in metrics:
        known = MEASURED[metric].dimensions
        for dimension in group_by:
            if dimension not in known:
                names = ", ".join(each.value for each in Dimension if each in known)
                raise BadUserInput(
                    f"{metric.value} cannot be grouped by {dimension.value}, but by {names}."
                )


def _hold_points(question: Question) -> None:
    count = len(buckets(question.timezone, question.granularity, question.begin, question.end))
    groups = question.limit + 1 if question.group_by else 1
    points = count * groups * len(question.metrics)
    if points > MOST_POINTS:
        raise OperationTooComplex(
            f"The answer may have {points} points; the limit is {MOST_POINTS}: ask for fewer groups or metrics, a shorter range or a coarser granularity.",
            measure="points",
            value=points,
            limit=MOST_POINTS,
        )
