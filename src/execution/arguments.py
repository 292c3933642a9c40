"""From the arguments of a field, as they stand in a document, to the frozen value that its loader takes."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import strawberry
from graphql import (
    ArgumentNode,
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
        self.schema, self.definition, self.own = schema, definition, own
        # Without what is selected below it: what is kept here outlives the document.
        self.node = FieldNode(name=node.name, arguments=node.arguments, loc=node.loc)
        self.function, self.frozen = function, frozen
        self.names = _variables(node.arguments or ())
        self._constant: Hashable | None = None
        self._direct = self._directly() if self.names else None

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
        return self.function(**self.converted(taken))

    def converted(self, taken: dict[str, Any]) -> dict[str, Any]:
        """Arguments as the schema names them to such as Python does, by Strawberry."""
        return convert_arguments(
            taken,
            self.own.arguments,
            scalar_registry=self.schema.schema_converter.scalar_registry,
            config=self.schema.config,
        )

    def _directly(self) -> "Direct | None":
        """Where every argument that has variables is one, of a scalar type; None where there is more
        to it."""
        converter = self.schema.config.name_converter
        names = {converter.from_argument(each): each.python_name for each in self.own.arguments}
        variables: list[tuple[str, str, bool]] = []
        constant = dict(self.definition.args)
        for argument in self.node.arguments or ():
            if not _variables([argument]):
                continue
            defined = constant.pop(argument.name.value)
            plain = get_nullable_type(defined.type)
            has_default = defined.default is not None or defined.default_value is not Undefined
            if (
                not isinstance(argument.value, VariableNode)
                or not is_leaf_type(plain)
                or is_enum_type(plain)
                or has_default
            ):
                return None
            name = names[argument.name.value]
            variables.append((name, argument.value.name.value, is_non_null_type(defined.type)))
        taken = get_argument_values(GraphQLField(self.definition.type, constant), self.node)
        return Direct(tuple(variables), self.converted(taken))


@dataclass(frozen=True, slots=True)
class Direct:
    """Arguments that stand in the text, and such as are the coerced values of variables."""

    variables: tuple[tuple[str, str, bool], ...]
    """Of the parameter, of the variable; whether it must be there."""
    constants: dict[str, Any]

    def taken(self, coerced: dict[str, Any]) -> dict[str, Any] | None:
        """By parameter; None where one that must be is missing."""
        found = dict(self.constants)
        for name, variable, is_required in self.variables:
            if variable in coerced:
                found[name] = coerced[variable]
            if is_required and found.get(name) is None:
                return None
        return found


def _variables(arguments: Iterable[ArgumentNode]) -> tuple[str, ...]:
    found: dict[str, None] = {}

    class Variables(Visitor):
        def enter_variable(self, node: Any, *_: Any) -> None:
            found[node.name.value] = None

    for argument in arguments:
        visit(argument, Variables())
    return tuple(found)
