"""Files go to a version, whatever happens meanwhile."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from modelharbor.client import (
    Changed,
    Client,
    Damaged,
    Draft,
    Progress,
    Refused,
    Rejected,
    Step,
    Transferred,
    documents,
    parts,
    tus,
    uploading,
    walk,
)
from modelharbor.db.base import Row
from tests.client.conftest import Quay
from tests.client.gates import Gate

pytestmark = pytest.mark.anyio
MIB = 1024 * 1024
GUARD_SECONDS = 60.0


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the parts of large uploads are kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def filled(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


async def files_of(quay: Quay) -> dict[str, tuple[int, str]]:
    return {row["path"]: (row["size_bytes"], row["sha256"]) for row in await quay.rows("files")}


def right(files: dict[str, bytes]) -> dict[str, tuple[int, str]]:
    return {name: (len(content), sha256(content).hexdigest()) for name, content in files.items()}


async def push(
    url: str, quay: Quay, folder: Path, told: list[Progress] | None = None, **options: Any
) -> tuple[Draft, Transferred]:
    report = (told if told is not None else []).append
    async with asyncio.timeout(GUARD_SECONDS), Client(url, quay.token) as client:
        return await client.upload_folder(folder, "ada/tiny", report=report, **options)


@asynccontextmanager
async def broken_off(quay: Quay, folder: Path, allowed: int, **options: Any) -> AsyncIterator[None]:
    """Within it, a push hangs after so many bytes; at its end, it is given up."""
    async with Gate(quay.served.port).serving() as gate:
        begun = asyncio.Event()
        async with Client(gate.url, quay.token) as client:

            def start(draft: Draft) -> None:
                gate.open(allowed)
                begun.set()

            task = asyncio.create_task(
                client.upload_folder(folder, "ada/tiny", begun=start, **options)
            )
            async with asyncio.timeout(GUARD_SECONDS):
                await begun.wait()
                await gate.held.wait()
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def settled(quay: Quay) -> list[Row]:
    """The uploads, once nobody holds one any more."""
    async with asyncio.timeout(GUARD_SECONDS):
        while await quay.rows("uploads", holder={"$ne": None}):
            await asyncio.sleep(0.02)
    return await quay.rows("uploads", part_of=None)


async def test_a_folder_is_sent_once(quay: Quay, tmp_path: Path) -> None:
    files = {
        "model.bin": os.urandom(9 * MIB + 1),
        "config.json": b'{"a": 1}',
        "sub/b.txt": b"b",
        "sub/same.txt": b"b",
        "empty": b"",
    }
    folder = filled(tmp_path / "model", files)
    told: list[Progress] = []
    size = sum(map(len, files.values()))
    draft, sent = await push(quay.url, quay, folder, told, label="first")
    assert (draft.version.number, draft.version.label, draft.is_same) == (1, "first", False)
    assert (sent.files, sent.size_bytes, sent.moved_bytes) == (5, size, size)
    assert await files_of(quay) == right(files)
    [model] = await quay.rows("models")
    assert (model["visibility"], model["name"]) == ("PRIVATE", "tiny")
    done = [now for now in told if now.step is Step.DONE]
    assert sorted(now.path for now in done) == sorted(files)
    assert sum(now.total for now in done) == size

    # The same contents go to another version without a byte, the large file's too.
    again, nothing = await push(quay.url, quay, folder, new=True)
    assert (again.version.number, nothing.moved_bytes, nothing.skipped_files) == (2, 0, 5)
    assert {row["protocol"] for row in await quay.rows("uploads", version_id={"$ne": None})} == {
        "TUS",
        "INSTANT",
    }


async def test_what_was_published_with_the_same_contents_is_found(
    quay: Quay, tmp_path: Path
) -> None:
    folder = filled(tmp_path / "model", {"a.txt": b"a", "b.txt": b"bb"})
    async with quay.working(), Client(quay.url, quay.token) as client:
        draft, _ = await client.upload_folder(folder, "ada/tiny", visibility="PUBLIC")
        version, job = await client.publish(draft.version)
        steps = [step.status async for step in client.follow(version.id, job)]
        assert steps[-1] == "READY"
        same, sent = await client.upload_folder(folder, "ada/tiny")
        assert (same.is_same, same.version.id) == (True, version.id)
        assert sent == Transferred(2, 3, 0, 2)
        assert await client.publish(same.version, ["prod"]) == (same.version, None)
        (folder / "b.txt").write_bytes(b"cc")  # of the same length
        other, sent = await client.upload_folder(folder, "ada/tiny")
        assert (other.version.number, sent.moved_bytes) == (2, 2)
    [model] = await quay.rows("models")
    assert model["visibility"] == "PUBLIC"
    assert [alias["name"] for alias in model["aliases"]] == ["prod"]


async def test_a_push_that_was_given_up_goes_on(quay: Quay, tmp_path: Path) -> None:
    files = {"model.bin": os.urandom(24 * MIB), "a.txt": b"a", "b.txt": b"b"}
    folder = filled(tmp_path / "model", files)
    async with broken_off(quay, folder, 10 * MIB):
        pass
    [upload] = [row for row in await settled(quay) if row["path"] == "model.bin"]
    received = upload["received_bytes"]
    assert 9 * MIB < received <= 11 * MIB
    draft, sent = await push(quay.url, quay, folder)
    assert (draft.is_resumed, draft.version.number) == (True, 1)
    assert sent.moved_bytes <= 24 * MIB - received + 2
    assert await files_of(quay) == right(files)
    assert len(await quay.rows("versions")) == 1


@pytest.mark.parametrize("change", ["size", "contents", "label", "missing", "new"])
async def test_only_the_same_folder_goes_on(quay: Quay, tmp_path: Path, change: str) -> None:
    files = {"model.bin": os.urandom(12 * MIB), "a.txt": b"a"}
    folder = filled(tmp_path / "model", files)
    begun, _ = await push(quay.url, quay, filled(tmp_path / "part", {"a.txt": b"a"}))
    async with Client(quay.url, quay.token) as client:
        file = {"path": "model.bin", "sizeBytes": str(12 * MIB)}
        input = {"versionId": begun.version.id, "files": [file]}
        await client.mutate(documents.CREATE_UPLOADS, input)
    match change:
        case "size":
            files["model.bin"] += b"x"
        case "contents":
            files["a.txt"] = b"b"
        case "missing":
            del files["a.txt"]
            (folder / "a.txt").unlink()
    filled(folder, files)
    draft, _ = await push(
        quay.url, quay, folder, label="x" if change == "label" else None, new=change == "new"
    )
    assert (draft.is_resumed, draft.version.number) == (False, 2)
    version = draft.version
    [second] = await quay.rows("versions", number=2)
    found = await quay.rows("files", version_id=second["_id"])
    assert {row["path"]: (row["size_bytes"], row["sha256"]) for row in found} == right(files)
    assert version.number == 2


async def test_connections_that_break_cost_little(quay: Quay, tmp_path: Path) -> None:
    files = {"model.bin": os.urandom(20 * MIB)}
    folder = filled(tmp_path / "model", files)
    async with Gate(quay.served.port).serving() as gate:
        pushing = asyncio.create_task(
            push(gate.url, quay, folder, begun=lambda draft: gate.open(4 * MIB))
        )
        async with asyncio.timeout(GUARD_SECONDS):
            for _ in range(3):
                await gate.held.wait()
                gate.cut()
                gate.open(4 * MIB)
            await gate.held.wait()
            gate.open()
            _, sent = await pushing
    assert await files_of(quay) == right(files)
    assert gate.passed <= 20 * MIB  # beside what is free
    assert sent.moved_bytes >= 20 * MIB


async def test_contents_that_turn_up_meanwhile_end_the_sending(
    quay: Quay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "SOON_BYTES", 0)  # bytes begin before the hash is known
    content = os.urandom(40 * MIB)
    await quay.store("other", {"stored.bin": content})
    folder = filled(tmp_path / "model", {"model.bin": content})
    async with Gate(quay.served.port).serving() as gate:

        def slow(draft: Draft) -> None:
            gate.open(2 * MIB)

        pushing = asyncio.create_task(push(gate.url, quay, folder, begun=slow))
        async with asyncio.timeout(GUARD_SECONDS):
            _, sent = await pushing
    assert sent.moved_bytes < 40 * MIB
    [upload] = await settled(quay)
    assert (upload["state"], upload["sha256"]) == ("COMPLETED", sha256(content).hexdigest())
    assert upload["received_bytes"] < 40 * MIB or upload["protocol"] == "INSTANT"


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few megabytes are sent in parts."""
    monkeypatch.setattr(uploading, "PARTED_BYTES", 9 * MIB)
    monkeypatch.setattr(uploading, "PIECE_BYTES", MIB)
    monkeypatch.setattr(tus, "PIECE_BYTES", MIB)


