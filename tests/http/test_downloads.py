"""Files over HTTP: bytes, ranges, entity tags, and who may have them."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from bson import ObjectId
from httpx import AsyncClient, Response
from starlette.applications import Starlette

from modelharbor.auth.links import DownloadLinks, secret_key
from modelharbor.auth.tokens import make_secret, secret_hash, token_text
from modelharbor.db.actors import ActorDocument, Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.files import BlobDocument, FileDocument, ScanVerdict
from modelharbor.db.models import Grant, ModelDocument, ModelState, Visibility
from modelharbor.db.tokens import Permission, TokenDocument
from modelharbor.db.usage import collection_of
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.http.downloads import byte_range, disposition, download_routes
from modelharbor.resolvers.recording import Usage
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from tests.documents import insert_actor, insert_model, insert_version
from tests.http.serving import Server, codes

pytestmark = pytest.mark.anyio
P = Permission
CONTENTS = random.Random(3).randbytes(100_000)
DIGEST = sha256(CONTENTS).hexdigest()
TAG = f'"{DIGEST}"'


@dataclass
class Shelf:
    """A model `tiny` of ada's with one stored file, `weights/model.bin`."""

    client: AsyncClient
    settings: Settings
    database: Database
    ada: ActorDocument
    model: ModelDocument
    version: VersionDocument
    file: FileDocument

    @property
    def url(self) -> str:
        return f"/files/{self.file.id}/model.bin"

    @property
    def links(self) -> DownloadLinks:
        return DownloadLinks(secret_key(self.settings), "")

    async def get(self, url: str | None = None, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.get(url or self.url, headers=named)

    async def add(self, path: str, size: int, digest: str) -> FileDocument:
        file = FileDocument(
            version_id=self.version.id,
            model_id=self.model.id,
            path=path,
            size_bytes=size,
            sha256=digest,
        )
        return await file.insert()

    async def set(self, **values: Any) -> None:
        await self.database.data["models"].update_one({"_id": self.model.id}, {"$set": values})

    async def recorded(self, least: int) -> list[Row]:
        """Events of downloads in the order that they ended in, once there are so many: those before are
        written too."""
        async with asyncio.timeout(30):
            while True:
                rows = await self.database.find(
                    collection_of(utc_now()), {"kind": "download"}, sort={"at": 1, "_id": 1}
                )
                if len(rows) >= least:
                    return rows
                await asyncio.sleep(0.05)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"usage_recording": True})


@pytest.fixture
async def shelf(database: Database, settings: Settings, server: Server, tmp_path: Path) -> Shelf:
    ada = await insert_actor("ada")
    model = await insert_model(ada, "tiny")
    version = await insert_version(database, model, {})
    shelf = Shelf(server.client, settings, database, ada, model, version, None)  # type: ignore[arg-type]  # set in the next line
    shelf.file = await shelf.add("weights/model.bin", len(CONTENTS), DIGEST)
    (tmp_path / "contents").write_bytes(CONTENTS)
    async with open_storage(settings) as storage:
        await storage.put_file(tmp_path / "contents", DIGEST)
    await BlobDocument(sha256=DIGEST, size_bytes=len(CONTENTS), references=1).insert()
    return shelf


async def bearer(user: ActorDocument, **values: Any) -> str:
    secret = make_secret()
    token = TokenDocument(
        user_id=user.id,
        name="test",
        prefix="mh_",
        secret_sha256=secret_hash(secret),
        **{"scopes": [Permission.READ, Permission.DOWNLOAD], **values},
    )
    await token.insert()
    return f"Bearer {token_text(token.id, secret)}"


def is_hidden(response: Response) -> bool:
    """The one answer for all that one may not know of."""
    body = response.json()
    body["errors"][0]["extensions"].pop("requestId")
    assert body == {
        "errors": [
            {
                "message": "There is no such file, or the link to it is no longer good.",
                "extensions": {"code": "NOT_FOUND"},
            }
        ]
    }
    return response.status_code == 404


