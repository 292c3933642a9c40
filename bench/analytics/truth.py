"""Random questions, and their answers by a recount of all events: nothing of it is the server's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final
from zoneinfo import ZoneInfo

import numpy as np

from .events import CLIENTS, DOWNLOAD, FORMATS, LIKE, VIEW, Events, Models, Whole

QUESTION: Final = """query Usage($input: AnalyticsInput!, $filter: ModelFilter) {
  analytics(input: $input, filter: $filter) {
    series { metric isOther group { dimension value } points { at value } total }
    totals { metric value }
    exact
    scannedBuckets
  }
}"""
ZONES: Final = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe", "America/St_Johns", "Asia/Tokyo", "Pacific/Apia", "Africa/Casablanca")  # fmt: skip
METRICS: Final = ("DOWNLOADS", "EGRESS_BYTES", "VIEWS", "LIKES", "UNIQUE_DOWNLOADERS")
DIMENSIONS: Final = {
    "DOWNLOADS": ("TASK", "LIBRARY", "LICENSE", "FORMAT", "CLIENT"),
    "EGRESS_BYTES": ("TASK", "LIBRARY", "LICENSE", "FORMAT", "CLIENT"),
    "VIEWS": ("TASK", "LIBRARY", "LICENSE", "CLIENT"),
    "LIKES": ("TASK", "LIBRARY", "LICENSE"),
    "UNIQUE_DOWNLOADERS": ("TASK", "LIBRARY", "LICENSE", "FORMAT", "CLIENT"),
}
LONGEST: Final = {"HOUR": timedelta(days=14), "DAY": timedelta(days=100), "WEEK": timedelta(days=120), "MONTH": timedelta(days=150)}  # fmt: skip
EXACT_UP_TO: Final = 1024  # different people
ERROR: Final = 0.032  # of estimates beyond, one standard error
SIGMAS: Final = 5.0
"""An estimate may be so many standard errors off: of a hundred thousand none is by chance."""


@dataclass(frozen=True, slots=True)
class Asked:
    metric: str
    granularity: str
    zone: str
    begin: datetime
    end: datetime
    group_by: tuple[str, ...]
    task: str | None
    limit: int

    def variables(self) -> dict[str, Any]:
        return {
            "input": {
                "metrics": [self.metric],
                "range": {"from": self.begin.isoformat(), "to": self.end.isoformat()},
                "granularity": self.granularity,
                "groupBy": list(self.group_by),
                "timezone": self.zone,
                "limit": self.limit,
            },
            "filter": None if self.task is None else {"task": {"eq": self.task}},
        }


@dataclass(slots=True)
class Differences:
    points: int = 0
    additive: int = 0
    """Values of metrics that are added up which are other ones."""
    exact: int = 0
    """People that were said to be counted exactly, and were not."""
    estimates: int = 0
    beyond: int = 0
    """Estimates that are further off than chance explains."""
    squares: float = 0.0

    @property
    def error(self) -> float:
        """Of estimates: the root of the mean square."""
        return float((self.squares / self.estimates) ** 0.5) if self.estimates else 0.0

    @property
    def all(self) -> int:
        return self.additive + self.exact + self.beyond


def draw(random: Random, models: Models, first: datetime, last: datetime) -> Asked:
    """Any range from a week before the first event to now; minutes are asked for of the last days."""
    metric = random.choice(METRICS)
    granularity = random.choice((*LONGEST, *LONGEST, "MINUTE"))
    if granularity == "MINUTE":
        begin = last - timedelta(seconds=random.randrange(3600, 6 * 86_400))
        end = begin + timedelta(seconds=random.randrange(60, 6 * 3600))
    else:
        span = last - first + timedelta(days=7)
        begin = first - timedelta(days=7) + random.random() * span
        end = begin + timedelta(hours=1) + random.random() ** 2 * LONGEST[granularity]
    count = random.choice((0, 1, 1, 1, 2))
    possible = DIMENSIONS[metric]
    group_by = tuple(random.sample(possible, count))
    is_long = granularity in ("MINUTE", "HOUR") and end - begin > timedelta(days=3)
    task = random.choice(models.dimensions["TASK"]) if random.random() < 0.2 else None
    return Asked(
        metric,
        granularity,
        random.choice(ZONES),
        begin.replace(microsecond=0),
        end.replace(microsecond=0),
        group_by[:1] if is_long else group_by,
        task or None,
        random.choice((1, 3, 5, 10)),
    )


def starts(asked: Asked) -> list[int]:
    """When buckets begin, in milliseconds; the last one is where the last bucket ends."""
    found: list[int] = []
    for start in _starts(asked):
        found.append(int(start.timestamp() * 1000))
        if start >= asked.end:
            break
    return sorted(set(found))


def _starts(asked: Asked) -> Iterator[datetime]:
    """By going on a minute, or a day of the calendar, at a time."""
    zone = ZoneInfo(asked.zone)
    if asked.granularity in ("MINUTE", "HOUR"):
        at = asked.begin.replace(second=0)
        if asked.granularity == "HOUR":
            while not _is_hour(at, zone):
                at -= timedelta(minutes=1)
        while True:
            yield at
            at += timedelta(minutes=1)
            while asked.granularity == "HOUR" and not _is_hour(at, zone):
                at += timedelta(minutes=1)
    day = asked.begin.astimezone(zone).date()
    while not _is_first(asked.granularity, day):
        day -= timedelta(days=1)
    while True:
        yield datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)
        day += timedelta(days=1)
        while not _is_first(asked.granularity, day):
            day += timedelta(days=1)


def _is_hour(at: datetime, zone: ZoneInfo) -> bool:
    """Also where the clock is changed by less than an hour."""
    local, before = at.astimezone(zone), (at - timedelta(minutes=1)).astimezone(zone)
    return local.minute == 0 or (
        local.utcoffset() != before.utcoffset() and (local.minute - before.minute) % 60 != 1
    )


def _is_first(granularity: str, day: Any) -> bool:
    if granularity == "WEEK":
        return bool(day.weekday() == 0)
    return granularity == "DAY" or day.day == 1


def recount(
    asked: Asked, events: Events, models: Models
) -> tuple[list[int], dict[tuple[str, ...], list[int]], dict[tuple[str, ...], int]]:
    """When the buckets begin; by group the value of each, and of all of them."""
    edges = starts(asked)
    some = events.between(edges[0], edges[-1])
    wanted = models.is_public[some.model] & _concerns(asked.metric, some)
    if asked.task is not None:
        of_task = np.array([task == asked.task for task in models.dimensions["TASK"]])
        wanted &= of_task[some.model]
    some = some.where(wanted)
    keys, groups = _groups(asked.group_by, some, models)
    bucket = np.searchsorted(edges, some.at, side="right") - 1
    found, totals = {}, {}
    for number, group in enumerate(groups):
        mine = keys == number
        if asked.metric == "UNIQUE_DOWNLOADERS":
            values = _people(bucket[mine], some.who[mine], len(edges) - 1)
            totals[group] = len(np.unique(some.who[mine]))
        else:
            amounts = some.size if asked.metric == "EGRESS_BYTES" else some.count
            sums = np.zeros(len(edges) - 1, dtype=np.int64)
            np.add.at(sums, bucket[mine], amounts[mine].astype(np.int64))
            values = sums.tolist()
            totals[group] = sum(values)
        found[group] = values
    return edges[:-1], found, totals


def _concerns(metric: str, events: Events) -> Any:
    if metric == "VIEWS":
        return events.kind == VIEW
    if metric == "LIKES":
        return events.kind == LIKE
    downloads = events.kind == DOWNLOAD
    return downloads if metric == "EGRESS_BYTES" else downloads & (events.count > 0)


def _groups(
    group_by: Sequence[str], events: Events, models: Models
) -> tuple[Whole, list[tuple[str, ...]]]:
    """The number of each event's group, and the values of each."""
    keys = np.zeros(len(events), dtype=np.int64)
    values: list[list[str]] = []
    for name in group_by:
        if name in models.dimensions:
            names = sorted(set(models.dimensions[name]))
            of_model = np.array([names.index(each) for each in models.dimensions[name]])
            codes = of_model[events.model]
        else:
            names = list(CLIENTS if name == "CLIENT" else FORMATS)
            codes = (events.client if name == "CLIENT" else events.format).astype(np.int64)
        values.append(names)
        keys = keys * len(names) + codes
    there, numbers = np.unique(keys, return_inverse=True)
    groups = []
    for key in there.tolist():
        group: list[str] = []
        for names in reversed(values):
            key, code = divmod(key, len(names))
            group.insert(0, names[code])
        groups.append(tuple(group))
    return numbers.astype(np.int64), groups


