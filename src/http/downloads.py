"""`/files/…`: contents of files, with ranges and entity tags, to those who may have them."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial
from typing import Final
from urllib.parse import quote

from bson import ObjectId
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from modelharbor.auth.links import HELD, DownloadLinks
from modelharbor.auth.quarantine import needed_beside
from modelharbor.auth.tokens import authenticate
from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import verdict_of
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import (
    Forbidden,
    NotFound,
    NotStored,
    PreconditionFailed,
    RangeNotSatisfiable,
)
from modelharbor.settings import Settings
from modelharbor.storage.blobs import blob_key

from .answers import error_response
from .budgets import principal_of
from .clients import class_of
from .state import State

_RANGE: Final = re.compile(r"bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE | re.ASCII)
_PEEK: Final = re.compile(r"\s*bytes\s*=\s*-", re.IGNORECASE | re.ASCII)  # at how a file ends
_TAGS: Final = re.compile(r'(W/)?("[\x21\x23-\x7e]*")')
_BEYOND: Final = 10**19  # bytes; no file is so large
PRESIGNED: Final = timedelta(minutes=5)  # to begin; the store lets a download that began end
_UNKEPT: Final = {"cache-control": "private, no-store", "referrer-policy": "no-referrer"}
_PLAIN: Final = re.compile(r"[^A-Za-z0-9._ -]")
# The store has tags and dates of its own: a client would take them along, and be refused there.
_CONDITIONS: Final = ("if-match", "if-range", "if-modified-since", "if-unmodified-since")


def download_routes(settings: Settings) -> list[BaseRoute]:
    return [Route("/files/{file_id}/{name}", download, name="download")]


async def download(request: Request[State]) -> Response:
    """GET or HEAD. Who may not know of the file is told the same as if there were none."""
    file, public, key, viewer = await _found(request)
    size, digest = file["size_bytes"], file["sha256"]
    tag = f'"{digest}"'
    headers = {
        "etag": tag,
        "accept-ranges": "bytes",
        # Caches ask each time, for the permission may have gone; the answer is then a 304.
        "cache-control": "public, no-cache" if public else "private, no-cache",
        "vary": "authorization",
        # Whatever the contents are, no browser shows them as a page of this server.
        "content-disposition": disposition(file["path"]),
        "content-security-policy": "sandbox; default-src 'none'",
        "cross-origin-resource-policy": "same-origin",
        "x-content-type-options": "nosniff",
    }
    about = {name: headers[name] for name in ("etag", "accept-ranges", "cache-control", "vary")}
    expected = request.headers.get("if-match")
    if expected is not None and not is_named(expected, tag, weakly=False):
        await _check_stored(request, key)
        changed = PreconditionFailed("The file is not the one that `If-Match` names.")
        return error_response(request.scope, changed, about)
    known = request.headers.get("if-none-match")
    if known is not None and is_named(known, tag, weakly=True):
        await _check_stored(request, key)
        return Response(status_code=304, headers=headers)

    status, start, end = 200, 0, size
    is_peek = False
    asked = request.headers.get("range") if request.method == "GET" else None
    if asked is not None and request.headers.get("if-range", tag) == tag:
        found = byte_range(asked, size)
        if found is not None:
            status, (start, end) = 206, found
            is_peek = start > 0 and _PEEK.match(asked) is not None
            if start >= end:
                await _check_stored(request, key)
                beyond = RangeNotSatisfiable(
                    f"The file has {size} bytes; the range has none of them."
                )
                about["content-range"] = f"bytes */{size}"
                return error_response(request.scope, beyond, about)
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)

    if request.method == "HEAD":
        await _check_stored(request, key)
        return _without_body(headers)
    usage = request.state["usage"]
    record = partial(
        usage.download,
        {name: file.get(name) for name in ("_id", "model_id", "version_id", "format")},
        class_of(request.headers.get("user-agent", "").encode("latin-1")),
        usage.who(_asking(request, viewer)),
    )
    # Of parts that are fetched side by side, or one after the other, one makes a download.
    is_last = end == size and not is_peek
    elsewhere = await _presigned(request, key)
    if elsewhere is not None:
        record(end - start, is_last=is_last)
        return RedirectResponse(elsewhere, 302, _UNKEPT)
    if key is None:
        raise _not_stored()
    body = await request.state["storage"].open_range(key, start, end)

    def ended(sent: int) -> None:
        if sent or not size:
            record(sent, is_last=is_last and sent == end - start)

    return Contents(body, status, headers, ended)


class Contents(StreamingResponse):
    """Tells in the end how many bytes were sent, also where the client has gone before."""

    def __init__(
        self,
        body: AsyncIterator[bytes],
        status: int,
        headers: dict[str, str],
        ended: Callable[[int], None],
    ) -> None:
        super().__init__(body, status, headers, media_type="application/octet-stream")
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = 0

        async def counted(message: Message) -> None:
            nonlocal sent
            await send(message)
            sent += len(message.get("body", b""))

        try:
            await super().__call__(scope, receive, counted)
        finally:
            self.ended(sent)


def _asking(request: Request[State], viewer: Viewer | None) -> str:
    """A person; of who has not said who they are, the address that budgets go by."""
    if viewer is None or viewer.user_id is None:
        return principal_of(request.scope, None).name
    return f"user:{viewer.user_id}"


async def _presigned(request: Request[State], key: str | None) -> str | None:
    """An address at which the store itself gives the contents; None: we give them.

    Browsers get them from here: the store would not tell them the file's name, nor let a page read it.
    """
    headers = request.headers
    if key is None or not request.state["storage"].presigns:
        return None
    if not request.state["settings"].presigned_downloads:
        return None
    if "text/html" in headers.get("accept", "") or "sec-fetch-mode" in headers:
        return None
    if any(name in headers for name in _CONDITIONS):
        return None
    await _check_stored(request, key)
    return await request.state["storage"].presigned(key, PRESIGNED)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Start and end (not included) of a `Range` header; None: answer with the whole.

    An empty one cannot be satisfied. Several ranges at once are answered with the whole, as
    RFC 9110 allows.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None:
        return None
    first, last = (_number(digits) if digits else None for digits in match.groups())
    if first is not None:
        if last is not None and last < first:
            return None
        return first, size if last is None else min(size, last + 1)
    if last is None:
        return None
    return max(0, size - last), size


def _number(digits: str) -> int:
    """At most _BEYOND: Python refuses to read thousands of digits."""
    digits = digits.lstrip("0")
    return int(digits or 0) if len(digits) < 20 else _BEYOND


def disposition(path: str) -> str:
    """`Content-Disposition` that saves under the file's name: RFC 6266, and plain for old clients."""
    name = path.rpartition("/")[2]
    return (
        f'attachment; filename="{_PLAIN.sub("_", name)}"; '
        f"filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    )


async def _found(request: Request[State]) -> tuple[Row, bool, str | None, Viewer | None]:
    """The file, whether everyone may have it, where its contents lie, when they are stored, and who asks,
    unless that is whoever has the link.
    NotFound, Forbidden, Unauthenticated."""
    database, query = request.state["database"], request.query_params
    gone = NotFound("There is no such file, or the link to it is no longer good.")
    given = request.path_params["file_id"]
    file_id = ObjectId(given) if re.fullmatch(r"[0-9a-f]{24}", given) else None
    links = DownloadLinks(request.state["secret_key"], "")
    viewer = None
    held = query.get(HELD, "")
    if file_id is None or not links.is_good(
        file_id, query.get("expires", ""), query.get("signature", ""), held=held
    ):
        held = ""
        # Before anything is read: a bad token is refused alike whether there is such a file or not.
        viewer = await authenticate(database, request.headers.get("authorization"))
    if file_id is None:
        raise gone
    names = "path size_bytes sha256 version_id model_id format"
    file = await _one(database, "files", file_id, names)
    if file is None or file["path"].rpartition("/")[2] != request.path_params["name"]:
        raise gone
    version, model, blob = await asyncio.gather(
        _one(database, "versions", file["version_id"], "status"),
        _one(database, "models", file["model_id"], "state visibility owner_id grants"),
        database.data["blobs"].find_one(
            {"sha256": file["sha256"]},
            {"sha256": 1, "key": 1, "stored": 1, "damaged_at": 1, "inspection.verdict": 1},
            max_time_ms=database.query_timeout_ms,
        ),
    )
    if version is None or version["status"] == VersionStatus.DELETED.value:
        raise gone
    if model is None or model["state"] == ModelState.DELETED.value:
        raise gone
    key = blob_key(blob) if blob is not None and blob["stored"] else None
    status = VersionStatus(version["status"])
    needed = needed_beside(status, verdict_of(blob))
    public = model["visibility"] == Visibility.PUBLIC.value and needed is None
    permissions = None if viewer is None else viewer.on_model(model)
    if permissions is not None and Permission.READ not in permissions:
        raise gone
    if permissions is not None and Permission.DOWNLOAD not in permissions:
        raise Forbidden("You may see this model, but not download its files.")
    if needed is None or held == needed.value:
        return file, public, key, viewer
    if needed is Permission.PUBLISH:
        raise Forbidden(
            f"The version is {status.value}: its files may do harm. Who may publish it gets a link by `downloadUrl(acceptQuarantined: true)`."
        )
    if needed not in (permissions or ()):
        raise Forbidden(
            "The version is not published, and this file is not known to be harmless: it is for those who may write."
        )
    return file, public, key, viewer


async def _one(database: Database, collection: str, id: ObjectId, names: str) -> Row | None:
    return await database.data[collection].find_one(
        {"_id": id}, dict.fromkeys(names.split(), 1), max_time_ms=database.query_timeout_ms
    )


async def _check_stored(request: Request[State], key: str | None) -> None:
    """NotStored; Unavailable. An answer about contents that are not here would say that they are."""
    if key is None or not await request.state["storage"].exists(key):
        raise _not_stored()


def _not_stored() -> NotStored:
    return NotStored("The contents of this file are not stored here.")


def is_named(header: str, tag: str, *, weakly: bool) -> bool:
    """Whether `If-Match` (not weakly) or `If-None-Match` (weakly) names this tag."""
    return header.strip() == "*" or any(
        found == tag and (weakly or not weak) for weak, found in _TAGS.findall(header)
    )


def _without_body(headers: dict[str, str]) -> Response:
    """The headers of the whole answer: `Response` would say that nothing follows."""
    response = Response(headers=headers, media_type="application/octet-stream")
    response.headers["content-length"] = headers["content-length"]
    return response
