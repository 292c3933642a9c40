"""GraphQL over WebSocket: https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md"""

import asyncio
import logging
from collections.abc import Hashable
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import orjson
from graphql import OperationType
from starlette.datastructures import Headers
from starlette.types import Scope, Send

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.base import utc_now
from modelharbor.errors import HarborError, RateLimited, Unauthenticated
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.failures import Problem, any_problem, problem
from modelharbor.execution.subscribing import Subscription
from modelharbor.observability.logging import log_event, request_id
from modelharbor.observability.sentry import operation_scope

from .answers import REQUEST_ID, request_id_from, with_request_id
from .outbox import Outbox
from .parameters import NESTING, check_nesting, is_nested_deeper, read_parameters
from .protocol import CUT_OFF, WRITE_TEXT

if TYPE_CHECKING:
    from .incoming import Incoming
    from .operations import Operations

log = logging.getLogger(__name__)
PROTOCOL: Final = "graphql-transport-ws"
GOING_AWAY: Final = 1001
STUCK: Final = 1013  # "try again later": clients come back
BAD_MESSAGE: Final = 4400
NOT_INITIALISED: Final = 4401
FORBIDDEN: Final = 4403
WRONG_PROTOCOL: Final = 4406
TOO_LATE: Final = 4408
SAME_ID: Final = 4409
INITIALISED_TWICE: Final = 4429
NO_LONGER_VALID: Final = "The token is no longer valid."
LONGEST_ID: Final = 256  # characters; clients make UUIDs or numbers
LONGEST_REASON: Final = 123  # bytes: RFC 6455, 5.5


