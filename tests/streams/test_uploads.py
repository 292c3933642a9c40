"""Uploads as they are followed: what is told, in which order, and to whom."""

from collections.abc import Sequence
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.db.uploads import HIDDEN, TAKING, UploadState
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.errors import NotFound
from modelharbor.events.changes import Change, What
from modelharbor.streams.base import Happening
from modelharbor.streams.uploads import UploadProgress, VersionUploads
from tests.documents import (
    change_upload,
    insert_actor,
    insert_job,
    insert_model,
    insert_upload,
    insert_version,
    receive_bytes,
    row_of,
    viewer_of,
)

from .watching import Watching, event, place

pytestmark = pytest.mark.anyio
S = UploadState
Told = list[tuple[str, str, int, bool, bool]]


def told(happenings: Sequence[Happening]) -> Told:
    """Path, state, bytes, whether passing, whether final."""
    return [
        (
            each.row["upload"]["path"],
            each.row["upload"]["state"],
            each.row["upload"]["received_bytes"],
            each.is_passing,
            each.is_final,
        )
        for each in happenings
    ]


@pytest.fixture
async def alice(database: Database) -> ActorDocument:
    return await insert_actor("alice")


@pytest.fixture
async def model(alice: ActorDocument) -> ModelDocument:
    return await insert_model(alice, "m", visibility=Visibility.PRIVATE)


@pytest.fixture
async def version(database: Database, model: ModelDocument) -> VersionDocument:
    return await insert_version(database, model, {}, status=VersionStatus.UPLOADING)


async def test_some_uploads_from_what_stands_to_the_end_of_the_last(
    watch: Watching, alice: ActorDocument, model: ModelDocument, version: VersionDocument
) -> None:
    database, viewer = watch.database, viewer_of(alice)
    a, b, other = [await insert_upload(alice, model, version, path) for path in ("a", "b", "c")]
    part = await insert_upload(alice, model, version, "a", part_of=a.id)
    source = UploadProgress((a.id, b.id))
    watched = await watch.watch(source, viewer)
    assert told(watched.follower.standings()) == [
        ("a", "CREATED", 0, False, False),
        ("b", "CREATED", 0, False, False),
    ]
    assert not watched.follower.is_over
    await change_upload(database, a, S.UPLOADING)
    await receive_bytes(database, a, 10)
    await receive_bytes(database, part, 99)
    await receive_bytes(database, other, 99)
    await change_upload(database, other, S.ABORTED)
    await database.data["uploads"].update_one({"_id": a.id}, {"$set": {"holder": None}})
    await receive_bytes(database, b, 5)
    await change_upload(database, a, S.PAUSED)
    await change_upload(database, b, S.FAILED)
    await receive_bytes(database, a, 100)
    await change_upload(database, a, S.COMPLETED)
    found = await watched.happenings()
    assert told(found) == [
        ("a", "UPLOADING", 0, False, False),
        ("a", "UPLOADING", 10, True, False),
        ("b", "CREATED", 5, True, False),
        ("a", "PAUSED", 10, False, False),
        ("b", "FAILED", 5, False, False),
        ("a", "PAUSED", 100, True, False),
        ("a", "COMPLETED", 100, False, True),
    ]
    positions = [each.position for each in found]
    assert positions == sorted(positions)
    assert [each.key for each in found] == [a.id, a.id, b.id, a.id, b.id, a.id, a.id]
    assert {each.sequence for each in found} == {0}
    assert all(not each.row["upload"].keys() & HIDDEN for each in found)
    assert found[1].row["upload"]["rate"] == 7.5
    assert watched.follower.is_over
    assert told(watched.follower.standings()) == [
        ("a", "COMPLETED", 100, False, False),
        ("b", "FAILED", 5, False, False),
    ]
    # From the log: states alone, and no end, which only all of them together have.
    assert source.query is not None
    logged = await watch.logged(source.query)
    replayed = told(await source.of_events(watch.reads(viewer), logged))
    assert replayed == [(*each[:4], False) for each in told(found) if not each[3]]


def upload_event(row: Row, number: int, **changes: Any) -> Change:
    after = {**row, **changes}
    return event(
        {
            "stream": "uploads",
            "about": [row["_id"], row["version_id"]],
            "principals": row["principals"],
            "upload_id": row["_id"],
            "upload": after,
        },
        number,
    )


def upload_progress(row: Row, number: int, **updated: Any) -> Change:
    return Change(What.PROGRESS, place(number), {"upload_id": row["_id"], "updated": updated})


async def test_what_was_read_at_the_start_is_not_told_again(
    watch: Watching, alice: ActorDocument, model: ModelDocument, version: VersionDocument
) -> None:
    """Who comes with `after` has it from the log: they wait until the reader is so far."""
    upload = await insert_upload(
        alice, model, version, "a", state=S.UPLOADING, received_bytes=50, sequence=3
    )
    source, reads, row = UploadProgress((upload.id,)), watch.reads(viewer_of(alice)), row_of(upload)
    follower = source.follow()
    assert follower.ahead == ""
    await watch.reader.ready()
    began = watch.reader.position
    await follower.begin(reads, began)
    assert follower.ahead[:16] >= began[:16]  # times of commits
    await watch.settle()
    assert watch.reader.position >= follower.ahead
    found = await follower.happenings(
        reads,
        [
            upload_event(row, 1, sequence=3),
            upload_progress(row, 2, sequence=3, received_bytes=50),
            upload_progress(row, 3, sequence=2, received_bytes=40),
            upload_progress(row, 4, sequence=4, received_bytes=60),
            upload_progress(row, 5, sequence=5, received_bytes=100, state="COMPLETED"),
            upload_event(row, 6, sequence=5, received_bytes=100, state="COMPLETED"),
        ],
    )
    assert told(found) == [
        ("a", "UPLOADING", 60, True, False),
        ("a", "COMPLETED", 100, False, True),
    ]
    assert [each.position for each in found] == [place(4), place(6)]


