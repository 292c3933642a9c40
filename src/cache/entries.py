"""An answer that is kept, and for whom it is good."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from bson import ObjectId

from .tags import Tag


class Access(Enum):
    """On what of the viewer an answer depends; each more than the one before."""

    ANYBODY = 0  # on nothing: what was read by key is public
    RIGHTS = 1  # on the principals that stand in some document
    VIEWER = 2  # on who it is


@dataclass(frozen=True, slots=True)
class Entry:
    """`position`: all changes up to this cluster time are in it; with later ones of its tags it is old."""

    body: bytes
    """JSON: `{"data":…}`, whole."""
    position: int
    tags: Collection[Tag]
    access: Access
    made_at: float
    """Seconds since 1970."""
    max_age: float
    """Seconds that it may be used."""
    stale: float = 0.0
    """Seconds beyond that while it is made anew."""
    is_private: bool = False
    """Not for caches that serve several people."""
    cost: int = 0
    """The actual cost of the operation."""
    viewed: tuple[ObjectId, ...] = ()
    """The models that it shows by their own field: whoever gets it has viewed them."""
    read_at: float = field(default=0.0, compare=False)
    """When all of it had been read, by the monotonic clock of this process; what another one has made,
    when it was fetched."""
