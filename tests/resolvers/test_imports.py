"""A folder becomes a version: once, whole, and only what lies in it."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument, FileFormat, FileRole, ScanVerdict
from modelharbor.db.models import Visibility
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import ErrorCode, Refused, Unauthenticated, Unavailable
from modelharbor.inspection.fence import Fence, open_fence
from modelharbor.resolvers import folders, imports
from modelharbor.resolvers.files import FileEntry, add_files
from modelharbor.resolvers.folders import Found, walk
from modelharbor.resolvers.imports import (
    ImportResult,
    Phase,
    Progress,
    import_folder,
    local_viewer,
)
from modelharbor.resolvers.models import update_model
from modelharbor.resolvers.versions import delete_version
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, digest_key, open_storage
from tests.documents import START, insert_actor, viewer_of

pytestmark = pytest.mark.anyio
CARD = "---\nlicense: mit\npipeline_tag: fill-mask\nlanguage: en\ntags: [tiny]\n---\n# Tiny\n"
HEADER = b'{"x":{"dtype":"F32","shape":[25,50],"data_offsets":[0,5000]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(5000)


@pytest.fixture
async def storage(settings: Settings) -> AsyncIterator[BlobStore]:
    async with open_storage(settings) as storage:
        yield storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "nested/.cache").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("hidden")
    (folder / ".gitattributes").write_text("hidden")
    (folder / "nested/.cache/x").write_text("hidden")
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "nested/config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def digest_of(contents: dict[str, bytes]) -> str:
    lines = [f"{path}\0{sha256(contents[path]).hexdigest()}\n" for path in sorted(contents)]
    return sha256("".join(lines).encode()).hexdigest()


CONTENTS = {
    "README.md": CARD.encode(),
    "config.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "nested/config.json": b'{"a": 1}',
}
SIZE = sum(map(len, CONTENTS.values()))
STORED = SIZE - len(b'{"a": 1}')


class Harbor:
    """A database and a store, with one person `ada` who owns things."""

    def __init__(
        self, database: Database, storage: BlobStore, fence: Fence, viewer: Viewer
    ) -> None:
        self.database, self.storage, self.fence, self.viewer = database, storage, fence, viewer
        self.progress: list[Progress] = []

    async def put(self, folder: Path, name: str = "tiny", **arguments: Any) -> ImportResult:
        return await import_folder(
            self.database,
            self.storage,
            self.fence,
            arguments.pop("viewer", self.viewer),
            folder,
            arguments.pop("owner", "ada"),
            name,
            **{"max_card_bytes": 10_000, "report": self.progress.append, **arguments},
        )

    async def rows(self, collection: str) -> list[Row]:
        return await self.database.data[collection].find({}).sort("_id", 1).to_list()

    async def model(self) -> Row:
        [model] = await self.rows("models")
        return model

    async def nothing_was_written(self) -> None:
        names = ["models", "versions", "files", "blobs", "cards", "events"]
        assert {name: await self.rows(name) for name in names} == {name: [] for name in names}

    async def counters_are_right(self) -> None:
        """Every stored counter against the documents that it counts."""
        for model in await self.rows("models"):
            versions = [v for v in await self.rows("versions") if v["model_id"] == model["_id"]]
            kept = {v["_id"] for v in versions if v["status"] != "DELETED"}
            files = [f for f in await self.rows("files") if f["version_id"] in kept]
            ready = {v["_id"] for v in versions if v["status"] in ("READY", "ARCHIVED")}
            own = {f["sha256"]: f["size_bytes"] for f in files if f["version_id"] in ready}
            assert model["stats"] == model["stats"] | {
                "versions": len(kept),
                "files": len(files),
                "size_bytes": sum(f["size_bytes"] for f in files),
                "stored_bytes": sum(own.values()),
            }
            for version in versions:
                mine = [f for f in await self.rows("files") if f["version_id"] == version["_id"]]
                assert version["file_count"] == len(mine)
                assert version["size_bytes"] == sum(f["size_bytes"] for f in mine)
        files = await self.rows("files")
        for blob in await self.rows("blobs"):
            assert blob["references"] == sum(f["sha256"] == blob["sha256"] for f in files)


@pytest.fixture
async def harbor(
    database: Database, settings: Settings, storage: BlobStore
) -> AsyncIterator[Harbor]:
    async with open_fence(settings) as fence:
        yield Harbor(database, storage, fence, viewer_of(await insert_actor("ada")))


async def test_a_folder_becomes_a_version(harbor: Harbor, folder: Path) -> None:
    result = await harbor.put(folder, aliases=["prod", "prod"], visibility=Visibility.PUBLIC)

    model = await harbor.model()
    [version] = await harbor.rows("versions")
    assert result == ImportResult(
        model_id=model["_id"],
        version_id=version["_id"],
        number=1,
        digest=digest_of(CONTENTS),
        status=VersionStatus.READY,
        status_reason=None,
        is_new=True,
        files=4,
        size_bytes=SIZE,
        stored_bytes=STORED,
        notes=(),
    )
    expected = {
        "owner_id": harbor.viewer.user_id,
        "name": "tiny",
        "visibility": "PUBLIC",
        "principals": ["public"],
        "license": "mit",
        "task": "fill-mask",
        "library": None,
        "languages": ["en"],
        "tags": ["tiny"],
        "formats": ["JSON", "SAFETENSORS", "TEXT"],
        "last_number": 1,
        "latest_version_id": version["_id"],
        "parameters": 1250,
    }
    assert model == model | expected
    assert model["stats"] == model["stats"] | {
        "versions": 1,
        "files": 4,
        "size_bytes": SIZE,
        "stored_bytes": STORED,
    }
    assert [(a["name"], a["version_id"]) for a in model["aliases"]] == [("prod", version["_id"])]
    assert version == version | {
        "status": "READY",
        "digest": digest_of(CONTENTS),
        "file_count": 4,
        "size_bytes": SIZE,
    }
    files = sorted(await harbor.rows("files"), key=lambda file: str(file["path"]))
    assert [(f["path"], f["sha256"], f["role"], f["format"]) for f in files] == [
        (path, sha256(contents).hexdigest(), role, format)
        for (path, contents), (role, format) in zip(
            CONTENTS.items(),
            [("CARD", "TEXT"), ("CONFIG", "JSON"), ("WEIGHTS", "SAFETENSORS"), ("CONFIG", "JSON")],
            strict=True,
        )
    ]
    for file in files:
        parts = await harbor.storage.open_range(digest_key(file["sha256"]), 0, file["size_bytes"])
        assert b"".join([part async for part in parts]) == CONTENTS[file["path"]]
    blobs = await harbor.rows("blobs")
    assert sorted((b["sha256"], b["references"], b["stored"]) for b in blobs) == sorted(
        (sha256(contents).hexdigest(), references, True)
        for contents, references in {CARD.encode(): 1, b'{"a": 1}': 2, WEIGHTS: 1}.items()
    )
    [card] = await harbor.rows("cards")
    assert (card["_id"], card["markdown"]) == (model["_id"], CARD)
    assert (card["metadata"]["license"], card["html"]) == ("mit", "<h1>Tiny</h1>\n")
    kinds = ["MODEL_CREATED", "VERSION_CREATED", "VERSION_READY", "ALIAS_SET"]
    assert [event["kind"] for event in await harbor.rows("events")] == kinds
    await harbor.counters_are_right()


async def test_progress_goes_from_nothing_to_all(harbor: Harbor, folder: Path) -> None:
    await harbor.put(folder)
    phases = ((Phase.HASHING, SIZE), (Phase.STORING, STORED), (Phase.INSPECTING, STORED))
    for phase, total in phases:
        seen = [progress for progress in harbor.progress if progress.phase is phase]
        done = [progress.done for progress in seen]
        assert done == sorted(done)
        assert done[-1] == total
        assert {progress.total for progress in seen} == {total}
        assert {progress.path for progress in seen} <= set(CONTENTS)


EVIL = b"cos\nsystem\n(S'touch /tmp/executed'\ntR."


async def test_a_file_that_is_unsafe_puts_the_version_in_quarantine(
    harbor: Harbor, folder: Path
) -> None:
    (folder / "nested/evil.pkl").write_bytes(EVIL)
    for is_new in (True, False):
        result = await harbor.put(folder, aliases=["prod"])
        assert (result.status, result.is_new) == (VersionStatus.QUARANTINED, is_new)
        assert result.status_reason == (
            "1 file is not known to be harmless: nested/evil.pkl (UNSAFE)."
        )
        [troubled] = result.troubled
        assert (troubled.path, troubled.verdict) == ("nested/evil.pkl", ScanVerdict.UNSAFE)
        assert any("system" in detail for detail in troubled.details)
    [version] = await harbor.rows("versions")
    assert (version["status"], version["digest"]) == ("QUARANTINED", result.digest)
    model = await harbor.model()
    assert (model["latest_version_id"], model["aliases"]) == (None, [])
    assert [event["kind"] for event in await harbor.rows("events")][2:] == ["VERSION_QUARANTINED"]
    await harbor.counters_are_right()


async def test_contents_are_inspected_once(harbor: Harbor, folder: Path) -> None:
    await harbor.put(folder)
    before = await harbor.rows("blobs")
    assert all(blob["inspection"]["verdict"] in ("SAFE", "SKIPPED") for blob in before)
    harbor.progress.clear()
    await harbor.put(folder, "other")
    assert {progress.phase for progress in harbor.progress} == {Phase.HASHING}
    assert [blob["inspection"] for blob in await harbor.rows("blobs")] == (
        [blob["inspection"] for blob in before]
    )


async def test_contents_that_cannot_be_read_back_publish_nothing(
    harbor: Harbor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> bytes:
        raise Unavailable("The file storage does not answer; try again later.")

    with monkeypatch.context() as patched:
        patched.setattr(BlobStore, "read_range", fails)
        with pytest.raises(Unavailable):
            await harbor.put(folder)
    assert await harbor.rows("versions") == []
    assert {blob.get("inspection") for blob in await harbor.rows("blobs")} == {None}
    result = await harbor.put(folder)
    assert (result.status, result.stored_bytes) == (VersionStatus.READY, 0)


async def test_the_same_folder_again_adds_nothing(harbor: Harbor, folder: Path) -> None:
    first = await harbor.put(folder)
    names = ["models", "versions", "files", "blobs", "cards", "events"]
    before = {name: await harbor.rows(name) for name in names}

    second = await harbor.put(folder)

    assert second == ImportResult(
        **{
            **{name: getattr(first, name) for name in ImportResult.__dataclass_fields__},
            "is_new": False,
            "stored_bytes": 0,
        }
    )
    assert {name: await harbor.rows(name) for name in names} == before


async def test_the_same_folder_again_sets_its_aliases(harbor: Harbor, folder: Path) -> None:
    first = await harbor.put(folder)
    second = await harbor.put(folder, aliases=["prod"])
    third = await harbor.put(folder, aliases=["prod"])
    assert (second.is_new, third.is_new) == (False, False)
    [alias] = (await harbor.model())["aliases"]
    assert (alias["name"], alias["version_id"]) == ("prod", first.version_id)
    kinds = [event["kind"] for event in await harbor.rows("events")]
    assert kinds == ["MODEL_CREATED", "VERSION_CREATED", "VERSION_READY", "ALIAS_SET"]


async def test_again_makes_another_version_of_the_same_contents(
    harbor: Harbor, folder: Path
) -> None:
    await harbor.put(folder)
    second = await harbor.put(folder, again=True)
    assert (second.number, second.is_new, second.stored_bytes) == (2, True, 0)
    stats = (await harbor.model())["stats"]
    assert (stats["versions"], stats["files"]) == (2, 8)
    assert (stats["size_bytes"], stats["stored_bytes"]) == (2 * SIZE, STORED)
    await harbor.counters_are_right()


async def test_files_that_are_added_move_the_time_of_the_counters(
    harbor: Harbor, folder: Path
) -> None:
    first = await harbor.put(folder)
    models, versions = (harbor.database.data[name] for name in ("models", "versions"))
    await models.update_one({}, {"$set": {"stats.as_of": START}})
    await versions.update_one({}, {"$set": {"status": VersionStatus.DRAFT.value}})
    entry = FileEntry("more", 1, "0" * 64, FileRole.OTHER, FileFormat.OTHER)
    await BlobDocument(sha256=entry.sha256, size_bytes=1).insert()

    async def add(session: AsyncClientSession) -> Row:
        version = await versions.find_one({"_id": first.version_id}, session=session)
        assert version is not None
        return await add_files(harbor.database, session, version, [entry])

    await harbor.database.transaction(add)
    stats = (await harbor.model())["stats"]
    assert (stats["files"], stats["as_of"] > START) == (5, True)
    await models.update_one({}, {"$set": {"stats.as_of": START}})
    await harbor.database.transaction(add)  # it is there already
    assert (await harbor.model())["stats"]["as_of"] == START


async def test_other_contents_make_the_next_version(harbor: Harbor, folder: Path) -> None:
    await harbor.put(folder, aliases=["prod"])
    (folder / "config.json").write_text('{"a": 22}')
    second = await harbor.put(folder, aliases=["prod"])
    assert (second.number, second.is_new, second.stored_bytes) == (2, True, 9)
    model = await harbor.model()
    assert model["latest_version_id"] == second.version_id
    assert [alias["version_id"] for alias in model["aliases"]] == [second.version_id]
    await harbor.counters_are_right()


async def test_a_deleted_version_is_not_recognised(harbor: Harbor, folder: Path) -> None:
    first = await harbor.put(folder)
    blobs = await harbor.rows("blobs")
    await delete_version(harbor.database, harbor.viewer, version_id=first.version_id)
    assert await harbor.rows("blobs") == blobs
    second = await harbor.put(folder)
    assert (second.number, second.is_new, second.stored_bytes) == (2, True, 0)
    await harbor.counters_are_right()


async def test_the_same_contents_in_another_model_are_stored_once(
    harbor: Harbor, folder: Path
) -> None:
    await harbor.put(folder)
    other = await harbor.put(folder, "other")
    assert (other.is_new, other.stored_bytes) == (True, 0)
    assert len(await harbor.rows("blobs")) == 3
    await harbor.counters_are_right()


async def test_what_a_person_wrote_stays(harbor: Harbor, folder: Path, settings: Settings) -> None:
    plain = folder.parent / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    first = await harbor.put(plain)
    await update_model(
        harbor.database,
        harbor.viewer,
        settings,
        model_id=first.model_id,
        license="bsd-3-clause",
        add_tags=["mine"],
    )

    result = await harbor.put(folder, visibility=Visibility.PUBLIC)

    model = await harbor.model()
    assert (model["license"], model["tags"]) == ("bsd-3-clause", ["mine"])
    assert (model["task"], model["languages"]) == ("fill-mask", ["en"])
    assert model["visibility"] == "PRIVATE"
    assert result.notes == ("ada/tiny is PRIVATE and stays so.",)
    assert [card["markdown"] for card in await harbor.rows("cards")] == [CARD]
    told = [event for event in await harbor.rows("events") if event["kind"] == "MODEL_UPDATED"][-1]
    assert told["before"] == {"task": None, "languages": [], "card_sha256": None}
    assert told["after"] == {
        "task": "fill-mask",
        "languages": ["en"],
        "card_sha256": sha256(CARD.encode()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("readme", "note", "html"),
    [
        (
            b"---\na: &x 1\nb: *x\n---\ntext",
            "README.md: The card's front matter uses a YAML alias (`*name`); write it out."
            " Its front matter was left out.",
            "<p>text</p>\n",
        ),
        (b"x" * 10_001, "It became no card.", None),
        (b'"' * 9_000, "over 40,000 bytes of HTML: shorten it. It became no card.", None),
        (b"\xff\xfe", "README.md is not UTF-8 text, or too long: it became no card.", None),
        (b"  \n", "", None),
    ],
)
async def test_a_card_that_cannot_be_used_keeps_no_model_out(
    harbor: Harbor, folder: Path, readme: bytes, note: str, html: str | None
) -> None:
    (folder / "README.md").write_bytes(readme)
    result = await harbor.put(folder)
    assert result.is_new
    assert [note in given for given in result.notes] == ([True] if note else [])
    assert [card["html"] for card in await harbor.rows("cards")] == ([html] if html else [])
    assert (await harbor.model())["license"] is None


async def refusal(harbor: Harbor, folder: Path, **arguments: Any) -> Refused:
    with pytest.raises(Refused) as raised:
        await harbor.put(folder, **arguments)
    await harbor.nothing_was_written()
    return raised.value


async def test_a_link_out_of_the_folder_is_refused_by_name(
    harbor: Harbor, folder: Path, settings: Settings
) -> None:
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder / "nested/leak.txt").symlink_to(secret)
    refused = await refusal(harbor, folder)
    assert refused.code is ErrorCode.BAD_INPUT
    assert refused.path == ["folder"]
    assert refused.message == (
        f"nested/leak.txt is a link out of the folder, to {secret}: put the file in its place."
    )
    assert [path for path in (settings.data_path / "blobs").rglob("*") if path.is_file()] == []


async def test_links_of_all_other_kinds(harbor: Harbor, folder: Path) -> None:
    for target, message in {
        "/etc/passwd": "is a link out of the folder, to /etc/passwd",
        "../..": "is a link out of the folder, to ",
        "nowhere": "is a link that leads nowhere",
        "link": "is a link that leads nowhere",
        ".": "is a link to a folder",
        "nested": "is a link to a folder",
    }.items():
        (folder / "link").symlink_to(target)
        assert message in (await refusal(harbor, folder)).message
        (folder / "link").unlink()


async def test_a_link_within_the_folder_is_the_file_that_it_leads_to(
    harbor: Harbor, folder: Path
) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("nested/config.json")
    result = await harbor.put(folder)
    assert (result.files, result.digest) == (4, digest_of(CONTENTS))


async def test_a_folder_that_is_itself_a_link(harbor: Harbor, folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert (await harbor.put(link)).digest == digest_of(CONTENTS)


async def test_pipes_and_sockets_are_refused(harbor: Harbor, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert (await refusal(harbor, folder)).message == (
        "pipe is neither a file nor a folder: remove it."
    )
    (folder / "pipe").unlink()
    place = os.getcwd()
    os.chdir(folder)  # the address of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("socket")
    finally:
        os.chdir(place)
    assert "socket is neither a file nor a folder" in (await refusal(harbor, folder)).message


async def test_what_becomes_a_link_after_the_walk_is_not_followed(
    harbor: Harbor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = folder.parent / "secret"
    (secret / "nested").mkdir(parents=True)
    for path in CONTENTS:
        (secret / path).write_text("secret")
    found = folders.walk

    def walk_and_swap(at: Path, within: Path | None = None) -> list[Found]:
        files = found(at, within)
        swapped.rename(folder.parent / "aside")
        swapped.symlink_to(secret / swapped.relative_to(folder))
        return files

    monkeypatch.setattr(imports, "walk", walk_and_swap)
    for swapped, path in {
        folder / "config.json": "config.json",
        folder / "nested": "nested/config.json",
        folder: "README.md",
    }.items():
        refused = await refusal(harbor, folder, within=folder.parent)
        assert (refused.code, refused.path) == (ErrorCode.BAD_INPUT, ["folder"])
        assert refused.message.startswith(f"{path} cannot be read: ")
        assert str(folder.parent) not in refused.message
        swapped.unlink()
        (folder.parent / "aside").rename(swapped)


async def test_a_file_that_cannot_be_read_is_named_by_its_path_in_the_folder(
    harbor: Harbor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = folders.walk

    def walk_and_remove(at: Path, within: Path | None = None) -> list[Found]:
        files = found(at, within)
        (folder / "nested/config.json").unlink()
        return files

    monkeypatch.setattr(imports, "walk", walk_and_remove)
    refused = await refusal(harbor, folder)
    assert refused.message == "nested/config.json cannot be read: No such file or directory."


async def test_a_file_that_becomes_a_pipe_is_not_waited_for(harbor: Harbor, folder: Path) -> None:
    def report(progress: Progress) -> None:
        path = folder / "model.safetensors"
        if progress.phase is Phase.HASHING and path.is_file():
            path.unlink()
            os.mkfifo(path)

    with pytest.raises(Refused) as raised:
        await asyncio.wait_for(harbor.put(folder, report=report), 10)
    assert raised.value.code is ErrorCode.CONFLICT


@pytest.mark.parametrize("name", [b"a\nb", b"a\x1bb", b"a\\..\\b", b"\xff\xfe"])
async def test_names_that_other_systems_refuse(harbor: Harbor, folder: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("x")
    assert "has characters that other systems refuse" in (await refusal(harbor, folder)).message


async def test_names_that_look_alike_are_two_files(harbor: Harbor, folder: Path) -> None:
    (folder / "Config.json").write_text("1")
    (folder / "caf\u00e9").write_text("2")
    (folder / "cafe\u0301").write_text("3")
    assert (await harbor.put(folder)).files == 7


async def test_folders_that_hold_nothing(harbor: Harbor, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / ".git").mkdir(parents=True)
    (empty / ".git/config").write_text("x")
    assert (await refusal(harbor, empty)).message == (
        "The folder has no files (hidden ones are left out)."
    )
    assert "No such file" in (await refusal(harbor, tmp_path / "absent")).message
    (tmp_path / "file").write_text("x")
    assert "Not a directory" in (await refusal(harbor, tmp_path / "file")).message


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_FILES", 3)
    for number in range(3):
        (tmp_path / str(number)).write_text("x")
    assert [found.path for found in walk(tmp_path)] == ["0", "1", "2"]
    (tmp_path / "3").write_text("x")
    with pytest.raises(Refused, match="over 3 files"):
        walk(tmp_path)


async def test_names_are_refused_before_the_folder_is_read(harbor: Harbor, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for arguments, code, path in (
        ({"name": "a/b"}, ErrorCode.BAD_INPUT, ["name"]),
        ({"aliases": ["5"]}, ErrorCode.BAD_INPUT, ["aliases"]),
        ({"owner": "nobody"}, ErrorCode.NOT_FOUND, ["owner"]),
    ):
        refused = await refusal(harbor, absent, **arguments)
        assert (refused.code, refused.path) == (code, path)


async def test_others_may_not_import_and_nothing_is_stored(
    harbor: Harbor, folder: Path, settings: Settings
) -> None:
    eve = viewer_of(await insert_actor("eve"))
    refused = await refusal(harbor, folder, viewer=eve)
    assert (refused.code, refused.path) == (ErrorCode.FORBIDDEN, ["owner"])
    with pytest.raises((Refused, Unauthenticated)):
        await harbor.put(folder, viewer=ANONYMOUS)
    await harbor.nothing_was_written()
    assert not any((settings.data_path / "blobs").iterdir())


async def test_an_organization_is_owner_too(harbor: Harbor, folder: Path) -> None:
    organization = await insert_actor("acme", ActorKind.ORGANIZATION)
    member = viewer_of(await insert_actor("bob"), {organization.id: Role.CONTRIBUTOR})
    refused = await refusal(harbor, folder, viewer=member, owner="acme")
    assert "PUBLISH" in refused.message
    local = await local_viewer(harbor.database, "ACME")
    result = await harbor.put(folder, viewer=local, owner="acme")
    assert (await harbor.model())["owner_id"] == organization.id
    assert result.is_new


async def test_an_archived_model_takes_no_version(harbor: Harbor, folder: Path) -> None:
    first = await harbor.put(folder)
    await harbor.database.data["models"].update_one({}, {"$set": {"state": "ARCHIVED"}})
    (folder / "config.json").write_text("{}")
    with pytest.raises(Refused) as raised:
        await harbor.put(folder)
    assert raised.value.code is ErrorCode.INVALID_TRANSITION
    assert [version["_id"] for version in await harbor.rows("versions")] == [first.version_id]


async def test_a_file_that_changes_meanwhile_registers_nothing(
    harbor: Harbor, folder: Path
) -> None:
    def report(progress: Progress) -> None:
        if progress.phase is Phase.HASHING:
            (folder / "model.safetensors").write_bytes(bytes(len(WEIGHTS)))

    with pytest.raises(Refused) as raised:
        await harbor.put(folder, report=report)
    assert (raised.value.code, raised.value.path) == (ErrorCode.CONFLICT, ["folder"])
    assert raised.value.message.startswith("model.safetensors changed while it was read.")
    blobs = await harbor.rows("blobs")
    assert {(blob["references"], blob["stored"]) for blob in blobs} == {(0, False)}
    await harbor.database.data["blobs"].delete_many({})  # which is all that is left of it
    await harbor.nothing_was_written()


async def test_two_at_once_make_one_version(harbor: Harbor, folder: Path) -> None:
    results = await asyncio.gather(*(harbor.put(folder, aliases=["prod"]) for _ in range(4)))
    assert [result.is_new for result in results].count(True) == 1
    assert {result.version_id for result in results} == {results[0].version_id}
    assert {result.number for result in results} == {1}
    assert len(await harbor.rows("versions")) == 1
    assert len(await harbor.rows("files")) == 4
    kinds = sorted(event["kind"] for event in await harbor.rows("events"))
    assert kinds == ["ALIAS_SET", "MODEL_CREATED", "VERSION_CREATED", "VERSION_READY"]
    await harbor.counters_are_right()


async def test_two_folders_at_once_make_two_versions(harbor: Harbor, folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    (other / "config.json").write_bytes(CONTENTS["config.json"])
    results = await asyncio.gather(harbor.put(folder), harbor.put(other))
    assert sorted(result.number for result in results) == [1, 2]
    assert [result.is_new for result in results] == [True, True]
    latest = max(results, key=lambda result: result.number)
    assert (await harbor.model())["latest_version_id"] == latest.version_id
    await harbor.counters_are_right()


async def test_an_import_that_broke_off_is_taken_up(
    harbor: Harbor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "FILES_AT_ONCE", 3)
    calls = 0

    async def break_off(*arguments: Any) -> Row:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the power is gone")
        return await add_files(*arguments)

    monkeypatch.setattr(imports, "add_files", break_off)
    with pytest.raises(RuntimeError, match="the power is gone"):
        await harbor.put(folder)

    [draft] = await harbor.rows("versions")
    model = await harbor.model()
    assert (draft["status"], draft["file_count"]) == (VersionStatus.DRAFT.value, 3)
    assert model["latest_version_id"] is None
    assert len(await harbor.rows("files")) == 3
    await harbor.counters_are_right()

    result = await harbor.put(folder)
    assert (result.version_id, result.number, result.is_new) == (draft["_id"], 1, True)
    assert (result.files, result.stored_bytes) == (4, 0)
    assert len(await harbor.rows("files")) == 4
    await harbor.counters_are_right()


async def test_contents_known_but_not_stored_are_stored_now(harbor: Harbor, folder: Path) -> None:
    digest = sha256(WEIGHTS).hexdigest()
    await harbor.database.data["blobs"].insert_one(
        {
            "_id": ObjectId(),
            "sha256": digest,
            "size_bytes": len(WEIGHTS),
            "references": 7,
            "stored": False,
        }
    )
    await harbor.put(folder)
    blob = await harbor.database.data["blobs"].find_one({"sha256": digest})
    assert blob is not None
    assert (blob["stored"], blob["references"]) == (True, 8)
    assert await harbor.storage.exists(digest_key(digest))


async def test_contents_that_got_lost_are_stored_again(harbor: Harbor, folder: Path) -> None:
    await harbor.put(folder)
    digest = sha256(WEIGHTS).hexdigest()
    await harbor.storage.delete(digest_key(digest))
    result = await harbor.put(folder, again=True)
    assert result.stored_bytes == len(WEIGHTS)
    assert await harbor.storage.exists(digest_key(digest))


async def test_an_import_by_a_client_is_held_to_the_quota(
    harbor: Harbor, folder: Path, settings: Settings
) -> None:
    """Of what is there already, of what uploads have reserved, and of what it brings."""
    small = settings.model_copy(update={"quota_bytes": SIZE - 1})
    with pytest.raises(Refused, match=f"{SIZE:,} more are needed") as caught:
        await harbor.put(folder, settings=small)
    assert (caught.value.code, caught.value.path) == (ErrorCode.QUOTA_EXCEEDED, ["folder"])
    await harbor.nothing_was_written()
    enough = settings.model_copy(update={"quota_bytes": SIZE})
    first = await harbor.put(folder, settings=enough)
    assert first.size_bytes == SIZE
    with pytest.raises(Refused, match=f"{SIZE:,} are used, 0 are reserved"):
        await harbor.put(folder, again=True, settings=enough)
    again = await harbor.put(folder, again=True)  # the operator's own hands
    assert again.number == 2
