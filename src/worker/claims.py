"""Who has which job, by leases: all of it decided by MongoDB, by its clock."""

import random
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.connection import APP_NAME, Database
from modelharbor.db.jobs import HELD, WAITING, JobKind, JobState
from modelharbor.errors import Unavailable
from modelharbor.jobs.states import CLAIMABLE, change_state

from .reports import literal

Claim: TypeAlias = tuple[ObjectId, int]
"""Id and fencing token."""

MOST_DEATHS: Final = 3
SPARE: Final = 16  # candidates more than needed: some are of kinds that get no more places
MOST_BLOCKED: Final = 3  # tried in one round: first their transactions are to be ended
MOST_EXPIRED: Final = 100  # looked at in one round
CLAIM_SECONDS: Final = 2.0
WATCHED: Final = (
    0.2  # of a lease: for so long a transaction is seen to do nothing before it is ended
)
EXPIRE_SECONDS: Final = 1.0  # for one of them, when others want it too
WORKER_DIED: Final = "WORKER_DIED"
STATES_HELD: Final = {"$in": [state.value for state in HELD]}


@dataclass(frozen=True, slots=True)
class Places:
    """What a worker may claim: in all, by kind, and whether a suspect is among it."""

    free: int
    by_kind: Mapping[JobKind, int]
    suspects: bool


def claim_of(job: Row) -> Claim:
    return job["_id"], job["token"]


def _is(claim: Claim) -> Row:
    return {"_id": claim[0], "token": claim[1]}


def leased(seconds: float) -> Row:
    return {
        "lease_until": {"$add": ["$$NOW", int(seconds * 1000)]},
        "heartbeat_at": "$$NOW",
    }


def _claimed(worker: str, lease_seconds: float) -> Row:
    return {
        **literal({"worker": worker}),
        **leased(lease_seconds),
        "token": {"$add": ["$token", 1]},
        "attempt": {"$add": ["$attempt", 1]},
        "started_at": {"$ifNull": ["$started_at", "$$NOW"]},
        "error": None,
        "progress.current": 0,
        "progress.total": None,
        "progress.rate": None,
        "progress.message": None,
        "steps": {
            "$filter": {
                "input": "$steps",
                "cond": {"$eq": ["$$this.state", JobState.SUCCEEDED.value]},
            }
        },
    }


