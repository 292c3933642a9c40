from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelharbor.observability.commands import CommandCounter
from modelharbor.settings import Settings
from tests.http.serving import Server, serving


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Server]:
    async with serving(settings) as server:
        yield server


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of all commands that any client of this process sends to MongoDB."""
    found: list[str] = []

    def started(self: CommandCounter, event: Any) -> None:
        found.append(event.command_name)

    monkeypatch.setattr(CommandCounter, "started", started)
    return found
