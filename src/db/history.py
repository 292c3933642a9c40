"""What the names of a model pointed at, at any time: each event that moved one keeps all of them.

So it takes one look into an index, however much has happened since or before.
"""

import heapq
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from bson import ObjectId
from pymongo import UpdateOne

from .base import Row, utc_now
from .connection import Database
from .events import MOVING, EventKind, Stream
from .versions import VersionStatus

AT_ONCE: Final = 1000  # events in one command
OF_VERSIONS: Final = frozenset({EventKind.VERSION_READY.value, EventKind.VERSION_RELEASED.value})


def pointed(model: Row) -> Row:
    """What an event keeps."""
    return {"latest_version_id": model["latest_version_id"], "aliases": model["aliases"]}


def moment(model: Row) -> datetime:
    """When a change of a model happens, of which the row was read in the same transaction: now, but
    after all changes before it, whichever clock those went by. So their times stand in the order of
    their commits."""
    last: datetime = model["updated_at"]
    return max(utc_now(), last + timedelta(milliseconds=1))


# Events of before they kept it -------------------------------------------------------------------


async def fill_pointed(database: Database) -> None:
    """Give the events of older versions what they would have kept. Again, it does the rest."""
    cursor = await database.data["events"].aggregate(
        [{"$match": {**_MOVING, "pointed": None}}, {"$group": {"_id": "$model_id"}}],
        allowDiskUse=True,
    )
    async for row in cursor:
        await _fill(database, row["_id"])


_MOVING: Final[Row] = {
    "stream": Stream.MODELS.value,
    "kind": {"$in": sorted(kind.value for kind in MOVING)},
}


async def _fill(database: Database, model_id: ObjectId) -> None:
    data = database.data
    model = await data["models"].find_one({"_id": model_id})
    if model is None:
        return  # gone with its rows: nobody can ask
    events = await data["events"].find({"model_id": model_id, **_MOVING}).to_list()
    # In the order of their commits; what has no place yet is the newest.
    events.sort(key=lambda event: (event.get("position") or "g", event["_id"]))
    versions = (
        await data["versions"]
        .find({"model_id": model_id}, {"number": 1, "status": 1, "published_at": 1})
        .to_list()
    )
    ready, aliases = _Ready(versions, events), _aliases_before(model, events)
    updates: list[UpdateOne] = []
    for event in events:
        ready.follow(event)
        _follow(aliases, event)
        if event.get("pointed") is None:
            now = {"latest_version_id": ready.latest, "aliases": list(aliases.values())}
            updates.append(UpdateOne({"_id": event["_id"]}, {"$set": {"pointed": now}}))
    for start in range(0, len(updates), AT_ONCE):
        await data["events"].bulk_write(updates[start : start + AT_ONCE], ordered=False)


def _aliases_before(model: Row, events: Sequence[Row]) -> dict[str, Row]:
    """The aliases of before all events, from those of today."""
    found = {entry["name"]: entry for entry in model["aliases"]}
    for event in reversed(events):
        name = (event["after"] or event["before"]).get("name")
        if event["kind"] == EventKind.ALIAS_SET.value and not event["before"]:
            found.pop(name, None)
        elif event["kind"] in (EventKind.ALIAS_SET.value, EventKind.ALIAS_DELETED.value):
            # Nobody knows when it was pointed there, nor by whom.
            found[name] = _entry(event["before"], None, model["created_at"])
    return found


def _follow(aliases: dict[str, Row], event: Row) -> None:
    if event["kind"] == EventKind.ALIAS_SET.value:
        after = event["after"]
        aliases[after["name"]] = _entry(after, event["actor_id"], event["at"])
    elif event["kind"] == EventKind.ALIAS_DELETED.value:
        aliases.pop(event["before"]["name"], None)


def _entry(told: Mapping[str, Any], by: ObjectId | None, at: datetime) -> Row:
    return {
        "name": told["name"],
        "version_id": told["version_id"],
        "protected": told["protected"],
        "set_by_id": by,
        "set_at": at,
    }


class _Ready:
    """The versions that are READY, event after event; each is so once, without a break."""

    def __init__(self, versions: Sequence[Row], events: Sequence[Row]) -> None:
        self._numbers = {row["_id"]: row["number"] for row in versions}
        begun = {e["version_id"] for e in events if e["kind"] in OF_VERSIONS}
        ended = {e["version_id"] for e in events if e["before"].get("status") == _READY}
        self._ready = {
            row["_id"]
            for row in versions
            if row["_id"] not in begun and (row["status"] == _READY or row["_id"] in ended)
        }
        self._highest = [(-self._numbers[each], each) for each in self._ready]
        heapq.heapify(self._highest)

    def follow(self, event: Row) -> None:
        version_id = event["version_id"]
        if event["kind"] in OF_VERSIONS and version_id in self._numbers:
            self._ready.add(version_id)
            heapq.heappush(self._highest, (-self._numbers[version_id], version_id))
        elif event["kind"] in _ENDING:
            self._ready.discard(version_id)

    @property
    def latest(self) -> ObjectId | None:
        while self._highest and self._highest[0][1] not in self._ready:
            heapq.heappop(self._highest)
        return self._highest[0][1] if self._highest else None


_READY: Final = VersionStatus.READY.value
_ENDING: Final = frozenset({EventKind.VERSION_ARCHIVED.value, EventKind.VERSION_DELETED.value})
