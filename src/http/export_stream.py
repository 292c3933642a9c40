"""`/exports/stream`: the rows of an export at once, as they are read: for notebooks, and pipes.

The same rows as `bulkExport` makes a file of, as JSON lines or CSV. The client sets the pace: what it does
not take is not read. An answer cannot say afterwards that something is missing, so it has all rows or
breaks off: whatever goes wrong once it has begun cuts the connection.
"""

import asyncio
import logging
from collections import Counter
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from modelharbor.auth.viewer import Viewer
from modelharbor.cache.budgets import BudgetSpent
from modelharbor.context import Context
from modelharbor.db.ending import ended
from modelharbor.errors import (
    BadRequest,
    BadUserInput,
    HarborError,
    MethodNotAllowed,
    OperationTooComplex,
    PersistedQueryNotFound,
    RateLimited,
    Timeout,
    Unavailable,
)
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.exporting import Batch, ExportQuery, prepare_export
from modelharbor.execution.failures import any_problem, problem
from modelharbor.execution.persisted import Resolved
from modelharbor.exports.encoding import Encoder, encoder
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.observability.logging import log_event

from .answers import OPERATION, error_response, json_response, with_request_id
from .budgets import BAD_DOCUMENT
from .budgets import headers as budget_headers
from .caching import check_address
from .downloads import disposition
from .events import gone
from .graphql import check_content
from .incoming import Incoming
from .parameters import check_encoding, from_query_string, read_json, read_parameters
from .protocol import CUT_OFF

if TYPE_CHECKING:
    from .operations import Operations

log = logging.getLogger(__name__)
STREAMED: Final = {"jsonl": ExportFormat.JSONL, "csv": ExportFormat.CSV}
PIECE_BYTES: Final = 64 * 1024
"""Handed to the connection at once: it holds no more than two of them for a client that takes nothing."""
MOST_WAIT_SECONDS: Final = 5.0  # before a look whether there is budget again
RETRY_SECONDS: Final = 1  # until there may be a place


def export_stream_routes(operations: "Operations") -> list[BaseRoute]:
    return [Route("/exports/stream", ExportStream(operations))]


