"""A served application, with short times."""

from collections.abc import AsyncIterator

import pytest

from modelharbor.settings import Settings
from tests.conformance.driving import Driver
from tests.live.serving import serving


@pytest.fixture
async def driver(settings: Settings) -> AsyncIterator[Driver]:
    short = settings.model_copy(update={"init_timeout_seconds": 0.5})
    async with serving(short) as served:
        yield Driver(served)
