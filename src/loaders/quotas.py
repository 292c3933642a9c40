"""What owners store, and what they may."""

import asyncio

from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.models import ModelState
from modelharbor.errors import Forbidden, NotFound

from .base import Loader

_DELETED = ModelState.DELETED.value


def may_see_storage(viewer: Viewer, owner_id: ObjectId) -> bool:
    """Oneself, the members of an organization, and operators."""
    return viewer.operates or owner_id == viewer.reads_as or owner_id in viewer.belongs


class StorageByOwnerLoader(Loader[tuple[ObjectId, str], Row | None, None]):
    """What the models of owners come to, by their counters; None for who may not know.

    The key is (owner id, login in lower case).
    """

    async def batch_load(self, keys: list[tuple[ObjectId, str]]) -> list[Row | None]:
        wanted = [key for key in keys if may_see_storage(self.reads.viewer, key[0])]
        if not wanted:
            return [None for _ in keys]
        sums, quotas = await asyncio.gather(
            self.reads.database.aggregate(
                "models",
                [
                    {"$match": {"owner_login_lower": {"$in": [login for _, login in wanted]}}},
                    {
                        "$group": {
                            "_id": {"owner": "$owner_id", "gone": {"$eq": ["$state", _DELETED]}},
                            "logical": {"$sum": "$stats.size_bytes"},
                            "stored": {"$sum": "$stats.stored_bytes"},
                        }
                    },
                ],
            ),
            self.find("quotas", {"_id": {"$in": [owner_id for owner_id, _ in wanted]}}),
        )
        there = {row["_id"].get("owner"): row for row in sums if not row["_id"]["gone"]}
        gone = {row["_id"].get("owner"): row for row in sums if row["_id"]["gone"]}
        by_owner = {row["_id"]: row for row in quotas}
        found = {
            key: self.usage(there.get(key[0], {}), gone.get(key[0], {}), by_owner.get(key[0], {}))
            for key in wanted
        }
        return [found.get(key) for key in keys]

    def usage(self, there: Row, gone: Row, quota: Row) -> Row:
        limit = quota.get("limit_bytes")
        return {
            "logical_bytes": there.get("logical", 0),
            "stored_bytes": there.get("stored", 0),
            "reclaimable_bytes": gone.get("stored", 0),
            "reserved_bytes": quota.get("reserved_bytes", 0),
            "quota_bytes": self.reads.quota_bytes if limit is None else limit,
        }


class StorageByLoginLoader(Loader[str, Row, str | None]):
    """Of one owner, by login in lower case; None: of the viewer. Raises where it may not be known."""

    async def batch_load(self, keys: list[str]) -> list[Row]:
        viewer, login = self.reads.viewer, self.arguments
        user_id = viewer.person_id()
        owner = viewer.user
        if login is not None and (owner is None or owner["login_lower"] != login):
            rows = await self.find("actors", {"login_lower": login}, ["login_lower"])
            owner = rows[0] if rows else None
        if owner is None:
            raise NotFound("There is no such person or organization.")
        key = owner["_id"], owner["login_lower"]
        found = await self.reads.loader(StorageByOwnerLoader, None).load(key)
        if found is None:
            raise Forbidden(
                "This needs a token with the scope READ."
                if owner["_id"] == user_id
                else "What is stored is for its owner, members of the organization, and operators."
            )
        return [found for _ in keys]
