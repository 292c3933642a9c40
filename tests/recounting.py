"""Use of models for tests, and answers about it counted anew from the raw events in plain Python."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final
from zoneinfo import ZoneInfo

from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.files import FileFormat
from modelharbor.db.metrics import Dimension, Granularity, Metric
from modelharbor.db.models import Grant, ModelDocument, ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.usage import UsageKind, latency_of, latency_step
from modelharbor.settings import Settings
from tests.documents import insert_actor, insert_model, row_of, viewer_of
from tests.usage import insert_usage, roll_up, usage

CLIENTS: Final = ("browser", "python", "curl", "bot")
FORMATS: Final = (FileFormat.GGUF.value, FileFormat.SAFETENSORS.value)
OPERATIONS: Final = ("0123456789abcdef:Page", "0123456789abcdee:Page", "fedcba9876543210:", "other")


@dataclass
class World:
    """Models of every kind, who may see them, and what happened."""

    models: dict[str, ModelDocument] = field(default_factory=dict)
    viewers: dict[str, Viewer] = field(default_factory=dict)
    events: list[Row] = field(default_factory=list)

    def seen_by(self, viewer: Viewer) -> dict[ObjectId, ModelDocument]:
        """The models that a viewer may read, by who they are and not by principals."""
        return {each.id: each for each in self.models.values() if _may_read(viewer, each)}


def _may_read(viewer: Viewer, model: ModelDocument) -> bool:
    if model.state is ModelState.DELETED:
        return False
    if model.visibility is Visibility.PUBLIC:
        return True
    if viewer.user is None or Permission.READ not in viewer.scopes:
        return False
    if model.visibility is Visibility.INTERNAL:
        return True
    mine = {viewer.user["_id"], *viewer.roles}
    return not mine.isdisjoint({model.owner_id, *(grant.actor_id for grant in model.grants)})


async def make_world(database: Database) -> World:
    world = World()
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    people = {login: await insert_actor(login) for login in ("ann", "bob", "eve")}
    boss = await insert_actor("boss", is_operator=True)
    world.viewers = {
        "nobody": ANONYMOUS,
        "ann": viewer_of(people["ann"]),
        "bob": viewer_of(people["bob"], {acme.id: Role.VIEWER}),
        "eve": viewer_of(people["eve"]),
        "boss": Viewer(user=row_of(boss), scopes=frozenset(Permission)),
        "no-scope": Viewer(user=row_of(people["ann"]), scopes=frozenset()),
    }
    granted = [Grant(actor_id=people["eve"].id, role=Role.VIEWER)]
    kinds: dict[str, Row] = {
        "public": {"task": "text", "library": "torch", "license": "mit"},
        "public-2": {"task": "image", "library": "torch"},
        "bare": {},
        "internal": {"visibility": Visibility.INTERNAL, "task": "text", "license": "mit"},
        "private": {"visibility": Visibility.PRIVATE, "task": "secret", "library": "own"},
        "granted": {"visibility": Visibility.PRIVATE, "task": "text", "grants": granted},
        "archived": {"state": ModelState.ARCHIVED, "task": "old"},
        "deleted": {"state": ModelState.DELETED, "task": "gone"},
        "deleted-private": {"state": ModelState.DELETED, "visibility": Visibility.PRIVATE},
    }
    for name, values in kinds.items():
        world.models[name] = await insert_model(acme, name, **values)
    world.models["mine"] = await insert_model(
        people["ann"], "mine", visibility=Visibility.PRIVATE, task="text"
    )
    return world


def random_events(world: World, random: Random, begin: datetime, end: datetime, n: int) -> None:
    """Of every kind, within the time."""
    models = list(world.models.values())
    versions = {model.id: [ObjectId() for _ in range(2)] for model in models}
    files = {each: [ObjectId() for _ in range(2)] for some in versions.values() for each in some}
    seconds = int((end - begin).total_seconds())
    for _ in range(n):
        at = begin + timedelta(seconds=random.randrange(seconds))
        model = random.choice(models)
        version = random.choice(versions[model.id])
        file = random.choice(files[version])
        what: Row = {"model": model.id, "version": version, "file": file}
        what["format"] = FORMATS[int(str(file)[-1], 16) % 2]
        client = random.choice(CLIENTS)
        match random.randrange(9):
            case 0 | 1 | 2:
                whole = random.random() < 0.7
                world.events.append(
                    usage(
                        UsageKind.DOWNLOAD,
                        at,
                        **what,
                        client=client,
                        count=int(whole),
                        bytes=random.randrange(10**6),
                        who=random.randrange(40) * 10**16,
                    )
                )
            case 3:
                world.events.append(
                    usage(UsageKind.UPLOAD, at, **what, bytes=random.randrange(10**9))
                )
            case 4:
                world.events.append(
                    usage(UsageKind.VIEW, at, model=model.id, client=client, count=3)
                )
            case 5:
                count = random.choice((1, 1, -1))
                world.events.append(usage(UsageKind.LIKE, at, model=model.id, count=count))
            case 6:
                changed = {"bytes": random.randrange(-100, 1000), "stored": random.randrange(500)}
                world.events.append(usage(UsageKind.STORAGE, at, model=model.id, **changed))
            case 7:
                kind = random.choice((UsageKind.MODEL, UsageKind.VERSION))
                more = {"version": version} if kind is UsageKind.VERSION else {}
                world.events.append(usage(kind, at, model=model.id, **more))
                spent = random.randrange(1024 * 60) / 1024
                world.events.append(usage(UsageKind.JOB, at, model=model.id, seconds=spent))
            case _:
                took = [random.lognormvariate(2, 1.5) for _ in range(random.randrange(1, 5))]
                world.events.append(
                    usage(
                        UsageKind.OPERATION,
                        at,
                        operation=random.choice(OPERATIONS),
                        client=client,
                        count=len(took),
                        errors=random.randrange(2),
                        total_ms=round(sum(took) * 1024) / 1024,
                        latencies=histogram(took),
                        cost=random.randrange(50),
                        commands=random.randrange(9),
                        batches=2,
                        keys=random.randrange(30),
                        hits=random.randrange(len(took) + 1),
                        took=took,
                    )
                )


def histogram(took: Iterable[float]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for each in took:
        found[str(latency_step(each))] += 1
    return dict(found)


async def record(database: Database, settings: Settings, world: World, now: datetime) -> None:
    """All events, and what they add up to."""
    await insert_usage(
        database,
        [{name: value for name, value in each.items() if name != "took"} for each in world.events],
    )
    await roll_up(database, settings, now=now)


# ---- the recount

_OF_EVENT: Final[dict[Metric, tuple[UsageKind, Callable[[Row], Any]]]] = {
    Metric.DOWNLOADS: (UsageKind.DOWNLOAD, lambda e: e["count"]),
    Metric.EGRESS_BYTES: (UsageKind.DOWNLOAD, lambda e: e["bytes"]),
    Metric.UPLOADS: (UsageKind.UPLOAD, lambda e: e["count"]),
    Metric.INGRESS_BYTES: (UsageKind.UPLOAD, lambda e: e["bytes"]),
    Metric.VIEWS: (UsageKind.VIEW, lambda e: e["count"]),
    Metric.LIKES: (UsageKind.LIKE, lambda e: e["count"]),
    Metric.STORAGE_BYTES: (UsageKind.STORAGE, lambda e: e["bytes"]),
    Metric.STORED_BYTES_AFTER_DEDUP: (UsageKind.STORAGE, lambda e: e["stored"]),
    Metric.NEW_MODELS: (UsageKind.MODEL, lambda e: e["count"]),
    Metric.NEW_VERSIONS: (UsageKind.VERSION, lambda e: e["count"]),
    Metric.JOB_SECONDS: (UsageKind.JOB, lambda e: e["seconds"]),
    Metric.API_REQUESTS: (UsageKind.OPERATION, lambda e: e["count"]),
    Metric.API_ERRORS: (UsageKind.OPERATION, lambda e: e["errors"]),
}
LEVELS: Final = (Metric.STORAGE_BYTES, Metric.STORED_BYTES_AFTER_DEDUP)


def label(at: datetime, zone: ZoneInfo, granularity: Granularity) -> tuple[Any, ...]:
    """What a clock on the wall says of the bucket that a moment is in."""
    local = at.astimezone(zone)
    match granularity:
        case Granularity.MINUTE:
            return (local.date(), local.hour, local.minute, local.utcoffset())
        case Granularity.HOUR:
            return (local.date(), local.hour, local.utcoffset())
        case Granularity.DAY:
            return (local.date(),)
        case Granularity.WEEK:
            return local.isocalendar()[:2]
        case Granularity.MONTH:
            return (local.year, local.month)


def value_of(dimension: Dimension, event: Row, models: dict[ObjectId, ModelDocument]) -> str:
    if dimension is Dimension.OWNER:
        return str(models[event["model"]].owner_id)
    if dimension in (Dimension.TASK, Dimension.LIBRARY, Dimension.LICENSE):
        return getattr(models[event["model"]], dimension.value.lower()) or ""
    return str(event.get(dimension.value.lower(), ""))


def recount(
    events: Sequence[Row],
    models: dict[ObjectId, ModelDocument],
    metric: Metric,
    group_by: Sequence[Dimension],
    zone: ZoneInfo,
    granularity: Granularity,
    starts: Sequence[datetime],
) -> dict[tuple[str, ...], list[Any]]:
    """By group what each bucket holds, of those that begin then: numbers, or all people, or all
    latencies."""
    labels = {label(start, zone, granularity): number for number, start in enumerate(starts)}
    assert len(labels) == len(starts)
    listed = metric in (Metric.UNIQUE_DOWNLOADERS, Metric.API_P95_MS)
    found: dict[tuple[str, ...], list[Any]] = {}
    for event in events:
        if metric is Metric.UNIQUE_DOWNLOADERS:
            if event["kind"] != UsageKind.DOWNLOAD.value or not event["count"]:
                continue
            value: Any = [event["who"]]
        elif metric is Metric.API_P95_MS:
            if event["kind"] != UsageKind.OPERATION.value:
                continue
            value = event["took"]
        else:
            kind, read = _OF_EVENT[metric]
            if event["kind"] != kind.value:
                continue
            value = read(event)
        if "model" in event and event["model"] not in models:
            continue
        at = event["at"]
        number = labels.get(label(at, zone, granularity))
        if metric in LEVELS and at < starts[0]:
            number = -1
        if number is None:
            continue
        group = tuple(value_of(each, event, models) for each in group_by)
        cells = found.setdefault(group, [[] if listed else 0 for _ in range(len(starts) + 1)])
        cells[number + 1] += value
    for cells in found.values():
        before = cells.pop(0)
        if metric in LEVELS:
            for number, change in enumerate(cells):
                before += change
                cells[number] = before
    return found


def p95(took: Sequence[float]) -> float:
    """The upper end of the step that the 95th of 100 is in."""
    if not took:
        return 0.0
    ordered = sorted(took)
    return latency_of(latency_step(ordered[-(-95 * len(ordered) // 100) - 1]))


def aware(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC)
