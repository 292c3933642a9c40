"""Every measure at its limit and one over it, before any resolver or command; and the pass itself."""

from typing import Any

import pytest
from graphql import build_schema, get_introspection_query, parse

from modelharbor.errors import OperationTooComplex
from modelharbor.execution.documents import DocumentStore, InvalidDocument
from modelharbor.execution.guard import Guard, Measures
from modelharbor.settings import Settings
from tests.http.serving import schema

SETTINGS = Settings()
CORE = schema._schema
"""Of a page: 1 a row and what is selected in it; `totalCount` 5 once, `dear` 7."""


def measured(query: str, settings: Settings = SETTINGS) -> Measures:
    return next(iter(Guard(CORE, settings).measure(parse(query)).values()))


def cost(query: str, **variables: Any) -> int:
    store = DocumentStore(CORE, SETTINGS)
    operation = store.get(query).operation(None)
    return store.check_cost(operation, operation.coerce(variables))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("{hello}", 0),
        ("{__typename}", 0),
        ("{item{name}}", 1),
        ("{item{child{child{name}}}}", 3),
        ("{dear}", 7),
        ("mutation{write}", 10),
        ("{items{nodes{name}}}", 20),
        ("{items{edges{node{name}}}}", 20),
        ("{items{totalCount}}", 20 + 5),
        ("{items(first:1){nodes{name}}}", 1),
        ("{items(first:100){nodes{name}}}", 100),
        ("{items(last:7){nodes{name}}}", 7),
        ("{items(first:2){nodes{child{name}}}}", 2 * 2),
        ("{items(first:2){edges{cursor node{child{name}}} pageInfo{hasNextPage}}}", 2 * 2 + 1),
        ("{items(first:2){totalCount nodes{name child{name}}}}", 5 + 2 * 2),
        ("{items(first:10){nodes{items(first:10){nodes{name}}}}}", 10 * (1 + 10)),
        ("{items(first:10){nodes{items{nodes{child{name}}}}}}", 10 * (1 + 20 * 2)),
        ('{byIds(ids:["a","b","c"]){name}}', 3),
        ('{byIds(ids:["a","b","c"]){child{name}}}', 3 * 2),
        ('{byIds(ids:"a"){name}}', 1),
        # A weight is paid for each element, and what is selected too.
        ("{shaded(shades:[DARK,LIGHT]){name}}", 2 * (10 + 0)),
        ("{shaded(shades:[DARK,LIGHT]){child{name}}}", 2 * (10 + 1)),
        ("{shaded(shades:DARK){name}}", 10),
        ("{shadow(shades:[DARK,LIGHT,DARK])}", 30),
        ("{shadow}", 20),
        ("{shadow(shades:DARK)}", 10),
        ("{shadow(shades:[" + "DARK " * 150 + "])}", 1500),  # no page: nothing ends at 100
        ("{item{...{child{name}}}}", 2),
        ("{item{...A ...A}} fragment A on Item{child{name}}", 1 + 1 + 1),
        # Refused by the field, so no more than a page of it.
        ("{items(first:1000000){nodes{name}}}", 100),
        ("{items(first:0){nodes{name}}}", 20),
        ("{items(first:-5){nodes{name}}}", 20),
        ("{__schema{queryType{name}}}", 1001),
    ],
)
def test_cost(query: str, expected: int) -> None:
    assert cost(query) == expected


def test_cost_with_variables() -> None:
    page = "query($n:Int){items(first:$n){nodes{...A}}} fragment A on Item{items(first:$n){nodes{name}}}"
    assert cost(page, n=3) == 3 * (1 + 3)
    assert cost(page) == 20 * (1 + 20)
    assert cost(page, n=None) == 20 * (1 + 20)
    assert cost("query($n:Int=5){items(first:$n){nodes{name}}}") == 5
    assert cost("query($n:Int=5){items(first:$n){nodes{name}}}", n=2) == 2
    assert cost("query($i:[ID!]!){byIds(ids:$i){name}}", i=["a", "b"]) == 2
    assert cost('query($i:ID!){byIds(ids:[$i,"b"]){name}}', i="a") == 2


