"""From exceptions to errors of an answer."""

import logging

import pytest
from graphql import GraphQLError
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ExecutionTimeout,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
)

from modelharbor.errors import Forbidden
from modelharbor.execution.failures import expected, field_problems, shorten


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Forbidden("no"), "FORBIDDEN"),
        (ServerSelectionTimeoutError("x"), "UNAVAILABLE"),
        (AutoReconnect("x"), "UNAVAILABLE"),
        (NetworkTimeout("x"), "UNAVAILABLE"),
        (NotPrimaryError("x"), "UNAVAILABLE"),
        (WaitQueueTimeoutError("x"), "UNAVAILABLE"),
        (OperationFailure("shutting down", 91), "UNAVAILABLE"),
        (ExecutionTimeout("x", 50), "TIMEOUT"),
        (RecursionError(), "BAD_REQUEST"),
        (OperationFailure("bad pipeline", 2), None),
        (BulkWriteError({}), None),
        (PyMongoError("x"), None),
        (ValueError("x"), None),
    ],
)
def test_what_is_expected_has_a_code(error: Exception, code: str | None) -> None:
    found = expected(error)
    assert (found.code if found else None) == code


def test_one_failure_of_many_fields_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    cause = RuntimeError("x")
    errors = [GraphQLError("x", path=["a", i], original_error=cause) for i in range(8)]
    found = field_problems(errors, 5)
    assert [problem["path"] for problem in found] == [["a", i] for i in range(5)]
    assert {problem["message"] for problem in found} == {"Internal server error"}
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    found[0]["extensions"]["requestId"] = "mine"
    assert "requestId" not in found[1]["extensions"]


def test_long_messages_are_cut() -> None:
    assert shorten("x" * 300) == "x" * 300
    assert shorten("x" * 301) == "x" * 299 + "…"
