"""What an answer was worth: priced as the guard prices what is asked for, but by the rows that came back."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from graphql import (
    BooleanValueNode,
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLObjectType,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionNode,
    VariableNode,
    get_variable_values,
)

from .price import Composite, Price, Prices, composite

Picked: TypeAlias = tuple[SelectionNode, Composite | None]
"""A selection and the type that it is made on, which says its price."""


def actual_cost(
    prices: Prices,
    document: DocumentNode,
    operation: OperationDefinitionNode,
    variables: Mapping[str, Any],
    data: Mapping[str, Any] | None,
) -> int:
    """The cost of `data`, an answer to the valid `operation` with these raw variables.

    Rows that came back count where page sizes and lengths of lists count before it runs; null and
    empty lists cost nothing. A list that no argument bounds is one object then, and here: its dearest
    element. So it is no more than was requested, unless a list is longer than its arguments say.
    The answer is walked once; what is walked is no longer than the operation.
    """
    if data is None:
        return 0
    root = composite(prices.schema.get_root_type(operation.operation))
    reading = _Reading(prices, document, operation, variables)
    selected = [(node, root) for node in operation.selection_set.selections]
    return _Place(reading, selected, root, False).cost(data)


class _Reading:
    """One operation with its variables, and what is made of them once for the whole answer."""

    def __init__(
        self,
        prices: Prices,
        document: DocumentNode,
        operation: OperationDefinitionNode,
        variables: Mapping[str, Any],
    ) -> None:
        self.prices = prices
        self.schema = prices.schema
        self.variables = variables
        self.definitions = {
            definition.variable.name.value: definition
            for definition in operation.variable_definitions or ()
        }
        self.fragments = {
            definition.name.value: definition
            for definition in document.definitions
            if isinstance(definition, FragmentDefinitionNode)
        }
        self._coerced: dict[str, Any] = {}

    def variable(self, name: str) -> Any:
        """As graphql-core coerces it, alone: the others may be many values, and nobody asks for them."""
        if name not in self._coerced:
            given = {name: self.variables[name]} if name in self.variables else {}
            definition = self.definitions.get(name)
            found = get_variable_values(self.schema, [definition] if definition else [], given)
            self._coerced[name] = None if isinstance(found, list) else found.coerced.get(name)
        return self._coerced[name]

    def is_included(self, node: SelectionNode) -> bool:
        for directive in node.directives or ():
            name = directive.name.value
            if name in {"skip", "include"} and directive.arguments:
                value = directive.arguments[0].value
                if isinstance(value, VariableNode):
                    holds = self.variable(value.name.value)
                else:
                    holds = isinstance(value, BooleanValueNode) and value.value
                if bool(holds) is (name == "skip"):
                    return False
        return True

    def fields(
        self, selected: Iterable[Picked], concrete: GraphQLObjectType, seen: set[str]
    ) -> Iterator[tuple[FieldNode, Composite | None]]:
        """The fields of an object of the type `concrete`, with those of its fragments, each spread once."""
        for node, parent in selected:
            if not self.is_included(node):
                continue
            if isinstance(node, FieldNode):
                yield node, parent
                continue
            inner: FragmentDefinitionNode | InlineFragmentNode
            if isinstance(node, FragmentSpreadNode):
                name = node.name.value
                if name in seen:
                    continue
                seen.add(name)
                inner = self.fragments[name]
            else:
                assert isinstance(node, InlineFragmentNode)
                inner = node
            condition, kind = inner.type_condition, parent
            if condition:
                kind = composite(self.schema.get_type(condition.name.value))
            if kind is None or concrete in self.types(kind):
                yield from self.fields(
                    [(each, kind) for each in inner.selection_set.selections], concrete, seen
                )

    def types(self, kind: Composite | None) -> list[GraphQLObjectType]:
        """What an object of the type `kind` can be."""
        if kind is None:
            return []
        if isinstance(kind, GraphQLObjectType):
            return [kind]
        return list(self.schema.get_possible_types(kind))


@dataclass(slots=True)
class _Shape:
    """The fields that objects of some types have in one place."""

    types: set[str]
    keys: set[str]
    names: list[str]
    """Keys of `__typename`."""
    rows: list[str]
    """Keys of the lists that hold a page's rows."""
    priced: "list[tuple[str, _Field]]"
    """By key, without the fields that cost nothing whatever their value is."""

    def fits(self, data: Mapping[str, Any]) -> bool:
        return self.keys == data.keys() and all(data[name] in self.types for name in self.names)


