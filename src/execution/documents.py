"""From text to a document that may run: parsed, measured and validated once, then found by its SHA-256."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Generic, TypeVar

from graphql import (
    ASTValidationRule,
    DocumentNode,
    GraphQLError,
    GraphQLSchema,
    OperationDefinitionNode,
    OperationType,
    OverlappingFieldsCanBeMergedRule,
    ValidationContext,
    get_variable_values,
    parse,
    specified_rules,
    validate,
)
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

from .failures import Problem, problem, syntax_problem, validation_problem
from .guard import Guard, Measures

OVERLAPS = 20_000  # graphql-core's units of work, a microsecond each; some dozens of fragments in one place fit


class BoundedOverlapRule(OverlappingFieldsCanBeMergedRule):
    """graphql-core's, which compares pairs: 2,000 tokens could take it 1.5 s within its own budget."""

    def __init__(self, context: ValidationContext) -> None:
        super().__init__(context)
        self.rule_context.remaining_complexity_budget = OVERLAPS


RULES = (
    *(rule for rule in specified_rules if rule is not OverlappingFieldsCanBeMergedRule),
    MaybeNullValidationRule,
    OneOfInputValidationRule,
)
KEPT_BYTES_PER_DOCUMENT = 1024  # of text, on average; parsed it takes a hundred times that
K = TypeVar("K")
V = TypeVar("V")


class InvalidDocument(Exception):
    """Why a text cannot run."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems[0]["message"])
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a document."""

    name: str | None
    node: OperationDefinitionNode
    measures: Measures

    @property
    def kind(self) -> OperationType:
        return self.node.operation


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


class Kept(Generic[K, V]):
    """The last used, bounded by number and by size."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes, self.bytes = most, most_bytes, 0
        self._found: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: K) -> V | None:
        found = self._found.get(key)
        if found is None:
            return None
        self._found.move_to_end(key)
        return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        if key in self._found:
            self.bytes -= self._found.pop(key)[1]
        self._found[key] = (value, size)
        self.bytes += size
        while len(self._found) > self.most or self.bytes > self.most_bytes:
            self.bytes -= self._found.popitem(last=False)[1][1]


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

    def check_cost(self, operation: Operation, variables: Mapping[str, Any]) -> int:
        """The cost with the variables of a request; OperationTooComplex when it is over the limit.

        They are coerced as for the execution (100.0 is 100, one id is a list of one); where that
        fails nothing will run, and the cost is the least that it can be.
        """
        found = None
        if operation.measures.cost.open:
            definitions = operation.node.variable_definitions or ()
            values = get_variable_values(self.schema, definitions, dict(variables), max_errors=1)
            found = None if isinstance(values, list) else values.coerced
        return self.guard.check_cost(operation.measures, found)

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
                operations[name or ""] = Operation(name, definition, measures[name or ""])
        if not operations:
            return (problem(BadRequest("The document has no operation.")),)
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
