"""The yardstick: Starlette sends the same bytes again and again. `python -m bench.cache.fixed --port PORT`.

It runs as our own server does (uvicorn with the same settings), looks at nothing of a request and knows
no GraphQL: whatever else a server does for an answer from a cache comes on top.
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
    folder = Path(os.environ[BODIES])
    return Starlette(
        routes=[Route("/readyz", sending(b"{}"))]
        + [
            Route(f"/{path.stem}", sending(path.read_bytes()), methods=["GET", "POST"])
            for path in sorted(folder.glob("*.json"))
        ]
    )


def sending(body: bytes) -> Callable[[Request[Any]], Awaitable[Response]]:
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
