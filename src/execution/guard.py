"""What an operation asks for, measured in one pass before anything is validated, resolved or read.

The pass visits every node of the document once: a fragment is measured once and its measures are added
wherever it is spread, so a nest of spreads costs no more than its text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLField,
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    InlineFragmentNode,
    IntValueNode,
    ListValueNode,
    NullValueNode,
    OperationDefinitionNode,
    OperationType,
    SelectionNode,
    SelectionSetNode,
    ValueNode,
    VariableNode,
    get_named_type,
    is_composite_type,
)

from modelharbor.db.keyset import DEFAULT_PAGE, MAX_PAGE
from modelharbor.errors import OperationTooComplex
from modelharbor.settings import Settings

MUTATION_WEIGHT = 10
INTROSPECTION: Final = frozenset({"__schema", "__type"})
INTROSPECTION_WEIGHT = 1000  # the whole schema takes the time of a large query
INTROSPECTION_DEPTH = 20  # the whole introspection query is 15 deep
NESTING = 150  # of selections and spreads: far above every depth limit, far below Python's stack
LARGEST = 2**31 - 1  # what a measure is told as

Composite: TypeAlias = GraphQLObjectType | GraphQLInterfaceType | GraphQLUnionType


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows a field may answer: the largest of its page sizes and of its lists' lengths."""

    fixed: int  # of what stands in the text; 0: nothing does
    variables: tuple[str, ...]
    default: int  # where neither is given

    def value(self, variables: Mapping[str, Any] | None) -> int:
        """At least 1; `variables` as graphql-core coerced them, without them the least that it can be."""
        if variables is None and self.variables:
            return max(self.fixed, 1)
        found = self.fixed
        for name in self.variables:
            found = max(found, _rows((variables or {}).get(name)))
        return found or self.default


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """A sum: what is known, and what hangs on the variables of a request."""

    known: int = 0
    open: "tuple[tuple[Rows | None, Cost], ...]" = ()

    def value(self, variables: Mapping[str, Any] | None) -> int:
        return min(self._value(variables, {}), LARGEST) if self.open else min(self.known, LARGEST)

    def _value(self, variables: Mapping[str, Any] | None, seen: dict[int, int]) -> int:
        found = seen.get(id(self))
        if found is None:
            found = self.known
            for rows, cost in self.open:
                once = cost._value(variables, seen)
                found += once * rows.value(variables) if rows else once
            seen[id(self)] = found
        return found


NOTHING = Cost()


def _sum(costs: "Sequence[Cost]") -> Cost:
    """Costs with open parts are kept whole: a fragment's is shared by all that spread it."""
    known = sum(cost.known for cost in costs if not cost.open)
    return Cost(known, tuple((None, cost) for cost in costs if cost.open))


def _times(rows: Rows, cost: Cost) -> Cost:
    if rows.variables or cost.open:
        return Cost(0, ((rows, cost),))
    return Cost(rows.value({}) * cost.known)


@dataclass(slots=True)
class Tally:
    """The measures of a selection set or of one selection, with what its fragments bring."""

    depth: int = 0
    introspection: int = 0
    width: int = 0
    fields: int = 0
    aliases: int = 0
    directives: int = 0
    once: list[Cost] = field(default_factory=list)
    each: list[Cost] = field(default_factory=list)
    """Within a page: what is paid for every row of it."""

    def add(self, other: "Tally") -> None:
        self.depth = max(self.depth, other.depth)
        self.introspection = max(self.introspection, other.introspection)
        self.width += other.width
        self.fields += other.fields
        self.aliases += other.aliases
        self.directives += other.directives
        self.once += other.once
        self.each += other.each

    def sealed(self) -> "Tally":
        """With its costs summed up, so that adding it many times stays cheap."""
        self.once, self.each = [_sum(self.once)], [_sum(self.each)]
        return self


@dataclass(frozen=True, slots=True)
class Measures:
    """What one operation asks for."""

    depth: int
    introspection: int
    root_fields: int
    fields: int
    aliases: int
    directives: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Price:
    """What a field of the schema costs, from its `@cost` or its type."""

    weight: int
    multipliers: tuple[str, ...]
    default_rows: int
    type: Composite | None  # None: a leaf
    is_page: bool  # only `nodes` and `edges` below it are paid for each row
    is_row: bool  # `nodes`, `edges`, `node`: their page has paid for the row itself


