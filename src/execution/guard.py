"""What an operation asks for, measured in one pass before anything is validated, resolved or read.

The pass visits every node of the document once: a fragment is measured once and its measures are added
wherever it is spread, so a nest of spreads costs no more than its text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLSchema,
    InlineFragmentNode,
    ListValueNode,
    ObjectValueNode,
    OperationDefinitionNode,
    OperationType,
    SelectionNode,
    SelectionSetNode,
    ValueNode,
    VariableNode,
)

from modelharbor.errors import OperationTooComplex
from modelharbor.settings import Settings

from .price import INTROSPECTION, Composite, Prices, RowCount, composite

INTROSPECTION_DEPTH = 20  # the whole introspection query is 15 deep
NESTING = 150  # of selections and spreads: far above every depth limit, far below Python's stack
LARGEST = 2**31 - 1  # what a measure is told as


@dataclass(frozen=True, slots=True)
class Uses:
    """Variables in the arguments of one field: how often each stands there."""

    names: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """Two sums: what is known of each, and what hangs on the variables of a request."""

    known: int = 0  # the cost itself
    values: int = 0  # in arguments, at all levels, and once for each time that a field is resolved
    open: "tuple[tuple[RowCount | Uses | None, Cost], ...]" = ()

    def value(self, variables: Mapping[str, Any] | None) -> int:
        return self.amounts(variables)[0]

    def amounts(self, variables: Mapping[str, Any] | None) -> tuple[int, int]:
        """Cost and values with these coerced variables; without them the least that they can be."""
        cost, values = _Sizes(variables).amounts(self)
        return min(cost, LARGEST), min(values, LARGEST)


class _Sizes:
    """Adds up costs for one request: each shared part, and each variable, is looked at once."""

    def __init__(self, variables: Mapping[str, Any] | None) -> None:
        self.variables = variables
        self.sizes: dict[str, int] = {}
        self.seen: dict[int, tuple[int, int]] = {}

    def amounts(self, cost: Cost) -> tuple[int, int]:
        if not cost.open:
            return cost.known, cost.values
        found = self.seen.get(id(cost))
        if found is None:
            known, values = cost.known, cost.values
            for times, below in cost.open:
                if isinstance(times, Uses):
                    values += sum(count * self.size(name) for name, count in times.names)
                    continue
                once = self.amounts(below)
                rows = times.value(self.variables) if times else 1
                known += once[0] * rows
                values += once[1] * rows
            found = self.seen[id(cost)] = known, values
        return found

    def size(self, name: str) -> int:
        """How many values a variable has, at all levels."""
        found = self.sizes.get(name)
        if found is None:
            given = (self.variables or {}).get(name)
            found = self.sizes[name] = count_values(given)
        return found


def count_values(value: object) -> int:
    """With what is in it, at all levels."""
    found, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        found += 1
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return found


NOTHING: Final = Cost()


def _sum(costs: Sequence[Cost]) -> Cost:
    """Costs with open parts are kept whole: a fragment's is shared by all that spread it."""
    if len(costs) < 2:
        return costs[0] if costs else NOTHING
    closed = [cost for cost in costs if not cost.open]
    return Cost(
        sum(cost.known for cost in closed),
        sum(cost.values for cost in closed),
        tuple((None, cost) for cost in costs if cost.open),
    )


def _times(rows: RowCount, cost: Cost) -> Cost:
    if rows.names or cost.open:
        return Cost(0, 0, ((rows, cost),))
    times = rows.value({})
    return Cost(times * cost.known, times * cost.values)


def _arguments(node: FieldNode) -> tuple[list[Cost], int]:
    """The values in the arguments of a field, nothing where there are none; how many are variables."""
    uses: dict[str, int] = {}
    found = sum(count_literals(each.value, uses) for each in node.arguments or ())
    if uses:
        cost = Cost(0, found, ((Uses(tuple(uses.items())), NOTHING),))
        return [cost], sum(uses.values())
    return [Cost(0, found)] if found else [], 0


def count_literals(value: ValueNode, uses: dict[str, int] | None = None) -> int:
    """Values in the text of one, at all levels, without its variables; those are counted in `uses`."""
    found, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, VariableNode):
            if uses is not None:
                name = each.name.value
                uses[name] = uses.get(name, 0) + 1
            continue
        found += 1
        if isinstance(each, ListValueNode):
            waiting += each.values
        elif isinstance(each, ObjectValueNode):
            waiting += [field.value for field in each.fields]
    return found


@dataclass(slots=True)
class Tally:
    """The measures of a selection set or of one selection, with what its fragments bring."""

    nesting: int = 0  # of selections and fragments
    depth: int = 0
    introspection: int = 0
    width: int = 0
    fields: int = 0
    aliases: int = 0
    directives: int = 0
    uses: int = 0  # of variables in arguments
    once: list[Cost] = field(default_factory=list)
    each: list[Cost] = field(default_factory=list)
    """Within a page: what is paid for every row of it."""

    def add(self, other: "Tally") -> None:
        self.nesting = max(self.nesting, other.nesting)
        self.depth = max(self.depth, other.depth)
        self.introspection = max(self.introspection, other.introspection)
        self.width += other.width
        self.fields += other.fields
        self.aliases += other.aliases
        self.directives += other.directives
        self.uses += other.uses
        self.once += other.once
        self.each += other.each

    def sealed(self) -> "Tally":
        """With its costs summed up, so that adding it many times stays cheap."""
        if len(self.once) > 1:
            self.once = [_sum(self.once)]
        if len(self.each) > 1:
            self.each = [_sum(self.each)]
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
    uses: int
    cost: Cost


