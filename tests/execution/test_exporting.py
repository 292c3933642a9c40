"""Batches of rows: those that ordinary pages give, each once, whatever changes meanwhile."""

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from typing import Any, Final

import orjson
import pytest
from bson import ObjectId

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.context import Context
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument, ModelState, Visibility
from modelharbor.errors import (
    BadRequest,
    BadUserInput,
    Conflict,
    HarborError,
    NotFound,
    OperationTooComplex,
)
from modelharbor.execution import exporting
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.exporting import Batch, ExportQuery, prepare_export
from modelharbor.exports.columns import Column, ColumnKind
from modelharbor.observability.commands import counted
from modelharbor.schema import schema
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.asking import Asker
from tests.documents import (
    START,
    insert_actor,
    insert_job,
    insert_model,
    insert_version,
    row_of,
    viewer_of,
)
from tests.explaining import Captured, explained

pytestmark = pytest.mark.anyio

FIELDS: Final = """
  id name fullName visibility createdAt tags properties viewerCan aliases { name version { number } }
  owner { __typename login ... on Organization { displayName } }
  stats { likes sizeBytes trendingScore }
  latestVersion { number digest }
  recent: versions(first: 2, orderBy: {field: NUMBER, direction: ASC}) {
    totalCount
    edges { cursor node { number files(first: 3) { nodes { path sizeBytes } pageInfo { hasNextPage } } } }
  }
"""


def context_of(ask: Asker, viewer: Viewer = ANONYMOUS) -> Context:
    return Context(
        database=ask.database,
        cache=ask.cache,
        viewer=viewer,
        links=DownloadLinks(b"k" * 32, "http://test"),
        settings=ask.settings,
        storage=ask.storage,
        request_id="test",
    )


def prepared(ask: Asker, text: str, **variables: Any) -> ExportQuery:
    return prepare_export(schema, ask.settings, text, variables)


async def batches_of(
    ask: Asker,
    query: ExportQuery,
    viewer: Viewer = ANONYMOUS,
    after: str | None = None,
    parent: str | None = None,
) -> AsyncIterator[Batch]:
    async with aclosing(query.batches(lambda: context_of(ask, viewer), after, parent)) as batches:
        async for batch in batches:
            yield batch


async def exported(
    ask: Asker, text: str, viewer: Viewer = ANONYMOUS, **variables: Any
) -> list[Row]:
    query = prepared(ask, text, **variables)
    batches = [batch async for batch in batches_of(ask, query, viewer)]
    assert all(not batch.faults and not batch.truncated for batch in batches)
    rows = [row for batch in batches for row in batch.rows]
    assert await query.count(context_of(ask, viewer)) == len(rows)
    return rows


async def paged(ask: Asker, text: str, viewer: Viewer = ANONYMOUS, size: int = 100) -> list[Row]:
    """By ordinary pages: `text` has `$first` and `$after`."""
    found: list[Row] = []
    after = None
    while True:
        answer = await ask(text, viewer, first=size, after=after)
        assert answer.errors == []
        [page] = answer.data.values()
        found += page["nodes"]
        if not page["pageInfo"]["hasNextPage"]:
            return found
        after = page["pageInfo"]["endCursor"]


