"""How models and the API are used: raw events, one collection for each UTC day.

A day's collection is ordinary, not a time-series one, for that takes the same id twice; it is dropped
whole when it is older than `usage_days`. Events are read by the rollups alone (db/rollups.py).
"""

from datetime import UTC, datetime
from enum import Enum
from typing import Final

from pymongo import ASCENDING, IndexModel

from .base import BaseDocument


class UsageKind(Enum):
    DOWNLOAD = "download"
    VIEW = "view"
    UPLOAD = "upload"
    LIKE = "like"
    OPERATION = "operation"
    JOB = "job"
    STORAGE = "storage"
    MODEL = "model"
    VERSION = "version"


PREFIX: Final = "usage_"
HISTOGRAM_STEPS: Final = 80
"""Of latencies: step n holds what took up to 0.1 ms x 2^(n / 4), the last one all beyond it too; so a
percentile is known to a fifth, 2^(1/4)."""
EVENT_INDEX: Final = IndexModel([("at", ASCENDING)], name="at")


def day_of(at: datetime) -> datetime:
    """The first moment of its day, UTC."""
    return at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def collection_of(at: datetime) -> str:
    """The name of the collection of its day: `usage_20261126`."""
    return f"{PREFIX}{at.astimezone(UTC):%Y%m%d}"


def day_of_collection(name: str) -> datetime | None:
    """The day that a collection is of; None for any other collection."""
    digits = name.removeprefix(PREFIX)
    if digits == name or len(digits) != 8 or not digits.isascii() or not digits.isdigit():
        return None
    try:
        return datetime.strptime(digits, "%Y%m%d").replace(tzinfo=UTC)
    except ValueError:
        return None


def minute_of(at: datetime) -> datetime:
    return at.replace(second=0, microsecond=0)


def quarter_of(at: datetime) -> datetime:
    """The first moment of its quarter of an hour: all timezones begin their days and hours at one."""
    return at.replace(minute=at.minute // 15 * 15, second=0, microsecond=0)


def latency_step(milliseconds: float) -> int:
    """The step of the histogram that a latency is counted in."""
    step = 0
    bound = 0.1
    while milliseconds > bound and step < HISTOGRAM_STEPS - 1:
        step += 1
        bound = 0.1 * 2 ** (step / 4)
    return step


def latency_of(step: int) -> float:
    """The most milliseconds that a latency of a step took."""
    found: float = 0.1 * 2 ** (step / 4)
    return found


WHOLE_DAY: Final = "day"
"""For the process of a dirty minute: all of its day is to be made anew, whatever its events are."""


class DirtyMinuteDocument(BaseDocument):
    """A minute to which events were added that are not rolled up yet, by one process. Written in the
    transaction that inserts the events, so that no event is there without it; whoever rolls up deletes
    it if it is still at the `marks` that was read before."""

    minute: datetime
    process: str
    marks: int  # how many transactions did

    class Settings:
        name = "usage_dirty"
        indexes = [
            IndexModel([("minute", ASCENDING), ("process", ASCENDING)], name="minute", unique=True)
        ]
