"""GraphQL over HTTP (https://graphql.github.io/graphql-over-http/draft/): requests in, answers out."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

import orjson
import strawberry
from graphql import OperationType
from graphql.execution.values import VariableValues
from starlette.datastructures import URL, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.tokens import authenticate
from modelharbor.auth.viewer import ANONYMOUS
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
from modelharbor.execution.failures import expected, problem, unexpected
from modelharbor.execution.persisted import check_hash, find, keep, named_hash
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
from .state import State

RESPONSE_JSON: Final = "application/graphql-response+json; charset=utf-8"
Page: TypeAlias = Callable[[Request[State]], Awaitable[Response]]
"""Answers browsers that come without an operation."""
NESTING = 128  # of variables and extensions: far above any input type, far below Python's stack
COST_HEADER = b"x-modelharbor-cost"


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a request carries, by GET or POST; of the right types."""

    query: str | None
    variables: dict[str, Any]
    operation_name: str | None
    extensions: dict[str, Any]
    document_id: object


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer, ready to be sent."""

    status: int
    media: bytes
    body: bytes


class Incoming:
    """A request as ASGI hands it over; Starlette's, where more than headers and body is wanted."""

    __slots__ = ("_headers", "method", "receive", "scope", "state")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope, self.receive = scope, receive
        self.method: str = scope["method"]
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
            content = {"errors": with_request_id(request.scope, list(error.problems))}
            return json_response(content, _request_error_status(media), None, media)
        except Exception as error:
            failure = expected(error)
            if failure is None:
                raise  # the middleware masks and reports it
            allow = {"allow": _allowed(method)} if failure.status == 405 else {}
            return error_response(request.scope, failure, allow, media)

    async def answer(self, request: "Incoming", media: str) -> "Encoded":
        parameters = await self.parameters(request)
        self.check_values(parameters.variables)
        document = await self.document(request, parameters)
        operation = document.operation(parameters.operation_name)
        request.scope[OPERATION] = operation.name
        if operation.kind is OperationType.SUBSCRIPTION:
            raise BadRequest("Subscriptions do not run over plain HTTP.")
        if operation.kind is OperationType.MUTATION and request.method == "GET":
            raise MethodNotAllowed("Mutations take POST.")
        values = operation.coerce(parameters.variables)
        try:
            requested = self.documents.check_cost(operation, values)
        except OperationTooComplex as error:
            raise InvalidDocument((problem(error),)) from None  # with these variables
        with operation_scope(operation.kind.value, operation.name):
            deadline = await self.take_place()
            try:
                answer, cost = await self.execute(
                    request, document, operation, parameters, values, requested, deadline
                )
            finally:
                self.places.release()
            return self.encode(request, answer, cost, media)

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
        self,
        request: "Incoming",
        document: Document,
        operation: Operation,
        parameters: Parameters,
        values: VariableValues | None,
        requested: int,
        deadline: float,
    ) -> tuple[Answer, dict[str, Any] | None]:
        """The answer, and what it cost where that is to be told."""
        state = request.state
        authorization = request.header(b"authorization")
        count = CommandCount()
        token = counted.set(count)
        try:
            context = Context(
                database=state["database"],
                cache=state["cache"],
                lanes=state["lanes"],
                viewer=ANONYMOUS
                if authorization is None
                else await authenticate(state["database"], authorization),
                links=DownloadLinks(state["secret_key"], partial(self.base_url, request)),
                settings=self.settings,
                request_id=request_id_of(request.scope),
            )
            answer = await run(
                self.schema, document, operation, parameters.variables, context, deadline, values
            )
        finally:
            counted.reset(token)
        self.metrics.count_operation(answer.fallback)
        cost = None
        if self.settings.debug or request.header(COST_HEADER) == "1":
            cost = {
                "requested": requested,
                "actual": actual_cost(
                    self.documents.guard.prices,
                    document.node,
                    operation.node,
                    parameters.variables,
                    answer.data,
                ),
                "dbCommands": len(count.names),
                "dbMs": round(count.micros / 1000, 3),
                "loaderBatches": context.count.batches,
                "cacheHits": count.cache_hits,
            }
        return answer, cost

    def encode(
        self, request: "Incoming", answer: Answer, cost: dict[str, Any] | None, media: str
    ) -> "Encoded":
        content: dict[str, Any] = {}
        if answer.errors:
            content["errors"] = with_request_id(request.scope, answer.errors)
        status = _request_error_status(media) if answer.is_refused else 200
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
                return Encoded(status, media.encode(), body)
            message = f"The answer has {size} bytes; the limit is {limit}: ask for less at once."
            made = problem(OperationTooComplex(message, measure="answer", value=size, limit=limit))
        content |= {"errors": with_request_id(request.scope, [made]), "data": None}
        return Encoded(200, media.encode(), orjson.dumps(content))

    def base_url(self, request: "Incoming") -> str:
        found = self.settings.public_url or URL(scope=request.scope).replace(
            path="", query="", fragment=""
        )
        return str(found).rstrip("/")

    async def document(self, request: "Incoming", parameters: Parameters) -> Document:
        named = named_hash(parameters.document_id, parameters.extensions)
        cache = request.state["cache"]
        if parameters.query is not None:
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
            _check_encoding(request.scope["query_string"])
            return _checked(from_query_string(request.whole.query_params))
        _check_content(request.header(b"content-type"), request.header(b"content-encoding"))
        body = await self.body(request)
        found = _json(body, "The body")
        if not isinstance(found, dict):
            raise BadRequest("The body takes one JSON object; batches are not taken.")
        return _checked(found)

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


def _check_encoding(query_string: bytes) -> None:
    """What reads it puts replacement characters where it is not UTF-8: another text would run."""
    try:
        unquote_to_bytes(query_string).decode()
        query_string.decode("ascii")
    except UnicodeDecodeError as error:
        raise BadRequest("The query string is not percent-encoded UTF-8.") from error


def from_query_string(query: QueryParams) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: query[name] for name in ("query", "operationName", "documentId") if name in query
    }
    for name in ("variables", "extensions"):
        if query.get(name):
            found[name] = _json(query[name].encode(), f"`{name}`")
    return found


def _json(text: bytes, what: str) -> Any:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"{what} is not JSON in UTF-8.") from error
    if text.count(b"{") + text.count(b"[") > NESTING and is_nested_deeper(found, NESTING):
        raise BadRequest(f"{what} is nested deeper than {NESTING} levels.")
    return found


def is_nested_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return any(isinstance(value, (dict, list)) for value in level)


def count_variable_values(variables: Mapping[str, Any], limit: int) -> int:
    """Values at all levels; counted no further than the list or object that passes the limit."""
    found = len(variables)
    waiting = list(variables.values())
    while waiting and found <= limit:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            found += len(value)
            waiting += value.values() if isinstance(value, dict) else value
    return found


def _checked(found: Mapping[str, Any]) -> Parameters:
    for name, kind, what in (
        ("query", str, "a string"),
        ("operationName", str, "a string"),
        ("variables", dict, "an object"),
        ("extensions", dict, "an object"),
    ):
        if found.get(name) is not None and not isinstance(found[name], kind):
            raise BadRequest(f"`{name}` takes {what}.")
    return Parameters(
        found.get("query"),
        found.get("variables") or {},
        found.get("operationName") or None,
        found.get("extensions") or {},
        found.get("documentId"),
    )


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
    "*/*": JSON,
    "": JSON,
}


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
    return 400 if media == RESPONSE_JSON else 200


def _allowed(method: str) -> str:
    return "POST" if method == "GET" else "GET, POST"
