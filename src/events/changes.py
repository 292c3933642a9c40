"""What a reader of the log hands over, and how one says what to hand over."""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.events import Stream


class What(Enum):
    EVENT = "event"  # `row`: of `events`
    PROGRESS = (
        "progress"  # `row`: {job_id, updated}: stored names of a job (dotted) with new values
    )
    MODEL = "model"  # `row`: {model_id}: some model was written


@dataclass(frozen=True, slots=True)
class Change:
    """One committed change. `position` grows from change to change, in the order of commits."""

    what: What
    position: str
    row: Row


Topic: TypeAlias = Hashable
"""What a subscriber is called for: made by the three functions here."""


def events_about(subject: ObjectId) -> Topic:
    """Events whose `about` names it."""
    return What.EVENT, subject


def events_of(stream: Stream) -> Topic:
    return What.EVENT, stream.value


def progress_of(job_id: ObjectId | None) -> Topic:
    """Progress of a job; None: of all."""
    return What.PROGRESS, job_id


MODELS: Topic = (What.MODEL,)
"""Any write to a model, events or not."""


def topics_of(change: Change) -> list[Topic]:
    """All topics under which it is handed over."""
    match change.what:
        case What.EVENT:
            return [
                events_of(Stream(change.row["stream"])),
                *(events_about(each) for each in change.row["about"]),
            ]
        case What.PROGRESS:
            return [progress_of(change.row["job_id"]), progress_of(None)]
        case What.MODEL:
            return [MODELS]
