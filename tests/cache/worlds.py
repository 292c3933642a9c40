"""Changes for tests of what is kept, without a database: as `Freshness` tells of them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from time import time
from typing import Any

from modelharbor.cache.entries import Access, Entry
from modelharbor.cache.tags import Tag


@dataclass
class World:
    """Time passes by changes alone."""

    position: int = 1
    version: int = 0
    floor: int = 0
    bumps: dict[Tag, int] = field(default_factory=dict)
    asked: int = 0

    def change(self, *tags: Tag) -> None:
        self.position += 1
        self.version += 1
        for tag in tags:
            self.bumps[tag] = self.position

    def is_current(self, position: int, tags: Collection[Tag]) -> bool:
        self.asked += 1
        return position >= self.floor and all(self.bumps.get(tag, 0) <= position for tag in tags)


def entry(world: World, **values: Any) -> Entry:
    return Entry(
        **{
            "body": b'{"data":1}',
            "position": world.position,
            "tags": frozenset({"models/1"}),
            "access": Access.ANYBODY,
            "made_at": time(),
            "max_age": 60.0,
            **values,
        }
    )
