"""Thousands of subscribers in a process of their own: `python -m bench.live.clients`.

Reads commands from stdin, one JSON object a line, and answers each by one line on stdout. A subscriber
is a bare asyncio protocol, and equal frames are read once, so that the subscribers take little of the
time that is measured.
"""

import asyncio
import sys
import time
from array import array
from base64 import b64encode
from collections.abc import Callable
from typing import Any, Final, cast

import orjson
import uvloop

from .frames import CLOSE, PING, PONG, TEXT, client_frame, server_frames
from .watching import Event, Stamp, Verdict, judge, percentile, read_event

AT_ONCE: Final = 100  # handshakes under way
CONNECT_SECONDS: Final = 60.0
ACK: Final = b'"connection_ack"'


class Failed(Exception):
    """The subscribers cannot do what they are told."""


class Fleet:
    """All subscribers. `document`: with or without `after` and `rate`."""

    def __init__(
        self, host: str, port: int, token: str | None, document: str, variables: dict[str, Any]
    ) -> None:
        self.host, self.port = host, port
        self.document, self.variables = document, variables
        self.handshake = (
            f"GET /graphql HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {b64encode(bytes(16)).decode()}\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: graphql-transport-ws\r\n\r\n"
        ).encode()
        payload = {} if token is None else {"authorization": f"Bearer {token}"}
        self.init = text_frame({"type": "connection_init", "payload": payload})
        self.known: dict[bytes, Event] = {}
        self.came: dict[int, array[float]] = {}
        self.subscribers: list[Subscriber] = []
        self.delivered = 0
        self.problems: list[str] = []
        self.subscriptions: dict[str | None, bytes] = {}

    def subscription(self, after: str | None) -> bytes:
        frame = self.subscriptions.get(after)
        if frame is None:
            variables = dict(self.variables)
            if after is not None and "after" in variables:
                variables["after"] = after
            payload = {"query": self.document, "variables": variables}
            frame = text_frame({"type": "subscribe", "id": "1", "payload": payload})
            self.subscriptions[after] = frame
        return frame

    async def connect(self, count: int) -> dict[str, Any]:
        """Back when each has its first event."""
        made = [Subscriber(self) for _ in range(count)]
        self.subscribers += made
        return await self._open(made)

    async def cut(self, count: int) -> dict[str, Any]:
        """Connections end without a word."""
        for each in self.subscribers[:count]:
            each.cut()
        await asyncio.sleep(0.1)
        return {}

    async def come_back(self, count: int) -> dict[str, Any]:
        """After the last event that each has."""
        return await self._open(self.subscribers[:count])

    async def _open(self, some: "list[Subscriber]") -> dict[str, Any]:
        start, places = time.monotonic(), asyncio.Semaphore(AT_ONCE)

        async def open(subscriber: Subscriber) -> None:
            async with places:
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        await subscriber.open()
                except (TimeoutError, OSError) as error:
                    self.problems.append(f"not connected: {type(error).__name__} {error}")

        await asyncio.gather(*map(open, some))
        if self.problems:
            raise Failed(f"{len(self.problems)} problems, the first: {self.problems[0]}")
        return {"seconds": time.monotonic() - start}

    async def wait(self, sequence: int, seconds: float) -> dict[str, Any]:
        """Until all have heard of this, or something later; how many have not."""
        until = time.monotonic() + seconds
        while behind := sum(1 for each in self.subscribers if each.last.sequence < sequence):
            if time.monotonic() > until:
                break
            await asyncio.sleep(0.02)
        return {"behind": behind, "delivered": self.delivered}

    async def report(self, stamps: list[list[Any]]) -> dict[str, Any]:
        """What came of these changes."""
        written = [Stamp(*each) for each in stamps]
        states = [each.sequence for each in written if each.is_state]
        verdict = sum((judge(each.heard, states) for each in self.subscribers), Verdict())
        since_ack, since_sent = array("d"), array("d")
        for stamp in written:
            for at in self.came.get(stamp.sequence, ()):
                since_ack.append(at - stamp.acknowledged)
                since_sent.append(at - stamp.sent)
        acknowledged, sent = sorted(since_ack), sorted(since_sent)
        return {
            "missed": verdict.missed,
            "repeated": verdict.repeated,
            "backwards": verdict.backwards,
            "measured": len(acknowledged),
            "p50": percentile(acknowledged, 0.50),
            "p99": percentile(acknowledged, 0.99),
            "longest": acknowledged[-1],
            "sent_p50": percentile(sent, 0.50),
            "sent_p99": percentile(sent, 0.99),
            "problems": self.problems,
        }


