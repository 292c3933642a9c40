"""Incoming bytes in stores of objects, S3 and its like: a segment is a row of numbered objects.

Each chunk but the last has the same size. Who goes on in a segment writes its last chunk anew, with the
same beginning: whatever of both the store keeps, the bytes that counted are in it. Chunks become one
object in the end (`compose`); a segment of one chunk is that already.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from hashlib import sha256
from typing import Final

import obstore
from obstore.store import MemoryStore, ObjectStore

from modelharbor.db.uploads import Segment
from modelharbor.errors import HarborError

from .failures import answering, not_whole
from .incoming import INCOMING, Hash, Incoming, Left, SegmentWriter, segment_key
from .settling import settled
from .streams import streamed

CHUNK: Final = 4 * 1024 * 1024  # bytes; of existing segments too, so it stays what it is
# Chunks of all writers that are put while their next one is being filled; others wait. So many writers
# need one chunk of memory each, and these beside.
AHEAD: Final = 3
SMALL: Final = 64 * 1024  # bytes
SPARE: Final = 12  # rooms for chunks that are kept for the next ones
PIECE: Final = 1024 * 1024  # bytes of an object that are hashed at a time
PART: Final = 8 * 1024 * 1024  # bytes of a large object put at a time; S3 refuses less than 5
MOST_PARTS: Final = 9_000  # of an object; S3 takes 10,000
PARTS_AT_ONCE: Final = 2  # of a file that is put, which are in memory meanwhile
LISTED_AT_ONCE: Final = 1_000
LETTING_GO_SECONDS: Final = 0.05
# Whatever the contents are, no browser shows them as a page of the store.
ATTRIBUTES: Final = {
    "Content-Disposition": "attachment",
    "Content-Type": "application/octet-stream",
}


def part_size(size: int) -> int:
    """How much of an object of this size is put at a time."""
    return max(PART, -(-size // MOST_PARTS))


class ChunkIncoming(Incoming):
    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.ahead = asyncio.Semaphore(AHEAD)
        self._spare: list[memoryview] = []

    @asynccontextmanager
    async def writer(
        self, key: str, at: int, hasher: Hash | None = None
    ) -> AsyncIterator[SegmentWriter]:
        number, rest = divmod(at, CHUNK)
        begun = await self._range(_chunk_key(key, number), 0, rest) if rest else b""
        writer = _ChunkWriter(self, key, at, begun, hasher)
        try:
            yield writer
        finally:
            await writer.end()

    def take(self, size: int) -> memoryview:
        """Room for a chunk that has so many bytes by now: there may be hundreds of small files at once.
        New room for each large one would stay with the process, in pieces."""
        if size <= SMALL < CHUNK:
            return memoryview(bytearray(SMALL))
        return self._spare.pop() if self._spare else memoryview(bytearray(CHUNK))

    def give_back(self, room: memoryview) -> None:
        """Once the store has it. One in memory keeps just this."""
        is_large = len(room) == CHUNK
        if is_large and len(self._spare) < SPARE and not isinstance(self._store, MemoryStore):
            self._spare.append(room)

    async def put(self, key: str, contents: bytes | memoryview) -> None:
        await obstore.put_async(
            self._store, key, contents, attributes=ATTRIBUTES, use_multipart=False
        )

    async def delete(self, key: str) -> None:
        with answering(key):
            folder = key.rpartition("/")[0]
            async for batch in obstore.list(self._store, folder, chunk_size=LISTED_AT_ONCE):
                mine = [each["path"] for each in batch if segment_key(each["path"]) == key]
                if mine:
                    with suppress(FileNotFoundError):
                        await obstore.delete_async(self._store, mine)

    def final_key(self, segments: Sequence[Segment]) -> str | None:
        filled = [segment for segment in segments if segment.size_bytes]
        return filled[0].key if len(filled) == 1 and filled[0].size_bytes <= CHUNK else None

    async def compose(
        self,
        segments: Sequence[Segment],
        key: str,
        report: Callable[[int], None] | None = None,
    ) -> str:
        size = sum(segment.size_bytes for segment in segments)
        with answering(key):
            with suppress(FileNotFoundError):
                has = await obstore.head_async(self._store, key)
                if has["size"] == size:
                    return await self.digest(key, size, report)
            seen = sha256()
            if size <= PART:
                whole = bytearray()
                async for piece in self._hashed(segments, seen, report):
                    whole += piece
                await self.put(key, memoryview(whole))
            else:
                await obstore.put_async(
                    self._store,
                    key,
                    self._hashed(segments, seen, report),
                    attributes=ATTRIBUTES,
                    use_multipart=True,
                    chunk_size=part_size(size),
                    max_concurrency=1,  # beside the one that is being filled; workers compose several
                )
        return seen.hexdigest()

    async def _hashed(
        self, segments: Sequence[Segment], seen: Hash, report: Callable[[int], None] | None
    ) -> AsyncIterator[bytes]:
        async with aclosing(self._pieces(segments)) as pieces:
            async for piece in pieces:
                await asyncio.to_thread(seen.update, piece)
                yield piece
                if report is not None:
                    report(len(piece))

    async def _pieces(self, segments: Sequence[Segment]) -> AsyncGenerator[bytes, None]:
        """The next chunk is asked for while one is used."""
        coming: asyncio.Task[AsyncIterator[bytes]] | None = None
        try:
            for segment in segments:
                for at in range(0, segment.size_bytes, CHUNK):
                    before = coming
                    key = _chunk_key(segment.key, at // CHUNK)
                    end = min(CHUNK, segment.size_bytes - at)
                    coming = asyncio.create_task(self._stream(key, end))
                    if before is not None:
                        async for piece in await before:
                            yield piece
            if coming is not None:
                async for piece in await coming:
                    yield piece
        finally:
            if coming is not None:
                coming.cancel()
                await settled(coming)

    async def _stream(self, key: str, end: int) -> AsyncIterator[bytes]:
        with answering(key):
            found = await obstore.get_async(self._store, key, options={"range": (0, end)})
        if tuple(found.range) != (0, end):
            raise not_whole(key, (0, end), found.range)
        return streamed(self._store, key, found, PIECE)

    async def digest(self, key: str, size: int, report: Callable[[int], None] | None = None) -> str:
        seen, at = sha256(), 0
        with answering(key):
            found = await obstore.get_async(self._store, key)
            if found.meta["size"] != size:
                raise not_whole(key, size, found.meta["size"])
            async for piece in streamed(self._store, key, found, PIECE):
                await asyncio.to_thread(seen.update, piece)
                at += len(piece)
                if report is not None:
                    report(len(piece))
        if at != size:
            raise not_whole(key, size, at)
        return seen.hexdigest()

    async def listed(self) -> AsyncIterator[Left]:
        with answering(INCOMING):
            async for batch in obstore.list(self._store, INCOMING, chunk_size=LISTED_AT_ONCE):
                for found in batch:
                    yield Left(found["path"], found["last_modified"], found["size"])

    async def close(self) -> None:
        # obstore's threads let go of Python's objects a moment after they have answered: an interpreter
        # that ends just then aborts.
        await asyncio.sleep(LETTING_GO_SECONDS)

    async def _range(self, key: str, start: int, end: int) -> bytes:
        with answering(key):
            found = await obstore.get_range_async(self._store, key, start=start, end=end)
        if len(found) != end - start:
            raise not_whole(key, (start, end), len(found))
        return found.to_bytes()


class _ChunkWriter(SegmentWriter):
    """A chunk is filled while the one before is put, where not too many do so."""

    def __init__(
        self, incoming: ChunkIncoming, key: str, at: int, begun: bytes, hasher: Hash | None
    ) -> None:
        self.size = at
        self._incoming, self._key, self._hasher = incoming, key, hasher
        self._room: memoryview | None = None
        self._filled = 0
        if begun:  # the last chunk is put anew as it grows
            self._fill(memoryview(begun))
        self._flushed = at
        self._hashed = at  # how many bytes of the segment the hasher has
        self._order = asyncio.Lock()
        self._putting: asyncio.Task[None] | None = None
        self._failure: HarborError | None = None

    async def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            async with self._order:
                self._refuse_failed()
                part = left[: CHUNK - self._filled]
                self._fill(part)
                self.size += len(part)
                left = left[len(part) :]
                if self._filled == CHUNK:
                    await self._put_whole()

    async def flush(self) -> int:
        async with self._order:
            await self._arrived()
            if self.size > self._flushed and self._room is not None:
                self._begin_put(self._room[: self._filled])
                await self._arrived()
            self._flushed = self.size
            return self.size

    async def end(self) -> None:
        await settled(self._putting)
        if self._room is not None and self._failure is None:
            self._incoming.give_back(self._room)

    def _fill(self, part: memoryview) -> None:
        needed = self._filled + len(part)
        if self._room is None or needed > len(self._room):
            room = self._incoming.take(needed)
            if self._room is not None:
                room[: self._filled] = self._room[: self._filled]
            self._room = room
        self._room[self._filled : self._filled + len(part)] = part
        self._filled += len(part)

    async def _put_whole(self) -> None:
        await self._arrived()
        assert self._room is not None
        room, self._room, self._filled = self._room, None, 0
        is_ahead = not self._incoming.ahead.locked()
        if is_ahead:
            await self._incoming.ahead.acquire()
        putting = self._begin_put(room)

        def put(putting: "asyncio.Task[None]") -> None:
            if is_ahead:
                self._incoming.ahead.release()
            if self._failure is None and not putting.cancelled():
                self._incoming.give_back(room)

        putting.add_done_callback(put)
        if not is_ahead:
            await self._arrived()

    async def _arrived(self) -> None:
        """All that was begun to be put is there."""
        if self._putting is not None:
            await asyncio.wait([self._putting])
            self._putting.result()
            self._putting = None
        self._refuse_failed()

    def _begin_put(self, chunk: memoryview) -> "asyncio.Task[None]":
        self._putting = asyncio.create_task(self._put(chunk, self.size - len(chunk)))
        return self._putting

    async def _put(self, chunk: memoryview, start: int) -> None:
        key = _chunk_key(self._key, start // CHUNK)
        try:
            with answering(key):
                if self._hasher is not None:
                    new = chunk[self._hashed - start :]
                    self._hashed += len(new)
                    await asyncio.to_thread(self._hasher.update, new)
                await self._incoming.put(key, chunk)
        except HarborError as error:
            self._failure = error

    def _refuse_failed(self) -> None:
        if self._failure is not None:
            raise self._failure


def _chunk_key(key: str, number: int) -> str:
    """The first one has the key of the segment."""
    return f"{key}.{number:08}" if number else key