async def fill(
    owner: ActorDocument, count: int, start: int = 0, **values: Any
) -> list[ModelDocument]:
    return [
        await insert_model(
            owner,
            f"model-{number:04}",
            # Several with the same time: their ids decide.
            **{"created_at": START + timedelta(seconds=number // 3), **values},
        )
        for number in range(start, start + count)
    ]


async def world(database: Database) -> dict[str, Viewer]:
    """Models of three owners, some of which only some may see; and who asks."""
    acme = await insert_actor("acme", ActorKind.ORGANIZATION, display_name="Acme")
    ada, eve = await insert_actor("ada"), await insert_actor("eve")
    models = [
        *await fill(acme, 20, visibility=Visibility.PRIVATE, tags=["a", "été"]),
        *await fill(ada, 20, 20, visibility=Visibility.INTERNAL),
        *await fill(eve, 20, 40, tags=["a"], properties={"x": [1, None], "y": {"z": 0.5}}),
        *await fill(eve, 3, 60, visibility=Visibility.PRIVATE),
        *await fill(eve, 3, 70, state=ModelState.ARCHIVED),
        *await fill(eve, 3, 80, state=ModelState.DELETED),
    ]
    for model in models[::7]:
        for number in range(1, 5):
            await insert_version(database, model, {f"{each}.bin": each for each in range(number)})
    return {
        "nobody": ANONYMOUS,
        "ada": viewer_of(ada, {acme.id: Role.DOWNLOADER}),
        "eve": viewer_of(eve),
    }


@pytest.mark.parametrize("who", ["nobody", "ada", "eve"])
async def test_rows_are_those_of_ordinary_pages(database: Database, ask: Asker, who: str) -> None:
    viewer = (await world(database))[who]
    wanted = await paged(
        ask,
        f"""query ($first: Int, $after: Cursor) {{
          models(first: $first, after: $after, orderBy: {{field: CREATED_AT, direction: ASC}}) {{
            nodes {{ {FIELDS} }} pageInfo {{ hasNextPage endCursor }}
          }}
        }}""",
        viewer,
        size=10,
    )
    assert len(wanted) == {"nobody": 20, "ada": 60, "eve": 43}[who]

    found = await exported(ask, f"{{ models {{ nodes {{ {FIELDS} }} }} }}", viewer)
    in_edges = await exported(ask, f"{{ models {{ edges {{ node {{ {FIELDS} }} }} }} }}", viewer)
    backwards = await exported(
        ask, f"{{ models(orderBy: {{field: CREATED_AT}}) {{ nodes {{ {FIELDS} }} }} }}", viewer
    )

    assert orjson.dumps(found) == orjson.dumps(wanted)
    assert in_edges == found
    assert backwards == found[::-1]


EVERYTHING: Final = """{ models { nodes { name versions { nodes {
  number files { nodes { path sizeBytes } pageInfo { hasNextPage } } } pageInfo { hasNextPage } } } } }"""


async def test_nested_connections_have_all_their_rows(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await insert_actor("ada")
    small, large = await fill(owner, 2)
    await insert_version(database, small, {"a.bin": 1})
    for _ in range(30):
        await insert_version(database, large, {"b.bin": 2})
    await insert_version(database, large, {f"{each:03}.bin": each for each in range(130)})

    first, second = await exported(ask, EVERYTHING)

    assert [len(node["files"]["nodes"]) for node in first["versions"]["nodes"]] == [1]
    nodes = second["versions"]["nodes"]
    assert [node["number"] for node in nodes] == list(range(31, 0, -1))
    assert [file["path"] for file in nodes[0]["files"]["nodes"]] == [
        f"{each:03}.bin" for each in range(130)
    ]

    # Up to a limit for each parent, which the row and the batch tell.
    monkeypatch.setattr(exporting, "MOST_BELOW", 25)
    query = prepared(ask, EVERYTHING)
    [batch] = [batch async for batch in batches_of(ask, query)]
    assert batch.truncated == 2
    versions = batch.rows[1]["versions"]
    assert (len(versions["nodes"]), versions["pageInfo"]["hasNextPage"]) == (25, True)
    assert len(versions["nodes"][0]["files"]["nodes"]) == 25
    assert batch.rows[0] == first


async def test_batches_are_small_where_much_hangs_below_their_rows(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "ROWS_BELOW", 100)
    owner = await insert_actor("ada")
    models = await fill(owner, 12)
    for model in models:
        for _ in range(3):
            await insert_version(database, model, {f"{each}.bin": each for each in range(10)})
    for _ in range(25):
        await insert_version(database, models[5], {f"{each}.bin": each for each in range(10)})
    query = prepared(ask, EVERYTHING)

    batches = [batch async for batch in batches_of(ask, query)]

    sizes = [
        sum(
            len(version["files"]["nodes"]) + 1
            for row in batch.rows
            for version in row["versions"]["nodes"]
        )
        for batch in batches
    ]
    names = [row["name"] for batch in batches for row in batch.rows]
    assert names == [model.name for model in models]
    # One row has more than a batch may have: it comes alone.
    assert max(sizes) == 28 * 11
    assert [len(b.rows) for b, size in zip(batches, sizes, strict=True) if size > 100] == [1]
    assert sum(sizes) == (11 * 3 + 28) * 11
    assert all(batch.truncated == 0 for batch in batches)


async def test_one_row_is_cut_where_it_holds_too_much(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "ROWS_BELOW", 100)
    monkeypatch.setattr(exporting, "LARGE_PARENTS_AT_ONCE", 2)
    [model] = await fill(await insert_actor("ada"), 1)
    for _ in range(4):
        await insert_version(database, model, {f"{each:02}.bin": each for each in range(40)})

    [batch] = [batch async for batch in batches_of(ask, prepared(ask, EVERYTHING))]

    nodes = batch.rows[0]["versions"]["nodes"]
    assert [len(version["files"]["nodes"]) for version in nodes] == [40, 40, 20, 20]
    assert [version["files"]["pageInfo"]["hasNextPage"] for version in nodes] == [
        False,
        False,
        True,
        True,
    ]
    assert batch.truncated == 2


async def test_large_rows_make_small_batches(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(exporting, "MOST_ROWS", 16)
    await fill(await insert_actor("ada"), 60, summary="x" * 1000)

    batches = [
        batch async for batch in batches_of(ask, prepared(ask, "{ models { nodes { summary } } }"))
    ]

    # Two at least: the second is read while the first is looked at.
    assert [len(batch.rows) for batch in batches] == [16, *[4] * 11]


async def test_no_more_is_read_at_once_than_one_reply_holds(database: Database, ask: Asker) -> None:
    models = await fill(await insert_actor("ada"), 20)
    for model in models:
        await database.data["cards"].insert_one({"_id": model.id, "html": "x" * 1_000_000})

    text = "{ models { nodes { name card { html } } } }"
    batches = [batch async for batch in batches_of(ask, prepared(ask, text))]

    assert [row["name"] for batch in batches for row in batch.rows] == [
        each.name for each in models
    ]
    assert max(len(orjson.dumps(batch.rows)) for batch in batches) < 16_000_000


async def test_more_properties_than_one_reply_holds(database: Database, ask: Asker) -> None:
    """Of the rows themselves, and of those below one of them."""
    models = await fill(await insert_actor("ada"), 20, properties={"a": "x" * 1_000_000})
    version = row_of(await insert_version(database, models[0], {}))
    await database.data["versions"].insert_many(
        [
            {**version, "_id": ObjectId(), "number": number, "properties": {"a": "x" * 1_000_000}}
            for number in range(2, 20)
        ]
    )

    text = "{ models { nodes { name properties versions { nodes { number properties } } } } }"
    batches = [batch async for batch in batches_of(ask, prepared(ask, text))]

    assert [row["name"] for batch in batches for row in batch.rows] == [
        each.name for each in models
    ]
    assert [each["number"] for each in batches[0].rows[0]["versions"]["nodes"]] == [
        *range(19, 0, -1)
    ]
    assert len(batches[0].rows) == 1


async def test_it_goes_on_where_a_batch_ended(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MOST_ROWS", 7)
    await fill(await insert_actor("ada"), 30)
    query = prepared(ask, "{ models { nodes { name } } }")
    batches = [batch async for batch in batches_of(ask, query)]
    assert [len(batch.rows) for batch in batches] == [7, 7, 7, 7, 2]

    for at, batch in enumerate(batches):
        rest = [each.rows async for each in batches_of(ask, query, after=batch.after)]
        assert rest == [each.rows for each in batches[at + 1 :]]


async def test_rows_that_are_there_throughout_come_once_whatever_changes(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MOST_ROWS", 10)
    owner = await insert_actor("ada")
    models = await fill(owner, 100)
    data = database.data["models"]
    seen: list[str] = []
    number = 0

    async for batch in batches_of(ask, prepared(ask, "{ models { nodes { name } } }")):
        seen += [row["name"] for row in batch.rows]
        # Behind, amid and ahead: some come, some go, and all get another place in other orders.
        await data.delete_one({"name": models[(number * 37) % 100].name})
        await fill(owner, 1, 200 + number, created_at=START + timedelta(seconds=number * 3))
        await data.update_many({}, {"$set": {"stats.trending_score": -number, "updated_at": START}})
        number += 1

    deleted = {models[(each * 37) % 100].name for each in range(number)}
    kept = [model.name for model in models if model.name not in deleted]
    assert [name for name in seen if name in set(kept)] == kept
    assert len(seen) == len(set(seen))


async def test_each_batch_has_the_rights_of_its_time(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MOST_ROWS", 5)
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    ada = await insert_actor("ada")
    await fill(acme, 40, visibility=Visibility.PRIVATE)
    viewers = [viewer_of(ada, {acme.id: Role.DOWNLOADER})] * 3

    async def make_context() -> Context:
        return context_of(ask, viewers.pop() if viewers else viewer_of(ada))

    query = prepared(ask, "{ models { nodes { name } } }")
    async with aclosing(query.batches(make_context)) as batches:
        assert [len(batch.rows) async for batch in batches] == [5, 5, 5]


async def test_what_no_plan_can_answer_is_told_by_id(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MOST_ROWS", 8)
    models = await fill(await insert_actor("ada"), 20)
    await database.data["models"].update_one({"_id": models[11].id}, {"$set": {"name": None}})
    await database.data["models"].update_one({"_id": models[15].id}, {"$set": {"display_name": {}}})
    query = prepared(ask, "{ models { nodes { id name displayName } } }")

    batches = [batch async for batch in batches_of(ask, query)]

    names = [row["name"] for batch in batches for row in batch.rows]
    assert names == [model.name for at, model in enumerate(models) if at != 11]
    faults = [fault for batch in batches for fault in batch.faults]
    assert [fault.id for fault in faults] == [
        str(global_id("Model", models[11].id)),
        str(global_id("Model", models[15].id)),
    ]
    rows = [row for batch in batches for row in batch.rows]
    assert rows[14] == {"id": faults[1].id, "name": models[15].name, "displayName": None}


async def test_other_connections(database: Database, ask: Asker) -> None:
    viewers = await world(database)
    eve = viewers["eve"]
    eve_actor = await ActorDocument.find_one({"login": "eve"})
    jobs = [await insert_job(eve_actor) for _ in range(5)]
    text = "{ jobs { nodes { id kind } } }"
    assert [row["id"] for row in await exported(ask, text, eve)] == [
        str(global_id("Job", job.id)) for job in reversed(jobs)
    ]
    assert await exported(ask, text) == []
    assert await exported(ask, "{ uploads { nodes { id } } }", eve) == []

    text = 'query ($name: String!) { model(owner: "eve", name: $name) { versions { nodes { number } } } }'
    found = await exported(ask, text, eve, name="model-0042")
    assert found == [{"number": 4}, {"number": 3}, {"number": 2}, {"number": 1}]
    query = prepared(ask, text, name="none")
    with pytest.raises(NotFound, match=r"There is no `model\.versions` that you may see"):
        await query.count(context_of(ask, eve))
    with pytest.raises(NotFound):
        _ = [batch async for batch in batches_of(ask, query, eve)]

    contents = "query ($hash: SHA256!) { blob(sha256: $hash) { nodes { path } } }"
    held = await exported(ask, contents, eve, hash=f"{2:064x}")
    wanted = await ask(contents.replace("$hash)", "$hash, first: 100)"), eve, hash=f"{2:064x}")
    assert held == wanted.data["blob"]["nodes"]
    assert len(held) > 4


@pytest.mark.parametrize(
    "chain",
    [
        'model(owner: "ada", name: "m") { latestVersion {',
        'a: resolve(ref: "ada/m") { b: model { latestVersion {',
    ],
)
async def test_all_rows_are_of_one_version(
    database: Database, ask: Asker, monkeypatch: pytest.MonkeyPatch, chain: str
) -> None:
    """Where the name that leads to it moves meanwhile, it ends: also where it was left, and is gone on
    with."""
    monkeypatch.setattr(exporting, "MOST_ROWS", 5)
    files = {f"{number:02}.bin": number for number in range(40)}
    model = await insert_model(await insert_actor("ada"), "m")
    await insert_version(database, model, files)
    text = "{" + chain + "files { nodes { path } }" + "}" * (chain.count("{") + 1)
    query = prepared(ask, text)

    done = list[Batch]()

    async def take() -> None:
        async for batch in batches_of(ask, query):
            done.append(batch)
            if len(done) == 1:
                await insert_version(database, model, files)

    with pytest.raises(Conflict, match="was of another object when this began"):
        await take()
    paths = [row["path"] for batch in done for row in batch.rows]
    assert paths == sorted(files)[: len(paths)]
    assert 0 < len(paths) < 40
    with pytest.raises(Conflict):
        _ = [
            batch
            async for batch in batches_of(ask, query, after=done[0].after, parent=done[0].parent)
        ]
    assert len(await exported(ask, text)) == 40


async def test_what_became_of_files_is_counted_too(database: Database, ask: Asker) -> None:
    model = await insert_model(await insert_actor("ada"), "m")
    base = await insert_version(database, model, {f"{each}.bin": each for each in range(7)})
    head = await insert_version(database, model, {f"{each}.bin": each for each in range(3, 12)})
    rows = await exported(
        ask,
        "query ($a: ID!, $b: ID!) { compareVersions(base: $a, head: $b) { files { nodes { path } } } }",
        a=global_id("ModelVersion", base.id),
        b=global_id("ModelVersion", head.id),
    )
    assert len(rows) == 12


async def test_a_batch_costs_one_command_for_each_level(database: Database, ask: Asker) -> None:
    await world(database)
    eve = viewer_of(await insert_actor("other"))
    count = Captured()
    token = counted.set(count)
    try:
        query = prepared(
            ask,
            "{ models { nodes { owner { login } versions { nodes { files { nodes { path } } } } } } }",
        )
        [batch] = [batch async for batch in batches_of(ask, query, eve)]
    finally:
        counted.reset(token)
    assert len(batch.rows) == 40
    assert count.names == ["find models", "find actors", "find versions", "find files"]
    # Those below by one scan each, in the order of their index.
    for (_, command), index in zip(count.commands[2:], ("number", "path"), strict=True):
        stages = await explained(database, command)
        assert {stage["indexName"] for stage in stages if "indexName" in stage} == {index}
        assert "SORT" not in {stage.get("stage") for stage in stages}


@pytest.mark.parametrize("who", ["nobody", "ada"])
async def test_the_walk_is_an_index_scan(
    database: Database, ask: Asker, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MOST_ROWS", 4)  # of 20 or 60
    viewer = (await world(database))[who]
    captured = Captured()
    token = counted.set(captured)
    try:
        query = prepared(ask, "{ models { nodes { name } } }")
        batches = [batch async for batch in batches_of(ask, query, viewer)]
    finally:
        counted.reset(token)
    assert len(batches) == len(captured.commands) == {"nobody": 5, "ada": 15}[who]
    for _, command in captured.commands[:-2]:  # with so few to come it does not matter
        stages = await explained(database, command)
        names = {stage.get("stage") for stage in stages}
        assert not names & {"SORT", "COLLSCAN"}, names
        assert {stage["indexName"] for stage in stages if "indexName" in stage} == {"created"}


async def test_columns_are_known_before_there_is_a_row(ask: Asker) -> None:
    query = prepared(
        ask,
        """{ models { nodes {
          id name parameters createdAt visibility properties tags
          stats { likes trendingScore }
          viewerHasLiked
          owner { login ... on User { kind: __typename avatarUrl } ... on Organization { kind: login } }
          files: versions { nodes { number } pageInfo { hasNextPage } }
        } } }""",
    )
    text, whole = ColumnKind.TEXT, ColumnKind.WHOLE
    assert query.columns == (
        Column("id", text, nullable=False),
        Column("name", text, nullable=False),
        Column("parameters", whole),
        Column("createdAt", ColumnKind.TIME, nullable=False),
        Column("visibility", text, nullable=False),
        Column("properties", ColumnKind.JSON),
        Column("tags", ColumnKind.LIST, nullable=False, of=(Column("item", text, nullable=False),)),
        Column(
            "stats",
            ColumnKind.OBJECT,
            nullable=False,
            of=(
                Column("likes", whole, nullable=False),
                Column("trendingScore", ColumnKind.NUMBER, nullable=False),
            ),
        ),
        Column("viewerHasLiked", ColumnKind.BOOLEAN, nullable=False),
        Column(
            "owner",
            ColumnKind.OBJECT,
            nullable=False,
            of=(
                Column("login", text, nullable=False),
                Column("kind", text, nullable=False),
                Column("avatarUrl", text),
            ),
        ),
        Column(
            "files",
            ColumnKind.OBJECT,
            nullable=False,
            of=(
                Column(
                    "nodes",
                    ColumnKind.LIST,
                    nullable=False,
                    of=(
                        Column(
                            "item",
                            ColumnKind.OBJECT,
                            nullable=False,
                            of=(Column("number", whole, nullable=False),),
                        ),
                    ),
                ),
                Column(
                    "pageInfo",
                    ColumnKind.OBJECT,
                    nullable=False,
                    of=(Column("hasNextPage", ColumnKind.BOOLEAN, nullable=False),),
                ),
            ),
        ),
    )


DEEP: Final = "{ models { nodes { versions(first: 100) { nodes { files(first: 100) { nodes { path } } } } } } }"
REFUSED: Final[list[tuple[str, type[Exception], str]]] = [
    ('mutation { likeModel(input: {id: "x"}) { userErrors { code } } }', BadUserInput, "mutation"),
    ('subscription { jobProgress(id: "x") { cursor } }', BadUserInput, "subscription"),
    ("{ models { nodes { id } } jobs { nodes { id } } }", BadUserInput, "`models`, `jobs`"),
    ("{ a: models { nodes { id } } b: models { nodes { id } } }", BadUserInput, "`a`, `b`"),
    ("{ __typename }", BadUserInput, "`__typename` is none"),
    ("{ __schema { types { name } } }", BadUserInput, "introspection"),
    ("{ viewer { login } }", BadUserInput, "`viewer.login` is none"),
    ('{ node(id: "x") { id } }', BadUserInput, "`node` is none"),
    ('{ suggest(prefix: "a") }', BadUserInput, "`suggest` is none"),
    ('{ search(query: "a") { nodes { __typename } } }', BadUserInput, "`search` has no order"),
    ('{ models(search: "a") { nodes { id } } }', BadUserInput, "`search`"),
    ("{ trending(window: DAY) { nodes { id } } }", BadUserInput, "for its order alone"),
    ("{ models(first: 10) { nodes { id } } }", BadUserInput, "`first`"),
    ("{ models(last: 10, before: null) { nodes { id } } }", BadUserInput, "`before` and `last`"),
    ("{ models(orderBy: {field: LIKES}) { nodes { id } } }", BadUserInput, "CREATED_AT"),
    ("{ models(orderBy: {field: NAME}) { nodes { id } } }", BadUserInput, "CREATED_AT"),
    ("{ models { totalCount } }", BadUserInput, "select the `nodes`"),
    ("{ models @skip(if: true) { nodes { id } } }", BadUserInput, "nothing is left"),
    ("{ models { nodes { id @skip(if: true) } } }", BadUserInput, "nothing is left"),
    (
        "{ models { nodes { id stats { likes @skip(if: true) } } } }",
        BadUserInput,
        "nothing is left",
    ),
    ("{ models { nodes { id } totalCount } }", BadUserInput, "leave out `models.totalCount`"),
    ("{ models { nodes { id } edges { node { id } } } }", BadUserInput, "`models.edges`"),
    ("{ models { edges { node { id } cursor } } }", BadUserInput, "`models.edges.cursor`"),
    ("{ models { nodes { versions(first: 1000) { nodes { id } } } } }", BadUserInput, "1 to 100"),
    (DEEP, OperationTooComplex, "cost of one row"),
    ("{ models { nodes { id } ", InvalidDocument, "Expected Name"),
    ("{ models { nodes { nothing } } }", InvalidDocument, "Cannot query field"),
    ("query ($x: Int!) { models(filter: {minLikes: $x}) { nodes { id } } }", InvalidDocument, ""),
    (
        "query A { models { nodes { id } } } query B { jobs { nodes { id } } }",
        BadRequest,
        "several",
    ),
    ("{" + "models { nodes { latestVersion { model {" * 4 + "id" + "}" * 17, HarborError, ""),
]


@pytest.mark.parametrize(("text", "kind", "message"), REFUSED)
def test_what_cannot_be_exported_is_refused_before_anything_is_read(
    settings: Settings, text: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises((HarborError, InvalidDocument)) as refused:
        prepare_export(schema, settings, text, {})
    assert isinstance(refused.value, (kind, InvalidDocument)), refused.value
    assert message in str(refused.value)


async def test_memory_does_not_grow_with_the_number_of_rows(database: Database, ask: Asker) -> None:
    """Of what is allocated by Python: with four times as many rows it is the same at its peak."""
    await fill(await insert_actor("ada"), 1)
    row = await database.data["models"].find_one()
    assert row is not None
    query = prepared(ask, "{ models { nodes { id name tags stats { likes } } } }")

    async def peak(start: int, end: int) -> int:
        await database.data["models"].insert_many(
            {**row, "_id": ObjectId(), "name": f"m{each}", "name_lower": f"m{each}"}
            for each in range(start, end)
        )
        count = 0
        tracemalloc.start()
        try:
            async for batch in batches_of(ask, query):
                count += len(batch.rows)
            assert count == end + 1
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = await peak(0, 4000)
    assert await peak(4000, 16_000) < few * 1.3
