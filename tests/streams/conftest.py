from collections.abc import AsyncIterator

import pytest

from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import Database
from modelharbor.settings import Settings

from .watching import Watching, watching


@pytest.fixture
async def watch(database: Database, settings: Settings) -> AsyncIterator[Watching]:
    async with connect_cache(settings) as cache, watching(database, cache, settings) as found:
        yield found
