"""How subscriptions end: by rights that are taken, by a server that closes, by clients that do not read."""

import asyncio
import gc
import json
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

import modelharbor.execution.groups as groups
from modelharbor.auth.viewer import job_principals
from modelharbor.db.actors import ActorKind
from modelharbor.db.base import Row, utc_now
from modelharbor.db.jobs import JobState
from modelharbor.db.tokens import Permission
from modelharbor.resolvers.tokens import issue_token
from modelharbor.settings import Settings
from tests.documents import insert_actor

from .client import WATCH, Client, open_client
from .serving import Served, id_of
from .stream import Stream, open_stream

pytestmark = pytest.mark.anyio
TOLD_WITHIN: Final = 5.0  # seconds, of rights that were taken
BIG: Final = WATCH.replace("current sequence", "current sequence message")


@pytest.fixture
def live_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"send_timeout_seconds": 1.5})


def state(event: Any) -> str:
    found: str = event["jobProgress"]["job"]["state"]
    return found


def current(event: Any) -> int:
    return int(event["jobProgress"]["job"]["progress"]["current"])


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def megabytes() -> float:
    gc.collect()
    resident: int = psutil.Process(os.getpid()).memory_info().rss
    return resident / 2**20


async def revoke(served: Served, token: str) -> None:
    await served.database.data["tokens"].update_one(
        {"prefix": token[:27]}, {"$set": {"revoked_at": utc_now()}}
    )


async def ends_unauthenticated(client: Client, id: str) -> None:
    message = await client.receive()
    assert (message["type"], message["id"]) == ("error", id)
    assert message["payload"][0]["extensions"]["code"] == "UNAUTHENTICATED"


async def fails(stream: Stream, code: str) -> None:
    event = await stream.event()
    assert event is not None
    assert event[0] == "next"
    assert event[1]["errors"][0]["extensions"]["code"] == code
    assert await stream.event() == ("complete", None)
    assert await stream.event() is None


async def test_a_revoked_token_ends_what_it_opened(served: Served) -> None:
    job = await served.put()
    document, token = await issue_token(
        served.database, served.user_id, "short", list(Permission), None
    )
    _, expiring = await issue_token(
        served.database,
        served.user_id,
        "expiring",
        list(Permission),
        utc_now() + timedelta(seconds=2),
    )
    async with (
        open_client(served.ws, served.token) as other,
        open_client(served.ws, token) as client,
        open_client(served.ws, expiring) as short,
        open_stream(served.http, WATCH, token, id=id_of(job)) as stream,
        open_stream(served.http, WATCH, served.token, id=id_of(job)) as other_stream,
    ):
        for each in (other, client, short):
            await each.subscribe("1", WATCH, id=id_of(job))
            await each.next()
        await client.subscribe("2", "subscription { jobs { job { state } } }")
        await stream.next()
        await other_stream.next()
        await revoke(served, token)
        async with asyncio.timeout(TOLD_WITHIN):
            await ends_unauthenticated(client, "1")
            await ends_unauthenticated(client, "2")
            assert await client.close_code() == (4403, "The token is no longer valid.")
            await fails(stream, "UNAUTHENTICATED")
            await ends_unauthenticated(short, "1")
            assert (await short.close_code())[0] == 4403
        await served.become(job, JobState.RUNNING)
        assert state(await other.next()) == "RUNNING"
        assert state(await other_stream.next()) == "RUNNING"
    async with open_client(served.ws, token, init=False) as client:
        await client.send(type="connection_init", payload={"Authorization": f"Bearer {token}"})
        assert (await client.close_code())[0] == 4403
    assert document.id


async def test_a_token_that_was_revoked_just_now_changes_nothing_and_reads_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> None:
        """It is not its turn yet."""

    monkeypatch.setattr(served.server.lifespan.state["viewers"], "look", look)
    create = """mutation { createModel(input: {owner: "ada", name: "m"}) {
      model { name } userErrors { code }
    } }"""
    async with open_client(served.ws, served.token) as client:
        await revoke(served, served.token)
        await client.subscribe("1", create)
        await ends_unauthenticated(client, "1")
        await client.subscribe("2", "{ viewer { login } }")
        await ends_unauthenticated(client, "2")
    assert await served.database.data["models"].count_documents({}) == 0


