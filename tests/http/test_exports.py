"""Results of exports over HTTP: bytes, ranges, and who may have them."""

import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import pytest
from bson import ObjectId
from httpx import AsyncClient, Response

from modelharbor.auth.links import DownloadLinks, secret_key
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobDocument, JobKind, JobState
from modelharbor.db.tokens import Permission
from modelharbor.resolvers.exports import piece_key
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from tests.documents import SCOPES, insert_actor, insert_job, viewer_of
from tests.http.serving import Server, codes
from tests.http.test_downloads import bearer

pytestmark = pytest.mark.anyio
NAME: Final = "models-20260101-000000.jsonl"
SIZES: Final = (1000, 1, 30_000, 500)
CONTENTS: Final = random.Random(5).randbytes(sum(SIZES))


@dataclass
class Desk:
    """An export of ada's, in four pieces, that she had as a member of acme."""

    client: AsyncClient
    database: Database
    links: DownloadLinks
    ada: ActorDocument
    member: MembershipDocument
    job: JobDocument

    @property
    def url(self) -> str:
        return f"/exports/{self.job.id}/{NAME}"

    @property
    def link(self) -> str:
        return self.links.export(self.job.id, NAME, 60)

    async def get(self, url: str, method: str = "GET", **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.request(method, url, headers=named)

    async def set(self, **values: Any) -> None:
        await self.database.data["jobs"].update_one(
            {"_id": self.job.id},
            {"$set": {name.replace("__", "."): value for name, value in values.items()}},
        )


@pytest.fixture
async def desk(database: Database, settings: Settings, server: Server) -> Desk:
    acme, ada = await insert_actor("acme", ActorKind.ORGANIZATION), await insert_actor("ada")
    member = MembershipDocument(organization_id=acme.id, user_id=ada.id, role=Role.VIEWER)
    await member.insert()
    pieces = [(f"{number}-3", size) for number, size in enumerate(SIZES)]
    job = await insert_job(
        ada,
        kind=JobKind.EXPORT,
        state=JobState.SUCCEEDED,
        token=3,
        scopes=[scope.value for scope in SCOPES],
        checkpoint={
            "pieces": pieces,
            "principals": list(viewer_of(ada, {acme.id: Role.VIEWER}).principals),
        },
        result={
            "fileName": NAME,
            "mediaType": "application/x-ndjson",
            "bytes": len(CONTENTS),
            "expiresAt": (utc_now() + timedelta(days=1)).isoformat(),
        },
    )
    async with open_storage(settings) as storage:
        at = 0
        for name, size in pieces:
            await storage.put(piece_key(job.id, name), CONTENTS[at : at + size])
            at += size
    return Desk(server.client, database, DownloadLinks(secret_key(settings), ""), ada, member, job)


async def test_the_whole_file(desk: Desk) -> None:
    answer = await desk.get(desk.link, accept_encoding="gzip, zstd")
    assert (answer.status_code, answer.content) == (200, CONTENTS)
    assert "content-encoding" not in answer.headers
    expected = {
        "content-type": "application/x-ndjson",
        "content-length": str(len(CONTENTS)),
        "content-disposition": f"attachment; filename=\"{NAME}\"; filename*=UTF-8''{NAME}",
        "etag": f'"{desk.job.id}-3"',
        "accept-ranges": "bytes",
        "cache-control": "private, no-store",
        "x-content-type-options": "nosniff",
    }
    assert expected.items() <= dict(answer.headers).items()

    head = await desk.get(desk.link, "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert expected.items() <= dict(head.headers).items()
    known = await desk.get(desk.link, if_none_match=f'"x", {expected["etag"]}')
    assert (known.status_code, known.content) == (304, b"")


async def test_ranges_go_across_pieces(desk: Desk) -> None:
    size = len(CONTENTS)
    for asked, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=990-1010", 990, 1011),
        ("bytes=1000-1000", 1000, 1001),
        ("bytes=999-", 999, size),
        ("bytes=-600", size - 600, size),
        ("bytes=0-999999", 0, size),
    ):
        answer = await desk.get(desk.link, range=asked)
        assert (answer.status_code, answer.content) == (206, CONTENTS[start:end]), asked
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    beyond = await desk.get(desk.link, range=f"bytes={size}-")
    assert (beyond.status_code, codes(beyond)) == (416, ["RANGE_NOT_SATISFIABLE"])
    assert beyond.headers["content-range"] == f"bytes */{size}"
    tag = f'"{desk.job.id}-3"'
    part = await desk.get(desk.link, range="bytes=1-2", if_range=tag)
    assert (part.status_code, part.content) == (206, CONTENTS[1:3])
    other = await desk.get(desk.link, range="bytes=1-2", if_range='"other"')
    assert (other.status_code, other.content) == (200, CONTENTS)


async def test_it_is_for_who_asked_for_it(desk: Desk) -> None:
    mine = await desk.get(desk.url, authorization=await bearer(desk.ada))
    assert (mine.status_code, mine.content) == (200, CONTENTS)
    eve = await insert_actor("eve", is_operator=True)
    link = desk.link
    for answer in (
        await desk.get(desk.url),
        await desk.get(desk.url, authorization=await bearer(eve)),
        await desk.get(desk.url, authorization=await bearer(desk.ada, scopes=[])),
        await desk.get(link.replace(NAME, "other.jsonl")),
        await desk.get(link.replace(str(desk.job.id), str(ObjectId()))),
        await desk.get(link.replace(str(desk.job.id), "x"), authorization=await bearer(desk.ada)),
        await desk.get(link[:-1] + ("0" if link[-1] != "0" else "1")),
        await desk.get(DownloadLinks(desk.links.key, "").export(desk.job.id, NAME, -120)),
        # A link to a file of the same id is none to this.
        await desk.get(
            DownloadLinks(desk.links.key, "")
            .link(desk.job.id, NAME, 60)
            .replace("/files/", "/exports/")
        ),
    ):
        assert (answer.status_code, codes(answer)) == (404, ["NOT_FOUND"])
    bad = await desk.get(desk.url, authorization="Bearer mh_x")
    assert (bad.status_code, codes(bad)) == (401, ["UNAUTHENTICATED"])


async def test_rights_that_ended_since_end_this_too(desk: Desk) -> None:
    await desk.member.delete()
    token = await bearer(desk.ada)
    for answer in (
        await desk.get(desk.link),
        await desk.get(desk.link, "HEAD"),
        await desk.get(desk.url, authorization=token),
    ):
        assert answer.status_code == 403
    refused = await desk.get(desk.link)
    assert codes(refused) == ["FORBIDDEN"]
    assert CONTENTS[:100] not in refused.content

    await desk.member.insert()
    assert (await desk.get(desk.link)).status_code == 200
    await desk.ada.delete()
    assert codes(await desk.get(desk.link)) == ["FORBIDDEN"]


async def test_it_is_kept_for_a_time(desk: Desk, settings: Settings) -> None:
    async with open_storage(settings) as storage:
        await storage.delete(piece_key(desk.job.id, "0-3"))
    for method in ("GET", "HEAD"):
        lost = await desk.get(desk.link, method)
        assert lost.status_code == 404
    assert codes(await desk.get(desk.link)) == ["NOT_STORED"]
    await desk.set(checkpoint=None)
    gone = await desk.get(desk.link)
    assert (gone.status_code, codes(gone)) == (410, ["GONE"])
    await desk.set(checkpoint={"pieces": [], "principals": []})
    await desk.set(result__expiresAt=(utc_now() - timedelta(seconds=1)).isoformat())
    assert codes(await desk.get(desk.link)) == ["GONE"]
    for state in (JobState.FAILED, JobState.RUNNING):
        await desk.set(state=state.value)
        assert codes(await desk.get(desk.link)) == ["NOT_FOUND"]
    await desk.set(state="SUCCEEDED", kind=JobKind.REINDEX.value)
    assert codes(await desk.get(desk.link)) == ["NOT_FOUND"]


async def test_an_empty_one(desk: Desk) -> None:
    await desk.set(checkpoint={"pieces": [], "principals": []}, result__bytes=0)
    answer = await desk.get(desk.link)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
    assert (await desk.get(desk.link, "HEAD")).status_code == 200


@pytest.mark.parametrize("permission", [Permission.DOWNLOAD, Permission.WRITE])
async def test_a_token_needs_the_scope_read(desk: Desk, permission: Permission) -> None:
    token = await bearer(desk.ada, scopes=[permission])
    assert codes(await desk.get(desk.url, authorization=token)) == ["NOT_FOUND"]
