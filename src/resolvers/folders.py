"""A folder on this machine, of which nobody knows who fills it: walked safely, read, hashed."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from io import RawIOBase
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Final

from modelharbor.errors import ErrorCode, Refused
from modelharbor.inspection.formats import HEAD_BYTES, role_of, sniff
from modelharbor.settings import Settings
from modelharbor.storage.blobs import PART

from .files import FileEntry
from .names import bad

MAX_FILES: Final = 100_000
MAX_PATH: Final = 1024  # characters
FILES_PER_STEP: Final = 200  # hashed between two looks at the event loop, when they are small


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the folder; `real` is where its contents are, when a link leads there: below `base`,
    by no link."""

    path: str
    base: Path
    real: Path
    size_bytes: int


# What a client may name ------------------------------------------------------------------------


def valid_folder(folder: str) -> str:
    """A path below an import root, in one form: relative, with `/`, without `.` and `..`."""
    if len(folder) > MAX_PATH:
        raise bad(f"The path is longer than {MAX_PATH} characters.", "folder")
    if not folder.isprintable() or "\\" in folder:
        raise bad("The path has characters that no folder's name has here.", "folder")
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise bad("The path must lead below the source: relative, and without '..'.", "folder")
    if _is_hidden(path):
        raise bad("Hidden folders are not imported.", "folder")
    return str(path)


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def allowed_folder(settings: Settings, source: str, folder: str) -> tuple[Path, Path]:
    """The root of an import source, and the folder below it; links followed in both. Blocks.

    Refused (`source`, `folder`) without a word about what else is on this machine.
    """
    root = settings.import_roots.get(source)
    if root is None:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such source.", "source")
    missing = bad("There is no such folder below the source.", "folder")
    try:
        root = root.resolve(strict=True)
        real = (root / valid_folder(folder)).resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        raise missing from None
    if not real.is_relative_to(root):
        raise bad("The folder is a link that leads out.", "folder")
    if not real.is_dir() or _is_hidden(real.relative_to(root)):
        raise missing
    return root, real


# The folder -------------------------------------------------------------------------------------


def walk(folder: Path, within: Path | None = None) -> list[Found]:
    """Its files in the order of their paths, without hidden ones. Blocks.

    With `within`, what is refused is told without where links lead to: to people far from this machine.

    Refused (BAD_INPUT, `folder`): links that lead out or nowhere or to folders, what is neither
    file nor folder, names that are no text, too many files, none at all.
    """
    try:
        root = folder.resolve(strict=True)
        if within is not None and not root.is_relative_to(within):
            raise bad("The folder is a link that leads out.", "folder")
        base = root if within is None else within
        waiting = [root]
        found: list[Found] = []
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                        continue
                    found.append(_file(base, root, Path(entry.path), tell=within is None))
                    if len(found) > MAX_FILES:
                        raise bad(f"The folder has over {MAX_FILES:,} files: split it.", "folder")
    except (OSError, ValueError) as error:
        reason = str(error) if within is None else _reason(error)
        raise bad(f"The folder cannot be read: {_plainly(reason)}.", "folder") from None
    if not found:
        raise bad("The folder has no files (hidden ones are left out).", "folder")
    return sorted(found, key=lambda file: file.path)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _file(base: Path, root: Path, at: Path, *, tell: bool) -> Found:
    path = at.relative_to(root).as_posix()
    shown = _plainly(path)
    if not path.isprintable() or "\\" in path:
        raise bad(
            f"The name of {shown!r} has characters that other systems refuse: rename it.", "folder"
        )
    if len(path) > MAX_PATH:
        raise bad(f"The path {shown[:80]}… is longer than {MAX_PATH} characters.", "folder")
    try:
        real = at.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        raise bad(f"{shown} is a link that leads nowhere: remove it.", "folder") from None
    if not real.is_relative_to(root):
        where = f", to {real}" if tell else ""
        raise bad(
            f"{shown} is a link out of the folder{where}: put the file in its place.", "folder"
        )
    status = real.stat()
    if stat.S_ISDIR(status.st_mode):
        raise bad(f"{shown} is a link to a folder: put the folder in its place.", "folder")
    if not stat.S_ISREG(status.st_mode):
        raise bad(f"{shown} is neither a file nor a folder: remove it.", "folder")
    return Found(path, base, real, status.st_size)


def _plainly(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


FOLDER: Final = (
    getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
)  # to go through, not to be read


def open_file(file: Found) -> int:
    """A descriptor. What became a link or a pipe since the walk, at any level below its base, is not
    followed, nor waited for. Refused (BAD_INPUT, `folder`), by its path in the folder alone."""
    *above, name = file.real.relative_to(file.base).parts
    try:
        at = os.open(file.base, FOLDER)
        try:
            for part in above:
                below = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = below
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=at)
        finally:
            os.close(at)
    except OSError as error:
        raise unreadable(file, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise bad(f"{file.path} is no longer a file.", "folder")
    return descriptor


def unreadable(file: Found, error: OSError) -> Refused:
    return bad(f"{file.path} cannot be read: {_reason(error)}.", "folder")


async def hashed(
    found: Sequence[Found], report: Callable[[int, int, str], None]
) -> AsyncIterator[FileEntry]:
    """The entry of each file, in order; `report` gets bytes done, bytes in all, and the file at hand."""
    total, done = sum(file.size_bytes for file in found), 0
    with closing(_parts(found)) as parts:
        while step := await asyncio.to_thread(_step, parts):
            for _, count, entry in step:
                done += count
                if entry is not None:
                    yield entry
            report(done, max(total, done), step[-1][0])


Part = tuple[str, int, FileEntry | None]


def _step(parts: Iterator[Part]) -> list[Part]:
    """What one visit to a thread does: a few megabytes, or some files that are small."""
    taken: list[Part] = []
    count = 0
    for part in islice(parts, FILES_PER_STEP):
        taken.append(part)
        count += part[1]
        if count >= PART:
            break
    return taken


def _parts(found: Sequence[Found]) -> Generator[Part, None, None]:
    """Path, bytes read, and with the last of a file its entry."""
    for file in found:
        digest, size, head = sha256(), 0, b""
        with open(open_file(file), "rb", buffering=0) as source:
            while part := _read(file, source):
                digest.update(part)
                size += len(part)
                if len(head) < HEAD_BYTES:
                    head += part[: HEAD_BYTES - len(head)]
                yield file.path, len(part), None
        format = sniff(head, file.path)
        role = role_of(file.path, format)
        yield file.path, 0, FileEntry(file.path, size, digest.hexdigest(), role, format)


def _read(file: Found, source: RawIOBase) -> bytes:
    try:
        return source.read(PART) or b""
    except OSError as error:
        raise unreadable(file, error) from None
