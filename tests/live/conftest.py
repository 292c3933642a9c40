"""A server for each test."""

from collections.abc import AsyncIterator

import pytest

from modelharbor.settings import Settings

from .serving import Served as Served
from .serving import id_of as id_of
from .serving import serving


@pytest.fixture
def live_settings(settings: Settings) -> Settings:
    """What the server of a test runs with: a test module may have its own."""
    return settings


@pytest.fixture
async def served(live_settings: Settings) -> AsyncIterator[Served]:
    async with serving(live_settings) as served:
        yield served
