"""What one GraphQL operation may use. Made anew for each, and dies with it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import strawberry

from modelharbor.loaders.base import Reads
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelharbor.auth.viewer import Viewer
    from modelharbor.loaders.budgets import Spending
    from modelharbor.observability.metrics import CacheCount


@dataclass(kw_only=True)
class Context(Reads):
    """Settings, engines and viewer, with the loaders of the operation."""

    settings: Settings
    storage: BlobStore
    request_id: str
    spending: "Spending | None" = None
    """What the operation is charged; None: nothing, as events of a subscription are not."""
    caches: "Sequence[CacheCount]" = ()
    """The layers of this process' caches."""

    @property
    def person(self) -> "Viewer":
        """The viewer, who must be somebody."""
        self.viewer.person_id()
        return self.viewer


Info: TypeAlias = strawberry.Info["Context", None]
