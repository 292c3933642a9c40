"""Becomes a program that ends with the one who started it and that can be found again.

Run as a script, before anything is imported: `python -I -S launch.py RECORD PARENT PROGRAM ARGUMENTS…`.
The record is written before the program begins, so there is no moment in which it runs unrecorded.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def started(pid: int) -> str | None:
    """When the process began, in the words of the system; None when there is no such process.

    A number that the system gave to another process later has another beginning.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold anything
        if fields[0] in "ZX":  # ended, not yet collected
            return None
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[19]}"
    listed = subprocess.run(  # elsewhere; seconds are as fine as it gets
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return listed[1].strip() if len(listed) == 2 and not listed[0].startswith("Z") else None


def end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent (strictly: the thread that made us) is gone, however it went.

    Elsewhere nothing happens: the next start finds what is left by its record.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def main(record: str, parent: str, program: str, *arguments: str) -> None:
    end_with_parent()
    if os.getppid() != int(parent):
        sys.exit(1)  # it went before we could ask
    path = Path(record)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"pid": os.getpid(), "started": started(os.getpid())}))
    fresh.replace(path)
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
