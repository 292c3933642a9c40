"""Every mutation once through GraphQL: the answer, the refusal as data, and what can be read after."""

from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.connection import Database
from modelharbor.db.files import FileDocument
from modelharbor.db.models import Visibility
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version, viewer_of

pytestmark = pytest.mark.anyio

ERRORS = "userErrors { code message path }"


def mutation(name: str, fields: str) -> str:
    kind = name[0].upper() + name[1:]
    return f"mutation($i: {kind}Input!) {{ {name}(input: $i) {{ {fields} {ERRORS} }} }}"


async def changed(
    ask: Asker, viewer: Viewer, name: str, fields: str, /, **given: Any
) -> dict[str, Any]:
    answer = await ask(mutation(name, fields), viewer, i=given)
    assert answer.errors == []
    found: dict[str, Any] = answer.data[name]
    return found


async def test_a_model_through_its_life(ask: Asker, database: Database) -> None:
    alice = viewer_of(await insert_actor("alice"))
    made = await changed(
        ask,
        alice,
        "createModel",
        "model { id fullName visibility state revision tags properties card { markdown metadata html } viewerCan }",
        owner="alice",
        name="Whale",
        tags=["a", "b"],
        properties={"layers": 12},
        cardMarkdown="---\nlicense: mit\n---\n# Whale\n<script>alert(1)</script>",
        visibility="PUBLIC",
    )
    assert made["userErrors"] == []
    model = made["model"]
    assert model == {
        "id": model["id"],
        "fullName": "alice/Whale",
        "visibility": "PUBLIC",
        "state": "ACTIVE",
        "revision": 1,
        "tags": ["a", "b"],
        "properties": {"layers": 12},
        "card": {
            "markdown": "---\nlicense: mit\n---\n# Whale\n<script>alert(1)</script>",
            "metadata": {"license": "mit"},
            "html": model["card"]["html"],
        },
        "viewerCan": ["READ", "DOWNLOAD", "WRITE", "PUBLISH", "PROMOTE", "ADMINISTER"],
    }
    assert "<h1>Whale</h1>" in model["card"]["html"]
    assert "<script" not in model["card"]["html"]

    again = await changed(ask, alice, "createModel", "model { id }", owner="alice", name="WHALE")
    assert again["model"] is None
    assert [(e["code"], e["path"]) for e in again["userErrors"]] == [("ALREADY_EXISTS", ["name"])]

    updated = await changed(
        ask,
        alice,
        "updateModel",
        "model { revision summary tags }",
        id=model["id"],
        expectedRevision=1,
        summary="Big",
        addTags=["c"],
        removeTags=["a"],
    )
    assert updated == {
        "model": {"revision": 2, "summary": "Big", "tags": ["b", "c"]},
        "userErrors": [],
    }
    stale = await changed(
        ask, alice, "updateModel", "model { id }", id=model["id"], expectedRevision=1, summary=None
    )
    assert [e["code"] for e in stale["userErrors"]] == ["STALE_REVISION"]
    cleared = await changed(
        ask, alice, "updateModel", "model { summary tags }", id=model["id"], summary=None
    )
    assert cleared["model"] == {"summary": None, "tags": ["b", "c"]}

    for name, state in (
        ("archiveModel", "ARCHIVED"),
        ("restoreModel", "ACTIVE"),
    ):
        done = await changed(ask, alice, name, "model { state }", id=model["id"])
        assert done == {"model": {"state": state}, "userErrors": []}
    refused = await changed(ask, alice, "restoreModel", "model { state }", id=model["id"])
    assert [e["code"] for e in refused["userErrors"]] == ["INVALID_TRANSITION"]

    gone = await changed(ask, alice, "deleteModel", "deletedId", id=model["id"])
    assert gone == {"deletedId": model["id"], "userErrors": []}
    after = await ask(
        "query($id: ID!) { node(id: $id) { id } model(id: $id) { id } models { totalCount } }",
        alice,
        id=model["id"],
    )
    assert after.data == {"node": None, "model": None, "models": {"totalCount": 0}}
    back = await changed(ask, alice, "restoreModel", "model { fullName }", id=model["id"])
    assert back == {"model": {"fullName": "alice/Whale"}, "userErrors": []}


