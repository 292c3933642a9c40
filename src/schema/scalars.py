"""Scalars of the API, each with a link to what specifies it."""

import re
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, NewType

import strawberry
from strawberry.types.scalar import ScalarDefinition

from modelharbor.events.cursors import encode

BigInt = NewType("BigInt", int)
Cursor = NewType("Cursor", str)
SHA256 = NewType("SHA256", str)
URL = NewType("URL", str)
JSON = NewType("JSON", object)  # anything that JSON can say; only at the edge

_WHOLE: Final = re.compile(r"-?[0-9]{1,19}\Z")
_MOMENT: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII
)
_HASH: Final = re.compile(r"[0-9a-fA-F]{64}\Z")


def event_cursor(stream: str, position: str, sequence: int) -> Any:
    """For what a subscription tells."""
    return encode(stream, position, sequence)


def _parse_big_int(value: Any) -> int:
    if isinstance(value, str) and _WHOLE.match(value):
        value = int(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError("BigInt takes a whole number of 64 bits, as a string or a number.")
    return int(value)


def _parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("A string is wanted here.")
    return value


def _parse_hash(value: Any) -> str:
    if not isinstance(value, str) or not _HASH.match(value):
        raise ValueError("SHA256 takes 64 hexadecimal digits.")
    return value.lower()


def _parse_moment(value: Any) -> datetime:
    """As RFC 3339 writes it; Python's own reader takes more, and in each version other things."""
    found = _MOMENT.match(value) if isinstance(value, str) else None
    if found is not None:
        day, time, fraction, offset = found.groups()
        plain = f"{day}T{time}.{(fraction or '')[:6]:0<6}{offset.upper()}"
        with suppress(ValueError, OverflowError):  # no such day, or beyond the years 1 to 9999
            return datetime.fromisoformat(plain).astimezone(UTC)
    raise ValueError("DateTime takes a text as in RFC 3339, like 2026-01-31T12:00:00Z.")


def _show_moment(value: datetime) -> str:
    """In UTC, to the millisecond: what MongoDB keeps. Without a time zone it is UTC already."""
    if value.tzinfo is None:
        return value.isoformat("T", "milliseconds") + "Z"
    shown = value.isoformat("T", "milliseconds")
    if not shown.endswith("+00:00"):
        shown = value.astimezone(UTC).isoformat("T", "milliseconds")
    return shown[:-6] + "Z"


SCALARS: Final[dict[object, ScalarDefinition]] = {
    BigInt: strawberry.scalar(
        name="BigInt",
        description="A whole number of 64 bits, as a string: a number in JSON loses digits beyond 2^53.",
        specified_by_url="https://www.rfc-editor.org/rfc/rfc8259#section-6",
        serialize=str,
        parse_value=_parse_big_int,
    ),
    Cursor: strawberry.scalar(
        name="Cursor",
        description="A place in a list, opaque; good for the same list in the same order.",
        specified_by_url="https://relay.dev/graphql/connections.htm#sec-Cursor",
        serialize=str,
        parse_value=_parse_text,
    ),
    SHA256: strawberry.scalar(
        name="SHA256",
        description="A SHA-256 hash in 64 hexadecimal digits, lower case.",
        specified_by_url="https://csrc.nist.gov/pubs/fips/180-4/upd1/final",
        serialize=str,
        parse_value=_parse_hash,
    ),
    URL: strawberry.scalar(
        name="URL",
        description="An absolute address.",
        specified_by_url="https://url.spec.whatwg.org/",
        serialize=str,
        parse_value=_parse_text,
    ),
    JSON: strawberry.scalar(
        name="JSON",
        description="Any JSON value.",
        specified_by_url="https://www.rfc-editor.org/rfc/rfc8259",
        serialize=lambda value: value,
        parse_value=lambda value: value,
    ),
    datetime: strawberry.scalar(
        name="DateTime",
        description="A moment in UTC, as in RFC 3339, to the millisecond.",
        specified_by_url="https://scalars.graphql.org/andimarek/date-time",
        serialize=_show_moment,
        parse_value=_parse_moment,
    ),
}
