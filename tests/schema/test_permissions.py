"""Every root field, for everyone: what each role may do, cell by cell.

The models are private and belong to an organization; the viewer has one role in it, or none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest
from bson import ObjectId

from modelharbor.auth.permissions import PERMISSIONS
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.connection import Database
from modelharbor.db.files import FileDocument
from modelharbor.db.jobs import JobDocument, JobState
from modelharbor.db.models import AliasEntry, ModelDocument, ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import UploadDocument, UploadState
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.schema import core
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

pytestmark = pytest.mark.anyio

P = Permission


@dataclass
class World:
    owner: ActorDocument
    model: ModelDocument
    archived: ModelDocument
    ready: VersionDocument
    draft: VersionDocument
    guest: ActorDocument
    job: JobDocument
    failed: JobDocument
    upload: UploadDocument
    whole: UploadDocument
    held: VersionDocument

    @property
    def model_id(self) -> str:
        return global_id("Model", self.model.id)

    @property
    def ready_id(self) -> str:
        return global_id("ModelVersion", self.ready.id)

    @property
    def draft_id(self) -> str:
        return global_id("ModelVersion", self.draft.id)


def one_upload(w: World) -> dict[str, Any]:
    return {"id": global_id("Upload", w.upload.id)}


SHELF: Final = "shelf"
"""What imports may be from."""
Inputs = Callable[[World], dict[str, Any]]
MUTATIONS: dict[str, tuple[Permission, Inputs]] = {
    "createModel": (P.WRITE, lambda w: {"owner": "acme", "name": "fresh"}),
    "updateModel": (P.WRITE, lambda w: {"id": w.model_id, "summary": "x"}),
    "archiveModel": (P.ADMINISTER, lambda w: {"id": w.model_id}),
    "restoreModel": (P.ADMINISTER, lambda w: {"id": global_id("Model", w.archived.id)}),
    "deleteModel": (P.ADMINISTER, lambda w: {"id": w.model_id}),
    "likeModel": (P.READ, lambda w: {"id": w.model_id}),
    "unlikeModel": (P.READ, lambda w: {"id": w.model_id}),
    "createModelVersion": (P.WRITE, lambda w: {"modelId": w.model_id}),
    "updateModelVersion": (P.WRITE, lambda w: {"id": w.draft_id, "label": "x"}),
    "publishModelVersion": (P.PUBLISH, lambda w: {"id": w.draft_id}),
    "archiveModelVersion": (P.PUBLISH, lambda w: {"id": w.ready_id}),
    "releaseModelVersion": (
        P.PUBLISH,
        lambda w: {"id": global_id("ModelVersion", w.held.id), "reason": "read by hand"},
    ),
    "deleteModelVersion": (P.WRITE, lambda w: {"id": w.draft_id}),
    "setModelAlias": (
        P.PROMOTE,
        lambda w: {"modelId": w.model_id, "name": "new", "versionId": w.ready_id},
    ),
    "deleteModelAlias": (P.PROMOTE, lambda w: {"modelId": w.model_id, "name": "old"}),
    "grantRole": (
        P.ADMINISTER,
        lambda w: {
            "subjectId": w.model_id,
            "actorId": global_id("User", w.guest.id),
            "role": "VIEWER",
        },
    ),
    "importModel": (
        P.PUBLISH,
        lambda w: {"source": SHELF, "folder": "tiny", "owner": "acme", "name": "fresh"},
    ),
    "cancelJob": (P.ADMINISTER, lambda w: {"id": global_id("Job", w.job.id)}),
    "createUploads": (
        P.WRITE,
        lambda w: {"versionId": w.draft_id, "files": [{"path": "new", "sizeBytes": 1}]},
    ),
    "completeUpload": (
        P.WRITE,
        lambda w: {"id": global_id("Upload", w.whole.id), "sha256": f"{9:064x}"},
    ),
    "pauseUpload": (P.WRITE, one_upload),
    "abortUpload": (P.WRITE, one_upload),
    "retryJob": (P.ADMINISTER, lambda w: {"id": global_id("Job", w.failed.id)}),
    "bulkUpdateModels": (P.WRITE, lambda w: {"ids": [w.model_id], "addTags": ["x"]}),
}
OPERATORS: dict[str, Inputs] = {
    "collectGarbage": lambda w: {},
    "setQuota": lambda w: {"ownerId": global_id("Organization", w.owner.id), "bytes": 1},
}
"""For who operates the site, whatever their role."""
OWN = {"createApiToken", "revokeApiToken", "bulkExport"}
"""Of one's own, whatever the role: tested in tests/resolvers and below for nobody."""

