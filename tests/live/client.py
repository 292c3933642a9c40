"""A client of `graphql-transport-ws` that sees every message."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

GUARD_SECONDS: Final = 20.0  # against a hang
WATCH: Final = """subscription Watch($id: ID!, $after: Cursor, $rate: Float = 50) {
  jobProgress(id: $id, after: $after, maxRateHz: $rate) {
    cursor job { id state progress { current sequence } }
  }
}"""


class Client:
    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def send(self, **message: Any) -> None:
        await self.connection.send(json.dumps(message))

    async def receive(self) -> dict[str, Any]:
        async with asyncio.timeout(GUARD_SECONDS):
            found: dict[str, Any] = json.loads(await self.connection.recv())
        return found

    async def subscribe(self, id: str, query: str, /, **variables: Any) -> None:
        payload = {"query": query, "variables": variables}
        await self.send(type="subscribe", id=id, payload=payload)

    async def next(self, id: str = "1") -> Any:
        """The data of the next event."""
        message = await self.receive()
        assert (message["type"], message["id"]) == ("next", id), message
        assert "errors" not in message["payload"], message
        return message["payload"]["data"]

    async def close_code(self) -> tuple[int, str]:
        """Once the server has closed the connection; what else it says is passed over."""
        with suppress(ConnectionClosed):
            async with asyncio.timeout(GUARD_SECONDS):
                while True:
                    await self.connection.recv()
        return self.connection.close_code or 0, self.connection.close_reason or ""

    async def is_silent(self, seconds: float = 0.3) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.connection.recv()
        except TimeoutError:
            return True
        return False


@asynccontextmanager
async def open_client(
    url: str, token: str | None = None, *, init: bool = True, **options: Any
) -> AsyncIterator[Client]:
    async with connect(
        url, subprotocols=options.pop("subprotocols", ["graphql-transport-ws"]), **options
    ) as connection:
        client = Client(connection)
        if init:
            payload = {} if token is None else {"authorization": f"Bearer {token}"}
            await client.send(type="connection_init", payload=payload)
            assert await client.receive() == {"type": "connection_ack"}
        yield client
