"""Jobs that are put by the clock.

A slot is the beginning of a period: a multiple of `every` since 1970, UTC, plus `offset`. Each slot
gives one job, put by whichever worker comes first (its idempotency key is `kind@slot`). When no
worker ran for a while, only the latest slot that was due is made up for; earlier ones are skipped.
So each kind is put at the first start of a worker too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import job_principals
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.jobs.put import put_job

PUT_SECONDS: Final = 2.0  # when others put the same slot's job, or one died of it
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Periodic:
    kind: JobKind
    every: timedelta
    offset: timedelta = timedelta()
    input: Row = field(default_factory=dict)

    def slot(self, now: datetime) -> datetime:
        """The latest that is due."""
        return EPOCH + self.offset + (now - EPOCH - self.offset) // self.every * self.every


SCHEDULE: Final[tuple[Periodic, ...]] = (
    Periodic(JobKind.GARBAGE_COLLECT, timedelta(days=1), timedelta(hours=3)),
    Periodic(JobKind.ROLLUP_ANALYTICS, timedelta(days=1), timedelta(minutes=20)),
    # All that ever arrived is listed only by night, between two of the others.
    Periodic(JobKind.EXPIRE_UPLOADS, timedelta(minutes=10), input={"sweep": False}),
    Periodic(JobKind.EXPIRE_UPLOADS, timedelta(days=1), timedelta(hours=4, minutes=5)),
    Periodic(JobKind.VERIFY_BLOBS, timedelta(days=7), timedelta(days=2, hours=1)),  # on Saturdays
)


class Clock:
    """Puts what is due, each slot once in a process: MongoDB is asked when a slot begins."""

    def __init__(self, schedule: Sequence[Periodic], kinds: Collection[JobKind]) -> None:
        self._schedule = [each for each in schedule if each.kind in kinds]
        self._put: list[datetime | None] = [None] * len(self._schedule)

    async def put_due(self, database: Database, now: datetime | None = None) -> list[Row]:
        """Jobs of slots that have begun; such as another worker has put are among them."""
        rows = []
        for number, each in enumerate(self._schedule):
            slot = each.slot(now or utc_now())
            if self._put[number] == slot:
                continue

            async def work(
                session: AsyncClientSession, each: Periodic = each, slot: datetime = slot
            ) -> Row:
                return await put_job(
                    database,
                    session,
                    kind=each.kind,
                    input=each.input,
                    principals=job_principals(),
                    idempotency_key=f"{each.kind.value}@{slot:%Y-%m-%dT%H:%M:%SZ}",
                )

            rows.append(await database.transaction(work, PUT_SECONDS))
            self._put[number] = slot
        return rows
