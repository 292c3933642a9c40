"""People and organizations (one collection: a login is unique over both), and who belongs where."""

from datetime import datetime
from enum import Enum

from beanie import PydanticObjectId
from pydantic import Field
from pymongo import ASCENDING, TEXT, IndexModel

from .base import BaseDocument, utc_now


class ActorKind(Enum):
    USER = "User"
    ORGANIZATION = "Organization"


class Role(Enum):
    """What someone may do, each more than the one before; the table is in auth/permissions.py."""

    VIEWER = "VIEWER"
    DOWNLOADER = "DOWNLOADER"
    CONTRIBUTOR = "CONTRIBUTOR"
    MAINTAINER = "MAINTAINER"
    ADMIN = "ADMIN"


class ActorDocument(BaseDocument):
    kind: ActorKind
    login: str
    login_lower: str
    display_name: str | None = None
    avatar_url: str | None = None
    is_operator: bool = False  # may operate the whole site; people only
    turn: int = 0  # raised by writes that first count what this actor has: two at once collide
    created_at: datetime = Field(default_factory=utc_now)

    class Settings:
        name = "actors"
        indexes = [
            IndexModel([("login_lower", ASCENDING)], name="login", unique=True),
            IndexModel(
                [("login", TEXT), ("display_name", TEXT)],
                name="text",
                weights={"login": 10, "display_name": 5},
                default_language="none",
                language_override="text_language",
            ),
        ]


class MembershipDocument(BaseDocument):
    organization_id: PydanticObjectId
    user_id: PydanticObjectId
    role: Role
    created_at: datetime = Field(default_factory=utc_now)

    class Settings:
        name = "memberships"
        indexes = [
            IndexModel(
                [("organization_id", ASCENDING), ("user_id", ASCENDING)], name="member", unique=True
            ),
            IndexModel([("user_id", ASCENDING), ("_id", ASCENDING)], name="user"),
        ]
