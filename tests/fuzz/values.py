"""Values for arguments and variables: mostly of things that are there, some unknown, a few malformed."""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLInputType,
    GraphQLList,
    GraphQLNonNull,
    Undefined,
)

from modelharbor.db.base import Row
from modelharbor.db.keyset import Order, encode_cursor
from modelharbor.loaders.search import RELEVANCE
from modelharbor.schema.actors import BY_ID
from modelharbor.schema.jobs import NEWEST
from modelharbor.schema.nodes import global_id
from modelharbor.schema.orders import (
    BY_PATH,
    MODEL_ORDERS,
    VERSION_ORDERS,
    ModelOrderField,
    ModelVersionOrderField,
)
from modelharbor.schema.versions import alias_id

from .data import GONE, HASHES, LOGINS, PATHS, TAGS, WORDS, Collections, likes

ID_TYPES: Final = {
    "Model": "models",
    "ModelVersion": "versions",
    "ModelFile": "files",
    "User": "actors",
    "Organization": "actors",
    "Membership": "memberships",
    "ApiToken": "tokens",
    "Job": "jobs",
    "Upload": "uploads",
}
MALFORMED: Final = ("", "garbage", "TW9kZWw6", "é", "x" * 300, "TW9kZWw6bm90LWFuLWlkLWF0LWFsbC4u")
JUNK: Final[tuple[Any, ...]] = (
    None, 5, -1, 2**40, 2**70, 1.5, True, "x", "", "é\u2028", [], {}, [None], [[1]], {"unknown": 1}, ["x"] * 3, {"id": None},
)  # fmt: skip


class EnumName(str):
    """A value that stands in a document without quotes."""

    __slots__ = ()