async def test_a_membership_that_is_taken_ends_what_it_showed(served: Served) -> None:
    organization = await insert_actor("acme", ActorKind.ORGANIZATION)
    member = await insert_actor("grace")
    _, token = await issue_token(served.database, member.id, "t", list(Permission), None)
    memberships = served.database.data["memberships"]
    row = {"organization_id": organization.id, "user_id": member.id, "role": "VIEWER"}
    await memberships.insert_one(dict(row))
    principals = job_principals(served.user_id, organization.id)
    shared = await served.put(principals=principals)
    own = await served.put(created_by_id=member.id, principals=job_principals(member.id))
    async with (
        open_client(served.ws, token) as client,
        open_client(served.ws, served.token) as other,
        open_stream(served.http, WATCH, token, id=id_of(shared)) as stream,
    ):
        await client.subscribe("shared", WATCH, id=id_of(shared))
        await client.next("shared")
        await client.subscribe("own", WATCH, id=id_of(own))
        await client.next("own")
        await other.subscribe("1", WATCH, id=id_of(shared))
        await other.next()
        await stream.next()
        await memberships.delete_one({"user_id": member.id})
        async with asyncio.timeout(TOLD_WITHIN):
            message = await client.receive()
            assert (message["type"], message["id"]) == ("error", "shared")
            assert message["payload"][0]["extensions"]["code"] == "NOT_FOUND"
            await fails(stream, "NOT_FOUND")
        await served.become(shared, JobState.RUNNING)
        await served.become(own, JobState.RUNNING)
        assert state(await client.next("own")) == "RUNNING"
        assert state(await other.next()) == "RUNNING"
        assert await client.is_silent()


async def test_rights_that_are_taken_while_it_begins_count_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    organization = await insert_actor("acme", ActorKind.ORGANIZATION)
    member = await insert_actor("grace")
    tokens = [
        await issue_token(served.database, member.id, name, list(Permission), None)
        for name in ("kept", "revoked")
    ]
    (_, kept), (_, revoked) = tokens
    memberships = served.database.data["memberships"]
    await memberships.insert_one(
        {"organization_id": organization.id, "user_id": member.id, "role": "VIEWER"}
    )
    job = await served.put(principals=job_principals(organization.id), created_by_id=None)
    viewers = served.server.lifespan.state["viewers"]
    admit = served.live.admit
    waiting, taken = 0, asyncio.Event()

    async def slow(*args: Any) -> Any:
        nonlocal waiting
        found = await admit(*args)
        waiting += 1
        await taken.wait()
        return found

    monkeypatch.setattr(served.live, "admit", slow)
    async with (
        open_client(served.ws, kept) as client,
        open_client(served.ws, revoked) as other,
    ):
        for each in (client, other):
            await each.subscribe("1", WATCH, id=id_of(job))

        async def stream(token: str, code: str) -> None:
            async with open_stream(served.http, WATCH, token, id=id_of(job)) as stream:
                await fails(stream, code)

        async with asyncio.TaskGroup() as group:
            group.create_task(stream(kept, "NOT_FOUND"))
            group.create_task(stream(revoked, "UNAUTHENTICATED"))
            await until(lambda: waiting == 4)
            await memberships.delete_one({"user_id": member.id})
            await revoke(served, revoked)
            await viewers.look()
            taken.set()
        message = await client.receive()
        assert (message["type"], message["id"]) == ("error", "1")
        assert message["payload"][0]["extensions"]["code"] == "NOT_FOUND"
        await ends_unauthenticated(other, "1")
        assert (await other.close_code())[0] == 4403
    assert members(served) == 0


async def test_rights_that_change_otherwise_change_nothing_for_who_may_still_watch(
    served: Served,
) -> None:
    organization = await insert_actor("acme", ActorKind.ORGANIZATION)
    job = await served.put()
    async with open_client(served.ws, served.token) as client:
        await client.subscribe("1", WATCH, id=id_of(job))
        await client.next()
        await served.database.data["memberships"].insert_one(
            {"organization_id": organization.id, "user_id": served.user_id, "role": "ADMIN"}
        )
        await asyncio.sleep(2.5)  # it is looked at every 2 s
        await served.become(job, JobState.RUNNING, JobState.SUCCEEDED)
        assert [state(await client.next()) for _ in range(2)] == ["RUNNING", "SUCCEEDED"]
        assert (await client.receive())["type"] == "complete"


