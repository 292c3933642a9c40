"""From text to a document that may run: parsed, measured and validated once, then found by its SHA-256."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, TypeAlias

import strawberry
from graphql import (
    ASTValidationRule,
    DocumentNode,
    GraphQLError,
    GraphQLSchema,
    Node,
    OperationDefinitionNode,
    OperationType,
    OverlappingFieldsCanBeMergedRule,
    Token,
    TokenKind,
    ValidationContext,
    ValuesOfCorrectTypeRule,
    parse,
    specified_rules,
    validate,
)
from graphql.execution.values import VariableValues
from graphql.validation.validate import ValidationAbortedError
from strawberry.schema.validation_rules.maybe_null import MaybeNullValidationRule
from strawberry.schema.validation_rules.one_of import OneOfInputValidationRule

from modelharbor.errors import (
    BadRequest,
    HarborError,
    IntrospectionDisabled,
    OperationTooComplex,
    PayloadTooLarge,
)
from modelharbor.settings import Settings

from .arguments import Frozen
from .failures import Problem, problem, syntax_problem, validation_problem
from .guard import Guard, Measures
from .kept import Kept
from .plan import Plan, make_plan
from .rules import BoundedValuesRule
from .selection import NotPlanned, Selection, switches
from .variables import Variables

OVERLAPS = 20_000  # graphql-core's units of work, a microsecond each; some dozens of fragments in one place fit


class BoundedOverlapRule(OverlappingFieldsCanBeMergedRule):
    """graphql-core's, which compares pairs: 2,000 tokens could take it 1.5 s within its own budget."""

    def __init__(self, context: ValidationContext) -> None:
        super().__init__(context)
        self.rule_context.remaining_complexity_budget = OVERLAPS


RULES = (
    *(
        BoundedValuesRule if rule is ValuesOfCorrectTypeRule else rule
        for rule in specified_rules
        if rule is not OverlappingFieldsCanBeMergedRule
    ),
    MaybeNullValidationRule,
    OneOfInputValidationRule,
)
KEPT_BYTES_PER_DOCUMENT = 1024  # of text, on average; parsed it takes a hundred times that
WAYS = 8  # of an operation, by the values of its variables in @skip and @include: each is a plan
PLANS, PLANS_BYTES = 2000, 2**24  # that are kept, and their source; a plan takes four times as much
FROZEN, FROZEN_BYTES = 2048, 2**20  # arguments that are kept, and the variables they are made of
Plans: TypeAlias = Kept[object, Plan | str]


class InvalidDocument(Exception):
    """Why a text cannot run."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems[0]["message"])
        self.problems = problems


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a document, with its plans as they become needed."""

    name: str | None
    node: OperationDefinitionNode
    measures: Measures
    document: DocumentNode
    variables: Variables
    frozen: Frozen
    plans: Plans
    _ways: dict[Hashable, object] = field(default_factory=dict)
    """What stands for each way through `@skip` and `@include` among all plans."""

    @cached_property
    def kind(self) -> OperationType:
        return self.node.operation

    def coerce(self, given: Mapping[str, Any]) -> VariableValues | None:
        """The values of its variables; None where they do not fit."""
        return self.variables.coerce(given)

    def plan(self, schema: strawberry.Schema, values: VariableValues) -> Plan | str:
        """The plan for these values, or why there is none."""
        switched = tuple(values.coerced.get(name) for name in self._switches)
        way = self._ways.get(switched)
        if way is None:
            if len(self._ways) >= WAYS:
                return f"more than {WAYS} ways through @skip and @include"
            way = self._ways[switched] = object()
        found = self.plans.get(way)
        if found is None:
            made = self.planned(schema, values)
            found = replace(made, source="") if isinstance(made, Plan) else made
            self.plans.put(way, found, made.size if isinstance(made, Plan) else len(made))
        return found

    def planned(self, schema: strawberry.Schema, values: VariableValues) -> Plan | str:
        """The same, made anew, with its source."""
        try:
            selection = Selection(schema._schema, self.document, self.node, values)
            return make_plan(schema, selection, self.frozen)
        except NotPlanned as reason:
            return str(reason)
        except GraphQLError:
            return "a directive that its variables do not fit"

    @property
    def has_switches(self) -> bool:
        """Whether variables stand in `@skip` or `@include`: there are several ways through it then."""
        return bool(self._switches)

    @cached_property
    def _switches(self) -> tuple[str, ...]:
        return switches(self.document, self.node)


@dataclass(frozen=True, slots=True)
class Document:
    """A text that parses, validates and is within the limits."""

    text: str
    sha256: str
    node: DocumentNode
    operations: dict[str, Operation]

    def operation(self, name: str | None) -> Operation:
        """The one that is meant; BadRequest when that is not clear."""
        if name:
            found = self.operations.get(name)
            if found is None:
                raise BadRequest("The document has no operation of the name in `operationName`.")
            return found
        if len(self.operations) > 1:
            raise BadRequest("The document has several operations: name one in `operationName`.")
        return next(iter(self.operations.values()))


