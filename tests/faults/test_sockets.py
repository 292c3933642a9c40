"""Connections that are cut at any time: whoever comes back with `after` has missed nothing."""

import asyncio
import random
from dataclasses import asdict

import pytest

from modelharbor.events import reader
from modelharbor.execution import groups
from modelharbor.settings import Settings
from tests.live.serving import serving

from .figures import is_long, record
from .watching import Counts, Moved, Watcher, moved

pytestmark = pytest.mark.anyio
CUTS = 1000 if is_long() else 100
JOBS = 4
EACH = 2  # watchers of one job
LONGEST = 0.25  # seconds that a connection lasts; some are cut before they are one
GUARD_SECONDS = 600.0


@pytest.mark.parametrize("remembers", [True, False], ids=["remembered", "from the log"])
async def test_sockets_are_cut_and_come_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, remembers: bool
) -> None:
    """`remembers`: the server has what was missed in memory, most of the time. Where it has not, others
    also come and go between any two who are told."""
    if not remembers:
        monkeypatch.setattr(groups, "AT_ONCE", 1)
        monkeypatch.setattr(groups, "KEPT", 1)
        monkeypatch.setattr(groups, "LINGER_SECONDS", 0.01)
        monkeypatch.setattr(reader, "RECENT_ROWS", 3)
    chance = random.Random(4)
    cuts = 0

    async def come_and_go(watcher: Watcher) -> None:
        nonlocal cuts
        if watcher.job is None:  # what stands is not told: it begins with what happens next
            await watcher.connected(enough=lambda: watcher.has_heard_of(jobs))
        while cuts < CUTS:
            was_cut = await watcher.connected(chance.uniform(0.0, LONGEST))
            cuts += was_cut
        if not watcher.is_complete:
            await watcher.connected(enough=lambda: watcher.has_heard_ends_of(jobs))

    async def move(job: Moved) -> None:
        while cuts < CUTS:
            await job.step(chance)
            await asyncio.sleep(chance.uniform(0.0, 0.1))
        await job.end(chance)

    async with serving(settings) as served, asyncio.timeout(GUARD_SECONDS):
        jobs = [await moved(served) for _ in range(JOBS)]
        watchers = [Watcher(served, job.row) for job in jobs for _ in range(EACH)]
        watchers.append(Watcher(served))
        async with asyncio.TaskGroup() as tasks:
            for watcher in watchers:
                tasks.create_task(come_and_go(watcher))
            for job in jobs:
                tasks.create_task(move(job))
    counts = sum((watcher.compare(jobs) for watcher in watchers), Counts())
    record(
        "a socket is cut at random, and comes back with `after`"
        + ("" if remembers else ", to a server that remembers little"),
        {"missed": 0, "repeated": 0, "backwards": 0},
        **asdict(counts),
        cuts=cuts,
        changes_of_state=sum(len(job.states) for job in jobs),
        events_heard=sum(watcher.events for watcher in watchers),
    )
    assert counts == Counts()
