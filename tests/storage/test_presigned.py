"""Downloads that the store itself gives: a real S3 server, and clients that follow where they are sent."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from modelharbor.auth.links import DownloadLinks, secret_key
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument, FileDocument
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import Segment
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.http.downloads import PRESIGNED
from modelharbor.resolvers.recording import Usage
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, open_storage
from tests.documents import insert_actor, insert_model, insert_version
from tests.http.serving import codes
from tests.live.serving import Served, serving
from tests.storage.s3 import Swift

pytestmark = pytest.mark.anyio
CONTENTS = random.Random(5).randbytes(100_000)
DIGEST = sha256(CONTENTS).hexdigest()
TAG = f'"{DIGEST}"'
SIGNED = {"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature"}  # fmt: skip


@dataclass
class Quay:
    """A PRIVATE model of bob's with one file, whose contents are in S3."""

    served: Served
    settings: Settings
    storage: BlobStore
    client: httpx.AsyncClient
    version: VersionDocument
    file: FileDocument
    counted: list[tuple[Any, int, bool]]

    @property
    def database(self) -> Database:
        return self.served.database

    def link(self, held: Permission | None = None) -> str:
        base = f"http://127.0.0.1:{self.served.port}"
        links = DownloadLinks(secret_key(self.settings), base)
        return links.link(self.file.id, self.file.path, 60, held=held)

    async def get(self, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.get(self.link(), headers=named)

    async def set_blob(self, **values: Any) -> None:
        await self.database.data["blobs"].update_one({"sha256": DIGEST}, {"$set": values})


@pytest.fixture
def s3_settings(swift: Swift, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in swift.environment.items():
        monkeypatch.setenv(name, value)
    return settings.model_copy(update={"storage_url": f"s3://{swift.make_bucket()}/prefix"})


@pytest.fixture
async def quay(
    request: pytest.FixtureRequest,
    s3_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Quay]:
    given: Row = getattr(request, "param", {})
    settings = s3_settings.model_copy(update=given)
    counted: list[tuple[Any, int, bool]] = []

    def download(
        self: Usage, file: Row, client: str, who: int, sent: int, *, is_last: bool
    ) -> None:
        counted.append((file["_id"], sent, is_last))

    monkeypatch.setattr(Usage, "download", download)
    async with (
        serving(settings) as served,
        open_storage(settings) as storage,
        httpx.AsyncClient() as client,
    ):
        model = await insert_model(await insert_actor("bob"), "tiny", visibility=Visibility.PRIVATE)
        version = await insert_version(served.database, model, {})
        file = FileDocument(
            version_id=version.id,
            model_id=model.id,
            path="weights/model.bin",
            size_bytes=len(CONTENTS),
            sha256=DIGEST,
        )
        await file.insert()
        (tmp_path / "contents").write_bytes(CONTENTS)
        await storage.put_file(tmp_path / "contents", DIGEST)
        await BlobDocument(sha256=DIGEST, size_bytes=len(CONTENTS), references=1).insert()
        yield Quay(served, settings, storage, client, version, file, counted)


async def test_a_client_is_sent_to_the_store_and_gets_the_bytes(quay: Quay, swift: Swift) -> None:
    response = await quay.get()
    assert (response.status_code, response.content) == (302, b"")
    sent = {
        name: value
        for name, value in response.headers.items()
        if name not in ("location", "date", "server", "x-request-id")
    }
    assert sent == {
        "cache-control": "private, no-store",
        "referrer-policy": "no-referrer",
        "content-length": "0",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    place = urlsplit(response.headers["location"])
    assert f"{place.scheme}://{place.netloc}" == swift.url
    assert parse_qs(place.query).keys() == SIGNED
    assert parse_qs(place.query)["X-Amz-Expires"] == [str(int(PRESIGNED.total_seconds()))]
    # Neither our signature nor the file's name goes there.
    ours = parse_qs(urlsplit(quay.link()).query)["signature"][0]
    assert ours not in response.headers["location"]
    assert "model.bin" not in response.headers["location"]
    assert quay.counted == [(quay.file.id, 100_000, True)]
    followed = await quay.client.get(quay.link(), follow_redirects=True)
    assert (followed.status_code, followed.content) == (200, CONTENTS)
    assert [each.status_code for each in followed.history] == [302]
    assert followed.headers["content-disposition"] == "attachment"
    assert followed.headers["content-type"] == "application/octet-stream"


async def test_uploaded_contents_are_found_by_their_key(quay: Quay) -> None:
    key = "incoming/0123456789abcdef01234567/1"
    async with quay.storage.incoming.writer(key, 0) as writer:
        await writer.write(CONTENTS)
        size = await writer.flush()
    final = quay.storage.incoming.final_key([Segment(key=key, size_bytes=size)])
    assert final is not None
    await quay.set_blob(key=final)
    response = await quay.client.get(quay.link(), follow_redirects=True)
    assert (response.status_code, response.content) == (200, CONTENTS)
    assert "/incoming/" in str(response.url)


async def test_a_range_is_kept_on_the_way(quay: Quay) -> None:
    response = await quay.client.get(
        quay.link(), headers={"range": "bytes=10-19"}, follow_redirects=True
    )
    assert [each.status_code for each in response.history] == [302]
    assert (response.status_code, response.content) == (206, CONTENTS[10:20])
    assert response.headers["content-range"] == "bytes 10-19/100000"
    beyond = await quay.get(range="bytes=100000-")
    assert (beyond.status_code, codes(beyond)) == (416, ["RANGE_NOT_SATISFIABLE"])
    assert quay.counted == [
        (quay.file.id, 10, False)
    ]  # by its first answer: the store tells nothing


HERE: list[tuple[dict[str, str], int, int | None]] = [
    ({"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}, 200, 100_000),
    ({"accept": "text/html", "range": "bytes=0-9"}, 206, 10),
    ({"sec-fetch-mode": "cors"}, 200, 100_000),
    # The store has another tag, and would refuse these.
    ({"if-match": TAG}, 200, 100_000),
    ({"if-match": TAG, "range": "bytes=0-9"}, 206, 10),
    ({"if-range": TAG, "range": "bytes=0-9"}, 206, 10),
    ({"if-range": '"old"', "range": "bytes=0-9"}, 200, 100_000),
    ({"if-unmodified-since": "Mon, 23 Nov 2020 00:00:00 GMT"}, 200, 100_000),
    ({"if-none-match": TAG}, 304, 0),
    ({"if-match": '"old"'}, 412, None),
]
"""Headers of a request, the status of its answer, and how much of the file that has."""


async def test_what_is_answered_here(quay: Quay) -> None:
    """What browsers ask for, and what has conditions."""
    for headers, status, length in HERE:
        quay.counted.clear()
        response = await quay.client.get(quay.link(), headers=headers)
        assert response.status_code == status, headers
        assert "location" not in response.headers, headers
        assert response.headers["etag"] == TAG, headers
        if length is not None:
            assert response.content == CONTENTS[:length], headers
        sent = {200: [(quay.file.id, 100_000, True)], 206: [(quay.file.id, 10, False)]}
        async with asyncio.timeout(30):  # it is told when the response has ended
            while quay.counted != sent.get(status, []):
                await asyncio.sleep(0.005)


async def test_head_is_answered_here(quay: Quay) -> None:
    response = await quay.client.head(quay.link())
    assert (response.status_code, response.headers["content-length"]) == (200, "100000")
    assert response.headers["etag"] == TAG


@pytest.mark.parametrize("quay", [{"presigned_downloads": False}], indirect=True)
async def test_a_setting_keeps_everybody_here(quay: Quay) -> None:
    response = await quay.get()
    assert (response.status_code, response.content) == (200, CONTENTS)
    assert response.headers["cache-control"] == "private, no-cache"
    response = await quay.get(range="bytes=10-19")
    assert (response.status_code, response.content) == (206, CONTENTS[10:20])


async def test_who_may_not_have_a_file_is_sent_nowhere(quay: Quay) -> None:
    async def status(link: str, **headers: str) -> int:
        response = await quay.client.get(link, headers=headers)
        assert ("location" in response.headers) == (response.status_code == 302)
        return response.status_code

    token = f"Bearer {quay.served.token}"  # of somebody who may not see the model
    bare = quay.link().partition("?")[0]
    assert await status(bare) == 404
    assert await status(bare, authorization=token) == 404
    assert await status(f"{quay.link()}&held=PUBLISH") == 404
    versions = quay.database.data["versions"]
    for state, held, expected in (
        (VersionStatus.QUARANTINED, None, 403),
        (VersionStatus.QUARANTINED, Permission.WRITE, 403),
        (VersionStatus.QUARANTINED, Permission.PUBLISH, 302),
        (VersionStatus.DRAFT, None, 403),
        (VersionStatus.DRAFT, Permission.WRITE, 302),
        (VersionStatus.DELETED, Permission.PUBLISH, 404),
    ):
        await versions.update_one({"_id": quay.version.id}, {"$set": {"status": state.value}})
        quay.counted.clear()
        assert await status(quay.link(held)) == expected, (state, held)
        assert len(quay.counted) == (expected == 302)


async def test_nobody_is_sent_to_what_is_not_there(quay: Quay) -> None:
    await quay.storage.delete(f"sha256/{DIGEST[:2]}/{DIGEST[2:4]}/{DIGEST}")
    for _ in range(2):
        response = await quay.get()
        assert (response.status_code, codes(response)) == (404, ["NOT_STORED"])
        assert "location" not in response.headers
        await quay.set_blob(stored=False)
    assert quay.counted == []
