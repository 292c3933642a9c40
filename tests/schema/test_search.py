"""Search, highlights and completion."""

import pytest

from modelharbor.db.actors import ActorKind
from modelharbor.db.connection import Database
from tests.asking import Asker
from tests.documents import insert_actor, insert_model

pytestmark = pytest.mark.anyio

SEARCH = """
query Search($query: String!, $types: [SearchType!], $first: Int, $after: Cursor, $last: Int, $before: Cursor) {
  search(query: $query, types: $types, first: $first, after: $after, last: $last, before: $before) {
    totalCount
    edges { cursor score highlights { field fragment }
      node { __typename ... on Model { name } ... on Actor { login } } }
    pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
  }
}
"""


async def registry() -> None:
    whale = await insert_actor("whale", ActorKind.ORGANIZATION, display_name="Whale <Watchers>")
    bob = await insert_actor("bob", display_name="Bob of the whale")
    await insert_model(
        bob, "Blue-Whale", summary="A whale & its <song>", tags=["sea", "whale song"]
    )
    await insert_model(bob, "minnow", summary="small")
    await insert_model(whale, "orca", summary="a dolphin")


async def test_all_kinds_are_found_best_first(ask: Asker, database: Database) -> None:
    await registry()
    answer = await ask(SEARCH, query="WHALE")
    assert answer.errors == []
    found = answer.data["search"]
    assert found["totalCount"] == 4
    scores = [edge["score"] for edge in found["edges"]]
    assert scores == sorted(scores, reverse=True)
    named = {
        edge["node"].get("name") or edge["node"]["login"]: edge["highlights"]
        for edge in found["edges"]
    }
    assert named == {
        "Blue-Whale": [
            {"field": "name", "fragment": "Blue-<em>Whale</em>"},
            {"field": "summary", "fragment": "A <em>whale</em> &amp; its &lt;song&gt;"},
            {"field": "tags", "fragment": "<em>whale</em> song"},
        ],
        "whale": [
            {"field": "login", "fragment": "<em>whale</em>"},
            {"field": "displayName", "fragment": "<em>Whale</em> &lt;Watchers&gt;"},
        ],
        "bob": [{"field": "displayName", "fragment": "Bob of the <em>whale</em>"}],
        "orca": [],
    }


async def test_kinds_and_words_narrow(ask: Asker, database: Database) -> None:
    await registry()
    users = await ask(SEARCH, query="whale", types=["USER"])
    assert [e["node"] for e in users.data["search"]["edges"]] == [
        {"__typename": "User", "login": "bob"}
    ]
    both = await ask(SEARCH, query="whale sea")
    assert [e["node"] for e in both.data["search"]["edges"]] == [
        {"__typename": "Model", "name": "Blue-Whale"}
    ]
    none = await ask(SEARCH, query="whale", types=[])
    assert none.data["search"]["edges"] == []
    assert none.data["search"]["totalCount"] == 0


async def test_pages_over_kinds_walk_in_both_directions(ask: Asker, database: Database) -> None:
    await registry()
    whole = (await ask(SEARCH, query="whale")).data["search"]["edges"]
    seen, place = [], None
    for _ in whole:
        answer = await ask(SEARCH, query="whale", first=1, **({"after": place} if place else {}))
        seen += answer.data["search"]["edges"]
        place = answer.data["search"]["pageInfo"]["endCursor"]
    assert seen == whole
    assert answer.data["search"]["pageInfo"]["hasNextPage"] is False
    seen, place = [], None
    for _ in whole:
        answer = await ask(SEARCH, query="whale", last=1, **({"before": place} if place else {}))
        seen = answer.data["search"]["edges"] + seen
        place = answer.data["search"]["pageInfo"]["startCursor"]
    assert seen == whole


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "A search needs a word: letters or digits."),
        (" -\"' ", "A search needs a word: letters or digits."),
        ("x" * 257, "A search has 257 characters; 256 at most."),
        ("a " * 11, "A search has 11 words; 10 at most."),
    ],
)
async def test_searches_that_are_refused(ask: Asker, query: str, message: str) -> None:
    for document in (SEARCH, "query($query: String!) { models(search: $query) { nodes { id } } }"):
        answer = await ask(document, query=query)
        assert answer.errors == [(message, "BAD_USER_INPUT")]
        assert answer.commands == []


async def test_operators_of_text_search_are_words(ask: Asker, database: Database) -> None:
    await registry()
    for query in ("-whale", '"whale', "(whale+)+$"):
        answer = await ask("query($q: String!) { models(search: $q) { nodes { name } } }", q=query)
        assert answer.errors == []
        assert {n["name"] for n in answer.data["models"]["nodes"]} == {"Blue-Whale", "orca"}


async def test_relevance_needs_words(ask: Asker) -> None:
    answer = await ask("{ models(orderBy: {field: RELEVANCE}) { nodes { id } } }")
    assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"]


@pytest.mark.parametrize(
    ("prefix", "first", "found"),
    [
        ("B", 8, ["bob", "bob/Blue-Whale"]),
        ("bob/", 8, ["bob/Blue-Whale", "bob/minnow"]),
        ("bob/", 1, ["bob/Blue-Whale"]),
        ("BOB/MIN", 8, ["bob/minnow"]),
        (".*", 8, []),
        ("nobody/x", 8, []),
    ],
)
async def test_suggestions(
    ask: Asker, database: Database, prefix: str, first: int, found: list[str]
) -> None:
    await registry()
    answer = await ask(
        "query($p: String!, $n: Int!) { suggest(prefix: $p, first: $n) }", p=prefix, n=first
    )
    assert answer.errors == []
    assert answer.data == {"suggest": found}


async def test_suggestions_that_are_refused(ask: Asker) -> None:
    for given in ('prefix: ""', 'prefix: "a", first: 0', 'prefix: "a", first: 51'):
        answer = await ask(f"{{ suggest({given}) }}")
        assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"]
        assert answer.commands == []
