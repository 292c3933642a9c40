"""What answers say they were made of: whatever changes one of them is told by one of its tags."""

import logging
import re
import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

import orjson
import pytest

from modelharbor.auth.viewer import Viewer
from modelharbor.cache.entries import Access
from modelharbor.db.base import Row
from modelharbor.db.cache import FOLLOWED
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.errors import HarborError
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.plan import Plan
from modelharbor.execution.reading import Read, Run
from modelharbor.loaders.base import Loader
from modelharbor.loaders.pages import OfTotalsLoader, PageLoader
from modelharbor.loaders.rights import Rights, narrowed
from modelharbor.loaders.rows import RowByIdLoader
from modelharbor.schema import core, schema
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version
from tests.execution.test_plan import OPERATIONS
from tests.fuzz import documents
from tests.fuzz.compare import LIMITS, Forgetful
from tests.fuzz.data import Collections, healthy, viewers
from tests.fuzz.documents import Writer, draw_variables
from tests.fuzz.values import Values

from .heard import Told, hearing
from .writes import Writes

pytestmark = pytest.mark.anyio

ROUNDS: Final = 2
WRITES: Final = 40  # of a round, which begins with the whole data
GENERATED: Final = 50
SEED: Final = "tags"

NEVER: Final = frozenset(
    {"viewerCan", "viewerHasLiked", "downloadUrl", "sharedWith", "jobs", "uploads", "tokens", "storage"}
)  # fmt: skip
ROOTS: Final = (
    ("models", 4.0),
    ("model", 3.0),
    ("search", 1.5),
    ("resolve", 2.0),
    ("compareVersions", 1.5),
)


class KeptWriter(Writer):
    """Writes only what may be kept."""

    def chosen(self, parent: Any, depth: int) -> str:
        while (name := super().chosen(parent, depth)) in NEVER:
            pass
        return name


def data_of(answer: Any) -> bytes | None:
    """None: it is not without errors."""
    return orjson.dumps(answer.data) if answer.read is not None else None


@dataclass
class Kept:
    """An answer as a cache would keep it."""

    document: str
    variables: dict[str, Any]
    who: str
    body: bytes | None = None
    read: Read | None = None

    def __str__(self) -> str:
        return f"{self.who}: {self.document} {self.variables}"


@dataclass
class Tally:
    """How often tags were bumped, by whether the answer is another one."""

    changed: int = 0
    same: int = 0
    needless: Counter[str] = field(default_factory=Counter)
    writes: int = 0

    def lines(self) -> str:
        needless = sum(self.needless.values())
        return (
            f"{self.writes} writes: {self.changed} answers changed, each told; of {self.same} that did"
            f" not {needless} ({100 * needless / max(1, self.same):.1f} %) were told, too"
        )


async def fill(database: Database, rows: Collections) -> None:
    for name, found in deepcopy(rows).items():
        await database.data[name].delete_many({})
        if found:
            await database.data[name].insert_many(found)


def by_plan(ask: Asker, document: str, variables: dict[str, Any]) -> Plan | None:
    """The plan of what may be kept."""
    try:
        operation = ask.documents.get(document).operation(None)
        values = operation.coerce(variables)
    except (InvalidDocument, HarborError):
        return None
    plan = operation.plan(schema, values) if values is not None else ""
    return plan if isinstance(plan, Plan) and plan.policy.max_age > 0 else None


def generated(
    ask: Asker, rows: Collections, count: int, seed: str, people: list[str]
) -> list[Kept]:
    values, made, number = Values(rows), list[Kept](), 0
    while len(made) < count:
        number += 1
        random = Random(f"{seed}/{number}")
        written = KeptWriter(core, values, random, "owner").write()
        operation = written.operations[0]
        if written.is_mutation or len(written.operations) > 1:
            continue
        given = draw_variables(operation, values, random, False)
        if by_plan(ask, written.text, given) is not None:
            made.append(Kept(written.text, given, random.choice(people)))
    return made


