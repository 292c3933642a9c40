"""What budgets want to know of an operation: whether it is only to be measured, and its rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLSchema,
    InlineFragmentNode,
    OperationType,
    SelectionNode,
    SelectionSetNode,
)
from graphql.execution.collect_fields import FragmentDetails, collect_fields
from graphql.execution.values import VariableValues, get_argument_values

from .documents import Document, Operation
from .guard import LARGEST
from .kept import Kept
from .price import INTROSPECTION, Composite, Prices, composite

FIELD: Final = "rateLimit"
MEASURED: Final = frozenset({FIELD, "__typename"})


class DryRun(NamedTuple):
    """What is left of an operation that is only to be measured."""

    document: Document
    operation: Operation


def dry_run(
    schema: GraphQLSchema, document: Document, operation: Operation, values: VariableValues | None
) -> DryRun | None:
    """The operation with `rateLimit` alone, where that is selected with `dryRun: true`; else None.

    Everything else at its root is left out, as by `@skip`.
    """
    query = schema.query_type
    if FIELD not in document.text or values is None or query is None:
        return None  # as almost always
    if operation.kind is not OperationType.QUERY or FIELD not in query.fields:
        return None
    fragments = _fragments(document.node)
    details = {name: FragmentDetails(definition) for name, definition in fragments.items()}
    collected = collect_fields(schema, details, values, query, operation.node)
    nodes = [each.node for group in collected.grouped_field_set.values() for each in group]
    defined = query.fields[FIELD]
    if not any(
        node.name.value == FIELD and get_argument_values(defined, node, values).get("dryRun")
        for node in nodes
    ):
        return None
    kept = tuple(node for node in nodes if node.name.value in MEASURED)
    node = replace(operation.node, selection_set=SelectionSetNode(selections=kept))
    text = DocumentNode(definitions=(node, *fragments.values()))
    # With a plan of its own, which nobody wants again.
    left = replace(operation, node=node, document=text, plans=Kept(1, 2**20), _ways={})
    made = replace(document, node=text, operations={operation.name or "": left})
    return DryRun(made, left)


def count_rows(
    prices: Prices, document: Document, operation: Operation, values: VariableValues | None
) -> int:
    """How many rows of pages, and of lists whose length the arguments tell, an operation may answer."""
    counting = _Counting(prices, _fragments(document.node), values.coerced if values else None)
    root = composite(prices.schema.get_root_type(operation.kind))
    return min(counting.rows(operation.node.selection_set, root).total, LARGEST)


class _Rows(NamedTuple):
    """What a selection brings: once, for each row of the page that it stands in, and whether it asks for those."""

    once: int = 0
    each: int = 0
    has_rows: bool = False

    @property
    def total(self) -> int:
        return self.once + self.each

    def plus(self, other: "_Rows") -> "_Rows":
        return _Rows(
            self.once + other.once, self.each + other.each, self.has_rows or other.has_rows
        )


class _Counting:
    """One pass over all fields with their fragments spread: the guard has seen that these are not many."""

    def __init__(
        self,
        prices: Prices,
        fragments: Mapping[str, FragmentDefinitionNode],
        variables: Mapping[str, Any] | None,
    ) -> None:
        self.prices, self.fragments, self.variables = prices, fragments, variables

    def rows(self, node: SelectionSetNode | None, parent: Composite | None) -> _Rows:
        found = _Rows()
        for selection in node.selections if node else ():
            found = found.plus(self.selected(selection, parent))
        return found

    def selected(self, node: SelectionNode, parent: Composite | None) -> _Rows:
        if isinstance(node, FieldNode):
            return self.field(node, parent)
        inner: FragmentDefinitionNode | InlineFragmentNode
        if isinstance(node, FragmentSpreadNode):
            inner = self.fragments[node.name.value]
        else:
            assert isinstance(node, InlineFragmentNode)
            inner = node
        condition = inner.type_condition
        kind = composite(self.prices.schema.get_type(condition.name.value)) if condition else parent
        return self.rows(inner.selection_set, kind)

    def field(self, node: FieldNode, parent: Composite | None) -> _Rows:
        name = node.name.value
        if parent is None or node.selection_set is None or name in INTROSPECTION:
            return _Rows()
        price = self.prices.of(parent, name)
        below = self.rows(node.selection_set, price.type)
        if price.is_row:
            return _Rows(each=below.total, has_rows=True)
        if not price.multipliers:
            return _Rows(once=below.total)
        rows = price.rows(node).value(self.variables)
        if price.is_page:
            return _Rows(once=below.once + (rows * (1 + below.each) if below.has_rows else 0))
        return _Rows(once=rows * (1 + below.total))


def _fragments(document: DocumentNode) -> dict[str, FragmentDefinitionNode]:
    return {
        definition.name.value: definition
        for definition in document.definitions
        if isinstance(definition, FragmentDefinitionNode)
    }
