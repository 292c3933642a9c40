"""Jobs of the real kinds, run to their end by a worker of the test."""

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from modelharbor.db.base import Row
from modelharbor.db.jobs import JobKind
from modelharbor.storage.blobs import open_storage
from modelharbor.worker.handlers import HANDLERS
from modelharbor.worker.tools import Handler, HandlerSpec
from tests.documents import insert_actor
from tests.worker.conftest import Hall
from tests.worker.handlers.docks import Dock


class Yard:
    """`hall` with the table of handlers, and settings of the test."""

    def __init__(self, hall: Hall, **changed: Any) -> None:
        self.hall, self.database = hall, hall.database
        self.settings = hall.settings.model_copy(update=changed)

    async def run(
        self, job: Row, handlers: Mapping[JobKind, Handler | HandlerSpec] = HANDLERS
    ) -> Row:
        """The job as it is when it has ended."""
        hall = Hall(self.database, self.settings)
        async with hall.working(handlers):
            return await hall.reaches(job["_id"], "SUCCEEDED", "FAILED", "DEAD", "CANCELLED")

    async def result(self, job: Row) -> Row:
        ended = await self.run(job)
        assert (ended["state"], ended["error"]) == ("SUCCEEDED", None)
        result: Row = ended["result"]
        return result

    async def log(self, job: Row) -> list[tuple[str, str]]:
        rows = (
            await self.database.data["job_logs"].find({"job_id": job["_id"]}).sort("_id").to_list()
        )
        return [(row["level"], row["message"]) for row in rows]


@pytest.fixture
def yard(hall: Hall, tmp_path: Path) -> Yard:
    return Yard(hall, import_roots={"disk": tmp_path / "disk"})


@pytest.fixture
async def dock(yard: Yard) -> AsyncIterator[Dock]:
    async with open_storage(yard.settings) as storage:
        dock = Dock(yard, storage, await insert_actor("ada"))
        await dock.open()
        yield dock
