"""One case on both engines, and what differs between their answers."""

import asyncio
import gc
import logging
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final
from uuid import uuid4

import orjson

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache, connect_cache
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import migrate
from modelharbor.db.tokens import Permission
from modelharbor.execution.documents import Document, DocumentStore
from modelharbor.execution.execute import Answer, run
from modelharbor.loaders.lanes import Lanes
from modelharbor.schema import core, schema
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, open_storage

from .data import Collections, damaged, healthy, viewers
from .failing import Failures, FuzzContext, Kept, Seen, intercepted
from .spots import Spot
from .values import Values

MOST_SHOWN: Final = 5  # places in a report
ORDERS: Final = 100  # of reads, in which graphql-core may give the plan's answer
LONGEST_SHOWN: Final = 200  # bytes of a value in a report
COLLECT: Final = 400  # runs between two collections of garbage: see `silent`
SECONDS: Final = 60.0  # for one operation; none should need them
LIMITS: Final[dict[str, Any]] = {
    "max_query_bytes": 1_000_000,
    "max_tokens": 50_000,
    "max_depth": 60,
    "max_aliases": 5000,
    "max_root_fields": 500,
    "max_directives": 5000,
    "max_cost": 10**9,
    "max_errors": 10_000,
    "document_cache_size": 200,
}


@dataclass(frozen=True)
class Case:
    """All that an answer depends on."""

    document: str
    operation_name: str | None
    variables: dict[str, Any]
    viewer: str
    data: str
    failures: int | None = None
    spot: str | None = None
    """Damage in one place: see spots.py."""
    seed: str = ""

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)

    @staticmethod
    def from_json(text: bytes) -> "Case":
        found = orjson.loads(text)
        return Case(**{name: found[name] for name in Case.__dataclass_fields__ if name in found})


@dataclass(frozen=True)
class Outcome:
    """What one engine made of a case."""

    answer: Answer | None
    raised: str | None
    seen: Seen

    @property
    def fallback(self) -> str | None:
        return self.answer.fallback if self.answer else "raised"


class FixedLinks(DownloadLinks):
    """Links without the time in them."""

    def link(
        self, file_id: Any, path: str, expires_in: int, *, held: Permission | None = None
    ) -> str:
        return f"{self.base_url}/{file_id}/{path}?{expires_in}&{held}"


class Forgetful(Cache):
    """A cache that never has anything: an answer does not hang on what was asked before."""

    async def get(self, key: str, most: int = 0) -> bytes | None:
        return None

    async def put(self, key: str, value: bytes, seconds: int) -> None:
        return


@dataclass
class World:
    """The data sets in their databases, and the two engines."""

    databases: dict[str, Database]
    rows: dict[str, Collections]
    viewers: dict[str, dict[str, Viewer]]
    cache: Cache
    storage: BlobStore
    settings: dict[str, Settings]
    documents: DocumentStore
    values: Values
    kept: dict[str, Kept]
    exists: frozenset[Any]
    runs: int = 0

    def document(self, text: str) -> Document:
        """InvalidDocument and the like for one that cannot run."""
        return self.documents.get(text)

    async def outcome(
        self,
        engine: str,
        case: Case,
        is_live: bool = False,
        order: int | None = None,
        lanes: Lanes | None = None,
    ) -> Outcome:
        """`is_live`: everything is read from the database; else what was read before is kept.

        `order`: reads end late, some more than others, as this seed says.
        `lanes`: with other cases that run at the same time.
        """
        self.runs += 1
        if self.runs % COLLECT == 0:
            gc.collect()
        document = self.document(case.document)
        operation = document.operation(case.operation_name)
        seen = Seen()
        context = FuzzContext(
            database=self.databases[case.data],
            cache=self.cache,
            viewer=self.viewers[case.data][case.viewer],
            links=FixedLinks(b"k" * 32, "http://test"),
            settings=self.settings[engine],
            storage=self.storage,
            request_id="fuzz",
            lanes=lanes,
            failures=None if case.failures is None else Failures(case.failures),
            kept=None if is_live else self.kept[case.data],
            scope=case.viewer,
            spot=None if case.spot is None else Spot.of(case.spot),
            delays=None if order is None else Random(order),
            seen=seen,
            exists=self.exists,
        )
        deadline = asyncio.get_running_loop().time() + SECONDS
        try:
            answer = await run(schema, document, operation, case.variables, context, deadline)
        except (Exception, asyncio.CancelledError) as error:
            return Outcome(None, f"{type(error).__name__}: {error}", seen)
        return Outcome(answer, None, seen)

    async def state(self) -> dict[str, str]:
        """A hash of everything that is stored, by data set."""
        found = {}
        for name, database in self.databases.items():
            answer = await database.data.command("dbHash")
            found[name] = str(answer["md5"])
        return found


