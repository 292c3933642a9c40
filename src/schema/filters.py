"""Filters: typed inputs, each field of which says what condition it makes."""

from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from datetime import datetime
from typing import Any, Final

import strawberry

from modelharbor.db import conditions
from modelharbor.db.base import Row
from modelharbor.db.files import FileFormat
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.db.keyset import Filter
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import BadUserInput
from modelharbor.loaders.models import WITH_CONTENTS

from .nodes import parse_global_id
from .scalars import JSON, SHA256, BigInt

MAX_DEPTH: Final = 5  # of and, or, not
MAX_LEAVES: Final = 50  # conditions in one filter
MATCH: Final = "modelharbor.match"


def matching(condition: Callable[[Any], Row], *, description: str) -> Any:
    """A field of a filter: `condition` makes the MongoDB filter from the value that was given."""
    return strawberry.field(default=None, description=description, metadata={MATCH: condition})


@strawberry.input(description="Conditions on a text; given together, all must hold.")
class StringFilter:
    eq: str | None = strawberry.field(default=None, description="Is this text.")
    in_: list[str] | None = strawberry.field(
        default=None, name="in", description="Is one of these, 100 at most."
    )
    prefix: str | None = strawberry.field(default=None, description="Begins with this text.")
    contains: str | None = strawberry.field(default=None, description="Has this text in it.")


@strawberry.input(description="Conditions on a list of texts; given together, all must hold.")
class StringListFilter:
    has_all: list[str] | None = strawberry.field(default=None, description="Holds all of these.")
    has_any: list[str] | None = strawberry.field(default=None, description="Holds one of these.")
    has_none: list[str] | None = strawberry.field(default=None, description="Holds none of these.")


@strawberry.input(description="Conditions on one of an object's own properties.")
class PropertyFilter:
    key: str = strawberry.field(description="Name of the property.")
    eq: JSON | None = strawberry.field(
        default=strawberry.UNSET, description="Is this text, number, boolean or null."
    )
    exists: bool | None = strawberry.field(default=None, description="Is there, or is not.")
    gt: float | None = strawberry.field(default=None, description="Is greater.")
    lt: float | None = strawberry.field(default=None, description="Is less.")


@strawberry.input(description="A range of whole numbers, both ends in it.")
class BigIntRange:
    gte: BigInt | None = strawberry.field(default=None, description="This or more.")
    lte: BigInt | None = strawberry.field(default=None, description="This or less.")


@strawberry.input(description="A range of time, both ends in it.")
class DateTimeRange:
    gte: datetime | None = strawberry.field(default=None, description="Then or later.")
    lte: datetime | None = strawberry.field(default=None, description="Then or earlier.")


def text(path: str, *, lower: bool = False, in_list: bool = False) -> Callable[[StringFilter], Row]:
    """`lower`: the stored text is in lower case, and case does not matter."""

    def fold(value: str | None) -> str | None:
        return value.lower() if lower and value is not None else value

    def condition(given: StringFilter) -> Row:
        one_of = None if given.in_ is None else [str(fold(value)) for value in given.in_]
        return conditions.text(
            path,
            eq=fold(given.eq),
            one_of=one_of,
            prefix=fold(given.prefix),
            contains=fold(given.contains),
            in_list=in_list,
        )

    return condition


def text_list(path: str) -> Callable[[StringListFilter], Row]:
    return lambda given: conditions.text_list(
        path, has_all=given.has_all, has_any=given.has_any, has_none=given.has_none
    )


def between(path: str) -> Callable[[BigIntRange | DateTimeRange], Row]:
    return lambda given: conditions.between(path, gte=given.gte, lte=given.lte)


def one_of(path: str) -> Callable[[list[Any]], Row]:
    return lambda given: conditions.one_of(path, [value.value for value in given])


def properties(given: list[PropertyFilter]) -> Row:
    if len(given) > MAX_LEAVES:
        raise BadUserInput(f"A filter has at most {MAX_LEAVES} conditions.")
    return conditions.all_of(
        [
            conditions.property_value(
                each.key,
                exists=each.exists,
                gt=each.gt,
                lt=each.lt,
                **({} if each.eq is strawberry.UNSET else {"eq": each.eq}),
            )
            for each in given
        ]
    )


def alias_name(given: str) -> Row:
    return conditions.text("aliases.name", eq=given)


def with_contents(given: SHA256) -> Row:
    return {WITH_CONTENTS: given}


def created_by(given: strawberry.ID) -> Row:
    found = parse_global_id(given)
    return {"created_by_id": found.id} if found else conditions.NOTHING


def subject(given: strawberry.ID) -> Row:
    found = parse_global_id(given)
    if found is None or found.name is not None:
        return conditions.NOTHING
    return {"subject.type": found.typename, "subject.id": found.id}


