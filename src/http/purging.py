"""Caches in front of the server are rid of what has become old, by the keys of `Surrogate-Key`: nginx's
by its files, others by the requests that CDNs take for it."""

import asyncio
import heapq
import logging
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import count
from os import DirEntry, scandir, unlink
from pathlib import Path
from time import monotonic
from typing import Final, Protocol, TypeAlias

import httpx

from modelharbor.cache.following import Following
from modelharbor.cache.tags import tags_of
from modelharbor.db.base import Row
from modelharbor.db.connection import Database, connect
from modelharbor.db.ending import ended
from modelharbor.observability.logging import configure_logging, hold_no_lines, log_event
from modelharbor.settings import Settings

from .caching import EVERY, purged_by

log = logging.getLogger(__name__)
AGAIN_SECONDS: Final = (2.0, 12.0)
"""Each key is purged again: an answer that was on its way may have been kept since. A process hears of
a change within 1.5 s, an operation takes 10 s at most."""
PAUSE_SECONDS: Final = 0.2  # between two purges: meanwhile keys come together
RETRY_SECONDS: Final = 2.0
MOST_KEYS: Final = 200  # of one request; Fastly takes 256
MOST_FRESH: Final = 10_000  # keys that wait; beyond that all is purged
HEAD_BYTES: Final = 32 * 1024  # of nginx's file: its own record, the key, the headers
_KEYS: Final = re.compile(rb"\r\nsurrogate-key:[ \t]*([^\r\n]*)\r\n", re.IGNORECASE)
_NAME: Final = re.compile("[0-9a-f]{32}", re.ASCII)
Version: TypeAlias = tuple[int, int, int]  # of a file: inode, time in ns, size


class Target(Protocol):
    async def purge(self, keys: Sequence[str]) -> int:
        """How many answers went, or requests were made. OSError, httpx.HTTPError."""


class NginxFolder:
    """The folder of `proxy_cache_path`: one file for each answer, with the headers as they came. nginx
    asks the server again for what has no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, tuple[Version, bytes]] = {}

    async def purge(self, keys: Sequence[str]) -> int:
        return await asyncio.to_thread(self._purge, [key.encode() for key in keys])

    def _purge(self, keys: list[bytes]) -> int:
        known, removed = self._known, 0
        self._known = {}
        for entry in _files(str(self.path)):
            try:
                about = entry.stat(follow_symlinks=False)
                version = (about.st_ino, about.st_mtime_ns, about.st_size)
                found = known.get(entry.path)
                if found is None or found[0] != version:
                    found = (version, keys_in(entry.path))
                if any(key in found[1] for key in keys):
                    unlink(entry.path)
                    removed += 1
                else:
                    self._known[entry.path] = found
            except FileNotFoundError:  # nginx was faster
                continue
        return removed


def _files(folder: str) -> Iterator[DirEntry[str]]:
    """Those that nginx has finished: the others have longer names."""
    try:
        with scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path)
                elif _NAME.fullmatch(entry.name):
                    yield entry
    except FileNotFoundError:  # nginx makes folders when it needs them
        return


def keys_in(path: str) -> bytes:
    """The `Surrogate-Key` of the answer in a file of nginx's cache."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    start = head.find(b"\nHTTP/1.")
    end = head.find(b"\r\n\r\n", start)
    found = _KEYS.search(head, start, end + 2) if 0 <= start < end else None
    return found[1] if found else b""


class Address:
    """Where a POST with `Surrogate-Key` purges: Fastly's way, and that of Varnish as docs/caching.md sets
    it up."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url, self.headers = url, dict(headers)
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> "Address":
        self._client = httpx.AsyncClient(headers=self.headers, timeout=10, follow_redirects=False)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._client is not None
        await self._client.aclose()

    async def purge(self, keys: Sequence[str]) -> int:
        assert self._client is not None
        made = 0
        for start in range(0, len(keys), MOST_KEYS):
            some = keys[start : start + MOST_KEYS]
            answer = await self._client.post(self.url, headers={"surrogate-key": " ".join(some)})
            if not answer.is_success:
                answer.raise_for_status()
                raise httpx.HTTPError(f"{answer.status_code} is no success")
            made += 1
        return made


class Purger:
    """Hears of changes, and purges: at once, and again when answers that were on their way are there."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._fresh: set[str] = set()
        self._later: list[tuple[float, int, list[str]]] = []
        self._numbers = count()
        self._woken = asyncio.Event()

    def changed(self, change: Row, time: int) -> None:
        self._add(purged_by(tags_of(change)))

    def reached(self, position: int, asked_at: float) -> None:
        """Nobody waits for it."""

    def lost(self, floor: int) -> None:
        """Also when it begins: what happened before is not known."""
        self._add({EVERY})

    async def opened(self) -> None:
        """All is purged already."""

    def server(self) -> object:
        """Any will do: nothing is judged by how far it has come."""
        return self

    def _add(self, keys: set[str]) -> None:
        self._fresh |= keys
        if len(self._fresh) > MOST_FRESH:
            self._fresh = {EVERY}
        self._woken.set()

    async def run(self) -> None:
        while True:
            wait = self._later[0][0] - monotonic() if self._later else None
            try:
                async with asyncio.timeout(None if wait is None else max(0.0, wait)):
                    await self._woken.wait()
            except TimeoutError:
                pass
            await self._purge()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _purge(self) -> None:
        self._woken.clear()
        fresh, self._fresh = self._fresh, set()
        keys, now = set(fresh), monotonic()
        while self._later and self._later[0][0] <= now:
            keys.update(heapq.heappop(self._later)[2])
        try:
            purged = await self.target.purge([EVERY] if EVERY in keys else sorted(keys))
        except (OSError, httpx.HTTPError) as error:
            log_event(log, logging.WARNING, "purge.failed", keys=len(keys), error=error)
            self._add(keys)
            await asyncio.sleep(RETRY_SECONDS)
            return
        log_event(log, logging.INFO, "purge.done", keys=len(keys), purged=purged)
        if fresh:
            for seconds in AGAIN_SECONDS:
                later = (monotonic() + seconds, next(self._numbers), list(fresh))
                heapq.heappush(self._later, later)


async def purging(database: Database, target: Target) -> None:
    """Until it is cancelled."""
    purger = Purger(target)
    following = asyncio.create_task(Following(database, purger).run())
    working = asyncio.create_task(purger.run())
    try:
        done, _ = await asyncio.wait([following, working], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await ended(following, working)


def be_purger(settings: Settings, target: NginxFolder | Address) -> None:
    """Until SIGINT or SIGTERM."""
    configure_logging(settings)
    try:
        asyncio.run(_work(settings, target))
    finally:
        hold_no_lines()


async def _work(settings: Settings, target: NginxFolder | Address) -> None:
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(connect(settings))
        if isinstance(target, Address):
            await stack.enter_async_context(target)
        working = asyncio.create_task(purging(database, target))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, working.cancel)
        await asyncio.wait([working])
        if not working.cancelled():
            working.result()
