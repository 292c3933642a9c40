"""The clients of docs/live.md do what it says."""

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Final

import pytest

from modelharbor.db.jobs import JobState
from tests.conformance.driving import GUARD_SECONDS, HERE, Driver, install
from tests.live.serving import id_of

pytestmark = pytest.mark.anyio
TEXT: Final = (Path(__file__).parents[2] / "docs" / "live.md").read_text()
FENCE: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS: Final = [(name, text) for name, text in FENCE.findall(TEXT)]
QUERY: Final = next(text for name, text in BLOCKS if name == "graphql")
EXAMPLES: Final = [each for each in BLOCKS if each[0] in {"js", "python", "sh"}]
NODE: Final = "globalThis.WebSocket ??= (await import('ws')).WebSocket;\n"


async def test_every_example_follows_a_job_to_its_end(driver: Driver, tmp_path: Path) -> None:
    assert [name for name, _ in EXAMPLES] == ["js", "js", "js", "python", "sh"]
    install()
    for name, text in EXAMPLES:
        await follows(driver, name, text.replace("127.0.0.1:8000", f"127.0.0.1:{driver.served.port}"), tmp_path)  # fmt: skip


async def follows(driver: Driver, name: str, text: str, folder: Path) -> None:
    served = driver.served
    job = await served.put()
    given = {"token": served.token, "id": id_of(job), "query": QUERY}
    if name == "sh":
        command, script = ["bash", "-c", text], None
    else:
        start = ["const "] if name == "js" else [""]
        lines = [f"{start[0]}{key} = {value!r};\n" for key, value in given.items()]
        # Node looks for packages beside the script.
        script = (HERE if name == "js" else folder) / f".example.{'mjs' if name == 'js' else 'py'}"
        script.write_text((NODE if name == "js" else "") + "".join(lines) + text)
        command = ["node" if name == "js" else sys.executable, str(script)]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TOKEN": served.token, "ID": id_of(job)},
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(GUARD_SECONDS):
            for state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED):
                if state is not JobState.QUEUED:
                    await served.become(job, state)
                while state.value not in (line := (await process.stdout.readline()).decode()):
                    assert line, (name, state)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        if script is not None:
            script.unlink()
