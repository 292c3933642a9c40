"""A folder on this machine becomes a version: walked safely, hashed, stored, published."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.models import CardDocument, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import MUTABLE, VersionStatus
from modelharbor.errors import ErrorCode, Refused
from modelharbor.inspection.fence import Fence
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, ContentChanged

from .access import full_name, may, refuse_unless_active, refuse_without
from .aliases import set_alias
from .blobs import announce_blobs, are_here, record_blobs
from .cards import Card, card_fields, render_card
from .files import FileEntry, add_files
from .folders import Found, hashed, open_file, unreadable, walk
from .inspections import Troubled, inspect_blob, troubled_files, uninspected
from .models import changed, create_model_in, valid_model_fields
from .names import valid_alias, valid_card, valid_model_name
from .quotas import refuse_beyond
from .settling import files_digest
from .telling import tell_of_model
from .versions import create_version_in, publish_version_in, valid_version_fields

FILES_AT_ONCE: Final = 1000  # written in one transaction
PUTS_AT_ONCE: Final = 8
INSPECTIONS_AT_ONCE: Final = 4
MOST_TROUBLED: Final = 20  # files that a result names
FILLED: Final = frozenset(status.value for status in MUTABLE)
"""States in which a version is still being filled."""


class Phase(Enum):
    HASHING = "hashing"
    STORING = "storing"
    INSPECTING = "inspecting"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of a phase, of any but PUBLISHING; `path` is the file at hand."""

    phase: Phase
    done: int
    total: int
    path: str