@pytest.mark.usefixtures("parted")
async def test_a_large_file_goes_in_parts(quay: Quay, tmp_path: Path, state: Path) -> None:
    files = {"model.bin": os.urandom(13 * MIB + 5), "a.txt": b"a"}
    folder = filled(tmp_path / "model", files)
    async with quay.working():
        _, sent = await push(quay.url, quay, folder)
    assert sent.moved_bytes == 13 * MIB + 6
    assert await files_of(quay) == right(files)
    [whole] = await quay.rows("uploads", path="model.bin", part_of=None)
    assert len(await quay.rows("uploads", part_of=whole["_id"])) == 4
    assert [at for at in state.rglob("*") if at.is_file()] == []


@pytest.mark.usefixtures("parted")
@pytest.mark.parametrize("is_kept", [True, False])
async def test_parts_go_on_too(quay: Quay, tmp_path: Path, state: Path, is_kept: bool) -> None:
    files = {"model.bin": os.urandom(16 * MIB)}
    folder = filled(tmp_path / "model", files)
    async with broken_off(quay, folder, 9 * MIB):
        pass
    await settled(quay)
    received = sum(
        row["received_bytes"] for row in await quay.rows("uploads", part_of={"$ne": None})
    )
    assert received > 7 * MIB
    if not is_kept:
        for at in state.rglob("*.json"):
            at.unlink()
    async with quay.working():
        draft, sent = await push(quay.url, quay, folder)
    assert draft.is_resumed
    if is_kept:
        assert sent.moved_bytes <= 16 * MIB - received + 64 * 1024
    assert await files_of(quay) == right(files)
    assert [at for at in state.rglob("*") if at.is_file()] == []


