"""MongoDB's change stream, with places in the log, from any place on, again and again."""

from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from bson import Timestamp
from bson.codec_options import CodecOptions
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from modelharbor.db.base import Row
from modelharbor.db.connection import Database

from .position import position_of

WAIT_MS: Final = 1000
"""How long MongoDB waits for a change before it says that there is none; a change is sent at once."""
HISTORY_LOST: Final = 286  # MongoDB's error code


class HistoryLost(Exception):
    """The changes since a place are gone from MongoDB's own log."""


@dataclass(slots=True)
class Place:
    """How far a stream was followed: all before `time`, and the first `seen` changes at it."""

    time: Timestamp
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    position: str
    change: Row | None
    """As MongoDB tells it, with times in UTC that do not say so; None: there is none just now, and
    nothing before `position` will come any more."""


async def now_of(data: AsyncDatabase[Row]) -> Timestamp:
    """The cluster's time: of the last write, or a later one."""
    time: Timestamp = (await data.command("hello"))["operationTime"]
    return time


async def follow(
    database: Database, pipeline: list[Row], place: Place
) -> AsyncGenerator[Found, None]:
    """Every change that the pipeline lets pass, in the order of commits, from `place` on, which moves
    with it. The first that comes is one without a change, as soon as the stream is open.

    Events in it are counted, so the pipeline lets pass either all inserts into `events` or none.
    Always opened at a time, never in the middle of a commit, where the count would not be known.
    Raises HistoryLost, and whatever PyMongo raises; another call with the same `place` goes on.
    """
    plain: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=False)
    data = database.data.with_options(codec_options=plain)
    time, skipped, seen, events = place.time, place.seen, 0, 0
    try:
        async with await data.watch(
            pipeline, start_at_operation_time=time, max_await_time_ms=WAIT_MS
        ) as stream:
            yield Found(position_of(time, 0), None)
            while stream.alive:
                change = await stream.try_next()
                if change is None:
                    reached = _reached(stream.resume_token)
                    if reached is not None and reached > time:
                        time, skipped, seen, events = reached, 0, 0, 0
                        place.time, place.seen = time, 0
                    yield Found(position_of(time, 0), None)
                    continue
                at = change["clusterTime"]
                if at != time:
                    time, skipped, seen, events = at, 0, 0, 0
                seen += 1
                if change["ns"]["coll"] == "events":
                    events += 1
                if seen <= skipped:
                    continue
                place.time, place.seen = time, seen
                yield Found(position_of(time, events + 1), dict(change))
    except OperationFailure as error:
        if error.code == HISTORY_LOST:
            raise HistoryLost from error
        raise
    raise HistoryLost("the database was dropped")


def _reached(token: Any) -> Timestamp | None:
    """The time of a resume token. Not documented; without it a place where nothing happens stays
    where it is, and may be older than MongoDB's log when it is needed."""
    with suppress(TypeError, KeyError, ValueError):
        text = token["_data"]
        if text[:2] == "82":  # a timestamp follows
            return Timestamp(int(text[2:10], 16), int(text[10:18], 16))
    return None
