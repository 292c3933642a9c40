"""What is recorded of operations, however they come and whoever makes the answer; and of a whole process,
until it ends or is killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from bson import ObjectId

from modelharbor.auth.links import DownloadLinks, secret_key
from modelharbor.db.actors import ActorDocument
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.http.server import environment
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from tests.documents import insert_actor, insert_model, insert_version
from tests.http.processes import SERVE, free_port
from tests.http.serving import Server, serving
from tests.live.client import WATCH, open_client
from tests.live.serving import id_of
from tests.live.serving import serving as listening
from tests.live.stream import TAKES_EVENTS, open_stream

pytestmark = pytest.mark.anyio
CURL = {"user-agent": "curl/8.5.0"}
SHOWN = 'query Shown($name: String!) { model(owner: "ada", name: $name) { name } }'
LIKE = "mutation Like($id: ID!) { likeModel(input: {id: $id}) { model { id } } }"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"usage_recording": True, "cache_timeout_seconds": 30.0})


@dataclass
class Used:
    """All events, added up."""

    calls: dict[str, Row] = field(default_factory=dict)
    """By the name of the operation."""
    views: Counter[ObjectId] = field(default_factory=Counter)
    clients: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, name: str) -> int:
        return int(self.calls.get(name, {}).get("count", 0))


async def events(database: Database) -> list[Row]:
    found: list[Row] = []
    for name in sorted(await database.data.list_collection_names()):
        if name.startswith("usage_2"):
            found += await database.data[name].find({}).to_list()
    return found


async def used(database: Database) -> Used:
    found = Used()
    for event in await events(database):
        if event["kind"] == "operation":
            _, _, name = event["operation"].partition(":")
            assert event["count"] == sum(event["latencies"].values())
            calls = found.calls.setdefault(name, {"operation": event["operation"]})
            for each in ("count", "errors", "cost", "commands", "batches", "keys", "hits"):
                calls[each] = calls.get(each, 0) + event.get(each, 0)
            found.clients[name, event["client"]] += event["count"]
        if event["kind"] == "view":
            found.views[event["model"]] += event["count"]
            found.clients["", event["client"]] += event["count"]
    return found


async def insert_models(
    owner_id: ObjectId | None = None,
) -> tuple[ModelDocument, ModelDocument, ModelDocument]:
    """Two public ones of ada's, and a private one."""
    ada = await ActorDocument.get(owner_id) if owner_id else await insert_actor("ada")
    assert ada is not None
    one, other = await insert_model(ada, "one"), await insert_model(ada, "other")
    return one, other, await insert_model(ada, "mine", visibility=Visibility.PRIVATE)


# ---- operations


async def test_operations_are_recorded_with_what_they_took(
    settings: Settings, database: Database
) -> None:
    await insert_models()
    text = 'query A { model(owner: "ada", name: "one") { name owner { login } } } query B { __typename }'
    async with serving(settings, None) as server:
        for _ in range(3):
            answer = await server.ask(text, CURL, operationName="A")
            assert answer.json() == {"data": {"model": {"name": "one", "owner": {"login": "ada"}}}}
        told = await server.ask(text, {"x-modelharbor-cost": "1"}, operationName="A")
        cost = told.json()["extensions"]["cost"]
        await server.ask(text, CURL, operationName="B")
        await server.client.get("/graphql", params={"query": "query G { __typename }"})
        failed = await server.ask(LIKE, variables={"id": "bm8="})
        assert failed.json()["errors"]
    found = await used(database)
    digest = sha256(text.encode()).hexdigest()[:16]
    assert found.calls["A"] == {
        "operation": f"{digest}:A",
        "count": 4,
        "errors": 0,
        "cost": 4 * cost["actual"],
        "commands": 4 * cost["dbCommands"],
        "batches": 4 * cost["loaderBatches"],
        "keys": 4 * 2,
        "hits": 0,
    }
    assert (cost["dbCommands"], cost["loaderBatches"]) == (2, 2)
    assert (found.clients["A", "curl"], found.clients["A", "python"]) == (3, 1)
    assert found.calls["B"]["operation"] == f"{digest}:B"
    assert [found.count(name) for name in ("B", "G", "Like")] == [1, 1, 1]
    assert found.calls["Like"]["errors"] == 1