async def test_the_whole_file(shelf: Shelf) -> None:
    response = await shelf.get()
    assert response.status_code == 200
    assert response.content == CONTENTS
    expected = {
        "content-type": "application/octet-stream",
        "content-length": "100000",
        "content-disposition": "attachment; filename=\"model.bin\"; filename*=UTF-8''model.bin",
        "etag": TAG,
        "accept-ranges": "bytes",
        "cache-control": "public, no-cache",
        "vary": "authorization",
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox; default-src 'none'",
    }
    assert {name: response.headers.get(name) for name in expected} == expected
    assert "content-encoding" not in response.headers


async def test_head_has_the_same_headers_and_no_body(shelf: Shelf) -> None:
    got, head = (
        await shelf.get(),
        await shelf.client.head(shelf.url, headers={"range": "bytes=0-1"}),
    )
    assert (head.status_code, head.content) == (200, b"")
    differing = {"x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in differing} == {
        k: v for k, v in got.headers.items() if k not in differing
    }


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=99990-", 99_990, 100_000),
        ("bytes=99990-200000", 99_990, 100_000),
        ("bytes=0-99999999999999999999999", 0, 100_000),
        (f"bytes=-{'9' * 26}", 0, 100_000),
        ("bytes=-10", 99_990, 100_000),
        ("bytes=-999999", 0, 100_000),
        ("BYTES = 5 - 6 ", 5, 7),
    ],
)
async def test_a_range(shelf: Shelf, asked: str, start: int, end: int) -> None:
    response = await shelf.get(range=asked)
    assert response.status_code == 206
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/100000"
    assert response.headers["content-length"] == str(end - start)
    assert response.headers["etag"] == TAG
    assert response.content == CONTENTS[start:end]


@pytest.mark.parametrize(
    "asked", ["bytes=100000-", "bytes=100000-100001", "bytes=-0", f"bytes={'9' * 26}-"]
)
async def test_a_range_beyond_the_end(shelf: Shelf, asked: str) -> None:
    response = await shelf.get(range=asked)
    assert (response.status_code, codes(response)) == (416, ["RANGE_NOT_SATISFIABLE"])
    assert response.headers["content-range"] == "bytes */100000"
    assert response.headers["content-type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=0-1,5-6",
        "bytes=5-4",
        "bytes=-",
        "bytes=a-b",
        "lines=0-1",
        "bytes",
        "bytes=1",
        "",
        "bytes=٣-٤",
    ],
)
async def test_ranges_that_are_answered_with_the_whole(shelf: Shelf, asked: str) -> None:
    response = await shelf.client.get(shelf.url, headers={b"range": asked.encode()})
    assert (response.status_code, len(response.content)) == (200, 100_000)


def test_ranges_of_absurd_numbers() -> None:
    assert byte_range(f"bytes=0-{'9' * 19}", 10) == (0, 10)
    assert byte_range(f"bytes=0-{'9' * 5000}", 10) == (0, 10)
    assert byte_range(f"bytes={'0' * 5000}2-{'0' * 5000}3", 10) == (2, 4)
    assert byte_range(f"bytes={'9' * 19}-", 10) == (10**19 - 1, 10)
    assert byte_range(f"bytes={'9' * 5000}-", 10) == (10**19, 10)
    assert byte_range("bytes=0-", 0) == (0, 0)


@pytest.mark.parametrize(
    ("tag", "status"),
    [
        (TAG, 304),
        (f"W/{TAG}", 304),
        (f'"other", {TAG}', 304),
        ("*", 304),
        ('"other"', 200),
        (DIGEST, 200),
        ("", 200),
    ],
)
async def test_if_none_match(shelf: Shelf, tag: str, status: int) -> None:
    response = await shelf.get(if_none_match=tag)
    assert response.status_code == status
    assert response.headers["etag"] == TAG
    assert response.headers["cache-control"] == "public, no-cache"
    assert response.content == (b"" if status == 304 else CONTENTS)


