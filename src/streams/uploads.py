"""Some uploads on their way to the end, and all uploads into one version.

Changes of state come as events of the log, each with the whole upload as it was then. Progress comes
as what was written to the upload: it is laid over the upload as it is known. Parts of uploads are never
told of: what they receive shows in the upload that they are parts of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.events import Stream
from modelharbor.db.uploads import HIDDEN, OPEN
from modelharbor.errors import NotFound
from modelharbor.events.changes import Change, Topic, What, events_about, progress_of
from modelharbor.events.following import now_of
from modelharbor.events.position import position_of
from modelharbor.loaders.base import Reads, Sharing
from modelharbor.loaders.versions import VersionByIdLoader, VersionWithinModelLoader

from .base import Follower, Happening, Source
from .many import Many, is_progress

SHOWN: Final[Row] = dict.fromkeys(sorted(HIDDEN), 0)
WHOLE: Final[Row] = {"part_of": None}
_OPEN: Final = frozenset(state.value for state in OPEN)


def _missing() -> NotFound:
    return NotFound("There is no such upload.")


@dataclass(frozen=True, slots=True)
class UploadProgress(Source):
    """What happens to some uploads, until all have ended."""

    upload_ids: tuple[ObjectId, ...]  # in order, each once

    sharing = Sharing.EVERYBODY

    @property
    def stream(self) -> str:
        return f"uploadProgress/{','.join(map(str, self.upload_ids))}"

    @property
    def topics(self) -> tuple[Topic, ...]:
        return tuple(
            topic
            for each in self.upload_ids
            for topic in (events_about(each), progress_of(Stream.UPLOADS, each))
        )

    @property
    def query(self) -> Row:
        ids = list(self.upload_ids)
        return {
            "about": {"$in": ids},
            "upload_id": {"$in": ids},
            "stream": Stream.UPLOADS.value,
        }

    async def check(self, reads: Reads) -> None:
        query = {"_id": {"$in": list(self.upload_ids)}, **reads.viewer.visible, **WHOLE}
        found = await reads.database.find("uploads", query, projection={"_id": 1})
        if len(found) < len(self.upload_ids):
            raise _missing()

    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return [
            self.happening(change.position, change.row["upload"])
            for change in changes
            if self.tells(change)
        ]

    def follow(self) -> "UploadProgressFollower":
        return UploadProgressFollower(self)

    def permits(self, viewer: Viewer, happening: Happening) -> bool:
        return not set(viewer.principals).isdisjoint(happening.row["upload"]["principals"])

    def tells(self, change: Change) -> bool:
        return change.what is What.EVENT and change.row.get("upload_id") in self.upload_ids

    def happening(
        self, position: str, upload: Row, is_passing: bool = False, is_final: bool = False
    ) -> Happening:
        return Happening(
            position,
            {"upload": upload},
            key=upload["_id"],
            is_passing=is_passing,
            is_final=is_final,
        )


class UploadProgressFollower(Follower):
    """Each upload counts its own changes, so a place in the log is all that a cursor says: what stands
    is told to those who come without one."""

    def __init__(self, source: UploadProgress) -> None:
        self.source = source
        self.known: dict[ObjectId, Happening] = {}

    async def begin(self, reads: Reads, position: str) -> None:
        query = {"_id": {"$in": list(self.source.upload_ids)}, **WHOLE}
        rows = await reads.database.find("uploads", query, projection=SHOWN)
        if len(rows) < len(self.source.upload_ids):
            raise _missing()
        by_id = {row["_id"]: row for row in rows}
        self.known = {
            each: self.source.happening(position, by_id[each]) for each in self.source.upload_ids
        }
        # Events of what was read already are not told again.
        self.ahead = position_of(await now_of(reads.database.data), 0)

    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return [found for change in changes if (found := self.one(change)) is not None]

    def one(self, change: Change) -> Happening | None:
        passing = is_progress(change)
        if not passing and not self.source.tells(change):
            return None
        upload_id: ObjectId = change.row["upload_id"]
        before = self.known[upload_id].row["upload"]
        after = {**before, **change.row["updated"]} if passing else change.row["upload"]
        if after["sequence"] <= before["sequence"]:
            return None
        self.known[upload_id] = made = self.source.happening(change.position, after, passing)
        if not passing and self.is_over:
            # What stands is that nothing follows, too.
            made = self.source.happening(change.position, after, is_final=True)
        return made

    @property
    def is_over(self) -> bool:
        return not any(each.row["upload"]["state"] in _OPEN for each in self.known.values())

    def standings(self) -> Sequence[Happening]:
        return list(self.known.values())


@dataclass(frozen=True, slots=True)
class VersionUploads(Many):
    """What happens to all uploads into a version that the viewer may see."""

    version_id: ObjectId

    subjects = Stream.UPLOADS
    row_name = "upload"
    shown = SHOWN

    @property
    def stream(self) -> str:
        return f"uploadProgress/version/{self.version_id}"

    @property
    def topics(self) -> tuple[Topic, ...]:
        return events_about(self.version_id), progress_of(Stream.UPLOADS, None)

    @property
    def query(self) -> Row:
        return {"about": self.version_id, "stream": Stream.UPLOADS.value}

    @property
    def wanted(self) -> Row:
        return {"version_id": self.version_id, **WHOLE}

    async def check(self, reads: Reads) -> None:
        version = await reads.loader(VersionByIdLoader, None).load(self.version_id)
        if version is not None:
            key = version["model_id"], self.version_id
            version = await reads.loader(VersionWithinModelLoader, None).load(key)
        if version is None:
            raise NotFound("There is no such version.")

    def sequence(self, row: Row) -> int:
        found: int = row["sequence"]
        return found

    def laid_over(self, row: Row, updated: Row) -> Row:
        return {**row, **updated}
