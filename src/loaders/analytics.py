"""How models and the API were used: questions, answered from the rollups alone.

Models of an audience are added up beforehand; the other ones that a viewer may read are found first, and
their own rows are added up with those. Rows are summed by the database, for pieces of time that never
lie in two buckets, and put into the buckets here. Of a timezone that is not UTC, days are read whole all
the same, and what lies on the other side of midnight there is taken from one bucket to the other.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import accumulate, chain
from math import ceil
from typing import Any, Final, TypeAlias

from bson import ObjectId

from modelharbor.auth.viewer import INTERNAL, OPERATOR, PUBLIC, Viewer
from modelharbor.db.base import Row, utc_now
from modelharbor.db.calendar import DAY, EPOCH, NOON, Buckets, buckets, compared, moment, seconds_of
from modelharbor.db.conditions import all_of, one_of
from modelharbor.db.keyset import Filter
from modelharbor.db.metrics import (
    AUDIENCE_CUBOIDS,
    HOME,
    MEASURED,
    OF_ROWS,
    Comparison,
    Dimension,
    Granularity,
    Metric,
    Sort,
    api_cuboid,
    model_cuboid,
)
from modelharbor.db.models import ModelState
from modelharbor.db.rollups import (
    AUDIENCES,
    MINUTES_KEPT,
    STATE,
    Cuboid,
    Grain,
    RollupStateDocument,
    cuboid_of,
    distinct,
)
from modelharbor.db.usage import latency_of
from modelharbor.errors import BadUserInput, Forbidden, OperationTooComplex

from .actors import ActorByIdLoader
from .base import Loader, Reads, Sharing
from .models import with_holders

Subject: TypeAlias = ObjectId | None
Group: TypeAlias = tuple[Any, ...]
_OF_MANY: Final = frozenset({PUBLIC, INTERNAL, OPERATOR})
"""Principals whose models are added up beforehand, or that stand in none."""
_READABLE: Final[Row] = one_of("state", [ModelState.ACTIVE.value, ModelState.ARCHIVED.value])
_STATE: Final = RollupStateDocument.Settings.name
FURTHEST: Final = timedelta(days=366)  # that a range may reach into the future
HEAVY: Final = {Sort.UNIQUE: 100, Sort.PERCENTILE: 10}
"""As so many rows counts one whose hashes, or histogram, are read."""
AT_ONCE: Final = 2000  # rows, before others have a turn
MOST_STRAYS: Final = 20_000  # quarters that are looked for one by one, of all models together
CHANGING: Final = timedelta(days=1)
"""Before today: of days from there on no whole ones are taken apart, for they may be amid being added up."""
UNITS: Final = {
    Granularity.MINUTE: 60,
    Granularity.HOUR: 3600,
    Granularity.DAY: DAY,
    Granularity.WEEK: 7 * DAY,
}
_NO_GROUP: Final[Row] = {"$literal": {}}
_MONDAY: Final = 3 * DAY  # 1 January 1970 was a Thursday


@dataclass(frozen=True, slots=True)
class Question:
    """Made by resolvers/analytics.py, which refuses what nobody can answer. Moments are seconds."""

    metrics: tuple[Metric, ...]
    begin: int
    end: int
    granularity: Granularity = Granularity.DAY
    group_by: tuple[Dimension, ...] = ()
    compare_to: Comparison | None = None
    timezone: str = "UTC"
    limit: int = 10
    models: Filter | None = None
    """Which models; None: all that the viewer may read."""

    @property
    def is_of_api(self) -> bool:
        return MEASURED[self.metrics[0]].is_of_api

    def with_sort(self, *sorts: Sort) -> list[Metric]:
        return [metric for metric in self.metrics if MEASURED[metric].sort in sorts]


def of_operators(viewer: Viewer) -> None:
    if not viewer.operates:
        raise Forbidden("This is for operators, with a token that has the scope OPERATE.")


@dataclass(frozen=True, slots=True)
class Span:
    """The buckets that are shown, or those that they are compared with."""

    number: int
    buckets: Buckets
    grain: Grain
    days_until: int | None = None
    """Of what is summed, whole days (UTC) are read up to this one, and quarters from there on, although
    the buckets are of another timezone."""

    @property
    def at(self) -> Row:
        return {"$gte": moment(self.buckets.begin), "$lt": moment(self.buckets.end)}

    def stretches(self, count: int) -> Iterator["Stretch"]:
        """Where all rows of it are that are summed, of so many models or groups of them."""
        begin, end, until = self.buckets.begin, self.buckets.end, self.days_until
        strays = [] if until is None else list(map(moment, self.buckets.strays(until)))
        if until is None or count * len(strays) > MOST_STRAYS:
            yield Stretch(self.grain, self.at)
            return
        first, last = begin - NOON, min(end - NOON, until)
        if first < last:
            yield Stretch(Grain.DAY, {"$gte": moment(first), "$lt": moment(last)}, is_days=True)
        if strays:
            yield Stretch(Grain.QUARTER, {"$in": strays}, is_stray=True)
        if until < end:
            rest = {"$gte": moment(max(begin, until)), "$lt": moment(end)}
            yield Stretch(Grain.QUARTER, rest)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of one grain, and into which buckets they go."""

    grain: Grain
    at: Row
    is_days: bool = False
    """Of the noon of the day: most of it is there."""
    is_stray: bool = False
    """Its own, and out of that of the noon of its day."""

    def piece(self, granularity: Granularity, span: Buckets) -> Any:
        if self.is_days:
            return piece(granularity, span, _NOON)
        if self.is_stray:
            return {"p": piece(granularity, span), "d": piece(granularity, span, _NOON)}
        return piece(granularity, span)

    @property
    def mark(self) -> Row:
        """Told with each sum."""
        return {name: True for name in ("is_days", "is_stray") if getattr(self, name)}


