"""MongoDB says nothing for some seconds, longer than anybody waits for it: all go on by themselves."""

import asyncio
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from bson import ObjectId
from pymongo.errors import PyMongoError

from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import migrate
from modelharbor.dev.engines import run_engines
from modelharbor.errors import Unavailable
from modelharbor.events.reader import open_reader
from modelharbor.events.recorder import recording
from modelharbor.settings import Settings

from .log import EVERYTHING, JOBS, listening, replayed, tell

pytestmark = pytest.mark.anyio
AWAY_SECONDS = 5.6  # an answer is waited for 5.1 s; then connections are made anew, in vain
WRITERS = 20


async def insert(database: Database, event_id: ObjectId) -> None:
    """Whether it is written or not: who cannot wait is not told."""
    row = {"_id": event_id, "stream": "jobs", "about": [], "principals": [], "position": None}
    with suppress(PyMongoError):
        await database.data["events"].insert_one(row)


async def test_it_is_away_and_comes_back(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with run_engines(
        tmp_path / "engines", redis_url=settings.redis_url, fast=True, cache_gigabytes=0.25
    ) as engines:
        changed = settings.model_copy(
            update={
                "mongo_url": engines.mongo_url,
                "mongo_database": "outage",
                "mongo_timeout_seconds": 0.5,
                "query_timeout_ms": 100,
            }
        )
        [mongod] = engines.running
        async with connect(changed.model_copy(update={"query_timeout_ms": 5000})) as database:
            await migrate(database)
        async with (
            connect(changed) as database,
            recording(database, changed),
            open_reader(database, changed) as reader,
            open_reader(database, changed) as late,
            listening(reader, EVERYTHING) as listener,
        ):
            began = reader.position
            before = [await tell(database, ObjectId()) for _ in range(3)]
            mongod.process.send_signal(signal.SIGSTOP)
            try:
                gone = time.monotonic()
                writing = [
                    asyncio.create_task(insert(database, ObjectId())) for _ in range(WRITERS)
                ]
                with pytest.raises(Unavailable):
                    await late.ready()
                waited = time.monotonic() - gone
                await asyncio.sleep(AWAY_SECONDS - waited)
            finally:
                mongod.process.send_signal(signal.SIGCONT)
            await asyncio.gather(*writing)
            async with asyncio.timeout(10):
                await late.ready()
                last = await written(database)
                while not listener.ids or listener.ids[-1] != last:
                    await asyncio.sleep(0.01)
                while await database.data["events"].count_documents({"position": None}):
                    await asyncio.sleep(0.01)
            rows = await database.data["events"].find(JOBS).sort("position", 1).to_list()
            assert listener.ids == [row["_id"] for row in rows]
            assert [each.position for each in listener.changes] == [row["position"] for row in rows]
            assert listener.ids[:3] == before
            assert listener.losses == 0
            for each in (reader, late):
                told = await replayed(database, each, JOBS, began)
                assert [row["_id"] for row in told] == listener.ids
    assert 2.4 <= waited <= 4
    assert "events.reading_failed" in caplog.text


async def written(database: Database) -> ObjectId:
    """One event that surely is, after all that were on their way."""
    while True:
        with suppress(PyMongoError):
            return await tell(database, ObjectId())
        await asyncio.sleep(0.05)
