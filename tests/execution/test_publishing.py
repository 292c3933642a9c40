"""Operations of a manifest against the schema and the limits."""

from typing import Any

import pytest
from graphql import parse

from modelharbor.execution.documents import DocumentStore
from modelharbor.execution.publishing import coordinates, examine, selected_fields
from modelharbor.resolvers.manifests import Entry
from modelharbor.resolvers.persisted import Publication
from modelharbor.schema import core
from modelharbor.settings import Settings


def examined(text: str, name: str | None = None, kind: str | None = None, **limits: Any) -> Any:
    found = examine(DocumentStore(core, Settings(**limits)), Entry("id", text, name, kind))
    return found if isinstance(found, Publication) else [str(each) for each in found]


def test_what_is_to_be_published() -> None:
    text = "query Names { models(first: 2) { nodes { ...of } } } fragment of on Model { name owner { login } }"
    assert examined(text, "Names", "query") == Publication(
        "id",
        text,
        DocumentStore(core, Settings()).get(text).sha256,
        "Names",
        "query",
        ["Actor.login", "Model.name", "Model.owner", "ModelConnection.nodes", "Query.models"],
    )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("mutation", "mutation M($id: ID!) { likeModel(input: {id: $id}) { model { id } } }"),
        ("subscription", "subscription S { jobs { cursor } }"),
    ],
)
def test_of_each_kind(kind: str, text: str) -> None:
    found = examined(text)
    assert isinstance(found, Publication), found
    assert (found.kind, found.name) == (kind, text.split()[1][0])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "query A {",
            "A (id), 1:10: Syntax Error: Expected Name, found <EOF> [GRAPHQL_PARSE_FAILED]",
        ),
        (
            "query A {\n  __typename\n  nothing\n}",
            "A (id), 3:3: Cannot query field 'nothing' on type 'Query' [GRAPHQL_VALIDATION_FAILED]",
        ),
        ("", "A (id), 1:1: Syntax Error: Unexpected <EOF> [GRAPHQL_PARSE_FAILED]"),
        (
            "fragment f on Model { name }",
            "A (id), 1:1: Fragment 'f' is never used [GRAPHQL_VALIDATION_FAILED]",
        ),
        (
            "query A { __typename } query B { __typename }",
            "A (id): the text has several operations: publish each by itself [BAD_INPUT]",
        ),
        ("query B { __typename }", "A (id): the operation in the text is named B [BAD_INPUT]"),
        ("{ __typename }", "A (id): the operation in the text is named nothing [BAD_INPUT]"),
        (
            "subscription A { jobs { cursor } }",
            "A (id): the operation in the text is a subscription, no query [BAD_INPUT]",
        ),
    ],
)
def test_what_breaks_is_told_with_its_place(text: str, told: str) -> None:
    assert examined(text, "A", "query") == [told]


def test_several_faults_are_told_each() -> None:
    assert examined("query A { zzzzzz qqqqqq }") == [
        "(id), 1:11: Cannot query field 'zzzzzz' on type 'Query' [GRAPHQL_VALIDATION_FAILED]",
        "(id), 1:18: Cannot query field 'qqqqqq' on type 'Query' [GRAPHQL_VALIDATION_FAILED]",
    ]


def test_limits_are_held() -> None:
    text = "query A { models(first: 100) { nodes { owner { login } } } }"
    assert examined(text, max_depth=3) == [
        "(id): The operation's depth is 4; the limit is 3 [OPERATION_TOO_COMPLEX]"
    ]
    assert examined(text, max_cost=50)[0].endswith("the limit is 50 [OPERATION_TOO_COMPLEX]")
    assert examined("query A { __schema { description } }", introspection=False) == [
        "(id): Introspection is switched off on this server [INTROSPECTION_DISABLED]"
    ]


def test_fields_are_those_of_the_types_in_the_text() -> None:
    text = "{ node(id: 1) { id ... on Model { __typename latestVersion { number } } } }"
    assert selected_fields(core, parse(text)) == [
        *("Model.latestVersion", "ModelVersion.number", "Node.id", "Query.node")
    ]


def test_a_field_is_selected_through_interfaces_too() -> None:
    assert sorted(coordinates(core, "User.login")) == ["Actor.login", "User.login"]
    assert sorted(coordinates(core, "User.id")) == ["Actor.id", "Node.id", "User.id"]
    assert coordinates(core, "Actor.login") == ["Actor.login"]
    for unknown in ("User.nothing", "Nothing.login", "ModelState.ACTIVE", "Model"):
        assert coordinates(core, unknown) == []
