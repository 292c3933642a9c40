"""The whole server on a port of its own, with a few models, and a browser to look at it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from modelharbor.app import create_app
from modelharbor.db.actors import ActorKind
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.http.console import BUILT
from modelharbor.http.server import options
from modelharbor.resolvers.tokens import issue_token
from modelharbor.settings import Settings
from tests.browser.chromium import Page, open_page
from tests.documents import SCOPES, insert_actor, insert_model, insert_version

PATIENCE = 30.0  # seconds until a start or stop that hangs fails


@dataclass
class Site:
    url: str
    token: str  # of admin
    server: uvicorn.Server
    serving: "asyncio.Task[None]"

    async def stop(self) -> None:
        self.server.should_exit = True
        async with asyncio.timeout(PATIENCE):
            await self.serving


@pytest.fixture
async def site(settings: Settings, database: Database) -> AsyncIterator[Site]:
    assert (BUILT / "index.html").is_file(), (
        "GraphiQL is not built: npm ci && npm run build in web/"
    )
    admin = await insert_actor("admin", display_name="Ada Minister")
    acme = await insert_actor("acme", ActorKind.ORGANIZATION, display_name="Acme Research")
    tiny = await insert_model(
        acme,
        "tiny-llama",
        summary="A Llama of one layer",
        task="text-generation",
        library="transformers",
        license="apache-2.0",
        tags=["safetensors", "tiny"],
        stats={"trending_score": 2.0, "downloads_30d": 1200, "likes": 7},
    )
    await insert_version(database, tiny, {"config.json": 612, "model.safetensors": 4_202_512})
    await insert_model(
        admin,
        "fraud",
        summary="Seen by its owner only",
        task="text-classification",
        visibility=Visibility.PRIVATE,
        stats={"trending_score": 1.0},
    )
    _, token = await issue_token(
        database, admin.id, "browser", sorted(SCOPES, key=lambda s: s.value)
    )

    given = options("127.0.0.1", 0, 1) | {"app": create_app(settings), "factory": False}
    server = uvicorn.Server(uvicorn.Config(**given))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(PATIENCE):
        while not server.started:
            assert not serving.done(), "The server did not start"
            await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    site = Site(f"http://127.0.0.1:{port}", token, server, serving)
    yield site
    await site.stop()


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    async with open_page(tmp_path / "profile") as page:
        yield page
