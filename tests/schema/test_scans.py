"""What was found in files, who gets which link to them, and what versions and models tell of it."""

from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from bson import Int64, ObjectId

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument, FileFormat, ScanVerdict
from modelharbor.db.jobs import JobKind, JobState, Level
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionStatus
from modelharbor.inspection.results import Finding, Inspection, Tensors
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.documents import (
    START,
    insert_actor,
    insert_job,
    insert_model,
    insert_version,
    viewer_of,
)

pytestmark = pytest.mark.anyio
S, V, P = VersionStatus, ScanVerdict, Permission
NEVER: Row = {"verdict": "SKIPPED", "scanner": None, "scannedAt": None, "findings": []}


async def blob(size: int, inspection: Inspection | None = None, **values: Any) -> None:
    """The contents that `insert_version` gives to files of this length."""
    row = inspection and inspection.row("modelharbor 1", START)
    await BlobDocument(sha256=f"{size:064x}", size_bytes=size, inspection=row, **values).insert()


def found(verdict: ScanVerdict) -> Inspection | None:
    return None if verdict is V.PENDING else Inspection(verdict, FileFormat.OTHER)


WEIGHTS = Inspection(
    V.SUSPICIOUS,
    FileFormat.GGUF,
    [
        Finding(Level.INFO, "config.secret", "It may hold a key."),
        Finding(Level.WARNING, "gguf.odd", "It is odd.", 2**40),
        Finding(Level.CRITICAL, "gguf.broken", "It ends early.", 0),
        Finding(Level.WARNING, "gguf.old", "It is old."),
    ],
    Tensors(2, 2**40, {"Q4_K": 2**40 - 7, "F32": 7}, "llama", 8192, "Q4_K_M"),
    {"general.name": "tiny", "sizes": [1, None, 0.5]},
)
FILES = """
query Files($first: Int) { model(owner: "acme", name: "m") { latestVersion { files(first: $first) { nodes {
  path
  scan { verdict scanner scannedAt findings { severity rule detail offset } }
  tensors { tensorCount parameterCount parametersByDtype architecture contextLength quantization }
  header
} } } } }
"""


async def test_what_was_found_in_files(ask: Asker, database: Database) -> None:
    acme = await insert_actor("acme")
    model = await insert_model(acme, "m")
    await insert_version(database, model, {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 1})
    await blob(1, WEIGHTS)
    await blob(2)
    await blob(3, stored=False)
    await blob(4, found(V.SAFE), stored=False, damaged_at=START)
    await blob(5, found(V.SAFE))
    told: Row = {
        "scan": {
            "verdict": "SUSPICIOUS",
            "scanner": "modelharbor 1",
            "scannedAt": "2026-01-01T00:00:00.000Z",
            "findings": [
                {
                    "severity": "CRITICAL",
                    "rule": "gguf.broken",
                    "detail": "It ends early.",
                    "offset": "0",
                },
                {
                    "severity": "WARNING",
                    "rule": "gguf.odd",
                    "detail": "It is odd.",
                    "offset": "1099511627776",
                },
                {
                    "severity": "WARNING",
                    "rule": "gguf.old",
                    "detail": "It is old.",
                    "offset": None,
                },
                {
                    "severity": "INFO",
                    "rule": "config.secret",
                    "detail": "It may hold a key.",
                    "offset": None,
                },
            ],
        },
        "tensors": {
            "tensorCount": 2,
            "parameterCount": "1099511627776",
            "parametersByDtype": {"Q4_K": 2**40 - 7, "F32": 7},
            "architecture": "llama",
            "contextLength": 8192,
            "quantization": "Q4_K_M",
        },
        "header": {"general.name": "tiny", "sizes": [1, None, 0.5]},
    }
    nothing: Row = {"tensors": None, "header": None}
    scanned = {**NEVER, "scanner": "modelharbor 1", "scannedAt": "2026-01-01T00:00:00.000Z"}
    expected = [
        {"path": "a", **told},
        {"path": "b", "scan": {**NEVER, "verdict": "PENDING"}, **nothing},
        {"path": "c", "scan": NEVER, **nothing},  # known by its hash alone
        {"path": "d", "scan": {**scanned, "verdict": "ERROR"}, **nothing},  # damaged since
        {"path": "e", "scan": {**scanned, "verdict": "SAFE"}, **nothing},
        {"path": "f", "scan": NEVER, **nothing},
        {"path": "g", **told},
    ]
    for asked in (ask, ask.by_core):
        for first in (1, 100):
            answer = await asked(FILES, first=first)
            assert answer.errors == []
            assert (answer.fallback is None) == (asked is ask)
            nodes = answer.data["model"]["latestVersion"]["files"]["nodes"]
            assert nodes == expected[:first]
            assert answer.commands == [
                *("find models", "find versions", "find files"),
                *(["find blobs"] * 3),
            ]


