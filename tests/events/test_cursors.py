"""Places in the log and the cursors made of them: exact, ordered, refused where they are not ours."""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from bson import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from modelharbor.errors import BadUserInput, CursorExpired
from modelharbor.events.cursors import decode, encode
from modelharbor.events.position import START, before, position_of, seconds_of, time_of

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SECONDS = int(NOW.timestamp())
words = st.integers(0, 2**32 - 1)
times = st.builds(Timestamp, words, words)


@given(times, words, times, words)
def test_places_sort_as_times_and_numbers(
    time: Timestamp, number: int, other: Timestamp, another: int
) -> None:
    place, second = position_of(time, number), position_of(other, another)
    assert (place < second) == ((time, number) < (other, another))
    assert (len(place), time_of(place), seconds_of(place)) == (24, time, time.time)
    assert place >= START


@given(st.builds(Timestamp, st.integers(1, 2**32 - 1), words), words)
def test_before_a_time_is_nothing_of_it_and_all_of_earlier_ones(
    time: Timestamp, number: int
) -> None:
    assert position_of(before(time), number) < position_of(time, 0)
    later = Timestamp(before(time).time, before(time).inc)
    assert (later.time << 32 | later.inc) + 1 == time.time << 32 | time.inc


@given(st.text(), words, words, st.integers(0, 2**64 - 1))
def test_a_cursor_gives_back_what_it_was_made_of(
    stream: str, inc: int, number: int, sequence: int
) -> None:
    position = position_of(Timestamp(SECONDS, inc), number)
    cursor = encode(stream, position, sequence)
    assert len(cursor) == 38
    assert set(cursor) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert decode(stream, cursor, now=NOW, days=30) == (position, sequence)
    assert decode(stream, cursor, now=NOW.replace(tzinfo=None), days=30) == (position, sequence)


CURSOR = encode("jobProgress", position_of(Timestamp(SECONDS, 1), 2), 3)


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        CURSOR[:-1],
        CURSOR + "A",
        CURSOR + "==",
        CURSOR[:-1] + ("B" if CURSOR[-1] == "A" else chr(ord(CURSOR[-1]) + 1)),  # spare bits
        "é" * 38,
        "\0" * 38,
        "+" * 38,
        " " + CURSOR[1:],
        base64.urlsafe_b64encode(bytes(28)).decode().rstrip("="),
        encode("jobProgress ", position_of(Timestamp(SECONDS, 1), 2), 3),
        encode("jobs", position_of(Timestamp(SECONDS, 1), 2), 3),
    ],
)
def test_what_is_no_cursor_of_this_stream_is_refused(cursor: str) -> None:
    with pytest.raises(BadUserInput, match="no cursor of this subscription"):
        decode("jobProgress", cursor, now=NOW, days=30)


@given(st.text(max_size=50))
def test_any_text_is_refused_or_read(cursor: str) -> None:
    with pytest.raises(BadUserInput):
        decode("jobProgress", cursor, now=NOW, days=30)


@pytest.mark.parametrize(
    ("seconds", "refusal"),
    [
        (0, None),
        (30 * 86_400, None),
        (30 * 86_400 + 1, CursorExpired),
        (SECONDS, CursorExpired),
        (-60, None),
        (-61, BadUserInput),
    ],
)
def test_a_cursor_is_good_for_some_days(seconds: int, refusal: type[Exception] | None) -> None:
    at = NOW - timedelta(seconds=seconds)
    position = position_of(Timestamp(int(at.timestamp()), 7), 2)
    cursor = encode("s", position, 0)
    if refusal is None:
        assert decode("s", cursor, now=NOW, days=30) == (position, 0)
    else:
        with pytest.raises(refusal):
            decode("s", cursor, now=NOW, days=30)