@pytest.mark.parametrize(
    ("tag", "status"),
    [
        (TAG, 200),
        (f'"other", {TAG}', 200),
        ("*", 200),
        (f"W/{TAG}", 412),
        ('"other"', 412),
        (DIGEST, 412),
        ("", 412),
    ],
)
async def test_if_match(shelf: Shelf, tag: str, status: int) -> None:
    response = await shelf.get(if_match=tag)
    assert response.status_code == status
    assert response.headers["etag"] == TAG
    if status == 200:
        assert response.content == CONTENTS
    else:
        assert codes(response) == ["PRECONDITION_FAILED"]
        both = await shelf.get(if_match=tag, if_none_match=TAG, range="bytes=100000-")
        assert both.status_code == 412
        head = await shelf.client.head(shelf.url, headers={"if-match": tag})
        assert head.status_code == 412


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        (TAG, 206),
        (f"W/{TAG}", 200),
        ('"other"', 200),
        ("Mon, 23 Nov 2026 00:00:00 GMT", 200),
    ],
)
async def test_if_range(shelf: Shelf, condition: str, status: int) -> None:
    response = await shelf.get(range="bytes=0-9", if_range=condition)
    assert response.status_code == status


async def test_an_empty_file(shelf: Shelf, tmp_path: Path) -> None:
    empty = sha256().hexdigest()
    (tmp_path / "empty").touch()
    async with open_storage(shelf.settings) as storage:
        await storage.put_file(tmp_path / "empty", empty)
    await BlobDocument(sha256=empty, size_bytes=0, references=1).insert()
    file = await shelf.add("__init__.py", 0, empty)
    url = f"/files/{file.id}/__init__.py"
    whole = await shelf.get(url)
    assert (whole.status_code, whole.content) == (200, b"")
    assert whole.headers["content-length"] == "0"
    assert (await shelf.get(url, range="bytes=0-")).status_code == 416


@pytest.mark.parametrize(
    "name",
    [
        'quotes".bin',
        "back\\slash",
        "line\r\nset-cookie: a=b",
        "模型 ünïcode.gguf",
        "semi;colon=%41",
        "\u202egpj.exe",
    ],
)
async def test_any_name_is_safe_in_the_header(shelf: Shelf, name: str) -> None:
    file = await shelf.add(f"deep/{name}", len(CONTENTS), DIGEST)
    response = await shelf.get(f"/files/{file.id}/{quote(name, safe='')}")
    assert response.status_code == 200
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", name)
    assert response.headers["content-disposition"] == (
        f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
    )
    assert "set-cookie" not in response.headers


def test_a_name_that_is_no_text() -> None:
    assert disposition("a\udc80b").endswith("filename*=UTF-8''a%3Fb")


@pytest.mark.parametrize(
    "url",
    [
        "/files/0/model.bin",
        "/files/zzzzzzzzzzzzzzzzzzzzzzzz/model.bin",
        "/files/ＡAAAAAAAAAAAAAAAAAAAAAAA/model.bin",  # noqa: RUF001  # look-alike on purpose
        f"/files/{'a' * 24}/model.bin",
        f"/files/{'a' * 10_000}/model.bin",
        "/files/%00/model.bin",
    ],
)
async def test_ids_that_are_malformed_or_unknown(shelf: Shelf, url: str) -> None:
    assert is_hidden(await shelf.get(url))


async def test_the_name_in_the_address_is_the_files(shelf: Shelf) -> None:
    assert is_hidden(await shelf.get(f"/files/{shelf.file.id}/other.exe"))
    assert (await shelf.get(f"/files/{shelf.file.id}")).status_code == 404
    assert (await shelf.get(f"/files/{shelf.file.id}/weights/model.bin")).status_code == 404


async def test_other_methods(shelf: Shelf) -> None:
    for method in ("POST", "PUT", "DELETE"):
        response = await shelf.client.request(method, shelf.url)
        assert response.status_code == 405
        assert codes(response) == ["METHOD_NOT_ALLOWED"]


