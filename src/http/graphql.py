"""GraphQL over HTTP (https://graphql.github.io/graphql-over-http/draft/): requests in, answers out.

Over WebSocket: sockets.py; as a stream of events: events.py.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

import orjson
import strawberry
from graphql import OperationType
from graphql.execution.values import VariableValues, get_variable_values
from starlette.datastructures import URL
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.tokens import authenticate
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.context import Context
from modelharbor.errors import (
    BadRequest,
    MethodNotAllowed,
    NotAcceptable,
    OperationTooComplex,
    PayloadTooLarge,
    RequestTimeout,
    Unavailable,
    UnsupportedMediaType,
)
from modelharbor.execution.answered import actual_cost
from modelharbor.execution.documents import Document, DocumentStore, InvalidDocument, Operation
from modelharbor.execution.execute import Answer, run
from modelharbor.execution.failures import expected, problem, request_problem, unexpected
from modelharbor.execution.persisted import check_hash, find, keep, named_hash
from modelharbor.execution.subscribing import Asked
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.observability.metrics import Metrics
from modelharbor.observability.sentry import operation_scope
from modelharbor.settings import Settings

from .answers import (
    JSON,
    OPERATION,
    error_response,
    json_response,
    request_id_of,
    with_request_id,
)
from .events import EVENTS, EventStream
from .parameters import (
    Parameters,
    check_encoding,
    count_variable_values,
    from_query_string,
    read_json,
    read_parameters,
)
from .sockets import Socket
from .state import State

RESPONSE_JSON: Final = "application/graphql-response+json; charset=utf-8"
Page: TypeAlias = Callable[[Request[State]], Awaitable[Response]]
"""Answers browsers that come without an operation."""
COST_HEADER = b"x-modelharbor-cost"
TOLD_BY_EVENTS: Final = frozenset({200, 400, 403, 404, 410})
"""What is wrong with an operation, to a client that takes events alone: it reads no other answer, and
comes again after most of them. What is wrong with its request, or passes, stays a status."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An operation that may run: valid, and within the limits."""

    document: Document
    operation: Operation
    variables: dict[str, Any]
    values: VariableValues | None  # None: they do not fit, graphql-core tells why
    requested: int  # its cost


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer, ready to be sent."""

    status: int
    media: bytes
    body: bytes


class Incoming:
    """A request as ASGI hands it over; Starlette's, where more than headers and body is wanted."""

    __slots__ = ("_headers", "is_socket", "method", "receive", "scope", "state")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope, self.receive = scope, receive
        self.is_socket: bool = scope["type"] == "websocket"
        self.method: str = scope.get("method", "GET")
        self.state: State = scope["state"]
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))

    def header(self, name: bytes) -> str | None:
        """Of several the first; `name` in lower case."""
        found = self._headers.get(name)
        return None if found is None else found.decode("latin-1")

    @property
    def whole(self) -> Request[State]:
        return Request(self.scope, self.receive)


P = ParamSpec("P")
T = TypeVar("T")


