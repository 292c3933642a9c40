"""Operations run as the endpoint runs them, without HTTP, with the commands that they cost."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.cache.client import Cache
from modelharbor.context import Context
from modelharbor.db.connection import Database
from modelharbor.execution.documents import DocumentStore
from modelharbor.execution.execute import run
from modelharbor.execution.failures import Problem
from modelharbor.execution.reading import Read
from modelharbor.loaders.lanes import Lanes
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.observability.metrics import CacheCount
from modelharbor.schema import core, schema
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore

GUARD_SECONDS: Final = 60.0  # against a hang


@dataclass
class Answer:
    data: Any
    errors: list[tuple[str, str | None]]  # (message, code)
    commands: list[str]
    fallback: str | None
    problems: list[Problem]
    """The errors whole."""
    batches: int
    read: Read | None = None


@dataclass
class Asker:
    """`await ask(document, viewer, name=value…)`"""

    database: Database
    cache: Cache
    settings: Settings
    storage: BlobStore
    viewer: Viewer = field(default=ANONYMOUS)
    seconds: float = GUARD_SECONDS
    lanes: Lanes | None = None
    position: int | None = None
    """With one, answers say what they were made of."""
    caches: Sequence[CacheCount] = ()

    def changed(self, **settings: Any) -> "Asker":
        """One with other settings, on the same data."""
        return replace(self, settings=self.settings.model_copy(update=settings))

    @property
    def by_core(self) -> "Asker":
        """One that asks graphql-core alone."""
        return self.changed(compiled_plans=False)

    @cached_property
    def documents(self) -> DocumentStore:
        return DocumentStore(core, self.settings)

    async def __call__(
        self,
        document: str,
        viewer: Viewer = ANONYMOUS,
        count: CommandCount | None = None,
        **variables: Any,
    ) -> Answer:
        context = Context(
            database=self.database,
            cache=self.cache,
            viewer=viewer,
            links=DownloadLinks(b"k" * 32, "http://test"),
            quota_bytes=self.settings.quota_bytes,
            export_link_minutes=self.settings.export_link_minutes,
            max_analytics_buckets=self.settings.max_analytics_buckets,
            max_analytics_models=self.settings.max_analytics_models,
            lanes=self.lanes,
            caches=self.caches,
            settings=self.settings,
            storage=self.storage,
            request_id="test",
        )
        count = count or CommandCount()
        found = self.documents.get(document)
        operation = found.operation(None)
        deadline = asyncio.get_running_loop().time() + self.seconds
        token = counted.set(count)
        try:
            result = await run(
                schema,
                found,
                operation,
                variables,
                context,
                deadline,
                position=self.position,
            )
        finally:
            counted.reset(token)
        errors = [(e["message"], e["extensions"].get("code")) for e in result.errors]
        return Answer(
            result.data,
            errors,
            count.names,
            result.fallback,
            result.errors,
            context.count.batches,
            result.read,
        )