@pytest.mark.parametrize(
    ("query", "value", "expected"),
    [
        ("query($v:Int){items(first:$v){nodes{name}}}", 100.0, 100),
        ("query($v:Int){items(first:$v){nodes{name}}}", 7.0, 7),
        ("query($v:Int){items(last:$v){nodes{name}}}", 1e2, 100),
        ("query($v:Int=100){items(first:$v){nodes{name}}}", None, 20),
        ("query($v:[ID!]!){byIds(ids:$v){name}}", "a", 1),
        ("query($v:[ID!]!){byIds(ids:$v){name}}", 5, 1),
        ("query($v:[Shade!]!){shaded(shades:$v){name}}", "DARK", 10),
        ("query($v:[Shade!]!){shaded(shades:$v){name}}", ["DARK", "LIGHT"], 20),
        ("query($v:[Shade!]! = [DARK,LIGHT,DARK]){shaded(shades:$v){name}}", ..., 30),
        ("query($v:[Shade!]! = DARK){shaded(shades:$v){name}}", ..., 10),
    ],
)
def test_variables_count_as_they_are_coerced(query: str, value: Any, expected: int) -> None:
    assert cost(query, **({} if value is ... else {"v": value})) == expected


@pytest.mark.parametrize("value", ["100", 100.5, True, [100], {"a": 1}, 2**31, "x"])
def test_variables_that_do_not_fit_cost_the_least(value: Any) -> None:
    """They are refused when the operation begins, with the reason."""
    assert cost("query($n:Int){items(first:$n){nodes{name}}}", n=value) == 1


def test_the_declared_directive_is_read_from_our_own_schema() -> None:
    from modelharbor.schema import core

    store = DocumentStore(core, SETTINGS)

    def of(query: str) -> int:
        operation = store.get(query).operation(None)
        return store.check_cost(operation, operation.coerce({}))

    assert of("{models(first:50){nodes{name}}}") == 50
    assert of("{models(first:50){totalCount nodes{name}}}") == 50 + 5
    assert of("{models(first:50){nodes{versions(first:2){nodes{number}}}}}") == 50 * (1 + 2)


def aliases(count: int) -> str:
    return "{item{" + " ".join(f"a{i}:name" for i in range(count)) + "}}"


def roots(count: int) -> str:
    return "{" + "hello " * count + "}"


def directives(count: int) -> str:
    return "{item{" + "name @include(if:true) " * count + "}}"


def nested(count: int) -> str:
    return "{item{" + "child{" * (count - 2) + "name" + "}" * (count - 1) + "}"


LIMITS = [
    ("depth", 12, nested),
    ("aliases", 30, aliases),
    ("rootFields", 20, roots),
    ("directives", 50, directives),
]


@pytest.mark.parametrize(("measure", "limit", "make"), LIMITS)
def test_at_the_limit_and_one_over_it(measure: str, limit: int, make: Any) -> None:
    store = DocumentStore(CORE, SETTINGS)
    assert store.get(make(limit)).operation(None)
    with pytest.raises(InvalidDocument) as refused:
        store.get(make(limit + 1))
    assert refused.value.problems[0]["extensions"] == {
        "code": "OPERATION_TOO_COMPLEX",
        "measure": measure,
        "value": limit + 1,
        "limit": limit,
    }


@pytest.mark.parametrize(("measure", "limit", "make"), LIMITS)
def test_fragments_hide_nothing(measure: str, limit: int, make: Any) -> None:
    inside = make(limit + 1).strip()
    spread = f"{{...A}} fragment A on Query{inside}"
    with pytest.raises(OperationTooComplex) as refused:
        measured(spread)
    assert refused.value.details["measure"] == measure
    assert refused.value.details["value"] == limit + 1


