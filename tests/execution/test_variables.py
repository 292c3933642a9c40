"""Variables: coerced as graphql-core does, or left to it where they do not fit."""

import json
from typing import Any, Final

import pytest
from graphql import (
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLList,
    GraphQLNonNull,
    OperationDefinitionNode,
    ValuesOfCorrectTypeRule,
    get_named_type,
    is_input_object_type,
    is_input_type,
    is_list_type,
    is_non_null_type,
    is_required_input_field,
    parse,
    validate,
)
from graphql.execution.values import VariableValues, get_variable_values
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from modelharbor.execution.variables import Variables
from modelharbor.schema import core

NAMED: Final = sorted(
    name
    for name, kind in core.type_map.items()
    if is_input_type(kind) and not name.startswith("__")
)
DEEPEST: Final = 4  # of input objects within each other; ModelFilter holds itself

WHOLE: Final = st.sampled_from([0, 1, -1, 7, 2**31 - 1, -(2**31)])
GOOD: Final[dict[str, SearchStrategy[Any]]] = {
    "Int": WHOLE | st.sampled_from([1.0, -0.0]),
    "Float": WHOLE | st.sampled_from([0.5, -1e300, 2**60]),
    "String": st.sampled_from(["", "a", "été", '"\\\n']),
    "ID": st.sampled_from(["", "x", 7, 2**60, 3.0]),
    "Boolean": st.booleans(),
    "BigInt": st.sampled_from(["1", "-5", 2**53 + 1, "9223372036854775807", 0]),
    "Cursor": st.just("abc"),
    "SHA256": st.sampled_from(["a" * 64, "A1" * 32]),
    "DateTime": st.sampled_from(["2026-01-31T12:00:00Z", "2026-01-31t12:00:00.5+02:00"]),
    "URL": st.just("https://x.test"),
}
JUNK: Final[SearchStrategy[Any]] = st.sampled_from(
    [None, True, False, 0, 1, -1, 1.0, 1.5, 2**31, 2**63, 1e308, "", "1", "x", "MIT", "ASC", [], [[]], [None], {}, {"x": 1}, {"eq": 1}, {"field": "NAME"}, [{"eq": "x"}, 5]]
)  # fmt: skip
ANYTHING: Final[SearchStrategy[Any]] = st.recursive(
    JUNK, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner)
)


@st.composite
def values(draw: DrawFn, kind: Any, junk: float, depth: int = 0) -> Any:
    """JSON for an input type; `junk` is the share of places where anything else may stand."""
    if draw(st.floats(0, 1)) < junk:
        return draw(ANYTHING)
    if is_non_null_type(kind):
        kind = kind.of_type
    elif draw(st.integers(0, 9)) == 0:
        return None
    if is_list_type(kind):
        inner = values(kind.of_type, junk, depth)
        return draw(inner if draw(st.integers(0, 4)) == 0 else st.lists(inner, max_size=2))
    if isinstance(kind, GraphQLEnumType):
        return draw(st.sampled_from(sorted(kind.values)))
    if not isinstance(kind, GraphQLInputObjectType):
        return draw(GOOD.get(kind.name, ANYTHING))
    found = {}
    for name, field in kind.fields.items():
        is_deep = depth >= DEEPEST and is_input_object_type(get_named_type(field.type))
        is_wanted = not is_deep and draw(st.integers(0, 3)) == 0
        if is_wanted or (is_required_input_field(field) and draw(st.floats(0, 1)) >= junk):
            found[name] = draw(values(field.type, junk, depth + 1))
    if draw(st.floats(0, 1)) < junk:
        found["nobodyKnowsThis"] = 1
    return found


def literal(value: Any, kind: Any) -> str:
    """As it stands in a document."""
    if is_non_null_type(kind):
        kind = kind.of_type
    if isinstance(value, list):
        inner = kind.of_type if is_list_type(kind) else kind
        return f"[{' '.join(literal(each, inner) for each in value)}]"
    if is_list_type(kind):
        return literal(value, kind.of_type)
    if isinstance(value, dict):
        fields = kind.fields if isinstance(kind, GraphQLInputObjectType) else {}
        shown = (
            f"{name}: {literal(each, fields[name].type if name in fields else kind)}"
            for name, each in value.items()
        )
        return f"{{{' '.join(shown)}}}"
    if isinstance(value, str) and isinstance(kind, GraphQLEnumType):
        return value
    return json.dumps(value)


@st.composite
def kinds(draw: DrawFn) -> tuple[Any, str]:
    """An input type with lists and non-null around it, and its text."""
    name = draw(st.sampled_from(NAMED))
    kind: Any = core.type_map[name]
    for _ in range(draw(st.integers(0, 2))):
        kind = GraphQLList(GraphQLNonNull(kind) if draw(st.booleans()) else kind)
    if draw(st.booleans()):
        kind = GraphQLNonNull(kind)
    return kind, str(kind)


