"""Versions come to a folder: several ranges at once, resumed, and verified.

A file is written beside its place, in pieces; which ones are whole stands in a small file next to it.
Both are found again by a process that comes after one that was killed. When the SHA-256 is right,
the file takes its place in one step.
"""

import asyncio
import fcntl
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin

import httpx

from .answers import failure_of, whole
from .failures import Changed, ClientError, Damaged, Rejected, Unreachable, Unsafe
from .folders import Target, safe_parts
from .hashing import STEP_BYTES, hash_range
from .patience import may_pass
from .records import File, Progress, Step, Transferred, Version
from .together import together

if TYPE_CHECKING:
    from .client import Client

PIECE_BYTES: Final = 16 * 1024 * 1024
WRITE_BYTES: Final = 1024 * 1024  # given to a thread at once
MOST_PIECES_AT_ONCE: Final = 64  # of one file; `parallel` bounds the connections of all
MOST_REDIRECTS: Final = 3
MOST_PIECES: Final = 1_000_000  # of one file: 16 TiB, whatever a server says
LINK_GONE: Final = frozenset({401, 403, 404})
"""What a link is answered with when its time has passed."""
MINE: Final = ".modelharbor-"
"""How names of files begin that are not whole yet."""


async def download(
    client: "Client",
    version: Version,
    folder: Path,
    *,
    include: Sequence[str] = (),
    parallel: int = 4,
    report: Callable[[Progress], None],
) -> Transferred:
    """Those of its files that `include` names (all without), below the folder; what is there already
    with the right contents is left as it is.

    Damaged: the server sent contents of another hash, twice. Unsafe: a path that would lead out of the
    folder, or through a link in it. Rejected (NOT_FOUND): `include` names no file.
    """
    target = Target(folder)
    try:
        fetching = _Fetching(client, target, asyncio.Semaphore(parallel), report)
        await fetching.all(_chosen(client, version, include), parallel)
    finally:
        target.close()
    if not fetching.files:
        what = " and ".join(include) or "a file"
        raise Rejected(f"{version.reference} has nothing that is named {what}.", "NOT_FOUND")
    return Transferred(
        fetching.files, fetching.size_bytes, fetching.moved_bytes, fetching.skipped_files
    )


async def _chosen(
    client: "Client", version: Version, include: Sequence[str]
) -> AsyncGenerator[File, None]:
    async with aclosing(client.files(version.id, links=True)) as files:
        async for file in files:
            if is_included(file.path, include):
                yield file


def is_included(path: str, patterns: Sequence[str]) -> bool:
    """`*` stands for any characters, `/` among them; a pattern with `/` at its end is a folder."""
    return not patterns or any(
        fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern)
        for pattern in patterns
    )


@dataclass
class _Fetching:
    client: "Client"
    target: Target
    connections: asyncio.Semaphore
    report: Callable[[Progress], None]
    files: int = 0
    size_bytes: int = 0
    moved_bytes: int = 0
    skipped_files: int = 0
    seen: set[str] = field(default_factory=set)

    async def all(self, files: AsyncIterator[File], parallel: int) -> None:
        """So many files at once; the first failure ends the others."""
        turn = asyncio.Lock()

        async def work() -> None:
            while True:
                async with turn:
                    try:
                        file = await anext(files)
                    except StopAsyncIteration:
                        return
                if file.path in self.seen:
                    raise Unsafe(f"The server names {file.path!r} twice.")
                self.seen.add(file.path)
                await self.one(file)
                self.files += 1
                self.size_bytes += file.size_bytes

        await together([work() for _ in range(parallel)])

    async def one(self, file: File) -> None:
        parts = safe_parts(file.path)
        with self.target.parent(parts) as parent:
            if await self._is_there(parent, parts[-1], file):
                self.skipped_files += 1
                self.report(Progress(file.path, Step.DONE, file.size_bytes, file.size_bytes))
                return
            with _part(parent, file) as part:
                moved = await self._filled(part, file)
                try:
                    os.rename(part.name, parts[-1], src_dir_fd=parent, dst_dir_fd=parent)
                except IsADirectoryError:
                    raise Unsafe(f"{file.path} is a folder here: remove it.") from None
                part.forget()
        self.report(Progress(file.path, Step.DONE, file.size_bytes, file.size_bytes, moved))

    async def _is_there(self, parent: int, name: str, file: File) -> bool:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=parent)
        except OSError:
            return False
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != file.size_bytes:
                return False
            digest, at = sha256(), 0
            while at < file.size_bytes:
                end = min(at + STEP_BYTES, file.size_bytes)
                if await asyncio.to_thread(hash_range, descriptor, digest, at, end) != end:
                    return False
                at = end
                self.report(Progress(file.path, Step.HASHING, at, file.size_bytes))
            return digest.hexdigest() == file.sha256
        finally:
            os.close(descriptor)

    async def _filled(self, part: "_Part", file: File) -> int:
        """Bytes that came over the network. Damaged: what came is not what was promised."""
        was_there = part.has_some()
        filling = _Filling(self, part, file)
        if await filling.run() == file.sha256:
            return filling.moved
        if not was_there:
            part.forget()
            raise Damaged(f"{file.path} came with other contents than its SHA-256 says.")
        part.empty()  # of an earlier process: the disk may have kept something else
        anew = _Filling(self, part, file, filling.moved)
        if await anew.run() != file.sha256:
            part.forget()
            raise Damaged(f"{file.path} came with other contents than its SHA-256 says.")
        return anew.moved


