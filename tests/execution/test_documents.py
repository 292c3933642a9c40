"""Documents are read once, and what reading them may cost is bounded."""

import gc
import weakref
from typing import Any

import pytest
from graphql import DocumentNode, parse
from graphql.execution.values import VariableValues

from modelharbor.errors import BadRequest, PayloadTooLarge
from modelharbor.execution.documents import DocumentStore, InvalidDocument
from modelharbor.execution.kept import Kept
from modelharbor.execution.plan import Plan
from modelharbor.schema import core
from modelharbor.schema import schema as served
from modelharbor.settings import Settings
from tests.http.serving import schema

SETTINGS = Settings()


@pytest.fixture
def store() -> DocumentStore:
    return DocumentStore(schema._schema, SETTINGS)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that were parsed."""
    found: list[str] = []

    def noting(text: str, **options: Any) -> DocumentNode:
        found.append(text)
        return parse(text, **options)

    monkeypatch.setattr("modelharbor.execution.documents.parse", noting)
    return found


def refusal(store: DocumentStore, text: str) -> dict[str, Any]:
    with pytest.raises(InvalidDocument) as refused:
        store.get(text)
    found: dict[str, Any] = refused.value.problems[0]["extensions"]
    return found


def test_good_and_bad_texts_are_read_once(store: DocumentStore, parsed: list[str]) -> None:
    assert store.get("{hello}") is store.get("{hello}")
    assert refusal(store, "{nope}") == refusal(store, "{nope}")
    assert parsed == ["{hello}", "{nope}"]


def test_a_flood_of_bad_texts_drives_out_no_good_one(parsed: list[str]) -> None:
    store = DocumentStore(schema._schema, SETTINGS.model_copy(update={"document_cache_size": 10}))
    store.get("{hello}")
    for number in range(50):
        refusal(store, f"{{nope{number}}}")
    store.get("{hello}")
    assert parsed.count("{hello}") == 1


def test_the_least_used_goes_first(parsed: list[str]) -> None:
    store = DocumentStore(schema._schema, SETTINGS.model_copy(update={"document_cache_size": 2}))
    for text in ("{hello}", "{dear}", "{hello}", "{item{name}}", "{hello}", "{dear}"):
        store.get(text)
    assert parsed == ["{hello}", "{dear}", "{item{name}}", "{dear}"]


def test_what_is_kept_is_bounded_by_size_too() -> None:
    kept: Kept[str, str] = Kept(most=10, most_bytes=100)
    kept.put("a", "A", 60)
    kept.put("b", "B", 40)
    assert (kept.get("a"), kept.get("b"), kept.bytes) == ("A", "B", 100)
    kept.put("c", "C", 1)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.bytes) == (None, "B", "C", 41)
    kept.put("b", "B2", 10)
    assert (len(kept), kept.get("b"), kept.bytes) == (2, "B2", 11)
    kept.put("d", "D", 101)
    assert (len(kept), kept.bytes) == (0, 0)


def plans_of(text: str, store: DocumentStore, count: int) -> list["weakref.ref[Any]"]:
    """The functions of the plans of so many documents that differ in their text."""
    found = []
    for number in range(count):
        operation = store.get(f"{text}#{number}").operation(None)
        plan = operation.plan(served, VariableValues({}, {}))
        assert isinstance(plan, Plan)
        assert plan.source == ""
        found.append(weakref.ref(plan.function))
    return found


def test_plans_are_bounded_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelharbor.execution.documents.PLANS_BYTES", 3000)
    store = DocumentStore(core, SETTINGS)
    alive = [each() is not None for each in plans_of("{viewer{login}}", store, 20)]
    assert not any(alive[:10])
    assert all(alive[-2:])


def test_a_plan_that_is_driven_out_is_freed_without_the_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the collector has frozen it would never free."""
    monkeypatch.setattr("modelharbor.execution.documents.PLANS", 1)
    store = DocumentStore(core, SETTINGS)
    text = "query($a: String) { models(search: $a) { nodes { owner { login } tags } } }"
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        alive = [each() is not None for each in plans_of(text, store, 5)]
    finally:
        gc.enable()
        gc.unfreeze()
    assert alive == [False, False, False, False, True]


