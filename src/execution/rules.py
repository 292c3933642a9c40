"""Rules of validation whose work graphql-core does not bound."""

from graphql import (
    SKIP,
    GraphQLError,
    GraphQLInputType,
    ValueNode,
    ValuesOfCorrectTypeRule,
    VisitorAction,
    validate_input_literal,
)

from .guard import count_literals

PRINTED = 500  # literals in messages about one argument, but for the last message: some 2 ms


class BoundedValuesRule(ValuesOfCorrectTypeRule):
    """graphql-core's, which prints the whole argument for each of its mistakes: ten in one of 1,900 values
    took it 0.1 s. Of a long argument only the first mistakes are told.
    """

    def is_valid_value_node(
        self, node: ValueNode, input_type: GraphQLInputType | None
    ) -> VisitorAction:
        printed, size = 0, count_literals(node)

        def report(error: GraphQLError, _path: list[str | int]) -> None:
            nonlocal printed
            self.report_error(error)
            printed += size
            if printed > PRINTED:
                raise _Enough

        if input_type:
            try:
                hidden = self.context.hide_suggestions
                validate_input_literal(node, input_type, report, None, None, hidden)
            except _Enough:
                pass
        return SKIP  # what is in it has been looked at


class _Enough(Exception):
    """An argument's mistakes are told."""
