"""The one DataLoader: aiodataloader's, with four defects mended and its work counted."""

import contextvars
from asyncio import CancelledError, shield
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Self, TypeVar, cast

from aiodataloader import DataLoader, dispatch_queue
from aiodataloader import Loader as Queued

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache
from modelharbor.cache.entries import Access
from modelharbor.cache.tags import Tag
from modelharbor.db.base import BaseDocument, Row
from modelharbor.db.connection import Database
from modelharbor.errors import Unavailable
from modelharbor.observability.metrics import CacheCount

if TYPE_CHECKING:
    from .budgets import Spending
    from .lanes import Lanes

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
A = TypeVar("A", bound=Hashable)
ROOT = "root"  # the key of a field of Query: aiodataloader refuses None


class Sharing(Enum):
    """With whom a batch of a loader may be read together: see lanes.py."""

    NEVER = "never"  # it depends on who asks in other ways
    EQUAL_RIGHTS = "equal rights"  # it depends on `viewer.principals` alone
    EVERYBODY = "everybody"  # it does not look at who asks


_ACCESS: Final = {
    Sharing.NEVER: Access.VIEWER,
    Sharing.EQUAL_RIGHTS: Access.RIGHTS,
    Sharing.EVERYBODY: Access.ANYBODY,
}


@dataclass(slots=True)
class LoadCount:
    batches: int = 0
    keys: int = 0


@dataclass(kw_only=True)
class Reads:
    """What the loaders of one operation share. They live as long as the operation, no longer."""

    database: Database
    cache: Cache
    viewer: Viewer
    links: DownloadLinks
    quota_bytes: int | None = None
    """What each owner's files may come to, where no quota was set; None: no limit."""
    export_link_minutes: float = 60.0
    """How long a link to what an export has written is good."""
    max_analytics_buckets: int = 500_000
    max_analytics_models: int = 10_000
    """What one question of analytics may read, and be about: see settings."""
    lanes: "Lanes | None" = None
    """Of the process; None: each read goes alone."""
    spending: "Spending | None" = None
    """What the operation is charged; None: nothing, as events of a subscription are not."""
    caches: Sequence[CacheCount] = ()
    """What each layer of the process' caches did."""
    count: LoadCount = field(default_factory=LoadCount)
    _loaders: dict[Hashable, Any] = field(default_factory=dict)

    def loader(self, loader: "type[Loader[K, R, A]]", arguments: A) -> "Loader[K, R, A]":
        """The operation's one loader of that kind and those arguments: equal ones share batches."""
        found = self._loaders.get((loader, arguments))
        if found is None:
            found = self._loaders[loader, arguments] = loader(self, arguments)
        return cast("Loader[K, R, A]", found)

    def forget(self) -> None:
        """What was read so far is not read again: after a change within the operation."""
        self._loaders.clear()


def projection(names: Iterable[str]) -> dict[str, int] | None:
    """For MongoDB, which takes no name beside a part of it; None for whole rows."""
    wanted = set(names)
    return {
        name: 1
        for name in wanted
        if not any(name[:at] in wanted for at, letter in enumerate(name) if letter == ".")
    } or None


class Loader(DataLoader[K, R], Generic[K, R, A]):
    """One batch read for one value of the field's arguments.

    graphql-core calls `load`; a plan calls `batch_load` itself, once a level, with the stored
    names that it needs as `fields` (empty: whole rows).
    """

    document: ClassVar[type[BaseDocument] | None] = None
    """Whose rows it answers: a guard test holds the names that fields read against it."""
    sharing: ClassVar[Sharing] = Sharing.NEVER
    shows: ClassVar[str] = ""
    """Where a row that it finds shows a model, which is then viewed: the name of the model's id in it."""

    def __init__(self, reads: Reads, arguments: A, fields: frozenset[str] = frozenset()) -> None:
        super().__init__(cast("Any", self._dispatched))
        self.reads, self.arguments, self.fields = reads, arguments, fields
        self.recorded: Mapping[K, R | Exception] = {}
        self._origin = contextvars.copy_context()

    @classmethod
    def of_batch(cls, reads: Reads, arguments: A, fields: frozenset[str]) -> Self:
        """For one call of `batch_load`: without the queue and the cache of a DataLoader."""
        made = cls.__new__(cls)
        made.reads, made.arguments, made.fields = reads, arguments, fields
        return made

    @property
    def most_keys(self) -> int:
        """How many keys of several operations go into one batch."""
        return 1000

    async def batch_load(self, keys: list[K]) -> Sequence[R | Exception]:
        """One answer for each key, in their order; an exception fails its own key only."""
        raise NotImplementedError

    async def found(self, keys: list[K]) -> dict[K, R | Exception]:
        """The answers of `batch_load` by key."""
        return dict(zip(keys, await self.batch_load(keys), strict=True))

    def tags(self, keys: Sequence[K], found: Mapping[K, Any]) -> Iterable[Tag] | None:
        """All that the answers for `keys` were made of: with any change that concerns them one of the
        tags is bumped, also where something begins to be there. None: that cannot be told, and the
        answer is not kept. Of `found` only what belongs to `keys` is looked at."""
        return None

    def access(self, keys: Sequence[K], found: Mapping[K, Any]) -> Access:
        """On what of the viewer the answers for `keys` depend."""
        return _ACCESS[self.sharing]

    def age(self, keys: Sequence[K], found: Mapping[K, Any]) -> float:
        """Seconds for which the answers for `keys` have been kept elsewhere already."""
        return 0.0

    def load(self, key: K) -> Any:
        # A future of its own for each caller: graphql-core cancels what is beside a failure, and who
        # is cancelled would take along all who wait for the same key.
        own = shield(super().load(key))
        own.add_done_callback(lambda done: self.clear(key) if done.cancelled() else None)
        return own

    def do_resolve_reject(self, key: K, future: Any) -> None:
        # In the context that made the loader: the batch is the operation's, not its first caller's.
        if not self._queue:
            self.loop.call_soon(dispatch_queue, self, context=self._origin)
        self._queue.append(Queued(key, future))

    def names(self, *always: str) -> Iterable[str]:
        """The stored names to read of rows; none: whole rows."""
        return self.fields.union(always) if self.fields else ()

    async def find(self, collection: str, query: Row, names: Iterable[str] = ()) -> list[Row]:
        """Rows in one command."""
        return await self.reads.database.find(collection, query, projection=projection(names))

    async def _dispatched(self, keys: list[K]) -> list[R | Exception]:
        missing = [key for key in keys if key not in self.recorded] if self.recorded else keys
        found = dict(zip(missing, await self._read(missing), strict=True)) if missing else {}
        answers = [found[key] if key in found else self.recorded[key] for key in keys]
        for key, value in zip(keys, answers, strict=True):
            if isinstance(value, Exception):
                self.clear(key)  # a failure is answered, not remembered
        return answers

    async def _read(self, keys: list[K]) -> list[R | Exception]:
        self.reads.count.batches += 1
        self.reads.count.keys += len(keys)
        try:
            return list(await self.batch_load(keys))
        except CancelledError:
            # Left to itself the dispatch would die and leave every other waiter hanging.
            raise Unavailable("The read was cancelled.") from None
