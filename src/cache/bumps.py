"""What has changed lately: for each tag the cluster time of its last change."""

from collections.abc import Collection, Iterable
from typing import Final

from .tags import Tag

MOST_TAGS: Final = 150_000
"""Of one generation; there are two."""
GENERATION_SECONDS: Final = 60.0


class Bumps:
    """Cluster times of changes by tag, in two generations: the older one is forgotten as a whole.

    `floor`: of positions below it nothing can be said; what was forgotten lies before it.
    `version` grows with everything that may make an entry old.
    """

    __slots__ = ("_began", "_last", "_new", "_old", "_old_last", "count", "floor", "version")

    def __init__(self, now: float) -> None:
        self.floor = 0
        self.version = 0
        self.count = 0
        self._new: dict[Tag, int] = {}
        self._old: dict[Tag, int] = {}
        self._last = self._old_last = 0  # the latest time in each
        self._began = now

    def add(self, tags: Collection[Tag], time: int) -> None:
        """Times never get less, unless a stream begins again: then what is known already stays."""
        if time < self._last:
            new = self._new
            for tag in tags:
                if new.get(tag, 0) < time:
                    new[tag] = time
        else:
            self._new.update(dict.fromkeys(tags, time))
            self._last = time
        self.version += 1
        self.count += len(tags)

    @property
    def last(self) -> int:
        """The cluster time of the last change."""
        return max(self._last, self._old_last)

    def is_current(self, position: int, tags: Iterable[Tag]) -> bool:
        """Whether nothing of it has changed after `position`."""
        if position < self.floor:
            return False
        # Most entries are younger than most changes of anything else.
        return (self._last <= position or not _has_later(self._new, tags, position)) and (
            self._old_last <= position or not _has_later(self._old, tags, position)
        )

    def age(self, now: float) -> None:
        """Begin a new generation when it is time."""
        if len(self._new) > MOST_TAGS or now - self._began >= GENERATION_SECONDS:
            self.floor = max(self.floor, self._old_last)
            self._old, self._new = self._new, {}
            self._old_last = self._last
            self._began = now

    def forget(self, floor: int) -> None:
        """Nothing is known of what lies before `floor`."""
        self.floor = max(self.floor, floor)
        self.version += 1


def _has_later(known: dict[Tag, int], tags: Iterable[Tag], position: int) -> bool:
    for tag in tags:
        time = known.get(tag)
        if time is not None and time > position:
            return True
    return False
