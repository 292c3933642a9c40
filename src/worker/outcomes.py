"""What an attempt comes to: from how its handler ended to the job's next state."""

import asyncio
import logging
import random
from dataclasses import dataclass, field
from typing import Final

import bson
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobState
from modelharbor.errors import RateLimited, Refused, Timeout, Unavailable
from modelharbor.execution.failures import expected
from modelharbor.jobs.states import change_state
from modelharbor.observability.logging import log_event
from modelharbor.observability.sentry import capture

from .claims import claim_of
from .interruptions import AwaitChildren, JobCancelled
from .reports import Reports, literal

log = logging.getLogger(__name__)
FIRST_BACKOFF_SECONDS: Final = 1.0
LONGEST_BACKOFF_SECONDS: Final = 300.0
MOST_RESULT_BYTES: Final = 256 * 1024
INTERNAL: Final = "INTERNAL"
MASKED: Final = "Something unexpected went wrong; the log of the worker tells it whole."
PASSING: Final = (Unavailable, Timeout, RateLimited)  # the same attempt may succeed later


@dataclass(frozen=True, slots=True)
class Outcome:
    to: JobState
    values: Row = field(default_factory=dict)
    stages: Row = field(default_factory=dict)
    """Expressions of an update pipeline."""


UNCOUNTED: Final[Row] = {"attempt": {"$subtract": ["$attempt", 1]}}
HANDED_BACK: Final = Outcome(JobState.QUEUED, stages=UNCOUNTED)
CANCELLED: Final = Outcome(JobState.CANCELLED)


def succeeded(result: Row | None, job: Row) -> Outcome:
    """Or failed, where the result cannot be stored or is too large: events carry it, and one beyond
    16 MB would stop all who follow them."""
    try:
        size = 0 if result is None else len(bson.encode(result))
        if size > MOST_RESULT_BYTES:
            raise ValueError(f"the result has {size} bytes, over {MOST_RESULT_BYTES}")
    except Exception as error:
        return _failed(*unexpected(error, job), None)
    return Outcome(JobState.SUCCEEDED, {"result": result, "error": None})


def after(error: BaseException, job: Row) -> Outcome:
    """What an exception of the handler comes to; unexpected ones are logged and reported."""
    if isinstance(error, AwaitChildren):
        return Outcome(JobState.QUEUED, {"awaits_children": True}, UNCOUNTED)
    if isinstance(error, JobCancelled):
        return CANCELLED
    if isinstance(error, Refused):
        return _failed(error.code.value, error.message, error.path)
    known = None if isinstance(error, RecursionError) else expected(error)
    if known is None:
        return _again(job, *unexpected(error, job))
    if isinstance(known, PASSING):
        return _again(job, known.code, known.message)
    return _failed(known.code, known.message, None)


def unexpected(error: BaseException, job: Row) -> tuple[str, str]:
    """Code and message for who looks at the job: masked."""
    log.error("job.broke job_id=%s kind=%s", job["_id"], job["kind"], exc_info=error)
    capture(error)
    return INTERNAL, MASKED


def _failed(code: str, message: str, path: list[str] | None) -> Outcome:
    failure = {"code": code, "message": message, "path": path}
    return Outcome(JobState.FAILED, {"error": failure})


def _again(job: Row, code: str, message: str) -> Outcome:
    if job["attempt"] >= job["max_attempts"]:
        return _failed(code, message, None)
    milliseconds = int(backoff_seconds(job["attempt"]) * 1000)
    return Outcome(
        JobState.RETRYING,
        {"error": {"code": code, "message": message, "path": None}},
        {"run_after": {"$add": ["$$NOW", milliseconds]}},
    )


def backoff_seconds(attempt: int) -> float:
    """After that many attempts: any time up to twice as long as the last time ("full jitter"), so
    that jobs which failed together do not come back together."""
    longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 30))
    return random.uniform(0, longest)


async def settle(database: Database, job: Row, reports: Reports, outcome: Outcome) -> Row | None:
    """The job in its new state, with what was reported last; None: it is not ours any more.

    A job that was cancelled meanwhile is CANCELLED, whatever its work came to.
    """
    id_, token = claim_of(job)

    async def work(session: AsyncClientSession) -> Row | None:
        for ending in (outcome, CANCELLED):
            update = {
                **literal({**reports.standing(), **ending.values}),
                **ending.stages,
            }
            row = await change_state(
                database,
                session,
                # Only what is held by this claim: a job that waits has the same token still.
                {"_id": id_, "token": token, "worker": job["worker"]},
                ending.to,
                [{"$set": update}],
            )
            if row is not None:
                await reports.save_lines(session)
                return row
        return None

    return await database.transaction(work)


async def settle_in_time(
    database: Database, job: Row, reports: Reports, outcome: Outcome
) -> Row | None:
    """`settle`, as often as it takes: until MongoDB says that it is done, or that the job is lost."""
    pause = 0.1
    while True:
        try:
            return await settle(database, job, reports, outcome)
        except Exception as error:
            if expected(error) is None or isinstance(error, RecursionError):
                if outcome.to is not JobState.SUCCEEDED:
                    raise
                # Its result cannot be stored: too large, or of no type that MongoDB knows.
                code, message = unexpected(error, job)
                outcome = _failed(code, message, None)
                continue
            log_event(log, logging.WARNING, "job.settle_failed", job_id=job["_id"], error=error)
        await asyncio.sleep(pause)
        pause = min(1.0, pause * 2)
