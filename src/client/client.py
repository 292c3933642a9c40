"""A connection to a server: operations, subscriptions, and files in both directions."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx
import orjson

from . import documents, exports, live
from .agent import user_agent
from .answers import data_of, failure_of, payload_of, whole
from .downloading import download
from .failures import PASSING, ClientError, Rejected, Unreachable
from .folders import walk
from .patience import Patience, may_pass
from .publishing import (
    Draft,
    find_or_create_draft,
    find_or_create_model,
    findings_of,
    follow,
    publish,
    reason_of,
)
from .records import (
    Exported,
    Exporting,
    File,
    Finding,
    LocalFile,
    Processing,
    Progress,
    Transferred,
    Upload,
    Version,
    Viewer,
    file_of,
    upload_of,
    version_of,
)
from .uploading import upload_files

FIRST_SECONDS: Final = 10.0
"""How long a server is looked for that has never answered: its address may be wrong."""
TIMEOUT: Final = httpx.Timeout(60.0, connect=10.0)
Report = Callable[[Progress], None]


def unheard(progress: Progress) -> None:
    pass


def untold(now: Exporting) -> None:
    pass


class Client:
    """`async with Client("https://models.example", token) as client: …`

    What may pass by itself (no connection, 423, 429, 5xx) is tried again until `patience` seconds
    have brought no progress, then raised as Unreachable or Rejected; every other answer at once.
    """

    def __init__(self, url: str, token: str | None = None, *, patience: float = 300.0) -> None:
        self.url = base_url(url)
        self._token = token
        self._seconds = patience
        self._has_answered = False
        self._http: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        return f"Client({self.url!r})"  # without the token: this ends up in logs

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(
            headers={"user-agent": user_agent()},
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=20),
            verify=ssl.create_default_context(),  # with the authorities of this machine
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    @property
    def http(self) -> httpx.AsyncClient:
        if self._http is None:
            raise RuntimeError("use it as `async with Client(…) as client`")
        return self._http

    def patience(self) -> Patience:
        return Patience(self._seconds if self._has_answered else min(self._seconds, FIRST_SECONDS))

    def authorized(self, url: str) -> dict[str, str]:
        """The headers that prove who asks: for this server alone."""
        if self._token is None or not _is_same_server(url, self.url):
            return {}
        return {"authorization": f"Bearer {self._token}"}

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        again: bool = True,
    ) -> httpx.Response:
        """An answer that is final, whatever it says. `again`: it may be done twice without harm."""
        patience = self.patience()
        while True:
            try:
                async with self.http.stream(
                    method,
                    url,
                    headers={**self.authorized(url), **(headers or {})},
                    content=content,
                ) as found:
                    answer = await whole(found)
            except httpx.TransportError as broken:
                error: ClientError = self.unreachable(broken)
                if not again and not isinstance(broken, httpx.ConnectError | httpx.ConnectTimeout):
                    raise error from None  # it may have been done
            else:
                self._has_answered = True
                if not may_pass(answer.status_code) or (not again and answer.status_code >= 500):
                    return answer
                error = failure_of(answer)
            await patience.wait(error)

    def answered(self) -> None:
        self._has_answered = True

    def unreachable(self, broken: Exception) -> Unreachable:
        why = str(broken) or type(broken).__name__
        return Unreachable(f"{urlsplit(self.url).netloc} does not answer: {why}.")

    # ---- operations

    async def execute(
        self, query: str, variables: Mapping[str, Any] | None = None, *, again: bool | None = None
    ) -> dict[str, Any]:
        """The `data` of a query or mutation. Rejected: its `errors`, or a status of HTTP.

        `again`: that it may be done twice without harm, so that it is sent again where no answer
        came. By default so of queries, and of mutations with an `idempotencyKey`.
        """
        variables = variables or {}
        if again is None:
            given = variables.get("input")
            has_key = isinstance(given, dict) and given.get("idempotencyKey") is not None
            again = has_key or not query.lstrip().startswith("mutation")
        body = orjson.dumps({"query": query, "variables": variables})
        patience = self.patience()
        while True:
            answer = await self.send(
                "POST",
                f"{self.url}/graphql",
                headers={
                    "content-type": "application/json",
                    "accept": "application/graphql-response+json, application/json",
                },
                content=body,
                again=again,
            )
            try:
                return data_of(answer)
            except Rejected as error:
                if not again or error.code not in PASSING:
                    raise
                await patience.wait(error)

    async def mutate(
        self, query: str, input: Mapping[str, Any], *, again: bool | None = None
    ) -> dict[str, Any]:
        """The payload of a mutation of one field and one `$input`. Refused: its `userErrors`."""
        data = await self.execute(query, {"input": input}, again=again)
        return payload_of(data)

    def subscribe(
        self, query: str, variables: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The data of each event; see live.py for how it goes on after a connection broke off."""
        return live.subscribe(
            f"{self.url}/graphql", self._token, query, variables or {}, self._seconds
        )

    # ---- what there is

    async def viewer(self) -> Viewer | None:
        """Who the token belongs to; None: nobody."""
        row = (await self.execute(documents.VIEWER))["viewer"]
        return None if row is None else Viewer(id=row["id"], login=row["login"])

    async def resolve(self, reference: str) -> Version:
        """`owner/name`, `owner/name@alias`, `owner/name:12`. Rejected: NOT_FOUND."""
        row = (await self.execute(documents.RESOLVE, {"ref": reference}))["resolve"]
        if row is None:
            what = f"There is no {reference}"
            if not {"@", ":"} & set(reference):
                what += " with a version that is READY"
            raise Rejected(f"{what}, or it is not yours to see.", "NOT_FOUND")
        return version_of(row)

    async def permissions(self, reference: str) -> frozenset[str] | None:
        """What one may do with the model of a reference; None: there is none that one may see."""
        owner, name = model_name(reference)
        row = (await self.execute(documents.PERMISSIONS, {"owner": owner, "name": name}))["model"]
        return None if row is None else frozenset(row["viewerCan"])

    async def reason(self, version_id: str) -> str | None:
        """Why a version has the status that it has, in a sentence; None: nothing is said."""
        return await reason_of(self, version_id)

    async def version(self, version_id: str) -> Version:
        return version_of(await self._node(documents.VERSION, version_id))

    async def files(self, version_id: str, *, links: bool = False) -> AsyncGenerator[File, None]:
        """All of a version, in order of their paths, read page by page; with `links` to their contents."""
        query = documents.FILES_WITH_LINKS if links else documents.FILES
        async with aclosing(self.pages(query, version_id, "files")) as rows:
            async for row in rows:
                yield file_of(row)

    async def link(self, file_id: str) -> str | None:
        """A new link to a file's contents; None: not for this token."""
        found: str | None = (await self._node(documents.LINK, file_id))["downloadUrl"]
        return found

    async def uploads(self, version_id: str) -> AsyncGenerator[Upload, None]:
        async with aclosing(self.pages(documents.UPLOADS, version_id, "uploads")) as rows:
            async for row in rows:
                yield upload_of(row)

    async def _node(self, query: str, id: str, after: str | None = None) -> dict[str, Any]:
        variables = {"id": id} if after is None else {"id": id, "after": after}
        row: dict[str, Any] | None = (await self.execute(query, variables))["node"]
        if not row:
            raise Rejected("It is gone, or not yours to see.", "NOT_FOUND")
        return row

    async def pages(self, query: str, id: str, field: str) -> AsyncGenerator[dict[str, Any], None]:
        after = None
        while True:
            page = (await self._node(query, id, after))[field]
            for row in page["nodes"]:
                yield row
            if not page["pageInfo"]["hasNextPage"]:
                return
            after = page["pageInfo"]["endCursor"]

    # ---- exports

    async def export(
        self,
        query: str,
        path: Path,
        variables: Mapping[str, Any] | None = None,
        *,
        format: str = "JSONL",
        compression: str = "ZSTD",
        new: bool = False,
        told: Callable[[Exporting], None] = untold,
        report: Report = unheard,
    ) -> Exported:
        """All rows of a query of one connection to a file, by a job of the server.

        Goes on where an earlier process was stopped, unless `new`. The file is there when it is whole.
        """
        return await exports.export(
            self,
            query,
            path,
            variables=variables or {},
            format=format,
            compression=compression,
            new=new,
            told=told,
            report=report,
        )

    async def fetch_export(
        self,
        job_id: str,
        path: Path,
        *,
        told: Callable[[Exporting], None] = untold,
        report: Report = unheard,
    ) -> Exported:
        """What the job of an earlier export has written, or writes, to a file."""
        return await exports.fetch_export(self, job_id, path, told=told, report=report)

    async def cancel_export(self, job_id: str) -> None:
        await exports.cancel_export(self, job_id)

    def stream_export(
        self, query: str, variables: Mapping[str, Any] | None = None, *, format: str = "JSONL"
    ) -> AsyncGenerator[bytes, None]:
        """The same rows straight, JSONL or CSV, as fast as they are taken. ClientError (CUT_OFF): they
        broke off."""
        return exports.stream_export(self, query, variables or {}, format)

    async def stream_to(
        self,
        query: str,
        path: Path,
        variables: Mapping[str, Any] | None = None,
        *,
        format: str = "JSONL",
        report: Callable[[int], None] = lambda size: None,
    ) -> int:
        """The same to a file, which is there when it is whole; answers its bytes."""
        return await exports.stream_to(
            self, query, path, variables=variables or {}, format=format, report=report
        )

    # ---- files and versions

    async def upload_folder(
        self,
        folder: Path,
        reference: str,
        *,
        label: str | None = None,
        visibility: str | None = None,
        new: bool = False,
        parallel: int = 4,
        report: Report = unheard,
        begun: Callable[[Draft], None] = lambda draft: None,
    ) -> tuple[Draft, Transferred]:
        """Send a folder to `owner/name`, which is made where it is missing (PRIVATE, unless
        `visibility` says otherwise).

        Goes on with the version that an earlier process began with this folder, and adds nothing where
        one has the same contents, unless `new`. `publish` is the next step; `begun` is told what is to
        be sent before it is.
        """
        owner, name = model_name(reference)
        viewer = await self.viewer()
        if viewer is None:
            raise Rejected("To send files, the server must know who you are.", "UNAUTHENTICATED")
        files = await asyncio.to_thread(walk, folder)
        model_id = await find_or_create_model(self, owner, name, visibility)
        draft = await find_or_create_draft(
            self, viewer, model_id, files, label=label, new=new, report=report
        )
        begun(draft)
        if draft.is_same:
            return draft, Transferred(len(files), draft.version.size_bytes, 0, len(files))
        sent = await self.upload_files(
            draft.version.id,
            [file for file in files if file.path not in draft.there],
            uploads=draft.uploads,
            hashes=draft.hashes,
            parallel=parallel,
            report=report,
        )
        there = [file for file in files if file.path in draft.there]
        return draft, Transferred(
            len(files),
            sent.size_bytes + sum(file.size_bytes for file in there),
            sent.moved_bytes,
            sent.skipped_files + len(there),
        )

    async def publish(
        self, version: Version, aliases: Sequence[str] = ()
    ) -> tuple[Version, str | None]:
        """A version whose files are there; with the id of the job that processes it, if there is one."""
        return await publish(self, version, aliases)

    def follow(
        self, version_id: str, job_id: str | None = None
    ) -> AsyncGenerator[Processing, None]:
        """How far the server is with what was published; the last one has the version's final status."""
        return follow(self, version_id, job_id)

    async def findings(self, version_id: str) -> list[Finding]:
        """What keeps a version from being READY."""
        return await findings_of(self, version_id)

    async def upload_files(
        self,
        version_id: str,
        files: Sequence[LocalFile],
        *,
        uploads: Iterable[Upload] = (),
        hashes: Mapping[str, str] | None = None,
        parallel: int = 4,
        report: Report = unheard,
    ) -> Transferred:
        """Send these to a version that takes files; see uploading.py."""
        return await upload_files(
            self,
            version_id,
            files,
            uploads=uploads,
            hashes=hashes or {},
            parallel=parallel,
            report=report,
        )

    async def download(
        self,
        version: Version,
        folder: Path,
        *,
        include: Sequence[str] = (),
        parallel: int = 4,
        report: Report = unheard,
    ) -> Transferred:
        """Fill a folder with the files of a version; see downloading.py."""
        return await download(
            self, version, folder, include=include, parallel=parallel, report=report
        )


def base_url(url: str) -> str:
    """Without what follows the place of the server. ClientError: it is no address."""
    try:
        parts = urlsplit(url.strip())
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or brackets that do not close
        is_good = False
    if not is_good or parts.username is not None or parts.query or parts.fragment:
        raise ClientError(
            "The address of a server is such as https://models.example or http://127.0.0.1:8000.",
            "BAD_INPUT",
        )
    path = parts.path.rstrip("/").removesuffix("/graphql")
    return f"{parts.scheme}://{parts.netloc}{path}"


def model_name(reference: str) -> tuple[str, str]:
    """Of `owner/name`. ClientError: it is something else."""
    owner, slash, name = reference.partition("/")
    if not owner or not slash or name in ("", ".", "..") or set(name) & set("/:@"):
        raise ClientError("A model is named as owner/name.", "BAD_INPUT")
    return owner, name


def _is_same_server(url: str, base: str) -> bool:
    one, other = urlsplit(url), urlsplit(base)
    return (one.scheme, one.netloc.lower()) == (other.scheme, other.netloc.lower())
