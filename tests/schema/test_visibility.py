"""Who sees what: lists, counts, facets, search, ids and files agree for each viewer."""

from typing import Any

import pytest
from beanie import PydanticObjectId
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorKind, MembershipDocument, Role
from modelharbor.db.connection import Database
from modelharbor.db.models import Grant, ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version, viewer_of

pytestmark = pytest.mark.anyio

EVERYWHERE = """
query Everywhere($sha: SHA256!) {
  models(orderBy: {field: NAME, direction: ASC}) {
    totalCount estimatedCount nodes { name }
    facets(fields: [VISIBILITY]) { buckets { value count } }
  }
  search(query: "whale") { totalCount nodes { ... on Model { name } } }
  suggest(prefix: "w")
  blob(sha256: $sha) { totalCount nodes { version { model { name } } sharedWith } }
}
"""


class World:
    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.viewers: dict[str, Viewer] = {"nobody": ANONYMOUS}


async def world(database: Database) -> World:
    """One model of each visibility in an organization, one granted, one deleted; equal contents."""
    made = World()
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    for login in ("member", "guest", "stranger"):
        made.viewers[login] = viewer_of(await insert_actor(login))
    member, guest = made.viewers["member"], made.viewers["guest"]
    assert member.user_id is not None
    assert guest.user_id is not None
    await MembershipDocument(
        organization_id=acme.id, user_id=member.user_id, role=Role.VIEWER
    ).insert()
    made.viewers["member"] = Viewer(
        user=member.user, roles={acme.id: Role.VIEWER}, scopes=member.scopes
    )
    for name, visibility, more in (
        ("w-public", Visibility.PUBLIC, {}),
        ("w-internal", Visibility.INTERNAL, {}),
        ("w-private", Visibility.PRIVATE, {}),
        (
            "w-shared",
            Visibility.PRIVATE,
            {"grants": [Grant(actor_id=PydanticObjectId(guest.user_id), role=Role.DOWNLOADER)]},
        ),
        ("w-deleted", Visibility.PUBLIC, {"state": ModelState.DELETED}),
    ):
        model = await insert_model(acme, name, visibility=visibility, summary="whale", **more)
        await insert_version(database, model, {"weights": 7})
        made.models[name] = model
    return made


SEEN = {
    "nobody": ["w-public"],
    "stranger": ["w-internal", "w-public"],
    "guest": ["w-internal", "w-public", "w-shared"],
    "member": ["w-internal", "w-private", "w-public", "w-shared"],
}


@pytest.mark.parametrize("who", SEEN)
async def test_lists_counts_facets_and_search_agree(
    ask: Asker, database: Database, who: str
) -> None:
    made = await world(database)
    names = SEEN[who]
    answer = await ask(EVERYWHERE, made.viewers[who], sha=f"{7:064x}")
    assert answer.errors == []
    models = answer.data["models"]
    assert [node["name"] for node in models["nodes"]] == names
    assert models["totalCount"] == models["estimatedCount"] == len(names)
    assert sum(b["count"] for b in models["facets"][0]["buckets"]) == len(names)
    assert sorted(node["name"] for node in answer.data["search"]["nodes"]) == names
    assert answer.data["search"]["totalCount"] == len(names)
    assert answer.data["suggest"] == [f"acme/{name}" for name in names]
    blob = answer.data["blob"]
    assert sorted(node["version"]["model"]["name"] for node in blob["nodes"]) == names
    assert blob["totalCount"] == len(names)
    assert {node["sharedWith"] for node in blob["nodes"]} == {len(names) - 1}


@pytest.mark.parametrize("who", SEEN)
async def test_foreign_ids_answer_like_unknown_ones(
    ask: Asker, database: Database, who: str
) -> None:
    made = await world(database)
    viewer = made.viewers[who]
    one = "query($id: ID!) { node(id: $id) { __typename id } }"
    unknown = (await ask(one, viewer, id=global_id("Model", ObjectId()))).data
    assert unknown == {"node": None}
    for name, model in made.models.items():
        version = await database.data["versions"].find_one({"model_id": model.id})
        file = await database.data["files"].find_one({"model_id": model.id})
        assert version is not None
        assert file is not None
        ids = [
            global_id("Model", model.id),
            global_id("ModelVersion", version["_id"]),
            global_id("ModelFile", file["_id"]),
        ]
        for each in ids:
            answer = await ask(one, viewer, id=each)
            if name in SEEN[who]:
                assert answer.data["node"]["id"] == each
            else:
                assert (answer.data, answer.errors) == (unknown, [])
        named = await ask(
            'query($n: String!, $id: ID!) { model(owner: "acme", name: $n) { name } byId: model(id: $id) { name } }',
            viewer,
            n=name,
            id=ids[0],
        )
        found = {"name": name} if name in SEEN[who] else None
        assert named.data == {"model": found, "byId": found}
        resolved = await ask(
            "query($r: String!) { resolve(ref: $r) { number } }", viewer, r=f"acme/{name}"
        )
        assert resolved.data == {"resolve": {"number": 1} if found else None}


