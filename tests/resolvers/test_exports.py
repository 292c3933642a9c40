"""How many exports one person has."""

import asyncio

import pytest

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.errors import ErrorCode, Refused
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.resolvers.exports import put_export
from modelharbor.resolvers.jobs import cancel_job, retry_job
from modelharbor.settings import Settings
from tests.documents import insert_actor, viewer_of

pytestmark = pytest.mark.anyio
AT_ONCE = 12


async def put(database: Database, viewer: Viewer, settings: Settings, key: str | None) -> Row:
    return await put_export(
        database,
        viewer,
        settings,
        query="{ models { nodes { id } } }",
        variables={},
        format=ExportFormat.JSONL,
        compression=Compression.NONE,
        base_url="http://test",
        idempotency_key=key,
    )


async def test_many_at_once_come_to_no_more_than_the_limit(
    database: Database, settings: Settings
) -> None:
    """Half of them in processes of their own, which do not wait for each other's turn."""
    viewer, bob = viewer_of(await insert_actor("ada")), viewer_of(await insert_actor("bob"))
    others = [
        Database(database.client, database.data, database.query_timeout_ms)
        for _ in range(AT_ONCE // 2)
    ]
    places = [*others, *[database] * (AT_ONCE - len(others))]
    asked = [put(place, viewer, settings, None) for place in places]
    found = await asyncio.gather(*asked, return_exceptions=True)
    refused = [each for each in found if isinstance(each, Refused)]
    assert {each.code for each in refused} == {ErrorCode.QUOTA_EXCEEDED}
    assert len(refused) == AT_ONCE - settings.max_exports
    assert await database.count("jobs", {}) == settings.max_exports
    await put(database, bob, settings, None)


async def test_those_that_are_tried_again_count_too(database: Database, settings: Settings) -> None:
    viewer = viewer_of(await insert_actor("ada"))
    one = settings.model_copy(update={"max_exports": 1})
    first = await put(database, viewer, one, None)
    await cancel_job(database, viewer, job_id=first["_id"])
    second = await put(database, viewer, one, None)
    with pytest.raises(Refused) as refused:
        await retry_job(database, viewer, job_id=first["_id"], max_exports=1)
    assert refused.value.code is ErrorCode.QUOTA_EXCEEDED
    await cancel_job(database, viewer, job_id=second["_id"])
    again = await retry_job(database, viewer, job_id=first["_id"], max_exports=1)
    assert again["state"] == "QUEUED"


async def test_one_key_at_once_is_one_export(database: Database, settings: Settings) -> None:
    viewer = viewer_of(await insert_actor("ada"))
    one = settings.model_copy(update={"max_exports": 1})
    places = [Database(database.client, database.data, database.query_timeout_ms) for _ in range(4)]
    rows = await asyncio.gather(*[put(place, viewer, one, "k") for place in places])
    assert len({row["_id"] for row in rows}) == 1
    assert await put(database, viewer, one, "k") == rows[0]
