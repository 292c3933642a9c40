"""What a process keeps in its own memory, bounded by bytes, so that reading everything once flushes nothing.

W-TinyLFU (https://arxiv.org/abs/1512.00727), for values of any size: what is new waits in a small
window; whoever leaves it gets a place among the kept only if it is asked for more often than all those
together that would have to go for it. How often, is remembered for keys that are not here, too.
"""

from collections import OrderedDict
from typing import Final, Generic, TypeVar

V = TypeVar("V")
OVERHEAD: Final = 340  # bytes for an entry beside its key and value, at most: see test_memory.py
WINDOW_SHARE: Final = 32
PROTECTED_SHARE: Final = 0.8  # of what is not the window: for those that were asked for again
LARGEST_SHARE: Final = 8
"""What is larger than this part of the whole is not kept."""
MOST: Final = 15  # four bits
_HALVED: Final = bytes((pair >> 1) & 0x77 for pair in range(256))


class Sketch:
    """About how often keys were seen: never too low, up to 15, and half of it forgotten now and then.

    Four rows of counters, two in a byte; a key has one in each, and the lowest is the nearest.
    """

    def __init__(self, width: int) -> None:
        """`width`: counters in a row; a power of two."""
        self._width = width
        self._counters = bytearray(4 * width // 2)

    @property
    def size(self) -> int:
        return len(self._counters)

    def add(self, hashed: int, times: int) -> None:
        for at in self._places(hashed):
            byte, shift = at >> 1, (at & 1) << 2
            pair = self._counters[byte]
            seen = (pair >> shift) & MOST
            more = min(seen + times, MOST)
            self._counters[byte] = pair & ~(MOST << shift) | more << shift

    def count(self, hashed: int) -> int:
        counters = self._counters
        return min((counters[at >> 1] >> ((at & 1) << 2)) & MOST for at in self._places(hashed))

    def halve(self) -> None:
        self._counters = self._counters.translate(_HALVED)

    def _places(self, hashed: int) -> tuple[int, int, int, int]:
        width, step = self._width, hashed >> 32 | 1
        mask = width - 1
        return (
            hashed & mask,
            width + (hashed + step & mask),
            2 * width + (hashed + 2 * step & mask),
            3 * width + (hashed + 3 * step & mask),
        )


class _Part(OrderedDict[bytes, "_Place[V]"], Generic[V]):
    """The longest unused first."""

    size = 0  # bytes of all its values


class _Place(Generic[V]):
    __slots__ = ("count", "era", "part", "size", "value")

    def __init__(self, value: V, size: int, part: _Part[V], era: int) -> None:
        self.value, self.size, self.part = value, size, part
        self.count = 0
        """How often it was asked for since it came; halved when an era has passed."""
        self.era = era


class Memory(Generic[V]):
    """Values by key. One that is here counts its uses itself: the sketch is for those that are not."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: bytes, all told."""
        width = 1024
        while width < min(capacity // 1024, 1 << 20):
            width *= 2
        self._sketch = Sketch(width)
        capacity = max(capacity - self._sketch.size, 0)
        self._largest = capacity // LARGEST_SHARE
        self._window_most = capacity // WINDOW_SHARE
        self._main_most = capacity - self._window_most
        self._protected_most = int(self._main_most * PROTECTED_SHARE)
        self._places: dict[bytes, _Place[V]] = {}
        self._window, self._probation, self._protected = _Part[V](), _Part[V](), _Part[V]()
        self._uses = self._era = 0

    @property
    def size(self) -> int:
        return self._sketch.size + sum(
            part.size for part in (self._window, self._probation, self._protected)
        )

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> V | None:
        place = self._places.get(key)
        if place is None:
            return None
        place.count += 1
        self._uses += 1
        part = place.part
        if part is self._probation:
            self._promote(key, place)
        else:
            part.move_to_end(key)
        return place.value

    def put(self, key: bytes, value: V, size: int) -> bool:
        """Whether it is kept now. `size`: bytes of the value."""
        size += OVERHEAD + len(key)
        if size > self._largest:
            self.drop(key)
            return False
        place = self._places.get(key)
        if place is None:
            self._seen(key)
            place = self._places[key] = _Place(value, size, self._window, self._era)
            self._window[key] = place
            if size > self._window_most:  # it would push out all others before it goes itself
                self._window.move_to_end(key, last=False)
        else:
            place.part.size -= place.size
            place.value, place.size = value, size
        place.part.size += size
        self._trim()
        return key in self._places

    def drop(self, key: bytes) -> None:
        place = self._places.get(key)
        if place is not None:
            self._forget(key, place)

    def _seen(self, key: bytes) -> None:
        self._sketch.add(hash(key), 1)
        self._uses += 1
        if self._uses > 10 * max(len(self._places), 1024):
            self._uses = 0
            self._era += 1
            self._sketch.halve()

    def _often(self, key: bytes, place: _Place[V]) -> int:
        place.count >>= self._era - place.era
        place.era = self._era
        return self._sketch.count(hash(key)) + place.count

    def _promote(self, key: bytes, place: _Place[V]) -> None:
        self._move(key, place, self._protected)
        while self._protected.size > self._protected_most:
            oldest = next(iter(self._protected))
            self._move(oldest, self._protected[oldest], self._probation)

    def _move(self, key: bytes, place: _Place[V], part: _Part[V]) -> None:
        del place.part[key]
        place.part.size -= place.size
        place.part = part
        part[key] = place
        part.size += place.size

    def _forget(self, key: bytes, place: _Place[V]) -> None:
        del self._places[key], place.part[key]
        place.part.size -= place.size
        place.count >>= self._era - place.era
        if place.count:
            self._sketch.add(hash(key), min(place.count, MOST))

    def _trim(self) -> None:
        while self._window.size > self._window_most:
            key = next(iter(self._window))
            self._admit(key, self._window[key])
        while self._main_bytes > self._main_most:  # one of those that are here has grown
            part = self._probation or self._protected
            key = next(iter(part))
            self._forget(key, part[key])

    @property
    def _main_bytes(self) -> int:
        return self._probation.size + self._protected.size

    def _admit(self, key: bytes, place: _Place[V]) -> None:
        """From the window to the others, or away."""
        missing = self._main_bytes + place.size - self._main_most
        if missing > 0:
            often = self._often(key, place)
            victims = []
            for part in (self._probation, self._protected):
                for other, victim in part.items():
                    if missing <= 0:
                        break
                    often -= self._often(other, victim)
                    if often <= 0:
                        self._forget(key, place)
                        return
                    missing -= victim.size
                    victims.append((other, victim))
            for other, victim in victims:
                self._forget(other, victim)
        self._move(key, place, self._probation)
