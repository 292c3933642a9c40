"""Runs one operation of a document: by its plan, or by graphql-core where there is none, or where the
answer is not as a plan expects it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard, cast

import strawberry
from bson import ObjectId
from graphql import ExecutionResult, OperationType, execute
from graphql.execution.values import VariableValues
from strawberry.execution import optimized_is_awaitable

from modelharbor.context import Context
from modelharbor.db.base import Row
from modelharbor.errors import Timeout

from .documents import Document, Operation
from .failures import Problem, field_problems, problem, request_problem
from .plan import Plan
from .reading import Read, Run, viewed_in

# Strawberry's, which knows plain values by their type; it says no more than `bool` of itself.
AWAITABLE = cast("Callable[[Any], TypeGuard[Awaitable[Any]]]", optimized_is_awaitable)
SWITCHED_OFF: Final = "plans are switched off"
MUTATION: Final = "a mutation"
INVALID_VARIABLES: Final = "variables that do not fit"
UNEXPECTED: Final = "an answer that is not as the schema promises"


@dataclass(frozen=True, slots=True)
class Answer:
    """`data` and `errors` of an answer. An operation that could not begin `is_refused` and has no data."""

    data: dict[str, Any] | None = None
    errors: list[Problem] = field(default_factory=list)
    is_refused: bool = False
    fallback: str | None = None
    """Why graphql-core made the answer; None: a plan did."""
    read: Read | None = None
    """What it may be kept by; None: it may not."""
    viewed: tuple[ObjectId, ...] = ()
    """The models that it shows by their own field, each once."""


async def run(
    schema: strawberry.Schema,
    document: Document,
    operation: Operation,
    variables: Mapping[str, Any],
    context: Context,
    deadline: float,
    values: VariableValues | None = None,
    top: Row | None = None,
    position: int | None = None,
) -> Answer:
    """At the deadline (in the event loop's time) the answer is TIMEOUT, and a plan's reads are
    cancelled; those that others take part in, and graphql-core's, end by their `maxTimeMS`.

    `values`: the variables as `operation.coerce` made them, where the caller has them. `top`: the
    event of a subscription, by the Python name of its field. `position`: cluster time up to which all
    changes were known before; None: the answer will not be kept.
    """
    why: str | None = None
    try:
        async with asyncio.timeout_at(deadline) as limit:
            if values is None:
                values = operation.coerce(variables)
            plan = _plan(schema, operation, values, context)
            if isinstance(plan, str):
                why = plan
                return await _interpreted(
                    schema, document, operation, variables, context, plan, top
                )
            assert values is not None
            reading = Run(plan.steps, context, values, variables, top)
            try:
                # Whatever goes wrong: graphql-core finds it too, and says it as it should be said.
                with suppress(Exception):
                    data = await plan.function(reading)
                    read = None
                    if position is not None and plan.policy.max_age > 0:
                        read = reading.what_was_read(position)
                    return Answer(data, read=read, viewed=reading.viewed())
            finally:
                reading.end()
            why, replayed = UNEXPECTED, reading.replayed()
            return await _interpreted(schema, document, operation, variables, replayed, why, top)
    except TimeoutError:
        if not limit.expired():
            raise
        seconds = f"{context.settings.operation_timeout_seconds:g}"
        made = problem(Timeout(f"The operation took longer than {seconds} s."))
        return Answer(errors=[made], fallback=why)


def _plan(
    schema: strawberry.Schema,
    operation: Operation,
    values: VariableValues | None,
    context: Context,
) -> Plan | str:
    """The plan, or why there is none."""
    if not context.settings.compiled_plans:
        return SWITCHED_OFF
    if operation.kind is OperationType.MUTATION:
        return MUTATION
    if values is None:
        return INVALID_VARIABLES
    return operation.plan(schema, values)


async def _interpreted(
    schema: strawberry.Schema,
    document: Document,
    operation: Operation,
    variables: Mapping[str, Any],
    context: Context,
    why: str,
    top: Row | None,
) -> Answer:
    """By graphql-core."""
    settings = context.settings
    result = execute(
        schema._schema,
        document.node,
        top,
        context_value=context,
        variable_values=dict(variables),
        operation_name=operation.name,
        max_coercion_errors=settings.max_errors,
        executor_class=schema.execution_context_class,
        is_awaitable=AWAITABLE,
        hide_suggestions=not settings.introspection,
        operation_extensions={},
    )
    found = result if isinstance(result, ExecutionResult) else await result
    errors = found.errors or []
    if found.data is None and errors and all(error.path is None for error in errors):
        problems = [request_problem(error) for error in errors[: settings.max_errors]]
        return Answer(errors=problems, is_refused=True, fallback=why)
    viewed = viewed_in(context, found.data or {})
    return Answer(
        found.data, field_problems(errors, settings.max_errors), fallback=why, viewed=viewed
    )