ENGINES: Final = ("core", "plan")


QUIET: Final = ("modelharbor.execution.failures", "asyncio")


@contextmanager
def silent() -> Iterator[None]:
    """Failures are on purpose here: nobody wants to read their tracebacks.

    Where a non-null failure ends its siblings, graphql-core drops coroutines that nobody awaits.
    These are collected between cases, where the warning can be ignored.
    """
    logs = [logging.getLogger(name) for name in QUIET]
    for log in logs:
        log.disabled = True
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
            gc.collect()
    finally:
        gc.enable()
        for log in logs:
            log.disabled = False


@asynccontextmanager
async def open_world(mongo_url: str, redis_url: str, data_path: Path) -> AsyncIterator[World]:
    """Makes two databases, and drops them."""
    base = f"fuzz_{uuid4().hex[:12]}"
    settings = Settings(
        mongo_url=mongo_url, redis_url=redis_url, data_path=data_path, environment="test", **LIMITS
    )
    rows = {"damaged": damaged(), "healthy": healthy()}
    named = {
        name: settings.model_copy(update={"mongo_database": f"{base}_{name}"}) for name in rows
    }
    with intercepted(), silent():
        # The healthy one last: Beanie's documents belong to the database that was opened last, and
        # mutations run on that one only.
        async with (
            connect(named["damaged"]) as broken,
            connect(named["healthy"]) as whole,
            connect_cache(settings) as cache,
            open_storage(settings) as storage,
        ):
            databases = {"damaged": broken, "healthy": whole}
            for name, database in databases.items():
                await migrate(database)
                for collection, found in rows[name].items():
                    await database.data[collection].insert_many(found)
            try:
                yield World(
                    databases,
                    rows,
                    {name: viewers(found) for name, found in rows.items()},
                    Forgetful(cache.redis),
                    storage,
                    {
                        "core": settings.model_copy(update={"compiled_plans": False}),
                        "plan": settings.model_copy(update={"compiled_plans": True}),
                    },
                    DocumentStore(core, settings),
                    Values(rows["healthy"]),
                    {name: Kept() for name in rows},
                    frozenset(row["_id"] for found in rows["healthy"].values() for row in found),
                )
            finally:
                for database in databases.values():
                    await database.client.drop_database(database.data.name)


Difference = dict[str, Any]


def differences(one: Outcome, other: Outcome) -> Difference:
    """By kind (`data`, `errors`, `is_refused`, `locations`, `raised`), what each of them has."""
    found: Difference = {}
    if one.raised != other.raised:
        found["raised"] = [one.raised, other.raised]
    if one.answer is None or other.answer is None:
        return found
    mine, theirs = one.answer, other.answer
    if _packed(mine.data) != _packed(theirs.data):
        found["data"] = list(islice(_apart(mine.data, theirs.data, []), MOST_SHOWN))
    if mine.is_refused != theirs.is_refused:
        found["is_refused"] = [mine.is_refused, theirs.is_refused]
    my_errors, their_errors = _errors(mine), _errors(theirs)
    if my_errors != their_errors:
        found["errors"] = [
            sorted((my_errors - their_errors).elements()),
            sorted((their_errors - my_errors).elements()),
        ]
    elif (located := _located(mine)) != (others := _located(theirs)):
        found["locations"] = [
            sorted((located - others).elements()),
            sorted((others - located).elements()),
        ]
    return found


def _packed(value: Any) -> bytes:
    """As it is sent. What JSON cannot say is said by Python."""
    return orjson.dumps(value, default=lambda each: f"{type(each).__name__} {each!r}")


