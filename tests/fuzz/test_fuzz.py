"""The two engines give the same answers: to random operations, and to those of the corpus."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graphql import GraphQLObjectType, GraphQLScalarType

from modelharbor.dev.engines import Engines
from modelharbor.schema import core

from .campaign import Tally, campaign, smallest
from .compare import (
    Case,
    Compared,
    Outcome,
    World,
    compared,
    compared_together,
    differences,
    open_world,
    shapes,
)
from .data import HASHES

# Of graphql-core, where a non-null failure ends what is beside it: see `silent`.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
CASES = 3300
SEED = "house"
CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))

PLANNED = {
    "alias": 500, "named fragment": 300, "nested named fragments": 100, "fragment spread again": 20,
    "interface": 300, "union": 100, "fragment on an interface": 100, "fragment on a union": 50,
    "fragment on an object type": 500, "inline fragment without a type": 50,
    "one alias for different fields": 10, "merged keys": 100, "__typename": 200,
    "skip by variable": 50, "include by variable": 100, "skip by value": 50, "include by value": 100,
    "directive on a field": 100, "directive on a spread": 20, "directive on a inline": 50,
    "variable": 300, "variable with a default": 200, "variable inside a value": 30,
    "nested connection": 200, "nested connection with arguments": 200, "lists in lists": 50,
    "several operations": 50, "forbidden object": 100, "missing relation": 200, "empty answer": 5,
    "reads shared with other operations": 20,
}  # fmt: skip
"""How often each shape occurs at least in cases that ran as a plan: a third of what was counted."""
REPLAYED = {
    "null propagation": 80, "key failure": 20, "batch failure": 10, "damaged value": 20,
    "refused argument": 80, "error in lists in lists": 5,
}  # fmt: skip
"""The same in cases that began as a plan, until something was not as the schema promises."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def world(
    engines: Engines, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    opened = open_world(engines.mongo_url, engines.redis_url, tmp_path_factory.mktemp("fuzz"))
    yield runner.run(opened.__aenter__())
    runner.run(opened.__aexit__(None, None, None))


def told(tally: Tally) -> str:
    return "\n\n".join(f"{each.case}\n{each.found}" for each in tally.found)


def test_answers_are_the_same(world: World, runner: asyncio.Runner) -> None:
    before = runner.run(world.state())
    tally = runner.run(campaign(world, CASES, SEED, most_found=3))
    assert tally.found == [], told(tally)
    assert runner.run(world.state()) == before
    assert tally.cases >= CASES
    assert sum(tally.invalid.values()) <= tally.documents // 50, tally.invalid
    assert tally.clean_by_plan >= 0.9 * tally.clean, tally.clean_fallbacks
    assert tally.clean >= 0.6 * tally.cases
    assert tally.shapes["refused variables"] >= 30
    assert tally.shapes["mutation"] >= 20
    rare = {shape: tally.planned_shapes[shape] for shape in PLANNED}
    assert {shape: count for shape, count in rare.items() if count < PLANNED[shape]} == {}
    rare = {shape: tally.replayed_shapes[shape] for shape in REPLAYED}
    assert {shape: count for shape, count in rare.items() if count < REPLAYED[shape]} == {}
    unread = readable() - set(tally.fields)
    assert unread == set(), " ".join(sorted(unread))


def readable() -> set[str]:
    """Every field that a query can reach, but those that a resolver of its own answers, and what is
    told of the operation itself and of the process, and of the last 24 hours."""
    apart = {"Mutation", "SystemHealth", "DependencyHealth", "UserError", "RateLimit", "CacheStats"}
    apart |= {"Subscription", "JobEvent", "UploadEvent", "ModelEvent", "QueryResultChange"}
    apart |= {"AnalyticsEvent", "OperationStats", "OperationStatsConnection", "OperationStatsEdge"}
    return {
        f"{kind.name}.{name}"
        for kind in core.type_map.values()
        if isinstance(kind, GraphQLObjectType)
        and not kind.name.startswith("__")
        and not kind.name.endswith("Payload")
        and kind.name not in apart
        for name in kind.fields
    } - {"Query.health", "Query.rateLimit", "Query.cacheStats", "Query.operationStats"}


@pytest.mark.parametrize("path", CORPUS, ids=[path.stem for path in CORPUS])
def test_the_corpus_is_answered_the_same(world: World, runner: asyncio.Runner, path: Path) -> None:
    case = Case.from_json(path.read_bytes())
    done = runner.run(compared(world, case))
    assert done.found == {} or done.is_by_order
    live = runner.run(compared(world, case, is_live=True))
    assert live.found == {} or live.is_by_order


