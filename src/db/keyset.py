"""Pages by keyset: a place in a list is the sort value and the id of the row that stands there.

Rows that come or go elsewhere never move a page, and page 10,000 costs what page 1 costs.
"""

import base64
import binascii
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from math import inf, nextafter
from typing import Any, Final

import bson
import orjson
from bson import ObjectId

from modelharbor.errors import BadUserInput

from .base import Row, value_at

LAST_YEAR, LAST_WHOLE = 9999, 2**63 - 1  # that Python, and BSON, can say
MAX_CURSOR: Final = 8192  # characters; a path of 1,024 characters of 4 bytes each gives 5,600


class Filter(Hashable):
    """A MongoDB filter that can be compared, so that equal ones share a batch."""

    __slots__ = ("data", "raw")

    def __init__(self, data: Row) -> None:
        self.data = data
        self.raw = bson.encode(data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"Filter({self.data!r})"


EVERYTHING: Final = Filter({})


class Sorted(Enum):
    """What kind of value a list is sorted by."""

    TEXT = "text"
    WHOLE = "whole"
    NUMBER = "number"
    TIME = "time"
    SCORE = "score"  # of a text search: computed, not stored
    ID = "id"


@dataclass(frozen=True, slots=True)
class Order:
    """A sort key; `_id` breaks ties in the same direction, where there can be any."""

    path: str  # stored name, dotted where embedded
    kind: Sorted
    ascending: bool = False
    unique: bool = False  # no two rows of a list have the same value

    @property
    def tag(self) -> str:
        """Stands in a cursor, so that one of another order is refused."""
        return ("+" if self.ascending else "-") + self.path

    def value(self, row: Row) -> Any:
        return value_at(row, self.path)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cursor points."""

    value: Any
    id: ObjectId


def encode_cursor(order: Order, row: Row) -> str:
    value = order.value(row)
    if isinstance(value, datetime):
        value = round(value.replace(tzinfo=value.tzinfo or UTC).timestamp() * 1000)
    elif isinstance(value, ObjectId):
        value = None
    packed = orjson.dumps([order.tag, value, str(row["_id"])])
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def decode_cursor(order: Order, cursor: str) -> Place:
    """BadUserInput for anything that `encode_cursor` did not make for this order."""
    try:
        if len(cursor) > MAX_CURSOR:
            raise ValueError("too long")
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        tag, value, hexadecimal = orjson.loads(packed)
        if tag != order.tag or not isinstance(hexadecimal, str):
            raise ValueError("of another list")
        return Place(_checked(order.kind, value), ObjectId(hexadecimal))
    except (ValueError, TypeError, OverflowError, binascii.Error, bson.errors.InvalidId):
        raise BadUserInput(
            "This is not a cursor of this list in this order; take one from its `edges` or `pageInfo`."
        ) from None


def _checked(kind: Sorted, value: Any) -> Any:
    match kind:
        case Sorted.TEXT if isinstance(value, str):
            return value
        case Sorted.WHOLE if type(value) is int and -(2**63) <= value < 2**63:
            return value
        case Sorted.NUMBER | Sorted.SCORE if type(value) in (int, float):
            return float(value)
        case Sorted.TIME if type(value) is int:
            return datetime.fromtimestamp(value / 1000, UTC)
        case Sorted.ID if value is None:
            return None
    raise ValueError("value of another kind")


@dataclass(frozen=True, slots=True)
class Window:
    """Which rows of a list: `limit` of them from one end of what lies between two places."""

    order: Order
    limit: int
    backward: bool = False  # the last ones, not the first
    after: Place | None = None
    before: Place | None = None
    query: Filter = EVERYTHING
    search: str | None = None  # words of a text search

    @property
    def direction(self) -> int:
        """Of the scan: 1 or -1."""
        return 1 if self.order.ascending != self.backward else -1

    @property
    def sort(self) -> dict[str, int]:
        """Of the scan."""
        if self.order.path == "_id" or self.order.unique:
            return {self.order.path: self.direction}
        return {self.order.path: self.direction, "_id": self.direction}

    def between(self, base: Row) -> Row:
        """`base` (a filter), and only what lies between the two places.

        Each branch of the `$or` carries the whole base: MongoDB then merges one bounded index scan
        for each, also amid thousands of rows with equal sort values.
        """
        upwards, downwards = ("$gt", "$lt") if self.order.ascending else ("$lt", "$gt")
        found = base
        for place, operator in ((self.after, upwards), (self.before, downwards)):
            if place is not None:
                found = self._beyond(found, place, operator)
        return found

    def _beyond(self, base: Row, place: Place, operator: str) -> Row:
        if self.order.path == "_id":
            return _both(base, {"_id": {operator: place.id}})
        if self.order.unique:
            return _both(base, {self.order.path: {operator: place.value}})
        branches = [
            {self.order.path: {operator: place.value}},
            {self.order.path: _just(place.value), "_id": {operator: place.id}},
        ]
        if "$or" in base and len(base) == 1:  # between two places: each branch of the first, twice
            return {"$or": [_both(branch, b) for branch in base["$or"] for b in branches]}
        return {"$or": [_both(base, branch) for branch in branches]}

    def cursor(self, row: Row) -> str:
        return encode_cursor(self.order, row)


def _just(value: Any) -> Row:
    """What equals `value`, said as a range up to the next one: with a single value MongoDB takes that
    branch for a list in the order of `_id`. It could not merge it with the other one where a filter has
    several principals, and would read and sort all that is left of the list."""
    match value:
        case datetime() if value.year < LAST_YEAR:
            return {"$gte": value, "$lt": value + timedelta(milliseconds=1)}
        case str():
            return {"$gte": value, "$lt": value + "\0"}
        case int() if value < LAST_WHOLE:
            return {"$gte": value, "$lt": value + 1}
        case float():
            return {"$gte": value, "$lt": nextafter(value, inf)}
    return {"$gte": value, "$lte": value}  # nothing comes after it


def _both(one: Row, other: Row) -> Row:
    if one.keys() & other.keys():
        return {"$and": [one, other]}
    return {**one, **other}


MAX_PAGE: Final = 100  # rows that a page may be asked for
DEFAULT_PAGE: Final = 20  # rows of a page when nobody says how many
