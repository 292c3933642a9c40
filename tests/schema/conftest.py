from collections.abc import AsyncIterator

import pytest

from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import Database
from modelharbor.settings import Settings
from tests.schema.asking import Asker


@pytest.fixture
async def ask(database: Database, settings: Settings) -> AsyncIterator[Asker]:
    async with connect_cache(settings) as cache:
        await cache.redis.flushdb()
        yield Asker(database, cache, settings)