def test_arguments_that_are_kept_hold_no_document() -> None:
    store = DocumentStore(
        core, SETTINGS.model_copy(update={"document_cache_size": 1, "max_query_bytes": 1024})
    )
    text = "query($a: String) { models(filter: {name: {eq: $a}}) { nodes { name } } }"
    document = store.get(text)
    operation = document.operation(None)
    values = operation.coerce({"a": "x"})
    assert values is not None
    plan = operation.plan(served, values)
    assert isinstance(plan, Plan)
    binder = plan.steps[0].binder
    assert binder is not None
    binder(values, {"a": "x"})
    assert len(store._frozen) == 1
    nodes = weakref.ref(operation.node)
    del document, operation, values, plan, binder
    store.get("{viewer{login}}")
    store.get("{viewer{id}}")
    gc.collect()  # validation leaves cycles
    assert nodes() is None


def test_the_operation_that_is_meant(store: DocumentStore) -> None:
    two = store.get("query A{hello} query B{dear}")
    assert two.operation("B").name == "B"
    for name in (None, "C"):
        with pytest.raises(BadRequest):
            two.operation(name)
    one = store.get("query A{hello}")
    assert one.operation(None) is one.operation("A")
    with pytest.raises(BadRequest):
        one.operation("B")


def test_tokens_at_the_limit_and_one_over_it() -> None:
    store = DocumentStore(schema._schema, SETTINGS.model_copy(update={"max_tokens": 6}))
    assert store.get("{item{name}}")  # six
    assert store.get("#\n" * 6 + "{item{name}}")
    for over in ("{item{name name}}", "#\n" * 7 + "{hello}"):
        assert refusal(store, over) == {
            "code": "OPERATION_TOO_COMPLEX",
            "measure": "tokens",
            "limit": 6,
        }


def test_bytes_at_the_limit_and_one_over_it() -> None:
    store = DocumentStore(schema._schema, SETTINGS.model_copy(update={"max_query_bytes": 9}))
    assert store.get("{hello}#é".replace("#é", "#x"))
    with pytest.raises(PayloadTooLarge):
        store.get("{hello}#éé")


REPEATED = {
    "a field": "{item{" + "name " * 1990 + "}}",
    "an object": "{item{" + "child{name} " * 480 + "}}",
    "fragments": "{item{"
    + "".join(f"...F{i} " for i in range(215))
    + "}}"
    + "".join(f"fragment F{i} on Item{{name}} " for i in range(215)),
    "inline fragments": "{item{" + "...{name} " * 490 + "}}",
}


@pytest.mark.parametrize("what", REPEATED)
def test_comparing_what_overlaps_is_bounded(store: DocumentStore, what: str) -> None:
    """Within every other limit, graphql-core's own bound lets these take 0.2 to 1.5 s."""
    found = refusal(store, REPEATED[what])
    assert found == {"code": "OPERATION_TOO_COMPLEX", "measure": "overlaps", "limit": 20_000}


def test_overlaps_that_conflict_are_still_named(store: DocumentStore) -> None:
    assert refusal(store, "{a:hello a:dear}") == {"code": "GRAPHQL_VALIDATION_FAILED"}
    sixty = "".join(f"...F{i} " for i in range(60))
    fragments = "".join(f"fragment F{i} on Item{{name}} " for i in range(60))
    assert store.get(f"{{item{{{sixty}}}}} {fragments}")


@pytest.mark.parametrize(
    "text", ["{item(a:" + "[" * 900 + "]" * 900 + "){name}}", "{item" * 500 + "}" * 500, "{"]
)
def test_what_is_too_deep_for_the_parser_is_a_parse_error(store: DocumentStore, text: str) -> None:
    assert refusal(store, text)["code"] in {"GRAPHQL_PARSE_FAILED"}


def test_problems_keep_no_document_alive(store: DocumentStore) -> None:
    with pytest.raises(InvalidDocument) as refused:
        store.get("{nope also}")
    assert refused.value.problems == (
        {
            "message": "Cannot query field 'nope' on type 'Query'.",
            "locations": [{"line": 1, "column": 2}],
            "extensions": {"code": "GRAPHQL_VALIDATION_FAILED"},
        },
        {
            "message": "Cannot query field 'also' on type 'Query'.",
            "locations": [{"line": 1, "column": 7}],
            "extensions": {"code": "GRAPHQL_VALIDATION_FAILED"},
        },
    )
