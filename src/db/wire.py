"""Commands on PyMongo's connections: no cursor, no session, no task for each answer.

A read costs the server more in PyMongo's layers than in anything else. What they are there for is
kept, because PyMongo still does it: its pool and its connections (TLS, authentication,
compression), server selection, what it does about errors, one retry, timeouts, events. What is
left out are objects that a read of one answer has no use for.

Private names of PyMongo are used here and nowhere else, each beside its reason; `unfit` holds them
against the PyMongo that is there.
"""

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from time import monotonic
from typing import Any, Final

import pymongo
from pymongo import ReadPreference, _csot, helpers_shared
from pymongo.asynchronous.client_session import _SESSION
from pymongo.asynchronous.command_cursor import AsyncCommandCursor
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.asynchronous.mongo_client import (
    AsyncMongoClient,
    _ClientCheckout,
    _ClientConnectionRetryable,
)
from pymongo.asynchronous.pool import AsyncConnection, Pool
from pymongo.asynchronous.server import Server
from pymongo.asynchronous.topology import Topology
from pymongo.errors import NotPrimaryError, OperationFailure, ProtocolError, PyMongoError
from pymongo.logger import _COMMAND_LOGGER, _CONNECTION_LOGGER, _SERVER_SELECTION_LOGGER
from pymongo.message import _op_msg, _OpMsg
from pymongo.network_layer import PyMongoProtocol
from pymongo.pool_shared import PoolState
from pymongo.read_preferences import _ServerMode
from pymongo.server_selectors import any_server_selector
from pymongo.server_type import SERVER_TYPE
from pymongo.topology_description import TOPOLOGY_TYPE, TopologyDescription

from .base import Row
from .reading import TooManyBytesError, in_one_reply

TESTED: Final = ((4, 20),)
"""Versions of PyMongo that the private names were held against."""
LOOK_SECONDS: Final = 0.5  # PyMongo looks as often whether its pool wants a read to end


class _TooLongError(Exception):
    """The command is longer than a document may be: PyMongo has words for it."""


