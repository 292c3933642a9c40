import asyncio

import pytest

from modelharbor.db.ending import ended

pytestmark = pytest.mark.anyio


async def test_a_task_is_ended_that_does_not_listen_at_first() -> None:
    told: list[str] = []

    async def stubborn() -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                told.append("swallowed")
        raise RuntimeError("at its end")  # which nobody is told of

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    ending = asyncio.create_task(ended(task))
    await asyncio.sleep(0.01)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert task.done()
    assert told == ["swallowed"] * 2
