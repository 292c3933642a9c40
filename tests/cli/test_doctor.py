"""`doctor`."""

import json
from pathlib import Path

import pytest

from modelharbor.cli import doctor
from modelharbor.db.connection import Database
from tests.cli.conftest import Run

pytestmark = pytest.mark.anyio


async def test_findings_are_shown_and_told_to_programs(
    run: Run, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "BUILT", tmp_path / "nowhere")
    shown = await run("doctor")
    assert (shown.code, shown.err) == (0, "")
    lines = [line.rstrip() for line in shown.out.splitlines()]
    assert lines[-2:] == [
        f"warn  graphiql      is not built: index.html missing in {tmp_path}/nowhere",
        " " * 20
        + "Run `make run` in the source tree, install the wheel, or set MODELHARBOR_GRAPHIQL=false.",
    ]
    told = await run("doctor", "--json")
    findings = json.loads(told.out)
    assert told.code == 0
    assert [finding["status"] for finding in findings] == [*["ok"] * 10, "warn"]
    assert findings[2]["name"] == "mongodb"
    assert findings[2]["remedy"] is None


async def test_a_failure_is_an_exit_code(run: Run) -> None:
    silent = {
        "MODELHARBOR_MONGO_URL": "mongodb://127.0.0.1:1/",
        "MODELHARBOR_MONGO_TIMEOUT_SECONDS": "0.2",
    }
    shown = await run("doctor", **silent)
    assert (shown.code, shown.err) == (1, "")
    assert "fail  mongodb     does not answer: 127.0.0.1:1: [Errno 111] " in shown.out
    told = await run("doctor", "--json", **silent)
    assert told.code == 1
    assert [one["status"] for one in json.loads(told.out) if one["name"] == "mongodb"] == ["fail"]
