"""Incoming bytes on local disk: a segment is a file, and may be the final object as it is."""

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from uuid import uuid4

import obstore
from obstore.store import LocalStore

from modelharbor.db.uploads import Segment
from modelharbor.errors import HarborError

from .failures import answering, failed, not_whole
from .incoming import INCOMING, Hash, Incoming, Left, SegmentWriter
from .settling import settled

P = ParamSpec("P")
T = TypeVar("T")
# Bytes that a thread hashes and writes at a time. A writer has two such pieces: one is filled while the
# other is written. Each is a few waits for the interpreter, so small ones are slow.
PIECE: Final = 1024 * 1024
FIRST: Final = 64 * 1024  # bytes of the first piece: there may be hundreds of small files at once
READ: Final = 4 * 1024 * 1024  # bytes that are read and hashed at a time
THREADS: Final = 16  # that wait for the disk at once
# Another may remove an empty folder before the file is in it.
OPEN_ATTEMPTS: Final = 10


class FolderIncoming(Incoming):
    def __init__(self, store: LocalStore, folder: Path) -> None:
        self._store, self._folder = store, folder
        self._threads = ThreadPoolExecutor(THREADS, "incoming")

    async def run(self, function: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        """In a thread. Who is cancelled waits for its end: it uses what would be closed then."""
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: function(*given, **named)
        )
        await settled(work)
        return work.result()

    @asynccontextmanager
    async def writer(
        self, key: str, at: int, hasher: Hash | None = None
    ) -> AsyncIterator[SegmentWriter]:
        with answering(key):
            writer = await self._writer(self._path(key), at, hasher)
        try:
            yield writer
        finally:
            await writer.end()

    async def _writer(self, path: Path, at: int, hasher: Hash | None) -> "_FileWriter":
        writer = _FileWriter(self, path, at, hasher)
        try:
            await self.run(writer.open)
        except BaseException:
            await writer.end()
            raise
        return writer

    async def delete(self, key: str) -> None:
        with answering(key):
            await self.run(_remove, self._path(key))

    def final_key(self, segments: Sequence[Segment]) -> str | None:
        filled = [segment for segment in segments if segment.size_bytes]
        return filled[0].key if len(filled) == 1 else None

    async def compose(
        self,
        segments: Sequence[Segment],
        key: str,
        report: Callable[[int], None] | None = None,
    ) -> str:
        path, size = self._path(key), sum(segment.size_bytes for segment in segments)
        with answering(key):
            if await self.run(_size, path) == size:
                return await self.digest(key, size, report)
            # Below `incoming/`, where it is found should this process end before it has its name.
            unfinished = path.with_name(f"{path.name}.{uuid4().hex}")
            copy = await self._writer(unfinished, 0, seen := sha256())
            try:
                await self._copy(segments, copy, report)
                await copy.flush()
                await self.run(_rename, unfinished, path)
            except BaseException:
                await self.run(unfinished.unlink, missing_ok=True)
                raise
            finally:
                await copy.end()
        return seen.hexdigest()

    async def _copy(
        self,
        segments: Sequence[Segment],
        copy: SegmentWriter,
        report: Callable[[int], None] | None,
    ) -> None:
        for segment in segments:
            async with aclosing(self._pieces(segment)) as pieces:
                async for piece in pieces:
                    await copy.write(piece)
                    if report is not None:
                        report(len(piece))

    async def _pieces(self, segment: Segment) -> AsyncGenerator[bytes, None]:
        if not segment.size_bytes:
            return
        at = 0
        with await self._opened(segment.key) as source:
            while at < segment.size_bytes:
                wanted = min(READ, segment.size_bytes - at)
                piece = await self.run(os.pread, source.fileno(), wanted, at)
                if not piece:
                    raise not_whole(segment.key, segment.size_bytes, at)
                yield piece
                at += len(piece)

    async def digest(self, key: str, size: int, report: Callable[[int], None] | None = None) -> str:
        seen, at = sha256(), 0
        buffer = memoryview(bytearray(min(READ, max(1, size))))
        with answering(key), await self._opened(key) as source:
            has = os.fstat(source.fileno()).st_size
            if has != size:
                raise not_whole(key, size, has)
            while count := await self.run(_hash_next, source, buffer, seen):
                at += count
                if report is not None:
                    report(count)
        if at != size:
            raise not_whole(key, size, at)
        return seen.hexdigest()

    async def _opened(self, key: str) -> FileIO:
        path, opened = self._path(key), list[FileIO]()
        try:
            await self.run(lambda: opened.append(FileIO(path, opener=_regular)))
        except asyncio.CancelledError:
            for file in opened:  # by the thread, when nobody waited for it any more
                file.close()
            raise
        return opened[0]

    async def listed(self) -> AsyncIterator[Left]:
        with answering(INCOMING):
            async for batch in obstore.list(self._store, INCOMING):
                for found in batch:
                    yield Left(found["path"], found["last_modified"], found["size"])

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    def _path(self, key: str) -> Path:
        return self._folder / key


