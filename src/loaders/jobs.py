"""Jobs, what they wait for, and what they write."""

from typing import Final

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.jobs import WAITING, JobDocument, JobLogDocument

from .base import Loader, Sharing
from .pages import PageLoader
from .rows import RowByIdLoader

MOST_WAITING: Final = 1000  # jobs that are counted before one
_WAITING: Final = frozenset(state.value for state in WAITING)


class JobByIdLoader(RowByIdLoader):
    """Jobs that the viewer may see."""

    collection, document = "jobs", JobDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return self.reads.viewer.visible


class JobPageLoader(PageLoader[str]):
    """All jobs that the viewer may see."""

    collection, document = "jobs", JobDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return self.reads.viewer.visible


class JobsByParentLoader(PageLoader[ObjectId]):
    """The parts of a job, as far as the viewer may see them."""

    collection, parent, document = "jobs", "parent_id", JobDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return self.reads.viewer.visible


class JobsBySubjectLoader(PageLoader[ObjectId]):
    """Jobs about something that was reached, as far as the viewer may see them."""

    collection, parent, document = "jobs", "subject.id", JobDocument
    sharing = Sharing.EQUAL_RIGHTS

    def base(self) -> Row:
        return self.reads.viewer.visible


class LogsByJobLoader(PageLoader[ObjectId]):
    """Lines of the logs of jobs that were reached."""

    collection, parent, document = "job_logs", "job_id", JobLogDocument
    sharing = Sharing.EVERYBODY


class QueuePositionByJobLoader(Loader[tuple[ObjectId, str], int | None, None]):
    """Where jobs stand among those that wait, from 1; None for one that does not wait.

    The key is (job id, its state). One read of the first of the queue, by its index alone, does for
    all; MOST_WAITING + 1 stands for everything behind them.
    """

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[tuple[ObjectId, str]]) -> list[int | None]:
        if not any(state in _WAITING for _, state in keys):
            return [None for _ in keys]
        rows = await self.reads.database.find(
            "jobs",
            {"state": {"$in": sorted(_WAITING)}},
            projection={"_id": 1},
            sort={"priority": -1, "turn": 1, "_id": 1},
            limit=MOST_WAITING,
        )
        places = {row["_id"]: place for place, row in enumerate(rows, 1)}
        return [
            places.get(job_id, MOST_WAITING + 1) if state in _WAITING else None
            for job_id, state in keys
        ]
