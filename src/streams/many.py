"""What happens to all jobs, or all uploads, that are named by what they are."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.conditions import holds
from modelharbor.db.events import Stream
from modelharbor.events.changes import SUBJECTS, Change, What
from modelharbor.loaders.base import Reads, Sharing

from .base import Follower, Happening, Source

MOST_KNOWN: Final = 1000  # rows that a follower keeps in memory


def is_progress(change: Change) -> bool:
    """A change of state writes the row too; its event tells of it."""
    return change.what is What.PROGRESS and "state" not in change.row["updated"]


class Many(Source):
    """Each row counts for itself, so its happenings carry no sequence: none is left out but by its
    place in the log."""

    __slots__ = ()

    sharing = Sharing.EQUAL_RIGHTS
    subjects: ClassVar[Stream]
    """Their events; the collection of the rows has the same name."""
    row_name: ClassVar[str]
    """Of the row within an event, and for the type of the field."""
    shown: ClassVar[Row]
    """The projection of what is read of them."""

    @property
    @abstractmethod
    def wanted(self) -> Row:
        """The filter of the rows, but for who may see them."""

    @abstractmethod
    def sequence(self, row: Row) -> int:
        """Where it counts its changes."""

    @abstractmethod
    def laid_over(self, row: Row, updated: Row) -> Row:
        """The row with new values of stored names."""

    def id_of(self, change: Change) -> ObjectId:
        found: ObjectId = change.row[SUBJECTS[self.subjects]]
        return found

    def tells(self, change: Change) -> bool:
        """Whether it is an event of one of them."""
        return change.what is What.EVENT and change.row["stream"] == self.subjects.value

    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return [
            self.happening(change, change.row[self.row_name])
            for change in changes
            if self.tells(change) and self.names(reads, change.row[self.row_name])
        ]

    def follow(self) -> "ManyFollower":
        return ManyFollower(self)

    def names(self, reads: Reads, row: Row) -> bool:
        """Whether it is one of those that are followed, as it is now."""
        return holds({"$and": [reads.viewer.visible, self.wanted]}, row)

    def happening(self, change: Change, row: Row, is_passing: bool = False) -> Happening:
        return Happening(
            change.position, {self.row_name: row}, key=row["_id"], is_passing=is_passing
        )


class ManyFollower(Follower):
    """Knows the rows that it heard of last, MOST_KNOWN at most: None for such as are not followed,
    which only a change of their state can alter."""

    def __init__(self, source: Many) -> None:
        self.source = source
        self.known: OrderedDict[ObjectId, Row | None] = OrderedDict()

    async def begin(self, reads: Reads, position: str) -> None:
        """There is nothing to read: what stands is not told."""

    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        fresh = await self.read(reads, changes)
        found = []
        for change in changes:
            happening = None
            if self.source.tells(change):
                happening = self.event(reads, change)
            elif is_progress(change):
                happening = self.progress(change, fresh)
            if happening is not None:
                found.append(happening)
        while len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)
        return found

    async def read(self, reads: Reads, changes: Iterable[Change]) -> set[ObjectId]:
        """The rows of which there is progress to tell, and nothing known: answers their ids."""
        told, wanted = set(), set()
        for change in changes:
            if self.source.tells(change):
                told.add(self.source.id_of(change))
            elif is_progress(change):
                row_id = self.source.id_of(change)
                if row_id not in told and row_id not in self.known:
                    wanted.add(row_id)
        if wanted:
            query = {"_id": {"$in": sorted(wanted)}}
            collection = self.source.subjects.value
            rows = await reads.database.find(collection, query, projection=self.source.shown)
            by_id = {row["_id"]: row for row in rows if self.source.names(reads, row)}
            self.known.update({row_id: by_id.get(row_id) for row_id in wanted})
        return wanted

    def event(self, reads: Reads, change: Change) -> Happening | None:
        row: Row = change.row[self.source.row_name]
        is_named = self.source.names(reads, row)
        # One that was read may be ahead of the log: what comes after this event starts from it.
        self.know(row["_id"], row if is_named else None)
        return self.source.happening(change, row) if is_named else None

    def progress(self, change: Change, fresh: set[ObjectId]) -> Happening | None:
        row_id = self.source.id_of(change)
        row = self.known.get(row_id)
        if row is None:
            return None
        after = self.source.laid_over(row, change.row["updated"])
        ahead = self.source.sequence(after) - self.source.sequence(row)
        if ahead < 0 or (ahead == 0 and row_id not in fresh):
            return None
        self.know(row_id, after)
        return self.source.happening(change, after, is_passing=True)

    def know(self, row_id: ObjectId, row: Row | None) -> None:
        self.known[row_id] = row
        self.known.move_to_end(row_id)
