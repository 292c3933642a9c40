"""`dev` and `serve`."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from modelharbor.auth.links import secret_key
from modelharbor.http.server import serve as run_server

from .running import read_settings
from .telling import Failure


def dev(
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8000,
    data: Annotated[Path, typer.Option(help="Folder for everything that is kept.")] = Path(
        ".modelharbor"
    ),
    models: Annotated[int, typer.Option(min=0, help="How many demo models.")] = 500,
) -> None:
    """Start engines, demo data and server on your own machine. Never for production."""
    from modelharbor.dev.run import run_dev  # the other commands start without its vocabulary

    raise typer.Exit(run_dev(port, data, models))


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one for each core.")] = 1,
) -> None:
    """Serve the API until SIGINT or SIGTERM."""
    settings = read_settings()
    _refuse_taken(host, port)
    secret_key(settings)  # where it has to be made: once, before the workers start
    run_server(settings, host, port, workers)


def _refuse_taken(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise Failure(
            f"{host} port {port} cannot be used ({error.strerror}): choose another with --host and --port."
        ) from None