def short_texts(function: Callable[P, T]) -> Callable[P, T]:
    """Remembers a few answers for short arguments: clients send the same headers again and again."""
    remembered = lru_cache(maxsize=64)(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        if all(len(str(value)) <= 128 for value in args):
            return remembered(*args, **kwargs)  # type: ignore[arg-type]  # all of them texts
        return function(*args, **kwargs)

    return called


class GraphQLEndpoint:
    """The ASGI application at `/graphql`."""

    def __init__(
        self, schema: strawberry.Schema, settings: Settings, page: Page, metrics: Metrics
    ) -> None:
        self.schema = schema
        self.metrics = metrics
        self.settings = settings
        self.page = page
        self.documents = DocumentStore(schema._schema, settings)
        self.places = asyncio.Semaphore(settings.max_running_operations)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Incoming(scope, receive)
        if request.is_socket:
            await Socket(self, request, send).serve()
            return
        answer = await self.respond(request)
        if isinstance(answer, Response):
            answer.headers.add_vary_header("Accept")
            await answer(scope, receive, send)
            return
        # What almost every answer is, without Starlette's Response: its headers are always the same.
        headers = [
            (b"content-type", answer.media),
            (b"content-length", b"%d" % len(answer.body)),
            (b"cache-control", b"private, no-store"),
            (b"vary", b"Accept"),
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def respond(self, request: "Incoming") -> "Response | Encoded":
        media, method = JSON, request.method
        try:
            if method not in {"GET", "POST"}:
                raise MethodNotAllowed("GraphQL takes GET and POST.")
            if method == "GET" and _wants_page(request.whole):
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
            allow = {"allow": _allowed(method)} if failure.status == 405 else {}
            return error_response(request.scope, failure, allow, JSON if media is EVENTS else media)

    async def answer(self, request: "Incoming", media: str) -> "Response | Encoded":
        prepared = await self.prepare(request, await self.parameters(request))
        operation = prepared.operation
        request.scope[OPERATION] = operation.name
        if operation.kind is OperationType.MUTATION and request.method == "GET":
            raise MethodNotAllowed("Mutations take POST.")
        if operation.kind is OperationType.SUBSCRIPTION:
            if not takes_events(request.header(b"accept")):
                raise NotAcceptable(
                    "Subscriptions run over WebSocket, or with `Accept: text/event-stream`."
                )
            return await EventStream.of_subscription(self, request, prepared)
        with operation_scope(operation.kind.value, operation.name):
            answer, cost = await self.execute(request, prepared)
            if media is EVENTS:
                return EventStream.of_answer(self.content(request, answer, cost)[1])
            return self.encode(request, answer, cost, media)

    async def prepare(self, request: "Incoming", parameters: Parameters) -> "Prepared":
        """Raises InvalidDocument and HarborErrors for what cannot run."""
        self.check_values(parameters.variables)
        document = await self.document(request, parameters)
        operation = document.operation(parameters.operation_name)
        values = operation.coerce(parameters.variables)
        try:
            requested = self.documents.check_cost(operation, values)
        except OperationTooComplex as error:
            raise InvalidDocument((problem(error),)) from None  # with these variables
        return Prepared(document, operation, parameters.variables, values, requested)

    async def take_place(self) -> float:
        """A place among the running operations, first come, first served; answers when the operation's
        time is over. Unavailable when that is before there is a place.

        All at once, operations share the process until each takes longer than it may.
        """
        deadline = asyncio.get_running_loop().time() + self.settings.operation_timeout_seconds
        if not self.places.locked():
            await self.places.acquire()  # at once
            return deadline
        try:
            async with asyncio.timeout_at(deadline):
                await self.places.acquire()
        except TimeoutError:
            raise Unavailable("The server has too much to do; try again.") from None
        return deadline

    def check_values(self, variables: Mapping[str, Any]) -> None:
        """Coercion takes some 20 µs for each value, and lets no other request have a turn."""
        limit = self.settings.max_input_values
        value = count_variable_values(variables, limit)
        if value > limit:
            message = f"The variables hold {value} input values or more; the limit is {limit}."
            error = OperationTooComplex(message, measure="inputValues", value=value, limit=limit)
            raise InvalidDocument((problem(error),))

    async def execute(
        self, request: "Incoming", prepared: "Prepared", viewer: Viewer | None = None
    ) -> tuple[Answer, dict[str, Any] | None]:
        """The answer, and what it cost where that is to be told. `viewer`: where that is known."""
        count = CommandCount()
        deadline = await self.take_place()
        token = counted.set(count)
        try:
            if viewer is None:
                authorization = request.header(b"authorization")
                viewer = (
                    ANONYMOUS
                    if authorization is None
                    else await authenticate(request.state["database"], authorization)
                )
            context = self.context(request, viewer)
            answer = await run(
                self.schema,
                prepared.document,
                prepared.operation,
                prepared.variables,
                context,
                deadline,
                prepared.values,
            )
        finally:
            counted.reset(token)
            self.places.release()
        self.metrics.count_operation(answer.fallback)
        cost = None
        if self.settings.debug or request.header(COST_HEADER) == "1":
            cost = {
                "requested": prepared.requested,
                "actual": actual_cost(
                    self.documents.guard.prices,
                    prepared.document.node,
                    prepared.operation.node,
                    prepared.variables,
                    answer.data,
                ),
                "dbCommands": len(count.names),
                "dbMs": round(count.micros / 1000, 3),
                "loaderBatches": context.count.batches,
                "cacheHits": count.cache_hits,
            }
        return answer, cost

    def context(self, request: "Incoming", viewer: Viewer) -> Context:
        base_url = partial(self.base_url, request)
        return self.context_of(request.state, base_url, request_id_of(request.scope), viewer)

    def context_of(
        self, state: State, base_url: str | Callable[[], str], request_id: str, viewer: Viewer
    ) -> Context:
        return Context(
            database=state["database"],
            cache=state["cache"],
            lanes=state["lanes"],
            viewer=viewer,
            links=DownloadLinks(state["secret_key"], base_url),
            quota_bytes=self.settings.quota_bytes,
            settings=self.settings,
            storage=state["storage"],
            request_id=request_id,
        )

    def asked(self, request: "Incoming", prepared: "Prepared") -> Asked:
        """A subscription, for `Live`."""
        if prepared.values is None:  # graphql-core alone tells what is wrong with them
            given = get_variable_values(
                self.schema._schema,
                prepared.operation.node.variable_definitions or (),
                dict(prepared.variables),
                max_errors=self.settings.max_errors,
                hide_suggestions=not self.settings.introspection,
            )
            if isinstance(given, list):
                raise InvalidDocument(tuple(request_problem(error) for error in given))
        base_url = self.base_url(request)
        return Asked(
            prepared.document,
            prepared.operation,
            prepared.variables,
            prepared.values,
            base_url,
            # Without the request: others go on with this when its client has gone.
            partial(self.context_of, request.state, base_url, request_id_of(request.scope)),
        )

    def encode(
        self, request: "Incoming", answer: Answer, cost: dict[str, Any] | None, media: str
    ) -> "Encoded":
        is_refused, body = self.content(request, answer, cost)
        return Encoded(_request_error_status(media) if is_refused else 200, media.encode(), body)

    def content(
        self, request: "Incoming", answer: Answer, cost: dict[str, Any] | None
    ) -> tuple[bool, bytes]:
        """Whether the operation was refused, and the answer in JSON."""
        content: dict[str, Any] = {}
        if answer.errors:
            content["errors"] = with_request_id(request.scope, answer.errors)
        if not answer.is_refused:
            content["data"] = answer.data
        if cost is not None:
            content["extensions"] = {"cost": cost}
        try:
            body = orjson.dumps(content)
        except TypeError as error:  # a value that JSON does not have came out of a JSON scalar
            made = unexpected(error, "encoding")
        else:
            size, limit = len(body), self.settings.max_answer_bytes
            if size <= limit or answer.is_refused:
                return answer.is_refused, body
            message = f"The answer has {size} bytes; the limit is {limit}: ask for less at once."
            made = problem(OperationTooComplex(message, measure="answer", value=size, limit=limit))
        content |= {"errors": with_request_id(request.scope, [made]), "data": None}
        return False, orjson.dumps(content)

    def base_url(self, request: "Incoming") -> str:
        found = self.settings.public_url or URL(scope=request.scope).replace(
            path="", query="", fragment=""
        )
        address = str(found).rstrip("/")
        return "http" + address[2:] if request.is_socket else address

    async def document(self, request: "Incoming", parameters: Parameters) -> Document:
        named = named_hash(parameters.document_id, parameters.extensions)
        cache = request.state["cache"]
        # Clients of graphql-ws have to send a text: an empty one beside a hash is none.
        if parameters.query is not None and (parameters.query or named is None):
            if named is not None:
                check_hash(parameters.query, named)
            found = self.documents.get(parameters.query)
            if named is not None:
                await keep(cache, found)
            return found
        if named is None:
            raise BadRequest("The request has no `query`.")
        return await find(self.documents, cache, named)

    async def parameters(self, request: "Incoming") -> Parameters:
        if request.method == "GET":
            check_encoding(request.scope["query_string"])
            return read_parameters(from_query_string(request.whole.query_params))
        _check_content(request.header(b"content-type"), request.header(b"content-encoding"))
        body = await self.body(request)
        found = read_json(body, "The body")
        if not isinstance(found, dict):
            raise BadRequest("The body takes one JSON object; batches are not taken.")
        return read_parameters(found)

    async def body(self, request: "Incoming") -> bytes:
        """Read no further than the limit, whatever the headers say, and no longer than its time."""
        limit = self.settings.max_body_bytes
        too_large = PayloadTooLarge(f"The body is larger than {limit} bytes.")
        length = request.header(b"content-length") or ""
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        seconds = self.settings.body_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    if len(body) + len(chunk) > limit:
                        raise too_large
                    if not more and not body:
                        whole: bytes = chunk
                        return whole
                    body += chunk
                    if not more:
                        return bytes(body)
        except TimeoutError:
            raise RequestTimeout(f"The body did not arrive within {seconds:g} s.") from None


@short_texts
def _check_content(media_type: str | None, encoding: str | None) -> None:
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


def _wants_page(request: Request[State]) -> bool:
    """A person's browser: it says `text/html` itself, and asks for no operation."""
    asked = {"query", "extensions", "documentId"} & request.query_params.keys()
    accepted = (part.split(";")[0].strip() for part in request.headers.get("accept", "").split(","))
    return not asked and "text/html" in accepted


def _request_error_status(media: str) -> int:
    """Clients of the older media type read the body of a 200 only."""
    return 200 if media is JSON else 400


def _allowed(method: str) -> str:
    return "POST" if method == "GET" else "GET, POST"
