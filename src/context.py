"""What one GraphQL operation may use. Made anew for each, and dies with it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

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

    @property
    def person(self) -> "Viewer":
        """The viewer, who must be somebody."""
        self.viewer.person_id()
        return self.viewer


Info: TypeAlias = strawberry.Info["Context", None]
