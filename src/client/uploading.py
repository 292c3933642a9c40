"""Files go to a version: hashed beside being sent, resumed, and compared with what the server has.

Small files are hashed first: the server may have their contents, and then nothing is sent. Large
ones are sent at once, while a thread hashes them; when the server turns out to have the contents,
sending ends. What was sent stays the server's to know: whoever comes after a process that was killed
asks it how far that had come.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import orjson

from . import documents, parts
from .failures import Changed, Damaged, Refused, Rejected
from .folders import opened
from .hashing import hash_file, hash_small
from .parts import Part
from .records import (
    ON_ITS_WAY,
    TAKING,
    LocalFile,
    Progress,
    Step,
    Transferred,
    Upload,
    batches,
    upload_of,
)
from .together import ended, together
from .tus import PIECE_BYTES, STUCK, Stream, create_part, join_parts, name_of

if TYPE_CHECKING:
    from .client import Client

SMALL_BYTES: Final = 8 * 1024 * 1024  # below it, a file is hashed before it is sent
SOON_BYTES: Final = 512 * 1024 * 1024  # up to it, the hash gets a start before the bytes
SOON_SECONDS: Final = 1.0
PARTED_BYTES: Final = 256 * 1024 * 1024  # from it on, a file may be sent in parts side by side
BATCH_FILES: Final = 500  # whose uploads are created together
BATCH_BYTES: Final = 400_000  # of their names, in JSON; a request has 1 MiB
HASHED_BYTES: Final = 64 * 1024 * 1024  # of small files, before what is known is sent
AHEAD: Final = 500  # uploads that wait to be sent
LOOK_SECONDS: Final = 0.2
LONGEST_LOOK_SECONDS: Final = 2.0
GONE: Final = 410
CLAIMS: Final = 3  # how often an upload is claimed beside its own bytes


async def upload_files(
    client: "Client",
    version_id: str,
    files: Sequence[LocalFile],
    *,
    uploads: Iterable[Upload],
    hashes: Mapping[str, str],
    parallel: int,
    report: Callable[[Progress], None],
) -> Transferred:
    """All of these, so many at once; with `uploads` of theirs that were begun, and hashes that are known.

    Returns when the server has made files of them, whose hashes are those of this machine. Changed: a
    file is not as it was when the folder was walked. Damaged: the server has other contents.
    """
    uploading = _Uploading(client, version_id, files, uploads, hashes, parallel, report)
    return await uploading.run()


@dataclass(slots=True, eq=False)
class _Entry:
    """A file on its way."""

    file: LocalFile
    upload: Upload | None = None
    digest: str | None = None
    done: int = 0  # bytes that the server has or is being sent
    moved: int = 0  # bytes that this process has sent
    is_ended: bool = False


class _Uploading:
    def __init__(
        self,
        client: "Client",
        version_id: str,
        files: Sequence[LocalFile],
        uploads: Iterable[Upload],
        hashes: Mapping[str, str],
        parallel: int,
        report: Callable[[Progress], None],
    ) -> None:
        self.client, self.version_id = client, version_id
        self.parallel, self.report = parallel, report
        begun = {upload.path: upload for upload in uploads}
        self.entries = [_Entry(file, begun.get(file.path), hashes.get(file.path)) for file in files]
        self.connections = asyncio.Semaphore(parallel)
        self.waiting: asyncio.Queue[_Entry | None] = asyncio.Queue(AHEAD)
        self.large = sum(entry.file.size_bytes >= SMALL_BYTES for entry in self.entries)
        """Large files that are not sent yet."""

    async def run(self) -> Transferred:
        await together([self._create(), *(self._work() for _ in range(self.parallel))])
        await self._settle()
        return Transferred(
            len(self.entries),
            sum(entry.file.size_bytes for entry in self.entries),
            sum(entry.moved for entry in self.entries),
            sum(not entry.moved for entry in self.entries),
        )

    def _tell(self, entry: _Entry, step: Step, done: int | None = None) -> None:
        at = entry.done if done is None else done
        self.report(Progress(entry.file.path, step, at, entry.file.size_bytes, entry.moved))

    # ---- uploads are created

    async def _create(self) -> None:
        """What was begun first, then large files, then small ones as they are hashed."""
        for entry in self.entries:
            if entry.upload is not None:
                await self.waiting.put(entry)
        new = [entry for entry in self.entries if entry.upload is None]
        large = [entry for entry in new if entry.file.size_bytes >= SMALL_BYTES]
        small = [entry for entry in new if entry.file.size_bytes < SMALL_BYTES]
        for batch in _batches(large):
            await self._create_uploads(batch)
            for entry in batch:
                await self.waiting.put(entry)
        for batch in _batches(small):
            await asyncio.to_thread(_hash_all, batch)
            await self._create_uploads(batch)
            for entry in batch:
                await self.waiting.put(entry)
        for _ in range(self.parallel):
            await self.waiting.put(None)

    async def _create_uploads(self, batch: Sequence[_Entry]) -> None:
        try:
            payload = await self.client.mutate(
                documents.CREATE_UPLOADS,
                {
                    "versionId": self.version_id,
                    "files": [_input(entry) for entry in batch],
                    "idempotencyKey": uuid4().hex,
                },
            )
        except Refused as error:
            raise _named(error, batch) from None
        for entry, row in zip(batch, payload["uploads"], strict=True):
            entry.upload = upload_of(row)

    # ---- bytes are sent

    async def _work(self) -> None:
        while (entry := await self.waiting.get()) is not None:
            try:
                await self._one(entry)
            except Rejected as error:
                if error.status != GONE and error.code != STUCK:
                    raise
                await self._once_more(entry)
            if entry.file.size_bytes >= SMALL_BYTES:
                self.large -= 1

    async def _once_more(self, entry: _Entry) -> None:
        """With a new upload, once: this one expired, or was ended, or holds what cannot be gone on with."""
        with suppress(Refused):  # it has ended
            await self.client.mutate(documents.ABORT_UPLOAD, {"id": _upload(entry).id}, again=True)
        parts.forget(_upload(entry).id)
        entry.done = 0
        await self._create_uploads([entry])
        await self._one(entry)

    async def _one(self, entry: _Entry) -> None:
        upload = _upload(entry)
        if upload.state in TAKING:
            if upload.sha256 is not None and await self._digest(entry) != upload.sha256:
                raise Rejected("It was begun with other contents.", STUCK)
            await self._send_and_hash(entry)
            if entry.is_ended:
                return
            upload = _upload(entry)
        elif upload.state in ON_ITS_WAY and upload.sha256 is None:
            await self._digest(entry)
            upload = await self._complete(entry)
        await self._digest(entry)
        if upload.state in ON_ITS_WAY:
            self._tell(entry, Step.VERIFYING)
        else:  # settling looks whether it is so
            self._end(entry)

    async def _digest(self, entry: _Entry) -> str:
        if entry.digest is None:
            entry.digest = await hash_file(entry.file)
        return entry.digest

    async def _send_and_hash(self, entry: _Entry) -> None:
        """Side by side. When the server has the contents, sending ends, or does not begin."""
        is_declared = _upload(entry).sha256 is not None
        hashing = asyncio.create_task(self._digest(entry))
        sending: asyncio.Task[None] | None = None
        try:
            if entry.file.size_bytes <= SOON_BYTES and not is_declared:
                await asyncio.wait({hashing}, timeout=SOON_SECONDS)
            if not hashing.done():
                sending = asyncio.create_task(self._send(entry))
                await asyncio.wait({sending, hashing}, return_when=asyncio.FIRST_COMPLETED)
            if hashing.done() and not is_declared and not (sending and sending.done()):
                await hashing
                if await self._has_it(entry):
                    self._end(entry)
                    return
            await (self._send(entry) if sending is None else sending)
            await hashing
        finally:
            await ended(hashing, *([] if sending is None else [sending]))
        if is_declared:
            return  # the server has compared it
        now = await self._complete(entry)
        if now.state == "COMPLETED":
            self._end(entry)
        entry.upload = now

    def _end(self, entry: _Entry) -> None:
        entry.is_ended = True
        self._tell(entry, Step.DONE, entry.file.size_bytes)

    async def _complete(self, entry: _Entry) -> Upload:
        payload = await self.client.mutate(
            documents.COMPLETE_UPLOAD,
            {"id": _upload(entry).id, "sha256": entry.digest},
            again=True,  # told twice it is the same
        )
        return upload_of(payload["upload"])

    async def _has_it(self, entry: _Entry) -> bool:
        """Whether the server made the file without the rest of its bytes: it has the contents."""
        for _ in range(CLAIMS):
            try:
                return (await self._complete(entry)).state == "COMPLETED"
            except Refused as error:
                if error.code == "SIZE_MISMATCH":
                    return False
                if error.code != "CONFLICT":
                    raise  # else the next piece began to be sent at this moment
        return False

    async def _send(self, entry: _Entry) -> None:
        upload, size = _upload(entry), entry.file.size_bytes
        begun = parts.recall(upload.id)
        if begun is None and size >= PARTED_BYTES and not upload.received_bytes:
            count = min(self.parallel // max(1, self.large), size // PIECE_BYTES)
            if count > 1:
                begun = await self._begin_parts(entry, count)
        if begun is None:
            is_new = upload.state == "CREATED" and not upload.received_bytes
            with opened(entry.file) as descriptor:
                whole = Part(name_of(upload.url), 0, size)
                await self._stream(entry, descriptor, whole).run(is_new=is_new)
            return
        try:
            with opened(entry.file) as descriptor:
                await together(self._stream(entry, descriptor, part).run() for part in begun)
            await join_parts(self.client, upload, begun)
        except Rejected as error:
            if error.status in (404, GONE):
                parts.forget(upload.id)
            raise
        parts.forget(upload.id)

    def _stream(self, entry: _Entry, descriptor: int, part: Part) -> Stream:
        def report(gained: int, moved: int) -> None:
            entry.done += gained
            entry.moved += moved
            self._tell(entry, Step.SENDING)

        return Stream(self.client, self.connections, entry.file.path, descriptor, part, report)

    async def _begin_parts(self, entry: _Entry, count: int) -> list[Part]:
        """Addresses for so many parts of about the same length."""
        upload, size = _upload(entry), entry.file.size_bytes
        length = -(-size // count)
        begun = []
        for start in range(0, size, length):
            end = min(start + length, size)
            name = await create_part(self.client, upload, end - start)
            begun.append(Part(name, start, end))
        parts.remember(upload.id, begun)
        return begun

    # ---- what came of it

    async def _settle(self) -> None:
        """Every file is there with the hash that it has here; for some a job has to read them first."""
        expected = {_upload(entry).path: entry for entry in self.entries}
        async with aclosing(self.client.files(self.version_id)) as files:
            async for file in files:
                entry = expected.pop(file.path, None)
                if entry is not None:
                    self._check(entry, file.sha256)
        waiting = list(expected.values())
        pause = LOOK_SECONDS
        while waiting:
            left = []
            for batch in batches(waiting, 100):
                rows = await self.client.execute(
                    documents.UPLOADS_BY_ID, {"ids": [_upload(entry).id for entry in batch]}
                )
                for entry, row in zip(batch, rows["nodes"], strict=True):
                    if not self._is_settled(entry, row):
                        left.append(entry)
            waiting = left
            if waiting:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, LONGEST_LOOK_SECONDS)

    def _is_settled(self, entry: _Entry, row: Mapping[str, Any] | None) -> bool:
        path = entry.file.path
        if row is None:
            raise Changed(f"The upload of {path} is gone: somebody has removed it.")
        now = upload_of(row)
        if now.state == "COMPLETED":
            if row["file"] is None:
                raise Changed(f"{path} was removed from the version meanwhile.")
            self._check(entry, row["file"]["sha256"])
            return True
        if now.state in ON_ITS_WAY:
            return False
        why = now.error or f"it is {now.state}"
        raise Rejected(f"The upload of {path} came to nothing: {why}", f"UPLOAD_{now.state}")

    def _check(self, entry: _Entry, sha256: str) -> None:
        if sha256 != entry.digest:
            raise Damaged(f"The server has other contents of {entry.file.path} than are here.")
        if not entry.is_ended:
            self._end(entry)


def _upload(entry: _Entry) -> Upload:
    if entry.upload is None:
        raise RuntimeError("its upload was not created yet")
    return entry.upload


def _input(entry: _Entry) -> dict[str, Any]:
    found = {"path": entry.file.path, "sizeBytes": str(entry.file.size_bytes)}
    return found if entry.digest is None else {**found, "sha256": entry.digest}


def _named(error: Refused, batch: Sequence[_Entry]) -> Refused:
    """With the name of the file that is meant, where only its place is told."""
    errors = []
    for each in error.errors:
        place = each.path[1] if len(each.path) > 1 and each.path[0] == "files" else ""
        if place.isdecimal() and int(place) < len(batch):
            name = batch[int(place)].file.path
            if repr(name) not in each.message:
                each = replace(each, message=f"{name!r}: {each.message}")
        errors.append(each)
    return Refused(errors)


def _batches(entries: Sequence[_Entry]) -> Iterator[Sequence[_Entry]]:
    """As many as one request takes; of small files no more than are hashed in a moment."""
    batch: list[_Entry] = []
    names = contents = 0
    for entry in entries:
        batch.append(entry)
        names += len(orjson.dumps(entry.file.path)) + 150
        contents += entry.file.size_bytes if entry.file.size_bytes < SMALL_BYTES else 0
        if len(batch) == BATCH_FILES or names > BATCH_BYTES or contents > HASHED_BYTES:
            yield batch
            batch, names, contents = [], 0, 0
    if batch:
        yield batch


def _hash_all(entries: Sequence[_Entry]) -> None:
    """Blocks."""
    for entry in entries:
        if entry.digest is None:
            entry.digest = hash_small(entry.file)
