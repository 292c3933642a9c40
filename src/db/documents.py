"""All documents, for Beanie, migrations and guard tests."""

from .actors import ActorDocument, MembershipDocument
from .base import BaseDocument
from .bulk import BulkBatchDocument
from .cache import CacheDocument
from .events import EventDocument
from .files import BlobDocument, FileDocument
from .idempotency import IdempotencyDocument
from .jobs import JobDocument, JobLogDocument
from .models import CardDocument, LikeDocument, ModelDocument
from .persisted import PersistedDocument, PersistedUsageDocument
from .rollups import (
    DayRollupDocument,
    HomeDocument,
    MinuteRollupDocument,
    QuarterRollupDocument,
    RollupDeltaDocument,
    RollupStateDocument,
)
from .tokens import TokenDocument
from .uploads import QuotaDocument, UploadDocument
from .usage import DirtyMinuteDocument
from .versions import VersionDocument

DOCUMENTS: list[type[BaseDocument]] = [
    ActorDocument,
    MembershipDocument,
    ModelDocument,
    CardDocument,
    LikeDocument,
    VersionDocument,
    FileDocument,
    BlobDocument,
    TokenDocument,
    EventDocument,
    IdempotencyDocument,
    JobDocument,
    JobLogDocument,
    BulkBatchDocument,
    UploadDocument,
    QuotaDocument,
    PersistedDocument,
    PersistedUsageDocument,
    CacheDocument,
    DirtyMinuteDocument,
    MinuteRollupDocument,
    QuarterRollupDocument,
    DayRollupDocument,
    HomeDocument,
    RollupStateDocument,
    RollupDeltaDocument,
]
