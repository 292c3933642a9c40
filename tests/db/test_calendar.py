"""Days and hours as clocks on the wall have them."""

from datetime import UTC, datetime, timedelta

import pytest

from modelharbor.db.calendar import Buckets, buckets, compared, moment, seconds_of, timezones
from modelharbor.db.metrics import Comparison, Granularity

C, G = Comparison, Granularity


def of(zone: str, granularity: Granularity, begin: str, end: str) -> Buckets:
    first, last = (
        seconds_of(datetime.fromisoformat(each).replace(tzinfo=UTC)) for each in (begin, end)
    )
    return buckets(zone, granularity, first, last)


def starts(found: Buckets) -> list[str]:
    return [f"{moment(each):%Y-%m-%d %H:%M}" for each in found.starts]


def hours(found: Buckets) -> list[float]:
    return [
        (end - start) / 3600 for start, end in zip(found.starts, found.starts[1:], strict=False)
    ]


@pytest.mark.parametrize(
    ("zone", "granularity", "begin", "end", "expected"),
    [
        # Back by half an hour at two: from half past one on twice.
        ("Australia/Lord_Howe", G.HOUR, "2026-04-04 14:10", "2026-04-04 17:00", [1, 0.5, 1, 1]),
        # On by half an hour at two: until half past two there is nothing.
        ("Australia/Lord_Howe", G.HOUR, "2026-10-03 14:40", "2026-10-03 17:00", [1, 0.5, 1]),
        ("Australia/Lord_Howe", G.DAY, "2026-04-03", "2026-04-06", [24, 24, 24.5, 24]),
        # Midnight is left out, and there twice.
        ("America/Sao_Paulo", G.DAY, "2018-11-03 12:00", "2018-11-05 12:00", [24, 23, 24]),
        ("America/Sao_Paulo", G.DAY, "2018-02-17 12:00", "2018-02-18 12:00", [25, 24]),
        ("Europe/Berlin", G.DAY, "2026-03-28 12:00", "2026-03-30 12:00", [24, 23, 24]),
        ("Europe/Berlin", G.HOUR, "2026-10-25 00:00", "2026-10-25 03:00", [1, 1, 1]),
        ("Europe/Berlin", G.MONTH, "2026-03-05", "2026-03-06", [743]),
        ("Europe/Berlin", G.WEEK, "2026-10-22", "2026-10-23", [169]),
        # A minute after midnight clocks went back to eleven: the day is 25 hours long all the same.
        ("America/St_Johns", G.DAY, "2010-11-07 12:00", "2010-11-07 13:00", [25]),
        # Samoa had no 30 December in 2011.
        ("Pacific/Apia", G.DAY, "2011-12-29 12:00", "2011-12-30 12:00", [24, 24]),
        ("Asia/Kathmandu", G.MINUTE, "2026-01-01 00:00:30", "2026-01-01 00:02", [1 / 60] * 2),
    ],
)
def test_buckets_are_as_long_as_clocks_make_them(
    zone: str, granularity: Granularity, begin: str, end: str, expected: list[float]
) -> None:
    assert hours(of(zone, granularity, begin, end)) == pytest.approx(expected)


def test_a_range_is_widened_to_whole_buckets() -> None:
    found = of("Asia/Kathmandu", G.DAY, "2026-01-01 18:15", "2026-01-02 18:15")
    assert starts(found) == ["2026-01-01 18:15", "2026-01-02 18:15"]
    found = of("Asia/Kathmandu", G.WEEK, "2026-01-07 18:14", "2026-01-07 18:16")
    assert starts(found) == ["2026-01-04 18:15", "2026-01-11 18:15"]
    found = of("UTC", G.MONTH, "2026-01-31 23:59", "2026-02-01 00:01")
    assert starts(found) == ["2026-01-01 00:00", "2026-02-01 00:00", "2026-03-01 00:00"]
    assert [
        found.at(seconds_of(datetime(2026, 2, 1, tzinfo=UTC) + timedelta(seconds=n)))
        for n in (-1, 0)
    ] == [0, 1]


@pytest.mark.parametrize(
    ("zone", "granularity", "begin", "end", "comparison", "expected"),
    [
        ("UTC", G.DAY, "2024-02-29", "2024-03-02", C.PREVIOUS_YEAR, "2023-02-28 00:00"),
        ("UTC", G.WEEK, "2026-02-16", "2026-02-17", C.PREVIOUS_YEAR, "2025-02-17 00:00"),
        ("UTC", G.MONTH, "2026-02-16", "2026-04-02", C.PREVIOUS_PERIOD, "2025-11-01 00:00"),
        ("UTC", G.MONTH, "2026-02-16", "2026-04-02", C.PREVIOUS_YEAR, "2025-02-01 00:00"),
        # Clocks were changed on the 29th.
        ("Europe/Berlin", G.DAY, "2026-03-30 12:00", "2026-03-31 12:00", C.PREVIOUS_WEEK, "2026-03-22 23:00"),
        ("Europe/Berlin", G.HOUR, "2026-03-30 12:00", "2026-03-30 13:00", C.PREVIOUS_WEEK, "2026-03-23 13:00"),
        ("Europe/Berlin", G.HOUR, "2026-03-29 02:00", "2026-03-29 04:00", C.PREVIOUS_PERIOD, "2026-03-29 00:00"),
        ("Europe/Berlin", G.WEEK, "2026-03-30 12:00", "2026-03-31 12:00", C.PREVIOUS_PERIOD, "2026-03-22 23:00"),
    ],
)  # fmt: skip
def test_what_is_compared_is_as_many_buckets_by_the_calendar(
    zone: str, granularity: Granularity, begin: str, end: str, comparison: Comparison, expected: str
) -> None:
    shown = of(zone, granularity, begin, end)
    earlier = compared(zone, granularity, shown, comparison)
    assert starts(earlier)[0] == expected
    assert len(earlier) == len(shown)


def test_names_of_timezones_are_no_paths() -> None:
    assert {"UTC", "Europe/Berlin", "Asia/Kathmandu"} <= timezones()
    assert timezones().isdisjoint({"", ".", "..", "/etc/passwd", "localtime", "Factory", "Europe"})
