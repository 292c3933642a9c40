"""The connection to MongoDB: pool, timeouts, read and write concern."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from contextvars import Context
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, TypeVar

from beanie.odm.utils.init import Initializer
from bson.codec_options import CodecOptions
from pymongo import AsyncMongoClient, WriteConcern, timeout
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import ConnectionFailure, ExecutionTimeout
from pymongo.read_concern import ReadConcern

from modelharbor.errors import Unavailable
from modelharbor.observability.commands import CommandCounter
from modelharbor.settings import Settings

from .base import Row
from .cache import FOLLOWED
from .documents import DOCUMENTS
from .driver import mend_driver
from .reading import ONE_BATCH, Reading

T = TypeVar("T")
APP_NAME: Final = "modelharbor"
ABORT_SECONDS: Final = 1.0
BUSY: Final = "The database is busy with other changes; try again."


def unfenced(session: AsyncClientSession) -> AbstractAsyncContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Database:
    """Reads through `find`, `aggregate` and `count`, whose rows hold times in UTC without saying so;
    within a session, and with the time zone, through `data[collection]`; writes through Beanie documents within `transaction`."""

    client: AsyncMongoClient[Row]
    data: AsyncDatabase[Row]
    query_timeout_ms: int
    fence: Callable[[AsyncClientSession], AbstractAsyncContextManager[None]] = unfenced
    """Around the work of every transaction: what it raises ends it, what it writes belongs to it."""
    _reading: Reading = field(init=False, repr=False, compare=False)
    _turns: dict[Hashable, tuple[asyncio.Lock, int]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        # Three times as fast for rows with many of them as with a time zone on each.
        plain: AsyncDatabase[Row] = self.data.with_options(
            codec_options=CodecOptions(tz_aware=False)
        )
        object.__setattr__(self, "_reading", Reading(plain, self.query_timeout_ms))

    def find(
        self,
        collection: str,
        query: Row,
        *,
        projection: Row | None = None,
        sort: dict[str, int] | None = None,
        limit: int = 0,
        batch_size: int = ONE_BATCH,
    ) -> Coroutine[Any, Any, list[Row]]:
        """Raw rows, bounded in time; one command as long as a batch (and 16 MB) holds them all."""
        return self._reading.find(
            collection,
            query,
            projection=projection,
            sort=sort,
            limit=limit,
            batch_size=batch_size,
        )

    def aggregate(
        self, collection: str | None, pipeline: list[Row], *, batch_size: int = ONE_BATCH
    ) -> Coroutine[Any, Any, list[Row]]:
        """Rows of a pipeline that writes nothing; without a collection it begins with `$documents`."""
        return self._reading.aggregate(collection, pipeline, batch_size=batch_size)

    def count(self, collection: str, query: Row) -> Coroutine[Any, Any, int]:
        """How many rows match, exactly."""
        return self._reading.count(collection, query)

    async def transaction(
        self,
        work: Callable[[AsyncClientSession], Awaitable[T]],
        seconds: float = 8.0,
        turn: Hashable | None = None,
    ) -> T:
        """Run `work` in one transaction; again from its start when MongoDB asks for it.

        All of it within `seconds`: PyMongo would go on for two minutes when MongoDB is gone. The
        default is below the time that an operation has. Between attempts PyMongo waits, longer each
        time, half a second at most. Raises Unavailable where others held it up for all the time.

        `turn`: those of this process that say the same go one after the other. Many that write to one
        document would else collide again and again, most of them for nothing.
        """
        if turn is None:
            return await self._transaction(work, seconds)
        until = monotonic() + seconds
        async with self._turn(turn, seconds):
            left = until - monotonic()
            if left <= 0:
                raise Unavailable(BUSY)
            return await self._transaction(work, left)

    @asynccontextmanager
    async def _turn(self, turn: Hashable, seconds: float) -> AsyncIterator[None]:
        lock, count = self._turns.get(turn, (asyncio.Lock(), 0))
        self._turns[turn] = (lock, count + 1)
        try:
            try:
                async with asyncio.timeout(seconds):
                    await lock.acquire()
            except TimeoutError:
                raise Unavailable(BUSY) from None
            try:
                yield
            finally:
                lock.release()
        finally:
            lock, count = self._turns.pop(turn)
            if count > 1:
                self._turns[turn] = (lock, count - 1)

    async def _transaction(
        self, work: Callable[[AsyncClientSession], Awaitable[T]], seconds: float
    ) -> T:
        attempts, until = 0, monotonic() + seconds

        async def attempt(session: AsyncClientSession) -> T:
            nonlocal attempts
            attempts += 1
            try:
                async with self.fence(session):
                    return await work(session)
            except BaseException:
                if session.in_transaction and monotonic() > until - ABORT_SECONDS:
                    await _abort(session)
                raise

        try:
            with timeout(seconds):
                async with self.client.start_session() as session:
                    # A transaction takes neither concern from the database object, only from here.
                    return await session.with_transaction(
                        attempt, ReadConcern("snapshot"), WriteConcern("majority")
                    )
        except ExecutionTimeout as error:
            if isinstance(error.__cause__, ConnectionFailure):
                raise error.__cause__ from None  # it was not slow, it was not there
            if attempts > 1 or error.has_error_label("TransientTransactionError"):
                raise Unavailable(BUSY) from error
            raise


async def _abort(session: AsyncClientSession) -> None:
    """When the time for all of it has passed: PyMongo would not send that any more, and what was written
    would stay locked for a minute."""
    aborting = asyncio.create_task(
        session.abort_transaction(),
        context=Context(),  # PyMongo's time limits are variables of it
    )
    try:
        await asyncio.wait([aborting], timeout=ABORT_SECONDS)
    finally:
        aborting.cancel()


class _Documents(Initializer):
    """Beanie's, without its questions to the server (version, collections): nobody answers yet."""

    async def _load_cached_info(self) -> None:
        self._database_major_version = 6  # Beanie asks it for nested links only: there are none


@asynccontextmanager
async def connect(settings: Settings) -> AsyncIterator[Database]:
    """Open the pool. Sends nothing yet: the server starts without its database and waits for it.

    One at a time in a process: Beanie binds the documents to the database of the last call, also
    for those who still hold an earlier one. Acknowledged writes are on a majority (`w: 1` lost some in failovers), reads see only such.
    """
    mend_driver()
    client: AsyncMongoClient[Row] = AsyncMongoClient(
        settings.mongo_url,
        tz_aware=True,
        appname=APP_NAME,
        maxPoolSize=settings.mongo_pool_size,
        serverSelectionTimeoutMS=int(settings.mongo_timeout_seconds * 1000),
        connectTimeoutMS=int(settings.mongo_timeout_seconds * 1000),
        socketTimeoutMS=settings.query_timeout_ms + 5000,
        waitQueueTimeoutMS=int(settings.mongo_timeout_seconds * 1000),
        event_listeners=[CommandCounter(FOLLOWED)],
    )
    async with client:
        data = client.get_database(
            settings.mongo_database,
            codec_options=CodecOptions(tz_aware=True),
            read_concern=ReadConcern("majority"),
            write_concern=WriteConcern("majority"),
        )
        await _Documents(database=data, document_models=DOCUMENTS, skip_indexes=True)
        yield Database(client, data, settings.query_timeout_ms)
