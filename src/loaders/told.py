"""What a list was made of, as tags: from its MongoDB filter and its order.

A document comes into a list, leaves it or moves in it only by an insert, a removal, or a change of a
name that the filter or the order reads. These are told apart by one value that every document of the
list has (its task, its owner, …) where the filter asks for one, else by who may see it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from modelharbor.cache.places import STEPS, parts_between, step_of
from modelharbor.cache.tags import (
    ANY,
    WITHIN,
    Tag,
    added,
    below,
    changed,
    entity,
    gone,
    moved,
    of_principal,
    of_value,
)
from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row
from modelharbor.db.models import ModelDocument

LISTED: Final = {
    "models": ("name", "display_name", "summary", "tags", "owner_login", "text_language"),
    "actors": ("login", "display_name", "text_language"),
}
"""Collections whose lists can be told, with the stored names that a search by words looks into; the
last one, which nothing writes, would say in which language."""
_BY_CHOICE: Final = ("owner_login_lower", *(name for name in WITHIN if name != "owner_login_lower"))
"""Names of WITHIN; an owner has fewer models than the rest."""
STORED: Final = {
    "models": frozenset({"_id", *ModelDocument.model_fields}),
    "actors": frozenset({"_id", *ActorDocument.model_fields}),
}
MOST_VALUES: Final = 8  # that a list is told by; of more, it is told by none
MOST_PRINCIPALS: Final = 64


def by_key(collection: str, keys: Iterable[object]) -> list[Tag]:
    """Documents by their id, there or not."""
    return [entity(collection, key) for key in keys]


def below_each(collection: str, parent: str, keys: Iterable[object]) -> list[Tag]:
    """All documents of parents."""
    return [gone(collection), *(below(collection, parent, key) for key in keys)]


def by_name(owner: str) -> list[Tag]:
    """That an owner (login in lower case) has no model of a name, or none for this viewer."""
    within = of_value("owner_login_lower", owner)
    return [
        gone("models"),
        added("models", within),
        changed("models", "owner_login_lower"),
        changed("models", "name_lower", within),
        changed("models", "principals", within),
    ]


@dataclass(frozen=True, slots=True)
class Between:
    """A page: all that stands between two values of a name, one of ORDERED; None: to the end."""

    name: str
    least: Any
    greatest: Any

    def tags(self, collection: str, values: list[str]) -> list[Tag]:
        first = 0 if self.least is None else step_of(self.name, self.least)
        last = STEPS - 1 if self.greatest is None else step_of(self.name, self.greatest)
        if first is None or last is None or (first == 0 and last == STEPS - 1):
            added_to = [added(collection, each) for each in values]
            return [*added_to, *(changed(collection, self.name, each) for each in values)]
        parts = [None, *parts_between(first, last)]
        return [moved(collection, self.name, each, part) for part in parts for each in values]


def of_list(
    collection: str, query: Row, *names: str, between: Between | None = None
) -> list[Tag] | None:
    """Which documents match a filter, and how they stand by `names`; None: not to be told.

    `between`: only of those that stand there; the document behind them is told by its id.
    """
    if collection not in LISTED:
        return None
    read = set(names)
    if not _read(collection, query, read):
        return None
    read.discard("_id")  # which never changes
    asked = _asked(query) if collection == "models" else {}
    name = next((each for each in _BY_CHOICE if each in asked), None)
    principals = asked.get("principals")
    if name is None:
        if principals is None:
            if between is not None:
                read.add(between.name)
            return [
                gone(collection),
                added(collection, ANY),
                *(changed(collection, each) for each in read),
            ]
        name, principals = "principals", None
    values = asked[name]
    read -= {name, "principals"}
    if between is None:
        placed = [added(collection, value) for value in values]
    else:
        placed = between.tags(collection, values)
    return [
        gone(collection),
        # It may come from another value, or go to one: then it is still among those that the viewer
        # sees, or this is what was changed.
        changed(collection, "principals"),
        *(changed(collection, name, each) for each in principals or ()),
        *(() if principals else (changed(collection, name),)),
        *placed,
        *(changed(collection, each, value) for each in read for value in values),
    ]


def _read(collection: str, query: Row, names: set[str]) -> bool:
    """Adds the stored names that a filter reads; False where that is not all that it depends on."""
    for name, value in query.items():
        if name in ("$and", "$or", "$nor"):
            if not all(_read(collection, part, names) for part in value):
                return False
        elif name == "$text":
            names.update(LISTED[collection])
        elif name.startswith("$") or name.partition(".")[0] not in STORED[collection]:
            return False
        else:
            names.add(name)
    return True


def _asked(query: Row) -> dict[str, list[str]]:
    """By name the few values of which every document that matches has one."""
    found: dict[str, list[str]] = {}
    for name, condition in _conjuncts(query):
        if name == "principals":
            most, of = MOST_PRINCIPALS, of_principal
        elif name in WITHIN:
            most, of = MOST_VALUES, partial(of_value, name)
        else:
            continue
        values = _values(condition)
        known = found.get(name)
        if 0 < len(values) <= most and (known is None or len(values) < len(known)):
            found[name] = [of(value) for value in values]
    return found


def _conjuncts(query: Row) -> Iterator[tuple[str, Any]]:
    """The conditions that all must hold."""
    for name, value in query.items():
        if name == "$and":
            for part in value:
                yield from _conjuncts(part)
        else:
            yield name, value


def _values(condition: Any) -> list[str]:
    """The texts one of which a value must be; none: it may be something else, too."""
    if isinstance(condition, dict):
        condition = condition.get("$eq", condition.get("$in"))
    found = condition if isinstance(condition, list) else [condition]
    return found if all(isinstance(each, str) for each in found) else []
