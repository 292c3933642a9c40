"""Files of this machine: which ones of a folder are sent, and how a folder is filled safely."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

from .failures import Changed, ClientError, Unsafe
from .records import LocalFile

MAX_PATH: Final = 1024  # characters
MAX_NAME: Final = 255  # bytes: of what file systems take
FOLDER: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


# What is sent -----------------------------------------------------------------------------------


def walk(folder: Path) -> list[LocalFile]:
    """Its files in the order of their paths, without hidden ones. Blocks.

    ClientError (BAD_INPUT): links that lead out or nowhere or to folders, what is neither file nor
    folder, names that the server would refuse, no file at all.
    """
    try:
        root = folder.resolve(strict=True)
        waiting, found = [root], []
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                        continue
                    found.append(_file(root, Path(entry.path)))
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise _bad(f"The folder {_plainly(str(folder))} cannot be read: {reason}.") from None
    if not found:
        raise _bad("The folder has no files (hidden ones are left out).")
    found.sort(key=lambda file: file.path)
    for one, other in pairwise(found):
        if one.path == other.path:
            raise _bad(f"Two files have the name {one.path!r}: rename one.")
    return found


def _bad(message: str) -> ClientError:
    return ClientError(message, "BAD_INPUT")


def _plainly(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _file(root: Path, at: Path) -> LocalFile:
    path = at.relative_to(root).as_posix()
    shown = _plainly(path)
    if not path.isprintable() or "\\" in path:
        raise _bad(f"The name of {shown!r} has characters that other systems refuse: rename it.")
    if len(path) > MAX_PATH:
        raise _bad(f"The path {shown[:80]}… is longer than {MAX_PATH} characters.")
    try:
        real = at.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        raise _bad(f"{shown} is a link that leads nowhere: remove it.") from None
    if not real.is_relative_to(root):
        raise _bad(f"{shown} is a link out of the folder, to {real}: put the file in its place.")
    status = real.stat()
    if stat.S_ISDIR(status.st_mode):
        raise _bad(f"{shown} is a link to a folder: put the folder in its place.")
    if not stat.S_ISREG(status.st_mode):
        raise _bad(f"{shown} is neither a file nor a folder: remove it.")
    # Names that look the same are the same on the server.
    return LocalFile(unicodedata.normalize("NFC", path), root, real, status.st_size)


@contextmanager
def opened(file: LocalFile) -> Iterator[int]:
    """A descriptor to read from. What became a link or a pipe since the walk is not followed, nor
    waited for. Changed: it is not as it was, before or while it was read."""
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
        raise Changed(f"{file.path} cannot be read: {error.strerror}.", "BAD_INPUT") from None
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode) or before.st_size != file.size_bytes:
            raise changed(file.path)
        yield descriptor
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise changed(file.path)
    finally:
        os.close(descriptor)


def changed(path: str) -> Changed:
    return Changed(f"{path} changed while it was read: push it again when it is at rest.")


# What is received -------------------------------------------------------------------------------


def safe_parts(path: str) -> tuple[str, ...]:
    """The names that lead to a file within a folder. Unsafe: a server's path that may lead elsewhere."""
    parts = tuple(path.split("/"))
    shown = _plainly(repr(path[:200]))
    if len(path) > MAX_PATH or not path.isprintable() or "\\" in path:
        raise Unsafe(f"The server names a file that cannot be one here: {shown}.")
    for part in parts:
        try:
            is_good = part not in ("", ".", "..") and len(part.encode()) <= MAX_NAME
        except UnicodeEncodeError:
            is_good = False
        if not is_good:
            raise Unsafe(f"The server names a file that would lie elsewhere: {shown}.")
    return parts


class Target:
    """A folder that is filled. Below it no link is followed, whoever puts one there meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._root = os.open(folder, FOLDER)

    def close(self) -> None:
        os.close(self._root)

    @contextmanager
    def parent(self, parts: tuple[str, ...]) -> Iterator[int]:
        """A descriptor of the folder that the file lies in; made where it is missing."""
        at = os.dup(self._root)
        try:
            for number, part in enumerate(parts[:-1]):
                try:
                    try:
                        below = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=at)
                    except FileNotFoundError:
                        with suppress(FileExistsError):  # another file of it came first
                            os.mkdir(part, dir_fd=at)
                        below = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=at)
                except NotADirectoryError:
                    where = self.folder.joinpath(*parts[: number + 1])
                    raise Unsafe(
                        f"{where} is a link or a file, where a folder has to be: remove it."
                    ) from None
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)