async def test_uploads_that_have_ended_are_over_at_once(
    watch: Watching, alice: ActorDocument, model: ModelDocument, version: VersionDocument
) -> None:
    ids = []
    for state in S:
        if state not in TAKING | {S.RECEIVED, S.VERIFYING}:
            upload = await insert_upload(alice, model, version, state.value, state=state)
            ids.append(upload.id)
    follower = UploadProgress(tuple(ids)).follow()
    await follower.begin(watch.reads(viewer_of(alice)), place(1))
    assert follower.is_over
    assert {each.row["upload"]["state"] for each in follower.standings()} == {
        "COMPLETED",
        "FAILED",
        "ABORTED",
        "EXPIRED",
    }


async def test_uploads_are_for_those_who_see_them(watch: Watching, database: Database) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    model = await insert_model(acme, "m")
    version = await insert_version(database, model, {}, status=VersionStatus.UPLOADING)
    upload = await insert_upload(alice, model, version, "a")
    part = await insert_upload(alice, model, version, "a", part_of=upload.id)
    source = UploadProgress((upload.id,))
    happening = Happening(place(1), {"upload": row_of(upload)})
    member = viewer_of(bob, {acme.id: Role.VIEWER})
    for viewer in (viewer_of(alice), member):
        await source.check(watch.reads(viewer))
        assert source.permits(viewer, happening)
    for viewer in (viewer_of(bob), ANONYMOUS):
        with pytest.raises(NotFound, match="no such upload"):
            await source.check(watch.reads(viewer))
        assert not source.permits(viewer, happening)
    for ids in ((ObjectId(),), (part.id,), (upload.id, part.id)):
        gone = UploadProgress(ids)
        with pytest.raises(NotFound, match="no such upload"):
            await gone.check(watch.reads(viewer_of(alice)))
        with pytest.raises(NotFound, match="no such upload"):
            await gone.follow().begin(watch.reads(viewer_of(alice)), place(1))


async def test_all_uploads_into_a_version(watch: Watching, alice: ActorDocument) -> None:
    database = watch.database
    model = await insert_model(alice, "public")
    version = await insert_version(database, model, {}, status=VersionStatus.UPLOADING)
    sibling = await insert_version(database, model, {}, status=VersionStatus.UPLOADING)
    a = await insert_upload(alice, model, version, "a")
    part = await insert_upload(alice, model, version, "a", part_of=a.id)
    elsewhere = await insert_upload(alice, model, sibling, "a")
    source = VersionUploads(version.id)
    mine = await watch.watch(source, viewer_of(alice))
    theirs = await watch.watch(source, ANONYMOUS)
    assert list(mine.follower.standings()) == []
    await receive_bytes(database, a, 10)
    await receive_bytes(database, part, 10)
    await receive_bytes(database, elsewhere, 10)
    await change_upload(database, elsewhere, S.UPLOADING)
    await change_upload(database, a, S.UPLOADING)
    late = await insert_upload(alice, model, version, "late")
    await change_upload(database, late, S.COMPLETED)
    await insert_job(alice, subject={"type": "ModelVersion", "id": version.id})
    await receive_bytes(database, a, 20)
    await change_upload(database, a, S.COMPLETED)
    found = await mine.happenings()
    # Of the first bytes nothing is told: whose they are was read when there were more.
    assert told(found) == [
        ("a", "UPLOADING", 10, False, False),
        ("late", "COMPLETED", 0, False, False),
        ("a", "UPLOADING", 20, True, False),
        ("a", "COMPLETED", 20, False, False),
    ]
    assert not mine.follower.is_over
    assert await theirs.happenings() == []
    logged = await watch.logged(source.query)
    replayed = told(await source.of_events(watch.reads(viewer_of(alice)), logged))
    assert replayed == [each for each in told(found) if not each[3]]
    assert await source.of_events(watch.reads(ANONYMOUS), logged) == []


async def test_who_may_watch_a_version(
    watch: Watching, alice: ActorDocument, version: VersionDocument
) -> None:
    source = VersionUploads(version.id)
    await source.check(watch.reads(viewer_of(alice)))
    bob = await insert_actor("bob")
    for viewer in (viewer_of(bob), ANONYMOUS):
        with pytest.raises(NotFound, match="no such version"):
            await source.check(watch.reads(viewer))
    with pytest.raises(NotFound, match="no such version"):
        await VersionUploads(ObjectId()).check(watch.reads(viewer_of(alice)))
    await version.set({"status": VersionStatus.DELETED})
    with pytest.raises(NotFound, match="no such version"):
        await source.check(watch.reads(viewer_of(alice)))
