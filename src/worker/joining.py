"""Pieces of an export that are a file each, and become one: the work of processes of their own."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage


def join_pieces(settings: Settings, pieces: Sequence[tuple[str, int]], key: str) -> int:
    """From the store into the store, with no more than a row group in memory.

    `pieces`: where they lie, and their sizes in bytes. Answers the size of what is put at `key`.
    """
    return asyncio.run(_join(settings, pieces, key))


async def _join(settings: Settings, pieces: Sequence[tuple[str, int]], key: str) -> int:
    from modelharbor.exports.arrow import joined  # pyarrow, which the worker itself does without

    size = 0
    async with open_storage(settings) as storage:

        async def read() -> AsyncIterator[bytes]:
            for each, size_bytes in pieces:
                yield await storage.read_range(each, 0, size_bytes)

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for part in joined(read()):
                size += len(part)
                yield part

        await storage.put(key, counted())
    return size
