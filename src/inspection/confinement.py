"""What a process gives up for good before it looks at a file of a stranger.

Limits of the system (memory, CPU, no file grows, few are open), then a filter of system calls: what
is not in `_CALLS` answers EPERM. A filter exists on Linux on x86-64 and aarch64; elsewhere the limits
and Python's audit hooks remain, and `filters_calls` says so.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

MOST_OPEN_FILES: Final = 16

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38

# linux/seccomp.h, linux/audit.h
_SECCOMP_MODE_FILTER: Final = 2
_KILL_PROCESS: Final = 0x8000_0000
_REFUSE: Final = 0x0005_0000 | errno.EPERM
_ALLOW: Final = 0x7FFF_0000
_ARCHITECTURES: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}

# linux/bpf_common.h: codes of instructions; `struct seccomp_data` says where what is loaded lies.
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _THIRD_ARGUMENT_AT = 0, 4, 32

# Numbers from asm/unistd_64.h of x86-64 and asm-generic/unistd.h, which aarch64 uses: memory, time,
# signals of its own, and reading and writing what is open already.
_CALLS: Final[Mapping[str, Sequence[int]]] = {
    "x86_64": (
        *(0, 1, 3, 8),  # read write close lseek
        *(11, 12, 25, 28),  # munmap brk mremap madvise
        *(13, 14, 15, 131),  # rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack
        *(39, 186, 24, 202, 334),  # getpid gettid sched_yield futex rseq
        *(96, 228, 230, 219),  # gettimeofday clock_gettime clock_nanosleep restart_syscall
        *(60, 231, 318),  # exit exit_group getrandom
    ),
    "aarch64": (
        *(63, 64, 57, 62),
        *(215, 214, 216, 233),
        *(134, 135, 139, 132),
        *(172, 178, 124, 98, 293),
        *(169, 113, 115, 128),
        *(93, 94, 278),
    ),
}
# mmap and mprotect, whose third argument must not ask for memory that can be executed.
_MAPPING_CALLS: Final[Mapping[str, Sequence[int]]] = {"x86_64": (9, 10), "aarch64": (222, 226)}
_PROT_EXEC: Final = 4

_REFUSED_EVENTS: Final = (
    *("open", "socket.", "subprocess.", "os.", "shutil.", "ctypes.", "_posixsubprocess."),
    *("pty.", "tempfile.", "sqlite3.", "urllib.", "http.", "ftplib.", "webbrowser."),
    *("pickle.find_class", "marshal.load", "exec", "import"),
)


class _Program(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filters_calls() -> bool:
    """Whether this machine can filter system calls."""
    return sys.platform == "linux" and platform.machine() in _CALLS


def hide() -> None:
    """No core file, and no other process of the same user looks into this one's memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        _control(_PR_SET_DUMPABLE, 0)


def end_with_parent(parent: int, signal_number: int) -> None:
    """Where the system can do it. Its own end notices a parent that ended before."""
    if sys.platform == "linux":
        _control(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os._exit(1)


def limit(memory_bytes: int, cpu_seconds: int) -> None:
    """`memory_bytes` of addresses beside those that are in use already."""
    limits = [
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MOST_OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ]
    if sys.platform == "linux":  # others have the limit, and do not keep to it
        limits.append((resource.RLIMIT_AS, _addresses_in_use() + memory_bytes))
    for which, most in limits:
        _, hard = resource.getrlimit(which)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # At the soft limit of time comes a signal that tells what it was.
        last = most + 1 if which == resource.RLIMIT_CPU and hard != most else most
        with suppress(ValueError, OSError):  # not every system has each of them
            resource.setrlimit(which, (most, last))


def give_up_calls() -> None:
    """For the rest of this process. OSError where the system has a filter and it could not be set."""
    if filters_calls():
        program = _program(platform.machine())
        _control(_PR_SET_NO_NEW_PRIVS, 1)
        instructions = _Program(len(program) // 8, program)
        _control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(instructions))
    sys.addaudithook(_refuse_events)


def _program(machine: str) -> bytes:
    """`struct sock_filter`s, 8 bytes each: code, steps to go on when true, when false, a number."""

    def step(code: int, number: int, when_true: int = 0, when_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, when_true, when_false, number)

    steps = [
        step(_LOAD, _ARCHITECTURE_AT),
        step(_EQUAL, _ARCHITECTURES[machine], when_true=1),
        step(_RETURN, _KILL_PROCESS),
        step(_LOAD, _NUMBER_AT),
    ]
    for number in _CALLS[machine]:
        steps += [step(_EQUAL, number, when_false=1), step(_RETURN, _ALLOW)]
    for number in _MAPPING_CALLS[machine]:
        steps += [
            step(_EQUAL, number, when_false=4),
            step(_LOAD, _THIRD_ARGUMENT_AT),
            step(_ANY_BIT, _PROT_EXEC, when_true=1),
            step(_RETURN, _ALLOW),
            step(_RETURN, _REFUSE),
        ]
    steps.append(step(_RETURN, _REFUSE))
    return b"".join(steps)


def _control(operation: int, *arguments: Any) -> None:
    """`prctl`; OSError when it is refused."""
    call = ctypes.CDLL(None, use_errno=True).prctl
    call.restype = ctypes.c_int
    given = [
        ctypes.c_ulong(each) if isinstance(each, int) else each
        for each in (*arguments, *[0] * (4 - len(arguments)))
    ]
    if call(ctypes.c_int(operation), *given) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {operation}: {os.strerror(number)}")


def _addresses_in_use() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _refuse_events(event: str, _arguments: tuple[Any, ...]) -> None:
    if event.startswith(_REFUSED_EVENTS):
        raise PermissionError(errno.EPERM, f"{event} is refused here")
