"""The smallest case that still differs: one part after the other is left out."""

from collections.abc import Awaitable, Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from typing import Any, Final, TypeAlias

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    InlineFragmentNode,
    Node,
    OperationDefinitionNode,
    VariableNode,
    parse,
    parse_value,
    print_ast,
)

from .compare import Case
from .values import literal

MOST_TRIES: Final = 1000
StillDiffers: TypeAlias = Callable[[Case], Awaitable[bool]]


async def shrunk(case: Case, still_differs: StillDiffers) -> Case:
    """`still_differs` is false for a case that is not valid."""
    tries = 0
    progress = True
    while progress and tries < MOST_TRIES:
        progress = False
        for smaller in candidates(case):
            tries += 1
            if await still_differs(smaller):
                case, progress = smaller, True
                break
            if tries >= MOST_TRIES:
                break
    return case


def candidates(case: Case) -> Iterator[Case]:
    """Cases with one part less, the large parts first."""
    if case.failures is not None:
        yield replace(case, failures=None)
    if case.spot is not None:
        yield replace(case, spot=None)
    if case.data != "healthy":
        yield replace(case, data="healthy")
    document = parse(case.document)
    for edited in _edits(document):
        yield replace(case, document=print_ast(_without_unused(edited)))
    yield from _nameless(case, document)
    yield from _inlined(case, document)
    for name, value in case.variables.items():
        rest = {key: each for key, each in case.variables.items() if key != name}
        yield replace(case, variables=rest)
        for smaller in _smaller_values(value):
            yield replace(case, variables={**rest, name: smaller})
    if case.viewer not in ("anonymous", "owner"):
        yield replace(case, viewer="owner")
    if case.viewer != "anonymous":
        yield replace(case, viewer="anonymous")


def _nodes(node: Any) -> Iterator[Any]:
    """A node and all below it, in the order of the text."""
    yield node
    for key in node.keys:
        value = getattr(node, key, None)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, Node):
                yield from _nodes(each)


def _edits(document: DocumentNode) -> Iterator[DocumentNode]:
    """Copies of a document, each with one thing changed that makes it smaller or plainer."""
    for parts, edit in EDITS:
        for index, node in enumerate(_nodes(document)):
            for part in range(parts(node)):
                copy = deepcopy(document)
                same = next(islice(_nodes(copy), index, None))
                if edit(copy, same, part):
                    yield copy


def _put(node: Any, name: str, value: Any) -> None:
    object.__setattr__(node, name, value)  # nodes are frozen; this one is a copy of our own


def _drop(name: str) -> Callable[[DocumentNode, Any, int], bool]:
    """One of several leaves a list of a node."""

    def edit(document: DocumentNode, node: Any, part: int) -> bool:
        items = getattr(node, name)
        _put(node, name, (*items[:part], *items[part + 1 :]))
        return len(items) > 1 or name not in ("definitions", "selections")

    return edit


def _length(name: str) -> Callable[[Any], int]:
    return lambda node: len(getattr(node, name, None) or ()) if name in node.keys else 0


def _open(document: DocumentNode, node: Any, part: int) -> bool:
    """What stands in an inline fragment takes its place; an inline fragment the place of a spread."""
    found = node.selections[part]
    if isinstance(found, InlineFragmentNode):
        inner = found.selection_set.selections
    elif isinstance(found, FragmentSpreadNode):
        fragment = _fragments(document)[found.name.value]
        inner = (
            InlineFragmentNode(
                type_condition=fragment.type_condition,
                directives=found.directives,
                selection_set=deepcopy(fragment.selection_set),
            ),
        )
    else:
        return False
    _put(node, "selections", (*node.selections[:part], *inner, *node.selections[part + 1 :]))
    return True


def _drop_alias(document: DocumentNode, node: Any, part: int) -> bool:
    _put(node, "alias", None)
    return True


def _has_alias(node: Any) -> int:
    return int(isinstance(node, FieldNode) and node.alias is not None)


EDITS: Final = (
    (_length("definitions"), _drop("definitions")),
    (_length("selections"), _drop("selections")),
    (_length("selections"), _open),
    (_length("arguments"), _drop("arguments")),
    (_length("directives"), _drop("directives")),
    (_has_alias, _drop_alias),
    (_length("values"), _drop("values")),
    (_length("fields"), _drop("fields")),
)


def _fragments(document: DocumentNode) -> dict[str, FragmentDefinitionNode]:
    return {
        each.name.value: each
        for each in document.definitions
        if isinstance(each, FragmentDefinitionNode)
    }


def _reached(document: DocumentNode, node: Any) -> Iterator[Any]:
    """A node and all below it, with the fragments that are spread there."""
    fragments, seen, left = _fragments(document), set[str](), [node]
    while left:
        for each in _nodes(left.pop()):
            yield each
            if isinstance(each, FragmentSpreadNode) and each.name.value not in seen:
                seen.add(each.name.value)
                if each.name.value in fragments:
                    left.append(fragments[each.name.value])


def _without_unused(document: DocumentNode) -> DocumentNode:
    """Fragments and variables that nothing uses any more make a document invalid."""
    spread: set[str] = set()
    for operation in document.definitions:
        if not isinstance(operation, OperationDefinitionNode):
            continue
        below = list(_reached(document, operation.selection_set))
        spread |= {each.name.value for each in below if isinstance(each, FragmentSpreadNode)}
        used = {each.name.value for each in below if isinstance(each, VariableNode)}
        variables = operation.variable_definitions or ()
        left = [each for each in variables if each.variable.name.value in used]
        _put(operation, "variable_definitions", tuple(left))
    definitions = [
        each
        for each in document.definitions
        if not isinstance(each, FragmentDefinitionNode) or each.name.value in spread
    ]
    _put(document, "definitions", tuple(definitions))
    return document


def _nameless(case: Case, document: DocumentNode) -> Iterator[Case]:
    if case.operation_name is not None:
        copy = deepcopy(document)
        for each in copy.definitions:
            if isinstance(each, OperationDefinitionNode):
                _put(each, "name", None)
        yield replace(case, document=print_ast(copy), operation_name=None)


def _inlined(case: Case, document: DocumentNode) -> Iterator[Case]:
    """A variable's value in the text, in all its places."""
    for name, value in case.variables.items():
        copy = deepcopy(document)
        try:
            node = parse_value(literal(value))
        except Exception:  # a value that no document can say
            continue
        for parent in _nodes(copy):
            for key in parent.keys:
                inner = getattr(parent, key, None)
                if isinstance(inner, VariableNode) and inner.name.value == name and key == "value":
                    _put(parent, "value", node)
                elif key == "values" and inner:
                    items = [
                        node if isinstance(each, VariableNode) and each.name.value == name else each
                        for each in inner
                    ]
                    _put(parent, "values", tuple(items))
        rest = {key: each for key, each in case.variables.items() if key != name}
        yield replace(case, document=print_ast(_without_unused(copy)), variables=rest)


def _smaller_values(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for index in range(len(value)):
            yield [*value[:index], *value[index + 1 :]]
    elif isinstance(value, dict):
        for name in value:
            yield {key: each for key, each in value.items() if key != name}
