"""Uploads are created, paused, completed, aborted, and expire."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.actors import Role
from modelharbor.db.base import utc_now
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import HIDDEN, UploadProtocol
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Gone, Refused, Unauthenticated
from modelharbor.resolvers.models import archive_model, delete_model
from modelharbor.resolvers.uploads import (
    EMPTY,
    FILES_AT_ONCE,
    UploadFile,
    abort_upload,
    complete_upload,
    expire_uploads,
    pause_upload,
)
from modelharbor.resolvers.versions import delete_version
from tests.documents import insert_actor, insert_model, insert_version, viewer_of
from tests.resolvers.state import events_of, refused
from tests.resolvers.uploading import Site, body, digest_of, site

__all__ = ["site"]
pytestmark = pytest.mark.anyio
A, B = b"a" * 100, b"b" * 50


# Create -----------------------------------------------------------------------------------------


async def test_uploads_are_created_in_the_order_of_their_files(site: Site) -> None:
    begun = utc_now()
    rows = await site.create(
        UploadFile("weights/model.bin", 100, digest_of(A)), UploadFile("Caf\u0065\u0301.txt", 7)
    )
    stored = await site.database.data["uploads"].find().sort("_id", 1).to_list()
    assert rows == stored
    first = rows[0]
    assert first["created_at"] >= begun
    assert first == first | {
        "version_id": site.version.id,
        "model_id": site.model.id,
        "owner_id": site.company.acme.id,
        "created_by_id": site.viewer.user_id,
        "principals": ["operator", f"actor:{site.viewer.user_id}", f"actor:{site.company.acme.id}"],
        "path": "weights/model.bin",
        "path_key": "weights/model.bin",
        "size_bytes": 100,
        "sha256": digest_of(A),
        "protocol": "TUS",
        "state": "CREATED",
        "is_open": True,
        "received_bytes": 0,
        "part_of": None,
        "segments": [],
        "expires_at": first["created_at"] + timedelta(hours=24),
    }
    assert (rows[1]["path"], rows[1]["path_key"]) == ("Caf\u00e9.txt", "caf\u00e9.txt")
    assert await site.quota() == (107, 2)
    assert (await site.one("versions"))["status"] == "UPLOADING"
    told = await events_of(site.database)
    assert [(each["stream"], each["kind"]) for each in told] == [
        ("models", "VERSION_UPDATED"),
        ("uploads", None),
        ("uploads", None),
    ]
    assert told[1]["upload"] == {k: v for k, v in first.items() if k not in HIDDEN}
    assert told[1]["about"] == [
        *(first["_id"], site.version.id, site.model.id, site.viewer.user_id)
    ]
    assert (told[1]["actor_id"], told[1]["principals"]) == (
        *(site.viewer.user_id, first["principals"]),
    )


async def test_a_key_gives_the_same_uploads_again(site: Site) -> None:
    files = [UploadFile(f"{number}", 10) for number in range(3)]
    many = await asyncio.gather(*(site.create(*files, idempotency_key="k") for _ in range(5)))
    assert all(rows == many[0] for rows in many)
    assert await site.quota() == (30, 3)
    await abort_upload(site.database, site.storage, site.viewer, upload_id=many[0][1]["_id"])
    again = await site.create(*files, idempotency_key="k")
    assert [row["state"] for row in again] == ["CREATED", "ABORTED", "CREATED"]
    async with refused(site.database, ErrorCode.CONFLICT, "idempotencyKey"):
        await site.create(*files[:2], idempotency_key="k")


@pytest.mark.parametrize(
    ("files", "code", "path", "says"),
    [
        ([], ErrorCode.BAD_INPUT, ["files"], "one at least"),
        ([("a", 1)] * (FILES_AT_ONCE + 1), ErrorCode.BAD_INPUT, ["files"], "1000 are allowed"),
        ([("a", -1)], ErrorCode.BAD_INPUT, ["files", "0", "sizeBytes"], "-1"),
        ([("a", 1001)], ErrorCode.BAD_INPUT, ["files", "0", "sizeBytes"], "1000"),
        ([("a", 0, "0" * 64)], ErrorCode.CHECKSUM_MISMATCH, ["files", "0", "sha256"], EMPTY),
        ([("b", 1), ("../a", 1)], ErrorCode.BAD_INPUT, ["files", "1", "path"], "'..'"),
        ([("a", 1), ("A", 1)], ErrorCode.ALREADY_EXISTS, ["files", "1", "path"], "'a'"),
        ([("a", 1), ("a", 1)], ErrorCode.ALREADY_EXISTS, ["files", "1", "path"], "'a'"),
        ([("a/b", 1), ("A", 1)], ErrorCode.ALREADY_EXISTS, ["files", "0", "path"], "'A'"),
        ([("Stra\u00dfe", 1), ("STRASSE", 1)], ErrorCode.ALREADY_EXISTS, None, "'Stra\u00dfe'"),
    ],
)
async def test_files_that_cannot_be(
    site: Site,
    files: list[tuple[str, int]],
    code: ErrorCode,
    path: list[str] | None,
    says: str,
) -> None:
    settings = site.settings.model_copy(update={"max_file_bytes": 1000})
    async with refused(site.database, code, *(path or ["files", "1", "path"]), says=says):
        await site.create(*(UploadFile(*file) for file in files), settings=settings)


async def test_paths_that_others_have_are_refused(site: Site) -> None:
    await site.create(UploadFile("x/one", 1), UploadFile("Two", 1))
    await site.upload(A, "y/three")
    await site.upload(A, "four")
    database = site.database
    for path, other in {
        "X/ONE": "x/one",
        "x": "x/one",
        "two/deeper/still": "Two",
        "TWO": "Two",
        "Y/Three": "y/three",
        "y": "y/three",
        "four/a": "four",
        "y/three/a": "y/three",
    }.items():
        async with refused(
            database, ErrorCode.ALREADY_EXISTS, "files", "1", "path", says=repr(other)
        ):
            await site.create(UploadFile("other", 1), UploadFile(path, 1))
    rows = await site.create(UploadFile("x/two", 1), UploadFile("xx", 1), UploadFile("x0", 1))
    assert [row["state"] for row in rows] == ["CREATED"] * 3


async def test_two_who_create_the_same_path_at_once(site: Site) -> None:
    many = await asyncio.gather(
        *(site.create(UploadFile(path, 1)) for path in ("a", "A", "a/b", "a")),
        return_exceptions=True,
    )
    refusals = [each for each in many if isinstance(each, Refused)]
    assert [each.code for each in refusals] == [ErrorCode.ALREADY_EXISTS] * 3
    assert await site.quota() == (1, 1)


async def test_who_may_not_write_creates_nothing(site: Site) -> None:
    file = UploadFile("a", 1)
    for viewer in (
        site.company.member(Role.DOWNLOADER),
        site.company.stranger,
        replace(site.viewer, scopes=frozenset({Permission.READ})),
    ):
        async with refused(site.database, ErrorCode.FORBIDDEN, "versionId"):
            await site.create(file, viewer=viewer)
    async with refused(site.database, ErrorCode.NOT_FOUND, "versionId"):
        await site.create(file, version_id=ObjectId())
    with pytest.raises(Unauthenticated):
        await site.create(file, viewer=ANONYMOUS)
    rows = await site.create(file, viewer=site.company.member(Role.CONTRIBUTOR))
    assert rows[0]["state"] == "CREATED"


async def test_versions_that_take_no_files(site: Site) -> None:
    for status in set(VersionStatus) - {
        *(VersionStatus.DRAFT, VersionStatus.UPLOADING, VersionStatus.DELETED),
    }:
        version = await insert_version(site.database, site.model, {}, status=status)
        async with refused(
            site.database, ErrorCode.INVALID_TRANSITION, "versionId", says=status.value
        ):
            await site.create(UploadFile("a", 1), version_id=version.id)
    await archive_model(site.database, site.viewer, model_id=site.model.id)
    async with refused(site.database, ErrorCode.INVALID_TRANSITION, "versionId", says="ARCHIVED"):
        await site.create(UploadFile("a", 1))


async def test_a_version_has_a_limit_of_files(site: Site) -> None:
    settings = site.settings.model_copy(update={"max_version_files": 3})
    await site.upload(A, "a")
    await site.create(UploadFile("b", 1), settings=settings)
    async with refused(site.database, ErrorCode.QUOTA_EXCEEDED, "files", says="4 files"):
        await site.create(UploadFile("c", 1), UploadFile("d", 1), settings=settings)
    await site.create(UploadFile("c", 1), settings=settings)


# Contents that are here already -----------------------------------------------------------------


async def other_version(site: Site, status: VersionStatus = VersionStatus.DRAFT) -> ObjectId:
    version = await insert_version(site.database, site.model, {}, status=status)
    return version.id


async def test_contents_that_one_may_download_are_not_sent_again(site: Site) -> None:
    before = await site.upload(A)
    version_id = await other_version(site)
    [row, other] = await site.create(
        UploadFile("copy", 100, digest_of(A)),
        UploadFile("other", 100, digest_of(B)),
        version_id=version_id,
    )
    assert row == await site.row(row)
    assert row == row | {
        "protocol": "INSTANT",
        "state": "COMPLETED",
        "is_open": False,
        "received_bytes": 100,
        "ended_at": row["created_at"],
    }
    file = await site.one("files", _id=row["file_id"])
    assert (file["path"], file["sha256"], file["version_id"]) == ("copy", digest_of(A), version_id)
    assert (file["path_key"], file["size_bytes"]) == ("copy", 100)
    job = await site.one("jobs", _id=row["job_id"])
    assert job == job | {
        "kind": "VERIFY_FILE",
        "state": "QUEUED",
        "input": {"version_id": version_id, "file_id": file["_id"], "sha256": digest_of(A)},
        "subject": {"type": "ModelVersion", "id": version_id},
        "created_by_id": site.viewer.user_id,
        "principals": row["principals"],
    }
    assert job["turn"] > (await site.one("jobs", _id=before["job_id"]))["turn"]
    assert (await site.one("blobs", sha256=digest_of(A)))["references"] == 2
    assert (other["state"], other["protocol"]) == ("CREATED", "TUS")
    assert await site.quota() == (100, 1)
    stats = (await site.one("models", _id=site.model.id))["stats"]
    assert (stats["files"], stats["size_bytes"]) == (2, 200)
    assert await site.states(row) == ["COMPLETED"]


async def test_contents_that_were_looked_into_need_no_job(site: Site) -> None:
    await site.upload(A)
    await site.database.data["blobs"].update_one(
        {}, {"$set": {"inspection": {"verdict": "SAFE", "format": "GGUF"}}}
    )
    version_id = await other_version(site)
    [row] = await site.create(UploadFile("copy", 100, digest_of(A)), version_id=version_id)
    file = await site.one("files", _id=row["file_id"])
    assert (row["job_id"], file["format"], file["role"]) == (None, "GGUF", "WEIGHTS")


async def test_bytes_are_needed_where_the_hash_proves_nothing(site: Site) -> None:
    """Another size, another protocol, a model that they do not see or may not download."""
    private = await insert_model(site.company.acme, "secret", visibility=Visibility.PRIVATE)
    version = await insert_version(site.database, private, {}, status=VersionStatus.DRAFT)
    await site.upload(A, "a", version_id=version.id)
    own = await insert_model(site.company.ann, "own")
    mine = await insert_version(site.database, own, {}, status=VersionStatus.DRAFT)
    ann = site.company.stranger
    files = [UploadFile("a", 100, digest_of(A))]

    async def protocol_for(**options: object) -> str:
        [row] = await site.create(*files, **{"viewer": ann, "version_id": mine.id, **options})
        await site.database.data["uploads"].delete_one({"_id": row["_id"]})
        await site.database.data["files"].delete_many({"version_id": row["version_id"]})
        return str(row["protocol"])

    async def ready(status: VersionStatus) -> None:
        await site.database.data["versions"].update_one(
            {"_id": version.id}, {"$set": {"status": status.value}}
        )

    async def granted(role: Role | None, visibility: Visibility = Visibility.PRIVATE) -> None:
        grants = [{"actor_id": site.company.ann.id, "role": role.value}] if role else []
        await site.database.data["models"].update_one(
            {"_id": private.id},
            {
                "$set": {
                    "grants": grants,
                    "visibility": visibility.value,
                    "principals": [f"actor:{site.company.ann.id}"],
                }
            },
        )

    await ready(VersionStatus.READY)
    assert await protocol_for() == "TUS"
    await granted(Role.VIEWER)
    assert await protocol_for() == "TUS"
    await granted(Role.DOWNLOADER)
    assert await protocol_for() == "INSTANT"
    assert await protocol_for(protocol=UploadProtocol.TUS) == "TUS"
    no_download = replace(ann, scopes=frozenset({Permission.READ, Permission.WRITE}))
    assert await protocol_for(viewer=no_download) == "TUS"
    for status in (VersionStatus.QUARANTINED, VersionStatus.DRAFT, VersionStatus.DELETED):
        await ready(status)
        assert await protocol_for() == "TUS"
    await ready(VersionStatus.DRAFT)
    await granted(Role.CONTRIBUTOR)
    assert await protocol_for() == "INSTANT"
    await ready(VersionStatus.QUARANTINED)
    assert await protocol_for() == "TUS"
    await granted(Role.MAINTAINER)
    assert await protocol_for() == "INSTANT"
    files = [UploadFile("a", 99, digest_of(A))]
    assert await protocol_for() == "TUS"
    files = [UploadFile("a", 100, digest_of(A))]
    await site.database.data["blobs"].update_one({}, {"$set": {"stored": False}})
    assert await protocol_for() == "TUS"


async def test_contents_that_the_store_lost_are_sent_again(site: Site) -> None:
    await site.upload(A)
    blob = await site.one("blobs", sha256=digest_of(A))
    await site.storage.delete(blob["key"])
    version_id = await other_version(site)
    [row] = await site.create(UploadFile("copy", 100, digest_of(A)), version_id=version_id)
    assert row["protocol"] == "TUS"
    row = await site.receiver().receive(site.viewer, row["_id"], 0, body(A))
    assert row["state"] == "COMPLETED"
    assert await site.contents(digest_of(A)) == A


async def test_empty_files_need_no_bytes(site: Site) -> None:
    rows = await site.create(
        UploadFile("a", 0), UploadFile("b", 0, EMPTY), protocol=UploadProtocol.TUS
    )
    assert [(row["state"], row["sha256"]) for row in rows] == [("COMPLETED", EMPTY)] * 2
    assert await site.contents(EMPTY) == b""
    assert (await site.one("blobs", sha256=EMPTY))["references"] == 2
    assert await site.quota() == (0, 0)


# Complete ---------------------------------------------------------------------------------------


async def completed(site: Site, upload_id: ObjectId, contents: bytes) -> dict[str, object]:
    return await complete_upload(
        site.database,
        site.storage,
        site.viewer,
        upload_id=upload_id,
        sha256=digest_of(contents),
    )


async def test_completed_twice_is_one_file(site: Site) -> None:
    row = await site.upload(A)
    assert await completed(site, row["_id"], A) == row
    async with refused(site.database, ErrorCode.CHECKSUM_MISMATCH, "sha256"):
        await completed(site, row["_id"], B)
    assert await site.counters() == (1, 100, 1, 100)


async def test_a_hash_completes_what_is_stored_already(site: Site) -> None:
    await site.upload(A)
    [row, other] = await site.create(UploadFile("copy", 100), UploadFile("other", 50))
    async with refused(site.database, ErrorCode.SIZE_MISMATCH, "id", says="0 of 50"):
        await completed(site, other["_id"], B)
    async with refused(site.database, ErrorCode.SIZE_MISMATCH, "id"):
        await completed(site, other["_id"], A)
    receiver = site.receiver()
    await receiver.receive(site.viewer, row["_id"], 0, body(A[:10]))
    assert len(site.kept()) == 2
    done = await completed(site, row["_id"], A)
    assert (done["state"], done["protocol"], done["received_bytes"]) == (
        *("COMPLETED", "INSTANT", 100),
    )
    assert len(site.kept()) == 1
    assert await site.quota() == (50, 1)
    assert (await site.one("blobs", sha256=digest_of(A)))["references"] == 2
    assert await site.states(row) == ["CREATED", "UPLOADING", "COMPLETED"]


async def test_a_hash_is_noted_for_what_is_being_verified(site: Site) -> None:
    [row] = await site.create(UploadFile("a", 100))
    await site.receiver().receive(site.viewer, row["_id"], 0, body(A[:10]))
    row = await site.receiver().receive(site.viewer, row["_id"], 10, body(A[10:]))
    assert row["state"] == "RECEIVED"
    row = await complete_upload(  # nothing is known of its bytes yet
        *(site.database, site.storage, site.viewer),
        upload_id=row["_id"],
        sha256=digest_of(A),
    )
    assert (row["state"], row["sha256"]) == ("RECEIVED", digest_of(A))
    async with refused(site.database, ErrorCode.CHECKSUM_MISMATCH, "sha256"):
        await completed(site, row["_id"], B)


# Pause, abort, expire ---------------------------------------------------------------------------


async def test_an_upload_is_paused_and_goes_on(site: Site) -> None:
    [row] = await site.create(UploadFile("a", 100))
    for _ in range(2):
        paused = await pause_upload(
            site.database, site.storage, site.viewer, upload_id=row["_id"], comment="later"
        )
        assert paused["state"] == "PAUSED"
    done = await site.receiver().receive(site.viewer, row["_id"], 0, body(A))
    assert done["state"] == "COMPLETED"
    assert await site.states(row) == ["CREATED", "PAUSED", "UPLOADING", "COMPLETED"]
    async with refused(site.database, ErrorCode.INVALID_TRANSITION, "id", says="COMPLETED"):
        await pause_upload(site.database, site.storage, site.viewer, upload_id=row["_id"])


async def test_an_aborted_upload_leaves_nothing(site: Site) -> None:
    [row] = await site.create(UploadFile("a", 100))
    await site.receiver().receive(site.viewer, row["_id"], 0, body(A[:10]))
    assert len(site.kept()) == 1
    for _ in range(2):
        gone = await abort_upload(
            site.database, site.storage, site.viewer, upload_id=row["_id"], comment="wrong file"
        )
        assert (gone["state"], gone["is_open"]) == ("ABORTED", False)
    assert site.kept() == []
    assert await site.quota() == (0, 0)
    events = await events_of(site.database, upload_id=row["_id"])
    assert (events[-1]["comment"], events[-1]["upload"]["state"]) == ("wrong file", "ABORTED")
    with pytest.raises(Gone):
        await site.receiver().receive(site.viewer, row["_id"], 10, body(A[10:]))
    [again] = await site.create(UploadFile("a", 100))
    assert again["state"] == "CREATED"
    done = await site.upload(B, "b")
    async with refused(site.database, ErrorCode.INVALID_TRANSITION, "id", says="COMPLETED"):
        await abort_upload(site.database, site.storage, site.viewer, upload_id=done["_id"])


async def test_uploads_belong_to_who_created_them_and_who_may_write(site: Site) -> None:
    [row] = await site.create(UploadFile("a", 100), viewer=site.company.member(Role.CONTRIBUTOR))
    arguments = {"upload_id": row["_id"]}
    for act in (pause_upload, abort_upload):
        async with refused(site.database, ErrorCode.FORBIDDEN, "id"):
            viewer = site.company.member(Role.DOWNLOADER)
            await act(site.database, site.storage, viewer, **arguments)
        async with refused(site.database, ErrorCode.NOT_FOUND, "id"):
            await act(site.database, site.storage, site.company.stranger, **arguments)
        async with refused(site.database, ErrorCode.NOT_FOUND, "id"):
            await act(site.database, site.storage, site.viewer, upload_id=ObjectId())
    await pause_upload(site.database, site.storage, site.viewer, **arguments)


async def test_uploads_that_wait_too_long_expire(site: Site) -> None:
    rows = await site.create(UploadFile("a", 100), UploadFile("b", 50))
    await site.receiver().receive(site.viewer, rows[0]["_id"], 0, body(A[:10]))
    later = utc_now() + timedelta(hours=23)
    assert await expire_uploads(site.database, site.storage, later) == []
    await site.database.data["uploads"].update_one(
        {"_id": rows[1]["_id"]}, {"$set": {"expires_at": later + timedelta(hours=9)}}
    )
    [gone] = await expire_uploads(site.database, site.storage, later + timedelta(hours=2))
    assert (gone["_id"], gone["state"]) == (rows[0]["_id"], "EXPIRED")
    assert gone["error"]["code"] == "UPLOAD_EXPIRED"
    assert await expire_uploads(site.database, site.storage, later + timedelta(hours=2)) == []
    assert (site.kept(), await site.quota()) == ([], (50, 1))
    async with refused(site.database, ErrorCode.UPLOAD_EXPIRED, "id"):
        await completed(site, rows[0]["_id"], A)


async def test_uploads_of_what_was_deleted_are_swept(site: Site) -> None:
    [first] = await site.create(UploadFile("a", 100))
    version_id = await other_version(site)
    [second] = await site.create(UploadFile("a", 100), version_id=version_id)
    receiver = site.receiver()
    for row in (first, second):
        await receiver.receive(site.viewer, row["_id"], 0, body(A[:10]))
    assert await expire_uploads(site.database, site.storage, utc_now()) == []
    await delete_version(site.database, site.viewer, version_id=version_id)
    with pytest.raises(Gone, match="version was deleted"):
        await receiver.status(site.viewer, second["_id"])
    with pytest.raises(Gone, match="version was deleted"):
        await receiver.receive(site.viewer, second["_id"], 10, body(A[10:20]))
    assert (await site.row(second))["received_bytes"] == 10
    [swept] = await expire_uploads(site.database, site.storage, utc_now())
    assert (swept["_id"], swept["state"]) == (second["_id"], "ABORTED")
    assert len(site.kept()) == 1
    await delete_model(site.database, site.viewer, model_id=site.model.id)
    with pytest.raises(Gone, match="model was deleted"):
        await receiver.status(site.viewer, first["_id"])
    [swept] = await expire_uploads(site.database, site.storage, utc_now())
    assert (swept["_id"], swept["state"]) == (first["_id"], "ABORTED")
    assert (site.kept(), await site.quota()) == ([], (0, 0))


async def test_what_its_job_left_is_swept(site: Site) -> None:
    [row] = await site.create(UploadFile("a", 100))
    await site.receiver().receive(site.viewer, row["_id"], 0, body(A[:10]))
    await site.receiver().receive(site.viewer, row["_id"], 10, body(A[10:]))
    later = utc_now() + timedelta(hours=25)
    assert await expire_uploads(site.database, site.storage, later) == []
    await site.database.data["jobs"].update_one({}, {"$set": {"state": "DEAD"}})
    assert await expire_uploads(site.database, site.storage, utc_now()) == []
    [failed] = await expire_uploads(site.database, site.storage, later)
    assert (failed["state"], failed["error"]["code"]) == ("FAILED", "INTERNAL")
    assert (site.kept(), await site.quota()) == ([], (0, 0))


async def test_operators_see_uploads_and_do_not_steer_them(site: Site) -> None:
    [row] = await site.create(UploadFile("a", 100))
    operator = await insert_actor("op", is_operator=True)
    viewer = replace(viewer_of(operator), scopes=frozenset(Permission))
    async with refused(site.database, ErrorCode.FORBIDDEN, "id"):
        await abort_upload(site.database, site.storage, viewer, upload_id=row["_id"])