async def test_a_context_of_any_length(ask: Asker, database: Database) -> None:
    model = await insert_model(await insert_actor("acme"), "m")
    lengths = {1: 2**31 - 1, 2: 2**31, 3: 2**63 - 1, 4: None}
    await insert_version(database, model, {str(size): size for size in lengths})
    for size, length in lengths.items():
        tensors = Tensors(0, 0, {}, context_length=length)
        await blob(size, Inspection(V.SAFE, FileFormat.GGUF, tensors=tensors))
    for asked in (ask, ask.by_core):
        answer = await asked(FILES)
        assert answer.errors == []
        nodes = answer.data["model"]["latestVersion"]["files"]["nodes"]
        assert [node["tensors"]["contextLength"] for node in nodes] == [2**31 - 1, None, None, None]


@pytest.mark.parametrize("verdict", V)
async def test_each_verdict_is_told(ask: Asker, database: Database, verdict: ScanVerdict) -> None:
    model = await insert_model(await insert_actor("acme"), "m")
    await insert_version(database, model, {"a": 1})
    await blob(1, found(verdict))
    for asked in (ask, ask.by_core):
        answer = await asked(FILES)
        [node] = answer.data["model"]["latestVersion"]["files"]["nodes"]
        assert node["scan"]["verdict"] == verdict.value


LINKS = """
query Links($id: ID!) { node(id: $id) { ... on ModelVersion { files { nodes {
  path plain: downloadUrl(expiresIn: 60) accepted: downloadUrl(expiresIn: 60, acceptQuarantined: true)
} } } } }
"""
ROLES = (None, Role.VIEWER, Role.DOWNLOADER, Role.CONTRIBUTOR, Role.MAINTAINER, Role.ADMIN)


def expected_links(
    status: VersionStatus, verdict: ScanVerdict, held: frozenset[Permission]
) -> tuple[str, str]:
    """What the plain link and the one that accepts is good for: "": no link, "any": no permission
    beside DOWNLOAD is in it."""
    if P.DOWNLOAD not in held or status is S.DELETED:
        return "", ""
    if status in (S.QUARANTINED, S.FAILED):
        return "", "PUBLISH" if P.PUBLISH in held else ""
    if status in (S.READY, S.ARCHIVED) or verdict in (V.SAFE, V.SKIPPED):
        return "any", "any"
    return ("WRITE", "WRITE") if P.WRITE in held else ("", "")


def link_is_for(url: str | None) -> str:
    if url is None:
        return ""
    given = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    file_id = ObjectId(urlsplit(url).path.split("/")[2])
    held = given.get("held", "")
    links = DownloadLinks(b"k" * 32, "http://test")
    assert links.is_good(file_id, given["expires"], given["signature"], held=held)
    assert held == "" or not links.is_good(file_id, given["expires"], given["signature"])
    return held or "any"


@pytest.mark.parametrize("role", ROLES)
async def test_who_gets_which_link(ask: Asker, database: Database, role: Role | None) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    someone = await insert_actor("someone")
    model = await insert_model(acme, "m", visibility=Visibility.PRIVATE)
    viewer = viewer_of(someone, {acme.id: role} if role else {})
    files = {verdict.value: number for number, verdict in enumerate(V)}
    for verdict in V:
        await blob(files[verdict.value], found(verdict))
    version = await insert_version(database, model, files)
    version_id = global_id("ModelVersion", version.id)
    held = viewer.on_model(
        {**model.model_dump(mode="python"), "state": "ACTIVE", "visibility": "PRIVATE"}
    )
    for status in S:
        await database.data["versions"].update_one(
            {"_id": version.id}, {"$set": {"status": status.value}}
        )
        for asked in (ask, ask.by_core):
            answer = await asked(LINKS, viewer, id=version_id)
            assert answer.errors == []
            if role is None or status is S.DELETED:
                assert answer.data == {"node": None}
                continue
            for node in answer.data["node"]["files"]["nodes"]:
                got = (link_is_for(node["plain"]), link_is_for(node["accepted"]))
                expected = expected_links(status, V(node["path"]), held)
                assert got == expected, (status, node["path"], role)


async def test_links_of_everybody_and_of_tokens_without_a_scope(
    ask: Asker, database: Database
) -> None:
    acme = await insert_actor("acme")
    model = await insert_model(acme, "m")
    version = await insert_version(database, model, {"a": 1}, status=S.DRAFT)
    await blob(1)
    whole = viewer_of(acme)

    def without(*scopes: Permission) -> Viewer:
        return Viewer(user=whole.user, scopes=whole.scopes - set(scopes))

    async def got(viewer: Viewer) -> tuple[str, str]:
        answer = await ask(LINKS, viewer, id=global_id("ModelVersion", version.id))
        [node] = answer.data["node"]["files"]["nodes"]
        return link_is_for(node["plain"]), link_is_for(node["accepted"])

    assert await got(ANONYMOUS) == ("", "")
    assert await got(whole) == ("WRITE", "WRITE")
    assert await got(without(P.WRITE)) == ("", "")
    assert await got(without(P.DOWNLOAD)) == ("", "")
    await database.data["versions"].update_one({}, {"$set": {"status": "QUARANTINED"}})
    assert await got(ANONYMOUS) == ("", "")
    assert await got(whole) == ("", "PUBLISH")
    assert await got(without(P.WRITE)) == ("", "PUBLISH")
    assert await got(without(P.PUBLISH)) == ("", "")
    assert await got(without(P.DOWNLOAD)) == ("", "")


async def test_links_of_a_page_cost_the_same_whatever_its_size(
    ask: Asker, database: Database
) -> None:
    acme = await insert_actor("acme")
    for number in range(12):
        model = await insert_model(acme, f"m{number:02}")
        await insert_version(
            database,
            model,
            {f"f{n}": n for n in range(5)},
            status=S.READY if number % 2 else S.DRAFT,
        )
    document = """query($first: Int!) { models(first: $first, orderBy: {field: NAME, direction: ASC}) {
      nodes { latestVersion { files(first: 5) { nodes { downloadUrl } } } } } }"""
    for asked in (ask, ask.by_core):
        for first in (1, 12):
            answer = await asked(document, first=first)
            assert answer.errors == []
            # Models, versions, files; who may, the statuses, and what is not published.
            assert len(answer.commands) == 6


VERSION = """
query Version($id: ID!, $state: [JobState!], $first: Int, $after: Cursor) { node(id: $id) { ... on ModelVersion {
  status statusReason parameters
  jobs(first: $first, after: $after, state: $state) { totalCount nodes { kind state } pageInfo { endCursor hasNextPage } }
} } }
"""