QUERIES: dict[str, tuple[Callable[[World], str], Callable[[World], Any]]] = {
    "node": (lambda w: f'node(id: "{w.model_id}") {{ id }}', lambda w: {"id": w.model_id}),
    "nodes": (lambda w: f'nodes(ids: ["{w.ready_id}"]) {{ id }}', lambda w: [{"id": w.ready_id}]),
    "model": (lambda w: 'model(owner: "acme", name: "m") { id }', lambda w: {"id": w.model_id}),
    "models": (
        lambda w: "models { totalCount nodes { id } }",
        lambda w: {"totalCount": 1, "nodes": [{"id": w.model_id}]},
    ),
    "resolve": (lambda w: 'resolve(ref: "acme/m@old") { id }', lambda w: {"id": w.ready_id}),
    "compareVersions": (
        lambda w: f'compareVersions(base: "{w.ready_id}", head: "{w.draft_id}") {{ bytesShared }}',
        lambda w: {"bytesShared": "7"},
    ),
    "trending": (
        lambda w: "trending { totalCount nodes { id } }",
        lambda w: {"totalCount": 1, "nodes": [{"id": w.model_id}]},
    ),
    "search": (
        lambda w: 'search(query: "whale") { totalCount nodes { ... on Model { id } } }',
        lambda w: {"totalCount": 1, "nodes": [{"id": w.model_id}]},
    ),
    "suggest": (lambda w: 'suggest(prefix: "acme/m")', lambda w: ["acme/m"]),
    "blob": (
        lambda w: f'blob(sha256: "{7:064x}") {{ totalCount nodes {{ path }} }}',
        lambda w: {"totalCount": 2, "nodes": [{"path": "a"}, {"path": "a"}]},
    ),
    "job": (
        lambda w: f'job(id: "{global_id("Job", w.job.id)}") {{ state }}',
        lambda w: {"state": "QUEUED"},
    ),
    "jobs": (
        lambda w: "jobs { totalCount nodes { state } }",
        lambda w: {"totalCount": 2, "nodes": [{"state": "FAILED"}, {"state": "QUEUED"}]},
    ),
    "upload": (
        lambda w: f'upload(id: "{global_id("Upload", w.upload.id)}") {{ path }}',
        lambda w: {"path": "sent"},
    ),
    "uploads": (
        lambda w: "uploads(state: [CREATED]) { totalCount nodes { path } }",
        lambda w: {"totalCount": 1, "nodes": [{"path": "sent"}]},
    ),
}
HIDDEN: dict[str, Any] = {
    "node": None,
    "nodes": [None],
    "model": None,
    "models": {"totalCount": 0, "nodes": []},
    "resolve": None,
    "compareVersions": None,
    "trending": {"totalCount": 0, "nodes": []},
    "search": {"totalCount": 0, "nodes": []},
    "suggest": [],
    "blob": {"totalCount": 0, "nodes": []},
    "job": None,
    "jobs": {"totalCount": 0, "nodes": []},
    "upload": None,
    "uploads": {"totalCount": 0, "nodes": []},
}
SUBSCRIPTIONS = {
    "jobProgress",
    "jobs",
    "uploadProgress",
    "modelEvents",
    "modelsChanged",
    "analytics",
}
"""Who is told what: tested in tests/streams."""
OPEN = {"viewer", "health", "storage", "rateLimit", "cacheStats", "analytics", "operationStats"}
"""Of oneself, and of the server; what is stored for others is tested in test_uploads.py, what is for
operators in test_cache.py, what was used in test_analytics.py."""