@pytest.mark.parametrize("how", ["abort", "expire"])
async def test_an_upload_that_was_ended_is_begun_anew(quay: Quay, tmp_path: Path, how: str) -> None:
    files = {"model.bin": os.urandom(12 * MIB)}
    folder = filled(tmp_path / "model", files)
    async with Gate(quay.served.port).serving() as gate:
        pushing = asyncio.create_task(
            push(gate.url, quay, folder, begun=lambda draft: gate.open(4 * MIB))
        )
        async with asyncio.timeout(GUARD_SECONDS):
            await gate.held.wait()
            gate.cut()
            [upload] = await settled(quay)
            async with Client(quay.url, quay.token) as client:
                if how == "abort":
                    [found] = [one async for one in client.uploads((await latest(client, quay)).id)]
                    await client.mutate(
                        "mutation A($input: AbortUploadInput!) "
                        "{ abortUpload(input: $input) { userErrors { code message path } } }",
                        {"id": found.id},
                    )
                else:
                    await quay.served.database.data["uploads"].update_one(
                        {"_id": upload["_id"]},
                        {"$set": {"state": "EXPIRED", "is_open": False}},
                    )
            gate.open()
            await pushing
    assert await files_of(quay) == right(files)
    states = {row["state"] for row in await settled(quay)}
    assert states == {"ABORTED" if how == "abort" else "EXPIRED", "COMPLETED"}


async def latest(client: Client, quay: Quay) -> Any:
    """The version that is being filled."""
    answer = await client.execute(
        'query { model(owner: "ada", name: "tiny") { versions(first: 1) { nodes { id } } } }'
    )
    return await client.version(answer["model"]["versions"]["nodes"][0]["id"])


async def test_an_upload_that_was_paused_is_told(quay: Quay, tmp_path: Path) -> None:
    folder = filled(tmp_path / "model", {"model.bin": os.urandom(12 * MIB)})
    async with Gate(quay.served.port).serving() as gate:
        pushing = asyncio.create_task(
            push(gate.url, quay, folder, begun=lambda draft: gate.open(4 * MIB))
        )
        async with asyncio.timeout(GUARD_SECONDS):
            await gate.held.wait()
            async with Client(quay.url, quay.token) as client:
                [upload] = [one async for one in client.uploads((await latest(client, quay)).id)]
                await client.mutate(
                    "mutation P($input: PauseUploadInput!) "
                    "{ pauseUpload(input: $input) { userErrors { code message path } } }",
                    {"id": upload.id},
                )
            gate.open()
            with pytest.raises(Rejected) as caught:
                await pushing
    assert caught.value.status == 403
    async with quay.working():
        draft, _ = await push(quay.url, quay, folder)  # goes on with it
    assert draft.is_resumed
    assert [row["state"] for row in await settled(quay)] == ["COMPLETED"]


async def test_a_file_that_changes_becomes_no_file(quay: Quay, tmp_path: Path) -> None:
    folder = filled(tmp_path / "model", {"model.bin": os.urandom(12 * MIB)})
    async with Gate(quay.served.port).serving() as gate:
        pushing = asyncio.create_task(
            push(gate.url, quay, folder, begun=lambda draft: gate.open(4 * MIB))
        )
        async with asyncio.timeout(GUARD_SECONDS):
            await gate.held.wait()
            os.truncate(folder / "model.bin", 6 * MIB)
            gate.open()
            with pytest.raises(Changed):
                await pushing
    assert await files_of(quay) == {}