NOTHING: Final = Event(-1, "", "")


class Subscriber(asyncio.Protocol):
    __slots__ = ("begun", "fleet", "heard", "is_open", "last", "rest", "transport")

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.heard: list[int] = []
        self.last = NOTHING
        self.transport: asyncio.Transport | None = None
        self.rest = b""
        self.is_open = False
        self.begun: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Back when the first event has come, or is sure not to come: all is known already."""
        loop = asyncio.get_running_loop()
        self.rest, self.is_open, self.begun = b"", False, loop.create_future()
        await loop.create_connection(lambda: self, self.fleet.host, self.fleet.port)
        await self.begun

    def cut(self) -> None:
        if self.transport is not None:
            transport, self.transport = self.transport, None
            transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.transport.write(self.fleet.handshake)

    def connection_lost(self, error: Exception | None) -> None:
        if self.transport is not None:  # it was not we who ended it
            self.fleet.problems.append(f"closed by the server: {self.rest!r}")
            self._begin()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        event = self.fleet.known.get(data)
        if event is not None and not self.rest:
            self._hear(event, now)
            return
        data = self.rest + data
        if not self.is_open:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self.rest = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.fleet.problems.append(head.decode(errors="replace"))
                self._begin()
                return
            self.is_open = True
            self._write(self.fleet.init)
        self.rest = b""
        for whole, opcode, payload in server_frames(data):
            if opcode == TEXT:
                self._read(whole, payload, now)
            elif opcode == PING:
                self._write(client_frame(PONG, payload))
            elif opcode in (CLOSE, -1):
                self.rest = whole

    def _read(self, whole: bytes, payload: bytes, now: float) -> None:
        event = self.fleet.known.get(whole)
        if event is None:
            if ACK in payload:
                self._write(self.fleet.subscription(self.last.cursor or None))
                return
            try:
                event = read_event(payload)
            except ValueError as error:
                self.fleet.problems.append(str(error))
            if event is None:
                return
            self.fleet.known[whole] = event
        self._hear(event, now)

    def _hear(self, event: Event, now: float) -> None:
        self.heard.append(event.sequence)
        self.last = event
        fleet = self.fleet
        fleet.delivered += 1
        came = fleet.came.get(event.sequence)
        if came is None:
            came = fleet.came[event.sequence] = array("d")
        came.append(now)
        if self.begun is not None:
            self._begin()

    def _begin(self) -> None:
        if self.begun is not None and not self.begun.done():
            self.begun.set_result(None)
        self.begun = None

    def _write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)


def text_frame(message: dict[str, Any]) -> bytes:
    return client_frame(TEXT, orjson.dumps(message))


async def obey(say: Callable[[dict[str, Any]], None]) -> None:
    """Until stdin ends."""
    reader = asyncio.StreamReader(limit=2**24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    fleet: Fleet | None = None
    while line := await reader.readline():
        given = orjson.loads(line)
        order = given.pop("do")
        try:
            if order == "begin":
                fleet, answer = Fleet(**given), {}
            else:
                assert fleet is not None
                answer = await getattr(fleet, order)(**given)
            say(answer)
        except Failed as error:
            say({"failed": str(error)})


if __name__ == "__main__":
    uvloop.run(obey(lambda answer: print(orjson.dumps(answer).decode(), flush=True)))
