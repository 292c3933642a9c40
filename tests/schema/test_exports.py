"""`bulkExport`, and where its file is."""

from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from typing import Any, Final

import pytest

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.db.tokens import Permission
from modelharbor.resolvers.persisted import Publication, publish, retire
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.documents import insert_actor, insert_job, viewer_of

pytestmark = pytest.mark.anyio
EXPORT: Final = """mutation ($input: BulkExportInput!) {
  bulkExport(input: $input) { job { id kind state downloadUrl } userErrors { code message path } }
}"""
GOOD: Final = "query ($n: BigInt) { models(filter: {sizeBytes: {gte: $n}}) { nodes { id } } }"


async def export(ask: Asker, viewer: Any, **given: Any) -> Any:
    answer = await ask(EXPORT, viewer, input=given)
    assert answer.errors == []
    return answer.data["bulkExport"]


async def test_an_export_is_a_job(ask: Asker, database: Database) -> None:
    ada = await insert_actor("ada")
    viewer = viewer_of(ada)
    made = await export(ask, viewer, query=GOOD, variables={"n": "7"}, idempotencyKey="k")
    [job] = await database.data["jobs"].find().to_list()
    assert made == {
        "job": {
            "id": global_id("Job", job["_id"]),
            "kind": "EXPORT",
            "state": "QUEUED",
            "downloadUrl": None,
        },
        "userErrors": [],
    }
    assert job["input"] == {
        "query": GOOD,
        "variables": '{"n":"7"}',
        "format": "JSONL",
        "compression": "ZSTD",
        "base_url": "http://test",
    }
    assert job["principals"] == ["operator", f"actor:{ada.id}"]
    again = await export(ask, viewer, query=GOOD, variables={"n": "7"}, idempotencyKey="k")
    assert again == made
    other = await export(ask, viewer, query=GOOD, variables={"n": "8"}, idempotencyKey="k")
    assert [error["code"] for error in other["userErrors"]] == ["CONFLICT"]
    for _ in range(ask.settings.max_exports - 1):
        assert (await export(ask, viewer, query=GOOD))["userErrors"] == []
    more = await export(ask, viewer, query=GOOD)
    assert [error["code"] for error in more["userErrors"]] == ["QUOTA_EXCEEDED"]


async def test_where_only_published_operations_run_so_does_this(
    ask: Asker, database: Database
) -> None:
    digest = sha256(GOOD.encode()).hexdigest()
    await publish(database, "site", [Publication("good", GOOD, digest, None, "query", [])], {})
    viewer, trusted = viewer_of(await insert_actor("ada")), ask.changed(trusted_only=True)

    assert (await export(trusted, viewer, query=GOOD))["userErrors"] == []
    other = await export(trusted, viewer, query="{ models { nodes { id } } }")
    assert [(error["code"], error["path"]) for error in other["userErrors"]] == [
        ("FORBIDDEN", ["query"])
    ]
    await retire(database, ["good"])
    assert (await export(trusted, viewer, query=GOOD))["job"] is None
    root = viewer_of(await insert_actor("root", is_operator=True))
    operator = replace(root, scopes=frozenset(Permission))
    assert (await export(trusted, operator, query=GOOD))["userErrors"] == []


NESTED: Final = "{ models { nodes { versions(first: 100) { nodes { files(first: 100) { nodes { path } } } } } } }"
REFUSED: Final[list[tuple[dict[str, Any], str, str]]] = [
    ({"query": "{ models { nodes { id } "}, "query", "Line 1, column 25: Syntax Error"),
    ({"query": "{\n  models { nodes { wrong } } }"}, "query", "Line 2, column 20: Cannot query"),
    (
        {"query": 'mutation { unlikeModel(input: {id: "x"}) { userErrors { code } } }'},
        "query",
        "this is a mutation",
    ),
    ({"query": "{ models { nodes { id } } jobs { nodes { id } } }"}, "query", "all but one of"),
    ({"query": "{ viewer { login } }"}, "query", "`viewer.login` is none"),
    ({"query": NESTED}, "query", "The cost of one row is 10"),
    ({"query": "x" * 40_000}, "query", "bytes; the limit is 32768"),
    ({"query": GOOD, "variables": {"n": "x"}}, "query", "BigInt"),
    ({"query": GOOD, "variables": [1]}, "variables", "Give an object"),
    ({"query": GOOD, "variables": {"n": 2**64}}, "variables", "64-bit"),
    ({"query": GOOD, "idempotencyKey": ""}, "idempotencyKey", ""),
]


@pytest.mark.parametrize(("given", "path", "message"), REFUSED)
async def test_what_cannot_be_exported_is_refused_at_once(
    ask: Asker, database: Database, given: dict[str, Any], path: str, message: str
) -> None:
    viewer = viewer_of(await insert_actor("ada"))
    made = await export(ask, viewer, **given)
    assert made["job"] is None
    [error] = made["userErrors"]
    assert (error["code"], error["path"]) == ("BAD_INPUT", [path])
    assert message in error["message"]
    assert await database.count("jobs", {}) == 0


async def test_a_format_needs_what_writes_it(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.exports.encoding.find_spec", lambda name: None)
    viewer = viewer_of(await insert_actor("ada"))
    made = await export(ask, viewer, query=GOOD, format="PARQUET")
    [error] = made["userErrors"]
    assert (error["code"], error["path"]) == ("BAD_INPUT", ["format"])
    assert "modelharbor[parquet]" in error["message"]
    assert await database.count("jobs", {}) == 0


async def test_the_link_is_for_who_asked(ask: Asker) -> None:
    ada, eve = await insert_actor("ada"), await insert_actor("eve", is_operator=True)
    result = {"fileName": "models é.csv", "rows": 3, "expiresAt": utc_now().isoformat()}
    done = {"state": JobState.SUCCEEDED, "result": result, "created_at": utc_now()}
    job = await insert_job(ada, eve, kind=JobKind.EXPORT, **done)
    other = await insert_job(ada, eve, kind=JobKind.REINDEX, **done)
    waiting = await insert_job(ada, eve, kind=JobKind.EXPORT)
    text = "query ($ids: [ID!]!) { nodes(ids: $ids) { ... on Job { downloadUrl result } } }"
    ids = [global_id("Job", each.id) for each in (job, other, waiting)]

    answer = await ask.changed(export_link_minutes=2)(text, viewer_of(ada), ids=ids)
    [url, *none] = [each["downloadUrl"] for each in answer.data["nodes"]]
    assert none == [None, None]
    assert answer.data["nodes"][0]["result"] == result
    place, _, query = url.partition("?")
    assert place == f"http://test/exports/{job.id}/models%20%C3%A9.csv"
    values = dict(each.split("=") for each in query.split("&"))
    links = DownloadLinks(b"k" * 32, "")
    assert links.is_good_export(job.id, values["expires"], values["signature"])
    ends = int(values["expires"]) - utc_now().timestamp()
    assert timedelta(minutes=2).total_seconds() <= ends + 60 <= 300

    for viewer in (viewer_of(eve), ANONYMOUS):
        answer = await ask(text, viewer, ids=ids)
        assert [each and each["downloadUrl"] for each in answer.data["nodes"]] == [None] * 3
    assert (await ask.by_core(text, viewer_of(ada), ids=ids)).data["nodes"][0]["downloadUrl"]
