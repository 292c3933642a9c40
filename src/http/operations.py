"""Operations, however they came: what may run, and how it is run."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import orjson
import strawberry
from graphql.execution.values import VariableValues, get_variable_values
from starlette.datastructures import URL

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.tokens import authenticate
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.context import Context
from modelharbor.errors import BadRequest, OperationTooComplex, Unavailable
from modelharbor.execution.answered import actual_cost
from modelharbor.execution.documents import Document, DocumentStore, InvalidDocument, Operation
from modelharbor.execution.execute import Answer, run
from modelharbor.execution.failures import problem, request_problem, unexpected
from modelharbor.execution.persisted import check_hash, find, keep, named_hash
from modelharbor.execution.subscribing import Asked
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.observability.metrics import Metrics
from modelharbor.settings import Settings

from .answers import request_id_of, with_request_id
from .incoming import Incoming
from .parameters import Parameters, count_variable_values
from .state import State

COST_HEADER: Final = b"x-modelharbor-cost"


@dataclass(frozen=True, slots=True)
class Prepared:
    """An operation that may run: valid, and within the limits."""

    document: Document
    operation: Operation
    variables: dict[str, Any]
    values: VariableValues | None  # None: they do not fit, graphql-core tells why
    requested: int  # its cost


class Operations:
    """Those of one process."""

    def __init__(self, schema: strawberry.Schema, settings: Settings, metrics: Metrics) -> None:
        self.schema, self.settings, self.metrics = schema, settings, metrics
        self.documents = DocumentStore(schema._schema, settings)
        self.places = asyncio.Semaphore(settings.max_running_operations)

    async def prepare(self, request: Incoming, parameters: Parameters) -> Prepared:
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

    async def document(self, request: Incoming, parameters: Parameters) -> Document:
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
        self, request: Incoming, prepared: Prepared, viewer: Viewer | None = None
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

    def context(self, request: Incoming, viewer: Viewer) -> Context:
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

    def asked(self, request: Incoming, prepared: Prepared) -> Asked:
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

    def content(
        self, request: Incoming, answer: Answer, cost: dict[str, Any] | None
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

    def base_url(self, request: Incoming) -> str:
        found = self.settings.public_url or URL(scope=request.scope).replace(
            path="", query="", fragment=""
        )
        address = str(found).rstrip("/")
        return "http" + address[2:] if request.is_socket else address
