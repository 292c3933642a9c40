"""Commands that need the client alone do not import the server."""

import subprocess
import sys
from typing import Any

import pytest
from typer.main import get_command

from modelharbor.cli import REMOTE, commands, elsewhere

SCRIPT = """
import sys
from modelharbor.cli import main
sys.argv = ["modelharbor", *sys.argv[1:]]
try:
    main()
finally:
    print(sorted({"beanie", "pymongo", "strawberry", "starlette"} & sys.modules.keys()))
"""


def started(*arguments: str) -> tuple[int, str]:
    """The code, and the last line: what it has imported of what is slow."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(REMOTE))
def test_these_import_nothing_of_the_server(name: str) -> None:
    assert started(name, "--help") == (0, "[]")


def test_they_fail_in_one_line_as_all_do() -> None:
    assert started("push", "missing", "ada/x") == (1, "[]")


def test_all_others_are_found() -> None:
    assert started("jobs", "--help") == (0, "['beanie', 'pymongo', 'starlette', 'strawberry']")


def test_the_two_groups_have_the_same_commands() -> None:
    every: Any = get_command(commands.app)
    remote: Any = get_command(elsewhere.app)
    assert set(remote.commands) == REMOTE
    for name, command in remote.commands.items():
        assert every.commands[name].help == command.help
        assert every.commands[name].epilog == command.epilog
