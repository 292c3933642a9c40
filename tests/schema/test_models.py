"""Models as the client reads them."""

import pytest

from modelharbor.db.actors import ActorKind
from modelharbor.db.connection import Database
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version

pytestmark = pytest.mark.anyio

PAGE = """
query Page($first: Int, $after: Cursor) {
  models(first: $first, after: $after, orderBy: {field: DOWNLOADS_30D}) {
    totalCount
    edges { cursor node {
      id fullName owner { __typename login } stats { likes downloads30d sizeBytes }
      aliases { name }
      latestVersion { number files(first: 10) { totalCount nodes { path sizeBytes } } }
    } }
    pageInfo { hasNextPage hasPreviousPage endCursor }
  }
}
"""


async def test_a_page_costs_the_same_whatever_its_size(ask: Asker, database: Database) -> None:
    owner = await insert_actor("acme", ActorKind.ORGANIZATION)
    for index in range(30):
        model = await insert_model(owner, f"model-{index}", stats={"downloads_30d": index})
        await insert_version(database, model, {f"f{i:02}": i + 1 for i in range(12)})
    document = PAGE.replace("totalCount\n    edges", "edges").replace(
        "{ totalCount nodes", "{ nodes"
    )
    for first in (1, 30):
        answer = await ask(document, first=first)
        assert answer.errors == []
        edges = answer.data["models"]["edges"]
        assert len(edges) == first
        assert edges[0]["node"]["fullName"] == "acme/model-29"
        assert [f["path"] for f in edges[0]["node"]["latestVersion"]["files"]["nodes"]] == [
            f"f{i:02}" for i in range(10)
        ]
        assert len(answer.commands) == 4, answer.commands


async def test_counts_of_lists_come_from_counters(ask: Asker, database: Database) -> None:
    owner = await insert_actor("acme", ActorKind.ORGANIZATION)
    model = await insert_model(owner, "m")
    await insert_version(database, model, {"a": 1, "b": 2, "c": 3})
    answer = await ask(
        '{model(owner:"ACME", name:"M"){versions(first:1){totalCount nodes{number files(first:1){totalCount nodes{path}}}}}}'
    )
    assert answer.errors == []
    assert answer.data == {
        "model": {
            "versions": {
                "totalCount": 1,
                "nodes": [{"number": 1, "files": {"totalCount": 3, "nodes": [{"path": "a"}]}}],
            }
        }
    }
