"""Servers that are not ours, and say whatever a test wants."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """Its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = _Server(uvicorn.Config(app, "127.0.0.1", port, log_config=None, lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 30)


class Shop:
    """A registry of one version, with files that lie at once or not at all."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.contents = files
        self.hashes = {path: sha256(content).hexdigest() for path, content in files.items()}
        self.asked: list[Request] = []
        self.refusals: list[Response] = []
        """What the next requests for contents are answered with."""
        self.url, self.name = "", "eve/trap"

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Shop"]:
        routes = [
            Route("/graphql", self.graphql, methods=["POST"]),
            Route("/files/{number:int}", self.file),
        ]
        async with served(Starlette(routes=routes)) as self.url:
            yield self

    async def graphql(self, request: Request) -> Response:
        asked = await request.json()
        return JSONResponse({"data": self.answer(asked["query"], asked["variables"])})

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if query.startswith("query Resolve"):
            return {"resolve": self.version()}
        if query.startswith("query Link"):
            return {"node": {"downloadUrl": f"{self.url}/files/{variables['id']}?new"}}
        assert query.startswith("query FilesWithLinks"), query
        nodes = [
            {
                "id": str(number),
                "path": path,
                "sizeBytes": str(len(content)),
                "sha256": self.hashes[path],
                "downloadUrl": f"{self.url}/files/{number}",
            }
            for number, (path, content) in enumerate(self.contents.items())
        ]
        page = {"endCursor": None, "hasNextPage": False}
        return {"node": {"files": {"nodes": nodes, "pageInfo": page}}}

    def version(self) -> dict[str, Any]:
        return {
            "id": "v",
            "number": 1,
            "status": "READY",
            "label": None,
            "digest": None,
            "sizeBytes": str(sum(len(content) for content in self.contents.values())),
            "fileCount": len(self.contents),
            "model": {"id": "m", "fullName": self.name},
        }

    async def file(self, request: Request) -> Response:
        self.asked.append(request)
        if self.refusals:
            return self.refusals.pop(0)
        content = list(self.contents.values())[request.path_params["number"]]
        found = request.headers.get("range")
        if found is None:
            return Response(content)
        start, end = (int(number) for number in found.removeprefix("bytes=").split("-"))
        part = content[start : end + 1]
        told = {"content-range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}
        return Response(part, 206, told)
