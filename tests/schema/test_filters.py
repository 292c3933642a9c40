"""Filters: each field, how they combine, and what is refused before anything is read."""

from typing import Any

import pytest

from modelharbor.db.actors import ActorKind
from modelharbor.db.connection import Database
from modelharbor.db.models import AliasEntry, ModelState, Visibility
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version, viewer_of

pytestmark = pytest.mark.anyio

FOUND = """
query Found($filter: ModelFilter) {
  models(filter: $filter, orderBy: {field: NAME, direction: ASC}) { totalCount nodes { name } }
}
"""


async def registry(ask: Asker, database: Database) -> None:
    acme = await insert_actor("Acme", ActorKind.ORGANIZATION)
    bob = await insert_actor("bob")
    first = await insert_model(
        acme,
        "Alpha.1",
        task="text-generation",
        library="transformers",
        license="mit",
        languages=["en", "de"],
        tags=["x", "y"],
        properties={
            "layers": 12,
            "name": "a",
            "quantized": True,
            "base": None,
            "sizes": [1, 9],
        },
        formats=["SAFETENSORS"],
        parameters=7 * 2**33,
        stats={"downloads_30d": 10},
    )
    version = await insert_version(database, first, {"a": 5})
    await database.data["models"].update_one(
        {"_id": first.id},
        {"$set": {"aliases": [AliasEntry(name="prod", version_id=version.id).model_dump()]}},
    )
    await insert_model(bob, "alpha_2", task="text-classification", tags=["y"], license="apache-2.0")
    await insert_model(bob, "beta", visibility=Visibility.INTERNAL, properties={"layers": 24})
    await insert_model(bob, "gone", state=ModelState.ARCHIVED)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["Alpha.1", "alpha_2"]),
        ({"owner": {"eq": "ACME"}}, ["Alpha.1"]),
        ({"owner": {"in": ["bob", "nobody"]}}, ["alpha_2"]),
        ({"name": {"prefix": "ALPHA."}}, ["Alpha.1"]),
        ({"name": {"contains": "a.1"}}, ["Alpha.1"]),
        ({"name": {"contains": ".*"}}, []),
        ({"name": {"prefix": "alpha", "contains": "_"}}, ["alpha_2"]),
        ({"name": {"prefix": "alpha", "contains": "alpha"}}, ["Alpha.1", "alpha_2"]),
        ({"language": {"prefix": "e", "contains": "n"}}, ["Alpha.1"]),
        ({"language": {"prefix": "e", "contains": "d"}}, []),
        ({"language": {"in": ["de"], "prefix": "e"}}, []),
        ({"task": {"prefix": "text-"}}, ["Alpha.1", "alpha_2"]),
        ({"task": {"in": []}}, []),
        ({"library": {"eq": "transformers"}}, ["Alpha.1"]),
        ({"license": {"eq": "apache-2.0"}}, ["alpha_2"]),
        ({"language": {"eq": "de"}}, ["Alpha.1"]),
        ({"tags": {"hasAll": ["x", "y"]}}, ["Alpha.1"]),
        ({"tags": {"hasAny": ["x", "z"]}}, ["Alpha.1"]),
        ({"tags": {"hasNone": ["x"]}}, ["alpha_2"]),
        ({"property": [{"key": "layers", "eq": 12}]}, ["Alpha.1"]),
        ({"property": [{"key": "layers", "gt": 11.5, "lt": 13}]}, ["Alpha.1"]),
        ({"property": [{"key": "name", "eq": "a"}, {"key": "quantized", "eq": True}]}, ["Alpha.1"]),
        ({"property": [{"key": "layers", "exists": False}]}, ["alpha_2"]),
        ({"property": [{"key": "base", "eq": None}]}, ["Alpha.1"]),
        ({"property": [{"key": "missing", "eq": None}]}, []),
        ({"property": [{"key": "sizes", "gt": 4, "lt": 5}]}, []),
        ({"property": [{"key": "sizes", "exists": True}]}, ["Alpha.1"]),
        ({"visibility": ["INTERNAL"]}, []),
        ({"state": ["ARCHIVED"]}, ["gone"]),
        ({"state": ["ACTIVE", "ARCHIVED"], "owner": {"eq": "bob"}}, ["alpha_2", "gone"]),
        ({"state": ["DELETED"]}, []),
        ({"format": ["SAFETENSORS", "GGUF"]}, ["Alpha.1"]),
        ({"sizeBytes": {"gte": "5", "lte": 5}}, ["Alpha.1"]),
        ({"parameters": {"gte": str(7 * 2**33), "lte": 7 * 2**33}}, ["Alpha.1"]),
        ({"parameters": {"gte": 1}}, ["Alpha.1"]),
        ({"parameters": {"gte": str(7 * 2**33 + 1)}}, []),
        ({"parameters": {"lte": 0}}, ["alpha_2"]),
        ({"parameters": {}}, ["Alpha.1", "alpha_2"]),
        ({"not": {"parameters": {"gte": 1}}}, ["alpha_2"]),
        ({"downloads30d": {"lte": 9}}, ["alpha_2"]),
        ({"createdAt": {"gte": "2026-01-01T00:00:00Z"}}, ["Alpha.1", "alpha_2"]),
        ({"createdAt": {"gte": "2026-01-01T02:00:01+02:00"}}, []),
        ({"createdAt": {"lte": "2026-01-01t00:00:00.0009z"}}, ["Alpha.1", "alpha_2"]),
        ({"sizeBytes": {"gte": "-9223372036854775808"}}, ["Alpha.1", "alpha_2"]),
        ({"updatedAt": {"lte": "2025-12-31T23:59:59Z"}}, []),
        ({"hasAlias": "prod"}, ["Alpha.1"]),
        ({"fileSha256": f"{5:064X}"}, ["Alpha.1"]),
        ({"not": {"fileSha256": f"{5:064x}"}}, ["alpha_2"]),
        ({"fileSha256": "f" * 64}, []),
        (
            {"or": [{"library": {"eq": "transformers"}}, {"name": {"eq": "alpha_2"}}]},
            ["Alpha.1", "alpha_2"],
        ),
        ({"or": []}, []),
        ({"and": []}, ["Alpha.1", "alpha_2"]),
        ({"and": [{"tags": {"hasAny": ["y"]}}, {"not": {"tags": {"hasAny": ["x"]}}}]}, ["alpha_2"]),
        ({"not": {}}, []),
        ({"owner": {"eq": None}, "task": None}, ["Alpha.1", "alpha_2"]),
    ],
)
async def test_what_a_filter_finds(
    ask: Asker, database: Database, given: dict[str, Any], names: list[str]
) -> None:
    await registry(ask, database)
    answer = await ask(FOUND, filter=given)
    assert answer.errors == []
    assert [node["name"] for node in answer.data["models"]["nodes"]] == names
    assert answer.data["models"]["totalCount"] == len(names)


