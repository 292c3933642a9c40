"""The application in this process, with a small schema that notes which of its resolvers ran."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import strawberry
from httpx import ASGITransport, AsyncClient, Response
from starlette.types import Receive, Scope, Send

from modelharbor.app import create_app
from modelharbor.context import Info
from modelharbor.errors import Forbidden
from modelharbor.schema.directives import Cost
from modelharbor.settings import Settings

SECRET = "mongodb://admin:hunter2@db.internal/"
ran: list[str] = []
"""Names of the resolvers that ran since `serving` began."""


@strawberry.enum
class Shade(Enum):
    DARK = "dark"
    LIGHT = "light"


@strawberry.type
class Item:
    name: str = "item"

    @strawberry.field
    def child(self) -> "Item":
        ran.append("child")
        return Item()

    @strawberry.field
    def items(self, first: int | None = None, last: int | None = None) -> "ItemConnection":
        ran.append("items")
        return ItemConnection()


@strawberry.type
class PageInfo:
    has_next_page: bool = False


@strawberry.type
class ItemEdge:
    cursor: str = "c"
    node: Item = field(default_factory=Item)


@strawberry.type
class ItemConnection:
    nodes: list[Item] = field(default_factory=list)
    edges: list[ItemEdge] = field(default_factory=list)
    page_info: PageInfo = field(default_factory=PageInfo)
    total_count: int = strawberry.field(default=0, directives=[Cost(weight=5)])


PER_SHADE = (Cost(weight=10, multipliers=["shades"]),)
BOTH = [Shade.DARK, Shade.LIGHT]


def resolve_shaded(shades: list[Shade]) -> list[Item]:
    ran.append("shaded")
    return []


def resolve_shadow(shades: list[Shade] = BOTH) -> int:
    ran.append("shadow")
    return len(shades)


def resolve_dear() -> int:
    ran.append("dear")
    return 7


@strawberry.type
class Query:
    cancelled: ClassVar[list[str]] = []

    @strawberry.field
    def hello(self, name: str = "you") -> str:
        ran.append("hello")
        return f"Hello {name}"

    @strawberry.field
    def item(self) -> Item:
        ran.append("item")
        return Item()

    @strawberry.field
    def items(self, first: int | None = None, last: int | None = None) -> ItemConnection:
        ran.append("items")
        return ItemConnection()

    @strawberry.field
    def by_ids(self, ids: list[strawberry.ID]) -> list[Item]:
        ran.append("by_ids")
        return []

    @strawberry.field
    def text(self, size: int) -> str:
        ran.append("text")
        return "x" * size

    @strawberry.field
    async def cached(self, info: Info) -> bool:
        ran.append("cached")
        return await info.context.cache.get("mh:test") is not None

    shaded: list[Item] = strawberry.field(resolver=resolve_shaded, directives=PER_SHADE)
    shadow: int = strawberry.field(resolver=resolve_shadow, directives=PER_SHADE)
    dear: int = strawberry.field(resolver=resolve_dear, directives=[Cost(weight=7)])

    @strawberry.field
    async def stored(self, info: Info) -> int | None:
        ran.append("stored")
        count: int = await info.context.database.data["models"].count_documents(
            {}, maxTimeMS=info.context.settings.query_timeout_ms
        )
        return count

    @strawberry.field
    async def awaited(self, info: Info) -> int | None:
        """Longer than its `maxTimeMS`."""
        rows = await info.context.database.data.aggregate(
            [
                {"$documents": [{"a": {"$range": [0, 100_000]}, "b": {"$range": [0, 1000]}}]},
                {"$unwind": "$a"},
                {"$unwind": "$b"},
                {"$count": "n"},
            ],
            maxTimeMS=1,
        )
        return len(await rows.to_list())

    @strawberry.field
    async def slow(self) -> str | None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            Query.cancelled.append("slow")
            raise
        return "done"

    @strawberry.field
    def broken(self) -> str | None:
        raise RuntimeError(f"cannot reach {SECRET}")

    @strawberry.field
    def broken_items(self) -> list["BrokenItem"]:
        return [BrokenItem() for _ in range(50)]

    @strawberry.field
    def needed(self) -> str:
        raise RuntimeError(SECRET)

    @strawberry.field
    def forbidden(self) -> str | None:
        raise Forbidden("Not yours.")

    @strawberry.field
    def too_large(self) -> int | None:
        return 2**40


@strawberry.type
class BrokenItem:
    @strawberry.field
    def name(self) -> str | None:
        raise RuntimeError(SECRET)


@strawberry.type
class Mutation:
    @strawberry.mutation
    def write(self) -> str:
        ran.append("write")
        return "written"


schema = strawberry.Schema(Query, Mutation)


@dataclass(frozen=True)
class Server:
    client: AsyncClient

    async def ask(self, query: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
        return await self.client.post(
            "/graphql", json={"query": query, **more}, headers=headers or {}
        )

    async def post(self, body: bytes | AsyncIterator[bytes], **headers: str) -> Response:
        """A body as it is; JSON by its header."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(
            "/graphql", content=body, headers={"content-type": "application/json", **named}
        )


@asynccontextmanager
async def serving(
    settings: Settings, served: strawberry.Schema | None = schema
) -> AsyncIterator[Server]:
    ran.clear()
    Query.cancelled.clear()
    app = create_app(settings, served)
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            copied: MutableMapping[str, Any] = {**scope, "state": dict(state or {})}
            await app(copied, receive, send)

        transport = ASGITransport(with_state)
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield Server(client)


def codes(response: Response) -> list[str]:
    return [error["extensions"]["code"] for error in response.json()["errors"]]
