"""Keyset pages against a plain sorted list, forwards and backwards, while rows come and go."""

import random
from datetime import timedelta
from typing import Any

import pytest

from modelharbor.db.connection import Database
from tests.asking import Asker
from tests.documents import START, insert_actor, insert_model, insert_version

pytestmark = pytest.mark.anyio

STEP = """
query Step($first: Int, $after: Cursor, $last: Int, $before: Cursor, $field: ModelOrderField!,
           $direction: OrderDirection!, $search: String) {
  models(first: $first, after: $after, last: $last, before: $before, search: $search,
         orderBy: {field: $field, direction: $direction}) {
    edges { cursor score node { name } }
    pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
  }
}
"""


async def registry(database: Database, count: int = 23) -> list[dict[str, Any]]:
    """Models with many equal sort values; answers what each is sorted by."""
    chance = random.Random(7)
    owner = await insert_actor("acme")
    found = []
    for index in range(count):
        stats = {
            "trending_score": chance.choice([0.5, 1.25, 3.0]),
            "downloads_30d": chance.randrange(3),
            "downloads_all": chance.randrange(4) * 2**40,
            "likes": chance.randrange(2),
            "size_bytes": chance.randrange(3) * 10**12,
        }
        moments: dict[str, Any] = {
            "created_at": START + timedelta(milliseconds=chance.randrange(3)),
            "updated_at": START + timedelta(days=chance.randrange(3)),
        }
        parameters = index % 4 * 2**33  # 0: not known
        words = " ".join(["whale"] * chance.randrange(1, 4))
        model = await insert_model(
            owner, f"m{index:02}", stats=stats, summary=words, parameters=parameters, **moments
        )
        row = {"id": str(model.id), "name": model.name, "parameters": parameters}
        found.append({**row, **stats, **moments})
    return found


PATHS = {
    "TRENDING": "trending_score",
    "DOWNLOADS_30D": "downloads_30d",
    "DOWNLOADS_ALL_TIME": "downloads_all",
    "LIKES": "likes",
    "SIZE": "size_bytes",
    "PARAMETERS": "parameters",
    "UPDATED_AT": "updated_at",
    "CREATED_AT": "created_at",
    "NAME": "name",
}


@pytest.mark.parametrize("direction", ["ASC", "DESC"])
async def test_every_order_walks_like_a_sorted_list(
    ask: Asker, database: Database, direction: str
) -> None:
    rows = await registry(database)
    for field, path in PATHS.items():
        expected = [
            row["name"]
            for row in sorted(
                rows, key=lambda row: (row[path], row["id"]), reverse=direction == "DESC"
            )
        ]
        assert await walked(ask, field, direction, forwards=True) == expected, field
        assert await walked(ask, field, direction, forwards=False) == expected, field


async def test_relevance_walks_in_both_directions(ask: Asker, database: Database) -> None:
    await registry(database)
    answer = await ask(STEP, first=100, field="RELEVANCE", direction="DESC", search="whale")
    assert answer.errors == []
    edges = answer.data["models"]["edges"]
    scores = [edge["score"] for edge in edges]
    assert len(edges) == 23
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    expected = [edge["node"]["name"] for edge in edges]
    assert await walked(ask, "RELEVANCE", "DESC", forwards=True, search="whale") == expected
    assert await walked(ask, "RELEVANCE", "DESC", forwards=False, search="whale") == expected


async def walked(
    ask: Asker, field: str, direction: str, *, forwards: bool, search: str | None = None
) -> list[str]:
    """All names, page by page."""
    size, end, onwards = ("first", "endCursor", "hasNextPage")
    if not forwards:
        size, end, onwards = ("last", "startCursor", "hasPreviousPage")
    place, names, pages = None, list[str](), 0
    while True:
        given: dict[str, Any] = {size: 5, "field": field, "direction": direction}
        if place:
            given["after" if forwards else "before"] = place
        answer = await ask(STEP, search=search, **given)
        assert answer.errors == []
        assert len(answer.commands) == 1
        page = answer.data["models"]
        found = [edge["node"]["name"] for edge in page["edges"]]
        names = names + found if forwards else found + names
        pages += 1
        if not page["pageInfo"][onwards]:
            assert pages == 5
            return names
        place = page["pageInfo"][end]


async def test_pages_do_not_shift_while_rows_come_and_go(ask: Asker, database: Database) -> None:
    rows = await registry(database)
    chance = random.Random(3)
    before = {row["name"] for row in rows}
    owner = await database.data["actors"].find_one({})
    assert owner is not None
    place, seen, gone = None, list[str](), set[str]()
    while True:
        answer = await ask(STEP, first=4, after=place, field="LIKES", direction="DESC")
        page = answer.data["models"]
        seen += [edge["node"]["name"] for edge in page["edges"]]
        if not page["pageInfo"]["hasNextPage"]:
            break
        place = page["pageInfo"]["endCursor"]
        leaving = chance.choice(sorted(before - gone))
        gone.add(leaving)
        await database.data["models"].delete_one({"name": leaving})
        template = await database.data["models"].find_one({})
        assert template is not None
        name = f"new{len(gone)}"
        del template["_id"]
        template["stats"]["likes"] = chance.randrange(2)
        await database.data["models"].insert_one({**template, "name": name, "name_lower": name})
    assert len(seen) == len(set(seen)), "a row came twice"
    assert before - gone <= set(seen), "a row that stayed was missed"


