"""What differs between two versions."""

import json
from enum import Enum
from typing import Annotated, Any, Final

import strawberry
from bson import ObjectId

from modelharbor.db import conditions
from modelharbor.db.base import Row
from modelharbor.db.keyset import Filter, Window
from modelharbor.execution.declaration import computed, loaded
from modelharbor.loaders.comparing import (
    ADDED,
    MODIFIED,
    REMOVED,
    UNCHANGED,
    BytesAddedLoader,
    BytesSharedLoader,
    ChangeCountLoader,
    FileChangesLoader,
    SharedBytesLoader,
    TensorComparisonLoader,
)
from modelharbor.loaders.versions import VersionByIdLoader

from .directives import KEPT, Cost
from .files import ModelFile, TensorSummary
from .nodes import parse_global_id
from .orders import BY_PATH
from .pages import PER_ROW, After, Before, Connection, First, Last, window
from .scalars import JSON, BigInt
from .versions import ModelVersion

ALL_FILES: Final = (Cost(weight=20),)
"""Of what goes through all files of both versions."""
BOTH: Final = ("base_id", "head_id", "base_model_id")


@strawberry.enum(description="What became of something between two versions.")
class ChangeKind(Enum):
    ADDED = strawberry.enum_value(ADDED, description="Only the head has it.")
    REMOVED = strawberry.enum_value(REMOVED, description="Only the base has it.")
    MODIFIED = strawberry.enum_value(MODIFIED, description="Both have it, and it differs.")
    UNCHANGED = strawberry.enum_value(UNCHANGED, description="It is the same in both.")


def versions_wanted(
    base: Annotated[
        strawberry.ID, strawberry.argument(description="Global id of the version to compare with.")
    ],
    head: Annotated[
        strawberry.ID,
        strawberry.argument(description="Global id of the version to compare: the newer, mostly."),
    ],
) -> tuple[ObjectId, ObjectId] | None:
    found = [parse_global_id(each) for each in (base, head)]
    ids = [each.id for each in found if each is not None and each.typename == "ModelVersion"]
    return (ids[0], ids[1]) if len(ids) == 2 else None


def changes_window(
    first: First = None,
    after: After = None,
    last: Last = None,
    before: Before = None,
    change: Annotated[
        list[ChangeKind] | None,
        strawberry.argument(
            description="Only what changed in one of these ways. All files of both versions are looked at for it."
        ),
    ] = None,
) -> Window:
    kinds = dict.fromkeys(str(each.value) for each in change or ())
    everything = change is None or len(kinds) == len(ChangeKind)
    query = {} if everything else conditions.one_of("change", list(kinds))
    return window(BY_PATH, first, after, last, before, Filter(query))


def property_changes(base_properties: Row | None, head_properties: Row | None) -> Any:
    base, head = base_properties or {}, head_properties or {}
    found = []
    for key in sorted(base.keys() | head.keys()):
        if key not in base:
            kind = ADDED
        elif key not in head:
            kind = REMOVED
        elif _text(base[key]) == _text(head[key]):
            continue
        else:
            kind = MODIFIED
        found.append({"key": key, "change": kind, "base": base.get(key), "head": head.get(key)})
    return found


def _text(value: Any) -> str:
    """As JSON: Python holds 1, 1.0 and true for equal."""
    return json.dumps(value, sort_keys=True, default=str)


def parameter_delta(base_parameters: int | None, head_parameters: int | None) -> Any:
    if base_parameters is None or head_parameters is None:
        return None
    return head_parameters - base_parameters


@strawberry.type(description="A path of one of two versions, or of both.", directives=(KEPT,))
class FileChange:
    path: str = strawberry.field(description="The path.")
    change: ChangeKind = strawberry.field(
        description="What became of it: MODIFIED where the contents differ."
    )
    base: ModelFile | None = strawberry.field(description="The file of the base.")
    head: ModelFile | None = strawberry.field(description="The file of the head.")
    shared_bytes: BigInt = loaded(
        SharedBytesLoader,
        key="contents",
        description="Length of the head's file where the base has these contents, at whatever path; else 0.",
        directives=(Cost(weight=2), KEPT),
    )


@strawberry.type(description="A page of what became of files.")
class FileChangeConnection(Connection[FileChange]):
    total_count: int = loaded(
        ChangeCountLoader,
        key="total",
        description="How many rows the whole list has. All files of both versions are looked at for it.",
        directives=(*ALL_FILES, KEPT),
    )


@strawberry.type(
    description="One of the versions' own properties that differs.", directives=(KEPT,)
)
class PropertyChange:
    key: str = strawberry.field(description="Its name.")
    change: ChangeKind = strawberry.field(
        description="What became of it: a property that is null is there."
    )
    base: JSON | None = strawberry.field(description="Its value in the base.")
    head: JSON | None = strawberry.field(description="Its value in the head.")


@strawberry.type(
    description="What the headers of two versions' weights say. Where a version has the same weights in several formats, those with the most parameters count.",
    directives=(KEPT,),
)
class TensorComparison:
    base: TensorSummary | None = strawberry.field(
        description="Those of the base together; null where no header of it tells."
    )
    head: TensorSummary | None = strawberry.field(
        description="Those of the head together; null where no header of it tells."
    )
    added: int | None = strawberry.field(
        description="How many tensors only the head has, by name; null where not all names are kept: of over 200 tensors in one file, or where over 200 files differ."
    )
    removed: int | None = strawberry.field(
        description="How many tensors only the base has; null as `added` is."
    )
    changed: int | None = strawberry.field(
        description="How many have another type or shape; null as `added` is. Values are not compared."
    )


@strawberry.type(
    description="What differs between two versions, a base and a head.", directives=(KEPT,)
)
class VersionComparison:
    base: ModelVersion = loaded(VersionByIdLoader, key="base_id", description="The base.")
    head: ModelVersion = loaded(VersionByIdLoader, key="head_id", description="The head.")
    files: FileChangeConnection = loaded(
        FileChangesLoader,
        key=BOTH,
        arguments=changes_window,
        description="The paths of both, in order.",
        directives=(*PER_ROW, KEPT),
    )
    properties: list[PropertyChange] = computed(
        property_changes, description="The versions' own properties that differ, by name."
    )
    tensors: TensorComparison | None = loaded(
        TensorComparisonLoader,
        key=BOTH,
        description="What the headers of their weights say; null where none tells, or where they have over 1,000 files with weights.",
        directives=ALL_FILES,
    )
    parameter_delta: BigInt | None = computed(
        parameter_delta,
        description="How many parameters more the head has; null where one of them does not tell.",
    )
    bytes_added: BigInt = loaded(
        BytesAddedLoader,
        key=BOTH,
        description="Sum of the lengths of the head's files whose contents the base has not.",
        directives=(*ALL_FILES, KEPT),
    )
    bytes_shared: BigInt = loaded(
        BytesSharedLoader,
        key=BOTH,
        description="Sum of the lengths of the head's other files: those whose contents the base has, at whatever path.",
        directives=(*ALL_FILES, KEPT),
    )
