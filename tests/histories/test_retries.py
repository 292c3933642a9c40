"""Who asks for a change that is there already is told that it is: from then on nothing older is answered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from .asked import Asking
from .clients import Log, opened
from .run import Stage, stage
from .world import ANYBODY, make_world

pytestmark = pytest.mark.anyio
GUARD_SECONDS: Final = 90.0
LIKE: Final = """mutation Like($input: LikeModelInput!) {
  likeModel(input: $input) { model { stats { likes } } userErrors { code } }
}"""


@asynccontextmanager
async def deaf(staged: Stage) -> AsyncIterator[None]:
    """Streams that wait for what comes hear nothing."""
    data = {
        "failCommands": ["getMore"],
        "appName": "modelharbor",
        "blockConnection": True,
        "blockTimeMS": 5000,
    }
    engines = staged.engines
    await engines.admin("configureFailPoint", "failCommand", mode="alwaysOn", data=data)
    await asyncio.sleep(0.3)  # what waited before has come back
    try:
        yield
    finally:
        await engines.admin("configureFailPoint", "failCommand", mode="off")


async def test_a_change_that_another_made_and_could_not_acknowledge(tmp_path: Path) -> None:
    """A server is killed after its commit; the client comes again, to another one."""
    async with stage(tmp_path, servers=1) as staged, asyncio.timeout(GUARD_SECONDS):
        world = await make_world(staged.database, Random(1), 3)
        model, bob = world.models["m0"], world.people["bob"]
        question = Asking(world, ANYBODY).one(model)
        asked = {"query": question.document, "variables": dict(question.variables)}
        async with opened(world, staged.database, list(staged.processes), Log(), 0) as clients:
            [connections] = clients.connections.values()

            async def likes() -> tuple[str, Any]:
                answer = await connections.post(asked, {})
                return answer.layer, answer.json["data"]["model"]["stats"]["likes"]

            while await likes() != ("l1", 0):
                await asyncio.sleep(0.05)
            async with deaf(staged):
                like = {"user_id": bob.id, "model_id": model.id}
                await staged.database.data["likes"].insert_one(like)
                await staged.database.data["models"].update_one(
                    {"_id": model.id}, {"$inc": {"stats.likes": 1}}
                )
                body = {"query": LIKE, "variables": {"input": {"id": model.global_id}}}
                told = await connections.post(body, {"authorization": f"Bearer {bob.token}"})
                assert told.json["data"]["likeModel"]["model"]["stats"]["likes"] == 1
                for _ in range(20):
                    _, found = await likes()
                    assert found == 1
                    await asyncio.sleep(0.02)
