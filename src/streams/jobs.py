"""One job on its way to the end, and all jobs that a filter names.

Changes of state come as events of the log, each with the whole job as it was then. Progress comes
as what was written to the job: it is laid over the job as it is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.conditions import within
from modelharbor.db.events import Stream
from modelharbor.db.jobs import ENDED
from modelharbor.db.keyset import Filter
from modelharbor.errors import NotFound
from modelharbor.events.changes import Change, Topic, What, events_about, events_of, progress_of
from modelharbor.jobs.states import HIDDEN
from modelharbor.loaders.base import Reads, Sharing

from .base import Follower, Happening, Source
from .many import Many, is_progress

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
        return events_about(self.job_id), progress_of(Stream.JOBS, self.job_id)

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
        elif is_progress(change):
            job = laid_over(self.known.row["job"], change.row["updated"])
            made = self.source.happening(change.position, job, is_passing=True)
        else:
            return None
        return made if made.sequence > self.known.sequence else None

    def standing(self) -> Happening | None:
        return self.known


@dataclass(frozen=True, slots=True)
class Jobs(Many):
    """What happens to all jobs that a filter names and the viewer may see."""

    filter: Filter

    subjects = Stream.JOBS
    row_name = "job"
    shown = SHOWN

    @property
    def stream(self) -> str:
        return f"jobs/{self.filter.raw.hex()}"

    @property
    def topics(self) -> tuple[Topic, ...]:
        return events_of(Stream.JOBS), progress_of(Stream.JOBS, None)

    @property
    def query(self) -> Row:
        return {"stream": Stream.JOBS.value, **within("job", self.filter.data)}

    @property
    def wanted(self) -> Row:
        return self.filter.data

    async def check(self, reads: Reads) -> None:
        """Everybody may watch what they may see."""

    def sequence(self, row: Row) -> int:
        return _sequence(row)

    def laid_over(self, row: Row, updated: Row) -> Row:
        return laid_over(row, updated)
