"""Requests as clients send them, with as little of a client as there can be: HTTP/1.1 and WebSocket."""

import asyncio
import gzip
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self
from urllib.parse import quote

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

TIMEOUT_SECONDS: Final = 40.0  # above all that a server may take


class Broken(Exception):
    """The connection ended before there was an answer: nobody knows what came of the request."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.body)
        return found

    @property
    def codes(self) -> list[str]:
        return [each["extensions"]["code"] for each in self.json.get("errors") or ()]

    @property
    def layer(self) -> str:
        """Of the cache, as the server says it: empty where it says nothing."""
        return self.headers.get("x-cache", "").split(" ")[0].split(";")[0].lower()


@dataclass
class Connections:
    """HTTP connections to one server, which may move to another port."""

    port: Callable[[], int]
    _idle: list[tuple[int, asyncio.StreamReader, asyncio.StreamWriter]] = field(
        default_factory=list
    )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *ended: object) -> None:
        for _, _, writer in self._idle:
            writer.transport.abort()

    async def post(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        content = orjson.dumps(body)
        sent = {**headers, "content-type": "application/json", "content-length": str(len(content))}
        return await self.request("POST", "/graphql", sent, content)

    async def get(self, parameters: dict[str, str], headers: dict[str, str]) -> Answer:
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        return await self.request("GET", f"/graphql?{query}", headers)

    async def request(
        self, method: str, path: str, headers: dict[str, str], content: bytes = b""
    ) -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode()
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await self._send(head + content)
        except (OSError, EOFError, TimeoutError) as error:
            raise Broken(repr(error)) from error

    async def _send(self, request: bytes) -> Answer:
        port = self.port()
        while self._idle:
            its_port, reader, writer = self._idle.pop()
            if its_port == port and not reader.at_eof() and not writer.is_closing():
                break
            writer.transport.abort()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in lines)
            }
            if "chunked" in headers.get("transfer-encoding", ""):
                body = await _chunks(reader)
            else:
                body = await reader.readexactly(int(headers.get("content-length", 0)))
        except BaseException:
            writer.transport.abort()
            raise
        self._idle.append((port, reader, writer))
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        return Answer(int(first.split()[1]), headers, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        found += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return found


class Socket:
    """One WebSocket, one operation at a time; opened anew when it has broken."""

    def __init__(self, port: Callable[[], int], authorization: str | None) -> None:
        self.port, self.authorization = port, authorization
        self.is_behind = False
        """It was open to a server that has moved."""
        self._connection: ClientConnection | None = None
        self._port = 0
        self._lock = asyncio.Lock()

    async def ask(self, operation: dict[str, Any]) -> Answer:
        async with self._lock:
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    return await self._ask(operation)
            except (OSError, EOFError, TimeoutError, WebSocketException) as error:
                self.is_behind = self._port != self.port()
                await self.close()
                raise Broken(repr(error)) from error

    async def _ask(self, operation: dict[str, Any]) -> Answer:
        if self._connection is None:
            self._port = self.port()
            self._connection = await connect(
                f"ws://127.0.0.1:{self._port}/graphql",
                subprotocols=["graphql-transport-ws"],  # type: ignore[list-item]  # it wants a NewType
                compression=None,
                ping_interval=None,
            )
            payload = {"authorization": self.authorization} if self.authorization else {}
            await self._send({"type": "connection_init", "payload": payload})
            assert await self._receive() == {"type": "connection_ack"}
        await self._send({"type": "subscribe", "id": "1", "payload": operation})
        told = await self._receive()
        if told["type"] == "error":
            return Answer(200, {}, orjson.dumps({"errors": told["payload"]}))
        assert await self._receive() == {"type": "complete", "id": "1"}
        return Answer(200, {}, orjson.dumps(told["payload"]))

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._connection is not None
        await self._connection.send(orjson.dumps(message).decode())

    async def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        while True:
            found: dict[str, Any] = orjson.loads(await self._connection.recv())
            if found["type"] != "ping":
                return found

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.transport.abort()
            with suppress(Exception):
                await connection.wait_closed()
