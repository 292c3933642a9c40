"""A way to a server that lets so many bytes through and then holds the rest back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

READ_BYTES = 64 * 1024
FREE_BYTES = 256 * 1024


class Gate:
    """Forwards connections. Towards the server it lets `allowed` bytes through, of all of them together;
    the first ones of each are free, so that what is small comes through."""

    def __init__(self, port: int, allowed: int | None = None) -> None:
        self.inside, self.allowed = port, allowed
        self.port = 0
        self.passed = 0
        self.held = asyncio.Event()
        """Set when something is held back."""
        self._opened = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self, allowed: int | None = None) -> None:
        """Let so many more through; all without a number."""
        self.allowed = None if allowed is None else self.passed + allowed
        self.held.clear()
        self._opened.set()
        self._opened = asyncio.Event()

    def cut(self) -> None:
        """Throw out whoever is inside."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Gate"]:
        server = await asyncio.start_server(self._enter, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            to, out = await asyncio.open_connection("127.0.0.1", self.inside)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(out)
        for work in (self._forward(reader, out), self._back(to, writer)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        free = FREE_BYTES
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                if free > 0:
                    free -= len(data)
                    out.write(data)
                    await out.drain()
                    continue
                while data:
                    count = len(data)
                    if self.allowed is not None:
                        count = min(count, self.allowed - self.passed)
                    if count == 0 and not await self._is_opened(reader):
                        break
                    out.write(data[:count])
                    self.passed += count
                    data = data[count:]
                    await out.drain()
                if data:
                    break
        out.close()

    async def _is_opened(self, reader: asyncio.StreamReader) -> bool:
        """Waits until more may pass; False: the other side has gone meanwhile."""
        opened = self._opened
        self.held.set()
        while not opened.is_set():
            if reader.at_eof() or reader.exception() is not None:
                return False
            with suppress(TimeoutError):
                await asyncio.wait_for(opened.wait(), 0.01)
        return True

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(READ_BYTES):
                writer.write(data)
                await writer.drain()
        writer.close()
