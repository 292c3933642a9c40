"""Uploads and what owners store: exact values, who sees which, and what a page costs."""

from datetime import timedelta
from hashlib import sha256
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventDocument, Stream
from modelharbor.db.files import FileDocument
from modelharbor.db.jobs import Failure, JobKind
from modelharbor.db.models import ModelDocument, ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import QuotaDocument, UploadDocument, UploadProtocol, UploadState
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.documents import (
    START,
    insert_actor,
    insert_job,
    insert_model,
    insert_upload,
    insert_version,
    row_of,
    viewer_of,
)

pytestmark = pytest.mark.anyio
S = UploadState
HASH = "ab" * 32


def upload_id(upload: UploadDocument) -> str:
    return global_id("Upload", upload.id)


def operator_of(actor: ActorDocument) -> Viewer:
    return Viewer(user={**row_of(actor), "is_operator": True}, scopes=frozenset(Permission))


async def draft_of(
    database: Database, owner: ActorDocument, name: str = "m", **values: Any
) -> tuple[ModelDocument, VersionDocument]:
    model = await insert_model(owner, name, **values)
    version = await insert_version(database, model, {}, status=VersionStatus.UPLOADING)
    return model, version


WHOLE = """
query Whole($id: ID!) { upload(id: $id) {
  id version { id number } path state sizeBytes receivedBytes percent bytesPerSecond etaSeconds
  protocol url headers sha256 expiresAt createdBy { login } createdAt completedAt
  error { code message path } file { path sha256 } job { id kind }
} }
"""


