"""Operations, however they came: what may run, what it costs whom, and whether its answer is there already."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Final, NamedTuple

import orjson
import strawberry
from bson import ObjectId
from graphql import OperationType
from graphql.execution.values import VariableValues, get_variable_values
from starlette.datastructures import URL

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, PUBLIC, Viewer
from modelharbor.cache.answers import Layer, Made
from modelharbor.cache.budgets import Charge
from modelharbor.cache.entries import Access, Entry
from modelharbor.context import Context
from modelharbor.errors import (
    HarborError,
    OperationTooComplex,
    PersistedQueryNotFound,
    Unauthenticated,
    Unavailable,
)
from modelharbor.execution.answered import actual_cost
from modelharbor.execution.budgets import count_rows, dry_run
from modelharbor.execution.caching import answer_key
from modelharbor.execution.documents import Document, DocumentStore, InvalidDocument, Operation
from modelharbor.execution.execute import Answer, run
from modelharbor.execution.failures import Problem, problem, request_problem, unexpected
from modelharbor.execution.kept import Kept
from modelharbor.execution.persisted import Resolved
from modelharbor.execution.plan import Plan
from modelharbor.execution.policy import Policy
from modelharbor.execution.subscribing import Asked
from modelharbor.loaders.budgets import Spending
from modelharbor.loaders.rights import narrowed
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.observability.metrics import Metrics
from modelharbor.resolvers.recording import Work, operation_key
from modelharbor.settings import Settings

from .answers import request_id_of, with_request_id
from .budgets import BAD_DOCUMENT, BAD_TOKEN, LEAST, Principal, price, principal_of, throttle_status
from .clients import class_of
from .incoming import Incoming
from .parameters import Parameters, count_variable_values
from .state import State

COST_HEADER: Final = b"x-modelharbor-cost"
REMEMBERED, REMEMBERED_BYTES = 4096, 2 * 2**20  # requests; what they were sent as, with their texts
LONGEST_REMEMBERED: Final = 8192  # bytes
WORTH_A_LOOK: Final = 10  # a cost: what could be given back of less is not worth counting


@dataclass(frozen=True, slots=True)
class Prepared:
    """An operation that may run: valid, and within the limits."""

    resolved: Resolved
    document: Document
    operation: Operation
    variables: dict[str, Any]
    values: VariableValues | None  # None: they do not fit, graphql-core tells why
    requested: int  # its cost
    is_dry_run: bool = False
    is_registering: bool = False
    """Whether its text came with a name, to be known by from now on."""
    policy: Policy | None = None  # None: its answer is not kept
    key: bytes = b""  # of its answer, where that is kept
    usage: str = ""  # what its calls are counted under

    @property
    def own_price(self) -> int | None:
        """Of a published operation that has one: nothing of it is given back."""
        trusted = self.resolved.trusted
        return None if trusted is None else trusted.price

    @property
    def price(self) -> int:
        return price(self.requested, self.own_price, is_dry_run=self.is_dry_run)


class Executed(NamedTuple):
    """An answer in JSON, whole."""

    body: bytes
    charge: Charge
    problems: list[Problem]
    is_refused: bool = False
    entry: Entry | None = None
    """What is kept of it; its body is `body`, where nothing was added for this request."""
    layer: Layer = Layer.BYPASS
    cost: int = 0
    """The actual one."""
    work: Work | None = None
    """What it took to make it; None: it was kept."""
    viewed: tuple[ObjectId, ...] = ()
    """The models that it shows by their own field."""


class Operations:
    """Those of one process."""

    def __init__(self, schema: strawberry.Schema, settings: Settings, metrics: Metrics) -> None:
        self.schema, self.settings, self.metrics = schema, settings, metrics
        self.documents = DocumentStore(schema._schema, settings)
        self.places = asyncio.Semaphore(settings.max_running_operations)
        self._remembered: Kept[bytes, tuple[int, Prepared]] = Kept(REMEMBERED, REMEMBERED_BYTES)

    # ---- what may run

    def known(self, request: Incoming, sent: bytes) -> Prepared | None:
        """What the same bytes were prepared to before, while the same operations are published."""
        found = self._remembered.get(sent)
        if found is None or found[0] != request.state["persisted"].published.version:
            return None
        return found[1]

    def remember(self, sent: bytes, version: int, prepared: Prepared) -> None:
        """`version`: of the published operations, before it was prepared."""
        size = len(sent) + len(prepared.document.text)  # which it keeps
        if size <= LONGEST_REMEMBERED and not prepared.is_registering:
            self._remembered.put(sent, (version, prepared), size)

    def refuse(self, request: Incoming) -> None:
        """Charge an operation that was prepared and cannot run in this way."""
        request.state["budgets"].owe(*self.principal(request), BAD_DOCUMENT)

    async def prepare(self, request: Incoming, parameters: Parameters) -> Prepared:
        """Raises InvalidDocument and HarborErrors for what cannot run."""
        budgets = request.state["budgets"]
        principal = self.principal(request)
        exhausted = budgets.exhausted(*principal)
        if exhausted is not None:
            exhausted.check()
        try:
            return await self._prepared(request, parameters)
        except InvalidDocument:
            budgets.owe(*principal, BAD_DOCUMENT)
            raise
        except PersistedQueryNotFound:
            budgets.owe(*principal, LEAST)
            raise
        except HarborError as error:
            if error.status < 500:
                budgets.owe(*principal, BAD_DOCUMENT)
            raise

    async def _prepared(self, request: Incoming, parameters: Parameters) -> Prepared:
        self.check_values(parameters.variables)
        resolved = await request.state["persisted"].resolve(
            parameters, is_person=request.authorization is not None
        )
        document = resolved.document
        operation = document.operation(parameters.operation_name)
        values = operation.coerce(parameters.variables)
        try:
            requested = self.documents.check_cost(operation, values)
        except OperationTooComplex as error:
            raise InvalidDocument((problem(error),)) from None  # with these variables
        measured = dry_run(self.schema._schema, document, operation, values)
        if measured is not None:
            document, operation = measured
        policy = self._policy(operation, values) if measured is None else None
        given = parameters.variables
        return Prepared(
            resolved,
            document,
            operation,
            given,
            values,
            requested,
            is_dry_run=measured is not None,
            is_registering=resolved.by == "text"
            and bool(parameters.document_id or parameters.extensions),
            policy=policy,
            key=answer_key(self.schema._schema, document, operation, given) if policy else b"",
            usage=operation_key(resolved.document.sha256, operation.name),
        )

    def _policy(self, operation: Operation, values: VariableValues | None) -> Policy | None:
        """None: its answers are not kept."""
        settings = self.settings
        if not settings.response_cache or not settings.compiled_plans or values is None:
            return None
        if operation.kind is not OperationType.QUERY:
            return None
        plan = operation.plan(self.schema, values)
        return plan.policy if isinstance(plan, Plan) and plan.policy.max_age > 0 else None

    def check_values(self, variables: Mapping[str, Any]) -> None:
        """Coercion takes some 20 µs for each value, and lets no other request have a turn."""
        limit = self.settings.max_input_values
        value = count_variable_values(variables, limit)
        if value > limit:
            message = f"The variables hold {value} input values or more; the limit is {limit}."
            error = OperationTooComplex(message, measure="inputValues", value=value, limit=limit)
            raise InvalidDocument((problem(error),))

    # ---- who asks, and who pays

    def principal(self, request: Incoming, viewer: Viewer | None = None) -> Principal:
        """Who pays, as far as that is known before anything is read."""
        if viewer is None and request.authorization is not None:
            viewer = request.state["sessions"].known(request.authorization)
        return principal_of(request.scope, viewer)

    async def viewer(self, request: Incoming, usable: bool) -> Viewer:
        """Who asks; `usable`: what is kept of tokens is good for it. Raises Unauthenticated."""
        if request.authorization is None:
            return ANONYMOUS
        try:
            return await request.state["sessions"].viewer(request.authorization, usable)
        except Unauthenticated:
            request.state["budgets"].owe(*self.principal(request), BAD_TOKEN)
            raise

    async def admit(self, request: Incoming, prepared: Prepared, viewer: Viewer) -> None:
        """A subscription: raises what forbids it."""
        state = request.state
        charge = state["budgets"].charge(*self.principal(request, viewer), prepared.price)
        if charge.waits:
            await state["freshness"].rounds.next()
        charge.check()
        state["persisted"].check(prepared.resolved, viewer)
        state["persisted"].used(prepared.resolved)

    def begun(self, request: Incoming, prepared: Prepared, since: float) -> None:
        """A subscription has: it is one call, whatever follows. `since`: when it was asked for, by
        `perf_counter`."""
        milliseconds = (perf_counter() - since) * 1000
        client = class_of(request.headers.get(b"user-agent"))
        request.state["usage"].operation(
            prepared.usage, client, milliseconds, prepared.requested, Work()
        )

    # ---- running them

    async def execute(
        self, request: Incoming, prepared: Prepared, viewer: Viewer | None = None
    ) -> Executed:
        """`viewer`: where that is known.

        One round trip to Redis, together with all who wait, tells what has changed and who may go on.
        A look at what is kept costs 1; the price of the operation is charged when it has to run.
        """
        since = perf_counter()
        state, policy = request.state, prepared.policy
        freshness, usage = state["freshness"], state["usage"]
        token = counted.set(CommandCount()) if self.tells_cost(request) else None
        try:
            principal = self.principal(request, viewer)
            cost = prepared.price if policy is None else LEAST
            charge = state["budgets"].charge(*principal, cost)
            usable = await freshness.ready()
            if charge.waits and not freshness.is_enabled:
                await freshness.rounds.next()
            charge.check()
            if policy is None or not usable:
                executed = await self._run(request, prepared, viewer, usable, charge, None)
            else:
                if viewer is None:
                    viewer = await self.viewer(request, usable)
                executed = await self._kept(request, prepared, policy, viewer, charge)
            state["persisted"].used(prepared.resolved)
        finally:
            if token is not None:
                counted.reset(token)
        if usage.is_on and not executed.is_refused:
            usage.operation(
                prepared.usage,
                class_of(request.headers.get(b"user-agent")),
                (perf_counter() - since) * 1000,
                executed.cost,
                executed.work,
                executed.viewed,
                is_failed=bool(executed.problems),
            )
        return executed

    async def _kept(
        self,
        request: Incoming,
        prepared: Prepared,
        policy: Policy,
        viewer: Viewer,
        charge: Charge,
    ) -> Executed:
        state = request.state
        state["persisted"].check(prepared.resolved, viewer)
        heard_at = state["freshness"].heard_at
        rights = PUBLIC if viewer.user is None else await state["rights"].of(viewer)
        answers, key, name = state["answers"], prepared.key, viewer.identity
        entry, layer, made = answers.peek(key, rights, name), Layer.L1, None
        if entry is None:
            seen = narrowed(viewer, rights)

            async def make() -> Made:
                executed = await self._run(request, prepared, seen, True, charge, policy)
                return Made(executed, executed.entry)

            served = await answers.answer(key, rights, name, policy.is_private, make)
            entry, layer = served.entry, served.layer
            made = None if served.made is None else served.made.answer
        is_anybodys = entry is not None and entry.access is Access.ANYBODY
        is_later = entry is None or entry.read_at > heard_at
        # Something may have become the viewer's own after it was asked what is, and before this was
        # read, which leaves that out.
        is_doubtful = viewer.user is not None and is_later and not is_anybodys
        if is_doubtful and not await state["rights"].are_all(viewer, rights):
            return await self._run(request, prepared, viewer, True, charge, None)
        if made is not None:
            executed: Executed = made
            return executed
        assert entry is not None
        body = entry.body
        if self.tells_cost(request):
            count = counted.get() or CommandCount()
            count.cache_hits += 1
            body = _with_cost(body, self.cost(prepared, entry.cost, count, 0, charge))
        return Executed(
            body, charge, [], entry=entry, layer=layer, cost=entry.cost, viewed=entry.viewed
        )

    async def _run(
        self,
        request: Incoming,
        prepared: Prepared,
        viewer: Viewer | None,
        usable: bool,
        charge: Charge,
        policy: Policy | None,
    ) -> Executed:
        """`policy`: of what is kept of the answer; None: nothing is."""
        state = request.state
        position = None if policy is None else state["freshness"].position
        begun = time.time()
        if charge.cost < prepared.price:
            charge = await self._pay(state, charge, prepared.price - charge.cost)
        outer, count = counted.get(), CommandCount()
        deadline = await self.take_place()
        token = counted.set(count)
        try:
            if viewer is None:
                viewer = await self.viewer(request, usable)
            state["persisted"].check(prepared.resolved, viewer)
            context = self.context(request, viewer)
            context.spending = Spending(charge, prepared.requested, partial(self._rows, prepared))
            answer = await run(
                self.schema,
                prepared.document,
                prepared.operation,
                prepared.variables,
                context,
                deadline,
                prepared.values,
                position=position,
            )
        finally:
            counted.reset(token)
            self.places.release()
            if outer is not None:
                outer.add(count)
        read_at = time.monotonic()
        if prepared.operation.kind is OperationType.MUTATION:
            if count.wrote is not None:
                await state["freshness"].acknowledge(count.wrote)
            elif not _is_refused(answer):
                await state["freshness"].acknowledge_read(count.read)
        self.metrics.count_operation(answer.fallback)
        actual = self._actual(request, prepared, answer)
        # What failed is not given back: who makes it fail would pay nothing.
        if prepared.own_price is None and not answer.errors:
            state["budgets"].settle(charge, max(actual, LEAST) - (prepared.price - charge.cost))
        is_whole, body = self.content(request, answer)
        entry, read = None, answer.read
        if policy is not None and is_whole and read is not None and policy.max_age > read.age:
            entry = Entry(
                body,
                read.position,
                read.tags,
                read.access,
                begun,
                policy.max_age - read.age,
                policy.stale,
                policy.is_private,
                actual,
                answer.viewed,
                read_at,
            )
        work = Work(len(count.names), context.count.batches, context.count.keys)
        if self.tells_cost(request):
            batches = context.count.batches
            body = _with_cost(body, self.cost(prepared, actual, count, batches, charge))
        layer = Layer.BYPASS if policy is None else Layer.MISS
        return Executed(
            body,
            charge,
            answer.errors,
            answer.is_refused,
            entry,
            layer,
            actual,
            work,
            answer.viewed,
        )

    async def _pay(self, state: State, charge: Charge, more: int) -> Charge:
        """What running it costs beyond the look that was charged already. Raises RateLimited."""
        if charge.budget is None:
            return charge
        found = state["budgets"].charge(charge.principal, charge.budget.kind, more)
        await state["freshness"].rounds.next()
        found.check()
        return found

    def _rows(self, prepared: Prepared) -> int:
        prices, resolved = self.documents.guard.prices, prepared.resolved.document
        operation = resolved.operation(prepared.operation.name)
        return count_rows(prices, resolved, operation, prepared.values)

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
            export_link_minutes=self.settings.export_link_minutes,
            max_analytics_buckets=self.settings.max_analytics_buckets,
            max_analytics_models=self.settings.max_analytics_models,
            settings=self.settings,
            storage=state["storage"],
            request_id=request_id,
            caches=self.metrics.caches,
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

    # ---- what it cost

    def _actual(self, request: Incoming, prepared: Prepared, answer: Answer) -> int:
        """What the answer was worth; where that can hardly be less, what was asked for."""
        if prepared.requested < WORTH_A_LOOK and not self.tells_cost(request):
            return prepared.requested
        return actual_cost(
            self.documents.guard.prices,
            prepared.document.node,
            prepared.operation.node,
            prepared.variables,
            answer.data,
        )

    def tells_cost(self, request: Incoming) -> bool:
        return self.settings.debug or request.headers.get(COST_HEADER) == b"1"

    def cost(
        self, prepared: Prepared, actual: int, count: CommandCount, batches: int, charge: Charge
    ) -> dict[str, Any]:
        """`extensions.cost`."""
        found = {
            "requested": prepared.requested,
            "actual": actual,
            "dbCommands": len(count.names),
            "dbMs": round(count.micros / 1000, 3),
            "loaderBatches": batches,
            "cacheHits": count.cache_hits,
        }
        status = throttle_status(charge)
        return found if status is None else {**found, "throttleStatus": status}

    def content(self, request: Incoming, answer: Answer) -> tuple[bool, bytes]:
        """The answer in JSON, and whether that is all of it, without errors."""
        content: dict[str, Any] = {}
        if answer.errors:
            content["errors"] = with_request_id(request.scope, answer.errors)
        if not answer.is_refused:
            content["data"] = answer.data
        try:
            body = orjson.dumps(content)
        except TypeError as error:  # a value that JSON does not have came out of a JSON scalar
            made = unexpected(error, "encoding")
        else:
            size, limit = len(body), self.settings.max_answer_bytes
            if size <= limit or answer.is_refused:
                return not answer.errors, body
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


def _is_refused(answer: Answer) -> bool:
    """Whether all that a mutation was to do was refused, so that nothing is acknowledged."""
    if answer.errors or answer.data is None:
        return True
    return all(isinstance(each, dict) and each.get("userErrors") for each in answer.data.values())


def _with_cost(body: bytes, cost: dict[str, Any]) -> bytes:
    """An answer, which is a JSON object that is not empty, with `extensions` as its last member."""
    return b'%b,"extensions":{"cost":%b}}' % (body[:-1], orjson.dumps(cost))