@strawberry.input(
    description="Which models. What is given in one filter must all hold; nest 5 deep and give 50 conditions at most."
)
class ModelFilter:
    and_: "list[ModelFilter] | None" = strawberry.field(
        default=None, name="and", description="All of these hold."
    )
    or_: "list[ModelFilter] | None" = strawberry.field(
        default=None, name="or", description="One of these holds at least."
    )
    not_: "ModelFilter | None" = strawberry.field(
        default=None, name="not", description="This does not hold."
    )
    owner: StringFilter | None = matching(
        text("owner_login_lower", lower=True), description="Login of the owner, in any case."
    )
    name: StringFilter | None = matching(
        text("name_lower", lower=True), description="Name, in any case."
    )
    task: StringFilter | None = matching(text("task"), description="Task.")
    library: StringFilter | None = matching(text("library"), description="Library.")
    license: StringFilter | None = matching(text("license"), description="Licence.")
    language: StringFilter | None = matching(
        text("languages", in_list=True), description="One of its languages."
    )
    tags: StringListFilter | None = matching(text_list("tags"), description="Tags.")
    property: list[PropertyFilter] | None = matching(properties, description="Own properties.")
    visibility: list[Visibility] | None = matching(
        one_of("visibility"), description="One of these visibilities."
    )
    state: list[ModelState] | None = matching(
        one_of("state"), description="One of these states; without it ACTIVE ones only."
    )
    format: list[FileFormat] | None = matching(
        one_of("formats"), description="Its latest version has a file of one of these formats."
    )
    parameters: BigIntRange | None = matching(
        between("parameters"),
        description="Parameters of its latest version; 0 where they are not known.",
    )
    size_bytes: BigIntRange | None = matching(
        between("stats.size_bytes"), description="Sum of its files' lengths, in bytes."
    )
    downloads30d: BigIntRange | None = matching(
        between("stats.downloads_30d"), description="Downloads in the last 30 days."
    )
    created_at: DateTimeRange | None = matching(between("created_at"), description="When made.")
    updated_at: DateTimeRange | None = matching(
        between("updated_at"), description="When last changed."
    )
    has_alias: str | None = matching(alias_name, description="Has an alias of this name.")
    file_sha256: SHA256 | None = matching(
        with_contents, description="Holds a file with these contents, in any version."
    )


@strawberry.input(description="Which versions of a model. What is given must all hold.")
class ModelVersionFilter:
    status: list[VersionStatus] | None = matching(
        one_of("status"), description="One of these statuses."
    )
    tags: StringListFilter | None = matching(text_list("tags"), description="Tags.")
    property: list[PropertyFilter] | None = matching(properties, description="Own properties.")
    created_at: DateTimeRange | None = matching(between("created_at"), description="When made.")
    created_by: strawberry.ID | None = matching(created_by, description="Id of who made it.")


@strawberry.input(description="Which jobs. What is given must all hold.")
class JobFilter:
    kind: list[JobKind] | None = matching(one_of("kind"), description="One of these kinds.")
    state: list[JobState] | None = matching(one_of("state"), description="One of these states.")
    created_by: strawberry.ID | None = matching(created_by, description="Id of who asked for it.")
    subject: strawberry.ID | None = matching(subject, description="Id of what it is about.")
    created_at: DateTimeRange | None = matching(between("created_at"), description="When made.")


class Compiler:
    """Makes a MongoDB filter from an input. Counts what it is given, refuses what is too much."""

    def __init__(self) -> None:
        self.leaves = 0
        self.contents = 0

    def compiled(self, given: Any, depth: int = 1) -> Row:
        if depth > MAX_DEPTH:
            raise BadUserInput(f"A filter nests {MAX_DEPTH} deep at most.")
        parts: list[Row] = []
        for field in dataclass_fields(given):
            value = getattr(given, field.name)
            if value is None:
                continue
            if field.name in ("and_", "or_", "not_"):
                self.count(max(1, len(value)) if isinstance(value, list) else 1)
                parts.append(self.combined(field.name, value, depth + 1))
            else:
                self.count(len(value) if field.name == "property" else 1)
                self.contents += field.name == "file_sha256"
                if self.contents > 1:
                    raise BadUserInput("A filter looks for the contents of one file at most.")
                parts.append(field.metadata[MATCH](value))
        return conditions.all_of(parts)

    def combined(self, name: str, value: Any, depth: int) -> Row:
        if name == "not_":
            return conditions.none_of(self.compiled(value, depth))
        found = [self.compiled(each, depth) for each in value]
        return conditions.all_of(found) if name == "and_" else conditions.any_of(found)

    def count(self, leaves: int) -> None:
        self.leaves += leaves
        if self.leaves > MAX_LEAVES:
            raise BadUserInput(f"A filter has at most {MAX_LEAVES} conditions.")


def compile_filter(given: ModelFilter | ModelVersionFilter | JobFilter | None) -> Filter:
    return Filter(Compiler().compiled(given) if given is not None else {})


def names_state(given: ModelFilter | None) -> bool:
    """Whether a filter says anything about states; else only ACTIVE models are meant."""
    if given is None:
        return False
    nested = [*(given.and_ or ()), *(given.or_ or ()), *([given.not_] if given.not_ else ())]
    return given.state is not None or any(names_state(each) for each in nested)
