"""Contents of files, on local disk, in S3 and its like: each an object that is found by its key.

What is put here by a hash lies under that; what was uploaded stays where it arrived (incoming.py).
"""

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

import obstore
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store, from_url

from modelharbor.db.base import Row
from modelharbor.errors import NotStored
from modelharbor.settings import Settings

from .chunks import ATTRIBUTES, PARTS_AT_ONCE, ChunkIncoming, part_size
from .failures import answering, not_whole
from .folders import FolderIncoming
from .incoming import INCOMING, Incoming
from .streams import streamed

PART: Final = 4 * 1024 * 1024  # bytes read and hashed at a time
SMALL: Final = 64 * 1024  # bytes; hashed where they are, the event loop does not feel it
SIGNING: Final = (S3Store, GCSStore, AzureStore)
READ_AT_ONCE: Final = 256 * 1024  # bytes that a download takes from the store at a time


class ContentChanged(Exception):
    """A file no longer has the contents that were announced; nothing was stored."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(f"{path} changed while it was read.")


def digest_key(digest: str) -> str:
    """Where contents lie that were put by their SHA-256."""
    # Two levels of folders: file systems slow down with millions of names in one.
    return f"sha256/{digest[:2]}/{digest[2:4]}/{digest}"


def blob_key(row: Row) -> str:
    """Where the contents of a row of `blobs` lie, when they are stored."""
    key: str = row.get("key") or digest_key(row["sha256"])
    return key


class BlobStore:
    """Objects by key. Nothing that was put by its hash is ever half written, whoever writes at once."""

    incoming: Incoming

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._folder = store.prefix if isinstance(store, LocalStore) else None
        self.incoming = (
            FolderIncoming(store, self._folder)
            if isinstance(store, LocalStore) and self._folder is not None
            else ChunkIncoming(store)
        )

    async def put_file(
        self, path: Path, digest: str, report: Callable[[int], None] | None = None
    ) -> None:
        """Store a file's contents under their SHA-256; `report` gets the bytes of each part.

        The bytes are hashed once more on their way, for a wrong blob would be shared by every
        later file with this hash. ContentChanged when they differ.
        """
        key = digest_key(digest)
        attributes = None if isinstance(self._store, LocalStore) else ATTRIBUTES
        small = await asyncio.to_thread(_read_small, path)
        if small is not None:
            if sha256(small).hexdigest() != digest:
                raise ContentChanged(path)
            await obstore.put_async(
                self._store, key, small, attributes=attributes, use_multipart=False
            )
            if report is not None:
                report(len(small))
        else:
            with await _opened(path) as source:
                await obstore.put_async(
                    self._store,
                    key,
                    _verified(source, path, digest, report),
                    attributes=attributes,
                    chunk_size=part_size(os.fstat(source.fileno()).st_size),
                    max_concurrency=PARTS_AT_ONCE,
                )
        if self._folder is not None:
            await asyncio.to_thread(_to_disk, self._folder / key)

    async def put(self, key: str, contents: bytes | AsyncIterator[bytes]) -> None:
        """Store bytes under a key of their own, whole or not at all; what comes by and by is never in
        memory all at once. Durable when it answers. InsufficientStorage, Unavailable."""
        attributes = None if isinstance(self._store, LocalStore) else ATTRIBUTES
        with answering(key):
            if isinstance(contents, bytes):
                await obstore.put_async(
                    self._store, key, contents, attributes=attributes, use_multipart=False
                )
            else:
                await obstore.put_async(
                    self._store, key, contents, attributes=attributes, max_concurrency=PARTS_AT_ONCE
                )
            if self._folder is not None:
                await asyncio.to_thread(_to_disk, self._folder / key)

    async def listed(self, folder: str) -> AsyncGenerator[str, None]:
        """Keys of all objects below a folder, in no order."""
        with answering(folder):
            async for batch in obstore.list(self._store, folder):
                for each in batch:
                    yield each["path"]

    async def folders(self, folder: str) -> list[str]:
        """Names of the folders within one."""
        with answering(folder):
            found = await obstore.list_with_delimiter_async(self._store, folder)
        return [each.rpartition("/")[2] for each in found["common_prefixes"]]

    async def remove_folder(self, folder: str) -> None:
        """An empty one, in stores that have such; others and fuller ones stay."""
        if self._folder is not None:
            with suppress(OSError):
                await asyncio.to_thread((self._folder / folder).rmdir)

    async def remove_unfinished(self, folder: str, is_old: Callable[[str], bool]) -> None:
        """What somebody who was killed had not put whole yet, in stores that have files of such: by the
        name that it was to have. Listings do not show it."""
        if self._folder is not None:
            await asyncio.to_thread(_remove_unfinished, self._folder / folder, is_old)

    async def exists(self, key: str) -> bool:
        """Unavailable when the store does not answer."""
        try:
            with answering(key):
                await obstore.head_async(self._store, key)
        except NotStored:
            return False
        return True

    async def open_range(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` up to `end` (not included).

        NotStored when they are not there, Unavailable when the store does not answer: both before
        the first byte.
        """
        with answering(key):
            if start == end:  # stores refuse an empty range
                await obstore.head_async(self._store, key)
                return _nothing()
            found = await obstore.get_async(self._store, key, options={"range": (start, end)})
        if tuple(found.range) != (start, end):
            raise not_whole(key, (start, end), found.range)
        return streamed(self._store, key, found, READ_AT_ONCE)

    async def read_range(self, key: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end` (not included), at once: the caller keeps it bounded.
        NotStored, Unavailable."""
        if start == end:
            return b""
        with answering(key):
            found = await obstore.get_range_async(self._store, key, start=start, end=end)
        if len(found) != end - start:
            raise not_whole(key, (start, end), len(found))
        return found.to_bytes()

    async def delete(self, key: str) -> None:
        """Remove an object; one that is not there is as good as removed."""
        if key.startswith(f"{INCOMING}/") and self._folder is not None:
            await self.incoming.delete(key)  # with the upload's folder
            return
        with suppress(FileNotFoundError):
            await obstore.delete_async(self._store, key)

    @property
    def presigns(self) -> bool:
        """Whether the store gives objects to whoever has an address that we signed."""
        return isinstance(self._store, SIGNING)

    async def presigned(self, key: str, expires_in: timedelta) -> str | None:
        """An address where the store itself gives the object to whoever has it; None: it does not.

        The store answers with `Content-Disposition: attachment`, without a name.
        """
        store = self._store
        if not isinstance(store, SIGNING):
            return None
        with answering(key):
            url: str = await obstore.sign_async(store, "GET", key, expires_in)
        return url

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
        # For this account alone: other people of the machine go through the API, as all do.
        await asyncio.to_thread(folder.mkdir, 0o700, parents=True, exist_ok=True)
        storage = BlobStore(LocalStore(folder.absolute()))
    elif settings.storage_url.startswith("file:"):
        storage = BlobStore(LocalStore.from_url(settings.storage_url, mkdir=True))
    else:
        storage = BlobStore(from_url(settings.storage_url))
    try:
        yield storage
    finally:
        await storage.incoming.close()


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


def _remove_unfinished(folder: Path, is_old: Callable[[str], bool]) -> None:
    with suppress(OSError):
        for each in list(folder.iterdir()):
            name, mark, number = each.name.rpartition("#")
            if mark and number.isdigit() and is_old(name):
                each.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Only now may a document say that it is stored: a power cut takes what the disk has not got."""
    for what in (path, path.parent):
        descriptor = os.open(what, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
