"""Changes of a job's state: by compare-and-set, each with its event in the same transaction."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from beanie import PydanticObjectId
from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventDocument, Stream
from modelharbor.db.jobs import ENDED, HELD, JobState

S = JobState
TRANSITIONS: Final[Mapping[JobState, frozenset[JobState]]] = {
    S.QUEUED: frozenset({S.RUNNING, S.CANCELLED}),
    # QUEUED: handed back, by a worker that ends, waits for children, or has died.
    S.RUNNING: frozenset({S.SUCCEEDED, S.FAILED, S.RETRYING, S.CANCELLING, S.QUEUED, S.DEAD}),
    S.RETRYING: frozenset({S.RUNNING, S.CANCELLED, S.QUEUED}),
    S.CANCELLING: frozenset({S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset({S.QUEUED}),
    S.CANCELLED: frozenset({S.QUEUED}),
    S.DEAD: frozenset({S.QUEUED}),
}
"""From each state, those that may follow: any other change is INVALID_TRANSITION."""

SOURCES: Final[Mapping[JobState, list[str]]] = {
    to: [source.value for source in JobState if to in TRANSITIONS[source]] for to in JobState
}
CLAIMABLE: Final[Row] = {
    "$expr": {"$lte": ["$run_after", "$$NOW"]},
    "$or": [{"awaits_children": False}, {"open_children": 0}],
}
"""Of the jobs that wait: their time has come."""

NOT_HELD: Final[Row] = {"worker": None, "lease_until": None, "heartbeat_at": None}
HIDDEN: Final = frozenset(
    {"input", "scopes", "token", "touched", "worker", "lease_until", "turn", "checkpoint"}
)


def snapshot(row: Row) -> Row:
    """The job as an event keeps it: without what only its worker needs."""
    return {name: value for name, value in row.items() if name not in HIDDEN}


async def change_state(
    database: Database,
    session: AsyncClientSession,
    query: Row,
    to: JobState,
    update: list[Row] | None = None,
    *,
    actor_id: ObjectId | None = None,
    comment: str | None = None,
) -> Row | None:
    """The job that `query` finds, in its new state; None where none is found in a state that `to` may
    follow.

    `update` are stages of an update pipeline, run after the change itself: values that come from
    outside belong into `$literal`. A job that ends is one less that its parent waits for, one that
    is queued again is one more.
    """
    jobs = database.data["jobs"]
    allowed = {"$and": [query, {"state": {"$in": SOURCES[to]}}]}
    reopened = False
    if to is JobState.QUEUED:
        before = await jobs.find_one(
            allowed, {"state": 1}, session=session, max_time_ms=database.query_timeout_ms
        )
        if before is None:
            return None
        # Within the snapshot: were it changed meanwhile, the update would collide.
        allowed = {"_id": before["_id"], "state": before["state"]}
        reopened = JobState(before["state"]) in ENDED
    changed: Row = {
        "state": to.value,
        "finished_at": "$$NOW" if to in ENDED else None,
        "progress.sequence": {"$add": ["$progress.sequence", 1]},
        "progress.updated_at": "$$NOW",
        **({} if to in HELD else NOT_HELD),
    }
    row: Row | None = await jobs.find_one_and_update(
        allowed,
        [{"$set": changed}, *(update or [])],
        session=session,
        return_document=ReturnDocument.AFTER,
    )
    if row is None:
        return None
    if row["parent_id"] is not None and (to in ENDED or reopened):
        await jobs.update_one(
            {"_id": row["parent_id"]},
            {"$inc": {"open_children": -1 if to in ENDED else 1}},
            session=session,
        )
    await tell(session, row, actor_id=actor_id, comment=comment)
    return row


async def tell(
    session: AsyncClientSession,
    row: Row,
    *,
    actor_id: ObjectId | None = None,
    comment: str | None = None,
) -> None:
    """Write the event of a job that is new or has changed its state."""
    await _event(row, actor_id, comment).insert(session=session)


async def tell_all(session: AsyncClientSession, rows: Sequence[Row]) -> None:
    """The same of several, in one command."""
    await EventDocument.insert_many([_event(row, None, None) for row in rows], session=session)


def _event(row: Row, actor_id: ObjectId | None, comment: str | None) -> EventDocument:
    subject: Mapping[str, Any] = row["subject"] or {}
    about = [row["_id"], row["parent_id"], subject.get("id"), row["created_by_id"]]
    return EventDocument(
        stream=Stream.JOBS,
        about=[PydanticObjectId(each) for each in dict.fromkeys(about) if each is not None],
        principals=row["principals"],
        job_id=row["_id"],
        actor_id=PydanticObjectId(actor_id) if actor_id else None,
        job=snapshot(row),
        comment=comment,
    )