def _apart(mine: Any, theirs: Any, path: list[Any]) -> Iterator[list[Any]]:
    """[path, mine, theirs] of each place where two answers differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict) and list(mine) == list(theirs):
        for name, value in mine.items():
            yield from _apart(value, theirs[name], [*path, name])
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (value, other) in enumerate(zip(mine, theirs, strict=True)):
            yield from _apart(value, other, [*path, index])
    elif _packed(mine) != _packed(theirs):
        yield [path, _short(mine), _short(theirs)]


def _short(value: Any) -> Any:
    packed = _packed(value)
    return value if len(packed) <= LONGEST_SHOWN else packed[:LONGEST_SHOWN].decode(errors="ignore")


def _errors(answer: Answer) -> Counter[str]:
    return Counter(
        _packed([error.get("path"), error["extensions"], error["message"]]).decode()
        for error in answer.errors
    )


def _located(answer: Answer) -> Counter[str]:
    return Counter(
        _packed([error.get("path"), error.get("locations")]).decode() for error in answer.errors
    )


@dataclass(frozen=True)
class Compared:
    """A case, the answers, and what differs."""

    case: Case
    core: Outcome
    plan: Outcome
    found: Difference
    is_by_order: bool = False
    """graphql-core gives the plan's very answer too, when its reads end in another order.

    Where two failures meet, it tells the one that comes first, and ends what is beside it: an error
    there is told or not, as it came before or after.
    """


async def compared(world: World, case: Case, is_live: bool = False) -> Compared:
    """The case on both engines; when they differ, by graphql-core again with its reads in other orders."""
    one, other = [await world.outcome(engine, case, is_live) for engine in ENGINES]
    return await _explained(world, Compared(case, one, other, differences(one, other)))


async def _explained(world: World, done: Compared) -> Compared:
    if done.found and can_be_by_order(done.core, done.plan):
        for order in range(ORDERS):
            again = await world.outcome("core", done.case, order=order)
            if not differences(again, done.plan):
                return replace(done, is_by_order=True)
    return done


async def compared_together(world: World, cases: Sequence[Case]) -> list[Compared]:
    """Cases of one data set: by graphql-core one after the other, by plans all at once, with shared reads."""
    merged: list[int] = []
    lanes = Lanes(merged=merged.append)
    ones = [await world.outcome("core", case) for case in cases]
    others = await asyncio.gather(
        *[world.outcome("plan", case, is_live=True, lanes=lanes) for case in cases]
    )
    done = []
    for case, one, other in zip(cases, ones, others, strict=True):
        if sum(merged):
            one.seen.shapes.add("reads shared with other operations")
        found = differences(one, other)
        done.append(await _explained(world, Compared(case, one, other, found)))
    return done


def can_be_by_order(one: Outcome, other: Outcome) -> bool:
    """Only of answers that both tell of failures."""
    return all(each.answer is not None and each.answer.errors for each in (one, other))


def report(case: Case, found: Difference) -> bytes:
    """A case of the corpus, with what differed when it was found."""
    shown = orjson.loads(_packed(found))
    return orjson.dumps({**asdict(case), "found": shown}, option=orjson.OPT_INDENT_2) + b"\n"


def shapes(compared: Compared) -> set[str]:
    """What occurred while the case ran, beside what its document says."""
    answer = compared.core.answer
    found = set(compared.core.seen.shapes)
    if compared.case.spot is not None:
        found.add("damage in one place")
    if answer is None:
        return found
    if answer.is_refused:
        found.add("refused variables")
    if answer.data == {}:
        found.add("empty answer")
    for error in answer.errors:
        path = error.get("path", [])
        if sum(type(part) is int for part in path) > 1:
            found.add("error in lists in lists")
        if _is_null_above(answer.data, path):
            found.add("null propagation")
        is_internal = error["extensions"]["code"] == "INTERNAL_SERVER_ERROR"
        if is_internal and compared.case.failures is None:
            found.add("damaged value")
        if error["extensions"]["code"] == "BAD_USER_INPUT" and path:
            found.add("refused argument")
    if answer.data is not None and _depth_of_lists(answer.data) > 1:
        found.add("lists in lists")
    return found


def _is_null_above(data: Any, path: list[Any]) -> bool:
    for part in path[:-1]:
        if data is None:
            return True
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return True
    return data is None


def _depth_of_lists(value: Any) -> int:
    if isinstance(value, dict):
        return max(map(_depth_of_lists, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth_of_lists, value), default=0)
    return 0