class _FileWriter(SegmentWriter):
    """Pieces are written in order, each by a thread, while the next one is filled."""

    def __init__(self, incoming: FolderIncoming, path: Path, at: int, hasher: Hash | None) -> None:
        self.size = at
        self._incoming, self._path, self._hasher = incoming, path, hasher
        self._descriptor = -1
        self._is_new, self._begun, self._flushed = at == 0, at, at
        self._filling: memoryview | None = None
        self._spare: memoryview | None = None
        self._filled = 0
        self._order = asyncio.Lock()
        self._writing: asyncio.Future[None] | None = None
        self._syncing: set[asyncio.Future[None]] = set()
        self._failure: HarborError | None = None

    async def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            self._refuse_failed()
            if self._filling is None:
                size = PIECE if self.size > self._begun else min(FIRST, PIECE)
                self._filling, self._spare = self._spare or memoryview(bytearray(size)), None
            if self._filled == len(self._filling):
                await self._hand_over()
                continue  # more may have been written meanwhile
            part = left[: len(self._filling) - self._filled]
            self._filling[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.size += len(part)
            left = left[len(part) :]

    async def flush(self) -> int:
        size = await self._hand_over()
        if (writing := self._writing) is not None:
            await asyncio.wait([writing])
            writing.result()
        self._refuse_failed()
        if self._is_new or size > self._flushed:
            sync = asyncio.ensure_future(self._attempt(self._sync))
            self._syncing.add(sync)
            sync.add_done_callback(self._syncing.discard)
            await asyncio.wait([sync])
            sync.result()
            self._refuse_failed()
            self._is_new, self._flushed = False, max(self._flushed, size)
        return size

    async def end(self) -> None:
        try:
            await settled(self._writing, *self._syncing)
        finally:
            await self._incoming.run(self._close)

    async def _hand_over(self) -> int:
        """Let a thread write what is filled, once it is done with the piece before. How many bytes are
        written when it has ended."""
        async with self._order:
            if self._writing is not None:
                await asyncio.wait([self._writing])
                self._writing.result()
            self._refuse_failed()
            if self._filling is not None:
                piece, at = self._filling[: self._filled], self.size - self._filled
                whole, self._filling, self._filled = self._filling, None, 0
                self._writing = asyncio.ensure_future(self._put(piece, at, whole))
            return self.size

    async def _put(self, piece: memoryview, at: int, whole: memoryview) -> None:
        await self._attempt(self._write, piece, at)
        if len(whole) == PIECE:
            self._spare = whole

    async def _attempt(self, work: Callable[P, None], *given: P.args, **named: P.kwargs) -> None:
        try:
            await self._incoming.run(work, *given, **named)
        except OSError as error:
            self._failure = self._failure or failed(self._path.name, error)

    def _refuse_failed(self) -> None:
        if self._failure is not None:
            raise self._failure

    # In threads:

    def open(self) -> None:
        self._descriptor = _open_to_write(self._path, is_new=self._is_new)
        has = os.fstat(self._descriptor).st_size
        if has < self.size:
            raise not_whole(str(self._path), self.size, has)
        if has > self.size:
            os.ftruncate(self._descriptor, self.size)

    def _write(self, piece: memoryview, at: int) -> None:
        if self._hasher is not None:
            self._hasher.update(piece)
        while piece:
            count = os.pwrite(self._descriptor, piece, at)
            piece, at = piece[count:], at + count

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        if self._is_new:
            # The file, the upload's folder and the one of all have to be found after a power cut.
            for folder in (self._path.parent, *self._path.parents[1:3]):
                _sync_folder(folder)

    def _close(self) -> None:
        if self._descriptor < 0:
            return
        with suppress(OSError):  # what lies beyond counts for nothing, but would take up room
            if os.fstat(self._descriptor).st_size > self._flushed:
                os.ftruncate(self._descriptor, self._flushed)
        os.close(self._descriptor)


def _open_to_write(path: Path, *, is_new: bool) -> int:
    flags = os.O_RDWR | (os.O_CREAT if is_new else 0)
    for attempt in range(OPEN_ATTEMPTS):
        try:
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
            return _regular(str(path), flags)
        except FileNotFoundError:
            if not is_new or attempt == OPEN_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _regular(path: str, flags: int) -> int:
    """Neither a link nor a pipe, whoever has put it there."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "This is no file", path)
    return descriptor


def _hash_next(source: FileIO, buffer: memoryview, seen: Hash) -> int:
    count: int = source.readinto(buffer)
    seen.update(buffer[:count])
    return count


def _size(path: Path) -> int | None:
    try:
        return path.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return None


def _rename(path: Path, final: Path) -> None:
    path.rename(final)
    _sync_folder(final.parent)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):  # others are in it, or there is none
        path.parent.rmdir()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
