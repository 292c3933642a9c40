"""Debian's nginx with deploy/nginx/modelharbor.conf, in front of a server."""

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from modelharbor.http.server import options
from tests.http.processes import free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx" / "modelharbor.conf"
START_SECONDS = 60.0
PATIENCE_SECONDS = 30.0  # a guard against hanging
MAIN = """
daemon off;
{user}
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 256; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/modelharbor.conf;
}}
"""


@dataclass(frozen=True)
class Front:
    url: str
    cache: Path
    """The folder of `proxy_cache_path`."""


@contextmanager
def fronting(upstream: str, folder: Path, *, lock: str = "100ms") -> Iterator[Front]:
    """`upstream`: address of the server. What else differs from the file as it is: port and folder, and
    where `lock` says so, how long requests wait for another's answer."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    assert program is not None, "nginx is not installed: `make test` installs it, or says how"
    folder = folder / "nginx"
    folder.mkdir()
    port, cache = free_port(), folder / "cache"
    text = CONFIGURATION.read_text()
    for ours, here in (
        ("server 127.0.0.1:8000;", f"server {upstream.removeprefix('http://')};"),
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("/var/cache/nginx/modelharbor ", f"{cache} "),
        ("proxy_cache_lock_timeout 100ms;", f"proxy_cache_lock_timeout {lock};"),
    ):
        assert text.count(ours) == 1
        text = text.replace(ours, here)
    (folder / "modelharbor.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user))
    with (folder / "out.log").open("wb") as out:
        process = subprocess.Popen(
            [program, "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"],
            stdout=out,
            stderr=out,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert process.poll() is None, (folder / "out.log").read_text()
            assert time.monotonic() < deadline, "nginx did not start"
            time.sleep(0.02)
        yield Front(url, cache)
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    """`/metrics` is refused without asking the server."""
    try:
        return httpx.get(f"{url}/metrics", timeout=5).status_code == 403
    except httpx.TransportError:
        return False


@asynccontextmanager
async def listening(app: Any, lifespan: str = "off") -> AsyncIterator[str]:
    """An ASGI application at an address, by the server's own protocol."""
    given = options("127.0.0.1", 0, 1) | {"app": app, "factory": False, "lifespan": lifespan}
    server = uvicorn.Server(uvicorn.Config(**given))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not server.started:
            assert not serving.done(), "The server did not start"
            await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    async with asyncio.timeout(PATIENCE_SECONDS):
        await serving
