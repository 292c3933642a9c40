"""Jobs: start them, cancel them, give them another chance."""

import asyncio
from collections.abc import Collection
from datetime import datetime
from typing import Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import OPERATOR, Viewer, actor_principal, job_principals
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, WAITING, JobKind, JobState
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused
from modelharbor.jobs.put import put_again, put_job
from modelharbor.jobs.states import change_state
from modelharbor.settings import Settings

from .exports import refuse_too_many_exports
from .folders import allowed_folder, valid_folder
from .imports import refuse_import
from .names import valid_comment, valid_idempotency_key, valid_model_name

CHILDREN_AT_ONCE: Final = 100  # cancelled in one transaction
BEING_CANCELLED: Final = frozenset({JobState.CANCELLING, JobState.CANCELLED})


# Start ------------------------------------------------------------------------------------------


async def start_import(
    database: Database,
    viewer: Viewer,
    settings: Settings,
    *,
    source: str,
    folder: str,
    owner: str,
    name: str | None = None,
    idempotency_key: str | None = None,
) -> Row:
    """Import `folder`, a path below the import root `source`, as `owner/name`.

    Without a name it is the folder's. Needs WRITE and PUBLISH on the model, or on what the owner has:
    now, and again when the job runs.
    """
    user_id = viewer.person_id()
    key = valid_idempotency_key(idempotency_key)
    if source not in settings.import_roots:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such source.", "source")
    folder = valid_folder(folder)
    name = valid_model_name(folder.rpartition("/")[2] if name is None else name, "name")
    given = {"source": source, "folder": folder, "owner": owner, "name": name}
    stored_key = None if key is None else f"{user_id}:{key}"
    if stored_key is not None:
        known = await database.data["jobs"].find_one(
            {"kind": JobKind.IMPORT_MODEL.value, "idempotency_key": stored_key},
            max_time_ms=database.query_timeout_ms,
        )
        if known is not None:
            return _same(known, given)
    await refuse_import(database, None, viewer, owner, name)
    await refuse_too_many(database, user_id, settings.max_waiting_jobs)
    # Only now: who may not import is not told which folders there are.
    await asyncio.to_thread(allowed_folder, settings, source, folder)

    async def work(session: AsyncClientSession) -> Row:
        found, model = await refuse_import(database, session, viewer, owner, name)
        job = await put_job(
            database,
            session,
            kind=JobKind.IMPORT_MODEL,
            input=given,
            created_by_id=user_id,
            scopes=sorted(scope.value for scope in viewer.scopes),
            principals=job_principals(user_id, found["_id"]),
            subject=None if model is None else model_subject(model["_id"]),
            idempotency_key=stored_key,
        )
        return _same(job, given)

    return await database.transaction(work)


async def refuse_too_many(database: Database, user_id: ObjectId, most: int) -> None:
    """A few more may slip in at the same moment: it is about thousands."""
    waiting = await database.data["jobs"].count_documents(
        {"state": {"$in": [state.value for state in WAITING]}, "created_by_id": user_id},
        limit=most,
        maxTimeMS=database.query_timeout_ms,
    )
    if waiting >= most:
        raise Refused(
            ErrorCode.QUOTA_EXCEEDED,
            f"{most} jobs of yours wait already: wait for some of them, or cancel some.",
        )


def _same(job: Row, given: Row) -> Row:
    if job["input"] != given:
        raise Refused(
            ErrorCode.CONFLICT,
            "The idempotency key was used with another input: use a new one.",
            "idempotencyKey",
        )
    return job


def model_subject(model_id: ObjectId) -> Row:
    return {"type": "Model", "id": model_id}


async def start_collection(
    database: Database, viewer: Viewer | None, *, dry_run: bool = False
) -> Row:
    """Remove what nobody needs any more, or only count it. Operators only; without a viewer it is the
    operator at the command line."""
    user_id = _operator(viewer)
    return await database.transaction(
        lambda session: put_job(
            database,
            session,
            kind=JobKind.GARBAGE_COLLECT,
            input={"dry_run": dry_run},
            created_by_id=user_id,
            scopes=_scopes(viewer),
            principals=job_principals(user_id),
        )
    )


