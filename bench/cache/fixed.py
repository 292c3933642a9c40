"""The yardstick: Starlette sends the same bytes again and again. `python -m bench.cache.fixed --port PORT`.

It runs as our own server does (uvicorn with the same settings), looks at nothing of a request and knows
no GraphQL: whatever else a server does for an answer from a cache comes on top. `/NAME` takes the body
of a request in, as whoever answers it has to; `/NAME/unread` does not even do that.
"""

import argparse
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from modelharbor.http.server import options

BODIES: Final = "BENCH_FIXED_BODIES"  # of the environment: a folder of NAME.json, one a path


def create_app() -> Starlette:
    routes = [Route("/readyz", unread(b"{}"))]
    for path in sorted(Path(os.environ[BODIES]).glob("*.json")):
        body = path.read_bytes()
        routes.append(Route(f"/{path.stem}", read(body), methods=["GET", "POST"]))
        routes.append(Route(f"/{path.stem}/unread", unread(body), methods=["POST"]))
    return Starlette(routes=routes)


Endpoint = Callable[[Request[Any]], Awaitable[Response]]


def read(body: bytes) -> Endpoint:
    async def answer(request: Request[Any]) -> Response:
        await request.body()
        return Response(body, media_type="application/json")

    return answer


def unread(body: bytes) -> Endpoint:
    async def answer(request: Request[Any]) -> Response:
        return Response(body, media_type="application/json")

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    wanted = options("127.0.0.1", arguments.port, workers=1)
    uvicorn.run(**wanted | {"app": f"{__spec__.name}:create_app"})


if __name__ == "__main__":
    main()
