"""A process that is a worker: it ends in time when it is told to, whatever its handlers do."""

import asyncio
import os
import signal
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import sentry_sdk

from modelharbor.db.jobs import JobKind
from modelharbor.observability.garbage import collecting
from modelharbor.observability.logging import configure_logging, hold_no_lines
from modelharbor.observability.sentry import init_sentry
from modelharbor.settings import Settings

from .run import run_worker
from .schedule import SCHEDULE, Periodic
from .tools import HandlerSpec

END_SECONDS: Final = 4.5  # after the drain, at most: handlers may have threads that nobody can stop
REPORT_SECONDS: Final = 2.0  # for what Sentry has not been sent yet
AUTOGROUP: Final = Path("/proc/self/autogroup")


def be_worker(
    settings: Settings,
    handlers: Mapping[JobKind, HandlerSpec],
    concurrency: int,
    kinds: Collection[JobKind] = (),
    schedule: Sequence[Periodic] = SCHEDULE,
) -> NoReturn:
    """Until SIGINT or SIGTERM; then the process ends, with 0."""
    give_way(settings.worker_nice)
    configure_logging(settings)
    init_sentry(settings)
    try:
        asyncio.run(_work(settings, handlers, concurrency, kinds, schedule))
    finally:
        hold_no_lines()
    sentry_sdk.flush(REPORT_SECONDS)
    # Nothing is left to do, and Python's own end waits for threads.
    os._exit(0)


def give_way(nice: int) -> None:
    """To whoever answers requests, or is asked by them, on the same machine: jobs can wait.

    Linux shares the processor out by sessions first, where it groups them (sched(7)): there the niceness
    of a process says nothing to those of other sessions, and that of the session is set too, if it is
    this process's own.
    """
    if nice == 0 or not hasattr(os, "nice"):
        return
    os.nice(nice)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # not grouped, or not to be changed now
            AUTOGROUP.write_text(str(nice))


async def _work(
    settings: Settings,
    handlers: Mapping[JobKind, HandlerSpec],
    concurrency: int,
    kinds: Collection[JobKind],
    schedule: Sequence[Periodic],
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(
            number, _stop, stop, settings.drain_seconds + END_SECONDS
        )
    async with collecting():
        await run_worker(settings, handlers, concurrency, kinds, stop, schedule=schedule)


def _stop(stop: asyncio.Event, seconds: float) -> None:
    """The first signal; more of them change nothing."""
    if not stop.is_set():
        stop.set()
        last = threading.Timer(seconds, _end)
        last.daemon = True
        last.start()


def _end() -> None:
    hold_no_lines()
    os._exit(0)
