"""What bulk changes have still to do."""

from beanie import PydanticObjectId
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument


class BulkBatchDocument(BaseDocument):
    """Models that a job is to change in one transaction, which removes this too.

    All of a job are made together, when it begins.
    """

    job_id: PydanticObjectId
    number: int  # in their order, from 0
    model_ids: list[PydanticObjectId]

    class Settings:
        name = "bulk_batches"
        indexes = [
            IndexModel([("job_id", ASCENDING), ("number", ASCENDING)], name="job", unique=True)
        ]