class Guard:
    """Measures documents of one schema and refuses what is too much."""

    def __init__(self, schema: GraphQLSchema, settings: Settings) -> None:
        self.schema = schema
        self.settings = settings
        self._prices: dict[tuple[str, str], Price] = {}

    def measure(self, document: DocumentNode) -> dict[str, Measures]:
        """By operation name (`""` for the one without). OperationTooComplex for what no variables can make fit."""
        walk = _Walk(self, document)
        found = {}
        for definition in document.definitions:
            if isinstance(definition, OperationDefinitionNode):
                measures = walk.operation(definition)
                self._check(measures)
                found[definition.name.value if definition.name else ""] = measures
        return found

    def check_cost(self, measures: Measures, variables: Mapping[str, Any] | None) -> int:
        """The cost with these coerced variables; OperationTooComplex when it is over the limit."""
        cost = measures.cost.value(variables)
        _hold("cost", cost, self.settings.max_cost)
        return cost

    def _check(self, measures: Measures) -> None:
        limits = self.settings
        _hold("depth", measures.depth, limits.max_depth)
        _hold("introspectionDepth", measures.introspection, INTROSPECTION_DEPTH)
        _hold("aliases", measures.aliases, limits.max_aliases)
        _hold("rootFields", measures.root_fields, limits.max_root_fields)
        _hold("directives", measures.directives, limits.max_directives)
        _hold("fields", measures.fields, limits.max_tokens)  # a text has fewer; fragments multiply
        self.check_cost(measures, None)

    def price(self, parent: Composite, name: str) -> Price:
        key = (parent.name, name)
        found = self._prices.get(key)
        if found is None:
            found = self._priced(parent, name)
            if len(self._prices) < 10_000:  # names come from clients
                self._prices[key] = found
        return found

    def _priced(self, parent: Composite, name: str) -> Price:
        if name in INTROSPECTION and parent is self.schema.query_type:
            defined = self.schema.get_field(parent, name)
            kind = get_named_type(defined.type) if defined else None
            return Price(INTROSPECTION_WEIGHT, (), 1, _composite(kind), False, False)
        defined = None if isinstance(parent, GraphQLUnionType) else parent.fields.get(name)
        if defined is None:
            return Price(0, (), 1, None, False, False)
        kind = _composite(get_named_type(defined.type))
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
        default_rows = max(
            (_rows(defined.args[m].default_value) for m in multipliers if m in defined.args),
            default=0,
        )
        return Price(
            0 if is_row else weight,
            multipliers,
            default_rows or (DEFAULT_PAGE if pages else 1),
            kind,
            is_page,
            is_row,
        )


