"""Rows that a query finds come to a file: written by a job of the server, or straight as they are read.

What a job has written is fetched into a file beside its place, `….part`, and takes that place when it is
whole. Which job it is of stands in a small file next to it: a process that comes after one that was killed
goes on with that job, and from that byte.
"""

import asyncio
import fcntl
import os
import stat
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import httpx
import orjson

from . import documents
from .answers import failure_of, number_of, whole
from .downloading import LINK_GONE, WRITE_BYTES, checked_link, write_at
from .failures import ClientError, JobFailed, Refused, Rejected, Unreachable, Unsafe
from .patience import may_pass
from .records import Exported, Exporting, Progress, Step

if TYPE_CHECKING:
    from .client import Client

ENDED: Final = frozenset({"SUCCEEDED", "FAILED", "DEAD", "CANCELLED"})
ROWS: Final = ("application/x-ndjson", "text/csv")


# As a job ---------------------------------------------------------------------------------------


async def put_export(
    client: "Client",
    query: str,
    variables: Mapping[str, Any],
    *,
    format: str,
    compression: str,
    key: str | None = None,
) -> str:
    """The id of its job."""
    payload = await client.mutate(
        documents.EXPORT,
        {
            "query": query,
            "variables": variables,
            "format": format,
            "compression": compression,
            "idempotencyKey": key or uuid4().hex,
        },
    )
    found: str = payload["job"]["id"]
    return found


async def follow_export(client: "Client", job_id: str) -> AsyncGenerator[Exporting, None]:
    """How far its job is, until it has ended. JobFailed: otherwise than well."""
    async with aclosing(client.subscribe(documents.EXPORT_JOB, {"id": job_id})) as events:
        async for data in events:
            job = data["jobProgress"]["job"]
            progress, total = job["progress"], job["progress"]["total"]
            yield Exporting(
                job_id,
                job["state"],
                int(progress["current"]),
                None if total is None else int(total),
                progress["ratePerSecond"],
                progress["etaSeconds"],
                progress["message"],
            )
            if job["state"] in ENDED:
                _refuse_failed(job)


def _refuse_failed(job: Mapping[str, Any]) -> None:
    if job["state"] != "SUCCEEDED":
        error = job["error"] or {"code": job["state"], "message": f"The job is {job['state']}."}
        raise JobFailed(error["message"], error["code"])


async def cancel_export(client: "Client", job_id: str) -> None:
    await client.mutate(documents.CANCEL_JOB, {"id": job_id}, again=True)


async def export_result(client: "Client", job_id: str) -> Exported:
    """What an export has written. JobFailed; Rejected: it has not ended, or is not yours."""
    job = await _job(client, job_id)
    if job is None or job["kind"] != "EXPORT":
        raise Rejected(f"There is no export {job_id}, or it is not yours.", "NOT_FOUND")
    if job["state"] not in ENDED:
        raise Rejected(f"The export is {job['state']}.", "CONFLICT")
    _refuse_failed(job)
    result = job["result"]
    return Exported(
        job_id,
        str(result["fileName"]),
        int(result["rows"]),
        number_of(result["bytes"]),
        int(result["truncated"]),
        int(result["faults"]),
        str(result["expiresAt"]),
        job["downloadUrl"],
    )


async def _job(client: "Client", job_id: str) -> dict[str, Any] | None:
    node: dict[str, Any] | None = (await client.execute(documents.EXPORTED, {"id": job_id}))["node"]
    return node or None


async def export(
    client: "Client",
    query: str,
    path: Path,
    *,
    variables: Mapping[str, Any],
    format: str,
    compression: str,
    new: bool,
    told: Callable[[Exporting], None],
    report: Callable[[Progress], None],
) -> Exported:
    """All rows of a query to a file, by a job. Goes on with the one that an earlier process began for the
    same query and file, unless `new`."""
    asked = [client.url, query, variables, format, compression]
    with _place(path, _digest(asked)) as place:
        if new:
            place.begin()
        try:
            job_id = await _found(client, place)
            if job_id is None:
                job_id = place.job_id = await put_export(
                    client, query, variables, format=format, compression=compression, key=place.key
                )
                place.remember()
            return await _followed(client, job_id, place, told, report)
        except (Refused, JobFailed):
            place.forget()
            raise
        except Rejected as error:
            # Before there is a job, and for good: nothing is to be gone on with.
            if place.job_id is None and error.status is not None and not may_pass(error.status):
                place.forget()
            raise


