"""`modelharbor dev` as a person starts it: a process of its own, on real engines."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from modelharbor.db.actors import ActorDocument, ActorKind
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument
from modelharbor.db.tokens import Permission, TokenDocument
from modelharbor.dev import run as subject
from modelharbor.dev.demo import add_usage
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model

PATIENCE_SECONDS = 120  # a guard against hanging
PROGRAM = """
import sys
from pathlib import Path
from modelharbor.dev.run import run_dev
sys.exit(run_dev(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
"""


@dataclass
class Started:
    process: "subprocess.Popen[str]"
    printed: str
    url: str
    token: str
    family: list[psutil.Process]  # itself and all that it started

    def ask(self, query: str, token: str | None = None, **headers: str) -> httpx.Response:
        return httpx.post(
            f"{self.url}/graphql",
            json={"query": query},
            headers={"Authorization": f"Bearer {token or self.token}", **headers},
            trust_env=False,
            timeout=PATIENCE_SECONDS,
        )

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def left(self) -> list[psutil.Process]:
        """Who still lives, after those who were told to end have had their time."""
        return psutil.wait_procs(self.family, timeout=PATIENCE_SECONDS)[1]


def lives(process: psutil.Process) -> bool:
    """Also in a container whose first process collects nobody."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def command(port: int, data: Path, models: int) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(port), str(data), str(models)]


def environment(**settings: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODELHARBOR_", "MAKE"))}
    return {**kept, **settings}


@contextmanager
def start(port: int, data: Path, models: int, **settings: str) -> Iterator[Started]:
    """Running and ready; killed with all its family if the test did not end it."""
    with subprocess.Popen(
        command(port, data, models), env=environment(**settings), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        family = [psutil.Process(process.pid)]
        try:
            printed = ""
            while "  Log  " not in printed:
                line = process.stdout.readline()
                assert line, f"ended after printing {printed!r}"
                printed += line
            family += family[0].children(recursive=True)
            found = re.search(
                r"GraphiQL +(http://127\.0\.0\.1:\d+)/graphiql#token=(mh_\S+)", printed
            )
            assert found
            yield Started(process, printed, found[1], found[2], family)
        finally:
            for member in family:
                if member.is_running():
                    member.kill()


def refused(port: int, data: Path, **settings: str) -> str:
    """What it says when it does not start, which is one line, on stderr alone, and exit code 1."""
    done = subprocess.run(
        command(port, data, 5),
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, ""), done
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_starts_ends_and_starts_again_with_its_data(port: int, tmp_path: Path) -> None:
    count = "{ viewer { login } models { totalCount } }"
    with start(port, tmp_path, 25) as first:
        url = f"http://127.0.0.1:{port}"
        mongo_port = (tmp_path / "dev" / "engines" / "mongod.port").read_text()
        assert first.printed == (
            f"\n  modelharbor is ready. Ctrl-C ends it.\n\n"
            f"  GraphiQL   {url}/graphiql#token={first.token}\n"
            f"  GraphQL    {url}/graphql\n"
            f"  Health     {url}/healthz and {url}/readyz\n"
            f"  MongoDB    mongodb://127.0.0.1:{mongo_port}/?replicaSet=rs0\n"
            f"  Shell      . {tmp_path}/dev/env (before other commands)\n"
            f"  Token      {first.token} (admin; a new one at each start)\n"
            f"  Data       {tmp_path}\n"
            f"  Log        {tmp_path}/dev/server.log\n"
        )
        shell = (tmp_path / "dev" / "env").read_text().splitlines()
        assert shell[:2] == [
            f"export MODELHARBOR_DATA_PATH={tmp_path}",
            f"export MODELHARBOR_MONGO_URL='mongodb://127.0.0.1:{mongo_port}/?replicaSet=rs0'",
        ]
        assert shell[2].startswith("export MODELHARBOR_REDIS_URL=redis://127.0.0.1:")
        assert len(first.family) >= 5  # itself, server, worker, mongod, redis-server
        answer = first.ask(count).json()
        assert answer["data"]["viewer"]["login"] == "admin"
        assert answer["data"]["models"]["totalCount"] == 25
        assert first.ask(count, Host="rebound.example").status_code == 400
        assert first.ask(count, Host=f"localhost:{port}").status_code == 200
        assert first.token not in (tmp_path / "dev" / "server.log").read_text()
        until = time.monotonic() + PATIENCE_SECONDS
        while "job.succeeded" not in (tmp_path / "dev" / "worker.log").read_text():
            assert time.monotonic() < until  # the garbage of the day is collected first of all
            time.sleep(0.05)
        assert first.stop(signal.SIGTERM) == 0
        assert first.left() == []
    # From a shell that has read the file of engines that are gone by now.
    assignments = [line.removeprefix("export ").partition("=") for line in shell]
    read = {name: shlex.split(value)[0] for name, _, value in assignments}
    with start(port, tmp_path, 25, **read) as second:
        assert second.token != first.token
        assert second.ask(count).json() == answer
        assert second.ask(count, token=first.token).status_code == 401
        assert second.stop(signal.SIGINT) == 0
        assert second.left() == []


def test_after_a_kill_the_next_start_finds_a_free_port_and_leaves_no_process(
    port: int, tmp_path: Path
) -> None:
    with start(port, tmp_path, 5) as first:
        first.process.kill()
        first.process.wait(PATIENCE_SECONDS)
        with start(port, tmp_path, 5) as second:
            assert [member for member in first.family if lives(member)] == []
            assert second.ask("{ models { totalCount } }").json() == {
                "data": {"models": {"totalCount": 5}}
            }
            assert second.stop(signal.SIGTERM) == 0
            assert second.left() == []


def test_an_engine_that_dies_ends_everything_in_one_line(port: int, tmp_path: Path) -> None:
    with start(port, tmp_path, 0) as started:
        (mongod,) = [member for member in started.family if member.name() == "mongod"]
        mongod.kill()
        assert started.process.wait(PATIENCE_SECONDS) == 1
        assert started.left() == []


def test_a_worker_that_dies_ends_everything_in_one_line(port: int, tmp_path: Path) -> None:
    with start(port, tmp_path, 0) as started:
        (worker,) = [each for each in started.family if each.cmdline()[-1:] == ["worker"]]
        worker.kill()
        assert started.process.wait(PATIENCE_SECONDS) == 1
        assert started.left() == []


def test_a_second_one_on_the_same_folder_is_refused(port: int, tmp_path: Path) -> None:
    with start(port, tmp_path, 0) as started:
        assert refused(port, tmp_path) == (
            f"modelharbor: {tmp_path}/dev is in use by process {started.process.pid}:"
            " stop it or choose another folder"
        )
        assert started.ask("{ viewer { login } }").status_code == 200


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        line = refused(number, tmp_path)
    assert line.startswith(f"modelharbor: port {number} cannot be used ([Errno 98] Address already")
    assert not (tmp_path / "dev" / "engines").exists()


@pytest.mark.parametrize("number", [-1, 65536])
def test_a_port_that_is_none_is_refused(number: int, tmp_path: Path) -> None:
    assert refused(number, tmp_path).startswith(f"modelharbor: port {number} cannot be used")


def test_a_folder_that_cannot_be_written_is_refused(port: int, tmp_path: Path) -> None:
    """Below a file: there even root cannot write."""
    (tmp_path / "file").write_text("")
    assert refused(port, tmp_path / "file" / "data") == (
        f"modelharbor: {tmp_path}/file/data/dev cannot be used: Not a directory"
    )


def test_a_wrong_setting_is_named(port: int, tmp_path: Path) -> None:
    assert refused(port, tmp_path, MODELHARBOR_MAX_DEPTH="deep") == (
        "modelharbor: MODELHARBOR_MAX_DEPTH: Input should be a valid integer,"
        " unable to parse string as an integer"
    )


def test_a_mongodb_of_yours_that_does_not_answer_is_told_in_one_line(
    port: int, tmp_path: Path
) -> None:
    line = refused(
        port,
        tmp_path,
        MODELHARBOR_MONGO_URL="mongodb://127.0.0.1:1/?replicaSet=rs0",
        MODELHARBOR_MONGO_TIMEOUT_SECONDS="0.2",
    )
    assert line.startswith("modelharbor: MongoDB does not do its part: ")


@pytest.mark.anyio
async def test_a_token_of_each_start_ends_with_the_next(database: Database) -> None:
    await subject._admin_token(database)
    await subject._admin_token(database)
    admin = await ActorDocument.find_one({"login_lower": "admin"})
    assert admin is not None
    assert (admin.kind, admin.is_operator) == (ActorKind.USER, True)
    tokens = await TokenDocument.find({"user_id": admin.id}).sort("_id").to_list()
    assert [token.revoked_at is None for token in tokens] == [False, True]
    assert [token.scopes for token in tokens] == [list(Permission)] * 2


async def counted(database: Database) -> dict[str, Any]:
    return {
        "models": await database.data["models"].count_documents({}),
        "marked": [row["arguments"]["models"] async for row in database.data["seeds"].find()],
    }


@pytest.mark.anyio
async def test_demo_data_follows_the_number_asked_for(
    database: Database, settings: Settings
) -> None:
    for models in (3, 3, 4):
        await subject._seed(database, settings, models)
        await subject._admin_token(database)
        assert await counted(database) == {"models": models, "marked": [models]}
    # As a seeding leaves it that was killed before all rows were there.
    await database.data["seeds"].update_one(
        {}, {"$set": {"complete": False}, "$unset": {"usage_until": ""}}
    )
    await database.data["models"].delete_one({})
    await subject._seed(database, settings, 4)
    assert await counted(database) == {"models": 4, "marked": [4]}
    await subject._seed(database, settings, 0)
    assert await counted(database) == {"models": 0, "marked": []}


@pytest.mark.anyio
async def test_stopped_while_its_usage_comes_the_demo_is_not_made_again(
    database: Database, settings: Settings
) -> None:
    assert await subject._seed(database, settings, 3) is not None
    made = await database.data["seeds"].find_one()
    usage = await subject._seed(database, settings, 3)
    assert usage is not None
    assert await database.data["seeds"].find_one() == made
    # Also where there is something of yours by then.
    await insert_model(await insert_actor("ada"), "mine")
    for models in (3, 4):
        usage = await subject._seed(database, settings, models)
        assert usage is not None
        assert await database.data["seeds"].find_one() == made
    await add_usage(database, usage)
    assert await database.data["rollup_days"].count_documents({}) > 0
    assert await subject._seed(database, settings, 3) is None
    assert await counted(database) == {"models": 4, "marked": [3]}


@pytest.mark.anyio
@pytest.mark.parametrize("before", [0, 3])
async def test_what_is_yours_is_never_removed(
    before: int, database: Database, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    if before:
        await subject._seed(database, settings, before)
    owner = ActorDocument(kind=ActorKind.USER, login="ada", login_lower="ada")
    await owner.insert()
    await ModelDocument(
        owner_id=owner.id,
        owner_login="ada",
        owner_login_lower="ada",
        owner_kind=ActorKind.USER,
        name="mine",
        name_lower="mine",
    ).insert()
    await subject._seed(database, settings, 7)
    assert await counted(database) == {"models": before + 1, "marked": [before] if before else []}
    assert ("the demo data stays at 3 models" in capsys.readouterr().err) == bool(before)