@dataclass(frozen=True, slots=True)
class ImportResult:
    model_id: ObjectId
    version_id: ObjectId
    number: int
    digest: str
    status: VersionStatus
    status_reason: str | None  # why it is not READY
    is_new: bool  # False: these contents were a version of the model already
    files: int
    size_bytes: int
    stored_bytes: int  # length of the contents that the store did not have yet
    notes: tuple[str, ...]  # what was left out, and why: sentences for the person at the terminal
    troubled: tuple[Troubled, ...] = ()  # files that keep it from being READY, the first of them


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and for whom. All of it is valid."""

    viewer: Viewer
    owner: Row
    name: str
    aliases: tuple[str, ...]
    visibility: Visibility | None
    again: bool
    settings: Settings | None = None
    """Whose quota it is held to; None: none, as the operator at the command line."""


@dataclass(slots=True)
class Readme:
    """The card that the folder carries, as far as it can be used."""

    card: Card | None = None
    notes: list[str] = field(default_factory=list)


@asynccontextmanager
async def _through(phase: Phase) -> AsyncIterator[None]:
    yield


async def local_viewer(database: Database, owner: str) -> Viewer:
    """Who has the files of the server at hand acts as the owner itself. Refused: NOT_FOUND."""
    return Viewer(user=await _owner(database, owner), scopes=frozenset(Permission))


async def import_folder(
    database: Database,
    storage: BlobStore,
    fence: Fence,
    viewer: Viewer,
    folder: Path,
    owner: str,
    name: str,
    *,
    aliases: Sequence[str] = (),
    visibility: Visibility | None = None,
    again: bool = False,
    settings: Settings | None = None,
    max_card_bytes: int,
    report: Callable[[Progress], None],
    within: Path | None = None,
    phase: Callable[[Phase], AbstractAsyncContextManager[None]] = _through,
) -> ImportResult:
    """Register a folder as a new version of `owner/name`, which is made when it is missing: READY, or
    QUARANTINED where a file is not known to be harmless.

    A folder whose contents are a version already adds nothing, unless `again`; its aliases are set
    all the same. Contents are stored and inspected first and the version is filled as a DRAFT with
    right counters, so an import that broke off is taken up by the next one of the same folder.

    `settings`: whose quotas it is held to; None: to none, as the operator at the command line.

    Refused (`folder`, `owner`, `name`, `aliases`) before anything is written: also where the folder
    is not `within` that one, once links are followed. It goes through each `phase` that it needs. What
    `report` raises ends it.
    """
    target = Target(
        viewer=viewer,
        owner=await _owner(database, owner),
        name=valid_model_name(name, "name"),
        aliases=tuple(dict.fromkeys(valid_alias(alias, "aliases") for alias in aliases)),
        visibility=visibility,
        again=again,
        settings=settings,
    )
    await _refuse_early(database, target)
    async with phase(Phase.HASHING):
        found = await asyncio.to_thread(walk, folder, within)
        readme = await asyncio.to_thread(_readme, found, max_card_bytes)
        reading = partial(_told, report, Phase.HASHING)
        entries = [entry async for entry in hashed(found, reading)]
    digest = files_digest([(entry.path, entry.sha256) for entry in entries])

    model, version = await _known(database, target, digest)
    if version is not None and version["status"] not in FILLED:
        return await _recognised(database, target, version, readme.notes)
    if model is not None and visibility not in (None, Visibility(model["visibility"])):
        readme.notes.append(f"{full_name(model)} is {model['visibility']} and stays so.")

    held = partial(_hold_to_quota, database, target, sum(entry.size_bytes for entry in entries))
    await database.transaction(held)  # before gigabytes are stored for nothing
    async with phase(Phase.STORING):
        stored_bytes = await _store(database, storage, found, entries, report)
    waiting = await _waiting(database, entries)
    if waiting:
        async with phase(Phase.INSPECTING):
            await _inspect(
                database, storage, fence, waiting, partial(_told, report, Phase.INSPECTING)
            )
    async with phase(Phase.PUBLISHING):
        version = await _claim(database, target, digest, readme.card)
        for batch in _batches(entries, FILES_AT_ONCE):
            if version["status"] in FILLED:
                work = partial(_add, database, target, version["_id"], batch)
                version = await database.transaction(work)
        published = await database.transaction(
            partial(_publish, database, target, version["_id"], readme.card),
            seconds=60,  # with 100,000 files it takes a while, and nobody waits for a request
        )
    if published is None:  # another import of the same folder came first
        return await _recognised(database, target, version, readme.notes, stored_bytes)
    return await _result(database, published, readme.notes, stored_bytes, is_new=True)


def _told(
    report: Callable[[Progress], None], phase: Phase, done: int, total: int, path: str
) -> None:
    report(Progress(phase, done, total, path))


async def refuse_import(
    database: Database, session: AsyncClientSession | None, viewer: Viewer, owner: str, name: str
) -> tuple[Row, Row | None]:
    """What an import would refuse before it reads the folder; else the owner, and the model if there is one."""
    found = await _owner(database, owner, session)
    target = Target(viewer, found, valid_model_name(name, "name"), (), None, False)
    return found, await _refuse_early(database, target, session)


async def _result(
    database: Database,
    version: Row,
    notes: Sequence[str],
    stored_bytes: int = 0,
    *,
    is_new: bool,
) -> ImportResult:
    status = VersionStatus(version["status"])
    troubled: Sequence[Troubled] = ()
    if status in (VersionStatus.QUARANTINED, VersionStatus.FAILED):
        troubled = await troubled_files(database, version["_id"], MOST_TROUBLED)
    return ImportResult(
        model_id=version["model_id"],
        version_id=version["_id"],
        number=version["number"],
        digest=version["digest"] or "",
        status=status,
        status_reason=version.get("status_reason"),
        is_new=is_new,
        files=version["file_count"],
        size_bytes=version["size_bytes"],
        stored_bytes=stored_bytes,
        notes=tuple(notes),
        troubled=tuple(troubled),
    )


# The folder ---------------------------------------------------------------------------------------


def _readme(found: Sequence[Found], max_card_bytes: int) -> Readme:
    """The card of a folder. One that cannot be used does not keep its model out. Blocks."""
    readme = Readme()
    named = [file for file in found if file.path.lower() == "readme.md"]
    if not named:
        return readme
    descriptor = open_file(named[0])
    try:
        with open(descriptor, "rb") as source:
            text = source.read(max_card_bytes + 1).decode("utf-8-sig")
        markdown = valid_card(text, max_card_bytes, "cardMarkdown")
        if markdown is None:
            return readme
        try:
            readme.card = render_card(markdown, max_card_bytes)
        except Refused as refused:
            readme.card = render_card(markdown, max_card_bytes, front_matter=False)
            readme.notes.append(
                f"{named[0].path}: {refused.message} Its front matter was left out."
            )
    except UnicodeDecodeError:
        readme.notes.append(f"{named[0].path} is not UTF-8 text, or too long: it became no card.")
    except Refused as refused:
        readme.notes.append(f"{named[0].path}: {refused.message} It became no card.")
    except OSError as error:
        raise unreadable(named[0], error) from None
    return readme


# Contents ---------------------------------------------------------------------------------------


async def _store(
    database: Database,
    storage: BlobStore,
    found: Sequence[Found],
    entries: Sequence[FileEntry],
    report: Callable[[Progress], None],
) -> int:
    """Put what the store does not have; answers its length."""
    real = {file.path: file.real for file in found}
    first = {entry.sha256: entry for entry in reversed(entries)}
    blobs = await announce_blobs(database, storage, list(first.values()))
    # Whose contents are not known to be stored whole: documents say so after they are on disk.
    missing = [
        entry
        for entry in first.values()
        if not await are_here(database, storage, blobs[entry.sha256])
    ]
    total, done = sum(entry.size_bytes for entry in missing), 0
    waiting = iter(missing)

    async def put() -> None:
        # Several of these share one iterator: each takes the next file when it is done with one.
        for entry in waiting:
            advance = partial(_advanced, entry.path)
            try:
                await storage.put_file(real[entry.path], entry.sha256, advance)
            except ContentChanged:
                raise Refused(
                    ErrorCode.CONFLICT,
                    f"{entry.path} changed while it was read. Nothing was registered: import it again.",
                    "folder",
                ) from None

    def _advanced(path: str, count: int) -> None:
        nonlocal done
        done += count
        _told(report, Phase.STORING, done, total, path)

    await _together(put, waiting, PUTS_AT_ONCE)
    await record_blobs(database, [blobs[entry.sha256]["_id"] for entry in missing])
    return total


async def _waiting(database: Database, entries: Sequence[FileEntry]) -> list[FileEntry]:
    """One file for each of the contents that nobody has looked into yet."""
    first = {entry.sha256: entry for entry in reversed(entries)}
    waiting = await uninspected(database, list(first))
    return [entry for digest, entry in first.items() if digest in waiting]


async def _inspect(
    database: Database,
    storage: BlobStore,
    fence: Fence,
    entries: Sequence[FileEntry],
    report: Callable[[int, int, str], None],
) -> None:
    total, done = sum(entry.size_bytes for entry in entries), 0
    waiting = iter(entries)

    async def inspect() -> None:
        # Several of these share one iterator: each takes the next file when it is done with one.
        nonlocal done
        for entry in waiting:
            report(done, total, entry.path)
            await inspect_blob(database, storage, fence, entry.sha256)
            done += entry.size_bytes
            report(done, total, entry.path)

    await _together(inspect, waiting, INSPECTIONS_AT_ONCE)


async def _together(
    work: Callable[[], Coroutine[None, None, None]], waiting: Iterator[FileEntry], count: int
) -> None:
    """`work` so many times at once; once one of them fails, the others find nothing more waiting."""

    async def one() -> None:
        try:
            await work()
        except BaseException:
            for _ in waiting:
                pass
            raise

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None  # of several that fail at once, one tells enough


def _batches(entries: Sequence[FileEntry], size: int) -> Iterator[Sequence[FileEntry]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


# The model and its version ----------------------------------------------------------------------


async def _owner(database: Database, login: str, session: AsyncClientSession | None = None) -> Row:
    owner = await database.data["actors"].find_one(
        {"login_lower": login.lower()}, session=session, max_time_ms=database.query_timeout_ms
    )
    if owner is None:
        raise Refused(
            ErrorCode.NOT_FOUND, f"There is no person or organization {login!r}.", "owner"
        )
    return owner


async def _model(
    database: Database, target: Target, session: AsyncClientSession | None = None
) -> Row | None:
    return await database.data["models"].find_one(
        {
            "owner_id": target.owner["_id"],
            "name_lower": target.name.lower(),
            **target.viewer.visible,
        },
        session=session,
        max_time_ms=database.query_timeout_ms,
    )


async def _refuse_early(
    database: Database, target: Target, session: AsyncClientSession | None = None
) -> Row | None:
    """What the transactions would refuse: before gigabytes are read and stored. Answers the model."""
    model = await _model(database, target, session)
    needed = [Permission.WRITE, Permission.PUBLISH]
    if target.aliases:
        needed.append(Permission.PROMOTE)
    for permission in needed:
        if model is None:
            refuse_without(
                target.viewer,
                permission,
                lambda viewer: viewer.on_owner(target.owner["_id"]),
                f"what {target.owner['login']} owns",
                "owner",
            )
        else:
            may(target.viewer, permission, model, "name")
    if model is not None:
        refuse_unless_active(model, "name")
    return model


async def _known(
    database: Database, target: Target, digest: str, session: AsyncClientSession | None = None
) -> tuple[Row | None, Row | None]:
    """The model, and its version with these contents: a whole one, else a DRAFT that broke off."""
    model = await _model(database, target, session)
    if model is None or target.again:
        return model, None
    versions = (
        await database.data["versions"]
        .find(
            {
                "model_id": model["_id"],
                "digest": digest,
                "status": {"$nin": [VersionStatus.DELETED.value, VersionStatus.FAILED.value]},
            },
            session=session,
        )
        .sort("number", -1)
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    versions.sort(key=lambda version: version["status"] in FILLED)
    return model, next(iter(versions), None)


async def _recognised(
    database: Database,
    target: Target,
    version: Row,
    notes: Sequence[str],
    stored_bytes: int = 0,
) -> ImportResult:
    """Nothing to add. An alias that was asked for is set where it points elsewhere, unless the version
    is in quarantine, or not settled yet."""
    row = await database.data["versions"].find_one(
        {"_id": version["_id"]}, max_time_ms=database.query_timeout_ms
    )
    if row is None:
        raise Refused(ErrorCode.CONFLICT, "The version was removed meanwhile: import it again.")
    unsettled = (VersionStatus.QUARANTINED.value, VersionStatus.PROCESSING.value)
    for name in () if row["status"] in unsettled else target.aliases:
        await set_alias(
            database, target.viewer, model_id=row["model_id"], name=name, version_id=row["_id"]
        )
    return await _result(database, row, notes, stored_bytes, is_new=False)


async def _claim(database: Database, target: Target, digest: str, card: Card | None) -> Row:
    """The version to be filled: at most one DRAFT for these contents, however many import them at once."""

    async def work(session: AsyncClientSession) -> Row:
        model, version = await _known(database, target, digest, session)
        if version is not None:
            return version
        if model is None:
            model = await create_model_in(
                database,
                session,
                target.viewer,
                owner=target.owner["login"],
                fields=valid_model_fields(
                    name=target.name, **card_fields(card.metadata if card else {})
                ),
                card=card,
                visibility=target.visibility or Visibility.PRIVATE,
            )
        # All who come at once write to the model here: all but one start anew, and find the DRAFT.
        return await create_version_in(
            database,
            session,
            target.viewer,
            model_id=model["_id"],
            fields={**valid_version_fields(), "digest": digest},
        )

    try:
        return await database.transaction(work)
    except Refused as refused:
        if refused.code is not ErrorCode.ALREADY_EXISTS:
            raise
        return await database.transaction(work)  # another made the model meanwhile: now it is found


async def _hold_to_quota(
    database: Database, target: Target, size_bytes: int, session: AsyncClientSession
) -> None:
    if target.settings is not None:
        await refuse_beyond(database, session, target.settings, target.owner, size_bytes, "folder")


async def _add(
    database: Database,
    target: Target,
    version_id: ObjectId,
    entries: Sequence[FileEntry],
    session: AsyncClientSession,
) -> Row:
    """The version with these files, unless another import has published it."""
    version = await _version(database, version_id, session)
    if version["status"] not in FILLED:
        return version
    size_bytes = version["size_bytes"]
    version = await add_files(database, session, version, entries)
    if version["size_bytes"] > size_bytes:  # counted by now
        await _hold_to_quota(database, target, 0, session)
    return version


async def _version(database: Database, version_id: ObjectId, session: AsyncClientSession) -> Row:
    version = await database.data["versions"].find_one(
        {"_id": version_id, "status": {"$ne": VersionStatus.DELETED.value}},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    if version is None:
        raise Refused(ErrorCode.CONFLICT, "The version was removed meanwhile: import it again.")
    return version


async def _publish(
    database: Database,
    target: Target,
    version_id: ObjectId,
    card: Card | None,
    session: AsyncClientSession,
) -> Row | None:
    """Settled, with its aliases and what its card tells; None when another import did it."""
    version = await _version(database, version_id, session)
    if version["status"] not in FILLED:
        return None
    if card is not None:
        await _fill(database, target.viewer, version["model_id"], card, session)
    published = await publish_version_in(
        database,
        session,
        target.viewer,
        version_id=version_id,
        set_aliases=target.aliases,
        most_files=None,  # its contents are inspected already, and nobody waits for a request
    )
    return published.version


async def _fill(
    database: Database,
    viewer: Viewer,
    model_id: ObjectId,
    card: Card,
    session: AsyncClientSession,
) -> None:
    """The card, and what it tells, where the model has nothing there yet."""
    model = await database.data["models"].find_one(
        {"_id": model_id}, session=session, max_time_ms=database.query_timeout_ms
    )
    if model is None:
        raise Refused(ErrorCode.CONFLICT, "The model was removed meanwhile.")
    told = {name: value for name, value in card_fields(card.metadata).items() if value}
    after = {name: value for name, value in told.items() if not model[name]}
    has_card = await database.data["cards"].find_one(
        {"_id": model_id}, {"_id": 1}, session=session, max_time_ms=database.query_timeout_ms
    )
    if not has_card:
        await CardDocument(
            id=model["_id"], markdown=card.markdown, metadata=card.metadata, html=card.html
        ).insert(session=session)
    if has_card and not after:
        return
    digest = {} if has_card else {"card_sha256": sha256(card.markdown.encode()).hexdigest()}
    await tell_of_model(
        session,
        EventKind.MODEL_UPDATED,
        model,
        by=viewer.user_id,
        before={name: model[name] for name in after} | dict.fromkeys(digest),
        after={**after, **digest},
    )
    await changed(
        database,
        session,
        {"_id": model_id, "revision": model["revision"]},
        {"$set": {**after, "updated_at": utc_now()}, "$inc": {"revision": 1}},
    )