async def test_nodes_keep_their_places(ask: Asker, database: Database) -> None:
    made = await world(database)
    ids = [
        global_id("Model", made.models["w-private"].id),
        "garbage",
        global_id("Model", made.models["w-public"].id),
        global_id("User", made.models["w-public"].id),
        global_id("Organization", made.models["w-public"].owner_id),
        global_id("User", made.models["w-public"].owner_id),
        "TW9kZWw6",
        global_id("Model", made.models["w-public"].id),
        "é",
        "x" * 10_000,
    ]
    answer = await ask("query($ids: [ID!]!) { nodes(ids: $ids) { __typename } }", ids=ids)
    assert answer.errors == []
    model, organization = {"__typename": "Model"}, {"__typename": "Organization"}
    assert answer.data == {
        "nodes": [None, None, model, None, organization, None, None, model, None, None]
    }
    refused = await ask("query($ids: [ID!]!) { nodes(ids: $ids) { id } }", ids=ids * 11)
    assert refused.errors == [("110 ids are given; 100 at most.", "BAD_USER_INPUT")]
    assert refused.commands == []


LINKS = """
{ model(owner: "acme", name: "NAME") { viewerCan latestVersion { files { nodes { downloadUrl(expiresIn: 60) } } } } }
"""


@pytest.mark.parametrize(
    ("who", "name", "can"),
    [
        ("nobody", "w-public", ["READ", "DOWNLOAD"]),
        ("stranger", "w-internal", ["READ", "DOWNLOAD"]),
        ("guest", "w-shared", ["READ", "DOWNLOAD"]),
        ("member", "w-private", ["READ"]),
    ],
)
async def test_links_need_the_permission_to_download(
    ask: Asker, database: Database, who: str, name: str, can: list[str]
) -> None:
    made = await world(database)
    answer = await ask(LINKS.replace("NAME", name), made.viewers[who])
    assert answer.errors == []
    assert answer.data["model"]["viewerCan"] == can
    [file] = answer.data["model"]["latestVersion"]["files"]["nodes"]
    if "DOWNLOAD" in can:
        assert file["downloadUrl"].startswith("http://test/files/")
    else:
        assert file["downloadUrl"] is None


async def test_only_members_see_members(ask: Asker, database: Database) -> None:
    made = await world(database)
    document = """
    query($id: ID!) { node(id: $id) { ... on Organization { members { totalCount nodes { role user { login } } } } } }
    """
    owner = global_id("Organization", made.models["w-public"].owner_id)
    for who, members in (("nobody", []), ("stranger", []), ("member", ["member"])):
        answer = await ask(document, made.viewers[who], id=owner)
        assert answer.errors == []
        page = answer.data["node"]["members"]
        assert [node["user"]["login"] for node in page["nodes"]] == members
        assert page["totalCount"] == len(members)
    member = made.viewers["member"].user_id
    assert member is not None
    listed = "query($id: ID!) { node(id: $id) { ... on User { organizations { totalCount nodes { login } } } } }"
    for who, logins in (("nobody", []), ("guest", []), ("member", ["acme"])):
        answer = await ask(listed, made.viewers[who], id=global_id("User", member))
        assert answer.errors == []
        page = answer.data["node"]["organizations"]
        assert [node["login"] for node in page["nodes"]] == logins
        assert page["totalCount"] == len(logins)


