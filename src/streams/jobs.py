"""One job on its way to the end, and all jobs that a filter names.

Changes of state come as events of the log, each with the whole job as it was then. Progress comes
as what was written to the job: it is laid over the job as it is known.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.conditions import holds, within
from modelharbor.db.events import Stream
from modelharbor.db.jobs import ENDED
from modelharbor.db.keyset import Filter
from modelharbor.errors import NotFound
from modelharbor.events.changes import Change, Topic, What, events_about, events_of, progress_of
from modelharbor.jobs.states import HIDDEN
from modelharbor.loaders.base import Reads, Sharing

from .base import Follower, Happening, Source

MOST_KNOWN: Final = 1000  # jobs that a follower of many keeps in memory
SHOWN: Final = dict.fromkeys(sorted(HIDDEN), 0)
_ENDED: Final = frozenset(state.value for state in ENDED)


def _missing() -> NotFound:
    return NotFound("There is no such job.")


def _sequence(job: Row) -> int:
    found: int = job["progress"]["sequence"]
    return found


def laid_over(job: Row, updated: Row) -> Row:
    """The job with new values of stored names, dotted where they are embedded or in a list."""
    for path, value in updated.items():
        names = path.split(".")
        if names[0] not in HIDDEN:
            job = _with(job, names, value)
    return job


def _with(found: Any, names: list[str], value: Any) -> Any:
    if not names:
        return value
    name, rest = names[0], names[1:]
    if isinstance(found, list):
        at = int(name)
        inner = found[at] if at < len(found) else None
        return [*found[:at], _with(inner, rest, value), *found[at + 1 :]]
    inner = found if isinstance(found, dict) else {}
    return {**inner, name: _with(inner.get(name), rest, value)}


def _is_progress(change: Change) -> bool:
    """A change of state writes the job too; its event tells of it."""
    return change.what is What.PROGRESS and "state" not in change.row["updated"]


@dataclass(frozen=True, slots=True)
class JobProgress(Source):
    """What happens to one job, until it has ended."""

    job_id: ObjectId

    sharing = Sharing.EVERYBODY

    @property
    def stream(self) -> str:
        return f"jobProgress/{self.job_id}"

    @property
    def topics(self) -> tuple[Topic, ...]:
        return events_about(self.job_id), progress_of(self.job_id)

    @property
    def query(self) -> Row:
        return {"about": self.job_id, "job_id": self.job_id, "stream": Stream.JOBS.value}

    async def check(self, reads: Reads) -> None:
        query = {"_id": self.job_id, **reads.viewer.visible}
        if not await reads.database.find("jobs", query, projection={"_id": 1}):
            raise _missing()

    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return [self.event(change) for change in changes if self.tells(change)]

    def follow(self) -> "JobProgressFollower":
        return JobProgressFollower(self)

    def permits(self, viewer: Viewer, happening: Happening) -> bool:
        return not set(viewer.principals).isdisjoint(happening.row["job"]["principals"])

    def tells(self, change: Change) -> bool:
        """Whether it is an event of this job: those of its parts are about it too."""
        return change.what is What.EVENT and change.row.get("job_id") == self.job_id

    def event(self, change: Change) -> Happening:
        return self.happening(change.position, change.row["job"])

    def happening(self, position: str, job: Row, is_passing: bool = False) -> Happening:
        return Happening(
            position,
            {"job": job},
            sequence=_sequence(job),
            key=self.job_id,
            is_passing=is_passing,
            is_final=job["state"] in _ENDED,
        )


class JobProgressFollower(Follower):
    def __init__(self, source: JobProgress) -> None:
        self.source = source
        self.known: Happening | None = None

    async def begin(self, reads: Reads, position: str) -> None:
        rows = await reads.database.find("jobs", {"_id": self.source.job_id}, projection=SHOWN)
        if not rows:
            raise _missing()
        self.known = self.source.happening(position, rows[0])

    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        found = []
        for change in changes:
            happening = self.one(change)
            if happening is not None:
                self.known = happening
                found.append(happening)
        return found

    def one(self, change: Change) -> Happening | None:
        assert self.known is not None
        if self.source.tells(change):
            made = self.source.event(change)
        elif _is_progress(change):
            job = laid_over(self.known.row["job"], change.row["updated"])
            made = self.source.happening(change.position, job, is_passing=True)
        else:
            return None
        return made if made.sequence > self.known.sequence else None

    def standing(self) -> Happening | None:
        return self.known


@dataclass(frozen=True, slots=True)
class Jobs(Source):
    """What happens to all jobs that a filter names and the viewer may see.

    Each job counts for itself, so its happenings carry no sequence: none is left out but by its
    place in the log.
    """

    filter: Filter

    sharing = Sharing.EQUAL_RIGHTS

    @property
    def stream(self) -> str:
        return f"jobs/{self.filter.raw.hex()}"

    @property
    def topics(self) -> tuple[Topic, ...]:
        return events_of(Stream.JOBS), progress_of(None)

    @property
    def query(self) -> Row:
        return {"stream": Stream.JOBS.value, **within("job", self.filter.data)}

    async def check(self, reads: Reads) -> None:
        """Everybody may watch what they may see."""

    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return [
            self.happening(change, change.row["job"])
            for change in changes
            if self.names(reads, change.row["job"])
        ]

    def follow(self) -> "JobsFollower":
        return JobsFollower(self)

    def names(self, reads: Reads, job: Row) -> bool:
        """Whether it is one of those that are followed, as it is now."""
        return holds({"$and": [reads.viewer.visible, self.filter.data]}, job)

    def happening(self, change: Change, job: Row, is_passing: bool = False) -> Happening:
        return Happening(change.position, {"job": job}, key=job["_id"], is_passing=is_passing)


class JobsFollower(Follower):
    """Knows the jobs that it heard of last, MOST_KNOWN at most: None for such as are not followed,
    which only a change of their state can alter."""

    def __init__(self, source: Jobs) -> None:
        self.source = source
        self.known: OrderedDict[ObjectId, Row | None] = OrderedDict()

    async def begin(self, reads: Reads, position: str) -> None:
        """There is nothing to read: what stands is not told."""

    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        fresh = await self.read(reads, changes)
        found = []
        for change in changes:
            happening = None
            if change.what is What.EVENT:
                happening = self.event(reads, change)
            elif _is_progress(change):
                happening = self.progress(change, fresh)
            if happening is not None:
                found.append(happening)
        while len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)
        return found

    async def read(self, reads: Reads, changes: Iterable[Change]) -> set[ObjectId]:
        """The jobs of which there is progress to tell, and nothing known: answers their ids."""
        told, wanted = set(), set()
        for change in changes:
            job_id = change.row["job_id"]
            if change.what is What.EVENT:
                told.add(job_id)
            elif _is_progress(change) and job_id not in told and job_id not in self.known:
                wanted.add(job_id)
        if wanted:
            query = {"_id": {"$in": sorted(wanted)}}
            rows = await reads.database.find("jobs", query, projection=SHOWN)
            by_id = {row["_id"]: row for row in rows if self.source.names(reads, row)}
            self.known.update({job_id: by_id.get(job_id) for job_id in wanted})
        return wanted

    def event(self, reads: Reads, change: Change) -> Happening | None:
        job: Row = change.row["job"]
        is_named = self.source.names(reads, job)
        # One that was read may be ahead of the log: what comes after this event starts from it.
        self.know(job["_id"], job if is_named else None)
        return self.source.happening(change, job) if is_named else None

    def progress(self, change: Change, fresh: set[ObjectId]) -> Happening | None:
        job_id = change.row["job_id"]
        job = self.known.get(job_id)
        if job is None:
            return None
        after = laid_over(job, change.row["updated"])
        ahead = _sequence(after) - _sequence(job)
        if ahead < 0 or (ahead == 0 and job_id not in fresh):
            return None
        self.know(job_id, after)
        return self.source.happening(change, after, is_passing=True)

    def know(self, job_id: ObjectId, job: Row | None) -> None:
        self.known[job_id] = job
        self.known.move_to_end(job_id)