class Wire:
    """Commands on PyMongo's connections.

    Usually the server is known and a connection is idle: then the way is short (`_take`, `_give`).
    Everything else (no server, a new connection, waiting for one, a second try) is PyMongo's, with
    `_exchange` as what it calls when it has a connection.
    """

    __slots__ = (
        "_client",
        "_codec",
        "_data",
        "_database",
        "_is_short",
        "_known",
        "_known_preference",
        "_known_server",
        "_preference",
    )

    def __init__(self, data: AsyncDatabase[Row]) -> None:
        self._data, self._client, self._database = data, data.client, data.name
        self._codec, self._preference = data.codec_options, data.read_preference
        # The time that the URL gives to a whole operation is kept by the long way.
        self._is_short = data.client.options.timeout is None
        self._known: TopologyDescription | None = None
        self._known_server: Server | None = None
        self._known_preference: _ServerMode = self._preference

    def is_usual(self) -> bool:
        """Neither a session that PyMongo would take from the context, nor logs that it would write."""
        return (
            _SESSION.get() is None
            and not _COMMAND_LOGGER.isEnabledFor(logging.DEBUG)
            and not _CONNECTION_LOGGER.isEnabledFor(logging.DEBUG)
            and not _SERVER_SELECTION_LOGGER.isEnabledFor(logging.DEBUG)
        )

    async def rows(self, command: Row, batch_size: int) -> list[Row] | None:
        """All rows of a command that answers with a cursor; None where it is too long to be sent."""
        try:
            reply, address = await self._run(command)
        except _TooLongError:
            return None
        cursor: Row = reply["cursor"]
        rows: list[Row] = cursor["firstBatch"]
        if cursor["id"]:
            # What PyMongo's own commands return for such an answer; it ends the cursor on the
            # server too when the read is cancelled.
            _, collection = cursor["ns"].split(".", 1)
            rest = {**cursor, "firstBatch": []}
            async with AsyncCommandCursor(
                self._data[collection], rest, address, batch_size=batch_size
            ) as more:
                if in_one_reply.get():
                    raise TooManyBytesError
                # Not appended: those who heard of the answer hold that list too.
                rows = [*rows, *await more.to_list()]
        return rows

    async def _run(self, command: Row) -> tuple[Row, Any]:
        """The answer, and the address of the server that gave it."""
        conn = self._take()
        if conn is None:
            found: tuple[Row, Any] = await self._client._retry_internal(
                self._attempt(command),
                None,
                None,
                next(iter(command)),
                is_read=True,
                read_pref=self._preference,
                retryable=self._client.options.retry_reads,
            )
            return found
        server = self._known_server
        assert server is not None  # it had the connection
        try:
            reply = await self._exchange(conn, command, self._known_preference)
        except BaseException as error:
            checkout = _ClientCheckout(self._client, server, None)
            checkout.contribute_socket(conn)
            try:
                await checkout.handle(type(error), error)
            finally:
                await server.pool.checkin(conn)
            if not isinstance(error, PyMongoError):
                raise
            failure = error
        else:
            if not _give(server.pool, conn):
                await server.pool.checkin(conn)
            return reply, conn.address
        again: tuple[Row, Any] = await _After(
            failure, server, self._client, self._attempt(command), command, self._preference
        ).run()
        return again

    def _attempt(self, command: Row) -> Callable[..., Any]:
        async def attempt(
            session: None, server: Server, conn: AsyncConnection, preference: _ServerMode
        ) -> tuple[Row, Any]:
            reply = await self._exchange(conn, command, preference)
            self._remember(server, preference)
            return reply, conn.address

        return attempt

    def _remember(self, server: Server, preference: _ServerMode) -> None:
        """The server that PyMongo selected, where it would select no other.

        A description of the topology is never changed, only replaced: while it is the same one,
        selection has the same result.
        """
        topology = self._topology
        description = topology.description
        kind = description.topology_type
        if not (
            kind == TOPOLOGY_TYPE.Single
            or (
                kind == TOPOLOGY_TYPE.ReplicaSetWithPrimary
                and self._preference.mode == ReadPreference.PRIMARY.mode
                and server.description.server_type == SERVER_TYPE.RSPrimary
            )
        ):
            return
        address = server.description.address
        if (
            topology.get_server_by_address(address) is server
            and description.server_descriptions().get(address) is server.description
            and server.description.is_server_type_known
            and self._client.options.server_selector is any_server_selector
            and not server.pool._telemetry._should_publish  # nobody is told of connections
            and self._is_short
        ):
            self._known, self._known_server = description, server
            self._known_preference = preference

    @property
    def _topology(self) -> Topology:
        return self._client._topology

    def _take(self) -> AsyncConnection | None:
        """An idle connection to the known server: what `Pool._get_conn` does when it need not wait.

        Nothing is awaited here, so its locks have nothing to keep out, unless someone holds one.
        """
        server, topology = self._known_server, self._topology
        if (
            server is None
            or topology is None  # an SRV address that was not resolved yet
            or topology._description is not self._known
            or self._client._loop is not asyncio.get_running_loop()  # PyMongo refuses that
            or _csot.get_timeout() is not None  # `pymongo.timeout`: it retries while there is time
        ):
            return None
        pool = server.pool
        if (
            pool.state != PoolState.READY
            or not pool.conns
            or pool.requests >= pool.max_pool_size
            or _is_busy(pool)
        ):
            return None
        conn = pool.conns[0]
        idle = pool.opts.max_idle_time_seconds
        if (
            conn.closed
            or conn.conn_closed()
            or pool.stale_generation(conn.generation, conn.service_id)
            or (idle is not None and conn.idle_time_seconds() > idle)
        ):
            return None
        pool.conns.popleft()
        pool.operation_count += 1
        pool.requests += 1
        pool.active_sockets += 1
        pool.active_contexts.add(conn.cancel_context)
        conn.active = True
        return conn

    async def _exchange(self, conn: AsyncConnection, command: Row, preference: _ServerMode) -> Row:
        """Send a command and decode the answer to it: `_run_command` of PyMongo, without a session.

        Raises what PyMongo raises; `_TooLongError` before anything was sent.
        """
        client, topology = self._client, self._topology
        name = next(iter(command))
        command = command.copy()  # a retry begins with what was asked
        cluster_time = topology.max_cluster_time()
        if cluster_time:
            command["$clusterTime"] = cluster_time
        conn.apply_timeout(command)
        request_id, message, length, _ = _op_msg(
            0, command, self._database, preference, self._codec, conn.compression_context
        )
        if length > conn.max_bson_size:
            raise _TooLongError
        listeners = client._event_listeners
        if listeners is None or not listeners.enabled_for_commands:
            return await self._answer(conn, request_id, message, name)
        listeners.publish_command_start(
            command, self._database, request_id, conn.address, conn.server_connection_id
        )
        began = monotonic()
        try:
            reply = await self._answer(conn, request_id, message, name)
        except Exception as error:
            if isinstance(error, NotPrimaryError | OperationFailure):
                failure: Any = error.details
            else:
                failure = {"errmsg": str(error), "errtype": type(error).__name__}
            listeners.publish_command_failure(
                timedelta(seconds=monotonic() - began),
                failure,
                name,
                request_id,
                conn.address,
                conn.server_connection_id,
                database_name=self._database,
            )
            raise
        listeners.publish_command_success(
            timedelta(seconds=monotonic() - began),
            reply,
            name,
            request_id,
            conn.address,
            conn.server_connection_id,
            database_name=self._database,
        )
        return reply

    async def _answer(
        self, conn: AsyncConnection, request_id: int, message: bytes, name: str
    ) -> Row:
        payload = await _round_trip(conn, request_id, message)
        [reply] = payload.unpack_response(None, self._codec, FIRST_BATCH)
        # PyMongo holds a lock for it, because another thread could be in there.
        self._topology._receive_cluster_time_no_lock(reply.get("$clusterTime"))
        helpers_shared._check_command_response(
            reply, conn.max_wire_version, pool_opts=conn.opts if name == "find" else None
        )
        return reply


