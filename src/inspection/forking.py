"""The fork server of the fence: it has the parsers loaded, and one child for each file.

Run as `python -I -m modelharbor.inspection.forking`, with nothing of its parent but one socket. A fork
of it costs milliseconds, where a new Python with the parsers takes most of a second; and it knows
nothing that a file could be after: no settings, no connections, no keys.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NoReturn

from . import wire
from .answers import encode
from .confinement import end_with_parent, filters_calls, give_up_calls, hide, limit
from .pieces import Pieces, Pipe
from .results import Inspection
from .source import Source

_ENCODINGS: Final = (
    *("ascii", "latin-1", "cp437", "utf-8", "utf-8-sig", "utf-16", "utf-32"),
    *("unicode_escape", "raw_unicode_escape"),
)

Inspector = Callable[[Source, Callable[..., None]], Inspection]


def main(descriptor: int, inspector_name: str, memory_bytes: int, cpu_seconds: int) -> None:
    """Until the other end of the socket is closed."""
    control = socket.socket(fileno=descriptor)
    module, _, name = inspector_name.partition(":")
    inspector: Inspector = getattr(importlib.import_module(module), name)
    for encoding in _ENCODINGS:  # nothing can be imported once the files are closed
        "".encode(encoding)
    hide()
    server = _Server(control, inspector, memory_bytes, cpu_seconds)
    gc.collect()
    gc.freeze()  # so that children do not copy what they only look at
    server.tell(wire.READY, 0, int(filters_calls()))
    server.serve()


class _Server:
    def __init__(
        self, control: socket.socket, inspector: Inspector, memory_bytes: int, cpu_seconds: int
    ) -> None:
        self._control = control
        self._inspector = inspector
        self._memory_bytes, self._cpu_seconds = memory_bytes, cpu_seconds
        self._children: dict[int, int] = {}  # number of the inspection by process id
        self._woken, self._wakes = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._woken, False)

    def tell(self, what: bytes, number: int, value: int) -> None:
        self._control.sendall(wire.CONTROL.pack(what, number, value))

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it wakes
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):  # for the worker, who ends the fence
            signal.signal(number, signal.SIG_IGN)
        try:
            while True:
                control = self._control.fileno()
                ready, _, _ = select.select([control, self._woken], [], [])
                if self._woken in ready:
                    with suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                    self._reap()
                if control in ready and not self._obey():
                    return
        finally:
            for child in self._children:
                os.kill(child, signal.SIGKILL)
            for child in self._children:
                os.waitpid(child, 0)

    def _obey(self) -> bool:
        """False at the end of the socket."""
        size = wire.CONTROL.size
        frame, descriptors, _, _ = socket.recv_fds(self._control, size, 2)
        while frame and len(frame) < size:
            more = self._control.recv(size - len(frame))
            frame = frame + more if more else b""
        if not frame:
            return False
        what, number, value = wire.CONTROL.unpack(frame)
        if what == wire.START:
            self._start(number, value, descriptors)
        else:
            for child, its_number in self._children.items():
                if its_number == number:  # not reaped yet, so the id is no one else's
                    os.kill(child, signal.SIGKILL)
        return True

    def _start(self, number: int, size: int, descriptors: Sequence[int]) -> None:
        server = os.getpid()
        try:
            child = os.fork()
        except OSError:
            child = None
        if child == 0:
            self._inspect(server, size, *descriptors)
        for each in descriptors:
            os.close(each)
        if child is None:
            self.tell(wire.ENDED, number, signal.SIGKILL)
        else:
            self._children[child] = number

    def _reap(self) -> None:
        while self._children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            self.tell(wire.ENDED, self._children.pop(child), status)

    def _inspect(self, server: int, size: int, asked: int, answered: int) -> NoReturn:
        """In the child, which never comes back."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with_parent(server, signal.SIGKILL)
            asked, answered = _only(asked, answered)
            limit(self._memory_bytes, self._cpu_seconds)
            give_up_calls()
            _answer(Pipe(asked, answered), size, self._inspector)
        finally:
            os._exit(1)


def _only(*kept: int) -> list[int]:
    """Closes whatever else is open; the standard ones lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    first = 10
    for at, each in enumerate(kept):
        os.dup2(each, first + at, inheritable=False)
    os.closerange(3, first)
    os.closerange(first + len(kept), os.sysconf("SC_OPEN_MAX"))
    return list(range(first, first + len(kept)))


def _answer(pipe: Pipe, size: int, inspector: Inspector) -> NoReturn:
    spare: bytearray | None = bytearray(1024 * 1024)  # for the answer when all else is used up
    try:
        try:
            source = Pieces(size, pipe)
            answer = encode(inspector(source, pipe.tell_stage))
            pipe.write(wire.ANSWER + wire.LENGTH.pack(len(answer)) + answer)
        except MemoryError:
            del spare
            pipe.write(wire.NO_MEMORY)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
            text = text[: wire.MOST_FAILURE_BYTES]
            pipe.write(wire.FAILED + wire.LENGTH.pack(len(text)) + text)
    finally:
        os._exit(0)


if __name__ == "__main__":
    _arguments = json.loads(sys.argv[1])
    sys.path.extend(_arguments["path"])
    main(
        _arguments["descriptor"],
        _arguments["inspector"],
        _arguments["memory_bytes"],
        _arguments["cpu_seconds"],
    )
