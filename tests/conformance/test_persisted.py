"""The set-ups of docs/persisted-operations.md work as they are written, with the real builds and clients."""

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest

from modelharbor.db.actors import ActorKind
from modelharbor.http.server import environment
from modelharbor.settings import Settings
from tests.conformance.driving import GUARD_SECONDS, HERE, install
from tests.documents import insert_actor, insert_model
from tests.live.serving import Served, serving

pytestmark = pytest.mark.anyio
ROOT: Final = HERE.parents[1]
TEXT: Final = (ROOT / "docs" / "persisted-operations.md").read_text()
SECTIONS: Final = dict(
    re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL),
)
FILE: Final = re.compile(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS: Final = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BY_NAME: Final = "GET name 200"
BY_POST: Final = {
    "useGETForHashedQueries: true": "useGETForHashedQueries: false",
    "preferGetForPersistedQueries: true": "preferGetForPersistedQueries: false",
}


class Project:
    """The folder of a client, as the document has it."""

    def __init__(self, folder: Path, served: Served, settings: Settings) -> None:
        self.folder, self.served, self.settings = folder, served, settings

    async def build(self, title: str, replaced: Mapping[str, str] = MappingProxyType({})) -> None:
        """The files of a section, and what its commands make of them."""
        install()
        (self.folder / "node_modules").symlink_to(HERE / "node_modules")
        (self.folder / "package.json").write_text('{"type": "module"}')
        shutil.copy(ROOT / "schema.graphql", self.folder)
        for name, text in FILE.findall(SECTIONS[title]):
            for old, new in {"127.0.0.1:8000": f"127.0.0.1:{self.served.port}", **replaced}.items():
                text = text.replace(old, new)
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        for commands in COMMANDS.findall(SECTIONS[title]):
            await self.command("bash", "-e", "-c", commands)
        await self.served.server.lifespan.state["persisted"].published.look()

    async def run(self, script: str, *arguments: str) -> Any:
        for name in (script, "noting.js"):
            shutil.copy(HERE / "persisted" / name, self.folder)
        return json.loads(await self.command("node", script, *arguments))

    async def command(self, *command: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **os.environ,
                **environment(self.settings),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "NODE_NO_WARNINGS": "1",  # imports of JSON are an experiment to Node 20
            },
        )
        try:
            async with asyncio.timeout(GUARD_SECONDS):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
        assert process.returncode == 0, (out.decode(), err.decode())
        return out.decode()


async def has_model() -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    await insert_model(acme, "bert")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("client", ["apollo", "urql"])
async def test_by_hash(client: str, method: str, settings: Settings, tmp_path: Path) -> None:
    title = {"apollo": "Apollo Client, by hash", "urql": "urql, by hash"}[client]
    # Where a text fits into an address, urql goes on with GET.
    by_text = f"{method if client == 'urql' else 'POST'} text 200"
    async with serving(settings) as served:
        await has_model()
        await served.server.lifespan.state["cache"].redis.flushdb()
        project = Project(tmp_path, served, settings)
        await project.build(title, BY_POST if method == "POST" else {})
        names = ["acme/bert"]
        assert await project.run(f"{client}-by-hash.js") == {
            "unknown": [names, [f"{method} name 200", by_text]],
            "known": [names, [f"{method} name 200"]],
            "unsupported": [names, [f"{method} name 400", by_text]],
            "after": [names, ["POST text 200"]],
        }


async def test_apollo(settings: Settings, tmp_path: Path) -> None:
    async with serving(settings.model_copy(update={"trusted_only": True})) as served:
        await has_model()
        project = Project(tmp_path, served, settings)
        await project.build("Apollo Client, published")
        assert await project.run("apollo.js") == {
            "names": ["acme/bert"],
            "requests": [BY_NAME],
            "other": "Operation Other not found in manifest",
            "none": [],
        }


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
async def test_urql(algorithm: str, settings: Settings, tmp_path: Path) -> None:
    async with serving(settings.model_copy(update={"trusted_only": True})) as served:
        await has_model()
        project = Project(tmp_path, served, settings)
        await project.build("urql, published", {"sha256": algorithm})
        assert await project.run("urql.js") == {
            "names": ["acme/bert"],
            "requests": [BY_NAME],
            "other": "[GraphQL] This server runs published operations only.",
        }


@pytest.mark.parametrize("algorithm", ["SHA256", "MD5"])
async def test_relay_and_graphql_ws(algorithm: str, settings: Settings, tmp_path: Path) -> None:
    async with serving(settings.model_copy(update={"trusted_only": True})) as served:
        await has_model()
        project = Project(tmp_path, served, settings)
        await project.build("Relay", {"SHA256": algorithm})
        (id,) = json.loads((tmp_path / "persisted.json").read_text())
        assert len(id) == {"SHA256": 64, "MD5": 32}[algorithm]
        found = {"names": ["acme/bert"], "requests": ["POST name 200"]}
        assert await project.run("relay.js") == found
        row = await served.database.data["persisted_documents"].find_one({"document_id": id})
        assert row is not None
        # The same over WebSocket, by its id and by the hash of its text.
        told = await project.run("graphql-ws.js", served.ws, id, row["sha256"])
        nodes = told.pop("id")
        assert [node["fullName"] for node in nodes] == ["acme/bert"]
        assert told == {
            "hash": nodes,
            "prefixed": nodes,
            "unknown": "PERSISTED_QUERY_REQUIRED",
            "text": "PERSISTED_QUERY_REQUIRED",
            "kept": "BAD_REQUEST",
        }
