"""Buckets of time as a clock on the wall has them: hours, days, weeks and months of a timezone.

A day has 23 or 25 hours where clocks are changed. Moments are seconds since 1970.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache, lru_cache
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from .metrics import Comparison, Granularity

LOCAL: Final = frozenset({"localtime", "Factory"})
"""Names that mean another thing on each machine."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC).replace(tzinfo=None)
MINUTE, HOUR, DAY = 60, 3600, 86_400
NOON: Final = DAY // 2
_QUARTER: Final = 900
_STEP: Final = 5 * DAY
"""Between two looks at the offset: clocks are not changed twice in so little time."""


@cache
def timezones() -> frozenset[str]:
    """Names that may be asked for: one that is not among them is never looked for on the disk."""
    return frozenset(available_timezones()) - LOCAL


@lru_cache(maxsize=600)
def zone_of(name: str) -> ZoneInfo:
    return ZoneInfo(name)


def seconds_of(at: datetime) -> int:
    """Without a time zone it is in UTC."""
    plain = at.astimezone(UTC).replace(tzinfo=None) if at.tzinfo else at
    return (plain - EPOCH) // timedelta(seconds=1)


def moment(seconds: int) -> datetime:
    """In UTC, without saying so, as rows have it."""
    return EPOCH + timedelta(seconds=seconds)


def offset(zone: ZoneInfo, at: int) -> int:
    """Seconds that a clock there is ahead of UTC."""
    found = datetime.fromtimestamp(at, zone).utcoffset()
    assert found is not None
    return found // timedelta(seconds=1)


def offsets(zone: ZoneInfo, begin: int, end: int) -> list[tuple[int, int]]:
    """(from when, offset) for each stretch between two changes of the clocks."""
    found = [(begin, offset(zone, begin))]
    at = begin
    while at < end:
        following = min(at + _STEP, end)
        while offset(zone, following) != found[-1][1]:
            changed = _change(zone, at, following)
            found.append((changed, offset(zone, changed)))
            at = changed
        at = following
    return found


def _change(zone: ZoneInfo, low: int, high: int) -> int:
    """The first moment after `low` with another offset; there is one up to `high`."""
    before = offset(zone, low)
    while high - low > 1:
        middle = (low + high) // 2
        if offset(zone, middle) == before:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, slots=True)
