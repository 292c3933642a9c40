"""What the database holds, to assert that a refused action left it as it was."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.errors import ErrorCode, Refused


async def everything(database: Database) -> dict[str, list[Row]]:
    """All documents of all collections."""
    return {
        name: await database.data[name].find().sort("_id", 1).to_list()
        for name in sorted(await database.data.list_collection_names())
    }


@asynccontextmanager
async def refused(
    database: Database, code: ErrorCode, *path: str, says: str = ""
) -> AsyncIterator[None]:
    """The block is refused with this code and path, and nothing at all was written."""
    before = await everything(database)
    with pytest.raises(Refused) as caught:
        yield
    assert (caught.value.code, caught.value.path) == (code, list(path) or None)
    assert says in caught.value.message
    assert await everything(database) == before


async def events_of(database: Database, **filter: Any) -> list[Row]:
    """In their order, without ids and times."""
    return await database.data["events"].find(filter, {"_id": 0, "at": 0}).sort("_id", 1).to_list()
