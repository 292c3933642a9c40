"""`pull`."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from modelharbor.cli.bars import Board, shown_bars
from modelharbor.client import Progress, Step
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run
from tests.client.conftest import Quay
from tests.client.strangers import Shop
from tests.http.proxy import Door
from tests.live.serving import Served, serving

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 60.0
MIB = 1024 * 1024


@pytest.fixture
async def served(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    """With a version `ada/Tiny:1`; its address and token are in the environment."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.bin").write_bytes(os.urandom(40 * MIB + 3))
    async with serving(settings) as served:
        monkeypatch.setenv("MODELHARBOR_URL", f"http://127.0.0.1:{served.port}")
        monkeypatch.setenv("MODELHARBOR_TOKEN", served.token)
        files = {at.name: at.read_bytes() for at in source.iterdir()}
        await Quay(served, settings, tmp_path).store("Tiny", files)
        yield served


SIZE = 40 * MIB + 5


async def test_a_version_is_pulled(run: Run, served: Served, tmp_path: Path) -> None:
    done = await run("pull", "ADA/Tiny:1")
    assert done == Done(
        0, f"ada/Tiny:1 is in Tiny\n2 files, {SIZE:,} bytes, every SHA-256 right\n", ""
    )
    for name in ("config.json", "model.bin"):
        assert (tmp_path / "Tiny" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    again = await run("pull", "ada/tiny:1", "Tiny")
    assert again.out.endswith("every SHA-256 right; 2 of them were there\n")
    assert await run("pull", "ada/Tiny", "--quiet") == Done(0, "", "")
    told = await run("pull", "ada/tiny", "other", "--include", "*.json", "--json")
    assert (told.code, told.err) == (0, "")
    assert orjson.loads(told.out) == {
        "reference": "ada/Tiny:1",
        "folder": "other",
        "files": 1,
        "size_bytes": 2,
        "moved_bytes": 2,
        "skipped_files": 0,
    }
    assert [at.name for at in (tmp_path / "other").iterdir()] == ["config.json"]


async def test_what_cannot_be_pulled_is_told(run: Run, served: Served, tmp_path: Path) -> None:
    for arguments, line in (
        (
            ["ada/none"],
            "There is no ada/none with a version that is READY, or it is not yours to see.",
        ),
        (["ada/tiny@prod"], "There is no ada/tiny@prod, or it is not yours to see."),
        (["tiny"], "A model is named as owner/name."),
        (["ada/..@prod"], "A model is named as owner/name."),
        (["ada/tiny", "--include", "*.gguf"], "ada/Tiny:1 has nothing that is named *.gguf."),
    ):
        assert await run("pull", *arguments) == Done(1, "", f"modelharbor: {line}\n")
    secret = "mh_" + "0" * 24 + "_secret"
    done = await run("pull", "ada/tiny", "--token", secret)
    assert done.code == 1
    assert secret not in done.err
    (tmp_path / "file").write_text("x")
    blocked = await run("pull", "ada/tiny", "file")
    assert blocked == Done(1, "", "modelharbor: file: File exists\n")
    assert not any((tmp_path / "tiny").iterdir())


async def test_a_pull_that_was_killed_goes_on(run: Run, served: Served, tmp_path: Path) -> None:
    """The connection falls silent in the middle; then the process is killed, and another goes on."""
    door = Door(served.port)
    await door.open()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "modelharbor", "pull", "ada/tiny", "--parallel", "1"),
        cwd=tmp_path,
        env={**os.environ, "MODELHARBOR_URL": f"http://127.0.0.1:{door.port}"},
    )
    folder = tmp_path / "tiny"
    async with asyncio.timeout(GUARD_SECONDS):
        while not any(
            b"\1" in marks and len(marks) > 1  # of the large file
            for marks in map(Path.read_bytes, folder.glob(".modelharbor-*.map"))
        ):
            assert process.returncode is None
            await asyncio.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await door.close()
    had = {at.name for at in folder.iterdir()}
    if "model.bin" not in had:  # else the kill came too late, which is good too
        done = await run("pull", "ada/tiny", "--json")
        result = orjson.loads(done.out)
        assert result["moved_bytes"] <= SIZE - 16 * MIB
    assert (await run("pull", "ada/tiny", "--quiet")).code == 0
    assert sorted(at.name for at in folder.iterdir()) == ["config.json", "model.bin"]
    assert (folder / "model.bin").read_bytes() == (tmp_path / "source/model.bin").read_bytes()


async def test_an_interrupt_says_how_to_go_on(served: Served, tmp_path: Path) -> None:
    door = Door(served.port)
    door.silent = True
    await door.open()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "modelharbor", "pull", "ada/tiny"),
        cwd=tmp_path,
        env={**os.environ, "MODELHARBOR_URL": f"http://127.0.0.1:{door.port}"},
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(GUARD_SECONDS):
        while not door._writers:
            assert process.returncode is None
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    await door.close()
    assert (process.returncode, err.decode()) == (
        130,
        "Stopped. The same command goes on from here.\n",
    )


def test_bars_sum_up_all_files() -> None:
    with shown_bars(hidden=True) as bars:
        board = Board(bars, "Files", 20, 2000)
        total = bars.tasks[0]
        for number in range(20):
            board.report(Progress(f"[b]{number}", Step.RECEIVING, 40, 100))
        assert len(bars.tasks) == 1 + 6
        assert bars.tasks[1].description == "\\[b]0"
        assert total.completed == 800
        board.report(Progress("[b]0", Step.HASHING, 90, 100))
        assert total.completed == 800
        for number in range(20):
            board.report(Progress(f"[b]{number}", Step.DONE, 100, 100))
        assert (total.completed, total.description, len(bars.tasks)) == (2000, "Files 20 of 20", 1)
        board.end()
        assert bars.tasks == []


async def test_a_server_names_neither_the_folder_nor_commands_of_the_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    shop = Shop({"a.txt": b"a"})
    shop.name = "eve/..\x1b[2J"
    async with shop.open():
        done = await run("pull", "eve/trap", "--url", shop.url)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert "eve/..\ufffd[2J:1 is in trap" in done.out
    assert [at.name for at in (tmp_path / "inner").iterdir()] == ["trap"]
    assert {at.name for at in tmp_path.iterdir()} == {"inner"}


@pytest.mark.parametrize("command", ["push", "pull", "login"])
async def test_exit_codes_are_documented(command: str, run: Run) -> None:
    told = " ".join((await run(command, "--help")).out.replace("\u2502", "").split())
    assert "3 the server cannot be reached" in told
    assert ("4 the version is quarantined; 5 the version failed" in told) == (command != "login")