class Values:
    """Draws values of input types. A hint says what they are for, such as `id:Model`."""

    def __init__(self, rows: Collections) -> None:
        self.rows = rows
        self.ids: dict[str, list[str]] = {
            kind: [
                global_id(kind, row["_id"])
                for row in rows[collection]
                if collection != "actors" or row["kind"] == kind
            ]
            for kind, collection in ID_TYPES.items()
        }
        self.ids["Alias"] = [
            alias_id(row["_id"], alias["name"])
            for row in rows["models"]
            for alias in row["aliases"]
        ]
        self.kinds = list(self.ids)
        self.names = [(row["owner_login"], row["name"]) for row in rows["models"]]
        self.by_hint: dict[str, Callable[[Random], Any]] = {
            "login": self.login,
            "name": lambda random: random.choice(self.names)[1],
            "alias": lambda random: random.choice(("prod", "beta", "stable", "latest", "none")),
            "path": lambda random: random.choice((*PATHS, *PATHS, "missing", "a\0b")),
            "pathPrefix": lambda random: random.choice(("weights/", "", "c", "none", "a b")),
            "words": self.words,
            "ref": self.reference,
            "prefix": self.prefix,
            "tag": lambda random: random.choice((*TAGS, *TAGS, "none")),
            "key": lambda random: random.choice(("size", "size", "accuracy", "none", "$bad", "")),
            "task": lambda random: random.choice(("text-generation", "image", "text", "none")),
            "license": lambda random: random.choice(("mit", "apache-2.0", "apache")),
            "library": lambda random: random.choice(("transformers", "trans", "none")),
            "language": lambda random: random.choice(("en", "de", "fr", "xx")),
            "number": lambda random: random.choice((1, 1, 2, 2, 3, 4, 0, 9)),
            "page": lambda random: random.choice((1, 1, 2, 2, 3, 3, 5, 20, 100)),
            "badPage": lambda random: random.choice((0, -1, 101, 2**31 - 1)),
            "limit": lambda random: random.choice((1, 2, 5, 20, 0, 101)),
            "suggested": lambda random: random.choice((1, 3, 8, 50, 0, 51)),
            "expiresIn": lambda random: random.choice((60, 3600, 604800, 59, 0)),
            "property": self.property,
        }

    def login(self, random: Random) -> str:
        found = (
            random.choice(self.names)[0] if random.random() < 0.8 else random.choice(("dan", "x"))
        )
        return found.upper() if random.random() < 0.1 else found

    def words(self, random: Random) -> str:
        if random.random() < 0.06:
            return random.choice(("", "  ", "a " * 12, "w" * 300))
        return " ".join(random.sample(WORDS, random.choice((1, 1, 1, 2))))

    def reference(self, random: Random) -> str:
        owner, name = random.choice(self.names)
        if random.random() < 0.1:
            return random.choice(("", "x", "acme/none", "a/b@", "a/b:0", "a/b/c"))
        return f"{owner}/{name}" + random.choice(("", "", "@prod", "@beta", ":1", ":2", "@none"))

    def prefix(self, random: Random) -> str:
        if random.random() < 0.08:
            return random.choice(("", "w" * 201, "a\0"))
        return random.choice(("w", "W", "t", "acme/", "ada/w", "a", "none"))

    def property(self, random: Random) -> Any:
        return random.choice((3, "big", 0.25, True, None, [1], {"a": 1}, 2**70, -1))

    def id(self, random: Random, wanted: str) -> str:
        """A global id, mostly of a type that is wanted; `A|B`: of one of these, empty: of any."""
        at = random.random()
        if at < 0.05:
            return random.choice(MALFORMED)
        kind = random.choice(wanted.split("|") if wanted and at > 0.12 else self.kinds)
        if at < 0.17:
            return global_id(kind, GONE)
        return random.choice(self.ids[kind])

    def liked(self, random: Random, viewer: str, wanted: bool) -> str:
        """A model that the viewer likes, or does not: saying so again changes nothing."""
        login = LOGINS.get(viewer)
        rows = self.rows["models"]
        found = [
            row["_id"]
            for number, row in enumerate(rows)
            if login is not None and likes(login, number) == wanted
        ]
        return global_id("Model", random.choice(found) if found else GONE)

    def cursor(self, random: Random, of: str) -> str:
        """A place in a list: `models:-name_lower`, `_id:actors`; sometimes in another list."""
        if random.random() < 0.06:
            return random.choice(("", "garbage", "é", "WyIrX2lkIixudWxsLCJ4Il0"))
        collection, _, tag = of.partition(":")
        rows = self.rows[collection] or self.rows["models"]
        row = random.choice(rows)
        order = ORDERS.get(tag) or ORDERS["+_id"]
        if tag.endswith("score"):
            row = {**row, "score": random.choice((0.75, 1.1, 5.5, 10.0))}
        return encode_cursor(order, row)

    def draw(self, random: Random, kind: GraphQLInputType, hint: str) -> Any:
        """A value as JSON has it, with enum values as EnumName."""
        if isinstance(kind, GraphQLNonNull):
            return self.draw_present(random, kind.of_type, hint)
        if random.random() < 0.08:
            return None
        return self.draw_present(random, kind, hint)

    def draw_present(self, random: Random, kind: Any, hint: str) -> Any:
        if isinstance(kind, GraphQLList):
            if random.random() < 0.1:
                return self.draw_present(random, _bare(kind.of_type), hint)  # a list of one
            count = random.choice((0, 1, 1, 2, 2, 3, 4))
            return [self.draw(random, kind.of_type, hint) for _ in range(count)]
        if isinstance(kind, GraphQLEnumType):
            return EnumName(random.choice(list(kind.values)))
        if isinstance(kind, GraphQLInputObjectType):
            return self.draw_object(random, kind, hint)
        return self.draw_scalar(random, kind.name, hint)

    def draw_object(self, random: Random, kind: GraphQLInputObjectType, hint: str) -> Row:
        depth = depth_of(hint)
        required = [
            name
            for name, field in kind.fields.items()
            if isinstance(field.type, GraphQLNonNull) and field.default_value is Undefined
        ]
        optional = [
            name
            for name in kind.fields
            if name not in required and not (depth >= 2 and name in ("and", "or", "not"))
        ]
        count = random.choice((0, 1, 1, 1, 2, 3)) if not required else random.choice((0, 0, 1))
        given = required + random.sample(optional, min(count, len(optional)))
        return {
            name: self.draw(random, kind.fields[name].type, hint_of(kind.name, name, hint))
            for name in given
        }

    def draw_scalar(self, random: Random, name: str, hint: str) -> Any:
        if hint.startswith("id:") or name == "ID":
            return self.id(random, hint.partition(":")[2] if hint.startswith("id:") else "")
        if hint.startswith("cursor:"):
            return self.cursor(random, hint.partition(":")[2])
        known = self.by_hint.get(hint)
        if known is not None:
            return known(random)
        match name:
            case "Int":
                return random.choice((0, 1, 2, 5, -1))
            case "Float":
                return random.choice((0, 0.25, 1.5, 3, -2.0, 1e300))
            case "Boolean":
                return random.random() < 0.5
            case "BigInt":
                value = random.choice((0, 7, 100, 2**40, 2**53 + 1, -5))
                return str(value) if random.random() < 0.5 else value
            case "DateTime":
                return random.choice(
                    (
                        "2026-01-01T00:00:00Z",
                        "2026-01-02T03:00:00.004Z",
                        "2025-12-31T23:00:00-01:00",
                    )
                )
            case "SHA256":
                found = random.choice(HASHES) if random.random() < 0.9 else "f" * 64
                return found.upper() if random.random() < 0.1 else found
            case "JSON":
                return self.property(random)
        return random.choice(("whale", "x", "", "été"))

    def broken(self, random: Random, value: Any) -> Any:
        """Something in place of a value, or of a part of it, that mostly does not fit."""
        if isinstance(value, dict) and value and random.random() < 0.6:
            name = random.choice(list(value))
            return {**value, name: self.broken(random, value[name])}
        if isinstance(value, dict) and random.random() < 0.3:
            return {**value, "unknown": 1}
        if isinstance(value, list) and value and random.random() < 0.6:
            place = random.randrange(len(value))
            return [*value[:place], self.broken(random, value[place]), *value[place + 1 :]]
        if isinstance(value, list) and random.random() < 0.3:
            return (value or ["x"]) * 101
        return random.choice(JUNK)


