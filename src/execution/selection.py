"""What an operation selects, as a tree of fields: what a plan is made from.

graphql-core's own functions collect the fields, so fragments, merged response names and `@skip` /
`@include` mean here exactly what they mean when it executes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    GraphQLField,
    GraphQLInterfaceType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    Node,
    OperationDefinitionNode,
    VariableNode,
    Visitor,
    get_named_type,
    is_abstract_type,
    is_composite_type,
    is_non_null_type,
    is_object_type,
    visit,
)
from graphql.execution.collect_fields import (
    FieldDetails,
    FragmentDetails,
    collect_fields,
    collect_subfields,
)
from graphql.execution.values import VariableValues
from strawberry.schema.schema_converter import GraphQLCoreConverter
from strawberry.types.field import StrawberryField

from modelharbor.loaders.base import Loader

from .declaration import (
    GIVEN,
    Computed,
    Declaration,
    Loaded,
    Rows,
    Streamed,
    declaration,
    is_row_of,
)

BACKREF: Final = GraphQLCoreConverter.DEFINITION_BACKREF
"""`GraphQLField.extensions` has Strawberry's side of the field under this name."""
MOST_FIELDS: Final = (
    1000  # of a selection, each possible type's counted: writing it takes 30 µs a field
)
ROWS_BEGIN: Final = frozenset({"_id"})  # what is read of rows of which nothing is wanted


class NotPlanned(Exception):
    """Only graphql-core can run this; the message says why."""


@dataclass(slots=True, eq=False)
class Selected:
    """One field of one type, under one response name."""

    number: int  # unique within the operation
    response: str
    path: str  # response names from the root, such as models.nodes.owner
    parent: GraphQLObjectType
    node: FieldNode  # the first of those that were merged
    definition: GraphQLField | None = None  # None: `__typename`
    own: StrawberryField | None = None
    what: Declaration | None = None
    below: "dict[str, list[Selected]]" = field(default_factory=dict)
    """The fields selected of each type that its objects may have; empty for a leaf."""
    reads: frozenset[str] = frozenset()
    """Of a `loaded` field: stored names of its rows; empty where its values are no rows."""
    loads: bool = False
    """Whether it, or anything below it, is `loaded`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One read for all parents of a place in the operation."""

    path: str
    loader: type[Loader[Any, Any, Any]]
    key: tuple[str, ...]  # stored names of the parent
    reads: frozenset[str]


@dataclass(slots=True)
class _Names:
    """Stored names read so far: of the object at hand and, where it is a page, of its rows."""

    own: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)