async def claim(database: Database, worker: str, lease_seconds: float, places: Places) -> list[Row]:
    """Jobs that are this worker's now, in the order in which they should start."""
    kinds = {kind: count for kind, count in places.by_kind.items() if count > 0}
    if places.free < 1 or not kinds:
        return []
    query: Row = {
        "state": {"$in": [state.value for state in WAITING]},
        "kind": {"$in": [kind.value for kind in kinds]},
        **CLAIMABLE,
        **({} if places.suspects else {"deaths": 0}),
    }
    attempts = 0

    async def work(session: AsyncClientSession) -> list[Row]:
        nonlocal attempts
        attempts += 1
        found = database.data["jobs"].find(
            query,
            {"kind": 1, "deaths": 1},
            sort=[("priority", -1), ("turn", 1), ("_id", 1)],
            limit=places.free + SPARE,
            max_time_ms=database.query_timeout_ms,
            session=session,
        )
        rows = await found.to_list()
        free = places.free
        if attempts > 1:
            # Others want the same ones, or a worker died in the middle of claiming some: who picks
            # fewer of them, at random, meets few.
            random.shuffle(rows)
            free = max(1, free // 2) if attempts == 2 else 1
        claimed = []
        for row in _fitting(rows, free, kinds, places.suspects):
            changed = await change_state(
                database,
                session,
                {"_id": row["_id"]},
                JobState.RUNNING,
                [{"$set": _claimed(worker, lease_seconds)}],
            )
            if changed is not None:
                claimed.append(changed)
        return claimed

    if not await _any(database, query):
        return []  # most looks find nothing: they need no transaction
    return await database.transaction(work, CLAIM_SECONDS)


async def _any(database: Database, query: Row) -> bool:
    return bool(await database.find("jobs", query, projection={"_id": 1}, limit=1))


def _fitting(rows: list[Row], free: int, kinds: Mapping[JobKind, int], suspects: bool) -> list[Row]:
    """Of the candidates as many as there are places for; one suspect at most."""
    left = dict(kinds)
    found: list[Row] = []
    for row in rows:
        kind = JobKind(row["kind"])
        if len(found) == free:
            break
        if left[kind] == 0 or (row["deaths"] and not suspects):
            continue
        suspects = suspects and not row["deaths"]
        left[kind] -= 1
        found.append(row)
    return found


async def expire(database: Database, own: Collection[Claim]) -> tuple[list[Row], bool]:
    """Jobs whose worker let its lease run out, which counts as its death: queued again as suspects,
    cancelled where that was wanted, DEAD with the third death. `own` are not looked at: we live.
    And whether some are held by a transaction that goes on: their worker lives, or died within it."""
    expired = {"$expr": {"$lt": ["$lease_until", "$$NOW"]}}
    rows = await database.find(
        "jobs",
        {"state": STATES_HELD, **expired},
        projection={"token": 1, "state": 1, "deaths": 1},
        limit=MOST_EXPIRED,
    )
    random.shuffle(rows)  # every worker sees the same ones
    changed, blocked = [], 0
    for row in rows:
        if claim_of(row) in own:
            continue
        to = _after_death(row)
        update: Row = {"deaths": {"$add": ["$deaths", 1]}}
        if to is JobState.DEAD:
            update["error"] = {
                "code": WORKER_DIED,
                "message": f"Workers ended {MOST_DEATHS} times while they had this job.",
                "path": None,
            }

        async def work(
            session: AsyncClientSession, row: Row = row, to: JobState = to, update: Row = update
        ) -> Row | None:
            return await change_state(
                database, session, {**_is(claim_of(row)), **expired}, to, [{"$set": update}]
            )

        try:
            after = await database.transaction(work, EXPIRE_SECONDS)
        except Unavailable:
            blocked += 1
            if blocked == MOST_BLOCKED:
                break
            continue
        if after is not None:
            changed.append(after)
    return changed, blocked > 0


def _after_death(row: Row) -> JobState:
    if row["state"] == JobState.CANCELLING.value:
        return JobState.CANCELLED
    return JobState.DEAD if row["deaths"] + 1 >= MOST_DEATHS else JobState.QUEUED


async def renew(database: Database, claims: Collection[Claim], lease_seconds: float) -> None:
    """One update for all. A lease that ran out, and that nobody noticed, holds again."""
    if claims:
        await database.data["jobs"].update_many(
            {"$or": [_is(each) for each in claims], "state": STATES_HELD},
            [{"$set": leased(lease_seconds)}],
        )


async def held_states(database: Database, claims: Collection[Claim]) -> dict[Claim, JobState]:
    """Of these claims those that stand, with the states of their jobs."""
    rows = await database.find(
        "jobs",
        {"_id": {"$in": [each[0] for each in claims]}, "state": STATES_HELD},
        projection={"token": 1, "state": 1},
    )
    return {claim_of(row): JobState(row["state"]) for row in rows if claim_of(row) in claims}


async def strays(database: Database, worker: str, own: Collection[Claim]) -> list[Row]:
    """What is ours without our knowing: MongoDB had claimed it for us, and its answer was lost."""
    rows = await database.find("jobs", {"state": STATES_HELD, "worker": worker})
    return [row for row in rows if claim_of(row) not in own]


class IdleTransactions:
    """Ends transactions in which nothing was done for a lease. MongoDB lets those of a process that
    was killed stand for a minute, and nobody can claim the jobs that they hold.

    MongoDB tells only how long they were idle in all, which a long one that is at work comes to as
    well: so what they have done must stay the same while we watch.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self.watched: dict[tuple[bytes, int], tuple[int, float]] = {}
        """By session and number: microseconds at work, and since when it is no more."""

    async def end_some(self, database: Database) -> int:
        """How many. Those that may have to go next time are `watched`."""
        found = await database.client.admin.aggregate(
            [
                {"$currentOp": {"idleSessions": True}},
                {
                    "$match": {
                        "type": "idleSession",
                        "appName": APP_NAME,
                        "transaction.timeInactiveMicros": {"$gt": int(self._lease_seconds * 1e6)},
                    }
                },
                {"$project": {"lsid.id": 1, "transaction": 1}},
            ],
            maxTimeMS=database.query_timeout_ms,
        )
        now, before, self.watched = time.monotonic(), self.watched, {}
        sessions = []
        for row in await found.to_list():
            did, session_id = row["transaction"], row["lsid"]["id"]
            key = bytes(session_id), did["parameters"]["txnNumber"]
            active, since = before.get(key, (None, now))
            if active != did["timeActiveMicros"]:
                since = now
            if now - since >= self._lease_seconds * WATCHED:
                sessions.append({"id": session_id})
            else:
                self.watched[key] = did["timeActiveMicros"], since
        if sessions:
            await database.client.admin.command("killSessions", sessions)
        return len(sessions)
