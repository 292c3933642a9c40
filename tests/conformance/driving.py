"""Runs a script of Node beside a served application, and moves jobs when the script asks for it."""

import asyncio
import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any, Final

from bson import ObjectId

from modelharbor.db.jobs import JobState
from tests.live.serving import Served, id_of

HERE: Final = Path(__file__).parent
GUARD_SECONDS: Final = 60.0


def install() -> None:
    """The clients, at the versions of package-lock.json; once, also where several processes want them."""
    modules = HERE / "node_modules"
    wanted, done = (HERE / "package-lock.json").read_bytes(), modules / "installed.json"
    with (HERE / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_file() or done.read_bytes() != wanted:
            command = ["npm", "ci", "--no-audit", "--no-fund"]
            subprocess.run(command, cwd=HERE, check=True, timeout=300, stdin=subprocess.DEVNULL)
            done.write_bytes(wanted)


class Driver:
    def __init__(self, served: Served) -> None:
        self.served = served
        self.jobs: dict[str, ObjectId] = {}

    async def run(self, script: str) -> Any:
        """What the script found."""
        install()
        process = await asyncio.create_subprocess_exec(
            *("node", script, self.served.http, self.served.ws, self.served.token),
            cwd=HERE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(GUARD_SECONDS):
                async for line in process.stdout:
                    message = json.loads(line)
                    if "found" in message:
                        return message["found"]
                    answer = await getattr(self, message["ask"])(*message["values"])
                    process.stdin.write(json.dumps(answer).encode() + b"\n")
            raise AssertionError(f"{script} ended without results")
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    # ---- what scripts ask for

    async def put(self) -> str:
        job = await self.served.put()
        self.jobs[id_of(job)] = job["_id"]
        return id_of(job)

    async def become(self, id: str, *states: str) -> None:
        await self.served.become({"_id": self.jobs[id]}, *map(JobState, states))

    async def cut(self) -> None:
        """As when a machine goes down."""
        for connection in list(self.served.server.server_state.connections):
            connection.transport.abort()

    async def members(self, wanted: int | None = None) -> int:
        """How many follow; once that is `wanted`."""
        while True:
            found = sum(len(group.members) for group in self.served.live.groups.values())
            if wanted is None or found == wanted:
                return found
            await asyncio.sleep(0.02)
