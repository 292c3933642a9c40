"""GraphQL over HTTP (https://graphql.github.io/graphql-over-http/draft/): requests in, answers out.

Over WebSocket: sockets.py; as a stream of events: events.py; how operations are run: operations.py.
"""

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import strawberry
from graphql import OperationType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelharbor.cache.answers import Layer
from modelharbor.cache.budgets import BudgetSpent
from modelharbor.cache.entries import Entry
from modelharbor.errors import (
    BadRequest,
    MethodNotAllowed,
    NotAcceptable,
    UnsupportedMediaType,
)
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.failures import expected, problem
from modelharbor.execution.kept import Kept
from modelharbor.observability.metrics import Metrics
from modelharbor.observability.sentry import operation_scope
from modelharbor.settings import Settings

from .answers import JSON, OPERATION, error_response, json_response, with_request_id
from .budgets import headers as budget_headers
from .caching import UNKEPT, Form, Named, Sent, check_address, form_of, sent, vary_of
from .events import EVENTS, EventStream
from .incoming import Incoming, short_texts
from .middleware import KEPT
from .operations import Executed, Operations, Prepared
from .parameters import (
    Parameters,
    check_encoding,
    from_query_string,
    read_json,
    read_parameters,
)
from .sockets import Socket
from .state import State

RESPONSE_JSON: Final = "application/graphql-response+json; charset=utf-8"
FORMS: Final = 2048  # headers of so many entries are remembered
FORMS_BYTES, LONGEST_FORMED = 16 * 2**20, 2**20  # of their bodies
Page: TypeAlias = Callable[[Request[State]], Awaitable[Response]]
"""Answers browsers that come without an operation."""
TOLD_BY_EVENTS: Final = frozenset({200, 400, 403, 404, 410})
"""What is wrong with an operation, to a client that takes events alone: it reads no other answer, and
comes again after most of them. What is wrong with its request, or passes, stays a status."""


