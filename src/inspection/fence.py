"""The fence: each inspection runs in a process of its own that can do nothing but compute and answer.

A fork server (`forking`), begun when the first file comes, has one child for each file. The child has
limits and no system calls but those for computing (`confinement`); the contents come to it by a pipe,
piece by piece, and what it answers is checked (`answers`). Whatever a file does to its child comes to
an inspection with the verdict ERROR.
"""

import asyncio
import fcntl
import json
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any, Final

from modelharbor.db.files import FileFormat, ScanVerdict
from modelharbor.db.jobs import Level
from modelharbor.errors import NotStored, Unavailable
from modelharbor.observability.logging import log_event
from modelharbor.settings import Settings

from . import wire
from .answers import Garbage, decode
from .results import Finding, Inspection

log = logging.getLogger(__name__)

SCANNER: Final = f"modelharbor 1, picklescan {version('picklescan')}"
"""What inspects; contents that an older one has inspected may be inspected again."""

START_SECONDS: Final = 60.0  # of the fork server; on a busy machine Python takes seconds
END_SECONDS: Final = 5.0  # of a process after SIGKILL
PIPE_BYTES: Final = 1024 * 1024  # what Linux allows to anyone
READS_AT_ONCE: Final = 8  # of one inspection, from the store
INSPECTOR: Final = "modelharbor.inspection.inspecting:inspect_contents"
_F_SETPIPE_SZ: Final = 1031  # linux/fcntl.h

Read = Callable[[int, int], Awaitable[bytes]]
Tell = Callable[[str], None]


@asynccontextmanager
async def open_fence(
    settings: Settings,
    *,
    most: int | None = None,
    inspector: str = INSPECTOR,
    path: Sequence[str] = (),
) -> AsyncIterator["Fence"]:
    """`most` inspections at once, as many as there are cores by default. Another `inspector`
    (`module:function`, found with the help of `path`) is for tests of the fence itself."""
    fence = Fence(settings, most or os.cpu_count() or 1, inspector, path)
    try:
        yield fence
    finally:
        await fence.end()


class Fence:
    def __init__(self, settings: Settings, most: int, inspector: str, path: Sequence[str]) -> None:
        self._seconds = settings.inspection_seconds
        self._arguments = {
            "inspector": inspector,
            "path": list(path),
            "memory_bytes": settings.inspection_memory_bytes,
            "cpu_seconds": math.ceil(settings.inspection_seconds) + 1,
        }
        self._places = asyncio.Semaphore(most)
        self._starting = asyncio.Lock()
        self._server: _ForkServer | None = None
        self._told = False
        self._ended = False

    async def inspect(self, read: Read, size: int, stage: Tell | None = None) -> Inspection:
        """`read(start, end)` answers the bytes from `start` up to `end`, not included; `stage` is
        told "sniff", "parse" and "scan" when they begin.

        Raises what these two raise, and Unavailable when no process can be started; never for the
        file's sake.
        """
        async with self._places:
            for last in (False, True):
                server = await self._running()
                try:
                    return await self._inspect(server, read, size, stage)
                except _ServerEnded:
                    if last:
                        break
        return _failed("fence.crashed", "The inspection of this file ended its process.")

    async def _inspect(
        self, server: "_ForkServer", read: Read, size: int, stage: Tell | None
    ) -> Inspection:
        async with server.child(size) as child:
            conversation = _Conversation(child, read, size, stage)
            answering = asyncio.create_task(conversation.answer())
            try:
                async with asyncio.timeout(self._seconds) as limit:
                    either: list[asyncio.Future[Any]] = [answering, child.ended]
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                    if server.ended and not answering.done():
                        raise _ServerEnded
                    return await answering
            except TimeoutError:
                if not limit.expired():
                    raise
                if conversation.reads_for() > self._seconds / 2:
                    raise Unavailable("The storage took too long to answer.") from None
                return _failed(
                    "fence.timeout",
                    f"The inspection took longer than {self._seconds:g} seconds.",
                    conversation.format,
                )
            except asyncio.IncompleteReadError:
                return _ended(await child.status(), conversation.format)
            except Garbage:
                return _failed(
                    "fence.garbage",
                    "The inspection of this file answered nonsense.",
                    conversation.format,
                )
            finally:
                answering.cancel()
                await asyncio.wait([answering])

    async def _running(self) -> "_ForkServer":
        async with self._starting:
            if self._ended:
                raise Unavailable("The inspection of files has ended.")
            if self._server is None or self._server.ended:
                if self._server is not None:
                    await self._server.end()
                    log_event(log, logging.WARNING, "inspection.restarted")
                starting = asyncio.ensure_future(_start(self._arguments))
                try:
                    self._server = await asyncio.shield(starting)
                except asyncio.CancelledError:
                    with suppress(Exception):  # whatever it is, nobody waits for it any more
                        self._server = await starting  # `end` is to find it
                    raise
                if not self._server.filters_calls and not self._told:
                    self._told = True
                    log_event(log, logging.WARNING, "inspection.unfiltered", platform=sys.platform)
            return self._server

    async def end(self) -> None:
        """What still runs is Unavailable."""
        async with self._starting:
            self._ended = True
            if self._server is not None:
                await self._server.end()
                self._server = None


