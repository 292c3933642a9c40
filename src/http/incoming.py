"""A request for an operation as ASGI hands it over, without Starlette's Request where that is not needed."""

import asyncio
from collections.abc import Callable, Generator
from functools import lru_cache, wraps
from types import CoroutineType
from typing import Any, ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from modelharbor.errors import PayloadTooLarge, RequestTimeout

from .state import State

P = ParamSpec("P")
T = TypeVar("T")


def short_texts(function: Callable[P, T]) -> Callable[P, T]:
    """Remembers a few answers for short arguments: clients send the same headers again and again."""
    remembered = lru_cache(maxsize=64)(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        for value in args:
            if value is not None and len(value) > 128:  # type: ignore[arg-type]  # a text
                return function(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]  # all of them texts, or None

    return called


class Incoming:
    """A request as ASGI hands it over; Starlette's, where more than headers and body is wanted."""

    __slots__ = ("authorization", "headers", "is_socket", "method", "receive", "scope", "state")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope, self.receive = scope, receive
        self.is_socket: bool = scope["type"] == "websocket"
        self.method: str = scope.get("method", "GET")
        self.state: State = scope["state"]
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        """By name in lower case; of several the first."""
        self.authorization = self.header(b"authorization")
        """Of a socket: what it was opened with, or what it says when it is initialised."""

    def header(self, name: bytes) -> str | None:
        """Of several the first; `name` in lower case."""
        found = self.headers.get(name)
        return None if found is None else found.decode("latin-1")

    @property
    def whole(self) -> Request[State]:
        return Request(self.scope, self.receive)

    async def body(self, limit: int, seconds: float) -> bytes:
        """Read no further than the limit, whatever the headers say, and no longer than its time."""
        length = self.header(b"content-length") or ""
        if length.isdecimal() and int(length[:20]) > limit:
            raise _too_large(limit)
        received = self.receive()
        if isinstance(received, CoroutineType):
            # Mostly all of it is there by now: a timer alone would cost more than to take it.
            try:
                received = _Begun(received, received.send(None))
            except StopIteration as done:
                message: Message = done.value
                if message["type"] == "http.request" and not message.get("more_body", False):
                    whole: bytes = message.get("body", b"")
                    if len(whole) > limit:
                        raise _too_large(limit) from None
                    return whole
                received = _done(message)
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await received
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    chunk = message.get("body", b"")
                    if len(body) + len(chunk) > limit:
                        raise _too_large(limit)
                    body += chunk
                    if not message.get("more_body", False):
                        return bytes(body)
                    received = self.receive()
        except TimeoutError:
            raise RequestTimeout(f"The body did not arrive within {seconds:g} s.") from None


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {limit} bytes.")


async def _done(message: Message) -> Message:
    return message


class _Begun:
    """A coroutine that was begun: to await it is to go on with it. `waits`: what it waits for."""

    def __init__(self, coroutine: "CoroutineType[Any, Any, Message]", waits: Any) -> None:
        self.coroutine, self.waits = coroutine, waits

    def __await__(self) -> Generator[Any, Any, Message]:
        waits = self.waits
        try:
            while True:
                try:
                    told = yield waits
                except BaseException as error:
                    waits = self.coroutine.throw(error)
                else:
                    waits = self.coroutine.send(told)
        except StopIteration as done:
            message: Message = done.value
            return message