async def start_reindex(
    database: Database, viewer: Viewer | None, *, model_id: ObjectId | None = None
) -> Row:
    """Count anew what models keep of their versions and files: of one, or of all. Operators only;
    without a viewer it is the operator at the command line."""
    user_id = _operator(viewer)

    async def work(session: AsyncClientSession) -> Row:
        if model_id is not None and not await database.data["models"].find_one(
            {"_id": model_id}, {"_id": 1}, session=session, max_time_ms=database.query_timeout_ms
        ):
            raise Refused(ErrorCode.NOT_FOUND, "There is no such model.", "modelId")
        return await put_job(
            database,
            session,
            kind=JobKind.REINDEX,
            input={"model_id": model_id},
            created_by_id=user_id,
            scopes=_scopes(viewer),
            principals=job_principals(user_id),
            subject=None if model_id is None else model_subject(model_id),
        )

    return await database.transaction(work)


async def start_verification(
    database: Database, viewer: Viewer | None, *, all_contents: bool = False
) -> Row:
    """Read stored contents again and compare them with their hashes: those that were not for
    `verify_days`, or all. Operators only; without a viewer it is the operator at the command line."""
    user_id = _operator(viewer)
    return await database.transaction(
        lambda session: put_job(
            database,
            session,
            kind=JobKind.VERIFY_BLOBS,
            input={"all": all_contents},
            created_by_id=user_id,
            scopes=_scopes(viewer),
            principals=job_principals(user_id),
        )
    )


async def start_backfill(
    database: Database, first: datetime | None = None, last: datetime | None = None
) -> Row:
    """Add up usage of these days (UTC) again, from its events: by default of all that are kept. For the
    operator at the command line."""
    return await database.transaction(
        lambda session: put_job(
            database,
            session,
            kind=JobKind.ROLLUP_ANALYTICS,
            input={"from": first, "to": last},
            principals=job_principals(),
        )
    )


def _operator(viewer: Viewer | None) -> ObjectId | None:
    if viewer is None:
        return None
    user_id = viewer.person_id()
    if not viewer.operates:
        raise Refused(
            ErrorCode.FORBIDDEN, "This is for operators, with a token that has the scope OPERATE."
        )
    return user_id


def _scopes(viewer: Viewer | None) -> list[str]:
    return [] if viewer is None else sorted(scope.value for scope in viewer.scopes)


# Cancel, and retry ------------------------------------------------------------------------------


async def cancel_job(
    database: Database, viewer: Viewer | None, *, job_id: ObjectId, comment: str | None = None
) -> Row:
    """A job that waits is CANCELLED, one that runs is CANCELLING until its worker has found out; so
    are all below it that have not ended. Cancelled before: the same again.

    For its creator (with WRITE), who may ADMINISTER what its owner has, and operators; without a viewer
    it is the operator at the command line.
    """
    actor_id = None if viewer is None else viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> Row:
        job = await _job_for(database, session, viewer, job_id)
        state = JobState(job["state"])
        if state in BEING_CANCELLED:
            return job
        if state in ENDED:
            raise _impossible(job, "cancelled")
        return await _cancel(database, session, job, actor_id, comment)

    row = await database.transaction(work)
    parents = [job_id]
    while parents:
        parents = await _cancel_children(database, parents, actor_id, comment)
    return row


async def _cancel(
    database: Database,
    session: AsyncClientSession,
    job: Row,
    actor_id: ObjectId | None,
    comment: str | None,
) -> Row:
    row = await change_state(
        database,
        session,
        {"_id": job["_id"], "state": job["state"]},
        JobState.CANCELLED if JobState(job["state"]) in WAITING else JobState.CANCELLING,
        [{"$set": {"comment": {"$literal": comment}}}],
        actor_id=actor_id,
        comment=comment,
    )
    assert row is not None  # read in this transaction: another's write in between starts it anew
    return row


async def _cancel_children(
    database: Database, parents: list[ObjectId], actor_id: ObjectId | None, comment: str | None
) -> list[ObjectId]:
    """Answers the children, whose own are to be cancelled next."""
    # The type is said because the index holds only rows of it.
    below = {"parent_id": {"$in": parents, "$type": "objectId"}}
    found = await database.find("jobs", below, projection={"state": 1})
    stopping = {state.value for state in (*ENDED, JobState.CANCELLING)}
    going = [row["_id"] for row in found if row["state"] not in stopping]
    for start in range(0, len(going), CHILDREN_AT_ONCE):
        batch = going[start : start + CHILDREN_AT_ONCE]

        async def work(session: AsyncClientSession, batch: list[ObjectId] = batch) -> None:
            rows = (
                await database.data["jobs"]
                .find({"_id": {"$in": batch}}, {"state": 1}, session=session)
                .max_time_ms(database.query_timeout_ms)
                .to_list()
            )
            for row in rows:
                if row["state"] not in stopping:
                    await _cancel(database, session, row, actor_id, comment)

        await database.transaction(work)
    return [row["_id"] for row in found]


