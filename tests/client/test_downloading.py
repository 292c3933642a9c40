"""Versions come to a folder."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import RedirectResponse, Response, StreamingResponse

from modelharbor.client import (
    Client,
    ClientError,
    Damaged,
    Progress,
    Rejected,
    Step,
    Transferred,
    Unsafe,
    downloading,
)
from modelharbor.client import answers as answering
from tests.client.conftest import Quay
from tests.client.strangers import Shop

pytestmark = pytest.mark.anyio
PIECE = 64 * 1024


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "PIECE_BYTES", PIECE)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        at.relative_to(folder).as_posix(): at.read_bytes()
        for at in folder.rglob("*")
        if at.is_file() or at.is_symlink()
    }


async def test_a_version_is_fetched_whole(quay: Quay, tmp_path: Path) -> None:
    files = {
        "model.bin": os.urandom(10 * PIECE + 17),
        "sub/config.json": b"{}",
        "sub/deep/exact.bin": os.urandom(2 * PIECE),
        "empty": b"",
    }
    await quay.store("tiny", files)
    size, to = sum(map(len, files.values())), tmp_path / "to"
    told: list[Progress] = []
    async with Client(quay.url, quay.token) as client:
        version = await client.resolve("ADA/tiny")
        assert (version.reference, version.file_count, version.size_bytes) == (
            "ada/tiny:1",
            4,
            size,
        )
        first = await client.download(version, to, report=told.append)
        assert first == Transferred(4, size, size, 0)
        assert files_of(to) == files  # and nothing beside them
        assert sorted(now.path for now in told if now.step is Step.DONE) == sorted(files)
        received = [now for now in told if now.path == "model.bin"]
        assert [now.done for now in received] == sorted(now.done for now in received)

        assert await client.download(version, to) == Transferred(4, size, 0, 4)
        (to / "sub/config.json").write_bytes(b"{]")
        (to / "empty").write_bytes(b"full")
        (to / "more.txt").write_bytes(b"mine")
        assert await client.download(version, to) == Transferred(4, size, 2, 2)
        assert files_of(to) == files | {"more.txt": b"mine"}


async def test_only_what_is_included_comes(quay: Quay, tmp_path: Path) -> None:
    files = {"a.json": b"1", "b.bin": b"2", "onnx/c.json": b"3", "onnx/d.bin": b"4", "x.txt": b"5"}
    await quay.store("tiny", files)
    async with Client(quay.url, quay.token) as client:
        version = await client.resolve("ada/tiny")
        for number, (include, names) in enumerate(
            (
                (["*.json"], {"a.json", "onnx/c.json"}),
                (["onnx/", "x.txt"], {"onnx/c.json", "onnx/d.bin", "x.txt"}),
                (["?.bin"], {"b.bin"}),
            )
        ):
            await client.download(version, tmp_path / str(number), include=include)
            assert set(files_of(tmp_path / str(number))) == names
        with pytest.raises(Rejected) as caught:
            await client.download(version, tmp_path / "none", include=["*.gguf"])
        assert caught.value.code == "NOT_FOUND"


async def test_without_the_permission_nothing_comes(quay: Quay, tmp_path: Path) -> None:
    await quay.store("tiny", {"a.bin": b"1"})
    async with Client(quay.url) as nobody:
        with pytest.raises(Rejected) as caught:
            await nobody.resolve("ada/tiny")
        assert caught.value.code == "NOT_FOUND"


async def broken_off(shop: Shop, folder: Path, pieces: int) -> None:
    """A download of its one large file that was given up after so many pieces."""
    async with Client(shop.url, "t", patience=30) as client:
        version = await client.resolve("eve/trap")
        enough = asyncio.Event()

        def report(now: Progress) -> None:
            if now.done >= pieces * PIECE:
                enough.set()

        task = asyncio.create_task(client.download(version, folder, parallel=1, report=report))
        await enough.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_what_broke_off_goes_on(tmp_path: Path) -> None:
    content = os.urandom(8 * PIECE + 5)
    async with Shop({"model.bin": content}).open() as shop:
        await broken_off(shop, tmp_path, 5)
        assert not (tmp_path / "model.bin").exists()
        shop.asked.clear()
        async with Client(shop.url, "t") as client:
            result = await client.download(await client.resolve("eve/trap"), tmp_path)
        assert len(content) - 5 * PIECE <= result.moved_bytes <= len(content) - 4 * PIECE
        assert files_of(tmp_path) == {"model.bin": content}
        assert not any("authorization" in request.headers for request in shop.asked)


async def test_a_flipped_byte_of_what_was_there_is_found(tmp_path: Path) -> None:
    content = os.urandom(8 * PIECE)
    async with Shop({"model.bin": content}).open() as shop:
        await broken_off(shop, tmp_path, 5)
        [part] = tmp_path.glob(".modelharbor-*.part")
        with part.open("r+b") as file:
            file.seek(PIECE + 7)
            file.write(bytes([content[PIECE + 7] ^ 1]))
        async with Client(shop.url) as client:
            result = await client.download(await client.resolve("eve/trap"), tmp_path)
        assert files_of(tmp_path) == {"model.bin": content}
        assert result.moved_bytes > len(content)  # what came in vain, and all of it anew


async def test_a_short_part_with_a_full_map_is_found(tmp_path: Path) -> None:
    content = os.urandom(4 * PIECE)
    async with Shop({"model.bin": content}).open() as shop:
        await broken_off(shop, tmp_path, 2)
        [map] = tmp_path.glob(".modelharbor-*.map")
        map.write_bytes(b"\1" * 4)
        async with Client(shop.url) as client:
            await client.download(await client.resolve("eve/trap"), tmp_path)
        assert files_of(tmp_path) == {"model.bin": content}


@pytest.mark.parametrize("size", [10, 3 * PIECE])
async def test_wrong_contents_never_take_their_place(size: int, tmp_path: Path) -> None:
    shop = Shop({"model.bin": os.urandom(size)})
    shop.hashes["model.bin"] = "0" * 64
    (tmp_path / "model.bin").write_bytes(b"mine")
    async with shop.open(), Client(shop.url) as client:
        with pytest.raises(Damaged) as caught:
            await client.download(await client.resolve("eve/trap"), tmp_path)
    assert caught.value.code == "CHECKSUM_MISMATCH"
    assert files_of(tmp_path) == {"model.bin": b"mine"}


@pytest.mark.parametrize(
    "path",
    ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil", "..", "a//evil", "link/evil", "link"],
)
async def test_a_server_cannot_write_elsewhere(path: str, tmp_path: Path) -> None:
    outside, to = tmp_path / "outside", tmp_path / "to"
    outside.mkdir()
    to.mkdir()
    (to / "link").symlink_to(outside)
    async with Shop({path: b"evil"}).open() as shop, Client(shop.url) as client:
        version = await client.resolve("eve/trap")
        if path == "link":  # takes the place of the link itself
            await client.download(version, to)
            assert (to / "link").read_bytes() == b"evil"
            assert not (to / "link").is_symlink()
        else:
            with pytest.raises(Unsafe):
                await client.download(version, to)
            assert shop.asked == []
    assert list(outside.iterdir()) == []
    assert sorted(at.name for at in tmp_path.iterdir()) == ["outside", "to"]


async def test_a_planted_part_is_not_written_through(tmp_path: Path) -> None:
    content = b"x" * 10
    shop = Shop({"model.bin": content})
    key = f"model.bin\n{shop.hashes['model.bin']}\n{PIECE}".encode()
    name = f".modelharbor-{sha256(key).hexdigest()[:32]}"
    to, victim = tmp_path / "to", tmp_path / "victim"
    to.mkdir()
    victim.write_bytes(b"precious")
    async with shop.open(), Client(shop.url) as client:
        version = await client.resolve("eve/trap")
        for ending in (".part", ".map"):
            for plant in (Path.symlink_to, Path.hardlink_to):
                plant(to / f"{name}{ending}", victim)
                with pytest.raises(Unsafe):
                    await client.download(version, to)
                (to / f"{name}{ending}").unlink()
        assert victim.read_bytes() == b"precious"
        await client.download(version, to)
    assert (to / "model.bin").read_bytes() == content


async def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    async with Shop({"a": b"1", "a/b": b"2"}).open() as shop, Client(shop.url) as client:
        with pytest.raises(Unsafe):
            await client.download(await client.resolve("eve/trap"), tmp_path, parallel=1)


async def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    content = os.urandom(3 * PIECE)
    async with Shop({"model.bin": content}).open() as shop, Client(shop.url) as client:
        await broken_off(shop, tmp_path, 1)
        [part] = tmp_path.glob(".modelharbor-*.part")
        version = await client.resolve("eve/trap")
        with part.open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(ClientError) as caught:
                await client.download(version, tmp_path)
            assert caught.value.code == "LOCKED"
        await client.download(version, tmp_path)
    assert files_of(tmp_path) == {"model.bin": content}


async def test_links_are_renewed_and_what_passes_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "MOST_PIECES_AT_ONCE", 1)
    content = os.urandom(2 * PIECE)
    shop = Shop({"model.bin": content})
    async with shop.open(), Client(shop.url) as client:
        version = await client.resolve("eve/trap")
        shop.refusals = [
            Response(status_code=404),  # its time has passed
            Response(status_code=503, headers={"retry-after": "0"}),
            RedirectResponse(f"{shop.url}/files/0?elsewhere", 302),
        ]
        await client.download(version, tmp_path)
    assert files_of(tmp_path) == {"model.bin": content}
    assert [request.url.query for request in shop.asked] == ["", "new", "new", "elsewhere", "new"]
    # A server whose store gives the files itself sends nobody there who has a condition on its tag.
    assert not any("if-match" in request.headers for request in shop.asked)


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([Response(status_code=404), Response(status_code=404)], "HTTP_404"),
        ([Response(status_code=412)], "CONFLICT"),
        ([Response(b"x" * 5, 200)], "RANGE_NOT_SATISFIABLE"),
        ([Response(b"x", 206, {"content-range": "bytes 7-7/9"})], "RANGE_NOT_SATISFIABLE"),
        ([RedirectResponse("/files/0", 302) for _ in range(3)], "NOT_FOUND"),
    ],
)
async def test_a_server_that_answers_nonsense_is_left(
    answers: list[Response], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "MOST_PIECES_AT_ONCE", 1)
    shop = Shop({"model.bin": os.urandom(2 * PIECE)})
    shop.refusals = answers
    async with shop.open(), Client(shop.url) as client:
        with pytest.raises(ClientError) as caught:
            await client.download(await client.resolve("eve/trap"), tmp_path)
    assert caught.value.code == code
    assert not (tmp_path / "model.bin").exists()


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield bytes(64 * 1024)
        await asyncio.sleep(0)  # the server notices that nobody is there


@pytest.mark.parametrize("status", [404, 500])
async def test_a_refusal_without_end_is_not_read(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "MOST_BYTES", 1024 * 1024)
    shop = Shop({"model.bin": b"x" * 10})
    shop.refusals = [StreamingResponse(endless(), status)]
    async with shop.open(), Client(shop.url) as client:
        with pytest.raises(Rejected) as caught:
            await client.download(await client.resolve("eve/trap"), tmp_path)
    assert caught.value.code == "BAD_ANSWER"


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:99999/", "gopher:x"],
)
async def test_a_redirect_to_anything_but_http_is_refused(location: str, tmp_path: Path) -> None:
    shop = Shop({"model.bin": b"x" * 10})
    shop.refusals = [Response(status_code=302, headers={"location": location})]
    async with shop.open(), Client(shop.url, "mh_secret") as client:
        with pytest.raises(Rejected) as caught:
            await client.download(await client.resolve("eve/trap"), tmp_path)
    assert caught.value.code == "BAD_ANSWER"
    assert ["authorization" in request.headers for request in shop.asked] == [False]


@pytest.mark.parametrize("size", ["-1", "1e9", None, "9" * 5000, str(10**15), str(10**18)])
async def test_an_impossible_size_is_refused(
    size: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop({"model.bin": b"x" * 10})
    answer = shop.answer

    def lie(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        data = answer(query, variables)
        if "node" in data:
            data["node"]["files"]["nodes"][0]["sizeBytes"] = size
        return data

    monkeypatch.setattr(shop, "answer", lie)
    async with shop.open(), Client(shop.url) as client:
        with pytest.raises(Rejected) as caught:
            await client.download(await client.resolve("eve/trap"), tmp_path)
    assert caught.value.code == "BAD_ANSWER"
    assert shop.asked == []


async def test_more_bytes_than_promised_are_not_taken(tmp_path: Path) -> None:
    shop = Shop({"model.bin": b"x" * 10})
    shop.refusals = [Response(b"x" * 11)]
    async with shop.open(), Client(shop.url) as client:
        with pytest.raises(Rejected) as caught:
            await client.download(await client.resolve("eve/trap"), tmp_path)
    assert caught.value.code == "SIZE_MISMATCH"
    assert not (tmp_path / "model.bin").exists()
