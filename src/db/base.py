"""What every document shares."""

from datetime import UTC, datetime
from typing import Any, TypeAlias

from beanie import Document, PydanticObjectId
from pydantic import Field

Row: TypeAlias = dict[str, Any]
"""A document as it is read: raw, with the fields of the projection. Rows are shared, never change one."""


def value_at(row: Row, path: str) -> Any:
    """What stands at a path of a row, dotted where it is embedded; KeyError."""
    found: Any = row
    for name in path.split("."):
        found = found[name]
    return found


def utc_now() -> datetime:
    """Now, in UTC, in the milliseconds that MongoDB keeps."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


class BaseDocument(Document):
    """A document whose id exists before it is inserted, so that it is never None."""

    id: PydanticObjectId = Field(default_factory=PydanticObjectId, alias="_id")
