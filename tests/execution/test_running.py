"""Answers that are not as a plan expects them: graphql-core gives them, from what the plan has read."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import orjson
import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect, ExecutionTimeout

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.errors import Forbidden, HarborError, Unavailable
from modelharbor.execution.declaration import is_row_of
from modelharbor.execution.execute import UNEXPECTED
from modelharbor.execution.plan import Plan
from modelharbor.execution.reading import Run
from modelharbor.loaders.actors import ActorByIdLoader
from modelharbor.loaders.lanes import Lanes
from modelharbor.loaders.models import LikedByModelLoader
from modelharbor.loaders.pages import TotalLoader
from modelharbor.loaders.versions import VersionByIdLoader
from modelharbor.schema import schema
from tests.asking import Answer, Asker
from tests.documents import insert_actor, insert_model, insert_version, viewer_of

# graphql-core drops coroutines that nobody awaits where a non-null failure ends what is beside it.
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

INTERNAL: Final = "INTERNAL_SERVER_ERROR"
GONE: Final = ObjectId("65ffffff0000000000000001")


async def two_models(database: Database) -> Viewer:
    """`acme/a` and `acme/b`, each with a version of two files, made by ada, who asks."""
    acme, ada = await insert_actor("acme"), await insert_actor("ada", display_name="Ada")
    for name in ("a", "b"):
        model = await insert_model(acme, name, tags=["x", "y"])
        await insert_version(database, model, {"p": 1, "q": 2}, created_by_id=ada.id)
    return viewer_of(ada)


async def both(ask: Asker, document: str, viewer: Viewer, **variables: Any) -> Answer:
    """The answer, which is graphql-core's own, although a plan was begun."""
    expected = await ask.by_core(document, viewer, **variables)
    answer = await ask(document, viewer, **variables)
    assert orjson.dumps(answer.data) == orjson.dumps(expected.data)
    # Which of several comes first is a matter of which read ends first.
    assert by_path(answer) == by_path(expected)
    assert (answer.fallback, expected.fallback) == (UNEXPECTED, "plans are switched off")
    return answer


def by_path(answer: Answer) -> list[Row]:
    return sorted(answer.problems, key=lambda problem: str(problem["path"]))


def told(answer: Answer) -> list[tuple[list[Any], str]]:
    return [(each["path"], each["extensions"]["code"]) for each in answer.problems]


# `model` and `latestVersion` may be null, so that the rest of the answer stays.
DOCUMENT: Final = """
{ a: model(owner: "acme", name: "a") { ...F } b: model(owner: "acme", name: "b") { ...F } viewer { login } }
fragment F on Model { name displayName visibility tags revision createdAt stats { likes downloadsAllTime trendingScore }
  owner { login }
  latestVersion { number status digest createdBy { login } files { nodes { path sizeBytes role } } } }
"""
ANEW: Final = "find models"
"""Rows of which parts of an embedded document were read are the only ones that a repair reads again."""
HEALTHY_VERSION: Final[Row] = {
    "number": 1,
    "status": "READY",
    "digest": None,
    "createdBy": {"login": "ada"},
    "files": {
        "nodes": [
            {"path": "p", "sizeBytes": "1", "role": "OTHER"},
            {"path": "q", "sizeBytes": "2", "role": "OTHER"},
        ]
    },
}
IN_MODEL: Final[list[tuple[str, Any, list[Any]]]] = [
    ("name", None, ["name"]),
    ("name", ["x"], ["name"]),
    ("display_name", {"x": 1}, ["displayName"]),
    ("visibility", "SECRET", ["visibility"]),
    ("visibility", None, ["visibility"]),
    ("tags", None, ["tags"]),
    ("tags", "x", ["tags"]),
    ("tags", ["x", None], ["tags", 1]),
    ("tags", ["x", {"y": 1}], ["tags", 1]),
    ("revision", 2**40, ["revision"]),
    ("revision", "x", ["revision"]),
    ("revision", 1.5, ["revision"]),
    ("created_at", None, ["createdAt"]),
    ("created_at", "2026", ["createdAt"]),
    ("stats.likes", None, ["stats", "likes"]),
    ("stats.trending_score", float("nan"), ["stats", "trendingScore"]),
    ("stats", None, ["stats"]),
    ("stats", 5, ["stats", "likes"]),
    ("owner_id", GONE, ["owner"]),
    ("owner_id", None, ["owner"]),
]
IN_VERSION: Final[list[tuple[str, Any, list[Any]]]] = [
    ("number", 2**40, ["number"]),
    ("status", "LOST", ["status"]),
    ("digest", {"x": 1}, []),
]


