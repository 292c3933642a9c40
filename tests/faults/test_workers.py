"""No job is lost, and its effect comes once, whatever happens to workers and to Redis."""

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import Database
from modelharbor.dev.engines import Child, find_engine, run_child
from modelharbor.settings import Settings
from tests.http.processes import free_port

from .figures import is_long, record
from .workers import LEASE, Shop, opened

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop(database: Database, settings: Settings, tmp_path: Path) -> Iterator[Shop]:
    given = {"lease_seconds": LEASE, "drain_seconds": 10.0 if is_long() else 1.0}
    changed = Settings(**{**settings.model_dump(include=settings.model_fields_set), **given})
    with opened(database, changed, tmp_path) as opened_shop:
        yield opened_shop


async def test_a_worker_is_killed_amid_many_jobs(shop: Shop) -> None:
    many = 200
    await shop.put(many, 0.05)
    doomed, _ = shop.start(), shop.start()
    await shop.until_count(many // 3, state="SUCCEEDED")
    doomed.kill()
    held = await shop.count(state="RUNNING")
    await shop.until_count(many, state="SUCCEEDED")
    lost, twice = many - await shop.count(state="SUCCEEDED"), await shop.twice()
    record(
        "kill -9 a worker amid 200 jobs",
        {"lost": 0, "effects_twice": 0},
        lost=lost,
        effects_twice=twice,
        held_at_the_kill=held,
    )
    assert (lost, twice, await shop.effects()) == (0, 0, many)


async def test_a_worker_is_killed_and_the_queue_is_idle(shop: Shop) -> None:
    """Nothing but its lease says that it is gone."""
    taken = []
    idle = shop.start()
    await shop.put(1, 0.0)
    await shop.until_started(1, pid=idle.pid)
    for _ in range(5 if is_long() else 1):
        idle.send_signal(signal.SIGSTOP)
        doomed = shop.start(concurrency=4)
        jobs = await shop.put(4, 0.5)
        await shop.until_started(4, pid=doomed.pid)
        idle.send_signal(signal.SIGCONT)
        killed = time.time()
        doomed.kill()
        first = (await shop.until_started(1, pid=idle.pid, at={"$gt": killed}))[0]
        taken.append(first["at"] - killed)
        ids = {"$in": [job["_id"] for job in jobs]}
        await shop.until_count(4, state="SUCCEEDED", _id=ids)
    twice = await shop.twice()
    record(
        "kill -9 a worker, the queue is then idle",
        {"redelivery_seconds": f"<= {LEASE + 1:g}", "effects_twice": 0},
        redelivery_seconds=max(taken),
        effects_twice=twice,
    )
    assert max(taken) <= LEASE + 1
    assert twice == 0


async def test_a_live_job_is_never_started_again(shop: Shop) -> None:
    (job,) = await shop.put(1, 4 * LEASE)
    shop.start()
    shop.start()
    await shop.until_count(1, state="SUCCEEDED")
    starts = len(await shop.starts(job=job["_id"]))
    record("a live job of 4 x lease, 2 workers", {"starts": 1}, starts=starts)
    assert (starts, await shop.effects()) == (1, 1)


async def test_a_worker_that_sleeps_past_its_lease_commits_nothing(shop: Shop) -> None:
    results = []
    for _ in range(3 if is_long() else 1):
        (job,) = await shop.put(1, 0.8)
        sleeper = shop.start()
        await shop.until_started(1, job=job["_id"])
        sleeper.send_signal(signal.SIGSTOP)
        other = shop.start()
        await shop.until_count(1, state="SUCCEEDED", _id=job["_id"])
        before = await shop.database.data["jobs"].find_one({"_id": job["_id"]})
        sleeper.send_signal(signal.SIGCONT)
        await asyncio.sleep(1.5)  # it goes on, and finds out
        after = await shop.database.data["jobs"].find_one({"_id": job["_id"]})
        assert before == after
        assert after is not None
        assert after["result"] == {"token": 2}
        results.append(await shop.database.count("effects", {"job": job["_id"]}))
        shop.stop(sleeper)
        shop.stop(other)
    record(
        "SIGSTOP a worker past its lease, another takes over, SIGCONT",
        {"committed_results": 1},
        committed_results=max(results),
    )
    assert set(results) == {1}


async def test_a_worker_that_is_told_to_end_hands_its_jobs_back(shop: Shop) -> None:
    many = 24
    await shop.put(many, 600.0)
    first = shop.start(concurrency=many)
    await shop.until_count(many, state="RUNNING")
    await shop.until_started(many)
    first.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    seconds = 0.1 + shop.stop(first)  # a second signal does not hurt
    waiting = await shop.count(state="QUEUED", attempt=0, deaths=0, lease_until=None)
    await shop.database.data["jobs"].update_many({}, {"$set": {"input.seconds": 0}})
    shop.start(concurrency=many)
    await shop.until_count(many, state="SUCCEEDED")
    lost = many - await shop.count(state="SUCCEEDED", attempt=1)
    record(
        "SIGTERM with 24 running jobs",
        {"lost": 0, "seconds_to_exit": "<= 15"},
        lost=lost,
        seconds_to_exit=seconds,
    )
    assert (waiting, lost, await shop.twice()) == (many, 0, 0)
    assert seconds <= 15


@asynccontextmanager
async def redis(folder: Path, port: int) -> AsyncIterator[Child]:
    options = ("--bind", "127.0.0.1", "--save", "", "--dir", str(folder))
    async with run_child(
        folder, "redis-server", find_engine("redis-server"), "--port", str(port), *options
    ) as child:
        yield child


async def test_redis_is_killed_and_hangs(shop: Shop, tmp_path: Path) -> None:
    gone_seconds = 10.0 if is_long() else 1.5
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    settings = shop.settings.model_copy(update={"redis_url": url})
    put, waits = 0, []
    async with connect_cache(settings) as cache:
        shop.start(redis_url=url)

        async def go_on(seconds: float) -> None:
            nonlocal put
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                waits.append(await shop.put_and_wake(cache, 0.01))
                put += 1
                await asyncio.sleep(0.03)

        async with redis(tmp_path, port) as first:
            await go_on(1.0)
            first.process.kill()
            first.process.wait()
            await go_on(gone_seconds)
        async with redis(tmp_path, port) as second:
            await go_on(1.0)
            second.process.send_signal(signal.SIGSTOP)
            while waits[-1] < 0.05:  # one caller finds out, which opens the breaker
                await go_on(0.01)
            opened_at = len(waits)
            await go_on(min(1.5, gone_seconds))
            added = max(waits[opened_at:])
            await go_on(max(0.0, gone_seconds - 1.5))
            second.process.send_signal(signal.SIGCONT)
            await shop.until_count(put, state="SUCCEEDED")
    lost = put - await shop.count(state="SUCCEEDED")
    record(
        f"kill -9 redis for {gone_seconds:g} s, and SIGSTOP it as long",
        {"lost": 0, "effects_twice": 0, "added_ms_after_the_breaker_opens": "<= 50"},
        jobs=put,
        lost=lost,
        effects_twice=await shop.twice(),
        added_ms_after_the_breaker_opens=added * 1000,
        longest_wake_ms=max(waits) * 1000,
    )
    assert (lost, await shop.twice()) == (0, 0)
    assert added <= 0.05
    assert max(waits) <= 0.3


async def test_a_job_that_kills_its_workers_is_dead_in_the_end(shop: Shop) -> None:
    many = 100 if is_long() else 40
    (poison,) = await shop.put(1, 0.0, "die", priority=1)
    await shop.put(many, 0.1)
    running: list[subprocess.Popen[bytes]] = []
    deaths = 0

    async def check() -> bool:
        """Whoever dies is started again, as a supervisor does it."""
        nonlocal deaths
        for process in list(running):
            if process.poll() is not None:
                running.remove(process)
                deaths += 1
        while len(running) < 2:
            running.append(shop.start(concurrency=4))
        return await shop.count(state={"$in": ["QUEUED", "RUNNING", "RETRYING"]}) == 0

    await shop.until(check)
    row = await shop.database.data["jobs"].find_one({"_id": poison["_id"]})
    assert row is not None
    done = await shop.count(state="SUCCEEDED")
    record(
        "a poison job: its process dies each time",
        {"worker_deaths": "<= 3", "others_done_percent": 100},
        worker_deaths=deaths,
        others_done_percent=100 * done / many,
    )
    assert (row["state"], row["error"]["code"]) == ("DEAD", "WORKER_DIED")
    assert (deaths, done, await shop.twice()) == (3, many, 0)