EVERYTHING = """
query Everything($ids: [ID!]!, $id: ID!, $sha256: SHA256!) {
  viewer { login tokens { totalCount nodes { name scopes } } organizations { totalCount nodes { login } } }
  models(first: 100) { totalCount estimatedCount
    facets(fields: [VISIBILITY, OWNER, TAG]) { field buckets { value count } }
    nodes { name viewerCan viewerHasLiked card { html }
      owner { login
        ... on User { tokens { totalCount } organizations { totalCount nodes { login } } }
        ... on Organization { members { totalCount nodes { role user { login } } } } }
      aliases { name version { number } model { name } setBy { login } }
      latestVersion { number model { name } }
      byAlias: version(alias: "prod") { number }
      versions { totalCount nodes { number aliases { name } createdBy { login } model { viewerCan }
        file(path: "config.json") { path }
        jobs { totalCount nodes { state } }
        files { totalCount nodes { path downloadUrl
          scan { verdict findings { rule } } tensors { parameterCount } header sharedWith version { number } } } } } } }
  holding: models(filter: {fileSha256: $sha256}) { totalCount nodes { name } }
  nodes(ids: $ids) { id __typename
    ... on Model { name viewerHasLiked } ... on ModelVersion { number model { name } }
    ... on ModelFile { path downloadUrl } ... on Membership { role } ... on ApiToken { name }
    ... on Job { state progress { percent } parent { state } }
    ... on Upload { percent url version { number } file { path } } }
  uploads { totalCount nodes { path percent url headers version { number uploads { totalCount nodes { path } } }
    file { path } job { state } createdBy { login } } }
  jobs { totalCount nodes { kind subject { id } createdBy { login } queuePosition
    children { totalCount nodes { state } } logs { totalCount nodes { message } } } }
  node(id: $id) { id ... on Model { name } }
  model(owner: "eve", name: "tiny-6") { name visibility }
  resolve(ref: "eve/tiny-6:1") { number model { name } }
  blob(sha256: $sha256) { totalCount nodes { path sharedWith version { model { name } } } }
  search(query: "whale") { totalCount nodes { ... on Model { name } ... on Actor { login } } }
  suggest(prefix: "t")
}
"""


def test_reads_that_people_share_tell_each_only_what_is_theirs(
    world: World, runner: asyncio.Runner
) -> None:
    """Everything that is read, for all viewers at once."""
    ids = [each for kind in world.values.ids.values() for each in kind[:10]]
    assert len(ids) <= 100
    private = world.values.ids["Model"][6]
    merged = 0
    for number, sha256 in enumerate(HASHES[:4]):
        # Those who wait get what the first of them reads: each is the first once.
        viewers = list(world.viewers["healthy"])
        viewers = viewers[number:] + viewers[:number]
        cases = [
            Case(
                EVERYTHING,
                None,
                {"ids": ids, "id": private, "sha256": sha256},
                viewer,
                "healthy",
            )
            for viewer in viewers * 2
        ]
        done = runner.run(compared_together(world, cases))
        assert [each.found for each in done] == [{}] * len(cases)
        assert {each.plan.fallback for each in done} == {None}
        assert len({differs(each) for each in done}) >= 5
        merged += sum("reads shared with other operations" in shapes(each) for each in done)
    assert merged == 4 * 14


def differs(done: Compared) -> str:
    assert done.plan.answer is not None
    return repr(done.plan.answer.data)


def test_a_broken_engine_is_found_and_the_case_made_small(
    world: World, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scalar is written in another way, on one side."""
    break_core(monkeypatch, lambda value: f"{value}0" if value == 7 else str(value))
    tally = runner.run(campaign(world, 2000, "broken", most_found=1))
    found = tally.found[0]
    assert list(found.found) == ["data"]
    small = " ".join(found.case.document.split())
    assert "downloadsAllTime" in small or "downloads30d" in small
    assert len(small) < 120, small
    assert found.case.operation_name is None
    assert len(small) <= len(found.original.document)
    assert found.case.failures is None
    [[path, mine, theirs], *_] = found.found["data"]
    assert path[0] in small
    assert (mine, theirs) == ("70", "7")
    assert Case.from_json(found.case.to_json()) == found.case


def test_a_failure_on_one_side_is_a_difference(
    world: World, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No order of reads explains it: the errors of both are compared."""

    def refuse(value: Any) -> str:
        if value == 7:
            raise ValueError("seven")
        return str(value)

    break_core(monkeypatch, refuse)
    document = (
        "{ models(orderBy: {field: NAME}) { nodes { name stats { likes downloadsAllTime } } } }"
    )
    case = Case(document, None, {}, "anonymous", "healthy")
    done = runner.run(compared(world, case))
    assert not done.is_by_order
    assert list(done.found) == ["data", "errors"]
    found = runner.run(smallest(world, done))
    small = " ".join(found.case.document.split())
    assert small == "{ models { nodes { stats { downloadsAllTime } } } }"


def break_core(monkeypatch: pytest.MonkeyPatch, serialize: Any) -> None:
    whole = World.outcome
    scalar = core.type_map["BigInt"]
    assert isinstance(scalar, GraphQLScalarType)
    kept = scalar.coerce_output_value

    async def outcome(self: World, engine: str, *arguments: Any, **named: Any) -> Outcome:
        if engine == "core":
            scalar.coerce_output_value = serialize
        try:
            return await whole(self, engine, *arguments, **named)
        finally:
            scalar.coerce_output_value = kept

    monkeypatch.setattr(World, "outcome", outcome)


def test_nothing_differs_from_itself(world: World, runner: asyncio.Runner) -> None:
    document = "{ models { nodes { name latestVersion { files { nodes { path } } } } } }"
    case = Case(document, None, {}, "owner", "damaged", 12345)
    one = runner.run(world.outcome("core", case))
    assert one.answer is not None
    assert one.answer.errors
    assert differences(one, runner.run(world.outcome("core", case))) == {}