def _people(bucket: Whole, who: Whole, count: int) -> list[int]:
    pairs = np.unique(np.stack([bucket, who]), axis=1)
    return np.bincount(pairs[0], minlength=count).tolist() if pairs.size else [0] * count


def compare(asked: Asked, answer: Any, events: Events, models: Models, into: Differences) -> None:
    """An answer beside the recount."""
    edges, by_group, totals = recount(asked, events, models)
    is_unique = asked.metric == "UNIQUE_DOWNLOADERS"
    shown = {
        tuple(each["value"] for each in series["group"]): series
        for series in answer["series"]
        if not series["isOther"]
    }
    # Where changes come to nothing there is no row, and so no group.
    rest = {group: values for group, values in by_group.items() if group not in shown and any(values)}  # fmt: skip
    nothing = [0] * len(edges)
    for group, series in shown.items():
        _hold(series, edges, by_group.get(group, nothing), totals.get(group, 0), answer, is_unique, into)  # fmt: skip
    others = [series for series in answer["series"] if series["isOther"]]
    if not is_unique:
        total = sum(totals.values())
        into.additive += answer["totals"][0]["value"] != total
        left = [sum(column) for column in zip(*rest.values(), strict=True)] if rest else nothing
        if others:
            _hold(others[0], edges, left, sum(left), answer, is_unique, into)
        else:
            into.additive += any(left)
        if shown and rest:  # the largest ones are shown
            least = min(totals.get(group, 0) for group in shown)
            into.additive += any(totals[group] > least for group in rest)


def _hold(
    series: Any,
    edges: Sequence[int],
    values: Sequence[int],
    total: int,
    answer: Any,
    is_unique: bool,
    into: Differences,
) -> None:
    points = series["points"]
    at = [int(datetime.fromisoformat(point["at"]).timestamp() * 1000) for point in points]
    into.points += len(points)
    if at != list(edges):
        into.additive += 1
        return
    found = [*(point["value"] for point in points), series["total"]]
    for value, truth in zip(found, [*values, total], strict=True):
        if not is_unique:
            into.additive += value != truth
        elif truth < EXACT_UP_TO:
            into.exact += value != truth
        else:
            into.exact += bool(answer["exact"])
            off = value / truth - 1
            into.estimates += 1
            into.squares += off * off
            into.beyond += abs(off) > SIGMAS * ERROR
