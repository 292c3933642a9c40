"""Counts that a process gathers, and writes some seconds later."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from modelharbor.db.connection import Database
from modelharbor.errors import Unavailable

log = logging.getLogger(__name__)
K = TypeVar("K", bound=tuple[Any, ...])
BATCH: Final = 500  # keys in one transaction


class Gathered(ABC, Generic[K]):
    """Counts since the last flush, by keys that have an order. What a killed process had not flushed is
    not counted."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: Counter[K] = Counter()

    @abstractmethod
    async def _add(self, counts: Mapping[K, int], session: AsyncClientSession) -> None:
        """Write them, within a transaction."""

    async def flush(self) -> None:
        """Write what is waiting; on a failure it goes on waiting."""
        taken, self._waiting = self._waiting, Counter()
        try:
            while taken:
                batch = dict(sorted(taken.items())[:BATCH])
                await self._database.transaction(partial(self._add, batch))
                for key in batch:
                    del taken[key]
        finally:
            self._waiting.update(taken)


@asynccontextmanager
async def flushing(gathered: Gathered[Any], seconds: float, event: str) -> AsyncIterator[None]:
    """Flush every so many seconds, and once more at the end; `event` is logged where that fails."""
    end = asyncio.Event()

    async def flush() -> None:
        try:
            await gathered.flush()
        except (PyMongoError, Unavailable) as error:
            log.warning("%s error=%s", event, error)

    async def run() -> None:
        while not end.is_set():
            await flush()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await end.wait()

    running = asyncio.create_task(run())
    try:
        yield
    finally:
        end.set()  # not cancelled: a flush under way would not know whether it was committed
        await running
        await flush()
