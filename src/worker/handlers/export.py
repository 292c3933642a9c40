"""EXPORT: the rows of a query become a file in the store, piece by piece.

A piece is about a second's work. It is put first, then the checkpoint names it together with the row
after which to go on: whoever takes the job over does that one piece again, and nothing else.
"""

import asyncio
import time
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Final

import orjson
from pymongo.asynchronous.client_session import AsyncClientSession
from rich.filesize import decimal

from modelharbor.auth.links import DownloadLinks, secret_key
from modelharbor.context import Context
from modelharbor.db.base import Row, utc_now
from modelharbor.db.ending import ended
from modelharbor.db.jobs import Level
from modelharbor.errors import BadUserInput, ErrorCode, Refused, Timeout
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.exporting import Batch, ExportQuery, prepare_export
from modelharbor.execution.failures import expected
from modelharbor.exports.encoding import Encoder, encoder
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.resolvers.exports import piece_key, pieces_of, remove_pieces
from modelharbor.schema import schema
from modelharbor.worker.interruptions import JobCancelled
from modelharbor.worker.joining import join_pieces
from modelharbor.worker.tools import Tools

from .checkpoints import Checkpoint

PIECE_SECONDS: Final = 1.0
CHECK_SECONDS: Final = 0.5  # while pieces are joined
PIECE_BYTES: Final = 4 * 1024 * 1024
"""Of a piece: as it is stored, or as JSON where it becomes a file of its own."""
BEGINNING: Final[Row] = {
    "after": None,
    "parent": None,  # what the rows are of
    "rows": 0,
    "bytes": 0,
    "truncated": 0,
    "faults": 0,
    "pieces": [],  # name and bytes of each
    "principals": [],  # of who asked, while it ran
    "is_whole": False,  # all rows are in the pieces
    "is_joined": False,  # they are one piece, where they had to be made into one
}


async def export_rows(job: Row, tools: Tools) -> Row:
    """Input: {query, variables, format, compression, base_url}."""
    exporting = _Exporting(job, tools)
    try:
        return await exporting.run()
    except JobCancelled:
        await remove_pieces(tools.storage, job["_id"], up_to=job["token"])
        raise


