"""The served schema as text."""

from dataclasses import replace
from typing import Any, Final

from graphql import (
    DirectiveDefinitionNode,
    NameNode,
    Node,
    ValueNode,
    Visitor,
    parse,
    print_ast,
    visit,
)

from . import schema

UNORDERED: Final = (
    "definitions",
    "fields",
    "values",
    "arguments",
    "interfaces",
    "types",
    "locations",
)


def schema_text() -> str:
    """In GraphQL's schema language, sorted: the same bytes for the same schema."""
    return sorted_text(schema.as_str())


def sorted_text(text: str) -> str:
    """A schema with directives first, and everything that has no order of its own by name.

    graphql-core's own sort would lose the directives that are applied, such as `@cost`.
    """
    document = visit(parse(text, no_location=True), _Sorted())
    return f"{print_ast(document)}\n"


class _Sorted(Visitor):
    def leave(self, node: Node, *_: Any) -> Any:
        if isinstance(node, ValueNode):  # the elements of a list are where they must be
            return None
        changes: dict[str, Any] = {
            key: tuple(sorted(getattr(node, key), key=_place))
            for key in UNORDERED
            if isinstance(getattr(node, key, None), tuple)
        }
        return replace(node, **changes) if changes else None


def _place(node: Any) -> tuple[bool, str]:
    name = node if isinstance(node, NameNode) else node.name
    return not isinstance(node, DirectiveDefinitionNode), name.value
