"""Entries in Redis, for all processes: all look-ups that wait at the same time go as one (rounds.py).

On a connection of its own, for values are long, and who only asks for changes does not wait for them.
Without Redis, or where it takes too long, it is as if nothing were there.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha1
from time import time
from typing import Any, Final

from redis.exceptions import NoScriptError

from modelharbor.db.ending import ended
from modelharbor.observability.metrics import CacheCount
from modelharbor.settings import Settings

from .client import Cache
from .entries import Entry
from .rounds import Rounds, running
from .sealing import Seal

log = logging.getLogger(__name__)
MOST_SECONDS: Final = 1000  # of which it is remembered what expires in them
MOST_AT_ONCE: Final = 64  # commands in one round trip
MOST_WAITING: Final = 1000
MOST_BYTES: Final = 4 * 1_048_576  # of a value, as it lies in Redis
LOCK_MILLISECONDS: Final = 2000
"""How long who makes an answer is waited for, at most; a process may die over it."""


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text
        self.sha1 = sha1(text.encode(), usedforsecurity=False).hexdigest()


# Names of entries, and of the lock where there is one; its holder, milliseconds, the most bytes of a value.
# Answers how many values were dropped, the number of the name that has one (0: none), and the value or
# whether the lock is now this holder's.
LOOK: Final = _Script("""
local names, dropped = #KEYS, 0
if ARGV[1] ~= '' then names = names - 1 end
for i = 1, names do
  local length = redis.pcall('STRLEN', KEYS[i])
  if type(length) ~= 'number' or length > tonumber(ARGV[3]) then
    redis.call('UNLINK', KEYS[i])
    dropped = dropped + 1
  elseif length > 0 then
    return {dropped, i, redis.call('GET', KEYS[i])}
  end
