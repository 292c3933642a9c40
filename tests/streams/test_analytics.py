"""Changes of use, as they are told: each once, to those who may read it, whenever they come back."""

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorDocument, Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.metrics import Metric
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.db.usage import UsageKind
from modelharbor.errors import BadUserInput, CursorExpired, Forbidden
from modelharbor.events.cursors import encode
from modelharbor.execution.subscribing import Subscription
from modelharbor.loaders.base import Reads
from modelharbor.schema import analytics_changes
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from modelharbor.streams import analytics
from tests.documents import insert_actor, insert_model, viewer_of
from tests.execution.test_live import Noted, World, until, world_of
from tests.usage import insert_usage, roll_up, usage

pytestmark = pytest.mark.anyio
FOLLOW = """subscription A(
  $metrics: [Metric!]! $groupBy: [Dimension!] $filter: ModelFilter $interval: Int = 0 $after: Cursor
) {
  analytics(
    metrics: $metrics groupBy: $groupBy filter: $filter intervalSeconds: $interval after: $after
  ) { cursor metric isOther value at group { dimension value } }
}"""
DOWNLOADS = ["DOWNLOADS"]
HOUR = 3600


@pytest.fixture
async def world(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """Where what changes is told at once."""
    monkeypatch.setattr(analytics_changes, "SHORTEST_SECONDS", 0)
    async with world_of(database, settings) as world:
        yield world


async def model_of(owner: ActorDocument, name: str, **values: Any) -> ModelDocument:
    return await insert_model(owner, name, **{"visibility": Visibility.PUBLIC, **values})


def download(model: ModelDocument, count: int = 1, **values: Any) -> Row:
    at = datetime.now(UTC) - timedelta(seconds=1)
    return usage(UsageKind.DOWNLOAD, at, model=model.id, count=count, bytes=10 * count, **values)


async def used(world: World, *events: Row) -> None:
    """Recorded, and added up in a run of its own."""
    await insert_usage(world.database, events)
    await roll_up(world.database, world.settings)


def events_of(sink: Noted) -> list[Row]:
    assert [each for each in sink.told if "errors" in each] == []
    return [each["data"]["analytics"] for each in sink.told]


def values_of(sink: Noted) -> list[tuple[str, float]]:
    """Of one dimension."""
    return [
        ("other" if each["isOther"] else each["group"][0]["value"], each["value"])
        for each in events_of(sink)
    ]


def sums_of(events: Iterable[Row]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for each in events:
        found[each["metric"], *(of["value"] for of in each["group"])] += each["value"]
    return found


async def level(world: World, run: int | None = None) -> int:
    """Back when all who follow know the last run; answers it."""
    state = await world.database.data["rollup_state"].find_one()
    last = run if run is not None else (state["run"] if state else 0)

    def known() -> bool:
        followers = [group.follower for group in world.live.groups.values()]
        return all(
            isinstance(each, analytics.AnalyticsFollower) and each.run >= last for each in followers
        ) and not any(group.changes for group in world.live.groups.values())

    await until(known)
    return last


async def test_what_came_is_added_up_and_told_by_group(world: World) -> None:
    ada = await insert_actor("owner")
    first = await model_of(ada, "first", task="text-generation")
    second = await model_of(ada, "second")
    await used(world, download(first, 40))
    sink, _ = await world.follow(FOLLOW, metrics=["DOWNLOADS", "LIKES"], groupBy=["MODEL", "TASK"])
    before = utc_now()
    await used(
        world,
        download(first, 2, client="python"),
        download(first, 1, client="curl"),
        download(second, 7),
        usage(UsageKind.LIKE, datetime.now(UTC), model=second.id, count=-1),
        usage(UsageKind.VIEW, datetime.now(UTC), model=second.id),
    )
    await sink.until(3)
    events = events_of(sink)
    ids = global_id("Model", first.id), global_id("Model", second.id)
    assert [(each["metric"], each["value"], each["isOther"]) for each in events] == [
        ("DOWNLOADS", 7.0, False),
        ("DOWNLOADS", 3.0, False),
        ("LIKES", -1.0, False),
    ]
    assert [[of["value"] for of in each["group"]] for each in events] == [
        [ids[1], ""],
        [ids[0], "text-generation"],
        [ids[1], ""],
    ]
    assert [of["dimension"] for of in events[0]["group"]] == ["MODEL", "TASK"]
    assert all(
        datetime.fromisoformat(each["at"]) >= before.replace(microsecond=0) for each in events
    )
    assert len({each["cursor"] for each in events}) == 3


async def test_a_run_is_read_once_however_many_follow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = analytics._deltas

    async def counted(found: Reads, *given: Any) -> list[Row]:
        reads.append(given[:2])
        return await read(found, *given)

    monkeypatch.setattr(analytics, "_deltas", counted)
    owner = await insert_actor("owner")
    model = await model_of(owner, "model")
    sinks = [(await world.follow(FOLLOW, metrics=DOWNLOADS))[0]]
    sinks.append((await world.follow(FOLLOW, viewer_of(owner), metrics=DOWNLOADS))[0])
    sinks.append((await world.follow(FOLLOW, metrics=["VIEWS", "DOWNLOADS"]))[0])
    assert len(world.live.groups) == 3
    run = await level(world)
    await used(world, download(model, 5))
    for sink in sinks:
        await sink.until(1)
        assert [each["value"] for each in events_of(sink)] == [5.0]
    assert reads == [(run, run + 1)]


async def test_equal_ones_share_a_follower_and_who_joins_begins_with_now(world: World) -> None:
    owner = await insert_actor("owner")
    model = await model_of(owner, "model")
    first, _ = await world.follow(FOLLOW, metrics=DOWNLOADS, interval=HOUR)
    await used(world, download(model, 1))
    await first.until(1)  # nothing was told in the hour before
    await used(world, download(model, 10))
    await level(world)
    assert [each["value"] for each in events_of(first)] == [1.0]
    second, _ = await world.follow(FOLLOW, metrics=DOWNLOADS, interval=HOUR)
    # What was added up until then is the first one's alone, and told so that both stand at one place.
    await first.until(2)
    assert [each["value"] for each in events_of(first)] == [1.0, 10.0]
    await used(world, download(model, 100))
    await level(world)
    third, _ = await world.follow(FOLLOW, metrics=DOWNLOADS, interval=HOUR)
    await second.until(1)
    assert [each["value"] for each in events_of(first)] == [1.0, 10.0, 100.0]
    assert [each["value"] for each in events_of(second)] == [100.0]
    assert third.told == []
    assert len(world.live.groups) == 1


async def test_what_waits_is_told_when_its_time_has_come(world: World) -> None:
    model = await model_of(await insert_actor("owner"), "model")
    sink, _ = await world.follow(FOLLOW, metrics=DOWNLOADS, interval=1)
    for count in (1, 10, 100):
        await used(world, download(model, count))
    await until(lambda: sum(each["value"] for each in events_of(sink)) == 111)


async def test_who_was_told_a_part_is_told_the_rest(world: World) -> None:
    owner = await insert_actor("owner")
    models = [await model_of(owner, f"model-{number}") for number in range(3)]
    asked: dict[str, Any] = {"metrics": ["DOWNLOADS", "EGRESS_BYTES"], "groupBy": ["MODEL"]}
    sink, subscription = await world.follow(FOLLOW, **asked)
    await used(world, download(models[0], 9))
    await sink.until(2)
    start = sink.cursor
    # Two runs come to one part.
    subscription.close()
    await used(world, *(download(model, 1 + place) for place, model in enumerate(models)))
    await used(world, download(models[1], 5))
    whole, subscription = await world.follow(FOLLOW, **asked, after=start)
    subscription.close()
    assert len(whole.told) == 6
    await used(world, download(models[2], 100))
    part = events_of(whole)
    for told in range(7):
        after = part[told - 1]["cursor"] if told else start
        sink, subscription = await world.follow(FOLLOW, **asked, after=after)
        subscription.close()
        rest = events_of(sink)
        if told:
            assert rest[: 6 - told] == part[told:]
        assert sums_of([*part[:told], *rest]) == {
            (metric, global_id("Model", models[place].id)): count * times
            for place, count in enumerate((1, 7, 103))
            for metric, times in (("DOWNLOADS", 1), ("EGRESS_BYTES", 10))
        }


async def test_what_is_told_is_the_difference_of_the_rows(world: World) -> None:
    """Two follow, of whom one sees less; they go and come back, with all that they were told last or
    with less, and some of what happens is late or recorded twice."""
    random = Random(7)
    owner = await insert_actor("owner")
    models = [await model_of(owner, f"model-{number}") for number in range(4)]
    models.append(await model_of(owner, "secret", visibility=Visibility.PRIVATE))
    viewers = {"owner": viewer_of(owner), "other": world.user}
    asked: dict[str, Any] = {
        "metrics": ["DOWNLOADS", "EGRESS_BYTES", "LIKES"],
        "groupBy": ["MODEL"],
    }
    told: dict[str, list[Row]] = {"owner": [], "other": []}
    here: dict[str, tuple[Noted, Subscription]] = {}

    async def come(name: str) -> None:
        after = told[name][-1]["cursor"] if told[name] else None
        here[name] = await world.follow(FOLLOW, viewers[name], **asked, after=after)

    async def go(name: str) -> None:
        """Without having seen some of the last."""
        sink, subscription = here.pop(name)
        subscription.close()
        events = events_of(sink)
        told[name] += events[
            : random.randint(0 if told[name] else min(1, len(events)), len(events))
        ]

    await used(world, *(download(model, 1000, client="bot") for model in models))
    before = await totals(world.database, models)
    for name in viewers:
        await come(name)
    # Whoever leaves before they were told anything has no cursor to come back with.
    await used(world, *(download(model, 1, client="ci") for model in models))
    for sink, _ in here.values():
        await sink.until(2)
    late: list[Row] = []
    for _ in range(10):
        events = [
            random_event(random, random.choice(models)) for _ in range(random.randrange(1, 6))
        ]
        await used(world, *events, *late)
        late = random.sample(events, k=min(2, len(events)))  # recorded once more
        for name in viewers:
            if name in here and random.random() < 0.4:
                await go(name)
            elif name not in here and random.random() < 0.7:
                await come(name)
    for name in viewers:
        if name not in here:
            await come(name)
    await level(world)
    after = await totals(world.database, models)
    for name, (sink, _) in here.items():
        seen = models if name == "owner" else models[:-1]
        ids = {global_id("Model", model.id) for model in seen}
        expected = {
            key: after[key] - before[key]
            for key in after
            if key[1] in ids and after[key] != before[key]
        }
        found = sums_of([*told[name], *events_of(sink)])
        assert {key: value for key, value in found.items() if value} == expected
        assert len(expected) > 8


def random_event(random: Random, model: ModelDocument) -> Row:
    at = datetime.now(UTC) - timedelta(minutes=random.choice((0, 0, 1, 40, 300)))
    client = random.choice(("python", "curl", "browser"))
    if random.random() < 0.3:
        return usage(UsageKind.LIKE, at, model=model.id, count=random.choice((1, 1, -1)))
    count = random.randrange(3)
    return usage(
        UsageKind.DOWNLOAD,
        at,
        model=model.id,
        count=count,
        bytes=random.randrange(99),
        client=client,
    )


async def totals(database: Database, models: Iterable[ModelDocument]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    query = {"cuboid": "model", "model": {"$in": [model.id for model in models]}}
    async for row in database.data["rollup_days"].find(query):
        for metric in ("downloads", "egress_bytes", "likes"):
            found[metric.upper(), global_id("Model", row["model"])] += row.get(metric, 0)
    return found


async def test_who_gets_more_rights_is_told_more_from_then_on(world: World) -> None:
    owner = await insert_actor("owner")
    secret = await model_of(owner, "secret", visibility=Visibility.PRIVATE)
    public = await model_of(owner, "public")
    asked: dict[str, Any] = {"metrics": DOWNLOADS, "groupBy": ["MODEL"]}
    sink, subscription = await world.follow(FOLLOW, **asked)
    await used(world, download(secret, 5), download(public, 1))
    await sink.until(1)
    more: Viewer = replace(world.user, roles={owner.id: Role.VIEWER})
    await world.live.renew(subscription, more)
    await used(world, download(secret, 3))
    await sink.until(2)
    await world.live.renew(subscription, replace(more, roles={}))
    await used(world, download(secret, 100), download(public, 2))
    await sink.until(3)
    ids = [global_id("Model", model.id) for model in (public, secret, public)]
    assert values_of(sink) == list(zip(ids, (1.0, 3.0, 2.0), strict=True))


async def test_only_models_that_a_filter_names_are_counted(world: World) -> None:
    owner = await insert_actor("owner")
    small = await model_of(owner, "small", tags=["small"])
    large = await model_of(owner, "large", tags=["large"])
    sink, _ = await world.follow(
        FOLLOW, ANONYMOUS, metrics=DOWNLOADS, filter={"tags": {"hasAny": ["small"]}}
    )
    await used(world, download(small, 2), download(large, 8))
    await sink.until(1)
    assert [each["value"] for each in events_of(sink)] == [2.0]
    await used(world, download(large, 8))
    await used(world, download(small, 1))
    await sink.until(2)
    assert [each["value"] for each in events_of(sink)] == [2.0, 1.0]


async def test_owners_are_told_with_what_they_are(world: World) -> None:
    owner = await insert_actor("owner")
    model = await model_of(owner, "model")
    text = """subscription { analytics(metrics: [DOWNLOADS], groupBy: [OWNER], intervalSeconds: 0) {
      value group { value node { id ... on User { login } } } } }"""
    sink, _ = await world.follow(text)
    await used(world, download(model, 4))
    await sink.until(1)
    id = global_id("User", owner.id)
    assert events_of(sink) == [
        {"value": 4.0, "group": [{"value": id, "node": {"id": id, "login": "owner"}}]}
    ]


async def test_beyond_so_many_groups_are_told_together(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics, "MOST_GROUPS", 2)
    owner = await insert_actor("owner")
    models = [await model_of(owner, f"model-{number}") for number in range(4)]
    ids = [global_id("Model", model.id) for model in models]
    sink, _ = await world.follow(FOLLOW, metrics=DOWNLOADS, groupBy=["MODEL"])
    await used(world, *(download(model, 1 + place) for place, model in enumerate(models)))
    await sink.until(3)
    assert values_of(sink) == [(ids[3], 4.0), (ids[2], 3.0), ("other", 3.0)]
    assert events_of(sink)[2]["group"] == []


async def test_beyond_so_many_groups_are_held_together(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analytics, "MOST_HELD", 1)
    owner = await insert_actor("owner")
    models = [await model_of(owner, f"model-{number}") for number in range(3)]
    asked: dict[str, Any] = {"metrics": DOWNLOADS, "groupBy": ["MODEL"]}
    sink, _ = await world.follow(FOLLOW, **asked)
    await used(world, *(download(model, 2) for model in models))
    await sink.until(2)
    assert [each["isOther"] for each in events_of(sink)] == [False, True]
    assert [each["value"] for each in events_of(sink)] == [2.0, 4.0]


async def test_the_api_is_for_operators(world: World) -> None:
    asked: dict[str, Any] = {"metrics": ["API_REQUESTS", "API_ERRORS"], "groupBy": ["OPERATION"]}
    with pytest.raises(Forbidden):
        await world.follow(FOLLOW, **asked)
    assert world.live.groups == {}
    actor = await insert_actor("operator", is_operator=True)
    operator = replace(viewer_of(actor), scopes=frozenset(Permission))
    sink, _ = await world.follow(FOLLOW, operator, **asked)
    model = await model_of(await insert_actor("owner"), "model")
    at = datetime.now(UTC)
    calls = {"operation": "0123456789abcdef:Trending", "client": "browser", "latencies": {"3": 6}}
    await used(
        world, usage(UsageKind.OPERATION, at, count=6, errors=1, **calls), download(model, 3)
    )
    await sink.until(2)
    assert [(each["metric"], each["value"]) for each in events_of(sink)] == [
        ("API_REQUESTS", 6.0),
        ("API_ERRORS", 1.0),
    ]
    assert values_of(sink)[0][0] == "0123456789abcdef:Trending"


async def test_a_cursor_is_good_for_a_day_and_for_the_same_question(world: World) -> None:
    source = analytics.Analytics((Metric.DOWNLOADS,), (), None, 5)
    seconds = int(datetime.now(UTC).timestamp())

    def cursor(age: int, sequence: int = 0) -> str:
        position = f"{seconds - age:08x}{0:016x}"
        return encode(source.stream, position, sequence)

    with pytest.raises(CursorExpired, match="kept for 1 days"):
        await world.follow(FOLLOW, metrics=DOWNLOADS, after=cursor(86_400 + 60))
    with pytest.raises(BadUserInput, match="no cursor of this subscription"):
        await world.follow(FOLLOW, metrics=["VIEWS"], after=cursor(10))
    model = await model_of(await insert_actor("owner"), "model")
    await used(world, download(model, 3))
    sink, _ = await world.follow(FOLLOW, metrics=DOWNLOADS, interval=60, after=cursor(86_000))
    assert [each["value"] for each in events_of(sink)] == [3.0]


async def test_a_server_that_is_behind_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cursor is of a run that this process has not heard of."""
    model = await model_of(await insert_actor("owner"), "model")
    sink, subscription = await world.follow(FOLLOW, metrics=DOWNLOADS)
    run = await level(world)
    await used(world, download(model, 1))
    await sink.until(1)
    subscription.close()
    position = world.reader.position
    source = analytics.Analytics((Metric.DOWNLOADS,), (), None, 0)
    ahead = encode(source.stream, position, analytics.through(run + 2))
    back, _, joining = world.resume(FOLLOW, metrics=DOWNLOADS, after=ahead)
    await used(world, download(model, 10))  # the run that the cursor is of
    await joining
    await used(world, download(model, 100))
    await back.until(1)
    assert [each["value"] for each in events_of(back)] == [100.0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"metrics": []}, "0 metrics"),
    ({"metrics": ["UNIQUE_DOWNLOADERS"]}, "UNIQUE_DOWNLOADERS does not add up"),
    ({"metrics": ["API_P95_MS"]}, "API_P95_MS does not add up"),
    ({"metrics": ["VIEWS", "API_REQUESTS"]}, "apart"),
    ({"metrics": ["VIEWS", "VIEWS"]}, "twice"),
    ({"metrics": ["VIEWS"], "groupBy": ["FILE"]}, "cannot be grouped by FILE"),
    ({"metrics": ["VIEWS"], "groupBy": ["OPERATION"]}, "cannot be grouped by OPERATION"),
    ({"metrics": DOWNLOADS, "groupBy": ["MODEL", "FILE", "CLIENT"]}, "2 at most"),
    ({"metrics": DOWNLOADS, "groupBy": ["MODEL", "MODEL"]}, "twice"),
    ({"metrics": DOWNLOADS, "interval": -1}, "it takes 0 to 3600"),
    ({"metrics": DOWNLOADS, "interval": 3601}, "it takes 0 to 3600"),
    ({"metrics": ["API_REQUESTS"], "filter": {"tags": {"hasAny": ["a"]}}}, "not about models"),
    ({"metrics": DOWNLOADS, "after": "nonsense"}, "no cursor"),
]


async def test_what_cannot_be_told_is_refused(world: World) -> None:
    for asked, message in REFUSED:
        with pytest.raises(BadUserInput, match=message):
            await world.follow(FOLLOW, **asked)
    assert world.live.groups == {}
