"""Operations that are to be published, checked against the schema and all limits."""

from graphql import (
    DocumentNode,
    FieldNode,
    GraphQLSchema,
    TypeInfo,
    TypeInfoVisitor,
    Visitor,
    is_interface_type,
    is_object_type,
    visit,
)

from modelharbor.errors import ErrorCode, HarborError
from modelharbor.resolvers.manifests import Entry, Trouble
from modelharbor.resolvers.persisted import Publication

from .documents import DocumentStore, InvalidDocument
from .failures import Problem, problem


def examine(documents: DocumentStore, entry: Entry) -> Publication | list[Trouble]:
    """What is to be published, or what is wrong with it."""
    try:
        document = documents.get(entry.text)
    except InvalidDocument as error:
        return [_trouble(each, entry) for each in error.problems]
    except HarborError as error:
        return [_trouble(problem(error), entry)]
    if len(document.operations) > 1:
        return [_bad("the text has several operations: publish each by itself", entry)]
    operation = document.operation(None)
    kind = operation.kind.value
    if entry.name is not None and entry.name != operation.name:
        return [_bad(f"the operation in the text is named {operation.name or 'nothing'}", entry)]
    if entry.kind is not None and entry.kind != kind:
        return [_bad(f"the operation in the text is a {kind}, no {entry.kind}", entry)]
    return Publication(
        entry.id,
        entry.text,
        document.sha256,
        operation.name,
        kind,
        selected_fields(documents.schema, document.node),
    )


def selected_fields(schema: GraphQLSchema, document: DocumentNode) -> list[str]:
    """As `Model.name`, sorted; of the type that stands in the document, which may be an interface."""
    found = set()
    info = TypeInfo(schema)

    class Fields(Visitor):
        def enter_field(self, node: FieldNode, *_: object) -> None:
            parent = info.get_parent_type()
            if parent is not None and not node.name.value.startswith("__"):
                found.add(f"{parent.name}.{node.name.value}")

    visit(document, TypeInfoVisitor(info, Fields()))
    return sorted(found)


def coordinates(schema: GraphQLSchema, field: str) -> list[str]:
    """A field, as `Model.name`, and those of interfaces by which it is selected too; empty where the
    schema has no such field."""
    type_name, _, name = field.partition(".")
    parent = schema.get_type(type_name)
    if not (is_object_type(parent) or is_interface_type(parent)) or name not in parent.fields:
        return []
    above = [each.name for each in parent.interfaces if name in each.fields]
    return [field, *(f"{each}.{name}" for each in above)]


def _trouble(made: Problem, entry: Entry) -> Trouble:
    places = made.get("locations") or [{"line": None, "column": None}]
    return Trouble(
        made["extensions"]["code"],
        made["message"].rstrip("."),
        entry.id,
        entry.name,
        places[0]["line"],
        places[0]["column"],
    )


def _bad(message: str, entry: Entry) -> Trouble:
    return Trouble(ErrorCode.BAD_INPUT.value, message, entry.id, entry.name)
