"""Anything that can happen to uploads, in any order and at once, against what must come of it."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from bson import ObjectId

from modelharbor.db.base import Row, utc_now
from modelharbor.db.jobs import JobKind
from modelharbor.db.uploads import Segment, UploadProtocol
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import HarborError, Refused
from modelharbor.resolvers import intake
from modelharbor.resolvers.completing import complete
from modelharbor.resolvers.receiving import Receiver
from modelharbor.resolvers.uploads import (
    UploadFile,
    abort_upload,
    complete_upload,
    expire_uploads,
    pause_upload,
)
from modelharbor.resolvers.versions import publish_version
from modelharbor.storage.blobs import blob_key
from modelharbor.worker.handlers import HANDLERS
from tests.documents import insert_version
from tests.resolvers.uploading import Site, Stalling, digest_of, site
from tests.worker.conftest import Hall

__all__ = ["site"]
pytestmark = pytest.mark.anyio
IS_LONG = os.environ.get("FAULTS") == "long"
BATCHES, AT_ONCE = (200, 8) if IS_LONG else (20, 6)
MOST_BYTES = 40_000


class Broken(Exception):
    """The client is gone."""


@dataclass
class Trial:
    """An upload as those who send it know it. They all send the same bytes, which may be others than
    were announced."""

    upload_id: ObjectId
    version_id: ObjectId
    contents: bytes
    announced: str | None
    sent: int = 0  # up to which byte any was sent
    is_open: bool = True  # as it was checked last

    @property
    def is_right(self) -> bool:
        return self.announced in {None, digest_of(self.contents)}

    async def body(
        self, offset: int, length: int, chance: random.Random, ending: Exception | None
    ) -> AsyncIterator[bytes]:
        at, end = offset, offset + length
        while at < end:
            count = min(chance.randrange(1, 8000), end - at)
            self.sent = max(self.sent, min(at + count, len(self.contents)))
            yield self.contents[at : at + count].ljust(count, b"x")  # more than there are
            at += count
            if chance.random() < 0.3:
                await asyncio.sleep(chance.uniform(0, 0.02))
        if ending is not None:
            raise ending


@dataclass
class Sleeper:
    """A process that stands still amid a request, past its lease."""

    trial: Trial
    body: Stalling
    token: int
    task: "asyncio.Task[Row]"


@dataclass
class Play:
    site: Site
    chance: random.Random
    receivers: list[Receiver]
    trials: list[Trial] = field(default_factory=list)
    sleepers: list[Sleeper] = field(default_factory=list)
    pool: list[bytes] = field(default_factory=list)  # contents that several files have
    versions: list[ObjectId] = field(default_factory=list)

    def trial(self) -> Trial:
        """One of a few that go on, most of the time: long stories are the interesting ones."""
        going = [trial for trial in self.trials if trial.is_open]
        if going and self.chance.random() < 0.9:
            return self.chance.choice(going[:3])
        return self.chance.choice(self.trials)

    def receiver(self) -> Receiver:
        return self.chance.choice(self.receivers)

    # ---- what happens

    async def create(self) -> None:
        contents = self.chance.choice(self.pool)
        if self.chance.random() < 0.5:
            contents = self.chance.randbytes(self.chance.randrange(1, MOST_BYTES))
            self.pool.append(contents)
        other = self.chance.choice(self.pool)
        announced = self.chance.choice([None, digest_of(contents), digest_of(other)])
        version_id = self.versions[-1]
        [row] = await self.site.create(
            UploadFile(f"file{self.chance.random()}", len(contents), announced),
            version_id=version_id,
            protocol=self.chance.choice([None, UploadProtocol.TUS]),
        )
        if row["protocol"] == "INSTANT":
            contents = next(each for each in self.pool if digest_of(each) == announced)
        self.trials.append(Trial(row["_id"], version_id, contents, announced))

    async def send(self) -> None:
        trial = self.trial()
        row = await self.site.row(trial.upload_id)
        size, offset = len(trial.contents), row["received_bytes"]
        if self.chance.random() < 0.1:
            offset = self.chance.randrange(size)
        length = self.chance.choice([0, 0, 1, *(size // 8 for _ in range(4)), size, size + 5])
        if length <= size:
            length = min(length, size - offset)
        ending = Broken() if self.chance.random() < 0.3 else None
        body = trial.body(offset, length, self.chance, ending)
        known = length if self.chance.random() < 0.5 else None
        await self.receiver().receive(self.site.viewer, trial.upload_id, offset, body, length=known)

    async def fall_asleep(self) -> None:
        trial = self.trial()
        row = await self.site.row(trial.upload_id)
        offset = row["received_bytes"]
        count = self.chance.randrange(max(1, (len(trial.contents) - offset) // 4))
        trial.sent = max(trial.sent, offset + count)
        body = Stalling(trial.contents[offset : offset + count])
        task = asyncio.create_task(
            self.receiver().receive(self.site.viewer, trial.upload_id, offset, aiter(body))
        )
        asked = asyncio.create_task(body.is_asked.wait())
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not task.done():
            token = (await self.site.row(trial.upload_id))["token"]
            self.sleepers.append(Sleeper(trial, body, token, task))
            await self.run_out(trial.upload_id)
        elif task.exception() is not None:
            await task

    async def wake(self) -> None:
        if self.sleepers:
            sleeper = self.sleepers.pop(self.chance.randrange(len(self.sleepers)))
            row = await self.site.row(sleeper.trial.upload_id)
            if row["token"] > sleeper.token:  # it was taken over: nothing of this may count
                sleeper.body._rest = b"z" * 5000
            sleeper.body.goes_on.set()
            await sleeper.task

    async def run_out(self, upload_id: ObjectId) -> None:
        await self.site.database.data["uploads"].update_one(
            {"_id": upload_id, "holder": {"$ne": None}},
            {"$set": {"held_until": utc_now() - timedelta(seconds=1)}},
        )

    async def die(self) -> None:
        """A process is killed that held an upload: what it had in memory is gone."""
        self.receivers[self.chance.randrange(len(self.receivers))] = self.site.receiver()
        await self.site.database.data["uploads"].update_one(
            {"_id": self.trial().upload_id, "is_open": True},
            {
                "$set": {"holder": "dead", "held_until": utc_now() - timedelta(seconds=1)},
                "$inc": {"token": 1},
            },
        )

    async def pause(self) -> None:
        await pause_upload(
            self.site.database,
            self.site.storage,
            self.site.viewer,
            upload_id=self.trial().upload_id,
        )

    async def abort(self) -> None:
        await abort_upload(
            self.site.database,
            self.site.storage,
            self.site.viewer,
            upload_id=self.trial().upload_id,
        )

    async def expire(self) -> None:
        await self.site.database.data["uploads"].update_one(
            {"_id": self.trial().upload_id}, {"$set": {"expires_at": utc_now() - timedelta(days=1)}}
        )
        await expire_uploads(self.site.database, self.site.storage, utc_now())

    async def tell(self) -> None:
        """What the hash is: that of these bytes, or of others."""
        trial = self.trial()
        contents = self.chance.choice([trial.contents, self.chance.choice(self.pool)])
        row = await complete_upload(
            self.site.database,
            self.site.storage,
            self.site.viewer,
            upload_id=trial.upload_id,
            sha256=digest_of(contents),
        )
        if row["protocol"] == "INSTANT":
            trial.contents = contents
        else:
            trial.announced = row["sha256"]

    async def verify(self) -> None:
        """As the job does it; two may do it at once."""
        row = await self.site.row(self.trial().upload_id)
        if row["state"] == "RECEIVED":
            segments = [Segment(**each) for each in row["segments"]]
            incoming = self.site.storage.incoming
            key = incoming.final_key(segments)
            if key is None:
                key = f"incoming/{row['_id']}/whole"
                digest = await incoming.compose(segments, key)
            else:
                digest = await incoming.digest(key, row["size_bytes"])
            await complete(self.site.database, self.site.storage, row, digest, key)

    async def publish(self) -> None:
        await publish_version(self.site.database, self.site.viewer, version_id=self.versions[-1])
        version = await insert_version(
            self.site.database, self.site.model, {}, status=VersionStatus.DRAFT
        )
        self.versions.append(version.id)

    async def batch(self) -> None:
        likely: list[tuple[Callable[[], Awaitable[None]], int]] = [
            *((self.create, 6), (self.send, 30), (self.fall_asleep, 6), (self.wake, 6)),
            *((self.die, 2), (self.pause, 2), (self.abort, 1), (self.expire, 1)),
            *((self.tell, 1), (self.verify, 6), (self.publish, 1)),
        ]
        actions, weights = zip(*likely, strict=True)
        chosen = self.chance.choices(actions, weights, k=AT_ONCE)
        for result in await asyncio.gather(
            *(action() for action in chosen), return_exceptions=True
        ):
            if not isinstance(result, HarborError | Refused | Broken | None):
                raise result

    # ---- what must hold

    async def check(self) -> None:
        data = self.site.database.data
        uploads = {row["_id"]: row async for row in data["uploads"].find()}
        files = {row["_id"]: row async for row in data["files"].find()}
        blobs = {row["sha256"]: row async for row in data["blobs"].find()}
        for trial in self.trials:
            row = uploads[trial.upload_id]
            trial.is_open = row["is_open"]
            if row["protocol"] != "INSTANT":
                assert row["received_bytes"] <= trial.sent
            if row["is_open"]:
                await self.check_bytes(trial, row)
            if row["state"] == "COMPLETED":
                assert trial.is_right or row["protocol"] == "INSTANT"
                file = files.pop(row["file_id"])
                assert file["sha256"] == row["sha256"] == digest_of(trial.contents)
                assert await self.site.contents(file["sha256"]) == trial.contents
            elif row["state"] == "FAILED" and row["error"]["code"] == "CHECKSUM_MISMATCH":
                assert not trial.is_right
        assert files == {}
        rows = [row async for row in data["files"].find()]
        for blob in blobs.values():
            assert blob["references"] == sum(row["sha256"] == blob["sha256"] for row in rows)
        opened = [row for row in uploads.values() if row["is_open"]]
        assert await self.site.quota() == (sum(row["size_bytes"] for row in opened), len(opened))
        stats = (await self.site.one("models", _id=self.site.model.id))["stats"]
        sizes = sum(row["size_bytes"] for row in rows)
        assert (stats["files"], stats["size_bytes"]) == (len(rows), sizes)

    async def check_bytes(self, trial: Trial, row: Row) -> None:
        came = [
            await self.site.storage.read_range(each["key"], 0, each["size_bytes"])
            for each in row["segments"]
        ]
        assert b"".join(came) == trial.contents[: row["received_bytes"]]


@pytest.mark.parametrize("seed", range(10 if IS_LONG else 2))
async def test_nothing_is_lost_and_nothing_wrong_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.01)
    play = Play(site, random.Random(seed), [site.receiver() for _ in range(3)])
    play.pool = [play.chance.randbytes(size) for size in (1, 20_000, MOST_BYTES)]
    play.versions.append(site.version.id)
    try:
        for _ in range(3):
            await play.create()
        for _ in range(BATCHES):
            await play.batch()
            await play.check()
    finally:
        while play.sleepers:
            await asyncio.gather(play.wake(), return_exceptions=True)
    await play.check()
    # The jobs come at last, as those of workers that were away.
    await site.database.data["uploads"].update_many(
        {"state": {"$in": ["CREATED", "UPLOADING", "PAUSED"]}},
        {"$set": {"expires_at": utc_now() - timedelta(days=1)}},
    )
    hall = Hall(site.database, site.settings.model_copy(update={"drain_seconds": 0.3}))
    sweep = await hall.put(JobKind.EXPIRE_UPLOADS, input={"orphan_seconds": 0})
    jobs = site.database.data["jobs"]

    async def has_done_all() -> bool:
        going = {"state": {"$in": ["QUEUED", "RUNNING", "RETRYING"]}, "_id": {"$ne": sweep["_id"]}}
        return await jobs.count_documents(going) == 0

    async with hall.working(HANDLERS):
        await hall.reaches(sweep["_id"], "SUCCEEDED")
        await hall.until(has_done_all)
        sweep = await hall.put(JobKind.EXPIRE_UPLOADS, input={"orphan_seconds": 0})
        await hall.reaches(sweep["_id"], "SUCCEEDED")
    await play.check()
    assert await site.quota() == (0, 0)
    blobs = await site.database.find("blobs", {"stored": True})
    keys = {blob_key(row).removeprefix("incoming/") for row in blobs}
    assert set(site.kept()) == {key for key in keys if not key.startswith("sha256/")}
    assert await site.database.count("jobs", {"state": "DEAD"}) == 0
