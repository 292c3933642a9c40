"""When Python looks for cyclic garbage, so that no request waits for it: measured in docs/performance.md.

A full collection walks every object that lives: with the schema, the modules and a thousand parsed
documents that takes 70 to 100 ms, in the middle of some request. So what lives when the server has
started is frozen, which takes it out of every later walk; young objects are collected as they come,
which takes some milliseconds at most; and what grows old meanwhile is collected once a minute, and
what survives that is frozen too, so that each full collection walks one minute's objects only.
Frozen objects are freed when nothing refers to them any more, but for cycles, which only a collection
finds: once an hour all are looked at.
"""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

YOUNG: Final = 5000
"""New objects until the youngest are looked at: Python's 700 looks seven times as often, at as many."""
MIDDLE: Final = 10
NEVER: Final = 1_000_000
"""Collections of the middle ones until a full one: they are made here, not by chance."""
SECONDS: Final = 60.0
ROUNDS: Final = 60
"""Collections of new objects before one of all."""


@asynccontextmanager
async def collecting(seconds: float = SECONDS) -> AsyncIterator[None]:
    """While the server runs. The process is its own: the policy is the whole interpreter's."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    task = asyncio.create_task(_collect_old(seconds))
    try:
        yield
    finally:
        task.cancel()
        gc.set_threshold(*before)
        gc.unfreeze()


async def _collect_old(seconds: float) -> None:
    while True:
        for _ in range(ROUNDS):
            await asyncio.sleep(seconds)
            gc.collect()
            gc.freeze()
        gc.unfreeze()
