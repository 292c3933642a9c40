"""Answers as a stream of events, each operation on its own connection:
https://github.com/enisdenjo/graphql-sse/blob/master/PROTOCOL.md (distinct connections mode)"""

import asyncio
from collections.abc import Hashable
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Final

import orjson
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelharbor.auth.viewer import Viewer
from modelharbor.errors import Unauthenticated
from modelharbor.execution.failures import Problem, any_problem, problem
from modelharbor.execution.subscribing import Subscription
from modelharbor.settings import Settings
from modelharbor.streams.base import Subscribed

from .answers import with_request_id
from .outbox import Outbox
from .protocol import CUT_OFF

if TYPE_CHECKING:
    from .incoming import Incoming
    from .operations import Operations, Prepared

EVENTS: Final = "text/event-stream; charset=utf-8"
ALIVE_SECONDS: Final = 12.0  # between comments that keep proxies from closing what is silent
COMPLETE: Final = b"event: complete\ndata: \n\n"


class EventStream(Response):
    """Events of one operation. It begins at once, and tells by events what goes wrong later."""

    media_type = EVENTS

    def __init__(self) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = []
        headers = MutableHeaders(raw=self.raw_headers)
        headers["content-type"] = EVENTS
        headers["cache-control"] = "private, no-store"
        headers["x-accel-buffering"] = "no"  # nginx would hold events back
        self.waiting: list[tuple[bytes, Hashable]] = []
        self.is_complete = False
        self.outbox: Outbox | None = None
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    @classmethod
    def of_answer(cls, body: bytes) -> "EventStream":
        """Of an operation that has run."""
        made = cls()
        made.send(body, None)
        made.complete()
        return made

    @classmethod
    def of_failure(cls, problems: list[Problem]) -> "EventStream":
        """Of an operation that could not begin."""
        made = cls()
        made.fail(problems)
        return made

    @classmethod
    async def of_subscription(
        cls, operations: "Operations", request: "Incoming", prepared: "Prepared"
    ) -> "EventStream":
        """Raises what forbids it."""
        made = _Following(operations, request, prepared)
        await made.begin()
        return made

    # ---- a sink

    def send(self, payload: bytes, key: Hashable) -> None:
        self.put(b"event: next\ndata: %b\n\n" % payload, key)

    async def room(self) -> None:
        await self.begun.wait()
        if self.outbox is not None:
            await self.outbox.room()

    def complete(self) -> None:
        self.put(COMPLETE, None)
        self.is_complete = True
        self.ended.set()

    def fail(self, problems: list[Problem]) -> None:
        self.send(orjson.dumps({"errors": problems}), None)
        self.complete()

    def put(self, event: bytes, key: Hashable) -> None:
        if self.is_complete:
            return
        if self.outbox is None:
            self.waiting.append((event, key))  # what is told before the answer begins
        else:
            self.outbox.put(event, key)

    # ---- a response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream(scope, receive, send)
        finally:
            self.end()

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def send_event(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        settings: Settings = scope["state"]["settings"]
        self.outbox = Outbox(
            send_event, settings.send_queue, settings.send_timeout_seconds, self.ended.set
        )
        # At once, so that a client knows it is heard.
        self.outbox.put(b":\n\n")
        for event, key in self.waiting:
            self.outbox.put(event, key)
        self.begun.set()
        following = asyncio.ensure_future(self.follow())
        left = asyncio.ensure_future(gone(receive))
        ended = asyncio.ensure_future(self.ended.wait())
        try:
            while not left.done() and not ended.done():
                done, _ = await asyncio.wait(
                    [left, ended], timeout=ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self.outbox.put(b":\n\n", "alive")
            if self.outbox.is_ended and CUT_OFF in scope:
                scope[CUT_OFF]()
                await left  # the server knows then that there is no more to come
            elif not left.done():
                await self.outbox.drained()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in (following, left, ended):
                task.cancel()
            self.outbox.end()

    async def follow(self) -> None:
        """Once the answer has begun."""

    def end(self) -> None:
        """Nobody listens any more."""


class _Following(EventStream):
    """Of a subscription."""

    def __init__(self, operations: "Operations", request: "Incoming", prepared: "Prepared") -> None:
        super().__init__()
        self.request = request
        self.live, self.viewers = request.state["live"], request.state["viewers"]
        self.operations, self.prepared = operations, prepared
        self.asked = operations.asked(request, prepared)
        self.viewer: Viewer | None = None
        self.subscription: Subscription | None = None
        self.admitted: tuple[Subscribed, int] | None = None

    async def begin(self) -> None:
        since = perf_counter()
        viewer = await self.viewers.enter(self.request.header(b"authorization"), self.be_told)
        self.viewer = viewer
        subscription = self.subscription = Subscription(self.asked, viewer, self)
        try:
            await self.operations.admit(self.request, self.prepared, viewer)
            self.admitted = await self.live.admit(subscription), subscription.turn
        except BaseException:
            self.end()
            raise
        self.operations.begun(self.request, self.prepared, since)
        self.live.shut_down[self.ended.set] = None
        if self.live.is_closing:
            self.ended.set()

    async def follow(self) -> None:
        assert self.subscription is not None
        assert self.admitted is not None
        try:
            await self.live.follow(self.subscription, *self.admitted)
        except Exception as error:
            self.fail([any_problem(error, "events")])

    def fail(self, problems: list[Problem]) -> None:
        super().fail(with_request_id(self.request.scope, problems))

    def be_told(self, viewer: Viewer | None) -> None:
        """The token is no longer good, or its rights have changed."""
        if viewer is None:
            if self.subscription is not None:
                self.subscription.close()
            self.fail([problem(Unauthenticated("The token is no longer valid."))])
            return
        self.viewer = viewer
        if self.subscription is not None:
            self.live.begin(self.renew(self.subscription, viewer))

    async def renew(self, subscription: Subscription, viewer: Viewer) -> None:
        try:
            await self.live.renew(subscription, viewer)
        except Exception as error:
            self.fail([any_problem(error, "events")])

    def end(self) -> None:
        self.live.shut_down.pop(self.ended.set, None)
        if self.subscription is not None:
            self.subscription.close()
            self.subscription = None  # they hold each other
        if self.viewer is not None:
            self.viewers.leave(self.viewer, self.be_told)


async def gone(receive: Receive) -> None:
    """Back when the client has gone."""
    with suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass
