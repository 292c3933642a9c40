"""`compareVersions`: files by path and contents, tensors, properties; who sees it; what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.cache.entries import Access
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument, FileDocument, FileFormat, FileRole
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.loaders import comparing
from modelharbor.schema.nodes import global_id
from tests.asking import Answer, Asker
from tests.documents import insert_actor, insert_model, insert_version, viewer_of
from tests.explaining import Captured, explained
from tests.faults.figures import is_long

pytestmark = pytest.mark.anyio

PAGE: Final = """
query Page($base: ID!, $head: ID!, $first: Int, $after: Cursor, $last: Int, $before: Cursor, $change: [ChangeKind!]) {
  compareVersions(base: $base, head: $head) {
    files(first: $first, after: $after, last: $last, before: $before, change: $change) {
      totalCount
      pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
      edges { cursor node { path } }
      nodes { path change base { id sizeBytes sha256 } head { id sizeBytes sha256 version { number } } sharedBytes }
    }
  }
}
"""
WHOLE: Final = """
query Whole($base: ID!, $head: ID!) {
  compareVersions(base: $base, head: $head) {
    base { number model { name } } head { number model { name } }
    properties { key change base head } parameterDelta bytesAdded bytesShared
    tensors { base { ...S } head { ...S } added removed changed }
  }
}
fragment S on TensorSummary { tensorCount parameterCount parametersByDtype architecture contextLength quantization }
"""
KINDS: Final = ("ADDED", "REMOVED", "MODIFIED", "UNCHANGED")


@dataclass
class Pair:
    ask: Asker
    base: VersionDocument
    head: VersionDocument
    viewer: Viewer = ANONYMOUS

    async def both(self, document: str, count: Captured | None = None, **given: Any) -> Any:
        """By the plan and by graphql-core, which answer the same."""
        ids: dict[str, Any] = {
            "base": global_id("ModelVersion", self.base.id),
            "head": global_id("ModelVersion", self.head.id),
        }
        planned: Answer = await self.ask(document, self.viewer, count=count, **ids, **given)
        other: Answer = await self.ask.by_core(document, self.viewer, **ids, **given)
        assert planned.fallback is None
        assert (planned.data, planned.errors) == (other.data, other.errors)
        assert planned.errors == []
        return planned.data["compareVersions"]

    async def page(self, count: Captured | None = None, **given: Any) -> Any:
        return (await self.both(PAGE, count, **given))["files"]

    async def whole(self) -> Any:
        return await self.both(WHOLE)


async def versions(
    database: Database,
    base: dict[str, int],
    head: dict[str, int],
    **values: Any,
) -> tuple[ModelDocument, VersionDocument, VersionDocument]:
    """Of one model, with files of these lengths: contents are equal where lengths are."""
    model = await insert_model(await insert_actor("acme"), "m", **values)
    return (
        model,
        await insert_version(database, model, base),
        await insert_version(database, model, head),
    )


def expected(base: dict[str, int], head: dict[str, int]) -> list[Row]:
    """What changed, with the bytes that are shared, in the order of paths."""
    found = []
    for path in sorted(base.keys() | head.keys()):
        old, new = base.get(path), head.get(path)
        if old is None:
            kind = "ADDED"
        elif new is None:
            kind = "REMOVED"
        else:
            kind = "UNCHANGED" if old == new else "MODIFIED"
        shared = new if new is not None and new in base.values() else 0
        found.append({"path": path, "change": kind, "base": old, "head": new, "shared": shared})
    return found


def told(nodes: Sequence[Row]) -> list[Row]:
    def size(file: Row | None) -> int | None:
        assert file is None or file["sha256"] == f"{int(file['sizeBytes']):064x}"
        return None if file is None else int(file["sizeBytes"])

    return [
        {
            "path": node["path"],
            "change": node["change"],
            "base": size(node["base"]),
            "head": size(node["head"]),
            "shared": int(node["sharedBytes"]),
        }
        for node in nodes
    ]


def drawn(chance: Random) -> dict[str, int]:
    paths = [f"{folder}{name}" for folder in ("", "a/", "é/") for name in ("b", "B", "c.bin", "z")]
    return {path: chance.randint(1, 9) for path in paths if chance.random() < 0.6}


@pytest.mark.parametrize("seed", range(3))
async def test_all_pages_both_ways(ask: Asker, database: Database, seed: int) -> None:
    """Of each list of kinds: from the front and from the back, by every cursor."""
    chance = Random(seed)
    base, head = drawn(chance), drawn(chance)
    _, old, new = await versions(database, base, head)
    pair = Pair(ask, old, new)
    everything = expected(base, head)
    assert {row["change"] for row in everything} == set(KINDS)
    for change in (None, ["MODIFIED"], ["ADDED", "REMOVED"], list(KINDS), []):
        rows = [row for row in everything if change is None or row["change"] in change]
        given: dict[str, Any] = {} if change is None else {"change": change}
        whole = await pair.page(first=100, **given)
        assert told(whole["nodes"]) == rows
        assert whole["totalCount"] == len(rows)
        assert [edge["node"]["path"] for edge in whole["edges"]] == [row["path"] for row in rows]
        size = chance.randint(1, 4)
        for ends in (("first", "after", "endCursor"), ("last", "before", "startCursor")):
            count, from_, cursor = ends
            place, found = None, list[Row]()
            while True:
                where: dict[str, Any] = {count: size, from_: place}
                page = await pair.page(**where, **given)
                found = (
                    [*found, *told(page["nodes"])]
                    if count == "first"
                    else [*told(page["nodes"]), *found]
                )
                info = page["pageInfo"]
                if not info["hasNextPage" if count == "first" else "hasPreviousPage"]:
                    break
                assert len(page["nodes"]) == size
                place = info[cursor]
            assert found == rows
        for place, edge in enumerate(whole["edges"]):
            beyond = await pair.page(first=2, after=edge["cursor"], **given)
            assert told(beyond["nodes"]) == rows[place + 1 : place + 3]
            before = await pair.page(last=2, before=edge["cursor"], **given)
            assert told(before["nodes"]) == rows[max(0, place - 2) : place]
    found = await pair.whole()
    shared = sum(row["shared"] for row in everything)
    assert int(found["bytesShared"]) == shared
    assert int(found["bytesAdded"]) == sum(head.values()) - shared


async def test_a_version_with_itself_and_with_nothing(ask: Asker, database: Database) -> None:
    model, old, new = await versions(database, {"a": 1, "b": 1}, {})
    same = Pair(ask, old, old)
    assert told((await same.page())["nodes"]) == expected({"a": 1, "b": 1}, {"a": 1, "b": 1})
    assert (await same.page(change=["UNCHANGED"]))["totalCount"] == 2
    assert (await same.whole())["bytesShared"] == "2"
    for pair, kind in ((Pair(ask, old, new), "REMOVED"), (Pair(ask, new, old), "ADDED")):
        page = await pair.page()
        assert [node["change"] for node in page["nodes"]] == [kind] * 2
        assert (page["totalCount"], page["pageInfo"]["hasNextPage"]) == (2, False)
    nothing = await insert_version(database, model, {})
    assert (await Pair(ask, new, nothing).page())["totalCount"] == 0
    assert (await Pair(ask, new, nothing).whole())["bytesAdded"] == "0"


async def test_versions_of_two_models(ask: Asker, database: Database) -> None:
    _, old, _ = await versions(database, {"a": 1, "moved": 7}, {})
    other = await insert_model(await insert_actor("other"), "fork")
    new = await insert_version(database, other, {"a": 2, "here": 7})
    pair = Pair(ask, old, new)
    assert told((await pair.page())["nodes"]) == expected({"a": 1, "moved": 7}, {"a": 2, "here": 7})
    whole = await pair.whole()
    assert (whole["base"]["model"]["name"], whole["head"]["model"]["name"]) == ("m", "fork")
    assert (whole["bytesShared"], whole["bytesAdded"]) == ("7", "2")


async def test_properties_and_parameters(ask: Asker, database: Database) -> None:
    _, old, new = await versions(database, {}, {})
    pair = Pair(ask, old, new)
    assert (await pair.whole())["properties"] == []
    assert (await pair.whole())["parameterDelta"] is None
    for version, properties, parameters in (
        (old, {"a": 1, "b": None, "c": {"x": 1, "y": [2]}, "d": 1, "same": "é"}, 2**40),
        (new, {"a": 1.0, "c": {"y": [2], "x": 1}, "d": True, "n": None, "same": "é"}, 7),
    ):
        await database.data["versions"].update_one(
            {"_id": version.id}, {"$set": {"properties": properties, "parameters": parameters}}
        )
    whole = await pair.whole()
    assert whole["parameterDelta"] == str(7 - 2**40)
    assert whole["properties"] == [
        {"key": "a", "change": "MODIFIED", "base": 1, "head": 1.0},
        {"key": "b", "change": "REMOVED", "base": None, "head": None},
        {"key": "d", "change": "MODIFIED", "base": 1, "head": True},
        {"key": "n", "change": "ADDED", "base": None, "head": None},
    ]


# ---- tensors


async def weigh(
    database: Database, version: VersionDocument, path: str, tensors: dict[str, Any], **values: Any
) -> None:
    """A file with weights, inspected: each tensor by its type and shape."""
    sizes = {name: (dtype, shape) for name, (dtype, shape) in tensors.items()}
    counts: dict[str, int] = {}
    for dtype, shape in sizes.values():
        counts[dtype] = counts.get(dtype, 0) + shape[0]
    digest = values.pop("sha256", f"{len(path):032x}{ObjectId()}{'0' * 8}")
    shown = [{"name": name, "dtype": d, "shape": s} for name, (d, s) in sizes.items()]
    summary = {
        "tensor_count": len(tensors),
        "parameter_count": sum(counts.values()),
        "parameters_by_dtype": counts,
        "architecture": None,
        "context_length": None,
        "quantization": None,
        **values.pop("says", {}),
    }
    header = {"tensors": shown, **values.pop("header", {})}
    inspection = {"format": "SAFETENSORS", "tensors": summary, "header": header, **values}
    await FileDocument(
        version_id=version.id,
        model_id=version.model_id,
        path=path,
        size_bytes=1,
        sha256=digest,
        role=FileRole.WEIGHTS,
        format=FileFormat.SAFETENSORS,
    ).insert()
    if await database.count("blobs", {"sha256": digest}) == 0:
        await BlobDocument(sha256=digest, size_bytes=1, inspection=inspection).insert()


async def test_tensors_by_name(ask: Asker, database: Database) -> None:
    """Of shards; one that both have is not looked into, and only one of several formats counts."""
    _, old, new = await versions(database, {"config.json": 3}, {"config.json": 3})
    pair = Pair(ask, old, new)
    assert (await pair.whole())["tensors"] is None
    shared = {"sha256": "a" * 64, "header": {"cut": True}}
    for version in (old, new):
        await weigh(database, version, "1.safetensors", {"e": ("F32", [5])}, **shared)
    says = {"architecture": "whale", "context_length": 4096}
    await weigh(
        database, old, "2", {"a": ("F32", [2]), "b": ("F32", [3]), "c": ("F16", [4])}, says=says
    )
    await weigh(
        database, new, "2", {"a": ("F16", [2]), "c": ("F16", [4]), "d": ("F16", [6])}, says=says
    )
    await weigh(database, new, "q.gguf", {"z": ("Q4", [1])}, format="GGUF")
    assert (await pair.whole())["tensors"] == {
        "base": {
            "tensorCount": 4,
            "parameterCount": "14",
            "parametersByDtype": {"F16": 4, "F32": 10},
            "architecture": "whale",
            "contextLength": 4096,
            "quantization": None,
        },
        "head": {
            "tensorCount": 4,
            "parameterCount": "17",
            "parametersByDtype": {"F16": 12, "F32": 5},
            "architecture": "whale",
            "contextLength": 4096,
            "quantization": None,
        },
        "added": 1,
        "removed": 1,
        "changed": 1,
    }
    # One side alone.
    _, empty, full = old, await insert_version(database, await the_model(old), {}), new
    tensors = (await Pair(ask, empty, full).whole())["tensors"]
    assert (tensors["base"], tensors["added"]) == (None, None)  # the shared one is cut


async def the_model(version: VersionDocument) -> ModelDocument:
    found = await ModelDocument.get(version.model_id)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "header",
    [
        {"cut": True},
        {"tensors": [{"name": "a", "dtype": "F32", "shape": [1]}]},
        {"tensors": [{"name": "a…", "dtype": "F32"}, {"name": "b", "dtype": "F32"}]},
        {"tensors": [{"name": "a"}, {"name": "a"}]},
        {"tensors": [7, 8]},
        {"tensors": None},
    ],
)
async def test_names_that_are_not_all_kept(
    ask: Asker, database: Database, header: dict[str, Any]
) -> None:
    _, old, new = await versions(database, {}, {})
    await weigh(database, old, "1", {"a": ("F32", [1]), "b": ("F32", [1])}, header=header)
    await weigh(database, new, "1", {"a": ("F32", [1]), "b": ("F32", [1])})
    tensors = (await Pair(ask, old, new).whole())["tensors"]
    assert (tensors["added"], tensors["removed"], tensors["changed"]) == (None, None, None)
    assert tensors["base"]["tensorCount"] == 2


async def test_tensors_of_too_many_files(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, old, new = await versions(database, {}, {})
    for number in range(3):
        await weigh(database, old, str(number), {f"t{number}": ("F32", [1])})
    pair = Pair(ask, old, new)
    tensors = (await pair.whole())["tensors"]
    assert (tensors["removed"], tensors["head"]) == (3, None)
    monkeypatch.setattr(comparing, "MOST_NAMED", 2)
    assert (await pair.whole())["tensors"]["removed"] is None
    monkeypatch.setattr(comparing, "MOST_WEIGHTS", 2)
    assert (await pair.whole())["tensors"] is None


# ---- who sees it


async def test_each_viewer_sees_what_is_theirs(ask: Asker, database: Database) -> None:
    """A private version is to everybody else as one that does not exist."""
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    open_ = await insert_model(acme, "open")
    closed = await insert_model(acme, "closed", visibility=Visibility.PRIVATE)
    public = await insert_version(database, open_, {"a": 1})
    private = await insert_version(database, closed, {"a": 1})
    deleted = await insert_version(database, open_, {}, status=VersionStatus.DELETED)
    held = await insert_version(database, open_, {"a": 2}, status=VersionStatus.QUARANTINED)
    member = viewer_of(await insert_actor("member"), {acme.id: Role.VIEWER})
    stranger = viewer_of(await insert_actor("stranger"))
    document = "query($b: ID!, $h: ID!) { compareVersions(base: $b, head: $h) { bytesShared files { nodes { path head { downloadUrl } } } } }"

    async def asked(viewer: Viewer, base: str, head: str) -> Any:
        planned = await ask(document, viewer, b=base, h=head)
        other = await ask.by_core(document, viewer, b=base, h=head)
        assert planned.errors == other.errors == []
        assert planned.data == other.data
        return planned.data["compareVersions"]

    def version_id(version: VersionDocument) -> str:
        return global_id("ModelVersion", version.id)

    for viewer in (member, stranger, ANONYMOUS):
        for base, head in ((public, private), (private, public), (private, private)):
            found = await asked(viewer, version_id(base), version_id(head))
            assert (found is not None) == (viewer is member)
            if found is not None:
                assert found["bytesShared"] == "1"
        for strange in (
            version_id(deleted),
            global_id("ModelVersion", ObjectId()),
            global_id("Model", open_.id),
            "nonsense",
        ):
            assert await asked(viewer, version_id(public), strange) is None
            assert await asked(viewer, strange, version_id(public)) is None
        # Contents that are held back are no nearer by this way.
        found = await asked(viewer, version_id(public), version_id(held))
        assert [node["head"]["downloadUrl"] for node in found["files"]["nodes"]] == [None]


@pytest.mark.parametrize(
    "given",
    [
        {"first": 0},
        {"first": 101},
        {"first": 1, "last": 1},
        {"after": "nonsense"},
        {"before": "WyIrbmFtZSIsImEiLCI2NWYxIl0"},
    ],
)
async def test_bad_pages(ask: Asker, database: Database, given: dict[str, Any]) -> None:
    _, old, new = await versions(database, {"a": 1}, {"a": 1})
    ids: dict[str, Any] = {
        "base": global_id("ModelVersion", old.id),
        "head": global_id("ModelVersion", new.id),
    }
    for each in (ask, ask.by_core):
        answer = await each(PAGE, **ids, **given)
        assert [code for _, code in answer.errors] == ["BAD_USER_INPUT"]


# ---- what it costs, and what it is kept by


async def test_commands(ask: Asker, database: Database) -> None:
    """As many for a hundred files as for one."""
    for many in (1, 100):
        await database.data["models"].delete_many({})
        await database.data["actors"].delete_many({})
        _, old, new = await versions(
            database,
            {f"f{n:03}": 1 for n in range(many)},
            {f"g{n:03}": 2 for n in range(many)},
        )
        pair = Pair(ask, old, new)
        captured = Captured()
        page = await pair.page(count=captured, first=100)
        assert page["totalCount"] == 2 * many
        assert sorted(captured.names) == [
            "aggregate files",  # the count
            "aggregate files",  # the page
            *(["find files"] if many == 1 else []),  # the first hundred are all REMOVED
            "find models",
            *["find versions"] * (2 if many == 1 else 1),
        ]
        captured = Captured()
        await pair.both(WHOLE, captured)
        assert sorted(captured.names) == [
            "aggregate files",  # both sums
            "aggregate files",  # weights
            "find models",  # rights
            "find models",  # the versions' own
            "find versions",
            "find versions",
        ]


async def fill(database: Database, version: VersionDocument, many: int) -> None:
    """Made by MongoDB itself, each with contents of its own."""
    number = {"$add": ["$n", 10_000_000]}
    await (
        await database.data.aggregate(
            [
                {"$documents": [{"n": {"$range": [0, many]}}]},
                {"$unwind": "$n"},
                {
                    "$project": {
                        "_id": {
                            "$toObjectId": {
                                "$concat": [
                                    str(version.id)[8:],
                                    {"$toString": number},
                                ]
                            }
                        },
                        "version_id": version.id,
                        "model_id": version.model_id,
                        "path": {"$concat": ["part-", {"$toString": number}]},
                        "path_key": {"$toString": number},
                        "size_bytes": {"$toInt": 2},
                        "role": "OTHER",
                        "format": "OTHER",
                        "sha256": {
                            "$concat": [
                                "0" * 48,
                                {"$toString": {"$add": [10**15, "$n"]}},
                            ]
                        },
                    }
                },
                {"$merge": {"into": "files", "on": "_id"}},
            ]
        )
    ).to_list()


async def test_a_page_of_very_many_files(ask: Asker, database: Database) -> None:
    """By the index of paths, as many files of each as the page has; wherever the page is."""
    _, old, new = await versions(database, {}, {"part-10007000": 1, "zero": 2})
    many = 100_000 if is_long() else 15_000
    await fill(database, old, many)
    pair = Pair(ask, old, new)
    whole = await pair.page(last=2)
    assert [node["path"] for node in whole["nodes"]] == [f"part-{10_000_000 + many - 1}", "zero"]
    assert whole["totalCount"] == many + 1
    document = PAGE.replace("totalCount", "")
    place = None
    for middle in (False, True):
        if middle:
            found = await pair.page(change=["MODIFIED"])
            assert [node["path"] for node in found["nodes"]] == ["part-10007000"]
            place = found["pageInfo"]["endCursor"]
        for given in ({"first": 20, "after": place}, {"last": 20, "before": place}):
            captured = Captured()
            page = (await pair.both(document, captured, **given))["files"]
            assert len(page["nodes"]) == 20
            [command] = [
                c for name, c in captured.commands if c[name] == "files" and name == "aggregate"
            ]
            stages = await explained(database, command)
            scans = [each for each in stages if "keysExamined" in each]
            assert len(scans) == 2
            assert {each["indexName"] for each in scans} == {"path"}
            assert 0 < sum(each["keysExamined"] for each in scans) <= 2 * 22
            assert {each["stage"] for each in stages if "stage" in each} & {
                "COLLSCAN",
                "SORT",
            } == set()


async def test_contents_that_many_models_have(ask: Asker, database: Database) -> None:
    """They are looked for among those of the base's model, by their hash."""
    _, old, new = await versions(database, {f"a{n}": 7 for n in range(500)}, {"b": 7, "c": 8})
    other = await insert_model(await insert_actor("other"), "other")
    await insert_version(database, other, {f"a{n}": 8 for n in range(500)})
    captured = Captured()
    page = await Pair(ask, old, new).page(captured, change=["ADDED"])
    assert [node["sharedBytes"] for node in page["nodes"]] == ["7", "0"]
    [command] = [each for name, each in captured.commands if each.get("find") == "files"]
    scans = [each for each in await explained(database, command) if "keysExamined" in each]
    assert sum(each["keysExamined"] for each in scans) <= 505


async def test_what_it_is_kept_by(ask: Asker, database: Database) -> None:
    model, old, new = await versions(database, {"a": 1}, {"a": 2})
    await weigh(database, new, "w", {"t": ("F32", [1])}, sha256="b" * 64)
    asking = replace(ask, position=1)
    ids: dict[str, Any] = {
        "base": global_id("ModelVersion", old.id),
        "head": global_id("ModelVersion", new.id),
    }
    read = (await asking(WHOLE, **ids)).read
    assert read is not None
    assert read.access is Access.ANYBODY
    assert {
        f"versions/{old.id}",
        f"versions/{new.id}",
        f"models/{model.id}",
        f"files?version_id={old.id}",
        f"files?version_id={new.id}",
        f"blobs/{'b' * 64}",
    } <= read.tags
    read = (await asking(PAGE, **ids)).read
    assert read is not None
    assert f"files?version_id={old.id}" in read.tags
    await database.data["models"].update_one({"_id": model.id}, {"$set": {"principals": []}})
    read = (await asking(PAGE, **ids)).read
    assert read is not None
    assert read.access is Access.RIGHTS
    assert f"models/{model.id}" in read.tags
