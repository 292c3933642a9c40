"""Sends a file to an upload, from wherever the server says that it goes on, in one request; then ends:
`python -I -S sender.py PORT TOKEN ADDRESS FILE COUNTER`, 0 when the server has all of it.

COUNTER is a mapped file: killed at any moment, it says up to which byte the system was given the file.
Nothing but the standard library, so that it starts at once.
"""

import mmap
import sys
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

PIECE = 64 * 1024
GUARD_SECONDS = 60.0
FREE, HELD = 204, (409, 423)


class Address:
    def __init__(self, port: int, token: str, path: str) -> None:
        self.port, self.path = port, path
        self.headers = {"authorization": f"Bearer {token}", "tus-resumable": "1.0.0"}

    def offset(self) -> int:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=GUARD_SECONDS)
        connection.request("HEAD", self.path, headers=self.headers)
        answer = connection.getresponse()
        connection.close()
        if answer.status != 200:
            sys.exit(f"HEAD {answer.status}")
        return int(answer.headers["upload-offset"])

    def begin(self, offset: int, length: int) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=GUARD_SECONDS)
        connection.putrequest("PATCH", self.path)
        headers = {
            **self.headers,
            "content-type": "application/offset+octet-stream",
            "upload-offset": str(offset),
            "content-length": str(length),
        }
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection


def end(connection: HTTPConnection) -> int:
    status = connection.getresponse().status
    connection.close()
    return status


def send(address: Address, file: Path, counter: mmap.mmap) -> int:
    size, until = file.stat().st_size, time.monotonic() + GUARD_SECONDS
    while True:
        offset = address.offset()
        # One of no bytes comes first: who held the upload may hold it still.
        status = end(address.begin(offset, 0))
        if status == FREE:
            break
        if status not in HELD or time.monotonic() > until:
            return status
        time.sleep(0.02)
    if offset == size:
        return FREE
    connection = address.begin(offset, size - offset)
    with file.open("rb") as source:
        source.seek(offset)
        while piece := source.read(PIECE):
            offset += len(piece)
            counter[:8] = (offset + 1).to_bytes(8, "little")
            connection.send(piece)
    return end(connection)


def main(port: str, token: str, path: str, file: str, told: str) -> int:
    with open(told, "r+b") as opened, mmap.mmap(opened.fileno(), 8) as counter:
        try:
            status = send(Address(int(port), token, path), Path(file), counter)
        except (OSError, HTTPException) as error:
            sys.exit(f"{type(error).__name__}: {error}")
    return 0 if status == FREE else status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
