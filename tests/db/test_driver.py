"""What is mended of the driver."""

import asyncio
from types import ModuleType

import pytest
from pymongo.asynchronous import pool, topology
from pymongo.lock import _async_create_condition, _async_create_lock

from modelharbor.db.driver import mend_driver

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("module", [pool, topology])
async def test_who_is_cancelled_twice_gives_back_no_lock_of_another(module: ModuleType) -> None:
    """The second time while the lock is somebody else's, as it is when many wait for a server."""
    mend_driver()
    lock = _async_create_lock()
    condition = _async_create_condition(lock)

    async def wait() -> None:
        async with lock:
            await module._async_cond_wait(condition, 60)

    waiting = asyncio.create_task(wait())
    while lock.locked() or not condition._waiters:
        await asyncio.sleep(0)
    async with lock:
        waiting.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        assert lock.locked()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for _ in range(5):
        await asyncio.sleep(0)
    assert not lock.locked()


@pytest.mark.parametrize("module", [pool, topology])
async def test_the_wait_ends_when_it_is_notified_or_in_time(module: ModuleType) -> None:
    mend_driver()
    lock = _async_create_lock()
    condition = _async_create_condition(lock)

    async def notify() -> None:
        async with lock:
            condition.notify_all()

    async with lock:
        assert await module._async_cond_wait(condition, 0.01) is False
        notifying = asyncio.create_task(notify())
        assert await module._async_cond_wait(condition, 60) is True
        assert lock.locked()
    await notifying
    assert not lock.locked()
