"""Processes for work that takes long."""

import asyncio
import os

import psutil
import pytest

from modelharbor.worker import processes
from modelharbor.worker.processes import open_processes

pytestmark = pytest.mark.anyio


async def test_they_end_when_nothing_is_to_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "IDLE_SECONDS", 0.05)
    async with open_processes(1) as opened:
        first, second = await asyncio.gather(opened.run(os.getpid), opened.run(os.getpid))
        assert first == second != os.getpid()
        async with asyncio.timeout(60):
            while psutil.pid_exists(first):
                await asyncio.sleep(0.01)
        # Made anew for what comes then.
        assert await opened.run(os.getpid) not in (first, os.getpid())