async def test_what_never_ran_is_not_recorded(settings: Settings, database: Database) -> None:
    dear = "{ models(first: 100) { nodes { versions(first: 100) { nodes { id } } } } }"
    two = "query A { __typename } query B { __typename }"
    async with serving(settings.model_copy(update={"max_cost": 1000}), None) as server:
        # The variable of the last ones is missing, and of another type.
        for query in ("query A {", "query A { nothing }", dear, two, SHOWN):
            assert (await server.ask(query)).json()["errors"], query
        assert (await server.ask(SHOWN, variables={"name": 5})).json()["errors"]
        answer = await server.ask("{ __typename }", {"authorization": "Bearer mh_nonsense"})
        assert answer.status_code == 401
        answer = await server.client.get("/graphql", params={"query": LIKE})
        assert answer.status_code == 405
    assert await events(database) == []


async def test_kept_answers_are_calls_and_views_too(settings: Settings, database: Database) -> None:
    """Also in a process that finds them in Redis."""
    one, _, _ = await insert_models()
    keeping = settings.model_copy(update={"response_cache": True})
    body: Row = {"query": SHOWN, "variables": {"name": "one"}}
    async with serving(keeping, None) as first, serving(keeping, None) as second:

        async def ask(server: Server, layer: str) -> None:
            before = await hits(server, layer)
            async with asyncio.timeout(30):
                while True:
                    answer = await server.client.post("/graphql", json=body, headers=CURL)
                    assert answer.json() == {"data": {"model": {"name": "one"}}}
                    asked[layer] += 1
                    if await hits(server, layer) > before:
                        return

        asked = Counter[str]()
        await ask(first, "l1")
        await ask(second, "l2")
        await ask(second, "l1")
        kept = sum([await hits(server, layer) for server in (first, second) for layer in LAYERS])
    found = await used(database)
    assert found.count("Shown") == sum(asked.values())
    assert found.calls["Shown"]["hits"] == kept >= 3
    assert found.calls["Shown"]["commands"] == found.count("Shown") - kept
    assert found.views == {one.id: sum(asked.values())}
    assert found.clients["", "curl"] == sum(asked.values())


LAYERS = ("l1", "l2")


async def hits(server: Server, layer: str) -> int:
    shown = (await server.client.get("/metrics")).text
    name = f'modelharbor_cache_hits_total{{layer="{layer}"}} '
    return int(float(shown.partition(name)[2].partition("\n")[0]))


async def test_operations_over_sockets_and_streams_are_recorded(
    settings: Settings, database: Database
) -> None:
    """A subscription is one call, when it has begun."""
    async with listening(settings) as served:
        model, _, _ = await insert_models(served.user_id)
        job = await served.put()
        async with (
            open_client(served.ws, served.token, user_agent_header="node") as client,
            httpx.AsyncClient(timeout=30) as http,
        ):
            await client.subscribe("1", SHOWN, name="one")
            assert await client.next("1") == {"model": {"name": "one"}}
            assert (await client.receive())["type"] == "complete"
            await client.subscribe("2", WATCH, id=id_of(job))
            await client.next("2")
            await client.subscribe("3", WATCH, id="bm8=")  # refused
            assert (await client.receive())["type"] == "error"
            body = {"query": SHOWN, "variables": {"name": "one"}}
            answer = await http.post(served.http, json=body, headers=TAKES_EVENTS)
            assert '{"data":{"model":{"name":"one"}}}' in answer.text
            async with open_stream(served.http, WATCH, served.token, id=id_of(job)) as stream:
                await stream.next()
                found = await eventually(database, lambda found: found.count("Watch") == 2)
    assert found.clients == {
        ("Shown", "node"): 1,
        ("Shown", "python"): 1,
        ("Watch", "node"): 1,
        ("Watch", "python"): 1,
        ("", "node"): 1,
        ("", "python"): 1,
    }
    assert found.views == {model.id: 2}
    assert found.calls["Watch"]["errors"] == 0


