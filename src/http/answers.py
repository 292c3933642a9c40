"""JSON answers of all routes. Errors have one shape everywhere: GraphQL's."""

import random
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Scope

from modelharbor.errors import HarborError
from modelharbor.execution.failures import Problem, problem

REQUEST_ID = "modelharbor.request_id"  # in the ASGI scope
OPERATION = "modelharbor.operation"  # likewise: the name of the operation that ran
JSON = "application/json; charset=utf-8"
_numbers = random.Random(
    secrets.randbits(256)
)  # an id is unique, not secret; no call of the system
SANE = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


def request_id_from(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's, where it is a sane one, else a new one."""
    for name, value in headers:
        if name == b"x-request-id":
            given = value.decode("latin-1")
            if SANE.fullmatch(given):
                return given
            break
    return f"{_numbers.getrandbits(128):032x}"


def request_id_of(scope: Scope) -> str:
    found: str = scope.get(REQUEST_ID, "")
    return found


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None, media: str = JSON
) -> Response:
    return Response(
        orjson.dumps(content),
        status,
        {"content-type": media, "cache-control": "private, no-store", **(headers or {})},
    )


def error_response(
    scope: Scope, error: HarborError, headers: Mapping[str, str] | None = None, media: str = JSON
) -> Response:
    content = {"errors": with_request_id(scope, [problem(error)])}
    return json_response(content, error.status, {**for_error(error), **(headers or {})}, media)


def for_error(error: HarborError) -> dict[str, str]:
    """Headers that belong to a status."""
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if error.status == 408:  # the rest of the body may still come
        return {"connection": "close"}
    return {"retry-after": "1"} if error.status == 503 else {}


def with_request_id(scope: Scope, problems: list[Problem]) -> list[Problem]:
    found = request_id_of(scope)
    return [{**made, "extensions": {**made["extensions"], "requestId": found}} for made in problems]
