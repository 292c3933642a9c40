"""What a page costs does not grow with what lies behind it."""

import pytest
from bson import ObjectId

from modelharbor.db.connection import Database
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version, row_of
from tests.explaining import Captured, keys_examined

pytestmark = pytest.mark.anyio

PAGE = """
query Page($first: Int!) {
  models(first: $first, orderBy: {field: NAME, direction: ASC}) { nodes {
    fullName owner { login } aliases { name } stats { downloads30d likes sizeBytes }
    latestVersion { number files(first: 10) { nodes { path sizeBytes } } }
  } }
}
"""


async def test_files_of_a_page(ask: Asker, database: Database) -> None:
    """50 models cost as few commands as one, and 12 index keys a parent, with 100,000 files too."""
    owner = await insert_actor("acme")
    for index in range(50):
        model = await insert_model(owner, f"m{index:02}")
        version = await insert_version(database, model, {"a": 1})
        many = 100_000 if index == 7 else 12
        await database.data["files"].insert_many(
            [{"version_id": version.id, "path": f"b{n:06}", "size_bytes": 1} for n in range(many)],
            ordered=False,
        )
    for first in (1, 50):
        captured = Captured()
        answer = await ask(PAGE, count=captured, first=first)
        assert answer.errors == []
        assert len(answer.commands) == 4
        nodes = answer.data["models"]["nodes"]
        assert [len(node["latestVersion"]["files"]["nodes"]) for node in nodes] == [10] * first
        examined = await keys_examined(database, captured, "files")
        assert 0 < examined <= 12 * first


async def test_versions_of_a_model(ask: Asker, database: Database) -> None:
    """The first page of 200,000 versions examines as many index keys as that of 10; so do the next."""
    owner = await insert_actor("acme")
    document = """
    query Versions($name: String!, $after: Cursor) { model(owner: "acme", name: $name) {
      versions(first: 5, after: $after) { totalCount nodes { number } pageInfo { endCursor } } } }
    """
    examined: dict[str, list[int]] = {}
    for name, many in (("few", 10), ("many", 200_000)):
        model = await insert_model(owner, name, stats={"versions": many})
        template = {"model_id": model.id, "status": "READY"}
        for start in range(0, many, 20_000):
            await database.data["versions"].insert_many(
                [
                    {**template, "_id": ObjectId(), "number": number + 1}
                    for number in range(start, min(many, start + 20_000))
                ],
                ordered=False,
            )
        after = None
        for page in range(2):
            captured = Captured()
            answer = await ask(document, count=captured, name=name, after=after)
            assert answer.errors == []
            found = answer.data["model"]["versions"]
            assert found["totalCount"] == many
            assert [n["number"] for n in found["nodes"]] == [
                many - 5 * page - offset for offset in range(5)
            ]
            after = found["pageInfo"]["endCursor"]
            examined.setdefault(name, []).append(
                await keys_examined(database, captured, "versions")
            )
    assert examined["few"][0] == examined["many"][0] == 6
    assert examined["many"][1] == 6


async def test_ties_are_not_walked_through(ask: Asker, database: Database) -> None:
    """Amid thousands of rows with an equal sort value the next page examines few keys."""
    owner = await insert_actor("acme")
    model = await insert_model(owner, "m")
    template = row_of(model)
    await database.data["models"].insert_many(
        [
            {**template, "_id": ObjectId(), "name": f"m{n}", "name_lower": f"m{n}"}
            for n in range(5_000)
        ]
    )
    document = """
    query($after: Cursor) { models(first: 10, after: $after, orderBy: {field: LIKES}) {
      nodes { name } pageInfo { endCursor } } }
    """
    after = None
    for _ in range(4):
        captured = Captured()
        answer = await ask(document, count=captured, after=after)
        assert len(answer.data["models"]["nodes"]) == 10
        after = answer.data["models"]["pageInfo"]["endCursor"]
        assert await keys_examined(database, captured, "models") <= 14
