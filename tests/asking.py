"""Operations run on the schema directly, with the commands that they cost."""

from dataclasses import dataclass, field
from typing import Any

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.cache.client import Cache
from modelharbor.context import Context
from modelharbor.db.connection import Database
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.schema import schema
from modelharbor.settings import Settings


@dataclass
class Answer:
    data: Any
    errors: list[tuple[str, str | None]]  # (message, code)
    commands: list[str]


@dataclass
class Asker:
    """`await ask(document, viewer, name=value…)`"""

    database: Database
    cache: Cache
    settings: Settings
    viewer: Viewer = field(default=ANONYMOUS)

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
            settings=self.settings,
            request_id="test",
        )
        count = count or CommandCount()
        token = counted.set(count)
        try:
            result = await schema.execute(
                document, variable_values=variables, context_value=context
            )
        finally:
            counted.reset(token)
        errors = [(e.message, (e.extensions or {}).get("code")) for e in result.errors or ()]
        return Answer(result.data, errors, count.names)
