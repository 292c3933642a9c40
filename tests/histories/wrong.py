"""Caches that are wrong on purpose, in front of a server: whoever looks for old answers must find these."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from .wire import Answer, Broken, Connections


@dataclass
class Kept:
    """What the caches of several proxies have in common."""

    changed: float = 0.0
    """When a mutation was answered last, by any of them."""


@dataclass
class WrongCache:
    """A proxy that keeps answers: for `seconds`; where it `forgets`, until the next mutation that goes
    through it, or, if it `hears`, through any of them; for all viewers alike where it `mixes` them."""

    name: str
    inner: Callable[[], int]
    kept: Kept
    seconds: float = 0.3
    forgets: bool = False
    hears: bool = False
    mixes: bool = False
    port: int = 0
    is_up: bool = True
    hits: int = 0
    _changed: float = 0.0
    _answers: dict[tuple[bytes, bytes, bytes], tuple[float, Answer]] = field(default_factory=dict)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["WrongCache"]:
        async with Connections(self.inner) as connections:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                try:
                    while True:
                        writer.write(encoded(await self._answer(connections, reader)))
                        await writer.drain()
                except (OSError, EOFError, Broken):
                    writer.close()

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()

    async def _answer(self, connections: Connections, reader: asyncio.StreamReader) -> Answer:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")[:-2]
        headers = dict(line.split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split()
        is_mutation = b"mutation M" in body
        authorization = b"" if self.mixes else headers.get("authorization", "").encode()
        key = (first.encode(), authorization, body)
        changed = self.kept.changed if self.hears else self._changed
        since, found = self._answers.get(key, (0.0, None))
        now = time.monotonic()
        if (
            found is not None
            and now - since < self.seconds
            and not (self.forgets and changed > since)
        ):
            return found
        answer = await connections.request(method, path, headers, body)
        if is_mutation:
            self._changed = self.kept.changed = time.monotonic()
        elif not answer.codes:
            self._answers[key] = (now, answer)
        return answer


def encoded(answer: Answer) -> bytes:
    head = f"HTTP/1.1 {answer.status} OK\r\ncontent-length: {len(answer.body)}\r\n\r\n"
    return head.encode() + answer.body