async def test_files_of_deleted_versions_are_gone(ask: Asker, database: Database) -> None:
    made = await world(database)
    model = made.models["w-public"]
    doomed = await insert_version(database, model, {"weights": 7})
    file = await database.data["files"].find_one({"version_id": doomed.id})
    assert file is not None
    document = """
    query($sha: SHA256!, $id: ID!) { node(id: $id) { id }
      models(filter: {fileSha256: $sha}) { totalCount }
      blob(sha256: $sha) { totalCount nodes { version { number } sharedWith } } }
    """
    given: dict[str, Any] = {"sha": f"{7:064x}", "id": global_id("ModelFile", file["_id"])}
    before = await ask(document, **given)
    assert before.data["blob"]["totalCount"] == 2
    admin = made.viewers["member"].user
    viewer = Viewer(user=admin, roles={model.owner_id: Role.ADMIN}, scopes=frozenset(Permission))
    gone = await ask(
        "mutation($i: DeleteModelVersionInput!) { deleteModelVersion(input: $i) { deletedId userErrors { code } } }",
        viewer,
        i={"id": global_id("ModelVersion", doomed.id)},
    )
    assert gone.data["deleteModelVersion"]["userErrors"] == []
    after = await ask(document, **given)
    assert after.errors == []
    assert after.data == {
        "node": None,
        "models": {"totalCount": 1},
        "blob": {"totalCount": 1, "nodes": [{"version": {"number": 1}, "sharedWith": 0}]},
    }


async def test_copies_of_contents_are_counted_in_few_commands(
    ask: Asker, database: Database
) -> None:
    """However many models hold them, and whoever may see these."""
    made = await world(database)
    document = "query($sha: SHA256!) { blob(sha256: $sha) { totalCount nodes { sharedWith } } }"
    few = await ask(document, sha=f"{7:064x}")
    assert few.data["blob"]["totalCount"] == 1
    template = await database.data["files"].find_one({})
    assert template is not None
    del template["_id"]
    foreign = made.models["w-private"].id
    await database.data["files"].insert_many(
        [
            {**template, "model_id": foreign, "version_id": ObjectId(), "path": f"f{index}"}
            for index in range(5_000)
        ]
    )
    many = await ask(document, sha=f"{7:064x}")
    assert many.data == few.data
    assert many.commands == few.commands
    assert len(many.commands) == 4


async def test_organizations_of_many_people_are_read_together(
    ask: Asker, database: Database
) -> None:
    made = await world(database)
    acme = made.models["w-public"].owner_id
    for index in range(12):
        person = await insert_actor(f"person{index}")
        await MembershipDocument(organization_id=acme, user_id=person.id, role=Role.VIEWER).insert()
    document = """
    query($id: ID!, $first: Int!) { node(id: $id) { ... on Organization { members(first: $first) {
      nodes { user { organizations(first: 1) { totalCount nodes { login } } } } } } } }
    """
    counts = []
    for first in (2, 13):
        answer = await ask(
            document, made.viewers["member"], id=global_id("Organization", acme), first=first
        )
        assert answer.errors == []
        people = answer.data["node"]["members"]["nodes"]
        assert [node["user"]["organizations"] for node in people] == [
            {"totalCount": 1, "nodes": [{"login": "acme"}]}
        ] * first
        counts.append(len(answer.commands))
    assert counts == [5, 5]


async def test_a_token_without_read_sees_no_members_or_tokens(
    ask: Asker, database: Database
) -> None:
    made = await world(database)
    member = made.viewers["member"]
    viewer = Viewer(user=member.user, roles=member.roles, scopes=frozenset({Permission.WRITE}))
    answer = await ask(
        "query($id: ID!) { viewer { login tokens { totalCount } organizations { totalCount } } node(id: $id) { ... on Organization { members { totalCount } } } }",
        viewer,
        id=global_id("Organization", made.models["w-public"].owner_id),
    )
    assert answer.errors == []
    assert answer.data == {
        "viewer": {"login": "member", "tokens": None, "organizations": {"totalCount": 0}},
        "node": {"members": {"totalCount": 0}},
    }


async def test_a_token_without_read_sees_what_nobody_sees(ask: Asker, database: Database) -> None:
    made = await world(database)
    user = made.viewers["member"].user
    for viewer in (Viewer(user=user, roles=made.viewers["member"].roles, scopes=frozenset()),):
        answer = await ask("{ models { nodes { name viewerCan } } }", viewer)
        assert answer.data == {"models": {"nodes": [{"name": "w-public", "viewerCan": ["READ"]}]}}
