"""What one GraphQL operation may use. Made anew for each, and dies with it."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import strawberry

from modelharbor.loaders.base import Reads
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore

if TYPE_CHECKING:
    from modelharbor.auth.viewer import Viewer


@dataclass(kw_only=True)
class Context(Reads):
    """Settings, engines and viewer, with the loaders of the operation."""

    settings: Settings
    storage: BlobStore
    request_id: str
    shown: "list[tuple[str, str, asyncio.Future[Any]]]" = field(default_factory=list)
    """What graphql-core has loaded for fields that show models: the field's name in the answer, and the
    name of the model's id in the row."""

    @property
    def person(self) -> "Viewer":
        """The viewer, who must be somebody."""
        self.viewer.person_id()
        return self.viewer


Info: TypeAlias = strawberry.Info["Context", None]
