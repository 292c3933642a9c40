"""What each kind of job does: the one table."""

from collections.abc import Mapping
from typing import Final

from modelharbor.db.jobs import JobKind
from modelharbor.worker.tools import HandlerSpec

from .bulk_mutation import change_models
from .expire_uploads import sweep_uploads
from .export import export_rows
from .finalize_version import finalize_version
from .garbage_collect import collect_garbage
from .import_model import import_model
from .reindex import reindex_models
from .rollup_analytics import roll_up_usage
from .verify_blobs import compare_contents
from .verify_file import verify_file

HANDLERS: Final[Mapping[JobKind, HandlerSpec]] = {
    JobKind.IMPORT_MODEL: HandlerSpec(
        import_model, at_once=2
    ),  # each reads and writes 8 files at once
    JobKind.REINDEX: HandlerSpec(reindex_models, at_once=1),
    JobKind.GARBAGE_COLLECT: HandlerSpec(collect_garbage, at_once=1),
    JobKind.EXPIRE_UPLOADS: HandlerSpec(sweep_uploads, at_once=1),
    JobKind.BULK_MUTATION: HandlerSpec(change_models, at_once=2),
    JobKind.EXPORT: HandlerSpec(export_rows, at_once=2),  # a core each, and some 50 MB
    JobKind.ROLLUP_ANALYTICS: HandlerSpec(roll_up_usage, at_once=1),
    JobKind.VERIFY_BLOBS: HandlerSpec(compare_contents, at_once=1),
    JobKind.VERIFY_FILE: HandlerSpec(verify_file, at_once=4),
    JobKind.FINALIZE_VERSION: HandlerSpec(
        finalize_version, at_once=2
    ),  # the largest hold 100,000 files in memory
}