async def eventually(database: Database, is_so: Callable[[Used], bool]) -> Used:
    async with asyncio.timeout(30):
        while not is_so(found := await used(database)):
            await asyncio.sleep(0.05)
    return found


# ---- views


@pytest.mark.parametrize("compiled", [True, False])
async def test_models_that_are_shown_by_their_own_field_are_viewed(
    settings: Settings, database: Database, compiled: bool
) -> None:
    """Once an operation, by those who may see them; graphql-core counts the same."""
    one, other, mine = await insert_models()
    await insert_version(database, one, {"a.bin": 1})
    given = settings.model_copy(update={"compiled_plans": compiled})
    async with serving(given, None) as server:
        for query in (
            '{ model(owner: "ada", name: "one") { name } }',
            '{ a: model(owner: "Ada", name: "One") { name } b: model(owner: "ada", name: "one") { id } }',
            '{ resolve(ref: "ada/one") { number } }',
            '{ resolve(ref: "ada/one:1") { number } model(owner: "ada", name: "one") { name } }',
            '{ a: model(owner: "ada", name: "one") { name } b: model(owner: "ada", name: "other") { id } }',
            # None of these shows one.
            '{ resolve(ref: "ada/one:2") { number } }',
            '{ resolve(ref: "ada/other") { number } }',
            '{ model(owner: "ada", name: "none") { name } }',
            '{ model(owner: "ada", name: "mine") { name } }',
            '{ resolve(ref: "ada/mine") { number } }',
            "{ models { nodes { name } } }",
            '{ model(owner: "ada", name: "one") @skip(if: true) { name } }',
        ):
            answer = (await server.ask(query)).json()
            assert "errors" not in answer, answer
    found = await used(database)
    assert found.views == {one.id: 5, other.id: 1}
    assert mine.id not in found.views


async def test_what_a_plan_could_not_answer_is_viewed_by_the_answer_that_is_sent(
    settings: Settings, database: Database
) -> None:
    """A stored value that is not as the schema promises: graphql-core answers null and why."""
    one, other, _ = await insert_models()
    await database.data["models"].update_one({"_id": one.id}, {"$unset": {"revision": 1}})
    async with serving(settings, None) as server:
        answer = await server.ask('{ model(owner: "ada", name: "one") { revision } }')
        assert answer.json()["data"] == {"model": None}
        two = '{ a: model(owner: "ada", name: "one") { revision } b: model(owner: "ada", name: "other") { name } }'
        assert (await server.ask(two)).json()["data"] == {"a": None, "b": {"name": "other"}}
    found = await used(database)
    assert found.views == {other.id: 1}
    assert found.calls[""]["errors"] == 2


async def test_who_may_see_a_model_views_it(settings: Settings, database: Database) -> None:
    """From kept answers as well."""
    async with listening(settings.model_copy(update={"response_cache": True})) as served:
        _, _, mine = await insert_models(served.user_id)
        body = {"query": SHOWN, "variables": {"name": "mine"}}
        async with httpx.AsyncClient() as client:
            for authorization in (f"Bearer {served.token}", None) * 3:
                headers = {} if authorization is None else {"authorization": authorization}
                answer = await client.post(served.http, json=body, headers=headers)
                shown = None if authorization is None else {"name": "mine"}
                assert answer.json() == {"data": {"model": shown}}
        found = await eventually(database, lambda found: found.count("Shown") == 6)
    assert found.views == {mine.id: 3}


# ---- a process


