"""What every source of a subscription can do.

A source is a frozen dataclass of what was asked for, without where to go on (`after`) and how often:
subscriptions with equal sources share one `Follower`, so each change is looked at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.events.changes import Change, Topic
from modelharbor.loaders.base import Reads, Sharing


@dataclass(frozen=True, slots=True, eq=False)
class Happening:
    """One event of a subscription. `row` is what the type of the field reads; for its `cursor` the
    names `stream`, `position` and `sequence` are added to it."""

    position: str
    row: Row
    sequence: int = 0
    """Where its subject counts its own changes: an older one than was sent is not sent."""
    key: Hashable = None
    """Its subject, of those that `is_passing`: a newer one takes the place of an older one."""
    is_passing: bool = False
    """May be left out when a newer one of the same key follows: progress."""
    is_final: bool = False
    """Nothing follows it: the subscription is complete."""


class Source(ABC):
    sharing: ClassVar[Sharing]
    """Of what it reads itself: who may share a follower."""
    pace: ClassVar[float] = 0.0
    """Seconds that pass at least between two looks at changes, where a look costs much."""
    kept_days: ClassVar[float | None] = None
    """How long `after` is good for; None: as long as events are kept."""

    @property
    @abstractmethod
    def stream(self) -> str:
        """Stands in cursors, hashed: a cursor of another stream is refused. Names field and subject."""

    @property
    @abstractmethod
    def topics(self) -> tuple[Topic, ...]: ...

    @property
    @abstractmethod
    def query(self) -> Row | None:
        """Filter of the events in the log that may belong to it; None: it is not made of events."""

    @property
    def takes_after(self) -> bool:
        return self.query is not None

    @abstractmethod
    async def check(self, reads: Reads) -> None:
        """May this viewer watch it? Raises a HarborError (Unauthenticated, NotFound …) when not.
        At the start, and again whenever the viewer's rights have changed."""

    @abstractmethod
    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        """Of events from the log, those that belong to it and may be seen. `reads` is made anew for
        each call, with a viewer of the rights that share a follower."""

    @abstractmethod
    def follow(self) -> "Follower": ...

    def permits(self, viewer: Viewer, happening: Happening) -> bool:
        """Where those who share a follower may differ in what they may see. Reads nothing."""
        return True


class Follower(ABC):
    """Follows what a source names, from `begin` on."""

    @abstractmethod
    async def begin(self, reads: Reads, position: str) -> None:
        """Read what stands now. Called once, after the reader hands over changes; those up to
        `position` are in what is read, later ones may be."""

    @abstractmethod
    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        """What changes, in order, come to."""

    due: float | None = None
    """By the clock of the event loop: when it wants a look although nothing may have changed."""
    ahead: str = ""
    """What `begin` has read may hold changes up to this place of the log, whose events are not told
    then: who comes back with `after` waits until the reader is there, and has them from the log."""

    def standing(self) -> Happening | None:
        """What one who comes now is told first; the same object until it changes. None: nothing."""
        return None

    def standings(self) -> Sequence[Happening]:
        """The same where there are several subjects, one for each."""
        standing = self.standing()
        return () if standing is None else (standing,)

    @property
    def is_over(self) -> bool:
        """Whether nothing will follow what stands."""
        standing = self.standing()
        return standing is not None and standing.is_final


class Place(NamedTuple):
    """How far a subscription has come."""

    position: str
    sequence: int


class Summing(Follower):
    """Adds up what happens: each event tells what came since those before it. So all who share it
    stand at one place, and who joins is first brought there."""

    place: Place
    """Up to here all is told, or about to be. Changed by `begin` and `happenings` alone, at their end."""

    @abstractmethod
    async def newest(self, reads: Reads) -> int:
        """The sequence where one begins who comes now: what is committed is before it."""

    @abstractmethod
    def hurry(self) -> None:
        """Have told at the next look what is added up, be it due or not: somebody waits for it."""

    @abstractmethod
    async def missed(self, reads: Reads, since: Place, until: Place) -> list[Happening]:
        """What came between two places, the second one a `place` of this."""


@dataclass(frozen=True, slots=True)
class Subscribed:
    """What a field of Subscription was asked for."""

    source: Source
    after: str | None = None
    """The cursor to go on from."""
    rate: float | None = None
    """Passing events of one key in a second, at most; None: as many as come."""
