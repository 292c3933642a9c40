"""What subscriptions may be asked for, and what their events look like."""

from datetime import UTC, datetime
from typing import Any

import pytest
import strawberry
from bson import ObjectId

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.context import Context
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.keyset import EVERYTHING
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.uploads import HIDDEN
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import BadUserInput, NotFound
from modelharbor.events.cursors import decode
from modelharbor.execution.execute import run
from modelharbor.schema import schema
from modelharbor.schema.filters import JobFilter
from modelharbor.schema.nodes import global_id
from modelharbor.schema.orders import ModelOrder, ModelOrderField
from modelharbor.schema.scalars import Cursor
from modelharbor.schema.subscription import (
    ModelEventKind,
    job_progress,
    jobs,
    model_events,
    models_changed,
    upload_progress,
)
from modelharbor.streams.jobs import JobProgress, Jobs
from modelharbor.streams.models import ModelEvents, ModelsChanged, ModelsChangedFollower
from modelharbor.streams.uploads import UploadProgress, VersionUploads
from tests.asking import Asker
from tests.documents import (
    insert_actor,
    insert_job,
    insert_model,
    insert_upload,
    insert_version,
    row_of,
    viewer_of,
)

pytestmark = pytest.mark.anyio

NUMBER = ObjectId("65a000000000000000000001")
OTHER = ObjectId("65a000000000000000000002")
AFTER = Cursor("somewhere")


def model_id(_id: ObjectId) -> strawberry.ID:
    return global_id("Model", _id)


def test_one_job() -> None:
    found = job_progress(global_id("Job", NUMBER), AFTER, max_rate_hz=0.5)
    assert (found.source, found.after, found.rate) == (JobProgress(NUMBER), "somewhere", 0.5)
    assert job_progress(global_id("Job", NUMBER)).rate == 5


@pytest.mark.parametrize("rate", [0, -1, 50.1, float("nan"), float("inf")])
def test_a_rate_that_is_refused(rate: float) -> None:
    with pytest.raises(BadUserInput, match="maxRateHz"):
        job_progress(global_id("Job", NUMBER), max_rate_hz=rate)


@pytest.mark.parametrize("given", ["", "garbage", global_id("Model", NUMBER)])
def test_a_job_that_is_none(given: str) -> None:
    with pytest.raises(NotFound):
        job_progress(strawberry.ID(given))


def test_many_jobs() -> None:
    found = jobs()
    assert (found.source, found.after, found.rate) == (Jobs(EVERYTHING), None, 1)
    by_somebody = JobFilter(created_by=global_id("User", NUMBER))
    source = jobs(by_somebody, AFTER).source
    assert isinstance(source, Jobs)
    assert source.filter.data == {"created_by_id": NUMBER}
    assert source.stream != found.source.stream
    assert source == jobs(by_somebody).source


def test_some_uploads_or_those_of_a_version() -> None:
    ids = [global_id("Upload", each) for each in (OTHER, NUMBER, OTHER)]
    found = upload_progress(ids, None, AFTER, max_rate_hz=0.5)
    assert found.source == UploadProgress((NUMBER, OTHER))
    assert (found.after, found.rate) == ("somewhere", 0.5)
    version = upload_progress(version_id=global_id("ModelVersion", NUMBER))
    assert (version.source, version.after, version.rate) == (VersionUploads(NUMBER), None, 5)
    assert version.source.stream != found.source.stream


def test_uploads_that_are_refused() -> None:
    upload, version = global_id("Upload", NUMBER), global_id("ModelVersion", NUMBER)
    many = [global_id("Upload", ObjectId()) for _ in range(101)]
    for given, within in ((None, None), ([upload], version)):
        with pytest.raises(BadUserInput, match="one of them"):
            upload_progress(given, within)
    for ids in ([], many):
        with pytest.raises(BadUserInput, match="it takes 1 to 100"):
            upload_progress(ids)
    assert len(upload_progress(many[:100]).source.topics) == 200
    with pytest.raises(BadUserInput, match="maxRateHz"):
        upload_progress([upload], max_rate_hz=0)
    for bad in ("garbage", "", version, global_id("Model", NUMBER)):
        with pytest.raises(NotFound, match="no such upload"):
            upload_progress([upload, strawberry.ID(bad)])
    for bad in ("garbage", "", upload):
        with pytest.raises(NotFound, match="no such version"):
            upload_progress(version_id=strawberry.ID(bad))


