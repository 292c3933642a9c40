"""Bytes that arrive: in segments, each durable as far as it was flushed, below `incoming/` in the store.

A segment is written by one holder of an upload after another. Who goes on where another stopped says
at which byte; what lies beyond counts for nothing. Whoever does not know that the one before has ended
begins a segment of another key: then nothing that is written late can come among other bytes.

On local disk a segment is a file (folders.py), in other stores it is a row of objects (chunks.py).
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol, Self

from modelharbor.db.uploads import Segment

INCOMING: Final = "incoming"  # below which all of this lies


class Hash(Protocol):
    """Of hashlib."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...

    def digest(self) -> bytes: ...

    def copy(self) -> Self: ...


def segment_key(key: str) -> str:
    """Of the segment, or the whole, that an object belongs to: what follows a dot is its alone."""
    return key.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Left:
    """An object below `incoming/`: `segment_key` says to what it belongs."""

    key: str
    last_modified: datetime
    size_bytes: int


class SegmentWriter(ABC):
    """Open until its context ends: then what was not flushed is gone.

    A failure (InsufficientStorage, Unavailable) ends it: all that follows raises it again, what was
    flushed before stays. The hasher is then ahead of what was flushed: throw it away.
    """

    size: int
    """Bytes written so far, with those that were there before."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Waits when the store is slower than they come: what is kept in memory is bounded. The hasher
        gets them by and by; all of them before `flush` answers."""

    @abstractmethod
    async def flush(self) -> int:
        """How many bytes are durable now: all that were written before this call. May run in a task
        beside further writes."""


class Incoming(ABC):
    @abstractmethod
    def writer(
        self, key: str, at: int, hasher: Hash | None = None
    ) -> AbstractAsyncContextManager[SegmentWriter]:
        """Write a segment from byte `at` on; at 0 it may be new. NotStored where it is shorter."""

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Remove a segment, or a whole; what is not there is as good as removed."""

    @abstractmethod
    def final_key(self, segments: Sequence[Segment]) -> str | None:
        """Key of the one object that these segments are already; None: they are to be composed."""

    @abstractmethod
    async def compose(
        self,
        segments: Sequence[Segment],
        key: str,
        report: Callable[[int], None] | None = None,
    ) -> str:
        """Make one durable object of segments; its SHA-256. `report` gets the bytes of each part.

        Once more is as good as once, also when the segments have gone meanwhile. NotStored when bytes
        are missing; the object is whole, or not there.
        """

    @abstractmethod
    async def digest(self, key: str, size: int, report: Callable[[int], None] | None = None) -> str:
        """The SHA-256 of an object, read whole. NotStored where its size is another."""

    @abstractmethod
    def listed(self) -> AsyncIterator[Left]:
        """All that lies below `incoming/`, in no order."""

    async def close(self) -> None:
        """End what it keeps running."""
        return