async def test_a_version_says_what_came_of_it(ask: Asker, database: Database) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    alice, bob, eve = [await insert_actor(login) for login in ("alice", "bob", "eve")]
    model = await insert_model(acme, "m")
    reason = "1 file is not known to be harmless: evil.pkl (UNSAFE)."
    held = await insert_version(
        database,
        model,
        {},
        status=S.QUARANTINED,
        status_reason=reason,
        parameters=Int64(2**40),
    )
    ready = await insert_version(database, model, {})
    subject = {"type": "ModelVersion", "id": held.id}
    for number, (kind, state) in enumerate(
        [
            (JobKind.VERIFY_FILE, JobState.SUCCEEDED),
            (JobKind.VERIFY_FILE, JobState.FAILED),
            (JobKind.FINALIZE_VERSION, JobState.RUNNING),
        ]
    ):
        at = START + timedelta(seconds=number)
        await insert_job(alice, acme, kind=kind, state=state, subject=subject, created_at=at)
    await insert_job(alice, acme, kind=JobKind.REINDEX, subject={"type": "Model", "id": model.id})
    await insert_job(bob, kind=JobKind.VERIFY_FILE, subject=subject)  # seen by bob alone
    ids = {version.id: global_id("ModelVersion", version.id) for version in (held, ready)}
    whole = [
        ("FINALIZE_VERSION", "RUNNING"),
        ("VERIFY_FILE", "FAILED"),
        ("VERIFY_FILE", "SUCCEEDED"),
    ]
    for asked in (ask, ask.by_core):

        async def jobs(
            viewer: Viewer, asked: Asker = asked, **given: Any
        ) -> tuple[int, list[tuple[str, str]], Row]:
            answer = await asked(VERSION, viewer, id=ids[held.id], **given)
            assert answer.errors == []
            node = answer.data["node"]
            assert (node["status"], node["statusReason"], node["parameters"]) == (
                *("QUARANTINED", reason),
                "1099511627776",
            )
            page = node["jobs"]
            rows = [(each["kind"], each["state"]) for each in page["nodes"]]
            return page["totalCount"], rows, page["pageInfo"]

        member = viewer_of(eve, {acme.id: Role.VIEWER})
        assert (await jobs(member))[:2] == (3, whole)
        assert (await jobs(viewer_of(alice)))[:2] == (3, whole)
        assert (await jobs(viewer_of(bob)))[:2] == (1, [("VERIFY_FILE", "QUEUED")])
        for stranger in (viewer_of(eve), ANONYMOUS):
            assert (await jobs(stranger))[:2] == (0, [])
        assert (await jobs(member, state=["FAILED", "RUNNING"]))[:2] == (2, whole[:2])
        assert (await jobs(member, state=[]))[:2] == (0, [])
        _, rows, info = await jobs(member, first=2)
        assert (rows, info["hasNextPage"]) == (whole[:2], True)
        _, rows, info = await jobs(member, first=2, after=info["endCursor"])
        assert (rows, info["hasNextPage"]) == (whole[2:], False)
        answer = await asked(VERSION, member, id=ids[ready.id])
        node = answer.data["node"]
        assert (node["status"], node["statusReason"], node["parameters"]) == ("READY", None, None)
        assert node["jobs"]["nodes"] == []


async def test_jobs_of_many_versions_cost_one_command(ask: Asker, database: Database) -> None:
    alice = await insert_actor("alice")
    model = await insert_model(alice, "m")
    for number in range(6):
        version = await insert_version(database, model, {})
        for _ in range(number):
            await insert_job(alice, subject={"type": "ModelVersion", "id": version.id})
    document = """{ model(owner: "alice", name: "m") { versions { nodes {
      number jobs(first: 3) { totalCount nodes { kind } } } } } }"""
    for asked in (ask, ask.by_core):
        answer = await asked(document, viewer_of(alice))
        assert answer.errors == []
        nodes = answer.data["model"]["versions"]["nodes"]
        counts = [(each["jobs"]["totalCount"], len(each["jobs"]["nodes"])) for each in nodes]
        assert counts == [(5, 3), (4, 3), (3, 3), (2, 2), (1, 1), (0, 0)]
        assert answer.commands == [
            *("find models", "find versions"),
            *("aggregate 1", "aggregate jobs"),
        ]


RANGES = """
query Ranges($filter: ModelFilter) { models(filter: $filter, orderBy: {field: PARAMETERS}) {
  totalCount nodes { name parameters } facets(fields: [PARAMETER_RANGE, FORMAT]) { field buckets { value count } }
} }
"""


async def test_models_by_their_parameters(ask: Asker, database: Database) -> None:
    acme = await insert_actor("acme")
    sizes = {
        "a": 0, "b": 1, "c": 10**8 - 1, "d": 10**8, "e": 10**9 - 1, "f": 10**9, "g": 10**10 - 1,
        "h": 10**10, "i": 10**11 - 1, "j": 10**11, "k": 2**62, "l": 0,
    }  # fmt: skip
    for name, parameters in sizes.items():
        formats = ["GGUF"] if parameters else []
        await insert_model(acme, name, parameters=Int64(parameters), formats=formats)
    # Made before there were any.
    await database.data["models"].update_one({"name": "l"}, {"$unset": {"parameters": 1}})
    for asked in (ask, ask.by_core):
        answer = await asked(RANGES, filter={"name": {"in": list("abcdefghijk")}})
        assert answer.errors == []
        models = answer.data["models"]
        assert [(node["name"], node["parameters"]) for node in models["nodes"]] == [
            *((name, str(sizes[name])) for name in "kjihgfedcb"),
            ("a", None),
        ]
        assert models["facets"] == [
            {
                "field": "PARAMETER_RANGE",
                "buckets": [
                    {"value": "100M_TO_1B", "count": 2},
                    {"value": "10B_TO_100B", "count": 2},
                    {"value": "1B_TO_10B", "count": 2},
                    {"value": "OVER_100B", "count": 2},
                    {"value": "UNDER_100M", "count": 2},
                ],
            },
            {"field": "FORMAT", "buckets": [{"value": "GGUF", "count": 10}]},
        ]
        answer = await asked(RANGES, filter={"parameters": {"gte": str(10**11), "lte": str(2**62)}})
        assert [node["name"] for node in answer.data["models"]["nodes"]] == ["k", "j"]
        assert answer.data["models"]["facets"][0]["buckets"] == [{"value": "OVER_100B", "count": 2}]
        answer = await asked(RANGES, filter={"parameters": {"lte": "0"}})
        assert [node["name"] for node in answer.data["models"]["nodes"]] == ["a"]
        assert answer.data["models"]["facets"][0]["buckets"] == []


