"""`worker`."""

from typing import Annotated

import typer
from pymongo.errors import ConfigurationError
from pymongo.uri_parser import parse_uri

from modelharbor.db.jobs import JobKind

from .running import read_settings
from .telling import Failure


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
    # Here: the other commands start without them.
    from modelharbor.worker.handlers import HANDLERS
    from modelharbor.worker.process import be_worker

    settings = read_settings()
    try:
        parse_uri(settings.mongo_url)
    except (ConfigurationError, ValueError) as error:
        raise Failure(f"MODELHARBOR_MONGO_URL: {error}") from None
    be_worker(settings, HANDLERS, concurrency or settings.worker_concurrency, kinds or [])
