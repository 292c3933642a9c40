"""How often models are downloaded, by day: what leaves the window of 30 days is known from here."""

from datetime import datetime

from beanie import PydanticObjectId
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument


class DownloadDayDocument(BaseDocument):
    model_id: PydanticObjectId
    day: datetime  # its first moment, UTC
    downloads: int
    in_window: bool = True  # counted in the model's `stats.downloads_30d`

    class Settings:
        name = "downloads"
        indexes = [
            IndexModel([("model_id", ASCENDING), ("day", ASCENDING)], name="day", unique=True),
            IndexModel(
                [("day", ASCENDING)],
                name="leaving",
                partialFilterExpression={"in_window": True},
            ),
        ]
