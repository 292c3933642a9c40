"""Operations that were published, and how often each is used."""

import re
from datetime import datetime
from typing import Final

from pydantic import Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, utc_now

SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
LONGEST_ID: Final = 256  # characters
USAGE_DAYS: Final = 400  # that counts are kept: a year, and the days around its end


def canonical(document_id: str) -> str | None:
    """An id as it is kept: of `sha256:` the digits alone; None where it has no digits behind it."""
    if not document_id.startswith("sha256:"):
        return document_id
    return document_id[7:] if SHA256.fullmatch(document_id, 7) else None


class PersistedDocument(BaseDocument):
    """One operation of one client."""

    document_id: str  # as its client names it; of a SHA-256 the digits alone
    client: str
    text: str
    sha256: str  # of the text
    name: str | None  # of the operation
    kind: str  # query, mutation, subscription
    fields: list[str]  # that it selects, each as `Model.name`
    price: int | None = None  # what it costs, whatever it asks for; None: what it asks for
    published_at: datetime = Field(default_factory=utc_now)
    retired_at: datetime | None = None
    sequence: int  # of the change; see `log`, where the last is

    class Settings:
        name = "persisted_documents"
        indexes = [
            IndexModel([("client", ASCENDING), ("document_id", ASCENDING)], name="id", unique=True),
            IndexModel([("document_id", ASCENDING)], name="clients"),
            IndexModel([("fields", ASCENDING)], name="fields"),
            IndexModel([("sequence", ASCENDING)], name="sequence"),
        ]


class PersistedUsageDocument(BaseDocument):
    """How often an id was asked for on one day, whichever client it is of."""

    document_id: str
    day: datetime  # its first moment, UTC
    calls: int
    last_used_at: datetime

    class Settings:
        name = "persisted_usage"
        indexes = [
            IndexModel([("document_id", ASCENDING), ("day", ASCENDING)], name="day", unique=True),
            IndexModel([("day", ASCENDING)], name="old", expireAfterSeconds=USAGE_DAYS * 24 * 3600),
        ]