async def test_a_server_that_closes_says_so_after_what_it_knows(served: Served) -> None:
    job = await served.put()
    await served.become(job, JobState.RUNNING)
    async with (
        open_client(served.ws, served.token) as client,
        open_client(served.ws, init=False) as silent,
        open_stream(served.http, WATCH, served.token, id=id_of(job), rate=0.5) as stream,
    ):
        await client.subscribe("1", WATCH, id=id_of(job), rate=0.5)
        await client.next()
        await stream.next()
        for done in (1, 2, 3):
            await served.progress(job, done)
        assert current(await client.next()) == 1
        assert current(await stream.next()) == 1
        await until(lambda: any(group.pending for group in served.live.groups.values()))
        served.server.should_exit = True
        assert current(await client.next()) == 3  # it is 2 s away from its turn
        code, reason = await client.close_code()
        assert (code, reason.partition(":")[0]) == (1001, "The server is closing")
        assert (await silent.close_code())[0] == 1001
        assert current(await stream.next()) == 3
        assert await stream.event() is None  # and no `complete`: there is more to come elsewhere


async def test_who_has_gone_leaves_nothing_behind(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "LINGER_SECONDS", 0.2)
    job = await served.put()
    for _ in range(3):
        async with (
            open_client(served.ws, served.token) as killed,
            open_client(served.ws, served.token) as polite,
            open_stream(served.http, WATCH, served.token, id=id_of(job)) as stream,
        ):
            for client in (killed, polite):
                await client.subscribe("1", WATCH, id=id_of(job))
                await client.next()
                await client.subscribe("2", "subscription { jobs { job { state } } }")
            await stream.next()
            await until(lambda: len(served.live.groups) == 2)
            killed.connection.transport.abort()
    await until(lambda: not served.live.groups)
    state = served.server.lifespan.state
    assert served.live.shut_down == {}
    assert served.live.checks == {}
    await until(lambda: not served.live.tasks)
    assert state["viewers"]._held == {}
    assert served.live.reader._subscribers == {}


async def test_a_client_that_does_not_read_gets_what_matters(served: Served) -> None:
    """Its progress is left out for newer one, states are not; others hear all as it happens."""
    job = await served.put()
    filler = "x" * 100_000
    before = megabytes()
    async with (
        open_client(served.ws, served.token, **narrow()) as slow,
        open_client(served.ws, served.token) as other,
    ):
        for client in (slow, other):
            await client.subscribe("1", BIG, id=id_of(job))
            await client.next()
        slow.connection.transport.pause_reading()
        await served.become(job, JobState.RUNNING)
        assert state(await other.next()) == "RUNNING"
        for done in range(1, 101):
            await served.progress(job, done, filler)
            if done == 60:
                await served.become(job, JobState.RETRYING, JobState.RUNNING)
                while state(await other.next()) != "RETRYING":
                    pass
        while current(await other.next()) != 100:
            pass
        await served.become(job, JobState.SUCCEEDED)
        assert state(await other.next()) == "SUCCEEDED"
        assert megabytes() - before < 15
        slow.connection.transport.resume_reading()
        seen, message = [], await slow.receive()
        while message["type"] == "next":
            seen.append(message["payload"]["data"])
            message = await slow.receive()
        assert message == {"id": "1", "type": "complete"}
        states = [each for each, later in zip(map(state, seen), [*map(state, seen[1:]), ""], strict=True) if each != later]  # fmt: skip
        assert states == ["RUNNING", "RETRYING", "RUNNING", "SUCCEEDED"]
        assert current(seen[-1]) == 100
        assert [current(each) for each in seen] == sorted(map(current, seen))
        assert len(seen) < 60  # of 104


def narrow() -> dict[str, Any]:
    """A connection that holds little on its way."""
    return {"max_queue": 1}


