"""Requests that are nearly the same are not taken for the same: a kept answer is for its own alone.

The measure is a server without caches.
"""

from collections.abc import AsyncIterator
from itertools import permutations
from random import Random
from typing import Any, Final

import orjson
import pytest

from modelharbor.db.connection import Database
from modelharbor.settings import Settings
from tests.http.pairs import NOBODY, Pair, pair

pytestmark = pytest.mark.anyio
LIST: Final = """query List($first: Int = 3, $filter: ModelFilter, $with: Boolean = false, $order: ModelOrder) {
  models(first: $first, filter: $filter, orderBy: $order) {
    totalCount
    nodes { name summary @include(if: $with) properties }
  }
}"""
ONE: Final = """query One($owner: String, $name: String, $id: ID) {
  model(owner: $owner, name: $name, id: $id) { name summary properties }
}"""
SEARCH: Final = """query Search($words: String!) {
  models(first: 20, search: $words) { totalCount edges { node { name } highlights { fragment } } }
}"""
SEVERAL: Final = """
query First { models(first: 1) { nodes { name } } }
query Second { models(first: 2) { nodes { name } } }
query first { models(first: 3) { nodes { name } } }
"""


@pytest.fixture
async def both(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    async with pair(settings, database, monkeypatch) as both:
        yield both


async def in_any_order(both: Pair, requests: list[dict[str, Any]], least_hits: int = 1) -> None:
    """Each after each other, from hot caches."""
    random, before = Random(1), both.hits
    asked = requests * 4
    random.shuffle(asked)
    for request in asked:
        for principal in (NOBODY, "owner"):
            headers = {**both.headers(principal), "content-type": "application/json"}
            body = request.get("raw") or orjson.dumps(request)
            await both.same(f"{principal}: {body!r}", content=body, headers=headers)
    assert both.hits - before >= least_hits


def given(document: str, *variables: Any) -> list[dict[str, Any]]:
    return [{"query": document, "variables": each} for each in variables]


def raw(document: str, *variables: str) -> list[dict[str, Any]]:
    """Variables as they are written."""
    text = orjson.dumps(document).decode()
    return [{"raw": f'{{"query": {text}, "variables": {each}}}'.encode()} for each in variables]


async def test_numbers(both: Pair) -> None:
    ways = (
        "1",
        "1.0",
        "1e0",
        "10e-1",
        '"1"',
        "true",
        "[1]",
        "-0",
        "0",
        "2",
        "1.5",
        "1e400",
        "null",
    )
    await in_any_order(both, raw(LIST, *[f'{{"first": {way}}}' for way in ways]))
    properties = [
        f'{{"filter": {{"property": [{{"key": "size", "eq": {way}}}]}}}}'
        for way in ("3", "3.0", '"3"', '"big"', "true", "1", "null", "[3]", "9007199254740993")
    ]
    await in_any_order(both, raw(LIST, *properties))
    large = [
        f'{{"filter": {{"sizeBytes": {{"gte": {way}}}}}}}'
        for way in ("9007199254740992", "9007199254740993", '"9007199254740993"', "1e3", "1000")
    ]
    await in_any_order(both, raw(LIST, *large))


async def test_nothing_null_and_what_is_left_out(both: Pair) -> None:
    texts = ("{}", '{"first": null}', '{"first": 3}', '{"filter": null}', '{"filter": {}}', "null")
    await in_any_order(both, raw(LIST, *texts))
    await in_any_order(both, [{"query": LIST}, {"query": LIST, "variables": None}])
    ways = [
        '{"filter": {"task": null}}',
        '{"filter": {"task": {}}}',
        '{"filter": {"task": {"eq": null}}}',
        '{"filter": {"task": {"in": []}}}',
        '{"filter": {"and": []}}',
        '{"filter": {"or": []}}',
        '{"filter": {"state": []}}',
        '{"filter": {"property": [{"key": "size"}]}}',
        '{"filter": {"property": [{"key": "size", "eq": null}]}}',
        '{"with": null}',
        '{"with": true}',
        '{"with": false}',
    ]
    await in_any_order(both, raw(LIST, *ways))


async def test_the_order_of_variables_and_of_what_is_in_them(both: Pair) -> None:
    parts = ['"first": 2', '"with": true', '"filter": {"tags": {"hasAny": ["nlp", "tiny"]}}']
    texts = ["{" + ", ".join(order) + "}" for order in permutations(parts)]
    await in_any_order(both, raw(LIST, *texts), least_hits=len(texts))
    nested = [
        '{"filter": {"tags": {"hasAny": ["nlp"], "hasNone": ["tiny"]}}}',
        '{"filter": {"tags": {"hasNone": ["tiny"], "hasAny": ["nlp"]}}}',
        '{"filter": {"tags": {"hasAny": ["tiny"], "hasNone": ["nlp"]}}}',
        '{"filter": {"tags": {"hasAny": "nlp"}}}',
        '{"filter": {"tags": {"hasAny": [["nlp"]]}}}',
        '{"filter": {"tags": {"hasAny": ["nlp", "nlp"]}}}',
        '{"filter": {"tags": {"hasAny": ["nlp,tiny"]}}}',
        '{"filter": {"and": [{"tags": {"hasAny": ["nlp"]}}, {"tags": {"hasAny": ["tiny"]}}]}}',
        '{"filter": {"or": [{"tags": {"hasAny": ["nlp"]}}, {"tags": {"hasAny": ["tiny"]}}]}}',
    ]
    await in_any_order(both, raw(LIST, *nested))
    orders = [
        f'{{"order": {{"field": "{field}", "direction": "{way}"}}}}'
        for field in ("NAME", "CREATED")
        for way in ("ASC", "DESC", "asc")
    ]
    await in_any_order(both, raw(LIST, *orders))


async def test_variables_that_nothing_uses_and_names_that_come_twice(both: Pair) -> None:
    texts = [
        '{"first": 1}',
        '{"first": 1, "unused": 1}',
        '{"first": 1, "unused": 2}',
        '{"First": 1}',
        '{"first ": 1}',
        '{"first": 1, "first": 2}',
        '{"first": 2, "first": 1}',
        '{"__proto__": 1}',
        '{"": 1}',
        '{"f\\u0069rst": 1}',
        '{"first\\u0000": 1}',
    ]
    await in_any_order(both, raw(LIST, *texts))


async def test_texts_that_look_alike(both: Pair) -> None:
    words = (
        '"été"', '"e\\u0301te\\u0301"', '"\\u00e9t\\u00e9"', '"ETE"', '"Été"', '"ete"', '"whale"',
        '"WHALE"', '"whale "', '"whale\\u00a0"', '"wha\\u200ble"', '"whale\\u0000"', '"\\uff57hale"',
        '"tiny whale"', '"whale tiny"', '"\\"whale\\""', '"-whale"',
    )  # fmt: skip
    await in_any_order(both, raw(SEARCH, *[f'{{"words": {each}}}' for each in words]))
    row = next(row for row in both.rows["models"] if row["visibility"] == "PUBLIC")
    owner, name = row["owner_login"], row["name"]
    named: list[dict[str, Any]] = [
        {"owner": owner, "name": name},
        {"owner": owner.upper(), "name": name.upper()},
        {"owner": f"{owner} ", "name": name},
        {"owner": name, "name": owner},
        {"owner": f"{owner}/{name}", "name": ""},
        {"owner": "", "name": f"{owner}/{name}"},
        {"owner": owner + name[:1], "name": name[1:]},
        {"owner": owner},
        {"name": name},
        {"owner": owner, "name": name, "id": None},
        {"owner": owner, "name": name, "id": ""},
        {"owner": [owner], "name": name},
        {"owner": {"eq": owner}, "name": name},
    ]
    await in_any_order(both, given(ONE, *named))


async def test_the_same_document_otherwise_written(both: Pair) -> None:
    variants = [
        LIST,
        LIST.replace("\n", " "),
        LIST.replace("  ", "\t"),
        LIST + "\n",
        "\ufeff" + LIST,
        LIST.replace(" {", "{"),
        LIST.replace("first: $first,", "first: $first"),
        LIST + " # 1",
        LIST + " # 2",
        LIST.replace("$first: Int = 3", "$first: Int = 2"),
        LIST.replace("= false", "= true"),
        LIST.replace("query List", "query Lists"),
        LIST.replace("@include", "@skip"),
    ]
    await in_any_order(both, [{"query": each, "variables": {}} for each in variants])


async def test_which_operation_of_a_document(both: Pair) -> None:
    names = (
        "First",
        "Second",
        "first",
        "FIRST",
        "",
        None,
        "Third",
        " First",
        "First\0",
        1,
        ["First"],
    )
    requests = [{"query": SEVERAL, "operationName": each} for each in names]
    await in_any_order(both, [*requests, {"query": SEVERAL}])
    single = [{"query": LIST, "operationName": each} for each in ("List", "", None, "list", "Lis")]
    await in_any_order(both, single)


async def test_what_does_not_belong_to_the_operation(both: Pair) -> None:
    requests: list[dict[str, Any]] = [
        {"query": LIST},
        {"query": LIST, "extensions": {}},
        {"query": LIST, "extensions": {"a": 1}},
        {"query": LIST, "extensions": None},
        {"query": LIST, "viewer": "ada"},
        {"query": LIST, "documentId": None},
        {"query": LIST, "documentId": ""},
        {"query": LIST, "documentId": 1},
        {"query": LIST, "extensions": {"persistedQuery": {"version": 1, "sha256Hash": "0" * 64}}},
    ]
    await in_any_order(both, requests)


async def test_variables_as_large_as_they_may_be(both: Pair) -> None:
    tags = [f"tag {number}" for number in range(100)]
    long = ["w" * 200 + end for end in ("a", "b")]
    several: list[dict[str, Any]] = [
        {"filter": {"tags": {"hasAny": tags}}},
        {"filter": {"tags": {"hasAny": tags[:-1]}}},
        {"filter": {"tags": {"hasAny": [*tags[:-1], "nlp"]}}},
        {"filter": {"tags": {"hasAny": [*tags, "nlp"]}}},
        *[{"filter": {"name": {"contains": each}}} for each in long],
        {"unused": "x" * 500_000},
        {"unused": ["x"] * 6000},
        {"filter": {"tags": {"hasAny": ["nlp"] * 4000}}},
    ]
    await in_any_order(both, given(LIST, *several))
    deep = '{"and": [' * 200 + "{}" + "]}" * 200
    await in_any_order(both, raw(LIST, f'{{"filter": {deep}}}', '{"filter": {}}'))