class Guard:
    """Measures documents of one schema and refuses what is too much."""

    def __init__(self, schema: GraphQLSchema, settings: Settings) -> None:
        self.schema = schema
        self.settings = settings
        self.prices = Prices(schema)

    def measure(self, document: DocumentNode) -> dict[str, Measures]:
        """By operation name (`""` for the one without). OperationTooComplex for what no variables can make fit."""
        operations = [
            definition
            for definition in document.definitions
            if isinstance(definition, OperationDefinitionNode)
        ]
        _hold("operations", len(operations), self.settings.max_operations)
        walk = _Walk(self, document)
        found, uses = {}, 0
        for operation in operations:
            measures = walk.operation(operation)
            self._check(measures)
            uses += measures.uses
            # Of all operations: a text has fewer, but they share fragments, and rules look at each again.
            _hold("variableUses", uses, self.settings.max_tokens)
            found[operation.name.value if operation.name else ""] = measures
        return found

    def check_cost(self, measures: Measures, variables: Mapping[str, Any] | None) -> int:
        """The cost with these coerced variables; OperationTooComplex when it is over the limit, or when
        they bring too many values to the places where they stand.
        """
        cost, values = measures.cost.amounts(variables)
        _hold("cost", cost, self.settings.max_cost)
        _hold("inputValues", values, self.settings.max_input_values)
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
            uses=found.uses,
            cost=_sum([*found.once, *found.each]),
        )

    def _set(self, node: SelectionSetNode | None, parent: Composite | None, level: int) -> Tally:
        if level > NESTING:
            raise _too_complex("depth", level, self.guard.settings.max_depth)
        tally = Tally()
        for selection in node.selections if node else ():
            tally.add(self._selection(selection, parent, level))
            tally.directives += len(selection.directives or ())
        tally.nesting += 1
        return tally.sealed()

    def _selection(self, node: SelectionNode, parent: Composite | None, level: int) -> Tally:
        if isinstance(node, FieldNode):
            return self._field(node, parent, level)
        if isinstance(node, FragmentSpreadNode):
            return self._fragment(node.name.value, level)
        assert isinstance(node, InlineFragmentNode)
        condition = node.type_condition
        kind = composite(self.guard.schema.get_type(condition.name.value)) if condition else parent
        return self._set(node.selection_set, kind, level + 1)

    def _fragment(self, name: str, level: int) -> Tally:
        found = self.measured.get(name)
        if found is None:
            definition = self.fragments.get(name)
            if definition is None:
                return Tally()  # validation names it
            self.measured[name] = Tally()  # a cycle ends here; validation names it
            kind = composite(self.guard.schema.get_type(definition.type_condition.name.value))
            found = self._set(definition.selection_set, kind, level + 1)
            found.directives += len(definition.directives or ())
            self.measured[name] = found
        elif level + found.nesting > NESTING:  # measured where there was more room
            raise _too_complex("depth", level + found.nesting, self.guard.settings.max_depth)
        return found

    def _field(self, node: FieldNode, parent: Composite | None, level: int) -> Tally:
        name = node.name.value
        price = self.guard.prices.of(parent, name) if parent else None
        arguments, uses = _arguments(node) if node.arguments else ([], 0)
        if node.selection_set is None and price is not None and not price.multipliers:
            cost = [*arguments, Cost(price.weight)] if price.weight else arguments
            return Tally(
                depth=1,
                introspection=int(name in INTROSPECTION),
                width=1,
                fields=1,
                aliases=int(bool(node.alias)),
                uses=uses,
                once=cost,
            )
        below = self._set(node.selection_set, price.type if price else None, level + 1)
        tally = Tally(
            nesting=below.nesting,
            depth=below.depth + 1,
            introspection=below.introspection,
            width=1,
            fields=below.fields + 1,
            aliases=below.aliases + bool(node.alias),
            directives=below.directives,
            uses=below.uses + uses,
        )
        if name in INTROSPECTION:
            tally.depth, tally.introspection = 1, below.depth + 1
        if price is None:
            return tally
        own = [Cost(price.weight)] if price.weight else []
        if not price.multipliers:
            cost = [*arguments, *own, *below.once, *below.each]
        else:
            rows = price.rows(node)
            per_row = below.each if price.is_page else below.once + below.each
            once = below.once if price.is_page else []
            cost = [*arguments, _times(rows, _sum([*own, *per_row])), *once]
        if price.is_row:
            tally.each = [_sum(cost)]
        else:
            tally.once = [_sum(cost)]
        return tally


def _hold(measure: str, value: int, limit: int) -> None:
    if value > limit:
        raise _too_complex(measure, value, limit)


NAMES: Final = {
    "operations": "number of operations in it",
    "variableUses": "number of places with variables, with all fragments spread,",
    "introspectionDepth": "depth of introspection",
    "rootFields": "number of root fields",
    "fields": "number of fields with all fragments spread",
    "aliases": "number of aliases",
    "directives": "number of directives",
    "inputValues": "number of input values, counted wherever they are used,",
}


def _too_complex(measure: str, value: int, limit: int) -> OperationTooComplex:
    value = min(value, LARGEST)
    return OperationTooComplex(
        f"The operation's {NAMES.get(measure, measure)} is {value}; the limit is {limit}.",
        measure=measure,
        value=value,
        limit=limit,
    )
