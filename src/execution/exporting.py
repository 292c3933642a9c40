"""All rows of one connection, batch by batch, in an order that nothing moves: what exports are made of.

The plan of the query runs as for any other; only windows are of our own. The root one goes on from the
row before, in an order of values that never change, so a row that is there throughout comes once,
whatever changes meanwhile. Nested ones without `first` and `last` take all rows up to a limit.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace
from inspect import isawaitable
from typing import Any, Final, TypeVar

import orjson
import strawberry
from graphql import (
    GraphQLError,
    GraphQLNamedType,
    OperationType,
    get_named_type,
    is_enum_type,
    is_leaf_type,
    is_list_type,
    is_non_null_type,
    is_object_type,
)
from graphql.execution.values import VariableValues, get_argument_values, get_variable_values
from pymongo.errors import ExecutionTimeout
from strawberry.relay.utils import to_base64

from modelharbor.context import Context
from modelharbor.db.base import Row
from modelharbor.db.conditions import all_of
from modelharbor.db.ending import ended
from modelharbor.db.keyset import (
    DEFAULT_PAGE,
    Filter,
    Order,
    Sorted,
    Window,
    decode_cursor,
    encode_cursor,
)
from modelharbor.db.reading import TooManyBytesError, in_one_reply
from modelharbor.errors import (
    BadUserInput,
    Conflict,
    HarborError,
    NotFound,
    OperationTooComplex,
    Unavailable,
)
from modelharbor.exports.columns import Column, ColumnKind
from modelharbor.loaders.base import ROOT, Loader
from modelharbor.loaders.pages import PageLoader, TooManyRowsError
from modelharbor.settings import Settings

from .arguments import Binder
from .declaration import Loaded, Rows, declaration
from .documents import Document, DocumentStore, InvalidDocument, Operation
from .execute import run
from .failures import expected, request_problem
from .guard import LARGEST
from .kept import Kept
from .plan import Plan, Step, make_plan
from .reading import Run
from .selection import NotPlanned, Selected, Selection, fields_of

T = TypeVar("T")
log = logging.getLogger(__name__)
MOST_ROWS: Final = 1000  # of a batch
FIRST_ROWS: Final = 100  # of the first one, before it is known how large they are
MOST_BELOW: Final = 1000  # rows of a nested connection, of one parent, where nobody says how many
FIRST_BELOW: Final = 20
"""Of these read at first, where one row has more below it than a batch may; the few parents with more
are read again."""
PARENTS_AT_ONCE: Final = 1000
LARGE_PARENTS_AT_ONCE: Final = 20
ROWS_BELOW: Final = 20_000
"""Rows of nested connections that a batch holds: with more it is made smaller. One row that has more by
itself is cut there."""
BATCH_BYTES: Final = 8 * 1024 * 1024  # of a batch as JSON: with more the next one is made smaller
SAMPLES: Final = 20  # rows of a batch whose length is looked at
ROW_SECONDS: Final = 60.0  # for one row, where no plan makes it
IMMUTABLE: Final = frozenset({"_id", "created_at", "number", "path"})
"""Stored names of orders in which no row ever moves."""
BY_CREATION: Final = Order("created_at", Sorted.TIME, ascending=True)
BY_ID: Final = Order("_id", Sorted.ID, ascending=True)
PASSING: Final = frozenset({"TIMEOUT", "UNAVAILABLE"})  # codes of what may go well later

ARGUMENTS, ARGUMENTS_BYTES = 64, 2**16  # that are kept, and the variables they are made of

MakeContext = Callable[[], "Awaitable[Context] | Context"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that the API answers with an error; it is left out where there is nothing but that."""

    id: str  # global
    message: str


@dataclass(frozen=True, slots=True)
class Batch:
    rows: list[Row]
    """As GraphQL answers the nodes of the connection."""
    after: str
    """Go on with this,"""
    parent: str
    """and with this: what the connection is of, such as a version."""
    truncated: int = 0
    """Nested connections with more rows than are here."""
    faults: tuple[Fault, ...] = ()


class _PageFoundError(Exception):
    """No more is to be read."""

    def __init__(self, page: Row | None, parent: Hashable) -> None:
        self.page, self.parent = page, str(parent)


class _TooMuchError(Exception):
    """A batch that holds too many rows below its own."""