async def retry_job(
    database: Database,
    viewer: Viewer | None,
    *,
    job_id: ObjectId,
    comment: str | None = None,
    max_exports: int | None = None,
) -> Row:
    """FAILED, DEAD or CANCELLED → QUEUED, with all its attempts to come, from the beginning.

    For the same people as `cancel_job`. `max_exports`: so many of the viewer's own wait or run at once.
    """
    actor_id = None if viewer is None else viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> Row:
        job = await _job_for(database, session, viewer, job_id)
        if JobState(job["state"]) not in ENDED - {JobState.SUCCEEDED}:
            raise _impossible(job, "retried")
        if job["open_children"]:
            # What is still going on below belongs to what was cancelled, and would be taken for new.
            raise Refused(
                ErrorCode.INVALID_TRANSITION,
                "Jobs below it have not ended: cancel them, or wait until they have.",
                "id",
            )
        is_export = job["kind"] == JobKind.EXPORT.value
        if max_exports is not None and is_export and job["created_by_id"] == actor_id is not None:
            await refuse_too_many_exports(database, session, actor_id, max_exports)
        return await put_again(database, session, job, actor_id=actor_id, comment=comment)

    return await database.transaction(work)


async def _job_for(
    database: Database, session: AsyncClientSession, viewer: Viewer | None, job_id: ObjectId
) -> Row:
    """The whole job, to be changed within the transaction."""
    seen = {} if viewer is None else viewer.visible
    job = await database.data["jobs"].find_one(
        {"_id": job_id, **seen}, session=session, max_time_ms=database.query_timeout_ms
    )
    if job is None:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such job that you may see.", "id")
    if viewer is not None and not _steers(viewer, job):
        raise Refused(
            ErrorCode.FORBIDDEN,
            "This is for who asked for the job, with the scope WRITE, and for who has the permission ADMINISTER on what its owner has.",
            "id",
        )
    return job


def _steers(viewer: Viewer, job: Row) -> bool:
    user_id = viewer.person_id()
    if viewer.operates or (job["created_by_id"] == user_id and Permission.WRITE in viewer.scopes):
        return True
    return any(
        Permission.ADMINISTER in viewer.on_owner(owner)
        and actor_principal(owner) in job["principals"]
        for owner in (user_id, *viewer.roles)
    )


def _impossible(job: Row, done: str) -> Refused:
    return Refused(
        ErrorCode.INVALID_TRANSITION, f"The job is {job['state']}: it cannot be {done}.", "id"
    )


# For the operator at the command line ------------------------------------------------------------


async def list_jobs(
    database: Database,
    *,
    states: Collection[JobState] = (),
    kinds: Collection[JobKind] = (),
    limit: int = 1000,
) -> list[Row]:
    """The newest first; of these states and kinds, where any are given."""
    query: Row = {"principals": OPERATOR}
    if states:
        query["state"] = {"$in": [state.value for state in states]}
    if kinds:
        query["kind"] = {"$in": [kind.value for kind in kinds]}
    return (
        await database.data["jobs"]
        .find(query, max_time_ms=database.query_timeout_ms)
        .sort("_id", -1)
        .to_list(limit)
    )


async def jobs_by_id(database: Database, job_ids: Collection[ObjectId]) -> list[Row]:
    """In the order of their ids; those that are there."""
    return (
        await database.data["jobs"]
        .find({"_id": {"$in": list(job_ids)}}, max_time_ms=database.query_timeout_ms)
        .sort("_id", 1)
        .to_list()
    )


async def log_of_job(database: Database, job_id: ObjectId) -> list[Row]:
    """Its lines, the oldest first."""
    return (
        await database.data["job_logs"]
        .find({"job_id": job_id}, max_time_ms=database.query_timeout_ms)
        .sort("_id", 1)
        .to_list()
    )