class ExportStream:
    """The ASGI application there, and to whom it sends how many."""

    def __init__(self, operations: "Operations") -> None:
        self.operations = operations
        self.running: Counter[str] = Counter()  # by who asked: see `_asker`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Incoming(scope, receive)
        try:
            query, made, asker = await self.prepare(request)
            await self.serve(request, query, made, asker, send)
        except InvalidDocument as error:
            problems = with_request_id(scope, list(error.problems))
            await json_response({"errors": problems}, 400)(scope, receive, send)
        except BudgetSpent as error:
            told = {name.decode(): value.decode() for name, value in budget_headers(error.charge)}
            await error_response(scope, error, told)(scope, receive, send)
        except RateLimited as error:
            await error_response(scope, error, {"retry-after": str(RETRY_SECONDS)})(
                scope, receive, send
            )
        except MethodNotAllowed as error:
            await error_response(scope, error, {"allow": "GET, POST"})(scope, receive, send)
        except PersistedQueryNotFound as error:
            problems = with_request_id(scope, [problem(error)])
            # Elsewhere it is a 200, as Apollo's clients like it: here that would be a row.
            await json_response({"errors": problems}, 404)(scope, receive, send)

    # ---- what may run

    async def prepare(self, request: Incoming) -> tuple[ExportQuery, Encoder, str]:
        """With who asks. Raises InvalidDocument and HarborErrors for what cannot run, as /graphql does."""
        budgets, principal = request.state["budgets"], self.operations.principal(request)
        exhausted = budgets.exhausted(*principal)
        if exhausted is not None:
            exhausted.check()
        try:
            resolved, query, format = await self._prepared(request)
        except InvalidDocument:
            budgets.owe(*principal, BAD_DOCUMENT)
            raise
        except HarborError as error:
            if error.status < 500:
                budgets.owe(*principal, BAD_DOCUMENT)
            raise
        viewer = await self.viewer(request)
        request.state["persisted"].check(resolved, viewer)
        request.state["persisted"].used(resolved)
        made = encoder(format, Compression.NONE, query.columns)
        return query, made, self._asker(request, viewer)

    async def _prepared(self, request: Incoming) -> tuple[Resolved, ExportQuery, ExportFormat]:
        if request.method not in {"GET", "POST"}:
            raise MethodNotAllowed("Exports take GET and POST.")
        operations = self.operations
        given = await self._given(request)
        parameters = read_parameters(given)
        format = _format(given.get("format"))
        operations.check_values(parameters.variables)
        resolved = await request.state["persisted"].resolve(
            parameters, is_person=request.authorization is not None
        )
        query = prepare_export(
            operations.schema,
            operations.settings,
            resolved.document.text,
            parameters.variables,
            parameters.operation_name,
        )
        request.scope[OPERATION] = query.operation.name
        return resolved, query, format

    async def _given(self, request: Incoming) -> dict[str, Any]:
        if request.method == "GET":
            check_address(request.scope)
            check_encoding(request.scope["query_string"])
            parameters = request.whole.query_params
            given = from_query_string(parameters)
            return given | {"format": parameters["format"]} if "format" in parameters else given
        settings = self.operations.settings
        check_content(request.header(b"content-type"), request.header(b"content-encoding"))
        body = await request.body(settings.max_body_bytes, settings.body_timeout_seconds)
        found = read_json(body, "The body")
        if not isinstance(found, dict):
            raise BadRequest("The body takes one JSON object.")
        return found

    # ---- sending

    async def serve(
        self, request: Incoming, query: ExportQuery, made: Encoder, asker: str, send: Send
    ) -> None:
        """Raises what goes wrong before the first row is sent, and after that where nothing can be cut."""
        self._check_room(asker)
        self.running[asker] += 1
        sending = asyncio.ensure_future(_Sending(self, request, query, made, send).run())
        leaving = asyncio.ensure_future(gone(request.receive))
        try:
            await asyncio.wait([sending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not sending.result():
                request.scope[CUT_OFF]()
                await leaving  # the server knows then that there is no more to come
        finally:
            self.running[asker] -= 1
            if not self.running[asker]:
                del self.running[asker]
            leaving.cancel()
            await ended(sending)

    def _check_room(self, asker: str) -> None:
        """Nobody may have all places: whoever takes the rows slowly holds one for long."""
        most = self.operations.settings.max_export_streams
        share = max(1, most // 2)
        if self.running[asker] >= share:
            raise RateLimited(
                f"Of {most} places for exports here you hold {share}, your share; try again, or as a job.",
                retryAfter=RETRY_SECONDS,
            )
        if self.running.total() >= most:
            raise Unavailable(f"{most} exports are being sent, the limit; try again, or as a job.")

    def _asker(self, request: Incoming, viewer: Viewer) -> str:
        """One person with all their tokens, or one address without any."""
        if viewer.user_id is not None:
            return f"user:{viewer.user_id}"
        return self.operations.principal(request, viewer).name

    async def viewer(self, request: Incoming) -> Viewer:
        """Who asks, as what they are now."""
        usable = await request.state["freshness"].ready()
        return await self.operations.viewer(request, usable)


class _Sending:
    """One answer."""

    def __init__(
        self, stream: ExportStream, request: Incoming, query: ExportQuery, made: Encoder, send: Send
    ) -> None:
        self.stream, self.request, self.query = stream, request, query
        self.encoder, self.send_message = made, send
        self.is_first = True  # the batch that is read next
        self.is_begun = False
        self.rows = 0

    async def run(self) -> bool:
        """False: it is not whole. Raises what goes wrong before it has begun."""
        batches = self.query.batches(self._context)
        try:
            async with aclosing(batches):
                async for batch in batches:
                    await self._send(batch)
            if not self.is_begun:
                await self._begin()
            await self._body(b"", more=False)
        except Exception as error:
            if not self.is_begun:
                raise
            code = any_problem(error, "an export that is sent")["extensions"]["code"]
            log_event(log, logging.WARNING, "export.cut", code=code, rows=self.rows)
            if CUT_OFF not in self.request.scope:
                raise
            return False
        return True

    async def _context(self) -> Context:
        """Of a batch, for who asks as what they are now. It is read once half of the budget is there: the
        other half is for whatever else its owner asks meanwhile. BudgetSpent of the first one."""
        request, state = self.request, self.request.state
        while True:
            viewer = await self.stream.viewer(request)
            name, kind = self.stream.operations.principal(request, viewer)
            budget = state["budgets"].budgets[kind]
            if budget is None:
                break
            charge = state["budgets"].charge(name, kind, budget.limit // 2, dry_run=True)
            if charge.waits:
                await state["freshness"].rounds.next()
            if self.is_first:
                charge.check()
            if charge.allowed:
                break
            await asyncio.sleep(min(charge.retry_after, MOST_WAIT_SECONDS))
        self.is_first = False
        return self.stream.operations.context(request, viewer)

    async def _send(self, batch: Batch) -> None:
        for fault in batch.faults:
            raise RuntimeError(f"{fault.id}: {fault.message}")
        if batch.truncated:
            raise OperationTooComplex(
                "A nested connection has more rows than an export takes of each: say how many by `first`, or use `bulkExport`, which says what is left out.",
                measure="nested",
            )
        self._charge(len(batch.rows))
        data = self.encoder.encode(batch.rows)
        self.rows += len(batch.rows)
        if not self.is_begun:
            await self._begin()
        for start in range(0, len(data), PIECE_BYTES):
            await self._body(data[start : start + PIECE_BYTES])

    def _charge(self, rows: int) -> None:
        """What was read has been done already."""
        principal = self.stream.operations.principal(self.request)
        self.request.state["budgets"].owe(*principal, max(1, rows * self.query.row_cost))

    async def _begin(self) -> None:
        self.is_begun = True
        name = f"{self.query.name}{self.encoder.suffix}"
        headers = {
            "content-type": self.encoder.media_type,
            "content-disposition": disposition(name),
            "cache-control": "private, no-store",
            "x-accel-buffering": "no",  # nginx would take all of it, and keep it on disk
        }
        raw = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
        await self.send_message({"type": "http.response.start", "status": 200, "headers": raw})
        head = self.encoder.begin()
        if head:
            await self._body(head)

    async def _body(self, data: bytes, *, more: bool = True) -> None:
        """Waits as long as the client takes nothing; Timeout when that is too long."""
        seconds = self.stream.operations.settings.send_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await self.send_message(
                    {"type": "http.response.body", "body": data, "more_body": more}
                )
        except TimeoutError:
            raise Timeout(f"The client has taken nothing for {seconds:g} s.") from None


def _format(given: object) -> ExportFormat:
    if given is None:
        return ExportFormat.JSONL
    found = STREAMED.get(given.lower()) if isinstance(given, str) else None
    if found is None:
        raise BadUserInput(
            "`format` is jsonl or csv; `bulkExport` makes Parquet, and compressed files."
        )
    return found