def spans_of(question: Question) -> list[Span]:
    """BadUserInput for a time of which there are no rows."""
    shown = buckets(question.timezone, question.granularity, question.begin, question.end)
    found = [shown]
    if question.compare_to is not None:
        found.append(compared(question.timezone, question.granularity, shown, question.compare_to))
    now = utc_now()
    if question.end > seconds_of(now + FURTHEST):
        raise BadUserInput("`range` ends more than a year from now.")
    if question.granularity is Granularity.MINUTE:
        oldest = seconds_of(now - MINUTES_KEPT)
        if any(each.begin < oldest for each in found):
            raise BadUserInput(
                f"Minutes are kept for {MINUTES_KEPT.days} days: ask for a later range, also for the one that it is compared with, or for hours."
            )
    return [_span(number, question.granularity, each, now) for number, each in enumerate(found)]


def _span(number: int, granularity: Granularity, span: Buckets, now: datetime) -> Span:
    grain, until = _grain(granularity, span), None
    if grain is Grain.QUARTER and granularity is not Granularity.HOUR:
        until = seconds_of(now - CHANGING) // DAY * DAY
        if span.begin - NOON >= until:
            until = None
    return Span(number, span, grain, until)


def _grain(granularity: Granularity, span: Buckets) -> Grain:
    if granularity is Granularity.MINUTE:
        return Grain.MINUTE
    if granularity is Granularity.HOUR or not span.is_utc:
        return Grain.QUARTER
    return Grain.DAY


_NOON: Final[Row] = {"$add": [{"$dateTrunc": {"date": "$at", "unit": "day"}}, NOON * 1000]}


def piece(granularity: Granularity, span: Buckets, at: Any = "$at") -> Row:
    """An expression that is equal for rows of one bucket: where a clock is changed, a bucket may have
    several pieces."""
    first, *others = span.offsets
    ahead: Any = first[1] * 1000
    stretch: Any = 0
    if others:
        later = [{"$gte": [at, moment(begin)]} for begin, _ in reversed(others)]
        ahead = _switch(later, [each * 1000 for _, each in reversed(others)], ahead)
        stretch = _switch(later, list(range(len(others), 0, -1)), 0)
    local: Row = {"$add": [at, ahead]}
    number: Row
    if granularity is Granularity.MONTH:
        number = {"$add": [{"$multiply": [{"$year": local}, 12]}, {"$month": local}]}
    else:
        shift = _MONDAY * 1000 if granularity is Granularity.WEEK else 0
        passed: Row = {"$add": [{"$toLong": local}, shift]}
        number = {"$floor": {"$divide": [passed, UNITS[granularity] * 1000]}}
    return {"n": number, "s": stretch} if others else number