class _Place:
    """Prices the objects in one place of an operation."""

    def __init__(
        self, reading: _Reading, selected: list[Picked], kind: Composite | None, is_page: bool
    ) -> None:
        self.reading = reading
        self.is_page = is_page
        self.shapes = self._shapes(selected, kind)

    def cost(self, data: Mapping[str, Any]) -> int:
        found = 0
        for key, priced in self._shape(data).priced:
            value = data.get(key)
            if value is not None:
                found += priced.cost(value)
        return found

    def rows(self, data: Mapping[str, Any]) -> int:
        """How many rows came back in a page; none where neither `nodes` nor `edges` was asked for."""
        found = (data.get(key) for key in self._shape(data).rows)
        return max((len(rows) for rows in found if isinstance(rows, list)), default=0)

    def _shape(self, data: Mapping[str, Any]) -> _Shape:
        """An answer does not say of which type an object is: the first whose fields it has.

        Several fit only where they have other fields under the same keys and `__typename` is not asked for.
        """
        if len(self.shapes) == 1:
            return self.shapes[0]
        return next((shape for shape in self.shapes if shape.fits(data)), self.shapes[0])

    def _shapes(self, selected: list[Picked], kind: Composite | None) -> list[_Shape]:
        """One for all types that have the same fields here."""
        found: dict[tuple[int, ...], _Shape] = {}
        for concrete in self.reading.types(kind):
            fields = list(self.reading.fields(selected, concrete, set()))
            same = tuple(id(node) for node, _ in fields)
            if same in found:
                found[same].types.add(concrete.name)
            else:
                found[same] = self._shaped(concrete, fields)
        return list(found.values())

    def _shaped(
        self, concrete: GraphQLObjectType, fields: list[tuple[FieldNode, Composite | None]]
    ) -> _Shape:
        shape = _Shape({concrete.name}, set(), [], [], [])
        grouped: dict[str, list[FieldNode]] = {}
        for node, parent in fields:
            key = (node.alias or node.name).value
            if key in grouped:  # validated: the same field with the same arguments
                grouped[key].append(node)
                continue
            grouped[key] = [node]
            shape.keys.add(key)
            if node.name.value == "__typename":
                shape.names.append(key)
            price = self.reading.prices.of(parent or concrete, node.name.value)
            if price.is_row:
                shape.rows.append(key)
            if price.weight or price.type is not None:
                shape.priced.append(
                    (key, _Field(self.reading, price, grouped[key], price.is_row and self.is_page))
                )
        return shape


class _Field:
    """Prices the values of one field in one place of an operation."""

    def __init__(
        self, reading: _Reading, price: Price, nodes: list[FieldNode], is_row_of_page: bool
    ) -> None:
        self.reading = reading
        self.price = price
        self.nodes = nodes
        self.is_page = price.is_page and bool(price.multipliers)
        self.is_each_paid = is_row_of_page or bool(price.multipliers)
        self._place: _Place | None = None

    def cost(self, value: Any) -> int:
        """Of a value that is not null."""
        if isinstance(value, list):
            found = (self.cost_of_one(each) for each in value if each is not None)
            return sum(found) if self.is_each_paid else max(found, default=0)
        found_once = self.cost_of_one(value)
        if self.is_page or not self.price.multipliers:
            return found_once
        return found_once * self._asked()

    def cost_of_one(self, value: Any) -> int:
        weight = self.price.weight
        if self.price.type is None:
            return weight
        place = self._place
        if place is None:  # made when there is something to price
            place = self._place = self._below()
        if self.is_page:
            weight *= place.rows(value)
        return weight + place.cost(value)

    def _asked(self) -> int:
        """Rows by the arguments, where the value is no list that could be counted."""
        rows = self.price.rows(self.nodes[0])
        return rows.value({name: self.reading.variable(name) for name in rows.names})

    def _below(self) -> _Place:
        selected: list[Picked] = [
            (below, self.price.type)
            for node in self.nodes
            if node.selection_set
            for below in node.selection_set.selections
        ]
        return _Place(self.reading, selected, self.price.type, self.is_page)
