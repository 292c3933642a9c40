"""Worker processes of a test, and the jobs that they share."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelharbor.cache.client import Cache
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind
from modelharbor.http.server import environment
from modelharbor.jobs.put import put_job
from modelharbor.jobs.waking import wake
from modelharbor.settings import Settings

from .figures import is_long

ROOT = Path(__file__).parent.parent.parent
LEASE = 15.0 if is_long() else 1.0
PATIENCE_SECONDS = 25 + 8 * LEASE  # a guard against hanging


@dataclass
class Shop:
    database: Database
    settings: Settings
    folder: Path
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def start(self, concurrency: int = 8, **changed: Any) -> "subprocess.Popen[bytes]":
        settings = self.settings.model_copy(update=changed)
        given = environment(settings) | {
            f"MODELHARBOR_{name.upper()}": str(value) for name, value in changed.items()
        }
        log = self.folder / f"worker{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker", str(concurrency)],
                cwd=ROOT,
                env={**os.environ, **given},
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def stop(self, process: "subprocess.Popen[bytes]") -> float:
        """Seconds that it took."""
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0, self.logs()
        return time.monotonic() - begun

    def logs(self) -> str:
        return "\n".join(each.read_text()[-3000:] for each in self.folder.glob("worker*.log"))

    async def put(self, count: int, seconds: float, do: str = "work", **given: Any) -> list[Row]:
        values: Row = {"kind": JobKind.REINDEX, "principals": ["operator"], **given}

        async def work(session: Any) -> list[Row]:
            return [
                await put_job(
                    self.database, session, input={"do": do, "seconds": seconds}, **values
                )
                for _ in range(count)
            ]

        return await self.database.transaction(work, 30.0)

    async def put_and_wake(self, cache: Cache, seconds: float) -> float:
        """Seconds that waking took."""
        await self.put(1, seconds)
        begun = time.perf_counter()
        await wake(cache)
        return time.perf_counter() - begun

    async def count(self, **query: Any) -> int:
        return await self.database.count("jobs", query)

    async def until(self, check: Callable[[], Awaitable[bool]]) -> None:
        begun = time.monotonic()
        while not await check():
            assert time.monotonic() - begun < PATIENCE_SECONDS, self.logs()
            await asyncio.sleep(0.02)

    async def until_count(self, count: int, **query: Any) -> None:
        async def check() -> bool:
            return await self.count(**query) >= count

        await self.until(check)

    async def starts(self, **query: Any) -> list[Row]:
        return await self.database.find("starts", query, sort={"at": 1})

    async def until_started(self, count: int, **query: Any) -> list[Row]:
        async def check() -> bool:
            return await self.database.count("starts", query) >= count

        await self.until(check)
        return await self.starts(**query)

    async def twice(self) -> int:
        """Jobs whose effect was committed more than once."""
        found = Counter(row["job"] for row in await self.database.find("effects", {}))
        return sum(count > 1 for count in found.values())

    async def effects(self) -> int:
        return await self.database.count("effects", {})


@contextmanager
def opened(database: Database, settings: Settings, folder: Path) -> Iterator[Shop]:
    shop = Shop(database, settings, folder)
    try:
        yield shop
    finally:
        for process in shop.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