SELECTED: Final = """
  id fullName summary task tags visibility state revision properties parameters updatedAt
  owner { login displayName } aliases { name version { number } setBy { login } }
  latestVersion { number files(first: 2) { totalCount nodes { path sizeBytes scan { verdict findings { rule } } } } }
  stats { downloads30d likes }
"""
DOCUMENTED: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    (f'{{ model(owner: "acme", name: "whale-0") {{ {SELECTED} card {{ html }} }} }}', {}),
    (f'{{ model(owner: "ADA", name: "tiny-1") {{ {SELECTED} }} }}', {}),
    ('{ model(owner: "ada", name: "made-7") { name } a: model(owner: "acme", name: "new-3") { name } }', {}),
    (f"{{ models(first: 3) {{ nodes {{ {SELECTED} }} pageInfo {{ endCursor hasNextPage }} }} }}", {}),
    ("{ models(last: 2, orderBy: {field: NAME}) { edges { cursor node { name } } pageInfo { hasPreviousPage } } }", {}),
    ('{ models(filter: {task: {eq: "image"}}, orderBy: {field: DOWNLOADS_30D}) { totalCount nodes { name stats { downloads30d } } } }', {}),
    ('{ models(filter: {task: {eq: "text-generation"}, license: {in: ["mit", "apache-2.0"]}}) { totalCount nodes { name license } } }', {}),
    ('{ models(filter: {owner: {eq: "acme"}}, orderBy: {field: UPDATED_AT}) { totalCount nodes { name } } }', {}),
    ('{ models(filter: {or: [{tags: {hasAny: ["nlp"]}}, {not: {library: {eq: "transformers"}}}]}) { totalCount nodes { name } } }', {}),
    ('{ models(filter: {hasAlias: "prod"}) { totalCount nodes { name } } }', {}),
    ('{ models(filter: {property: [{key: "size", gt: 3}]}) { totalCount nodes { name } } }', {}),
    ("{ models(filter: {state: [ARCHIVED]}, orderBy: {field: CREATED_AT, direction: ASC}) { nodes { name createdAt } } }", {}),
    ("{ models(filter: {visibility: [PUBLIC], sizeBytes: {gte: \"1000\"}}) { totalCount estimatedCount facets(fields: [TASK, TAG, OWNER, FORMAT, PARAMETER_RANGE, VISIBILITY, LANGUAGE]) { field buckets { value count } } } }", {}),
    ('{ models(search: "whale") { totalCount edges { score highlights { field fragment } node { name summary } } } }', {}),
    ('{ models(search: "whale", orderBy: {field: LIKES}, filter: {license: {eq: "mit"}}) { totalCount nodes { name } } }', {}),
    ('{ search(query: "whale", first: 4) { totalCount pageInfo { hasNextPage } edges { score node { __typename ... on Model { name summary } ... on Actor { login displayName } } } } }', {}),
    ('{ search(query: "ada", types: [USER]) { totalCount nodes { ... on User { login organizations { totalCount nodes { login } } } } } }', {}),
    ('{ search(query: "acme", types: [ORGANIZATION]) { nodes { ... on Organization { login members { totalCount nodes { role user { login } } } } } } }', {}),
    ('{ resolve(ref: "acme/whale-0") { number label model { name } } b: resolve(ref: "acme/blue-2@prod") { number } c: resolve(ref: "acme/large-4:2") { number status } d: resolve(ref: "acme/none") { number } }', {}),
    ('{ resolve(ref: "acme/large-4") { number aliases { name } files(pathPrefix: "weights/", first: 1) { totalCount nodes { path sha256 version { number } tensors { parameterCount } header } pageInfo { hasNextPage } } file(path: "config.json") { sizeBytes } createdBy { login } } }', {}),
    ("{ models(filter: {owner: {in: [\"acme\", \"borg\"]}}) { nodes { name versions(first: 2, filter: {status: [READY]}) { totalCount nodes { number status } pageInfo { hasNextPage } } all: versions { totalCount } byNumber: version(number: 2) { label } byAlias: version(alias: \"prod\") { number } latest: version(alias: \"latest\") { number } } } }", {}),
    ('{ models(filter: {owner: {in: ["acme", "borg"]}}) { nodes { aliases(asOf: "2026-01-03T00:00:00Z") { name setAt version { number status } } latest: version(asOf: "2026-01-03T00:00:00Z") { number } prod: version(alias: "prod", asOf: "2099-01-01T00:00:00Z") { number } second: version(number: 2, asOf: "2099-01-01T00:00:00Z") { label } } } }', {}),
    ('{ resolve(ref: "acme/whale-0", asOf: "2099-01-01T00:00:00Z") { number label } b: resolve(ref: "acme/blue-2@prod", asOf: "2099-01-01T00:00:00Z") { number } c: resolve(ref: "acme/large-4:2", asOf: "2026-01-01T00:00:00Z") { number } }', {}),
)  # fmt: skip
"""What clients ask for, each loader in some of them."""