@pytest.mark.parametrize(("name", "value", "path"), IN_MODEL)
async def test_a_stored_value_that_is_not_as_promised(
    ask: Asker, database: Database, name: str, value: Any, path: list[Any]
) -> None:
    viewer = await two_models(database)
    healthy = await ask(DOCUMENT, viewer)
    assert (healthy.problems, healthy.fallback) == ([], None)
    await database.data["models"].update_one({"name_lower": "b"}, {"$set": {name: value}})
    answer = await both(ask, DOCUMENT, viewer)
    is_nullable = path == ["displayName"]
    assert told(answer) == ([(["b", *path], INTERNAL)] if path else [])
    assert answer.data["a"] == healthy.data["a"]
    assert answer.data["viewer"] == {"login": "ada"}
    if path:
        rest = {**healthy.data["b"], "displayName": None} if is_nullable else None
        assert answer.data["b"] == rest
    assert sorted(answer.commands) == sorted([*healthy.commands, ANEW])


@pytest.mark.parametrize(("name", "value", "path"), IN_VERSION)
async def test_what_is_beside_a_failure_stays(
    ask: Asker, database: Database, name: str, value: Any, path: list[Any]
) -> None:
    viewer = await two_models(database)
    healthy = await ask(DOCUMENT, viewer)
    model = await database.data["models"].find_one({"name_lower": "b"})
    assert model is not None
    query = {"model_id": model["_id"]}
    await database.data["versions"].update_one(query, {"$set": {name: value}})
    expected = await ask.by_core(DOCUMENT, viewer)
    answer = await ask(DOCUMENT, viewer)
    assert (answer.data, answer.problems) == (expected.data, expected.problems)
    assert told(answer) == ([(["b", "latestVersion", *path], INTERNAL)] if path else [])
    if path:
        assert answer.fallback == UNEXPECTED
        assert answer.data["b"] == {**healthy.data["b"], "latestVersion": None}
        assert answer.data["a"]["latestVersion"] == HEALTHY_VERSION
    anew = [ANEW] if answer.fallback else []
    assert sorted(answer.commands) == sorted([*healthy.commands, *anew])


async def test_an_error_says_where_it_stands(ask: Asker, database: Database) -> None:
    viewer = await two_models(database)
    await database.data["files"].update_many({"path": "q"}, {"$set": {"role": "KING"}})
    document = (
        '{ model(owner: "acme", name: "a") { latestVersion { files { nodes { path\n  role } } } } }'
    )
    answer = await both(ask, document, viewer)
    assert answer.data == {"model": {"latestVersion": None}}
    assert answer.problems == [
        {
            "message": "Internal server error",
            "locations": [{"line": 2, "column": 3}],
            "path": ["model", "latestVersion", "files", "nodes", 1, "role"],
            "extensions": {"code": INTERNAL},
        }
    ]


async def test_owners_that_are_gone_or_unknown(ask: Asker, database: Database) -> None:
    viewer = await two_models(database)
    document = (
        "{ models { nodes { name owner { login __typename ... on User { displayName } } } } }"
    )
    healthy = await ask(document, viewer)
    actors = database.data["actors"]
    await actors.update_one({"login": "acme"}, {"$set": {"kind": "Robot"}})
    answer = await both(ask, document, viewer)
    assert answer.data is None
    assert told(answer) == [(["models", "nodes", 0, "owner"], INTERNAL)]
    assert sorted(answer.commands) == sorted(healthy.commands)
    await actors.update_one({"login": "acme"}, {"$set": {"kind": "Model"}})  # a type, but no actor
    assert (await both(ask, document, viewer)).data is None
    await actors.delete_one({"login": "acme"})
    answer = await both(ask, document, viewer)
    assert told(answer) == [(["models", "nodes", 0, "owner"], INTERNAL)]
    assert sorted(answer.commands) == sorted(healthy.commands)


