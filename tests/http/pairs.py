"""Two servers on the same data, one with caches and one without: what they answer has to be equal."""

import asyncio
import re
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import pytest
from httpx import ASGITransport, AsyncClient, Response
from starlette.types import Receive, Scope, Send

from modelharbor.app import create_app
from modelharbor.auth.links import DownloadLinks
from modelharbor.db.actors import ActorDocument
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.http.state import State
from modelharbor.resolvers.tokens import issue_token, revoke_token
from modelharbor.settings import Settings
from tests.fuzz.compare import LIMITS
from tests.fuzz.data import Collections, healthy

UNLIMITED: Final = {"budget_anonymous": 0, "budget_token": 0, "budget_operator": 0}
REQUEST_ID: Final = re.compile(rb'"requestId":"[^"]*"')
SCOPES: Final = tuple(each for each in Permission if each is not Permission.OPERATE)
NOBODY: Final = "nobody"
# Logins of tests/fuzz/data.py: ada administers acme, bob is a member of it, cyd operates the site, dan
# maintains it, eve holds grants on single models, zoe has nothing.
TOKENS: Final[dict[str, tuple[str, Sequence[Permission]]]] = {
    "owner": ("ada", SCOPES),
    "member": ("bob", SCOPES),
    "maintainer": ("dan", SCOPES),
    "grantee": ("eve", SCOPES),
    "stranger": ("zoe", SCOPES),
    "operator": ("cyd", tuple(Permission)),
    "owner who reads": ("ada", (Permission.READ,)),
    "owner without READ": ("ada", (Permission.WRITE,)),
    "operator without READ": ("cyd", (Permission.OPERATE,)),
    "member by another token": ("bob", SCOPES),
    "revoked": ("ada", SCOPES),
}
REVOKED: Final = "revoked"


@dataclass(frozen=True)
class Pair:
    cached: AsyncClient
    plain: AsyncClient
    state: State
    """Of the server with caches."""
    tokens: dict[str, str]
    rows: Collections
    database: Database

    @property
    def principals(self) -> list[str]:
        return [NOBODY, *self.tokens, "forged"]

    def headers(self, principal: str) -> dict[str, str]:
        if principal == NOBODY:
            return {}
        if principal == "forged":
            owner = self.tokens["owner"]
            return {"authorization": f"Bearer {owner[:-1]}{'A' if owner[-1] != 'A' else 'B'}"}
        return {"authorization": f"Bearer {self.tokens[principal]}"}

    @property
    def hits(self) -> int:
        return self.state["answers"].count.hits

    async def same(self, told: str, method: str = "POST", **request: Any) -> Response:
        """Both give one answer to a request; the one with caches first."""
        answer = await self.cached.request(method, "/graphql", **request)
        expected = await self.plain.request(method, "/graphql", **request)
        assert without_id(answer) == without_id(expected), told
        return answer

    async def ask(self, principal: str, document: str, **more: Any) -> Response:
        body = {"query": document, **more}
        told = f"{principal}: {document} {more}"
        return await self.same(told, json=body, headers=self.headers(principal))


def without_id(response: Response) -> tuple[int, str, bytes]:
    media = response.headers.get("content-type", "")
    return response.status_code, media, REQUEST_ID.sub(b"", response.content)


def _fixed_link(self: DownloadLinks, file_id: Any, path: str, expires_in: int, **more: Any) -> str:
    return f"http://test/{file_id}/{path}?{expires_in}&{more}"


@asynccontextmanager
async def _client(settings: Settings) -> AsyncIterator[tuple[AsyncClient, State]]:
    app = create_app(settings)
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            copied: MutableMapping[str, Any] = {**scope, "state": dict(state or {})}
            await app(copied, receive, send)

        transport = ASGITransport(with_state)
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client, cast("State", state)


@asynccontextmanager
async def pair(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    """On the healthy data of the fuzzer, with links that do not hang on the time."""
    monkeypatch.setattr(DownloadLinks, "link", _fixed_link)
    rows = healthy()
    for name, found in rows.items():
        await database.data[name].insert_many(found)
    tokens = {}
    for name, (login, scopes) in TOKENS.items():
        user = await ActorDocument.find_one({"login_lower": login})
        assert user is not None
        token, tokens[name] = await issue_token(database, user.id, "test", scopes)
        if name == REVOKED:
            await revoke_token(database, token.id)
    given = {**settings.model_dump(include=settings.model_fields_set), **LIMITS, **UNLIMITED}
    # A machine that is busy with other things is no reason to go by without caches.
    patient = {
        "response_cache": True,
        "cache_timeout_seconds": 5.0,
        "redis_timeout_seconds": 5.0,
    }
    async with AsyncExitStack() as stack:
        without = Settings(**{**given, "response_cache": False})
        plain, _ = await stack.enter_async_context(_client(without))
        # The last one: Beanie's documents are of the client that was opened last, and it takes the writes.
        cached, state = await stack.enter_async_context(_client(Settings(**{**given, **patient})))
        async with asyncio.timeout(60):
            while not await state["freshness"].ready():
                await asyncio.sleep(0.05)
        yield Pair(cached, plain, state, tokens, rows, database)
