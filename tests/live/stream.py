"""A client of graphql-sse's distinct connections that sees every event."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from .client import GUARD_SECONDS

TAKES_EVENTS = {"accept": "text/event-stream"}


class Stream:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.lines = response.aiter_lines()

    async def event(self) -> tuple[str, Any] | None:
        """Name and data of the next one; None: the connection has ended."""
        name, data = "", ""
        async with asyncio.timeout(GUARD_SECONDS):
            async for line in self.lines:
                field, _, value = line.partition(":")
                if not line and name:
                    return name, json.loads(data) if data else None
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    data += value.strip()
        return None

    async def next(self) -> Any:
        """The data of the next event."""
        event = await self.event()
        assert event is not None
        assert event[0] == "next", event
        assert "errors" not in event[1], event
        return event[1]["data"]


@asynccontextmanager
async def open_stream(
    url: str, query: str, token: str | None = None, **variables: Any
) -> AsyncIterator[Stream]:
    headers = dict(TAKES_EVENTS)
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    body = {"query": query, "variables": variables}
    async with (
        httpx.AsyncClient(timeout=GUARD_SECONDS) as client,
        client.stream("POST", url, json=body, headers=headers) as response,
    ):
        yield Stream(response)