async def world(database: Database) -> World:
    owner = await insert_actor("acme", ActorKind.ORGANIZATION)
    admin = await insert_actor("admin")
    await MembershipDocument(organization_id=owner.id, user_id=admin.id, role=Role.ADMIN).insert()
    guest = await insert_actor("guest")
    model = await insert_model(owner, "m", visibility=Visibility.PRIVATE, summary="whale")
    ready = await insert_version(database, model, {"a": 7})
    draft = await insert_version(database, model, {"a": 7}, status=VersionStatus.DRAFT)
    taking = await insert_version(database, model, {}, status=VersionStatus.UPLOADING)
    held = await insert_version(database, model, {}, status=VersionStatus.QUARANTINED)
    await database.data["models"].update_one(
        {"_id": model.id},
        {
            "$set": {
                "latest_version_id": ready.id,
                "aliases": [AliasEntry(name="old", version_id=ready.id).model_dump()],
            }
        },
    )
    archived = await insert_model(
        owner, "archived", visibility=Visibility.PRIVATE, state=ModelState.ARCHIVED
    )
    assert await FileDocument.count() == 2
    subject = {"type": "Model", "id": model.id}
    job = await insert_job(admin, owner, subject=subject)
    failed = await insert_job(admin, owner, subject=subject, state=JobState.FAILED)
    upload = await insert_upload(admin, model, taking, "sent")
    whole = await insert_upload(admin, model, taking, "whole", state=UploadState.RECEIVED)
    return World(owner, model, archived, ready, draft, guest, job, failed, upload, whole, held)


async def viewer_with(role: Role | None, made: World) -> Viewer:
    someone = await insert_actor("someone")
    if role is None:
        return viewer_of(someone)
    await MembershipDocument(organization_id=made.owner.id, user_id=someone.id, role=role).insert()
    return viewer_of(someone, {made.owner.id: role})


async def everything(database: Database) -> dict[str, list[Any]]:
    """All that a refused mutation might have changed."""
    return {
        name: await database.data[name].find().sort("_id", 1).to_list()
        for name in (
            "models",
            "versions",
            "likes",
            "events",
            "memberships",
            "tokens",
            "cards",
            "jobs",
            "uploads",
            "quotas",
        )
    }


def test_the_table_names_every_root_field() -> None:
    assert core.mutation_type is not None
    assert core.query_type is not None
    assert core.subscription_type is not None
    assert set(core.subscription_type.fields) == SUBSCRIPTIONS
    assert set(core.mutation_type.fields) == MUTATIONS.keys() | OWN | OPERATORS.keys()
    assert set(core.query_type.fields) == QUERIES.keys() | OPEN
    assert QUERIES.keys() == HIDDEN.keys()


@pytest.fixture
def ask(ask: Asker) -> Asker:
    folder = ask.settings.data_path / SHELF
    (folder / "tiny").mkdir(parents=True)
    return ask.changed(import_roots={SHELF: folder})


async def mutate(ask: Asker, viewer: Viewer, name: str, given: dict[str, Any]) -> Any:
    kind = f"{name[0].upper()}{name[1:]}Input"
    return await ask(
        f"mutation($i: {kind}!) {{ {name}(input: $i) {{ userErrors {{ code message }} }} }}",
        viewer,
        i=given,
    )


@pytest.mark.parametrize("role", [*Role, None])
async def test_each_mutation_for_each_role(
    ask: Asker, database: Database, role: Role | None
) -> None:
    for name, (needed, inputs) in MUTATIONS.items():
        made = await world(database)
        viewer = await viewer_with(role, made)
        before = await everything(database)
        answer = await mutate(ask, viewer, name, inputs(made))
        assert answer.errors == [], name
        codes = [error["code"] for error in answer.data[name]["userErrors"]]
        if role is not None and needed in PERMISSIONS[role]:
            assert codes == [], (name, role)
            if name != "unlikeModel":
                assert await everything(database) != before, (name, role)
        else:
            hidden = role is None and name not in ("createModel", "importModel")
            assert codes == ["NOT_FOUND" if hidden else "FORBIDDEN"], (name, role)
            assert await everything(database) == before, (name, role)
        for collection in await database.data.list_collection_names():
            if collection != "migrations":
                await database.data[collection].delete_many({})


