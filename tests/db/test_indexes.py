"""Every canonical query is an index scan, and every index is used by one.

The commands are those that the API and the resolvers really send; each is explained.
"""

import pytest

from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.documents import DOCUMENTS
from modelharbor.db.jobs import JobLogDocument, JobState
from modelharbor.db.models import AliasEntry, Visibility
from modelharbor.db.uploads import UploadState
from modelharbor.db.versions import VersionStatus
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.documents import (
    insert_actor,
    insert_job,
    insert_model,
    insert_upload,
    insert_version,
    viewer_of,
)
from tests.explaining import Captured, explained

pytestmark = pytest.mark.anyio

ELSEWHERE = {
    ("events", "model"): "history of one model",
    ("events", "stream"): "what subscriptions missed: tests/events",
    ("events", "about"): "what subscriptions of some subjects missed: tests/events",
    ("events", "unrecorded"): "what was never given its place: tests/events",
    ("jobs", "queue"): "what a worker claims: tests/worker",
    ("jobs", "due"): "what a worker claims where most wait for their time: tests/worker",
    ("jobs", "turns"): "where in the queue a new one of an owner goes: tests/jobs",
    ("jobs", "idempotency"): "unique: one job for one key",
    ("jobs", "finished"): "for those that are kept no longer",
    ("bulk_batches", "job"): "what a bulk change has still to do: tests/worker",
    ("blobs", "unused"): "what the garbage collection takes: tests/worker",
    ("models", "deleted"): "what the garbage collection takes: tests/worker",
    ("likes", "model"): "for a model whose rows are removed",
    ("tokens", "revoked"): "what the garbage collection takes: tests/worker",
    ("tokens", "expires"): "what the garbage collection takes: tests/worker",
    ("idempotency", "key"): "unique: one answer for one key",
    ("idempotency", "expires"): "TTL",
    ("versions", "digest"): "whether a folder was imported before",
    ("usage_dirty", "minute"): "unique: one count for a minute and process; tests/worker",
    ("rollup_homes", "moving"): "whose past is to be counted as something else: tests/worker",
    ("rollup_minutes", "model"): "what quarters are made of: tests/worker",
    ("rollup_minutes", "audience"): "what is asked of them: tests/schema",
    ("rollup_quarters", "model"): "what days are made of: tests/worker",
    ("rollup_quarters", "audience"): "what is asked of them: tests/schema",
    ("rollup_days", "model"): "what stats of models are made of: tests/worker",
    ("rollup_days", "audience"): "what is asked of them: tests/schema",
    ("rollup_deltas", "run"): "what subscriptions tell: tests/streams",
    ("rollup_deltas", "old"): "TTL",
    ("files", "path_key"): "what a new path must not clash with: tests/resolvers",
    ("blobs", "key"): "whose contents an object is: tests/worker",
    ("uploads", "parts"): "what one sends beside others: tests/resolvers",
    ("uploads", "expiring"): "what the sweeper takes: tests/worker",
    ("uploads", "ended"): "for those that are kept no longer",
    ("uploads", "path"): "unique: one upload for one path at a time",
    ("memberships", "user"): "for who presents a token: tests/auth",
    ("persisted_documents", "id"): "unique: one text for an id of a client; tests/resolvers",
    ("persisted_documents", "clients"): "who else has an id: tests/resolvers",
    ("persisted_documents", "fields"): "who selects a field: tests/resolvers",
    ("persisted_documents", "sequence"): "what has changed: tests/execution",
    ("persisted_usage", "day"): "unique: one count for an id and day; tests/resolvers",
    ("persisted_usage", "old"): "TTL",
}
"""Indexes that no query of the API reads by, each with what it is there for."""


