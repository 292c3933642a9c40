"""GraphiQL: a page of our own files, which `web/` builds and the wheel carries.

The page is the same for everyone and holds nothing secret; a token comes in the fragment of its
address, which browsers do not send.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from modelharbor.errors import NotFound
from modelharbor.settings import Settings

from .answers import error_response
from .state import State

BUILT: Final = Path(__file__).parent / "static" / "graphiql"
MEDIA_TYPES: Final = {  # not guessed: the machine's own table of types differs from place to place
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".ttf": "font/ttf",
}
# Workers take the policy of their own answer, so every file has it. The editor writes style elements.
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "worker-src 'self'",
        "connect-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "font-src 'self' data:",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SAFE: Final = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
FRESH: Final = {**SAFE, "cache-control": "no-cache"}
HASHED: Final = {**SAFE, "cache-control": "public, max-age=31536000, immutable"}


def console_routes(settings: Settings) -> list[BaseRoute]:
    """`/graphiql` with its files, and `/`, which leads there; nothing when GraphiQL is off."""
    if not settings.graphiql:
        return []
    return [
        Route("/", to_graphiql),
        Route("/graphiql", graphiql_page),
        Route("/graphiql/", graphiql_page),
        Route("/graphiql/assets/{name}", graphiql_asset),
    ]


async def to_graphiql(request: Request[State]) -> Response:
    return RedirectResponse("/graphiql")


async def graphiql_page(request: Request[State]) -> Response:
    """The page; it names its files by absolute paths, so it works at any address."""
    if not request.state["settings"].graphiql:
        return error_response(request.scope, NotFound("GraphiQL is switched off here."))
    return await _file(
        request,
        "index.html",
        FRESH,
        "GraphiQL is not built here: `make run` builds it, and the wheel brings it.",
    )


async def graphiql_asset(request: Request[State]) -> Response:
    return await _file(
        request, f"assets/{request.path_params['name']}", HASHED, "GraphiQL has no such file."
    )


async def _file(
    request: Request[State], path: str, headers: Mapping[str, str], missing: str
) -> Response:
    """`path` is below BUILT: a name from a route holds no slash, and `..` is no file."""
    media_type = MEDIA_TYPES.get(Path(path).suffix)
    if media_type is None or not await anyio.Path(BUILT / path).is_file():
        return error_response(request.scope, NotFound(missing))
    return FileResponse(BUILT / path, headers=headers, media_type=media_type)
