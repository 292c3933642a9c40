"""SHA-256 of files, in threads, a few megabytes at a time."""

import asyncio
import os
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final

from .folders import changed, opened
from .records import LocalFile

READ_BYTES: Final = 1024 * 1024
STEP_BYTES: Final = 16 * READ_BYTES  # between two looks at the event loop


def hash_range(descriptor: int, digest: Any, start: int, end: int) -> int:
    """Where it came to: before `end` when the file ends there. Blocks."""
    while start < end:
        data = os.pread(descriptor, min(READ_BYTES, end - start), start)
        if not data:
            break
        digest.update(data)
        start += len(data)
    return start


def hash_small(file: LocalFile) -> str:
    """In one go. Blocks."""
    digest = sha256()
    with opened(file) as descriptor:
        if hash_range(descriptor, digest, 0, file.size_bytes) != file.size_bytes:
            raise changed(file.path)
    return digest.hexdigest()


async def hash_file(file: LocalFile, report: Callable[[int], None] = lambda done: None) -> str:
    """Can be cancelled between two steps. Changed: it is not as it was when the folder was walked."""
    digest, at = sha256(), 0
    with opened(file) as descriptor:
        while at < file.size_bytes:
            end = min(at + STEP_BYTES, file.size_bytes)
            if await asyncio.to_thread(hash_range, descriptor, digest, at, end) != end:
                raise changed(file.path)
            at = end
            report(at)
    return digest.hexdigest()
