"""A request for an operation as ASGI hands it over, without Starlette's Request where that is not needed."""

import asyncio
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from modelharbor.errors import PayloadTooLarge, RequestTimeout

from .state import State

P = ParamSpec("P")
T = TypeVar("T")


def short_texts(function: Callable[P, T]) -> Callable[P, T]:
    """Remembers a few answers for short arguments: clients send the same headers again and again."""
    remembered = lru_cache(maxsize=64)(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if all(len(str(value)) <= 128 for value in args):
            return remembered(*args, **kwargs)  # type: ignore[arg-type]  # all of them texts
        return function(*args, **kwargs)

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
        too_large = PayloadTooLarge(f"The body is larger than {limit} bytes.")
        length = self.header(b"content-length") or ""
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    if len(body) + len(chunk) > limit:
                        raise too_large
                    if not more and not body:
                        whole: bytes = chunk
                        return whole
                    body += chunk
                    if not more:
                        return bytes(body)
        except TimeoutError:
            raise RequestTimeout(f"The body did not arrive within {seconds:g} s.") from None