def _bare(kind: Any) -> Any:
    return kind.of_type if isinstance(kind, GraphQLNonNull) else kind


def _orders() -> dict[str, Order]:
    made = [BY_ID, BY_PATH, NEWEST]
    for ascending in (False, True):
        made.append(Order(RELEVANCE.path, RELEVANCE.kind, ascending))
        made += [Order(path, kind, ascending) for path, kind in MODEL_ORDERS.values()]
        made += [
            Order(path, kind, ascending, unique) for path, kind, unique in VERSION_ORDERS.values()
        ]
    return {order.tag: order for order in made}


ORDERS: Final = _orders()


def order_tag(kind: str, value: Any) -> str:
    """The tag of the order that an `orderBy` asks for, as a cursor of the list has it."""
    given = value if isinstance(value, dict) else {}
    direction = "+" if given.get("direction") == "ASC" else "-"
    if kind == "ModelOrder":
        field = ModelOrderField[given.get("field") or "TRENDING"]
        return direction + MODEL_ORDERS[field][0]
    return direction + VERSION_ORDERS[ModelVersionOrderField[given.get("field") or "NUMBER"]][0]


HINTS: Final = {
    ("Query", "node", "id"): "id:",
    ("Query", "model", "id"): "id:Model",
    ("Query", "job", "id"): "id:Job",
    ("Query", "compareVersions", "base"): "id:ModelVersion",
    ("Query", "compareVersions", "head"): "id:ModelVersion",
    ("Query", "upload", "id"): "id:Upload",
    ("Query", "storage", "owner"): "login",
    ("Query", "model", "owner"): "login",
    ("Query", "model", "name"): "name",
    ("Query", "search", "query"): "words",
    ("Query", "models", "search"): "words",
    ("Query", "resolve", "ref"): "ref",
    ("Query", "suggest", "prefix"): "prefix",
    ("Query", "suggest", "first"): "suggested",
    ("Model", "version", "number"): "number",
    ("Model", "version", "alias"): "alias",
    ("ModelVersion", "file", "path"): "path",
    ("ModelVersion", "files", "pathPrefix"): "pathPrefix",
    ("ModelFile", "downloadUrl", "expiresIn"): "expiresIn",
    ("ModelConnection", "facets", "limit"): "limit",
}
FIELD_HINTS: Final = {
    ("", "owner"): "login",
    ("", "name"): "name",
    ("", "task"): "task",
    ("", "library"): "library",
    ("", "license"): "license",
    ("", "language"): "language",
    ("", "tags"): "tag",
    ("", "hasAlias"): "alias",
    ("", "createdBy"): "id:User",
    ("", "subject"): "id:Model|ModelVersion",
    ("PropertyFilter", "key"): "key",
    ("PropertyFilter", "eq"): "property",
}


def hint_of(kind: str, name: str, outer: str) -> str:
    """What a field of an input object is for; conditions on a text are for what the text is."""
    if kind in ("StringFilter", "StringListFilter"):
        return outer
    if kind == "ModelFilter" and name in ("and", "or", "not"):
        return f"depth:{depth_of(outer) + 1}"
    return FIELD_HINTS.get((kind, name)) or FIELD_HINTS.get(("", name), "")


def depth_of(hint: str) -> int:
    """How deep a filter stands in another."""
    return int(hint.partition("depth:")[2] or 0)


def literal(value: Any) -> str:
    """A value as it stands in a document."""
    if isinstance(value, EnumName):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {literal(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(each) for each in value) + "]"
    return json.dumps(value)


def plain(value: Any) -> Any:
    """A value as it stands in the variables."""
    if isinstance(value, EnumName):
        return str(value)
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def weighted(random: Random, choices: Sequence[tuple[Any, float]]) -> Any:
    return random.choices([each for each, _ in choices], [weight for _, weight in choices])[0]
