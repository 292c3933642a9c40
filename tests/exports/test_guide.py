"""The examples of docs/exports.md run as they stand there, one after the other."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from graphql import parse, validate

from modelharbor.db.actors import ActorDocument
from modelharbor.execution.exporting import prepare_export
from modelharbor.schema import core, schema
from modelharbor.settings import Settings
from tests.client.conftest import Quay
from tests.documents import insert_model, insert_version
from tests.live.serving import serving

pytestmark = pytest.mark.anyio
GUARD_SECONDS: Final = 120.0
ROOT: Final = Path(__file__).parents[2]
FENCE: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: Final = FENCE.findall((ROOT / "docs" / "exports.md").read_text())
QUERY, MUTATION = (text for name, text in BLOCKS if name == "graphql")
SHELL: Final = [text for name, text in BLOCKS if name == "sh"]
PYTHON: Final = [text for name, text in BLOCKS if name == "python"]
PRINTED: Final = ["text-generation    7", "READY", "ada/c", "\n7\n", "ada/b", "3 rows, "]
"""What each example in Python prints, in part."""


@pytest.fixture
async def quay(settings: Settings, tmp_path: Path) -> AsyncIterator[Quay]:
    async with serving(settings) as served:
        owner = await ActorDocument.get(served.user_id)
        assert owner is not None
        for name, task, likes in (
            ("a", "text-generation", 3),
            ("b", "text-generation", 4),
            ("c", None, 5),
        ):
            model = await insert_model(owner, name, task=task, stats={"likes": likes})
            await insert_version(served.database, model, {"config.json": 2})
        yield Quay(served, settings, tmp_path)


def test_its_operations_are_valid() -> None:
    for text in (QUERY, MUTATION):
        assert validate(core, parse(text)) == []
    names = [column.name for column in prepare_export(schema, Settings(), QUERY, {}).columns]
    assert names == ["fullName", "task", "createdAt", "tags", "stats", "latestVersion", "versions"]


async def test_its_examples_run(quay: Quay, tmp_path: Path) -> None:
    (tmp_path / "models.graphql").write_text(QUERY)
    assert len(PYTHON) == len(PRINTED)
    async with quay.working():
        by_command, by_curl = SHELL
        assert '{"fullName":"ada/a","task":"text-generation"' in await printed(
            quay, "bash", "-ceu", by_command
        )
        # Together, for pandas and polars take a second to begin.
        whole = await printed(quay, sys.executable, "-c", "\nprint('----')\n".join(PYTHON))
        for found, expected in zip(whole.split("----"), PRINTED, strict=True):
            assert expected in found
        assert await printed(quay, "bash", "-ceu", by_curl) == ""
    assert {at.name for at in tmp_path.iterdir()} >= {
        *("models.parquet", "models.jsonl.zst", "models.csv", "all.parquet", "names.jsonl"),
    }


async def printed(quay: Quay, *command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=quay.folder,
        stdout=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "MODELHARBOR_URL": quay.url,
            "MODELHARBOR_TOKEN": quay.token,
            "XDG_CONFIG_HOME": str(quay.folder / "config"),
        },
    )
    async with asyncio.timeout(GUARD_SECONDS):
        out, _ = await process.communicate()
    assert process.returncode == 0, command
    return out.decode()
