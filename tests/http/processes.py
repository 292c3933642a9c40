"""The server as a process of its own, as `modelharbor serve` runs it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from modelharbor.http.server import environment
from modelharbor.settings import Settings

START_SECONDS = 60.0
SERVE = """
import sys
from modelharbor.http.server import serve
from modelharbor.settings import Settings
serve(Settings(), "127.0.0.1", int(sys.argv[1]), int(sys.argv[2]))
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def served(settings: Settings, workers: int = 1) -> Iterator[str]:
    """Its address. Ended by SIGTERM, which it must follow."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(port), str(workers)],
        env={**os.environ, **environment(settings)},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
