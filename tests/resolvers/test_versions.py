"""Versions are numbered, published, archived and deleted; the model's counters and latest follow."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import Role
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument, FileDocument, FileFormat, FileRole
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.db.models import AliasEntry, ModelDocument, ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import MUTABLE, VersionDocument, VersionStatus
from modelharbor.errors import ErrorCode, Refused, Unauthenticated
from modelharbor.resolvers.access import refuse_unless_active
from modelharbor.resolvers.aliases import set_alias
from modelharbor.resolvers.files import FileEntry
from modelharbor.resolvers.files import add_files as add_files_in
from modelharbor.resolvers.settling import files_digest
from modelharbor.resolvers.versions import (
    Published,
    archive_version,
    create_version,
    delete_version,
    publish_version,
    release_version,
    update_version,
)
from modelharbor.settings import Settings
from tests.documents import START, insert_job, insert_model
from tests.resolvers.conftest import Company
from tests.resolvers.state import events_of, everything, refused

pytestmark = pytest.mark.anyio


async def add_files(
    version: VersionDocument | Mapping[str, Any],
    files: dict[str, int],
    format: FileFormat = FileFormat.OTHER,
) -> None:
    """As an import adds them to a DRAFT; equal lengths are equal contents."""
    row = (
        version.model_dump() | {"_id": version.id}
        if isinstance(version, VersionDocument)
        else version
    )
    for path, size in files.items():
        await FileDocument(
            version_id=row["_id"],
            model_id=row["model_id"],
            path=path,
            size_bytes=size,
            sha256=f"{size:064x}",
            format=format,
        ).insert()


async def add_version(
    model: ModelDocument, number: int, status: VersionStatus = VersionStatus.DRAFT
) -> VersionDocument:
    version = VersionDocument(model_id=model.id, number=number, status=status)
    await version.insert()
    return version


async def model_row(database: Database, model_id: ObjectId) -> dict[str, Any]:
    row = await database.data["models"].find_one({"_id": model_id})
    assert row is not None
    return row


def counters(model: Mapping[str, Any]) -> tuple[int, int, int, int]:
    stats = model["stats"]
    return stats["versions"], stats["files"], stats["size_bytes"], stats["stored_bytes"]


async def test_a_version_is_created_as_a_draft_with_the_next_number(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", last_number=6)
    row = await create_version(
        database,
        company.admin,
        settings,
        model_id=model.id,
        label=" v7 ",
        description="Better\nthan before",
        tags=["a", "a"],
        properties={"loss": 0.5},
    )
    assert row == await database.data["versions"].find_one({"_id": row["_id"]})
    assert (row["number"], row["status"], row["label"], row["description"]) == (
        *(7, "DRAFT", "v7", "Better\nthan before"),
    )
    assert (row["tags"], row["properties"], row["revision"], row["created_by_id"]) == (
        *(["a"], {"loss": 0.5}, 1),
        company.members[Role.ADMIN].id,
    )
    after = await model_row(database, model.id)
    assert (after["last_number"], after["revision"], after["latest_version_id"]) == (7, 1, None)
    assert counters(after) == (1, 0, 0, 0)
    assert [(e["kind"], e["version_id"], e["after"]) for e in await events_of(database)] == [
        ("VERSION_CREATED", row["_id"], {"number": 7, "status": "DRAFT"})
    ]


async def test_versions_created_at_once_get_numbers_of_their_own(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    rows = await asyncio.gather(
        *[create_version(database, company.admin, settings, model_id=model.id) for _ in range(10)]
    )
    assert sorted(row["number"] for row in rows) == list(range(1, 11))
    assert counters(await model_row(database, model.id))[0] == 10


async def test_bad_fields_of_versions(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("label", {"label": "x" * 101}),
        ("description", {"description": "x" * 10_001}),
        ("properties", {"properties": {"$a": 1}}),
    ]
    for path, fields in [*bad, ("tags", {"tags": ["\0"]})]:
        async with refused(database, ErrorCode.BAD_INPUT, path):
            await create_version(database, company.admin, settings, model_id=model.id, **fields)
    for path, fields in [
        *bad,
        ("addTags", {"add_tags": [""]}),
        ("removeTags", {"remove_tags": [""]}),
    ]:
        async with refused(database, ErrorCode.BAD_INPUT, path):
            await update_version(database, company.admin, version_id=version.id, **fields)


async def test_an_update_of_a_version(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1, VersionStatus.READY)
    row = await update_version(
        database,
        company.admin,
        version_id=version.id,
        expected_revision=1,
        label="v1",
        add_tags=["a", "b"],
        properties={"a": 1},
    )
    assert (row["label"], row["tags"], row["properties"], row["revision"]) == (
        *("v1", ["a", "b"], {"a": 1}, 2),
    )
    again = await everything(database)
    assert row == await update_version(
        database, company.admin, version_id=version.id, label="v1", add_tags=["a"]
    )
    assert await everything(database) == again
    cleared = await update_version(
        database,
        company.admin,
        version_id=version.id,
        label=None,
        description=None,
        remove_tags=["a"],
        properties=None,
    )
    assert (cleared["label"], cleared["tags"], cleared["properties"]) == (None, ["b"], {})
    assert [(e["kind"], e["before"], e["after"]) for e in await events_of(database)] == [
        (
            "VERSION_UPDATED",
            {"label": None, "tags": [], "properties": {}},
            {"label": "v1", "tags": ["a", "b"], "properties": {"a": 1}},
        ),
        (
            "VERSION_UPDATED",
            {"label": "v1", "tags": ["a", "b"], "properties": {"a": 1}},
            {"label": None, "tags": ["b"], "properties": {}},
        ),
    ]
    for attempt in (update_version, archive_version):
        async with refused(database, ErrorCode.STALE_REVISION, "expectedRevision"):
            await attempt(database, company.admin, version_id=version.id, expected_revision=1)


async def test_a_published_version_is_ready_with_its_digest_and_the_model_follows(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    draft = await create_version(database, company.admin, settings, model_id=model.id)
    await add_files(draft, {"b.txt": 7, "a/é.txt": 5})
    await add_files(draft, {"a.safetensors": 100, "copy.safetensors": 100}, FileFormat.SAFETENSORS)
    published = await publish_version(
        database, company.admin, version_id=draft["_id"], set_aliases=["prod", "best", "prod"]
    )
    assert published.job is None
    row = published.version
    lines = [
        *(f"a.safetensors\0{100:064x}\n", f"a/é.txt\0{5:064x}\n"),
        *(f"b.txt\0{7:064x}\n", f"copy.safetensors\0{100:064x}\n"),
    ]
    assert row == await database.data["versions"].find_one({"_id": draft["_id"]})
    assert (row["status"], row["digest"]) == (
        "READY",
        sha256("".join(lines).encode()).hexdigest(),
    )
    assert (row["file_count"], row["size_bytes"]) == (4, 212)
    assert row["published_at"] is not None
    after = await model_row(database, model.id)
    assert after["latest_version_id"] == row["_id"]
    assert after["formats"] == ["OTHER", "SAFETENSORS"]
    assert counters(after) == (1, 4, 212, 112)
    assert [(a["name"], a["version_id"], a["protected"]) for a in after["aliases"]] == [
        ("prod", row["_id"], False),
        ("best", row["_id"], False),
    ]
    assert [(e["kind"], e["after"]) for e in await events_of(database)] == [
        ("VERSION_CREATED", {"number": 1, "status": "DRAFT"}),
        ("VERSION_READY", {"status": "READY", "digest": row["digest"]}),
        ("ALIAS_SET", {"name": "prod", "version_id": row["_id"], "protected": False}),
        ("ALIAS_SET", {"name": "best", "version_id": row["_id"], "protected": False}),
    ]


async def test_counters_that_were_kept_while_files_came_are_not_counted_twice(
    database: Database, company: Company
) -> None:
    model = await insert_model(
        company.acme, "bert", stats={"versions": 1, "files": 1, "size_bytes": 7}
    )
    version = VersionDocument(model_id=model.id, number=1, file_count=1, size_bytes=7)
    await version.insert()
    await add_files(version, {"a": 7, "b": 8})
    await publish_version(database, company.admin, version_id=version.id)
    assert counters(await model_row(database, model.id)) == (1, 2, 15, 15)


def test_the_digest_does_not_depend_on_the_order() -> None:
    assert files_digest([("b", "1"), ("a", "2")]) == files_digest([("a", "2"), ("b", "1")])
    assert files_digest([("a", "1")]) != files_digest([("a", "2")])
    assert files_digest([("a", "1"), ("b", "2")]) != files_digest([("a", "2"), ("b", "1")])


async def test_equal_contents_are_counted_once_over_all_versions(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    ids = []
    for files in ({"a": 10, "b": 20, "c": 20}, {"a": 10, "b": 30}, {"x": 10, "y": 20}):
        draft = await create_version(database, company.admin, settings, model_id=model.id)
        await add_files(draft, files)
        await publish_version(database, company.admin, version_id=draft["_id"])
        ids.append(draft["_id"])
    assert counters(await model_row(database, model.id)) == (3, 7, 120, 60)
    draft = await create_version(database, company.admin, settings, model_id=model.id)
    await add_files(draft, {"b": 30})  # what only a draft has too is still the version's own
    await delete_version(database, company.admin, version_id=ids[1])
    assert counters(await model_row(database, model.id)) == (3, 5, 80, 30)
    await delete_version(database, company.admin, version_id=draft["_id"])
    assert counters(await model_row(database, model.id)) == (2, 5, 80, 30)
    await archive_version(database, company.admin, version_id=ids[2])
    assert counters(await model_row(database, model.id)) == (2, 5, 80, 30)
    await delete_version(database, company.admin, version_id=ids[0])
    assert counters(await model_row(database, model.id)) == (1, 2, 30, 30)
    await delete_version(database, company.admin, version_id=ids[2])
    assert counters(await model_row(database, model.id)) == (0, 0, 0, 0)


async def test_a_version_without_files_is_not_published(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1)
    async with refused(
        database, ErrorCode.BAD_INPUT, "id", says="The version has no files: add some first."
    ):
        await publish_version(database, company.admin, version_id=version.id)


async def test_a_bad_alias_stops_the_publishing(database: Database, company: Company) -> None:
    model = await insert_model(
        company.acme,
        "bert",
        grants=[{"actor_id": company.ann.id, "role": Role.MAINTAINER}],
        aliases=[AliasEntry(name="prod", version_id=company.acme.id, protected=True)],
    )
    version = await add_version(model, 1)
    await add_files(version, {"a": 1})
    for code, name in ((ErrorCode.BAD_INPUT, "12"), (ErrorCode.FORBIDDEN, "prod")):
        async with refused(database, code, "setAliases"):
            await publish_version(
                database, company.stranger, version_id=version.id, set_aliases=["good", name]
            )


async def test_the_latest_is_the_highest_number_that_is_ready(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    drafts = []
    for index, format in enumerate((FileFormat.GGUF, FileFormat.ONNX, FileFormat.KERAS)):
        draft = await create_version(database, company.admin, settings, model_id=model.id)
        await add_files(draft, {"weights": index + 1}, format)
        drafts.append(draft["_id"])
    one, two, three = drafts

    async def latest() -> tuple[Any, list[str]]:
        row = await model_row(database, model.id)
        return row["latest_version_id"], row["formats"]

    await publish_version(database, company.admin, version_id=two)
    assert await latest() == (two, ["ONNX"])
    await publish_version(database, company.admin, version_id=one)
    assert await latest() == (two, ["ONNX"])
    await publish_version(database, company.admin, version_id=three)
    assert await latest() == (three, ["KERAS"])
    await archive_version(database, company.admin, version_id=three)
    assert await latest() == (two, ["ONNX"])
    await delete_version(database, company.admin, version_id=two)
    assert await latest() == (one, ["GGUF"])
    await delete_version(database, company.admin, version_id=one)
    assert await latest() == (None, [])


async def test_of_two_publishings_at_once_one_wins(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1)
    await add_files(version, {"a": 1})
    found = await asyncio.gather(
        *[publish_version(database, company.admin, version_id=version.id) for _ in range(4)],
        return_exceptions=True,
    )
    codes = [one.code for one in found if isinstance(one, Refused)]
    assert codes == [ErrorCode.INVALID_TRANSITION] * 3
    assert counters(await model_row(database, model.id)) == (0, 1, 1, 1)


async def test_the_time_of_the_counters_is_when_they_changed(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    admin = company.admin

    async def changed_by(action: Awaitable[Any]) -> bool:
        await database.data["models"].update_one({}, {"$set": {"stats.as_of": START}})
        before = (await model_row(database, model.id))["stats"]
        await action
        after = (await model_row(database, model.id))["stats"]
        moved = bool(after["as_of"] > START)
        assert moved == (after != before)
        return moved

    draft = await create_version(database, admin, settings, model_id=model.id)
    assert await changed_by(create_version(database, admin, settings, model_id=model.id))
    await add_files(draft, {"a": 1})
    assert not await changed_by(update_version(database, admin, version_id=draft["_id"], label="x"))
    assert await changed_by(publish_version(database, admin, version_id=draft["_id"]))
    assert not await changed_by(archive_version(database, admin, version_id=draft["_id"]))
    assert await changed_by(delete_version(database, admin, version_id=draft["_id"]))


async def test_what_an_archived_model_holds_does_not_change_at_the_same_time(
    database: Database, settings: Settings, company: Company, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads the model as ACTIVE, then it is archived, then each would write."""
    model = await insert_model(company.acme, "bert")
    admin = company.admin
    draft = await add_version(model, 1)
    ready = await add_version(model, 2, VersionStatus.READY)
    await add_files(draft, {"a": 1})

    async def create() -> None:
        await create_version(database, admin, settings, model_id=model.id)

    async def point() -> None:
        await set_alias(database, admin, model_id=model.id, name="prod", version_id=ready.id)

    entry = FileEntry("new", 1, f"{1:064x}", FileRole.OTHER, FileFormat.OTHER)
    await BlobDocument(sha256=entry.sha256, size_bytes=1).insert()

    async def add(session: AsyncClientSession) -> None:
        row = await database.data["versions"].find_one({"_id": draft.id}, session=session)
        assert row is not None
        model_was_read.set()
        await add_files_in(database, session, row, [entry])

    model_was_read = asyncio.Event()

    def refuse(model: Mapping[str, Any], *path: str) -> None:
        refuse_unless_active(dict(model), *path)
        model_was_read.set()

    for module in ("versions", "aliases"):
        monkeypatch.setattr(f"modelharbor.resolvers.{module}.refuse_unless_active", refuse)
    acts: list[Callable[[], Awaitable[Any]]] = [
        *(create, point),
        lambda: update(database, admin, draft.id),
        lambda: publish(database, admin, draft.id),
        lambda: archive(database, admin, ready.id),
        lambda: delete(database, admin, draft.id),
        lambda: database.transaction(add),
    ]
    before = await everything(database)
    archived = {**before["models"][0], "state": "ARCHIVED"}
    for act in acts:
        model_was_read.clear()
        acting: list[asyncio.Future[Any]] = []

        async def hold(session: AsyncClientSession) -> None:
            await database.data["models"].update_one(
                {"_id": model.id}, {"$set": {"state": "ARCHIVED"}}, session=session
            )
            acting.append(asyncio.ensure_future(act()))  # noqa: B023  # awaited in this round
            await model_was_read.wait()

        await database.transaction(hold)
        with pytest.raises(Refused) as caught:
            await acting[0]
        assert caught.value.code is ErrorCode.INVALID_TRANSITION
        assert await everything(database) == {**before, "models": [archived]}
        await database.data["models"].update_one({}, {"$set": {"state": "ACTIVE"}})


