"""No one is answered what another may see: everything that can be asked, by everybody, from hot caches.

The measure is a server without caches: what it answers to someone is what they may see.
"""

import os
from collections.abc import AsyncIterator, Iterator
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson
import pytest
from graphql import (
    FieldDefinitionNode,
    GraphQLField,
    GraphQLInterfaceType,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLUnionType,
    IntValueNode,
    ListTypeNode,
    NamedTypeNode,
    NonNullTypeNode,
    ObjectTypeDefinitionNode,
    TypeNode,
    get_named_type,
    is_leaf_type,
    parse,
)

from modelharbor.auth.viewer import Viewer
from modelharbor.db.connection import Database
from modelharbor.errors import HarborError
from modelharbor.execution.documents import DocumentStore, InvalidDocument
from modelharbor.loaders.rights import Rights
from modelharbor.schema import core
from modelharbor.schema.nodes import global_id
from modelharbor.schema.sdl import schema_text
from modelharbor.settings import Settings
from tests.faults.figures import is_long
from tests.fuzz.compare import LIMITS
from tests.fuzz.documents import Writer, draw_variables
from tests.fuzz.values import Values
from tests.http.pairs import NOBODY, Pair, pair

pytestmark = pytest.mark.anyio
DOCUMENTS: Final = 400 if is_long() else 40
"""Random ones."""
ROUNDS: Final = 3
SEED: Final = os.environ.get("SEED", "1")
VOLATILE: Final = frozenset({"latencyMs", "uptimeSeconds"})
"""What hangs on the time."""


