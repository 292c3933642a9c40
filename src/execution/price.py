"""What the fields of a schema cost: by their `@cost`, or by what they are.

A leaf costs 0, an object 1, a page its rows times what is selected in each, a mutation 10.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from graphql import (
    FieldNode,
    GraphQLArgument,
    GraphQLField,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    IntValueNode,
    ListValueNode,
    NullValueNode,
    ObjectValueNode,
    ValueNode,
    VariableNode,
    get_named_type,
    is_composite_type,
)

from modelharbor.db.keyset import DEFAULT_PAGE, MAX_PAGE

MUTATION_WEIGHT = 10
INTROSPECTION: Final = frozenset({"__schema", "__type"})
INTROSPECTION_WEIGHT = 1000  # the whole schema takes the time of a large query
KEPT = 10_000  # prices; names come from clients

Composite: TypeAlias = GraphQLObjectType | GraphQLInterfaceType | GraphQLUnionType


@dataclass(frozen=True, slots=True)
class RowCount:
    """How many rows a field may answer: the largest of its page sizes and of its lists' lengths."""

    fixed: int  # of what stands in the text; 0: nothing does
    variables: tuple[str, ...]
    default: int  # where neither is given
    within: tuple[tuple[str, str], ...] = ()
    """Variables that are whole inputs, each with the name of its field that tells."""

    def value(self, variables: Mapping[str, Any] | None) -> int:
        """At least 1; `variables` as graphql-core coerced them, without them the least that it can be."""
        if variables is None and (self.variables or self.within):
            return max(self.fixed, 1)
        found = self.fixed
        for name in self.variables:
            found = max(found, count_rows((variables or {}).get(name)))
        for name, inner in self.within:
            given = (variables or {}).get(name)
            if isinstance(given, Mapping):
                found = max(found, count_rows(given.get(inner)))
        return found or self.default

    @property
    def names(self) -> tuple[str, ...]:
        """Of all variables that it depends on."""
        return (*self.variables, *(name for name, _ in self.within))


@dataclass(frozen=True, slots=True)
class Price:
    """What a field of the schema costs, from its `@cost` or its type."""

    weight: int
    multipliers: tuple[str, ...]
    default_rows: int
    type: Composite | None  # None: a leaf
    is_page: bool  # only `nodes` and `edges` below it are paid for each row
    is_row: bool  # `nodes`, `edges`, `node`: their page has paid for the row itself
    defaults: Mapping[str, int] = field(default_factory=dict)
    """By multipliers that are fields of an input: how many rows they tell of when they are left out."""

    def rows(self, node: FieldNode) -> RowCount:
        """How many rows `node` asks for."""
        fixed, variables = 0, []
        within: list[tuple[str, str]] = []
        for argument in node.arguments or ():
            for multiplier in self.multipliers:
                name, _, inner = multiplier.partition(".")
                if argument.name.value != name:
                    continue
                value: ValueNode | None = argument.value
                if inner and isinstance(value, VariableNode):
                    within.append((value.name.value, inner))
                    continue
                if inner:
                    value = _field_of(value, inner)
                if value is None:
                    fixed = max(fixed, self.defaults[multiplier])
                elif isinstance(value, VariableNode):
                    variables.append(value.name.value)
                else:
                    fixed = max(fixed, _literal(value))
        return RowCount(fixed, tuple(variables), self.default_rows, tuple(within))


NO_PRICE: Final = Price(0, (), 1, None, False, False)


class Prices:
    """The prices of one schema, each made when it is first asked for."""

    def __init__(self, schema: GraphQLSchema) -> None:
        self.schema = schema
        self._found: dict[tuple[str, str], Price] = {}

    def of(self, parent: Composite, name: str) -> Price:
        """Of the field `name` of `parent`; nothing for one that does not exist."""
        key = (parent.name, name)
        found = self._found.get(key)
        if found is None:
            found = self._priced(parent, name)
            if len(self._found) < KEPT:
                self._found[key] = found
        return found

    def _priced(self, parent: Composite, name: str) -> Price:
        if name in INTROSPECTION and parent is self.schema.query_type:
            defined = self.schema.get_field(parent, name)
            kind = get_named_type(defined.type) if defined else None
            return Price(INTROSPECTION_WEIGHT, (), 1, composite(kind), False, False)
        defined = None if isinstance(parent, GraphQLUnionType) else parent.fields.get(name)
        if defined is None:
            return NO_PRICE
        kind = composite(get_named_type(defined.type))
        is_page = kind is not None and _is_connection(kind)
        is_row = (name in {"nodes", "edges"} and _is_connection(parent)) or (
            name == "node" and parent.name.endswith("Edge")
        )
        weight, multipliers = _declared(defined)
        if weight is None:
            weight = (
                MUTATION_WEIGHT if parent is self.schema.mutation_type else int(kind is not None)
            )
        if multipliers is None:
            known = ("first", "last") if is_page else ("ids",)
            multipliers = tuple(argument for argument in known if argument in defined.args)
        pages = not {"first", "last"}.isdisjoint(multipliers)
        default_rows = max((_default_of(defined, each) for each in multipliers), default=0)
        return Price(
            0 if is_row else weight,
            multipliers,
            default_rows or (DEFAULT_PAGE if pages else 1),
            kind,
            is_page,
            is_row,
            {each: _default_of(defined, each) for each in multipliers if "." in each},
        )


def _field_of(node: ValueNode | None, name: str) -> ValueNode | None:
    """What stands in the text of an input under a name."""
    if isinstance(node, ObjectValueNode):
        for each in node.fields:
            if each.name.value == name:
                return each.value
    return None


def _literal(node: ValueNode) -> int:
    """As `count_rows`, of what stands in the text. One value where a list may stand is a list of one."""
    if isinstance(node, IntValueNode):
        digits = node.value
        return MAX_PAGE if len(digits) > 9 else count_rows(int(digits))
    if isinstance(node, ListValueNode):
        return len(node.values)
    return 0 if isinstance(node, NullValueNode) else 1


def count_rows(value: object) -> int:
    """How long a list is; a page size, which the resolver refuses above MAX_PAGE; 0: not given."""
    if isinstance(value, list):
        return len(value)
    return min(max(value, 0), MAX_PAGE) if isinstance(value, int) else 0


def composite(kind: GraphQLNamedType | None) -> Composite | None:
    return kind if is_composite_type(kind) else None


def _default_of(defined: GraphQLField, multiplier: str) -> int:
    """What an argument, or a field of one that is an input, counts where it is not given."""
    name, _, inner = multiplier.partition(".")
    argument: GraphQLArgument | GraphQLInputField | None = defined.args.get(name)
    if argument is not None and inner:
        kind = get_named_type(argument.type)
        argument = kind.fields.get(inner) if isinstance(kind, GraphQLInputObjectType) else None
    return count_rows(argument.default_value) if argument is not None else 0


def _is_connection(kind: Composite) -> bool:
    return (
        not isinstance(kind, GraphQLUnionType)
        and kind.name.endswith("Connection")
        and "pageInfo" in kind.fields
    )


def _declared(defined: GraphQLField) -> tuple[int | None, tuple[str, ...] | None]:
    """`weight` and `multipliers` of the field's `@cost`; None where it says nothing."""
    declared = defined.extensions.get("strawberry-definition")
    for directive in getattr(declared, "directives", ()):
        definition = getattr(type(directive), "__strawberry_directive__", None)
        if definition is not None and definition.python_name == "Cost":
            multipliers = directive.multipliers  # None or UNSET where it names none
            return directive.weight, tuple(multipliers) if multipliers else None
    return None, None
