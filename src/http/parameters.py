"""What a request for an operation carries, over whatever transport: of the right types, bounded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import orjson
from starlette.datastructures import QueryParams

from modelharbor.errors import BadRequest

NESTING: Final = (
    128  # of variables and extensions: far above any input type, far below Python's stack
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a request carries, by GET or POST; of the right types."""

    query: str | None
    variables: dict[str, Any]
    operation_name: str | None
    extensions: dict[str, Any]
    document_id: object


def check_encoding(query_string: bytes) -> None:
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
            found[name] = read_json(query[name].encode(), f"`{name}`")
    return found


def read_json(text: bytes, what: str) -> Any:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"{what} is not JSON in UTF-8.") from error
    if text.count(b"{") + text.count(b"[") > NESTING:
        check_nesting(found, what)
    return found


def check_nesting(value: Any, what: str) -> None:
    if is_nested_deeper(value, NESTING):
        raise BadRequest(f"{what} is nested deeper than {NESTING} levels.")


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


def read_parameters(found: Mapping[str, Any]) -> Parameters:
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
