"""REINDEX: what models keep of their versions, files and owners is derived anew.

Every change of a version or its files writes to its model in the same transaction. So whoever reads a
model and all below it, and then writes to it, in one transaction, either sees a change whole or collides
with it. Most models are right: a batch is first compared as one snapshot saw it, without writing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isclose
from typing import Any, Final

from bson import Int64, ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from modelharbor.auth.viewer import model_principals
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.history import moment
from modelharbor.db.jobs import Level
from modelharbor.db.models import ModelState, trending_score
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Refused
from modelharbor.resolvers.access import full_name
from modelharbor.resolvers.settling import PUBLISHED
from modelharbor.resolvers.telling import tell_of_model
from modelharbor.worker.tools import Tools

from .checkpoints import Checkpoint

MODELS_AT_ONCE: Final = 100  # compared with one snapshot
VERSIONS_AT_ONCE: Final = 1000  # whose files one command reads
MODEL_SECONDS: Final = 55.0  # for the largest ones; MongoDB ends a transaction after 60
NAMES: Final = ("name_lower", "owner_login", "owner_login_lower")
READ: Final = dict.fromkeys(
    (
        *("owner_id", "owner_login", "owner_login_lower", "owner_kind", "name", "name_lower"),
        *("formats", "visibility", "state", "principals", "grants", "latest_version_id"),
        *("parameters", "aliases", "stats", "created_at", "updated_at"),
    ),
    1,
)


async def reindex_models(job: Row, tools: Tools) -> Row:
    """Input: {model_id}, None for all. Result: {models, changed}, over all attempts."""
    model_id = job["input"]["model_id"]
    database = tools.database
    done = Checkpoint(tools, {"after": None, "models": 0, "changed": 0})
    only: Row = {} if model_id is None else {"_id": model_id}
    total = await database.count("models", only)
    if model_id is not None and not total:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such model.", "modelId")
    while True:
        tools.report(done.values["models"], max(total, done.values["models"]), unit="models")
        last = done.values["after"]
        after: Row = only if last is None else {"$and": [only, {"_id": {"$gt": last}}]}
        ids, wrong = await _compare(database, after)
        if not ids:
            return {name: done.values[name] for name in ("models", "changed")}
        for each in wrong:
            await _mend(tools, done, each)

        async def passed(session: AsyncClientSession, ids: Sequence[ObjectId] = ids) -> Row:
            return {"after": ids[-1], "models": done.values["models"] + len(ids)}

        await done.advance(passed)


async def _compare(database: Database, query: Row) -> tuple[list[ObjectId], list[ObjectId]]:
    """The next models, and those of them that are not as they should be or have something to be told."""
    async with database.client.start_session(snapshot=True) as session:
        models = await _models(database, session, query, MODELS_AT_ONCE)
        found = await derive(database, session, models)
    wrong = [
        model["_id"]
        for model in models
        if found[model["_id"]].dangling or differences(model, found[model["_id"]].fields)
    ]
    return [model["_id"] for model in models], wrong


async def _mend(tools: Tools, done: Checkpoint, model_id: ObjectId) -> None:
    """Look again, and write what differs, in one transaction."""
    told: list[tuple[str, Level]] = []

    async def mend(session: AsyncClientSession, *, names: bool) -> Row:
        told.clear()
        models = await _models(tools.database, session, {"_id": model_id}, 1)
        if not models:
            return {}  # removed meanwhile
        [model] = models
        found = (await derive(tools.database, session, models))[model_id]
        told.extend(
            (f"{full_name(model)}: the alias {alias} points at no version.", Level.WARNING)
            for alias in found.dangling
        )
        fields = {
            name: value
            for name, value in differences(model, found.fields).items()
            if names or name not in NAMES
        }
        if not fields:
            return {}
        told.append((f"{full_name(model)}: {', '.join(sorted(fields))}", Level.INFO))
        if any(name in COUNTERS for name in fields):
            fields["stats.as_of"] = utc_now()
        is_moved = "latest_version_id" in fields
        if is_moved:
            fields["updated_at"] = moment(model)
        await tools.database.data["models"].update_one(
            {"_id": model_id}, {"$set": fields}, session=session
        )
        if is_moved:
            await _tell(session, model, fields)
        return {"changed": done.values["changed"] + 1}

    try:
        await done.advance(partial(mend, names=True), MODEL_SECONDS)
    except DuplicateKeyError:
        tools.log(
            f"Another model has the name of {model_id} by now: its names stay as they are.",
            Level.WARNING,
        )
        await done.advance(partial(mend, names=False), MODEL_SECONDS)
    for message, level in told:
        tools.log(message, level)


async def _tell(session: AsyncClientSession, model: Row, fields: Row) -> None:
    """The latest version is another one by now: who asks for an earlier time is to get the old one,
    and who asks for now the new one."""
    name = "latest_version_id"
    await tell_of_model(
        session,
        EventKind.MODEL_UPDATED,
        {**model, **fields},
        by=None,
        before={name: model.get(name)},
        after={name: fields[name]},
        is_moved=True,
    )


async def _models(
    database: Database, session: AsyncClientSession, query: Row, most: int
) -> list[Row]:
    return (
        await database.data["models"]
        .find(query, READ, session=session)
        .sort("_id", 1)
        .limit(most)
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )


# What should be ---------------------------------------------------------------------------------


COUNTERS: Final = ("stats.versions", "stats.files", "stats.size_bytes", "stats.stored_bytes")


@dataclass(slots=True)
class Derived:
    """`fields`: stored names with the values that they should have."""

    fields: Row
    dangling: list[str]
    """Aliases that point at a version that is not there."""


@dataclass(slots=True)
class _Found:
    """What the versions and files of a model come to."""

    versions: set[ObjectId] = field(default_factory=set)
    latest: tuple[int, ObjectId | None] = (0, None)
    parameters: int | None = None  # of the latest
    files: int = 0
    size_bytes: int = 0
    published: dict[str, int] = field(default_factory=dict)  # contents, with their length


async def derive(
    database: Database, session: AsyncClientSession, models: Sequence[Row]
) -> dict[ObjectId, Derived]:
    """By the id of each model, from all that is stored below it, as the session sees it."""
    found = {model["_id"]: _Found() for model in models}
    await _read_versions(database, session, found)
    latest = [each.latest[1] for each in found.values() if each.latest[1] is not None]
    formats = await _formats(database, session, latest)
    owners = await _owners(database, session, {model["owner_id"] for model in models})
    return {model["_id"]: _derived(model, found[model["_id"]], formats, owners) for model in models}


async def _read_versions(
    database: Database, session: AsyncClientSession, found: dict[ObjectId, _Found]
) -> None:
    cursor = database.data["versions"].find(
        {"model_id": {"$in": list(found)}, "status": {"$ne": VersionStatus.DELETED.value}},
        {"model_id": 1, "number": 1, "status": 1, "parameters": 1},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    waiting: dict[bool, list[ObjectId]] = {True: [], False: []}
    async for version in cursor:
        of_model = found[version["model_id"]]
        of_model.versions.add(version["_id"])
        is_ready = version["status"] == VersionStatus.READY.value
        if is_ready and version["number"] > of_model.latest[0]:
            of_model.latest = (version["number"], version["_id"])
            of_model.parameters = version.get("parameters")
        waiting[version["status"] in PUBLISHED].append(version["_id"])
    for is_published, ids in waiting.items():
        for start in range(0, len(ids), VERSIONS_AT_ONCE):
            batch = ids[start : start + VERSIONS_AT_ONCE]
            await _read_files(database, session, found, batch, is_published)


async def _read_files(
    database: Database,
    session: AsyncClientSession,
    found: dict[ObjectId, _Found],
    version_ids: list[ObjectId],
    is_published: bool,
) -> None:
    contents = await database.data["files"].aggregate(
        [
            {"$match": {"version_id": {"$in": version_ids}}},
            {
                "$group": {
                    "_id": {"model": "$model_id", "sha256": "$sha256"},
                    "files": {"$sum": 1},
                    "size_bytes": {"$max": "$size_bytes"},
                    "all_bytes": {"$sum": "$size_bytes"},
                }
            },
        ],
        session=session,
        maxTimeMS=database.query_timeout_ms,
        allowDiskUse=True,
    )
    async for row in contents:
        of_model = found[row["_id"]["model"]]
        of_model.files += row["files"]
        of_model.size_bytes += row["all_bytes"]
        if is_published:
            of_model.published[row["_id"]["sha256"]] = row["size_bytes"]


async def _formats(
    database: Database, session: AsyncClientSession, version_ids: Sequence[ObjectId]
) -> dict[ObjectId, list[str]]:
    cursor = await database.data["files"].aggregate(
        [
            {"$match": {"version_id": {"$in": list(version_ids)}}},
            {"$group": {"_id": "$version_id", "formats": {"$addToSet": "$format"}}},
        ],
        session=session,
        maxTimeMS=database.query_timeout_ms,
    )
    return {row["_id"]: sorted(row["formats"]) async for row in cursor}


async def _owners(
    database: Database, session: AsyncClientSession, ids: set[ObjectId]
) -> dict[ObjectId, Row]:
    cursor = database.data["actors"].find(
        {"_id": {"$in": list(ids)}},
        {"login": 1, "login_lower": 1, "kind": 1},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    return {row["_id"]: row async for row in cursor}


def _derived(
    model: Row, found: _Found, formats: dict[ObjectId, list[str]], owners: dict[ObjectId, Row]
) -> Derived:
    latest = found.latest[1]
    is_deleted = model["state"] == ModelState.DELETED.value
    fields: dict[str, Any] = {
        "stats.versions": len(found.versions),
        "stats.files": found.files,
        "stats.size_bytes": found.size_bytes,
        "stats.stored_bytes": sum(found.published.values()),
        "stats.trending_score": trending_score(
            model["stats"]["downloads_30d"], model["stats"]["likes"], model["created_at"]
        ),
        "latest_version_id": latest,
        "formats": [] if latest is None else formats.get(latest, []),
        "parameters": found.parameters or 0,
        "principals": model_principals(model),
        "name_lower": model["name"].lower() + (f"#{model['_id']}" if is_deleted else ""),
    }
    owner = owners.get(model["owner_id"])
    if owner is not None:
        fields["owner_login"] = owner["login"]
        fields["owner_login_lower"] = owner["login_lower"]
        fields["owner_kind"] = owner["kind"]
    dangling = [
        alias["name"] for alias in model["aliases"] if alias["version_id"] not in found.versions
    ]
    return Derived(fields, dangling)


def differences(model: Row, fields: Row) -> Row:
    """Those fields that the model has with another value, or not at all."""
    return {name: value for name, value in fields.items() if not _same(_at(model, name), value)}


def _at(row: Row, name: str) -> Any:
    first, _, rest = name.partition(".")
    value = row.get(first)
    return value.get(rest) if rest and isinstance(value, dict) else value


def _same(old: Any, new: Any) -> bool:
    if isinstance(new, float) and isinstance(old, float):
        return isclose(old, new, rel_tol=1e-9)  # MongoDB's logarithm may differ in the last digit
    if isinstance(old, Int64):  # how PyMongo reads a number from 2^31 on
        old = int(old)
    return type(old) is type(new) and bool(old == new)