async def fetch_export(
    client: "Client",
    job_id: str,
    path: Path,
    *,
    told: Callable[[Exporting], None],
    report: Callable[[Progress], None],
) -> Exported:
    """What a job writes, or has written."""
    with _place(path, _digest([client.url, job_id])) as place:
        try:
            job = await _job(client, job_id)
            if job is None or job["state"] in ENDED:
                return await _fetched(client, job_id, place, report)
            return await _followed(client, job_id, place, told, report)
        except Rejected:
            if not place.size():
                place.forget()
            raise


def _digest(asked: list[Any]) -> str:
    return sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def _found(client: "Client", place: "_Place") -> str | None:
    """The job that an earlier process has put; None: none, or it came to nothing."""
    if place.job_id is None:
        return None  # at most its key is known, and the job is found by that
    job = await _job(client, place.job_id)
    if job is not None and (job["state"] not in ENDED or job["downloadUrl"] is not None):
        return place.job_id
    place.begin()
    return None


async def _followed(
    client: "Client",
    job_id: str,
    place: "_Place",
    told: Callable[[Exporting], None],
    report: Callable[[Progress], None],
) -> Exported:
    told(Exporting(job_id, "QUEUED"))  # as far as is known here
    async with aclosing(follow_export(client, job_id)) as steps:
        async for now in steps:
            told(now)
    return await _fetched(client, job_id, place, report)


async def _fetched(
    client: "Client", job_id: str, place: "_Place", report: Callable[[Progress], None]
) -> Exported:
    try:
        result = await export_result(client, job_id)
        await _Fetch(client, place, result, report).run()
    except Rejected as error:
        if error.code == "GONE":
            place.forget()
        raise
    place.finish()
    return result


