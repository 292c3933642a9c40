"""What has changed is purged from caches in front: by files of nginx, and by requests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from modelharbor.cache.tags import entity
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.http import purging as module
from modelharbor.http.caching import EVERY, surrogate_key
from modelharbor.http.purging import Address, NginxFolder, Purger, keys_in, purging
from tests.deploy.nginx import listening
from tests.documents import insert_actor, insert_model

pytestmark = pytest.mark.anyio
PATIENCE_SECONDS = 30.0  # a guard against hanging
NAME = "{:032x}"


def kept(folder: Path, number: int, headers: bytes, body: bytes = b"{}") -> Path:
    """A file as nginx writes it."""
    path = folder / f"{number % 16:x}" / NAME.format(number)
    path.parent.mkdir(exist_ok=True)
    head = b"\0" * 336 + b"\nKEY: http://localhost/graphql?documentId=a json br \n"
    path.write_bytes(head + b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n" + body)
    return path


def deletion(number: int) -> Row:
    return {"kind": "delete", "coll": "models", "id": number, "names": [], "document": None}


class Noting:
    """A target; it fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.purged: list[list[str]] = []

    async def purge(self, keys: Sequence[str]) -> int:
        if self.failures:
            self.failures -= 1
            raise httpx.ConnectError("nobody is there")
        self.purged.append(list(keys))
        return 1


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)


@asynccontextmanager
async def running(purger: Purger) -> AsyncIterator[None]:
    working = asyncio.create_task(purger.run())
    yield
    working.cancel()
    await asyncio.wait([working])
    assert working.cancelled()


@pytest.mark.parametrize(
    ("headers", "keys"),
    [
        (b"a: 1\r\nsurrogate-key: k1 k2\r\nb: 2", b"k1 k2"),
        (b"Surrogate-Key:k1", b"k1"),
        (b"a: surrogate-key: k1", b""),
        (b"x-surrogate-key: k1", b""),
        (b"a: 1", b""),
    ],
)
async def test_keys_are_read_from_the_headers_alone(
    tmp_path: Path, headers: bytes, keys: bytes
) -> None:
    path = kept(tmp_path, 1, headers, b'{"a":"\r\nsurrogate-key: k9\r\n\r\n"}')
    assert keys_in(str(path)) == keys


