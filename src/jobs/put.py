"""Put a job into the queue: within the transaction of the change that needs it.

Among jobs of equal priority the one with the smallest `turn` is claimed first. A lane is what one
owner has of one kind. A new job's turn follows both the last one that waits in its lane and the
smallest one that waits in any, so lanes take turns, however many jobs one of them holds
(start-time fair queuing: Goyal, Vin, Cheng, 1996).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, WAITING, JobDocument, JobKind, JobState
from modelharbor.db.tokens import Permission

from .states import CLAIMABLE, change_state, tell, tell_all


async def put_job(
    database: Database,
    session: AsyncClientSession,
    *,
    kind: JobKind,
    input: Row,
    principals: Sequence[str],
    created_by_id: ObjectId | None = None,
    scopes: Sequence[Permission | str] = (),
    subject: Row | None = None,
    parent_id: ObjectId | None = None,
    idempotency_key: str | None = None,
    priority: int = 0,
    run_after: datetime | None = None,
    max_attempts: int = 5,
) -> Row:
    """The new job, or the one of this kind that has the same `idempotency_key`.

    `created_by_id`: who asked for it (None: the system), `scopes`: what their token allowed.
    `principals`: who may see it (auth/viewer.py, job_principals). `subject`: {type, id}.
    `run_after`: not before. A parent counts its children that have not ended.
    """
    jobs = database.data["jobs"]
    if idempotency_key is not None:
        found: Row | None = await jobs.find_one(
            {"kind": kind.value, "idempotency_key": idempotency_key},
            session=session,
            max_time_ms=database.query_timeout_ms,
        )
        if found is not None:
            return found
    row = JobDocument(
        kind=kind,
        input=input,
        scopes=[each.value if isinstance(each, Permission) else each for each in scopes],
        created_by_id=PydanticObjectId(created_by_id) if created_by_id else None,
        principals=list(principals),
        subject=subject,
        parent_id=PydanticObjectId(parent_id) if parent_id else None,
        idempotency_key=idempotency_key,
        priority=priority,
        turn=await next_turn(database, session, kind, created_by_id, priority),
        max_attempts=max_attempts,
        **({} if run_after is None else {"run_after": run_after}),
    )
    await row.insert(session=session)
    if parent_id is not None:
        await jobs.update_one({"_id": parent_id}, {"$inc": {"open_children": 1}}, session=session)
    stored: Row = get_dict(row, to_db=True)
    await tell(session, stored)
    return stored


@dataclass(frozen=True, slots=True)
class NewJob:
    """What `put_jobs` puts: see `put_job`."""

    input: Row
    subject: Row | None = None


async def put_jobs(
    database: Database,
    session: AsyncClientSession,
    new: Sequence[NewJob],
    *,
    kind: JobKind,
    principals: Sequence[str],
    created_by_id: ObjectId | None = None,
    scopes: Sequence[Permission | str] = (),
    max_attempts: int = 5,
) -> list[Row]:
    """Many jobs of one lane in few commands; no children, without idempotency keys. In their order."""
    if not new:
        return []
    turn = await next_turn(database, session, kind, created_by_id, 0)
    documents = [
        JobDocument(
            kind=kind,
            input=each.input,
            scopes=[scope.value if isinstance(scope, Permission) else scope for scope in scopes],
            created_by_id=PydanticObjectId(created_by_id) if created_by_id else None,
            principals=list(principals),
            subject=each.subject,
            turn=turn + place,
            max_attempts=max_attempts,
        )
        for place, each in enumerate(new)
    ]
    rows: list[Row] = [get_dict(document, to_db=True) for document in documents]
    await database.data["jobs"].insert_many(rows, session=session)
    await tell_all(session, rows)
    return rows


async def put_again(
    database: Database,
    session: AsyncClientSession,
    job: Row,
    *,
    actor_id: ObjectId | None = None,
    comment: str | None = None,
) -> Row:
    """QUEUED, with all its attempts to come, from the beginning: a job that FAILED, is DEAD or was
    CANCELLED, as this transaction has read it."""
    turn = await next_turn(
        database, session, JobKind(job["kind"]), job["created_by_id"], job["priority"]
    )
    progress = {"current": 0, "total": None, "rate": None, "message": None}
    fresh: Row = {
        **dict.fromkeys(("error", "result", "checkpoint", "started_at")),
        **dict.fromkeys(("attempt", "deaths"), 0),
        **{f"progress.{name}": value for name, value in progress.items()},
        "steps": [],
        "awaits_children": False,
        "turn": turn,
        "run_after": "$$NOW",
        "comment": {"$literal": comment},
    }
    row = await change_state(
        database,
        session,
        {"_id": job["_id"], "state": job["state"]},
        JobState.QUEUED,
        [{"$set": fresh}],
        actor_id=actor_id,
        comment=comment,
    )
    assert row is not None  # read in this transaction: another's write in between starts it anew
    return row


async def adopt(
    database: Database,
    session: AsyncClientSession,
    parent_id: ObjectId,
    job_ids: Sequence[ObjectId],
) -> int:
    """Those of these jobs that have not ended and belong to no other become children of this one;
    answers how many. Who ends one of them at the same time collides with it."""
    jobs = database.data["jobs"]
    found = await jobs.update_many(
        {
            "_id": {"$in": list(job_ids)},
            "parent_id": None,
            "state": {"$nin": [state.value for state in ENDED]},
        },
        {"$set": {"parent_id": parent_id}},
        session=session,
    )
    if found.modified_count:
        await jobs.update_one(
            {"_id": parent_id}, {"$inc": {"open_children": found.modified_count}}, session=session
        )
    return found.modified_count


async def add_progress(database: Database, job_id: ObjectId, count: int) -> None:
    """So much of the work of a job that awaits its children was done by one of them."""
    done: Row = {"$add": ["$progress.current", count]}
    await database.data["jobs"].update_one(
        {"_id": job_id, "state": JobState.QUEUED.value, "awaits_children": True},
        [
            {
                "$set": {
                    "progress.current": {"$min": [{"$ifNull": ["$progress.total", done]}, done]},
                    "progress.sequence": {"$add": ["$progress.sequence", 1]},
                    "progress.updated_at": "$$NOW",
                }
            }
        ],
    )


async def next_turn(
    database: Database,
    session: AsyncClientSession,
    kind: JobKind,
    created_by_id: ObjectId | None,
    priority: int,
) -> int:
    """Two reads of one index entry each, as long as few of the first in the queue cannot run yet."""
    jobs = database.data["jobs"]
    waiting = {"$in": [state.value for state in WAITING]}
    # Of those that could be claimed now: one that waits for its time must not hold the clock back.
    first = {"state": JobState.QUEUED.value, "priority": priority, **CLAIMABLE}
    lane = {
        "state": waiting,
        "created_by_id": created_by_id,
        "kind": kind.value,
        "priority": priority,
    }
    turns = []
    for query, order in ((first, 1), (lane, -1)):
        row = await jobs.find_one(
            query,
            {"turn": 1},
            sort=[("turn", order)],
            session=session,
            max_time_ms=database.query_timeout_ms,
        )
        turns.append(row["turn"] if row else 0)
    return max(turns) + 1
