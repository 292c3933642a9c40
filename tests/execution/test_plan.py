"""Queries as plans: the bytes are graphql-core's, the commands do not grow, and nothing more is read than is
told."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from beanie import PydanticObjectId
from graphql import parse

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import FileFormat, FileRole
from modelharbor.db.models import (
    AliasEntry,
    CardDocument,
    Grant,
    LikeDocument,
    ModelState,
    Visibility,
)
from modelharbor.db.tokens import Permission, TokenDocument
from modelharbor.db.versions import VersionStatus
from modelharbor.execution.documents import WAYS, DocumentStore
from modelharbor.execution.selection import MOST_FIELDS
from modelharbor.schema import core, schema
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.asking import Asker
from tests.documents import START, insert_actor, insert_model, insert_version, viewer_of
from tests.explaining import Captured

pytestmark = pytest.mark.anyio

ROOT: Final = Path(__file__).parent.parent.parent
LARGE: Final = 2**53 + 1  # a number in JSON would lose its last digit
MOMENT: Final = datetime(2026, 2, 3, 4, 5, 6, 789000, UTC)
SHA: Final = f"{7:064x}"


@dataclass
class World:
    """Three models: one with everything, one of a person, one bare and private."""

    ids: dict[str, str] = field(default_factory=dict)
    viewer: Viewer = ANONYMOUS


async def world(database: Database) -> World:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION, display_name="Acme")
    ada = await insert_actor("ada", avatar_url="https://pictures.test/ada.png")
    eve = await insert_actor("eve", display_name="Eve <e@e>")
    await MembershipDocument(organization_id=acme.id, user_id=ada.id, role=Role.ADMIN).insert()
    full = await insert_model(
        acme,
        "blue-whale",
        display_name="Blue & whale",
        summary="A whale of a <model>",
        task="text-generation",
        library="transformers",
        license="mit",
        languages=["en", "de"],
        tags=["whale", "été"],
        formats=["SAFETENSORS"],
        properties={"size": 7, "nested": {"a": [1, None, {"b": 0.5}], "1": True}},
        revision=3,
        updated_at=MOMENT,
        grants=[Grant(actor_id=PydanticObjectId(eve.id), role=Role.DOWNLOADER)],
        stats={
            "downloads_30d": 12,
            "downloads_all": LARGE,
            "stored_bytes": 2**62,
            "trending_score": 1.25,
        },
    )
    files = {"config.json": 7, "weights/model.safetensors": 2**41}
    first = await insert_version(
        database, full, files, label="v1", created_by_id=ada.id, published_at=MOMENT
    )
    second = await insert_version(
        database, full, {"config.json": 7}, tags=["new"], properties={"x": [1.5]}, digest=SHA
    )
    await insert_version(database, full, {}, status=VersionStatus.DRAFT)
    await database.data["files"].update_one(
        {"version_id": second.id},
        {"$set": {"role": FileRole.CONFIG.value, "format": FileFormat.JSON.value}},
    )
    entries = [
        AliasEntry(
            name="prod", version_id=first.id, protected=True, set_by_id=ada.id, set_at=START
        ),
        AliasEntry(name="beta", version_id=second.id, set_at=MOMENT),
    ]
    await database.data["models"].update_one(
        {"_id": full.id},
        {
            "$set": {
                "aliases": [entry.model_dump() for entry in entries],
                "latest_version_id": second.id,
            }
        },
    )
    await CardDocument(
        id=full.id, markdown="# Whale", metadata={"tags": ["x", 1]}, html="<h1>Whale</h1>"
    ).insert()
    other = await insert_model(ada, "tiny-whale", task="text-generation", tags=["tiny"])
    await insert_version(database, other, {"config.json": 7})
    bare = await insert_model(eve, "bare", visibility=Visibility.PRIVATE, state=ModelState.ARCHIVED)
    await LikeDocument(user_id=ada.id, model_id=full.id).insert()
    for number in range(3):
        await TokenDocument(
            user_id=ada.id,
            name=f"token {number}",
            prefix=f"mh_{number}",
            secret_sha256=f"{number:064x}",
            scopes=[Permission.READ, Permission.WRITE][: number + 1],
            created_at=START,
            last_used_at=MOMENT if number == 1 else None,
        ).insert()
    file = await database.data["files"].find_one({"version_id": second.id})
    assert file is not None
    made = {
        "acme": ("Organization", acme.id),
        "ada": ("User", ada.id),
        "full": ("Model", full.id),
        "bare": ("Model", bare.id),
        "version": ("ModelVersion", second.id),
        "file": ("ModelFile", file["_id"]),
    }
    ids = {name: str(global_id(*each)) for name, each in made.items()}
    return World(ids, viewer_of(ada, {acme.id: Role.ADMIN}))


Given = Callable[[World], Row]
Shape = tuple[str, list[Given]]


def nothing(made: World) -> Row:
    return {}


def these(**values: Any) -> Given:
    return lambda made: values


def switched(*names: str) -> list[Given]:
    """Every combination of the values of some variables."""
    return [
        these(**dict(zip(names, values, strict=True)))
        for values in product((True, False), repeat=len(names))
    ]


SORTED: Final = "orderBy: {field: NAME, direction: ASC}"
SHAPES: Final[dict[str, Shape]] = {
    "typename alone": ("{ __typename }", [nothing]),
    "aliases": (
        f"{{ a: models({SORTED}) {{ b: nodes {{ c: name d: name e: owner {{ f: login }} }} }} }}",
        [nothing],
    ),
    "one field under two names with other arguments": (
        f"""{{ a: models(first: 1, {SORTED}) {{ nodes {{ name }} pageInfo {{ endCursor hasNextPage hasPreviousPage startCursor }} }}
        b: models(last: 1, {SORTED}) {{ nodes {{ name }} pageInfo {{ endCursor hasNextPage hasPreviousPage startCursor }} }} }}""",
        [nothing],
    ),
    "arguments that are literals": (
        """{ models(first: 2, filter: {or: [{tags: {hasAny: ["tiny"]}}, {not: {task: {eq: "x"}}}], state: [ACTIVE, ARCHIVED]},
        orderBy: {field: DOWNLOADS_ALL_TIME, direction: ASC}) { totalCount nodes { name } } }""",
        [nothing],
    ),
    "arguments that are variables": (
        """query($first: Int, $filter: ModelFilter, $order: ModelOrder, $search: String) {
        models(first: $first, filter: $filter, orderBy: $order, search: $search) { totalCount nodes { name } } }""",
        [
            nothing,
            these(first=1),
            these(first=None, filter=None, order=None, search=None),
            these(filter={"tags": {"hasAll": "tiny"}}, order={"field": "NAME"}),
            these(search="whale", first=2.0),
            these(filter={"sizeBytes": {"gte": "8"}, "updatedAt": {"lte": "2027-01-01T00:00:00Z"}}),
        ],
    ),
    "variables with defaults": (
        """query($first: Int = 1, $direction: OrderDirection! = ASC, $limit: Int! = 1) {
        models(first: $first, orderBy: {field: NAME, direction: $direction}) {
        nodes { name } facets(fields: [TAG], limit: $limit) { buckets { value } } } }""",
        [nothing, these(first=2, direction="DESC", limit=2), these(first=None)],
    ),
    "variables within a literal": (
        """query($task: String, $tags: [String!], $tag: String!) { models(filter: {task: {eq: $task}, tags: {hasAny: $tags, hasNone: [$tag]}},
        orderBy: {field: NAME}) { nodes { name } } }""",
        [
            these(tag="x"),
            these(task="text-generation", tag="tiny"),
            these(tags=["tiny"], task=None, tag="x"),
            these(tags="tiny", tag="x"),
        ],
    ),
    "named fragments within each other": (
        f"""query {{ models({SORTED}) {{ ...Page }} }}
        fragment Page on ModelConnection {{ nodes {{ ...Head ...Tail }} }}
        fragment Head on Model {{ name owner {{ ...Who }} }} fragment Tail on Model {{ latestVersion {{ model {{ ...Head }} }} }}
        fragment Who on Actor {{ login ... on User {{ avatarUrl }} }}""",
        [nothing],
    ),
    "inline fragments with and without a type": (
        f"""{{ ... {{ models({SORTED}) {{ ... on ModelConnection {{ nodes {{ ... {{ name }} ... on Model {{ task }}
        ... on Node {{ id }} }} }} }} }} }}""",
        [nothing],
    ),
    "merged response names": (
        f"""{{ models({SORTED}) {{ nodes {{ owner {{ login }} }} nodes {{ owner {{ displayName }} name }} ...More }}
        models({SORTED}) {{ totalCount }} }}
        fragment More on ModelConnection {{ nodes {{ owner {{ login id }} stats {{ likes }} }} nodes {{ stats {{ files }} }} }}""",
        [nothing],
    ),
    "the order of names is that of their first appearance": (
        """query($id: ID!) { node(id: $id) { ...Late id ... on Model { name } ...Late } } fragment Late on Model { task name id }""",
        [lambda made: {"id": made.ids["full"]}],
    ),
    "skip and include by value": (
        f"""{{ models({SORTED}) {{ nodes {{ name @skip(if: true) task @skip(if: false) tags @include(if: false)
        id @include(if: true) license @skip(if: false) @include(if: false) ...F @skip(if: true) ... @include(if: true) {{ revision }} }} }} }}
        fragment F on Model {{ summary }}""",
        [nothing],
    ),
    "skip and include by variables": (
        f"""query($a: Boolean!, $b: Boolean!, $c: Boolean! = false) {{ models({SORTED}) {{ nodes {{
        name @skip(if: $a) owner @include(if: $b) {{ login }} ...F @skip(if: $c)
        ... on Model @include(if: $a) {{ latestVersion {{ number @skip(if: $b) __typename }} }} }} }} }}
        fragment F on Model {{ name tags @include(if: $b) @skip(if: $a) }}""",
        [*switched("a", "b", "c"), these(a=True, b=False)],
    ),
    "nothing is left of a selection": (
        "query($a: Boolean!) { models { nodes { name @include(if: $a) } } viewer @skip(if: $a) { login } }",
        switched("a"),
    ),
    "an interface": (
        f"""{{ models({SORTED}) {{ nodes {{ owner {{ __typename id login displayName avatarUrl
        ... on Organization {{ members(first: 1) {{ totalCount nodes {{ role user {{ login }} organization {{ login }} }} }} }}
        ... on User {{ organizations {{ nodes {{ login }} }} }} ... on Node {{ same: id }} }} }} }} }}""",
        [nothing],
    ),
    "a union": (
        """query($types: [SearchType!]) { search(query: "whale", types: $types) { totalCount edges { cursor score node { __typename
        ... on Model { name owner { login } } ... on Actor { login } ... on User { tokens { totalCount } } ... on Node { id } }
        highlights { field fragment } } nodes { ... on Organization { displayName } } pageInfo { endCursor hasNextPage } } }""",
        [nothing, these(types=["MODEL"]), these(types=["USER", "ORGANIZATION"]), these(types=[])],
    ),
    "search among owners": (
        """{ search(query: "acme") { nodes { __typename ... on Organization { login members { nodes { user { login } } } } ... on Model { name } } } }""",
        [nothing],
    ),
    "node of each type": (
        """query($id: ID!) { node(id: $id) { id __typename ... on Model { fullName stats { likes } } ... on ModelVersion { number model { name } }
        ... on ModelFile { path version { number } } ... on Actor { login } ... on User { organizations { totalCount } } } }""",
        [
            lambda made, name=name: {"id": made.ids[name]}
            for name in ("acme", "ada", "full", "bare", "version", "file")
        ]
        + [these(id="garbage"), these(id="")],
    ),
    "nodes with ids of any kind": (
        """query($ids: [ID!]!) { nodes(ids: $ids) { __typename id ... on Model { name owner { login } } ... on ModelFile { path } }
        more: nodes(ids: ["x", "", "TW9kZWw6"]) { id } none: nodes(ids: []) { id } }""",
        [
            lambda made: {"ids": [*made.ids.values(), "x", "é", made.ids["full"], 7]},
            lambda made: {"ids": made.ids["full"]},
        ],
    ),
    "nested connections with arguments": (
        f"""query($n: Int, $after: Cursor) {{ models({SORTED}) {{ nodes {{ name
        versions(first: $n, after: $after, orderBy: {{field: NUMBER, direction: ASC}}, filter: {{status: [READY]}}) {{ totalCount
        edges {{ cursor node {{ number files(last: 1, role: [CONFIG, OTHER], pathPrefix: "c") {{ totalCount nodes {{ path }}
        pageInfo {{ startCursor hasPreviousPage }} }} }} }} }}
        all: versions {{ totalCount nodes {{ number status aliases {{ name setBy {{ login }} }} }} }} }} }} }}""",
        [nothing, these(n=1), these(n=3, after=None)],
    ),
    "versions by number and alias": (
        f"""query($alias: String) {{ models({SORTED}) {{ nodes {{ one: version(number: 1) {{ number }} two: version(alias: $alias) {{ number }}
        latest: version(alias: "latest") {{ number digest file(path: "config.json") {{ sizeBytes sha256 sharedWith }} }} }} }} }}""",
        [these(alias="prod"), these(alias="nope")],
    ),
    "lists in lists": (
        """{ models(search: "whale") { estimatedCount facets(fields: [TAG, TASK, FORMAT, LANGUAGE, OWNER, VISIBILITY], limit: 5) {
        field buckets { value count __typename } } edges { score highlights { field fragment __typename } node { tags languages } } } }""",
        [nothing],
    ),
    "enums": (
        """{ models(filter: {state: [ACTIVE, ARCHIVED]}, orderBy: {field: NAME}) { nodes { visibility state viewerCan
        versions { nodes { status files { nodes { role format } } } } } } viewer { tokens { nodes { scopes } } } }""",
        [nothing],
    ),
    "custom scalars": (
        """{ model(owner: "ACME", name: "Blue-Whale") { createdAt updatedAt properties stats { downloadsAllTime storedBytes sizeBytes asOf trendingScore }
        card { metadata markdown html } versions { nodes { sizeBytes digest createdAt publishedAt properties
        files { nodes { sizeBytes sha256 downloadUrl long: downloadUrl(expiresIn: 7200) } } } } owner { avatarUrl } } }""",
        [nothing],
    ),
    "typename everywhere": (
        f"""{{ __typename models({SORTED}) {{ __typename pageInfo {{ __typename }} edges {{ __typename node {{ __typename stats {{ __typename }}
        card {{ __typename }} aliases {{ __typename version {{ __typename }} model {{ __typename }} setBy {{ __typename }} }}
        versions {{ __typename nodes {{ __typename files {{ t: __typename edges {{ __typename node {{ __typename }} }} }} }} }}
        owner {{ __typename }} }} }} facets(fields: [TASK]) {{ __typename buckets {{ __typename }} }} }}
        viewer {{ __typename tokens {{ __typename }} }} }}""",
        [nothing],
    ),
    "fields computed for the viewer": (
        f"{{ models({SORTED}) {{ nodes {{ viewerCan viewerHasLiked aliases {{ model {{ viewerCan }} }} }} }} viewer {{ login tokens(first: 2) {{ totalCount nodes {{ name prefix lastUsedAt expiresAt }} }} }} }}",
        [nothing],
    ),
    "embedded documents": (
        f"{{ models({SORTED}) {{ nodes {{ stats {{ likes }} more: stats {{ files versions }} aliases {{ name protected setAt id version {{ number }} }} }} }} }}",
        [nothing],
    ),
    "one model in every way": (
        """query($id: ID, $owner: String, $name: String) { model(id: $id, owner: $owner, name: $name) { fullName latestVersion { number } } }""",
        [
            lambda made: {"id": made.ids["full"]},
            these(owner="acme", name="blue-whale"),
            these(owner="acme", name="nope"),
            these(id="garbage"),
            lambda made: {"id": made.ids["acme"]},
        ],
    ),
    "references, beginnings of names and contents": (
        """query($ref: String!, $sha: SHA256!) { resolve(ref: $ref) { number model { fullName } createdBy { login } }
        suggest(prefix: "a") few: suggest(prefix: "acme/", first: 1)
        blob(sha256: $sha, first: 2) { totalCount edges { cursor node { path version { model { name } } } } } }""",
        [
            these(ref="acme/blue-whale@prod", sha=SHA),
            these(ref="acme/blue-whale:2", sha=SHA.upper()),
            these(ref="acme/nope", sha="f" * 64),
        ],
    ),
}


def timeless(
    links: DownloadLinks, file_id: Any, path: str, expires_in: int, *, held: object = None
) -> str:
    """A link without the time in it."""
    return f"{links.base_url}/{file_id}/{path}?{expires_in}"


@pytest.mark.parametrize("name", SHAPES)
async def test_a_plan_gives_the_bytes_of_graphql_core(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(DownloadLinks, "link", timeless)
    made = await world(database)
    document, given = SHAPES[name]
    ask = ask.changed(max_cost=10**6)
    for variables in (each(made) for each in given):
        for viewer in (made.viewer, ANONYMOUS):
            expected = await ask.by_core(document, viewer, **variables)
            answer = await ask(document, viewer, **variables)
            assert expected.problems == answer.problems == []
            assert (expected.fallback, answer.fallback) == ("plans are switched off", None)
            assert orjson.dumps(answer.data) == orjson.dumps(expected.data)


class Kept:
    """Answers of the database, the same objects each time."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[Row]] = {}
        self.copies: dict[str, list[Row]] = {}
        for name in ("find", "aggregate"):
            monkeypatch.setattr(Database, name, self.kept(getattr(Database, name)))

    def kept(self, read: Any) -> Any:
        async def answered(database: Database, *given: Any, **named: Any) -> list[Row]:
            key = repr((read.__name__, given, named))
            if key not in self.rows:
                self.rows[key] = await read(database, *given, **named)
                self.copies[key] = deepcopy(self.rows[key])
            return self.rows[key]

        return answered


