"""What a client subscribes to: the one root field of its operation, and what answers to it hang on."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import orjson
import strawberry
from graphql import (
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    SelectionNode,
    VariableDefinitionNode,
    VariableNode,
    Visitor,
    visit,
)
from graphql.execution.values import VariableValues

from modelharbor.auth.viewer import Viewer
from modelharbor.context import Context
from modelharbor.errors import BadRequest, BadUserInput
from modelharbor.loaders.base import Sharing
from modelharbor.streams.base import Happening, Place, Subscribed

from .arguments import Binder, Frozen
from .declaration import Computed, Loaded, Streamed, declaration
from .documents import Document, Operation
from .failures import Problem
from .plan import Plan
from .selection import BACKREF, NotPlanned, Selection

if TYPE_CHECKING:
    from .groups import Group

PASSED_OVER: Final = frozenset({"after", "maxRateHz"})
"""Arguments that say nothing about what an event looks like."""


class Sink(Protocol):
    """Where the events of one subscription go."""

    def send(self, payload: bytes, key: Hashable) -> None:
        """An answer in JSON. With a `key` it may be dropped for a later one of that key."""

    async def room(self) -> None:
        """Back when little enough waits to be sent for more to come."""

    def complete(self) -> None: ...

    def fail(self, problems: list[Problem]) -> None:
        """The subscription has ended by these errors."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A subscription as a client asks for it; all of it is valid."""

    document: Document
    operation: Operation
    variables: Mapping[str, Any]
    values: VariableValues | None
    base_url: str
    """Of links in answers: who comes by another name of the server gets other links."""
    context: Callable[[Viewer], Context]


def moved(place: Place | None, happening: Happening) -> Place:
    """Once the happening was told."""
    if place is None:
        return Place(happening.position, happening.sequence)
    return Place(max(happening.position, place.position), max(happening.sequence, place.sequence))


@dataclass(slots=True, eq=False)
class Subscription:
    """One client's."""

    asked: Asked
    viewer: Viewer
    sink: Sink
    place: Place | None = None
    serial: int = 0  # of the group's happenings, the last that it has or shall not get
    group: "Group | None" = None
    turn: int = 0
    """Raised whenever it leaves or begins anew: what was begun before is not gone on with."""
    is_closed: bool = False

    def leave(self) -> None:
        self.turn += 1
        if self.group is not None:
            self.group.remove(self)
            self.group = None

    def close(self) -> None:
        """For good."""
        self.is_closed = True
        self.leave()


class RootField:
    """The one root field of a subscription."""

    def __init__(
        self, schema: strawberry.Schema, operation: Operation, document: Document, frozen: Frozen
    ) -> None:
        self.operation = operation
        root = schema._schema.subscription_type
        assert root is not None  # validated
        node = _root_field(document, operation)
        self.definition = root.fields.get(node.name.value) if node else None
        if node is None or self.definition is None:
            raise BadRequest("A subscription has one field, which is none of introspection.")
        own = self.definition.extensions[BACKREF]
        what = declaration(own)
        assert isinstance(what, Streamed)  # every field of Subscription is
        self.name: str = own.python_name
        self.binder = Binder(schema, self.definition, own, node, what.subscribed, frozen)
        declared = {each.variable.name.value for each in operation.node.variable_definitions or ()}
        self.names = declared - _only_used_in(document, node)
        """Of the variables on which answers hang."""
        self._sharing: Sharing | None = None

    def subscribed(self, asked: Asked) -> Subscribed:
        """Raises BadUserInput, in the words of whatever reads the arguments."""
        if asked.values is None:
            raise BadUserInput("The variables do not fit the operation.")
        try:
            found = self.binder(asked.values, asked.variables)
        except GraphQLError as error:  # a null that the variable may be, and the argument not
            raise BadUserInput(error.message) from None
        assert isinstance(found, Subscribed)
        return found

    def varying(self, variables: Mapping[str, Any]) -> bytes:
        """The values of variables on which answers hang."""
        kept = {name: value for name, value in variables.items() if name in self.names}
        return orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)

    def sharing(self, schema: strawberry.Schema, asked: Asked) -> Sharing:
        """The narrowest of all that is read for an answer, over all ways through the document."""
        if self._sharing is None:
            self._sharing = self._narrowest(schema, asked)
        return self._sharing

    def _narrowest(self, schema: strawberry.Schema, asked: Asked) -> Sharing:
        plan = asked.operation.plan(schema, asked.values) if asked.values else ""
        if not isinstance(plan, Plan) or asked.operation.has_switches:
            return Sharing.NEVER
        assert asked.values is not None
        try:
            selection = Selection(
                schema._schema, asked.operation.document, asked.operation.node, asked.values
            )
        except NotPlanned:
            return Sharing.NEVER
        found = Sharing.EVERYBODY
        for each in selection.fields:
            if isinstance(each.what, Computed) and "viewer" in each.what.parameters:
                return Sharing.NEVER
            if isinstance(each.what, Loaded):
                if each.what.loader.sharing is Sharing.NEVER:
                    return Sharing.NEVER
                if each.what.loader.sharing is Sharing.EQUAL_RIGHTS:
                    found = Sharing.EQUAL_RIGHTS
        return found


def _root_field(document: Document, operation: Operation) -> FieldNode | None:
    """Through fragments, too; None where there are several or none."""
    found: dict[str, FieldNode] = {}
    fragments = {
        each.name.value: each
        for each in document.node.definitions
        if isinstance(each, FragmentDefinitionNode)
    }
    waiting: list[SelectionNode] = list(operation.node.selection_set.selections)
    while waiting:
        node = waiting.pop()
        if isinstance(node, FieldNode):
            found[(node.alias or node.name).value] = node
        elif isinstance(node, InlineFragmentNode):
            waiting += node.selection_set.selections
        elif isinstance(node, FragmentSpreadNode):
            waiting += fragments[node.name.value].selection_set.selections
    return next(iter(found.values())) if len(found) == 1 else None


def _only_used_in(document: Document, root: FieldNode) -> frozenset[str]:
    """Variables that stand nowhere but in arguments that say nothing about what an event looks like."""
    ignored = {
        argument.value.name.value
        for argument in root.arguments or ()
        if isinstance(argument.value, VariableNode) and argument.name.value in PASSED_OVER
    }
    uses: dict[str, int] = {}

    class Uses(Visitor):
        def enter_variable(self, node: Any, _key: Any, parent: Any, *_: Any) -> None:
            if not isinstance(parent, VariableDefinitionNode):
                uses[node.name.value] = uses.get(node.name.value, 0) + 1

    visit(document.node, Uses())
    return frozenset(name for name in ignored if uses.get(name) == 1)
