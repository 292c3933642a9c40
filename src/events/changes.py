"""What a reader of the log hands over, and how one says what to hand over."""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.events import Stream

SUBJECTS: Final = {Stream.JOBS: "job_id", Stream.UPLOADS: "upload_id"}
"""What a row of an event, or of progress, calls the id of its subject."""


class What(Enum):
    EVENT = "event"  # `row`: of `events`
    # `row`: {job_id | upload_id, updated}: stored names (dotted) with new values
    PROGRESS = "progress"
    MODEL = "model"  # `row`: {model_id}: some model was written
    ROLLUP = "rollup"  # `row`: {run}: usage up to that run is added up


@dataclass(frozen=True, slots=True)
class Change:
    """One committed change. `position` grows from change to change, in the order of commits."""

    what: What
    position: str
    row: Row


Topic: TypeAlias = Hashable
"""What a subscriber is called for: one of those below, or made by the three functions there."""


def events_about(subject: ObjectId) -> Topic:
    """Events whose `about` names it."""
    return What.EVENT, subject


def events_of(stream: Stream) -> Topic:
    return What.EVENT, stream.value


def progress_of(stream: Stream, subject: ObjectId | None) -> Topic:
    """Progress of a job or an upload; None: of all."""
    return What.PROGRESS, stream.value, subject


MODELS: Topic = (What.MODEL,)
"""Any write to a model, events or not."""
ROLLUPS: Topic = (What.ROLLUP,)
"""Each run that added up usage."""


def topics_of(change: Change) -> list[Topic]:
    """All topics under which it is handed over."""
    match change.what:
        case What.EVENT:
            return [
                events_of(Stream(change.row["stream"])),
                *(events_about(each) for each in change.row["about"]),
            ]
        case What.PROGRESS:
            stream = Stream.JOBS if "job_id" in change.row else Stream.UPLOADS
            subject = change.row[SUBJECTS[stream]]
            return [progress_of(stream, subject), progress_of(stream, None)]
        case What.MODEL:
            return [MODELS]
        case What.ROLLUP:
            return [ROLLUPS]
