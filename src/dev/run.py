"""`modelharbor dev`: engines, migrations, demo data, a token and the server, with one command."""

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bson import ObjectId
from pydantic import ValidationError
from pydantic_settings import SettingsError
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.progress import Progress

from modelharbor.db.actors import ActorDocument, ActorKind
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import migrate
from modelharbor.db.tokens import Permission
from modelharbor.inspection.fence import open_fence
from modelharbor.resolvers.tokens import issue_token
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage

from .demo import (
    MARKER,
    SEEDS,
    SeedProgress,
    SeedRefused,
    add_usage,
    clear,
    seed,
    seeded,
    usage_left,
)
from .engines import Child, EngineError, Engines, claim, end_child, run_child, run_engines
from .launch import end_with_parent
from .usage import Usage

HOST: Final = "127.0.0.1"
ALLOWED_HOSTS: Final = ["localhost", "127.0.0.1", "[::1]"]  # any other name is DNS rebinding
ADMIN_LOGIN: Final = "admin"
SHELL: Final = "dev/env"  # below the data folder
TOKEN_NAME: Final = "make run"
READY_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.05
DRAIN_SECONDS: Final = "2"  # nobody likes to wait at Ctrl-C; jobs go on at the next start
WORKER: Final = ("-m", "modelharbor", "worker")