async def test_a_plan_does_not_change_the_rows(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be another operation's too."""
    monkeypatch.setattr(DownloadLinks, "link", timeless)
    made = await world(database)
    ask = ask.changed(max_cost=10**6)
    for document, given in SHAPES.values():
        variables = given[0](made)
        expected = await ask(document, made.viewer, **variables)
        with monkeypatch.context() as patch:
            kept = Kept(database, patch)
            for _ in range(2):
                answer = await ask(document, made.viewer, **variables)
                assert (answer.problems, answer.fallback) == ([], None)
                assert orjson.dumps(answer.data) == orjson.dumps(expected.data)
                assert kept.rows == kept.copies
            assert "models" not in document or kept.rows


async def test_numbers_texts_and_moments_arrive_whole(ask: Asker, database: Database) -> None:
    """What the comparison of both engines would not see: that both are right."""
    made = await world(database)
    answer = await ask(
        """{ model(owner: "acme", name: "blue-whale") { updatedAt properties tags visibility viewerCan
        stats { downloadsAllTime storedBytes trendingScore files } aliases { name } } }""",
        made.viewer,
    )
    assert answer.fallback is None
    assert answer.data["model"] == {
        "updatedAt": "2026-02-03T04:05:06.789Z",
        "properties": {"size": 7, "nested": {"a": [1, None, {"b": 0.5}], "1": True}},
        "tags": ["whale", "été"],
        "visibility": "PUBLIC",
        "viewerCan": [
            "READ",
            "DOWNLOAD",
            "WRITE",
            "PUBLISH",
            "PROMOTE",
            "ADMINISTER",
        ],
        "stats": {
            "downloadsAllTime": "9007199254740993",
            "storedBytes": "4611686018427387904",
            "trendingScore": 1.25,
            "files": 3,
        },
        "aliases": [{"name": "beta"}, {"name": "prod"}],
    }


DEEP: Final = """
query Deep($first: Int!) { models(first: $first, orderBy: {field: NAME, direction: ASC}) {
  nodes {
    fullName viewerHasLiked owner { login } card { html }
    latestVersion { number createdBy { login } files(first: 2) { totalCount nodes { path downloadUrl version { number } } } }
    versions(first: 2) { totalCount nodes { number aliases { name setBy { login } } } }
  } } }
"""
DEEP_READS: Final = [
    "find actors",
    "find actors",
    "find actors",
    "find cards",
    "find models",
    "find models",
    "find models",
    "find models",
    "find versions",
    "find versions",
    "find versions",
    "find versions",
    "aggregate 1",
    "aggregate 1",
    "find likes",
]


async def test_fifty_rows_cost_the_commands_of_two(ask: Asker, database: Database) -> None:
    """Of two and not of one: the list of a single parent is a plain find."""
    owner = await insert_actor("acme")
    viewer = viewer_of(await insert_actor("ada"))
    for index in range(50):
        model = await insert_model(owner, f"m{index:02}")
        version = await insert_version(
            database, model, {"a": 1, "b": 2, "c": 3}, created_by_id=owner.id
        )
        entry = AliasEntry(name="prod", version_id=version.id, set_by_id=owner.id)
        await database.data["models"].update_one(
            {"_id": model.id}, {"$set": {"aliases": [entry.model_dump()]}}
        )
    counts = []
    for first in (1, 2, 50):
        answer = await ask(DEEP, viewer, first=first)
        assert (answer.problems, answer.fallback) == ([], None)
        nodes = answer.data["models"]["nodes"]
        assert [node["versions"]["nodes"][0]["aliases"] for node in nodes] == [
            [{"name": "prod", "setBy": {"login": "acme"}}]
        ] * first
        counts.append((len(answer.commands), answer.batches))
        if first > 1:
            assert sorted(answer.commands) == sorted(DEEP_READS)
    assert counts == [counts[0]] * 3


def projections(captured: Captured) -> list[tuple[str, set[str] | None]]:
    """The collection and the names that each read asked for; None: whole rows."""
    found: list[tuple[str, set[str] | None]] = []
    for name, command in captured.commands:
        collection, shown = str(command[name]), command.get("projection")
        pipelines = [command.get("pipeline", [])]
        for stage in pipelines[0]:
            if "$lookup" in stage:
                collection = stage["$lookup"]["from"]
                pipelines.append(stage["$lookup"]["pipeline"])
        for pipeline in pipelines:
            for stage in pipeline:
                shown = stage.get("$project", shown)
        found.append((collection, set(shown) if shown else None))
    return found


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("{ models { nodes { name } } }", [("models", {"_id", "name", "stats.trending_score"})]),
        ("{ models { pageInfo { hasNextPage } } }", [("models", {"_id", "stats.trending_score"})]),
        (
            f"{{ models({SORTED}) {{ nodes {{ id fullName stats {{ likes }} owner {{ login }} }} }} }}",
            [
                (
                    "models",
                    {"_id", "name", "name_lower", "owner_login", "owner_id", "stats.likes"},
                ),
                ("actors", {"_id", "kind", "login"}),
            ],
        ),
        (
            f"{{ models({SORTED}) {{ nodes {{ viewerCan aliases {{ name }} latestVersion {{ number files {{ nodes {{ path }} }} }} }} }} }}",
            [
                (
                    "models",
                    {
                        "_id",
                        "name_lower",
                        "state",
                        "visibility",
                        "owner_id",
                        "grants",
                        "aliases",
                        "latest_version_id",
                    },
                ),
                ("versions", {"_id", "number"}),
                ("files", {"_id", "path"}),
            ],
        ),
        (
            """{ search(query: "whale", types: [MODEL, USER]) { nodes { ... on Model { name } ... on User { displayName } } } }""",
            [
                ("models", {"_id", "score", "__typename", "name", "display_name"}),
                ("actors", {"_id", "score", "__typename", "name", "display_name"}),
            ],
        ),
        (
            """{ models(search: "whale") { edges { score highlights { field } node { task } } } }""",
            [
                (
                    "models",
                    {"_id", "score", "name", "login", "display_name", "summary", "tags", "task"},
                )
            ],
        ),
        (
            '{ model(owner: "acme", name: "blue-whale") { stats { __typename } versions(first: 1) { nodes { status } } } }',
            [
                ("models", {"_id", "owner_login_lower", "name_lower", "principals", "stats"}),
                ("versions", {"_id", "number", "status"}),
            ],
        ),
        (
            """query($yes: Boolean! = false) { model(owner: "acme", name: "blue-whale") { name task @include(if: $yes) card @include(if: $yes) { html } } }""",
            [("models", {"_id", "owner_login_lower", "name_lower", "principals", "name"})],
        ),
    ],
)
async def test_a_read_asks_for_the_names_that_are_needed(
    ask: Asker,
    database: Database,
    document: str,
    expected: list[tuple[str, set[str] | None]],
) -> None:
    made = await world(database)
    captured = Captured()
    answer = await ask(document, made.viewer, count=captured)
    assert (answer.problems, answer.fallback) == ([], None)
    assert projections(captured) == expected
    whole = Captured()
    assert (await ask.by_core(document, made.viewer, count=whole)).data == answer.data
    assert [collection for collection, _ in projections(whole)] == [c for c, _ in expected]