def prepare_export(
    schema: strawberry.Schema,
    settings: Settings,
    text: str,
    variables: Mapping[str, Any],
    operation_name: str | None = None,
) -> "ExportQuery":
    """InvalidDocument, with all its problems, for a text or variables that cannot run; BadUserInput,
    BadRequest, OperationTooComplex, PayloadTooLarge for what cannot be exported. Reads nothing."""
    # What counts is the cost of a row, however many there are.
    unpriced = settings.model_copy(update={"max_cost": LARGEST, "document_cache_size": 1})
    documents = DocumentStore(schema._schema, unpriced)
    document = documents.get(text)
    operation = document.operation(operation_name)
    if operation.kind is not OperationType.QUERY:
        raise BadUserInput(f"An export is made of a query; this is a {operation.kind.value}.")
    values = operation.coerce(variables)
    if values is None:
        values = _coerced(schema, settings, operation, variables)
    cost = documents.check_cost(operation, values)
    try:
        selection = Selection(schema._schema, document.node, operation.node, values)
        found = _chain(selection)
        plan = make_plan(schema, selection, Kept(ARGUMENTS, ARGUMENTS_BYTES))
    except NotPlanned as reason:
        raise BadUserInput(f"This cannot be exported: {reason}.") from None
    except GraphQLError as error:  # a directive that its variables do not fit
        raise InvalidDocument((request_problem(error),)) from None
    bound, implied = _bound(selection, plan, values)
    window = _window(found.page, plan, bound)
    row_cost = max(1, cost // DEFAULT_PAGE)  # nobody says how many, so so many are counted
    if row_cost > settings.max_cost:
        raise OperationTooComplex(
            f"The cost of one row is {row_cost}; the limit is {settings.max_cost}.",
            measure="cost",
            value=row_cost,
            limit=settings.max_cost,
        )
    return ExportQuery(
        schema,
        document,
        operation,
        dict(variables),
        values,
        plan,
        found,
        bound,
        implied - {found.page.number},
        window,
        row_cost,
        _columns(found.node.below),
    )


def _coerced(
    schema: strawberry.Schema,
    settings: Settings,
    operation: Operation,
    variables: Mapping[str, Any],
) -> VariableValues:
    """By graphql-core, which alone tells what is wrong with them."""
    given = get_variable_values(
        schema._schema,
        operation.node.variable_definitions or (),
        dict(variables),
        max_errors=settings.max_errors,
        hide_suggestions=not settings.introspection,
    )
    if isinstance(given, list):
        raise InvalidDocument(tuple(request_problem(error) for error in given))
    return given


@dataclass(frozen=True, slots=True)
class _Chain:
    """From the root to the rows."""

    fields: tuple[Selected, ...]
    page: Selected
    """The last of them: the connection."""
    inner: tuple[Selected, ...]
    """`nodes`, or `edges` and `node`."""

    @property
    def node(self) -> Selected:
        return self.inner[-1]

    @property
    def counting(self) -> type[Loader[Any, int, None]]:
        """What counts the rows: of its `totalCount`."""
        assert self.page.definition is not None
        fields = map(declaration, fields_of(get_named_type(self.page.definition.type)))
        return next(
            each.loader for each in fields if isinstance(each, Loaded) and each.key == "total"
        )

    @property
    def typename(self) -> str:
        assert self.node.definition is not None
        return get_named_type(self.node.definition.type).name

    def page_of(self, data: Any) -> Row | None:
        for each in self.fields:
            data = None if data is None else data[each.response]
        found: Row | None = data
        return found

    def rows(self, data: Any) -> list[Row] | None:
        """None where something on the way to the connection is null."""
        page = self.page_of(data)
        if page is None:
            return None
        rows: list[Row] = page[self.inner[0].response]
        if len(self.inner) > 1:
            response = self.node.response
            rows = [edge[response] for edge in rows]
        return rows


ONE_CONNECTION: Final = "An export is the rows of one connection, such as `models { nodes { … } }`"


def _chain(selection: Selection) -> _Chain:
    fields, found = selection.top, []
    while True:
        if not fields:
            raise BadUserInput(f"{ONE_CONNECTION}: nothing is left of it.")
        if len(fields) != 1:
            names = ", ".join(f"`{each.response}`" for each in fields)
            raise BadUserInput(f"{ONE_CONNECTION}: leave out all but one of {names}.")
        [each] = fields
        if each.definition is None:
            raise BadUserInput(f"{ONE_CONNECTION}: `{each.path}` is none.")
        found.append(each)
        kind: Any = each.definition.type
        plain = kind.of_type if is_non_null_type(kind) else kind
        if is_object_type(plain) and _is_page(plain):
            break
        if is_list_type(plain) or list(each.below) != [plain.name]:
            raise BadUserInput(f"{ONE_CONNECTION}: `{each.path}` is none.")
        fields = each.below[plain.name]
    if not isinstance(each.what, Loaded) or not issubclass(each.what.loader, PageLoader):
        raise BadUserInput(f"{ONE_CONNECTION}: `{each.path}` has no order that stays as it is.")
    inner = [_only(each.below[plain.name], each.path, ("nodes", "edges"))]
    if inner[0].node.name.value == "edges":
        [edges] = inner[0].below.values()
        inner.append(_only(edges, inner[0].path, ("node",)))
    return _Chain(tuple(found), each, tuple(inner))


def _is_page(kind: GraphQLNamedType) -> bool:
    return any(isinstance(declaration(own), Rows) for own in fields_of(kind))


def _only(fields: Sequence[Selected], path: str, names: tuple[str, ...]) -> Selected:
    rows = [each for each in fields if each.node.name.value in names]
    others = [f"`{each.path}`" for each in fields if each not in rows[:1]]
    if not rows:
        raise BadUserInput(f"{ONE_CONNECTION}: select the `{names[0]}` of `{path}`.")
    if others:
        raise BadUserInput(f"An export has nothing but rows: leave out {', '.join(others)}.")
    return rows[0]


def _bound(
    selection: Selection, plan: Plan, values: VariableValues
) -> tuple[dict[int, Hashable], frozenset[int]]:
    """The arguments of each step; and which of them are windows for which nobody says how many."""
    bound: dict[int, Hashable] = {}
    implied = set()
    for number, step in plan.steps.items():
        if step.binder is None:
            continue
        binder = step.binder
        bound[number] = _value(binder, values)
        if isinstance(bound[number], Window) and issubclass(step.loader, PageLoader):
            taken = get_argument_values(binder.definition, binder.node, values)
            if taken.get("first") is None and taken.get("last") is None:
                implied.add(number)
    return bound, frozenset(implied)


def _value(binder: Binder, values: VariableValues) -> Hashable:
    try:
        return binder.bind(values)
    except HarborError:
        raise
    except GraphQLError as error:
        raise InvalidDocument((request_problem(error),)) from None


def _window(page: Selected, plan: Plan, bound: Mapping[int, Hashable]) -> Window:
    """Of the connection itself, in an order that stays as it is."""
    window = bound.get(page.number)
    if not isinstance(window, Window):
        raise BadUserInput(f"{ONE_CONNECTION}: `{page.path}` has no order that stays as it is.")
    given = {argument.name.value for argument in page.node.arguments or ()}
    placed = sorted(given & {"first", "last", "after", "before"})
    if placed:
        names = " and ".join(f"`{name}`" for name in placed)
        raise BadUserInput(f"An export has all rows: leave out {names} of `{page.path}`.")
    if window.search is not None:
        raise BadUserInput(
            "What `search` finds is in an order that changes: give a `filter` instead."
        )
    if window.order.path in IMMUTABLE:
        return window
    if "orderBy" in given:
        raise BadUserInput(
            "An export is in an order that never changes: leave `orderBy` out, or give CREATED_AT."
        )
    assert page.definition is not None
    if "orderBy" not in page.definition.args:
        raise BadUserInput(
            f"{ONE_CONNECTION}: `{page.path}` is a list for its order alone, which changes."
        )
    loader = plan.steps[page.number].loader
    assert issubclass(loader, PageLoader)
    return replace(window, order=BY_CREATION if loader.collection == "models" else BY_ID)


# What the rows look like ---------------------------------------------------------------------------

_KINDS: Final = {
    "Int": ColumnKind.WHOLE,
    "BigInt": ColumnKind.WHOLE,
    "Float": ColumnKind.NUMBER,
    "Boolean": ColumnKind.BOOLEAN,
    "DateTime": ColumnKind.TIME,
    "JSON": ColumnKind.JSON,
}


def _columns(below: Mapping[str, Sequence[Selected]]) -> tuple[Column, ...]:
    """Of objects that may be of several types: all that any of them has."""
    found: dict[str, Column] = {}
    for selected in below.values():
        for each in selected:
            made = _column(each)
            there = found.get(made.name)
            found[made.name] = made if there is None else _merged(there, made)
    if not found:
        raise BadUserInput("Select something of each object: of one nothing is left.")
    common = set.intersection(
        *({each.response for each in selected} for selected in below.values())
    )
    return tuple(
        column if name in common else replace(column, nullable=True)
        for name, column in found.items()
    )


def _merged(one: Column, other: Column) -> Column:
    nullable = one.nullable or other.nullable
    if one.kind is not other.kind:
        return Column(one.name, ColumnKind.JSON, nullable)
    if one.kind is ColumnKind.OBJECT:
        inner = {column.name: column for column in one.of}
        for column in other.of:
            there = inner.get(column.name)
            inner[column.name] = column if there is None else _merged(there, column)
        return replace(one, nullable=nullable, of=tuple(inner.values()))
    if one.kind is ColumnKind.LIST:
        return replace(one, nullable=nullable, of=(_merged(one.of[0], other.of[0]),))
    return replace(one, nullable=nullable)


def _column(each: Selected) -> Column:
    if each.definition is None:  # `__typename`
        return Column(each.response, ColumnKind.TEXT, nullable=False)
    return _typed(each, each.response, each.definition.type)


def _typed(each: Selected, name: str, kind: Any) -> Column:
    nullable = not is_non_null_type(kind)
    if not nullable:
        kind = kind.of_type
    if is_list_type(kind):
        return Column(name, ColumnKind.LIST, nullable, (_typed(each, "item", kind.of_type),))
    if is_enum_type(kind):
        return Column(name, ColumnKind.TEXT, nullable)
    if is_leaf_type(kind):
        return Column(name, _KINDS.get(kind.name, ColumnKind.TEXT), nullable)
    return Column(name, ColumnKind.OBJECT, nullable, _columns(each.below))


# Running it ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ExportQuery:
    """A query whose rows can be exported, with its variables."""

    schema: strawberry.Schema
    document: Document
    operation: Operation
    variables: dict[str, Any]
    values: VariableValues
    plan: Plan
    chain: _Chain
    bound: Mapping[int, Hashable]
    """The arguments of each step."""
    implied: frozenset[int]
    """Steps that read nested connections for which nobody says how many rows."""
    window: Window
    row_cost: int
    columns: tuple[Column, ...]

    @property
    def name(self) -> str:
        """Of the connection, such as `models`."""
        return self.chain.page.node.name.value

    async def count(self, context: Context) -> int:
        """How many rows there are now. NotFound where there is no such connection."""
        page, _ = await self._page(context, replace(self.window, limit=1))
        counted: int = await context.loader(self.chain.counting, None).load(page["total"])
        return counted

    async def batches(
        self, make_context: MakeContext, after: str | None = None, parent: str | None = None
    ) -> AsyncGenerator[Batch, None]:
        """From the beginning, or `after` where an earlier batch ended, of the same `parent`. Close it
        when you are done.

        Rows are read some at a time, each time with a context of its own. The next ones are read, and
        the next batch is made, while the caller is at work on this one. Raises what the database does,
        and NotFound where the connection's owner is gone, Conflict where it is another one now: the name
        that leads there, an alias or `latestVersion`, has moved.
        """
        size = _Size(max(1, min(MOST_ROWS, FIRST_ROWS, ROWS_BELOW // self.row_cost)))
        pages = _ahead(self._pages(make_context, after, parent, size))
        async with aclosing(_ahead(self._batches(pages, size))) as batches:
            async for batch in batches:
                yield batch

    async def _pages(
        self, make_context: MakeContext, after: str | None, parent: str | None, size: "_Size"
    ) -> AsyncGenerator[tuple[Context, Row, str], None]:
        """The rows of the connection as they are stored, and what they are of."""
        order = self.window.order
        while True:
            made = make_context()
            context = await made if isawaitable(made) else made
            place = None if after is None else decode_cursor(order, after)
            window = replace(self.window, limit=size.rows, after=place)
            try:
                page, found = await self._page(context, window)
            except TooManyBytesError:
                size.rows = window.limit // 2
                continue
            if parent not in (None, found):
                # Going on with the old one is no way: whoever asks may not see that any more.
                raise Conflict(
                    f"`{self.chain.page.path}` was of another object when this began: start it anew, or name what does not move: a version by its number, or with `asOf`."
                )
            parent = found
            if page["nodes"]:
                yield context, page, found
                after = encode_cursor(order, page["nodes"][-1])
            if not page["has_next"]:
                return

    async def _page(self, context: Context, window: Window) -> tuple[Row, str]:
        """And what it is of."""
        reading = _Reading(self, context, window)
        try:
            await self.plan.function(reading)
        except _PageFoundError as found:
            if found.page is not None:
                return found.page, found.parent
        finally:
            reading.end()
        raise NotFound(f"There is no `{self.chain.page.path}` that you may see.")

    async def _batches(
        self, pages: AsyncGenerator[tuple[Context, Row, str], None], size: "_Size"
    ) -> AsyncGenerator[Batch, None]:
        """With all that hangs below the rows: as many of a page at once as come to one batch."""
        order = self.window.order
        async with aclosing(pages):
            async for context, page, parent in pages:
                left: list[Row] = page["nodes"]
                while left:
                    stored = left[: size.rows]
                    part = {**page, "nodes": stored, "has_next": True}
                    reading = _Reading(self, context, replace(self.window, limit=len(stored)), part)
                    rows = await self._run(reading)
                    if rows is None and len(stored) > 1:
                        size.rows = len(stored) // 2
                        continue
                    faults: tuple[Fault, ...] = ()
                    if rows is None:
                        rows, faults = await self._interpreted(context, stored[0])
                    size.adapt(len(stored), reading.below, _length_of(rows))
                    place = encode_cursor(order, stored[-1])
                    yield Batch(rows, place, parent, reading.truncated, faults)
                    left = left[len(stored) :]

    async def _run(self, reading: "_Reading") -> list[Row] | None:
        """None where it has to be tried with fewer rows, down to one: then no plan answers that one."""
        try:
            return self.chain.rows(await self.plan.function(reading))
        except (_TooMuchError, TooManyBytesError, ExecutionTimeout):
            if reading.window.limit == 1:
                raise
            return None
        except Exception as error:
            if expected(error) is not None:
                raise
            return None
        finally:
            reading.end()

    async def _interpreted(
        self, context: Context, stored: Row
    ) -> tuple[list[Row], tuple[Fault, ...]]:
        """One row by graphql-core, which tells what is wrong with it."""
        windows = {
            (self.plan.steps[number].loader, self.bound[number]): self.arguments(number)
            for number in self.implied
        }
        page = self.chain.page.number
        only = Filter(all_of([self.window.query.data, {"_id": stored["_id"]}]))
        windows[self.plan.steps[page].loader, self.bound[page]] = replace(
            self.window, limit=1, query=only
        )
        settings = context.settings.model_copy(update={"compiled_plans": False})
        shared = {each.name: getattr(context, each.name) for each in fields(Context) if each.init}
        own = _Windows(
            **{**shared, "settings": settings, "_loaders": {}},
            windows=windows,
        )
        deadline = asyncio.get_running_loop().time() + ROW_SECONDS
        answer = await run(
            self.schema, self.document, self.operation, self.variables, own, deadline
        )
        rows = self.chain.rows(answer.data) if answer.data is not None else None
        if not answer.errors:
            return rows or [], ()
        problem = answer.errors[0]
        if problem["extensions"].get("code") in PASSING:
            raise Unavailable(problem["message"])
        id = to_base64(self.chain.typename, str(stored["_id"]))
        log.warning("export.fault id=%s message=%s", id, problem["message"])
        return [row for row in rows or [] if row is not None], (Fault(id, problem["message"]),)

    def arguments(self, number: int) -> Hashable:
        """Of a nested step."""
        found = self.bound.get(number)
        if number in self.implied:
            assert isinstance(found, Window)
            return replace(found, limit=MOST_BELOW)
        return found


@dataclass(slots=True)
class _Size:
    """How many rows the next batch is to have."""

    rows: int

    def adapt(self, rows: int, below: int, length: int) -> None:
        """So many that they come to a quarter of the rows below and half of the bytes that a batch may have:
        some batches are under way at once. No more than twice as many as before."""
        most = min(2.0, ROWS_BELOW / 4 / max(1, below), BATCH_BYTES / 2 / max(1, length))
        if most < 1 or rows >= self.rows:  # the rest of a page says little
            self.rows = max(1, min(MOST_ROWS, int(rows * most)))


async def _ahead(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Each is made while its caller is at work on the one before."""
    making = asyncio.ensure_future(anext(source))
    try:
        while True:
            try:
                found = await making
            except StopAsyncIteration:
                return
            making = asyncio.ensure_future(anext(source))
            # So that it has begun, and the database is at work, before the caller is busy without a pause.
            await asyncio.sleep(0)
            yield found
    finally:
        await ended(making)
        await source.aclose()


def _length_of(rows: Sequence[Row]) -> int:
    """In bytes as JSON, from some of them."""
    sample = rows[:: max(1, len(rows) // SAMPLES)]
    if not sample:
        return 0
    return sum(len(orjson.dumps(row)) for row in sample) * len(rows) // len(sample)


class _Reading(Run):
    """A run of the plan with windows of our own: for rows that are at hand, or, without any, to find
    some. Then it ends with them."""

    __slots__ = ("below", "page", "query", "truncated", "window")

    def __init__(
        self, query: ExportQuery, context: Context, window: Window, page: Row | None = None
    ) -> None:
        super().__init__(query.plan.steps, context, query.values, query.variables)
        self.query, self.window, self.page = query, window, page
        self.below = self.truncated = 0

    async def read(self, number: int, keys: list[Any]) -> Mapping[Any, Any]:
        if not keys:
            return {}
        step = self._steps[number]
        if number == self.query.chain.page.number:
            if self.page is None:
                found = await self._load(step, self.window, keys)
                raise _PageFoundError(found.get(keys[0]), keys[0])
            return {keys[0]: self.page}
        arguments = self.query.arguments(number)
        if isinstance(arguments, Window) and issubclass(step.loader, PageLoader):
            return await self._pages(step, arguments, keys)
        return await self._load(step, arguments, keys)

    async def read_by_arguments(self, number: int) -> Mapping[Any, Any]:
        key = self.query.bound[number]
        if key is None:
            return {}
        found = await self._load(self._steps[number], None, [key])
        return {ROOT: found.get(key)}

    async def _load(
        self, step: Step, arguments: Hashable, keys: list[Any], scan_rows: int = 0
    ) -> Mapping[Any, Any]:
        context = self.context
        context.count.batches += 1
        context.count.keys += len(keys)
        loader: Loader[Any, Any, Any] = step.loader.of_batch(context, arguments, step.reads)
        if isinstance(loader, PageLoader):
            loader.scan_rows = scan_rows
        # Not by lanes: who asks for a few rows would wait for these thousands. One row that is too much
        # by itself has to be read as it is.
        token = in_one_reply.set(self.window.limit > 1)
        try:
            return await loader.found(keys)
        finally:
            in_one_reply.reset(token)

    async def _pages(self, step: Step, window: Window, keys: list[Any]) -> Mapping[Any, Any]:
        """Nested pages: so many at once that the rows fit, whatever the parents have."""
        is_implied = step.number in self.query.implied
        is_scanned = is_implied and self.window.limit > 1
        first = replace(window, limit=FIRST_BELOW) if is_implied and not is_scanned else window
        found: dict[Any, Any] = {}
        for start in range(0, len(keys), PARENTS_AT_ONCE):
            part = keys[start : start + PARENTS_AT_ONCE]
            await self._take(found, step, first, part, is_scanned)
        if not is_implied:
            return found
        if not is_scanned:
            more = [key for key in keys if _is_cut(found.get(key))]
            for start in range(0, len(more), LARGE_PARENTS_AT_ONCE):
                if self.below >= ROWS_BELOW:  # of one row alone: see `_take`
                    break
                await self._take(found, step, window, more[start : start + LARGE_PARENTS_AT_ONCE])
        self.truncated += sum(_is_cut(page) for page in found.values())
        return found

    async def _take(
        self,
        found: dict[Any, Any],
        step: Step,
        window: Window,
        keys: list[Any],
        is_scanned: bool = False,
    ) -> None:
        """_TooMuchError for what is more than a batch may have below its rows, unless it is one row."""
        try:
            loaded = await self._load(step, window, keys, ROWS_BELOW if is_scanned else 0)
        except TooManyRowsError:
            raise _TooMuchError from None
        for key in keys:
            self.below += _length(loaded.get(key)) - _length(found.get(key))
            found[key] = loaded.get(key)
        if self.below > ROWS_BELOW and self.window.limit > 1:
            raise _TooMuchError


def _is_cut(page: Any) -> bool:
    return isinstance(page, dict) and page["has_next"]


def _length(page: Any) -> int:
    return len(page["nodes"]) if isinstance(page, dict) else 0


@dataclass(kw_only=True)
class _Windows(Context):
    """For graphql-core, whose fields make windows by themselves."""

    windows: Mapping[tuple[Any, Hashable], Hashable] = field(default_factory=dict)

    def loader(self, loader: Any, arguments: Any) -> Any:
        return super().loader(loader, self.windows.get((loader, arguments), arguments))