async def test_likes_are_counted_once(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    viewer = viewer_of(alice)
    model = await insert_model(alice, "m")
    model_id = global_id("Model", model.id)
    fields = "model { stats { likes } viewerHasLiked }"
    for name, likes in (("likeModel", 1), ("likeModel", 1), ("unlikeModel", 0), ("unlikeModel", 0)):
        done = await changed(ask, viewer, name, fields, id=model_id)
        assert done["model"] == {"stats": {"likes": likes}, "viewerHasLiked": likes == 1}


async def test_a_version_through_its_life(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    viewer = viewer_of(alice)
    model = await insert_model(alice, "m")
    model_id = global_id("Model", model.id)
    made = await changed(
        ask,
        viewer,
        "createModelVersion",
        "modelVersion { id number status createdBy { login } model { stats { versions } } }",
        modelId=model_id,
        label="v1",
    )
    version = made["modelVersion"]
    version_id = version.pop("id")
    assert version == {
        "number": 1,
        "status": "DRAFT",
        "createdBy": {"login": "alice"},
        "model": {"stats": {"versions": 1}},
    }
    empty = await changed(ask, viewer, "publishModelVersion", "modelVersion { id }", id=version_id)
    assert [e["code"] for e in empty["userErrors"]] == ["BAD_INPUT"]

    stored = await database.data["versions"].find_one({})
    assert stored is not None
    await FileDocument(
        version_id=stored["_id"], model_id=model.id, path="a.bin", size_bytes=3, sha256="a" * 64
    ).insert()
    ready = await changed(
        ask,
        viewer,
        "publishModelVersion",
        "modelVersion { status aliases { name } model { latestVersion { number } } }",
        id=version_id,
        setAliases=["production"],
    )
    assert ready == {
        "modelVersion": {
            "status": "READY",
            "aliases": [{"name": "production"}],
            "model": {"latestVersion": {"number": 1}},
        },
        "userErrors": [],
    }
    pointed = await changed(
        ask,
        viewer,
        "setModelAlias",
        "alias { id name protected model { name } version { number } setBy { login } }",
        modelId=model_id,
        name="champion",
        versionId=version_id,
    )
    alias = pointed["alias"]
    alias_id = alias.pop("id")
    assert alias == {
        "name": "champion",
        "protected": False,
        "model": {"name": "m"},
        "version": {"number": 1},
        "setBy": {"login": "alice"},
    }
    by_id = await ask(
        "query($id: ID!) { node(id: $id) { __typename id ... on Alias { name } } }", id=alias_id
    )
    assert by_id.data == {"node": {"__typename": "Alias", "id": alias_id, "name": "champion"}}
    resolved = await ask('{ resolve(ref: "alice/m@champion") { number } }')
    latest = await ask(
        '{ model(owner: "alice", name: "m") { version(alias: "latest") { number } } resolve(ref: "alice/m@latest") { number } }'
    )
    assert latest.data == {"model": {"version": {"number": 1}}, "resolve": {"number": 1}}
    assert resolved.data == {"resolve": {"number": 1}}

    held = await changed(ask, viewer, "deleteModelVersion", "deletedId", id=version_id)
    assert [e["code"] for e in held["userErrors"]] == ["CONFLICT"]
    for name in ("champion", "production"):
        gone = await changed(
            ask, viewer, "deleteModelAlias", "deletedId", modelId=model_id, name=name
        )
        assert gone["userErrors"] == []
    renamed = await changed(
        ask, viewer, "updateModelVersion", "modelVersion { label }", id=version_id, label=None
    )
    assert renamed["modelVersion"] == {"label": None}
    archived = await changed(
        ask,
        viewer,
        "archiveModelVersion",
        "modelVersion { status model { latestVersion { id } } }",
        id=version_id,
    )
    assert archived["modelVersion"] == {"status": "ARCHIVED", "model": {"latestVersion": None}}
    deleted = await changed(ask, viewer, "deleteModelVersion", "deletedId", id=version_id)
    assert deleted == {"deletedId": version_id, "userErrors": []}
    after = await ask(
        '{ model(owner: "alice", name: "m") { versions { totalCount nodes { id } } } }'
    )
    assert after.data == {"model": {"versions": {"totalCount": 0, "nodes": []}}}
    kinds = [row["kind"] async for row in database.data["events"].find().sort("_id", 1)]
    assert kinds == [
        "VERSION_CREATED",
        "VERSION_READY",
        "ALIAS_SET",
        "ALIAS_SET",
        "ALIAS_DELETED",
        "ALIAS_DELETED",
        "VERSION_UPDATED",
        "VERSION_ARCHIVED",
        "VERSION_DELETED",
    ]


async def test_roles_and_tokens(ask: Asker, database: Database) -> None:
    alice, bob = await insert_actor("alice"), await insert_actor("bob")
    model = await insert_model(alice, "m", visibility=Visibility.PRIVATE)
    viewer = viewer_of(alice)
    seen = '{ model(owner: "alice", name: "m") { viewerCan } }'
    assert (await ask(seen, viewer_of(bob))).data == {"model": None}
    granted = await changed(
        ask,
        viewer,
        "grantRole",
        "granted",
        subjectId=global_id("Model", model.id),
        actorId=global_id("User", bob.id),
        role="VIEWER",
    )
    assert granted == {"granted": True, "userErrors": []}
    assert (await ask(seen, viewer_of(bob))).data == {"model": {"viewerCan": ["READ"]}}
    forgotten = await changed(
        ask,
        viewer,
        "grantRole",
        "granted",
        subjectId=global_id("Model", model.id),
        actorId=global_id("User", bob.id),
    )
    assert [(e["code"], e["path"]) for e in forgotten["userErrors"]] == [("BAD_INPUT", ["role"])]
    assert (await ask(seen, viewer_of(bob))).data == {"model": {"viewerCan": ["READ"]}}
    refused = await changed(
        ask,
        viewer_of(bob),
        "grantRole",
        "granted",
        subjectId=global_id("Model", model.id),
        actorId=global_id("User", bob.id),
        role="ADMIN",
    )
    assert refused["granted"] is False
    assert [e["code"] for e in refused["userErrors"]] == ["FORBIDDEN"]

    made = await changed(
        ask,
        viewer,
        "createApiToken",
        "secret token { id name prefix scopes lastUsedAt }",
        name="laptop",
        scopes=["READ"],
    )
    assert made["userErrors"] == []
    assert made["secret"].startswith(made["token"]["prefix"])
    mine = await ask("{ viewer { login tokens { totalCount nodes { name } } } }", viewer)
    assert mine.data == {
        "viewer": {"login": "alice", "tokens": {"totalCount": 1, "nodes": [{"name": "laptop"}]}}
    }
    foreign = await ask(
        "query($id: ID!) { node(id: $id) { ... on User { login tokens { totalCount } } } }",
        viewer_of(bob),
        id=global_id("User", alice.id),
    )
    assert foreign.data == {"node": {"login": "alice", "tokens": None}}
    not_his = await changed(
        ask, viewer_of(bob), "revokeApiToken", "deletedId", id=made["token"]["id"]
    )
    assert [e["code"] for e in not_his["userErrors"]] == ["NOT_FOUND"]
    revoked = await changed(ask, viewer, "revokeApiToken", "deletedId", id=made["token"]["id"])
    assert revoked == {"deletedId": made["token"]["id"], "userErrors": []}


async def test_nobody_may_change_anything(ask: Asker, database: Database) -> None:
    answer = await ask(mutation("likeModel", "model { id }"), i={"id": "x"})
    assert [code for _, code in answer.errors] == ["UNAUTHENTICATED"]
    assert answer.data is None
    assert answer.commands == []


async def test_ids_of_other_kinds_are_not_found(ask: Asker, database: Database) -> None:
    alice = viewer_of(await insert_actor("alice"))
    for given in (
        "x",
        "",
        "TW9kZWw6eA==",
        global_id("User", ObjectId()),
        global_id("Model", ObjectId()),
    ):
        done = await changed(ask, alice, "likeModel", "model { id }", id=given)
        assert [e["code"] for e in done["userErrors"]] == ["NOT_FOUND"], given


async def test_two_mutations_in_one_operation_see_each_other(
    ask: Asker, database: Database
) -> None:
    alice = await insert_actor("alice")
    model = await insert_model(alice, "m")
    first = await insert_version(database, model, {"a": 1})
    second = await insert_version(database, model, {"a": 1})
    document = """
    mutation($m: ID!, $a: ID!, $b: ID!) {
      one: setModelAlias(input: {modelId: $m, name: "x", versionId: $a}) { alias { model { aliases { version { number } } } } }
      two: setModelAlias(input: {modelId: $m, name: "x", versionId: $b}) { alias { model { aliases { version { number } } } } }
    }
    """
    answer = await ask(
        document,
        viewer_of(alice),
        m=global_id("Model", model.id),
        a=global_id("ModelVersion", first.id),
        b=global_id("ModelVersion", second.id),
    )
    assert answer.errors == []
    numbers = [
        answer.data[name]["alias"]["model"]["aliases"][0]["version"]["number"]
        for name in ("one", "two")
    ]
    assert numbers == [1, 2]