class DocumentStore:
    """The documents of one process. Valid and refused ones are kept apart: bad ones drive out no good one."""

    def __init__(self, schema: GraphQLSchema, settings: Settings) -> None:
        self.schema = schema
        self.settings = settings
        self.guard = Guard(schema, settings)
        most, size = (
            settings.document_cache_size,
            settings.document_cache_size * KEPT_BYTES_PER_DOCUMENT,
        )
        self._valid: Kept[str, Document] = Kept(most, max(size, settings.max_query_bytes))
        self._refused: Kept[str, tuple[Problem, ...]] = Kept(most, size)
        self._frozen: Frozen = Kept(FROZEN, FROZEN_BYTES)
        self._plans: Plans = Kept(PLANS, PLANS_BYTES)

    def get(self, text: str) -> Document:
        """InvalidDocument, with all its problems, for one that cannot run; PayloadTooLarge for a long text."""
        encoded = text.encode()
        if len(encoded) > self.settings.max_query_bytes:
            raise PayloadTooLarge(
                f"The query has {len(encoded)} bytes; the limit is {self.settings.max_query_bytes}."
            )
        key = sha256(encoded).hexdigest()
        found = self._valid.get(key)
        if found is not None:
            return found
        problems = self._refused.get(key)
        if problems is None:
            made = self._read(text, key)
            if isinstance(made, Document):
                self._valid.put(key, made, len(encoded))
                return made
            problems = made
            self._refused.put(key, problems, sum(len(p["message"]) for p in problems))
        raise InvalidDocument(problems)

    def check_cost(self, operation: Operation, values: VariableValues | None) -> int:
        """The cost with the variables of a request; OperationTooComplex when it is over the limit.

        They are coerced as for the execution (100.0 is 100, one id is a list of one); where that
        fails nothing will run, and the cost is the least that it can be.
        """
        return self.guard.check_cost(operation.measures, values.coerced if values else None)

    def known(self, document_sha256: str) -> Document | None:
        return self._valid.get(document_sha256)

    def _read(self, text: str, key: str) -> Document | tuple[Problem, ...]:
        try:
            node = parse(
                text,
                max_lexical_tokens=self.settings.max_tokens,
                max_comments=self.settings.max_tokens,
            )
        except GraphQLError as error:
            return (self._unreadable(error),)
        try:
            measures = self.guard.measure(node)
            if not self.settings.introspection and any(m.introspection for m in measures.values()):
                raise IntrospectionDisabled("Introspection is switched off on this server.")
        except HarborError as error:
            return (problem(error),)
        # First alone: what it refuses would cost the other rules most.
        overlaps = self._validate(node, (BoundedOverlapRule,))
        if overlaps and isinstance(overlaps[-1], ValidationAbortedError):
            message = "Too many selections meet under the same names: leave out repeated ones."
            return (problem(OperationTooComplex(message, measure="overlaps", limit=OVERLAPS)),)
        errors = [*self._validate(node, RULES), *overlaps][: self.settings.max_errors]
        if errors:
            return tuple(validation_problem(error) for error in errors)
        operations = {}
        for definition in node.definitions:
            if isinstance(definition, OperationDefinitionNode):
                name = definition.name.value if definition.name else None
                operations[name or ""] = Operation(
                    name,
                    definition,
                    measures[name or ""],
                    node,
                    Variables(self.schema, definition),
                    self._frozen,
                    self._plans,
                )
        if not operations:
            return (problem(BadRequest("The document has no operation.")),)
        _forget_tokens(node)
        return Document(text, key, node, operations)

    def _validate(
        self, node: DocumentNode, rules: tuple[type[ASTValidationRule], ...]
    ) -> list[GraphQLError]:
        return validate(
            self.schema,
            node,
            rules,
            max_errors=self.settings.max_errors,
            hide_suggestions=not self.settings.introspection,
        )

    def _unreadable(self, error: GraphQLError) -> Problem:
        limit = self.settings.max_tokens
        if f"more than {limit} " in error.message:
            return problem(
                OperationTooComplex(
                    f"The document has more than {limit} tokens or comments.",
                    measure="tokens",
                    limit=limit,
                )
            )
        return syntax_problem(error)


def _forget_tokens(document: DocumentNode) -> None:
    """Of what is kept: places in the text stay, the tokens go. They are a sixth of a parsed
    document, and a chain in both directions, which only a full collection would free."""
    nothing = Token(TokenKind.SOF, 0, 0, 0, 0)
    waiting: list[Any] = [document]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node):
            if node.loc is not None:
                node.loc.start_token = node.loc.end_token = nothing
            waiting += [getattr(node, key) for key in node.keys if key != "loc"]
        elif isinstance(node, (list, tuple)):
            waiting += node