def run_dev(port: int, data: Path, models: int) -> int:
    """Run until Ctrl-C or SIGTERM (0), or say in one line on stderr why not (1)."""
    if "MAKELEVEL" in os.environ:
        end_with_parent()  # a killed `make run` would otherwise leave us, and nobody knows
    try:
        asyncio.run(_run(port, data.expanduser().absolute(), models))
    except asyncio.CancelledError:
        return 0
    except EngineError as error:
        print(f"modelharbor: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(port: int, data: Path, models: int) -> None:
    _stop_on_signals()
    folder = data / "dev"
    own = _own_settings()
    async with claim(folder):
        _check_port(port)
        async with (
            # First, for it imports while the engines start.
            run_child(folder, "server", *_server(port), stdin=subprocess.PIPE) as server,
            run_engines(
                folder / "engines",
                mongo_url=_yours(own, data, "mongo_url"),
                redis_url=_yours(own, data, "redis_url"),
            ) as engines,
        ):
            try:
                environment = {
                    "MODELHARBOR_MONGO_URL": engines.mongo_url,
                    "MODELHARBOR_REDIS_URL": engines.redis_url,
                    "MODELHARBOR_DATA_PATH": str(data),
                    "MODELHARBOR_ALLOWED_HOSTS": json.dumps(ALLOWED_HOSTS),
                }
                if "drain_seconds" not in own.model_fields_set:
                    environment["MODELHARBOR_DRAIN_SECONDS"] = DRAIN_SECONDS
                os.environ.update(environment)
                token, usage = await _prepare(Settings(), models)
                _go(server, environment)
                await _wait_until_ready(server, port)
                # After the server is there, so that nobody waits for its imports.
                async with run_child(folder, "worker", Path(sys.executable), *WORKER) as worker:
                    _write_shell(data, engines)
                    _tell(port, token, data, server, engines)
                    if usage is not None:
                        print("  Its 90 days of analytics come in the next seconds.\n", flush=True)
                        await _add_usage(Settings(), usage)  # nobody waits for it
                    await _watch((server, worker), engines)
            finally:
                await end_child(server)  # while its engines are still there


def _own_settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        raise EngineError(f"MODELHARBOR_{name}: {first['msg']}") from None
    except SettingsError as error:
        raise EngineError(
            f'{error}: lists and maps are JSON, such as ["a", "b"] and {{"disk": "/srv/models"}}'
        ) from None


def _yours(own: Settings, data: Path, name: str) -> str | None:
    """The URL of an engine of yours, which we are to use; None: there is none. In a shell that has read
    our file are those of our engines of last time, which are gone."""
    url: str = getattr(own, name)
    with suppress(FileNotFoundError):
        if f"export MODELHARBOR_{name.upper()}={shlex.quote(url)}" in (
            (data / SHELL).read_text().splitlines()
        ):
            return None
    return url if name in own.model_fields_set else None


def _stop_on_signals() -> None:
    """The first Ctrl-C, SIGTERM or closed terminal ends us in order; more of them change nothing."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if task is not None and not stopping:
            stopping = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise EngineError(
                f"port {port} cannot be used ({error}): choose another, for example PORT={port % 60000 + 1000}"
            ) from None


def _server(port: int) -> tuple[Path, str, str]:
    """Python, and what it is to do: get ready, and serve once the settings are there."""
    return (
        Path(sys.executable),
        "-c",
        "import json, os, sys, modelharbor.app\n"
        "from modelharbor.http.server import serve\n"
        "from modelharbor.settings import Settings\n"
        "os.environ.update(json.loads(sys.stdin.readline()))\n"
        f"serve(Settings(), {HOST!r}, {port}, workers=1)",
    )


def _go(server: Child, environment: dict[str, str]) -> None:
    """Give the server its settings. One that has ended meanwhile is found out afterwards."""
    if server.process.stdin is not None:
        with suppress(BrokenPipeError):
            server.process.stdin.write(json.dumps(environment).encode() + b"\n")
            server.process.stdin.flush()


async def _prepare(settings: Settings, models: int) -> tuple[str, Usage | None]:
    """Bring the database to this version, fill it when that is due; answers an admin's token, and
    what is to be added to demo data before a worker begins."""
    try:
        async with connect(settings) as database:
            await migrate(database)
            usage = await _seed(database, settings, models)
            return await _admin_token(database), usage
    except PyMongoError as error:
        raise EngineError(f"MongoDB does not do its part: {str(error).split(',')[0]}") from None
    except SeedRefused as error:
        raise EngineError(str(error)) from None


async def _add_usage(settings: Settings, usage: Usage) -> None:
    try:
        async with connect(settings) as database:
            await add_usage(database, usage)
    except PyMongoError as error:
        raise EngineError(f"MongoDB does not do its part: {str(error).split(',')[0]}") from None


async def _seed(database: Database, settings: Settings, models: int) -> Usage | None:
    """Demo data goes into an empty database, and takes the place of demo data of another size. Where only
    its usage is missing, because we were stopped while it came, that comes now.

    What was not made by the demo is never removed.
    """
    there, left = await seeded(database), await usage_left(database)
    if there is not None and there.models == models and (there.complete or left is not None):
        return left
    if await holds_own(database):
        if there is not None:
            print(
                f"modelharbor: the demo data stays at {there.models} models, for there is data of yours beside it"
                " ('modelharbor seed --fresh' would replace all of it).",
                file=sys.stderr,
            )
        return left
    async with open_storage(settings) as storage, open_fence(settings) as fence:
        if there is not None or await database.data["actors"].find_one({}, {"_id": 1}) is not None:
            await clear(database, storage)  # takes a second, for nothing in a new database
        if not models:
            return None
        with _progress() as report:
            made = await seed(
                database, storage, models=models, usage_later=True, fence=fence, report=report
            )
        return made.usage


async def holds_own(database: Database) -> bool:
    """Whether there is anything that neither the demo nor we have made."""
    row = await database.data[SEEDS].find_one({"_id": MARKER})
    # Demo rows have ids of the past that they tell of, others that of the day when they were made.
    later = {"_id": {"$gt": ObjectId.from_datetime(row["at"])}} if row else {}
    for name in ("models", "versions", "actors"):
        others = {"login_lower": {"$ne": ADMIN_LOGIN}} if name == "actors" else {}
        if await database.data[name].find_one({**later, **others}, {"_id": 1}) is not None:
            return True
    return False


@contextmanager
def _progress() -> Iterator[Callable[[SeedProgress], None]]:
    """A bar on stderr, where that is a terminal; it is gone when all is done."""
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task("Demo data", total=None)

        def report(now: SeedProgress) -> None:
            progress.update(task, completed=now.done, total=now.total)

        yield report


async def _admin_token(database: Database) -> str:
    """A new one each time; the one before is good no longer."""
    admin = await ActorDocument.find_one({"login_lower": ADMIN_LOGIN})
    if admin is None:
        admin = ActorDocument(
            kind=ActorKind.USER, login=ADMIN_LOGIN, login_lower=ADMIN_LOGIN, is_operator=True
        )
        await admin.insert()
    await database.data["tokens"].update_many(
        {"user_id": admin.id, "name": TOKEN_NAME, "revoked_at": None},
        {"$set": {"revoked_at": utc_now()}},
    )
    _, token = await issue_token(database, admin.id, TOKEN_NAME, list(Permission))
    return token


async def _wait_until_ready(server: Child, port: int) -> None:
    until = time.monotonic() + READY_SECONDS
    while not await _is_ready(port):
        if server.process.poll() is not None:
            raise server.failure()
        if time.monotonic() > until:
            raise EngineError(f"the server does not become ready (log: {server.log})")
        await asyncio.sleep(POLL_SECONDS)


async def _is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = (await asyncio.wait_for(reader.readline(), READY_SECONDS)).split()
        finally:
            writer.close()
    except OSError:
        return False
    return status[1:2] == [b"200"]


def _write_shell(data: Path, engines: Engines) -> None:
    """A file for the shell: with it other commands find the same engines and the same contents."""
    lines = [f"export MODELHARBOR_DATA_PATH={shlex.quote(str(data))}"]
    running = {child.name for child in engines.running}
    if "mongod" in running:  # yours may hold a password, and is in the environment already
        lines.append(f"export MODELHARBOR_MONGO_URL={shlex.quote(engines.mongo_url)}")
    if "redis-server" in running:
        lines.append(f"export MODELHARBOR_REDIS_URL={shlex.quote(engines.redis_url)}")
    (data / SHELL).write_text("\n".join(lines) + "\n")


def _tell(port: int, token: str, data: Path, server: Child, engines: Engines) -> None:
    url = f"http://{HOST}:{port}"
    ours = any(child.name == "mongod" for child in engines.running)  # yours may hold a password
    mongodb = engines.mongo_url if ours else "yours"
    print(
        f"""
  modelharbor is ready. Ctrl-C ends it.

  GraphiQL   {url}/graphiql#token={token}
  GraphQL    {url}/graphql
  Health     {url}/healthz and {url}/readyz
  MongoDB    {mongodb}
  Shell      . {shlex.quote(str(data / SHELL))} (before other commands)
  Token      {token} (admin; a new one at each start)
  Data       {data}
  Log        {server.log}
""",
        flush=True,
    )


async def _watch(children: Sequence[Child], engines: Engines) -> None:
    """Until something that should go on has ended."""
    while True:
        await asyncio.sleep(0.5)
        engines.check()
        for child in children:
            if child.process.poll() is not None:
                raise child.failure()
