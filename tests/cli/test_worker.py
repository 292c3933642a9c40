"""`worker`, as a process of its own."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.http.server import environment
from modelharbor.settings import Settings
from modelharbor.worker.handlers import HANDLERS
from modelharbor.worker.schedule import SCHEDULE
from tests.cli.conftest import Done, Run

pytestmark = pytest.mark.anyio
PATIENCE_SECONDS = 60  # a guard against hanging


@contextmanager
def working(
    settings: Settings, folder: Path, *arguments: str, **variables: str
) -> Iterator["subprocess.Popen[bytes]"]:
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "modelharbor", "worker", *arguments],
            env={**os.environ, **environment(settings), **variables},
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def told(folder: Path, words: str) -> str:
    for _ in range(PATIENCE_SECONDS * 20):
        text = (folder / "worker.log").read_text()
        if words in text:
            return text
        await asyncio.sleep(0.05)
    raise AssertionError((folder / "worker.log").read_text())


def slots_about_now() -> set[str]:
    """What a worker puts that was started within the last minute."""
    times = (utc_now() - timedelta(seconds=PATIENCE_SECONDS), utc_now())
    return {
        f"{each.kind.value}@{each.slot(time):%Y-%m-%dT%H:%M:%SZ}"
        for each in SCHEDULE
        for time in times
    }


async def test_it_works_until_it_is_told_to_end(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    with working(settings, tmp_path, "--concurrency", "2") as process:
        await told(tmp_path, "job.succeeded")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, PATIENCE_SECONDS) == 0
    text = (tmp_path / "worker.log").read_text()
    assert f"concurrency=2 kinds={','.join(kind.value for kind in HANDLERS)}\n" in text
    assert "worker.drains" in text
    assert "worker.ended" in text
    jobs = await database.find("jobs", {})
    assert {job["idempotency_key"] for job in jobs} <= slots_about_now()
    assert {job["state"] for job in jobs} <= {"SUCCEEDED", "QUEUED"}
    assert "SUCCEEDED" in {job["state"] for job in jobs}


async def test_it_takes_only_the_kinds_that_it_is_told(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    given = ("--kinds", "IMPORT_MODEL", "--kinds", "REINDEX")
    with working(settings, tmp_path, *given) as process:
        await told(tmp_path, "concurrency=8 kinds=IMPORT_MODEL,REINDEX\n")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(await database.find("jobs", {})) < len(SCHEDULE):
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait, PATIENCE_SECONDS) == 0
    rows = await database.find("jobs", {})
    assert {(row["idempotency_key"], row["state"]) for row in rows} <= {
        (slot, "QUEUED") for slot in slots_about_now()
    }


async def test_it_waits_for_migrations_and_for_mongodb(settings: Settings, tmp_path: Path) -> None:
    empty = {"MODELHARBOR_MONGO_DATABASE": f"test_{uuid4().hex[:12]}"}
    gone = {
        "MODELHARBOR_MONGO_URL": "mongodb://127.0.0.1:1/",
        "MODELHARBOR_MONGO_TIMEOUT_SECONDS": "0.1",
    }
    for variables, reason in ((empty, "migrations"), (gone, "mongodb")):
        with working(settings, tmp_path, **variables) as process:
            await told(tmp_path, f"worker.waits reason={reason}")
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, PATIENCE_SECONDS) == 0


async def test_what_it_cannot_do_is_told_in_one_line(run: Run) -> None:
    done = await run("worker", "--kinds", "FLY")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "'FLY' is not one of 'IMPORT_MODEL', 'REINDEX', 'GARBAGE_COLLECT'" in done.err
    assert await run("worker", MODELHARBOR_MONGO_URL="mongodb://host:99999/") == Done(
        1,
        "",
        "modelharbor: MODELHARBOR_MONGO_URL: Port must be an integer between 0 and 65535\n",
    )