@pytest.mark.parametrize("text", [b"", b"\0" * 500, b"\nHTTP/1.1 200 OK\r\nsurrogate-key: k1"])
async def test_a_file_that_is_none_of_nginx_has_no_keys(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / NAME.format(1)
    path.write_bytes(text)
    assert keys_in(str(path)) == b""


async def test_files_go_by_their_keys(tmp_path: Path) -> None:
    first = kept(tmp_path, 1, b"surrogate-key: modelharbor k1 k2")
    second = kept(tmp_path, 2, b"surrogate-key: modelharbor k2")
    third = kept(tmp_path, 3, b"content-type: text/css")
    unfinished = first.with_name(f"{first.name}.0000000001")
    unfinished.write_bytes(first.read_bytes())
    folder = NginxFolder(tmp_path)
    assert await folder.purge(["k9"]) == 0
    assert await folder.purge(["k9", "k1"]) == 1
    assert not first.exists()
    second.write_bytes(third.read_bytes().replace(b"content-type: text", b"surrogate-key: k5 "))
    assert await folder.purge(["k2"]) == 0  # it is another answer by now
    assert await folder.purge(["k5"]) == 1
    first = kept(tmp_path, 1, b"surrogate-key: modelharbor k3")
    assert await folder.purge([EVERY]) == 1
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {third, unfinished}


async def test_a_folder_that_is_not_made_yet_is_empty(tmp_path: Path) -> None:
    assert await NginxFolder(tmp_path / "none").purge([EVERY]) == 0


async def test_an_address_is_asked_with_some_keys_at_a_time() -> None:
    asked: list[tuple[str, str, dict[bytes, bytes]]] = []
    statuses = iter([200, 200, 200, 302, 429, 503])

    async def cdn(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append((scope["method"], scope["path"], dict(scope["headers"])))
        await send({"type": "http.response.start", "status": next(statuses), "headers": []})
        await send({"type": "http.response.body", "body": b""})

    keys = [f"k{number}" for number in range(450)]
    async with (
        listening(cdn) as url,
        Address(f"{url}/service/s/purge", {"Fastly-Key": "secret"}) as address,
    ):
        assert await address.purge(keys) == 3
        for _ in range(3):
            with pytest.raises(httpx.HTTPError):
                await address.purge(["k"])
    sent = [headers[b"surrogate-key"].decode().split() for _, _, headers in asked[:3]]
    assert [len(some) for some in sent] == [200, 200, 50]
    assert [key for some in sent for key in some] == keys
    assert {(method, path) for method, path, _ in asked} == {("POST", "/service/s/purge")}
    assert {headers[b"fastly-key"] for _, _, headers in asked} == {b"secret"}
    assert len(asked) == 6


async def test_keys_are_purged_at_once_and_again() -> None:
    target = Noting()
    purger = Purger(target)
    async with running(purger):
        for number in (1, 2):
            target.purged.clear()
            purger.changed(deletion(number), 5)
            await until(lambda: len(target.purged) >= 2 and not purger._later)
            keys = {"models", "models-", f"models/{number}"}
            for purged in target.purged:
                assert set(purged) == set(map(surrogate_key, keys))


async def test_what_could_not_be_purged_is_tried_again() -> None:
    target = Noting(failures=3)
    purger = Purger(target)
    async with running(purger):
        purger.changed(deletion(1), 5)
        await until(lambda: len(target.purged) >= 2)
    assert target.failures == 0
    assert all(surrogate_key("models/1") in purged for purged in target.purged)


async def test_all_is_purged_where_changes_were_lost_or_are_too_many() -> None:
    for lose in (
        lambda purger: purger.lost(7),
        lambda purger: [purger.changed(deletion(number), 5) for number in range(10_001)],
    ):
        target = Noting()
        purger = Purger(target)
        purger.changed(deletion(1), 5)
        lose(purger)
        async with running(purger):
            await until(lambda: bool(target.purged))  # noqa: B023  # it is awaited here
        assert target.purged[0] == [EVERY]


async def test_changes_of_the_database_are_heard(database: Database) -> None:
    """From before it began, all; then what changes."""
    target = Noting()
    ada = await insert_actor("ada")
    model = await insert_model(ada, "tiny")
    working = asyncio.create_task(purging(database, target))
    try:
        await until(lambda: [EVERY] in target.purged)
        change: dict[str, Any] = {"$set": {"summary": "new"}}
        await database.data["models"].update_one({"_id": model.id}, change)
        keys = {surrogate_key(entity("models", model.id)), surrogate_key("models.summary")}
        keys.add(surrogate_key("models.summary@principal:public"))
        await until(lambda: sum(keys <= set(purged) for purged in target.purged) >= 2)
    finally:
        working.cancel()
        await asyncio.wait([working])


class Deaf(Noting):
    """Does not hear that it is cancelled the first time, as the driver may not (db/ending.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.has_swallowed = False

    async def purge(self, keys: Sequence[str]) -> int:
        await super().purge(keys)
        try:
            await asyncio.sleep(PATIENCE_SECONDS)
        except asyncio.CancelledError:
            self.has_swallowed = True
        return 1


async def test_it_ends_although_a_word_is_swallowed(database: Database) -> None:
    target = Deaf()
    working = asyncio.create_task(purging(database, target))
    await until(lambda: bool(target.purged))
    working.cancel()
    await asyncio.wait([working], timeout=PATIENCE_SECONDS)
    assert working.cancelled()
    assert target.has_swallowed
