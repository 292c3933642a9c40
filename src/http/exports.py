"""`/exports/…`: what exports have written, to who asked for it."""

import re

from bson import ObjectId
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.tokens import authenticate
from modelharbor.db.tokens import Permission
from modelharbor.errors import NotFound, NotStored, RangeNotSatisfiable
from modelharbor.resolvers.exports import Result, read_result, result_of

from .answers import error_response
from .downloads import byte_range, disposition, is_named
from .state import State


def export_routes() -> list[BaseRoute]:
    return [Route("/exports/{job_id}/{name}", download_export, name="export")]


async def download_export(request: Request[State]) -> Response:
    """GET or HEAD, with a link that is good or the token of who asked for it. What they may see is looked
    at each time: rights that ended since it ran end this, too."""
    result = await _found(request)
    size, tag = result.size_bytes, f'"{result.tag}"'
    headers = {
        "etag": tag,
        "accept-ranges": "bytes",
        "cache-control": "private, no-store",
        "referrer-policy": "no-referrer",
        "content-disposition": disposition(result.name),
        "content-security-policy": "sandbox; default-src 'none'",
        "cross-origin-resource-policy": "same-origin",
        "x-content-type-options": "nosniff",
    }
    known = request.headers.get("if-none-match")
    if known is not None and is_named(known, tag, weakly=True):
        return Response(status_code=304, headers=headers)
    status, start, end = 200, 0, size
    asked = request.headers.get("range") if request.method == "GET" else None
    if asked is not None and request.headers.get("if-range", tag) == tag:
        found = byte_range(asked, size)
        if found is not None:
            status, (start, end) = 206, found
            if start >= end:
                beyond = RangeNotSatisfiable(
                    f"The file has {size} bytes; the range has none of them."
                )
                about = {"etag": tag, "content-range": f"bytes */{size}"}
                return error_response(request.scope, beyond, about)
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    storage = request.state["storage"]
    if request.method == "HEAD":
        for piece in result.pieces[:1]:
            if not await storage.exists(piece.key):
                raise NotStored("The result of this export is not stored here.")
        response = Response(headers=headers, media_type=result.media_type)
        response.headers["content-length"] = headers["content-length"]
        return response
    body = await read_result(storage, result.pieces, start, end)
    return StreamingResponse(body, status, headers, media_type=result.media_type)


async def _found(request: Request[State]) -> Result:
    """Unauthenticated, NotFound, Gone, Forbidden."""
    given, query = request.path_params["job_id"], request.query_params
    job_id = ObjectId(given) if re.fullmatch(r"[0-9a-f]{24}", given) else None
    links = DownloadLinks(request.state["secret_key"], "")
    viewer = None
    if job_id is None or not links.is_good_export(
        job_id, query.get("expires", ""), query.get("signature", "")
    ):
        viewer = await authenticate(request.state["database"], request.headers.get("authorization"))
    if job_id is None or (viewer is not None and Permission.READ not in viewer.scopes):
        raise NotFound("There is no such export, or the link to it is no longer good.")
    name = request.path_params["name"]
    return await result_of(request.state["database"], job_id, name, viewer)