# ---- which operations have a plan


def found_operations() -> dict[str, str]:
    """The queries that the project shows or measures."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in ("web/src/examples", "bench/operations")
        for path in sorted((ROOT / folder).glob("*.graphql"))
    }
    for name in ("README.md", "docs/api.md"):
        blocks = re.findall(r"^```graphql\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S)
        texts |= {f"{name} {number}": text for number, text in enumerate(blocks, 1)}
    others = re.compile(r"^\s*(mutation|subscription)\b", re.M)
    return {name: text for name, text in texts.items() if not others.search(text)}


CLIENTS: Final = {
    "ModelList": """query ModelList($after: Cursor, $f: ModelFilter) { models(first: 50, after: $after, filter: $f, orderBy: {field: TRENDING}) {
        totalCount facets(fields: [TASK, LICENSE]) { field buckets { value count } } edges { cursor node { id fullName owner { login } tags
        stats { downloads30d likes sizeBytes } latestVersion { number status aliases { name } createdBy { login } } } } pageInfo { hasNextPage endCursor } } }""",
    "ModelPage": """query ModelPage { model(owner: "qwen", name: "tiny") { id card { html metadata } aliases { name version { number } }
        versions(first: 20) { totalCount nodes { number status files(first: 10) { totalCount nodes { path sizeBytes format } } } } viewerCan } }""",
    "WhatIsInProduction": """query WhatIsInProduction { resolve(ref: "acme/fraud@production") { number digest model { fullName } } }""",
}
"""Such as clients of a model registry send."""
OPERATIONS: Final = {**CLIENTS, **found_operations()}


def test_the_shown_operations_are_found() -> None:
    assert OPERATIONS.keys() >= {
        "ModelList",
        "ModelPage",
        "README.md 1",
        "docs/api.md 1",
        "bench/operations/page.graphql",
        "web/src/examples/viewer.graphql",
    }
    assert not any(parse(text).definitions == () for text in OPERATIONS.values())


@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_shown_operation_has_a_plan(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("modelharbor.loaders.budgets.utc_now", lambda: MOMENT)
    made = await world(database)
    given: dict[str, Row] = {
        "bench/operations/filtered.graphql": {"filter": {"task": {"eq": "text-generation"}}},
        "bench/operations/facets.graphql": {"filter": {"task": {"eq": "text-generation"}}},
        "bench/operations/model.graphql": {"owner": "acme", "name": "blue-whale"},
        "bench/operations/search.graphql": {"words": "whale"},
        "docs/api.md 1": {"id": made.ids["full"]},
        "docs/api.md 2": {"day": "2026-01-01T00:00:00Z"},
        "docs/api.md 5": {"base": made.ids["version"], "head": made.ids["version"]},
        "web/src/examples/analytics.graphql": {
            "from": "2026-01-01T00:00:00Z",
            "to": "2026-03-01T00:00:00Z",
        },
    }
    variables = given.get(name, {})
    answer = await ask(OPERATIONS[name], made.viewer, **variables)
    assert (answer.errors, answer.fallback) == ([], None)
    expected = await ask.by_core(OPERATIONS[name], made.viewer, **variables)
    assert orjson.dumps(answer.data) == orjson.dumps(expected.data)


@pytest.mark.parametrize(
    ("document", "variables", "why"),
    [
        ("{ __schema { queryType { name } } }", {}, "introspection"),
        ('{ models { nodes { name } } __type(name: "Model") { name } }', {}, "introspection"),
        ("{ health { status } }", {}, "Query.health has a resolver of its own"),
        (
            'mutation { likeModel(input: {id: "x"}) { userErrors { code } } }',
            {},
            "a mutation",
        ),
        (
            'query($n: Int!) { suggest(prefix: "a", first: $n) }',
            {"n": "x"},
            "variables that do not fit",
        ),
        (
            'query($n: Int!) { suggest(prefix: "a", first: $n) }',
            {},
            "variables that do not fit",
        ),
        (
            "query($n: Int, $yes: Boolean!) { models(first: $n) @skip(if: $yes) { totalCount } }",
            {"yes": None},
            "variables that do not fit",
        ),
        (
            "query($yes: Boolean = true) { viewer @skip(if: $yes) { login } models { totalCount } }",
            {"yes": None},
            "a directive that its variables do not fit",
        ),
    ],
)
async def test_without_a_plan_the_answer_says_why(
    ask: Asker, document: str, variables: Row, why: str
) -> None:
    viewer = viewer_of(await insert_actor("ada"))
    for _ in range(2):  # what was found out once is found again
        answer = await ask(document, viewer, **variables)
        expected = await ask.by_core(document, viewer, **variables)
        assert (answer.fallback, expected.fallback) == (why, "plans are switched off")
        assert (answer.data, answer.problems) == (expected.data, expected.problems)


async def test_plans_can_be_switched_off(ask: Asker) -> None:
    answer = await ask.changed(compiled_plans=False)("{ models { totalCount } }")
    assert answer.fallback == "plans are switched off"
    assert (await ask("{ models { totalCount } }")).fallback is None


async def test_objects_written_in_place_keep_their_names_apart(
    ask: Asker, database: Database
) -> None:
    """Lists and more after them, in objects that may be null: a plan must not lose its own variables."""
    made = await world(database)
    answer = await ask(
        """{ model(owner: "acme", name: "blue-whale") { latestVersion { tags number status }
        versions(first: 1) { nodes { tags number } } card { markdown } } }""",
        made.viewer,
    )
    assert (answer.errors, answer.fallback) == ([], None)
    assert answer.data["model"]["latestVersion"]["number"] > 0


async def test_reads_of_one_loader_at_one_level_are_one(ask: Asker, database: Database) -> None:
    made = await world(database)
    aliases = " ".join(f"a{number}: owner {{ id }}" for number in range(25))
    document = f"{{ models {{ nodes {{ {aliases} o: owner {{ login }} }} }} }}"
    answer = await ask(document, made.viewer)
    assert (answer.errors, answer.fallback) == ([], None)
    assert answer.commands == ["find models", "find actors"]
    assert answer.data == (await ask.by_core(document, made.viewer)).data


async def test_only_so_many_ways_through_an_operation_have_a_plan(ask: Asker) -> None:
    """Nine ways: the first eight stay planned, the ninth never is."""
    document = """query($a: Boolean!, $b: Boolean!, $c: Boolean!, $d: Boolean!) { models {
        a: totalCount @include(if: $a) b: totalCount @include(if: $b) c: totalCount @include(if: $c) d: totalCount @include(if: $d) } }"""
    ways = list(product((True, False), repeat=4))[: WAYS + 1]
    for _ in range(2):
        found = []
        for values in ways:
            variables: dict[str, Any] = dict(zip("abcd", values, strict=True))
            answer = await ask(document, **variables)
            wanted = {name: 0 for name, value in variables.items() if value}
            assert (answer.data, answer.errors) == ({"models": wanted}, [])
            found.append(answer.fallback)
        assert found == [
            *[None] * WAYS,
            f"more than {WAYS} ways through @skip and @include",
        ]


async def test_a_way_is_not_told_apart_by_other_variables(ask: Asker) -> None:
    document = "query($a: Boolean!, $n: Int) { models(first: $n) { totalCount @skip(if: $a) } }"
    for number in range(1, 3 * WAYS):
        answer = await ask(document, a=number % 2 == 0, n=number)
        assert (answer.errors, answer.fallback) == ([], None)


async def test_a_document_with_very_many_fields_has_no_plan(ask: Asker) -> None:
    roomy = ask.changed(max_aliases=10**4, max_tokens=10**5, max_query_bytes=10**6, max_cost=10**6)
    for many, why in (
        (MOST_FIELDS - 2, None),
        (MOST_FIELDS - 1, f"more than {MOST_FIELDS} fields"),
    ):
        names = " ".join(f"n{number}: name" for number in range(many))
        answer = await roomy(f"{{ models {{ nodes {{ {names} }} }} }}")
        assert (answer.data, answer.errors) == ({"models": {"nodes": []}}, [])
        assert answer.fallback == why


def test_each_operation_of_a_document_has_plans_of_its_own() -> None:
    text = f"""query A {{ models({SORTED}) {{ nodes {{ ...F }} }} }} query B {{ model(owner: "ada", name: "tiny-whale") {{ ...F }} }}
    fragment F on Model {{ name }}"""
    document = DocumentStore(core, Settings()).get(text)
    plans = []
    for name in ("A", "B"):
        operation = document.operation(name)
        values = operation.coerce({})
        assert values is not None
        plan = operation.plan(schema, values)
        assert not isinstance(plan, str)
        assert operation.plan(schema, values) is plan
        plans.append(plan)
    assert [[step.path for step in plan.steps.values()] for plan in plans] == [
        ["models"],
        ["model"],
    ]


async def test_two_askers_of_one_plan_do_not_meet(ask: Asker, database: Database) -> None:
    """A plan keeps nothing of a run: each viewer gets what is theirs, from one and the same plan."""
    made = await world(database)
    document = "{ viewer { login } models(orderBy: {field: NAME}) { nodes { name viewerHasLiked viewerCan } } }"
    stranger = replace(made.viewer, scopes=frozenset())
    answers: dict[str, Any] = {}
    for _ in range(2):
        for name, viewer in (("ada", made.viewer), ("stranger", stranger), ("nobody", ANONYMOUS)):
            answer = await ask(document, viewer)
            assert answer.fallback is None
            assert answers.setdefault(name, answer.data) == answer.data
    assert answers["nobody"]["viewer"] is None
    assert [node["viewerHasLiked"] for node in answers["ada"]["models"]["nodes"]] == [False, True]
    assert [node["viewerCan"] for node in answers["nobody"]["models"]["nodes"]] == [
        ["READ", "DOWNLOAD"]
    ] * 2
    assert [node["viewerCan"] for node in answers["stranger"]["models"]["nodes"]] == [["READ"]] * 2
