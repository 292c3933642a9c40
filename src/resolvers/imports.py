"""A folder on this machine becomes a version: walked safely, hashed, stored, published."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from hashlib import sha256
from io import RawIOBase
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.models import CardDocument, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Refused
from modelharbor.inspection.formats import HEAD_BYTES, role_of, sniff
from modelharbor.settings import Settings
from modelharbor.storage.blobs import PART, BlobStore, ContentChanged

from .access import full_name, may, refuse_unless_active, refuse_without
from .aliases import set_alias
from .blobs import announce_blobs, record_blobs
from .cards import Card, card_fields, render_card
from .files import FileEntry, add_files
from .models import changed, create_model_in, valid_model_fields
from .names import bad, valid_alias, valid_card, valid_model_name
from .telling import tell_of_model
from .versions import create_version_in, files_digest, publish_version_in, valid_version_fields

MAX_FILES: Final = 100_000
MAX_PATH: Final = 1024  # characters
FILES_AT_ONCE: Final = 1000  # written in one transaction
FILES_PER_STEP: Final = 200  # hashed between two looks at the event loop, when they are small
PUTS_AT_ONCE: Final = 8


class Phase(Enum):
    HASHING = "hashing"
    STORING = "storing"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of a phase, of HASHING or STORING; `path` is the file at hand."""

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
    is_new: bool  # False: these contents were a version of the model already
    files: int
    size_bytes: int
    stored_bytes: int  # length of the contents that the store did not have yet
    notes: tuple[str, ...]  # what was left out, and why: sentences for the person at the terminal


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the folder; `real` is where its contents are, when a link leads there: below `base`,
    by no link."""

    path: str
    base: Path
    real: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where to, and for whom. All of it is valid."""

    viewer: Viewer
    owner: Row
    name: str
    aliases: tuple[str, ...]
    visibility: Visibility | None
    again: bool


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
    viewer: Viewer,
    folder: Path,
    owner: str,
    name: str,
    *,
    aliases: Sequence[str] = (),
    visibility: Visibility | None = None,
    again: bool = False,
    max_card_bytes: int,
    report: Callable[[Progress], None],
    within: Path | None = None,
    phase: Callable[[Phase], AbstractAsyncContextManager[None]] = _through,
) -> ImportResult:
    """Register a folder as a new READY version of `owner/name`, which is made when it is missing.

    A folder whose contents are a version already adds nothing, unless `again`; its aliases are set
    all the same. Contents are stored first and the version is filled as a DRAFT with right
    counters, so an import that broke off is taken up by the next one of the same folder.

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
    )
    await _refuse_early(database, target)
    async with phase(Phase.HASHING):
        found = await asyncio.to_thread(walk, folder, within)
        readme = await asyncio.to_thread(_readme, found, max_card_bytes)
        entries = [entry async for entry in _hashed(found, report)]
    digest = files_digest([(entry.path, entry.sha256) for entry in entries])

    model, version = await _known(database, target, digest)
    if version is not None and version["status"] != VersionStatus.DRAFT.value:
        return await _recognised(database, target, version, readme.notes)
    if model is not None and visibility not in (None, Visibility(model["visibility"])):
        readme.notes.append(f"{full_name(model)} is {model['visibility']} and stays so.")

    async with phase(Phase.STORING):
        stored_bytes = await _store(database, storage, found, entries, report)
    async with phase(Phase.PUBLISHING):
        version = await _claim(database, target, digest, readme.card)
        for batch in _batches(entries, FILES_AT_ONCE):
            if version["status"] == VersionStatus.DRAFT.value:
                work = partial(_add, database, version["_id"], batch)
                version = await database.transaction(work)
        published = await database.transaction(
            partial(_publish, database, target, version["_id"], readme.card),
            seconds=60,  # with 100,000 files it takes a while, and nobody waits for a request
        )
    if published is None:  # another import of the same folder came first
        return await _recognised(database, target, version, readme.notes, stored_bytes)
    return _result(published, readme.notes, stored_bytes, is_new=True)


async def refuse_import(
    database: Database, session: AsyncClientSession | None, viewer: Viewer, owner: str, name: str
) -> tuple[Row, Row | None]:
    """What an import would refuse before it reads the folder; else the owner, and the model if there is one."""
    found = await _owner(database, owner, session)
    target = Target(viewer, found, valid_model_name(name, "name"), (), None, False)
    return found, await _refuse_early(database, target, session)


def _result(
    version: Row, notes: Sequence[str], stored_bytes: int = 0, *, is_new: bool
) -> ImportResult:
    return ImportResult(
        model_id=version["model_id"],
        version_id=version["_id"],
        number=version["number"],
        digest=version["digest"],
        is_new=is_new,
        files=version["file_count"],
        size_bytes=version["size_bytes"],
        stored_bytes=stored_bytes,
        notes=tuple(notes),
    )


# What a client may name ------------------------------------------------------------------------


def valid_folder(folder: str) -> str:
    """A path below an import root, in one form: relative, with `/`, without `.` and `..`."""
    if len(folder) > MAX_PATH:
        raise bad(f"The path is longer than {MAX_PATH} characters.", "folder")
    if not folder.isprintable() or "\\" in folder:
        raise bad("The path has characters that no folder's name has here.", "folder")
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise bad("The path must lead below the source: relative, and without '..'.", "folder")
    if _is_hidden(path):
        raise bad("Hidden folders are not imported.", "folder")
    return str(path)


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def allowed_folder(settings: Settings, source: str, folder: str) -> tuple[Path, Path]:
    """The root of an import source, and the folder below it; links followed in both. Blocks.

    Refused (`source`, `folder`) without a word about what else is on this machine.
    """
    root = settings.import_roots.get(source)
    if root is None:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such source.", "source")
    missing = bad("There is no such folder below the source.", "folder")
    try:
        root = root.resolve(strict=True)
        real = (root / valid_folder(folder)).resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        raise missing from None
    if not real.is_relative_to(root):
        raise bad("The folder is a link that leads out.", "folder")
    if not real.is_dir() or _is_hidden(real.relative_to(root)):
        raise missing
    return root, real


# The folder -------------------------------------------------------------------------------------


def walk(folder: Path, within: Path | None = None) -> list[Found]:
    """Its files in the order of their paths, without hidden ones. Blocks.

    With `within`, what is refused is told without where links lead to: to people far from this machine.

    Refused (BAD_INPUT, `folder`): links that lead out or nowhere or to folders, what is neither
    file nor folder, names that are no text, too many files, none at all.
    """
    try:
        root = folder.resolve(strict=True)
        if within is not None and not root.is_relative_to(within):
            raise bad("The folder is a link that leads out.", "folder")
        base = root if within is None else within
        waiting = [root]
        found: list[Found] = []
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                        continue
                    found.append(_file(base, root, Path(entry.path), tell=within is None))
                    if len(found) > MAX_FILES:
                        raise bad(f"The folder has over {MAX_FILES:,} files: split it.", "folder")
    except (OSError, ValueError) as error:
        reason = str(error) if within is None else _reason(error)
        raise bad(f"The folder cannot be read: {_plainly(reason)}.", "folder") from None
    if not found:
        raise bad("The folder has no files (hidden ones are left out).", "folder")
    return sorted(found, key=lambda file: file.path)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _file(base: Path, root: Path, at: Path, *, tell: bool) -> Found:
    path = at.relative_to(root).as_posix()
    shown = _plainly(path)
    if not path.isprintable() or "\\" in path:
        raise bad(
            f"The name of {shown!r} has characters that other systems refuse: rename it.", "folder"
        )
    if len(path) > MAX_PATH:
        raise bad(f"The path {shown[:80]}… is longer than {MAX_PATH} characters.", "folder")
    try:
        real = at.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        raise bad(f"{shown} is a link that leads nowhere: remove it.", "folder") from None
    if not real.is_relative_to(root):
        where = f", to {real}" if tell else ""
        raise bad(
            f"{shown} is a link out of the folder{where}: put the file in its place.", "folder"
        )
    status = real.stat()
    if stat.S_ISDIR(status.st_mode):
        raise bad(f"{shown} is a link to a folder: put the folder in its place.", "folder")
    if not stat.S_ISREG(status.st_mode):
        raise bad(f"{shown} is neither a file nor a folder: remove it.", "folder")
    return Found(path, base, real, status.st_size)


def _plainly(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


FOLDER: Final = (
    getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
)  # to go through, not to be read


def _open(file: Found) -> int:
    """A descriptor. What became a link or a pipe since the walk, at any level below its base, is not
    followed, nor waited for. Refused (BAD_INPUT, `folder`), by its path in the folder alone."""
    *above, name = file.real.relative_to(file.base).parts
    try:
        at = os.open(file.base, FOLDER)
        try:
            for part in above:
                below = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=at)
                os.close(at)
                at = below
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=at)
        finally:
            os.close(at)
    except OSError as error:
        raise _unreadable(file, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise bad(f"{file.path} is no longer a file.", "folder")
    return descriptor


def _unreadable(file: Found, error: OSError) -> Refused:
    return bad(f"{file.path} cannot be read: {_reason(error)}.", "folder")


async def _hashed(
    found: Sequence[Found], report: Callable[[Progress], None]
) -> AsyncIterator[FileEntry]:
    """The entry of each file, in order."""
    total, done = sum(file.size_bytes for file in found), 0
    with closing(_parts(found)) as parts:
        while step := await asyncio.to_thread(_step, parts):
            for _, count, entry in step:
                done += count
                if entry is not None:
                    yield entry
            report(Progress(Phase.HASHING, done, max(total, done), step[-1][0]))


Part = tuple[str, int, FileEntry | None]


def _step(parts: Iterator[Part]) -> list[Part]:
    """What one visit to a thread does: a few megabytes, or some files that are small."""
    taken: list[Part] = []
    count = 0
    for part in islice(parts, FILES_PER_STEP):
        taken.append(part)
        count += part[1]
        if count >= PART:
            break
    return taken


def _parts(found: Sequence[Found]) -> Generator[Part, None, None]:
    """Path, bytes read, and with the last of a file its entry."""
    for file in found:
        digest, size, head = sha256(), 0, b""
        with open(_open(file), "rb", buffering=0) as source:
            while part := _read(file, source):
                digest.update(part)
                size += len(part)
                if len(head) < HEAD_BYTES:
                    head += part[: HEAD_BYTES - len(head)]
                yield file.path, len(part), None
        format = sniff(head, file.path)
        role = role_of(file.path, format)
        yield file.path, 0, FileEntry(file.path, size, digest.hexdigest(), role, format)


def _read(file: Found, source: RawIOBase) -> bytes:
    try:
        return source.read(PART) or b""
    except OSError as error:
        raise _unreadable(file, error) from None


def _readme(found: Sequence[Found], max_card_bytes: int) -> Readme:
    """The card of a folder. One that cannot be used does not keep its model out. Blocks."""
    readme = Readme()
    named = [file for file in found if file.path.lower() == "readme.md"]
    if not named:
        return readme
    descriptor = _open(named[0])
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
        raise _unreadable(named[0], error) from None
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
        if not (blobs[entry.sha256]["stored"] and await storage.exists(entry.sha256))
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
        report(Progress(Phase.STORING, done, total, path))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(PUTS_AT_ONCE):
                group.create_task(put())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None  # of several that fail at once, one tells enough
    await record_blobs(database, [blobs[entry.sha256]["_id"] for entry in missing])
    return total


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
                "status": {"$ne": VersionStatus.DELETED.value},
            },
            session=session,
        )
        .sort("number", -1)
        .max_time_ms(database.query_timeout_ms)
        .to_list()
    )
    versions.sort(key=lambda version: version["status"] == VersionStatus.DRAFT.value)
    return model, next(iter(versions), None)


async def _recognised(
    database: Database,
    target: Target,
    version: Row,
    notes: Sequence[str],
    stored_bytes: int = 0,
) -> ImportResult:
    """Nothing to add. An alias that was asked for is set where it points elsewhere."""
    row = await database.data["versions"].find_one(
        {"_id": version["_id"]}, max_time_ms=database.query_timeout_ms
    )
    if row is None:
        raise Refused(ErrorCode.CONFLICT, "The version was removed meanwhile: import it again.")
    for name in target.aliases:
        await set_alias(
            database, target.viewer, model_id=row["model_id"], name=name, version_id=row["_id"]
        )
    return _result(row, notes, stored_bytes, is_new=False)


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


async def _add(
    database: Database,
    version_id: ObjectId,
    entries: Sequence[FileEntry],
    session: AsyncClientSession,
) -> Row:
    """The version with these files, unless another import has published it."""
    version = await _version(database, version_id, session)
    if version["status"] != VersionStatus.DRAFT.value:
        return version
    return await add_files(database, session, version, entries)


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
    """READY, with its aliases and what its card tells; None when another import did it."""
    version = await _version(database, version_id, session)
    if version["status"] != VersionStatus.DRAFT.value:
        return None
    if card is not None:
        await _fill(database, target.viewer, version["model_id"], card, session)
    return await publish_version_in(
        database, session, target.viewer, version_id=version_id, set_aliases=target.aliases
    )


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
