"""Answers as a stream of events, each operation on its own connection:
https://github.com/enisdenjo/graphql-sse/blob/master/PROTOCOL.md (distinct connections mode)"""

import asyncio
from collections.abc import Hashable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import orjson
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelharbor.auth.viewer import Viewer
from modelharbor.errors import Unauthenticated
from modelharbor.execution.failures import Problem, any_problem, problem
from modelharbor.execution.live import Subscription
from modelharbor.settings import Settings

from .answers import with_request_id
from .outbox import Outbox
from .protocol import CUT_OFF

if TYPE_CHECKING:
    from .graphql import GraphQLEndpoint, Incoming, Prepared

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
        self.ended = asyncio.Event()
        self.subscription: Subscription | None = None

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
        cls, endpoint: "GraphQLEndpoint", request: "Incoming", prepared: "Prepared"
    ) -> "EventStream":
        """Raises what forbids it."""
        made = _Following(endpoint, request)
        await made.begin(prepared)
        return made

    # ---- a sink

    def send(self, payload: bytes, key: Hashable) -> None:
        self.put(b"event: next\ndata: %b\n\n" % payload, key)

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
        gone = asyncio.ensure_future(_gone(receive))
        ended = asyncio.ensure_future(self.ended.wait())
        try:
            while not gone.done() and not ended.done():
                done, _ = await asyncio.wait(
                    [gone, ended], timeout=ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    self.outbox.put(b":\n\n", "alive")
            if self.outbox.is_ended and CUT_OFF in scope:
                scope[CUT_OFF]()
                await gone  # the server knows then that there is no more to come
            elif not gone.done():
                await self.outbox.drained()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            ended.cancel()
            self.outbox.end()
            self.end()

    def end(self) -> None:
        """Nobody listens any more."""


class _Following(EventStream):
    """Of a subscription."""

    def __init__(self, endpoint: "GraphQLEndpoint", request: "Incoming") -> None:
        super().__init__()
        self.endpoint, self.request = endpoint, request
        self.live, self.viewers = request.state["live"], request.state["viewers"]
        self.viewer: Viewer | None = None

    async def begin(self, prepared: "Prepared") -> None:
        authorization = self.request.header(b"authorization")
        viewer = self.viewer = await self.viewers.enter(authorization, self.be_told)
        try:
            asked = self.endpoint.asked(self.request, prepared)
            self.subscription = await self.live.subscribe(asked, viewer, self)
        except BaseException:
            self.viewers.leave(viewer, self.be_told)
            raise
        if self.viewer is not viewer:  # rights changed meanwhile
            self.be_told(self.viewer)
        self.live.shut_down[self.ended.set] = None
        if self.live.is_closing:
            self.ended.set()

    def fail(self, problems: list[Problem]) -> None:
        super().fail(with_request_id(self.request.scope, problems))

    def be_told(self, viewer: Viewer | None) -> None:
        """The token is no longer good, or its rights have changed."""
        self.viewer = viewer
        if self.subscription is None:
            return  # `begin` looks after it
        if viewer is None:
            self.subscription.leave()
            self.fail([problem(Unauthenticated("The token is no longer valid."))])
            return
        self.live.begin(self.renew(self.subscription, viewer))

    async def renew(self, subscription: Subscription, viewer: Viewer) -> None:
        try:
            await self.live.renew(subscription, viewer)
        except Exception as error:
            self.fail([any_problem(error, "events")])

    def end(self) -> None:
        self.live.shut_down.pop(self.ended.set, None)
        if self.subscription is not None:
            self.subscription.leave()
            self.subscription = None  # they hold each other
        if self.viewer is not None:
            self.viewers.leave(self.viewer, self.be_told)


async def _gone(receive: Receive) -> None:
    """Back when the client has gone."""
    with suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass
