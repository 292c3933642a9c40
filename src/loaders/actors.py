"""People and organizations, and who belongs where."""

from collections.abc import Mapping, Sequence
from typing import Any

from bson import ObjectId

from modelharbor.cache.tags import Tag
from modelharbor.db.actors import ActorDocument, MembershipDocument
from modelharbor.db.base import Row
from modelharbor.db.tokens import TokenDocument

from .base import Loader, Sharing
from .pages import PageLoader, Total
from .rows import RowByIdLoader
from .told import below_each, by_key


class ActorByIdLoader(RowByIdLoader):
    """Rows that say by `__typename` which type of the schema they are."""

    collection, document = "actors", ActorDocument
    always = frozenset({"_id", "kind"})
    sharing, is_told = Sharing.EVERYBODY, True

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        found = await super().batch_load(keys)
        return [row and {**row, "__typename": row["kind"]} for row in found]


class ViewerLoader(Loader[str, Row | None, None]):
    """Who asks; None for nobody. Authentication has read the row."""

    document = ActorDocument

    async def batch_load(self, keys: list[str]) -> list[Row | None]:
        return [self.reads.viewer.user for _ in keys]


class MembershipByIdLoader(RowByIdLoader):
    """Memberships of organizations that the viewer belongs to."""

    collection, document = "memberships", MembershipDocument

    def base(self) -> Row:
        return {"organization_id": {"$in": list(self.reads.viewer.belongs)}}


class MembersByOrganizationLoader(PageLoader[ObjectId]):
    """Members, for those who are members; for others the list is empty."""

    collection, parent, document = "memberships", "organization_id", MembershipDocument
    is_told = True

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        mine = [key for key in keys if key in self.reads.viewer.belongs]
        found = dict(zip(mine, await super().batch_load(mine), strict=True)) if mine else {}
        return [found.get(key) or self.empty(key) for key in keys]

    def empty(self, key: ObjectId) -> Row:
        return {**self.page(key, []), "total": Total(self.collection, key, known=0)}


class OrganizationsByUserLoader(PageLoader[ObjectId]):
    """The organizations of people, as far as the viewer belongs to them too.

    These are few: all are read for all people, and the pages cut here.
    """

    collection, document = "actors", ActorDocument

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        shared = {
            "user_id": {"$in": keys},
            "organization_id": {"$in": list(self.reads.viewer.belongs)},
        }
        memberships = await self.find("memberships", shared, ["user_id", "organization_id"])
        found: dict[ObjectId, list[ObjectId]] = {key: [] for key in keys}
        for row in memberships:
            found[row["user_id"]].append(row["organization_id"])
        ids = list({each for listed in found.values() for each in listed})
        rows = await self.find("actors", {"_id": {"$in": ids}}) if ids else []
        by_id = {row["_id"]: {**row, "__typename": row["kind"]} for row in rows}
        return [self.cut(key, [by_id[each] for each in found[key]]) for key in keys]

    def tags(self, keys: Sequence[ObjectId], found: Mapping[ObjectId, Any]) -> list[Tag]:
        shown = {row["_id"] for key in keys for row in found[key]["nodes"]}
        return [*below_each("memberships", "user_id", keys), *by_key("actors", shown)]

    def cut(self, key: ObjectId, rows: list[Row]) -> Row:
        """One page of the rows, by id."""
        window = self.arguments
        between = [
            row
            for row in sorted(rows, key=lambda row: row["_id"], reverse=window.direction < 0)
            if (window.after is None or row["_id"] > window.after.id)
            and (window.before is None or row["_id"] < window.before.id)
        ]
        page = self.page(key, between[: window.limit + 1])
        return {**page, "total": Total("actors", key, known=len(rows))}


class TokenByIdLoader(RowByIdLoader):
    """The viewer's own tokens."""

    collection, document = "tokens", TokenDocument

    def base(self) -> Row:
        return {"user_id": self.reads.viewer.reads_as, "revoked_at": None}


class TokensByUserLoader(PageLoader[ObjectId]):
    """Tokens that are not revoked, for their owner only; for others None."""

    collection, parent, document = "tokens", "user_id", TokenDocument

    def base(self) -> Row:
        return {"revoked_at": None}

    async def batch_load(self, keys: list[ObjectId]) -> list[Row | None]:
        mine = self.reads.viewer.reads_as
        if mine is None or mine not in keys:
            return [None for _ in keys]
        [found] = await super().batch_load([mine])
        return [found if key == mine else None for key in keys]