SORTED = {"search", "search all", "blob", "filter contents"}
"""What is found by words or contents is few, and sorted in memory."""
HASH = "0" * 63 + "1"
OPERATIONS = {
    **{
        f"order {name}": f"{{ models(first: 2, orderBy: {{field: {name}}}) {{ nodes {{ name }} }} }}"
        for name in (
            "TRENDING",
            "DOWNLOADS_30D",
            "DOWNLOADS_ALL_TIME",
            "LIKES",
            "SIZE",
            "PARAMETERS",
            "UPDATED_AT",
            "CREATED_AT",
            "NAME",
        )
    },
    **{
        f"filter {name}": f'{{ models(first: 2, filter: {{{name}: {{eq: "x"}}}}) {{ totalCount nodes {{ name }} }} }}'
        for name in ("task", "library", "license")
    },
    **{
        f"trending {name}": f"{{ trending(first: 2, window: {name}) {{ nodes {{ name }} }} }}"
        for name in ("DAY", "WEEK", "MONTH")
    },
    **{
        f"trending {name} of a task": f'{{ trending(first: 2, window: {name}, task: "x") {{ totalCount nodes {{ name }} }} }}'
        for name in ("DAY", "WEEK", "MONTH")
    },
    "filter owner": '{ models(first: 2, filter: {owner: {eq: "acme"}}) { totalCount nodes { name } } }',
    "filter tags": '{ models(first: 2, filter: {tags: {hasAny: ["rare"]}}) { nodes { name } } }',
    "filter contents": '{ models(filter: {fileSha256: "' + HASH + '"}) { nodes { name } } }',
    "filter parameters": "{ models(first: 2, filter: {parameters: {gte: 7}}, orderBy: {field: PARAMETERS}) { totalCount nodes { name } } }",
    "search": '{ models(search: "whale") { nodes { name } } }',
    "search all": '{ search(query: "whale") { nodes { __typename } } }',
    "by name": '{ model(owner: "acme", name: "m1") { card { html } viewerHasLiked } }',
    "by alias": '{ resolve(ref: "acme/m1@production") { number } }',
    "by number": '{ resolve(ref: "acme/m1:1") { number } }',
    "aliases of then": '{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { aliases(asOf: "2026-01-01T00:00:00Z") { name version { number } } } } }',
    "latest of then": '{ resolve(ref: "acme/m1", asOf: "2026-01-01T00:00:00Z") { number } }',
    "number of then": '{ resolve(ref: "acme/m1:1", asOf: "2026-01-01T00:00:00Z") { number } }',
    "suggest": '{ suggest(prefix: "m") }',
    "versions": '{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { versions(first: 2) { nodes { number file(path: "a") { path } } } } } }',
    "versions by time": "{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { versions(first: 2, orderBy: {field: CREATED_AT}) { nodes { number } } } } }",
    "versions by size": "{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { versions(first: 2, orderBy: {field: SIZE}) { nodes { number } } } } }",
    "files": "{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { latestVersion { files(first: 2) { nodes { path sharedWith downloadUrl } } } } } }",
    "files of drafts": "{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { versions(first: 3) { nodes { files(first: 2) { nodes { scan { verdict } tensors { tensorCount } header downloadUrl(acceptQuarantined: true) } } } } } } }",
    "blob": '{ blob(sha256: "' + HASH + '") { nodes { path } } }',
    "jobs": "{ jobs(first: 2) { totalCount nodes { state queuePosition parent { id } } } }",
    "jobs in a state": "{ jobs(first: 2, filter: {state: [DEAD]}) { totalCount nodes { kind } } }",
    "jobs of somebody": '{ jobs(first: 2, filter: {createdBy: "CREATOR"}) { nodes { kind } } }',
    "jobs about": '{ jobs(first: 2, filter: {subject: "SUBJECT"}) { totalCount nodes { kind } } }',
    "jobs of versions": "{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { versions(first: 2) { nodes { jobs(first: 2) { totalCount nodes { kind } } } } } } }",
    "jobs of a version": "{ models(first: 1, orderBy: {field: NAME, direction: ASC}) { nodes { latestVersion { jobs(first: 2, state: [DEAD]) { totalCount nodes { kind } } } } } }",
    "parts of jobs": "{ jobs(first: 3) { nodes { children(first: 2) { totalCount nodes { state } } logs(first: 2) { totalCount nodes { message } } } } }",
    "uploads": "{ uploads(first: 2) { totalCount nodes { path version { number } file { path } } } }",
    "uploads in a state": "{ uploads(first: 2, state: [PAUSED]) { totalCount nodes { path } } }",
    "uploads of versions": "{ models(first: 3, orderBy: {field: NAME, direction: ASC}) { nodes { versions(first: 2) { nodes { uploads(first: 2) { totalCount nodes { path } } } } } } }",
    "storage": '{ storage(owner: "acme") { logicalBytes reservedBytes } }',
    "me": "{ viewer { organizations { nodes { login members { nodes { role } } } } tokens { nodes { name } } } }",
}