async def test_an_upload_of_other_contents_is_not_gone_on_with(quay: Quay, tmp_path: Path) -> None:
    folder = filled(tmp_path / "model", {"a.bin": os.urandom(7 * MIB)})
    async with broken_off(quay, folder, 4 * MIB):
        pass
    await settled(quay)
    files = {"a.bin": os.urandom(7 * MIB)}
    filled(folder, files)
    await push(quay.url, quay, folder)
    assert await files_of(quay) == right(files)
    assert sorted(row["state"] for row in await settled(quay)) == ["ABORTED", "COMPLETED"]


async def test_other_contents_on_the_server_are_found(quay: Quay, tmp_path: Path) -> None:
    folder = filled(tmp_path / "model", {"a.txt": b"a", "b.txt": b"b"})
    async with Client(quay.url, quay.token) as client:

        async def spoil(draft: Draft) -> None:
            await quay.served.database.data["files"].update_one(
                {"path": "a.txt"}, {"$set": {"sha256": "0" * 64}}
            )

        draft, _ = await client.upload_folder(folder, "ada/tiny")
        await spoil(draft)
        engine = uploading._Uploading(client, draft.version.id, walk(folder), (), {}, 1, print)
        for entry, upload in zip(
            engine.entries, [one async for one in client.uploads(draft.version.id)], strict=True
        ):
            entry.upload, entry.digest = upload, sha256(entry.file.path[:1].encode()).hexdigest()
        with pytest.raises(Damaged):
            await engine._settle()


async def test_what_is_refused_is_told_whole(
    quay: Quay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await quay.served.database.data["quotas"].insert_one(
        {"_id": quay.served.user_id, "limit_bytes": 3, "reserved_bytes": 0, "open_uploads": 0}
    )
    folder = filled(tmp_path / "model", {"a.txt": b"abcd"})
    with pytest.raises(Refused) as caught:
        await push(quay.url, quay, folder)
    assert caught.value.code == "QUOTA_EXCEEDED"
    assert await quay.rows("uploads") == []
    folder = filled(tmp_path / "clash", {"a.txt": b"a", "A.txt": b"b"})
    with pytest.raises(Refused) as clash:
        await push(quay.url, quay, folder, new=True)
    assert clash.value.code == "ALREADY_EXISTS"
    folder = filled(tmp_path / "named", {"a.txt": b"a", "b:c.txt": b"b"})
    with pytest.raises(Refused, match=r"^'b:c\.txt': The path has U\+003A"):
        await push(quay.url, quay, folder, new=True)
    async with Client(quay.url) as nobody:
        with pytest.raises(Rejected) as unknown:
            await nobody.upload_folder(folder, "ada/tiny")
        assert unknown.value.code == "UNAUTHENTICATED"
    assert await files_of(quay) == {}


async def test_many_small_files_go_in_batches(
    quay: Quay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "BATCH_FILES", 25)
    files = {f"{number:04}.txt": str(number).encode() for number in range(110)}
    folder = filled(tmp_path / "model", files)
    _, sent = await push(quay.url, quay, folder, parallel=8)
    assert (sent.files, sent.moved_bytes) == (110, sum(map(len, files.values())))
    assert await files_of(quay) == right(files)


def test_batches_are_bounded_by_what_a_request_takes(tmp_path: Path) -> None:
    folder = filled(tmp_path, {f"{number}-{'x' * 200}": b"" for number in range(20)})
    entries = [uploading._Entry(file) for file in walk(folder)]
    many = [entry for entry in entries for _ in range(100)]
    batches = list(uploading._batches(many))
    assert [entry for batch in batches for entry in batch] == many
    assert max(map(len, batches)) == 500
    long = [
        uploading._Entry(file.__class__("\u4e2d" * 1000, *rest))
        for file, rest in ((entry.file, (entry.file.base, entry.file.real, 0)) for entry in many)
    ]
    assert max(map(len, uploading._batches(long))) < 140


def test_parts_that_cannot_be_kept_are_begun_anew(state: Path) -> None:
    assert parts.recall("u") is None
    some = [parts.Part("1", 0, 5), parts.Part("2", 5, 9)]
    parts.remember("u", some)
    assert parts.recall("u") == some
    [at] = [at for at in state.rglob("*") if at.is_file()]
    for content in ("", "{}", "[1]", '[["a", 1]]'):
        at.write_text(content)
        assert not parts.recall("u")
    parts.forget("u")
    parts.forget("u")
    at.parent.rmdir()
    at.parent.write_text("in the way")
    parts.remember("u", some)  # nothing happens
    assert parts.recall("u") is None
