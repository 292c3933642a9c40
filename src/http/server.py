"""uvicorn, set up for this application."""

import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import SecretStr

from modelharbor.settings import Settings

from .protocol import BoundedProtocol, SocketProtocol

KEEP_ALIVE_SECONDS = (
    75  # longer than what proxies in front keep (nginx: 60), or they would meet closed connections
)
SHUTDOWN_SECONDS = 20  # for requests under way; an operation takes 10 at most
FACTORY = "modelharbor.app:create_app"


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve until SIGINT or SIGTERM. Each worker is a process of its own, with its own pools."""
    os.environ.update(environment(settings))
    # Each connection is an open file, and shells allow 1,024 where the system allows more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvicorn.run(**options(host, port, workers, settings.trusted_proxies))


def options(
    host: str, port: int, workers: int, trusted_proxies: Sequence[str] = ()
) -> dict[str, Any]:
    return {
        "app": FACTORY,
        "factory": True,
        "host": host,
        "port": port,
        "workers": workers,
        "loop": "uvloop",
        "http": BoundedProtocol,
        "lifespan": "on",
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": SHUTDOWN_SECONDS,
        "ws": SocketProtocol,
        "ws_max_size": 256 * 1024,
        "ws_per_message_deflate": False,  # a small frame may not become a large one
        "backlog": 2048,
        # Whoever else connects could write them.
        "proxy_headers": bool(trusted_proxies),
        "forwarded_allow_ips": list(trusted_proxies),
        "server_header": False,
        "access_log": False,  # the request middleware logs
        "log_config": None,
    }


def environment(settings: Settings) -> dict[str, str]:
    """What was set, as environment variables: workers read their settings from there."""
    return {
        f"MODELHARBOR_{name.upper()}": _text(getattr(settings, name))
        for name in sorted(settings.model_fields_set)
        if getattr(settings, name) is not None
    }


def _text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value, default=str)
