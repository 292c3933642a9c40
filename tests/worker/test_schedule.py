"""Jobs by the clock: one for each slot, and of those that were missed the latest."""

from datetime import UTC, datetime, timedelta

import pytest

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.worker.schedule import SCHEDULE, Clock, Periodic
from modelharbor.worker.tools import Tools

from .conftest import Hall

DAILY = Periodic(JobKind.GARBAGE_COLLECT, timedelta(days=1), timedelta(hours=3), {"n": 1})


@pytest.mark.parametrize(
    ("now", "slot"),
    [
        ("2026-03-01T02:59:59.999", "2026-02-28T03:00:00"),
        ("2026-03-01T03:00:00", "2026-03-01T03:00:00"),
        ("2026-03-01T23:00:00", "2026-03-01T03:00:00"),
    ],
)
def test_a_slot_is_the_latest_that_is_due(now: str, slot: str) -> None:
    moment = datetime.fromisoformat(now).replace(tzinfo=UTC)
    assert DAILY.slot(moment) == datetime.fromisoformat(slot).replace(tzinfo=UTC)


def test_what_is_put_by_the_clock() -> None:
    assert [(each.kind, each.every, each.input) for each in SCHEDULE] == [
        (JobKind.GARBAGE_COLLECT, timedelta(days=1), {}),
        (JobKind.ROLLUP_ANALYTICS, timedelta(days=1), {}),
        (JobKind.EXPIRE_UPLOADS, timedelta(minutes=10), {"sweep": False}),
        (JobKind.EXPIRE_UPLOADS, timedelta(days=1), {}),
        (JobKind.VERIFY_BLOBS, timedelta(days=7), {}),
    ]


@pytest.mark.anyio
async def test_slots_of_one_kind_are_apart(database: Database) -> None:
    clock = Clock(SCHEDULE, {JobKind.EXPIRE_UPLOADS})
    night = datetime(2026, 3, 2, 4, tzinfo=UTC)
    for minutes in (4, 5, 9, 10, 11):
        await clock.put_due(database, night + timedelta(minutes=minutes))
    rows = await database.find("jobs", {}, sort={"_id": 1})
    assert [(row["idempotency_key"], row["input"]) for row in rows] == [
        ("EXPIRE_UPLOADS@2026-03-02T04:00:00Z", {"sweep": False}),
        ("EXPIRE_UPLOADS@2026-03-01T04:05:00Z", {}),
        ("EXPIRE_UPLOADS@2026-03-02T04:05:00Z", {}),
        ("EXPIRE_UPLOADS@2026-03-02T04:10:00Z", {"sweep": False}),
    ]


@pytest.mark.anyio
async def test_each_slot_is_put_once_by_whoever_comes_first(database: Database) -> None:
    clocks = [Clock([DAILY], {JobKind.GARBAGE_COLLECT}) for _ in range(3)]
    monday = datetime(2026, 3, 2, 12, tzinfo=UTC)
    for now in (monday, monday + timedelta(hours=1), monday + timedelta(days=5)):
        for clock in clocks:
            await clock.put_due(database, now)
    assert await Clock([DAILY], {JobKind.REINDEX}).put_due(database, monday) == []
    rows = await database.find("jobs", {}, sort={"_id": 1})
    assert [(row["idempotency_key"], row["input"]) for row in rows] == [
        ("GARBAGE_COLLECT@2026-03-02T03:00:00Z", {"n": 1}),
        ("GARBAGE_COLLECT@2026-03-07T03:00:00Z", {"n": 1}),  # those between are skipped
    ]
    assert {tuple(row["principals"]) for row in rows} == {("operator",)}
    assert {row["created_by_id"] for row in rows} == {None}


@pytest.mark.anyio
async def test_workers_put_and_run_what_is_due(hall: Hall) -> None:
    ran = []

    async def handler(job: Row, tools: Tools) -> None:
        ran.append(job["input"])

    async with (
        hall.working({JobKind.GARBAGE_COLLECT: handler}, schedule=[DAILY]),
        hall.working({JobKind.GARBAGE_COLLECT: handler}, schedule=[DAILY]),
    ):

        async def check() -> bool:
            return await hall.database.count("jobs", {"state": "SUCCEEDED"}) == 1

        await hall.until(check)
    assert ran == [{"n": 1}]
