"""`push`."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import orjson
import pytest

from modelharbor.db.jobs import JobState
from modelharbor.http.server import environment
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run
from tests.client.conftest import Quay
from tests.client.gates import Gate
from tests.http.processes import SERVE, free_port
from tests.live.serving import serving
from tests.resolvers.state import everything

pytestmark = pytest.mark.anyio
MIB = 1024 * 1024
GUARD_SECONDS = 90.0
HARMFUL = b"cposix\nsystem\n(S'true'\ntR."
"""A pickle that would run a command; nothing here reads it but the scanner."""


@pytest.fixture
async def quay(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Quay]:
    """Its address and token are in the environment."""
    for name in ("config", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path / name))
    async with serving(settings) as served:
        quay = Quay(served, settings, tmp_path)
        monkeypatch.setenv("MODELHARBOR_URL", quay.url)
        monkeypatch.setenv("MODELHARBOR_TOKEN", quay.token)
        yield quay


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("notes")
    return folder


async def test_a_folder_is_pushed_and_published(run: Run, quay: Quay, folder: Path) -> None:
    async with quay.working():
        done = await run(
            "push", "model", "ada/Tiny", "--alias", "prod", "--alias", "new", "--public"
        )
    [version] = await quay.rows("versions")
    assert done == Done(
        0,
        f"ada/Tiny:1 is READY\ndigest {version['digest']}\n2 files, 7 bytes; 7 of them were sent\n",
        "",
    )
    [model] = await quay.rows("models")
    assert model["visibility"] == "PUBLIC"
    assert sorted(alias["name"] for alias in model["aliases"]) == ["new", "prod"]
    again = await run("push", "model", "ADA/tiny", "--alias", "third")
    assert again == Done(
        0,
        f"ada/Tiny:1 is READY\ndigest {version['digest']}\nThese contents were there already: nothing was added.\n",
        "",
    )
    [model] = await quay.rows("models")
    assert sorted(alias["name"] for alias in model["aliases"]) == ["new", "prod", "third"]
    assert await run("push", "model", "ada/tiny", "--new", "--quiet") == Done(0, "", "")
    assert [row["status"] for row in await quay.rows("versions")] == ["READY", "READY"]


async def test_programs_are_told_in_json(run: Run, quay: Quay, folder: Path) -> None:
    done = await run("push", "model", "ada/tiny", "--no-publish", "--label", "first", "--json")
    assert (done.code, done.err) == (0, "")
    told = orjson.loads(done.out)
    [version] = await quay.rows("versions")
    assert told.pop("id")
    assert told == {
        "reference": "ada/tiny:1",
        "status": version["status"],
        "digest": None,
        "reason": None,
        "is_new": True,
        "is_resumed": False,
        "files": 2,
        "size_bytes": 7,
        "moved_bytes": 7,
        "skipped_files": 0,
        "findings": [],
    }
    assert (version["status"], version["label"]) == ("UPLOADING", "first")
    [model] = await quay.rows("models")
    assert model["visibility"] == "PRIVATE"
    async with quay.working():
        done = await run("push", "model", "ada/tiny", "--label", "first", "--json")
    told = orjson.loads(done.out)
    assert (told["status"], told["is_resumed"], told["moved_bytes"]) == ("READY", True, 0)
    assert len(await quay.rows("versions")) == 1


async def test_what_is_harmful_has_its_own_code(run: Run, quay: Quay, folder: Path) -> None:
    (folder / "model.pkl").write_bytes(HARMFUL)
    async with quay.working():
        done = await run("push", "model", "ada/tiny", "--json")
        again = await run("push", "model", "ada/tiny")
    assert done.code == again.code == 4
    assert orjson.loads(done.out)["status"] == "QUARANTINED"
    assert done.err.startswith("modelharbor: ada/tiny:1 is QUARANTINED")
    assert again.out.startswith("ada/tiny:1 is QUARANTINED\n")
    assert [row["status"] for row in await quay.rows("versions")] == ["QUARANTINED"]
    pulled = await run("pull", "ada/tiny:1", "out")
    assert (pulled.code, pulled.out) == (4, "")
    assert pulled.err.startswith(
        "modelharbor: ada/tiny:1 is QUARANTINED: 1 file is not known to be harmless: model.pkl"
    )
    assert not (folder.parent / "out").exists()


async def test_what_would_be_refused_in_the_end_is_refused_before_a_byte_is_sent(
    run: Run, quay: Quay, folder: Path
) -> None:
    async with quay.working():
        assert (await run("push", "model", "ada/tiny")).code == 0
    (folder / "more.txt").write_text("more")
    await quay.served.database.data["tokens"].update_many({}, {"$pull": {"scopes": "PROMOTE"}})
    done = await run("push", "model", "ada/tiny", "--alias", "prod")
    assert done == Done(
        1,
        "",
        "modelharbor: This needs PROMOTE on ada/tiny, which you or this token have not.\n",
    )
    named = await run("push", "model", "ada/tiny", "--alias", "Prod")
    assert named == Done(1, "", "modelharbor: An alias is written in lower case: use 'prod'.\n")
    assert len(await quay.rows("versions")) == 1


async def test_a_version_that_fails_has_its_own_code(run: Run, quay: Quay, folder: Path) -> None:
    pushing = asyncio.ensure_future(run("push", "model", "ada/tiny"))
    database = quay.served.database
    async with asyncio.timeout(GUARD_SECONDS):
        while not (jobs := await quay.rows("jobs", kind="FINALIZE_VERSION")):
            assert not pushing.done()
            await asyncio.sleep(0.02)
        await database.data["versions"].update_one({}, {"$set": {"status": "FAILED"}})
        await quay.served.become(jobs[0], JobState.CANCELLED)
        done = await pushing
    assert done.code == 5
    assert done.err.startswith("modelharbor: ada/tiny:1 is FAILED")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["missing", "ada/x"], 1, "The folder missing cannot be read: No such file or directory."),
        (["empty", "ada/x"], 1, "The folder has no files (hidden ones are left out)."),
        (["model", "x"], 1, "A model is named as owner/name."),
        (
            ["model", "ada/x:1"],
            1,
            "A model is named as owner/name.",
        ),
        (["model", "nobody/x"], 1, "There is no person or organization of the login 'nobody'."),
        (["model", "ada/x", "--parallel", "0"], 2, None),
        (["model", "ada/x", "--url", "nowhere"], 1, None),
    ],
)
async def test_what_cannot_be_pushed_is_told(
    arguments: list[str],
    code: int,
    line: str | None,
    run: Run,
    quay: Quay,
    folder: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    before = await everything(quay.served.database)
    done = await run("push", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    if line is not None:
        assert done.err == f"modelharbor: {line}\n"
    after = await everything(quay.served.database)
    for name in ("actors", "models", "versions", "files", "uploads", "events"):
        assert after.get(name) == before.get(name)


async def test_without_a_server_or_a_token_nothing_is_pushed(
    run: Run, quay: Quay, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.client.client.FIRST_SECONDS", 0.2)
    gone = await run("push", "model", "ada/x", "--url", f"http://127.0.0.1:{free_port()}")
    assert (gone.code, "does not answer" in gone.err) == (3, True)
    secret = "mh_" + "0" * 24 + "_secret"
    for token in (secret, "x"):
        done = await run("push", "model", "ada/x", "--token", token)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert secret not in done.err
    monkeypatch.delenv("MODELHARBOR_TOKEN")
    nobody = await run("push", "model", "ada/x")
    assert nobody == Done(1, "", "modelharbor: To send files, the server must know who you are.\n")
    assert await quay.rows("models") == []


async def held_up(gate: Gate, process: asyncio.subprocess.Process) -> None:
    """Until what the process sends is held back."""
    while not gate.held.is_set():
        assert process.returncode is None
        await asyncio.sleep(0.01)


async def test_a_push_that_was_killed_goes_on_by_itself(run: Run, quay: Quay, folder: Path) -> None:
    content = os.urandom(24 * MIB)
    (folder / "model.bin").write_bytes(content)
    async with Gate(quay.served.port, allowed=10 * MIB).serving() as gate:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "modelharbor", "push", "model", "ada/tiny"),
            cwd=folder.parent,
            env={**os.environ, "MODELHARBOR_URL": gate.url},
        )
        async with asyncio.timeout(GUARD_SECONDS):
            await held_up(gate, process)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            gate.cut()
            while await quay.rows("uploads", holder={"$ne": None}):
                await asyncio.sleep(0.02)
    [upload] = await quay.rows("uploads", path="model.bin")
    assert upload["received_bytes"] >= 9 * MIB
    async with quay.working():
        done = await run("push", "model", "ada/tiny", "--json")
    told = orjson.loads(done.out)
    assert (told["status"], told["is_resumed"]) == ("READY", True)
    assert told["moved_bytes"] <= 24 * MIB - upload["received_bytes"] + 7
    assert len(await quay.rows("versions")) == 1
    pulled = await run("pull", "ada/tiny", "back", "--quiet")
    assert pulled.code == 0
    assert (folder.parent / "back" / "model.bin").read_bytes() == content


async def test_an_interrupt_says_how_to_go_on(quay: Quay, folder: Path) -> None:
    (folder / "model.bin").write_bytes(os.urandom(12 * MIB))
    async with Gate(quay.served.port, allowed=2 * MIB).serving() as gate:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "modelharbor", "push", "model", "ada/tiny"),
            cwd=folder.parent,
            env={**os.environ, "MODELHARBOR_URL": gate.url},
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(GUARD_SECONDS):
            await held_up(gate, process)
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
    assert process.returncode == 130
    assert err.decode() == (
        "Stopped. The same command goes on from here; what was published is processed by the server all the same.\n"
    )


@contextmanager
def server(settings: Settings, port: int) -> Iterator[None]:
    """A process of its own, killed at the end without a word."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(port), "1"],
        env={**os.environ, **environment(settings)},
    )
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


