"""Arguments of fields: bound once where they can be, remembered by their variables' values, never confused."""

from collections.abc import Hashable
from typing import Any

import orjson
import pytest
from graphql import FieldNode, OperationDefinitionNode, parse
from graphql.execution.values import VariableValues, get_variable_values

from modelharbor.db.keyset import Window
from modelharbor.errors import BadUserInput
from modelharbor.execution.arguments import MOST_BYTES, Binder, Frozen
from modelharbor.execution.declaration import Loaded, declaration
from modelharbor.execution.documents import FROZEN, FROZEN_BYTES, DocumentStore
from modelharbor.execution.kept import Kept
from modelharbor.execution.plan import Plan
from modelharbor.execution.selection import BACKREF
from modelharbor.schema import core, schema
from modelharbor.settings import Settings


class Bound:
    """The binder of the one root field of a document, and the arguments that its function got."""

    def __init__(self, text: str, most: int = FROZEN, most_bytes: int = FROZEN_BYTES) -> None:
        [operation] = parse(text).definitions
        assert isinstance(operation, OperationDefinitionNode)
        [node] = operation.selection_set.selections
        assert isinstance(node, FieldNode)
        assert core.query_type is not None
        definition = core.query_type.fields[node.name.value]
        own = definition.extensions[BACKREF]
        what = declaration(own)
        assert isinstance(what, Loaded)
        function = what.arguments or what.by
        assert function is not None
        self.operation, self.function = operation, function
        self.calls: list[dict[str, Any]] = []
        self.frozen: Frozen = Kept(most, most_bytes)
        self.binder = Binder(schema, definition, own, node, self.noted, self.frozen)

    def noted(self, **taken: Any) -> Hashable:
        self.calls.append(taken)
        return self.function(**taken)

    def __call__(self, **given: Any) -> Any:
        values = get_variable_values(core, self.operation.variable_definitions or (), given)
        assert isinstance(values, VariableValues)
        return self.binder(values, given)


def test_what_stands_in_the_text_is_bound_once() -> None:
    bound = Bound(
        '{ models(first: 7, filter: {tags: {hasAny: ["a"]}}, search: "x") { totalCount } }'
    )
    found = bound()
    assert isinstance(found, Window)
    assert (found.limit, found.search) == (7, "x")
    assert all(bound() is found for _ in range(3))
    assert len(bound.calls) == 1
    assert len(bound.frozen) == 0


def test_no_arguments_are_constants_too() -> None:
    bound = Bound("{ models { totalCount } }")
    assert bound().limit == 20
    assert bound() is bound()
    assert bound.calls == [{}]


def test_a_constant_that_is_refused_is_refused_each_time() -> None:
    bound = Bound("{ models(first: 0) { totalCount } }")
    for _ in range(2):
        with pytest.raises(BadUserInput, match="`first` is 0"):
            bound()


def test_plain_variables_go_straight_to_the_function() -> None:
    bound = Bound("query($a: String!, $n: Int!) { suggest(prefix: $a, first: $n) }")
    assert bound(a="x", n=3).text == "x"  # `first` has a default: Strawberry's way
    bound = Bound("query($o: String, $n: String!) { model(owner: $o, name: $n) { id } }")
    for number in range(3):
        found = bound(o="acme", n=f"m{number}")
        assert (found.owner, found.name) == ("acme", f"m{number}")
    assert bound.calls == [{"owner": "acme", "name": f"m{number}"} for number in range(3)]
    assert len(bound.frozen) == 0  # there is nothing to remember


def test_constants_stand_beside_plain_variables() -> None:
    bound = Bound('query($n: String!) { model(owner: "acme", name: $n) { id } }')
    assert bound(n="a").owner == "acme"
    assert bound(n="b").name == "b"
    assert bound.calls == [{"owner": "acme", "name": "a"}, {"owner": "acme", "name": "b"}]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, {}),
        ({"n": None}, {"first": None}),
        ({"n": 5}, {"first": 5}),
        ({"n": 5.0}, {"first": 5}),
    ],
)
def test_what_is_absent_is_left_out(given: dict[str, Any], taken: dict[str, Any]) -> None:
    bound = Bound("query($n: Int) { models(first: $n) { totalCount } }")
    assert bound(**given).limit == taken.get("first") or 20
    assert bound.calls == [taken]


def test_defaults_of_variables_count() -> None:
    bound = Bound("query($n: Int = 6) { models(first: $n) { totalCount } }")
    assert [bound().limit, bound(n=7).limit, bound(n=None).limit] == [6, 7, 20]


@pytest.mark.parametrize("given", [{}, {"p": None}])
def test_a_required_argument_that_its_variable_leaves_out(given: dict[str, Any]) -> None:
    """A variable that may be null stands for an argument that may not, for it has a default."""
    bound = Bound('query($p: String = "x") { suggest(prefix: $p) }')
    if not given:
        assert bound().text == "x"
    else:
        with pytest.raises(Exception, match="Argument 'prefix' has invalid value"):
            bound(**given)
        assert bound.calls == []