class _Walk:
    """One pass over one document."""

    def __init__(self, guard: Guard, document: DocumentNode) -> None:
        self.guard = guard
        self.fragments = {
            definition.name.value: definition
            for definition in document.definitions
            if isinstance(definition, FragmentDefinitionNode)
        }
        self.measured: dict[str, Tally] = {}

    def operation(self, node: OperationDefinitionNode) -> Measures:
        schema = self.guard.schema
        root = {
            OperationType.QUERY: schema.query_type,
            OperationType.MUTATION: schema.mutation_type,
            OperationType.SUBSCRIPTION: schema.subscription_type,
        }[node.operation]
        found = self._set(node.selection_set, root, 1)
        directives = len(node.directives or ())
        for variable in node.variable_definitions or ():
            directives += len(variable.directives or ())
        return Measures(
            depth=found.depth,
            introspection=found.introspection,
            root_fields=found.width,
            fields=min(found.fields, LARGEST),
            aliases=min(found.aliases, LARGEST),
            directives=min(found.directives + directives, LARGEST),
            cost=_sum([*found.once, *found.each]),
        )

    def _set(self, node: SelectionSetNode | None, parent: Composite | None, level: int) -> Tally:
        if level > NESTING:
            raise _too_complex("depth", level, self.guard.settings.max_depth)
        tally = Tally()
        for selection in node.selections if node else ():
            tally.add(self._selection(selection, parent, level))
            tally.directives += len(selection.directives or ())
        return tally.sealed()

    def _selection(self, node: SelectionNode, parent: Composite | None, level: int) -> Tally:
        if isinstance(node, FieldNode):
            return self._field(node, parent, level)
        if isinstance(node, FragmentSpreadNode):
            return self._fragment(node.name.value, level)
        assert isinstance(node, InlineFragmentNode)
        condition = node.type_condition
        kind = _composite(self.guard.schema.get_type(condition.name.value)) if condition else parent
        return self._set(node.selection_set, kind, level + 1)

    def _fragment(self, name: str, level: int) -> Tally:
        found = self.measured.get(name)
        if found is None:
            definition = self.fragments.get(name)
            if definition is None:
                return Tally()  # validation names it
            self.measured[name] = Tally()  # a cycle ends here; validation names it
            kind = _composite(self.guard.schema.get_type(definition.type_condition.name.value))
            found = self._set(definition.selection_set, kind, level + 1)
            found.directives += len(definition.directives or ())
            self.measured[name] = found
        return found

    def _field(self, node: FieldNode, parent: Composite | None, level: int) -> Tally:
        name = node.name.value
        price = self.guard.price(parent, name) if parent else None
        below = self._set(node.selection_set, price.type if price else None, level + 1)
        tally = Tally(
            depth=below.depth + 1,
            introspection=below.introspection,
            width=1,
            fields=below.fields + 1,
            aliases=below.aliases + bool(node.alias),
            directives=below.directives,
        )
        if name in INTROSPECTION:
            tally.depth, tally.introspection = 1, below.depth + 1
        if price is None:
            return tally
        own = [Cost(price.weight)] if price.weight else []
        if not price.multipliers:
            cost = _sum([*own, *below.once, *below.each])
        else:
            rows = self._rows(node, price)
            per_row = below.each if price.is_page else below.once + below.each
            once = below.once if price.is_page else []
            cost = _sum([_times(rows, _sum([*own, *per_row])), *once])
        if price.is_row:
            tally.each = [cost]
        else:
            tally.once = [cost]
        return tally

    def _rows(self, node: FieldNode, price: Price) -> Rows:
        fixed, variables = 0, []
        for argument in node.arguments or ():
            if argument.name.value in price.multipliers:
                if isinstance(argument.value, VariableNode):
                    variables.append(argument.value.name.value)
                else:
                    fixed = max(fixed, _literal(argument.value))
        return Rows(fixed, tuple(variables), price.default_rows)


def _literal(node: ValueNode) -> int:
    """As `_rows`, of what stands in the text. One value where a list may stand is a list of one."""
    if isinstance(node, IntValueNode):
        digits = node.value
        return MAX_PAGE if len(digits) > 9 else _rows(int(digits))
    if isinstance(node, ListValueNode):
        return len(node.values)
    return 0 if isinstance(node, NullValueNode) else 1


def _rows(value: object) -> int:
    """How long a list is; a page size, which the resolver refuses above MAX_PAGE; 0: not given."""
    if isinstance(value, list):
        return len(value)
    return min(max(value, 0), MAX_PAGE) if isinstance(value, int) else 0


def _composite(kind: GraphQLNamedType | None) -> Composite | None:
    return kind if is_composite_type(kind) else None


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


def _hold(measure: str, value: int, limit: int) -> None:
    if value > limit:
        raise _too_complex(measure, value, limit)


NAMES: Final = {
    "introspectionDepth": "depth of introspection",
    "rootFields": "number of root fields",
    "fields": "number of fields with all fragments spread",
    "aliases": "number of aliases",
    "directives": "number of directives",
}


def _too_complex(measure: str, value: int, limit: int) -> OperationTooComplex:
    value = min(value, LARGEST)
    return OperationTooComplex(
        f"The operation's {NAMES.get(measure, measure)} is {value}; the limit is {limit}.",
        measure=measure,
        value=value,
        limit=limit,
    )
