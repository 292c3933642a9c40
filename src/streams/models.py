"""What happens to models, and how a list of them changes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final

from bson import ObjectId

from modelharbor.db.base import Row
from modelharbor.db.events import EventKind, Stream
from modelharbor.db.keyset import Window
from modelharbor.db.models import ModelState
from modelharbor.errors import NotFound
from modelharbor.events.changes import MODELS, Change, Topic, What, events_about, events_of
from modelharbor.loaders.base import ROOT, Reads, Sharing
from modelharbor.loaders.models import ModelPageLoader

from .base import Follower, Happening, Source

PACE_SECONDS: Final = 0.5  # between two looks at a list


@dataclass(frozen=True, slots=True)
class ModelEvents(Source):
    """Events of models: of some, of those of one owner, of some kinds; None: of all."""

    model_ids: tuple[ObjectId, ...] | None = None
    owner: str | None = None  # login, in lower case
    kinds: frozenset[str] | None = None

    sharing = Sharing.EQUAL_RIGHTS

    @property
    def stream(self) -> str:
        models = ",".join(map(str, self.model_ids)) if self.model_ids is not None else "*"
        kinds = ",".join(sorted(self.kinds)) if self.kinds is not None else "*"
        return f"modelEvents/{models}/{kinds}/{'*' if self.owner is None else f'={self.owner}'}"

    @property
    def topics(self) -> tuple[Topic, ...]:
        if self.model_ids is not None:
            return tuple(events_about(model_id) for model_id in self.model_ids)
        return (events_of(Stream.MODELS),)

    @property
    def query(self) -> Row:
        query: Row = {"stream": Stream.MODELS.value}
        if self.model_ids is not None:
            query["about"] = {"$in": list(self.model_ids)}
        if self.kinds is not None:
            query["kind"] = {"$in": sorted(self.kinds)}
        return query

    async def check(self, reads: Reads) -> None:
        if self.owner is not None and await self.owner_id(reads) is None:
            raise NotFound("There is no such person or organization.")
        # One that was deleted is still followed by those who could see it: they may not have been
        # told yet.
        if self.model_ids is not None and await _seen(reads, self.model_ids) != set(self.model_ids):
            raise NotFound("There is no such model.")

    async def owner_id(self, reads: Reads) -> ObjectId | None:
        rows = await reads.database.find(
            "actors", {"login_lower": self.owner}, projection={"_id": 1}
        )
        found: ObjectId | None = rows[0]["_id"] if rows else None
        return found

    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        rights = set(reads.viewer.principals)
        told = [
            change
            for change in changes
            if change.what is What.EVENT
            and self.names(change.row)
            and not rights.isdisjoint(change.row["principals"])
        ]
        if told and self.owner is not None:
            owner_id = await self.owner_id(reads)
            told = [change for change in told if owner_id in change.row["about"]]
        if not told:
            return []
        # They could see it when it happened; whether they still may, the model says.
        seen = await _seen(reads, {change.row["model_id"] for change in told})
        return [
            Happening(change.position, change.row)
            for change in told
            if change.row["model_id"] in seen
        ]

    def names(self, event: Row) -> bool:
        return (
            event["stream"] == Stream.MODELS.value
            and event["model_id"] is not None
            and (self.model_ids is None or event["model_id"] in self.model_ids)
            and (self.kinds is None or event["kind"] in self.kinds)
        )

    def follow(self) -> "ModelEventsFollower":
        return ModelEventsFollower(self)


async def _seen(reads: Reads, model_ids: Collection[ObjectId]) -> set[ObjectId]:
    """Those that the viewer may see; of those that are gone, the ones that they could see until then."""
    rows = await reads.database.find(
        "models", {"_id": {"$in": list(model_ids)}}, projection={"principals": 1, "state": 1}
    )
    seen_by = {
        row["_id"]: row["principals"] for row in rows if row["state"] != ModelState.DELETED.value
    }
    gone = [model_id for model_id in model_ids if model_id not in seen_by]
    if gone:
        seen_by |= await _seen_until_gone(reads, gone)
    rights = set(reads.viewer.principals)
    return {
        model_id for model_id, principals in seen_by.items() if not rights.isdisjoint(principals)
    }


async def _seen_until_gone(reads: Reads, model_ids: list[ObjectId]) -> dict[ObjectId, list[str]]:
    """The principals of models when they were deleted, for the last time; one command. Without such
    an event nobody is known to have seen it."""
    events = {"from": "events", "localField": "_id", "foreignField": "about"}
    deletion: Row = {"kind": EventKind.MODEL_DELETED.value}
    shown: Row = {"$project": {"principals": 1}}
    # By the order of commits. It is the order of an index, so no more of a long history is read than
    # its end; what has no place yet is later, and little.
    placed = [{"$match": deletion}, {"$sort": {"position": -1}}, {"$limit": 1}, shown]
    latest = [{"$match": {**deletion, "position": None}}, shown]
    rows = await reads.database.aggregate(
        None,
        [
            {"$documents": [{"_id": model_id} for model_id in model_ids]},
            {"$lookup": {**events, "pipeline": placed, "as": "placed"}},
            {"$lookup": {**events, "pipeline": latest, "as": "latest"}},
        ],
    )
    return {
        row["_id"]: deleted["principals"]
        for row in rows
        for deleted in [*row["placed"], *sorted(row["latest"], key=itemgetter("_id"))]
    }


class ModelEventsFollower(Follower):
    def __init__(self, source: ModelEvents) -> None:
        self.source = source

    async def begin(self, reads: Reads, position: str) -> None:
        """There is nothing to read: events stand for themselves."""

    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return await self.source.of_events(reads, changes)


@dataclass(frozen=True, slots=True)
class ModelsChanged(Source):
    """A page of models, from the first one on, and how it changes."""

    window: Window

    sharing = Sharing.EQUAL_RIGHTS
    pace = PACE_SECONDS

    @property
    def stream(self) -> str:
        return "modelsChanged"

    @property
    def topics(self) -> tuple[Topic, ...]:
        return (MODELS,)

    @property
    def query(self) -> None:
        return None

    async def check(self, reads: Reads) -> None:
        """Everybody may watch what they may see."""

    async def of_events(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        return []

    def follow(self) -> "ModelsChangedFollower":
        return ModelsChangedFollower(self)


class ModelsChangedFollower(Follower):
    """Reads the page anew and compares."""

    def __init__(self, source: ModelsChanged) -> None:
        self.source = source
        self.edges: dict[ObjectId, Row] = {}
        self.now: Happening | None = None

    async def begin(self, reads: Reads, position: str) -> None:
        page = await self.page(reads)
        self.stand(position, page, self.edges_of(page))

    async def happenings(self, reads: Reads, changes: Sequence[Change]) -> list[Happening]:
        page = await self.page(reads)
        before, after = self.edges, self.edges_of(page)
        added = [edge for edge in after.values() if _is_elsewhere(edge, before)]
        removed = [_id for _id, edge in before.items() if _is_elsewhere(edge, after)]
        updated = [
            edge["node"]
            for _id, edge in after.items()
            if not _is_elsewhere(edge, before) and edge["node"] != before[_id]["node"]
        ]
        if not (added or removed or updated):
            return []
        position = changes[-1].position
        self.stand(position, page, after)
        return [Happening(position, _row(page, after, added, updated, removed))]

    def standing(self) -> Happening | None:
        return self.now

    async def page(self, reads: Reads) -> Row:
        found: Row = await reads.loader(ModelPageLoader, self.source.window).load(ROOT)
        return found

    def edges_of(self, page: Row) -> dict[ObjectId, Row]:
        """By id, in the order of the list."""
        window = self.source.window
        return {
            row["_id"]: {"cursor": window.cursor(row), "node": row, "search": window.search}
            for row in page["nodes"]
        }

    def stand(self, position: str, page: Row, edges: dict[ObjectId, Row]) -> None:
        self.edges = edges
        self.now = Happening(position, _row(page, edges, list(edges.values()), [], []))


def _is_elsewhere(edge: Row, others: dict[ObjectId, Row]) -> bool:
    """Whether it has no such place among the others."""
    other = others.get(edge["node"]["_id"])
    return other is None or other["cursor"] != edge["cursor"]


def _row(
    page: Row,
    edges: dict[ObjectId, Row],
    added: list[Row],
    updated: list[Row],
    removed: list[ObjectId],
) -> Row:
    return {
        "added": added,
        "updated": updated,
        "removed": removed,
        "order": list(edges),
        "total": page["total"],
    }