class Buckets:
    """Bucket n begins at `starts[n]` and ends where the next one begins; the last start only ends."""

    starts: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    """Of clocks in that time: see `offsets`."""

    @property
    def begin(self) -> int:
        return self.starts[0]

    @property
    def end(self) -> int:
        return self.starts[-1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def at(self, seconds: int) -> int:
        """The number of the bucket that a moment is in."""
        return bisect_right(self.starts, seconds) - 1

    def strays(self, until: int) -> list[int]:
        """The quarters of an hour, of days in UTC before `until`, that are not in the bucket that the noon
        of their day is in."""
        found: list[int] = []
        for start in self.starts:
            day = start - start % DAY
            if day < until:
                is_early = start <= day + NOON
                found += (
                    range(day, start, _QUARTER) if is_early else range(start, day + DAY, _QUARTER)
                )
        return found

    @property
    def is_utc(self) -> bool:
        """Whether clocks there show UTC all the time."""
        return all(each == 0 for _, each in self.offsets)


def _buckets(zone: ZoneInfo, starts: list[int]) -> Buckets:
    # A day that clocks leave out (Samoa, 30 December 2011) begins where the next one does.
    kept = tuple(dict.fromkeys(starts))
    return Buckets(kept, tuple(offsets(zone, kept[0], kept[-1])))


@lru_cache(maxsize=256)
def buckets(timezone: str, granularity: Granularity, begin: int, end: int) -> Buckets:
    """Those that have anything of the range: it is widened to whole ones."""
    zone = zone_of(timezone)
    starts: list[int] = []
    for start in _from(zone, granularity, begin):
        starts.append(start)
        if start >= end:
            break
    return _buckets(zone, starts)


@lru_cache(maxsize=256)
def compared(
    timezone: str, granularity: Granularity, shown: Buckets, comparison: Comparison
) -> Buckets:
    """As many buckets of an earlier time, the first beside the first; by the calendar there."""
    zone, count = zone_of(timezone), len(shown)
    begin = shown.begin
    if granularity in (Granularity.MINUTE, Granularity.HOUR):
        if comparison is Comparison.PREVIOUS_PERIOD:
            first = begin - (shown.end - begin)
        else:
            first = _earlier(zone, begin, comparison)
    else:
        day = datetime.fromtimestamp(begin, zone).date()
        first = _midnight(zone, _earlier_day(day, granularity, count, comparison))
    starts: list[int] = []
    for start in _from(zone, granularity, first):
        starts.append(start)
        if len(starts) > count:
            break
    return _buckets(zone, starts)


def _earlier(zone: ZoneInfo, at: int, comparison: Comparison) -> int:
    """The same time on the clock, on an earlier day."""
    local = datetime.fromtimestamp(at, zone)
    day = _day_before(local.date(), comparison)
    return int(datetime.combine(day, local.time(), tzinfo=zone).timestamp())


def _earlier_day(day: date, granularity: Granularity, count: int, comparison: Comparison) -> date:
    if comparison is Comparison.PREVIOUS_PERIOD:
        if granularity is Granularity.MONTH:
            return _months_later(day, -count)
        return day - timedelta(days=count * (7 if granularity is Granularity.WEEK else 1))
    if comparison is Comparison.PREVIOUS_YEAR and granularity is Granularity.WEEK:
        return day - timedelta(weeks=52)
    return _day_before(day, comparison)


def _day_before(day: date, comparison: Comparison) -> date:
    if comparison is Comparison.PREVIOUS_WEEK:
        return day - timedelta(days=7)
    if (day.month, day.day) == (2, 29):
        return day.replace(year=day.year - 1, day=28)
    return day.replace(year=day.year - 1)


def _months_later(day: date, months: int) -> date:
    years, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(years, month + 1, 1)


def _midnight(zone: ZoneInfo, day: date) -> int:
    """When a day begins there: where clocks leave midnight out, when they go on."""
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp())


def _from(zone: ZoneInfo, granularity: Granularity, at: int) -> Iterator[int]:
    """When the bucket begins that a moment is in, and then each one after it."""
    if granularity is Granularity.MINUTE:
        yield from _minutes(at)
    elif granularity is Granularity.HOUR:
        yield from _hours(zone, at)
    else:
        day = datetime.fromtimestamp(at, zone).date()
        if granularity is Granularity.WEEK:
            day -= timedelta(days=day.weekday())
        elif granularity is Granularity.MONTH:
            day = day.replace(day=1)
        while True:
            yield _midnight(zone, day)
            if granularity is Granularity.MONTH:
                day = _months_later(day, 1)
            else:
                day += timedelta(days=7 if granularity is Granularity.WEEK else 1)


def _minutes(at: int) -> Iterator[int]:
    at -= at % MINUTE
    while True:
        yield at
        at += MINUTE


def _hours(zone: ZoneInfo, at: int) -> Iterator[int]:
    """Whole hours of the clock; where it is changed by half an hour, one more begins there."""
    start = at - (at + offset(zone, at)) % HOUR
    if (offset(zone, start) - offset(zone, at)) % HOUR:
        start = _quarter(_change(zone, start, at))
    while True:
        yield start
        following = start + HOUR - (start + offset(zone, start)) % HOUR
        if (offset(zone, following) - offset(zone, start)) % HOUR:
            following = _quarter(_change(zone, start, following))
        start = following


def _quarter(at: int) -> int:
    """Rows are not divided further."""
    return at - at % _QUARTER