def nested(depth: int) -> dict[str, Any]:
    given: dict[str, Any] = {"task": {"eq": "x"}}
    for _ in range(depth - 1):
        given = {"and": [given]}
    return given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nested(6), "A filter nests 5 deep at most."),
        ({"or": [{"task": {"eq": "x"}}] * 50}, "A filter has at most 50 conditions."),
        ({"property": [{"key": "a", "exists": True}] * 51}, "A filter has at most 50 conditions."),
        (
            {"property": [{"key": "$where", "eq": 1}]},
            "A property's key is not empty, has no dot and does not begin with `$`.",
        ),
        (
            {"property": [{"key": "a.b", "eq": 1}]},
            "A property's key is not empty, has no dot and does not begin with `$`.",
        ),
        (
            {"property": [{"key": "a", "eq": {"$ne": None}}]},
            "A property is compared with a text, a number, a boolean or null.",
        ),
        (
            {"property": [{"key": "a", "eq": 2**70}]},
            "A whole number is compared within 64 bits; give a larger one as a text.",
        ),
        ({"or": [{}] * 51}, "A filter has at most 50 conditions."),
        (
            {"or": [{"fileSha256": "0" * 64}] * 2},
            "A filter looks for the contents of one file at most.",
        ),
        (
            {"property": [{"key": "a", "eq": 1e300}]},
            "A number is compared within 64 bits; give a larger one as a text.",
        ),
        ({"task": {"in": ["x"] * 101}}, "A list has 101 values; 100 at most."),
        ({"task": {"eq": "x" * 257}}, "A value has 257 characters; 256 at most."),
        ({"name": {"contains": "a\0b"}}, "A value holds a NUL character; leave it out."),
    ],
)
async def test_filters_that_are_refused(ask: Asker, given: dict[str, Any], message: str) -> None:
    answer = await ask(FOUND, filter=given)
    assert answer.errors == [(message, "BAD_USER_INPUT")]
    assert answer.data is None
    assert answer.commands == []


