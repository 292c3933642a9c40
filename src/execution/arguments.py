"""From the arguments of a field, as they stand in a document, to the frozen value that its loader takes."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import strawberry
from graphql import (
    FieldNode,
    GraphQLField,
    Undefined,
    VariableNode,
    Visitor,
    get_nullable_type,
    is_enum_type,
    is_leaf_type,
    is_non_null_type,
    visit,
)
from graphql.execution.values import VariableValues, get_argument_values
from strawberry.types.arguments import convert_arguments
from strawberry.types.field import StrawberryField

from .kept import Kept

MOST_BYTES: Final = 2048  # of the variables of a value that is kept
Frozen = Kept[tuple["Binder", bytes], Hashable]


class Binder:
    """Binds the arguments of one field in one document. What comes out is a pure function of the
    variables, so it is kept for when they come again."""

    def __init__(
        self,
        schema: strawberry.Schema,
        definition: GraphQLField,
        own: StrawberryField,
        node: FieldNode,
        function: Callable[..., Hashable],
        frozen: Frozen,
    ) -> None:
        self.schema, self.definition, self.own, self.node = schema, definition, own, node
        self.function, self.frozen = function, frozen
        self.names = _variables(node)
        self._constant: Hashable | None = None
        self._direct = self._directly()

    def __call__(self, values: VariableValues, given: Mapping[str, Any]) -> Hashable:
        """Raises what graphql-core would tell of the field."""
        if not self.names:
            if self._constant is None:
                self._constant = self.bind(values)
            return self._constant
        if self._direct is not None:
            taken = self._direct.taken(values.coerced)
            return self.bind(values) if taken is None else self.function(**taken)
        key = orjson.dumps({name: given[name] for name in self.names if name in given})
        if len(key) > MOST_BYTES:
            return self.bind(values)
        found = self.frozen.get((self, key))
        if found is None:
            found = self.bind(values)
            self.frozen.put((self, key), found, len(key))
        return found

    def bind(self, values: VariableValues) -> Hashable:
        taken = get_argument_values(self.definition, self.node, values)
        converter = self.schema.schema_converter
        return self.function(
            **convert_arguments(
                taken,
                self.own.arguments,
                scalar_registry=converter.scalar_registry,
                config=self.schema.config,
            )
        )

    def _directly(self) -> "Direct | None":
        """Where every argument is a variable of a scalar type; None where there is more to it."""
        names = {
            self.schema.config.name_converter.from_argument(argument): argument.python_name
            for argument in self.own.arguments
        }
        if any(
            each.default is not None or each.default_value is not Undefined
            for each in self.definition.args.values()
        ):
            return None
        found: list[tuple[str, str, bool]] = []
        for argument in self.node.arguments or ():
            kind = self.definition.args[argument.name.value].type
            plain = get_nullable_type(kind)
            if (
                not isinstance(argument.value, VariableNode)
                or not is_leaf_type(plain)
                or is_enum_type(plain)
            ):
                return None
            name = names[argument.name.value]
            found.append((name, argument.value.name.value, is_non_null_type(kind)))
        return Direct(tuple(found))


@dataclass(frozen=True, slots=True)
class Direct:
    """Arguments that are the coerced values of variables as they are."""

    names: tuple[
        tuple[str, str, bool], ...
    ]  # of the parameter, of the variable; whether it must be

    def taken(self, coerced: dict[str, Any]) -> dict[str, Any] | None:
        """By parameter; None where one that must be is missing."""
        found = {}
        for name, variable, is_required in self.names:
            if variable in coerced:
                found[name] = coerced[variable]
            if is_required and found.get(name) is None:
                return None
        return found


def _variables(node: FieldNode) -> tuple[str, ...]:
    found: dict[str, None] = {}

    class Variables(Visitor):
        def enter_variable(self, node: Any, *_: Any) -> None:
            found[node.name.value] = None

    for argument in node.arguments or ():
        visit(argument, Variables())
    return tuple(found)
