"""API tokens. The secret itself is never stored."""

from datetime import datetime
from enum import Enum

from beanie import PydanticObjectId
from pydantic import Field
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument, utc_now


class Permission(Enum):
    READ = "READ"
    DOWNLOAD = "DOWNLOAD"
    WRITE = "WRITE"
    PUBLISH = "PUBLISH"
    PROMOTE = "PROMOTE"
    ADMINISTER = "ADMINISTER"
    OPERATE = "OPERATE"


class TokenDocument(BaseDocument):
    user_id: PydanticObjectId
    name: str
    prefix: str  # what of the token may be shown
    secret_sha256: str
    scopes: list[Permission]
    created_at: datetime = Field(default_factory=utc_now)
    last_used_at: datetime | None = None  # to the minute
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    class Settings:
        name = "tokens"
        indexes = [
            IndexModel([("user_id", ASCENDING), ("_id", ASCENDING)], name="user"),
            *[
                IndexModel(
                    [(end, ASCENDING)],
                    name=end.removesuffix("_at"),
                    partialFilterExpression={end: {"$type": "date"}},
                )
                for end in ("revoked_at", "expires_at")
            ],
        ]
