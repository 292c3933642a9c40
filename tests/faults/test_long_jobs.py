"""What long jobs do is done once, however often their workers are killed."""

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import orjson
import pytest
from bson import ObjectId

from modelharbor.auth.links import DownloadLinks
from modelharbor.cache.client import connect_cache
from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.keyset import Filter
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.http.server import environment
from modelharbor.loaders.base import Reads
from modelharbor.resolvers.bulk import start_bulk_change
from modelharbor.resolvers.exports import folder_of, pieces_of, put_export
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model, row_of, viewer_of

from .figures import is_long, record

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not is_long(), reason="takes minutes: FAULTS=long"),
]
KILLS = 20
CHANGED, EXPORTED = 3000, 50_000  # models
GUARD_SECONDS = 600.0  # against a hang


@dataclass
class Gallows:
    """One real worker at a time, which is killed again and again."""

    database: Database
    settings: Settings
    log: Path
    chance: Random
    kills: int = 0

    @asynccontextmanager
    async def worker(self) -> AsyncIterator["subprocess.Popen[bytes]"]:
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "modelharbor", "worker"],
                env={**os.environ, **environment(self.settings)},
                stdout=output,
                stderr=output,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    async def job(self, job_id: ObjectId) -> Row:
        row = await self.database.data["jobs"].find_one({"_id": job_id})
        assert row is not None
        return row

    async def taken(self, job_id: ObjectId, token: int | None = None) -> bool:
        """Waits until another claim than that one has it (None: for ever); False: it has ended."""
        while (row := await self.job(job_id))["finished_at"] is None:
            if token is not None and row["token"] != token:
                # Three deaths would be the end of it. Not earlier: until then what the dead one had
                # begun may hold the row.
                deaths = {"$set": {"deaths": 0}}
                await self.database.data["jobs"].update_one({"_id": job_id}, deaths)
                return True
            await asyncio.sleep(0.02)
        return False

    async def ended(self, job_id: ObjectId, seconds: float) -> Row:
        """Kills whoever has it, up to so long after it was taken, until there were enough of them."""
        async with asyncio.timeout(GUARD_SECONDS):
            while (row := await self.job(job_id))["finished_at"] is None:
                async with self.worker():
                    if not await self.taken(job_id, row["token"]):
                        continue
                    if self.kills == KILLS:
                        await self.taken(job_id)
                        continue
                    await asyncio.sleep(self.chance.random() * seconds)
                    self.kills += 1
        assert row["state"] == "SUCCEEDED", self.log.read_text()[-3000:]
        return row


@pytest.fixture
def gallows(database: Database, settings: Settings, tmp_path: Path) -> Gallows:
    given = settings.model_dump(include=settings.model_fields_set)
    changed = Settings(**{**given, "lease_seconds": 1.0})
    return Gallows(database, changed, tmp_path / "worker.log", Random("long jobs"))


async def fill(database: Database, count: int) -> ActorDocument:
    ada = await insert_actor("ada")
    row = row_of(await insert_model(ada, "m0"))
    names = [f"m{number}" for number in range(1, count)]
    await database.data["models"].insert_many(
        [{**row, "_id": ObjectId(), "name": name, "name_lower": name} for name in names]
    )
    return ada


async def test_workers_are_killed_amid_a_bulk_change(gallows: Gallows) -> None:
    database = gallows.database
    viewer = viewer_of(await fill(database, CHANGED))
    async with connect_cache(gallows.settings) as cache:
        reads = Reads(database=database, cache=cache, viewer=viewer, links=DownloadLinks(b"", ""))
        every = Filter({"state": "ACTIVE"})
        preview = await start_bulk_change(reads, gallows.settings, filter=every, add_tags=["x"])
    assert preview.job is not None

    job = await gallows.ended(preview.job["_id"], 2.0)

    revisions = Counter([row["revision"] async for row in database.data["models"].find()])
    told = database.data["events"].find({"stream": "models"})
    events = Counter(Counter([event["model_id"] async for event in told]).values())
    record(
        f"kill -9 the worker again and again amid a change of {CHANGED} models",
        {"changed_once": CHANGED, "told_once": CHANGED},
        changed_once=revisions[2],
        told_once=events[1],
        kills=gallows.kills,
    )
    assert job["result"] == {"changed": CHANGED, "unchanged": 0, "failed": 0, "failures": []}
    assert (revisions, events) == ({2: CHANGED}, {1: CHANGED})
    assert gallows.kills > 3


async def test_workers_are_killed_amid_exports(gallows: Gallows) -> None:
    """As many exports as it takes for all the kills."""
    database, settings = gallows.database, gallows.settings
    viewer = viewer_of(await fill(database, EXPORTED))
    wanted = {global_id("Model", row["_id"]) async for row in database.data["models"].find()}
    exports = missing = twice = left = 0
    while gallows.kills < KILLS:
        put = await put_export(
            database,
            viewer,
            settings,
            query="{ models { nodes { id fullName tags stats { likes } } } }",
            variables={},
            format=ExportFormat.JSONL,
            compression=Compression.NONE,
            base_url="http://test",
        )
        job = await gallows.ended(put["_id"], 2.0)
        blobs = settings.data_path / "blobs"
        named = [blobs / piece.key for piece in pieces_of(job["_id"], job["checkpoint"])]
        lines = b"".join(path.read_bytes() for path in named).splitlines()
        seen = Counter(orjson.loads(line)["id"] for line in lines)
        exports += 1
        missing += len(wanted - seen.keys())
        twice += sum(count > 1 for count in seen.values())
        left += len(set((blobs / folder_of(job["_id"])).iterdir()) - set(named))
        assert job["result"]["rows"] == len(lines)
    record(
        f"kill -9 the worker {KILLS} times amid exports of {EXPORTED} models",
        {"rows_missing": 0, "rows_twice": 0, "pieces_left_over": 0},
        rows_missing=missing,
        rows_twice=twice,
        pieces_left_over=left,
        exports=exports,
    )
    assert (missing, twice, left) == (0, 0, 0)
