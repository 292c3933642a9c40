"""The actual cost: exact for answers of every kind, and never more than what was requested."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graphql import (
    DocumentNode,
    GraphQLEnumType,
    GraphQLInterfaceType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLResolveInfo,
    GraphQLUnionType,
    OperationDefinitionNode,
    build_schema,
    execute_sync,
    get_named_type,
    get_nullable_type,
    is_abstract_type,
    is_composite_type,
    is_required_argument,
    parse,
    print_schema,
    validate,
)

from modelharbor.execution.answered import actual_cost
from modelharbor.execution.guard import Guard
from modelharbor.execution.price import Prices
from modelharbor.schema import core
from modelharbor.settings import Settings
from tests.http.serving import schema as small

ROOT = Path(__file__).parent.parent.parent
SETTINGS = Settings()
ROOMY = SETTINGS.model_copy(
    update={
        name: 10**9
        for name in type(SETTINGS).model_fields
        if name.startswith("max_") and not name.endswith("bytes")
    }
)
SMALL, REAL = Prices(small._schema), Prices(core)


def of(document: DocumentNode) -> OperationDefinitionNode:
    return next(d for d in document.definitions if isinstance(d, OperationDefinitionNode))


def actual(prices: Prices, query: str, data: Any, **variables: Any) -> int:
    document = parse(query)
    assert validate(prices.schema, document) == []
    return actual_cost(prices, document, of(document), variables, data)


NAMED = {"name": "a"}


@pytest.mark.parametrize(
    ("query", "data", "expected"),
    [
        ("{hello}", None, 0),
        ("{hello}", {"hello": "x"}, 0),
        ("{dear}", {"dear": 7}, 7),
        ("mutation{write}", {"write": "x"}, 10),
        ("{item{name}}", {"item": NAMED}, 1),
        ("{item{child{name}}}", {"item": {"child": NAMED}}, 2),
        # Three rows of a hundred.
        ("{items(first:100){nodes{name}}}", {"items": {"nodes": [NAMED] * 3}}, 3),
        ("{items(first:100){nodes{name}}}", {"items": {"nodes": []}}, 0),
        (
            "{items(first:9){nodes{child{name}}}}",
            {"items": {"nodes": [{"child": NAMED}] * 2}},
            2 * (1 + 1),
        ),
        (
            "{items(first:9){edges{cursor node{child{name}}}}}",
            {"items": {"edges": [{"cursor": "c", "node": {"child": NAMED}}] * 2}},
            2 * (1 + 1),
        ),
        # The same rows both ways are the same rows; what is selected in them is there twice.
        (
            "{items(first:9){edges{node{child{name}}} nodes{child{name}}}}",
            {"items": {"edges": [{"node": {"child": NAMED}}] * 2, "nodes": [{"child": NAMED}] * 2}},
            2 * (1 + 1 + 1),
        ),
        (
            "{items(first:9){a:nodes{name} b:nodes{name} totalCount pageInfo{hasNextPage}}}",
            {
                "items": {
                    "a": [NAMED] * 4,
                    "b": [NAMED] * 4,
                    "totalCount": 4,
                    "pageInfo": {"hasNextPage": False},
                }
            },
            4 + 5 + 1,
        ),
        # No rows came back.
        ("{items(first:9){totalCount}}", {"items": {"totalCount": 9}}, 5),
        (
            "{items(first:9){nodes{items(first:9){nodes{name}}}}}",
            {"items": {"nodes": [{"items": {"nodes": [NAMED] * n}} for n in (0, 2, 5)]}},
            3 + 2 + 5,
        ),
        # Under another name.
        ("{p:items{n:nodes{c:child{name}}}}", {"p": {"n": [{"c": NAMED}]}}, 2),
        # Lists by the rows that came, values that are no lists by what was asked for.
        ('{byIds(ids:["a","b","c"]){child{name}}}', {"byIds": [{"child": NAMED}] * 2}, 2 * 2),
        ("{shaded(shades:[DARK,LIGHT]){child{name}}}", {"shaded": [{"child": NAMED}]}, 11),
        ("{shaded(shades:[DARK,LIGHT]){name}}", {"shaded": []}, 0),
        ("{shadow(shades:[DARK,LIGHT,DARK])}", {"shadow": 3}, 30),
        ("{shadow}", {"shadow": 2}, 20),
        # A list that nothing bounds is one object: the dearest.
        ("{brokenItems{name}}", {"brokenItems": [{"name": None}] * 50}, 1),
        ("{brokenItems{name}}", {"brokenItems": []}, 0),
        # A field that is selected again is answered once.
        ("{item{child{name}} item{child{child{name}}}}", None, 0),
        (
            "{item{child{name} ...A} ...B ...B} fragment A on Item{child{name}}"
            " fragment B on Query{item{name ...A}}",
            {"item": {"child": NAMED, "name": "a"}},
            2,
        ),
        (
            "{item{child{name}} item{child{child{name}}}}",
            {"item": {"child": {"name": "a", "child": NAMED}}},
            3,
        ),
    ],
)
def test_what_was_answered_is_priced(query: str, data: Any, expected: int) -> None:
    assert actual(SMALL, query, data) == expected


def test_variables_are_taken_in() -> None:
    query = "query($s:[Shade!]!){shadow(shades:$s)}"
    assert actual(SMALL, query, {"shadow": 2}, s=["DARK", "LIGHT"]) == 20
    assert actual(SMALL, query, {"shadow": 1}, s="DARK") == 10
    skipped = (
        "query($y:Boolean!,$n:Boolean=false){item @include(if:$n){name} a:item @skip(if:$y){name}"
        " ...@include(if:$y){dear} b:item @skip(if:false) @include(if:true){name}}"
    )
    assert actual(SMALL, skipped, {"dear": 7, "b": NAMED}, y=True) == 7 + 1
    given = {"item": NAMED, "a": NAMED, "b": NAMED}
    assert actual(SMALL, skipped, given, y=False, n=True) == 3


ANY = """query($ids:[ID!]!){nodes(ids:$ids){
  ...on Model{x:card{a:__typename} fullName}
  ...on ModelVersion{x:file(path:"a"){a:__typename}}
  id
}}"""
TYPED = """query($ids:[ID!]!){nodes(ids:$ids){
  t:__typename
  ...on Model{x:card{a:__typename}}
  ...on ModelVersion{x:file(path:"a"){a:__typename}}
}}"""


@pytest.mark.parametrize(
    ("query", "node", "expected"),
    [
        # By the fields that an object has, its type is known.
        (ANY, {"x": {"a": "ModelCard"}, "fullName": "a/b", "id": "1"}, 1 + 20),
        (ANY, {"x": {"a": "ModelFile"}, "id": "1"}, 1 + 1),
        (ANY, {"x": None, "fullName": "a/b", "id": "1"}, 1),
        (ANY, {"id": "1"}, 1),
        (ANY, None, 0),
        # By `__typename` too, under any name.
        (TYPED, {"t": "ModelVersion", "x": {"a": "ModelFile"}}, 1 + 1),
        (TYPED, {"t": "Model", "x": {"a": "ModelCard"}}, 1 + 20),
        # Conditions on interfaces hold for what implements them.
        (
            "query($ids:[ID!]!){nodes(ids:$ids){...on Actor{...on Node{id}...on User{o:organizations{totalCount}}}}}",
            {"id": "1", "o": {"totalCount": 3}},
            1 + 5,
        ),
    ],
)
def test_fragments_count_for_the_types_that_they_are_for(
    query: str, node: Any, expected: int
) -> None:
    assert actual(REAL, query, {"nodes": [node, node, None]}, ids=["a"]) == 2 * expected


def test_facets_and_payloads() -> None:
    query = "{models(first:5){facets(fields:[TASK,TAG],limit:9){field buckets{value}} nodes{id}}}"
    bucket = {"value": "a"}
    facets = [{"field": "TASK", "buckets": [bucket] * 9}, {"field": "TAG", "buckets": []}]
    found = {"models": {"facets": facets, "nodes": [{"id": "1"}]}}
    assert actual(REAL, query, found) == (10 + 1) + 10 + 1
    change = 'mutation{likeModel(input:{id:"x"}){model{owner{login}} userErrors{code}}}'
    done = {"likeModel": {"model": {"owner": {"login": "a"}}, "userErrors": []}}
    assert actual(REAL, change, done) == 10 + 1 + 1
    refused = {"likeModel": {"model": None, "userErrors": [{"code": "NOT_FOUND"}]}}
    assert actual(REAL, change, refused) == 10 + 1


TWIN = build_schema(print_schema(core))
"""The same types, with resolvers that make things up."""


class Inventor:
    """Answers as a server may: pages no longer than asked for, nulls, objects of any type."""

    def __init__(self, chance: random.Random, full: bool = False) -> None:
        self.chance, self.full = chance, full

    def resolve(self, source: Any, info: GraphQLResolveInfo[Any], **given: Any) -> Any:
        kind = info.return_type
        if not isinstance(kind, GraphQLNonNull) and not self.full and self.chance.random() < 0.2:
            return None
        rows = None
        if "first" in given or "last" in given or get_named_type(kind).name.endswith("Connection"):
            asked = given.get("first") or given.get("last") or 20
            rows = asked if self.full else self.chance.randint(0, asked)
        elif "ids" in given or "fields" in given:
            rows = len(given.get("ids") or given.get("fields") or ())
        elif info.field_name in {"nodes", "edges"}:
            rows = source["rows"]
        return self.value(get_nullable_type(kind), rows)

    def value(self, kind: Any, rows: int | None) -> Any:
        if isinstance(kind, GraphQLList):
            length = rows if rows is not None else (1 if self.full else self.chance.randint(0, 3))
            element = kind.of_type
            return [
                None
                if not isinstance(element, GraphQLNonNull)
                and not self.full
                and self.chance.random() < 0.2
                else self.value(get_nullable_type(element), None)
                for _ in range(length)
            ]
        if isinstance(kind, GraphQLObjectType):
            return {"rows": rows}
        if isinstance(kind, GraphQLInterfaceType | GraphQLUnionType):
            return {"__typename": self.chance.choice(TWIN.get_possible_types(kind)).name}
        if isinstance(kind, GraphQLEnumType):
            return next(iter(kind.values.values())).value
        return {"Int": 1, "Float": 1.0, "Boolean": True}.get(kind.name, "x")


def answered(
    document: DocumentNode, variables: dict[str, Any], inventor: Inventor
) -> dict[str, Any] | None:
    result = execute_sync(
        TWIN,
        document,
        variable_values=variables,
        field_resolver=inventor.resolve,
        type_resolver=lambda value, *_: value["__typename"],
    )
    assert not result.errors, result.errors
    return result.data


def both(text: str, variables: dict[str, Any], inventor: Inventor) -> tuple[int, int]:
    """Requested and actual."""
    document = parse(text)
    assert validate(core, document) == [], text
    [measures] = Guard(core, ROOMY).measure(document).values()
    data = answered(document, variables, inventor)
    return (
        measures.cost.value(variables),
        actual_cost(REAL, document, of(document), variables, data),
    )


class Author:
    """Writes operations on our schema: aliases, fragments, repeated and skipped fields, variables."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.names = 0
        self.fragments: list[str] = []

    def operation(self) -> str:
        assert core.query_type
        body = self.selections(core.query_type, 5)
        return (
            "query($n:Int,$yes:Boolean!,$no:Boolean!,$ids:[ID!]!)"
            "{...@skip(if:$yes){models(first:$n){nodes{...@include(if:$no){id}}} nodes(ids:$ids){id}}"
            f"{body}}}" + "".join(self.fragments)
        )

    def selections(self, kind: Any, depth: int) -> str:
        return " ".join(self.selection(kind, depth) for _ in range(self.chance.randint(1, 4)))

    def selection(self, kind: Any, depth: int) -> str:
        roll = self.chance.random()
        if depth > 1 and roll < 0.15:
            return f"...{self.condition()}{{{self.selections(kind, depth - 1)}}}"
        if depth > 1 and roll < 0.4 and is_abstract_type(kind):
            concrete = self.chance.choice(core.get_possible_types(kind))
            return f"...on {concrete.name}{{{self.selections(concrete, depth - 1)}}}"
        if depth > 1 and roll < 0.25:
            name = self.fresh("F")
            body = self.selections(kind, depth - 1)
            self.fragments.append(f" fragment {name} on {kind.name}{{{body}}}")
            return f"...{name} ...{name}{self.condition()}"
        fields = {} if isinstance(kind, GraphQLUnionType) else kind.fields
        usable = [
            name
            for name, field in fields.items()
            if name != "health" and (depth > 0 or not is_composite_type(get_named_type(field.type)))
        ]
        if not usable or roll > 0.95:
            return f"{self.fresh('t')}:__typename"
        name = self.chance.choice(usable)
        return f"{self.fresh('a')}:{self.field(name, fields[name], depth)}"

    def field(self, name: str, field: Any, depth: int) -> str:
        given = []
        for argument, defined in field.args.items():
            if argument == "first":
                given.append(f"first:{self.chance.choice(['1', '3', '7', '$n'])}")
            elif argument in {"ids", "fields"} or is_required_argument(defined):
                given.append(f"{argument}:{self.literal(argument)}")
        arguments = f"({' '.join(given)})" if given else ""
        target: Any = get_named_type(field.type)
        if not is_composite_type(target):
            return f"{name}{arguments}{self.condition()}"
        return f"{name}{arguments}{self.condition()}{{{self.selections(target, depth - 1)}}}"

    def literal(self, argument: str) -> str:
        if argument == "ids":
            return self.chance.choice(['["a","b","c"]', "$ids", '"a"'])
        if argument == "input":
            limit = self.chance.choice(["", ", limit: 3"])
            dates = 'from: "2026-01-01T00:00:00Z", to: "2026-01-02T00:00:00Z"'
            return f"{{metrics: [DOWNLOADS], range: {{{dates}}}{limit}}}"
        if argument == "fields":
            return self.chance.choice(["[TASK,TAG]", "TASK"])
        return f'"{"a" * 64}"'  # references, words, paths and hashes

    def condition(self) -> str:
        return self.chance.choice(["", "", "", " @include(if:$yes)", " @skip(if:$yes)"])

    def fresh(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"


VARIABLES = {"n": 4, "yes": True, "no": False, "ids": ["a", "b"]}


@pytest.mark.parametrize("seed", range(100))
def test_actual_is_no_more_than_requested(seed: int) -> None:
    text = Author(random.Random(seed)).operation()
    requested, found = both(text, VARIABLES, Inventor(random.Random(seed)))
    assert 0 <= found <= requested, text
    fullest = both(text, VARIABLES, Inventor(random.Random(seed), full=True))
    assert 0 <= fullest[1] <= requested, text


def written() -> Iterator[Any]:
    """The operations of the documents and of the measurements."""
    fence = re.compile(r"^```graphql\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for path in (ROOT / "README.md", ROOT / "docs" / "api.md"):
        for number, text in enumerate(fence.findall(path.read_text())):
            yield pytest.param(text, id=f"{path.name} {number}")
    for path in sorted((ROOT / "bench" / "operations").glob("*.graphql")):
        yield pytest.param(path.read_text(), id=path.name)


GIVEN = {
    "after": None,
    "day": "2026-01-01T00:00:00Z",
    "base": "x",
    "expected": 1,
    "filter": {"task": {"eq": "a"}},
    "head": "x",
    "id": "x",
    "name": "b",
    "owner": "a",
    "search": "a",
    "version": "x",
    "words": "a",
}


@pytest.mark.parametrize("text", [*written()])
def test_full_answers_to_our_own_operations_cost_what_was_requested(text: str) -> None:
    """Each list that nothing bounds has one element, and where a type is open it is one that is meant.

    A page of which neither `nodes` nor `edges` is asked for is paid for 20 rows; none comes back.
    """
    names = [d.variable.name.value for d in of(parse(text)).variable_definitions or ()]
    given = {name: GIVEN[name] for name in names}
    for seed in range(5):
        requested, found = both(text, given, Inventor(random.Random(seed)))
        assert found <= requested
    fullest = max(
        both(text, given, Inventor(random.Random(seed), full=True))[1] for seed in range(12)
    )
    rowless = (
        0 if re.search("nodes|edges|node\\(|resolve|mutation|model\\(|analytics", text) else 20
    )
    assert fullest == requested - rowless


def test_an_answer_is_walked_once() -> None:
    """Of a place that objects of many types share, each is looked at once, however deep it is."""
    looked: list[Any] = []

    class Watched(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            looked.append(key)
            return super().get(key, default)

    data: Any = Watched(login="a", id="x")
    text = "owner{login}"
    for _ in range(10):
        text = f"latestVersion{{model{{{text}}}}}"
        data = Watched(latestVersion=Watched(model=data))
    query = f"query($ids:[ID!]!){{nodes(ids:$ids){{...on Model{{{text}}} ...on User{{id}}}}}}"
    assert actual(REAL, query, Watched(nodes=[data]), ids=["a"]) == 1 + 20
    assert len(looked) == 1 + 20 + 1