def _ended(status: int, format: FileFormat) -> Inspection:
    """Of a child that ended without an answer."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU:
        return _failed("fence.timeout", "The inspection took too much of the processor.", format)
    if number == signal.SIGKILL:  # by no one but the system, when memory runs out
        return _failed("fence.memory", "The inspection of this file took too much memory.", format)
    return _failed("fence.crashed", "The inspection of this file ended its process.", format)


def _failed(rule: str, detail: str, format: FileFormat = FileFormat.OTHER) -> Inspection:
    return Inspection(ScanVerdict.ERROR, format, [Finding(Level.CRITICAL, rule, detail)])


class _ServerEnded(Exception):
    """Not the file's doing, as far as one knows."""


async def _start(arguments: dict[str, Any]) -> "_ForkServer":
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",  # neither the environment nor the folder at hand say what is imported
                "-m",
                "modelharbor.inspection.forking",
                json.dumps({**arguments, "descriptor": theirs.fileno()}),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},  # a thread cannot be forked
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the worker
            )
        except OSError as error:
            ours.close()
            raise Unavailable("The inspection of files could not be started.") from error
    server = _ForkServer(ours, process)
    try:
        async with asyncio.timeout(START_SECONDS):
            await server.ready()
    except (TimeoutError, _ServerEnded):
        await server.end()
        raise Unavailable("The inspection of files could not be started.") from None
    except BaseException:
        await server.end()
        raise
    return server


class _ForkServer:
    def __init__(self, control: socket.socket, process: asyncio.subprocess.Process) -> None:
        self._control, self._process = control, process
        self._numbers = 0
        self._statuses: dict[int, asyncio.Future[int]] = {}
        self._ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen())
        self.filters_calls = False

    @property
    def ended(self) -> bool:
        return self._listening.done()

    async def ready(self) -> None:
        self.filters_calls = await self._ready

    async def _listen(self) -> None:
        """Until the server ends; whoever waits for a child of it then learns that."""
        loop, frame = asyncio.get_running_loop(), b""
        try:
            while part := await loop.sock_recv(self._control, wire.CONTROL.size - len(frame)):
                frame += part
                if len(frame) == wire.CONTROL.size:
                    self._hear(*wire.CONTROL.unpack(frame))
                    frame = b""
        except OSError:
            pass
        finally:
            if not self._ready.done():
                self._ready.set_exception(_ServerEnded())
            for waiting in self._statuses.values():
                if not waiting.done():
                    waiting.set_exception(_ServerEnded())
                    waiting.exception()  # nobody has to ask for it

    def _hear(self, what: bytes, number: int, value: int) -> None:
        if what == wire.READY:
            self._ready.set_result(bool(value))
        elif number in self._statuses and not self._statuses[number].done():
            self._statuses[number].set_result(value)

    @asynccontextmanager
    async def child(self, size: int) -> AsyncIterator["_Child"]:
        """A child that waits to be served; killed and gone when the block is left."""
        number = self._numbers = self._numbers + 1
        status = self._statuses[number] = asyncio.get_running_loop().create_future()
        from_child, to_parent = os.pipe()
        from_parent, to_child = os.pipe()
        pipes = [from_child, to_child]
        try:
            try:
                _widen(from_child, to_child)
                frame = wire.CONTROL.pack(wire.START, number, size)
                # Frames are few and small, so the socket has room for them or has nobody behind it.
                socket.send_fds(self._control, [frame], [from_parent, to_parent])
            except OSError:
                raise _ServerEnded from None
            finally:
                os.close(from_parent)
                os.close(to_parent)
            async with _open_pipes(pipes) as (reader, writer):
                yield _Child(reader, writer, status)
        finally:
            for each in pipes:
                os.close(each)
            if not status.done():
                with suppress(OSError):
                    self._control.send(wire.CONTROL.pack(wire.KILL, number, 0))
                await asyncio.wait([status], timeout=END_SECONDS)
            del self._statuses[number]

    async def end(self) -> None:
        """The server ends when its socket does, and takes its children with it."""
        self._listening.cancel()
        await asyncio.wait([self._listening])
        self._control.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def _widen(*pipes: int) -> None:
    """So that a piece goes through at once, where the system allows it."""
    if sys.platform == "linux":
        for each in pipes:
            with suppress(OSError):
                fcntl.fcntl(each, _F_SETPIPE_SZ, PIPE_BYTES)