@pytest.fixture
async def both(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    async with pair(settings, database, monkeypatch) as both:
        yield both


@cache
def unkept() -> frozenset[tuple[str, str]]:
    """Fields, by type, with which an answer is not kept, as the schema says it."""
    types = [
        each
        for each in parse(schema_text()).definitions
        if isinstance(each, ObjectTypeDefinitionNode)
    ]
    ages = {each.name.value: _age(each) for each in types}
    return frozenset(
        (each.name.value, field.name.value)
        for each in types
        for field in each.fields or ()
        if field.name.value.startswith("viewer")
        or 0 in (_age(field), ages.get(_named(field.type), 1) if _age(field) is None else 1)
    )


def _age(node: ObjectTypeDefinitionNode | FieldDefinitionNode) -> int | None:
    """Of a type that says nothing 0, of a field None."""
    for directive in node.directives or ():
        if directive.name.value == "cacheControl":
            for argument in directive.arguments or ():
                if argument.name.value == "maxAge" and isinstance(argument.value, IntValueNode):
                    return int(argument.value.value)
    return 0 if isinstance(node, ObjectTypeDefinitionNode) else None


def _named(node: TypeNode) -> str:
    while not isinstance(node, NamedTypeNode):
        assert isinstance(node, ListTypeNode | NonNullTypeNode)
        node = node.type
    return node.name.value


def whole(kind: Any, depth: int, *, kept: bool) -> str:
    """A selection of all fields of a type that need no arguments, so deep. `kept`: without those that
    forbid to keep the answer."""
    if isinstance(kind, GraphQLUnionType | GraphQLInterfaceType):
        parts = [
            f"... on {each.name} {whole(each, depth, kept=kept)}"
            for each in core.get_possible_types(kind)
        ]
        return "{ __typename " + " ".join(parts) + " }"
    assert isinstance(kind, GraphQLObjectType)
    found = ["__typename"]
    for name, field in kind.fields.items():
        inner = get_named_type(field.type)
        # Fields of different types that meet in one object must not have one name.
        alias = f"{kind.name}_{name}: {name}"
        if name in VOLATILE or _needs(field) or (kept and (kind.name, name) in unkept()):
            continue
        if is_leaf_type(inner):
            found.append(alias)
        elif depth > 0:
            few = "(first: 2)" if "first" in field.args else ""
            found.append(f"{alias}{few} {whole(inner, depth - 1, kept=kept)}")
    return "{ " + " ".join(found) + " }"


def _needs(field: GraphQLField) -> bool:
    return any(
        isinstance(each.type, GraphQLNonNull) and each.default_value is None
        for each in field.args.values()
    ) or bool({"fields", "number", "alias", "path"} & field.args.keys())


def matrix(pair: Pair, *, kept: bool) -> Iterator[str]:
    """Each root field, with all that is below it."""
    assert core.query_type is not None
    fields = core.query_type.fields

    def selected(name: str, depth: int) -> str:
        kind = get_named_type(fields[name].type)
        return "" if is_leaf_type(kind) else whole(kind, depth, kept=kept)

    kinds = {"Model": "models", "ModelVersion": "versions", "ModelFile": "files"}
    kinds |= {"User": "actors", "Organization": "actors", "Job": "jobs", "Upload": "uploads"}
    kinds |= {"Membership": "memberships", "ApiToken": "tokens"}
    for kind, collection in kinds.items():
        typed = core.get_type(kind)
        rows = [
            row for row in pair.rows[collection] if collection != "actors" or row["kind"] == kind
        ]
        for row in rows[:: max(1, len(rows) // 6)]:
            yield f'{{ node(id: "{global_id(kind, row["_id"])}") {{ ... on {kind} {whole(typed, 1, kept=kept)} }} }}'
        ids = ", ".join(f'"{global_id(kind, row["_id"])}"' for row in rows[:20])
        yield f"{{ nodes(ids: [{ids}]) {{ ... on {kind} {whole(typed, 0, kept=kept)} }} }}"
    for row in pair.rows["models"]:
        named = f'owner: "{row["owner_login"]}", name: "{row["name"]}"'
        yield f"{{ model({named}) {selected('model', 2)} }}"
        reference = f"{row['owner_login']}/{row['name']}"
        for end in ("", "@prod", ":1"):
            yield f'{{ resolve(ref: "{reference}{end}") {selected("resolve", 1)} }}'
    for arguments in (
        "first: 5",
        "first: 100",
        "first: 100, filter: {state: [ARCHIVED, ACTIVE]}",
        'first: 100, filter: {owner: {eq: "acme"}}',
        "first: 100, filter: {visibility: [PRIVATE, INTERNAL]}",
        'search: "whale"',
    ):
        yield f"{{ models({arguments}) {selected('models', 2)} }}"
    yield f'{{ search(query: "whale") {selected("search", 2)} }}'
    for prefix in ("a", "acme/", "ada/", "w"):
        yield f'{{ suggest(prefix: "{prefix}", first: 50) }}'
    for row in pair.rows["blobs"][:4]:
        yield f'{{ blob(sha256: "{row["sha256"]}") {selected("blob", 2)} }}'
    for row in pair.rows["jobs"]:
        yield f'{{ job(id: "{global_id("Job", row["_id"])}") {selected("job", 1)} }}'
    for row in pair.rows["uploads"][:8]:
        yield f'{{ upload(id: "{global_id("Upload", row["_id"])}") {selected("upload", 1)} }}'
    yield f"{{ jobs(first: 100) {selected('jobs', 2)} }}"
    yield f"{{ uploads(first: 100) {selected('uploads', 2)} }}"
    asked = 'range: {from: "2026-01-01T00:00:00Z", to: "2026-03-01T00:00:00Z"}'
    for metric, dimension in (
        ("DOWNLOADS", "MODEL"),
        ("VIEWS", "OWNER"),
        ("API_REQUESTS", "CLIENT"),
    ):
        given = f"input: {{metrics: [{metric}], groupBy: [{dimension}], {asked}}}"
        yield f"{{ analytics({given}) {selected('analytics', 3)} }}"
    yield f"{{ trending(first: 100) {selected('trending', 2)} }}"
    yield f"{{ operationStats {selected('operationStats', 2)} }}"
    for base, head in pairwise(pair.rows["versions"][:6]):
        both = [global_id("ModelVersion", each["_id"]) for each in (base, head)]
        given = f'base: "{both[0]}", head: "{both[1]}"'
        yield f"{{ compareVersions({given}) {selected('compareVersions', 2)} }}"
    yield f"{{ viewer {selected('viewer', 2)} }}"
    yield f"{{ storage {selected('storage', 1)} }}"
    for login in ("ada", "acme", "ADA", "nobody"):
        yield f'{{ storage(owner: "{login}") {selected("storage", 1)} }}'


def test_the_matrix_has_every_root_field() -> None:
    assert core.query_type is not None
    # The state of the server and of its caches is not of somebody; what is left of a budget moves.
    apart = {"health", "cacheStats", "rateLimit"}
    source = Path(__file__).read_text()
    for name in core.query_type.fields.keys() - apart:
        assert f"{{ {name}" in source, name


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "all"])
async def test_everybody_is_answered_everything_as_without_caches(both: Pair, kept: bool) -> None:
    random = Random(SEED)
    documents = list(matrix(both, kept=kept))
    random.shuffle(documents)
    if not is_long():
        documents = documents[: 40 if kept else 15]
    for document in documents:
        asking = both.principals * ROUNDS
        random.shuffle(asking)
        for principal in asking:
            await both.ask(principal, document)
    if kept:
        assert both.hits > len(documents)


async def test_random_operations_are_answered_as_without_caches(both: Pair) -> None:
    """With variables, fragments and directives, drawn for one principal and asked by all."""
    values, store = Values(both.rows), DocumentStore(core, Settings(**LIMITS))
    asked = number = 0
    while asked < DOCUMENTS:
        number += 1
        random = Random(f"{SEED}/{number}")
        written = Writer(core, values, random, "owner").write()
        if written.is_mutation or "facets" in written.text or "estimatedCount" in written.text:
            continue  # these may be half a minute old, each by its own clock
        try:
            store.get(written.text)
        except (InvalidDocument, HarborError):
            continue
        asked += 1
        asking = both.principals * 2
        random.shuffle(asking)
        for operation in written.operations:
            variables = draw_variables(operation, values, random, random.random() < 0.05)
            for principal in asking:
                more = {"variables": variables, "operationName": operation.name}
                await both.ask(principal, written.text, **more)
    assert both.hits > DOCUMENTS


LISTED: Final = (
    "{ models(first: 50) { totalCount nodes { id name visibility summary tags stats { likes } } } }"
)
MINE: Final = "{ models(first: 50) { nodes { name viewerCan viewerHasLiked } } }"


async def test_rights_that_change_change_answers_at_once(both: Pair) -> None:
    """What an owner changes, by the server with caches, is so for everybody with the next answer."""
    random = Random(SEED)
    models = [row for row in both.rows["models"] if row["owner_login"] in ("ada", "acme")]
    models = [row for row in models if row["state"] == "ACTIVE"]
    people = {row["login_lower"]: row["_id"] for row in both.rows["actors"]}
    asked = 0
    for number in range(60 if is_long() else 20):
        row = random.choice(models)
        model = global_id("Model", row["_id"])
        one = f'{{ model(owner: "{row["owner_login"]}", name: "{row["name"]}") {{ name summary visibility viewerCan }} }}'
        plain = f'{{ model(id: "{model}") {{ name summary visibility latestVersion {{ number files {{ totalCount }} }} }} }}'
        for principal in random.sample(both.principals, 5):
            for document in (LISTED, plain):
                await both.ask(principal, document)
        user = random.choice(("eve", "zoe", "bob"))
        granted = {
            "actorId": global_id("User", people[user]),
            "role": random.choice(("VIEWER", None)),
        }
        changes: list[tuple[str, dict[str, Any]]] = [
            (
                "updateModel",
                {"id": model, "visibility": random.choice(("PUBLIC", "PRIVATE", "INTERNAL"))},
            ),
            ("updateModel", {"id": model, "summary": f"summary {number}"}),
            ("grantRole", {"subjectId": model, **granted}),
            ("grantRole", {"subjectId": global_id("Organization", people["acme"]), **granted}),
            ("likeModel", {"id": model}),
        ]
        name, given = random.choice(changes)
        kind = f"{name[0].upper()}{name[1:]}Input"
        body = {
            "query": f"mutation($i: {kind}!) {{ {name}(input: $i) {{ userErrors {{ code message }} }} }}",
            "variables": {"i": given},
        }
        changed = await both.cached.post("/graphql", json=body, headers=both.headers("owner"))
        assert changed.json()["data"][name]["userErrors"] in ([], None) or name == "grantRole", (
            changed.json()
        )
        asking = both.principals
        random.shuffle(asking)
        for principal in asking:
            for document in (LISTED, plain, one, MINE):
                await both.ask(principal, document)
                asked += 1
    assert both.hits > asked // 4


async def test_what_becomes_private_while_it_is_asked_for(
    both: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was seen by those it belongs to before and is after: so it is in between, and by nobody else."""
    row = next(row for row in both.rows["models"] if row["owner_login"] == "borg")
    document = f'{{ model(owner: "borg", name: "{row["name"]}") {{ name visibility }} }}'
    of = Rights.of

    async def changes_then(self: Rights, viewer: Viewer) -> str:
        found = await of(self, viewer)
        await both.database.data["models"].update_one(
            {"_id": row["_id"]},
            {"$set": {"visibility": "PRIVATE", "principals": [f"actor:{row['owner_id']}"]}},
        )
        return found

    await both.ask("member", "{ models(first: 1) { nodes { name } } }")
    with monkeypatch.context() as patched:
        patched.setattr(Rights, "of", changes_then)
        body, headers = {"query": document}, both.headers("member")
        mine = (await both.cached.post("/graphql", json=body, headers=headers)).json()
    assert mine["data"]["model"] in (
        {"name": row["name"], "visibility": "PUBLIC"},
        {"name": row["name"], "visibility": "PRIVATE"},
    )
    nobodys = (await both.cached.post("/graphql", json=body)).json()
    assert nobodys["data"]["model"] in (None, {"name": row["name"], "visibility": "PUBLIC"})


async def by_name(both: Pair, text: str) -> dict[str, str]:
    """For GET: the document is known by its hash from now on."""
    named = {"persistedQuery": {"version": 1, "sha256Hash": sha256(text.encode()).hexdigest()}}
    for client in (both.cached, both.plain):
        sent = await client.post("/graphql", json={"query": text, "extensions": named})
        assert "data" in sent.json()
    return {"extensions": orjson.dumps(named).decode()}


def one_named(both: Pair, visibility: str) -> str:
    row = next(
        row
        for row in both.rows["models"]
        if row["visibility"] == visibility and row["state"] == "ACTIVE"
    )
    named = f'owner: "{row["owner_login"]}", name: "{row["name"]}"'
    return f"{{ model({named}) {{ name summary tags visibility }} }}"


@pytest.mark.parametrize("what", ["PUBLIC", "PRIVATE", "list"])
async def test_tags_of_others_confirm_nothing(both: Pair, what: str) -> None:
    """A 304 is for who would be answered the same."""
    text = LISTED if what == "list" else one_named(both, what)
    params = await by_name(both, text)
    answers, tags = {}, {}
    for principal in both.principals * 2:
        found = await both.same(principal, "GET", params=params, headers=both.headers(principal))
        answers[principal] = found.content
        tags[principal] = found.headers.get("etag")
    for theirs in both.principals:
        if tags[theirs] is None:
            continue
        for mine in both.principals:
            for known in (tags[theirs], f"W/{tags[theirs]}", f'"x", {tags[theirs]}'):
                headers = {**both.headers(mine), "if-none-match": known}
                for client in (both.cached, both.plain):
                    found = await client.get("/graphql", params=params, headers=headers)
                    told = (theirs, mine, known)
                    if answers[mine] == answers[theirs] and tags[mine] is not None:
                        assert found.status_code == 304, told
                        assert found.content == b"", told
                    else:
                        assert found.status_code != 304, told
    assert len({tags[each] for each in both.principals}) > (1 if what != "PUBLIC" else 0)


async def test_only_what_everybody_may_see_is_for_caches_on_the_way(both: Pair) -> None:
    """With credentials and then without, and the other way round, in any order."""
    random = Random(SEED)
    for text in (
        one_named(both, "PUBLIC"),
        one_named(both, "PRIVATE"),
        LISTED,
        MINE,
        "{ viewer { login } }",
    ):
        params = await by_name(both, text)
        nobodys = (await both.plain.get("/graphql", params=params)).content
        asking = both.principals * ROUNDS
        random.shuffle(asking)
        for principal in asking:
            told = f"{principal}: {text}"
            headers = both.headers(principal)
            found = await both.same(told, "GET", params=params, headers=headers)
            control = found.headers["cache-control"]
            vary = {each.strip().lower() for each in found.headers["vary"].split(",")}
            assert {"authorization", "accept", "accept-encoding"} <= vary, told
            if "public" in control:
                assert principal == NOBODY, told
                assert found.content == nobodys, told
            else:
                assert control == "private, no-store", told
        by_cookie = await both.cached.get("/graphql", params=params, headers={"cookie": "a=b"})
        assert by_cookie.headers["cache-control"] == "private, no-store"


def tricks(both: Pair, principal: str) -> list[list[tuple[str, str]]]:
    """Headers by which someone is, or may seem, somebody else."""
    token = both.tokens["owner"]
    mine = list(both.headers(principal).items())
    owners = ("authorization", f"Bearer {token}")
    return [
        [*mine, owners],
        [owners, *mine],
        [("authorization", f"bearer {token}")],
        [("authorization", f"BEARER   {token}  ")],
        [("authorization", f"Bearer\t{token}")],
        [("authorization", token)],
        [("authorization", f"Basic {token}")],
        [("authorization", f"Bearer {token}, Bearer x")],
        [("authorization", "")],
        [("authorization", "Bearer ")],
        [*mine, ("x-forwarded-for", "127.0.0.1"), ("x-forwarded-user", "ada")],
        [*mine, ("x-forwarded-authorization", f"Bearer {token}")],
        [*mine, ("proxy-authorization", f"Bearer {token}")],
        [*mine, ("cookie", f"authorization=Bearer {token}; token={token}")],
        [*mine, ("x-http-method-override", "DELETE")],
        [*mine, ("accept", "application/graphql-response+json")],
        [*mine, ("accept", "application/json;q=0.5, application/graphql-response+json;q=0.9")],
        [*mine, ("accept", "text/event-stream")],
        [*mine, ("accept", "image/png")],
        [*mine, ("accept-encoding", "gzip")],
        [*mine, ("cache-control", "no-cache"), ("pragma", "no-cache")],
        [*mine, ("host", "other.test")],
    ]


async def test_headers_make_nobody_somebody_else(both: Pair) -> None:
    random = Random(SEED)
    text = one_named(both, "PRIVATE")
    params = await by_name(both, text)
    for document in (text, LISTED, MINE):
        asking = [
            (each, trick) for each in (NOBODY, "stranger", "member") for trick in tricks(both, each)
        ]
        random.shuffle(asking)
        for principal, trick in [*asking, *asking]:
            # The answer to who is known stays hot.
            await both.ask("owner", document)
            told = f"{principal} {trick}: {document}"
            await both.same(told, json={"query": document}, headers=trick)
            if document is text:
                await both.same(told, "GET", params=params, headers=trick)
    leaks = {**params, "access_token": both.tokens["owner"], "authorization": both.tokens["owner"]}
    found = await both.same("in the address", "GET", params=leaks)
    assert found.json() == {"data": {"model": None}}
