"""IMPORT_MODEL."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.jobs import JobKind
from modelharbor.db.tokens import Permission
from modelharbor.resolvers.jobs import cancel_job, start_import
from modelharbor.resolvers.settling import files_digest
from modelharbor.schema.nodes import global_id
from modelharbor.worker.handlers.import_model import import_model
from modelharbor.worker.reports import Reports
from modelharbor.worker.tools import Tools
from tests.documents import insert_actor, viewer_of
from tests.worker.handlers.conftest import Yard

pytestmark = pytest.mark.anyio
CONTENTS = {"README.md": b"# Tiny\n", "a/config.json": b"{}", "b.bin": bytes(200_000)}
SIZE = sum(map(len, CONTENTS.values()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "disk/team/Tiny"
    for path, contents in CONTENTS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)
    return folder


@pytest.fixture
async def ada(folder: Path, yard: Yard) -> ActorDocument:
    return await insert_actor("ada")


async def start(yard: Yard, viewer: Viewer, **given: Any) -> Row:
    values: Row = {"source": "disk", "folder": "team/Tiny", "owner": "ada", "name": None, **given}
    return await start_import(yard.database, viewer, yard.settings, **values)


async def nothing_was_made(yard: Yard) -> None:
    for name in ("models", "versions", "files"):
        assert await yard.database.count(name, {}) == 0, name


async def test_a_folder_becomes_a_version(yard: Yard, ada: ActorDocument) -> None:
    job = await yard.run(await start(yard, viewer_of(ada)))
    model = await yard.database.data["models"].find_one()
    version = await yard.database.data["versions"].find_one()
    assert model is not None
    assert version is not None
    assert (model["name"], version["status"]) == ("Tiny", "READY")
    contents = [(path, sha256(each).hexdigest()) for path, each in CONTENTS.items()]
    assert job["result"] == {
        "modelId": global_id("Model", model["_id"]),
        "versionId": global_id("ModelVersion", version["_id"]),
        "number": 1,
        "digest": files_digest(contents),
        "status": "READY",
        "statusReason": None,
        "isNew": True,
        "files": 3,
        "sizeBytes": SIZE,
        "storedBytes": SIZE,
        "notes": [],
    }
    assert job["subject"] == {"type": "Model", "id": model["_id"]}
    assert [(step["name"], step["state"]) for step in job["steps"]] == [
        *(("hash", "SUCCEEDED"), ("store", "SUCCEEDED")),
        *(("inspect", "SUCCEEDED"), ("publish", "SUCCEEDED")),
    ]
    progress = job["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (
        3 * SIZE,
        3 * SIZE,
        "bytes",
    )
    last = await yard.database.data["events"].find_one({"job_id": job["_id"]}, sort=[("_id", -1)])
    assert last is not None
    assert model["_id"] in last["about"]


async def test_the_same_again_adds_nothing(yard: Yard, ada: ActorDocument) -> None:
    first = await yard.result(await start(yard, viewer_of(ada)))
    job = await yard.run(await start(yard, viewer_of(ada)))
    assert job["result"] == first | {"isNew": False, "storedBytes": 0}
    assert [step["name"] for step in job["steps"]] == ["hash"]
    assert (job["progress"]["current"], job["progress"]["total"]) == (3 * SIZE, 3 * SIZE)


async def test_progress_only_grows(
    yard: Yard, ada: ActorDocument, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "copy.bin").write_bytes(CONTENTS["b.bin"])  # read twice, stored once
    seen: list[tuple[int, int | None, str | None]] = []

    def report(
        self: Tools,
        current: int,
        total: int | None = None,
        *,
        unit: str | None = None,
        message: str | None = None,
    ) -> None:
        seen.append((current, total, message))

    monkeypatch.setattr(Tools, "report", report)
    await yard.run(await start(yard, viewer_of(ada)))
    done = [current for current, _, _ in seen]
    assert done == sorted(done)
    assert all(total is not None and current <= total for current, total, _ in seen)
    everything = 3 * SIZE + len(CONTENTS["b.bin"])
    assert seen[-1][:2] == (everything, everything)
    assert {str(message).partition(" ")[0] for _, _, message in seen[:-1]} == {
        *("Reading", "Storing", "Inspecting")
    }


async def test_a_note_goes_to_the_log(yard: Yard, ada: ActorDocument, folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\xff")
    job = await start(yard, viewer_of(ada))
    note = "README.md is not UTF-8 text, or too long: it became no card."
    assert (await yard.result(job))["notes"] == [note]
    assert await yard.log(job) == [("INFO", note)]


async def test_a_file_that_is_unsafe_is_named_in_the_log(
    yard: Yard, ada: ActorDocument, folder: Path
) -> None:
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    job = await start(yard, viewer_of(ada))
    result = await yard.result(job)
    assert (result["status"], result["statusReason"]) == (
        "QUARANTINED",
        "1 file is not known to be harmless: evil.pkl (UNSAFE).",
    )
    [(level, line)] = await yard.log(job)
    assert (level, line.partition(" Loading")[0]) == ("WARNING", "evil.pkl: UNSAFE")


async def test_a_folder_that_now_leads_out_is_refused(
    yard: Yard, ada: ActorDocument, folder: Path, tmp_path: Path
) -> None:
    job = await start(yard, viewer_of(ada))
    folder.rename(tmp_path / "secret")
    folder.symlink_to(tmp_path / "secret")
    ended = await yard.run(job)
    assert (ended["state"], ended["error"]) == (
        "FAILED",
        {
            "code": "BAD_INPUT",
            "message": "The folder is a link that leads out.",
            "path": ["folder"],
        },
    )
    await nothing_was_made(yard)


async def test_what_is_refused_names_no_place_of_the_machine(
    yard: Yard, ada: ActorDocument, folder: Path, tmp_path: Path
) -> None:
    (folder / "leak").symlink_to("/etc/passwd")
    ended = await yard.run(await start(yard, viewer_of(ada)))
    assert ended["error"] == {
        "code": "BAD_INPUT",
        "message": "leak is a link out of the folder: put the file in its place.",
        "path": ["folder"],
    }
    await nothing_was_made(yard)


async def test_a_worker_without_the_source_leaves_it_to_others(
    yard: Yard, ada: ActorDocument
) -> None:
    job = await start(yard, viewer_of(ada))
    ended = await Yard(yard.hall, import_roots={}).run(job)
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "UNAVAILABLE")
    assert ended["attempt"] == ended["max_attempts"]  # which a worker that has it would have used
    assert "MODELHARBOR_IMPORT_ROOTS" in ended["error"]["message"]
    await nothing_was_made(yard)


async def test_rights_that_are_gone_by_then_are_missed(yard: Yard, ada: ActorDocument) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    member = MembershipDocument(organization_id=acme.id, user_id=ada.id, role=Role.MAINTAINER)
    await member.insert()
    viewer = viewer_of(ada, {acme.id: Role.MAINTAINER})
    assert (await yard.result(await start(yard, viewer, owner="acme", name="a")))["isNew"]
    second = await start(yard, viewer, owner="acme", name="b")
    await member.set({MembershipDocument.role: Role.CONTRIBUTOR})
    ended = await yard.run(second)
    assert (ended["state"], ended["error"]["code"], ended["error"]["path"]) == (
        *("FAILED", "FORBIDDEN"),
        ["owner"],
    )
    assert await yard.database.count("models", {}) == 1


async def test_the_scopes_are_those_of_then(yard: Yard, ada: ActorDocument) -> None:
    job = await start(yard, viewer_of(ada))
    reading = [Permission.READ.value]
    await yard.database.data["jobs"].update_one({"_id": job["_id"]}, {"$set": {"scopes": reading}})
    ended = await yard.run(job)
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "FORBIDDEN")
    await nothing_was_made(yard)


@pytest.mark.parametrize("where", ["Reading", "Storing", "Inspecting"])
async def test_it_is_cancelled_at_a_report(
    where: str, yard: Yard, ada: ActorDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Tools.report

    def found_out(self: Tools, *counts: int, message: str | None = None, **given: Any) -> None:
        if message is not None and message.startswith(where):
            self._reports.cancel()
        report(self, *counts, message=message, **given)

    async def nothing(self: Reports) -> None:
        """Does not find out sooner."""

    async def handler(job: Row, tools: Tools) -> Row:
        await cancel_job(yard.database, None, job_id=job["_id"])
        return await import_model(job, tools)

    monkeypatch.setattr(Tools, "report", found_out)
    monkeypatch.setattr(Reports, "write", nothing)
    ended = await yard.run(await start(yard, viewer_of(ada)), {JobKind.IMPORT_MODEL: handler})
    assert (ended["state"], ended["error"], ended["result"]) == ("CANCELLED", None, None)
    await nothing_was_made(yard)
    # Whatever was stored by then is garbage that will be found.
    for blob in await yard.database.data["blobs"].find().to_list():
        assert blob["references"] == 0


async def test_a_cancelled_one_is_told_while_it_works(yard: Yard, ada: ActorDocument) -> None:
    """Through the database, as it happens: nothing is published after it."""
    job = await start(yard, viewer_of(ada))

    async def handler(job: Row, tools: Tools) -> Row:
        await cancel_job(yard.database, viewer_of(ada), job_id=job["_id"])
        return await import_model(job, tools)

    ended = await yard.run(job, {JobKind.IMPORT_MODEL: handler})
    assert ended["state"] == "CANCELLED"
    await nothing_was_made(yard)
