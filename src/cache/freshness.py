"""Whether what is kept may still be used: no answer is older than a write that was acknowledged.

Every process hears of all changes (following.py) and knows up to which cluster time it has heard of
them: its `position`. Who writes raises a number in Redis to the cluster time of the write before it
acknowledges; who reads asks for that number with the next round trip (rounds.py), and goes by what is
kept only once it has heard of everything up to it. Whatever is not certain is answered by MongoDB.

Redis may forget: then the number is set to MongoDB's own time, which is later than all writes that were
acknowledged before. Who cannot reach Redis waits until every process must have heard of its write, for
one that has not heard for a second uses nothing that is kept; and suspends all use of it meanwhile, so
that those who write after it need not wait.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from pymongo.errors import PyMongoError
from pymongo.server_type import SERVER_TYPE
from pymongo.topology_description import TOPOLOGY_TYPE, TopologyDescription
from redis.exceptions import RedisError

from modelharbor.db.base import Row
from modelharbor.db.cache import FOLLOWED, SUSPENSION
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.observability.logging import log_event
from modelharbor.settings import Settings

from . import keys
from .bumps import Bumps
from .client import Cache
from .following import Following, pack
from .rounds import Part, Rounds, Send, running
from .tags import Tag, tags_of

log = logging.getLogger(__name__)
MOST_AGE_SECONDS: Final = 1.0
"""Without having heard for so long that everything is known, nothing that is kept is used."""
HEARD_SECONDS: Final = 1.05
"""After that, everybody has heard of a change, or uses nothing that is kept."""
REACH_SECONDS: Final = 0.05  # how long a request waits for changes that it must know of
SUSPENDED_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 0.3  # how long a writer tries to reach Redis again
EXTEND_SECONDS: Final = 3.0  # with less left it is extended
AHEAD: Final = 60 << 32  # a cluster time so far ahead of MongoDB's own is none
RAISE: Final = """
local known = redis.call('GET', KEYS[1])
if not known or #known ~= 16 then return false end
if ARGV[1] > known then redis.call('SET', KEYS[1], ARGV[1]) return ARGV[1] end
return known
"""
"""Only what is there is raised: who finds it lost asks MongoDB what it has to be, at least."""
SET: Final = """
local known = redis.call('GET', KEYS[1])
if known and #known == 16 and ARGV[1] <= known and known <= ARGV[2] then return known end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
"""


@dataclass(slots=True)
class FreshnessStats:
    changes: int = 0  # heard of
    forgotten: int = 0  # times that everything kept became unusable
    suspensions: int = 0  # written by this process
    recoveries: int = 0  # times that the number in Redis was not to be trusted
    late: int = 0  # requests that did not wait any longer for changes


class Freshness:
    """What one process knows. Opened by `open_freshness`."""

    def __init__(
        self, database: Database, cache: Cache, settings: Settings, parts: tuple[Part, ...] = ()
    ) -> None:
        self.is_enabled = settings.response_cache
        self.stats = FreshnessStats()
        self._database, self._client = database, database.client
        self._cache, self._settings = cache, settings
        self._key = cache.name(keys.acknowledged(settings.mongo_database))
        self._bumps = Bumps(monotonic())
        self._callbacks: list[Callable[[str, Any], None]] = []
        self._told_position = 0
        self._heard_at = 0.0  # all that was changed before then is known
        self._acknowledged = self._learned = 0
        self._wanted = 0  # what Redis is to be raised to, with the next round trip
        self._reaching: dict[asyncio.Future[bool], int] = {}
        self._suspended_until = 0.0
        self._suspension: tuple[float, float] | None = None  # our own: written at, lasts until
        self._suspending: asyncio.Task[None] | None = None
        self._description: TopologyDescription | None = None
        self._server: object = None  # the primary
        self._has_server = False
        self._passed: int | None = 0  # only positions after it are of this primary; None: any
        own: tuple[Part, ...] = (self,) if self.is_enabled else ()
        self.rounds = Rounds(settings, (*own, *parts), self._recover if own else None)
        self.following = Following(database, self)

    # ---- what others ask

    @property
    def position(self) -> int:
        """All changes up to this cluster time have been heard of; 0: nothing is known.

        Who reads from MongoDB after having asked for it reads all of them.
        """
        if self._client.topology_description is not self._description:
            self._look()
        return self._told_position if self._passed is None and self._has_server else 0

    @property
    def version(self) -> int:
        """Grows with every change: while it is the same, what was current is current."""
        if self._client.topology_description is not self._description:
            self._look()
        return self._bumps.version

    @property
    def heard_at(self) -> float:
        """All that was changed before then (of the monotonic clock) has been heard of."""
        return self._heard_at

    @property
    def invalidations(self) -> int:
        """Tags that changes have concerned."""
        return self._bumps.count

    async def ready(self) -> bool:
        """Whether what is judged current may be used now: no write that was acknowledged before this was
        called is unknown here. False, and at once, while nobody knows."""
        if not self.is_enabled or not await self.rounds.next():
            return False
        wanted = max(self._acknowledged, self._learned)
        return self._is_certain() and (self._told_position >= wanted or await self._reach(wanted))

    def learned(self, position: int) -> None:
        """Clients of this process are told of a change at this cluster time, by a subscription: what they
        ask for then is no older."""
        self._learned = max(self._learned, position)

    def is_current(self, position: int, tags: Collection[Tag]) -> bool:
        """Whether nothing that concerns one of `tags` was changed after `position`, as far as is known.

        To be asked before something is kept, too: what was read meanwhile may be of another server.
        """
        if self._client.topology_description is not self._description:
            self._look()
        return position > 0 and self._bumps.is_current(position, tags)

    async def acknowledge(self, wrote: int | None) -> None:
        """Before a write is acknowledged: from now on nobody uses what is older than it. `wrote`: the
        cluster time of its commit."""
        if wrote is None:
            return
        if not self.is_enabled:
            await announce(self._cache, self._settings, wrote)
            return
        if await self._raise(wrote):
            return
        # A busy moment is no outage: to suspend everybody is the last resort.
        until = monotonic() + RETRY_SECONDS
        while not self._is_suspended_for_all() and monotonic() < until:
            await asyncio.sleep(RETRY_SECONDS / 10)
            if await self._raise(wrote):
                return
        await self._wait_for_all()

    async def acknowledge_read(self, read: int | None) -> None:
        """The same for one who wrote nothing and found what was to be done done already, by somebody who
        may not have acknowledged it. `read`: the cluster time of what was read."""
        if read is None or not self.is_enabled:
            return
        if self._told_position < read and not await self._reach(read, MOST_AGE_SECONDS):
            await self.acknowledge(read)
        elif self._bumps.last > self._acknowledged:
            # Not the time of the read: others hear of that when something changes after it.
            await self.acknowledge(self._bumps.last)

    def on_change(self, callback: Callable[[str, Any], None]) -> None:
        """Have it called with the collection and `_id` of each change that is heard of; with None for
        the id, for each collection, where anything in it may have been changed."""
        self._callbacks.append(callback)

    # ---- what is certain

    def _is_certain(self) -> bool:
        now = monotonic()
        return (
            self.position > 0
            and now - self._heard_at <= MOST_AGE_SECONDS
            and now >= self._suspended_until
            and not self.rounds.is_open
        )

    async def _raise(self, wrote: int) -> bool:
        self._wanted = max(self._wanted, wrote)
        return await self.rounds.next() and self._acknowledged >= wrote

    async def _reach(self, position: int, seconds: float = REACH_SECONDS) -> bool:
        """Wait a moment for the changes up to `position`."""
        loop = asyncio.get_running_loop()
        reached: asyncio.Future[bool] = loop.create_future()
        self._reaching[reached] = position
        timer = loop.call_later(seconds, self._give_up, reached)
        try:
            if await reached:
                return self._is_certain()
        finally:
            timer.cancel()
            self._reaching.pop(reached, None)
        self.stats.late += 1
        if position - AHEAD > self._told_position > 0:
            self.rounds.doubt()  # nobody can have written then
        return False

    def _give_up(self, reached: "asyncio.Future[bool]") -> None:
        if not reached.done():
            reached.set_result(False)

    def _look(self) -> None:
        """What PyMongo knows of the servers is another object with every change of it."""
        description = self._client.topology_description
        self._description = description
        server = _server_of(description)
        self._has_server = server is not None
        if server is None or server == self._server:
            return
        if self._server is not None:
            # A server that has just become primary may know less, for a moment, than this process has
            # heard of from the one before. What was read from it so far may lack something; it knows
            # everything once it tells of something later.
            self._passed = self._told_position
            self._forget(self._told_position + 1)
        self._server = server

    def _forget(self, floor: int) -> None:
        self._bumps.forget(floor)
        self.stats.forgotten += 1
        for collection in FOLLOWED:
            self._tell(collection, None)

    def _tell(self, collection: str, key: Any) -> None:
        for callback in self._callbacks:
            try:
                callback(collection, key)
            except Exception:
                log.exception("cache.not_told collection=%s", collection)

    # ---- what is heard of changes

    def changed(self, change: Row, time: int) -> None:
        collection, key = change["coll"], change["id"]
        self.stats.changes += 1
        self._bumps.add(tags_of(change), time)
        if collection == "cache" and key == SUSPENSION:
            self._suspend()
        self._tell(collection, key)

    def reached(self, position: int, asked_at: float) -> None:
        self._bumps.age(monotonic())
        self._heard_at = max(self._heard_at, asked_at)
        if position <= self._told_position:
            return
        self._told_position = position
        if self._passed is not None and position > self._passed:
            self._passed = None
        if self._reaching and self._passed is None:
            for reached, target in self._reaching.items():
                if target <= position and not reached.done():
                    reached.set_result(True)

    def lost(self, floor: int) -> None:
        self._told_position, self._heard_at = 0, 0.0
        self._forget(floor)

    async def opened(self) -> None:
        """Of a suspension that was written before the stream began nobody will tell."""
        found = await self._database.data["cache"].find_one(
            {
                "_id": SUSPENSION,
                # Clocks of servers differ; one that has ended is only a pause.
                "$expr": {"$gt": [{"$add": ["$until", 60_000]}, "$$NOW"]},
            }
        )
        if found is not None:
            self._suspend()

    def server(self) -> object:
        if self._client.topology_description is not self._description:
            self._look()
        return self._server if self._has_server else None

    # ---- a part of every round trip

    def commands(self, pipeline: Any) -> int:
        if self._wanted:
            pipeline.execute_command("EVAL", RAISE, 1, self._key, f"{self._wanted:016x}")
            self._wanted = 0
        else:
            # As good as a GET, but a server that takes no writes (a replica by now) refuses it.
            pipeline.execute_command("GETEX", self._key, "PERSIST")
        return 1

    def answered(self, replies: list[Any]) -> None:
        found = _number(replies[0])
        if found is None or found < self._acknowledged:
            self.rounds.doubt()  # lost, or of an older time
        else:
            self._acknowledged = found

    def failed(self) -> None:
        self._wanted = 0

    async def _recover(self, send: Send) -> None:
        """On a new connection: what the number was is not known, and all that was acknowledged is
        before MongoDB's time."""
        self.stats.recoveries += 1
        hello = await self._database.data.command({"hello": 1})
        now = pack(hello["operationTime"])
        found = _number(await send("EVAL", SET, 1, self._key, f"{now:016x}", f"{now + AHEAD:016x}"))
        if found is None:
            raise RedisError("it does not keep a number")
        self._acknowledged = found

    # ---- without Redis

    def _suspend(self) -> None:
        # From when it is heard of, which is after it was written: no two clocks are compared.
        self._suspended_until = monotonic() + SUSPENDED_SECONDS

    def _is_suspended_for_all(self) -> bool:
        now = monotonic()
        written_at, until = self._suspension or (0.0, 0.0)
        # Everybody has heard of it, and will have heard of a write of now when it ends.
        return now - written_at >= HEARD_SECONDS <= until - now

    async def _wait_for_all(self) -> None:
        now = monotonic()
        _, until = self._suspension or (0.0, 0.0)
        if until - now < EXTEND_SECONDS and self._suspending is None:
            self._suspending = asyncio.get_running_loop().create_task(
                self._write_suspension(), context=Context()
            )
        if not self._is_suspended_for_all():
            await asyncio.sleep(HEARD_SECONDS)

    async def _write_suspension(self) -> None:
        began = monotonic()
        try:
            await self._database.data["cache"].update_one(
                {"_id": SUSPENSION},
                [{"$set": {"until": {"$add": ["$$NOW", int(SUSPENDED_SECONDS * 1000)]}}}],
                upsert=True,
            )
        except PyMongoError as error:
            log_event(log, logging.WARNING, "cache.not_suspended", error=error)
        else:
            now = monotonic()
            self._suspend()
            self.stats.suspensions += 1
            written_at, until = self._suspension or (0.0, 0.0)
            if until - now < HEARD_SECONDS:
                written_at = now  # some may hear of it only after the one before has ended
            self._suspension = (written_at, began + SUSPENDED_SECONDS)
        finally:
            self._suspending = None

    async def close(self) -> None:
        if self._suspending is not None:
            await ended(self._suspending)


