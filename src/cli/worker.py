"""`worker`."""

import asyncio
import os
import signal
import threading
from typing import Annotated, Final

import typer
from pymongo.errors import ConfigurationError, InvalidURI
from pymongo.uri_parser import parse_uri

from modelharbor.db.jobs import JobKind
from modelharbor.observability.logging import configure_logging, hold_no_lines
from modelharbor.observability.sentry import init_sentry
from modelharbor.settings import Settings

from .running import Failure, read_settings

END_SECONDS: Final = 4.5  # after the drain, at most: handlers may have threads that nobody can stop


def worker(
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Jobs at once; default: MODELHARBOR_WORKER_CONCURRENCY."),
    ] = None,
    kinds: Annotated[
        list[JobKind] | None,
        typer.Option("--kinds", help="Only jobs of this kind; may be given several times."),
    ] = None,
) -> None:
    """Run jobs until SIGINT or SIGTERM; then let them end for a while, and hand the rest back."""
    settings = read_settings()
    try:
        parse_uri(settings.mongo_url)
    except (ConfigurationError, InvalidURI, ValueError) as error:
        raise Failure(f"MODELHARBOR_MONGO_URL: {error}") from None
    configure_logging(settings)
    init_sentry(settings)
    try:
        asyncio.run(work(settings, concurrency or settings.worker_concurrency, kinds or []))
    finally:
        hold_no_lines()


async def work(settings: Settings, concurrency: int, kinds: list[JobKind]) -> None:
    # Here: the other commands start without them.
    from modelharbor.worker.handlers import HANDLERS
    from modelharbor.worker.run import run_worker

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, stop, settings.drain_seconds + END_SECONDS)
    await run_worker(settings, HANDLERS, concurrency, kinds, stop)


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