@pytest.mark.parametrize(
    ("refused", "variables", "path"),
    [
        ("x: models(first: $n) { totalCount }", {"n": 0}, ["x"]),
        ("x: models(first: 0) { totalCount }", {"n": 1}, ["x"]),
        ('x: models(first: $n, after: "nonsense") { totalCount }', {"n": 1}, ["x"]),
        ('x: suggest(prefix: "", first: $n)', {"n": 1}, ["x"]),
        ('x: resolve(ref: "") { files(first: $n) { totalCount } }', {"n": 1}, ["x"]),
        ("x: model { versions(first: $n) { totalCount } }", {"n": 1}, ["x"]),
    ],
)
async def test_a_refused_argument_beside_good_fields(
    ask: Asker, database: Database, refused: str, variables: Row, path: list[Any]
) -> None:
    viewer = await two_models(database)
    good = 'viewer { login } good: model(owner: "acme", name: "a") { name versions(first: $n) { totalCount } }'
    alone = await ask(f"query($n: Int!) {{ {good} }}", viewer, **variables)
    answer = await both(ask, f"query($n: Int!) {{ {good} {refused} }}", viewer, **variables)
    assert (path, "BAD_USER_INPUT") in told(answer)
    assert sorted(answer.commands) == sorted(alone.commands)
    assert "find models" in alone.commands


async def test_arguments_are_refused_below_each_parent(ask: Asker, database: Database) -> None:
    """Each parent tells of it, and nothing is read for them."""
    viewer = await two_models(database)
    document = (
        'query($n: Int) { models { nodes { name version(number: $n, alias: "x") { number } } } }'
    )
    answer = await both(ask, document, viewer, n=1)
    assert told(answer) == [
        (["models", "nodes", index, "version"], "BAD_USER_INPUT") for index in (0, 1)
    ]
    assert [node["version"] for node in answer.data["models"]["nodes"]] == [None, None]
    assert answer.commands == ["find models"]


async def test_a_refused_argument_of_a_value_that_may_be_null(
    ask: Asker, database: Database
) -> None:
    """It is null and told of, not merely null."""
    viewer = await two_models(database)
    document = '{ model(owner: "acme", name: "a") { version(number: 1) { file(path: "p") { path downloadUrl(expiresIn: 1) } } } }'
    answer = await both(ask, document, viewer)
    path = ["model", "version", "file", "downloadUrl"]
    assert told(answer) == [(path, "BAD_USER_INPUT")]
    assert answer.data == {"model": {"version": {"file": {"path": "p", "downloadUrl": None}}}}
    assert answer.commands == ["find models", "find versions", "find files"]


def stubbed(
    monkeypatch: pytest.MonkeyPatch, loader: Any, answer: Callable[[Any, list[Any]], Any]
) -> list[list[Any]]:
    """The keys of each batch of a loader, which answers so (an exception is raised)."""
    batches: list[list[Any]] = []

    async def batch_load(self: Any, keys: list[Any]) -> Sequence[Any]:
        batches.append(keys)
        found = answer(self, keys)
        if isinstance(found, Exception):
            raise found
        made: Sequence[Any] = found
        return made

    monkeypatch.setattr(loader, "batch_load", batch_load)
    return batches


PARTLY: Final = (
    '{ model(owner: "acme", name: "a") { name owner { login } viewerHasLiked } viewer { login } }'
)


