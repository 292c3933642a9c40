"""Watching jobs over WebSocket, end to end."""

from typing import Any

import pytest

from modelharbor.db.jobs import JobState

from .client import WATCH, open_client
from .conftest import Served, id_of

pytestmark = pytest.mark.anyio
S = JobState


def seen(event: Any) -> tuple[str, str]:
    job = event["jobProgress"]["job"]
    return job["state"], job["progress"]["current"]


async def test_a_job_is_watched_from_what_stands_to_its_end(served: Served) -> None:
    job = await served.put()
    async with open_client(served.ws, served.token) as client:
        await client.subscribe("1", WATCH, id=id_of(job))
        assert seen(await client.next()) == ("QUEUED", "0")
        await served.become(job, S.RUNNING)
        assert seen(await client.next()) == ("RUNNING", "0")
        await served.progress(job, 7)
        assert seen(await client.next()) == ("RUNNING", "7")
        await served.become(job, S.SUCCEEDED)
        assert seen(await client.next()) == ("SUCCEEDED", "7")
        assert await client.receive() == {"id": "1", "type": "complete"}


async def test_who_comes_back_is_told_what_was_missed_and_no_more(served: Served) -> None:
    job = await served.put()
    async with open_client(served.ws, served.token) as client:
        await client.subscribe("1", WATCH, id=id_of(job))
        first = await client.next()
        await served.become(job, S.RUNNING)
        await client.next()
    await served.become(job, S.RETRYING, S.RUNNING, S.SUCCEEDED)
    async with open_client(served.ws, served.token) as client:
        await client.subscribe("1", WATCH, id=id_of(job), after=first["jobProgress"]["cursor"])
        states = [seen(await client.next())[0] for _ in range(4)]
        assert states == ["RUNNING", "RETRYING", "RUNNING", "SUCCEEDED"]
        assert await client.receive() == {"id": "1", "type": "complete"}
