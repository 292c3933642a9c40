"""What an installation needs, looked at one by one, and what to do where something is missing."""

import re
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.version import Version
from pymongo.errors import ConfigurationError, ConnectionFailure, PyMongoError
from redis.exceptions import RedisError

import modelharbor
from modelharbor.cache.client import connect_cache
from modelharbor.db.base import BaseDocument
from modelharbor.db.connection import Database, connect
from modelharbor.db.documents import DOCUMENTS
from modelharbor.db.migrations import pending
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage

OLDEST_MONGODB: Final = Version("6.0")
OLDEST_REDIS: Final = Version("6.2")
SHORTEST_KEY: Final = 32  # characters
MOST_SKEW: Final = timedelta(seconds=2)  # leases and expiry are compared with either clock
OPTIONS: Final = ("unique", "sparse", "expireAfterSeconds", "partialFilterExpression", "weights")


class Status(Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """`remedy` is what to do; None where all is well."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None


async def examine(settings: Settings, pages: Path) -> list[Finding]:
    """Asks everything that the server needs; `pages` is where the build of GraphiQL lies.

    Changes nothing but a small object in the storage, which it removes again.
    """
    return [
        python(),
        packages(),
        *await mongodb(settings),
        await redis(settings),
        await storage(settings),
        secret_key(settings),
        graphiql(settings, pages),
    ]


# What is installed ------------------------------------------------------------------------------


def python() -> Finding:
    return Finding("python", Status.OK, ".".join(map(str, sys.version_info[:3])))


def packages(declared: Sequence[str] | None = None) -> Finding:
    """Are the packages here that this version asks for?"""
    declared = requires("modelharbor") or () if declared is None else declared
    wrong = [found for text in declared if (found := _wrong(Requirement(text)))]
    if wrong:
        return Finding("packages", Status.FAIL, ", ".join(wrong), "Install modelharbor again.")
    return Finding("packages", Status.OK, f"modelharbor {modelharbor.__version__}")


def _wrong(wanted: Requirement) -> str | None:
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return None
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted} is missing"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} is {found}, not {wanted.specifier}"


# MongoDB ----------------------------------------------------------------------------------------


async def mongodb(settings: Settings) -> list[Finding]:
    """`mongodb`, `transactions`, `clock`, `migrations`, `indexes`; only the first where nobody answers."""
    async with AsyncExitStack() as stack:
        try:
            database = await stack.enter_async_context(connect(settings))
        except (ConfigurationError, ValueError) as error:
            remedy = "Correct MODELHARBOR_MONGO_URL."
            return [Finding("mongodb", Status.FAIL, str(error), remedy)]
        try:
            return await _mongodb(database)
        except ConnectionFailure as error:
            detail = f"does not answer: {_short(error)}"
            remedy = "Start it, or say where it is with MODELHARBOR_MONGO_URL."
        except PyMongoError as error:
            detail = f"refuses: {_short(error)}"
            remedy = "Give the user of MODELHARBOR_MONGO_URL the role readWrite on the database."
        return [Finding("mongodb", Status.FAIL, detail, remedy)]


async def _mongodb(database: Database) -> list[Finding]:
    asked = time.time()
    hello = await database.client.admin.command("hello", codec_options=database.data.codec_options)
    answered = time.time()
    return [
        await _mongodb_version(database),
        _transactions(hello),
        _clock(hello["localTime"], asked, answered),
        await _migrations(database),
        await _indexes(database),
    ]


def _short(error: Exception) -> str:
    return re.split(r" \(configured|, full error|, Timeout", str(error), maxsplit=1)[0]


async def _mongodb_version(database: Database) -> Finding:
    found = str((await database.client.admin.command("buildInfo"))["version"])
    if Version(found.partition("-")[0]) < OLDEST_MONGODB:
        remedy = f"Run MongoDB {OLDEST_MONGODB} or newer."
        return Finding("mongodb", Status.FAIL, f"version {found} is too old", remedy)
    return Finding("mongodb", Status.OK, f"version {found}, database {database.data.name}")


def _transactions(hello: dict[str, Any]) -> Finding:
    if "setName" in hello:
        return Finding("transactions", Status.OK, f"replica set {hello['setName']}")
    if hello.get("msg") == "isdbgrid":
        return Finding("transactions", Status.OK, "sharded cluster")
    return Finding(
        "transactions",
        Status.FAIL,
        "MongoDB runs alone",
        "Run it as a replica set, one member is enough: `mongod --replSet rs0`, then rs.initiate().",
    )


def _clock(there: datetime, asked: float, answered: float) -> Finding:
    """Between the question and the answer its clock must have shown what it says."""
    early = datetime.fromtimestamp(asked, UTC) - there
    late = there - datetime.fromtimestamp(answered, UTC)
    skew = max(early, late, timedelta(0))
    if skew > MOST_SKEW:
        return Finding(
            "clock",
            Status.WARN,
            f"{skew.total_seconds():.0f} s from MongoDB's",
            "Set the clocks of both machines by NTP.",
        )
    return Finding("clock", Status.OK, "as MongoDB's")


async def _migrations(database: Database) -> Finding:
    waiting = await pending(database)
    if waiting:
        return Finding(
            "migrations",
            Status.FAIL,
            f"pending: {', '.join(waiting)}",
            "Run `modelharbor migrate`.",
        )
    return Finding("migrations", Status.OK, "none is pending")


async def _indexes(database: Database) -> Finding:
    missing: list[str] = []
    others: list[str] = []
    extra: list[str] = []
    count = 0
    there = set(await database.data.list_collection_names())
    for document in DOCUMENTS:
        name = document.get_collection_name()
        wanted = _declared(document)
        found = (
            {
                index["name"]: _shape(index)
                async for index in await database.data[name].list_indexes()
                if index["name"] != "_id_"
            }
            if name in there
            else {}
        )
        count += len(wanted)
        missing += [f"{name}.{index}" for index in wanted if index not in found]
        others += [
            f"{name}.{index}"
            for index in wanted
            if found.get(index, wanted[index]) != wanted[index]
        ]
        extra += [f"{name}.{index}" for index in found if index not in wanted]
    if others:
        return Finding(
            "indexes",
            Status.FAIL,
            f"not as declared: {', '.join(others)}",
            "Drop them, then run `modelharbor migrate --indexes`.",
        )
    if missing:
        return Finding(
            "indexes",
            Status.FAIL,
            f"missing: {', '.join(missing)}",
            "Run `modelharbor migrate --indexes`.",
        )
    if extra:
        return Finding(
            "indexes",
            Status.WARN,
            f"not ours: {', '.join(extra)}",
            "Drop them if nobody needs them: each makes every write slower.",
        )
    return Finding("indexes", Status.OK, f"all {count} are there")


def _declared(document: type[BaseDocument]) -> dict[str, dict[str, Any]]:
    return {
        index.index.document["name"]: _shape(index.index.document)
        for index in document.get_settings().indexes or ()
    }


def _shape(index: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two indexes the same. Of a text index the fields stand in its weights alone."""
    text = {name: 1 for name, kind in index["key"].items() if kind == "text" and name != "_fts"}
    options = {name: index[name] for name in OPTIONS if index.get(name)}
    if text:
        options["weights"] = text | dict(options.get("weights", {}))
    key = [
        (name, kind)
        for name, kind in index["key"].items()
        if kind != "text" and name not in ("_fts", "_ftsx")
    ]
    return {"key": key, **options}


# The rest ---------------------------------------------------------------------------------------


async def redis(settings: Settings) -> Finding:
    """Without it everything goes on, only slower: never worse than a warning."""
    remedy = "Start it, or say where it is with MODELHARBOR_REDIS_URL."
    try:
        async with connect_cache(settings) as cache:
            found = str((await cache.redis.info("server"))["redis_version"])
    except (RedisError, OSError, TimeoutError, ValueError) as error:
        detail = f"does not answer, so nothing is cached: {error}"
        return Finding("redis", Status.WARN, detail, remedy)
    if Version(found) < OLDEST_REDIS:
        remedy = f"Run Redis {OLDEST_REDIS} or newer."
        return Finding("redis", Status.WARN, f"version {found} is too old", remedy)
    return Finding("redis", Status.OK, f"version {found}")


async def storage(settings: Settings) -> Finding:
    place = settings.storage_url or str(settings.data_path.absolute() / "blobs")
    try:
        async with open_storage(settings) as store:
            await store.check()
    except Exception as error:  # each kind of store has its own
        remedy = "Make it writable, or choose another with MODELHARBOR_STORAGE_URL or MODELHARBOR_DATA_PATH."
        return Finding("storage", Status.FAIL, f"{place}: {error}", remedy)
    return Finding("storage", Status.OK, f"{place} is writable")


def secret_key(settings: Settings) -> Finding:
    """One for all machines: links that one has signed, any other must accept."""
    name = "secret key"
    if settings.secret_key is not None:
        length = len(settings.secret_key.get_secret_value())
        if length < SHORTEST_KEY:
            remedy = f"Set MODELHARBOR_SECRET_KEY to {SHORTEST_KEY} random characters or more."
            return Finding(name, Status.FAIL, f"has only {length} characters", remedy)
        return Finding(name, Status.OK, "is set")
    path = settings.data_path.absolute() / "secret.key"
    if settings.storage_url is not None and not settings.storage_url.startswith("file:"):
        return Finding(
            name,
            Status.WARN,
            "is made by each machine for itself, and the storage is one for several",
            "Give all machines the same MODELHARBOR_SECRET_KEY.",
        )
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return Finding(name, Status.OK, f"will be made in {path}")
    except OSError as error:
        return Finding(name, Status.FAIL, str(error), "Make the data folder readable.")
    if mode & 0o077:
        return Finding(name, Status.WARN, f"others may read {path}", f"Run `chmod 600 {path}`.")
    return Finding(name, Status.OK, f"is kept in {path}, for this machine alone")


def graphiql(settings: Settings, pages: Path) -> Finding:
    if not settings.graphiql:
        return Finding("graphiql", Status.OK, "is switched off")
    page = pages / "index.html"
    if not page.is_file():
        missing = [page.name]
    else:
        named = re.findall(r'"[^"]*/(assets/[^"/]+)"', page.read_text(encoding="utf-8"))
        missing = [name for name in named if not (pages / name).is_file()]
    if missing:
        return Finding(
            "graphiql",
            Status.WARN,
            f"is not built: {', '.join(missing)} missing in {pages}",
            "Run `make run` in the source tree, install the wheel, or set MODELHARBOR_GRAPHIQL=false.",
        )
    return Finding("graphiql", Status.OK, "is built")
