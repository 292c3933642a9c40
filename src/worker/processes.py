"""Processes for work that needs the CPU for long, made when the first such work comes."""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar

T = TypeVar("T")
IDLE_SECONDS: Final = 30.0  # then the processes end, with the memory that they have


class Processes:
    """One pool, made anew when a process of it died: what ran in it then has failed.

    Started afresh (`spawn`): a fork would take over locks and connections as they happen to stand.
    Model cards are rendered in processes of their own (resolvers/cards.py): those are limited in CPU
    and killed one by one, which a pool cannot do.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: ProcessPoolExecutor | None = None
        self._at_work = 0
        self._rest: asyncio.TimerHandle | None = None

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Raises BrokenProcessPool when the process dies of it, or dies of another's work."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._most, multiprocessing.get_context("spawn"), initializer=_begin
            )
        loop, pool = asyncio.get_running_loop(), self._pool
        if self._rest is not None:
            self._rest.cancel()

        def told(_: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._done)

        try:
            work = pool.submit(function, *arguments)
            self._at_work += 1
            # Not when the caller leaves: the process is at work still, maybe in the middle of a write.
            work.add_done_callback(told)
            return await asyncio.wrap_future(work)
        except BrokenProcessPool:
            if self._pool is pool:
                self._pool = None
                pool.shutdown(wait=False)
            raise

    def _done(self) -> None:
        self._at_work -= 1
        if self._at_work == 0:
            self._rest = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.end)

    def end(self) -> None:
        """At once: what still runs is nobody's any more."""
        if self._rest is not None:
            self._rest.cancel()
        pool, self._pool = self._pool, None
        if pool is None:
            return
        # There is no public way before Python 3.14, and at its end Python would wait for them.
        running = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()


@asynccontextmanager
async def open_processes(most: int | None = None) -> AsyncIterator[Processes]:
    """At most as many as there are cores; none yet."""
    processes = Processes(most or os.cpu_count() or 1)
    try:
        yield processes
    finally:
        processes.end()


def _begin() -> None:
    """In each process: Ctrl-C is for the worker, and nobody outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
