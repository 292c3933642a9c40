"""What a request has written is known to all before its answer begins."""

from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from modelharbor.http.acknowledging import AcknowledgingMiddleware
from modelharbor.observability.commands import counted

pytestmark = pytest.mark.anyio


class Noted:
    """What happens, in its order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    async def acknowledge(self, wrote: int | None) -> None:
        self.events.append(wrote)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        count = counted.get()
        for written, message in (
            (None, {"type": "http.response.start", "status": 100}),
            (7, {"type": "http.response.start", "status": 200}),
            (7, {"type": "http.response.body", "body": b"a", "more_body": True}),
            (9, {"type": "http.response.body", "body": b"b"}),
        ):
            if count is not None:
                count.wrote = written
            await send(message)

    async def send(self, message: Message) -> None:
        self.events.append(message.get("status") or message["body"])

    async def run(self, **scope: Any) -> list[Any]:
        self.events.clear()

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        whole = {
            "type": "http",
            "method": "PATCH",
            "path": "/uploads/1",
            "state": {"freshness": self},
            **scope,
        }
        await AcknowledgingMiddleware(self.app)(whole, receive, self.send)
        assert counted.get() is None
        return self.events


async def test_a_write_is_acknowledged_before_the_answer_begins() -> None:
    noted = Noted()
    assert await noted.run() == [100, 7, 200, b"a", 9, b"b"]


@pytest.mark.parametrize(
    "scope",
    [
        {"method": "GET"},
        {"method": "HEAD"},
        {"method": "OPTIONS"},
        {"path": "/graphql", "method": "POST"},
        {"type": "websocket"},
        {"state": {}},
    ],
)
async def test_the_rest_passes(scope: dict[str, Any]) -> None:
    assert await Noted().run(**scope) == [100, 200, b"a", b"b"]
