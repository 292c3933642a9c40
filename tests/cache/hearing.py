"""A stream that is only listened to."""

from modelharbor.cache.following import Following
from modelharbor.cache.tags import tags_of
from modelharbor.db.base import Row
from modelharbor.db.connection import Database

from .processes import until


class Heard:
    """All that a stream tells."""

    def __init__(self, database: Database) -> None:
        self.data = database.data
        self.changes: list[Row] = []
        self.times: list[int] = []
        self.reached_to: list[tuple[int, int]] = []  # position, and how many times before it
        self.position = 0
        self.lost_to: list[int] = []
        self.following = Following(database, self)

    def changed(self, change: Row, time: int) -> None:
        self.changes.append(change)
        self.times.append(time)

    def reached(self, position: int, asked_at: float) -> None:
        self.position = max(self.position, position)
        self.reached_to.append((position, len(self.times)))

    def lost(self, floor: int) -> None:
        self.lost_to.append(floor)

    async def opened(self) -> None:
        pass

    def server(self) -> object:
        return 1

    async def tags(self, count: int = 1) -> set[str]:
        """Of so many changes, which are all there are since the last time; without those of places in
        an order, see test_places.py."""
        await until(lambda: len(self.changes) >= count)
        found = {tag for change in self.changes for tag in tags_of(change) if "~" not in tag}
        assert len(self.changes) == count
        self.changes.clear()
        return found
