"""What `make bench-live` sends, hears and says of it: without a server, and with both of them, small."""

import asyncio
import socket
from dataclasses import replace
from typing import Any

import orjson
import pytest
import uvicorn
from graphql import parse, validate

from bench.live.clients import Fleet
from bench.live.frames import CLOSE, PING, TEXT, client_frame, server_frames
from bench.live.measuring import Measured
from bench.live.moving import Mover, published_job, stored_job
from bench.live.plain import application
from bench.live.report import OURS as OURS_NAME
from bench.live.report import goals, goals_text, ratios, table
from bench.live.watching import (
    OURS,
    PLAIN,
    SELECTION,
    Event,
    Stamp,
    Verdict,
    judge,
    percentile,
    read_event,
)
from modelharbor.db.jobs import JobState
from modelharbor.http.protocol import head_of_text
from modelharbor.schema import core
from modelharbor.settings import Settings
from tests.live.serving import serving

COUNT = 3
MEASURED = Measured(
    subscribers=1000,
    kilobytes=23.44,
    connect_seconds=1.25,
    idle_share=0.02,
    delivered=60_000,
    p50=6.04,
    p99=29.96,
    longest=41.0,
    sent_p50=9.5,
    sent_p99=33.26,
    missed=0,
    repeated=0,
    backwards=0,
    cpu_micros=10.06,
    back=500,
    back_cpu_seconds=0.31,
    missed_away=0,
)


def test_the_subscription_is_valid() -> None:
    assert validate(core, parse(OURS)) == []
    assert SELECTION in PLAIN


def test_frames_of_clients_are_masked() -> None:
    assert client_frame(TEXT, b"ab") == b"\x81\x82\0\0\0\0ab"
    assert client_frame(PING, b"x" * 200)[:8] == b"\x89\xfe\x00\xc8\0\0\0\0"
    assert client_frame(TEXT, b"x" * 70_000)[:10] == b"\x81\xff" + (70_000).to_bytes(8, "big")


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_frames_of_the_server_are_read(size: int) -> None:
    whole = head_of_text(size) + b"x" * size
    assert list(server_frames(whole + b"\x88\x02\x03\xe8")) == [
        (whole, TEXT, b"x" * size),
        (b"\x88\x02\x03\xe8", CLOSE, b"\x03\xe8"),
    ]
    for cut in {1, 2, 3, 9, len(whole) - 1} - set(range(len(whole), 20)):
        assert list(server_frames(whole[:cut])) == [(whole[:cut], -1, b"")]


def message(**payload: object) -> bytes:
    return orjson.dumps({"type": "next", "id": "1", "payload": payload})


def test_events_are_read() -> None:
    job = {"id": "x", "state": "RUNNING", "progress": {"current": "7", "sequence": "9"}}
    told = message(data={"jobProgress": {"cursor": "c", "job": job}})
    assert read_event(told) == Event(9, "RUNNING", "c")
    assert read_event(b'{"type":"connection_ack"}') is None
    for wrong in (message(errors=[{"message": "no"}]), b'{"type":"error","id":"1"}'):
        with pytest.raises(ValueError, match="1"):
            read_event(wrong)


@pytest.mark.parametrize(
    ("heard", "verdict"),
    [
        ([2, 3, 4, 5, 6], Verdict()),
        ([2, 4, 6], Verdict()),  # progress may be left out
        ([2, 3, 5, 6], Verdict(missed=1)),
        ([2, 4], Verdict(missed=1)),
        ([2, 4, 4, 6], Verdict(repeated=1)),
        ([2, 4, 3, 6], Verdict(backwards=1)),
        ([5, 6], Verdict()),  # it came later
        ([], Verdict(missed=2)),
    ],
)
def test_what_was_heard_is_judged(heard: list[int], verdict: Verdict) -> None:
    assert judge(heard, [4, 6]) == verdict


def test_percentiles() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([3.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_goals() -> None:
    assert [goal.is_met for goal in goals([MEASURED])] == [True] * 4
    assert goals_text(goals([replace(MEASURED, kilobytes=30.06, missed_away=1)])) == (
        "- 1,000 subscribers: 30.1 of 30 KB a connection: missed\n"
        "- 1,000 subscribers: p99 30.0 of 30 ms: met\n"
        "- 1,000 subscribers: 1 of 0 events dropped, repeated or told backwards: missed\n"
        "- 1,000 subscribers: 0.62 of 1 s of CPU to reconnect 1,000: met"
    )
    assert goals([replace(MEASURED, subscribers=10_000, p99=999.0)])[1].is_met


def test_tables() -> None:
    assert table([(OURS_NAME, MEASURED)]).splitlines()[2] == (
        "| modelharbor | 1,000 | 23.4 | 6.0 | 30.0 | 41.0 | 9.5 | 33.3 | 60,000 | 0 | 0 | 0 | 10.1 | 0.62 | 0 | 1.2 | 2% |"
    )
    plain = replace(MEASURED, kilobytes=70.32, p99=299.6, cpu_micros=100.6, back_cpu_seconds=3.1)
    bigger = replace(MEASURED, subscribers=10_000)
    assert ratios([MEASURED, bigger], [plain]).splitlines()[2:] == [
        "| 1,000 | 3.0 | 10.0 | 10.0 | 10.0 |"
    ]


async def watched(fleet: Fleet, mover: Mover) -> dict[str, Any]:
    """All that a measurement does, small; what the subscribers report."""
    stamps: list[Stamp] = [await mover.become(JobState.RUNNING)]
    await fleet.connect(COUNT)
    assert [each.last.sequence for each in fleet.subscribers] == [stamps[0].sequence] * COUNT
    stamps.append(await mover.progress())
    assert (await fleet.wait(stamps[-1].sequence, 10))["behind"] == 0
    await fleet.cut(1)
    stamps += [await mover.become(state) for state in (JobState.RETRYING, JobState.RUNNING)]
    await fleet.come_back(1)
    stamps.append(await mover.become(JobState.SUCCEEDED))
    assert (await fleet.wait(stamps[-1].sequence, 10))["behind"] == 0
    await fleet.cut(COUNT)
    return await fleet.report([[s.sequence, s.sent, s.acknowledged, s.is_state] for s in stamps])


@pytest.mark.anyio
async def test_subscribers_of_ours_miss_nothing(settings: Settings) -> None:
    async with serving(settings) as served:
        job = await stored_job(served.database, served.user_id)
        variables = {"id": job.job, "rate": 50.0, "after": None}
        fleet = Fleet("127.0.0.1", served.port, served.token, OURS, variables)
        report = await watched(fleet, job)
    assert (report["missed"], report["repeated"], report["backwards"]) == (0, 0, 0)
    assert (report["measured"], report["problems"]) == (COUNT * 5, [])


@pytest.mark.anyio
async def test_subscribers_of_plain_strawberry_miss_what_came_while_they_were_away(
    settings: Settings,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config = uvicorn.Config(application(settings.redis_url), log_config=None)
        server = uvicorn.Server(config)
        serve = asyncio.create_task(server.serve([taken]))
        while not server.started:
            await asyncio.sleep(0.01)
        async with published_job(settings.redis_url) as job:
            report = await watched(Fleet("127.0.0.1", port, None, PLAIN, {"id": job.job}), job)
        server.should_exit = True
        await serve
    assert (report["missed"], report["repeated"], report["problems"]) == (1, 0, [])