class CloseSocket(Exception):
    """The client broke the protocol, or may not be here."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Running:
    """One operation of a socket."""

    __slots__ = ("head", "id", "socket", "subscription", "task")

    def __init__(self, socket: "Socket", id: str) -> None:
        self.socket, self.id = socket, id
        self.head = b'{"id":%b,"type":' % orjson.dumps(id)
        self.task: asyncio.Task[None] | None = None
        self.subscription: Subscription | None = None

    def send(self, payload: bytes, key: Hashable) -> None:
        if self.socket.running.get(self.id) is not self:
            return  # it has ended
        self.socket.outbox.put(
            b'%b"next","payload":%b}' % (self.head, payload),
            None if key is None else (self.id, key),
        )

    async def room(self) -> None:
        await self.socket.outbox.room()

    def complete(self) -> None:
        if self.socket.forget(self):
            self.socket.outbox.put(b'%b"complete"}' % self.head)

    def fail(self, problems: list[Problem]) -> None:
        if self.socket.forget(self):
            shown = orjson.dumps(self.socket.marked(problems))
            self.socket.outbox.put(b'%b"error","payload":%b}' % (self.head, shown))


class Socket:
    """One connection."""

    def __init__(self, operations: "Operations", request: "Incoming", send: Send) -> None:
        self.operations, self.settings = operations, operations.settings
        self.request, self.send = request, send
        self.live = request.state["live"]
        self.viewers = request.state["viewers"]
        self.request_id = request.scope[REQUEST_ID] = request_id_from(request.scope["headers"])
        self.authorization: str | None = None
        self.viewer: Viewer = ANONYMOUS
        self.running: dict[str, Running] = {}
        self.is_initialised = self.is_acknowledged = False
        self.count = 0  # of operations so far
        self.outbox = Outbox(
            self.send_text,
            self.settings.send_queue,
            self.settings.send_timeout_seconds,
            self.be_stuck,
            request.scope.get(WRITE_TEXT),
        )
        self.closing: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        scope, receive = self.request.scope, self.request.receive
        await receive()
        if not is_own_origin(Headers(scope=scope), self.settings.allowed_origins):
            await self.send({"type": "websocket.close", "code": 1008, "reason": "Origin"})
            return
        if PROTOCOL not in scope["subprotocols"]:
            await self.send({"type": "websocket.accept"})
            await self.close(WRONG_PROTOCOL, f"Subprotocol not acceptable: use {PROTOCOL}")
            return
        await self.send({"type": "websocket.accept", "subprotocol": PROTOCOL})
        loop = asyncio.get_running_loop()
        start = loop.time()
        request_id.set(self.request_id)
        late = loop.call_later(self.settings.init_timeout_seconds, self.be_late)
        self.live.shut_down[self.go_away] = None
        if self.live.is_closing:
            self.go_away()
        try:
            while True:
                message = await receive()
                if message["type"] != "websocket.receive":
                    break
                await self.take(message.get("text"))
        except CloseSocket as reason:
            await self.close(reason.code, reason.reason)
        finally:
            late.cancel()
            self.end()
            seconds = round(loop.time() - start, 1)
            log_event(log, logging.INFO, "socket.closed", seconds=seconds, operations=self.count)

    def end(self) -> None:
        self.live.shut_down.pop(self.go_away, None)
        self.outbox.end()
        for running in list(self.running.values()):
            self.stop(running)
        self.viewers.leave(self.viewer, self.be_told)

    async def close(self, code: int, reason: str) -> None:
        self.outbox.end()
        shown = reason.encode()[:LONGEST_REASON].decode(errors="ignore")
        await self.send({"type": "websocket.close", "code": code, "reason": shown})

    def close_soon(self, code: int, reason: str, *, last: bool = False) -> None:
        """From where nobody can wait; `last`: after what waits to be sent, for a second at most."""
        if self.closing is not None:
            return

        async def close() -> None:
            if last:
                try:
                    async with asyncio.timeout(1.0):
                        await self.outbox.drained()
                except TimeoutError:
                    pass
            await self.close(code, reason)

        self.closing = self.live.begin(close())

    def be_late(self) -> None:
        if not self.is_initialised:
            self.close_soon(TOO_LATE, "Connection initialisation timeout")

    def be_stuck(self) -> None:
        """It does not even take the message that it is closed: the connection is cut a while later."""
        reason = "Too slow: come back, and go on with `after`"
        cut_off = self.request.scope.get(CUT_OFF)
        if cut_off is None:
            self.close_soon(STUCK, reason)
        else:
            cut_off(STUCK, reason)

    def go_away(self) -> None:
        self.close_soon(
            GOING_AWAY, "The server is closing: come back, and go on with `after`", last=True
        )

    # ---- what clients say

    async def take(self, text: str | None) -> None:
        if text is None:
            raise CloseSocket(BAD_MESSAGE, "Messages are text")
        try:
            message = orjson.loads(text)
        except orjson.JSONDecodeError:
            raise CloseSocket(BAD_MESSAGE, "Messages are JSON") from None
        if not isinstance(message, dict):
            raise CloseSocket(BAD_MESSAGE, "Messages are JSON objects")
        match message.get("type"):
            case "connection_init":
                await self.initialise(message.get("payload"))
            case "ping":
                payload = message.get("payload")
                if is_nested_deeper(payload, NESTING):
                    raise CloseSocket(BAD_MESSAGE, "The payload is nested too deeply")
                answer = (
                    {"type": "pong"} if payload is None else {"type": "pong", "payload": payload}
                )
                self.outbox.put(orjson.dumps(answer))
            case "pong":
                pass
            case "subscribe":
                self.subscribe(message)
            case "complete":
                running = self.running.get(self.id_of(message))
                if running is not None:
                    self.stop(running)
            case _:
                raise CloseSocket(BAD_MESSAGE, "Messages have a `type` of the protocol")

    def id_of(self, message: dict[str, Any]) -> str:
        found = message.get("id")
        if not isinstance(found, str) or not 0 < len(found) <= LONGEST_ID:
            raise CloseSocket(BAD_MESSAGE, f"`id` takes 1 to {LONGEST_ID} characters")
        return found

    async def initialise(self, payload: object) -> None:
        if self.is_initialised:
            raise CloseSocket(INITIALISED_TWICE, "Too many initialisation requests")
        if payload is not None and not isinstance(payload, dict):
            raise CloseSocket(BAD_MESSAGE, "`payload` of connection_init takes an object")
        self.is_initialised = True
        self.authorization = authorization_of(payload or {}, self.request.scope)
        self.request.authorization = self.authorization
        try:
            self.viewer = await self.viewers.enter(self.authorization, self.be_told)
        except Unauthenticated as error:
            raise CloseSocket(FORBIDDEN, error.message) from None
        except HarborError as error:
            raise CloseSocket(STUCK, error.message) from None
        self.is_acknowledged = True
        self.outbox.put(b'{"type":"connection_ack"}')

    def subscribe(self, message: dict[str, Any]) -> None:
        if not self.is_acknowledged:
            raise CloseSocket(NOT_INITIALISED, "Unauthorized: send connection_init first")
        id = self.id_of(message)
        if id in self.running:
            raise CloseSocket(SAME_ID, f"Subscriber for {id} already exists")
        payload = message.get("payload")
        if not isinstance(payload, dict):
            raise CloseSocket(BAD_MESSAGE, "`payload` of subscribe takes an object")
        running = Running(self, id)
        most = self.settings.max_subscriptions
        if len(self.running) >= most:
            self.running[id] = running
            running.fail(
                [problem(RateLimited(f"A socket runs {most} operations at once, no more."))]
            )
            return
        self.running[id] = running
        self.count += 1
        running.task = self.live.begin(self.run(running, payload))

    async def run(self, running: Running, payload: dict[str, Any]) -> None:
        token = request_id.set(self.request_id)
        try:
            check_nesting(payload, "The payload")
            prepared = await self.operations.prepare(self.request, read_parameters(payload))
            kind = prepared.operation.kind
            if kind is OperationType.SUBSCRIPTION:
                asked = self.operations.asked(self.request, prepared)
                since = perf_counter()
                await self.operations.admit(self.request, prepared, self.viewer)
                subscription = Subscription(asked, self.viewer, running)
                running.subscription, turn = subscription, subscription.turn
                subscribed = await self.live.admit(subscription)
                self.operations.begun(self.request, prepared, since)
                await self.live.follow(subscription, subscribed, turn)
            else:
                self.refuse_expired()
                with operation_scope(kind.value, prepared.operation.name):
                    # Who asks is looked at again: what was revoked, or granted, holds from then on.
                    executed = await self.operations.execute(self.request, prepared)
                if executed.is_refused:
                    running.fail(executed.problems)
                else:
                    await running.room()
                    running.send(executed.body, None)
                    running.complete()
        except InvalidDocument as error:
            running.fail(list(error.problems))
        except Exception as error:
            running.fail([any_problem(error, "socket")])
        finally:
            running.task = None
            request_id.reset(token)

    def refuse_expired(self) -> None:
        expires_at = self.viewer.expires_at
        if expires_at is not None and expires_at <= utc_now():
            raise Unauthenticated(NO_LONGER_VALID)

    # ---- what clients are told

    async def send_text(self, text: bytes) -> None:
        await self.send({"type": "websocket.send", "text": text.decode()})

    def marked(self, problems: list[Problem]) -> list[Problem]:
        return with_request_id(self.request.scope, problems)

    def forget(self, running: Running) -> bool:
        """Whether it was there: what has ended is not told of twice."""
        if self.running.get(running.id) is not running:
            return False
        del self.running[running.id]
        if running.subscription is not None:
            running.subscription.close()
            running.subscription = None  # they hold each other
        return True

    def stop(self, running: Running) -> None:
        if running.task is not None:
            running.task.cancel()
        self.forget(running)

    def be_told(self, viewer: Viewer | None) -> None:
        """The token is no longer good, or its rights have changed."""
        if viewer is None:
            gone = problem(Unauthenticated(NO_LONGER_VALID))
            for running in list(self.running.values()):
                running.fail([gone])
            self.close_soon(FORBIDDEN, NO_LONGER_VALID, last=True)
            return
        self.viewer = viewer
        for running in list(self.running.values()):
            if running.subscription is not None:
                self.live.begin(self.renew(running, running.subscription, viewer))

    async def renew(self, running: Running, subscription: Subscription, viewer: Viewer) -> None:
        try:
            await self.live.renew(subscription, viewer)
        except Exception as error:
            running.fail([any_problem(error, "socket")])


def is_own_origin(headers: Headers, allowed: list[str]) -> bool:
    """A browser says which page opens the socket: none but our own pages may, and allowed ones."""
    origin = headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return True
    try:
        host = urlsplit(origin).netloc
    except ValueError:  # brackets that do not close
        return False
    return bool(host) and host == headers.get("host")


def authorization_of(payload: dict[str, Any], scope: Scope) -> str | None:
    """From connection_init, where browsers can say it, else from the handshake."""
    headers = payload.get("headers")
    for given in (payload, headers if isinstance(headers, dict) else {}):
        for name, value in given.items():
            if name.lower() == "authorization" and isinstance(value, str):
                return value
    return Headers(scope=scope).get("authorization")