@pytest.mark.parametrize(
    ("query", "variables", "expected"),
    [
        ("{hello}", {}, 0),
        ('{hello(name:"a")}', {}, 1),
        ("{shadow(shades:[DARK,LIGHT])}", {}, 3),
        ("{items(first:1){nodes{items(first:2){nodes{name}}}}}", {}, 2),
        # In each row anew.
        ("{items(first:9){nodes{items(first:2){nodes{name}}}}}", {}, 1 + 9),
        ("{items{edges{node{items(last:2,first:null){nodes{name}}}}}}", {}, 20 * 2),
        ('{byIds(ids:["a","b"]){items(first:2){nodes{name}}}}', {}, 3 + 2),
        # Wherever a variable is used.
        ("query($v:[Shade!]!){shadow(shades:$v)}", {"v": ["dark", "light"]}, 3),
        ("query($v:[Shade!]!){shadow(shades:$v) a:shadow(shades:$v)}", {"v": ["dark"]}, 4),
        ("query($v:[Shade!]!){...A} fragment A on Query{shadow(shades:$v)}", {"v": []}, 1),
        ("query($v:ID!){byIds(ids:[$v,$v,$v]){name}}", {"v": "a"}, 4),
        ("query($v:Int){items(first:9){nodes{items(first:$v){nodes{name}}}}}", {"v": 3}, 10),
        # Without variables the least.
        ("query($v:Int){items(first:$v){nodes{items(first:2){nodes{name}}}}}", None, 2),
    ],
)
def test_values_are_counted_as_often_as_they_are_read(
    query: str, variables: Any, expected: int
) -> None:
    assert measured(query).cost.amounts(variables)[1] == expected


def test_objects_count_with_all_that_is_in_them() -> None:
    from modelharbor.schema import core

    query = "query($f:ModelFilter!){models(filter:{or:[$f,{},{task:{eq:%s}}]}){nodes{id}}}"
    [measures] = Guard(core, SETTINGS).measure(parse(query % '"a"')).values()
    # {or:[…]}, its list, two objects in it, {eq:…}, "a"; and the variable.
    assert measures.cost.amounts({"f": {"or": [{}, {"task": {"eq": "b"}}]}})[1] == 6 + 6


def test_input_values_at_the_limit_and_one_over_it() -> None:
    guard = Guard(CORE, SETTINGS.model_copy(update={"max_input_values": 200}))
    [measures] = guard.measure(
        parse("query($v:[ID!]!){byIds(ids:$v){name} a:byIds(ids:$v){name}}")
    ).values()
    assert guard.check_cost(measures, {"v": ["a"] * 99}) == 2 * 99
    with pytest.raises(OperationTooComplex) as refused:
        guard.check_cost(measures, {"v": ["a"] * 100})
    assert refused.value.details == {"measure": "inputValues", "value": 202, "limit": 200}


def test_operations_at_the_limit_and_one_over_it() -> None:
    store = DocumentStore(CORE, SETTINGS)
    assert store.get(" ".join(f"query Q{n}{{hello}}" for n in range(50)))
    with pytest.raises(InvalidDocument) as refused:
        store.get(" ".join(f"query Q{n}{{hello}}" for n in range(51)))
    found = refused.value.problems[0]["extensions"]
    assert (found["measure"], found["value"], found["limit"]) == ("operations", 51, 50)


def test_operations_that_share_variables_by_a_fragment_are_bounded_together() -> None:
    def sharing(uses: int) -> str:
        operations = " ".join(f"query Q{n}($a:ID!){{...F}}" for n in range(40))
        return f"{operations} fragment F on Query{{byIds(ids:[{'$a ' * uses}]){{name}}}}"

    store = DocumentStore(CORE, SETTINGS)
    assert len(store.get(sharing(50)).operations) == 40
    with pytest.raises(InvalidDocument) as refused:
        store.get(sharing(51))
    found = refused.value.problems[0]["extensions"]
    assert (found["measure"], found["value"], found["limit"]) == ("variableUses", 2040, 2000)


def test_fragments_in_fragments_do_not_nest_without_end() -> None:
    """Each is measured where the one before it was measured already, 130 levels higher."""
    levels = 130

    def nest(inside: str) -> str:
        return "...{" * levels + inside + "}" * levels

    operations = "".join(f"query Q{n}{{item{{...F{n}}}}}" for n in range(4))
    fragments = f"fragment F0 on Item{{{nest('name')}}}" + "".join(
        f"fragment F{n} on Item{{{nest(f'...F{n - 1}')}}}" for n in range(1, 4)
    )
    assert measured("{item{...F0}}" + f"fragment F0 on Item{{{nest('name')}}}").depth == 2
    with pytest.raises(OperationTooComplex) as refused:
        Guard(CORE, SETTINGS).measure(parse(operations + fragments))
    assert refused.value.details["measure"] == "depth"


