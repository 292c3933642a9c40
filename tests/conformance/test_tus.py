"""The clients of tus that people use, and curl: as they come, unchanged."""

import asyncio
import os
import random
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.conformance.driving import GUARD_SECONDS, Driver
from tests.http.uploading import Desk, receiving

pytestmark = pytest.mark.anyio


class Uploading(Driver):
    """Makes uploads, and the files that are to be sent, when a script asks for them."""

    def __init__(self, desk: Desk, folder: Path) -> None:
        super().__init__(desk.served)
        self.desk, self.folder = desk, folder
        self.made: dict[str, ObjectId] = {}

    async def create(self, name: str, size: int) -> dict[str, str]:
        path = self.folder / name
        path.write_bytes(random.Random(name).randbytes(size))
        self.made[name] = upload_id = await self.desk.create(size, name)
        url = f"{self.desk.base}/uploads/{upload_id}"
        return {"id": global_id("Upload", upload_id), "url": url, "file": str(path)}

    def sent(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    async def arrived(self, name: str) -> bool:
        """Whether the file that came of it has exactly what was sent."""
        return await self.desk.file(self.made[name]) == self.sent(name)


async def test_tus_js_client(settings: Settings, tmp_path: Path) -> None:
    async with receiving(settings) as desk:
        uploading = Uploading(desk, tmp_path)
        results: dict[str, Any] = await uploading.run("tus.js")
        parts = [line for line in results.pop("parallel") if line.startswith("PATCH")]
        assert results == {
            "whole": ["POST: 201", "PATCH at 0: 204"],
            "again": ["POST: 201", "PATCH at 0: 409", "HEAD: 200"],
            "named": ["HEAD: 200", "PATCH at 0: 204"],
            "withFirstBytes": ["POST: 201"],
            "overridden": ["POST: 201", "POST at 0: 204"],
            "empty": ["POST: 201"],
            "stopped": ["POST: 201", "PATCH at 0: 204", "PATCH at 1000000: 204"],
            "stored": True,
            "resumed": [
                "HEAD: 200",
                *(f"PATCH at {at}: 204" for at in (2_000_000, 3_000_000, 4_000_000)),
            ],
            "terminated": ["POST: 201", "PATCH at 0: 204", "DELETE: 204"],
        }
        assert parts == ["PATCH at 0: 204"] * 4
        for name in ("whole", "named", "first", "overridden", "empty", "stopped"):
            assert await uploading.arrived(name), name
        row = await desk.row(uploading.made["parallel"])
        assert (row["state"], row["received_bytes"]) == ("RECEIVED", 4_000_003)
        digest = sha256(uploading.sent("parallel")).hexdigest()
        assert await desk.whole(row["_id"]) == digest
        assert (await desk.row(uploading.made["terminated"]))["state"] == "ABORTED"


TUSPY = """
from tusclient.client import TusClient
from tusclient.storage.filestorage import FileStorage

client = TusClient(BASE + "/uploads", {"Authorization": "Bearer " + TOKEN})
uploader = client.uploader(
    WHOLE["file"], metadata={"upload": WHOLE["id"]}, chunk_size=700_000, upload_checksum=True
)
uploader.upload()
assert uploader.url == WHOLE["url"]
client.uploader(EMPTY["file"], metadata={"upload": EMPTY["id"]}).upload()
for begin, end in ((0, 1_000_000), (1_000_000, 2_000_000)):  # as two runs of a program
    uploader = client.uploader(
        RESUMED["file"],
        metadata={"upload": RESUMED["id"]},
        chunk_size=500_000,
        store_url=True,
        url_storage=FileStorage(RESUMED["file"] + ".urls"),
    )
    assert uploader.offset == begin
    uploader.upload(end)
"""


async def test_tuspy(settings: Settings, tmp_path: Path) -> None:
    async with receiving(settings) as desk:
        uploading = Uploading(desk, tmp_path)
        sizes = {"whole": 2_000_000, "resumed": 2_000_000, "empty": 0}
        given: dict[str, Any] = {
            name.upper(): await uploading.create(name, size) for name, size in sizes.items()
        }
        given |= {"BASE": desk.base, "TOKEN": desk.served.token}
        lines = "".join(f"{name} = {value!r}\n" for name, value in given.items())
        # A program of its own: the package leaves files open.
        await run(sys.executable, "-c", lines + TUSPY)
        for name in sizes:
            assert await uploading.arrived(name), name


async def run(*command: str, **variables: str) -> str:
    """What a program prints."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, **variables}
    )
    try:
        told, _ = await asyncio.wait_for(process.communicate(), GUARD_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, told
    return told.decode()


CURL = """
set -eu
curl -sS --fail -X PATCH "$URL" -H "Authorization: Bearer $TOKEN" -H "Tus-Resumable: 1.0.0" \\
  -H "Content-Type: application/offset+octet-stream" -H "Upload-Offset: 0" \\
  --data-binary @<(head -c 1000000 "$FILE")
offset=$(curl -sS --fail -I "$URL" -H "Authorization: Bearer $TOKEN" -H "Tus-Resumable: 1.0.0" |
  tr -d '\\r' | awk 'tolower($1) == "upload-offset:" { print $2 }')
tail -c +$((offset + 1)) "$FILE" |
  curl -sS --fail -X PATCH "$URL" -H "Authorization: Bearer $TOKEN" -H "Tus-Resumable: 1.0.0" \\
  -H "Content-Type: application/offset+octet-stream" -H "Upload-Offset: $offset" -T -
echo "$offset"
"""
WHOLE = """
curl -sS -i -X POST "$BASE/uploads" -H "Authorization: Bearer $TOKEN" -H "Tus-Resumable: 1.0.0" \\
  -H "Upload-Length: $(stat -c %s "$FILE")" -H "Upload-Metadata: upload $(printf %s "$ID" | base64 -w 0)" \\
  -H "Content-Type: application/offset+octet-stream" --data-binary "@$FILE"
"""


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
async def test_curl(settings: Settings, tmp_path: Path) -> None:
    async with receiving(settings) as desk:
        uploading = Uploading(desk, tmp_path)

        async def curl(script: str, name: str) -> str:
            made = await uploading.create(name, 3_000_000)
            return await run(
                *("bash", "-c", script),
                TOKEN=desk.served.token,
                BASE=desk.base,
                URL=made["url"],
                ID=made["id"],
                FILE=made["file"],
            )

        assert await curl(CURL, "resumed") == "1000000\n"
        told = await curl(WHOLE, "whole")
        assert "HTTP/1.1 201 " in told
        assert "upload-offset: 3000000\r\n" in told
        assert await uploading.arrived("resumed")
        assert await uploading.arrived("whole")