FIRST_BATCH: Final[Row] = {"cursor": {"firstBatch": 1}}
"""What of an answer is documents of ours, for codecs with types of their own."""


class _After(_ClientConnectionRetryable[Any]):
    """PyMongo's decision whether a read is tried again, after a first try that was made before."""

    __slots__ = ("_failure",)

    def __init__(
        self,
        failure: PyMongoError,
        server: Server,
        client: AsyncMongoClient[Row],
        attempt: Callable[..., Any],
        command: Row,
        preference: _ServerMode,
    ) -> None:
        super().__init__(
            client,
            attempt,
            None,
            next(iter(command)),
            is_read=True,
            read_pref=preference,
            retryable=client.options.retry_reads,
        )
        self._server = server
        self._failure: PyMongoError | None = failure

    async def _read(self) -> Any:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return await super()._read()


def _is_busy(pool: Pool) -> bool:
    """Someone is in the pool, or waits for something of it: PyMongo knows whose turn it is."""
    return bool(pool.lock.locked() or pool.size_cond._waiters or pool._max_connecting_cond._waiters)


def _give(pool: Pool, conn: AsyncConnection) -> bool:
    """Give back a connection that can be used again, as `Pool.checkin` does; False where it cannot."""
    if (
        conn.closed
        or pool.state != PoolState.READY
        or _is_busy(pool)
        or pool.stale_generation(conn.generation, conn.service_id)
    ):
        return False
    conn.active = False
    pool._checkin_apply(conn, False, False, False)
    return True


async def _round_trip(conn: AsyncConnection, request_id: int, message: bytes) -> _OpMsg:
    """Send a message and wait for the answer to it.

    PyMongo makes two tasks for each answer, one of them to look whether it should go on waiting;
    here a timer does. Whatever ends the wait (an error, the timer, a cancellation) closes the
    connection: an answer that nobody has read must not meet the next one who asks.
    """
    protocol = conn.conn.get_conn
    watch = _Watch(conn, protocol)
    try:
        await protocol.write(message)
        data, op_code = await protocol.read(request_id, conn.max_message_size)
        if op_code != _OpMsg.OP_CODE:
            raise ProtocolError(f"Got opcode {op_code!r} but expected {_OpMsg.OP_CODE!r}")
        answer = _OpMsg.unpack(data)
    except BaseException as error:
        watch.timer.cancel()
        # Closes it, and raises network errors as those that PyMongo has for them.
        await conn._raise_connection_failure(error)
    watch.timer.cancel()
    if watch.has_ended:  # in the moment in which the answer came
        await conn.close_conn(None)
    return answer


