"""The pieces that MongoDB filters are made of: every value in them is a scalar that we checked.

A client's own dict or operator can never come through: a piece takes scalars and makes the dict.
"""

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from modelharbor.errors import BadUserInput

from .base import Row

MAX_TEXT: Final = 256  # characters of a value
MAX_VALUES: Final = 100  # of a list of values
NOTHING: Final[Row] = {"_id": {"$in": []}}


def text(
    path: str,
    *,
    eq: str | None = None,
    one_of: Sequence[str] | None = None,
    prefix: str | None = None,
    contains: str | None = None,
    in_list: bool = False,
    longest: int = MAX_TEXT,
) -> Row:
    """Conditions on a text; given together, all must hold. Expressions are escaped.

    On a list of texts, one of them must meet them all.
    """
    operators: Row = {}
    if eq is not None:
        operators["$eq"] = _text(eq, longest)
    if one_of is not None:
        operators["$in"] = [_text(value, longest) for value in _values(one_of)]
    begin = re.escape(_text(prefix or "", longest))
    part = re.escape(_text(contains or "", longest))
    if prefix is not None and contains is not None:
        operators["$regex"] = f"^(?=[\\s\\S]*{part}){begin}"
    elif prefix is not None:
        operators["$regex"] = f"^{begin}"
    elif contains is not None:
        operators["$regex"] = part
    if not operators:
        return {}
    if operators.keys() == {"$eq"}:
        return {path: operators["$eq"]}
    return {path: {"$elemMatch": operators} if in_list else operators}


def text_list(
    path: str,
    *,
    has_all: Sequence[str] | None,
    has_any: Sequence[str] | None,
    has_none: Sequence[str] | None,
) -> Row:
    given: list[Row] = []
    if has_all is not None:
        given.extend({path: _text(value)} for value in _values(has_all))
    if has_any is not None:
        given.append({path: {"$in": [_text(value) for value in _values(has_any)]}})
    if has_none is not None:
        given.append({path: {"$nin": [_text(value) for value in _values(has_none)]}})
    return all_of(given)


def between(path: str, *, gte: int | datetime | None, lte: int | datetime | None) -> Row:
    bounds: Row = {}
    for operator, bound in (("$gte", gte), ("$lte", lte)):
        if isinstance(bound, int) and not -(2**63) <= bound < 2**63:
            raise BadUserInput(f"{bound} does not fit into 64 bits.")
        if bound is not None:
            bounds[operator] = bound
    return {path: bounds} if bounds else {}


def one_of(path: str, values: Sequence[str]) -> Row:
    """`values` come from an enum."""
    unique = list(dict.fromkeys(values))
    return {path: unique[0] if len(unique) == 1 else {"$in": unique}}


_ABSENT: Final = object()


def property_value(
    key: str, *, eq: Any = _ABSENT, exists: bool | None, gt: float | None, lt: float | None
) -> Row:
    """Conditions on one of an object's own properties. `eq` takes a text, number, boolean or null."""
    if not key or len(key) > MAX_TEXT or key.startswith("$") or "." in key or "\0" in key:
        raise BadUserInput("A property's key is not empty, has no dot and does not begin with `$`.")
    path, given = f"properties.{key}", list[Row]()
    if eq is not _ABSENT:
        if not isinstance(eq, str | int | float | bool | None):
            raise BadUserInput("A property is compared with a text, a number, a boolean or null.")
        if isinstance(eq, int) and not -(2**63) <= eq < 2**63:
            raise BadUserInput(
                "A whole number is compared within 64 bits; give a larger one as a text."
            )
        if isinstance(eq, float) and (not math.isfinite(eq) or abs(eq) >= 2**63):
            raise BadUserInput("A number is compared within 64 bits; give a larger one as a text.")
        if eq is None:
            given.append({path: {"$type": "null"}})  # there, and null
        else:
            given.append({path: _text(eq) if isinstance(eq, str) else eq})
    if exists is not None:
        given.append({path: {"$exists": exists}})
    bounds = {
        operator: bound for operator, bound in (("$gt", gt), ("$lt", lt)) if bound is not None
    }
    if bounds:
        if not all(math.isfinite(bound) for bound in bounds.values()):
            raise BadUserInput("A bound is a finite number.")
        # A list is not compared: one of its elements could be above, another below.
        given.append({path: {**bounds, "$not": {"$type": "array"}}})
    return all_of(given)


def all_of(parts: Sequence[Row]) -> Row:
    """All hold; of none: everything."""
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return parts[0] if parts else {}
    keys = [key for part in parts for key in part]
    if len(set(keys)) == len(keys):
        return {key: value for part in parts for key, value in part.items()}
    return {"$and": list(parts)}


def any_of(parts: Sequence[Row]) -> Row:
    """One holds at least; of none: nothing."""
    if not parts:
        return NOTHING
    return parts[0] if len(parts) == 1 else {"$or": list(parts)}


def none_of(part: Row) -> Row:
    return {"$nor": [part]}


def within(prefix: str, query: Row) -> Row:
    """The conditions, on what is embedded under `prefix`."""
    return {
        name: [within(prefix, part) for part in value] if name == "$and" else value
        for name, value in ((_under(prefix, name), value) for name, value in query.items())
    }


def _under(prefix: str, name: str) -> str:
    return name if name.startswith("$") else f"{prefix}.{name}"


def holds(query: Row, row: Row) -> bool:
    """Whether a row that is at hand meets the conditions, as MongoDB would find: of equality, `$in`,
    `$gte`, `$lte` and `$and` alone."""
    for name, wanted in query.items():
        if name == "$and":
            if not all(holds(part, row) for part in wanted):
                return False
            continue
        found = _found(row, name)
        operators = wanted if isinstance(wanted, dict) else {"$in": [wanted]}
        if not all(_meets(found, operator, bound) for operator, bound in operators.items()):
            return False
    return True


def _found(row: Row, path: str) -> Any:
    found: Any = row
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return _comparable(found)


def _meets(found: Any, operator: str, bound: Any) -> bool:
    if operator == "$in":
        values = [_comparable(value) for value in bound]
        return found in values or (
            isinstance(found, list) and any(_comparable(each) in values for each in found)
        )
    limit = _comparable(bound)
    if type(found) is not type(limit):
        return False  # MongoDB compares within one kind
    if operator == "$gte":
        return bool(found >= limit)
    if operator == "$lte":
        return bool(found <= limit)
    raise ValueError(f"{operator} is not for rows that are at hand")


def _comparable(value: Any) -> Any:
    """Times in UTC and in whole milliseconds, as MongoDB keeps them."""
    if not isinstance(value, datetime):
        return value
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    return aware.replace(microsecond=aware.microsecond // 1000 * 1000)


def _text(value: str, longest: int = MAX_TEXT) -> str:
    if len(value) > longest:
        raise BadUserInput(f"A value has {len(value)} characters; {longest} at most.")
    if "\0" in value:
        raise BadUserInput("A value holds a NUL character; leave it out.")
    return value


def _values(values: Sequence[str]) -> Sequence[str]:
    if len(values) > MAX_VALUES:
        raise BadUserInput(f"A list has {len(values)} values; {MAX_VALUES} at most.")
    return values