def test_events_of_models() -> None:
    assert model_events().source == ModelEvents()
    found = model_events(
        [model_id(OTHER), model_id(NUMBER), model_id(OTHER)],
        "Alice",
        [ModelEventKind.MODEL_DELETED],
        AFTER,
    )
    assert found.source == ModelEvents((NUMBER, OTHER), "alice", frozenset({"MODEL_DELETED"}))
    assert (found.after, found.rate) == ("somewhere", None)


def test_events_of_models_that_are_refused() -> None:
    ids = [model_id(ObjectId()) for _ in range(101)]
    many: tuple[dict[str, Any], ...] = ({"model_ids": []}, {"model_ids": ids}, {"kinds": []})
    for given in many:
        with pytest.raises(BadUserInput, match="it takes 1 to"):
            model_events(**given)
    with pytest.raises(NotFound):
        model_events([strawberry.ID("garbage")])
    with pytest.raises(NotFound):
        model_events([global_id("ModelVersion", NUMBER)])
    assert len(model_events(ids[:100]).source.topics) == 100


def test_a_list_of_models() -> None:
    source = models_changed().source
    assert isinstance(source, ModelsChanged)
    assert source.window.limit == 20
    assert source == models_changed().source
    assert source.query is None
    for first in (0, -1, 101):
        with pytest.raises(BadUserInput, match="first"):
            models_changed(first=first)
    with pytest.raises(BadUserInput, match="RELEVANCE"):
        models_changed(order_by=ModelOrder(field=ModelOrderField.RELEVANCE))


async def shown(ask: Asker, viewer: Viewer, field: str, document: str, row: Row) -> list[Any]:
    """What one event looks like, by a plan and by graphql-core."""
    found: list[Row] = []
    for asked in (ask, ask.by_core):
        context = Context(
            database=ask.database,
            cache=ask.cache,
            viewer=viewer,
            links=DownloadLinks(b"k" * 32, "http://test"),
            settings=asked.settings,
            storage=ask.storage,
            request_id="test",
        )
        told = {**row, "stream": "s", "position": f"{1_700_000_000:08x}{2:016x}", "sequence": 3}
        parsed = asked.documents.get(document)
        answer = await run(
            schema, parsed, parsed.operation(None), {}, context, 1e12, top={field: told}
        )
        assert answer.errors == []
        assert answer.data is not None
        assert (answer.fallback is None) == (asked is ask)
        found.append(answer.data)
    assert found[0] == found[1]
    return list(found[0].values())