async def registry(database: Database) -> tuple[Viewer, dict[str, str]]:
    """Who asks, and ids that operations name."""
    acme = await insert_actor("acme", ActorKind.ORGANIZATION, display_name="whale watchers")
    alice = await insert_actor("alice")
    await MembershipDocument(organization_id=acme.id, user_id=alice.id, role=Role.ADMIN).insert()
    for index in range(200):
        model = await insert_model(
            acme,
            f"m{index}",
            summary="whale" if index % 50 == 0 else None,
            task="x" if index % 20 == 0 else "y",
            library="x" if index % 20 == 0 else "y",
            license="x" if index % 20 == 0 else "y",
            tags=["rare"] if index % 40 == 0 else ["common"],
            visibility=Visibility.PUBLIC if index % 2 else Visibility.PRIVATE,
            stats={"trending_score": float(index)},
            parameters=index % 10,
        )
        if index < 3:
            for _ in range(3):
                version = await insert_version(
                    database, model, {"a": 1, "b": 2}, status=VersionStatus.DRAFT
                )
            await database.data["models"].update_one(
                {"_id": model.id},
                {
                    "$set": {
                        "aliases": [
                            AliasEntry(name="production", version_id=version.id).model_dump()
                        ]
                    }
                },
            )
    bob, parent = await insert_actor("bob"), await insert_job(alice)
    for _ in range(3):
        await JobLogDocument(job_id=parent.id, message="x").insert()
    for index in range(300):
        await insert_job(
            alice if index % 3 else bob,
            subject={"type": "Model", "id": model.id} if index % 50 == 1 else None,
            parent_id=parent.id if index % 4 == 3 else None,
            state=JobState.DEAD if index % 20 == 1 else JobState.SUCCEEDED,
        )
    for number in range(300):
        await insert_upload(
            alice if number % 3 else bob,
            model,
            version,
            f"f{number}",
            state=UploadState.PAUSED if number % 20 == 1 else UploadState.COMPLETED,
        )
    ids: dict[str, str] = {
        "CREATOR": global_id("User", alice.id),
        "SUBJECT": global_id("Model", model.id),
    }
    return viewer_of(alice, {acme.id: Role.ADMIN}), ids


async def test_canonical_queries_and_indexes_belong_together(
    ask: Asker, database: Database
) -> None:
    viewer, ids = await registry(database)
    used: set[tuple[str, str]] = set()
    for title, document in OPERATIONS.items():
        for name, given in ids.items():
            document = document.replace(name, given)
        captured = Captured()
        answer = await ask(document, viewer, captured)
        assert answer.errors == [], title
        assert captured.commands, title
        for name, command in captured.commands:
            assert 0 < command["maxTimeMS"] <= 5000, (title, command)
            found = await explained(database, command)
            assert found, (title, name)
            for stage in found:
                assert stage.get("stage") != "COLLSCAN", (title, command)
                assert int(stage.get("collectionScans", 0)) == 0, (title, command)
                assert stage.get("stage") != "SORT" or title in SORTED, (title, command)
                collection = str(command[name])
                if "indexName" in stage:
                    used.add((collection, stage["indexName"]))
                if "indexesUsed" in stage:
                    looked = _lookups(command) or [collection]
                    used.update((looked[0], index) for index in stage["indexesUsed"])
    declared = {
        (document.get_collection_name(), index.index.document["name"])
        for document in DOCUMENTS
        for index in document.get_settings().indexes
    }
    assert declared - used - ELSEWHERE.keys() == set()
    assert ELSEWHERE.keys() <= declared


def _lookups(command: Row) -> list[str]:
    return [stage["$lookup"]["from"] for stage in command["pipeline"] if "$lookup" in stage]
