"""Which idempotency keys were used, for what, and what came of it."""

from datetime import datetime

from beanie import PydanticObjectId
from pymongo import ASCENDING, IndexModel

from .base import BaseDocument


class IdempotencyDocument(BaseDocument):
    user_id: PydanticObjectId
    operation: str  # name of the mutation
    key: str
    input_sha256: str
    result_id: PydanticObjectId  # the object that was made
    nonce: str  # what a secret is derived from again, where the answer holds one
    expires_at: datetime

    class Settings:
        name = "idempotency"
        indexes = [
            IndexModel(
                [("user_id", ASCENDING), ("operation", ASCENDING), ("key", ASCENDING)],
                name="key",
                unique=True,
            ),
            IndexModel([("expires_at", ASCENDING)], name="expires", expireAfterSeconds=0),
        ]
