"""Rows come to a file: fetched from where an earlier process came to, and never taken for whole."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from modelharbor.client import Client, ClientError, JobFailed, Progress, Rejected, Step, Unsafe
from modelharbor.client.exports import _place
from tests.client.strangers import served

pytestmark = pytest.mark.anyio
MIB = 1024 * 1024
CONTENTS = bytes(range(256)) * 4 * 1024 * 3  # 3 MiB
QUERY = "{ models { nodes { name } } }"


class Mill:
    """A server with the result of one export, that it says and sends as a test wants."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = {
            "kind": "EXPORT",
            "state": "SUCCEEDED",
            "error": None,
            "result": {
                "fileName": "models.jsonl",
                "rows": 7,
                "bytes": len(CONTENTS),
                "truncated": 0,
                "faults": 0,
                "expiresAt": "2026-01-08T00:00:00+00:00",
            },
        }
        self.answers: list[Response] = []
        """What the next requests for the result are answered with."""
        self.ranges: list[str | None] = []
        self.links = 0
        self.url = ""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Client]:
        routes = [
            Route("/graphql", self.graphql, methods=["POST"]),
            Route("/result", self.result),
            Route("/exports/stream", self.stream, methods=["POST"]),
        ]
        async with (
            served(Starlette(routes=routes)) as self.url,
            Client(self.url, "mh_secret", patience=2.0) as client,
        ):
            yield client

    async def graphql(self, request: Request) -> Response:
        self.links += 1
        node = {**self.job, "downloadUrl": f"{self.url}/result?{self.links}"}
        return JSONResponse({"data": {"node": node}})

    async def result(self, request: Request) -> Response:
        assert "authorization" not in request.headers  # the link is enough
        asked = request.headers.get("range")
        self.ranges.append(asked)
        if self.answers:
            return self.answers.pop(0)
        if asked is None:
            return Response(CONTENTS)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        about = {"content-range": f"bytes {start}-{len(CONTENTS) - 1}/{len(CONTENTS)}"}
        return Response(CONTENTS[start:], 206, about)

    async def stream(self, request: Request) -> Response:
        return self.answers.pop(0)


async def cut(size: int) -> AsyncIterator[bytes]:
    """So many bytes; then the server breaks down."""
    yield CONTENTS[:size]
    await asyncio.sleep(0)
    raise RuntimeError("broken")


def broken(size: int, media: str = "application/octet-stream") -> Response:
    length = {} if media.startswith("application/x-") else {"content-length": str(len(CONTENTS))}
    return StreamingResponse(cut(size), headers=length, media_type=media)


async def test_a_result_is_fetched_to_its_place(tmp_path: Path) -> None:
    told: list[Progress] = []
    mill, path = Mill(), tmp_path / "rows.jsonl"
    async with mill.open() as client:
        result = await client.fetch_export("job", path, report=told.append)
    assert path.read_bytes() == CONTENTS
    assert [at.name for at in tmp_path.iterdir()] == ["rows.jsonl"]
    assert (result.rows, result.size_bytes) == (7, len(CONTENTS))
    size = len(CONTENTS)
    assert told[0] == Progress("rows.jsonl", Step.RECEIVING, 0, size)
    assert told[-1] == Progress("rows.jsonl", Step.DONE, size, size, size)


async def test_it_goes_on_where_a_connection_broke_off(tmp_path: Path) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"
    mill.answers = [broken(MIB), JSONResponse({}, 503)]
    async with mill.open() as client:
        await client.fetch_export("job", path)
    assert path.read_bytes() == CONTENTS
    first, *others = mill.ranges
    assert first is None
    assert len(others) == 2
    assert len(set(others)) == 1


class Killed(BaseException):
    pass


async def test_it_goes_on_where_another_process_was_killed(tmp_path: Path) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"

    def die(now: Progress) -> None:
        if now.moved:
            raise Killed

    async with mill.open() as client:
        with pytest.raises(Killed):
            await client.fetch_export("job", path, report=die)
        had = (tmp_path / "rows.jsonl.part").stat().st_size
        assert 0 < had < len(CONTENTS)
        assert not path.exists()
        await client.fetch_export("job", path)
        assert mill.ranges == [None, f"bytes={had}-"]
        assert path.read_bytes() == CONTENTS
        # What is left of another export is not gone on with.
        with pytest.raises(Killed):
            await client.fetch_export("job", path, report=die)
        await client.fetch_export("another", path)
    assert mill.ranges[2:] == [None, None]
    assert [at.name for at in tmp_path.iterdir()] == ["rows.jsonl"]