GIVEN: Final[dict[str, Any]] = {
    "filter": {"task": {"eq": "image"}, "license": {"in": ["mit"]}},
    "owner": "acme",
    "name": "whale-0",
    "words": "whale",
}


def shown(ask: Asker) -> list[tuple[str, dict[str, Any]]]:
    """What the project shows or measures, as far as it may be kept."""
    found: list[tuple[str, dict[str, Any]]] = []
    for text in OPERATIONS.values():
        given = {name: value for name, value in GIVEN.items() if f"${name}:" in text}
        if by_plan(ask, text, given) is not None:
            found.append((text, given))
    assert len(found) >= 8
    return found


async def ask_again(ask: Asker, people: dict[str, Viewer], kept: Kept) -> tuple[bytes | None, Any]:
    answer = await ask(kept.document, people[kept.who], **kept.variables)
    return data_of(answer), answer.read


async def prove(
    ask: Asker, database: Database, cases: list[Kept], writes: int, rounds: int, seed: str
) -> Tally:
    rows = healthy()
    people, tally = viewers(rows), Tally()
    ask = replace(ask.changed(**LIMITS), position=1, cache=Forgetful(ask.cache.redis))
    for turn in range(rounds):
        await fill(database, rows)
        made = Writes(Random(f"{seed}/{turn}"), database, ask, people)
        made.know(rows)
        for kept in cases:
            kept.body, kept.read = await ask_again(ask, people, kept)
        async with hearing(database) as heard:
            for _ in range(writes):
                done = await made.one()
                told = await heard.since()
                tally.writes += 1
                for kept in cases:
                    body, read = await ask_again(ask, people, kept)
                    is_told = kept.read is not None and not kept.read.tags.isdisjoint(told)
                    if kept.read is None:
                        kept.body, kept.read = body, read
                        continue
                    if body != kept.body:
                        tally.changed += 1
                        assert is_told, f"not told: {done}\n{kept}\n{kept.body!r}\n{body!r}\n{sorted(told)}\n{sorted(kept.read.tags)}"  # fmt: skip
                    else:
                        tally.same += 1
                        if is_told:
                            tally.needless[done.split(" ")[0]] += 1
                    if is_told:  # else it is what it was, with what it was made of then
                        kept.body, kept.read = body, read
    return tally


async def test_whatever_changes_an_answer_is_told_by_one_of_its_tags(
    ask: Asker,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "modelharbor.execution.failures")  # of rows that are gone
    monkeypatch.setattr(documents, "ROOTS", ROOTS)
    people = list(viewers(healthy()))
    cases = [
        Kept(document, variables, who)
        for document, variables in (*DOCUMENTED, *shown(ask))
        for who in ("anonymous", "owner")
    ]
    cases += generated(ask, healthy(), GENERATED, SEED, people)
    tally = await prove(ask, database, cases, WRITES, ROUNDS, SEED)
    assert tally.changed > 200
    assert tally.needless.total() < 0.2 * tally.same, tally.lines()


async def test_who_would_share_an_answer_would_get_the_same(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "ROOTS", ROOTS)
    rows = healthy()
    await fill(database, rows)
    people = viewers(rows)
    ask = replace(ask.changed(**LIMITS), position=1, cache=Forgetful(ask.cache.redis))
    cases = [Kept(document, variables, "") for document, variables in (*DOCUMENTED, *shown(ask))]
    cases += generated(ask, rows, GENERATED, "access", [""])
    rights = Rights(database, Told())
    of = {name: await rights.of(viewer) for name, viewer in people.items()}
    assert of["anonymous"] == of["scopeless"] == "public"
    assert len(set(of.values())) >= 4
    seen: Counter[Access] = Counter()
    for kept in cases:
        found = {}
        for name, viewer in people.items():
            whole = await ask(kept.document, viewer, **kept.variables)
            answer = await ask(kept.document, narrowed(viewer, of[name]), **kept.variables)
            assert data_of(answer) == data_of(whole), (str(kept), name)
            if answer.read is not None:
                assert whole.read is not None
                assert whole.read.access == answer.read.access
                found[name] = data_of(answer), answer.read.access
        for name, (body, access) in found.items():
            seen[access] += 1
            for other, (others, _) in found.items():
                shared = access is Access.ANYBODY or (
                    access is Access.RIGHTS and of[name] == of[other]
                )
                assert not shared or body == others, (str(kept), name, other)
    assert min(seen[access] for access in Access) >= 10