async def test_an_event_of_a_job(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    job = await insert_job(alice)
    [event] = await shown(
        ask,
        viewer_of(alice),
        "job_progress",
        f'subscription {{ jobProgress(id: "{global_id("Job", job.id)}") {{ cursor job {{ id state progress {{ percent }} createdBy {{ login }} }} }} }}',
        {"job": row_of(job)},
    )
    assert event["job"] == {
        "id": global_id("Job", job.id),
        "state": "QUEUED",
        "progress": {"percent": None},
        "createdBy": {"login": "alice"},
    }
    now = datetime.fromtimestamp(1_700_000_000, UTC)
    place = decode("s", event["cursor"], now=now, days=1)
    assert place == (f"{1_700_000_000:08x}{2:016x}", 3)


async def test_an_event_of_an_upload(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model = await insert_model(alice, "m", visibility=Visibility.PRIVATE)
    version = await insert_version(database, model, {}, status=VersionStatus.UPLOADING)
    upload = await insert_upload(alice, model, version, "a", received_bytes=25)
    row = {name: value for name, value in row_of(upload).items() if name not in HIDDEN}
    [event] = await shown(
        ask,
        viewer_of(alice),
        "upload_progress",
        f'subscription {{ uploadProgress(ids: ["{global_id("Upload", upload.id)}"]) {{ cursor upload {{ id state percent url version {{ number model {{ name }} }} createdBy {{ login }} }} }} }}',
        {"upload": {**row, "state": "UPLOADING"}},
    )
    assert event["upload"] == {
        "id": global_id("Upload", upload.id),
        "state": "UPLOADING",
        "percent": 25.0,
        "url": f"http://test/uploads/{upload.id}",
        "version": {"number": 1, "model": {"name": "m"}},
        "createdBy": {"login": "alice"},
    }


EVENT = """
subscription { modelEvents { cursor kind at changedFields
  model { fullName } version { number model { fullName } } actor { login } } }
"""


async def test_an_event_of_a_model(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model = await insert_model(alice, "m", visibility=Visibility.PRIVATE)
    version = await insert_version(database, model, {"a": 1})
    row = {
        "kind": "VERSION_READY",
        "model_id": model.id,
        "version_id": version.id,
        "actor_id": alice.id,
        "at": datetime(2026, 1, 1, tzinfo=UTC),
        "before": {"status": "DRAFT"},
        "after": {"status": "READY", "digest": "x"},
    }
    [event] = await shown(ask, viewer_of(alice), "model_events", EVENT, row)
    plain = {
        "cursor": event["cursor"],
        "kind": "VERSION_READY",
        "at": "2026-01-01T00:00:00.000Z",
        "changedFields": ["digest", "status"],
    }
    assert event == {
        **plain,
        "model": {"fullName": "alice/m"},
        "version": {"number": 1, "model": {"fullName": "alice/m"}},
        "actor": {"login": "alice"},
    }
    gone = {"model": None, "version": None, "actor": {"login": "alice"}}
    [event] = await shown(ask, ANONYMOUS, "model_events", EVENT, row)
    assert event == {**plain, **gone}
    await version.set({"status": VersionStatus.DELETED})
    [event] = await shown(ask, viewer_of(alice), "model_events", EVENT, row)
    assert event == {**plain, **gone, "model": {"fullName": "alice/m"}}
    await model.set({"state": ModelState.DELETED, "principals": []})
    alone = {**row, "version_id": None, "actor_id": None}
    [event] = await shown(ask, viewer_of(alice), "model_events", EVENT, alone)
    assert event == {**plain, "model": None, "version": None, "actor": None}


LIST = """
subscription { modelsChanged(first: 2) { cursor removedIds ids totalCount
  added { cursor score highlights { field } node { fullName owner { login } viewerHasLiked } }
  updated { name } } }
"""


async def test_a_change_of_a_list(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    models = [
        await insert_model(alice, f"m{n}", stats={"trending_score": float(n)}) for n in range(3)
    ]
    source = models_changed(first=2).source
    assert isinstance(source, ModelsChanged)
    follower = ModelsChangedFollower(source)
    context = Context(
        database=database,
        cache=ask.cache,
        viewer=ANONYMOUS,
        links=DownloadLinks(b"k" * 32, "http://test"),
        settings=ask.settings,
        storage=ask.storage,
        request_id="test",
    )
    await follower.begin(context, "0" * 24)
    standing = follower.standing()
    assert standing is not None
    row = {**standing.row, "removed": [NUMBER], "updated": [row_of(models[0])]}
    [event] = await shown(ask, ANONYMOUS, "models_changed", LIST, row)
    [listed] = [(await ask("{ models(first: 2) { edges { cursor } totalCount } }")).data["models"]]
    assert event == {
        "cursor": event["cursor"],
        "removedIds": [model_id(NUMBER)],
        "ids": [model_id(models[2].id), model_id(models[1].id)],
        "totalCount": 3,
        "added": [
            {
                "cursor": edge["cursor"],
                "score": None,
                "highlights": [],
                "node": {
                    "fullName": f"alice/m{number}",
                    "owner": {"login": "alice"},
                    "viewerHasLiked": False,
                },
            }
            for edge, number in zip(listed["edges"], (2, 1), strict=True)
        ],
        "updated": [{"name": "m0"}],
    }
