"""What exports have written and nobody is to have any more: of those that were kept long enough, and of
those that failed, were cancelled, or are not known."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from bson import ObjectId
from bson.errors import InvalidId

from modelharbor.db.base import Row
from modelharbor.db.jobs import ENDED, JobKind, JobState
from modelharbor.resolvers.exports import EXPORTS, remove_pieces
from modelharbor.worker.tools import Tools

AT_ONCE: Final = 100
ANY_TOKEN: Final = 2**62
GIVEN_UP: Final = frozenset(state.value for state in ENDED - {JobState.SUCCEEDED})


def old_exports(before: datetime) -> Row:
    """Those that ended before this, and have a result still. The type is said because the index holds
    only rows of it."""
    return {
        "finished_at": {"$type": "date", "$lt": before},
        "kind": JobKind.EXPORT.value,
        "state": JobState.SUCCEEDED.value,
        "checkpoint": {"$ne": None},
    }


async def remove_old_exports(tools: Tools, before: datetime) -> int:
    """Answers how many results went that were kept long enough."""
    names = await tools.storage.folders(EXPORTS)
    removed = 0
    for start in range(0, len(names), AT_ONCE):
        tools.check()
        removed += await _remove(tools, names[start : start + AT_ONCE], before)
    return removed


async def _remove(tools: Tools, names: Sequence[str], before: datetime) -> int:
    database, removed = tools.database, 0
    ids = [found for name in names if (found := _id(name)) is not None]
    rows = await database.find(
        "jobs",
        {"_id": {"$in": ids}},
        projection={"state": 1, "finished_at": 1, "token": 1, "checkpoint": 1},
    )
    jobs = {row["_id"]: row for row in rows}
    limit = before.replace(tzinfo=None)
    for job_id in ids:
        job = jobs.get(job_id)
        if job is None:
            await remove_pieces(tools.storage, job_id, up_to=ANY_TOKEN)
        elif job["state"] in GIVEN_UP:
            # Someone may try it again meanwhile: what that writes has another token.
            await remove_pieces(tools.storage, job_id, up_to=job["token"])
        elif job["state"] == JobState.SUCCEEDED.value and job["finished_at"] < limit:
            # First the job says so: who asks for the file is told that it was kept long enough.
            await database.data["jobs"].update_one(
                {"_id": job_id}, {"$set": {"checkpoint": None, "result.isRemoved": True}}
            )
            await remove_pieces(tools.storage, job_id, up_to=ANY_TOKEN)
            removed += job["checkpoint"] is not None
    return removed


def _id(name: str) -> ObjectId | None:
    try:
        return ObjectId(name)
    except InvalidId:
        return None