end
if ARGV[1] == '' then return {dropped, 0, 0} end
if redis.call('SET', KEYS[#KEYS], ARGV[1], 'NX', 'PX', ARGV[2]) then return {dropped, 0, 1} end
return {dropped, 0, 0}
""")
# The name of an entry, names of others that it takes the place of, the lock; the value ('': none, the lock
# is given back), milliseconds, the lock's holder.
PUT: Final = _Script("""
if ARGV[1] ~= '' then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  for i = 2, #KEYS - 1 do redis.call('UNLINK', KEYS[i]) end
end
if ARGV[3] ~= '' then
  local holder = redis.pcall('GET', KEYS[#KEYS])
  if holder == ARGV[3] then redis.call('UNLINK', KEYS[#KEYS]) end
end
return 0
""")


class Claim(Enum):
    """Who makes what is not there."""

    OURS = "ours"
    THEIRS = "theirs"
    NONE = "none"  # nobody knows: Redis did not answer, or there is no lock


@dataclass(frozen=True, slots=True)
class Looked:
    """`at`: the number of the name under which `entry` was; after it others may have one."""

    entry: Entry | None
    at: int
    claim: Claim


@dataclass(slots=True, eq=False)
class _Asked:
    """A command; `arguments` without the script."""

    script: _Script | None
    arguments: tuple[Any, ...]
    reply: Any = None
    is_answered: bool = False
    is_whole: bool = False
    """To be sent with its text: Redis has forgotten the script."""

    def command(self) -> tuple[Any, ...]:
        if self.script is None:
            return self.arguments
        if self.is_whole:
            return ("EVAL", self.script.text, *self.arguments)
        return ("EVALSHA", self.script.sha1, *self.arguments)


@dataclass(slots=True)
class _Written:
    """By this process and not yet expired, by the second it expires: entries and bytes."""

    seconds: dict[int, list[int]] = field(default_factory=dict)

    def note(self, size: int, seconds: float) -> None:
        if len(self.seconds) > MOST_SECONDS:
            self()
        both = self.seconds.setdefault(int(time() + seconds), [0, 0])
        both[0] += 1
        both[1] += size

    def __call__(self) -> tuple[int, int]:
        now = int(time())
        for second in [each for each in self.seconds if each < now]:
            del self.seconds[second]
        left = self.seconds.values()
        return sum(both[0] for both in left), sum(both[1] for both in left)


NOTHING: Final = Looked(None, 0, Claim.NONE)


class Shared:
    """Entries by name. Opened by `open_answers`, which closes it."""

    def __init__(self, cache: Cache, settings: Settings, secret: bytes) -> None:
        """`secret`: what another installation wrote, or anybody else, is not read."""
        self.seal = Seal(secret, settings.max_answer_bytes)
        self.prefix = cache.name(settings.mongo_database)
        self.sizes = _Written()
        self.rounds = Rounds(settings, (self,))
        self._holder = secrets.token_hex(8)
        self._waiting: deque[_Asked] = deque()
        self._sent: list[_Asked] = []
        self._pushing: asyncio.Task[None] | None = None

    @property
    def is_closed(self) -> bool:
        """Redis does not answer, or not in time: nobody waits for it."""
        return self.rounds.is_open

    async def look(self, names: Sequence[str], lock: str | None, count: CacheCount) -> Looked:
        """The first entry under `names`; without one, the lock is taken if it is free."""
        keys = [*names] if lock is None else [*names, lock]
        holder = "" if lock is None else self._holder
        found = await self._ask(LOOK, (len(keys), *keys, holder, LOCK_MILLISECONDS, MOST_BYTES))
        if not isinstance(found, list) or len(found) != 3:
            return NOTHING
        dropped, at, value = found
        count.poisoned += dropped
        if at == 0:
            if lock is None:
                return NOTHING
            return Looked(None, 0, Claim.OURS if value == 1 else Claim.THEIRS)
        name = names[at - 1]
        entry = self.seal.open(name, value)
        if entry is None:
            count.poisoned += 1
            log.warning("cache.poisoned name=%s bytes=%d", name, len(value))
            self._send(_Asked(None, ("UNLINK", name)))
        return Looked(entry, at, Claim.NONE)

    def put(
        self, name: str, entry: Entry, others: Sequence[str] = (), lock: str | None = None
    ) -> None:
        """Sent soon; whether it arrives is not waited for. `others`: names whose entries it replaces;
        `lock`: given back, if it is this process's."""
        seconds = entry.made_at + entry.max_age + entry.stale - time()
        if self.is_closed:
            return
        value = self.seal.close(name, entry)
        if seconds <= 0 or len(value) > MOST_BYTES:
            if lock is not None:
                self.give_back(lock)
            return
        keys = [name, *others, lock or name]
        milliseconds = max(int(seconds * 1000), 1)
        self._send(
            _Asked(PUT, (len(keys), *keys, value, milliseconds, self._holder if lock else ""))
        )
        self.sizes.note(len(value), seconds)

    def give_back(self, lock: str) -> None:
        if not self.is_closed:
            self._send(_Asked(PUT, (1, lock, "", 0, self._holder)))

    async def _ask(self, script: _Script, arguments: tuple[Any, ...]) -> Any:
        """None where there is no answer in time."""
        if self.is_closed or len(self._waiting) >= MOST_WAITING:
            return None
        asked = _Asked(script, arguments)
        self._waiting.append(asked)
        while not asked.is_answered:
            if not await self.rounds.next():
                return None
        return asked.reply

    def _send(self, asked: _Asked) -> None:
        """Nobody waits for its answer."""
        if self.is_closed or len(self._waiting) >= MOST_WAITING:
            return
        self._waiting.append(asked)
        self._push()

    def _push(self) -> None:
        if self._pushing is None:
            # In a context of its own: it serves many operations.
            self._pushing = asyncio.get_running_loop().create_task(
                self._push_all(), context=Context()
            )

    async def _push_all(self) -> None:
        try:
            while self._waiting and await self.rounds.next():
                pass
        finally:
            self._pushing = None

    async def close(self) -> None:
        if self._pushing is not None:
            await ended(self._pushing)

    # ---- a part of every round trip

    def commands(self, pipeline: Any) -> int:
        waiting = self._waiting
        self._sent = [waiting.popleft() for _ in range(min(len(waiting), MOST_AT_ONCE))]
        for asked in self._sent:
            pipeline.execute_command(*asked.command())
        return len(self._sent)

    def answered(self, replies: list[Any]) -> None:
        sent, self._sent = self._sent, []
        for asked, reply in zip(sent, replies, strict=True):
            if isinstance(reply, NoScriptError) and not asked.is_whole:
                asked.is_whole = True
                self._waiting.append(asked)
                self._push()
                continue
            asked.is_answered = True
            if isinstance(reply, Exception):
                log.warning("cache.refused error=%s", reply)
            else:
                asked.reply = reply

    def failed(self) -> None:
        self._sent = []
        self._waiting.clear()


@asynccontextmanager
async def open_shared(cache: Cache, settings: Settings, secret: bytes) -> AsyncIterator[Shared]:
    """`secret`: equal for all processes that share Redis."""
    shared = Shared(cache, settings, secret)
    async with running(shared.rounds):
        try:
            yield shared
        finally:
            await shared.close()