@pytest.mark.parametrize(
    ("error", "code", "times"),
    [
        (Forbidden("Not yours."), "FORBIDDEN", 1),
        (Unavailable("Later."), "UNAVAILABLE", 1),
        (AutoReconnect("gone"), "UNAVAILABLE", 1),
        (ExecutionTimeout("slow", 50), "TIMEOUT", 1),
        (RuntimeError("secret"), INTERNAL, 2),  # it may be the plan's own mistake
        (KeyError("secret"), INTERNAL, 2),
    ],
)
async def test_a_batch_that_fails(
    ask: Asker,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: str,
    times: int,
) -> None:
    viewer = await two_models(database)
    healthy = await ask(PARTLY, viewer)
    batches = stubbed(monkeypatch, LikedByModelLoader, lambda loader, keys: error)
    answer = await both(ask, PARTLY, viewer)
    assert told(answer) == [(["model", "viewerHasLiked"], code)]
    assert answer.data == {"model": None, "viewer": {"login": "ada"}}
    assert len(batches) == 1 + times
    assert sorted(healthy.commands) == ["find actors", "find likes", "find models"]
    if times == 1:
        assert sorted(answer.commands) == ["find actors", "find models"]


@pytest.mark.parametrize("error", [Forbidden("Not yours."), ValueError("secret")])
async def test_a_key_that_fails_fails_alone(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    viewer = await two_models(database)
    document = "{ models(orderBy: {field: NAME, direction: ASC}) { nodes { name owner { login } latestVersion { number files { totalCount } } } } }"
    healthy = await ask(document, viewer)
    read = VersionByIdLoader.batch_load

    async def batch_load(self: VersionByIdLoader, keys: list[ObjectId]) -> list[Any]:
        found = await read(self, keys)
        return [found[0], error]

    monkeypatch.setattr(VersionByIdLoader, "batch_load", batch_load)
    answer = await both(ask, document, viewer)
    [(path, code)] = told(answer)
    assert path == ["models", "nodes", 1, "latestVersion"]
    assert code == ("FORBIDDEN" if isinstance(error, HarborError) else INTERNAL)
    nodes = healthy.data["models"]["nodes"]
    assert answer.data["models"]["nodes"] == [nodes[0], {**nodes[1], "latestVersion": None}]
    read_once = ["find actors", "find files", "find models", "find versions", "find versions"]
    assert sorted(answer.commands) == read_once


async def test_two_failures_at_once_are_both_told(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = await two_models(database)
    stubbed(monkeypatch, TotalLoader, lambda loader, keys: Forbidden("No total."))
    document = """{ a: model(owner: "acme", name: "a") { versions { totalCount } } b: model(owner: "acme", name: "b") { version(number: 1) { number files(first: 0) { totalCount } } } }"""
    answer = await both(ask, document, viewer)
    assert sorted(told(answer)) == [
        (["a", "versions", "totalCount"], "FORBIDDEN"),
        (["b", "version", "files"], "BAD_USER_INPUT"),
    ]
    assert answer.data == {"a": None, "b": {"version": None}}


async def test_rows_that_were_read_with_other_names_are_read_again(
    ask: Asker, database: Database
) -> None:
    """The owner and the maker are actors; of each the plan read other names."""
    viewer = await two_models(database)
    document = """{ models(orderBy: {field: NAME, direction: ASC}) { nodes { name owner { login } latestVersion { status createdBy { displayName } } } } }"""
    healthy = await ask(document, viewer)
    await database.data["versions"].update_one({}, {"$set": {"status": "LOST"}})
    answer = await both(ask, document, viewer)
    assert answer.data["models"]["nodes"][1] == healthy.data["models"]["nodes"][1]
    assert sorted(answer.commands) == sorted([*healthy.commands, "find actors", "find actors"])


async def test_names_of_a_third_place_do_not_hide_those_of_the_second(
    ask: Asker, database: Database
) -> None:
    """One person in three places, read with other names in the one between."""
    viewer = await two_models(database)
    document = """{ models(orderBy: {field: NAME, direction: ASC}) { nodes { name visibility owner { login }
      latestVersion { createdBy { displayName } files(first: 1) { nodes { version { createdBy { login } } } } } } }
      broken: model(owner: "acme", name: "b") { tags } }"""
    healthy = await ask(document, viewer)
    assert healthy.fallback is None
    await database.data["models"].update_one({"name_lower": "b"}, {"$set": {"tags": None}})
    answer = await both(ask, document, viewer)
    assert answer.data == {**healthy.data, "broken": None}
    assert told(answer) == [(["broken", "tags"], INTERNAL)]


# ---- mistakes of a plan


async def test_a_mistake_of_a_plan_is_repaired(ask: Asker, database: Database) -> None:
    """Whatever it raises: the client gets the answer. What it had read is not read again."""
    viewer = await two_models(database)
    healthy = await ask(DOCUMENT, viewer)
    operation = ask.documents.get(DOCUMENT).operation(None)
    values = operation.coerce({})
    assert values is not None
    plan = operation.plan(schema, values)
    assert isinstance(plan, Plan)

    async def after_reading(run: Run) -> Row:
        await plan.function(run)
        raise KeyError("a mistake")

    async def at_once(run: Run) -> Row:
        raise KeyError("a mistake")

    for function in (after_reading, at_once):
        [way] = operation._ways.values()
        operation.plans.put(way, replace(plan, function=function), 0)
        answer = await ask(DOCUMENT, viewer)
        assert (answer.data, answer.problems) == (healthy.data, [])
        assert answer.fallback == UNEXPECTED
        if function is after_reading:
            assert sorted(answer.commands) == sorted([*healthy.commands, ANEW])
    expected = await ask.by_core(DOCUMENT, viewer)
    assert sorted(answer.commands) == sorted(expected.commands)


async def test_the_error_of_a_computed_field_is_that_of_graphql_core(
    ask: Asker, database: Database
) -> None:
    viewer = await two_models(database)
    await database.data["models"].update_one({"name_lower": "b"}, {"$set": {"grants": None}})
    document = """{ a: model(owner: "acme", name: "a") { viewerCan } b: model(owner: "acme", name: "b") { viewerCan } }"""
    answer = await both(ask, document, viewer)
    assert told(answer) == [(["b", "viewerCan"], INTERNAL)]
    assert answer.data == {"a": {"viewerCan": ["READ", "DOWNLOAD"]}, "b": None}
    assert answer.commands == ["find models", "find models"]


# ---- the deadline


TIMED_OUT: Final = [
    {"message": "The operation took longer than 10 s.", "extensions": {"code": "TIMEOUT"}}
]


async def only(tasks: set[asyncio.Task[Any]]) -> None:
    """Waits until no other tasks are there."""
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - tasks:
            await asyncio.sleep(0)


def held(
    monkeypatch: pytest.MonkeyPatch, release: asyncio.Event
) -> tuple[asyncio.Event, list[str]]:
    """Actors are read when `release` says so. Whether that has begun, and how each read ended."""
    begun, ended = asyncio.Event(), []
    read = ActorByIdLoader.batch_load

    async def batch_load(self: ActorByIdLoader, keys: list[ObjectId]) -> Any:
        begun.set()
        try:
            await release.wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        ended.append("read")
        return await read(self, keys)

    monkeypatch.setattr(ActorByIdLoader, "batch_load", batch_load)
    return begun, ended


async def test_at_the_deadline_reads_are_cancelled(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = await two_models(database)
    healthy = await ask(DOCUMENT, viewer)
    before = asyncio.all_tasks()
    with monkeypatch.context() as patch:
        _, ended = held(patch, asyncio.Event())
        answer = await replace(ask, seconds=0.1)(DOCUMENT, viewer)
    assert (answer.data, answer.problems, answer.fallback) == (None, TIMED_OUT, None)
    await only(before)
    assert ended == ["cancelled"]  # the owners of both models
    again = await ask(DOCUMENT, viewer)
    assert (again.data, again.problems, again.fallback) == (healthy.data, [], None)


async def test_at_the_deadline_graphql_core_gives_the_same(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches of a DataLoader are nobody's in particular: they end by `maxTimeMS`."""
    viewer = await two_models(database)
    healthy = await ask.by_core(DOCUMENT, viewer)
    before, release = asyncio.all_tasks(), asyncio.Event()
    with monkeypatch.context() as patch:
        held(patch, release)
        answer = await replace(ask.by_core, seconds=0.1)(DOCUMENT, viewer)
        assert (answer.data, answer.problems) == (None, TIMED_OUT)
        release.set()
        await only(before)
    again = await ask.by_core(DOCUMENT, viewer)
    assert (again.data, again.problems) == (healthy.data, [])


async def test_the_deadline_of_one_is_not_that_of_who_reads_together_with_it(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = await two_models(database)
    ask = replace(ask, lanes=Lanes())
    healthy = await ask(DOCUMENT, viewer)
    before, release = asyncio.all_tasks(), asyncio.Event()
    held(monkeypatch, release)
    hasty = [asyncio.create_task(replace(ask, seconds=0.1)(DOCUMENT, viewer)) for _ in range(3)]
    patient = [asyncio.create_task(ask(DOCUMENT, viewer)) for _ in range(3)]
    for answer in await asyncio.gather(*hasty):
        assert (answer.data, answer.problems) == (None, TIMED_OUT)
    release.set()
    for answer in await asyncio.gather(*patient):
        assert (answer.data, answer.problems, answer.fallback) == (healthy.data, [], None)
    await only(before)
    assert ask.lanes is not None
    assert (ask.lanes._lanes, ask.lanes._tasks) == ({}, set())


async def test_the_deadline_holds_while_graphql_core_repairs(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = await two_models(database)
    document = "{ models { nodes { name owner { login } latestVersion { createdBy { displayName } status } } } }"
    await database.data["versions"].update_many({}, {"$set": {"status": "LOST"}})
    before, release = asyncio.all_tasks(), asyncio.Event()
    batches = []
    read = ActorByIdLoader.batch_load

    async def batch_load(self: ActorByIdLoader, keys: list[ObjectId]) -> Any:
        batches.append(keys)
        if len(batches) > 2:  # the two of the plan are over
            await release.wait()
        return await read(self, keys)

    monkeypatch.setattr(ActorByIdLoader, "batch_load", batch_load)
    answer = await replace(ask, seconds=0.3)(document, viewer)
    assert (answer.data, answer.problems) == (None, TIMED_OUT)
    assert len(batches) > 2
    release.set()
    await only(before)


async def test_a_client_that_leaves_cancels_its_reads(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = await two_models(database)
    before = asyncio.all_tasks()
    begun, ended = held(monkeypatch, asyncio.Event())
    asking = asyncio.create_task(ask(DOCUMENT, viewer))
    await begun.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await only(before)
    assert ended == ["cancelled"]  # the owners of both models


async def test_what_is_cancelled_beside_a_failure_is_not_cancelled_elsewhere(
    ask: Asker, database: Database
) -> None:
    """graphql-core cancels what stands beside a failure: here the maker of `b`, whom `a` waits for too."""
    viewer = await two_models(database)
    document = """{ a: model(owner: "acme", name: "a") { owner { login } latestVersion { createdBy { login } } }
      b: model(owner: "acme", name: "b") { owner { login } latestVersion { createdBy { login } } } }"""
    healthy = await ask(document, viewer)
    await database.data["models"].update_one({"name_lower": "b"}, {"$set": {"owner_id": GONE}})
    answer = await both(ask, document, viewer)
    assert answer.data == {**healthy.data, "b": None}
    assert told(answer) == [(["b", "owner"], INTERNAL)]


def test_the_check_of_a_row_is_the_one_that_plans_write_down() -> None:
    """They do not call it."""
    assert is_row_of(int, {"__typename": "int"}, None)
    assert is_row_of(int, {}, None)
    assert not is_row_of(int, {"__typename": "str"}, None)
