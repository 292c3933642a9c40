"""What answers of a server say."""

from collections.abc import Mapping
from typing import Any, Final

import httpx
import orjson

from .failures import Refused, Rejected, UserError, rejected
from .patience import asked_seconds

MOST_BYTES: Final = 64 * 1024 * 1024
"""Of an answer that is no file, unpacked; a server sends 16 MiB at most."""
LONGEST_NUMBER: Final = 19  # digits
_OF_TRANSPORT: Final = frozenset({"content-encoding", "content-length", "transfer-encoding"})


async def whole(answer: httpx.Response) -> httpx.Response:
    """With its body, which is still to come. Rejected: it does not end within bounds."""
    pieces, size = [], 0
    async for piece in answer.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > MOST_BYTES:
            raise Rejected("The server's answer has no end.", "BAD_ANSWER")
    headers = [pair for pair in answer.headers.multi_items() if pair[0] not in _OF_TRANSPORT]
    return httpx.Response(answer.status_code, headers=headers, content=b"".join(pieces))


def number_of(value: object) -> int:
    """A number of bytes in an answer. Rejected: it is none."""
    text = str(value)
    if not text.isascii() or not text.isdigit() or len(text) > LONGEST_NUMBER:
        raise Rejected("The server's answer has no number where one belongs.", "BAD_ANSWER")
    return int(text)


def failure_of(answer: httpx.Response) -> Rejected:
    """Of an answer whose body was read."""
    try:
        body = orjson.loads(answer.content)
        errors = body.get("errors") if isinstance(body, dict) else None
    except orjson.JSONDecodeError:
        errors = None
    errors = errors if isinstance(errors, list) else []
    failure = rejected(
        [error for error in errors if isinstance(error, dict)],
        answer.status_code,
        answer.headers.get("x-request-id"),
    )
    failure.asked_seconds = asked_seconds(answer.headers.get("retry-after"))
    return failure


def data_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = orjson.loads(answer.content)
    except orjson.JSONDecodeError:
        found = None
    if (
        not isinstance(found, dict)
        or found.get("errors")
        or not isinstance(found.get("data"), dict)
    ):
        if answer.status_code == 200 and not (isinstance(found, dict) and found.get("errors")):
            raise Rejected(
                "What answers there is no server of modelharbor.", "NO_SERVER", status=200
            )
        raise failure_of(answer)
    data: dict[str, Any] = found["data"]
    return data


def payload_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of an operation of one mutation. Refused: its `userErrors`."""
    [payload] = data.values()
    errors = payload.get("userErrors") or ()
    if errors:
        raise Refused(
            [
                UserError(error["code"], error["message"], tuple(error.get("path") or ()))
                for error in errors
            ]
        )
    found: dict[str, Any] = payload
    return found