async def test_a_link_whose_time_has_passed_is_read_again(tmp_path: Path) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"
    mill.answers = [JSONResponse({}, 403)]
    async with mill.open() as client:
        await client.fetch_export("job", path)
        assert path.read_bytes() == CONTENTS
        mill.answers = [JSONResponse({}, 403), JSONResponse({}, 403)]
        with pytest.raises(Rejected) as refused:
            await client.fetch_export("job", path)
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Response(CONTENTS + b"x"), "SIZE_MISMATCH"),
        (Response(CONTENTS, headers={"content-encoding": "br"}), "RANGE_NOT_SATISFIABLE"),
        (Response(CONTENTS, 206, {"content-range": "bytes 1-2/3"}), "RANGE_NOT_SATISFIABLE"),
        (Response(status_code=302, headers={"location": "http://else/"}), "HTTP_302"),
        (
            JSONResponse({"errors": [{"message": "Gone.", "extensions": {"code": "GONE"}}]}, 410),
            "GONE",
        ),
    ],
)
async def test_another_answer_is_never_taken_for_it(
    answer: Response, code: str, tmp_path: Path
) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"
    mill.answers = [answer]
    async with mill.open() as client:
        with pytest.raises(Rejected) as refused:
            await client.fetch_export("job", path)
    assert refused.value.code == code
    assert not path.exists()


async def test_a_job_that_failed_leaves_nothing(tmp_path: Path) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"
    error = {"code": "FORBIDDEN", "message": "Your rights ended."}
    mill.job |= {"state": "FAILED", "error": error, "result": None}
    async with mill.open() as client:
        with pytest.raises(JobFailed, match="Your rights ended") as refused:
            await client.fetch_export("job", path)
    assert refused.value.code == "FORBIDDEN"
    assert list(tmp_path.iterdir()) == []


async def test_one_process_at_a_time_writes_a_file(tmp_path: Path) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"
    async with mill.open() as client:
        with _place(path, "of another process"), pytest.raises(ClientError) as refused:
            await client.fetch_export("job", path)
        assert refused.value.code == "LOCKED"
        (tmp_path / "folder").mkdir()
        with pytest.raises(Unsafe):
            await client.fetch_export("job", tmp_path / "folder")
        (tmp_path / "linked.part").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic links"):
            await client.fetch_export("job", tmp_path / "linked")
    assert not (tmp_path / "elsewhere").exists()


# ---- straight


@pytest.mark.parametrize("size", [0, MIB])
async def test_rows_that_break_off_are_no_file(size: int, tmp_path: Path) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"
    mill.answers = [broken(size, "application/x-ndjson")]
    async with mill.open() as client:
        with pytest.raises(ClientError) as refused:
            await client.stream_to(QUERY, path)
    assert refused.value.code == "CUT_OFF"
    assert list(tmp_path.iterdir()) == []


async def test_rows_are_asked_for_again_before_the_first_came(tmp_path: Path) -> None:
    mill, path = Mill(), tmp_path / "rows.jsonl"
    rows = b'{"name":"a"}\n'
    mill.answers = [
        JSONResponse({}, 503, {"retry-after": "0"}),
        Response(rows, media_type="application/x-ndjson"),
        Response(b"<html>", media_type="text/html"),
        JSONResponse(
            {"errors": [{"message": "No.", "extensions": {"code": "BAD_USER_INPUT"}}]}, 400
        ),
    ]
    sizes: list[int] = []
    async with mill.open() as client:
        assert await client.stream_to(QUERY, path, report=sizes.append) == len(rows)
        assert (path.read_bytes(), sizes) == (rows, [len(rows)])
        for code in ("NO_SERVER", "BAD_USER_INPUT"):
            with pytest.raises(Rejected) as refused:
                await client.stream_to(QUERY, path)
            assert refused.value.code == code
    assert path.read_bytes() == rows  # what was there stays
    assert orjson.loads(rows) == {"name": "a"}
