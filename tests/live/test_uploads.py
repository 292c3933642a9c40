"""Uploads watched over WebSocket while their bytes come, end to end."""

from hashlib import sha256
from typing import Any

import httpx
import pytest

from modelharbor.db.files import FileDocument
from modelharbor.db.uploads import UploadDocument

from .client import Client, open_client
from .conftest import Served

pytestmark = pytest.mark.anyio

SIZE = 64 * 1024
CREATE = """mutation($i: CreateUploadsInput!) { createUploads(input: $i) {
  uploads { id url headers } userErrors { message }
} }"""
WATCH = """subscription($ids: [ID!], $versionId: ID, $after: Cursor) {
  uploadProgress(ids: $ids, versionId: $versionId, after: $after, maxRateHz: 50) {
    cursor upload { path state receivedBytes percent file { sha256 } job { kind state } }
  }
}"""
MAKE = """mutation {
  createModel(input: {owner: "ada", name: "m"}) { model { id } userErrors { message } }
}"""
VERSION = """mutation($i: CreateModelVersionInput!) { createModelVersion(input: $i) {
  modelVersion { id } uploads { id url headers } userErrors { message }
} }"""


async def ask(served: Served, http: httpx.AsyncClient, query: str, **given: Any) -> Any:
    variables = {"i": given} if given else {}
    answer = await http.post(served.http, json={"query": query, "variables": variables})
    data = answer.json()["data"]
    [payload] = data.values()
    assert payload["userErrors"] == []
    return payload


async def send(http: httpx.AsyncClient, upload: Any, offset: int, data: bytes) -> None:
    headers = {
        **upload["headers"],
        "upload-offset": str(offset),
        "content-type": "application/offset+octet-stream",
    }
    answer = await http.patch(upload["url"], content=data, headers=headers)
    assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(offset + len(data)))


async def told(client: Client) -> Any:
    return (await client.next())["uploadProgress"]


async def test_an_upload_is_watched_from_its_beginning_to_its_file(served: Served) -> None:
    contents = bytes(range(256)) * (SIZE // 256)
    digest = sha256(contents).hexdigest()
    headers = {"authorization": f"Bearer {served.token}"}
    async with (
        httpx.AsyncClient(headers=headers, timeout=30) as http,
        open_client(served.ws, served.token) as client,
        open_client(served.ws, await served.another_token("bob")) as stranger,
    ):
        model = (await ask(served, http, MAKE))["model"]["id"]
        files = [{"path": "a.bin", "sizeBytes": SIZE}, {"path": "b.bin", "sizeBytes": SIZE}]
        made = await ask(served, http, VERSION, modelId=model, files=files)
        version, (upload, other) = made["modelVersion"]["id"], made["uploads"]
        ids = [upload["id"]]
        await stranger.subscribe("1", WATCH, ids=ids)
        refusal = await stranger.receive()
        assert refusal["type"] == "error"
        assert refusal["payload"][0]["extensions"]["code"] == "NOT_FOUND"
        await client.subscribe("1", WATCH, ids=ids)
        first = await told(client)
        assert first["upload"] == {
            "path": "a.bin",
            "state": "CREATED",
            "receivedBytes": "0",
            "percent": 0.0,
            "file": None,
            "job": None,
        }
        await send(http, upload, 0, contents[: SIZE // 2])
        half = await told(client)
        assert half["upload"] == {
            **first["upload"],
            "state": "UPLOADING",
            "receivedBytes": str(SIZE // 2),
            "percent": 50.0,
        }
        await send(http, upload, SIZE // 2, contents[SIZE // 2 :])
        done = await told(client)
        while done["upload"]["state"] == "UPLOADING":  # progress, where it was told
            done = await told(client)
        assert done["upload"] == {
            "path": "a.bin",
            "state": "COMPLETED",
            "receivedBytes": str(SIZE),
            "percent": 100.0,
            "file": {"sha256": digest},
            "job": {"kind": "VERIFY_FILE", "state": "QUEUED"},
        }
        assert await client.receive() == {"id": "1", "type": "complete"}
        # Who comes back is told the changes of state alone, and of the version all its uploads.
        await client.subscribe("1", WATCH, ids=ids, after=first["cursor"])
        assert [(await told(client))["upload"]["state"] for _ in range(2)] == [
            "UPLOADING",
            "COMPLETED",
        ]
        assert await client.receive() == {"id": "1", "type": "complete"}
        await client.subscribe("2", WATCH, versionId=version)
        await send(http, other, 0, contents)
        event = (await client.next("2"))["uploadProgress"]["upload"]
        assert (event["path"], event["state"]) == ("b.bin", "COMPLETED")
    [file, _] = await FileDocument.find().sort("+path").to_list()
    assert (file.path, file.sha256, file.size_bytes) == ("a.bin", digest, SIZE)
    assert await UploadDocument.find({"is_open": True}).count() == 0