class _Exporting:
    def __init__(self, job: Row, tools: Tools) -> None:
        self.job, self.tools = job, tools
        self.done = Checkpoint(tools, BEGINNING)
        given = job["input"]
        self.query = _prepared(tools, given)
        self.encoder: Encoder = encoder(
            ExportFormat(given["format"]), Compression(given["compression"]), self.query.columns
        )
        self.links = DownloadLinks(secret_key(tools.settings), given["base_url"])
        self.principals = set(self.done.values["principals"])
        self.total: int | None = None

    async def run(self) -> Row:
        tools, done = self.tools, self.done
        kept = pieces_of(self.job["_id"], done.values)
        # What an attempt that broke off has put, and not named.
        await remove_pieces(tools.storage, self.job["_id"], up_to=self.job["token"], kept=kept)
        if not done.values["is_whole"]:
            async with tools.step("count"):
                await self.count()
            async with tools.step("write"):
                await self.write()
        if not self.encoder.is_joinable and not done.values["is_joined"]:
            async with tools.step("join"):
                await self.join()
        values = done.values
        tools.report(values["rows"], values["rows"], unit="rows", message=_size(values["bytes"]))
        if values["truncated"]:
            tools.log(
                f"{values['truncated']} connections below rows have more than is in the file.",
                Level.WARNING,
            )
        return self.result()

    async def context(self) -> Context:
        """Of one batch, with what may be seen now."""
        tools = self.tools
        viewer = await tools.viewer_now()
        if not self.principals.issubset(viewer.principals):
            raise Refused(
                ErrorCode.FORBIDDEN,
                "Rights of yours ended while it ran, and with them that to its first rows: start it anew.",
            )
        self.principals.update(viewer.principals)
        settings = tools.settings
        return Context(
            database=tools.database,
            cache=tools.cache,
            viewer=viewer,
            links=self.links,
            quota_bytes=settings.quota_bytes,
            export_link_minutes=settings.export_link_minutes,
            max_analytics_buckets=settings.max_analytics_buckets,
            max_analytics_models=settings.max_analytics_models,
            settings=settings,
            storage=tools.storage,
            request_id=f"job {self.job['_id']}",
        )

    async def count(self) -> None:
        try:
            self.total = await self.query.count(await self.context())
        except Exception as error:
            if not isinstance(expected(error), Timeout):
                raise
            self.tools.log("There are too many rows to count them first.")
        self.report(self.done.values["rows"])

    async def write(self) -> None:
        piece = _Piece(self.encoder, is_first=not self.done.values["pieces"])
        done = self.done.values
        batches = self.query.batches(self.context, done["after"], done["parent"])
        async with aclosing(batches):
            async for batch in batches:
                await piece.add(batch)
                for fault in batch.faults:
                    self.tools.log(f"{fault.id}: {fault.message}", Level.WARNING)
                self.report(self.done.values["rows"] + piece.rows)
                if piece.is_full:
                    await self.put(piece)
                    piece = _Piece(self.encoder, is_first=False)
        await self.put(piece, is_whole=True)

    async def put(self, piece: "_Piece", *, is_whole: bool = False) -> None:
        """The piece, then the checkpoint that names it."""
        before = self.done.values
        contents = await self.contents(piece)
        pieces = before["pieces"]
        if contents:
            name = f"{len(pieces)}-{self.job['token']}"
            await self.tools.storage.put(piece_key(self.job["_id"], name), contents)
            pieces = [*pieces, [name, len(contents)]]
        await self.advance(
            {
                "after": piece.after or before["after"],
                "parent": piece.parent or before["parent"],
                "rows": before["rows"] + piece.rows,
                "bytes": before["bytes"] + len(contents),
                "truncated": before["truncated"] + piece.truncated,
                "faults": before["faults"] + piece.faults,
                "pieces": pieces,
                "principals": sorted(self.principals),
                "is_whole": is_whole,
            }
        )

    async def contents(self, piece: "_Piece") -> bytes:
        if not piece.parts:
            return b""
        if self.encoder.is_joinable:
            return self.encoder.piece(piece.parts)
        return await self.tools.apart(self.encoder.piece, piece.parts)

    async def join(self) -> None:
        """One file of them."""
        tools, job_id, token = self.tools, self.job["_id"], self.job["token"]
        parts = [(part.key, part.size_bytes) for part in pieces_of(job_id, self.done.values)]
        tools.report(self.done.values["rows"], message=f"Joining {len(parts)} pieces")
        name = f"whole-{token}"
        joining = asyncio.create_task(
            tools.apart(join_pieces, tools.settings, parts, piece_key(job_id, name))
        )
        try:
            # Who is told here that the job was cancelled removes the pieces: the process, which nobody
            # can stop, finds the next one gone, and leaves nothing.
            while not joining.done():
                tools.check()
                await asyncio.wait({joining}, timeout=CHECK_SECONDS)
        finally:
            await ended(joining)
        size = joining.result()
        await self.advance({"pieces": [[name, size]], "bytes": size, "is_joined": True})
        kept = pieces_of(job_id, self.done.values)
        await remove_pieces(tools.storage, job_id, up_to=token, kept=kept)

    async def advance(self, values: Row) -> None:
        async def work(session: AsyncClientSession) -> Row:
            return values

        await self.done.advance(work)

    def report(self, rows: int) -> None:
        total = None if self.total is None else max(self.total, rows)
        message = _size(self.done.values["bytes"])
        self.tools.report(rows, total, unit="rows", message=message)

    def result(self) -> Row:
        given, values = self.job["input"], self.done.values
        now = utc_now()
        made: datetime = self.job["created_at"]
        expires = (now + timedelta(days=self.tools.settings.export_days)).astimezone(UTC)
        return {
            "fileName": f"{self.query.name}-{made:%Y%m%d-%H%M%S}{self.encoder.suffix}",
            "mediaType": self.encoder.media_type,
            "format": given["format"],
            "compression": given["compression"],
            "rows": values["rows"],
            "bytes": values["bytes"],
            "truncated": values["truncated"],
            "faults": values["faults"],
            "expiresAt": expires.isoformat(timespec="seconds"),
        }


def _prepared(tools: Tools, given: Row) -> ExportQuery:
    variables = orjson.loads(given["variables"])
    try:
        return prepare_export(schema, tools.settings, given["query"], variables)
    except InvalidDocument as invalid:
        # It was good when it was put: by a server with another schema, or other limits.
        raise BadUserInput(str(invalid)) from None


class _Piece:
    """Rows that are put together."""

    def __init__(self, encoder: Encoder, *, is_first: bool) -> None:
        self._encoder = encoder
        self._began = time.monotonic()
        self.parts = [encoder.begin()] if is_first else []
        self.rows = self.truncated = self.faults = self.size_bytes = 0
        self.after: str | None = None
        self.parent: str | None = None

    @property
    def is_full(self) -> bool:
        return self.size_bytes >= PIECE_BYTES or time.monotonic() - self._began >= PIECE_SECONDS

    async def add(self, batch: Batch) -> None:
        self.rows += len(batch.rows)
        self.truncated += batch.truncated
        self.faults += len(batch.faults)
        self.after, self.parent = batch.after, batch.parent
        # In a thread: meanwhile the next batch comes in.
        part = await asyncio.to_thread(self._encoder.encode, batch.rows)
        self.parts.append(part)
        self.size_bytes += len(part)


def _size(count: int) -> str:
    return f"{decimal(count)} written"