class _Watch:
    """Ends the wait for an answer when its time is over, or when the pool was cleared."""

    __slots__ = ("_conn", "_deadline", "_loop", "_protocol", "has_ended", "timer")

    def __init__(self, conn: AsyncConnection, protocol: PyMongoProtocol) -> None:
        self._conn, self._protocol = conn, protocol
        self._loop = asyncio.get_running_loop()
        self.has_ended = False
        seconds = protocol.gettimeout  # a property: `socketTimeoutMS`, or what `timeout` leaves
        self._deadline = None if seconds is None else self._loop.time() + seconds
        wait = LOOK_SECONDS if seconds is None or seconds > LOOK_SECONDS else seconds
        self.timer = self._loop.call_later(wait, self._look)

    def _look(self) -> None:
        left = LOOK_SECONDS if self._deadline is None else self._deadline - self._loop.time()
        if self._conn.cancel_context.cancelled:
            self._end(pymongo.errors._OperationCancelled("operation cancelled"))
        elif left <= 0:
            self._end(TimeoutError("timed out"))
        else:
            self.timer = self._loop.call_later(min(left, LOOK_SECONDS), self._look)

    def _end(self, error: Exception) -> None:
        self.has_ended = True
        self._protocol.close(error)  # the read raises it


NEEDED: Final[tuple[tuple[Callable[..., Any], tuple[str, ...]], ...]] = (
    (
        AsyncMongoClient._retry_internal,
        ("func", "session", "bulk", "operation", "is_read", "read_pref", "retryable"),
    ),
    (
        _ClientConnectionRetryable.__init__,
        ("mongo_client", "func", "bulk", "operation", "is_read", "read_pref", "retryable"),
    ),
    (_ClientConnectionRetryable.run, ("self",)),
    (_ClientConnectionRetryable._read, ("self",)),
    (_ClientCheckout.__init__, ("client", "server", "session")),
    (_ClientCheckout.handle, ("exc_type", "exc_val")),
    (_ClientCheckout.contribute_socket, ("conn",)),
    (AsyncConnection.apply_timeout, ("cmd",)),
    (AsyncConnection.close_conn, ("reason",)),
    (AsyncConnection._raise_connection_failure, ("error",)),
    (Pool.checkin, ("conn",)),
    (Pool._checkin_apply, ("conn", "txn", "cursor", "forked")),
    (Pool.stale_generation, ("gen", "service_id")),
    (Topology._receive_cluster_time_no_lock, ("cluster_time",)),
    (Topology.max_cluster_time, ("self",)),
    (PyMongoProtocol.write, ("message",)),
    (PyMongoProtocol.read, ("request_id", "max_message_size")),
    (PyMongoProtocol.close, ("exc",)),
    (_op_msg, ("flags", "command", "dbname", "read_preference", "opts", "ctx")),
    (_OpMsg.unpack, ("msg",)),
    (_OpMsg.unpack_response, ("cursor_id", "codec_options", "user_fields")),
    (
        helpers_shared._check_command_response,
        ("response", "max_wire_version", "pool_opts"),
    ),
    (AsyncCommandCursor.__init__, ("collection", "cursor_info", "address", "batch_size")),
)
"""Functions of PyMongo with parameters that are relied on."""


def unfit(data: AsyncDatabase[Row]) -> str | None:
    """Why reads have to go through PyMongo's public API; None when they need not."""
    return next(_reasons(data), None)


def _reasons(data: AsyncDatabase[Row]) -> Iterator[str]:
    if pymongo.version_tuple[:2] not in TESTED:
        yield f"PyMongo {pymongo.version} is not one that was tested"
    for function, parameters in NEEDED:
        missing = set(parameters) - set(inspect.signature(function).parameters)
        if missing:
            yield f"{function.__qualname__} has no {', '.join(sorted(missing))}"
    options = data.client.options
    credentials = options.pool_options._credentials
    if options.pool_options.server_api is not None:
        yield "a declared API version"
    if options.load_balanced:
        yield "a load balancer"
    if options.auto_encryption_opts is not None:
        yield "encryption on this side"
    if credentials is not None and credentials.mechanism == "MONGODB-OIDC":
        yield "credentials that expire"