async def test_a_client_that_stays_stuck_is_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modelharbor.http.protocol.CUT_OFF_SECONDS", 0.5)
    job = await served.put()
    await served.become(job, JobState.RUNNING)
    async with (
        open_client(served.ws, served.token, **narrow()) as stuck,
        open_client(served.ws, served.token) as other,
    ):
        for client in (stuck, other):
            await client.subscribe("1", BIG, id=id_of(job))
            await client.next()
        writer = await deaf_stream(served, job)
        await until(lambda: members(served) == 3)
        stuck.connection.transport.pause_reading()
        filler, done, start = "x" * 200_000, 0, asyncio.get_running_loop().time()
        while members(served) == 3:
            done += 1
            await served.progress(job, done, filler)
            assert current(await other.next()) <= done
            assert asyncio.get_running_loop().time() - start < 20
        await until(lambda: members(served) == 1)
        await served.become(job, JobState.SUCCEEDED)
        while state(await other.next()) != "SUCCEEDED":
            pass
        stuck.connection.transport.resume_reading()
        code, _ = await stuck.close_code()
        assert code in {1013, 1006}  # its own word where that still fits through, else none
        writer.transport.abort()
    assert [each.message for each in caplog.records if each.levelno > logging.WARNING] == []


def members(served: Served) -> int:
    return sum(len(group.members) for group in served.live.groups.values())


async def deaf_stream(served: Served, job: Row) -> asyncio.StreamWriter:
    """A stream of events that nobody reads."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", served.port))
    _, writer = await asyncio.open_connection(sock=own, limit=1024)
    body = json.dumps({"query": BIG, "variables": {"id": id_of(job)}}).encode()
    writer.write(
        b"POST /graphql HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\nAuthorization: Bearer %b\r\n\r\n%b"
        % (len(body), served.token.encode(), body)
    )
    return writer


async def test_10000_subscribes_on_one_socket_harm_nobody(served: Served) -> None:
    job = await served.put()
    async with (
        open_client(served.ws, served.token) as flood,
        open_client(served.ws, served.token) as other,
    ):
        await other.subscribe("1", WATCH, id=id_of(job))
        await other.next()
        before = megabytes()

        async def send() -> None:
            for number in range(10_000):
                await flood.subscribe(str(number), WATCH, id=id_of(job))

        sending = asyncio.create_task(send())
        told: set[str] = set()
        refused = 0
        while refused + len(told) < 10_000:
            message = await flood.receive()
            if message["type"] == "next":
                told.add(message["id"])
            else:
                assert message["payload"][0]["extensions"]["code"] == "RATE_LIMITED"
                refused += 1
        await sending
        assert (refused, len(told)) == (9_980, 20)
        assert members(served) == 21
        await served.become(job, JobState.RUNNING)
        assert state(await other.next()) == "RUNNING"
        assert {(await flood.receive())["id"] for _ in range(20)} == told
        # As many that come and go at once: each makes place for the next one.
        for number in range(10_000):
            await flood.send(type="complete", id=str(number) if str(number) in told else "9")
            await flood.subscribe(f"again {number}", WATCH, id=id_of(job))
            await flood.send(type="complete", id=f"again {number}")
        await flood.send(type="ping")
        while (await flood.receive())["type"] != "pong":
            pass
        await until(lambda: members(served) == 1)
        await served.become(job, JobState.SUCCEEDED)
        assert state(await other.next()) == "SUCCEEDED"
        assert len(served.live.groups) == 1
        assert megabytes() - before < 20


async def test_who_asks_and_does_not_read_is_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.http.protocol.CUT_OFF_SECONDS", 0.5)
    job = await served.put()
    async with (
        open_client(served.ws, served.token, max_queue=1) as deaf,
        open_client(served.ws, served.token) as other,
    ):
        await other.subscribe("1", WATCH, id=id_of(job))
        await other.next()
        before = megabytes()
        deaf.connection.transport.pause_reading()
        filler = {"filler": "x" * 50_000}

        async def ask() -> None:
            while True:
                await deaf.send(type="ping", payload=filler)

        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(ask(), 20)
        assert megabytes() - before < 20
        await served.become(job, JobState.RUNNING)
        assert state(await other.next()) == "RUNNING"
