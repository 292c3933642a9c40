"""A bounded store of what was used last."""

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The last used, bounded by number and by size."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes, self.bytes = most, most_bytes, 0
        self._found: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: K) -> V | None:
        found = self._found.get(key)
        if found is None:
            return None
        self._found.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        if key in self._found:
            self.bytes -= self._found.pop(key)[1]
        self._found[key] = (value, size)
        self.bytes += size
        while len(self._found) > self.most or self.bytes > self.most_bytes:
            self.bytes -= self._found.popitem(last=False)[1][1]
