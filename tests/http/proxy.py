"""A door to an engine that a test can close: whoever is inside is thrown out, or left waiting."""

import asyncio
from contextlib import suppress

from tests.http.processes import free_port


class Door:
    """Forwards one TCP port to another while it is open."""

    def __init__(self, port: int) -> None:
        self.inside = port
        self.port = free_port()
        self.silent = False
        """Connections are taken, and nothing is ever said to them."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._enter, "127.0.0.1", self.port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._writers.clear()

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(OSError):
            to, out = await asyncio.open_connection("127.0.0.1", self.inside)
            self._writers.add(out)
            for source, sink in ((reader, out), (to, writer)):
                self._tasks.add(asyncio.create_task(self._carry(source, sink)))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if not self.silent:
                    sink.write(data)
                    await sink.drain()
            sink.close()
