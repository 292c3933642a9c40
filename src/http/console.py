"""GraphiQL: a page of our own files, which `web/` builds and the wheel carries, with the compressed form
of each beside it.

The page is the same for everyone and holds nothing secret; a token comes in the fragment of its
address, which browsers do not send.
"""

import os
import stat
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from modelharbor.errors import NotFound
from modelharbor.settings import Settings

from .answers import error_response
from .caching import codings, matching, tag_with
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
    "vary": "Accept-Encoding",
}
FRESH: Final = {**SAFE, "cache-control": "no-cache"}
HASHED: Final = {**SAFE, "cache-control": "public, max-age=31536000, immutable"}
SUFFIXES: Final = {"br": ".br", "gzip": ".gz"}
"""Of the files that hold a content coding."""


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
    accepts = ",".join(request.headers.getlist("accept-encoding"))
    found = None
    if media_type is not None:
        found = await run_sync(_form, BUILT / path, codings(accepts))
    if found is None:
        return error_response(request.scope, NotFound(missing))
    chosen, digest, coding, about = found
    known = request.headers.get("if-none-match")
    tag = None if known is None else matching(known, digest, accepts)
    if tag is not None:
        return Response(status_code=304, headers={**headers, "etag": tag})
    tag = f'"{digest}"'
    made = {**headers, "etag": tag}
    if coding is not None:
        made["content-encoding"] = coding
        made["etag"] = tag_with(tag.encode(), coding.encode()).decode()
    return FileResponse(chosen, headers=made, media_type=media_type, stat_result=about)


def _form(
    path: Path, accepted: tuple[str, ...]
) -> tuple[Path, str, str | None, os.stat_result] | None:
    """The file to send, the digest of its plain contents, its coding; None: there is no such file."""
    plain = _stat(path)
    if plain is None:
        return None
    digest = _digest(path, plain.st_mtime_ns, plain.st_size)
    for coding in accepted:
        suffix = SUFFIXES.get(coding)
        compressed = path.with_name(path.name + suffix) if suffix else None
        about = compressed and _stat(compressed)
        if compressed and about:
            return compressed, digest, coding, about
    return path, digest, None, plain


def _stat(path: Path) -> os.stat_result | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a zero byte
        return None
    return found if stat.S_ISREG(found.st_mode) else None


@lru_cache(maxsize=256)
def _digest(path: Path, changed: int, size: int) -> str:
    """Of contents, not of times: all machines tell the same."""
    return blake2b(path.read_bytes(), digest_size=16).hexdigest()