@asynccontextmanager
async def _open_pipes(
    pipes: list[int],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Takes both over from the list: what is left in it is still the caller's to close."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    incoming, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipes.pop(0), "rb", buffering=0)
    )
    try:
        outgoing, protocol = await loop.connect_write_pipe(
            lambda: asyncio.streams.FlowControlMixin(), os.fdopen(pipes.pop(0), "wb", buffering=0)
        )
        try:
            yield reader, asyncio.StreamWriter(outgoing, protocol, None, loop)
        finally:
            if not outgoing.is_closing():
                outgoing.abort()
    finally:
        incoming.close()


class _Child:
    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        status: asyncio.Future[int],
    ) -> None:
        self.reader, self.writer, self.ended = reader, writer, status

    async def status(self) -> int:
        """How it ended; it has closed its pipes, so it is about to."""
        await asyncio.wait([self.ended], timeout=END_SECONDS)
        return self.ended.result() if self.ended.done() else 0


class _Conversation:
    """With one child: pieces out, stages and the answer in. Garbage when it does not keep to it."""

    def __init__(self, child: _Child, read: Read, size: int, stage: Tell | None) -> None:
        self._child, self._read, self._size, self._stage = child, read, size, stage
        self._stages_told = -1
        self._reading_since: float | None = None
        self.format = FileFormat.OTHER  # as far as it was told

    def reads_for(self) -> float:
        """Seconds since the read began that is going on."""
        if self._reading_since is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._reading_since

    async def answer(self) -> Inspection:
        receive = self._child.reader.readexactly
        while True:
            match await receive(1):
                case wire.READ:
                    await self._send_pieces()
                case wire.STAGE:
                    self._hear(*wire.STAGE_AND_FORMAT.unpack(await receive(2)))
                case wire.ANSWER:
                    return decode(await self._text(wire.MOST_ANSWER_BYTES))
                case wire.NO_MEMORY:
                    return _failed(
                        "fence.memory",
                        "The inspection of this file took too much memory.",
                        self.format,
                    )
                case wire.FAILED:
                    text = (await self._text(wire.MOST_FAILURE_BYTES)).decode("utf-8", "replace")
                    log_event(log, logging.ERROR, "inspection.failed", error=text)
                    return _failed(
                        "fence.failed", "The inspection of this file failed.", self.format
                    )
                case _:
                    raise Garbage("frame")

    async def _text(self, most: int) -> bytes:
        (length,) = wire.LENGTH.unpack(await self._child.reader.readexactly(wire.LENGTH.size))
        if length > most:
            raise Garbage("length")
        return await self._child.reader.readexactly(length)

    def _hear(self, stage: int, format: int) -> None:
        if stage >= len(wire.STAGES) or format > len(wire.FORMATS):
            raise Garbage("stage")
        if format:
            self.format = wire.FORMATS[format - 1]
        if stage > self._stages_told:
            self._stages_told = stage
            if self._stage is not None:
                self._stage(wire.STAGES[stage])

    async def _send_pieces(self) -> None:
        receive = self._child.reader.readexactly
        (count,) = wire.COUNT.unpack(await receive(wire.COUNT.size))
        if count > wire.MOST_PIECES:
            raise Garbage("count")
        asked = await receive(count * wire.PIECE.size)
        pieces = list(wire.PIECE.iter_unpack(asked))
        if (
            any(
                not 0 < length <= wire.PIECE_BYTES or start + length > self._size
                for start, length in pieces
            )
            or sum(length for _, length in pieces) > wire.MOST_ASKED_BYTES
        ):
            raise Garbage("piece")
        reads: list[asyncio.Task[bytes]] = []
        try:
            while pieces or reads:
                while pieces and len(reads) < READS_AT_ONCE:
                    reads.append(asyncio.create_task(self._piece(*pieces.pop(0))))
                self._reading_since = asyncio.get_running_loop().time()
                contents = await reads[0]
                self._reading_since = None
                del reads[0]
                self._child.writer.write(contents)
                with suppress(ConnectionError):  # it ended; how, is seen where its frames end
                    await self._child.writer.drain()
        finally:
            for each in reads:
                each.cancel()
            if reads:
                await asyncio.wait(reads)

    async def _piece(self, start: int, length: int) -> bytes:
        contents = await self._read(start, start + length)
        if len(contents) != length:
            raise NotStored("The contents that are stored are not whole.")
        return contents
