"""Values of variables, coerced as graphql-core does, with what hangs on the document alone done once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphql import (
    GraphQLError,
    GraphQLSchema,
    OperationDefinitionNode,
    Undefined,
    is_leaf_type,
    is_non_null_type,
)
from graphql.execution.get_variable_signature import (
    GraphQLVariableSignature,
    get_variable_signature,
)
from graphql.execution.values import (
    VariableValues,
    VariableValueSource,
    input_is_nested_too_deeply,
)
from graphql.utilities.coerce_input_value import coerce_default_value, coerce_input_value


@dataclass(frozen=True, slots=True)
class _Variable:
    signature: GraphQLVariableSignature
    is_required: bool
    has_default: bool
    is_flat: bool  # neither a list nor an input object


class Variables:
    """The variables of one operation. graphql-core alone tells what is wrong with values that do not fit."""

    def __init__(self, schema: GraphQLSchema, operation: OperationDefinitionNode) -> None:
        self._known: list[_Variable] | None = []
        for node in operation.variable_definitions or ():
            signature = get_variable_signature(schema, node)
            if isinstance(signature, GraphQLError):  # validated documents have none
                self._known = None
                return
            kind: Any = signature.type
            is_required = is_non_null_type(kind)
            self._known.append(
                _Variable(
                    signature,
                    is_required,
                    node.default_value is not None,
                    is_leaf_type(kind.of_type if is_required else kind),
                )
            )

    def coerce(self, given: Mapping[str, Any]) -> VariableValues | None:
        """None where a value does not fit, or where there may be more to say about it."""
        if self._known is None:
            return None
        sources: dict[str, VariableValueSource] = {}
        coerced: dict[str, Any] = {}
        for variable in self._known:
            signature = variable.signature
            value = given.get(signature.name, Undefined)
            if value is Undefined:
                sources[signature.name] = VariableValueSource(signature)
                if variable.has_default:
                    coerced[signature.name] = coerce_default_value(signature)  # validated
                elif variable.is_required:
                    return None
                continue
            sources[signature.name] = VariableValueSource(signature, value)
            if not variable.is_flat and input_is_nested_too_deeply(value, signature.type):
                return None
            found = coerce_input_value(value, signature.type)
            if found is Undefined:
                return None
            coerced[signature.name] = found
        return VariableValues(sources, coerced)
