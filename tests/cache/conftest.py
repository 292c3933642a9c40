"""What tests of caches share."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from modelharbor.db.connection import Database

from .hearing import Heard
from .processes import until


@pytest.fixture
async def heard(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Heard]:
    monkeypatch.setattr("modelharbor.cache.following.BACK_SECONDS", 0)
    # The writes of the fixture itself are before it.
    await database.data["versions"].insert_one({"model_id": 0, "number": 0})
    made = Heard(database)
    task = asyncio.create_task(made.following.run())
    await until(lambda: made.position > 0)
    await asyncio.sleep(0.3)
    made.changes.clear()
    yield made
    task.cancel()
    await asyncio.wait([task])
