"""`make bench-uploads`: one large upload beside `cp` and `sha256sum`, and the memory that eight at once take."""

import argparse
import asyncio
import hashlib
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bson import ObjectId

from bench.measure import LoadError, cpu_seconds, resident_mebibytes, yardstick
from bench.report import grid, processor, write
from bench.serving import Filled, Serving, engines_beside, our_server
from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorDocument, ActorKind
from modelharbor.db.base import Row
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import migrate
from modelharbor.db.tokens import Permission
from modelharbor.dev.engines import EngineError
from modelharbor.resolvers.models import create_model
from modelharbor.resolvers.tokens import issue_token
from modelharbor.resolvers.uploads import UploadFile, create_uploads
from modelharbor.resolvers.versions import create_version
from modelharbor.storage.blobs import open_storage

ROOT: Final = Path(__file__).parent.parent
DOCUMENT: Final = ROOT / "docs" / "performance.md"
FOLDER: Final = ROOT / ".modelharbor" / "bench-uploads"
DATABASE: Final = "modelharbor_bench_uploads"
BEGIN: Final = "<!-- uploads: begin -->"
END: Final = "<!-- uploads: end -->"
MB: Final = 1_000_000
WARM_BYTES: Final = 16 * MB
LEAST_RATIO: Final = 0.5
MOST_MEBIBYTES: Final = 64.0
HEAD: Final = ("Round", "cp s", "sha256sum s", "Upload s", "MB/s", "Ratio", "Server CPU s/GB")
MARK_BYTES: Final = 8  # at the beginning, which make contents of their own out of one file


@dataclass(frozen=True, slots=True)
class Round:
    size: int  # bytes
    copy_seconds: float
    hash_seconds: float
    upload_seconds: float
    cpu_seconds: float  # of the server

    @property
    def ratio(self) -> float:
        """Throughput of the upload, of `cp` and `sha256sum` one after the other."""
        return (self.copy_seconds + self.hash_seconds) / self.upload_seconds


@dataclass(frozen=True, slots=True)
class Together:
    count: int
    size: int  # bytes, of each
    seconds: float
    idle_mebibytes: float
    most_mebibytes: float

    @property
    def above_idle(self) -> float:
        return self.most_mebibytes - self.idle_mebibytes


class Client:
    """Someone with a version that takes uploads, and what they send."""

    def __init__(self, database: Database, data: Filled, served: Serving) -> None:
        self.database, self.data, self.served = database, data, served
        self.viewer = Viewer()
        self.version_id = ObjectId()
        self.token = ""

    async def begin(self) -> None:
        user = await ActorDocument(kind=ActorKind.USER, login="bench", login_lower="bench").insert()
        _, self.token = await issue_token(self.database, user.id, "bench", list(Permission), None)
        row = await self.database.data["actors"].find_one({"_id": user.id})
        assert row is not None
        self.viewer = Viewer(user=row, scopes=frozenset(Permission))
        settings = self.data.settings
        model = await create_model(
            self.database, self.viewer, settings, owner="bench", name="bench"
        )
        version = await create_version(self.database, self.viewer, settings, model_id=model["_id"])
        self.version_id = version["_id"]

    async def send(self, path: Path, sizes: list[int]) -> float:
        """Seconds for uploads of these sizes at once, each with contents of its own."""
        async with open_storage(self.data.settings) as storage:
            rows = await create_uploads(
                self.database,
                storage,
                self.viewer,
                self.data.settings,
                version_id=self.version_id,
                files=[UploadFile(str(ObjectId()), size, None) for size in sizes],
            )
        begun = time.perf_counter()
        await asyncio.gather(*(asyncio.to_thread(self._send, path, row) for row in rows))
        seconds = time.perf_counter() - begun
        for row in rows:
            await self._check(path, row)
        return seconds

    def _send(self, path: Path, row: Row) -> None:
        """One PATCH, its body straight from the file."""
        address, size = urlsplit(self.served.url), row["size_bytes"]
        lines = [
            f"PATCH /uploads/{row['_id']} HTTP/1.1",
            f"Host: {address.netloc}",
            f"Authorization: Bearer {self.token}",
            "Tus-Resumable: 1.0.0",
            "Upload-Offset: 0",
            "Content-Type: application/offset+octet-stream",
            f"Content-Length: {size}",
        ]
        head = "\r\n".join([*lines, "", ""]).encode()
        with (
            path.open("rb") as source,
            socket.create_connection((address.hostname, address.port)) as connection,
        ):
            connection.sendall(head + mark(row))
            connection.sendfile(source, MARK_BYTES, size - MARK_BYTES)
            answer = connection.recv(65536)
        if not answer.startswith(b"HTTP/1.1 204 "):
            raise LoadError(f"the server answers {answer[:400]!r}")

    async def _check(self, path: Path, row: Row) -> None:
        found = await self.database.data["uploads"].find_one({"_id": row["_id"]})
        file = await self.database.data["files"].find_one({"_id": found and found["file_id"]})
        if file is None or file["sha256"] != await asyncio.to_thread(digest, path, row):
            raise LoadError("what arrived is not what was sent")


def mark(row: Row) -> bytes:
    found: bytes = row["_id"].binary[-MARK_BYTES:]
    return found