async def test_archived_and_deleted(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert", stats={"versions": 1})
    version = await add_version(model, 1, VersionStatus.READY)
    row = await archive_version(
        database, company.admin, version_id=version.id, expected_revision=1, comment="old"
    )
    assert (row["status"], row["revision"]) == ("ARCHIVED", 2)
    assert await delete_version(database, company.admin, version_id=version.id, comment="bad") == (
        version.id
    )
    assert counters(await model_row(database, model.id))[0] == 0
    assert [
        (e["kind"], e["before"], e["after"], e["comment"]) for e in await events_of(database)
    ] == [
        ("VERSION_ARCHIVED", {"status": "READY"}, {"status": "ARCHIVED"}, "old"),
        ("VERSION_DELETED", {"number": 1, "status": "ARCHIVED"}, {"status": "DELETED"}, "bad"),
    ]
    async with refused(database, ErrorCode.NOT_FOUND, "id"):
        await delete_version(database, company.admin, version_id=version.id)


async def test_a_version_that_an_alias_points_at_stays(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 3, VersionStatus.READY)
    aliases = [AliasEntry(name=name, version_id=version.id) for name in ("prod", "best")]
    await database.data["models"].update_one(
        {"_id": model.id}, {"$set": {"aliases": [alias.model_dump() for alias in aliases]}}
    )
    async with refused(
        database,
        ErrorCode.CONFLICT,
        "id",
        says="Aliases point at version 3 of Acme/bert: prod, best. Move or delete them first.",
    ):
        await delete_version(database, company.admin, version_id=version.id)


@pytest.mark.parametrize("status", VersionStatus)
async def test_transitions_of_versions(
    database: Database, company: Company, status: VersionStatus
) -> None:
    model = await insert_model(company.acme, "bert")
    for number, (act, start) in enumerate(
        [(publish, MUTABLE), (archive, {READY}), (release, {VersionStatus.QUARANTINED})], 1
    ):
        version = await add_version(model, number, status)
        await add_files(version, {"a": 1})
        if status in start:
            await act(database, company.admin, version.id)
            continue
        code = (
            ErrorCode.NOT_FOUND if status is VersionStatus.DELETED else ErrorCode.INVALID_TRANSITION
        )
        async with refused(database, code, "id"):
            await act(database, company.admin, version.id)


# What the files come to ----------------------------------------------------------------------------


async def blob(size: int, **values: Any) -> None:
    """The contents that `add_files` gives to files of this length."""
    await BlobDocument(sha256=f"{size:064x}", size_bytes=size, **values).insert()


def inspection(
    verdict: str, format: FileFormat = FileFormat.OTHER, parameters: int | None = None
) -> dict[str, Any]:
    tensors = None if parameters is None else {"parameter_count": parameters}
    return {
        "verdict": verdict,
        "format": format.value,
        "scanner": "test",
        "scanned_at": START,
        "findings": [],
        "tensors": tensors,
        "header": None,
    }


async def published(database: Database, company: Company, version_id: ObjectId) -> Published:
    return await publish_version(
        database, company.admin, version_id=version_id, set_aliases=["prod"]
    )


async def test_contents_that_nobody_looked_into_are_left_to_a_job(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", stats={"versions": 1})
    version = await add_version(model, 1, VersionStatus.UPLOADING)
    await add_files(version, {"a": 1, "b": 2, "c": 3})
    await blob(1)
    await blob(2, inspection=inspection("SAFE"))
    done = await published(database, company, version.id)
    assert (done.version["status"], done.version["revision"]) == ("PROCESSING", 2)
    job = done.job
    assert job is not None
    assert job == await database.data["jobs"].find_one({})
    assert (job["kind"], job["state"], job["created_by_id"]) == (
        *("FINALIZE_VERSION", "QUEUED"),
        company.members[Role.ADMIN].id,
    )
    assert job["input"] == {"version_id": version.id, "aliases": ["prod"], "files": 3}
    assert job["subject"] == {"type": "ModelVersion", "id": version.id}
    after = await model_row(database, model.id)
    assert (after["latest_version_id"], after["aliases"], counters(after)) == (
        *(None, []),
        (1, 0, 0, 0),
    )
    assert [
        (e["kind"], e["before"], e["after"]) for e in await events_of(database, stream="models")
    ] == [("VERSION_UPDATED", {"status": "UPLOADING"}, {"status": "PROCESSING"})]
    async with refused(database, ErrorCode.INVALID_TRANSITION, "id"):
        await published(database, company, version.id)


async def test_a_job_that_sees_to_a_file_is_waited_for(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1, VersionStatus.UPLOADING)
    await add_files(version, {"a": 1})
    subject = {"type": "ModelVersion", "id": version.id}
    job = await insert_job(None, kind=JobKind.VERIFY_FILE, subject=subject)
    done = await published(database, company, version.id)
    assert done.job is not None
    await database.data["versions"].update_one({}, {"$set": {"status": "UPLOADING"}})
    await job.set({"state": JobState.SUCCEEDED})
    done = await published(database, company, version.id)
    assert (done.job, done.version["status"]) == (None, "READY")


@pytest.mark.parametrize("verdict", ["UNSAFE", "SUSPICIOUS", "ERROR"])
async def test_one_file_that_is_not_known_to_be_harmless_is_enough(
    database: Database, company: Company, verdict: str
) -> None:
    model = await insert_model(company.acme, "bert", stats={"versions": 1})
    version = await add_version(model, 1)
    await add_files(version, {"a": 1, "b": 2, "c": 3})
    await blob(1, inspection=inspection("SAFE"))
    await blob(2, inspection=inspection(verdict))
    await blob(3, inspection=inspection("SKIPPED"))
    done = await published(database, company, version.id)
    reason = f"1 file is not known to be harmless: b ({verdict})."
    row = done.version
    assert done.job is None
    assert (row["status"], row["status_reason"], row["published_at"]) == (
        *("QUARANTINED", reason),
        None,
    )
    assert row["digest"] == files_digest([(path, f"{n:064x}") for n, path in enumerate("abc", 1)])
    assert (row["file_count"], row["size_bytes"]) == (3, 6)
    after = await model_row(database, model.id)
    assert (after["latest_version_id"], after["aliases"], counters(after)) == (
        *(None, []),
        (1, 3, 6, 0),
    )
    assert [(e["kind"], e["before"], e["after"]) for e in await events_of(database)] == [
        (
            "VERSION_QUARANTINED",
            {"status": "DRAFT"},
            {"status": "QUARANTINED", "status_reason": reason},
        )
    ]
    await delete_version(database, company.admin, version_id=version.id)
    assert counters(await model_row(database, model.id)) == (0, 0, 0, 0)


async def test_a_reason_names_some_files(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1)
    await add_files(version, dict.fromkeys([f"{n:04}" for n in range(12)], 1))
    await blob(1, inspection=inspection("ERROR"))
    row = (await published(database, company, version.id)).version
    names = ", ".join(f"{n:04} (ERROR)" for n in range(10))
    assert row["status_reason"] == (f"12 files are not known to be harmless: {names} and 2 more.")


async def test_damaged_contents_fail_a_version(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert", stats={"versions": 1})
    version = await add_version(model, 1)
    await add_files(version, {"a": 1, "b": 2})
    await blob(1, stored=False, damaged_at=START, inspection=inspection("SAFE"))
    await blob(2, inspection=inspection("UNSAFE"))
    row = (await published(database, company, version.id)).version
    reason = "1 file could not be verified: a."
    assert (row["status"], row["status_reason"], row["digest"]) == ("FAILED", reason, None)
    assert counters(await model_row(database, model.id)) == (1, 2, 3, 0)
    assert [(e["kind"], e["after"]) for e in await events_of(database)] == [
        ("VERSION_FAILED", {"status": "FAILED", "status_reason": reason})
    ]
    async with refused(database, ErrorCode.INVALID_TRANSITION, "id"):
        await release(database, company.admin, version.id)


async def test_contents_known_by_their_hash_alone_are_skipped(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1)
    await add_files(version, {"a": 1, "b": 2})
    await blob(1, stored=False)
    assert (await published(database, company, version.id)).version["status"] == "READY"


async def test_parameters_are_those_of_the_weights_in_one_format(
    database: Database, settings: Settings, company: Company
) -> None:
    """Shards sum up, equal contents count once, the format with the most is taken, the model follows
    its latest version."""
    model = await insert_model(company.acme, "bert")
    gguf, tensors, onnx = FileFormat.GGUF, FileFormat.SAFETENSORS, FileFormat.ONNX
    contents = [
        *((10, tensors, 100), (11, tensors, 50), (12, gguf, 149), (13, onnx, 151)),
        (14, FileFormat.JSON, None),
    ]
    for size, format, parameters in contents:
        await blob(size, inspection=inspection("SAFE", format, parameters))
    found = []
    for files in (
        {"1.safetensors": 10, "2.safetensors": 11, "copy.safetensors": 10, "m.gguf": 12},
        {"1.safetensors": 10, "m.onnx": 13, "config.json": 14},
        {"config.json": 14},
    ):
        draft = await create_version(database, company.admin, settings, model_id=model.id)
        await add_files(draft, files)
        await database.data["files"].update_many(
            {"path": {"$ne": "config.json"}}, {"$set": {"role": FileRole.WEIGHTS.value}}
        )
        row = (await published(database, company, draft["_id"])).version
        found.append((row["parameters"], (await model_row(database, model.id))["parameters"]))
    assert found == [(150, 150), (151, 151), (None, 0)]
    await archive_version(database, company.admin, version_id=row["_id"])
    assert (await model_row(database, model.id))["parameters"] == 151


async def test_a_released_version_is_ready_and_says_why(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", stats={"versions": 1})
    version = await add_version(model, 1)
    await add_files(version, {"a": 1, "b": 2})
    await blob(2, inspection=inspection("UNSAFE"))
    was = (await published(database, company, version.id)).version
    for reason in ("", "  ab ", "x" * 2001):
        async with refused(database, ErrorCode.BAD_INPUT, "reason"):
            await release_version(database, company.admin, version_id=version.id, reason=reason)
    row = await release_version(
        database, company.admin, version_id=version.id, reason=" It is ours: built here.\n"
    )
    said = "It is ours: built here."
    assert row == await database.data["versions"].find_one({"_id": version.id})
    assert (row["status"], row["status_reason"], row["digest"]) == ("READY", said, was["digest"])
    assert row["published_at"] is not None
    after = await model_row(database, model.id)
    assert (after["latest_version_id"], counters(after)) == (version.id, (1, 2, 3, 3))
    event = (await events_of(database))[-1]
    assert (event["kind"], event["before"], event["after"], event["comment"]) == (
        "VERSION_RELEASED",
        {"status": "QUARANTINED", "status_reason": was["status_reason"]},
        {"status": "READY", "status_reason": said},
        said,
    )
    assert event["actor_id"] == company.members[Role.ADMIN].id


async def test_the_versions_of_an_archived_model_stay_as_they_are(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", state=ModelState.ARCHIVED)
    draft = await add_version(model, 1)
    ready = await add_version(model, 2, VersionStatus.READY)
    await add_files(draft, {"a": 1})
    async with refused(database, ErrorCode.INVALID_TRANSITION, "modelId"):
        await create_version(database, company.admin, settings, model_id=model.id)
    for act, version in ((publish, draft), (update, draft), (delete, draft), (archive, ready)):
        async with refused(database, ErrorCode.INVALID_TRANSITION, "id"):
            await act(database, company.admin, version.id)


async def update(database: Database, viewer: Viewer, version_id: ObjectId) -> None:
    await update_version(database, viewer, version_id=version_id, label="new")


async def publish(database: Database, viewer: Viewer, version_id: ObjectId) -> None:
    await publish_version(database, viewer, version_id=version_id)


async def release(database: Database, viewer: Viewer, version_id: ObjectId) -> None:
    await release_version(database, viewer, version_id=version_id, reason="looked into it")


async def archive(database: Database, viewer: Viewer, version_id: ObjectId) -> None:
    await archive_version(database, viewer, version_id=version_id)


async def delete(database: Database, viewer: Viewer, version_id: ObjectId) -> None:
    await delete_version(database, viewer, version_id=version_id)


DRAFT, READY = VersionStatus.DRAFT, VersionStatus.READY
WRITERS = {Role.CONTRIBUTOR, Role.MAINTAINER, Role.ADMIN}
PUBLISHERS = {Role.MAINTAINER, Role.ADMIN}
ACTIONS = [
    (update, DRAFT, Permission.WRITE, WRITERS),
    (publish, DRAFT, Permission.PUBLISH, PUBLISHERS),
    (publish, VersionStatus.UPLOADING, Permission.PUBLISH, PUBLISHERS),
    (archive, READY, Permission.PUBLISH, PUBLISHERS),
    (release, VersionStatus.QUARANTINED, Permission.PUBLISH, PUBLISHERS),
    (delete, DRAFT, Permission.WRITE, WRITERS),
    (delete, VersionStatus.UPLOADING, Permission.WRITE, WRITERS),
    (delete, READY, Permission.PUBLISH, PUBLISHERS),
    (delete, VersionStatus.QUARANTINED, Permission.PUBLISH, PUBLISHERS),
    (delete, VersionStatus.PROCESSING, Permission.PUBLISH, PUBLISHERS),
]
NAMES = [f"{action[0].__name__} {action[1].value}" for action in ACTIONS]


@pytest.mark.parametrize("action", ACTIONS, ids=NAMES)
@pytest.mark.parametrize("role", [*Role, None])
async def test_who_may_change_a_version(
    database: Database, company: Company, action: Any, role: Role | None
) -> None:
    act, status, permission, allowed = action
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    version = await add_version(model, 1, status)
    await add_files(version, {"a": 1})
    viewer = company.member(role) if role else company.stranger
    if role in allowed:
        await act(database, viewer, version.id)
        assert len(await events_of(database)) == 1
    elif role is None:
        async with refused(database, ErrorCode.NOT_FOUND, "id", says="There is no such version"):
            await act(database, viewer, version.id)
    else:
        if role not in WRITERS:
            permission = (
                Permission.PUBLISH if act in (publish, archive, release) else Permission.WRITE
            )
        async with refused(
            database,
            ErrorCode.FORBIDDEN,
            "id",
            says=f"This needs the permission {permission.value} on Acme/bert",
        ):
            await act(database, viewer, version.id)


@pytest.mark.parametrize("role", [*Role, None])
async def test_who_may_create_a_version(
    database: Database, settings: Settings, company: Company, role: Role | None
) -> None:
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    viewer = company.member(role) if role else company.stranger
    if role in WRITERS:
        await create_version(database, viewer, settings, model_id=model.id)
        return
    code = ErrorCode.FORBIDDEN if role else ErrorCode.NOT_FOUND
    async with refused(database, code, "modelId"):
        await create_version(database, viewer, settings, model_id=model.id)


@pytest.mark.parametrize("action", ACTIONS, ids=NAMES)
async def test_unknown_versions_foreign_scopes_and_nobody(
    database: Database, company: Company, action: Any
) -> None:
    act, status, permission, _ = action
    model = await insert_model(company.acme, "bert")
    version = await add_version(model, 1, status)
    async with refused(database, ErrorCode.NOT_FOUND, "id"):
        await act(database, company.admin, ObjectId())
    viewer = replace(company.admin, scopes=frozenset(Permission) - {permission})
    async with refused(
        database, ErrorCode.FORBIDDEN, "id", says=f"The token lacks the scope {permission.value}"
    ):
        await act(database, viewer, version.id)
    before = await everything(database)
    with pytest.raises(Unauthenticated):
        await act(database, ANONYMOUS, version.id)
    assert await everything(database) == before
