"""The end of tasks that use the database."""

import asyncio
from typing import Any


async def ended(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks until they have ended, also when the caller is cancelled meanwhile: Python 3.11's
    `asyncio.wait_for`, which the driver sends by, swallows the word at the moment when it is done."""
    is_cancelled = False
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        try:
            await asyncio.wait(left, timeout=0.1)
        except asyncio.CancelledError:
            is_cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not tell of it
    if is_cancelled:
        raise asyncio.CancelledError
