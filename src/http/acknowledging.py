"""No route acknowledges a write before everybody has to know of it."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelharbor.observability.commands import CommandCount, counted

READING = frozenset({"GET", "HEAD", "OPTIONS"})


class AcknowledgingMiddleware:
    """For all routes but `/graphql`, which does it for each operation: what a request has written to
    MongoDB before its answer begins. Pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] in READING
            or scope["path"] == "/graphql"
            or "freshness" not in scope.get("state", {})
        ):
            await self.app(scope, receive, send)
            return
        freshness = scope["state"]["freshness"]
        count = CommandCount()
        acknowledged = None

        async def send_acknowledged(message: Message) -> None:
            nonlocal acknowledged
            # An interim answer (1xx) acknowledges nothing yet, and what is written later comes with more.
            if count.wrote != acknowledged:
                acknowledged = count.wrote
                await freshness.acknowledge(acknowledged)
            await send(message)

        token = counted.set(count)
        try:
            await self.app(scope, receive, send_acknowledged)
        finally:
            counted.reset(token)
