"""Subscriptions over `graphql-transport-ws`, taken up again where they broke off."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from .agent import user_agent
from .failures import PASSING, ClientError, Rejected, Unauthenticated, Unreachable, rejected
from .patience import Patience, asked_seconds, may_pass

PROTOCOL: Final = Subprotocol("graphql-transport-ws")
FORBIDDEN: Final = 4403
PASSING_CODES: Final = frozenset({1000, 1001, 1006, 1011, 1012, 1013, 4408})
"""Why a server closes a socket that it would open again."""
LARGEST: Final = 16 * 1024 * 1024  # bytes of a message


async def subscribe(
    url: str,
    token: str | None,
    query: str,
    variables: Mapping[str, Any],
    seconds: float,
) -> AsyncGenerator[dict[str, Any], None]:
    """The data of each event, until the server has no more. `url` is that of HTTP.

    Where the answer has a field with a `cursor` and the document takes `$after`, the next connection
    goes on from the last one. Unreachable: no connection came to anything for so many seconds.
    """
    patience = Patience(seconds)
    given = dict(variables)
    while True:
        try:
            async with connect(
                _of_websocket(url),
                subprotocols=[PROTOCOL],
                max_size=LARGEST,
                open_timeout=20,
                close_timeout=2,
                user_agent_header=user_agent(),
            ) as socket:
                async with aclosing(_events(socket, token, query, given)) as events:
                    async for data in events:
                        patience.progressed()
                        cursor = _cursor(data)
                        if cursor is not None and "$after" in query:
                            given["after"] = cursor
                        yield data
                return
        except ConnectionClosed as closed:
            code = 1006 if closed.rcvd is None else closed.rcvd.code
            reason = "" if closed.rcvd is None else closed.rcvd.reason
            if code == FORBIDDEN:
                raise Unauthenticated(
                    reason or "The token is not valid.", "UNAUTHENTICATED"
                ) from None
            if code not in PASSING_CODES:
                raise Rejected(
                    f"The server closed the connection: {reason or code}.", f"CLOSED_{code}"
                ) from None
            error: ClientError = Unreachable(f"The connection broke off: {reason or code}.")
        except InvalidStatus as answer:
            status = answer.response.status_code
            if not may_pass(status):
                raise Rejected(
                    f"The server refuses a WebSocket: {status}.", f"HTTP_{status}", status=status
                ) from None
            error = Unreachable(f"The server answered {status}.")
            error.asked_seconds = asked_seconds(answer.response.headers.get("retry-after"))
        except (InvalidHandshake, OSError, TimeoutError, EOFError) as broken:
            error = Unreachable(f"{urlsplit(url).netloc} does not answer: {broken}.")
        except Rejected as answer_:
            if answer_.code not in PASSING:
                raise
            error = answer_
        await patience.wait(error)


async def _events(
    socket: ClientConnection, token: str | None, query: str, variables: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    payload = {} if token is None else {"authorization": f"Bearer {token}"}
    await _send(socket, type="connection_init", payload=payload)
    started = False
    while True:
        message = orjson.loads(await socket.recv())
        match message.get("type"):
            case "connection_ack" if not started:
                started = True
                wanted = {"query": query, "variables": variables}
                await _send(socket, type="subscribe", id="1", payload=wanted)
            case "ping":
                with suppress(ConnectionClosed):  # what it said before is still to be read
                    await _send(socket, type="pong")
            case "next":
                answer = message["payload"]
                if answer.get("errors"):
                    raise rejected(answer["errors"], None, None)
                yield answer["data"]
            case "error":
                raise rejected(message["payload"], None, None)
            case "complete":
                return


async def _send(socket: ClientConnection, **message: Any) -> None:
    await socket.send(orjson.dumps(message).decode())


def _of_websocket(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(scheme="wss" if parts.scheme == "https" else "ws"))


def _cursor(data: Mapping[str, Any]) -> str | None:
    for value in data.values():
        if isinstance(value, dict) and isinstance(value.get("cursor"), str):
            found: str = value["cursor"]
            return found
    return None