def _switch(cases: list[Row], values: Sequence[int], otherwise: int) -> Row:
    branches = [{"case": case, "then": then} for case, then in zip(cases, values, strict=True)]
    return {"$switch": {"branches": branches, "default": otherwise}}


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one cuboid."""

    cuboid: Cuboid
    match: Row
    names: tuple[str, ...]
    """Of the rows: what tells groups apart."""
    group: Callable[[Row], tuple[Subject, Group]]
    count: int = 1
    """Of models."""

    def base(self, grain: Grain) -> Row:
        return {"cuboid": cuboid_of(self.cuboid, grain).value, **self.match}


class Tally:
    """What was added up for one group; by span, metric and bucket."""

    __slots__ = ("before", "histograms", "sums", "who")

    def __init__(self) -> None:
        self.sums: dict[tuple[int, Metric], dict[int, Any]] = {}
        self.before: dict[tuple[int, Metric], Any] = {}
        self.who: dict[int, dict[int, list[list[int]]]] = {}
        self.histograms: dict[int, dict[int, list[int]]] = {}

    def add(self, span: int, metric: Metric, bucket: int, value: Any) -> None:
        sums = self.sums.setdefault((span, metric), {})
        sums[bucket] = sums.get(bucket, 0) + value

    def add_before(self, span: int, metric: Metric, value: Any) -> None:
        self.before[span, metric] = self.before.get((span, metric), 0) + value

    def add_who(self, span: int, bucket: int, *who: list[int]) -> None:
        self.who.setdefault(span, {}).setdefault(bucket, []).extend(who)

    def add_histogram(self, span: int, bucket: int, counts: list[int]) -> None:
        histograms = self.histograms.setdefault(span, {})
        histograms[bucket] = added(histograms.get(bucket), counts)

    @property
    def is_empty(self) -> bool:
        """What was taken away again is not there."""
        return not (self.who or self.histograms or any(self.before.values())) and not any(
            any(sums.values()) for sums in self.sums.values()
        )

    def take(self, other: "Tally") -> None:
        for (span, metric), sums in other.sums.items():
            for bucket, value in sums.items():
                self.add(span, metric, bucket, value)
        for (span, metric), value in other.before.items():
            self.add_before(span, metric, value)
        for span, found in other.who.items():
            for bucket, who in found.items():
                self.add_who(span, bucket, *who)
        for span, histograms in other.histograms.items():
            for bucket, counts in histograms.items():
                self.add_histogram(span, bucket, counts)


def added(one: list[int] | None, other: list[int]) -> list[int]:
    """Two histograms."""
    if one is None:
        return list(other)
    return [left + right for left, right in zip(one, other, strict=True)]


def percentile(histogram: Sequence[int], share: float) -> float:
    """The milliseconds within which that share of all was answered: the upper end of its step."""
    wanted, passed = ceil(share * sum(histogram)), 0
    if wanted == 0:
        return 0.0
    for step, count in enumerate(histogram):
        passed += count
        if passed >= wanted:
            return latency_of(step)
    raise AssertionError("a share of all is among them")


def count_unique(parts: Iterable[list[int]]) -> tuple[float, bool]:
    """How many different hashes there are in all of them, and whether that is exact."""
    count, is_exact = distinct(set().union(*parts))
    return float(count), is_exact


@dataclass
class Reading:
    """One question for all that it is asked of: the root, or each of several models."""

    reads: Reads
    question: Question
    spans: list[Span]
    sources: list[Source]
    tallies: dict[Subject, dict[Group, Tally]] = field(default_factory=lambda: defaultdict(dict))
    scanned: int = 0
    through: Any = EPOCH

    @property
    def summed(self) -> list[Metric]:
        return self.question.with_sort(Sort.ADDITIVE, Sort.LEVEL)

    async def read(self) -> None:
        parts = [
            (each, *part)
            for each in self.sources
            for span in self.spans
            for part in self.parts(each, span)
        ]
        found: list[tuple[str, list[Row]]] = []
        for number, (_, collection, stages, most) in enumerate(parts):
            marked = [*stages[:1], {"$limit": most + 1}, *stages[1:], {"$set": {"part": number}}]
            found.append((collection, marked))
        found.append((_STATE, [{"$match": {"_id": STATE}}, {"$project": {"through": 1}}]))
        (collection, pipeline), *others = found
        for other, stages in others:
            pipeline.append({"$unionWith": {"coll": other, "pipeline": stages}})
        rows = await self.reads.database.aggregate(collection, pipeline)
        counts = [0] * len(parts)
        for row in rows:
            if "part" in row:
                counts[row["part"]] += row.get("n", 1)
            else:
                self.through = row["through"]
        self.scanned = sum(counts)
        for count, (*_, most) in zip(counts, parts, strict=True):
            self.hold(count, most)
        self.hold(self.scanned, self.reads.max_analytics_buckets)
        await self.take(rows, [part[0] for part in parts])

    def hold(self, count: int, most: int) -> None:
        if count > most:
            raise OperationTooComplex(
                f"The answer takes more than {most} rows of added-up usage: ask for a shorter range, a coarser granularity or fewer models.",
                measure="buckets",
                value=count,
                limit=most,
            )

    def parts(self, source: Source, span: Span) -> Iterator[tuple[str, list[Row], int]]:
        """(collection, stages, most rows) of all that is read of a source for a span."""
        base = source.base(span.grain)
        names = {name: f"${name}" for name in source.names}
        most = self.reads.max_analytics_buckets
        if self.summed:
            sums = {MEASURED[metric].field for metric in self.summed}
            for stretch in span.stretches(source.count):
                of_bucket = stretch.piece(self.question.granularity, span.buckets)
                yield (
                    stretch.grain.value,
                    [
                        {"$match": {**source.base(stretch.grain), "at": stretch.at}},
                        _group({"p": of_bucket, **names}, sums),
                        {"$set": {"span": span.number, **stretch.mark}},
                    ],
                    most,
                )
        levels = {MEASURED[metric].field for metric in self.question.with_sort(Sort.LEVEL)}
        if levels:
            # Of all time, in which most rows have changed none of them.
            changes = {"$or": [{name: {"$exists": True}} for name in sorted(levels)]}
            for grain, at in _before(span):
                yield (
                    grain.value,
                    [
                        {"$match": {**source.base(grain), "at": at, **changes}},
                        _group(names, levels),
                        {"$set": {"span": span.number, "before": True}},
                    ],
                    most,
                )
        for metric in self.question.with_sort(Sort.UNIQUE, Sort.PERCENTILE):
            name, sort = MEASURED[metric].field, MEASURED[metric].sort
            yield (
                span.grain.value,
                [
                    {"$match": {**base, "at": span.at, f"{name}.0": {"$exists": True}}},
                    {"$project": {"_id": names or _NO_GROUP, "at": 1, name: 1}},
                    {"$set": {"span": span.number}},
                ],
                most // HEAVY[sort],
            )

    async def take(self, rows: Sequence[Row], sources: Sequence[Source]) -> None:
        fields = [(metric, MEASURED[metric].field) for metric in self.summed]
        levels = [
            (metric, MEASURED[metric].field) for metric in self.question.with_sort(Sort.LEVEL)
        ]
        for number, row in enumerate(rows):
            await self.give_way(number)
            if "part" not in row:
                continue
            values = levels if "before" in row else fields
            is_whole = "who" in row or "latencies" in row
            if not is_whole and not any(row[name] for _, name in values):
                continue
            subject, group = sources[row["part"]].group(row["_id"])
            groups = self.tallies[subject]
            tally = groups.get(group)
            if tally is None:
                tally = groups[group] = Tally()
            span = row["span"]
            if "before" in row:
                for metric, name in values:
                    tally.add_before(span, metric, row[name])
                continue
            buckets, at = self.spans[span].buckets, seconds_of(row["at"])
            if "who" in row:
                tally.add_who(span, buckets.at(at), row["who"])
            elif "latencies" in row:
                tally.add_histogram(span, buckets.at(at), row["latencies"])
            else:
                for place, sign in _places(row, at):
                    if buckets.begin <= place < buckets.end:
                        for metric, name in values:
                            if row[name]:
                                tally.add(span, metric, buckets.at(place), sign * row[name])
        for groups in self.tallies.values():
            for group in [group for group, tally in groups.items() if tally.is_empty]:
                del groups[group]

    # ---- what is answered

    def total(self, tally: Tally, metric: Metric, span: int = 0) -> tuple[float, bool]:
        """Of all buckets, and whether it is exact."""
        match MEASURED[metric].sort:
            case Sort.UNIQUE:
                return count_unique(chain.from_iterable(tally.who.get(span, {}).values()))
            case Sort.PERCENTILE:
                together: list[int] | None = None
                for counts in tally.histograms.get(span, {}).values():
                    together = added(together, counts)
                return percentile(together or (), 0.95), False
            case _:
                before = tally.before.get((span, metric), 0)
                return float(before + sum(tally.sums.get((span, metric), {}).values())), True

    def points(self, tally: Tally, metric: Metric, span: int) -> tuple[list[float], bool]:
        """Of each bucket, and whether they are exact."""
        numbers = range(len(self.spans[span].buckets))
        sums = tally.sums.get((span, metric), {})
        match MEASURED[metric].sort:
            case Sort.ADDITIVE:
                return [float(sums.get(each, 0)) for each in numbers], True
            case Sort.LEVEL:
                changes = (sums.get(each, 0) for each in numbers)
                levels = accumulate(changes, initial=tally.before.get((span, metric), 0))
                return [float(each) for each in levels][1:], True
            case Sort.UNIQUE:
                who = tally.who.get(span, {})
                found = [count_unique(who.get(each, ())) for each in numbers]
                return [each for each, _ in found], all(is_exact for _, is_exact in found)
            case Sort.PERCENTILE:
                histograms = tally.histograms.get(span, {})
                return [percentile(histograms.get(each, ()), 0.95) for each in numbers], False

    async def answer(self, subject: Subject) -> Row:
        question, groups = self.question, self.tallies.get(subject, {})
        ranks = {}
        for number, (group, tally) in enumerate(groups.items()):
            await self.give_way(number)
            ranks[group] = (-self.total(tally, question.metrics[0])[0], _order(group))
        ranked = sorted(groups, key=ranks.__getitem__)
        other, everything = Tally(), Tally()
        for number, group in enumerate(ranked):
            await self.give_way(number)
            everything.take(groups[group])
            if number >= question.limit:
                other.take(groups[group])
        shown = [(self.named(group), groups[group], False) for group in ranked[: question.limit]]
        if len(ranked) > question.limit:
            shown.append(([], other, True))
        if not question.group_by:
            shown = [([], everything, False)]
        series = [
            {**self.series(tally, metric), "group": named, "is_other": is_other}
            for metric in question.metrics
            for named, tally, is_other in shown
        ]
        totals = [self.totals(everything, metric) for metric in question.metrics]
        return {
            "series": series,
            "totals": totals,
            "freshness": self.through,
            "exact": all(each["is_exact"] for each in (*series, *totals)),
            "scanned_buckets": self.scanned,
        }

    @staticmethod
    async def give_way(number: int) -> None:
        if number % AT_ONCE == AT_ONCE - 1:
            await asyncio.sleep(0)

    def series(self, tally: Tally, metric: Metric) -> Row:
        values, is_exact = self.points(tally, metric, 0)
        total, is_whole_exact = self.total(tally, metric)
        starts = self.spans[0].buckets.starts
        points: list[Row] = [
            {"at": moment(start), "value": value}
            for start, value in zip(starts, values, strict=False)
        ]
        is_exact = is_exact and is_whole_exact
        if len(self.spans) > 1:
            before, were_exact = self.points(tally, metric, 1)
            is_exact = is_exact and were_exact
            for point, value in zip(points, before, strict=False):
                point["comparison"] = value
        return {
            "metric": metric.value,
            "points": points,
            "total": total,
            "is_exact": is_exact,
        }

    def totals(self, tally: Tally, metric: Metric) -> Row:
        value, is_exact = self.total(tally, metric)
        found: Row = {"metric": metric.value, "value": value, "is_exact": is_exact}
        if len(self.spans) > 1:
            before, was_exact = self.total(tally, metric, 1)
            found["is_exact"] = is_exact and was_exact
            found |= {"comparison": before, "change_percent": change(value, before)}
        return found

    def named(self, group: Group) -> list[Row]:
        named = zip(self.question.group_by, group, strict=True)
        return [group_value(dimension, value) for dimension, value in named]


def change(value: float, before: float) -> float | None:
    """In per cent; None where there was nothing."""
    return (value - before) / abs(before) * 100 if before else None


TYPES: Final = {
    Dimension.MODEL: "Model",
    Dimension.VERSION: "ModelVersion",
    Dimension.FILE: "ModelFile",
}
"""Of what such a value is the id of."""


def group_value(dimension: Dimension, value: Any) -> Row:
    """`type` and `node_id` where it is an object; of owners the type is found later."""
    found: Row = {"dimension": dimension.value, "text": "" if value is None else str(value)}
    if value is not None and (dimension in TYPES or dimension is Dimension.OWNER):
        found |= {"type": TYPES.get(dimension), "node_id": ObjectId(value)}
    return found


def _order(group: Group) -> tuple[str, ...]:
    return tuple(str(each) for each in group)


def _group(names: Mapping[str, Any], sums: Iterable[str]) -> Row:
    summed = {name: {"$sum": f"${name}"} for name in sorted(sums)}
    return {
        "$group": {"_id": names or _NO_GROUP, "at": {"$min": "$at"}, "n": {"$sum": 1}, **summed}
    }


def _places(row: Row, at: int) -> Iterator[tuple[int, int]]:
    """Moments in the buckets that a sum goes into, and whether it comes or is taken away."""
    noon = at - at % DAY + NOON
    if "is_days" in row:
        yield noon, 1
        return
    yield at, 1
    if "is_stray" in row:
        yield noon, -1


def _before(span: Span) -> Iterator[tuple[Grain, Row]]:
    """Where all rows of before a span are: whole days, and what is left of the last one."""
    begin = span.buckets.begin
    midnight = begin - begin % DAY
    yield Grain.DAY, {"$lt": moment(midnight)}
    if midnight < begin:
        grain = Grain.MINUTE if span.grain is Grain.MINUTE else Grain.QUARTER
        yield grain, {"$gte": moment(midnight), "$lt": moment(begin)}


def audience_source(viewer: Viewer, group_by: tuple[Dimension, ...]) -> Source:
    """All models of the audiences that the viewer belongs to."""
    dimension = group_by[0] if group_by else None
    audiences = [each for each in AUDIENCES if each in viewer.principals]
    return Source(
        AUDIENCE_CUBOIDS[dimension],
        one_of("audience", audiences),
        ("value",) if dimension else (),
        lambda row: (None, (row.get("value") or "",) if dimension else ()),
    )


def model_source(
    ids: list[ObjectId],
    group_by: tuple[Dimension, ...],
    homes: Mapping[ObjectId, Row] | None,
) -> Source:
    """Each of these models; without `homes`, for each of them."""
    of_rows = tuple(name for each, name in OF_ROWS.items() if each in group_by)
    of_homes = any(each in HOME or each is Dimension.MODEL for each in group_by)
    names = ("model", *of_rows) if homes is None or of_homes else of_rows

    def group(row: Row) -> tuple[Subject, Group]:
        home = homes[row["model"]] if homes is not None and of_homes else {}
        found = tuple(
            row.get("model")
            if each is Dimension.MODEL
            else home[HOME[each]]
            if each in HOME
            else row.get(OF_ROWS[each]) or (None if each in TYPES else "")
            for each in group_by
        )
        return (row["model"] if homes is None else None), found

    return Source(model_cuboid(group_by), {"model": {"$in": ids}}, names, group, len(ids))


def api_source(group_by: tuple[Dimension, ...]) -> Source:
    names = tuple(each.value.lower() for each in group_by)
    # Of the index by audience, which these rows have none of.
    return Source(
        api_cuboid(group_by),
        {"audience": None},
        names,
        lambda row: (None, tuple(row.get(name) or "" for name in names)),
    )


class AnalyticsLoader(Loader[str, Row, Question]):
    """One question about all that the viewer may read: a command, before it one for their models, and
    after it one for the kinds of owners where these are asked for."""

    sharing = Sharing.EQUAL_RIGHTS

    async def batch_load(self, keys: list[str]) -> list[Row]:
        question = self.arguments
        if question.is_of_api:
            of_operators(self.reads.viewer)
        spans = spans_of(question)
        reading = Reading(self.reads, question, spans, await self.sources())
        await reading.read()
        answer = await reading.answer(None)
        await self.find_owners(answer)
        return [answer for _ in keys]

    async def sources(self) -> list[Source]:
        question, viewer = self.arguments, self.reads.viewer
        group_by = question.group_by
        if question.is_of_api:
            return [api_source(group_by)]
        by_audience = question.models is None and (
            not group_by or (len(group_by) == 1 and group_by[0] in AUDIENCE_CUBOIDS)
        )
        found = [audience_source(viewer, group_by)] if by_audience else []
        if by_audience:
            own = [each for each in viewer.principals if each not in _OF_MANY]
            query = all_of([_READABLE, {"principals": {"$in": own}}]) if own else None
        else:
            wanted = question.models.data if question.models else {}
            query = all_of([_READABLE, viewer.visible, wanted])
        homes = await self.homes(query) if query is not None else {}
        if homes:
            found.append(model_source(list(homes), group_by, homes))
        return found

    async def homes(self, query: Row) -> dict[ObjectId, Row]:
        """The models that match, by id, with what they are grouped by."""
        most = self.reads.max_analytics_models
        names = ["_id", *(_STORED[each] for each in self.arguments.group_by if each in HOME)]
        rows = await self.reads.database.find(
            "models",
            await with_holders(self.reads, query),
            projection=dict.fromkeys(names, 1),
            limit=most + 1,
        )
        if len(rows) > most:
            raise OperationTooComplex(
                f"This is about more than {most} models that are not added up beforehand: give a `filter` that fewer match.",
                measure="models",
                value=len(rows),
                limit=most,
            )
        return {
            row["_id"]: {HOME[each]: str(row.get(stored) or "") for each, stored in _STORED.items()}
            for row in rows
        }

    async def find_owners(self, answer: Row) -> None:
        """What owners are: persons or organizations."""
        if Dimension.OWNER not in self.arguments.group_by:
            return
        values = [
            value
            for series in answer["series"]
            for value in series["group"]
            if value["dimension"] == Dimension.OWNER.value and "node_id" in value
        ]
        ids = list({value["node_id"] for value in values})
        rows = await self.reads.loader(ActorByIdLoader, None).load_many(ids) if ids else []
        kinds = {row["_id"]: row["kind"] for row in rows if row is not None}
        for value in values:
            value["type"] = kinds.get(value["node_id"])


_STORED: Final = {
    Dimension.OWNER: "owner_id",
    Dimension.TASK: "task",
    Dimension.LIBRARY: "library",
    Dimension.LICENSE: "license",
}


class AnalyticsByModelLoader(Loader[ObjectId, Row, Question]):
    """One question about each of several models, which were reached: one command for all of them."""

    sharing = Sharing.EVERYBODY

    @property
    def most_keys(self) -> int:
        return 100

    async def batch_load(self, keys: list[ObjectId]) -> list[Row]:
        question = self.arguments
        source = model_source(keys, question.group_by, None)
        reading = Reading(self.reads, question, spans_of(question), [source])
        await reading.read()
        return [await reading.answer(key) for key in keys]