class Selection:
    """All that one operation selects, with one set of values for the variables of its `@skip` and
    `@include`. Raises NotPlanned."""

    def __init__(
        self,
        schema: GraphQLSchema,
        document: DocumentNode,
        operation: OperationDefinitionNode,
        values: VariableValues,
    ) -> None:
        self.schema, self.operation, self.values = schema, operation, values
        self.fragments = {
            definition.name.value: FragmentDetails(definition)
            for definition in document.definitions
            if isinstance(definition, FragmentDefinitionNode)
        }
        self.fields: list[Selected] = []
        root = schema.get_root_type(operation.operation)
        assert root is not None  # validated
        collected = collect_fields(schema, self.fragments, values, root, operation)
        self.root = root
        self.top = self._selected(root, collected.grouped_field_set, _Names(), "")

    def batches(self) -> list[Batch]:
        """Every read, parents first."""
        found = [
            Batch(each.path, each.what.loader, each.what.reads, each.reads)
            for each in self.fields
            if isinstance(each.what, Loaded)
        ]
        return sorted(found, key=lambda batch: batch.path.count("."))

    def _selected(
        self,
        parent: GraphQLObjectType,
        grouped: Mapping[str, list[FieldDetails]],
        names: _Names,
        path: str,
    ) -> list[Selected]:
        if parent.is_type_of is not None and not _is_row_type(parent):
            raise NotPlanned(f"{parent.name} decides by itself what is one")
        return [
            self._field(parent, response, details, names, f"{path}.{response}".lstrip("."))
            for response, details in grouped.items()
        ]

    def _field(
        self,
        parent: GraphQLObjectType,
        response: str,
        details: list[FieldDetails],
        names: _Names,
        path: str,
    ) -> Selected:
        if len(self.fields) >= MOST_FIELDS:
            raise NotPlanned(f"more than {MOST_FIELDS} fields")
        node = details[0].node
        found = Selected(len(self.fields), response, path, parent, node)
        self.fields.append(found)
        name = node.name.value
        if name == "__typename":
            return found
        if name.startswith("__"):
            raise NotPlanned("introspection")
        definition = parent.fields[name]
        own: StrawberryField = definition.extensions[BACKREF]
        what = declaration(own, is_asked=bool(node.arguments))
        if (what is None and not own.is_basic_field) or own.extensions:
            raise NotPlanned(f"{parent.name}.{name} has a resolver of its own")
        found.definition, found.own, found.what = definition, own, what
        match what:
            case Computed(parameters=parameters, of_rows=of_rows):
                names.own.update(set(parameters) - GIVEN)
                names.rows.update(of_rows)
            case Loaded():
                names.own.update(what.reads)
        self._below(found, details, names)
        found.loads = isinstance(what, Loaded) or any(
            each.loads for fields in found.below.values() for each in fields
        )
        return found

    def _below(self, found: Selected, details: list[FieldDetails], names: _Names) -> None:
        assert found.definition is not None
        assert found.own is not None
        target: Any = get_named_type(found.definition.type)
        if not is_composite_type(target):
            if found.what is None:
                names.own.add(found.own.python_name)
            return
        inner = _Names()
        if isinstance(found.what, Rows):
            inner = _Names(own=names.rows)
        elif isinstance(found.what, Computed):
            # What it makes is not stored; in a page, rows may follow further down.
            inner = _Names(rows=names.rows)
        kinds: Collection[Any] = [target]
        if is_abstract_type(target):
            kinds = self.schema.get_possible_types(target)
        for each in kinds:
            collected = collect_subfields(
                self.schema, self.fragments, self.values, self.operation, each, details
            )
            found.below[each.name] = self._selected(
                each, collected.grouped_field_set, inner, found.path
            )
        if isinstance(found.what, Streamed):
            return  # its row is at hand, whole
        if found.what is None:
            # Embedded. Of what may be null, part of it could not be told from something else.
            stored, kind = found.own.python_name, found.definition.type
            is_whole = not (is_non_null_type(kind) and is_object_type(kind.of_type) and inner.own)
            names.own.update([stored] if is_whole else [f"{stored}.{name}" for name in inner.own])
        elif isinstance(found.what, Loaded):
            is_page = any(isinstance(declaration(own), Rows) for own in fields_of(target))
            found.reads = frozenset(inner.rows if is_page else inner.own) or ROWS_BEGIN


def switches(document: DocumentNode, operation: OperationDefinitionNode) -> tuple[str, ...]:
    """Variables that stand in `@skip` and `@include`: each set of their values has its own selection."""
    found: dict[str, None] = {}

    class Switches(Visitor):
        def enter_directive(self, node: Any, *_: Any) -> None:
            if node.name.value in ("skip", "include"):
                for argument in node.arguments:
                    if isinstance(argument.value, VariableNode):
                        found[argument.value.name.value] = None

    nodes: Iterable[Node] = (
        operation,
        *(each for each in document.definitions if isinstance(each, FragmentDefinitionNode)),
    )
    for node in nodes:
        visit(node, Switches())
    return tuple(found)


def fields_of(kind: Any) -> Iterator[StrawberryField]:
    """The declarations of a type's fields; none for a union."""
    if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
        for name, definition in kind.fields.items():
            if not name.startswith("__"):
                yield definition.extensions[BACKREF]
    else:
        assert isinstance(kind, GraphQLUnionType)


def _is_row_type(kind: GraphQLObjectType) -> bool:
    """Rows of other types beside its own are told apart by the name that they carry."""
    return getattr(kind.is_type_of, "__func__", None) is is_row_of