async def announce(cache: Cache, settings: Settings, wrote: int | None) -> None:
    """What `acknowledge` does, for a process that keeps nothing and follows nothing: a worker, before
    it tells that a job is done, and a server that keeps no answers, beside others that do. Where Redis does not answer, it is a write past the API, of which
    everybody hears within a second or so."""
    if wrote is None:
        return
    key = cache.name(keys.acknowledged(settings.mongo_database))
    with suppress(RedisError, OSError, TimeoutError):
        async with asyncio.timeout(settings.cache_timeout_seconds):
            await cache.redis.eval(RAISE, 1, key, f"{wrote:016x}")


def _number(found: Any) -> int | None:
    """What Redis answers, if it is a cluster time."""
    if isinstance(found, bytes) and len(found) == 16:
        with suppress(ValueError):
            return int(found, 16)
    return None


def _server_of(description: TopologyDescription) -> object:
    """By what the primary is known; another election has another one."""
    if description.topology_type in {TOPOLOGY_TYPE.Sharded, TOPOLOGY_TYPE.LoadBalanced}:
        return description.topology_type if description.has_writable_server() else None
    for server in description.server_descriptions().values():
        if server.server_type == SERVER_TYPE.RSPrimary:
            return server.address, server.election_id
    return None


@asynccontextmanager
async def open_freshness(
    database: Database, cache: Cache, settings: Settings, *parts: Part
) -> AsyncIterator[Freshness]:
    """Follows and asks in the background, and waits for neither: `ready` is False until both have
    succeeded. `parts` go with its round trips, also where nothing is kept."""
    freshness = Freshness(database, cache, settings, parts)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(freshness.close)
        if freshness.is_enabled:
            following = asyncio.get_running_loop().create_task(
                freshness.following.run(), context=Context()
            )
            stack.push_async_callback(ended, following)
        await stack.enter_async_context(running(freshness.rounds))
        yield freshness
