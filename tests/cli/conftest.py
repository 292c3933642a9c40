"""The command line in this process, with the settings of the test in its environment."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest
from typer.testing import CliRunner

from modelharbor.cli.commands import app
from modelharbor.http.server import environment
from modelharbor.settings import Settings


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run: TypeAlias = Callable[..., Awaitable[Done]]


@pytest.fixture
def run(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`await run("user", "list", MODELHARBOR_…=…)`; what is not expected is raised here. `input` is read
    by the command."""
    monkeypatch.chdir(tmp_path)  # where no .env lies
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)

    async def call(*arguments: str, input: str | None = None, **variables: str) -> Done:
        # Commands have an event loop of their own, which needs a thread of its own.
        result = await asyncio.to_thread(
            CliRunner().invoke,
            app,
            list(arguments),
            input=input,
            env={"COLUMNS": "200", **variables},
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return call
