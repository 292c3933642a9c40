"""A Redis that may be killed and hung, on one port for as long as it is needed."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Final

from bench.serving import HOST, free_port
from modelharbor.dev.engines import Child, EngineError, find_engine, run_child

START_SECONDS: Final = 10.0


class Redis:
    """Keeps nothing on the disk: whoever kills it finds it empty afterwards."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.port = free_port()
        self.child: Child | None = None

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    async def start(self) -> None:
        options = ("--bind", HOST, "--save", "", "--appendonly", "no", "--dir", str(self.folder))
        program = find_engine("redis-server")
        server = run_child(self.folder, "redis", program, "--port", str(self.port), *options)
        self.child = await self.stack.enter_async_context(server)
        until = monotonic() + START_SECONDS
        while not await self._listens():
            if self.child.process.poll() is not None:
                raise self.child.failure()
            if monotonic() > until:
                raise EngineError(f"redis-server does not listen (log: {self.child.log})")
            await asyncio.sleep(0.01)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(HOST, self.port)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def hang(self) -> None:
        """Its connections stay, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.child is not None
        self.child.process.send_signal(number)


@asynccontextmanager
async def own_redis(folder: Path) -> AsyncIterator[Redis]:
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        redis = Redis(folder, stack)
        await redis.start()
        try:
            yield redis
        finally:
            redis.go_on()  # or it could not end
