"""From what went wrong to what the client reads: every error coded, the unexpected ones masked and reported."""

import logging
from collections.abc import Iterable
from typing import Any, TypeAlias

from graphql import GraphQLError, GraphQLSyntaxError
from pymongo.errors import ConnectionFailure, ExecutionTimeout, OperationFailure

from modelharbor.errors import (
    BadRequest,
    BadUserInput,
    HarborError,
    ParseFailed,
    Timeout,
    Unavailable,
    ValidationFailed,
)
from modelharbor.observability.sentry import capture

log = logging.getLogger(__name__)
Problem: TypeAlias = dict[str, Any]
"""An error as it stands in an answer: `message`, `locations`, `path`, `extensions` with a `code`."""

MASKED = "Internal server error"
LONGEST_MESSAGE = 300  # names in messages are the client's; an answer to a bad request stays small
GOING_DOWN = frozenset({91, 11600, 11602})  # a server that shuts down says so to running commands


def expected(error: BaseException) -> HarborError | None:
    """The coded error that stands for an exception; None: nobody expected it."""
    if isinstance(error, HarborError):
        return error
    if isinstance(error, ConnectionFailure):
        return Unavailable("The database does not answer; try again.")
    if isinstance(error, ExecutionTimeout):
        return Timeout("The database took too long; ask for less.")
    if isinstance(error, OperationFailure) and error.code in GOING_DOWN:
        return Unavailable("The database does not answer; try again.")
    if isinstance(error, RecursionError):
        return BadRequest("The request is nested too deeply.")
    return None


def problem(error: HarborError) -> Problem:
    return {"message": shorten(error.message), "extensions": dict(error.extensions)}


def unexpected(error: BaseException, where: str) -> Problem:
    """Masked for the client; whole in the log and in Sentry."""
    log.error("request.failed where=%s", where, exc_info=error)
    capture(error)
    return {"message": MASKED, "extensions": {"code": "INTERNAL_SERVER_ERROR"}}


def any_problem(error: BaseException, where: str) -> Problem:
    found = expected(error)
    return problem(found) if found else unexpected(error, where)


def syntax_problem(error: GraphQLError) -> Problem:
    return _located(error, problem(ParseFailed(error.message)))


def validation_problem(error: GraphQLError) -> Problem:
    return _located(error, problem(ValidationFailed(error.message)))


def request_problem(error: GraphQLError) -> Problem:
    """Of an operation that could not begin: its variables do not fit."""
    return _located(error, problem(BadUserInput(error.message)))


def field_problems(errors: Iterable[GraphQLError], most: int) -> list[Problem]:
    """Errors of fields, at most so many. One exception that failed many fields is reported once."""
    seen: dict[int, Problem] = {}
    found = []
    for error in list(errors)[:most]:
        cause = _cause(error)
        made = seen.get(id(cause))
        if made is None:
            made = seen[id(cause)] = _field_problem(cause, error)
        found.append(_located(error, {**made, "extensions": dict(made["extensions"])}))
    return found


def _field_problem(cause: BaseException, error: GraphQLError) -> Problem:
    if isinstance(cause, GraphQLSyntaxError) or not isinstance(cause, GraphQLError):
        return any_problem(cause, f"field {'.'.join(map(str, error.path or ()))}")
    if (cause.extensions or {}).get("code"):
        return {"message": shorten(cause.message), "extensions": dict(cause.extensions or {})}
    if cause.message.startswith("Argument "):  # a variable that is missing inside an input
        return problem(BadUserInput(cause.message))
    return unexpected(cause, f"field {'.'.join(map(str, error.path or ()))}")  # of a scalar


def _cause(error: GraphQLError) -> BaseException:
    cause: BaseException = error
    while isinstance(cause, GraphQLError) and cause.original_error is not None:
        cause = cause.original_error
    return cause


def _located(error: GraphQLError, made: Problem) -> Problem:
    found: Problem = {"message": made["message"]}
    if error.locations:
        found["locations"] = [{"line": at.line, "column": at.column} for at in error.locations[:2]]
    if error.path:
        found["path"] = list(error.path)
    found["extensions"] = made["extensions"]
    return found


def shorten(message: str) -> str:
    return message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 1] + "…"
