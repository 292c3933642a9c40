"""Bytes to an address by tus 1.0.0, from wherever the server says that it is."""

import asyncio
import os
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import httpx

from .answers import failure_of, number_of, whole
from .failures import ClientError, Rejected
from .folders import changed
from .hashing import READ_BYTES
from .parts import Part
from .patience import may_pass
from .records import Upload

if TYPE_CHECKING:
    from .client import Client

PIECE_BYTES: Final = 64 * 1024 * 1024  # of one request
STUCK: Final = "STUCK"
"""The code of an upload that takes nothing at the offset that it names: its parts are known elsewhere."""
STUCK_AFTER: Final = 3  # refusals at one offset
RESUMABLE: Final = {"tus-resumable": "1.0.0"}
CONFLICT: Final = 409
LOST: Final = frozenset({CONFLICT, 423})
"""Of a PATCH: somebody else sends, or has sent, to the same address. What the server has tells the rest."""


class Stream:
    """A range of an open file on its way to one address. `report` is told bytes: how many more the
    server has or is being sent (fewer than none when some did not arrive), and how many were sent."""

    def __init__(
        self,
        client: "Client",
        connections: asyncio.Semaphore,
        path: str,
        descriptor: int,
        part: Part,
        report: Callable[[int, int], None],
    ) -> None:
        self.client, self.connections = client, connections
        self.path, self.descriptor, self.part = path, descriptor, part
        self.url = _address(client, part.name)
        self.length = part.end - part.start
        self.report = report
        self.at = 0

    async def run(self, *, is_new: bool = False) -> None:
        """Until the server has all. `is_new`: it has nothing, and need not be asked.

        Rejected: it takes no more (410: it was ended), or not these bytes.
        """
        patience, farthest = self.client.patience(), 0
        is_known, is_free, is_told, refusals = is_new, is_new, False, 0
        while True:
            try:
                if not is_known:
                    self._move(await self._offset())
                    is_known = True
                if self.at > farthest:
                    farthest, refusals = self.at, 0
                    patience.progressed()
                if self.at == self.length and is_told:
                    return
                async with self.connections:
                    # After a failure one of no bytes comes first: who held the upload may hold it
                    # still, and what is sent to be refused is sent in vain. At the end, too: what has
                    # all its bytes may wait for somebody to say so.
                    await self._patch(PIECE_BYTES if is_free else 0)
                is_told = is_free = True
                continue
            except httpx.TransportError as broken:
                error: ClientError = self.client.unreachable(broken)
            except Rejected as answer:
                status = answer.status or 0
                if status not in LOST and not may_pass(status):
                    raise
                error = answer
                refusals += status == CONFLICT
                if refusals == STUCK_AFTER:
                    raise Rejected(answer.message, STUCK, status=status) from None
            is_known = is_free = False
            await patience.wait(error)

    def _move(self, at: int, moved: int = 0) -> None:
        gained, self.at = at - self.at, at
        self.report(gained, moved)

    def _headers(self) -> dict[str, str]:
        return {**RESUMABLE, **self.client.authorized(self.url)}

    async def _offset(self) -> int:
        async with self.client.http.stream("HEAD", self.url, headers=self._headers()) as found:
            answer = await whole(found)
        if answer.status_code not in (200, 204):
            raise failure_of(answer)
        at = _number(answer.headers, "upload-offset")
        if at > self.length or _number(answer.headers, "upload-length") != self.length:
            raise Rejected(f"The server expects another length of {self.path}.", "SIZE_MISMATCH")
        return at

    async def _patch(self, most: int) -> None:
        at, end = self.at, min(self.at + most, self.length)
        async with self.client.http.stream(
            "PATCH",
            self.url,
            headers={
                **self._headers(),
                "content-type": "application/offset+octet-stream",
                "content-length": str(end - at),
                "upload-offset": str(at),
            },
            content=self._blocks(at, end),
        ) as found:
            answer = await whole(found)
        self.client.answered()
        if answer.status_code != 204:
            raise failure_of(answer)
        self._move(_number(answer.headers, "upload-offset"))

    async def _blocks(self, at: int, end: int) -> AsyncGenerator[bytes, None]:
        """From the disk, a little at a time."""
        while at < end:
            block = await asyncio.to_thread(
                os.pread, self.descriptor, min(READ_BYTES, end - at), self.part.start + at
            )
            if not block:
                raise changed(self.path)
            yield block
            at += len(block)
            self._move(at, len(block))


async def create_part(client: "Client", upload: Upload, size_bytes: int) -> str:
    """The name of a new part of an upload, which takes bytes like one."""
    headers = {"upload-concat": "partial", "upload-length": str(size_bytes)}
    return await _create(client, upload, headers)


async def join_parts(client: "Client", upload: Upload, parts: Sequence[Part]) -> None:
    """Their bytes, in this order, are those of the upload."""
    addresses = " ".join(_address(client, part.name) for part in parts)
    await _create(client, upload, {"upload-concat": f"final;{addresses}"})


async def _create(client: "Client", upload: Upload, headers: Mapping[str, str]) -> str:
    binding = b64encode(upload.id.encode()).decode()
    answer = await client.send(
        "POST",
        f"{client.url}/uploads",
        headers={**RESUMABLE, "upload-metadata": f"upload {binding}", **headers},
    )
    if answer.status_code != 201:
        raise failure_of(answer)
    return name_of(answer.headers.get("location", ""))


def name_of(url: str) -> str:
    """Of an upload among those of its server: the end of its address. Rejected: it has none.

    Only that is kept and used, so that bytes and token go to the server that this is a client of,
    whatever address it thinks that it has.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    if not name.isascii() or not name.isalnum():
        raise Rejected("The server gives an upload no address.", "BAD_ANSWER")
    return name


def _address(client: "Client", name: str) -> str:
    return f"{client.url}/uploads/{name}"


def _number(headers: Mapping[str, str], name: str) -> int:
    return number_of(headers.get(name, ""))
