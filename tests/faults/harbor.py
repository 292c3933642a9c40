"""Server and worker processes on one data folder, as the commands start them, and uploads to them."""

import asyncio
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final

import httpx
from bson import ObjectId

from modelharbor.client import documents
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import ENDED, JobKind
from modelharbor.db.models import ModelDocument
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.http.server import environment
from modelharbor.jobs.put import put_job
from modelharbor.resolvers.tokens import issue_token
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from modelharbor.storage.blobs import blob_key
from tests.documents import insert_actor, insert_model, insert_version
from tests.http.processes import free_port

from . import sender

COMMAND: Final = str(Path(sys.executable).parent / "modelharbor")
GUARD_SECONDS: Final = 90.0
END_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.001
ESTABLISHED: Final = "01"  # in /proc/net/tcp
MEDIA: Final = "application/offset+octet-stream"
MIB: Final = 1024 * 1024


@dataclass(eq=False)
class Child:
    """A process, in a group of its own, that a test may kill at any moment."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def kill(self) -> None:
        """With all that it has started; nothing happens where it has ended."""
        if self.is_running:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@dataclass(eq=False)
class Server(Child):
    port: int
    is_ready: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Harbor:
    settings: Settings
    folder: Path
    children: list[Child] = field(default_factory=list)

    @property
    def store(self) -> Path:
        """Where the store has its objects."""
        url = self.settings.storage_url
        return self.settings.data_path / "blobs" if url is None else Path(url[len("file://") :])

    def _popen(self, *arguments: str) -> tuple["subprocess.Popen[bytes]", Path]:
        log = self.folder / f"{len(self.children)}-{arguments[1]}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments,
                env={**os.environ, **environment(self.settings)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return process, log

    def server(self) -> Server:
        port = free_port()
        server = Server(*self._popen(COMMAND, "serve", "--port", str(port)), port)
        self.children.append(server)
        return server

    def worker(self) -> Child:
        worker = Child(*self._popen(COMMAND, "worker", "--concurrency", "4"))
        self.children.append(worker)
        return worker

    def workers(self) -> list[Child]:
        named = [each for each in self.children if each.log.name.endswith("-worker.log")]
        return [each for each in named if each.is_running]

    def work(self) -> None:
        """One worker runs, or more."""
        if not self.workers():
            self.worker()

    def rest(self) -> None:
        """No worker runs. They are told to end: one that is killed may leave a transaction, whose locks
        MongoDB keeps for a minute."""
        _end(self.workers())

    def servers(self) -> list[Server]:
        return [each for each in self.children if isinstance(each, Server) and each.is_running]

    async def up(self, count: int = 2) -> list[Server]:
        """So many servers that answer; those that are missing are started."""
        while len(self.servers()) < count:
            self.server()
        async with asyncio.timeout(GUARD_SECONDS):
            while len(ready := [each for each in self.servers() if await _answers(each)]) < count:
                assert len(self.servers()) >= count, self.logs()
                await asyncio.sleep(0.02)
        return ready

    async def any(self, chance: random.Random) -> Server:
        """One that answers."""
        await self.up(1)
        return chance.choice([each for each in self.servers() if await _answers(each)])

    def logs(self) -> str:
        return "\n".join(
            f"--- {each.log.name}\n{each.log.read_text(errors='replace')[-1500:]}"
            for each in self.children[-4:]
        )

    def close(self) -> None:
        _end([each for each in self.children if each.is_running])


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.signal(signal.SIGCONT)
        child.signal(signal.SIGTERM)
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(END_SECONDS)
        child.kill()


async def _answers(server: Server) -> bool:
    if not server.is_ready:
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
                server.is_ready = (await client.get(f"{server.url}/healthz")).status_code == 200
        except httpx.TransportError:
            return False
    return server.is_ready


def on_the_way(port: int) -> int:
    """Bytes that the system holds between a server and its clients: sent, and not read yet."""
    count = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, *_ = line.split()
        sending, reading = (int(each, 16) for each in queues.split(":"))
        if state == ESTABLISHED and int(local.partition(":")[2], 16) == port:
            count += reading
        elif state == ESTABLISHED and int(remote.partition(":")[2], 16) == port:
            count += sending
    return count


@contextmanager
def opened(settings: Settings, folder: Path) -> Iterator[Harbor]:
    harbor = Harbor(settings, folder)
    try:
        yield harbor
    finally:
        harbor.close()


@dataclass(eq=False)
class Sender(Child):
    counter: Path

    @property
    def position(self) -> int | None:
        """Of the file, up to where the system was given its bytes; None: it has not begun."""
        with (
            self.counter.open("rb") as file,
            mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ) as told,
        ):
            return int.from_bytes(told[:8], "little") - 1 if any(told[:8]) else None

    async def until(self, mark: int) -> None:
        """It has come so far, or it has ended."""
        async with asyncio.timeout(GUARD_SECONDS):
            while self.is_running and (self.position is None or self.position < mark):
                await asyncio.sleep(POLL_SECONDS)

    async def ended(self) -> int:
        async with asyncio.timeout(GUARD_SECONDS):
            while (code := self.process.poll()) is None:
                await asyncio.sleep(POLL_SECONDS)
        return code


@dataclass
class Berth:
    """A version of ada's, and what is sent to it."""

    harbor: Harbor
    database: Database
    folder: Path
    owner_id: ObjectId
    token: str
    model: ModelDocument
    version: VersionDocument
    client: httpx.AsyncClient

    # ---- what is asked of a server

    async def mutate(self, server: Server, query: str, given: Row) -> Row:
        """The payload; one that could not be had is asked for again."""
        async with asyncio.timeout(GUARD_SECONDS):
            while True:
                answer = await self.client.post(
                    f"{server.url}/graphql", json={"query": query, "variables": {"input": given}}
                )
                told = answer.json()
                if "errors" not in told:
                    payload: Row = next(iter(told["data"].values()))
                    return payload
                codes = {error["extensions"]["code"] for error in told["errors"]}
                assert codes <= {"UNAVAILABLE", "TIMEOUT"}, told
                await asyncio.sleep(0.05)

    async def create_uploads(self, server: Server, *files: Row, key: str | None = None) -> Row:
        version_id = global_id("ModelVersion", self.version.id)
        given = {"versionId": version_id, "files": list(files)}
        if key is not None:
            given["idempotencyKey"] = key
        return await self.mutate(server, documents.CREATE_UPLOADS, given)

    async def create(
        self, server: Server, size: int, path: str = "model.bin", sha256: str | None = None
    ) -> ObjectId:
        file = {"path": path, "sizeBytes": str(size), "sha256": sha256}
        payload = await self.create_uploads(server, file)
        assert payload["userErrors"] == []
        [upload] = payload["uploads"]
        return ObjectId(upload["url"].rpartition("/")[2])

    async def complete(self, server: Server, upload_id: ObjectId, sha256: str) -> Row:
        given = {"id": global_id("Upload", upload_id), "sha256": sha256}
        return await self.mutate(server, documents.COMPLETE_UPLOAD, given)

    async def head(self, server: Server, upload_id: ObjectId) -> int:
        answer = await self.client.head(f"{server.url}/uploads/{upload_id}")
        assert answer.status_code == 200
        return int(answer.headers["upload-offset"])

    async def patch(
        self, server: Server, upload_id: ObjectId, offset: int, body: Any, **headers: str
    ) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.patch(
            f"{server.url}/uploads/{upload_id}",
            content=body,
            headers={"upload-offset": str(offset), "content-type": MEDIA, **named},
        )

    async def post(
        self, server: Server, upload_id: ObjectId, body: bytes = b"", **headers: str
    ) -> httpx.Response:
        binding = b64encode(global_id("Upload", upload_id).encode()).decode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(
            f"{server.url}/uploads",
            content=body,
            headers={"upload-metadata": f"upload {binding}", "content-type": MEDIA, **named},
        )

    def sender(self, server: Server, upload_id: ObjectId, file: Path) -> Sender:
        number = len(self.harbor.children)
        counter, log = self.folder / f"{number}.counter", self.folder / f"{number}-sender.log"
        counter.write_bytes(bytes(8))
        arguments = [str(server.port), self.token, f"/uploads/{upload_id}", str(file), str(counter)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", sender.__file__, *arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        made = Sender(process, log, counter)
        self.harbor.children.append(made)
        return made

    # ---- what has come of it

    async def row(self, upload_id: ObjectId) -> Row:
        return await self.one("uploads", _id=upload_id)

    async def one(self, collection: str, **query: Any) -> Row:
        [row] = await self.database.find(collection, query)
        return row

    async def until(self, collection: str, row_id: ObjectId, **values: Any) -> Row:
        """The row, once it has these values, or one of these sets of values."""
        begun = time.monotonic()
        while True:
            row = await self.one(collection, _id=row_id)
            if all(
                row[name] in value if isinstance(value, set) else row[name] == value
                for name, value in values.items()
            ):
                return row
            assert time.monotonic() - begun < GUARD_SECONDS, f"{row}\n{self.harbor.logs()}"
            await asyncio.sleep(POLL_SECONDS)

    async def swept(self) -> None:
        """By the job, without any grace; some worker is running."""
        job = await self.database.transaction(
            lambda session: put_job(
                self.database,
                session,
                kind=JobKind.EXPIRE_UPLOADS,
                input={"orphan_seconds": 0},
                principals=["operator"],
            )
        )
        job = await self.until("jobs", job["_id"], state={state.value for state in ENDED})
        assert job["state"] == "SUCCEEDED", job

    async def orphans(self) -> set[str]:
        """Objects that no contents have."""
        keys = {blob_key(row) for row in await self.database.find("blobs", {"stored": True})}
        there = self.objects()
        assert keys <= there
        return there - keys

    def objects(self) -> set[str]:
        folder = self.harbor.store
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    async def stored(self, upload_id: ObjectId) -> str:
        """The SHA-256 of the file on disk that a completed upload has become: one file, and so many
        references of its contents as there are files with them."""
        upload = await self.row(upload_id)
        assert (upload["state"], upload["error"]) == ("COMPLETED", None), upload
        file = await self.one("files", version_id=upload["version_id"], path=upload["path"])
        assert file["_id"] == upload["file_id"]
        blob = await self.one("blobs", sha256=file["sha256"])
        assert blob["references"] == await self.database.count("files", {"sha256": blob["sha256"]})
        with (self.harbor.store / blob_key(blob)).open("rb") as opened_file:
            digest = file_digest(opened_file, "sha256").hexdigest()
        assert digest == blob["sha256"] == upload["sha256"]
        return digest

    async def counts(self, *collections: str, **query: Any) -> list[int]:
        """How many rows each has; the last of them those of the query."""
        queries: list[Row] = [*({} for _ in collections[:-1]), query]
        pairs = zip(collections, queries, strict=True)
        return [await self.database.count(name, each) for name, each in pairs]

    async def reserved(self) -> tuple[int, int]:
        """Bytes, and uploads."""
        row = await self.one("quotas", _id=self.owner_id)
        return row["reserved_bytes"], row["open_uploads"]


@asynccontextmanager
async def moored(harbor: Harbor, database: Database, folder: Path) -> AsyncIterator[Berth]:
    ada = await insert_actor("ada")
    _, token = await issue_token(database, ada.id, "test", list(Permission), None)
    model = await insert_model(ada, "tiny")
    version = await insert_version(database, model, {}, status=VersionStatus.DRAFT)
    async with httpx.AsyncClient(
        headers={"authorization": f"Bearer {token}", "tus-resumable": "1.0.0"},
        timeout=GUARD_SECONDS,
        trust_env=False,
        limits=httpx.Limits(max_connections=None),
    ) as client:
        yield Berth(harbor, database, folder, ada.id, token, model, version, client)
        await end_transactions(database)


async def end_transactions(database: Database) -> None:
    """Of processes that were killed: MongoDB would keep their locks for a minute."""
    found = await database.client.admin.aggregate(
        [
            {"$currentOp": {"idleSessions": True}},
            {"$match": {"type": "idleSession", "transaction": {"$exists": True}}},
            {"$project": {"id": "$lsid.id"}},
        ]
    )
    sessions = [{"id": row["id"]} for row in await found.to_list()]
    if sessions:
        await database.client.admin.command("killSessions", sessions)
