"""A fault of PyMongo 4.20 on Python 3.11, mended from outside.

It waits for a server by `asyncio.wait_for(condition.wait(), …)`, which runs the wait in a task of its
own there. Who is cancelled twice, by a deadline and a client that goes, say, leaves that task behind:
it takes the lock of the topology again, and nobody gives it back. Every operation of the process then
waits for ever. From Python 3.12 on there is no such task.
"""

import asyncio
import sys
from typing import Any

from pymongo.asynchronous import pool, topology
from pymongo.lock import Condition


async def _wait(condition: Condition, seconds: float | None) -> bool:
    """Whether it was notified in time."""
    try:
        async with asyncio.timeout(seconds):
            return await condition.wait()
    except TimeoutError:
        return False


def mend_driver() -> None:
    """Before the first client is made. Again, it changes nothing."""
    modules: tuple[Any, ...] = (pool, topology)
    if sys.version_info < (3, 12):
        for module in modules:
            module._async_cond_wait = _wait
