"""Contents of files, each under its SHA-256: on local disk, in S3 and its like."""

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from modelharbor.errors import NotStored, Unavailable
from modelharbor.settings import Settings

log = logging.getLogger(__name__)
PART: Final = 4 * 1024 * 1024  # bytes read, hashed and written at a time
PARTS_AT_ONCE: Final = 4  # that wait to be written: what one upload may hold in memory
SMALL: Final = 64 * 1024  # bytes; hashed where they are, the event loop does not feel it
READ_AT_ONCE: Final = 256 * 1024  # bytes that a download takes from the store at a time


class ContentChanged(Exception):
    """A file no longer has the contents that were announced; nothing was stored."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(f"{path} changed while it was read.")


class BlobStore:
    """Contents by hash. Nothing under a final name is ever half written, whoever writes at once."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def put_file(
        self, path: Path, digest: str, report: Callable[[int], None] | None = None
    ) -> None:
        """Store a file's contents under their SHA-256; `report` gets the bytes of each part.

        The bytes are hashed once more on their way, for a wrong blob would be shared by every
        later file with this hash. ContentChanged when they differ.
        """
        key = _key(digest)
        small = await asyncio.to_thread(_read_small, path)
        if small is not None:
            if sha256(small).hexdigest() != digest:
                raise ContentChanged(path)
            await obstore.put_async(self._store, key, small, use_multipart=False)
            if report is not None:
                report(len(small))
        else:
            with await _opened(path) as source:
                await obstore.put_async(
                    self._store,
                    key,
                    _verified(source, path, digest, report),
                    chunk_size=PART,
                    max_concurrency=PARTS_AT_ONCE,
                )
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            await asyncio.to_thread(_to_disk, self._store.prefix / key)

    async def exists(self, digest: str) -> bool:
        """Unavailable when the store does not answer."""
        try:
            with _answering(digest):
                await obstore.head_async(self._store, _key(digest))
        except NotStored:
            return False
        return True

    async def open_range(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `end` (not included).

        NotStored when they are not there, Unavailable when the store does not answer: both before
        the first byte.
        """
        key = _key(digest)
        with _answering(digest):
            if start == end:  # stores refuse an empty range
                await obstore.head_async(self._store, key)
                return _nothing()
            found = await obstore.get_async(self._store, key, options={"range": (start, end)})
        if tuple(found.range) != (start, end):
            log.error(
                "storage.damaged sha256=%s wanted=%s-%s has=%s", digest, start, end, found.range
            )
            raise NotStored("The contents of this file are not whole here.")
        return aiter(found.stream(READ_AT_ONCE))

    async def delete(self, digest: str) -> None:
        """Remove contents; those that are not there are as good as removed."""
        try:
            await obstore.delete_async(self._store, _key(digest))
        except FileNotFoundError:
            return

    async def check(self) -> None:
        """Write and remove a small object; raises what the store says when it cannot."""
        key = f"check/{uuid4().hex}"
        await obstore.put_async(self._store, key, b"modelharbor")
        await obstore.delete_async(self._store, key)


@asynccontextmanager
async def open_storage(settings: Settings) -> AsyncIterator[BlobStore]:
    """The store of `storage_url`, else `blobs` below the data folder.

    Stores in a cloud take their credentials from their usual environment variables.
    """
    if settings.storage_url is None:
        folder = settings.data_path / "blobs"
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        yield BlobStore(LocalStore(folder.absolute()))
    elif settings.storage_url.startswith("file:"):
        yield BlobStore(LocalStore.from_url(settings.storage_url, mkdir=True))
    else:
        yield BlobStore(from_url(settings.storage_url))


@contextmanager
def _answering(digest: str) -> Iterator[None]:
    """What the store raises, in our words."""
    try:
        yield
    except FileNotFoundError:
        raise NotStored("The contents of this file are not stored here.") from None
    except (BaseError, OSError) as error:
        log.exception("storage.unreadable sha256=%s", digest)
        raise Unavailable("The file storage does not answer; try again later.") from error


def _key(digest: str) -> str:
    # Two levels of folders: file systems slow down with millions of names in one.
    return f"sha256/{digest[:2]}/{digest[2:4]}/{digest}"


def _open(path: Path) -> BinaryIO:
    """ContentChanged where there is a pipe or a device by now: who reads one may wait for ever."""
    return open(path, "rb", opener=_regular)


def _regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ContentChanged(path)
    return descriptor


def _read_small(path: Path) -> bytes | None:
    """The contents of a file that is small enough to be put in one go, as thousands in a folder are."""
    with _open(path) as source:
        contents = source.read(SMALL + 1)
    return contents if len(contents) <= SMALL else None


async def _opened(path: Path) -> BinaryIO:
    """Who is cancelled meanwhile leaves nothing open: the thread goes on to its end."""
    opening = asyncio.ensure_future(asyncio.to_thread(_open, path))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        with suppress(OSError):
            (await opening).close()
        raise


async def _verified(
    source: BinaryIO, path: Path, digest: str, report: Callable[[int], None] | None
) -> AsyncIterator[bytes]:
    seen = sha256()

    def read() -> bytes:
        part = source.read(PART)
        seen.update(part)
        return part

    while part := await asyncio.to_thread(read):
        yield part
        if report is not None:
            report(len(part))
    if seen.hexdigest() != digest:
        raise ContentChanged(path)  # before the end: the store throws away what it has


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""  # makes this a generator


def _to_disk(path: Path) -> None:
    """Only now may a document say that it is stored: a power cut takes what the disk has not got."""
    for what in (path, path.parent):
        descriptor = os.open(what, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
