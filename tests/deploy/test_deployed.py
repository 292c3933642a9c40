"""The server behind nginx, as docs/caching.md sets both up: hits, purges by what has changed, no leaks."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from modelharbor.app import create_app
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.http.console import BUILT
from modelharbor.http.server import environment
from modelharbor.resolvers.tokens import issue_token
from modelharbor.settings import Settings
from tests.deploy.nginx import Front, fronting, listening
from tests.documents import SCOPES, insert_actor, insert_model

pytestmark = pytest.mark.anyio
PATIENCE_SECONDS = 20.0  # a guard against hanging, and less than any of these answers may be kept
LIST = "query List{models(first:10){nodes{fullName summary}}}"
UPDATE = "mutation($id:ID!,$to:String!){updateModel(input:{id:$id,summary:$to}){userErrors{code}}}"


@dataclass
class Site:
    client: httpx.AsyncClient
    front: Front
    settings: Settings
    bearer: dict[str, str]  # of who owns all models
    open: ModelDocument
    hidden: ModelDocument

    async def register(self, text: str) -> str:
        """The address at which its answer may be kept."""
        digest = sha256(text.encode()).hexdigest()
        extensions = {"persistedQuery": {"version": 1, "sha256Hash": digest}}
        sent = await self.client.post("/graphql", json={"query": text, "extensions": extensions})
        assert "errors" not in sent.json(), sent.text
        return f"/graphql?documentId=sha256:{digest}"

    async def summaries(self, address: str, **headers: str) -> tuple[dict[str, str], str]:
        """By name; and what nginx did."""
        answer = await self.client.get(address, headers=headers)
        nodes = answer.json()["data"]["models"]["nodes"]
        found = {node["fullName"]: node["summary"] for node in nodes}
        return found, answer.headers["x-proxy-cache"]

    async def until(
        self, address: str, wanted: Callable[[dict[str, str], str], bool]
    ) -> tuple[dict[str, str], str]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not wanted(*(found := await self.summaries(address))):
                await asyncio.sleep(0.05)
        return found


@pytest.fixture
async def site(settings: Settings, database: Database, tmp_path: Path) -> AsyncIterator[Site]:
    ada = await insert_actor("ada")
    public = await insert_model(ada, "open", summary="first")
    hidden = await insert_model(ada, "hidden", summary="mine", visibility=Visibility.PRIVATE)
    scopes = sorted(SCOPES, key=lambda scope: scope.value)
    _, token = await issue_token(database, ada.id, "deployed", scopes)
    settings = settings.model_copy(
        update={
            "response_cache": True,
            "surrogate_keys": True,
            "cache_timeout_seconds": PATIENCE_SECONDS,  # on a machine with much to do
        }
    )
    bearer = {"authorization": f"Bearer {token}"}
    plain = {"accept": "application/json"}
    async with listening(create_app(settings), "on") as upstream:
        with fronting(upstream, tmp_path) as front:
            async with httpx.AsyncClient(base_url=front.url, headers=plain, timeout=30) as client:
                yield Site(client, front, settings, bearer, public, hidden)


@asynccontextmanager
async def purging(site: Site, folder: Path) -> AsyncIterator[None]:
    """`modelharbor purge`, which purges all when it begins."""
    with (folder / "purge.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "modelharbor", "purge", str(site.front.cache)],
            env={**os.environ, **environment(site.settings)},
            cwd=folder,
            stderr=log,
        )
    try:
        async with asyncio.timeout(60):
            while (folder / "purge.log").read_text().count("purge.done") < 1:
                assert process.poll() is None, (folder / "purge.log").read_text()
                await asyncio.sleep(0.05)
        yield
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        process.kill()
        process.wait()


async def test_a_repeated_read_does_not_reach_the_server(site: Site) -> None:
    address = await site.register(LIST)
    found = await site.until(address, lambda found, did: did == "HIT")
    assert found == ({"ada/open": "first"}, "HIT")
    answer = await site.client.get(address)
    assert answer.headers["cache-control"] == "public, no-cache"
    assert not {"surrogate-key", "ratelimit", "ratelimit-policy"} & answer.headers.keys()
    again = await site.client.get(address, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_nobody_is_given_what_another_asked_for(site: Site) -> None:
    address = await site.register(LIST)
    everybody, hers = {"ada/open": "first"}, {"ada/open": "first", "ada/hidden": "mine"}
    assert await site.summaries(address, **site.bearer) == (hers, "BYPASS")
    found = await site.until(address, lambda found, did: did == "HIT")
    assert found == (everybody, "HIT")
    assert await site.summaries(address, **site.bearer) == (hers, "BYPASS")
    assert await site.summaries(address) == (everybody, "HIT")
    bad = await site.client.get(address, headers={"authorization": "Bearer mh_nobody"})
    assert (bad.status_code, bad.headers["x-proxy-cache"]) == (401, "BYPASS")
    assert await site.summaries(address) == (everybody, "HIT")


async def test_what_depends_on_the_viewer_is_not_kept(site: Site) -> None:
    address = await site.register("{viewer{login} models(first:1){nodes{viewerHasLiked}}}")
    for _ in range(2):
        answer = await site.client.get(address)
        assert answer.headers["cache-control"] == "private, no-store"
        assert answer.headers["x-proxy-cache"] == "MISS"


async def test_mistakes_are_not_kept(site: Site) -> None:
    unknown = f"/graphql?documentId=sha256:{'0' * 64}"
    mutation = await site.client.get(
        "/graphql", params={"query": UPDATE, "variables": '{"id":"x","to":"y"}'}
    )
    assert mutation.status_code == 405
    for _ in range(2):
        answer = await site.client.get(unknown)
        assert answer.json()["errors"][0]["extensions"]["code"] == "PERSISTED_QUERY_NOT_FOUND"
        assert answer.headers["cache-control"] == "private, no-store"
        assert answer.headers["x-proxy-cache"] == "MISS"


async def test_too_long_an_address_is_a_coded_answer(site: Site) -> None:
    answer = await site.client.get(f"/graphql?documentId={'x' * 40_000}")
    assert answer.status_code == 414
    assert answer.json()["errors"][0]["extensions"]["code"] == "PAYLOAD_TOO_LARGE"


async def test_a_write_purges_what_it_made_old(site: Site, tmp_path: Path) -> None:
    address = await site.register(LIST)
    async with purging(site, tmp_path):
        await site.until(address, lambda found, did: did == "HIT")
        variables = {"id": await id_of(site), "to": "second"}
        written = await site.client.post(
            "/graphql", json={"query": UPDATE, "variables": variables}, headers=site.bearer
        )
        assert written.json() == {"data": {"updateModel": {"userErrors": []}}}
        found = await site.until(address, lambda found, did: found["ada/open"] == "second")
        assert found == ({"ada/open": "second"}, "MISS")


async def test_a_direct_write_purges_too(site: Site, database: Database, tmp_path: Path) -> None:
    address = await site.register(LIST)
    async with purging(site, tmp_path):
        await site.until(address, lambda found, did: did == "HIT")
        await database.data["models"].update_one(
            {"_id": site.hidden.id},
            {"$set": {"visibility": "PUBLIC"}, "$push": {"principals": "public"}},
        )
        found = await site.until(address, lambda found, did: "ada/hidden" in found)
        assert found == ({"ada/open": "first", "ada/hidden": "mine"}, "MISS")


async def test_sockets_go_through(site: Site) -> None:
    url = site.front.url.replace("http", "ws", 1) + "/graphql"
    protocol = Subprotocol("graphql-transport-ws")
    async with asyncio.timeout(PATIENCE_SECONDS):
        async with connect(url, subprotocols=[protocol], origin=site.front.url) as socket:  # type: ignore[arg-type]  # a NewType of str
            await socket.send('{"type":"connection_init"}')
            assert orjson.loads(await socket.recv())["type"] == "connection_ack"
            payload = {"id": "1", "type": "subscribe", "payload": {"query": LIST}}
            await socket.send(orjson.dumps(payload).decode())
            answer: dict[str, Any] = orjson.loads(await socket.recv())
    assert answer["payload"]["data"]["models"]["nodes"] == [
        {"fullName": "ada/open", "summary": "first"}
    ]


async def test_graphiql_comes_compressed_and_its_files_are_kept(site: Site) -> None:
    if not BUILT.exists():
        pytest.skip("GraphiQL is not built: `make run`, `make test` and `make wheel` build it")
    html = {"accept": "text/html,*/*;q=0.8", "accept-encoding": "gzip, deflate, br, zstd"}
    for path in ("/graphql", "/graphiql"):
        page = await site.client.get(path, headers=html)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["cache-control"] == "no-cache"
        known = {**html, "if-none-match": page.headers["etag"]}
        assert (await site.client.get("/graphiql", headers=known)).status_code == 304
    name = next((BUILT / "assets").glob("*.js.br")).name.removesuffix(".br")
    for status in ("MISS", "HIT"):
        answer = await site.client.get(f"/graphiql/assets/{name}", headers=html)
        assert answer.headers["content-encoding"] == "br"
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["x-proxy-cache"] == status
        assert answer.content == (BUILT / "assets" / name).read_bytes()


async def id_of(site: Site) -> str:
    answer = await site.client.post(
        "/graphql", json={"query": '{model(owner:"ada",name:"open"){id}}'}
    )
    found: str = answer.json()["data"]["model"]["id"]
    return found