def digest(path: Path, row: Row) -> str:
    seen = hashlib.sha256(mark(row))
    left = row["size_bytes"] - MARK_BYTES
    with path.open("rb") as source:
        source.seek(MARK_BYTES)
        while left:
            piece = source.read(min(left, 1 << 22))
            seen.update(piece)
            left -= len(piece)
    return seen.hexdigest()


def main() -> int:
    arguments = _arguments()
    try:
        is_met = asyncio.run(_run(arguments))
    except (EngineError, LoadError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0 if is_met else 3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.uploads", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2000, help="of the one upload (2000)")
    parser.add_argument("--rounds", type=int, default=3, help="of it (3)")
    parser.add_argument("--together", type=int, default=8, help="uploads at once (8)")
    parser.add_argument("--each", type=int, default=1000, help="megabytes of each of them (1000)")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of engines and files")
    parser.add_argument(
        "--write", action="store_true", help=f"put the table into docs/{DOCUMENT.name}"
    )
    return parser.parse_args()


async def _run(arguments: argparse.Namespace) -> bool:
    """Whether both goals are met."""
    folder: Path = arguments.data.absolute()
    source = folder / "source"
    load, yardsticks = os.getloadavg()[0], [yardstick()]
    async with engines_beside(folder, DATABASE) as data:
        try:
            fill(source, max(arguments.megabytes, arguments.each) * MB)
            rounds, together = await _measure(arguments, data, source)
        finally:
            for left in (folder / "blobs", source, folder / "copy"):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        yardsticks.append(yardstick())
        about = circumstances(data, load, yardsticks)
    ratio = statistics.median(each.ratio for each in rounds)
    goals = [
        (f"ratio {ratio:.2f} (median) of {LEAST_RATIO} at least", ratio >= LEAST_RATIO),
        (
            f"{together.count} uploads of {together.size / MB:,.0f} MB at once, {together.seconds:.1f} s: "
            f"{together.above_idle:.0f} of {MOST_MEBIBYTES:.0f} MiB resident above the "
            f"{together.idle_mebibytes:.0f} at rest",
            together.above_idle <= MOST_MEBIBYTES,
        ),
    ]
    told = [
        about,
        grid(HEAD, [line(number, each) for number, each in enumerate(rounds, 1)]),
        "\n".join(f"- {text}: {'met' if is_met else 'missed'}" for text, is_met in goals),
    ]
    print("\n\n".join(told))
    if arguments.write:
        write(DOCUMENT, "\n\n".join(told), BEGIN, END)
    return all(is_met for _, is_met in goals)


async def _measure(
    arguments: argparse.Namespace, data: Filled, source: Path
) -> tuple[list[Round], Together]:
    async with connect(data.settings) as database:
        await database.client.drop_database(data.settings.mongo_database)
        await migrate(database)
        async with our_server(data) as served:
            client = Client(database, data, served)
            await client.begin()
            await client.send(source, [WARM_BYTES])
            sizes = [arguments.each * MB] * arguments.together
            idle = resident_mebibytes(served.pid)
            with watched_memory(served.pid) as most:
                seconds = await client.send(source, sizes)
            together = Together(len(sizes), sizes[0], seconds, idle, max(most))
            rounds = [
                await _round(client, source, arguments.megabytes * MB)
                for _ in range(arguments.rounds)
            ]
            return rounds, together


async def _round(client: Client, source: Path, size: int) -> Round:
    copy = source.with_name("copy")
    os.truncate(source, size)
    copying = await asyncio.to_thread(timed, "cp", str(source), str(copy))
    hashing = await asyncio.to_thread(timed, "sha256sum", str(copy))
    copy.unlink()
    before = cpu_seconds(client.served.pid)
    sending = await client.send(source, [size])
    used = cpu_seconds(client.served.pid) - before
    return Round(size, copying, hashing, sending, used)


def fill(path: Path, size: int) -> None:
    """With bytes that nothing can compress; read once more, so that it is in memory."""
    piece = random.Random(1).randbytes(16 * MB)
    with path.open("wb") as file:
        for _ in range(0, size, len(piece)):
            file.write(piece)
        file.truncate(size)
        os.fsync(file.fileno())


def timed(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


@contextmanager
def watched_memory(pid: int) -> Iterator[list[float]]:
    """Resident mebibytes of a process, again and again."""
    found, ended = [resident_mebibytes(pid)], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            found.append(resident_mebibytes(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def line(number: int, one: Round) -> tuple[str, ...]:
    return (
        f"{number}",
        f"{one.copy_seconds:.2f}",
        f"{one.hash_seconds:.2f}",
        f"{one.upload_seconds:.2f}",
        f"{one.size / MB / one.upload_seconds:,.0f}",
        f"{one.ratio:.2f}",
        f"{one.cpu_seconds / one.size * 1e9:.2f}",
    )


def circumstances(data: Filled, load: float, yardsticks: list[float]) -> str:
    cores = ", ".join(map(str, data.server_cores)) or "shared with all else"
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: one server process (core {cores}), local disk, "
        f"bytes flushed to it before they count, {processor()}, "
        f"MongoDB {data.mongo_version}. Load of the machine before: {load:.1f}. "
        f"Meanwhile Python added up a million numbers in {min(yardsticks):.0f} to {max(yardsticks):.0f} ms of CPU."
    )


if __name__ == "__main__":
    sys.exit(main())