async def test_each_mutation_for_nobody(ask: Asker, database: Database) -> None:
    made = await world(database)
    before = await everything(database)
    own: dict[str, dict[str, Any]] = {
        "createApiToken": {"name": "x", "scopes": ["READ"]},
        "bulkExport": {"query": "{ models { nodes { id } } }"},
        "revokeApiToken": {"id": global_id("ApiToken", ObjectId())},
    }
    for name in MUTATIONS.keys() | OWN | OPERATORS.keys():
        inputs = MUTATIONS[name][1] if name in MUTATIONS else OPERATORS.get(name)
        given = inputs(made) if inputs else own[name]
        answer = await mutate(ask, ANONYMOUS, name, given)
        assert [code for _, code in answer.errors] == ["UNAUTHENTICATED"], name
        assert answer.commands == []
    assert await everything(database) == before


@pytest.mark.parametrize("permission", [p for p in Permission if p is not P.OPERATE])
async def test_a_token_without_the_scope_may_not(
    ask: Asker, database: Database, permission: Permission
) -> None:
    """An administrator's token that lacks one scope: FORBIDDEN (or not there, without READ)."""
    made = await world(database)
    viewer = await viewer_with(Role.ADMIN, made)
    viewer = Viewer(user=viewer.user, roles=viewer.roles, scopes=viewer.scopes - {permission})
    before = await everything(database)
    for name, (needed, inputs) in MUTATIONS.items():
        if needed is not permission:
            continue
        answer = await mutate(ask, viewer, name, inputs(made))
        assert answer.errors == []
        [error] = answer.data[name]["userErrors"]
        if permission is P.READ:
            assert error["code"] == "NOT_FOUND"
        else:
            assert error["code"] == "FORBIDDEN"
            assert permission.value in error["message"]
    assert await everything(database) == before


@pytest.mark.parametrize("role", [*Role, None])
async def test_each_query_for_each_role(ask: Asker, database: Database, role: Role | None) -> None:
    made = await world(database)
    member = await viewer_with(role, made)
    viewers = [member] if role is not None else [member, ANONYMOUS]
    for viewer in viewers:
        for name, (document, visible) in QUERIES.items():
            answer = await ask("{ " + document(made) + " }", viewer)
            assert answer.errors == [], name
            expected = visible(made) if role is not None else HIDDEN[name]
            assert answer.data == {name: expected}, (name, role)
        own = await ask("{ viewer { login } health { status } rateLimit { cost } }", viewer)
        login = {"login": "someone"} if viewer.user else None
        status, cost = {"status": "ok"}, {"cost": 0}
        assert own.data == {"viewer": login, "health": status, "rateLimit": cost}


@pytest.mark.parametrize("name", sorted(OPERATORS))
async def test_each_mutation_of_operators(ask: Asker, database: Database, name: str) -> None:
    """An administrator's role does not make one; nor does being one without the scope OPERATE."""
    made = await world(database)
    viewer = await viewer_with(Role.ADMIN, made)
    assert viewer.user is not None
    operator = {**viewer.user, "is_operator": True}
    scopes = frozenset(Permission)
    before = await everything(database)
    for each in (
        viewer,
        Viewer(user=viewer.user, roles=viewer.roles, scopes=scopes),
        Viewer(user=operator, roles=viewer.roles, scopes=viewer.scopes),
    ):
        answer = await mutate(ask, each, name, OPERATORS[name](made))
        assert answer.errors == []
        assert [error["code"] for error in answer.data[name]["userErrors"]] == ["FORBIDDEN"]
        assert await everything(database) == before
    answer = await mutate(ask, Viewer(user=operator, scopes=scopes), name, OPERATORS[name](made))
    assert answer.data[name]["userErrors"] == []
    assert await everything(database) != before
