"""What a file could make its inspection do, had it taken it over: run in the fence by its tests.

The contents name the attempt, and what it is given.
"""

import ctypes
import errno
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelharbor.db.files import FileFormat, ScanVerdict
from modelharbor.inspection import wire
from modelharbor.inspection.pieces import Pieces
from modelharbor.inspection.results import Inspection
from modelharbor.inspection.source import Source

LIBC = ctypes.CDLL(None)
CALLS = {
    name: getattr(LIBC, name)
    for name in (
        *("open", "openat", "creat", "unlink", "socket", "fork", "vfork", "execve", "ptrace"),
        *("kill", "getppid", "mprotect", "prctl", "dup", "pipe", "chdir", "mount", "setuid"),
    )
}
for call in CALLS.values():
    call.restype = ctypes.c_int
LENGTH_OF = LIBC.strlen
SYSCALL = LIBC.syscall
SYSCALL.restype = ctypes.c_long
ERRNO_AT = LIBC["__errno_location" if sys.platform == "linux" else "__error"]
ERRNO_AT.restype = ctypes.POINTER(ctypes.c_int)
ERRNO = ERRNO_AT()
PAGE = ctypes.create_string_buffer(8192)
ALIGNED = ctypes.c_void_p((ctypes.addressof(PAGE) + 4095) & ~4095)


def act(source: Source, tell: Callable[..., None]) -> Inspection:
    what, _, given = source.read(0, min(source.size, 4000)).rstrip(b"#").decode().partition(" ")
    tell("sniff")
    header = ATTEMPTS[what](given, source)
    return Inspection(ScanVerdict.SAFE, FileFormat.OTHER, header=header)


def _errors(given: str, _: Source) -> Any:
    """Of calls of the system that went past Python: their numbers."""
    path = given.encode()
    tried = {
        "open": (path, os.O_CREAT | os.O_WRONLY, 0o600),
        "openat": (-100, path, os.O_CREAT | os.O_WRONLY, 0o600),
        "creat": (path, 0o600),
        "unlink": (path,),
        "socket": (socket.AF_INET, socket.SOCK_STREAM, 0),
        "fork": (),
        "execve": (b"/bin/true", None, None),
        "ptrace": (16, 1, None, None),
        "kill": (1, 0),
        "mprotect": (ALIGNED, 4096, 7),
        "prctl": (4, 1, 0, 0, 0),
        "dup": (0,),
        "chdir": (b"/tmp",),
        "setuid": (0,),
    }
    answers = {}
    for name, arguments in tried.items():
        ERRNO.contents.value = 0
        answers[name] = [CALLS[name](*arguments), errno.errorcode.get(ERRNO.contents.value)]
    ERRNO.contents.value = 0  # io_uring_setup: calls without calls
    answers["io_uring"] = [SYSCALL(425, 8, PAGE), errno.errorcode.get(ERRNO.contents.value)]
    return answers


def _what_is_there(_: str, __: Source) -> Any:
    descriptors = []
    for each in range(256):
        try:
            os.lseek(each, 0, os.SEEK_CUR)
        except OSError as error:
            if error.errno == errno.EBADF:
                continue
        descriptors.append(each)
    return {"environment": sorted(os.environ), "descriptors": descriptors}


def _write(given: str, _: Source) -> Any:
    Path(given).write_text("out")


def _read(given: str, _: Source) -> Any:
    return Path(given).read_text()


def _socket(_: str, __: Source) -> Any:
    socket.create_connection(("127.0.0.1", 9)).close()


def _fork(_: str, __: Source) -> Any:
    if os.fork() == 0:
        os._exit(0)


def _exec(_: str, __: Source) -> Any:
    os.execv("/bin/true", ["true"])


def _spawn(given: str, _: Source) -> Any:
    subprocess.run(["touch", given], check=True)


def _thread(_: str, __: Source) -> Any:
    threading.Thread(target=time.sleep, args=(1,)).start()


def _unpickle(given: str, _: Source) -> Any:
    pickle.loads(f"cposix\nsystem\n(S'touch {given}'\ntR.".encode())


def _import(_: str, __: Source) -> Any:
    import this  # noqa: F401  # nobody else does


def _loop(_: str, __: Source) -> Any:
    while True:
        pass


def _sleep(_: str, __: Source) -> Any:
    time.sleep(600)


def _memory(_: str, __: Source) -> Any:
    held = []
    while True:
        held.append(bytearray(16 * 1024 * 1024))


def _recursion(_: str, __: Source) -> Any:
    return _recursion(_, __)


def _huge(_: str, __: Source) -> Any:
    os.write(11, wire.ANSWER + wire.LENGTH.pack(2**31))
    os.write(11, b"x" * 1024 * 1024)
    time.sleep(600)


def _nonsense(_: str, __: Source) -> Any:
    os.write(11, b"?" * 100)
    time.sleep(600)


def _lie(given: str, _: Source) -> Any:
    answer = given.encode()
    os.write(11, wire.ANSWER + wire.LENGTH.pack(len(answer)) + answer)
    time.sleep(600)


def _beyond(_: str, source: Source) -> Any:
    assert isinstance(source, Pieces)
    source._pipe.pieces([(source.size, 1)])


def _wide(_: str, source: Source) -> Any:
    assert isinstance(source, Pieces)
    source._pipe.pieces([(0, source.size)] * 65_535)


def _stages(_: str, __: Source) -> Any:
    os.write(11, wire.STAGE + b"\xff\xff")
    time.sleep(600)


def _exit(_: str, __: Source) -> Any:
    os._exit(0)


def _abort(_: str, __: Source) -> Any:
    os.abort()


def _crash(_: str, __: Source) -> Any:
    LENGTH_OF(None)


def _quit(_: str, __: Source) -> Any:
    sys.exit(0)


def _all(_: str, source: Source) -> Any:
    """Reads everything, forwards in large parts, then small ones backwards."""
    total = 0
    for at in range(0, source.size, 3_000_000):
        total += sum(source.read(at, min(3_000_000, source.size - at))[::4093])
    for at in range(source.size - 100, 0, -1_000_003):
        total += sum(source.read(at, 100))
    return {"total": total}


def _nothing(_: str, __: Source) -> Any:
    return None


ATTEMPTS: dict[str, Callable[[str, Source], Any]] = {
    name.removeprefix("_"): value
    for name, value in list(globals().items())
    if name.startswith("_") and callable(value)
}


def contents(what: str, given: object = "", size: int = 0) -> bytes:
    """That make the fence try it."""
    text = given if isinstance(given, str) else json.dumps(given)
    return f"{what} {text}".encode().ljust(size, b"#")
