"""Tags: what an answer was made of, and what a change concerns. Where both have one, the answer is old.

`models/65f…`                 one document
`files?version_id=65f…`       the documents below one parent
`models.summary`              that name of any document, by an update
`models.summary@task:ocr`     the same of documents that have this value (after the update)
`models+@principal:public`    a document that is new in a list
`models+@*`                   a document that is new, whatever it has
`models~stats.likes=2:9@task:ocr`  one whose value stands there now, in an order: see places.py
`models-`                     a document that is gone, or changed in a way that is not told

An answer that depends on documents which are not in it (a list, a count) has, whatever else:
- `gone` of the collection;
- `added`, within one value that all its documents have, or within `*`;
- `changed` of each name that it filters or sorts by, within such a value or of any document; for a
  page in the order of one of ORDERED `moved` instead, of what lies between its ends, and then
  `entity` of the document behind its end and no `added`;
- where it goes by such a value, `changed` of that name too, of any document: who has left the value
  is not within it any more;
- `entity` of each document that is in it, if it shows more of them than that they are there.

Contents are known by hash, and a deletion does not tell it: who has one of `blobs` has `gone` too.
"""

from functools import lru_cache
from typing import Any, Final, TypeAlias, get_args

from pydantic import BaseModel

from modelharbor.db.base import Row
from modelharbor.db.cache import FOLLOWED
from modelharbor.db.models import ModelDocument

from .places import ORDERED, parts_of, step_of

Tag: TypeAlias = str

PARENTS: Final = {
    "versions": ("model_id",),
    "files": ("version_id",),
    "memberships": ("organization_id", "user_id"),
    "tokens": ("user_id",),
}
"""Stored names by which documents are listed below a parent: any change of one concerns that list."""
WITHIN: Final = ("task", "library", "license", "owner_login_lower")
"""Stored names of models, beside `principals`, by whose value lists are told apart."""
assert set(WITHIN) <= set(ModelDocument.model_fields)
ANY: Final = "*"
"""For `added`: whatever the document has."""
_HASH: Final = "sha256"
"""By which contents are known."""


def entity(collection: str, key: object) -> Tag:
    """One document, by its `_id` (blobs: by `sha256`)."""
    return f"{collection}/{key}"


def below(collection: str, name: str, value: object) -> Tag:
    """All documents whose `name`, one of PARENTS, has this value."""
    return f"{collection}?{name}={value}"


def changed(collection: str, name: str, within: str | None = None) -> Tag:
    """An update of `name`, of any document or of those `within` a value.

    A name with dots stands for what is told of it: `tags.1` for `tags`, `properties.layers` for
    `properties`, but `stats.likes` for itself.
    """
    name = told_name(collection, name)
    return f"{collection}.{name}" if within is None else f"{collection}.{name}@{within}"


def added(collection: str, within: str) -> Tag:
    """An insert of a document within a value, or ANY."""
    return f"{collection}+@{within}"


def moved(collection: str, name: str, within: str, part: tuple[int, int] | None) -> Tag:
    """A document within a value whose `name`, one of ORDERED, has come to stand in a part; None: at a
    place that is not known."""
    where = "?" if part is None else f"{part[0]}:{part[1]}"
    return f"{collection}~{name}={where}@{within}"


def gone(collection: str) -> Tag:
    return f"{collection}-"


def of_principal(principal: str) -> str:
    """For `within`."""
    return f"principal:{principal}"


def of_value(name: str, value: object) -> str:
    """For `within`; `name` is one of WITHIN."""
    return f"{name}:{value}"


def _parts(document: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """Stored names, with those in them where they are a record of their own."""
    found = {}
    for name, field in document.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        record = next(
            (each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None
        )
        is_list = getattr(field.annotation, "__origin__", None) is list
        inside = record.model_fields if record is not None and not is_list else ()
        found[field.alias or name] = tuple(f"{name}.{each}" for each in inside)
    return found


_NAMES: Final = {collection: _parts(document) for collection, document in FOLLOWED.items()}


@lru_cache(10_000)
def told_name(collection: str, name: str) -> str:
    """The name under which a change of a stored name is told."""
    first, _, rest = name.partition(".")
    inside = _NAMES.get(collection, {}).get(first)
    if not rest or not inside:
        return first
    second = f"{first}.{rest.partition('.')[0]}"
    return second if second in inside else first


@lru_cache(10_000)
def told_names(collection: str, name: str) -> tuple[str, ...]:
    """All names that are told when one was written: what it is in, and what is in it, too."""
    told = told_name(collection, name)
    first, _, rest = told.partition(".")
    inside = _NAMES.get(collection, {}).get(first, ())
    return (first, told) if rest else (first, *inside)


def _every_name(collection: str) -> list[str]:
    return [
        each
        for name, inside in _NAMES.get(collection, {}).items()
        if name != "_id"
        for each in (name, *inside)
    ]


def withins(collection: str, document: Row) -> list[str]:
    """The values by which lists with this document are told apart."""
    if collection != "models":
        return []
    return [
        *[of_principal(each) for each in document.get("principals") or ()],
        *[of_value(name, document.get(name)) for name in WITHIN],
    ]


def tags_of(change: Row) -> list[Tag]:
    """What a change concerns, as `following.py` reads it: `kind`, `coll`, `id`, `names` that an update
    wrote, and of the `document` after it the names by which lists are told apart; None: not known."""
    collection, kind, document = change["coll"], change["kind"], change["document"]
    parents = PARENTS.get(collection, ())
    is_whole = kind in {"insert", "replace"}
    names: list[str] = []
    if kind == "update":
        names = list(
            dict.fromkeys(told for name in change["names"] for told in told_names(collection, name))
        )
    elif kind == "replace":
        names = _every_name(collection)
    found = [] if collection == "blobs" else [entity(collection, change["id"])]
    found += [f"{collection}.{name}" for name in names]
    if document is None or kind not in {"insert", "replace", "update"}:
        return [*found, gone(collection)]
    within = withins(collection, document)
    found += [f"{collection}.{name}@{each}" for name in names for each in within]
    if within:
        for name in ORDERED if is_whole else ORDERED.intersection(names):
            found += _moved(collection, name, document, within)
    if is_whole:
        found += [f"{collection}+@{each}" for each in (ANY, *within)]
    found += [below(collection, name, document.get(name)) for name in parents]
    fixed: tuple[str, ...] = parents
    if collection == "blobs":
        found.append(entity(collection, document.get(_HASH)))
        fixed = (_HASH,)
    # It was elsewhere before, and nobody knows where.
    if kind != "insert" and any(name in names for name in fixed):
        found.append(gone(collection))
    return found


def _moved(collection: str, name: str, document: Row, within: list[str]) -> list[Tag]:
    value: Any = document
    for each in name.split("."):
        value = value.get(each) if isinstance(value, dict) else None
    step = step_of(name, value)
    parts = [None] if step is None else parts_of(step)
    return [moved(collection, name, each, part) for part in parts for each in within]


def read_names() -> list[str]:
    """Stored names that `tags_of` reads of a document."""
    return sorted(
        {
            "principals",
            _HASH,
            *WITHIN,
            *(name.partition(".")[0] for name in ORDERED),
            *(name for names in PARENTS.values() for name in names),
        }
    )


def is_apart(change: Row) -> bool:
    """Whether its tags were made of what the document came to be later, maybe."""
    return bool(change["kind"] == "update" and change["coll"] == "models")