class _Fetch:
    """Fetches what is missing of a file."""

    def __init__(
        self,
        client: "Client",
        place: "_Place",
        result: Exported,
        report: Callable[[Progress], None],
    ) -> None:
        self.client, self.place, self.result, self.report = client, place, result, report
        self.url = result.url
        self.at = place.size()
        if self.at > result.size_bytes:
            place.truncate(0)
            self.at = 0
        self.moved = 0

    async def run(self) -> None:
        size, patience, renewed = self.result.size_bytes, self.client.patience(), False
        self.tell(Step.RECEIVING)
        while self.at < size:
            before, url = self.at, self.url or await self._renew()
            try:
                await self._take(url)
                error: ClientError = Unreachable("The connection broke off.")
            except httpx.TransportError as broken:
                error = self.client.unreachable(broken)
            except Rejected as answer:
                if answer.status in LINK_GONE and not renewed:
                    renewed, self.url = True, None
                    continue
                if answer.status is None or not may_pass(answer.status):
                    raise
                error = answer
            if self.at > before:
                patience.progressed()
                renewed = False
            if self.at < size:
                await patience.wait(error)
        self.tell(Step.DONE)

    def tell(self, step: Step) -> None:
        name, size = self.place.path.name, self.result.size_bytes
        self.report(Progress(name, step, self.at, size, self.moved))

    async def _renew(self) -> str:
        self.url = (await export_result(self.client, self.result.job_id)).url
        if self.url is None:
            raise Rejected("The result of this export is not for this token.", "FORBIDDEN")
        return self.url

    async def _take(self, url: str) -> None:
        """As much as comes of what is missing; never more."""
        start, size = self.at, self.result.size_bytes
        headers = {"accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        async with self.client.http.stream("GET", checked_link(url), headers=headers) as answer:
            self.client.answered()
            if answer.status_code >= 300:
                raise failure_of(await whole(answer))
            if answer.status_code == 206:
                found = answer.headers.get("content-range", "")
                is_right = found == f"bytes {start}-{size - 1}/{size}"
            else:
                is_right = answer.status_code == 200 and not start
            if not is_right or answer.headers.get("content-encoding", "identity") != "identity":
                raise Rejected(
                    "The server answers another range than it was asked for.",
                    "RANGE_NOT_SATISFIABLE",
                )
            async for block in answer.aiter_raw(WRITE_BYTES):
                if self.at + len(block) > size:
                    raise Rejected("The server sends more than the export has.", "SIZE_MISMATCH")
                await asyncio.to_thread(write_at, self.place.descriptor, block, self.at)
                self.at += len(block)
                self.moved += len(block)
                self.tell(Step.RECEIVING)


# What is not whole yet --------------------------------------------------------------------------


class _Place:
    """Where a file is to be, what there is of it, and which job that is of."""

    def __init__(self, path: Path, asked: str, descriptor: int) -> None:
        self.path, self.asked, self.descriptor = path, asked, descriptor
        self.part, self.trail = _part(path), path.with_name(f"{path.name}.part.json")
        self.key = uuid4().hex
        self.job_id: str | None = None
        try:
            found = orjson.loads(self.trail.read_bytes())
            if found["asked"] == asked:
                self.key, self.job_id = str(found["key"]), found["job"]
                return
        except (OSError, ValueError, TypeError, KeyError):
            pass
        self.begin()

    def begin(self) -> None:
        """Anew: whatever is there is of another export."""
        self.truncate(0)
        self.key, self.job_id = uuid4().hex, None
        self.remember()

    def remember(self) -> None:
        made = self.trail.with_name(f"{self.trail.name}.{os.getpid()}")
        made.write_bytes(orjson.dumps({"asked": self.asked, "key": self.key, "job": self.job_id}))
        made.replace(self.trail)

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def truncate(self, size: int) -> None:
        os.ftruncate(self.descriptor, size)

    def finish(self) -> None:
        """It is whole: it takes its place."""
        self.part.replace(self.path)
        self.trail.unlink(missing_ok=True)

    def forget(self) -> None:
        for each in (self.part, self.trail):
            each.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextmanager
def _place(path: Path, asked: str) -> Iterator[_Place]:
    """For one process at a time."""
    if path.is_dir():
        raise Unsafe(f"{path} is a folder.")
    with _opened(_part(path)) as descriptor:
        yield _Place(path, asked, descriptor)


@contextmanager
def _opened(part: Path) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(part, flags, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise Unsafe(f"{part} is no file of its own: remove it.")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClientError(f"Another process is writing {part}.", "LOCKED") from None
        yield descriptor
    finally:
        os.close(descriptor)


# Straight ---------------------------------------------------------------------------------------


async def stream_export(
    client: "Client", query: str, variables: Mapping[str, Any], format: str
) -> AsyncGenerator[bytes, None]:
    """The rows as they are read, JSONL or CSV; whoever takes them sets the pace.

    ClientError (CUT_OFF): they broke off, and cannot be gone on with.
    """
    url = f"{client.url}/exports/stream"
    body = orjson.dumps({"query": query, "variables": variables, "format": format.lower()})
    headers = {**client.authorized(url), "content-type": "application/json"}
    patience = client.patience()
    while True:
        has_begun = False
        try:
            async with client.http.stream("POST", url, headers=headers, content=body) as answer:
                client.answered()
                if answer.status_code != 200:
                    raise failure_of(await whole(answer))
                if answer.headers.get("content-type", "").partition(";")[0] not in ROWS:
                    raise Rejected(
                        "What answers there is no server of modelharbor.", "NO_SERVER", status=200
                    )
                has_begun = True
                async for block in answer.aiter_bytes():
                    yield block
                return
        except (httpx.TransportError, httpx.DecodingError) as broken:
            if has_begun:
                raise ClientError(
                    "The rows broke off before the last one: a list in them was longer than 1,000 rows, or the server stopped. An export as a job counts such lists, and goes on by itself.",
                    "CUT_OFF",
                ) from None
            error: ClientError = client.unreachable(broken)
        except Rejected as answer_:
            if answer_.status is None or not may_pass(answer_.status):
                raise
            error = answer_
        await patience.wait(error)


async def stream_to(
    client: "Client",
    query: str,
    path: Path,
    *,
    variables: Mapping[str, Any],
    format: str,
    report: Callable[[int], None],
) -> int:
    """The same to a file, which is there when it is whole; answers its bytes."""
    part, size = _part(path), 0
    with _opened(part) as descriptor:
        os.ftruncate(descriptor, 0)
        try:
            async with aclosing(stream_export(client, query, variables, format)) as blocks:
                async for block in blocks:
                    await asyncio.to_thread(write_at, descriptor, block, size)
                    size += len(block)
                    report(size)
        except BaseException:
            with suppress(FileNotFoundError):
                part.unlink()
            raise
        part.replace(path)
    return size
