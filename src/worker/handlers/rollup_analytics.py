"""ROLLUP_ANALYTICS: what is not done all the time (worker/rolling_up.py). All models are compared with what
they are counted as; or days are rolled up again, from their events.

Both in parts, each under the lease of the rollups: what is live goes on between two of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from time import monotonic
from typing import Final

from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import Level
from modelharbor.db.rollups import DIMENSIONS, Grain, bucket_query, bucket_starts, naive
from modelharbor.db.usage import collection_of, day_of
from modelharbor.worker.rolling_up import holding, told
from modelharbor.worker.rollups import DAY, Adding, aware, ensure_state
from modelharbor.worker.tools import Tools
from modelharbor.worker.usage_intake import Intake, mark_day

from .checkpoints import Checkpoint

PART_SECONDS: Final = 2.0
EVENTS_AT_ONCE: Final = 300_000  # of a few days, under the lease: what is live waits for it


async def roll_up_usage(job: Row, tools: Tools) -> Row:
    """Input: {} compares models; {from, to} rolls up days again, None: from the first one whose events
    are there, to today. Result: {models}, or {days, events, skipped}: days that have rows, but no events
    any more; their rows stay."""
    state = await ensure_state(tools.database, tools.settings, utc_now())
    if "from" not in job["input"]:
        return await _compare(tools)
    return await _backfill(tools, job["input"]["from"], job["input"]["to"], state)


async def _compare(tools: Tools) -> Row:
    database, settings = tools.database, tools.settings
    done = Checkpoint(tools, {"after": None, "models": 0})
    total = await database.count("models", {})
    is_more = True
    while is_more:
        _report(tools, done.values["models"], total, "models")
        after, models = done.values["after"], done.values["models"]
        until = monotonic() + PART_SECONDS
        async with holding(database, settings, tools.check) as mine:
            state = await ensure_state(mine, settings, utc_now())
            intake = Intake(Adding(mine, settings, state, tools.check), naive(utc_now()))
            while is_more:
                after, count = await intake.compare(after)
                models += count
                is_more = after is not None
                if monotonic() > until:
                    break
            await told(mine, tools.cache, settings, tools.check)
        await done.advance(partial(_so_far, {"after": after, "models": models}))
    _report(tools, models, total, "models")
    return {"models": models}


async def _backfill(tools: Tools, first: datetime | None, last: datetime | None, state: Row) -> Row:
    database, settings = tools.database, tools.settings
    whole_from, today = naive(state["whole_from"]), naive(day_of(utc_now()))
    end = today if last is None else min(naive(last), today)
    start, skipped = whole_from if first is None else naive(first), 0
    if start < whole_from:
        tools.log(
            f"Events of before {whole_from:%Y-%m-%d} are not kept: rows of those days stay.",
            Level.WARNING,
        )
        began = whole_from if state.get("began") is None else naive(state["began"])
        skipped = max(0, (min(whole_from, end + DAY) - max(start, began)).days)
        start = whole_from
    days = []
    for day in bucket_starts(Grain.DAY, start, end + DAY):
        if await _can_be_made(database, day):
            days.append(day)
            continue
        tools.log(f"There are no events of {day:%Y-%m-%d}: its rows stay.", Level.WARNING)
        skipped += 1
    counts = {
        day: await database.data[collection_of(aware(day))].estimated_document_count()
        for day in days
    }
    total = sum(counts.values())
    done = Checkpoint(tools, {"day": None, "days": 0, "events": 0})
    if done.values["day"] is not None:
        days = [day for day in days if day > naive(done.values["day"])]
    for some in _together(days, counts):
        _report(tools, done.values["events"], total, "events", f"{some[0]:%Y-%m-%d}")
        async with holding(database, settings, tools.check) as mine:
            # Marked only now: else others would do it, and nobody could say how far it is.
            for day in some:
                await mark_day(mine.data, day)
            while (await told(mine, tools.cache, settings, tools.check)).is_moving:
                pass
        values = {
            "day": some[-1],
            "days": done.values["days"] + len(some),
            "events": done.values["events"] + sum(counts[day] for day in some),
        }
        await done.advance(partial(_so_far, values))
    _report(tools, done.values["events"], total, "events")
    return {"days": done.values["days"], "events": done.values["events"], "skipped": skipped}


async def _can_be_made(database: Database, day: datetime) -> bool:
    """From its events, or because it has nothing to lose: collections may have been dropped by hand, or
    left out of a backup, and rows written without events."""
    if await database.find(collection_of(aware(day)), {}, projection={"_id": 1}, limit=1):
        return True
    rows = bucket_query(tuple(DIMENSIONS), day, day + DAY)
    return not await database.find(Grain.DAY.value, rows, projection={"_id": 1}, limit=1)


def _together(days: Sequence[datetime], counts: Mapping[datetime, int]) -> Iterator[list[datetime]]:
    """Days that are rolled up in one run: each writes the stats of all models that it concerns."""
    some: list[datetime] = []
    events = 0
    for day in days:
        if some and events + counts[day] > EVENTS_AT_ONCE:
            yield some
            some, events = [], 0
        some.append(day)
        events += counts[day]
    if some:
        yield some


def _report(tools: Tools, done: int, total: int, unit: str, message: str | None = None) -> None:
    tools.report(done, max(total, done), unit=unit, message=message)


async def _so_far(values: Row, session: AsyncClientSession) -> Row:
    return values
