"""What a document would read, told from the declarations alone: each batch with its stored names.

The proof that a plan can be made without running a resolver; nothing here touches the database.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from graphql import (
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLInterfaceType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    OperationDefinitionNode,
    SelectionNode,
    get_named_type,
    parse,
)
from strawberry.schema.schema_converter import GraphQLCoreConverter
from strawberry.types.field import StrawberryField

from modelharbor.loaders.base import Loader

from .declaration import GIVEN, Computed, Declaration, Loaded, Rows, declaration

BACKREF: Final = GraphQLCoreConverter.DEFINITION_BACKREF


@dataclass(frozen=True, slots=True)
class Batch:
    """One read for all parents of a place in the document."""

    path: str  # response names from the root, such as models.nodes.owner
    loader: type[Loader[Any, Any, Any]]
    key: tuple[str, ...]  # stored names of the parent
    reads: frozenset[str]  # stored names of the rows; empty for values that are no rows


@dataclass(slots=True)
class _Names:
    """Stored names read so far: of the object at hand and, where it is a page, of its rows."""

    own: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)


class NotDeclared(Exception):
    """A field has a resolver of its own: only graphql-core can run the document."""


def batches(schema: GraphQLSchema, document: str) -> list[Batch]:
    """Every batch of the document's one query, parents first. NotDeclared where it cannot be told."""
    definitions = parse(document).definitions
    fragments = {d.name.value: d for d in definitions if isinstance(d, FragmentDefinitionNode)}
    [operation] = [d for d in definitions if isinstance(d, OperationDefinitionNode)]
    root = schema.get_root_type(operation.operation)
    if root is None:
        raise NotDeclared(operation.operation.value)
    walk = _Walk(schema, fragments)
    walk.object(root, operation.selection_set.selections, _Names(), "")
    return sorted(walk.found, key=lambda batch: batch.path.count("."))


@dataclass(slots=True)
class _Walk:
    schema: GraphQLSchema
    fragments: dict[str, FragmentDefinitionNode]
    found: list[Batch] = field(default_factory=list)

    def object(
        self, parent: Any, selections: Iterable[SelectionNode], names: _Names, path: str
    ) -> None:
        for node in selections:
            if isinstance(node, FieldNode):
                if not node.name.value.startswith("__"):
                    self.field(parent, node, names, path)
            else:
                inner, below = self.fragment(parent, node)
                self.object(inner, below, names, path)

    def fragment(self, parent: Any, node: Any) -> tuple[Any, Iterable[SelectionNode]]:
        if isinstance(node, FragmentSpreadNode):
            node = self.fragments[node.name.value]
        condition = node.type_condition
        inner = self.schema.get_type(condition.name.value) if condition else parent
        return inner, node.selection_set.selections

    def field(self, parent: Any, node: FieldNode, names: _Names, path: str) -> None:
        definition = parent.fields[node.name.value]
        own: StrawberryField = definition.extensions[BACKREF]
        what = declaration(own)
        if what is None and not own.is_basic_field:
            raise NotDeclared(f"{parent.name}.{node.name.value}")
        at = f"{path}.{(node.alias or node.name).value}".lstrip(".")
        below = node.selection_set.selections if node.selection_set else ()
        target: Any = get_named_type(definition.type)
        self.note(what, own, names)
        if isinstance(what, Loaded):
            inner = _Names()
            self.object(target, below, inner, at)
            reads = inner.rows if self.is_page(target) else inner.own
            self.found.append(Batch(at, what.loader, what.reads, frozenset(reads)))
        elif isinstance(what, Rows):
            self.object(target, below, _Names(own=names.rows), at)
        elif isinstance(what, Computed):
            # What it makes is not stored; in a page, rows may follow further down.
            self.object(target, below, _Names(rows=names.rows), at)
        else:
            self.object(target, below, _Names(), at)  # embedded: read as a whole

    def note(self, what: Declaration | None, own: StrawberryField, names: _Names) -> None:
        match what:
            case Computed(parameters=parameters, of_rows=of_rows):
                names.own.update(set(parameters) - GIVEN)
                names.rows.update(of_rows)
            case Loaded():
                names.own.update(what.reads)
            case None:
                names.own.add(own.python_name)

    def is_page(self, target: Any) -> bool:
        return any(isinstance(declaration(own), Rows) for own in fields_of(target))


def fields_of(kind: Any) -> Iterator[StrawberryField]:
    """The declarations of a type's fields; none for a union."""
    if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
        for name, definition in kind.fields.items():
            if not name.startswith("__"):
                yield definition.extensions[BACKREF]
    elif not isinstance(kind, GraphQLUnionType):
        return