async def test_a_filter_at_its_limits_passes(ask: Asker) -> None:
    for given in (nested(5), {"or": [{"task": {"eq": "x"}}] * 25}):
        assert (await ask(FOUND, filter=given)).errors == []


@pytest.mark.parametrize(
    "given",
    [
        {"name": {"$ne": None}},
        {"$where": "sleep(2000)||true"},
        {"organization.id": "B"},
        {"name": ["a"]},
        {"state": ["NOPE"]},
        {"fileSha256": "xyz"},
        {"createdAt": {"gte": "yesterday"}},
        {"createdAt": {"gte": "2026-01-01"}},
        {"createdAt": {"gte": "2026-01-01T00:00:00"}},
        {"createdAt": {"gte": "2026-W01-1T00:00:00Z"}},
        {"createdAt": {"gte": "20260101T000000Z"}},
        {"createdAt": {"gte": "2026-01-01T00Z"}},
        {"createdAt": {"gte": "2026-02-30T00:00:00Z"}},
        {"createdAt": {"gte": "9999-12-31T23:59:59-23:59"}},
        {"sizeBytes": {"gte": "9223372036854775808"}},
        {"sizeBytes": {"gte": 1.5}},
    ],
)
async def test_what_is_no_filter_is_refused_by_the_schema(
    ask: Asker, given: dict[str, Any]
) -> None:
    answer = await ask(FOUND, filter=given)
    assert len(answer.errors) == 1
    assert answer.data is None
    assert answer.commands == []


async def test_facets_and_counts(ask: Asker, database: Database) -> None:
    await registry(ask, database)
    document = """
    query($filter: ModelFilter) { models(first: 1, filter: $filter) { totalCount estimatedCount
      facets(fields: [TASK, TAG, LANGUAGE, OWNER, FORMAT, VISIBILITY, LICENSE, LIBRARY], limit: 2) {
        field buckets { value count } } } }
    """
    answer = await ask(document)
    assert answer.errors == []
    assert answer.data["models"] == {
        "totalCount": 2,
        "estimatedCount": 2,
        "facets": [
            {
                "field": "TASK",
                "buckets": [
                    {"value": "text-classification", "count": 1},
                    {"value": "text-generation", "count": 1},
                ],
            },
            {"field": "TAG", "buckets": [{"value": "y", "count": 2}, {"value": "x", "count": 1}]},
            {
                "field": "LANGUAGE",
                "buckets": [{"value": "de", "count": 1}, {"value": "en", "count": 1}],
            },
            {
                "field": "OWNER",
                "buckets": [{"value": "Acme", "count": 1}, {"value": "bob", "count": 1}],
            },
            {"field": "FORMAT", "buckets": [{"value": "SAFETENSORS", "count": 1}]},
            {"field": "VISIBILITY", "buckets": [{"value": "PUBLIC", "count": 2}]},
            {
                "field": "LICENSE",
                "buckets": [{"value": "apache-2.0", "count": 1}, {"value": "mit", "count": 1}],
            },
            {"field": "LIBRARY", "buckets": [{"value": "transformers", "count": 1}]},
        ],
    }
    again = await ask(document)
    assert again.data == answer.data
    assert len(again.commands) == 2, "facets and the estimate came from the cache"
    carol = viewer_of(await insert_actor("carol"))
    others = await ask(document, carol, filter={"property": [{"key": "layers", "exists": True}]})
    assert others.data["models"]["totalCount"] == 2
    assert others.data["models"]["estimatedCount"] == 2
    visibilities = others.data["models"]["facets"][5]["buckets"]
    assert visibilities == [{"value": "INTERNAL", "count": 1}, {"value": "PUBLIC", "count": 1}]
