"""Runs one operation of a document. The seam between the engines: today graphql-core runs everything."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import strawberry
from graphql import ExecutionResult, execute
from strawberry.execution import optimized_is_awaitable

from modelharbor.context import Context
from modelharbor.errors import Timeout

from .documents import Document, Operation
from .failures import Problem, field_problems, problem, request_problem

# Strawberry's, which knows plain values by their type; it says no more than `bool` of itself.
AWAITABLE = cast("Callable[[Any], TypeGuard[Awaitable[Any]]]", optimized_is_awaitable)


@dataclass(frozen=True, slots=True)
class Answer:
    """`data` and `errors` of an answer. An operation that could not begin `is_refused` and has no data."""

    data: dict[str, Any] | None = None
    errors: list[Problem] = field(default_factory=list)
    is_refused: bool = False


async def run(
    schema: strawberry.Schema,
    document: Document,
    operation: Operation,
    variables: Mapping[str, Any],
    context: Context,
    deadline: float,
) -> Answer:
    """At the deadline (in the event loop's time) its resolvers are cancelled and the answer is TIMEOUT."""
    settings = context.settings
    try:
        async with asyncio.timeout_at(deadline) as limit:
            result = execute(
                schema._schema,
                document.node,
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
    except TimeoutError:
        if not limit.expired():
            raise
        seconds = f"{settings.operation_timeout_seconds:g}"
        return Answer(errors=[problem(Timeout(f"The operation took longer than {seconds} s."))])
    errors = found.errors or []
    if found.data is None and errors and all(error.path is None for error in errors):
        return Answer(
            errors=[request_problem(error) for error in errors[: settings.max_errors]],
            is_refused=True,
        )
    return Answer(found.data, field_problems(errors, settings.max_errors))