async def test_who_may_download(shelf: Shelf) -> None:
    owner = await bearer(shelf.ada)
    unscoped = await bearer(shelf.ada, scopes=[Permission.READ])
    stranger = await bearer(await insert_actor("eve"))
    reader = await insert_actor("bob")
    sees = await bearer(reader)
    grants = [Grant(actor_id=reader.id, role=Role.VIEWER).model_dump(mode="python")]
    grants[0]["role"] = Role.VIEWER.value
    await shelf.set(grants=grants)
    everyone = {
        "nobody": None,
        "owner": owner,
        "unscoped": unscoped,
        "stranger": stranger,
        "reader": sees,
    }
    expected = {
        Visibility.PUBLIC: (200, 200, 403, 200, 200),
        Visibility.INTERNAL: (404, 200, 403, 200, 200),
        Visibility.PRIVATE: (404, 200, 403, 404, 403),
    }
    for visibility, statuses in expected.items():
        await shelf.set(visibility=visibility.value)
        for (who, token), status in zip(everyone.items(), statuses, strict=True):
            response = await shelf.get(**({"authorization": token} if token else {}))
            assert (visibility, who, response.status_code) == (visibility, who, status)
            if status == 404:
                assert is_hidden(response)
            elif status == 403:
                assert codes(response) == ["FORBIDDEN"]
            else:
                public = visibility is Visibility.PUBLIC
                assert response.headers["cache-control"] == (
                    "public, no-cache" if public else "private, no-cache"
                )


@pytest.mark.parametrize("token", ["Bearer mh_x", "Basic YTpi", "Bearer", "\x7f"])
async def test_a_token_that_is_malformed(shelf: Shelf, token: str) -> None:
    response = await shelf.get(authorization=token)
    assert (response.status_code, codes(response)) == (401, ["UNAUTHENTICATED"])


async def test_a_token_that_has_expired_or_was_revoked(shelf: Shelf) -> None:
    past = utc_now() - timedelta(seconds=1)
    for values in ({"expires_at": past}, {"revoked_at": past}):
        response = await shelf.get(authorization=await bearer(shelf.ada, **values))
        assert (response.status_code, codes(response)) == (401, ["UNAUTHENTICATED"])


async def test_a_signed_link_needs_no_token(shelf: Shelf) -> None:
    await shelf.set(visibility=Visibility.PRIVATE.value, principals=[])
    link = shelf.links.link(shelf.file.id, shelf.file.path, 60)
    response = await shelf.get(link)
    assert (response.status_code, response.content) == (200, CONTENTS)
    assert response.headers["cache-control"] == "private, no-cache"


async def test_a_link_that_is_not_good(shelf: Shelf) -> None:
    await shelf.set(visibility=Visibility.PRIVATE.value)
    good = shelf.links.link(shelf.file.id, shelf.file.path, 60)
    other = await shelf.add("other.bin", len(CONTENTS), DIGEST)
    for bad in (
        shelf.links.link(shelf.file.id, shelf.file.path, -1000),
        shelf.links.link(other.id, shelf.file.path, 60).replace(str(other.id), str(shelf.file.id)),
        DownloadLinks(b"other", "").link(shelf.file.id, shelf.file.path, 60),
        good[:-1] + ("0" if good[-1] != "0" else "1"),
        re.sub(r"expires=\d+", "expires=99999999999", good),
        re.sub(r"expires=\d+", "expires=", good),
        re.sub(r"expires=\d+", "expires=٣", good),
        re.sub(r"signature=\w+", "signature=é", good),
        good.partition("&")[0],
    ):
        assert is_hidden(await shelf.get(bad))


async def test_what_was_deleted_is_gone_for_all(shelf: Shelf) -> None:
    link = shelf.links.link(shelf.file.id, shelf.file.path, 60)
    owner = await bearer(shelf.ada)
    versions = shelf.database.data["versions"]
    mine = {"_id": shelf.version.id}
    await versions.update_one(mine, {"$set": {"status": VersionStatus.DELETED.value}})
    assert is_hidden(await shelf.get(link))
    assert is_hidden(await shelf.get(authorization=owner))
    await versions.update_one(mine, {"$set": {"status": VersionStatus.ARCHIVED.value}})
    assert (await shelf.get(link)).status_code == 200
    await shelf.set(state=ModelState.DELETED.value, principals=[])
    assert is_hidden(await shelf.get(link))
    assert is_hidden(await shelf.get(authorization=owner))
    await versions.delete_one(mine)
    assert is_hidden(await shelf.get(link))