@pytest.mark.parametrize("field", [*PATHS, "RELEVANCE"])
async def test_a_search_walks_in_every_order(ask: Asker, database: Database, field: str) -> None:
    await registry(database)
    whole = await ask(STEP, first=100, field=field, direction="DESC", search="whale")
    expected = [edge["node"]["name"] for edge in whole.data["models"]["edges"]]
    assert len(expected) == 23
    for forwards in (True, False):
        found = await walked(ask, field, "DESC", forwards=forwards, search="whale")
        assert found == expected


async def test_a_cursor_of_the_longest_path_is_taken(ask: Asker, database: Database) -> None:
    model = await insert_model(await insert_actor("acme"), "m")
    paths = ["\U0001f40b" * 1023 + end for end in "ab"]
    await insert_version(database, model, dict.fromkeys(paths, 1))
    document = """
    query($after: Cursor) { model(owner: "acme", name: "m") { latestVersion {
      files(first: 1, after: $after) { nodes { path } pageInfo { endCursor } } } } }
    """
    after, seen = None, []
    for _ in paths:
        answer = await ask(document, after=after)
        assert answer.errors == []
        page = answer.data["model"]["latestVersion"]["files"]
        seen += [node["path"] for node in page["nodes"]]
        after = page["pageInfo"]["endCursor"]
    assert seen == paths


async def test_a_range_between_two_cursors(ask: Asker, database: Database) -> None:
    await registry(database)
    whole = await ask(STEP, first=100, field="LIKES", direction="DESC")
    edges = whole.data["models"]["edges"]
    answer = await ask(
        STEP,
        first=100,
        after=edges[3]["cursor"],
        before=edges[9]["cursor"],
        field="LIKES",
        direction="DESC",
    )
    assert answer.data["models"]["edges"] == edges[4:9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("first: 0", "`first` is 0; it takes 1 to 100."),
        ("first: 101", "`first` is 101; it takes 1 to 100."),
        ("last: -1", "`last` is -1; it takes 1 to 100."),
        ("first: 1, last: 1", "Give `first` or `last`, not both."),
    ],
)
async def test_sizes_that_are_refused(ask: Asker, arguments: str, message: str) -> None:
    answer = await ask(f"{{ models({arguments}) {{ nodes {{ id }} }} }}")
    assert answer.errors == [(message, "BAD_USER_INPUT")]
    assert answer.data is None
    assert answer.commands == []


async def test_cursors_that_are_refused(ask: Asker, database: Database) -> None:
    await registry(database, 2)
    likes = await ask(STEP, first=1, field="LIKES", direction="DESC")
    foreign = likes.data["models"]["pageInfo"]["endCursor"]
    for cursor in (
        foreign,
        "",
        "x",
        "ÿ",
        "AAAA",
        "W10",
        "bnVsbA",
        "WyItc3RhdHMuc2l6ZV9ieXRlcyIsMSwxXQ",
        "a" * 5000,
    ):
        answer = await ask(STEP, first=1, after=cursor, field="SIZE", direction="DESC")
        assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"], cursor
        assert answer.commands == []


async def test_a_page_of_each_parent_goes_on_from_a_cursor(ask: Asker, database: Database) -> None:
    owner = await insert_actor("acme")
    for name in ("a", "b"):
        model = await insert_model(owner, name)
        for count in range(1, 6):
            await insert_version(database, model, {f"f{i}": i + 1 for i in range(count)})
    document = """
    query Files($after: Cursor, $filter: ModelVersionFilter) {
      models(orderBy: {field: NAME, direction: ASC}) { nodes { name
        versions(first: 2, after: $after, filter: $filter) {
          totalCount nodes { number } pageInfo { hasNextPage endCursor } } } } }
    """
    first = await ask(document)
    assert first.errors == []
    pages = [node["versions"] for node in first.data["models"]["nodes"]]
    assert [[n["number"] for n in page["nodes"]] for page in pages] == [[5, 4], [5, 4]]
    assert [page["totalCount"] for page in pages] == [5, 5]
    assert len(first.commands) == 3
    second = await ask(document, after=pages[0]["pageInfo"]["endCursor"])
    after = [node["versions"] for node in second.data["models"]["nodes"]]
    assert [n["number"] for n in after[0]["nodes"]] == [3, 2]
    filtered = await ask(document, filter={"status": ["DRAFT"]})
    assert [n["versions"]["totalCount"] for n in filtered.data["models"]["nodes"]] == [0, 0]