# What is not whole yet --------------------------------------------------------------------------


class _Part:
    """A file to be, and the list of its pieces that are whole: a byte for each."""

    def __init__(self, parent: int, file: File) -> None:
        key = sha256(f"{file.path}\n{file.sha256}\n{PIECE_BYTES}".encode()).hexdigest()[:32]
        self.parent, self.name = parent, f"{MINE}{key}.part"
        self.map_name = f"{MINE}{key}.map"
        self.size_bytes = file.size_bytes
        self.count = max(1, -(-file.size_bytes // PIECE_BYTES))
        if self.count > MOST_PIECES:
            raise Rejected(f"{file.path} is too large to be a file.", "BAD_ANSWER")
        self.descriptor = self._open(self.name, file.path)
        try:
            self.map = self._open(self.map_name, file.path)
        except BaseException:
            os.close(self.descriptor)
            raise
        if os.fstat(self.map).st_size != self.count:
            os.ftruncate(self.map, 0)
            os.ftruncate(self.map, self.count)

    def _open(self, name: str, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        while True:
            try:
                descriptor = os.open(name, flags, 0o666, dir_fd=self.parent)
            except OSError as error:
                raise Unsafe(f"{name}, for {path}, cannot be used: {error.strerror}.") from None
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                    raise Unsafe(f"{name}, for {path}, is no file of its own: remove it.")
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ClientError(
                        f"Another process is fetching {path} into this folder.", "LOCKED"
                    ) from None
                with suppress(FileNotFoundError):
                    if os.stat(name, dir_fd=self.parent, follow_symlinks=False).st_ino == (
                        status.st_ino
                    ):
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # another process has just finished it

    def close(self) -> None:
        os.close(self.map)
        os.close(self.descriptor)

    def bounds(self, number: int) -> tuple[int, int]:
        start = number * PIECE_BYTES
        return start, min(start + PIECE_BYTES, self.size_bytes)

    def whole(self) -> list[bool]:
        return [mark == 1 for mark in os.pread(self.map, self.count, 0)]

    def has_some(self) -> bool:
        return any(self.whole())

    def mark(self, number: int) -> None:
        os.pwrite(self.map, b"\1", number)

    def empty(self) -> None:
        os.ftruncate(self.map, 0)
        os.ftruncate(self.map, self.count)

    def finish(self) -> None:
        """Nothing behind the end: an earlier process may have been told another length."""
        os.ftruncate(self.descriptor, self.size_bytes)

    def forget(self) -> None:
        for name in (self.name, self.map_name):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.parent)


@contextmanager
def _part(parent: int, file: File) -> Iterator[_Part]:
    part = _Part(parent, file)
    try:
        yield part
    finally:
        part.close()


# The pieces of one file -------------------------------------------------------------------------


class _Filling:
    """Fetches what is missing, and hashes behind it in order."""

    def __init__(self, fetching: _Fetching, part: _Part, file: File, moved: int = 0) -> None:
        self.fetching, self.client = fetching, fetching.client
        self.part, self.file, self.moved = part, file, moved
        self.url = file.url
        self.done = 0

    async def run(self) -> str:
        """The SHA-256 of all of it."""
        whole = self.part.whole()
        ready = [asyncio.Event() for _ in whole]
        missing = []
        for number, is_whole in enumerate(whole):
            if is_whole:
                ready[number].set()
                start, end = self.part.bounds(number)
                self.done += end - start
            else:
                missing.append(number)
        self._tell()
        waiting = iter(missing)

        async def fetch() -> None:
            # Several of these share one iterator: each takes the next piece when it is done with one.
            for number in waiting:
                await self._piece(number)
                self.part.mark(number)
                ready[number].set()

        digest = sha256()

        async def follow() -> None:
            for number, event in enumerate(ready):
                await event.wait()
                start, end = self.part.bounds(number)
                at = await asyncio.to_thread(hash_range, self.part.descriptor, digest, start, end)
                if at != end:  # shorter than its map says: its hash is wrong as well
                    return

        workers = min(len(missing), MOST_PIECES_AT_ONCE)
        await together([follow(), *(fetch() for _ in range(workers))])
        self.part.finish()
        return digest.hexdigest()

    def _tell(self) -> None:
        self.fetching.report(
            Progress(self.file.path, Step.RECEIVING, self.done, self.file.size_bytes, self.moved)
        )

    async def _piece(self, number: int) -> None:
        """Fetch one; after a connection broke off, from where it had come to."""
        at, end = self.part.bounds(number)
        patience, renewed = self.client.patience(), False
        while at < end:
            before, url = at, self.url or await self._renew()
            try:
                async with self.fetching.connections, aclosing(self._range(url, at, end)) as blocks:
                    async for block in blocks:
                        await asyncio.to_thread(write_at, self.part.descriptor, block, at)
                        at += len(block)
                        self.done += len(block)
                        self.moved += len(block)
                        self.fetching.moved_bytes += len(block)
                        self._tell()
                error: ClientError = Unreachable("The connection broke off.")
            except httpx.InvalidURL:  # of a redirect, which is made ready though it is not followed
                raise _no_link() from None
            except httpx.TransportError as broken:
                error = self.client.unreachable(broken)
            except Rejected as answer:
                if answer.status in LINK_GONE and not renewed:
                    renewed = True
                    if self.url == url:  # another piece may have renewed it
                        self.url = None
                    continue
                if answer.status is None or not may_pass(answer.status):
                    raise
                error = answer
            if at > before:
                patience.progressed()
                renewed = False
            if at < end:
                await patience.wait(error)

    async def _renew(self) -> str:
        self.url = await self.client.link(self.file.id)
        if self.url is None:
            raise Rejected(f"{self.file.path} may not be downloaded with this token.", "FORBIDDEN")
        return self.url

    async def _range(self, url: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Its bytes, or fewer of them; never more. A link is followed with nothing that is secret."""
        file = self.file
        is_whole = (start, end) == (0, file.size_bytes)
        headers = {"accept-encoding": "identity"}
        if not is_whole:
            headers["range"] = f"bytes={start}-{end - 1}"
        for _ in range(MOST_REDIRECTS):
            async with self.client.http.stream("GET", checked_link(url), headers=headers) as answer:
                self.client.answered()
                if answer.has_redirect_location:
                    url = checked_link(answer.headers["location"], url)
                    continue
                if answer.status_code == 412:
                    raise Changed(f"{file.path} is another file on the server now.")
                if answer.status_code >= 300:
                    raise failure_of(await whole(answer))
                found = answer.headers.get("content-range", "")
                if answer.status_code == 206:
                    is_right = found.startswith(f"bytes {start}-{end - 1}/")
                else:
                    is_right = is_whole and answer.status_code == 200
                if not is_right or "content-encoding" in answer.headers:
                    raise Rejected(
                        f"The server answers another range of {file.path} than it was asked for.",
                        "RANGE_NOT_SATISFIABLE",
                    )
                left = end - start
                async for block in answer.aiter_raw(WRITE_BYTES):
                    if len(block) > left:
                        raise Rejected(
                            f"The server sends more of {file.path} than it has.", "SIZE_MISMATCH"
                        )
                    left -= len(block)
                    yield block
                return
        raise Rejected(f"The link to {file.path} leads nowhere.", "NOT_FOUND")


def checked_link(given: object, base: str = "") -> str:
    """Rejected: it is no address that contents are fetched from."""
    try:
        url = urljoin(base, given) if isinstance(given, str) else ""
        parts = httpx.URL(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.host)
        is_good = is_good and 0 < (parts.port or 80) < 65_536
    except (httpx.InvalidURL, ValueError):
        is_good = False
    if not is_good:
        raise _no_link()
    return url


def _no_link() -> Rejected:
    return Rejected("The server names an address that is none.", "BAD_ANSWER")


def write_at(descriptor: int, data: bytes, at: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count