@st.composite
def cases(draw: DrawFn) -> tuple[str, dict[str, Any]]:
    """A document with variables, and values for some of them."""
    definitions, found = [], {}
    for number in range(draw(st.integers(0, 4))):
        kind, text = draw(kinds())
        default = ""
        if draw(st.integers(0, 2)) == 0:
            default = f" = {literal(draw(values(kind, 0.0)), kind)}"
        definitions.append(f"$v{number}: {text}{default}")
        if draw(st.integers(0, 5)):
            found[f"v{number}"] = draw(values(kind, draw(st.sampled_from([0.0, 0.0, 0.1]))))
    if draw(st.booleans()):
        found["stranger"] = draw(JUNK)
    head = f"({', '.join(definitions)})" if definitions else ""
    return f"query{head} {{ __typename }}", found


def told(values: VariableValues) -> Any:
    """What can be compared; `repr` tells 1 from 1.0 and True."""
    sources = {
        name: (source.signature.name, str(source.signature.type), repr(source.value))
        for name, source in values.sources.items()
    }
    return list(sources.items()), repr(values.coerced), values.coerced


def is_valid(text: str) -> bool:
    return not validate(core, parse(text), [ValuesOfCorrectTypeRule])


def compared(text: str, found: dict[str, Any]) -> VariableValues | None:
    [operation] = parse(text).definitions
    assert isinstance(operation, OperationDefinitionNode)
    expected = get_variable_values(core, operation.variable_definitions or (), found)
    variables = Variables(core, operation)
    for _ in range(2):  # what was made once is used again
        coerced = variables.coerce(found)
        if isinstance(expected, list):
            assert expected
            assert coerced is None
        else:
            assert coerced is not None
            assert told(coerced) == told(expected)
    return coerced


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(cases())
def test_values_are_coerced_as_by_graphql_core(case: tuple[str, dict[str, Any]]) -> None:
    assume(is_valid(case[0]))
    compared(*case)


def test_both_outcomes_are_common() -> None:
    """Else the comparison would say little."""
    outcomes: list[bool] = []

    @settings(
        max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(cases())
    def count(case: tuple[str, dict[str, Any]]) -> None:
        if "$" in case[0] and is_valid(case[0]):
            outcomes.append(compared(*case) is not None)

    count()
    assert min(outcomes.count(True), outcomes.count(False)) >= 20


@pytest.mark.parametrize(
    ("definition", "given", "coerced"),
    [
        ("$n: Int", {}, {}),
        ("$n: Int", {"n": None}, {"n": None}),
        ("$n: Int", {"n": 2.0}, {"n": 2}),
        ("$n: Int", {"n": 2.5}, None),
        ("$n: Int", {"n": "2"}, None),
        ("$n: Int", {"n": True}, None),
        ("$n: Int!", {}, None),
        ("$n: Int!", {"n": None}, None),
        ("$n: Int! = 3", {}, {"n": 3}),
        ("$n: Int! = 3", {"n": None}, None),
        ("$n: Int = 3", {"n": None}, {"n": None}),
        ("$n: Int = null", {}, {"n": None}),
        ("$n: [ID!]", {"n": 7}, {"n": ["7"]}),
        ("$n: [ID!]", {"n": ["a", None]}, None),
        ("$n: BigInt", {"n": "9007199254740993"}, {"n": 2**53 + 1}),
        ("$n: BigInt", {"n": 1.0}, None),
        ("$n: JSON", {"n": {"a": [1, None]}}, {"n": {"a": [1, None]}}),
        ("$n: StringFilter", {"n": {"eq": "x"}}, {"n": {"eq": "x"}}),
        ("$n: StringFilter", {"n": {"eq": 5}}, None),
        ("$n: StringFilter", {"n": {"nope": "x"}}, None),
        ("$n: StringFilter", {"n": "x"}, None),
    ],
)
def test_values_by_example(definition: str, given: dict[str, Any], coerced: Any) -> None:
    found = compared(f"query({definition}) {{ __typename }}", given)
    assert (None if found is None else found.coerced) == coerced


@pytest.mark.parametrize("depth", [3, 150, 199, 200, 201, 5000])
def test_values_that_are_nested_too_deeply_are_left_to_graphql_core(depth: int) -> None:
    value: Any = {}
    for _ in range(depth):
        value = {"not": value}
    found = compared("query($f: ModelFilter) { __typename }", {"f": value})
    assert (found is not None) == (depth <= 200)
    [operation] = parse("query($f: JSON) { __typename }").definitions
    assert isinstance(operation, OperationDefinitionNode)
    free = Variables(core, operation).coerce({"f": value})  # its depth is its own
    assert free is not None
    assert free.coerced["f"] is value


def test_a_type_that_is_not_there_is_left_to_graphql_core() -> None:
    [operation] = parse("query($n: Nothing) { __typename }").definitions
    assert isinstance(operation, OperationDefinitionNode)
    assert Variables(core, operation).coerce({"n": 1}) is None
    assert Variables(core, operation).coerce({}) is None
