"""Answers that are kept: in the process (memory.py), in Redis (shared.py), and made once for all who wait.

An entry is used only where `Freshness` says that it is current. Whoever asks has come by a round before
(`Freshness.ready`), so that all that was acknowledged until then is known here.
"""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from enum import Enum
from time import time
from typing import Any, Final, Protocol

from bson import ObjectId

from modelharbor.db.ending import ended
from modelharbor.errors import HarborError
from modelharbor.observability.metrics import CacheCount, Metrics
from modelharbor.settings import Settings

from .client import Cache
from .entries import Access, Entry
from .memory import Memory
from .shared import Claim, Shared, open_shared
from .tags import Tag

log = logging.getLogger(__name__)
HOT: Final = 5
"""An entry that was used so often since it was made is made anew before it is too old."""
FRESH_SHARE: Final = 0.8  # of its time, before that begins
MOST_REFRESHES: Final = 16  # at once
TRIES: Final = 3  # others' answers that turn out old, before one is made alone
POLL_SECONDS: Final = (0.01, 0.02, 0.03, 0.04)  # for what another process is making
UNKEPT_SECONDS: Final = 5.0
"""How long it is remembered that answers of an operation cannot be kept: nobody waits for them."""
MOST_LEARNED: Final = 20_000
TAG_BYTES: Final = sys.getsizeof("") + 8  # beside its letters, and its place
VIEWED_BYTES: Final = sys.getsizeof(ObjectId()) + sys.getsizeof(b"") + 12 + 8
ENTRY_BYTES: Final = 560  # of the objects around a body and its tags; measured in test_answers.py


class Judge(Protocol):
    """What `Freshness` tells of changes."""

    @property
    def position(self) -> int: ...
    @property
    def version(self) -> int: ...
    def is_current(self, position: int, tags: Collection[Tag]) -> bool: ...


class Layer(Enum):
    """Where an answer came from."""

    L1 = "l1"
    L2 = "l2"
    MISS = "miss"
    BYPASS = "bypass"
    STALE = "stale"
    JOINED = "joined"  # it was being made for another request


@dataclass(frozen=True, slots=True)
class Made:
    """What was computed. `entry` None: it is not to be kept."""

    answer: Any
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Served:
    """One of both, or both: `made` where this request made it."""

    entry: Entry | None
    made: Made | None
    layer: Layer


Make = Callable[[], Awaitable[Made]]
"""Computes the answer. Also called later, when the request that brought it has long been answered."""


class _Held:
    """An entry in memory. `position` and `version`: as of the last look at what has changed."""

    __slots__ = ("due", "entry", "hits", "is_renewing", "position", "version")

    def __init__(self, entry: Entry, version: int) -> None:
        self.entry, self.position, self.version = entry, entry.position, version
        self.hits, self.is_renewing = 0, False
        self.due = entry.made_at + entry.max_age * FRESH_SHARE


class _End(Enum):
    """How a flight ended that brought no entry."""

    UNKEPT = "unkept"
    FAILED = "failed"
    LEFT = "left"  # whoever made it was called off


@dataclass(frozen=True, slots=True)
class _Asked:
    """Under which names an answer may lie."""

    base: bytes
    rights: str
    viewer: str
    is_private: bool

    def key(self, access: Access) -> bytes:
        if access is Access.ANYBODY:
            return anybody_key(self.base)
        if access is Access.RIGHTS:
            return rights_key(self.base, self.rights)
        return viewer_key(self.base, self.rights, self.viewer)

    def key_of(self, entry: Entry) -> bytes:
        is_private = self.is_private or entry.is_private
        return self.key(Access.VIEWER if is_private else entry.access)

    @property
    def keys(self) -> list[bytes]:
        return [self.key(each) for each in ([Access.VIEWER] if self.is_private else Access)]


# No text of rights or of a viewer has a zero in it, so no two of these are ever equal.
def anybody_key(base: bytes) -> bytes:
    return b"a\0" + base


def rights_key(base: bytes, rights: str) -> bytes:
    return b"r%b\0%b" % (rights.encode(), base)


def viewer_key(base: bytes, rights: str, viewer: str) -> bytes:
    """With the rights, which one person has more of through one token than through another."""
    return b"v%b\0%b\0%b" % (viewer.encode(), rights.encode(), base)


def entry_bytes(entry: Entry) -> int:
    """What it takes in memory."""
    tags = entry.tags
    told = sum(map(len, tags)) + TAG_BYTES * len(tags) + VIEWED_BYTES * len(entry.viewed)
    return ENTRY_BYTES + len(entry.body) + told