S, V = VersionStatus, ScanVerdict
BEING_MADE = {S.DRAFT, S.UPLOADING, S.PROCESSING}
RELEASED = {S.READY, S.ARCHIVED}
WHO = ("nobody", "stranger", "viewer", "downloader", "unscoped", "contributor", "maintainer", "link", "link for WRITE", "link for PUBLISH")  # fmt: skip
SENT: list[tuple[str, dict[str, str], int]] = [
    ("GET", {}, 200),
    ("HEAD", {}, 200),
    ("GET", {"range": "bytes=0-1"}, 206),
    ("GET", {"range": "bytes=100000-"}, 416),
    ("GET", {"if-none-match": TAG}, 304),
    ("HEAD", {"if-none-match": "*"}, 304),
    ("GET", {"if-match": '"other"'}, 412),
]
"""Requests, and what each is answered with to those who may have the file."""


def expected_status(status: VersionStatus, verdict: ScanVerdict, who: str) -> int:
    """Of a file in a PRIVATE model."""
    if status is S.DELETED or who in ("nobody", "stranger"):
        return 404
    if who == "viewer":
        return 403
    if status in RELEASED:
        return 200
    if status in BEING_MADE:
        is_harmless = verdict in (V.SAFE, V.SKIPPED)
        return 200 if is_harmless or who in ("contributor", "maintainer", "link for WRITE") else 403
    return 200 if who == "link for PUBLISH" else 403


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each download that is recorded: its bytes, and whether its last one was among them."""
    found: list[tuple[int, bool]] = []

    def download(
        self: Usage, file: Row, client: str, who: int, sent: int, *, is_last: bool
    ) -> None:
        found.append((sent, is_last))

    monkeypatch.setattr(Usage, "download", download)
    return found


async def presented(shelf: Shelf) -> dict[str, tuple[str, dict[str, str]]]:
    """The address and headers of each of WHO; the model is PRIVATE from now on."""
    roles = {"viewer": Role.VIEWER, "downloader": Role.DOWNLOADER, "unscoped": Role.MAINTAINER, "contributor": Role.CONTRIBUTOR, "maintainer": Role.MAINTAINER}  # fmt: skip
    given: dict[str, tuple[str, dict[str, str]]] = {"nobody": (shelf.url, {})}
    grants = []
    for who in ("stranger", *roles):
        actor = await insert_actor(who)
        scopes = [P.READ, P.DOWNLOAD] if who == "unscoped" else list(Permission)
        given[who] = (shelf.url, {"authorization": await bearer(actor, scopes=scopes)})
        if who in roles:
            grants.append({"actor_id": actor.id, "role": roles[who].value})
    await shelf.set(visibility=Visibility.PRIVATE.value, grants=grants)
    for held in (None, P.WRITE, P.PUBLISH):
        who = "link" if held is None else f"link for {held.value}"
        given[who] = (shelf.links.link(shelf.file.id, shelf.file.path, 60, held=held), {})
    assert tuple(given) == WHO
    return given


async def be(shelf: Shelf, status: VersionStatus, verdict: ScanVerdict) -> None:
    await shelf.database.data["versions"].update_one(
        {"_id": shelf.version.id}, {"$set": {"status": status.value}}
    )
    inspection = None if verdict is V.PENDING else {"verdict": verdict.value}
    await shelf.database.data["blobs"].update_one(
        {"sha256": DIGEST}, {"$set": {"inspection": inspection}}
    )


@pytest.mark.parametrize("status", S)
async def test_who_has_a_file_of_a_version_in_each_status(
    shelf: Shelf, counted: list[tuple[int, bool]], status: VersionStatus
) -> None:
    given = await presented(shelf)
    for verdict in V:
        await be(shelf, status, verdict)
        counted.clear()
        for who, (url, headers) in given.items():
            about = (status, verdict, who)
            allowed = expected_status(status, verdict, who)
            # The same decides about the rest.
            for method, more, success in SENT if verdict is V.UNSAFE else SENT[:1]:
                counted.clear()
                response = await shelf.client.request(method, url, headers=headers | more)
                answered = response.status_code
                assert answered == (success if allowed == 200 else allowed), (*about, method, more)
                is_whole = (method, answered) == ("GET", 200)
                sent = {200: [(100_000, True)], 206: [(2, False)]}.get(answered, [])
                assert counted == (sent if method == "GET" else []), (*about, method, more)
                if is_whole:
                    assert response.content == CONTENTS
                if allowed == 200:
                    assert response.headers["cache-control"] == "private, no-cache"
                    continue
                assert "etag" not in response.headers
                assert response.headers["cache-control"] == "private, no-store"
                if method == "GET" and allowed == 404:
                    assert is_hidden(response)
                elif method == "GET":
                    assert codes(response) == ["FORBIDDEN"]


@pytest.mark.parametrize("status", [S.QUARANTINED, S.FAILED])
async def test_a_refusal_says_what_is_the_matter(shelf: Shelf, status: VersionStatus) -> None:
    await be(shelf, status, V.SAFE)
    said = f"The version is {status.value}: its files may do harm. Who may publish it gets a link by `downloadUrl(acceptQuarantined: true)`."
    link = shelf.links.link(shelf.file.id, shelf.file.path, 60)
    for response in (
        await shelf.get(),
        await shelf.get(link),
        await shelf.get(authorization=await bearer(shelf.ada, scopes=list(Permission))),
    ):
        assert response.json()["errors"][0]["message"] == said


async def test_no_shared_cache_keeps_what_only_some_may_have(shelf: Shelf) -> None:
    """Of a PUBLIC model."""
    links = {
        held: shelf.links.link(shelf.file.id, shelf.file.path, 60, held=held)
        for held in (None, P.WRITE, P.PUBLISH)
    }
    for status, verdict, held, kept in (
        (S.READY, V.UNSAFE, None, "public, no-cache"),
        (S.DRAFT, V.SAFE, None, "public, no-cache"),
        (S.DRAFT, V.PENDING, P.WRITE, "private, no-cache"),
        (S.QUARANTINED, V.SAFE, P.PUBLISH, "private, no-cache"),
    ):
        await be(shelf, status, verdict)
        for more in ({}, {"if_none_match": TAG}, {"if_match": '"x"'}, {"range": "bytes=100000-"}):
            response = await shelf.get(links[held], **more)
            assert response.headers["cache-control"] == kept, (status, more)
        await shelf.set(visibility=Visibility.PUBLIC.value)


@pytest.mark.parametrize("status", [S.READY, S.DRAFT, S.QUARANTINED])
async def test_a_permission_that_is_added_to_a_link_by_hand_ends_it(
    shelf: Shelf, counted: list[tuple[int, bool]], status: VersionStatus
) -> None:
    """Where the version is READY, too: it is no longer what was signed."""
    await shelf.set(visibility=Visibility.PRIVATE.value)
    await be(shelf, status, V.UNSAFE)
    plain, write, publish = (
        shelf.links.link(shelf.file.id, shelf.file.path, 60, held=held)
        for held in (None, P.WRITE, P.PUBLISH)
    )
    for bad in (
        f"{plain}&held=PUBLISH",
        f"{plain}&held=WRITE",
        plain.replace("&signature", "&held=PUBLISH&signature"),
        f"{write}&held=PUBLISH",
        write.replace("held=WRITE", "held=PUBLISH"),
        write.replace("held=WRITE", "held="),
        write.replace("held=WRITE", "held=WRITE%20PUBLISH"),
        publish.replace("held=PUBLISH", "held=WRITE"),
        publish.replace("&held=PUBLISH", ""),
        publish.replace("held=PUBLISH", "held=publish"),
    ):
        assert is_hidden(await shelf.get(bad)), bad
    assert counted == []


async def test_damaged_contents_are_for_nobody(
    shelf: Shelf, counted: list[tuple[int, bool]]
) -> None:
    """Where somebody might have had them, they are told that they are gone."""
    given = await presented(shelf)
    await shelf.database.data["blobs"].update_one(
        {"sha256": DIGEST}, {"$set": {"stored": False, "damaged_at": utc_now()}}
    )
    for status in S:
        await shelf.database.data["versions"].update_one(
            {"_id": shelf.version.id}, {"$set": {"status": status.value}}
        )
        for who, (url, headers) in given.items():
            allowed = expected_status(status, V.ERROR, who)
            for method, more in (("GET", {}), ("GET", {"if-none-match": TAG})):
                response = await shelf.client.request(method, url, headers=headers | more)
                expected = 404 if allowed == 200 else allowed
                assert response.status_code == expected, (status, who, method, more)
                if allowed == 200:
                    assert codes(response) == ["NOT_STORED"]
    assert counted == []


async def test_contents_lie_where_their_row_says(shelf: Shelf) -> None:
    async with open_storage(shelf.settings) as storage:
        async with storage.incoming.writer("incoming/0/1", 0) as writer:
            await writer.write(b"elsewhere")
            await writer.flush()
        digest = sha256(b"elsewhere").hexdigest()
        blob = BlobDocument(sha256=digest, size_bytes=9, key="incoming/0/1", references=1)
        await blob.insert()
        file = await shelf.add("elsewhere.bin", 9, digest)
        url = f"/files/{file.id}/elsewhere.bin"
        response = await shelf.get(url)
        assert (response.status_code, response.content) == (200, b"elsewhere")
        response = await shelf.get(url, range="bytes=4-8")
        assert (response.status_code, response.content) == (206, b"where")
        damaged = {"$set": {"stored": False}}
        await shelf.database.data["blobs"].update_one({"_id": blob.id}, damaged)
        response = await shelf.get(url)
        assert (response.status_code, codes(response)) == (404, ["NOT_STORED"])


async def test_contents_that_are_not_stored(shelf: Shelf) -> None:
    file = await shelf.add("absent.bin", 5, "0" * 64)
    url = f"/files/{file.id}/absent.bin"
    response = await shelf.get(url)
    assert (response.status_code, codes(response)) == (404, ["NOT_STORED"])
    assert (await shelf.client.head(url)).status_code == 404
    for asked in ({"range": "bytes=5-"}, {"if_none_match": "*"}, {"if_match": '"other"'}):
        response = await shelf.get(url, **asked)
        assert (response.status_code, codes(response)) == (404, ["NOT_STORED"])
    await shelf.get()
    assert [row["file"] for row in await shelf.recorded(1)] == [shelf.file.id]


async def test_a_bad_token_is_refused_alike_whether_there_is_a_file_or_not(
    shelf: Shelf, commands: list[str]
) -> None:
    await shelf.set(visibility=Visibility.PRIVATE.value)
    commands.clear()
    for url in (
        shelf.url,
        f"/files/{'a' * 24}/model.bin",
        f"/files/{shelf.file.id}/other.exe",
        "/files/0/model.bin",
        shelf.links.link(shelf.file.id, shelf.file.path, -1000),
    ):
        response = await shelf.get(url, authorization="Bearer nonsense")
        assert (response.status_code, codes(response)) == (401, ["UNAUTHENTICATED"])
    assert commands == []
    link = shelf.links.link(shelf.file.id, shelf.file.path, 60)
    assert (await shelf.get(link, authorization="Bearer nonsense")).status_code == 200


async def test_of_the_parts_of_a_file_one_counts_as_a_download(shelf: Shelf) -> None:
    """That with the last byte, unless somebody only looked at the end."""
    empty = await shelf.add("empty.bin", 0, sha256(b"").hexdigest())
    Path(shelf.settings.data_path / "empty").write_bytes(b"")
    async with open_storage(shelf.settings) as storage:
        await storage.put_file(shelf.settings.data_path / "empty", empty.sha256)
    await BlobDocument(sha256=empty.sha256, size_bytes=0, references=1).insert()
    await shelf.get(range="bytes=10-19")
    await shelf.get(range="bytes=0-99998")
    await shelf.get(range="bytes=1-")
    await shelf.get(range="bytes=100000-")
    await shelf.get(if_none_match=TAG)
    await shelf.client.head(shelf.url)
    await shelf.get()
    await shelf.get(range="bytes=0-9")
    await shelf.get(range="bytes=0-")
    await shelf.get(range="bytes=-100000")
    await shelf.get(range="bytes=-8")
    await shelf.get(range="bytes=50000-")
    await shelf.get(range="bytes=0-49999")
    await shelf.get(f"/files/{empty.id}/empty.bin")
    rows = await shelf.recorded(11)
    assert sorted((row["bytes"], row["count"]) for row in rows) == [
        *((0, 1), (8, 0), (10, 0), (10, 0), (50_000, 0), (50_000, 1), (99_999, 0), (99_999, 1)),
        *[(100_000, 1)] * 3,
    ]


async def test_what_is_recorded_of_a_download(shelf: Shelf) -> None:
    """What it was of, by what it was fetched and how much was sent; of who it was no more than whether
    they are the same."""
    mine = {"authorization": await bearer(shelf.ada)}
    for headers in (
        {"user-agent": "curl/8.5.0"},
        {"user-agent": "curl/8.5.0", "range": "bytes=5-9"},
        {"user-agent": "modelharbor/1.2.3 ci", **mine},
        mine,
    ):
        assert (await shelf.client.get(shelf.url, headers=headers)).status_code < 300
    rows = await shelf.recorded(4)
    who = [row.pop("who") for row in rows]
    assert who[0] == who[1]
    assert who[2] == who[3]
    assert who[0] != who[2]
    assert all(0 <= each < 2**63 for each in who)
    for row in rows:
        assert utc_now() - row.pop("at").replace(tzinfo=UTC) < timedelta(minutes=1)
        assert isinstance(row.pop("_id"), ObjectId)
    of = {
        "kind": "download",
        "model": shelf.model.id,
        "version": shelf.version.id,
        "file": shelf.file.id,
        "format": shelf.file.format.value,
    }
    assert rows == [
        of | {"client": "curl", "count": 1, "bytes": 100_000},
        of | {"client": "curl", "count": 0, "bytes": 5},
        of | {"client": "modelharbor-ci", "count": 1, "bytes": 100_000},
        of | {"client": "python", "count": 1, "bytes": 100_000},
    ]
    everything = str(await shelf.database.find(collection_of(utc_now()), {}))
    assert "127.0.0.1" not in everything
    assert str(shelf.ada.id) not in everything


class Slow:
    """A store that gives one byte at a time, and notes how many."""

    presigns = False

    def __init__(self) -> None:
        self.given = 0

    async def open_range(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        return self._bytes(end - start)

    async def _bytes(self, count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            self.given += 1
            yield b"x"
            await asyncio.sleep(0)


async def test_reading_ends_when_the_client_goes(shelf: Shelf) -> None:
    """What was sent until then is recorded; it is no whole file."""
    storage = Slow()
    usage = Usage(shelf.database, shelf.settings, b"k")
    app = Starlette(routes=download_routes(shelf.settings))
    gone = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 10:
            gone.set()

    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.3"},
        "method": "GET",
        "path": shelf.url,
        "headers": [],
        "query_string": b"",
        "state": {
            "settings": shelf.settings,
            "database": shelf.database,
            "storage": storage,
            "usage": usage,
            "secret_key": b"k",
        },
    }
    await asyncio.wait_for(app(scope, receive, send), 30)
    assert 9 <= storage.given < 1000
    await usage.flush()
    [row] = await shelf.recorded(1)
    assert (row["bytes"], row["count"]) == (len(sent) - 1, 0)
    assert row["client"] == "unknown"