PROPERTY = """
query($v: JSON) { models(filter: {property: [{key: "a", eq: $v}]}) { totalCount } }
"""
ALIKE: list[dict[str, Any]] = [
    {"v": 1}, {"v": 1.0}, {"v": True}, {"v": "1"}, {"v": None}, {}, {"v": 0}, {"v": False}, {"v": ""}
]  # fmt: skip


def test_values_of_any_kind_are_not_confused() -> None:
    """Those that Python takes for equal are not equal in a filter."""
    alone = [Bound(PROPERTY)(**given).query.raw for given in ALIKE]
    assert len(set(alone)) == len(ALIKE)
    bound = Bound(PROPERTY)
    for _ in range(2):
        assert [bound(**given).query.raw for given in ALIKE] == alone
        assert [bound(**given).query.raw for given in ALIKE[::-1]] == alone[::-1]
    assert len(bound.calls) == len(bound.frozen) == len(ALIKE)


def test_an_input_object_is_remembered_by_its_values() -> None:
    bound = Bound(
        "query($f: ModelFilter, $n: Int) { models(filter: $f, first: $n) { totalCount } }"
    )
    filters: list[Any] = [
        {"tags": {"hasAny": ["a"]}},
        {"tags": {"hasAny": "a"}},  # a list of one: another text, the same meaning
        {"tags": {"hasAny": []}},
        {"tags": {}},
        {},
        None,
    ]
    found = [bound(f=each, n=n) for each in filters for n in (1, 2)]
    assert len(bound.calls) == len(filters) * 2
    assert [bound(f=each, n=n) for each in filters for n in (1, 2)] == found
    assert len(bound.calls) == len(filters) * 2
    assert found[0] == found[2]
    assert [window.limit for window in found] == [1, 2] * len(filters)
    absent = bound(n=1)
    assert absent == bound(f=None, n=1)
    assert len(bound.frozen) == len(filters) * 2 + 1


def test_variables_of_other_fields_do_not_matter() -> None:
    bound = Bound("query($f: ModelFilter, $other: Int) { models(filter: $f) { totalCount } }")
    found = bound(f={"task": {"eq": "x"}}, other=1)
    assert bound(f={"task": {"eq": "x"}}, other=2, stranger="y") is found
    assert len(bound.calls) == 1


def test_a_refusal_is_not_remembered_as_an_answer() -> None:
    bound = Bound("query($f: ModelFilter) { models(filter: $f) { totalCount } }")
    bad = {"task": {"in": ["x"] * 101}}
    for _ in range(2):
        with pytest.raises(BadUserInput):
            bound(f=bad)
    assert len(bound.frozen) == 0
    assert bound(f={}).limit == 20


def test_binders_do_not_take_each_others_answers() -> None:
    """Two fields of one document store share what is remembered, by binder."""
    one = Bound("query($ids: [ID!]!) { nodes(ids: $ids) { id } }")
    other = Bound("query($ids: [ID!]!) { nodes(ids: $ids) { id } }")
    other.binder.frozen = one.frozen
    assert one(ids=["x"]) == other(ids=["x"]) == (None,)
    assert (len(one.calls), len(other.calls)) == (1, 1)
    assert len(one.frozen) == 2


def test_what_is_remembered_is_bounded_in_number() -> None:
    bound = Bound("query($f: ModelFilter) { models(filter: $f) { totalCount } }", most=3)
    for number in range(10):
        bound(f={"task": {"eq": f"t{number}"}})
    assert len(bound.frozen) == 3
    bound(f={"task": {"eq": "t9"}})
    assert len(bound.calls) == 10
    bound(f={"task": {"eq": "t0"}})
    assert len(bound.calls) == 11


def test_what_is_remembered_is_bounded_in_size() -> None:
    bound = Bound("query($f: ModelFilter) { models(filter: $f) { totalCount } }", most_bytes=2000)
    for number in range(10):
        bound(f={"task": {"eq": f"{number:0200}"}})
    assert bound.frozen.bytes <= 2000
    assert 0 < len(bound.frozen) < 10


def test_large_values_are_not_remembered() -> None:
    bound = Bound("query($ids: [ID!]!) { nodes(ids: $ids) { id } }")
    few, many = ["x" * 100] * 10, ["x" * 100] * 30
    assert len(orjson.dumps(few)) < MOST_BYTES < len(orjson.dumps(many))
    for _ in range(2):
        assert bound(ids=many) == (None,) * 30
    assert (len(bound.calls), len(bound.frozen)) == (2, 0)
    for _ in range(2):
        assert bound(ids=few) == (None,) * 10
    assert (len(bound.calls), len(bound.frozen)) == (3, 1)


def test_the_documents_of_a_process_share_what_is_remembered() -> None:
    store = DocumentStore(core, Settings())
    texts = [
        f"query Q{number}($f: ModelFilter) {{ models(filter: $f) {{ totalCount }} }}"
        for number in range(3)
    ]
    for text in texts:
        operation = store.get(text).operation(None)
        values = operation.coerce({"f": {}})
        assert values is not None
        plan = operation.plan(schema, values)
        assert isinstance(plan, Plan)
        binders = [step.binder for step in plan.steps.values() if step.binder is not None]
        assert len(binders) == 1
        assert binders[0](values, {"f": {}}) == binders[0](values, {"f": {}})
    assert len(store._frozen) == 3
