"""Damage in one place: one stored name of some rows of one type has a value that it may not have.

Where much is damaged graphql-core makes every answer; here all but one value is as it should be, so
what a plan makes of that value decides.
"""

from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any, Final

from bson import Int64, ObjectId
from graphql import GraphQLInterfaceType, GraphQLObjectType
from strawberry.schema.schema_converter import GraphQLCoreConverter

from modelharbor.db.base import Row
from modelharbor.execution.declaration import GIVEN, Computed, Loaded, declaration
from modelharbor.schema import core

from .data import ABSENT, GONE, KINDS, NAN, START

COLLECTIONS: Final = {
    "Model": "models", "ModelStats": "models", "ModelCard": "cards", "ModelVersion": "versions", "ModelFile": "files",
    "User": "actors", "Organization": "actors", "Actor": "actors", "Membership": "memberships", "ApiToken": "tokens", "Alias": "aliases",
    "Job": "jobs", "Upload": "uploads",
}  # fmt: skip
VALUES: Final[tuple[Any, ...]] = (
    ABSENT, ABSENT, None, None, True, False, 0, 5, 2**31, Int64(2**62), -(2**31) - 1, 1.5, 2.0, NAN, float("inf"),
    "", "x", "7", "READ", "User", {}, {"a": 1}, [], [None], ["x"], ["x", None], ["READ", "FLY"], [[1]], (), b"x", GONE, START,
)  # fmt: skip
NUMBERS: Final = [at for at, value in enumerate(VALUES) if isinstance(value, int | float)]
ALIAS: Final = frozenset({"name", "version_id"})


@dataclass(frozen=True)
class Spot:
    """`Type/stored.name/number of the value/seed` as text."""

    kind: str
    path: str
    value: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.path}/{self.value}/{self.seed}"

    @staticmethod
    def of(text: str) -> "Spot":
        kind, path, value, seed = text.split("/")
        return Spot(kind, path, int(value), int(seed))

    def damaged(self, found: Any) -> Any:
        """What a loader answered for a key, with the damage in it. What is shared is not changed."""
        if isinstance(found, list):
            return [self.damaged(each) for each in found]
        if type(found) is not dict:
            return found
        if "window" in found and "nodes" in found:
            return {**found, "nodes": [self.damaged(row) for row in found["nodes"]]}
        return self._row(found)

    def _row(self, row: Row) -> Row:
        collection = COLLECTIONS[self.kind]
        if collection == "aliases":
            if row.keys() >= ALIAS and "_id" not in row:
                return self._changed(row, self.path) if self._hits(row["version_id"]) else row
            if isinstance(row.get("aliases"), list):
                return {**row, "aliases": [self._row(each) for each in row["aliases"]]}
            return row
        _id = row.get("_id")
        if not isinstance(_id, ObjectId) or not self._hits(_id):
            return row
        number = int(str(_id)[2:8], 16)
        of = "models" if collection == "cards" else collection
        if number >= len(KINDS) or KINDS[number] != of:
            return row
        return self._changed(row, self.path)

    def _hits(self, _id: ObjectId) -> bool:
        digest = blake2b(f"{self.seed}/{_id}".encode(), digest_size=1).digest()[0]
        return digest % 4 == 0 or self.seed % 3 == 0

    def _changed(self, row: Row, path: str) -> Row:
        name, _, rest = path.partition(".")
        typename = {"__typename"} & row.keys() if name == "kind" else set()
        if name not in row and not typename:
            return row
        if rest:
            inner = row[name]
            return {**row, name: self._changed(inner, rest)} if type(inner) is dict else row
        value = VALUES[self.value]
        if value is ABSENT:
            return {key: each for key, each in row.items() if key != name}
        # A plan's rows have the name that was made of the kind, and not always the kind itself.
        return {**row, **dict.fromkeys(({name} & row.keys()) | typename, value)}


def _readable() -> dict[str, list[tuple[str, str]]]:
    """By field (`Model.name`), the type and the stored names that it reads."""
    found: dict[str, list[tuple[str, str]]] = {}
    for kind in core.type_map.values():
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType) and kind.name in COLLECTIONS:
            for name, field in kind.fields.items():
                own = field.extensions[GraphQLCoreConverter.DEFINITION_BACKREF]
                what = declaration(own)
                names: tuple[str, ...] = (own.python_name,)
                if isinstance(what, Computed):
                    names = tuple(each for each in what.parameters if each not in GIVEN)
                elif isinstance(what, Loaded):
                    names = what.reads
                prefix = "stats." if kind.name == "ModelStats" else ""
                found[f"{kind.name}.{name}"] = [
                    (kind.name, prefix + each) for each in names if each != "_id"
                ]
    return found


READABLE: Final = _readable()


def draw_spot(random: Random, fields: set[str]) -> str | None:
    """Something that an operation with these fields reads; None where it reads no row."""
    possible = [each for field in sorted(fields) for each in READABLE.get(field, ())]
    if any(kind == "actors" for kind in map(COLLECTIONS.get, (each[0] for each in possible))):
        possible.append(("User", "kind"))
    if not possible:
        return None
    kind, path = random.choice(possible)
    near = random.random() < 0.5  # numbers and booleans, which scalars make of each other
    value = random.choice(NUMBERS) if near else random.randrange(len(VALUES))
    return str(Spot(kind, path, value, random.randrange(1000)))