KINDS: Final = {
    "documents": r"^\w+/",
    "parents": r"\?",
    "names of any document": r"\.\w+$",
    "names within a value": r"\.[\w.]+@",
    "new documents": r"\+@",
    "places in an order": r"~",
    "documents that are gone": r"-$",
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_tag_that_is_left_out_is_missed(
    ask: Asker,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """No kind of tag is there for nothing, and the writes are of all kinds."""
    caplog.set_level(logging.CRITICAL, "modelharbor.execution.failures")
    left_out, whole = re.compile(KINDS[kind]), Run.what_was_read

    def without(self: Run, position: int) -> Read | None:
        read = whole(self, position)
        if read is None:
            return None
        return replace(read, tags=frozenset(t for t in read.tags if not left_out.search(t)))

    monkeypatch.setattr(Run, "what_was_read", without)
    cases = [Kept(document, variables, "owner") for document, variables in DOCUMENTED]
    with pytest.raises(AssertionError, match=r"^not told"):
        await prove(ask, database, cases, 150, 2, f"{SEED}/{kind}")


PUBLIC_PAGE: Final = (
    "{ models(first: 2, orderBy: {field: NAME, direction: ASC}) { nodes { name } } }"
)
OF_TASK: Final = '{ models(filter: {task: {eq: "image"}}) { totalCount nodes { name } } }'


async def test_what_does_not_concern_a_list_is_not_told_by_its_tags(
    ask: Asker, database: Database
) -> None:
    ada = await insert_actor("ada")
    shown, _, far = [await insert_model(ada, name, task="text") for name in "abc"]
    hidden = await insert_model(ada, "hidden", visibility=Visibility.PRIVATE, task="text")
    imaged = await insert_model(ada, "z", task="image")
    ask = replace(ask, position=1)
    page, of_task = await ask(PUBLIC_PAGE), await ask(OF_TASK)
    one = await ask('{ model(owner: "ada", name: "a") { summary owner { login } } }')
    none = await ask('{ model(owner: "ada", name: "none") { name } }')
    data = database.data["models"]

    async def told() -> list[bool]:
        tags = await heard.since()
        reads = [each.read for each in (page, of_task, one, none)]
        return [read is not None and not read.tags.isdisjoint(tags) for read in reads]

    async with hearing(database) as heard:
        await data.update_one({"_id": far.id}, {"$set": {"summary": "new"}})
        assert await told() == [False, False, False, False]
        await data.update_one({"_id": shown.id}, {"$set": {"summary": "new"}})
        assert await told() == [True, False, True, False]
        await data.update_one({"_id": far.id}, {"$inc": {"stats.likes": 1}})
        assert await told() == [False, False, False, False]
        await data.update_one({"_id": hidden.id}, {"$set": {"name": "y", "name_lower": "y"}})
        assert await told() == [False, False, False, True]
        await insert_model(ada, "hidden-too", visibility=Visibility.PRIVATE)
        assert await told() == [False, False, False, True]
        await data.update_one({"_id": far.id}, {"$set": {"name": "d", "name_lower": "d"}})
        assert await told() == [True, False, False, True]
        await insert_model(ada, "new", task="text")
        assert await told() == [True, False, False, True]
        await data.update_one({"_id": hidden.id}, {"$set": {"task": "image"}})
        assert await told() == [False, False, False, False]
        await data.update_one({"_id": imaged.id}, {"$inc": {"stats.trending_score": 1}})
        assert await told() == [False, True, False, False]
        await data.update_one({"_id": far.id}, {"$set": {"task": "image"}})
        assert await told() == [False, True, False, False]
        other = await insert_actor("bob")
        await insert_model(other, "none")
        assert await told() == [True, False, False, False]


async def test_pages_hear_of_what_comes_to_stand_in_them_alone(
    ask: Asker, database: Database
) -> None:
    ada = await insert_actor("ada")
    models = [
        await insert_model(ada, f"m{place}", stats={"trending_score": 60.0 - place})
        for place in range(9)
    ]
    ask = replace(ask, position=1)
    text = "query($after: Cursor) { models(first: 2, after: $after) { nodes { name } pageInfo { endCursor } } }"
    pages, after = [], None
    for _ in range(3):
        pages.append(await ask(text, after=after))
        after = pages[-1].data["models"]["pageInfo"]["endCursor"]
    pages.append(await ask("{ models(first: 1) { totalCount } }"))
    data = database.data["models"]

    async def told() -> list[bool]:
        tags = await heard.since()
        reads = [page.read for page in pages]
        return [read is not None and not read.tags.isdisjoint(tags) for read in reads]

    def score(place: int, value: object) -> tuple[Row, Row]:
        return {"_id": models[place].id}, {"$set": {"stats.trending_score": value}}

    async with hearing(database) as heard:
        await data.update_one(*score(8, 52.5))
        assert await told() == [False, False, False, False]
        await data.update_one(*score(8, 57.5))
        assert await told() == [False, True, False, False]
        await data.update_one(*score(8, 99.0))
        assert await told() == [True, False, False, True]
        await data.update_one(*score(4, 1.0))  # the first of one page is behind the one before
        assert await told() == [False, True, True, False]
        await data.update_one(*score(8, None))
        assert await told() == [True, True, True, True]
        await data.update_one({"_id": models[7].id}, {"$set": {"stats": {"trending_score": 55.5}}})
        assert await told() == [False, False, True, False]
        await insert_model(ada, "new", stats={"trending_score": 59.5})
        assert await told() == [True, False, False, True]
        await data.update_one({"_id": models[7].id}, {"$set": {"state": "ARCHIVED"}})
        assert await told() == [True, True, True, True]


async def test_what_cannot_be_told_is_not_kept(ask: Asker, database: Database) -> None:
    ada = await insert_actor("ada")
    await insert_version(database, await insert_model(ada, "a"), {"x": 7})
    ask = replace(ask, position=1)
    holding = f'{{ models(filter: {{fileSha256: "{7:064x}"}}) {{ totalCount nodes {{ name }} }} }}'
    answer = await ask(holding)
    assert answer.data["models"]["totalCount"] == 1
    assert answer.read is None
    assert (await ask("{ models { nodes { name viewerCan } } }")).read is None
    assert (await ask("{ models { nodes { name } } }")).read is not None
    assert (await replace(ask, position=None)("{ models { nodes { name } } }")).read is None
    assert (await ask.by_core("{ models { nodes { name } } }")).read is None


async def test_the_age_of_counts_that_were_kept_elsewhere_is_told(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await insert_model(await insert_actor("ada"), "a", task="text")
    ask = replace(ask, position=1)
    counted = "{ models { estimatedCount facets(fields: [TASK]) { buckets { count } } } }"
    first = await ask(counted)
    assert first.read is not None
    assert first.read.age < 5
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 15)
    again = await ask(counted)
    assert again.data == first.data
    assert again.read is not None
    assert 15 <= again.read.age < 20
    exact = await ask("{ models { totalCount } }")
    assert exact.read is not None
    assert exact.read.age == 0.0


async def test_a_place_in_time_is_that_of_before_the_first_read(
    ask: Asker, database: Database
) -> None:
    await insert_model(await insert_actor("ada"), "a")
    answer = await replace(ask, position=7)("{ models { nodes { name } } }")
    assert answer.read is not None
    assert answer.read.position == 7
    assert answer.read.access is Access.RIGHTS


def test_only_what_was_thought_about_tells_what_it_read() -> None:
    """Each of these has its part in the operations above."""

    def below(kind: type[Any]) -> set[type[Any]]:
        kinds: list[type[Any]] = kind.__subclasses__()
        return {kind}.union(*[below(each) for each in kinds])

    ours = {each for each in below(Loader) if each.__module__.startswith("modelharbor.")}
    bases = {Loader, RowByIdLoader, PageLoader, OfTotalsLoader}
    telling = {
        each
        for each in ours - bases
        if "tags" in vars(each) or issubclass(each, OfTotalsLoader) or vars(each).get("is_told")
    }
    told = {each.__name__ for each in telling}
    assert told == {
        "ActorByIdLoader",
        "AliasesByModelLoader",
        "AliasesByVersionLoader",
        "CardByModelLoader",
        "ChangeCountLoader",
        "ComparedBytesLoader",
        "ComparisonLoader",
        "EstimateLoader",
        "FacetsLoader",
        "FileByIdLoader",
        "FileByPathLoader",
        "FileChangesLoader",
        "FilesByVersionLoader",
        "MembersByOrganizationLoader",
        "ModelByIdLoader",
        "ModelByNameLoader",
        "ModelPageLoader",
        "OrganizationsByUserLoader",
        "ScanByContentsLoader",
        "SearchLoader",
        "SharedBytesLoader",
        "TensorComparisonLoader",
        "TotalLoader",
        "VersionByIdLoader",
        "VersionByModelLoader",
        "VersionByReferenceLoader",
        "VersionsByModelLoader",
        "_BytesLoader",
        "_InspectedLoader",
    }
    read = {getattr(each, "collection", "models") for each in telling}
    assert read <= set(FOLLOWED)
