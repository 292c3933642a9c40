"""Waiting for what must not be left behind."""

import asyncio
from typing import Any


async def settled(*works: "asyncio.Future[Any] | None") -> None:
    """Wait until all have ended, however they do; who is cancelled meanwhile waits all the same, and
    is cancelled then. What they raised is theirs to tell."""
    cancelled: asyncio.CancelledError | None = None
    waiting = {work for work in works if work is not None}
    while going := {work for work in waiting if not work.done()}:
        try:
            await asyncio.wait(going)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        for work in waiting:
            if not work.cancelled():
                work.exception()  # else asyncio complains that nobody asked
        raise cancelled
