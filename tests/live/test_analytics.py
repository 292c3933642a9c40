"""Changes of use over WebSocket, end to end."""

from datetime import UTC, datetime

import pytest

from modelharbor.db.usage import UsageKind
from modelharbor.execution.groups import Group
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model
from tests.execution.test_live import until
from tests.usage import insert_usage, roll_up, usage

from .client import open_client
from .conftest import Served

pytestmark = pytest.mark.anyio
FOLLOW = """subscription A($after: Cursor) {
  analytics(metrics: [DOWNLOADS], intervalSeconds: 1, after: $after) { cursor value }
}"""


def place(group: Group) -> bool:
    """Whether somebody follows by now."""
    return any(member.place is not None for member in group.members)


async def test_who_comes_back_is_told_what_was_added_since(
    served: Served, live_settings: Settings
) -> None:
    model = await insert_model(await insert_actor("owner"), "model")

    async def download(count: int) -> None:
        at = datetime.now(UTC)
        event = usage(UsageKind.DOWNLOAD, at, model=model.id, count=count, bytes=1)
        await insert_usage(served.database, [event])
        await roll_up(served.database, live_settings)

    async with open_client(served.ws, served.token) as client:
        await client.subscribe("1", FOLLOW)
        await until(lambda: any(place(each) for each in served.live.groups.values()))
        await download(3)
        first = (await client.next())["analytics"]
        assert first["value"] == 3.0
    await download(20)
    await download(100)
    async with open_client(served.ws, served.token) as client:
        await client.subscribe("1", FOLLOW, after=first["cursor"])
        assert (await client.next())["analytics"]["value"] == 120.0
