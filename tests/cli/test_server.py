"""`dev`, `serve`, and what every command has in common."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import typer

from modelharbor.cli.commands import app
from modelharbor.http.server import environment
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run

pytestmark = pytest.mark.anyio
PATIENCE_SECONDS = 60  # a guard against hanging


async def test_help_names_every_command(run: Run) -> None:
    whole = await run("--help")
    assert (whole.code, whole.err) == (0, "")
    assert await run() == whole
    for words in (
        "dev Start engines, demo data and server on your own machine. Never for production.",
        "serve Serve the API until SIGINT or SIGTERM.",
        "worker Run jobs until SIGINT or SIGTERM; then let them end for a while, and hand the rest back.",
        "purge Rid a cache in front of the server of what has changed, until SIGINT or SIGTERM.",
        "migrate Bring the database to this version's shape.",
        "seed Fill the database with demo data, shaped like a real hub.",
        "import Register a folder as a new version of a model.",
        "push Send a folder as a new version of a model, and publish it.",
        "pull Fetch the files of a version into a folder, and verify each.",
        "export Write all rows of a query to a file.",
        "login Store a server's address and your token, once the server has taken it.",
        "logout Forget the stored address and token.",
        "user People.",
        "org Organizations.",
        "member Who belongs to an organization, and as what.",
        "token API tokens.",
        "schema The served GraphQL schema.",
        "persisted Published operations: those that clients run by their ids.",
        "jobs Jobs: long work that workers do.",
        "reindex Count anew what models keep of their versions, files and owners, as a job.",
        "collect-garbage Remove what nobody needs any more, as a job: old contents, tokens, jobs, deleted models.",
        "verify-blobs Read stored contents again and compare them with their hashes, as a job.",
        "plan Show how an operation runs: its reads, and the function that its document is compiled to.",
        "doctor Check engines, indexes and storage, and say what to do.",
    ):
        assert words in " ".join(whole.out.replace("│", "").split())


def test_every_command_and_option_is_explained() -> None:
    command = typer.main.get_command(app)
    waiting, seen = [command], 0
    while waiting:
        group = waiting.pop()
        for name, inner in getattr(group, "commands", {}).items():
            assert inner.help, name
            for parameter in inner.params:
                assert getattr(parameter, "help", None), (name, parameter.name)
            waiting.append(inner)
            seen += 1
    assert seen == 50


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fly"], "No such command 'fly'. (--help tells more)"),
        (["user"], "Missing command. (--help tells more)"),
        (
            ["user", "list", "--jason"],
            "No such option: --jason (Possible options: --json) (--help tells more)",
        ),
    ],
)
async def test_a_mistyped_command_is_told_in_one_line(
    arguments: list[str], line: str, run: Run
) -> None:
    assert await run(*arguments) == Done(2, "", f"modelharbor: {line}\n")


async def test_engines_that_do_not_answer_are_told_in_one_line(run: Run) -> None:
    done = await run(
        *("user", "list"),
        MODELHARBOR_MONGO_URL="mongodb://ada:hidden@127.0.0.1:1/",
        MODELHARBOR_MONGO_TIMEOUT_SECONDS="0.2",
    )
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith("modelharbor: MongoDB does not answer (127.0.0.1:1: ")
    assert done.err.endswith("): start it, or say where it is with MODELHARBOR_MONGO_URL.\n")
    assert "hidden" not in done.err


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("MONGO_URL", "mongodb://host:99999/", "Port must be an integer between 0 and 65535"),
        ("REDIS_URL", "http://host", "Value error, begins with none of redis://, rediss://"),
        ("REDIS_URL", "redis://host:port/0", "Value error, its port is no number"),
        ("MAX_DEPTH", "deep", "Input should be a valid integer, unable to parse string"),
    ],
)
async def test_a_wrong_setting_is_named(name: str, value: str, line: str, run: Run) -> None:
    done = await run("user", "list", **{f"MODELHARBOR_{name}": value})
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith(f"modelharbor: MODELHARBOR_{name}: {line}")


async def test_a_list_that_is_no_json_is_told(run: Run) -> None:
    assert await run("user", "list", MODELHARBOR_ALLOWED_HOSTS="example.org") == Done(
        1,
        "",
        'modelharbor: error parsing value for field "allowed_hosts" from source'
        ' "EnvSettingsSource": lists and maps are JSON, such as ["a", "b"] and'
        ' {"disk": "/srv/models"}\n',
    )


async def test_a_taken_port_is_refused(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert await run("serve", "--port", port) == Done(
            1,
            "",
            f"modelharbor: 127.0.0.1 port {port} cannot be used (Address already in use):"
            " choose another with --host and --port.\n",
        )
        # It handles signals, so it needs the main thread of a process.
        dev = subprocess.run(
            [
                sys.executable,
                "-m",
                "modelharbor",
                "dev",
                "--port",
                port,
                "--data",
                tmp_path / "dev",
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert (dev.returncode, dev.stdout, dev.stderr.count("\n")) == (1, "", 1)
        assert dev.stderr.startswith(f"modelharbor: port {port} cannot be used")
    assert not (tmp_path / "secret.key").exists()


async def test_a_data_folder_that_cannot_be_written_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "data"
    done = await run("serve", "--port", str(free_port()), MODELHARBOR_DATA_PATH=str(path))
    assert done == Done(1, "", f"modelharbor: {path}: Not a directory\n")


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_it_serves_until_it_is_told_to_end(
    workers: str, settings: Settings, tmp_path: Path
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "modelharbor", "serve", "--workers", workers]
    with (
        (tmp_path / "server.log").open("wb") as log,
        subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, **environment(settings)},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            assert answers(port), (tmp_path / "server.log").read_text()
            process.send_signal(signal.SIGTERM)
            # A worker of its own ends by the signal itself, one of several is ended in order.
            assert process.wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM)
        finally:
            process.kill()
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600
    told = (tmp_path / "server.log").read_text()
    assert "http.request" in told
    assert "Finished server process" in told


def answers(port: int) -> bool:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        try:
            found = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return found.status_code == 200
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