RELEASE = """
mutation Release($input: ReleaseModelVersionInput!) { releaseModelVersion(input: $input) {
  modelVersion { status statusReason publishedAt parameters
    files { nodes { path scan { verdict } downloadUrl(expiresIn: 60) } }
    model { latestVersion { number } parameters } }
  userErrors { code message path }
} }
"""


async def test_a_version_is_released_by_who_says_why(ask: Asker, database: Database) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    alice = await insert_actor("alice")
    model = await insert_model(acme, "m")
    held = await insert_version(
        database,
        model,
        {"evil.pkl": 1},
        status=S.QUARANTINED,
        status_reason="1 file is not known to be harmless: evil.pkl (UNSAFE).",
    )
    await database.data["models"].update_one({}, {"$set": {"latest_version_id": None}})
    await blob(1, found(V.UNSAFE))
    maintainer = viewer_of(alice, {acme.id: Role.MAINTAINER})
    version_id = global_id("ModelVersion", held.id)

    async def release(viewer: Viewer, reason: str = "read it", id: str = version_id) -> Row:
        answer = await ask(RELEASE, viewer, input={"id": id, "reason": reason})
        assert answer.errors == []
        done: Row = answer.data["releaseModelVersion"]
        return done

    async def everything() -> list[Row]:
        names = ("models", "versions", "events", "blobs", "jobs")
        return [row for name in names for row in await database.find(name, {}, sort={"_id": 1})]

    before = await everything()
    contributor = viewer_of(alice, {acme.id: Role.CONTRIBUTOR})
    for viewer, given, code, path in (
        (contributor, {}, "FORBIDDEN", ["id"]),
        (maintainer, {"reason": " no "}, "BAD_INPUT", ["reason"]),
        (maintainer, {"id": global_id("ModelVersion", ObjectId())}, "NOT_FOUND", ["id"]),
        (maintainer, {"id": global_id("Model", model.id)}, "NOT_FOUND", ["id"]),
    ):
        refused = await release(viewer, **given)
        assert refused["modelVersion"] is None
        assert [error["code"] for error in refused["userErrors"]] == [code]
        assert [error["path"] for error in refused["userErrors"]] == [path]
    assert await everything() == before

    done = await release(maintainer, " Built here,\nread by hand. ")
    assert done["userErrors"] == []
    released = done["modelVersion"]
    assert released.pop("publishedAt") is not None
    [file] = released.pop("files")["nodes"]
    assert link_is_for(file.pop("downloadUrl")) == "any"
    assert file == {"path": "evil.pkl", "scan": {"verdict": "UNSAFE"}}
    assert released == {
        "status": "READY",
        "statusReason": "Built here,\nread by hand.",
        "parameters": None,
        "model": {"latestVersion": {"number": 1}, "parameters": None},
    }
    [event] = await database.find("events", {})
    assert (event["kind"], event["version_id"], event["actor_id"]) == (
        *("VERSION_RELEASED", held.id),
        alice.id,
    )
    assert event["comment"] == "Built here,\nread by hand."
    assert (event["before"]["status"], event["after"]["status"]) == ("QUARANTINED", "READY")

    before = await everything()
    again = await release(maintainer)
    assert [error["code"] for error in again["userErrors"]] == ["INVALID_TRANSITION"]
    assert await everything() == before
