"""What the names of models pointed at, at a time: from the log of events, see db/history.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from bson import ObjectId

from modelharbor.cache.tags import Tag, entity
from modelharbor.db.base import Row
from modelharbor.db.versions import VersionStatus

from .base import Loader, Reads, Sharing
from .models import alias_rows
from .told import by_key

LAST: Final[list[Row]] = [
    {"$sort": {"at": -1, "_id": -1}},
    {"$limit": 1},
    {"$project": {"_id": 0, "pointed": 1}},
]


@dataclass(frozen=True, slots=True)
class Names:
    """Of one model."""

    aliases: list[Row]
    latest_version_id: ObjectId | None
    is_told: bool
    """By the log; False: there is nothing in it from before that time."""


async def names_at(
    reads: Reads, model_ids: Sequence[ObjectId], at: datetime
) -> dict[ObjectId, Names]:
    """In one command, however many events there are. Before the log began, what stands in the model
    and was set by then is known, and no more."""
    told: Row = {"at": {"$lte": at}, "pointed": {"$type": "object"}}
    rows = await reads.database.aggregate(
        "models",
        [
            {"$match": {"_id": {"$in": list(model_ids)}}},
            {"$project": {"aliases": 1}},
            {
                "$lookup": {
                    "from": "events",
                    "localField": "_id",
                    "foreignField": "model_id",
                    "pipeline": [{"$match": told}, *LAST],
                    "as": "told",
                }
            },
        ],
    )
    return {row["_id"]: _names(row, at) for row in rows}


def _names(row: Row, at: datetime) -> Names:
    if row["told"]:
        pointed = row["told"][0]["pointed"]
        return Names(pointed["aliases"], pointed["latest_version_id"], True)
    by_then = at.astimezone(UTC).replace(tzinfo=None)
    return Names([each for each in row["aliases"] if each["set_at"] <= by_then], None, False)


async def latest_at(
    reads: Reads, model_ids: Sequence[ObjectId], at: datetime
) -> dict[ObjectId, ObjectId]:
    """The latest versions of models of which the log does not tell: of those that are READY today the
    last one that was made, and published, by then."""
    published: Row = {
        "created_at": {"$lte": at},
        "published_at": {"$lte": at},
        "status": VersionStatus.READY.value,
    }
    rows = await reads.database.aggregate(
        "models",
        [
            {"$match": {"_id": {"$in": list(model_ids)}}},
            {"$project": {"_id": 1}},
            {
                "$lookup": {
                    "from": "versions",
                    "localField": "_id",
                    "foreignField": "model_id",
                    "pipeline": [
                        {"$match": published},
                        {"$sort": {"created_at": -1, "_id": -1}},
                        {"$limit": 1},
                        {"$project": {"_id": 1}},
                    ],
                    "as": "latest",
                }
            },
        ],
    )
    return {row["_id"]: row["latest"][0]["_id"] for row in rows if row["latest"]}


async def versions_at(
    reads: Reads, model_ids: Sequence[ObjectId], alias: str | None, at: datetime
) -> list[ObjectId]:
    """Where an alias pointed in these models; without one, the latest version. Those that did not have
    it are left out."""
    names = await names_at(reads, model_ids, at)
    if alias is not None:
        return [
            a["version_id"] for each in names.values() for a in each.aliases if a["name"] == alias
        ]
    found = [each.latest_version_id for each in names.values()]
    untold = [model_id for model_id, each in names.items() if not each.is_told]
    if untold:
        found += (await latest_at(reads, untold, at)).values()
    return [version_id for version_id in found if version_id is not None]


class AliasesByModelLoader(Loader[ObjectId, list[Row], datetime | None]):
    """The aliases of models that were reached, at a time; None: now. Without those that pointed at
    versions that are deleted today."""

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[ObjectId]) -> list[list[Row]]:
        at = self.arguments
        if at is None:
            rows = await self.find("models", {"_id": {"$in": keys}}, ["aliases"])
            now = {row["_id"]: alias_rows(row["_id"], row["aliases"]) for row in rows}
            return [now.get(key, []) for key in keys]
        names = await names_at(self.reads, keys, at)
        found = {key: alias_rows(key, each.aliases) for key, each in names.items()}
        pointed = list({alias["version_id"] for each in found.values() for alias in each})
        listed = {"_id": {"$in": pointed}, "status": {"$ne": VersionStatus.DELETED.value}}
        there = (
            {row["_id"] for row in await self.find("versions", listed, ["_id"])} if pointed else ()
        )
        return [
            [{**alias, "as_of": at} for alias in found.get(key, ()) if alias["version_id"] in there]
            for key in keys
        ]

    def tags(self, keys: Sequence[ObjectId], found: Mapping[ObjectId, Any]) -> list[Tag]:
        # The model is written to by whatever adds to its history, also where a version is deleted.
        versions = {alias["version_id"] for key in keys for alias in found[key]}
        return [*by_key("models", keys), *(entity("versions", each) for each in versions)]
