"""What budgets want to know of an operation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from graphql import print_ast

from modelharbor.execution.budgets import count_rows, dry_run
from modelharbor.execution.documents import DocumentStore
from modelharbor.schema import core
from modelharbor.settings import Settings

PAGE = Path(__file__).parents[2] / "bench" / "operations" / "page.graphql"


@pytest.fixture
def documents() -> DocumentStore:
    return DocumentStore(core, Settings())


def left(
    documents: DocumentStore, text: str, name: str | None = None, **variables: Any
) -> str | None:
    """The selection that is left of an operation for a dry run."""
    document = documents.get(text)
    operation = document.operation(name)
    found = dry_run(core, document, operation, operation.coerce(variables))
    if found is None:
        return None
    assert found.operation is found.document.operation(name)
    assert found.operation.node in found.document.node.definitions
    assert found.operation.measures is operation.measures
    return " ".join(print_ast(found.operation.node.selection_set).split())


OTHER = "models { totalCount }"
ASKED = {
    "{ rateLimit(dryRun: true) { cost } %s }": "rateLimit(dryRun: true) { cost }",
    "{ %s __typename rateLimit(dryRun: true) { cost } }": "__typename rateLimit(dryRun: true) { cost }",
    "{ a: rateLimit { cost } b: rateLimit(dryRun: true) { limit } %s }": "a: rateLimit { cost } b: rateLimit(dryRun: true) { limit }",
    "{ ...F } fragment F on Query { %s ... { rateLimit(dryRun: true) { ...R } } } fragment R on RateLimit { cost }": "rateLimit(dryRun: true) { ...R }",
    "query($yes: Boolean = true) { rateLimit(dryRun: $yes) { cost } %s }": "rateLimit(dryRun: $yes) { cost }",
    "query($yes: Boolean = true) { rateLimit(dryRun: true) @include(if: $yes) { cost } %s }": "rateLimit(dryRun: true) @include(if: $yes) { cost }",
}
NOT_ASKED = [
    "{ rateLimit { cost } %s }",
    "{ rateLimit(dryRun: false) { cost } %s }",
    "{ rateLimit(dryRun: null) { cost } %s }",
    "query($no: Boolean = false) { rateLimit(dryRun: $no) { cost } %s }",
    "query($no: Boolean) { rateLimit(dryRun: $no) { cost } %s }",
    "{ rateLimit(dryRun: true) @skip(if: true) { cost } %s }",
    "query($no: Boolean = false) { ... @include(if: $no) { rateLimit(dryRun: true) { cost } } %s }",
    "{ %s }",
    "{ rateLimit: viewer { login } %s }",
]


@pytest.mark.parametrize("text", ASKED)
def test_a_dry_run_keeps_nothing_else(documents: DocumentStore, text: str) -> None:
    assert left(documents, text % OTHER) == f"{{ {ASKED[text]} }}"


@pytest.mark.parametrize("text", NOT_ASKED)
def test_what_is_no_dry_run(documents: DocumentStore, text: str) -> None:
    assert left(documents, text % OTHER) is None


def test_the_operation_that_runs_decides(documents: DocumentStore) -> None:
    text = "query A { rateLimit(dryRun: true) { cost } models { totalCount } } query B { viewer { id } }"
    assert left(documents, text, "A") == "{ rateLimit(dryRun: true) { cost } }"
    assert left(documents, text, "B") is None


def test_values_that_do_not_fit_are_told_as_ever(documents: DocumentStore) -> None:
    text = "query($no: Boolean) { rateLimit(dryRun: $no) { cost } }"
    assert left(documents, text, no="x") is None


def rows(documents: DocumentStore, text: str, variables: Mapping[str, Any] | None = None) -> int:
    document = documents.get(text)
    operation = document.operation(None)
    values = operation.coerce(variables or {})
    return count_rows(documents.guard.prices, document, operation, values)


COUNTED = {
    "{ viewer { login } rateLimit { nodeCount } }": 0,
    "{ models(first: 10) { totalCount pageInfo { hasNextPage } } }": 0,
    "{ models(first: 10) { nodes { name } } }": 10,
    "{ models { edges { node { name } } } }": 20,
    "{ models(first: 10) { nodes { owner { login } versions(first: 5) { nodes { number } } } } }": 60,
    "{ models(first: 10) { edges { node { versions(last: 5) { edges { node { files(first: 3) { nodes { path } } } } } } } } }": 10
    + 50
    + 150,
    '{ nodes(ids: ["a", "b"]) { ... on Model { versions(first: 4) { nodes { id } } } } }': 2 + 8,
    '{ model(id: "x") { ...F } other: model(id: "y") { ...F } } fragment F on Model { versions(first: 4) { nodes { id } } }': 8,
    '{ model(id: "x") { latestVersion { model { versions(first: 7) { nodes { id } } } } } }': 7,
    "{ __schema { types { name } } }": 0,
}


@pytest.mark.parametrize("text", COUNTED)
def test_rows_are_counted_within_each_other(documents: DocumentStore, text: str) -> None:
    assert rows(documents, text) == COUNTED[text]


def test_rows_are_counted_by_the_variables(documents: DocumentStore) -> None:
    text = "query($n: Int, $ids: [ID!]!) { models(first: $n) { nodes { id } } nodes(ids: $ids) { id } }"
    assert rows(documents, text, {"n": 3, "ids": ["a", "b"]}) == 5
    assert rows(documents, text, {"ids": "a"}) == 21


def test_a_fragment_counts_wherever_it_is_spread(documents: DocumentStore) -> None:
    doubled = " ".join(f"fragment F{n} on Model {{ ...F{n + 1} ...F{n + 1} }}" for n in range(8))
    last = "fragment F8 on Model { versions(first: 1) { nodes { id } } }"
    assert rows(documents, f'{{ model(id: "x") {{ ...F0 }} }} {doubled} {last}') == 2**8


def test_the_page_of_the_benchmarks(documents: DocumentStore) -> None:
    assert rows(documents, PAGE.read_text()) == 20 + 20 * 3