class Answers:
    """Of one process. Keys: `base` names the operation with its variables, `rights` and `viewer` whose
    answer it is where it is not anybody's; neither has a zero character."""

    def __init__(
        self,
        freshness: Judge,
        shared: Shared | None,
        capacity: int,
        count: CacheCount | None = None,
        shared_count: CacheCount | None = None,
    ) -> None:
        """`capacity`: bytes of memory; `shared` None: this process keeps for itself alone."""
        self.count = count or CacheCount("l1")
        self.shared_count = shared_count or CacheCount("l2")
        self.shared = shared
        self._freshness = freshness
        self._memory: Memory[_Held] = Memory(capacity)
        self._flights: dict[bytes, asyncio.Future[Entry | _End]] = {}
        self._renewing: set[asyncio.Task[None]] = set()
        self._learned: dict[bytes, Access | float] = {}
        self.count.sizes = lambda: (len(self._memory), self._memory.size)
        if shared is not None:
            self.shared_count.sizes = shared.sizes

    def peek(self, base: bytes, rights: str, viewer: str) -> Entry | None:
        """What is in memory, current and not too old. None also where `answer` has something to do
        beside serving it."""
        return (
            self._peek(anybody_key(base))
            or self._peek(rights_key(base, rights))
            or self._peek(viewer_key(base, rights, viewer))
        )

    async def answer(
        self, base: bytes, rights: str, viewer: str, is_private: bool, make: Make
    ) -> Served:
        """From memory, from Redis, or made; raises what `make` raises, of this request alone."""
        asked = _Asked(base, rights, viewer, is_private)
        found = self._in_memory(asked, make)
        if found is not None:
            return found
        self.count.misses += 1
        for number in range(TRIES):
            if number and (found := self._in_memory(asked, make)):
                return found
            learned = self._learned.get(base)
            if isinstance(learned, float):
                if time() < learned:
                    break
                del self._learned[base]
            key = self._flight_key(asked)
            flight = self._flights.get(key)
            if flight is None:
                return await self._fly(key, asked, make)
            end = await asyncio.shield(flight)
            if isinstance(end, Entry):
                if self._is_for(asked, key, end) and self._freshness.is_current(
                    end.position, end.tags
                ):
                    self.count.joined += 1
                    return Served(end, None, Layer.JOINED)
            elif end is not _End.LEFT:
                break
        made = await make()
        self._keep(asked, made)
        return Served(made.entry, made, Layer.MISS)

    async def close(self) -> None:
        """End what is being made in the background."""
        await ended(*self._renewing)

    def _peek(self, key: bytes) -> Entry | None:
        held = self._memory.get(key)
        if (
            held is None
            or not self._is_current(key, held)
            or (time() >= held.due and not self._may_wait(key, held))
        ):
            return None
        held.hits += 1
        self.count.hits += 1
        return held.entry

    def _is_current(self, key: bytes, held: _Held) -> bool:
        freshness = self._freshness
        if held.version != freshness.version:
            if not freshness.is_current(held.position, held.entry.tags):
                self.count.invalidations += 1
                self._memory.drop(key)
                return False
            held.version = freshness.version
        # Nothing in it has changed until then, so it is as good as if it were read now.
        position = freshness.position
        if position > held.position:
            held.position = position
        return True

    def _may_wait(self, key: bytes, held: _Held) -> bool:
        """Whether what is due to be made anew need not be, now."""
        entry, now = held.entry, time()
        if now < entry.made_at + entry.max_age:
            return held.hits < HOT or held.is_renewing or len(self._renewing) >= MOST_REFRESHES
        if now >= entry.made_at + entry.max_age + entry.stale:
            self._memory.drop(key)
        return False

    def _in_memory(self, asked: _Asked, make: Make) -> Served | None:
        for key in asked.keys:
            held = self._memory.get(key)
            if held is None or not self._is_current(key, held):
                continue
            entry, now = held.entry, time()
            age = now - entry.made_at
            if age >= entry.max_age + entry.stale:
                self._memory.drop(key)
                continue
            if now >= held.due and (age >= entry.max_age or not self._may_wait(key, held)):
                self._renew(asked, held, make)
            held.hits += 1
            self.count.hits += 1
            if age < entry.max_age:
                return Served(entry, None, Layer.L1)
            self.count.stale += 1
            return Served(entry, None, Layer.STALE)
        return None

    def _flight_key(self, asked: _Asked) -> bytes:
        """With whom to wait for an answer: as far as is known, all who may have the same."""
        learned = self._learned.get(asked.base)
        if asked.is_private:
            return asked.key(Access.VIEWER)
        return asked.key(learned if isinstance(learned, Access) else Access.RIGHTS)

    def _is_for(self, asked: _Asked, flight: bytes, entry: Entry) -> bool:
        """Whether an answer that was made for others of the same flight is this request's, too."""
        if asked.is_private or entry.is_private or entry.access is Access.VIEWER:
            return flight == asked.key(Access.VIEWER)
        if entry.access is Access.RIGHTS:
            return flight != asked.key(Access.ANYBODY)
        return True

    async def _fly(
        self, key: bytes, asked: _Asked, make: Make, renewed: _Held | None = None
    ) -> Served:
        """Get or make it, for all who come meanwhile. `renewed`: what is to be replaced."""
        flight = asyncio.get_running_loop().create_future()
        self._flights[key] = flight
        end: Entry | _End = _End.FAILED
        try:
            served = await self._fetch(key, asked, make, renewed)
            end = served.entry or (_End.UNKEPT if served.made else _End.LEFT)
            return served
        except (asyncio.CancelledError, HarborError):
            end = _End.LEFT  # it may be of this request alone: another one takes over
            raise
        finally:
            del self._flights[key]
            flight.set_result(end)

    async def _fetch(self, key: bytes, asked: _Asked, make: Make, renewed: _Held | None) -> Served:
        shared = self.shared
        if shared is None:
            made = await make()
            self._keep(asked, made)
            return Served(made.entry, made, Layer.MISS)
        names = _Names(shared, asked)
        lock = f"{names.of(key)}:lock"
        found, claim = await self._look(shared, names, lock, renewed)
        if renewed is None:
            for seconds in POLL_SECONDS:
                if claim is not Claim.THEIRS:
                    break
                await asyncio.sleep(seconds)
                found, claim = await self._look(shared, names, lock, renewed)
        if found is not None:
            self.shared_count.hits += 1
            self._hold(asked, found)
            return Served(found, None, Layer.L2)
        if renewed is not None and claim is Claim.THEIRS:
            return Served(None, None, Layer.MISS)  # another process is at it
        self.shared_count.misses += 1
        ours: str | None = lock if claim is Claim.OURS else None
        try:
            made = await make()
            if self._keep(asked, made):
                assert made.entry is not None
                name = names.of(asked.key_of(made.entry))
                shared.put(name, made.entry, [other for other in names.all if other != name], ours)
                ours = None
            return Served(made.entry, made, Layer.MISS)
        finally:
            if ours is not None:
                shared.give_back(ours)

    async def _look(
        self, shared: Shared, names: "_Names", lock: str, renewed: _Held | None
    ) -> tuple[Entry | None, Claim]:
        """A current entry from Redis, else who is to make one."""
        left = names.all
        while True:
            looked = await shared.look(left, lock, self.shared_count)
            entry = looked.entry
            if looked.at == 0:
                return None, looked.claim
            if entry is not None:
                age = time() - entry.made_at
                if age < 0:  # by the clock of another machine
                    entry, age = replace(entry, made_at=time()), 0.0
                if not self._freshness.is_current(entry.position, entry.tags):
                    self.shared_count.invalidations += 1
                elif age < entry.max_age and (
                    renewed is None or entry.made_at > renewed.entry.made_at
                ):
                    return entry, Claim.NONE
            left = left[looked.at :]

    def _keep(self, asked: _Asked, made: Made) -> bool:
        """Whether what was made may be kept, and is still current."""
        if made.entry is None:
            self._learn(asked.base, time() + UNKEPT_SECONDS)
            return False
        return self._hold(asked, made.entry)

    def _hold(self, asked: _Asked, entry: Entry) -> bool:
        self._learn(asked.base, entry.access)
        freshness = self._freshness
        if not freshness.is_current(entry.position, entry.tags):
            return False
        if not isinstance(entry.tags, tuple):
            entry = replace(entry, tags=tuple(entry.tags))  # a set takes much more
        held = _Held(entry, freshness.version)
        self._memory.put(asked.key_of(entry), held, entry_bytes(entry))
        return True

    def _learn(self, base: bytes, what: Access | float) -> None:
        if len(self._learned) >= MOST_LEARNED and base not in self._learned:
            self._learned.clear()  # what is asked for often is soon learned again
        self._learned[base] = what

    def _renew(self, asked: _Asked, held: _Held, make: Make) -> None:
        """Make it anew in the background; while that goes on, all are served what there is."""
        key = self._flight_key(asked)
        if held.is_renewing or key in self._flights or len(self._renewing) >= MOST_REFRESHES:
            return
        held.is_renewing = True
        # In a context of its own: nothing of it belongs to the request that was there first.
        task = asyncio.get_running_loop().create_task(
            self._renewed(key, asked, held, make), context=Context()
        )
        self._renewing.add(task)
        task.add_done_callback(self._renewing.discard)

    async def _renewed(self, key: bytes, asked: _Asked, held: _Held, make: Make) -> None:
        try:
            if key in self._flights:
                return
            served = await self._fly(key, asked, make, held)
            self.count.refreshed += served.made is not None
        except Exception as error:
            log.warning("answers.not_refreshed error=%r", error)
        finally:
            held.is_renewing = False
            # Where that was in vain, the next try is a little later.
            held.due = time() + max(held.entry.max_age / 20, 0.5)


class _Names:
    """In Redis; all of one operation are in one slot of a cluster."""

    def __init__(self, shared: Shared, asked: _Asked) -> None:
        self._seal = shared.seal
        self._root = f"{shared.prefix}:answer:{{{self._seal.name(asked.base)}}}"
        self.all = [self.of(key) for key in asked.keys]

    def of(self, key: bytes) -> str:
        return f"{self._root}:{self._seal.name(key)}"


@asynccontextmanager
async def open_answers(
    cache: Cache, freshness: Judge, settings: Settings, secret: bytes, metrics: Metrics
) -> AsyncIterator[Answers]:
    """`secret`: equal for all processes that share Redis."""
    async with open_shared(cache, settings, secret) as shared:
        answers = Answers(
            freshness, shared, settings.cache_bytes, metrics.answers, metrics.shared_answers
        )
        try:
            yield answers
        finally:
            await answers.close()