class GraphQLEndpoint:
    """The ASGI application at `/graphql`."""

    def __init__(
        self, schema: strawberry.Schema, settings: Settings, page: Page, metrics: Metrics
    ) -> None:
        self.settings, self.page = settings, page
        self.operations = Operations(schema, settings, metrics)
        self._forms: Kept[int, tuple[Entry, Form]] = Kept(FORMS, FORMS_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Incoming(scope, receive)
        if request.is_socket:
            await Socket(self.operations, request, send).serve()
            return
        answer = await self.respond(request)
        if isinstance(answer, Response):
            for name in self.vary(request).decode().split(", "):
                answer.headers.add_vary_header(name)
            await answer(scope, receive, send)
            return
        # What almost every answer is, without Starlette's Response: its headers are always the same.
        status, headers, body = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def vary(self, request: Incoming) -> bytes:
        return vary_of(request.method, with_origins=bool(self.settings.allowed_origins))

    async def respond(self, request: Incoming) -> "Response | Sent":
        media, method = JSON, request.method
        try:
            if method not in {"GET", "POST"}:
                raise MethodNotAllowed("GraphQL takes GET and POST.")
            if method == "GET" and _wants_page(request):
                return await self.page(request.whole)
            media = negotiate(request.header(b"accept"))
            return await self.answer(request, media)
        except InvalidDocument as error:
            problems = with_request_id(request.scope, list(error.problems))
            if media is EVENTS:
                return EventStream.of_failure(problems)
            return json_response({"errors": problems}, _request_error_status(media), None, media)
        except Exception as error:
            failure = expected(error)
            if failure is None:
                raise  # the middleware masks and reports it
            if media is EVENTS and failure.status in TOLD_BY_EVENTS:
                made = with_request_id(request.scope, [problem(failure)])
                return EventStream.of_failure(made)
            more = {"allow": _allowed(method)} if failure.status == 405 else {}
            if isinstance(failure, BudgetSpent):
                told = budget_headers(failure.charge)
                more = {name.decode(): value.decode() for name, value in told}
            return error_response(request.scope, failure, more, JSON if media is EVENTS else media)

    async def answer(self, request: Incoming, media: str) -> Response | Sent:
        prepared = await self.prepared(request)
        operation = prepared.operation
        request.scope[OPERATION] = operation.name
        if operation.kind is OperationType.MUTATION and request.method == "GET":
            self.operations.refuse(request)
            raise MethodNotAllowed("Mutations take POST.")
        if operation.kind is OperationType.SUBSCRIPTION:
            if not takes_events(request.header(b"accept")):
                self.operations.refuse(request)
                raise NotAcceptable(
                    "Subscriptions run over WebSocket, or with `Accept: text/event-stream`."
                )
            return await EventStream.of_subscription(self.operations, request, prepared)
        with operation_scope(operation.kind.value, operation.name):
            executed = await self.operations.execute(request, prepared)
        if media is EVENTS:
            return EventStream.of_answer(executed.body)
        return self.encoded(request, prepared, executed, media)

    def encoded(
        self, request: Incoming, prepared: Prepared, executed: Executed, media: str
    ) -> Sent:
        named, form, entry = None, None, executed.entry
        if request.method == "GET" and prepared.resolved.by != "text":
            named = Named.of(request.headers)
        if entry is not None and (named is not None or b"accept-encoding" in request.headers):
            form = self.form(entry)
            if executed.layer is not Layer.MISS:
                request.scope[KEPT] = (form.digest, entry.body)  # compressed once
        status, headers, body = sent(
            _request_error_status(media) if executed.is_refused else 200,
            media.encode(),
            executed.body,
            self.vary(request),
            named=named,
            entry=entry,
            form=form,
            has_errors=bool(executed.problems),
            layer=executed.layer.value.upper().encode() if self.settings.debug else None,
        )
        if UNKEPT in headers:  # what others may keep does not tell who paid
            headers += budget_headers(executed.charge)
        return status, headers, body

    def form(self, entry: Entry) -> Form:
        """What is told of an entry, which is served many times."""
        found = self._forms.get(id(entry))
        if found is None or found[0] is not entry:
            found = entry, form_of(entry, with_keys=self.settings.surrogate_keys)
            if len(entry.body) <= LONGEST_FORMED:  # it is kept from being forgotten by this
                self._forms.put(id(entry), found, len(entry.body) + len(found[1].keys))
        return found[1]

    async def prepared(self, request: Incoming) -> Prepared:
        if request.method == "GET":
            check_address(request.scope)
            sent_as: bytes = request.scope["query_string"]
            key = b"GET " + sent_as
        else:
            check_content(request.header(b"content-type"), request.header(b"content-encoding"))
            sent_as = await request.body(
                self.settings.max_body_bytes, self.settings.body_timeout_seconds
            )
            key = b"POST " + sent_as
        found = self.operations.known(request, key)
        if found is None:
            version = request.state["persisted"].published.version
            found = await self.operations.prepare(request, self.parameters(request, sent_as))
            self.operations.remember(key, version, found)
        return found

    def parameters(self, request: Incoming, sent_as: bytes) -> Parameters:
        if request.method == "GET":
            check_encoding(sent_as)
            return read_parameters(from_query_string(request.whole.query_params))
        found = read_json(sent_as, "The body")
        if not isinstance(found, dict):
            raise BadRequest("The body takes one JSON object; batches are not taken.")
        return read_parameters(found)


@short_texts
def check_content(media_type: str | None, encoding: str | None) -> None:
    """JSON only: what a foreign page can send without being asked first (text, forms) is not taken."""
    media, *options = (media_type or "").split(";")
    if media.strip().lower() != "application/json":
        raise UnsupportedMediaType("The body takes `Content-Type: application/json`.")
    for option in options:
        name, _, value = option.partition("=")
        if name.strip().lower() == "charset" and value.strip(' "').lower() not in {"utf-8", "utf8"}:
            raise UnsupportedMediaType("JSON is in UTF-8.")
    if (encoding or "identity").strip().lower() not in {"", "identity"}:
        raise UnsupportedMediaType("The body may not be compressed.")


@short_texts
def negotiate(accept: str | None) -> str:
    """The media type of the answer: the one that is liked most, the first among equals. NotAcceptable."""
    best, best_quality = None, 0.0
    for part in (accept or "*/*").split(","):
        media, *options = part.split(";")
        known = MEDIA.get(media.strip().lower())
        if known is not None and (quality := _quality(options)) > best_quality:
            best, best_quality = known, quality
    if best is None:
        raise NotAcceptable(
            "Answers are `application/graphql-response+json` or `application/json`."
        )
    return best


MEDIA: Final = {
    "application/graphql-response+json": RESPONSE_JSON,
    "application/json": JSON,
    "application/*": JSON,
    "text/event-stream": EVENTS,
    "*/*": JSON,
    "": JSON,
}


@short_texts
def takes_events(accept: str | None) -> bool:
    """Whether a stream of events is acceptable, however much something else is liked more."""
    for part in (accept or "").split(","):
        media, *options = part.split(";")
        if media.strip().lower() == "text/event-stream" and _quality(options) > 0:
            return True
    return False


def _quality(options: list[str]) -> float:
    for option in options:
        name, _, value = option.partition("=")
        if name.strip().lower() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def _wants_page(request: Incoming) -> bool:
    """A person's browser: it says `text/html` itself, and asks for no operation."""
    if b"text/html" not in request.headers.get(b"accept", b""):
        return False
    asked = {"query", "extensions", "documentId"} & request.whole.query_params.keys()
    accepted = (part.split(";")[0].strip() for part in (request.header(b"accept") or "").split(","))
    return not asked and "text/html" in accepted


def _request_error_status(media: str) -> int:
    """Clients of the older media type read the body of a 200 only."""
    return 200 if media is JSON else 400


def _allowed(method: str) -> str:
    return "POST" if method == "GET" else "GET, POST"