async def test_a_server_that_is_killed_costs_no_more_than_a_moment(
    run: Run, quay: Quay, folder: Path, settings: Settings
) -> None:
    content = os.urandom(24 * MIB)
    (folder / "model.bin").write_bytes(content)
    port, quick = free_port(), settings.model_copy(update={"upload_lease_seconds": 1.0})
    async with (
        asyncio.timeout(GUARD_SECONDS),
        quay.working(),
        Gate(port, allowed=10 * MIB).serving() as gate,
    ):
        with server(quick, port):
            pushing = asyncio.ensure_future(
                run("push", "model", "ada/tiny", "--json", MODELHARBOR_URL=gate.url)
            )
            while not gate.held.is_set():
                assert not pushing.done(), await pushing
                await asyncio.sleep(0.01)
            # Until what came is on disk, and no transaction is under way: that of a process that was
            # killed stands in the way of others for a while.
            while not (
                await quay.rows("uploads", received_bytes={"$gt": 9 * MIB})
                and len(await quay.rows("files")) == 2
            ):
                await asyncio.sleep(0.02)
        with server(quick, port):
            gate.open()
            done = await pushing
    assert (done.code, done.err) == (0, "")
    told = orjson.loads(done.out)
    assert (told["status"], told["is_resumed"]) == ("READY", False)
    assert gate.passed <= 25 * MIB
    pulled = await run("pull", "ada/tiny", "back", "--quiet")
    assert pulled.code == 0
    assert (folder.parent / "back" / "model.bin").read_bytes() == content