@dataclass
class Sent:
    """Requests to a process of its own, each with when its answer was there."""

    url: str
    process: "subprocess.Popen[bytes]"
    link: str
    downloads: list[float] = field(default_factory=list)
    calls: int = 0

    async def download(self, client: httpx.AsyncClient) -> None:
        answer = await client.get(self.url + self.link)
        assert len(answer.content) == len(CONTENTS)
        self.downloads.append(time.time())

    async def call(self, client: httpx.AsyncClient) -> None:
        body = {"query": SHOWN, "variables": {"name": "one"}}
        assert (await client.post(f"{self.url}/graphql", json=body)).status_code == 200
        self.calls += 1


CONTENTS = bytes(range(256)) * 40


@asynccontextmanager
async def process_of(settings: Settings, database: Database, tmp_path: Path) -> AsyncIterator[Sent]:
    one, _, _ = await insert_models()
    version = await insert_version(database, one, {"a.bin": len(CONTENTS)})
    digest = sha256(CONTENTS).hexdigest()
    file = await database.data["files"].find_one_and_update(
        {"version_id": version.id}, {"$set": {"sha256": digest}}
    )
    assert file is not None
    (tmp_path / "contents").write_bytes(CONTENTS)
    async with open_storage(settings) as storage:
        await storage.put_file(tmp_path / "contents", digest)
    await BlobDocument(sha256=digest, size_bytes=len(CONTENTS), references=1).insert()
    link = DownloadLinks(secret_key(settings), "").link(file["_id"], file["path"], 600)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(port), "1"], env={**os.environ, **environment(settings)}
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(90), httpx.AsyncClient() as client:
            while True:
                assert process.poll() is None
                try:
                    if (await client.get(f"{url}/healthz")).status_code == 200:
                        break
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
        yield Sent(url, process, link)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


async def ask_until_it_ends(
    sent: Sent, does: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        while True:
            try:
                await does(client)
            except httpx.TransportError:
                return


async def test_a_process_that_is_told_to_end_loses_nothing(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    """Amid requests: whatever was answered is recorded."""
    unlimited = settings.model_copy(update={"budget_anonymous": 0})
    async with process_of(unlimited, database, tmp_path) as sent:
        asking = [
            asyncio.create_task(ask_until_it_ends(sent, does))
            for does in [sent.download, sent.call] * 4
        ]
        async with asyncio.timeout(60):
            while len(sent.downloads) < 100 or sent.calls < 100:
                await asyncio.sleep(0.01)
        sent.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*asking)
        assert await asyncio.to_thread(sent.process.wait, 30) in (0, -signal.SIGTERM)
    found = await used(database)
    rows = [event for event in await events(database) if event["kind"] == "download"]
    # An answer that was sent may have been cut off on its way.
    assert sum(row["count"] for row in rows) in range(len(sent.downloads), len(sent.downloads) + 5)
    assert found.count("Shown") in range(sent.calls, sent.calls + 5)
    assert found.views.total() == found.count("Shown")


async def test_a_process_that_is_killed_loses_what_came_in_its_last_second(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    """At random moments; what came before is there, each once."""
    unlimited = settings.model_copy(update={"budget_anonymous": 0})
    async with process_of(unlimited, database, tmp_path) as sent:
        asking = asyncio.create_task(ask_until_it_ends(sent, sent.download))
        await asyncio.sleep(3.0)
        killed_at = time.time()
        sent.process.kill()
        await asking
    rows = [event for event in await events(database) if event["kind"] == "download"]
    older = [at for at in sent.downloads if at < killed_at - LOST_SECONDS]
    assert len(older) > 10
    recorded = sorted(row["at"].timestamp() for row in rows)
    assert len(older) <= len(rows) <= len(sent.downloads) + 1
    assert killed_at - recorded[-1] < LOST_SECONDS


LOST_SECONDS = 1.5
"""A second, and what a machine with much else to do takes for the transaction."""
