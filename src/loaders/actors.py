"""People and organizations, and who belongs where."""

from collections.abc import Sequence

from bson import ObjectId

from modelharbor.db.actors import ActorDocument, MembershipDocument
from modelharbor.db.base import Row
from modelharbor.db.conditions import NOTHING
from modelharbor.db.keyset import Filter
from modelharbor.db.tokens import TokenDocument

from .base import Loader
from .pages import PageLoader, Total
from .rows import RowByIdLoader


class ActorByIdLoader(RowByIdLoader):
    """Rows that say by `__typename` which type of the schema they are."""

    collection, document = "actors", ActorDocument
    always = frozenset({"_id", "kind"})

    async def batch_load(self, keys: list[ObjectId]) -> Sequence[Row | Exception | None]:
        found = await super().batch_load(keys)
        return [
            row and {**row, "__typename": row["kind"]}
            for row in found
            if not isinstance(row, Exception)
        ]


class ActorByLoginLoader(Loader[str, Row | None, None]):
    """By login, in any case."""

    document = ActorDocument

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        lower = {key: key.lower() for key in keys}
        rows = await self.find("actors", {"login_lower": {"$in": list(lower.values())}})
        by_login = {row["login_lower"]: {**row, "__typename": row["kind"]} for row in rows}
        return [by_login.get(lower[key]) for key in keys]


class ViewerLoader(Loader[str, Row | None, None]):
    """Who asks; None for nobody. Authentication has read the row."""

    document = ActorDocument

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        return [self.reads.viewer.user for _ in keys]


class MembershipByIdLoader(RowByIdLoader):
    """Memberships of organizations that the viewer belongs to, and the viewer's own."""

    collection, document = "memberships", MembershipDocument

    def base(self) -> Row:
        return {"organization_id": {"$in": list(self.reads.viewer.roles)}}


class MembersByOrganizationLoader(PageLoader[ObjectId]):
    """Members, for those who are members; for others the list is empty."""

    collection, parent, document = "memberships", "organization_id", MembershipDocument

    async def batch_load(self, keys: list[ObjectId]) -> Sequence[Row | Exception | None]:
        mine = [key for key in keys if key in self.reads.viewer.roles]
        found = dict(zip(mine, await super().batch_load(mine), strict=True)) if mine else {}
        return [found.get(key) or self.empty(key) for key in keys]

    def empty(self, key: ObjectId) -> Row:
        return {**self.page(key, []), "total": Total(self.collection, query=Filter(NOTHING))}


class OrganizationsByUserLoader(PageLoader[ObjectId]):
    """The organizations of people, as far as the viewer belongs to them too."""

    collection, document = "actors", ActorDocument

    async def batch_load(self, keys: list[ObjectId]) -> Sequence[Row | Exception | None]:
        shared = {
            "user_id": {"$in": keys},
            "organization_id": {"$in": list(self.reads.viewer.roles)},
        }
        found = await self.find("memberships", shared, ["user_id", "organization_id"])
        return [await self._page(key, found) for key in keys]

    async def _page(self, user_id: ObjectId, memberships: list[Row]) -> Row:
        ids = [row["organization_id"] for row in memberships if row["user_id"] == user_id]
        query = {"_id": {"$in": ids}}
        page = self.page(user_id, await self.one(query))
        return {
            **page,
            "nodes": [{**row, "__typename": row["kind"]} for row in page["nodes"]],
            "total": Total("actors", query=Filter(query)),
        }


class TokenByIdLoader(RowByIdLoader):
    """The viewer's own tokens."""

    collection, document = "tokens", TokenDocument

    def base(self) -> Row:
        return {"user_id": self.reads.viewer.user_id, "revoked_at": None}


class TokensByUserLoader(PageLoader[ObjectId]):
    """Tokens that are not revoked, for their owner only; for others None."""

    collection, parent, document = "tokens", "user_id", TokenDocument

    def base(self) -> Row:
        return {"revoked_at": None}

    async def batch_load(self, keys: list[ObjectId]) -> Sequence[Row | Exception | None]:
        mine = self.reads.viewer.user_id
        found = await super().batch_load([mine]) if mine in keys and mine is not None else [None]
        return [found[0] if key == mine else None for key in keys]
