"""How long an answer may be kept, and for whom: from `@cacheControl`, by Apollo's rules.

A field of Query, and one that answers objects, is never kept unless a hint on it, or on the type of
its objects, says how long; other fields go by what they stand in. A field's own hint counts before
that of the type. An answer is kept as long as the least of all its fields; it is one person's where
one field is. Of an interface or union every type counts that its objects can have.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from graphql import OperationType, get_named_type, is_abstract_type, is_composite_type

from modelharbor.loaders.base import Loader

from .declaration import Computed, Loaded
from .selection import BACKREF, Selected, Selection


@dataclass(frozen=True, slots=True)
class Policy:
    max_age: float
    """Seconds; 0: not kept."""
    is_private: bool
    """One person's."""
    stale: float
    """Seconds that it may be used beyond `max_age`, while it is made anew."""


NEVER: Final = Policy(0.0, False, 0.0)


@dataclass(frozen=True, slots=True)
class Hint:
    """What `@cacheControl` says; None: nothing."""

    max_age: float | None = None
    is_private: bool = False
    stale: float = 0.0


NO_HINT: Final = Hint()


def policy_of(selection: Selection) -> Policy:
    """Of all that a query selects. Whatever depends on the viewer in a computed field, and what has a
    loader that cannot tell what it read, is never kept."""
    if selection.operation.operation is not OperationType.QUERY:
        return NEVER
    hints = list(_hints(selection, selection.top, is_root=True))
    ages = [hint.max_age for hint in hints if hint.max_age is not None]
    max_age = min(ages, default=0.0)
    if max_age <= 0:
        return NEVER
    stale = min(hint.stale for hint in hints if hint.max_age is not None)
    return Policy(max_age, any(hint.is_private for hint in hints), stale)


def _hints(selection: Selection, fields: Iterable[Selected], *, is_root: bool) -> Iterator[Hint]:
    for each in fields:
        if each.definition is None:  # `__typename`
            continue
        yield _hint(selection, each, is_root=is_root)
        for below in each.below.values():
            yield from _hints(selection, below, is_root=False)


def _hint(selection: Selection, each: Selected, *, is_root: bool) -> Hint:
    what = each.what
    if isinstance(what, Computed) and "viewer" in what.parameters:
        return Hint(0.0)
    if isinstance(what, Loaded) and what.loader.tags is Loader.tags:
        return Hint(0.0)
    return hint_of(selection.schema, each.definition, is_root=is_root)


def hint_of(schema: Any, field: Any, *, is_root: bool) -> Hint:
    """Of one field of the schema: by its own hint, else by its type's, else by the rules."""
    target = get_named_type(field.type)
    own = _declared(field)
    of_type = NO_HINT
    if is_composite_type(target):
        of_type = _of_type(schema, target)
    elif not is_root:
        return own
    if own.max_age is not None:
        return Hint(own.max_age, own.is_private or of_type.is_private, own.stale)
    is_private = own.is_private or of_type.is_private
    return Hint(of_type.max_age or 0.0, is_private, of_type.stale)


def _of_type(schema: Any, kind: Any) -> Hint:
    if is_abstract_type(kind):
        hints = [_declared(each) for each in schema.get_possible_types(kind)]
        return Hint(
            min((hint.max_age or 0.0 for hint in hints), default=0.0),
            any(hint.is_private for hint in hints),
            min((hint.stale for hint in hints), default=0.0),
        )
    return _declared(kind)


def _declared(thing: Any) -> Hint:
    """`@cacheControl` of a field or an object type, as Strawberry has it."""
    definition = thing.extensions.get(BACKREF)
    for directive in getattr(definition, "directives", None) or ():
        known = getattr(type(directive), "__strawberry_directive__", None)
        if known is not None and known.python_name == "CacheControl":
            age, stale = directive.max_age, directive.stale_while_revalidate
            return Hint(
                float(age) if isinstance(age, int) else None,
                getattr(directive.scope, "value", None) == "PRIVATE",
                float(stale) if isinstance(stale, int) else 0.0,
            )
    return NO_HINT