def test_a_message_holds_no_endless_number() -> None:
    doubled = "".join(f"fragment A{n} on Query{{...A{n + 1} ...A{n + 1}}}" for n in range(60))
    with pytest.raises(OperationTooComplex) as refused:
        measured("{...A0}" + doubled + "fragment A60 on Query{hello}")
    assert refused.value.message == (
        "The operation's number of root fields is 2147483647; the limit is 20."
    )
    assert refused.value.details["value"] == 2**31 - 1


def test_cost_at_the_limit_and_one_over_it() -> None:
    store = DocumentStore(CORE, SETTINGS.model_copy(update={"max_cost": 30}))
    operation = store.get("query($n:Int){items(first:$n){nodes{name}}}").operation(None)
    assert store.guard.check_cost(operation.measures, {"n": 30}) == 30
    with pytest.raises(OperationTooComplex) as refused:
        store.guard.check_cost(operation.measures, {"n": 31})
    assert refused.value.details == {"measure": "cost", "value": 31, "limit": 30}


def test_what_no_variable_can_make_fit_is_refused_with_the_document() -> None:
    query = "query($n:Int){items(first:100){nodes{items(first:100){nodes{items(first:$n){totalCount}}}}}}"
    with pytest.raises(InvalidDocument) as refused:
        DocumentStore(CORE, SETTINGS).get(query)
    assert refused.value.problems[0]["extensions"]["measure"] == "cost"


def test_introspection_has_its_own_depth() -> None:
    everything = get_introspection_query(
        specified_by_url=True,
        directive_is_repeatable=True,
        schema_description=True,
        input_value_deprecation=True,
    )
    found = measured(everything)
    assert (found.depth, found.introspection) == (1, 15)
    deep = "{__schema{types{" + "ofType{" * 18 + "name" + "}" * 18 + "}}}"
    with pytest.raises(OperationTooComplex) as refused:
        measured(deep)
    assert refused.value.details == {"measure": "introspectionDepth", "value": 21, "limit": 20}


def test_a_fragment_bomb_is_measured_without_being_spread() -> None:
    """2 to the 140th fields in 5 kB."""
    text = "{item{...F0}}" + "".join(
        f"fragment F{i} on Item{{...F{i + 1} ...F{i + 1}}}" for i in range(140)
    )
    with pytest.raises(OperationTooComplex) as refused:
        measured(text + "fragment F140 on Item{name}")
    assert refused.value.details == {"measure": "fields", "value": 2**31 - 1, "limit": 2000}


def test_a_chain_of_fragments_is_as_deep_as_it_is_long() -> None:
    text = "{item{...F0}}" + "".join(f"fragment F{i} on Item{{...F{i + 1}}}" for i in range(200))
    with pytest.raises(OperationTooComplex) as refused:
        measured(text + "fragment F200 on Item{name}")
    assert refused.value.details["measure"] == "depth"


@pytest.mark.parametrize(
    "query",
    [
        "{item{...A}} fragment A on Item{...B} fragment B on Item{...A}",
        "{item{...A}} fragment A on Item{child{...A}}",
        "{item{...Missing}}",
        "{item{...A}} fragment A on Missing{name}",
        "{missing{child{name}}}",
        "subscription{anything}",
        "{hello{name}}",
    ],
)
def test_what_is_invalid_is_left_to_validation(query: str) -> None:
    assert measured(query)
    with pytest.raises(InvalidDocument) as refused:
        DocumentStore(CORE, SETTINGS).get(query)
    assert refused.value.problems[0]["extensions"]["code"] == "GRAPHQL_VALIDATION_FAILED"


def test_unions_are_walked() -> None:
    union = build_schema("type A{a:A n:Int} type B{n:Int} union U=A|B type Query{u:U}")
    found = Guard(union, SETTINGS).measure(parse("{u{__typename ...on A{a{n}} ...on B{n}}}"))[""]
    assert (found.depth, found.cost.value({})) == (3, 2)