async def test_an_upload_whole(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model, version = await draft_of(database, alice)
    upload = await insert_upload(
        alice,
        model,
        version,
        "weights/a.bin",
        state=S.UPLOADING,
        size_bytes=2**35,
        received_bytes=2**33,
        rate=2.0**30,
        sha256=HASH,
    )
    shown = {
        "id": upload_id(upload),
        "version": {"id": global_id("ModelVersion", version.id), "number": 1},
        "path": "weights/a.bin",
        "state": "UPLOADING",
        "sizeBytes": "34359738368",
        "receivedBytes": "8589934592",
        "percent": 25.0,
        "bytesPerSecond": 1073741824.0,
        "etaSeconds": 24.0,
        "protocol": "TUS",
        "url": f"http://test/uploads/{upload.id}",
        "headers": {"Tus-Resumable": "1.0.0"},
        "sha256": HASH,
        "expiresAt": "2026-01-02T00:00:00.000Z",
        "createdBy": {"login": "alice"},
        "createdAt": "2026-01-01T00:00:00.000Z",
        "completedAt": None,
        "error": None,
        "file": None,
        "job": None,
    }
    for asked in (ask, ask.by_core):
        answer = await asked(WHOLE, viewer_of(alice), id=upload_id(upload))
        assert answer.errors == []
        assert (answer.fallback is None) == (asked is ask)
        assert answer.data == {"upload": shown}
    file = FileDocument(
        version_id=version.id, model_id=model.id, path="weights/a.bin", size_bytes=4, sha256=HASH
    )
    await file.insert()
    job = await insert_job(alice, kind=JobKind.VERIFY_FILE)
    await upload.set(
        {
            "state": S.COMPLETED,
            "protocol": UploadProtocol.INSTANT,
            "received_bytes": 2**35,
            "ended_at": START + timedelta(hours=1),
            "file_id": file.id,
            "job_id": job.id,
        }
    )
    for asked in (ask, ask.by_core):
        answer = await asked(WHOLE, viewer_of(alice), id=upload_id(upload))
        assert answer.errors == []
        assert answer.data["upload"] == {
            **shown,
            "state": "COMPLETED",
            "receivedBytes": "34359738368",
            "percent": 100.0,
            "bytesPerSecond": None,
            "etaSeconds": None,
            "protocol": "INSTANT",
            "headers": {},
            "completedAt": "2026-01-01T01:00:00.000Z",
            "file": {"path": "weights/a.bin", "sha256": HASH},
            "job": {"id": global_id("Job", job.id), "kind": "VERIFY_FILE"},
        }


@pytest.mark.parametrize(
    ("state", "given", "expected"),
    [
        ("UPLOADING", {}, (0.0, None, None)),
        ("UPLOADING", {"received_bytes": 33, "rate": 0.0}, (33.0, 0.0, None)),
        ("UPLOADING", {"received_bytes": 100, "rate": 2.0}, (100.0, 2.0, 0.0)),
        ("UPLOADING", {"received_bytes": 1, "size_bytes": 3, "rate": 4.0}, (33.33, 4.0, 0.5)),
        ("PAUSED", {"received_bytes": 50, "rate": 2.0}, (50.0, None, None)),
        ("RECEIVED", {"received_bytes": 100, "rate": 2.0}, (100.0, None, None)),
        ("CREATED", {"size_bytes": 0}, (100.0, None, None)),
    ],
)
async def test_how_far_an_upload_is(
    ask: Asker, database: Database, state: str, given: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    alice = await insert_actor("alice")
    model, version = await draft_of(database, alice)
    upload = await insert_upload(alice, model, version, "a", state=S(state), **given)
    document = "query($id: ID!) { upload(id: $id) { percent bytesPerSecond etaSeconds } }"
    answer = await ask(document, viewer_of(alice), id=upload_id(upload))
    assert answer.errors == []
    assert answer.fallback is None
    assert tuple(answer.data["upload"].values()) == expected


async def test_an_upload_that_ended_without_a_file(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model, version = await draft_of(database, alice)
    failure = Failure(code="CHECKSUM_MISMATCH", message="Other bytes.")
    upload = await insert_upload(alice, model, version, "a", state=S.FAILED, error=failure)
    document = "query($id: ID!) { upload(id: $id) { completedAt error { code message path } } }"
    answer = await ask(document, viewer_of(alice), id=upload_id(upload))
    assert answer.data["upload"] == {
        "completedAt": None,
        "error": {"code": "CHECKSUM_MISMATCH", "message": "Other bytes.", "path": None},
    }


EVERYWHERE = """
query Everywhere($id: ID!, $ids: [ID!]!, $version: ID!) {
  upload(id: $id) { id } one: node(id: $id) { id } nodes(ids: $ids) { __typename }
  uploads { totalCount nodes { id } }
  version: node(id: $version) { ... on ModelVersion { uploads { totalCount nodes { id } } } }
}
"""


async def test_who_sees_which_uploads(ask: Asker, database: Database) -> None:
    """And never a part of one, whoever asks."""
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    alice, member, stranger = [await insert_actor(name) for name in ("alice", "mem", "str")]
    model, version = await draft_of(database, acme)
    upload = await insert_upload(alice, model, version, "a")
    part = await insert_upload(alice, model, version, "a", part_of=upload.id)
    other = await insert_upload(stranger, *await draft_of(database, stranger, "n"), "a")
    roles: dict[Any, Role] = {acme.id: Role.VIEWER}
    mine = frozenset({Permission.WRITE})
    viewers: dict[str, tuple[Viewer, list[UploadDocument]]] = {
        "creator": (viewer_of(alice), [upload]),
        "member": (viewer_of(member, roles), [upload]),
        "operator": (operator_of(member), [other, upload]),
        "without READ": (Viewer(user=row_of(alice), roles=roles, scopes=mine), []),
        "stranger": (viewer_of(stranger), [other]),
        "nobody": (ANONYMOUS, []),
    }
    for name, (viewer, seen) in viewers.items():
        for asked in (ask, ask.by_core):
            answer = await asked(
                EVERYWHERE,
                viewer,
                id=upload_id(upload),
                ids=[upload_id(upload), upload_id(part)],
                version=global_id("ModelVersion", version.id),
            )
            assert answer.errors == [], name
            found = {"id": upload_id(upload)} if upload in seen else None
            assert answer.data["upload"] == answer.data["one"] == found, name
            assert answer.data["nodes"] == [{"__typename": "Upload"} if found else None, None]
            assert answer.data["uploads"] == {
                "totalCount": len(seen),
                "nodes": [{"id": upload_id(each)} for each in seen],
            }, name
            assert answer.data["version"]["uploads"] == {
                "totalCount": 1 if found else 0,
                "nodes": [found] if found else [],
            }, name


async def test_what_is_no_longer_there_or_to_be_seen_is_null(
    ask: Asker, database: Database
) -> None:
    """The upload is still its creator's to see; the model need not be."""
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    hidden = await draft_of(database, bob, "hidden", visibility=Visibility.PRIVATE)
    gone = await draft_of(database, bob, "gone")
    fine = await draft_of(database, bob, "fine")
    await gone[1].set({"status": VersionStatus.DELETED})
    for model, version in (hidden, gone, fine):
        file = FileDocument(
            version_id=version.id, model_id=model.id, path="a", size_bytes=4, sha256=HASH
        )
        await file.insert()
        await insert_upload(alice, model, version, "a", state=S.COMPLETED, file_id=file.id)
    for asked in (ask, ask.by_core):
        answer = await asked(
            "{ uploads { nodes { version { number } file { path } } } }", viewer_of(alice)
        )
        assert answer.errors == []
        assert answer.data["uploads"]["nodes"] == [
            {"version": {"number": 1}, "file": {"path": "a"}},
            {"version": None, "file": None},
            {"version": None, "file": None},
        ]


@pytest.mark.parametrize("given", ["", "garbage", global_id("Model", ObjectId("a" * 24))])
async def test_an_id_that_is_none_of_an_upload(ask: Asker, database: Database, given: str) -> None:
    answer = await ask("query($id: ID!) { upload(id: $id) { id } }", id=given)
    assert (answer.data, answer.errors) == ({"upload": None}, [])


async def test_uploads_by_state_both_ways(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model, version = await draft_of(database, alice)
    made = [await insert_upload(alice, model, version, state.value, state=state) for state in S]
    document = """
    query($state: [UploadState!], $first: Int, $last: Int, $before: Cursor) {
      uploads(state: $state, first: $first, last: $last, before: $before) {
        totalCount nodes { path } pageInfo { endCursor } } }
    """
    paths = [each.path for each in reversed(made)]
    wanted: list[tuple[list[str] | None, list[str]]] = [
        (None, paths),
        ([], []),
        (["PAUSED"], ["PAUSED"]),
        (["CREATED", "EXPIRED"], ["EXPIRED", "CREATED"]),
    ]
    for given, expected in wanted:
        answer = await ask(document, viewer_of(alice), state=given)
        assert answer.errors == []
        found = answer.data["uploads"]
        assert [node["path"] for node in found["nodes"]] == expected
        assert found["totalCount"] == len(expected)
    first = (await ask(document, viewer_of(alice), first=3)).data["uploads"]
    back = await ask(document, viewer_of(alice), last=2, before=first["pageInfo"]["endCursor"])
    assert [node["path"] for node in back.data["uploads"]["nodes"]] == paths[:2]


PAGE = """
query Page($first: Int!) { uploads(first: $first) { totalCount nodes {
  state percent url version { number model { name } } file { path } job { state } createdBy { login }
} } }
"""
OF_VERSIONS = """
query($ids: [ID!]!) { nodes(ids: $ids) { ... on ModelVersion {
  uploads(first: 2) { totalCount nodes { path version { number } file { path } job { state } } }
} } }
"""


async def test_what_a_page_costs_does_not_grow_with_it(ask: Asker, database: Database) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    viewer, versions = None, []
    for number in range(30):
        alice = await insert_actor(f"alice{number}")
        viewer = viewer or viewer_of(alice, {acme.id: Role.VIEWER})
        model, version = await draft_of(database, acme, f"m{number}")
        versions.append(global_id("ModelVersion", version.id))
        for path in "abc":
            file = FileDocument(
                version_id=version.id, model_id=model.id, path=path, size_bytes=4, sha256=HASH
            )
            await file.insert()
            job = await insert_job(alice, acme)
            await insert_upload(
                alice, model, version, path, state=S.COMPLETED, file_id=file.id, job_id=job.id
            )
    assert viewer is not None
    for asked in (ask, ask.by_core):
        costs = []
        for first in (1, 90):
            answer = await asked(PAGE, viewer, first=first)
            assert answer.errors == []
            nodes = answer.data["uploads"]["nodes"]
            assert answer.data["uploads"]["totalCount"] == 90
            assert len(nodes) == first
            assert all(each["version"] and each["file"] and each["job"] for each in nodes)
            costs.append(len(answer.commands))
        # The page and its total; models and versions for versions, and (but where rows are shared) for
        # files; files, jobs, creators, the models of versions.
        assert costs[0] == costs[1]
        assert costs[0] <= 10
        costs = []
        for count in (2, 30):
            answer = await asked(OF_VERSIONS, viewer, ids=versions[:count])
            assert answer.errors == []
            assert [len(node["uploads"]["nodes"]) for node in answer.data["nodes"]] == [2] * count
            assert [node["uploads"]["totalCount"] for node in answer.data["nodes"]] == [3] * count
            costs.append(len(answer.commands))
        assert costs[0] == costs[1]
        assert costs[0] <= 10


# What is changed ---------------------------------------------------------------------------------

UPLOADS = "uploads { id path state protocol url receivedBytes sha256 file { path } job { kind } }"
CHANGE = """
mutation($i: %sInput!) { %s(input: $i) { %s userErrors { code path } } }
"""


async def change(ask: Asker, viewer: Viewer, name: str, selected: str, given: Row) -> Any:
    document = CHANGE % (name[0].upper() + name[1:], name, selected)
    answer = await ask(document, viewer, i=given)
    assert answer.errors == []
    return answer.data[name]


async def test_uploads_are_announced_paused_and_given_up(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    viewer = viewer_of(alice)
    model = await insert_model(alice, "m")
    version = await insert_version(database, model, {}, status=VersionStatus.DRAFT)
    given = {
        "versionId": global_id("ModelVersion", version.id),
        "files": [
            {"path": "a.bin", "sizeBytes": "5", "sha256": HASH.upper()},
            {"path": "b/c.txt", "sizeBytes": 7},
        ],
        "protocol": "TUS",
        "idempotencyKey": "k",
    }
    made = await change(ask, viewer, "createUploads", UPLOADS, given)
    rows = await UploadDocument.find().sort("+_id").to_list()
    new = {"state": "CREATED", "protocol": "TUS", "receivedBytes": "0", "file": None, "job": None}
    assert made == {
        "uploads": [
            {
                **new,
                "id": upload_id(row),
                "path": path,
                "url": f"http://test/uploads/{row.id}",
                "sha256": content,
            }
            for row, path, content in zip(rows, ("a.bin", "b/c.txt"), (HASH, None), strict=True)
        ],
        "userErrors": [],
    }
    assert await change(ask, viewer, "createUploads", UPLOADS, given) == made
    selected = "upload { id state } job { id }"
    first = {"id": upload_id(rows[0])}
    for name, state in (("pauseUpload", "PAUSED"), ("abortUpload", "ABORTED")):
        found = await change(ask, viewer, name, selected, {**first, "comment": "x"})
        assert found == {"upload": {**first, "state": state}, "job": None, "userErrors": []}
    refused = {"upload": None, "job": None}
    assert await change(ask, viewer, "pauseUpload", selected, first) == {
        **refused,
        "userErrors": [{"code": "INVALID_TRANSITION", "path": ["id"]}],
    }
    incomplete = {"id": upload_id(rows[1]), "sha256": HASH}
    assert await change(ask, viewer, "completeUpload", selected, incomplete) == {
        **refused,
        "userErrors": [{"code": "SIZE_MISMATCH", "path": ["id"]}],
    }
    events = await EventDocument.find({"stream": Stream.UPLOADS.value}).sort("+_id").to_list()
    assert [(each.upload or {})["state"] for each in events] == [
        "CREATED",
        "CREATED",
        "PAUSED",
        "ABORTED",
    ]
    for name in ("pauseUpload", "abortUpload", "completeUpload"):
        for bad in ("garbage", global_id("Model", rows[0].id)):
            also = {"sha256": HASH} if name == "completeUpload" else {}
            assert await change(ask, viewer, name, selected, {"id": bad, **also}) == {
                **refused,
                "userErrors": [{"code": "NOT_FOUND", "path": ["id"]}],
            }


async def test_files_that_are_refused(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model = await insert_model(alice, "m")
    version = await insert_version(database, model, {}, status=VersionStatus.DRAFT)
    many = [{"path": f"f{number}", "sizeBytes": 1} for number in range(1001)]
    wanted: list[tuple[list[Row], str, list[str]]] = [
        ([], "BAD_INPUT", ["files"]),
        (many, "BAD_INPUT", ["files"]),
        ([{"path": "../x", "sizeBytes": 1}], "BAD_INPUT", ["files", "0", "path"]),
        ([{"path": "x", "sizeBytes": -1}], "BAD_INPUT", ["files", "0", "sizeBytes"]),
        (
            [{"path": "x", "sizeBytes": 1}, {"path": "X", "sizeBytes": 1}],
            "ALREADY_EXISTS",
            ["files", "1", "path"],
        ),
    ]
    for files, code, path in wanted:
        given = {"versionId": global_id("ModelVersion", version.id), "files": files}
        found = await change(ask, viewer_of(alice), "createUploads", "uploads { id }", given)
        assert found == {"uploads": [], "userErrors": [{"code": code, "path": path}]}
    assert await UploadDocument.count() == 0


async def test_a_version_with_files(ask: Asker, database: Database) -> None:
    """Made in one step, or not at all; a repetition answers the same."""
    alice = await insert_actor("alice")
    viewer = viewer_of(alice)
    model = await insert_model(alice, "m")
    empty = sha256().hexdigest()
    given = {
        "modelId": global_id("Model", model.id),
        "label": "x",
        "files": [{"path": "b", "sizeBytes": 5}, {"path": "a", "sizeBytes": 0}],
        "idempotencyKey": "k",
    }
    selected = "modelVersion { id number status fileCount } job { id } " + UPLOADS
    bad = {**given, "files": [*given["files"], {"path": "A", "sizeBytes": 1}]}
    refused = await change(ask, viewer, "createModelVersion", selected, bad)
    assert refused == {
        "modelVersion": None,
        "uploads": [],
        "job": None,
        "userErrors": [{"code": "ALREADY_EXISTS", "path": ["files", "2", "path"]}],
    }
    assert await VersionDocument.count() == 0
    made = await change(ask, viewer, "createModelVersion", selected, given)
    assert made["userErrors"] == []
    assert made["job"] is None
    version = made["modelVersion"]
    assert (version["number"], version["status"], version["fileCount"]) == (1, "UPLOADING", 1)
    b, a = made["uploads"]
    assert (b["path"], b["state"], b["protocol"]) == ("b", "CREATED", "TUS")
    assert (a["path"], a["state"], a["protocol"]) == ("a", "COMPLETED", "INSTANT")
    assert (a["sha256"], a["file"]) == (empty, {"path": "a"})
    assert await change(ask, viewer, "createModelVersion", selected, given) == made
    assert await VersionDocument.count() == 1
    assert await UploadDocument.count() == 2
    plain = {"modelId": given["modelId"]}
    without = await change(ask, viewer, "createModelVersion", selected, plain)
    assert (without["uploads"], without["modelVersion"]["status"]) == ([], "DRAFT")
    # Said to be whole once more, given up, published: the job goes on with what is there.
    whole = {"id": a["id"], "sha256": empty}
    shown = "upload { id state } job { kind }"
    assert await change(ask, viewer, "completeUpload", shown, whole) == {
        "upload": {"id": a["id"], "state": "COMPLETED"},
        "job": a["job"],
        "userErrors": [],
    }
    assert a["job"] == {"kind": "VERIFY_FILE"}
    selected = "modelVersion { status } uploads { id } job { kind subject { id } }"
    assert await change(ask, viewer, "publishModelVersion", selected, {"id": version["id"]}) == {
        "modelVersion": None,
        "uploads": [],
        "job": None,
        "userErrors": [{"code": "INVALID_TRANSITION", "path": ["id"]}],
    }
    await change(ask, viewer, "abortUpload", shown, {"id": b["id"]})
    assert await change(ask, viewer, "publishModelVersion", selected, {"id": version["id"]}) == {
        "modelVersion": {"status": "PROCESSING"},
        "uploads": [],
        "job": {"kind": "FINALIZE_VERSION", "subject": {"id": version["id"]}},
        "userErrors": [],
    }


# What is stored ----------------------------------------------------------------------------------

STORAGE = (
    "storage { logicalBytes storedBytes dedupRatio reclaimableBytes reservedBytes quotaBytes }"
)
NOTHING = {
    "logicalBytes": "0",
    "storedBytes": "0",
    "dedupRatio": 1.0,
    "reclaimableBytes": "0",
    "reservedBytes": "0",
    "quotaBytes": None,
}


async def test_what_is_stored_for_oneself_and_for_organizations(
    ask: Asker, database: Database
) -> None:
    acme = await insert_actor("Acme", ActorKind.ORGANIZATION)
    other = await insert_actor("other", ActorKind.ORGANIZATION)
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    for number, state in enumerate(ModelState):
        await insert_model(
            acme, f"m{number}", state=state, stats={"size_bytes": 2**40, "stored_bytes": 2**39}
        )
    await insert_model(bob, "m", stats={"size_bytes": 5})
    await QuotaDocument(id=acme.id, limit_bytes=2**50, reserved_bytes=7).insert()
    viewer = viewer_of(alice, {acme.id: Role.VIEWER})
    used = {
        "logicalBytes": str(2**41),
        "storedBytes": str(2**40),
        "dedupRatio": 2.0,
        "reclaimableBytes": str(2**39),
        "reservedBytes": "7",
        "quotaBytes": str(2**50),
    }
    limited = ask.changed(quota_bytes=100)
    for asked in (limited, limited.by_core):
        answer = await asked("{ " + STORAGE + " }", viewer)
        assert (answer.data, answer.errors) == ({"storage": {**NOTHING, "quotaBytes": "100"}}, [])
        named = STORAGE.replace("storage", 'storage(owner: "aCME")')
        answer = await asked("{ " + named + " }", viewer)
        assert (answer.data, answer.errors) == ({"storage": used}, [])
        assert len(answer.commands) == 3  # who it is, its models, its quota
        ids = [global_id("Organization", each.id) for each in (acme, other)]
        answer = await asked(
            "query($ids: [ID!]!) { nodes(ids: $ids) { ... on Organization { " + STORAGE + " } } }",
            viewer,
            ids=ids,
        )
        assert answer.data["nodes"] == [{"storage": used}, {"storage": None}]
        assert len(answer.commands) == 3  # who they are, their models, their quotas
    named = STORAGE.replace("storage", 'storage(owner: "bob")')
    answer = await ask("{ " + named + " }", operator_of(alice))
    assert answer.data == {"storage": {**NOTHING, "logicalBytes": "5"}}


@pytest.mark.parametrize(
    ("who", "owner", "code"),
    [
        ("nobody", None, "UNAUTHENTICATED"),
        ("nobody", "acme", "UNAUTHENTICATED"),
        ("alice", "acme", "FORBIDDEN"),
        ("alice", "bob", "FORBIDDEN"),
        ("alice", "nobody-at-all", "NOT_FOUND"),
        ("without READ", None, "FORBIDDEN"),
        ("without READ", "alice", "FORBIDDEN"),
    ],
)
async def test_what_is_stored_is_not_for_everyone(
    ask: Asker, database: Database, who: str, owner: str | None, code: str
) -> None:
    await insert_actor("acme", ActorKind.ORGANIZATION)
    alice, _ = await insert_actor("alice"), await insert_actor("bob")
    viewers = {
        "nobody": ANONYMOUS,
        "alice": viewer_of(alice),
        "without READ": Viewer(user=row_of(alice), scopes=frozenset({Permission.WRITE})),
    }
    document = "query($owner: String) { storage(owner: $owner) { logicalBytes } }"
    for asked in (ask, ask.by_core):
        answer = await asked(document, viewers[who], owner=owner)
        assert answer.data is None
        assert [found for _, found in answer.errors] == [code]


async def test_a_quota_is_set_by_operators(ask: Asker, database: Database) -> None:
    acme, alice = await insert_actor("acme", ActorKind.ORGANIZATION), await insert_actor("alice")
    for owner in (acme, alice):
        given = {"ownerId": global_id(owner.kind.value, owner.id), "bytes": str(2**50)}
        refused = await change(ask, viewer_of(alice), "setQuota", STORAGE, given)
        assert refused == {"storage": None, "userErrors": [{"code": "FORBIDDEN", "path": None}]}
        assert await QuotaDocument.get(owner.id) is None
        for limit in (2**50, 0, None):
            found = await change(
                ask, operator_of(alice), "setQuota", STORAGE, {**given, "bytes": limit}
            )
            shown = None if limit is None else str(limit)
            assert found == {"storage": {**NOTHING, "quotaBytes": shown}, "userErrors": []}
    for bad in ("garbage", global_id("Model", acme.id), global_id("User", ObjectId("a" * 24))):
        found = await change(
            ask, operator_of(alice), "setQuota", STORAGE, {"ownerId": bad, "bytes": 1}
        )
        assert found == {
            "storage": None,
            "userErrors": [{"code": "NOT_FOUND", "path": ["ownerId"]}],
        }
