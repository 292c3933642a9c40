"""What each kind of job does: the one table."""

from collections.abc import Mapping
from typing import Final

from modelharbor.db.jobs import JobKind
from modelharbor.worker.tools import HandlerSpec

from .garbage_collect import collect_garbage
from .import_model import import_model
from .reindex import reindex_models

HANDLERS: Final[Mapping[JobKind, HandlerSpec]] = {
    JobKind.IMPORT_MODEL: HandlerSpec(
        import_model, at_once=2
    ),  # each reads and writes 8 files at once
    JobKind.REINDEX: HandlerSpec(reindex_models, at_once=1),
    JobKind.GARBAGE_COLLECT: HandlerSpec(collect_garbage, at_once=1),
}
